"""What is left behind when a step is not finite: the names of its samples, and all that replays it."""

import dataclasses
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from eclosion.device import autocast
from eclosion.errors import TrainingDiverged
from eclosion.registry import dump
from eclosion.rng import generator
from eclosion.tracking.tracker import write_json
from eclosion.training.distributed import full_tensors
from eclosion.training.drawing import draw, prepared

if TYPE_CHECKING:
    from eclosion.training.context import Context

__all__ = ["diverged"]

MAX_NAMES = 5


def diverged(c: "Context") -> TrainingDiverged:
    """The error for the first step that was not finite, after writing a bundle that replays it.

    The weights still are those before that step: it and all since left them alone. The batch and
    its noise are functions of position, so they are made again rather than kept.
    """
    failed = c.state.failed_at()
    assert failed is not None
    name, step = failed
    first = c.state.samples_seen - (c.state.step - step) * c.run.train.batch_size
    share = c.run.train.batch_size // c.world.size
    mine = range(first + c.world.rank * share, first + (c.world.rank + 1) * share)
    batch, _ = prepared(c.task, c.loader.batch_at(mine), c.device)
    drawn = c.task.draw(name, batch, [generator(c.run.seed, "loss", name, p) for p in mine])
    losses = _losses(c, name, step, mine)
    bad = [i for i in range(len(batch)) if not torch.isfinite(losses[i])]
    names = [c.samples.name(c.loader.order.index_at(mine[i])) for i in (bad or range(len(batch)))]

    folder = c.folder.replay / f"step-{step:08d}" / f"rank-{c.world.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in batch.fields.items() if isinstance(v, Tensor)}
    save_file(_whole(tensors), folder / "batch.safetensors")
    save_file(_whole({k: v for k, v in _fields(drawn).items() if isinstance(v, Tensor)}), folder / "drawn.safetensors")
    save_file(_whole(full_tensors(c.state.stages[name].module.state_dict())), folder / f"{name}.safetensors")
    write_json(
        folder / "info.json",
        {
            "step": step,
            "network": name,
            "positions": list(mine),
            "samples": [c.samples.name(c.loader.order.index_at(p)) for p in mine],
            "losses": [str(float(x)) for x in losses],
            "micro_batch_size": c.loader.micro_batch_size,
            "rank": c.world.rank,
            "loss_scale": float(c.state.stages[name].scale.value),
            "config": dump(c.run),
            "environment": c.meta["environment"],
        },
    )
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    what = "loss" if bad else "gradient"
    return TrainingDiverged(
        f"step {step}: the {what} of {name} is not finite, with {', '.join(names[:MAX_NAMES])}{more}. The weights are "
        f"as before this step; {folder} replays it. Try a lower optimizer.learning_rate, or mixed_precision=no."
    )


def _losses(c: "Context", name: str, step: int, positions: range) -> Tensor:
    """The losses of the failed step, micro-batch by micro-batch with the dropout that they had then; float32 [B]."""
    task = c.task.with_nets({n: s.module for n, s in c.state.stages.items()})
    size = c.loader.micro_batch_size
    found = []
    for i in range(len(positions) // size):
        batch, _ = prepared(task, c.loader.batch_at(positions[i * size : (i + 1) * size]), c.device)
        drawn = draw(task, name, batch, c.run.seed, step, i, c.world.rank)
        with torch.no_grad(), autocast(c.device, c.precision):
            found.append(task.loss(name, batch, drawn).cpu())
    return torch.cat(found)


def _fields(drawn: object) -> dict[str, object]:
    assert dataclasses.is_dataclass(drawn)
    return {field.name: getattr(drawn, field.name) for field in dataclasses.fields(drawn)}


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
