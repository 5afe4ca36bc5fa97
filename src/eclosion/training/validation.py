"""The loss on images that are not trained on, with the averaged networks and the same noise each time.

What is random about the i-th image follows from (seed, "validation", i) alone, and no condition is dropped. So two
validations differ by the weights alone, and neither the number of processes nor the size of a batch changes the
result, but for the last bits.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from eclosion.config.schema import RunConfig
from eclosion.data.batch import Batch, Skip
from eclosion.data.loader import Loader
from eclosion.data.source import Samples
from eclosion.device import autocast
from eclosion.rng import generator
from eclosion.sampling.examples import in_order, validation_data
from eclosion.tasks.task import DataFacts, Task
from eclosion.training.distributed import World
from eclosion.training.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from eclosion.training.context import Context

__all__ = ["Validation", "open_validation", "validate"]

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
            totals, skipped = _totals(c, task, names, stop)
    except StopRequested:
        return False
    found = [skip for part in c.world.gather(skipped) for skip in part]
    losses = {name: total / count if count else float("nan") for name, (total, count) in totals.items()}
    several = len(names) > 1
    numbers = {f"validation/loss/{name}" if several else "validation/loss": loss for name, loss in losses.items()}
    c.log(numbers | ({"validation/skipped": float(len(found))} if found else {}))
    if c.world.leads and c.state.scores.step < 0:
        for skip in found[:MAX_TOLD]:
            c.tracker.say(f"validation skips {skip.name}: {skip.detail}", reason=skip.reason)
    return c.state.scores.record(c.state.step, losses) and c.run.checkpoint.keep_best


@torch.no_grad()
def _totals(
    c: "Context", task: Task, names: Sequence[str], stop: StopSignals
) -> tuple[dict[str, tuple[float, float]], list[Skip]]:
    """Sum of the losses and number of images of each network, over all processes; and what this one skipped."""
    assert c.validation is not None
    exact = torch.float32 if c.device.type == "mps" else torch.float64
    sums = torch.zeros((len(names), 2), dtype=exact, device=c.device)
    skipped: list[Skip] = []
    with closing(c.validation.batches()) as batches:
        while True:
            with c.world.leaving(stop):  # a server may keep it waiting
                batch = next(batches, None)
            c.world.agree_to_stop(stop)
            if batch is None:
                break
            skipped += batch.skipped
            here = task.prepare(batch.to(c.device))
            for i, name in enumerate(names):
                rngs = [generator(c.run.seed, "validation", position) for position in batch.positions]
                with autocast(c.device, c.precision):
                    losses = task.loss(name, here, task.validation_draw(name, here, rngs))
                counted = here.weight > 0
                sums[i, 0] += torch.where(counted, losses, 0).to(exact).sum()
                sums[i, 1] += counted.sum()
    totals = c.world.sum(sums).tolist()
    return {name: (total, count) for name, (total, count) in zip(names, totals, strict=True)}, skipped
