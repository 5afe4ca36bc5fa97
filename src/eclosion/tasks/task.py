"""What the loop and the sampling code ask of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from eclosion.data.batch import Batch
from eclosion.diffusion.samplers import OnStep
from eclosion.rng import Generator

__all__ = ["DataFacts", "Drawn", "Task", "TaskPart"]

# a frozen dataclass of tensors, made and read by one task alone
Drawn = Any


@dataclass(frozen=True)
class DataFacts:
    """What a task must know of the data before it can build its networks.

    Attributes:
        size: height and width in pixels.
        class_names: the name of each label, or empty.
    """

    size: tuple[int, int]
    class_names: tuple[str, ...] = ()


class Task(Protocol):
    """What is trained. Knows networks and mathematics; knows no optimizer, file, process or tracker.

    Attributes:
        nets: networks by name; always called through `__call__`, since they may be wrapped.
    """

    nets: dict[str, nn.Module]

    def draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Drawn:
        """Every random tensor of a batch; row i comes from rngs[i] alone."""
        ...

    def loss(self, name: str, batch: Batch, drawn: Drawn) -> Tensor:
        """One number per image: float32 [B], differentiable. No randomness but a network's own dropout."""
        ...

    def conditions(self, indices: Sequence[int]) -> Batch:
        """What the i-th images of a preview are asked to show."""
        ...

    def sample(
        self,
        conditions: Batch,
        rngs: Sequence[Generator],
        *,
        sampler: Any,
        guidance_scale: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], float32; image i comes from conditions[i] and rngs[i] alone."""
        ...

    def with_nets(self, nets: Mapping[str, nn.Module]) -> "Task":
        """The same task on other networks, such as averages or data-parallel copies."""
        ...

    def pipeline(self) -> Any:
        """A diffusers pipeline that holds the networks; UserError if there is none for this task."""
        ...


class TaskPart(Protocol):
    """A part that describes a task: its fields are its options."""

    def build(self, facts: DataFacts) -> Task:
        """The task, with networks drawn from torch's global generator, on the CPU."""
        ...
