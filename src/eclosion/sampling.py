"""From a task, or from a run folder, to images on disk."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.load import validate
from eclosion.config.schema import RunConfig
from eclosion.device import autocast, pick_device, pick_precision
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import CheckpointError, ConfigError
from eclosion.registry import build
from eclosion.rng import generator
from eclosion.rundir import RunDir
from eclosion.tasks.task import DataFacts, Task

__all__ = ["TrainedTask", "grid", "load_trained", "make_images", "sample", "save_png"]


def make_images(
    task: Task,
    indices: Sequence[int],
    *,
    seed: int,
    sampler: Any,
    guidance_scale: float = 1.0,
    batch_size: int = 16,
    precision: Any = "no",
    on_step: OnStep | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images as people look at them: uint8 [N, H, W, 3]; image i depends on the seed and indices[i] alone."""
    found = []
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        device = next(next(iter(task.nets.values())).parameters()).device
        rngs = [generator(seed, "sample", i) for i in part]
        with torch.no_grad(), autocast(device, precision):
            images = task.sample(
                task.conditions(part), rngs, sampler=sampler, guidance_scale=guidance_scale, on_step=on_step
            )
        found.append(to_uint8(images))
    return np.concatenate(found)


def to_uint8(images: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]: the one place where images leave the network's range."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(
    images: np.ndarray[Any, np.dtype[np.uint8]], *, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """One picture of many, row by row on white.

    Args:
        images: uint8 [N, H, W, 3].
        columns: images in a row; none makes the picture about square.
        scale: each pixel becomes a square of this many; none makes small images about 96 px wide.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = scale or max(1, round(96 / width))
    gap = 2
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, math.ceil(count / columns) * cell_h + gap), "white")
    for i, pixels in enumerate(images):
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + i % columns * cell_w, gap + i // columns * cell_h))
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a picture so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    image.save(aside, format="PNG")
    aside.replace(path)
    return path


@dataclass(frozen=True)
class TrainedTask:
    """A task read from a checkpoint, on its first average, ready to sample.

    Attributes:
        task: on the device, in eval mode.
        run: the config it was trained with.
        folder: the run folder that holds its checkpoint.
        step, samples_seen: optimizer updates and images behind it.
        meta: what the checkpoint says of itself: config, versions, data.
        device, precision: where and how it samples.
    """

    task: Task
    run: RunConfig
    folder: RunDir
    step: int
    samples_seen: int
    meta: Mapping[str, Any]
    device: torch.device
    precision: Any


def load_trained(folder: str | Path, *, device: str = "auto") -> TrainedTask:
    """The trained task of a run folder or of one of its checkpoints.

    Raises:
        CheckpointError: if there is none, or none that is whole.
    """
    path = Path(folder)
    one = path if (path / "manifest.json").is_file() else None
    root = RunDir(path.parent.parent if one else path)
    store = CheckpointStore(root, keep_last=2, keep_every=None)
    found = one or store.latest()
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint. Give the folder of a run that has trained.")
    for warning in store.warnings:
        warnings.warn(warning, stacklevel=3)
    loaded = store.load(found)
    meta, state = loaded.manifest.meta, loaded.state
    run, facts = validate(meta["config"]), meta["facts"]
    task = run.task.build(DataFacts(size=run.data.size, class_names=tuple(facts["class_names"])))
    where = pick_device(device)
    nets = {}
    for name, net in task.nets.items():
        net.load_state_dict(loaded.files[f"{name}.ema"] if f"{name}.ema" in loaded.files else loaded.files[name])
        nets[name] = net.to(where).eval().requires_grad_(False)
    precision = pick_precision(run.train.mixed_precision, where)
    return TrainedTask(task.with_nets(nets), run, root, state["step"], state["samples_seen"], meta, where, precision)


def sample(
    folder: str | Path,
    *,
    num_images: int = 16,
    seed: int = 0,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    out: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    on_step: OnStep | None = None,
) -> Path:
    """Make images with a trained run.

    Args:
        folder: a run folder, or one checkpoint in it.
        num_images: how many.
        seed: image i depends on this and i alone.
        sampler: name of a sampler; none takes the run's own.
        num_inference_steps: network calls per image; none takes the sampler's default.
        guidance_scale: how strongly images follow their class; 1 is off; none takes the run's own.
        out: where they go; none makes a folder inside the run's.
        batch_size: images made at once.
        device: "auto", "cpu", "cuda" or "mps".
        on_step: called with (step, steps) before each network call.

    Returns:
        The folder, which holds one PNG per image and `grid.png`.

    Raises:
        CheckpointError: if the run has no checkpoint.
        ConfigError: if the sampler is unknown or refuses the number of steps.
    """
    if num_images < 1 or batch_size < 1:
        raise ConfigError(f"num_images is {num_images} and batch_size is {batch_size}; both must be at least 1.")
    trained = load_trained(folder, device=device)
    chosen = _sampler(trained.run, sampler, num_inference_steps)
    images = make_images(
        trained.task,
        range(num_images),
        seed=seed,
        sampler=chosen,
        guidance_scale=trained.run.sample.guidance_scale if guidance_scale is None else guidance_scale,
        batch_size=batch_size,
        precision=trained.precision,
        on_step=on_step,
    )
    target = Path(out) if out else trained.folder.samples / f"step-{trained.step:08d}-seed-{seed}"
    for i, pixels in enumerate(images):
        save_png(Image.fromarray(pixels), target / f"{i:06d}.png")
    save_png(grid(images), target / "grid.png")
    return target


def _sampler(run: RunConfig, name: str | None, steps: int | None) -> Any:
    from pydantic import ValidationError

    from eclosion.registry import dump

    options = dump(run.sample.sampler) if name is None else {"name": name}
    if steps is not None:
        options["num_inference_steps"] = steps
    try:
        return build("samplers", options)
    except (ValidationError, ValueError) as error:
        detail = "; ".join(e["msg"] for e in error.errors()) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"sampler: {detail}") from error
