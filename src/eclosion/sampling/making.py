"""Images from a task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eclosion.device import autocast
from eclosion.diffusion.samplers import OnStep
from eclosion.rng import generator
from eclosion.sampling.examples import Examples
from eclosion.sampling.pictures import Pixels, to_uint8
from eclosion.tasks.task import Task

__all__ = ["make_batch", "make_images"]


def make_images(
    task: Task,
    indices: Sequence[int],
    *,
    seed: int,
    sampler: Any,
    guidance_scale: float | Sequence[float] = 1.0,
    batch_size: int = 16,
    precision: Any = "no",
    on_step: OnStep | None = None,
    examples: Examples | None = None,
    first: int = 0,
    last: int | None = None,
) -> Pixels:
    """Images as people look at them: uint8 [N, H, W, 3]; image i depends on the seed, indices[i] and its example alone.

    Args:
        task: on its device, in eval mode.
        indices: which images.
        seed: of their noise.
        sampler: for all networks, or a list with one for each.
        guidance_scale: the same.
        batch_size: images made at once.
        precision: of the networks.
        on_step: called before each call of a network.
        examples: what images are made from, if the task wants any.
        first, last: places of the networks to begin and to end with; none is the last.
    """
    found = []
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        rows = None if examples is None else examples.rows(part)
        found.append(
            to_uint8(
                make_batch(
                    task,
                    part,
                    seed=seed,
                    sampler=sampler,
                    guidance_scale=guidance_scale,
                    precision=precision,
                    on_step=on_step,
                    examples=rows,
                    first=first,
                    last=last,
                )
            )
        )
    return np.concatenate(found)


@torch.no_grad()
def make_batch(
    task: Task,
    indices: Sequence[int],
    *,
    seed: int,
    sampler: Any,
    guidance_scale: float | Sequence[float] = 1.0,
    precision: Any = "no",
    on_step: OnStep | None = None,
    examples: Examples | None = None,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """As `make_images`, all at once and as the networks leave them: [B, 3, H, W] in [-1, 1], on the device.

    Args:
        examples: what these images are made from, a row for each.
    """
    device = next(next(iter(task.nets.values())).parameters()).device
    rngs = [generator(seed, "sample", i) for i in indices]
    conditions = task.conditions(indices, None if examples is None else examples.conditions)
    image = examples.image.to(device) if first and examples is not None and examples.image is not None else None
    with autocast(device, precision):
        return task.sample(
            conditions,
            rngs,
            sampler=sampler,
            guidance_scale=guidance_scale,
            on_step=on_step,
            first=first,
            last=last,
            image=image,
        )
