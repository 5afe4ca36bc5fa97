"""What a micro-batch is told besides its samples: what an encoder makes of them, and what is random about them.

Both follow from the samples and their positions, so that they can be made again at any time.
"""

from dataclasses import replace

import torch

from eclosion.data.batch import Batch
from eclosion.rng import generator, integer_seed
from eclosion.tasks.task import Drawn, Task

__all__ = ["draw", "prepared"]


@torch.no_grad()
def prepared(task: Task, batch: Batch, device: torch.device) -> tuple[Batch, Batch]:
    """A batch with what an encoder adds to it: once on the device; and once for the networks after the first.

    In the second, what was there stays where it is, and what was added is on the device: so an encoder sees each
    image once in a step, and a step keeps no more on the device than that.
    """
    here = task.prepare(batch.to(device))
    added = {name: value for name, value in here.fields.items() if name not in batch}
    return here, replace(batch, fields={**batch.fields, **added})


def draw(task: Task, name: str, batch: Batch, seed: int, step: int, index: int, rank: int) -> Drawn:
    """Every random tensor of a micro-batch, keyed by position; and the dropout of its networks, keyed by step."""
    dropout = integer_seed(seed, "dropout", name, step, index, rank)
    device = batch.weight.device
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(dropout)
    elif device.type == "mps":
        torch.mps.manual_seed(dropout)
    else:
        torch.default_generator.manual_seed(dropout)
    return task.draw(name, batch, [generator(seed, "loss", name, p) for p in batch.positions])
