"""From a checkpoint to a diffusers pipeline folder, loaded again and compared before it counts as done."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.registry import dump
from eclosion.rng import generator, randn
from eclosion.sampling import TrainedTask, load_trained
from eclosion.tasks.task import Task

__all__ = ["clean_exports", "export", "export_trained"]

ASIDE = ".export-"
# The file that makes a folder a pipeline.
INDEX = "model_index.json"


def export(run: str | Path, out: str | Path, *, pipeline: str = "ddpm") -> Path:
    """Write the newest checkpoint of a run, on its first average, as a diffusers pipeline.

    Args:
        run: a run folder, or one checkpoint in it.
        out: the folder to write; must be new or empty.
        pipeline: "ddpm" or "ddim".

    Returns:
        The folder, which `DDPMPipeline.from_pretrained` or `DDIMPipeline.from_pretrained` loads.

    Raises:
        ConfigError: if `out` holds something, or there is no such pipeline.
        CheckpointError: if the run has no checkpoint.
        UserError: if diffusers has no pipeline for this task.
        EnvironmentProblem: if what was written does not load as the same network.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty. Choose a new folder for the pipeline.")
    return export_trained(load_trained(run, device="cpu"), target, pipeline=pipeline)


def export_trained(trained: TrainedTask, target: Path, *, pipeline: str) -> Path:
    """Write a trained task as a pipeline folder.

    It is written aside, loaded again and compared; then its files move into `target`, the one that makes it a
    pipeline last, so that a kill leaves no half of one.
    """
    wanted = _pipeline(trained.task, pipeline)
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        wanted.save_pretrained(aside, safe_serialization=True)
        (aside / "README.md").write_text(_card(type(wanted).__name__, trained), encoding="utf-8")
        _compare(wanted, aside)
        (target / INDEX).unlink(missing_ok=True)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == INDEX):
            old = target / path.name
            if old.is_dir():
                shutil.rmtree(old)
            path.replace(old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def clean_exports(folder: Path) -> None:
    """Remove what a killed export left behind. Only under the run's lock."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path)


def _pipeline(task: Task, kind: str) -> Any:
    ddpm = task.pipeline()
    if kind == "ddpm":
        return ddpm
    if kind == "ddim":
        from diffusers import DDIMPipeline, DDIMScheduler  # heavy: only when a pipeline is wanted

        return DDIMPipeline(unet=ddpm.unet, scheduler=DDIMScheduler.from_config(ddpm.scheduler.config))
    raise ConfigError(f"{kind!r} is no pipeline for export. Use ddpm or ddim.")


def _compare(wanted: Any, folder: Path) -> None:
    """The pipeline on disk must be the one in memory: same weights, same noise levels, same output."""
    with _quiet():
        found = type(wanted).from_pretrained(folder, low_cpu_mem_usage=False)
    ours, theirs = wanted.unet.state_dict(), found.unet.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[k].cpu(), theirs[k].cpu()) for k in ours)
    same = same and torch.equal(wanted.scheduler.alphas_cumprod, found.scheduler.alphas_cumprod)
    if same:
        x, t = _probe(wanted.unet)
        was_training = wanted.unet.training
        with torch.no_grad():
            wanted_out = wanted.unet.eval()(x.to(wanted.unet.device), t.to(wanted.unet.device)).sample.cpu()
            found_out = found.unet.eval()(x, t).sample
        wanted.unet.train(was_training)
        same = torch.allclose(wanted_out, found_out, rtol=1e-3, atol=1e-4)
    if not same:
        raise EnvironmentProblem(
            f"{folder}: the pipeline does not load as the network that was written. Check the disk."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bar: ours are enough."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _probe(unet: Any) -> tuple[torch.Tensor, torch.Tensor]:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x = randn([generator(0, "export")], (unet.config.in_channels, height, width))
    return x, torch.tensor([1])


def _card(kind: str, trained: TrainedTask) -> str:
    """The model card: what it is, how to use it, what it was made from."""
    config = json.dumps(dump(trained.run), indent=2)
    environment = json.dumps(trained.meta["environment"], indent=2)
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion, eclosion]
---

# {trained.folder.root.name}

An image diffusion model trained from scratch with eclosion.

```python
from diffusers import {kind}

image = {kind}.from_pretrained("path/to/this/folder")().images[0]
```

| | |
|---|---|
| optimizer steps | {trained.step} |
| images seen | {trained.samples_seen} |
| images in the data set | {trained.meta["facts"]["num_samples"]} |
| fingerprint of the data | `{trained.meta["fingerprint"]}` |

## Config

```json
{config}
```

## Environment

```json
{environment}
```
"""
