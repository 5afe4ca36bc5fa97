"""The JSON files that train a decoder of DALLE2-pytorch, in native words.

Each key of the original is accepted, and obeyed or said to have no effect. What is wrong is told in its words, all at
once: unknown keys, values of the wrong type, and what does not go together.
"""

import os
from collections.abc import Mapping
from typing import Any

from eclosion.config.dalle2_cascade import TOLD
from eclosion.config.dalle2_checks import problems_of
from eclosion.config.dalle2_data import data_tree
from eclosion.config.dalle2_evaluate import evaluate_tree
from eclosion.config.dalle2_keys import keys_of
from eclosion.config.dalle2_notes import notes_of
from eclosion.config.dalle2_per_unet import (
    blurs,
    encodes,
    encodes_text,
    followed,
    follows,
    for_upsamplers,
    given_unets,
    per_unet,
    schedules,
    sizes_of,
    text_dims,
)
from eclosion.config.dalle2_schema import Decoder, DecoderFile, Train
from eclosion.config.dalle2_tracker import start_tree, track_tree
from eclosion.config.dalle2_unet import unet_options
from eclosion.config.dialect import Dialect, Translation
from eclosion.config.explain import checked, left_out, without_unknown
from eclosion.errors import ConfigError

__all__ = ["DIALECT", "translate"]


def recognises(settings: Mapping[str, Any]) -> bool:
    """Whether there is a decoder, or a prior with a tracker and no native task."""
    return "decoder" in settings or ({"prior", "tracker"} <= set(settings) and "task" not in settings)


def translate(settings: Mapping[str, Any], *, lenient: bool = False) -> Translation:
    """The run that a decoder config describes.

    Args:
        settings: the file.
        lenient: whether unknown keys are left out with a note, and not refused.

    Raises:
        ConfigError: with every problem, one line each, in the original's words.
    """
    if {"decoder", "task"} <= set(settings):
        raise ConfigError(
            "task stands beside decoder: a config is in the words of DALLE2-pytorch (decoder) or in ours (task). Leave "
            "one of them out; what decoder cannot say stands on the command line, such as task.resize=nearest."
        )
    if "decoder" not in settings:
        raise ConfigError("prior: of DALLE2-pytorch, configs of decoders are read, and those of priors not yet.")
    raw, unknown = without_unknown(DecoderFile, _with_lists(settings))
    problems = [] if lenient else unknown
    try:
        file = checked(DecoderFile, raw, strict=False)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    unets = given_unets(file, raw)
    problems = [*problems, *problems_of(file, unets)]
    if problems:
        raise ConfigError(problems)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
    notes = notes_of(file, dict(_written(raw)), world_size=world_size)
    return Translation(_tree(file, unets, world_size), (*left_out(unknown), *notes), keys_of(file))


def _with_lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same without empty sections, with lists of loggers and savers, of which one alone may be written."""
    given = {key: value for key, value in settings.items() if value is not None}
    tracker = given.get("tracker")
    if isinstance(tracker, Mapping):
        alone = {key: [tracker[key]] for key in ("log", "save") if isinstance(tracker.get(key), Mapping)}
        given["tracker"] = {**tracker, **alone}
    return given


def _written(tree: Any, path: str = "") -> Any:
    """Path and value of every key that is given and not null; empty mappings and lists of plain values are values."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _written(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        for i, item in enumerate(tree):
            yield from _written(item, f"{path}[{i}]")
    elif tree is not None:
        yield path, tree


# --- the native tree -------------------------------------------------------------------------------------------------


