"""The config object of the Hugging Face tutorial "Train a diffusion model", in native words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eclosion.config.dialect import Dialect, Translation
from eclosion.errors import ConfigError, did_you_mean

__all__ = ["DIALECT"]

# The tutorial's settings, with the values that it gives them.
DEFAULTS: dict[str, Any] = {
    "image_size": 128,
    "train_batch_size": 16,
    "eval_batch_size": 16,
    "num_epochs": 50,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_warmup_steps": 500,
    "save_image_epochs": 10,
    "save_model_epochs": 30,
    "mixed_precision": "fp16",
    "output_dir": "ddpm-butterflies-128",
    "push_to_hub": True,
    "hub_model_id": None,
    "hub_private_repo": None,
    "overwrite_output_dir": True,
    "seed": 0,
    "dataset_name": None,
}
# Enough to know the dialect by, whatever is misspelt beside them.
SIGNS = {"train_batch_size", "num_epochs", "output_dir", "save_image_epochs", "save_model_epochs", "image_size"}
HUB = ("push_to_hub", "hub_model_id", "hub_private_repo")


def recognises(settings: Mapping[str, Any]) -> bool:
    """Whether at least two of the tutorial's own words stand at the top, and none of the native ones."""
    return len(SIGNS & set(settings)) >= 2 and not {"data", "output"} & set(settings)


def translate(settings: Mapping[str, Any]) -> Translation:
    """The tutorial's training run: its network, its preprocessing, its schedule, and a pipeline in output_dir."""
    unknown = sorted(set(settings) - set(DEFAULTS))
    if unknown:
        raise ConfigError([f"{key} is not a setting of the tutorial.{did_you_mean(key, DEFAULTS)}" for key in unknown])
    s = {**DEFAULTS, **settings}
    source, notes = _source(s["dataset_name"]), _hub_notes(s)
    numbers = ("train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "num_epochs")
    wrong = [f"{key} must be a whole number, at least 1, not {s[key]!r}." for key in numbers if not _is_count(s[key])]
    if wrong:
        raise ConfigError(wrong)
    tree = {
        "output": str(s["output_dir"]),
        "overwrite": s["overwrite_output_dir"],
        "export": "ddpm",
        "seed": s["seed"],
        "data": {
            "source": source,
            "image_size": s["image_size"],
            "resize": "stretch",
            "interpolation": "bilinear",
            "horizontal_flip": True,
        },
        "task": {
            "name": "unconditional",
            "model": {"name": "diffusers", "class_name": "UNet2DModel", "preset": "tutorial"},
            "noise_schedule": "linear",
            "prediction_type": "epsilon",
        },
        "train": {
            "duration": f"{s['num_epochs']} epochs",
            "batch_size": s["train_batch_size"] * s["gradient_accumulation_steps"],
            "micro_batch_size": s["train_batch_size"],
            "mixed_precision": s["mixed_precision"] or "no",
            "max_grad_norm": 1.0,
        },
        "optimizer": {
            "learning_rate": s["learning_rate"],
            "lr_schedule": "cosine",
            "lr_warmup_steps": s["lr_warmup_steps"],
        },
        "ema": {"decays": []},
        "sample": {"every": f"{s['save_image_epochs']} epochs", "num_images": s["eval_batch_size"], "seed": s["seed"]},
        "checkpoint": {"every": f"{s['save_model_epochs']} epochs"},
    }
    return Translation(tree, tuple(notes))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _source(dataset_name: object) -> dict[str, Any]:
    """A folder of images is read as one; anything else goes to the datasets library, as in the tutorial."""
    if dataset_name is None:
        return {"name": "dataset"}  # stands for the one given to train(); refused when there is none
    path = Path(str(dataset_name))
    packed = (
        "*.parquet",
        "*.arrow",
        "dataset_info.json",
        "dataset_dict.json",
        "data/*.parquet",
        "*.jsonl",
        "*/*.arrow",
    )
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in packed):
        return {"name": "folder", "root": str(path)}
    return {"name": "huggingface", "path": str(dataset_name)}


def _hub_notes(settings: Mapping[str, Any]) -> list[str]:
    if not settings["push_to_hub"]:
        return []
    return ["push_to_hub is accepted and has no effect yet: nothing is uploaded. Use huggingface_hub on output_dir."]


DIALECT = Dialect(recognises, translate)
