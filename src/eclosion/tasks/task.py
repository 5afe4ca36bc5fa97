"""What the loop and the sampling code ask of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from eclosion.config.schema import RunConfig
from eclosion.data.batch import Batch
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, did_you_mean
from eclosion.rng import Generator

__all__ = ["DataFacts", "Drawn", "Task", "TaskPart", "check_wishes"]

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

    def check_sampling(self, sampler: Any, guidance_scale: float) -> None:
        """Refuse a sampler or a guidance that this task could not use, before anything is trained."""
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


def check_wishes(task: Task, run: RunConfig) -> None:
    """Refuse, before anything is trained, what would fail only later: freezing, pictures, the pipeline at the end.

    Raises:
        ConfigError: with every problem.
        UserError: if there is no pipeline for this task.
    """
    frozen = run.train.freeze
    problems = [
        f"train.freeze: {name!r} is no network of this task.{did_you_mean(name, task.nets)}"
        for name in frozen
        if name not in task.nets
    ]
    if set(frozen) >= set(task.nets):
        problems.append(f"train.freeze names every network ({', '.join(task.nets)}), so nothing would be trained.")
    if run.sample.num_images:
        try:
            task.check_sampling(run.sample.sampler, run.sample.guidance_scale)
        except ConfigError as error:
            problems += [f"sample: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    if run.export != "no":
        task.pipeline()