def _tree(file: DecoderFile, unets: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    train, epoch = file.train, file.train.epoch_samples
    saves = train.save_every_n_samples  # there also at the end of each epoch; how long one is, the data may have to say
    often = f"{min(saves, epoch)} samples" if epoch else f"{saves} samples or 1 epoch"
    samplers = _samplers(file.decoder)
    one_sampler = all(sampler == samplers[0] for sampler in samplers)
    return {
        "output": file.tracker.data_path,
        "overwrite": file.tracker.overwrite_data_path,
        "seed": file.seed,
        "data": data_tree(file),
        "task": _task(file, unets, None if one_sampler else samplers),
        "train": {
            "duration": f"{train.epochs * epoch} samples" if epoch else f"{train.epochs} epochs",
            "batch_size": file.data.batch_size * world_size,
            "max_grad_norm": per_unet(train.max_grad_norm, 1)[0],
            "mixed_precision": "auto" if train.amp else "no",
            "freeze": [f"unet_{i}" for i, trained in enumerate(train.unet_training_mask or []) if not trained],
            "device": train.device.partition(":")[0] if train.device else "auto",
        },
        "optimizer": _optimizer(train, len(unets)),
        "ema": {"decays": [train.ema_beta] if train.use_ema else []},
        "sample": {
            "every": often,
            "num_images": train.n_sample_images,
            "guidance_scale": _guidance(file),
            "seed": file.seed,
            **({"sampler": samplers[0]} if one_sampler else {}),
        },
        "validate": {
            "every": (f"{epoch} samples" if epoch else "1 epoch") if file.data.splits.val > 0 else None,
            "num_samples": train.validation_samples,
        },
        "evaluate": evaluate_tree(
            file.evaluate,
            every=f"{epoch} samples" if epoch else "1 epoch",
            split="val" if file.data.splits.val > 0 else "train",
            seed=file.seed,
            sampler=samplers[0] if one_sampler else None,
        ),
        "checkpoint": {"every": often, "keep_best": any(save.save_best_to for save in file.tracker.save)},
        "track": track_tree(file.tracker, validates=file.data.splits.val > 0),
        "start": start_tree(file.tracker),
    }


def _task(file: DecoderFile, unets: list[dict[str, Any]], samplers: list[dict[str, Any]] | None) -> dict[str, Any]:
    decoder = file.decoder
    clip = {"name": "clip", "make": decoder.clip.make, "model": decoder.clip.model} if decoder.clip else None
    return {
        "name": "unclip_decoder",
        "unets": [_unet(file, i, unet, samplers) for i, unet in enumerate(unets)],
        "image_dropout": decoder.image_cond_drop_prob,
        "text_dropout": decoder.text_cond_drop_prob,
        "unconditional": decoder.unconditional,
        "encoder": clip if encodes(file) or encodes_text(file) else None,
        "image_embed_dim": decoder.unets[0].image_embed_dim if follows(file, "image") else None,
        "text_embed_dim": next(iter(text_dims(decoder)), None),
        "clip_sample": decoder.clip_denoised and decoder.clip_x_start,
        "dynamic_threshold": decoder.dynamic_thres_percentile if decoder.use_dynamic_thres else None,
    }


def _unet(file: DecoderFile, i: int, unet: Mapping[str, Any], samplers: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One network of the native task."""
    decoder, count = file.decoder, len(file.decoder.unets)
    options = {key: value for key, value in unet_options(unet).items() if key not in TOLD}
    options.pop("image_conditioned", None)  # the place in the cascade decides
    if decoder.unconditional:
        options.pop("text_conditioned", None)
    learned = [*per_unet(decoder.learned_variance, 1), *[False] * count][i]
    crops = per_unet(decoder.random_crop_sizes, count)
    gamma = per_unet(decoder.p2_loss_weight_gamma, count)[i]
    p2 = {"weighting": "p2", "p2_gamma": gamma, "p2_k": decoder.p2_loss_weight_k} if gamma > 0 else {}
    variance = {
        "weight": decoder.vb_loss_weight,
        "constrain_fraction": decoder.learned_variance_constrain_frac,
    }
    return {
        "model": {"name": "unclip_unet", **options},
        "image_size": sizes_of(file)[i],
        "noise_schedule": _noise_schedule(decoder, i),
        "prediction_type": _prediction_type(decoder, i),
        "learned_variance": variance if learned else None,
        "loss": {"kind": decoder.loss_type, **p2},
        "lowres": _lowres(decoder, i) if i else None,
        "crop_size": crops[i],
        "sampler": samplers[i] if samplers else None,
    }


def _noise_schedule(decoder: Decoder, i: int) -> dict[str, Any]:
    """The schedule of a U-Net; those that say how much noise a level adds are stretched to the number of levels."""
    name, T = schedules(decoder)[i], decoder.timesteps
    ends = {} if name in ("cosine", "jsd") else {"beta_start": 1e-4 * 1000 / T, "beta_end": 0.02 * 1000 / T}
    return {"name": name, "num_train_timesteps": T, **ends}


def _prediction_type(decoder: Decoder, i: int) -> str:
    count = len(decoder.unets)
    if per_unet(decoder.predict_v, count)[i]:
        return "v_prediction"
    return "sample" if per_unet(decoder.predict_x_start, count)[i] else "epsilon"


def _lowres(decoder: Decoder, i: int) -> dict[str, Any]:
    """How an upsampler sees the image of the U-Net before."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        "downsample_first": decoder.lowres_downsample_first,
        "blur_probability": decoder.blur_prob if blurs(decoder)[i] else 0.0,
        "blur_sigma": plain(decoder.blur_sigma),
        "blur_kernel_size": plain(decoder.blur_kernel_size),
        "noise": for_upsamplers(decoder.use_noise_for_lowres_cond, len(decoder.unets))[i],
        "sample_noise_level": decoder.lowres_noise_sample_level,
    }


def _samplers(decoder: Decoder) -> list[dict[str, Any]]:
    """All levels with DDPM, or fewer with DDIM."""
    return [
        {"name": "ddpm"}
        if steps is None or steps == decoder.timesteps
        else {"name": "ddim", "num_inference_steps": steps, "eta": decoder.ddim_sampling_eta}
        for steps in per_unet(decoder.sample_timesteps, len(decoder.unets))
    ]


def _optimizer(train: Train, count: int) -> dict[str, Any]:
    """AdamW as in the original. The values of the first U-Net are those of all; what others have otherwise is named."""
    each = [
        {"learning_rate": lr, "weight_decay": wd, "lr_warmup_steps": warmup or 0, "max_grad_norm": norm}
        for lr, wd, warmup, norm in zip(
            *(per_unet(value, count) for value in (train.lr, train.wd, train.warmup_steps, train.max_grad_norm)),
            strict=True,
        )
    ]
    differ = {f"unet_{i}": {k: v for k, v in own.items() if v != each[0][k]} for i, own in enumerate(each)}
    return {
        "learning_rate": each[0]["learning_rate"],
        "betas": [0.9, 0.99],
        "weight_decay": each[0]["weight_decay"],
        "decay": "matrices",
        "lr_warmup_steps": each[0]["lr_warmup_steps"],
        "networks": {name: own for name, own in differ.items() if own},
    }


def _guidance(file: DecoderFile) -> float | list[float]:
    """One number for all U-Nets that follow something; or a list, with 1 for those that follow nothing."""
    scale = file.train.cond_scale
    if file.decoder.unconditional:
        return 1.0
    if not isinstance(scale, list):
        return scale
    return [one if followed(file.decoder, i) else 1.0 for i, one in enumerate(scale)]


DIALECT = Dialect(recognises, translate)
