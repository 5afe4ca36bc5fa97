"""Images from a task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eclosion.device import autocast
from eclosion.diffusion.samplers import OnStep
from eclosion.rng import generator
from eclosion.sampling.examples import Examples
from eclosion.sampling.pictures import Pixels, to_uint8
from eclosion.tasks.task import Task

__all__ = ["make_images"]


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
    device = next(next(iter(task.nets.values())).parameters()).device
    found = []
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        rows = None if examples is None else examples.rows(part)
        rngs = [generator(seed, "sample", i) for i in part]
        conditions = task.conditions(part, None if rows is None else rows.conditions)
        image = rows.image.to(device) if first and rows is not None and rows.image is not None else None
        with torch.no_grad(), autocast(device, precision):
            images = task.sample(
                conditions,
                rngs,
                sampler=sampler,
                guidance_scale=guidance_scale,
                on_step=on_step,
                first=first,
                last=last,
                image=image,
            )
        found.append(to_uint8(images))
    return np.concatenate(found)
