"""What is random about a micro-batch, keyed so that it can be drawn again at any time."""

import torch

from eclosion.data.batch import Batch
from eclosion.rng import generator, integer_seed
from eclosion.tasks.task import Drawn, Task

__all__ = ["draw"]


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
