"""The loss on images that are not trained on, with the averaged networks and the same noise each time.

What is random about the i-th image follows from (seed, "validation", i) alone, and no condition is dropped. So two
validations differ by the weights alone, image by image. The number of processes changes nothing as long as each has
micro-batches of the same size; the size of a batch changes the last bits.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eclosion.config.schema import RunConfig
from eclosion.data.batch import Batch, Skip
from eclosion.data.loader import Loader
from eclosion.data.source import Samples
from eclosion.device import autocast
from eclosion.rng import generator
from eclosion.sampling.examples import in_order, validation_data
from eclosion.tasks.task import DataFacts, Task
from eclosion.training.distributed import World
from eclosion.training.scores import error_of, mean_of
from eclosion.training.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from eclosion.training.context import Context

__all__ = ["Losses", "Validation", "open_validation", "validate"]

# Equal parts of the noise levels, from clean to noise, in which the loss is told apart: it is of another size in each.
BANDS = 8
# Skipped images that are told of one by one.
MAX_TOLD = 5


@dataclass(frozen=True)
class Validation:
    """The images that are not trained on, in the order of their source.

    Attributes:
        samples: the opened source.
        loader: gives them in order; each process has its share of each batch.
        count: how many are looked at, from the first.
    """

    samples: Samples
    loader: Loader
    count: int

    @classmethod
    def of(cls, samples: Samples, run: RunConfig, world: World) -> "Validation":
        """The validation that a config describes, on samples that are open."""
        micro = min(run.train.micro_batch_size or run.train.batch_size, run.train.batch_size // world.size)
        loader = Loader(
            samples,
            in_order(run.data),
            seed=run.seed,
            batch_size=micro * world.size,
            rank=world.rank,
            world_size=world.size,
        )
        wanted = run.validate.num_samples
        return cls(samples, loader, len(samples) if wanted is None else min(wanted, len(samples)))

    def measured_on(self, names: Sequence[str]) -> str:
        """What losses of the networks `names` are measured on: they compare where this is the same."""
        return f"{self.count} images of {self.samples.fingerprint}, {' + '.join(names)}"

    def batches(self) -> Generator[Batch, None, None]:
        """All batches of this process; of images behind the last one the weight is 0."""
        num_steps = -(-self.count // self.loader.batch_size)
        with closing(self.loader.steps(0)) as steps:
            for micro_batches in islice(steps, num_steps):
                for batch in micro_batches:
                    yield self._cut(batch)

    def _cut(self, batch: Batch) -> Batch:
        inside = torch.tensor([float(position < self.count) for position in batch.positions])
        skipped = [skip for skip in batch.skipped if skip.position < self.count]
        return Batch(batch.positions, batch.weight * inside, batch.fields, skipped)


@contextmanager
def open_validation(run: RunConfig, facts: DataFacts, world: World) -> Iterator[Validation | None]:
    """The validation of a run while it goes; None if it has none.

    Raises:
        ConfigError: if validation is asked for and there is no data for it, or none that the task can use.
        DataError: if the data cannot be opened.
    """
    with validation_data(run, facts) as samples:
        yield None if samples is None else Validation.of(samples, run, world)


@dataclass(frozen=True)
class Losses:
    """The losses of a network, image by image, in the order of the source.

    Attributes:
        values: float64 [N]; NaN for an image that could not be read, infinite where a loss is not finite.
        bands: int64 [N], which eighth of the noise levels each image stands in; -1 for one that could not be read.
    """

    values: Tensor
    bands: Tensor


def validate(c: "Context", stop: StopSignals) -> bool:
    """Measure, log and record the loss at this step.

    After a signal it is left out; it is made when the run goes on.

    Returns:
        Whether it is the best so far, and its checkpoint is to be kept.
    """
    assert c.validation is not None
    names = [stage.name for stage in c.state.trained]
    try:
        with c.evaluating() as task:
            losses, skipped = _losses(c, task, names, stop)
    except StopRequested:
        return False
    found = [skip for part in c.world.gather(skipped) for skip in part]
    numbers: dict[str, float] = {}
    for name, own in losses.items():
        numbers |= _numbers(own, f"/{name}" if len(names) > 1 else "")
    c.log(numbers | ({"validation/skipped": float(len(found))} if found else {}))
    if c.world.leads and c.state.scores.step < 0:
        for skip in found[:MAX_TOLD]:
            c.tracker.say(f"validation skips {skip.name}: {skip.detail}", reason=skip.reason)
    values = {name: own.values for name, own in losses.items()}
    return c.state.scores.record(c.state.step, values) and c.run.checkpoint.keep_best


def _numbers(losses: Losses, end: str) -> dict[str, float]:
    """Mean and standard error, over all noise levels and over each eighth that has an image."""
    numbers = {f"validation/loss{end}": mean_of(losses.values)}
    parts = {"": losses.values} | {f"/band_{band}": losses.values[losses.bands == band] for band in range(BANDS)}
    for part, values in parts.items():
        if part and len(values):
            numbers[f"validation/loss{end}{part}"] = mean_of(values)
        if math.isfinite(error := error_of(values)):
            numbers[f"validation/loss_error{end}{part}"] = error
    return numbers


@torch.no_grad()
def _losses(c: "Context", task: Task, names: Sequence[str], stop: StopSignals) -> tuple[dict[str, Losses], list[Skip]]:
    """The losses of each network, from all processes; and what this one skipped."""
    assert c.validation is not None
    positions: list[int] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in names}  # [2, B], on the device: loss and noise level
    skipped: list[Skip] = []
    with closing(c.validation.batches()) as batches:
        while True:
            batch = c.world.wait_for(stop, lambda: next(batches, None))  # a server may keep it waiting
            c.world.agree_to_stop(stop)
            if batch is None:
                break
            skipped += batch.skipped
            positions += [p if w else -1 for p, w in zip(batch.positions, batch.weight.tolist(), strict=True)]
            here = task.prepare(batch.to(c.device))
            for name in names:
                rngs = [generator(c.run.seed, "validation", position) for position in batch.positions]
                drawn = task.validation_draw(name, here, rngs)
                with autocast(c.device, c.precision):
                    losses = task.loss(name, here, drawn).float()
                parts[name].append(torch.stack([losses, task.noise_level(name, drawn).float()]))
    none = torch.zeros(2, 0, device=c.device)
    own = (positions, {name: torch.cat([none, *found], dim=1).cpu() for name, found in parts.items()})
    gathered = c.world.gather(own)
    return {name: _in_order(c.validation.count, [(p, found[name]) for p, found in gathered]) for name in names}, skipped


def _in_order(count: int, parts: Sequence[tuple[list[int], Tensor]]) -> Losses:
    """What all processes found, each image at its place."""
    values = torch.full((count,), math.nan, dtype=torch.float64)
    bands = torch.full((count,), -1, dtype=torch.int64)
    for positions, found in parts:
        where = torch.tensor(positions, dtype=torch.int64)
        known = where >= 0  # the others were not delivered, or stand behind the last image
        losses, levels = found[:, known]
        values[where[known]] = losses.double().nan_to_num(nan=math.inf)
        bands[where[known]] = (levels * BANDS).long().clamp(0, BANDS - 1)
    return Losses(values, bands)
