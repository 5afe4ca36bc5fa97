"""The config object of the Hugging Face tutorial "Train a diffusion model", in native words."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from eclosion.config.dialect import Dialect, Translation
from eclosion.config.explain import checked, left_out, without_unknown
from eclosion.config.hub import check_repo_name
from eclosion.errors import ConfigError
from eclosion.registry import part

__all__ = ["DIALECT", "TutorialConfig"]

Count = Annotated[int, Field(ge=1)]


@part
class TutorialConfig:
    """The tutorial's settings, with the values that it gives them."""

    # Height and width of the images in pixels; images are stretched to it.
    image_size: Count = 128
    # Images per forward pass.
    train_batch_size: Count = 16
    # Images in a grid of samples.
    eval_batch_size: Count = 16
    # Passes over the data.
    num_epochs: Count = 50
    # Forward passes per optimizer step.
    gradient_accumulation_steps: Count = 1
    # Learning rate after warm-up; then it falls to 0 as a cosine.
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    # Optimizer steps over which the learning rate rises from 0.
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 500
    # Epochs between two grids of samples.
    save_image_epochs: Count = 10
    # Epochs between two checkpoints.
    save_model_epochs: Count = 30
    # Precision of the network's arithmetic.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = "fp16"
    # Folder of the run; the finished pipeline stands in it.
    output_dir: str | Path = "ddpm-butterflies-128"
    # Whether the finished pipeline is pushed to the Hugging Face hub. The tutorial's own object says true.
    push_to_hub: bool = False
    # The repository there; none takes the name of output_dir. It is made if it is not there.
    hub_model_id: str | None = None
    # Whether only its owner may see it; none is true here, and false makes it public.
    hub_private_repo: bool | None = None
    # Whether a finished or different run in output_dir is replaced; an unfinished run of this config goes on.
    overwrite_output_dir: bool = True
    # Everything random in a run follows from this number.
    seed: Annotated[int, Field(ge=0)] = 0
    # A folder of images, or a data set on the hub or on disk; none stands for the one given to train().
    dataset_name: str | Path | None = None


NAMES = {field.name for field in dataclasses.fields(TutorialConfig)}
# Enough to know the dialect by, whatever is misspelt beside them.
SIGNS = NAMES - {"seed", "learning_rate", "mixed_precision"}
# Files and folders that say that a folder holds a packed data set, and not images.
PACKED = ("*.parquet", "*.arrow", "dataset_info.json", "dataset_dict.json", "data/*.parquet", "*.jsonl", "*/*.arrow")


def recognises(settings: Mapping[str, Any]) -> bool:
    """Whether at least two of the tutorial's own words stand at the top, and none of the native ones."""
    return len(SIGNS & set(settings)) >= 2 and not {"data", "output"} & set(settings)


def translate(settings: Mapping[str, Any], *, lenient: bool = False) -> Translation:
    """The tutorial's training run: its network, its preprocessing, its schedule, and a pipeline in output_dir.

    Args:
        settings: the attributes of the object.
        lenient: whether unknown ones are left out with a note, and not refused.

    Raises:
        ConfigError: with every wrong setting, in the tutorial's words.
    """
    known, unknown = without_unknown(TutorialConfig, settings) if lenient else (settings, [])
    s = checked(TutorialConfig, known)
    tree = {
        "output": str(s.output_dir),
        "overwrite": s.overwrite_output_dir,
        "export": "ddpm",
        "seed": s.seed,
        "data": {
            "source": _source(s.dataset_name),
            "image_size": s.image_size,
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
            "duration": f"{s.num_epochs} epochs",
            "batch_size": s.train_batch_size * s.gradient_accumulation_steps,
            "micro_batch_size": s.train_batch_size,
            "mixed_precision": s.mixed_precision or "no",
            "max_grad_norm": 1.0,
        },
        "optimizer": {
            "learning_rate": s.learning_rate,
            "lr_schedule": "cosine",
            "lr_warmup_steps": s.lr_warmup_steps,
        },
        "ema": {"decays": []},
        "sample": {"every": f"{s.save_image_epochs} epochs", "num_images": s.eval_batch_size, "seed": s.seed},
        "checkpoint": {"every": f"{s.save_model_epochs} epochs"},
        "hub": _hub(s),
    }
    return Translation(tree, (*left_out(unknown), *_notes(s)))


def _source(dataset_name: str | Path | None) -> dict[str, Any]:
    """A folder of images is read as one; anything else goes to the datasets library, as in the tutorial."""
    if dataset_name is None:
        return {"name": "dataset"}  # stands for the one given to train(); refused when there is none
    path = Path(dataset_name)
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in PACKED):
        return {"name": "folder", "root": str(path)}
    return {"name": "huggingface", "path": str(dataset_name)}


def _hub(settings: TutorialConfig) -> dict[str, Any] | None:
    """Where the pipeline is pushed to; nowhere while the name is the one that the tutorial leaves to be filled in."""
    if not settings.push_to_hub or _is_to_be_filled_in(settings):
        return None
    name = settings.hub_model_id or Path(settings.output_dir).name
    try:
        repo = check_repo_name(name)
    except ValueError as error:
        raise ConfigError(f"{'hub_model_id' if settings.hub_model_id else 'output_dir'}: {error}.") from None
    return {"repo": repo, "private": settings.hub_private_repo is not False}


def _is_to_be_filled_in(settings: TutorialConfig) -> bool:
    return "<" in (settings.hub_model_id or "")


def _notes(settings: TutorialConfig) -> list[str]:
    if not settings.push_to_hub or not _is_to_be_filled_in(settings):
        return []
    return [
        f"push_to_hub: nothing is pushed, as hub_model_id is {settings.hub_model_id!r}, which is to be filled in. Give "
        "it the name of a repository, or push by hand with `eclosion push`."
    ]


DIALECT = Dialect(recognises, translate)
