"""Scores of what the averaged networks make, while they are trained.

Nothing here draws from a stream that training draws from: image i of an evaluation starts from (seed, "sample", i), and
networks are in eval mode. Finished batches are kept in the run folder, so that an evaluation that was interrupted goes
on with the run, and is not begun anew.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclosion.checkpoint.disk import make_folder
from eclosion.config.schema import RunConfig
from eclosion.data.source import Samples
from eclosion.device import pick_device
from eclosion.evaluation.comparing import how_measured
from eclosion.evaluation.images import Seen
from eclosion.evaluation.made import TaskImages, digest_of_weights
from eclosion.evaluation.measuring import Measured, measure
from eclosion.evaluation.pairs import memorised_sheet
from eclosion.evaluation.plan import Part, check_needs, count_of, examples_of, guidance_of, open_parts
from eclosion.evaluation.real import DataImages
from eclosion.evaluation.results import Result, append_results
from eclosion.report import write_report
from eclosion.sampling.pictures import grid, pairs, save_png
from eclosion.tasks.task import DataFacts, Task
from eclosion.training.distributed import World, full_tensors, world
from eclosion.training.scores import VALIDATION, Score
from eclosion.training.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from eclosion.training.context import Context

__all__ = ["Evaluation", "evaluate", "evaluation_workers", "open_evaluation"]


class RunWorkers:
    """The processes of a run, as an evaluation sees them; a signal to any of them stops it in all.

    Attributes:
        rank, size: which of how many.
    """

    def __init__(self, world: World, stop: StopSignals | None) -> None:
        """Nothing is exchanged yet.

        Args:
            world: the processes.
            stop: the signals that stop them together; None leaves signals to each.
        """
        self.rank, self.size = world.rank, world.size
        self._world, self._stop = world, stop

    def gather(self, value: Any) -> list[Any]:
        """What each of them gave, on all of them."""
        return self._world.gather(value)

    def from_leader(self, value: Any) -> Any:
        """What the leading one gave."""
        return self._world.from_leader(value)

    def agree(self) -> None:
        """Leave through `StopRequested` in all of them, if a signal has come to any."""
        if self._stop is not None:
            self._world.agree_to_stop(self._stop)


@contextmanager
def evaluation_workers(device: str) -> Iterator[tuple[RunWorkers, str]]:
    """The processes that torchrun started for an evaluation without training, and the device of this one.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        ConfigError: if there is no such device here, or one GPU for several processes.
    """
    with world(pick_device(device).type) as found:
        own = f"cuda:{found.local_rank}" if found.size > 1 and pick_device(device).type == "cuda" else device
        yield RunWorkers(found, stop=None), own


@dataclass(frozen=True)
class Evaluation:
    """What a run scores its images against, open for as long as it goes.

    Attributes:
        parts: the part of the data that is always compared with; and, if there is one, that of the last step.
        told: notes that have been said.
    """

    parts: Sequence[Part]
    told: set[str] = field(default_factory=set)


@contextmanager
def open_evaluation(
    run: RunConfig, samples: Samples, facts: DataFacts, task: Task, world: World, *, first: int
) -> Iterator[tuple[Evaluation | None, list[str]]]:
    """What a run evaluates itself with, and what to say of it; None if it does not.

    Args:
        run: the config.
        samples, facts: the images of training, open, and what is known of them.
        task: what makes images.
        world: the processes of the run.
        first: the place of the network that they begin with.

    Raises:
        ConfigError: if the data lacks what is asked for, or a metric lacks what it needs.
        DataError: if the data cannot be opened.
        EnvironmentProblem: if the weights of an extractor are not there.
    """
    if run.evaluate.every is None:
        yield None, []
        return
    with open_parts(run, samples, facts) as (parts, notes):
        for part in parts:
            notes += world.lead(partial(check_needs, run, part, task, first))
        yield Evaluation(parts, told=set(notes)), notes


def evaluate(c: "Context", stop: StopSignals) -> bool:
    """Make images, score them, log and record that.

    After a signal it is left out; what is finished of it is kept, and it goes on when the run goes on.

    Returns:
        Whether a score says that this is the best checkpoint so far, and it is to be kept.
    """
    assert c.evaluation is not None
    best = False
    try:
        with c.evaluating() as task:
            weights = _weights(c)
            for part in c.evaluation.parts:
                if part.final and not c.state.done:
                    continue
                began = time.perf_counter()
                measured = _measured(c, task, part, weights, stop)
                _keep(c, part, measured, time.perf_counter() - began)
                if not part.final:
                    best = _decides(c, measured)
    except StopRequested:
        return False
    c.state.scores.evaluated = c.state.step
    if c.world.leads:
        write_report(c.folder.root)
    return best and c.run.checkpoint.keep_best


def _measured(c: "Context", task: Task, part: Part, weights: str, stop: StopSignals) -> Measured:
    """Make the images, score them, and draw the pictures of them."""
    options, run, workers = c.run.evaluate, c.run, RunWorkers(c.world, stop)
    first, last = c.state.span
    made = TaskImages(
        task,
        name=f"{run.output} at step {c.state.step}",
        weights=weights,
        count=count_of(run, part, task, first=first),
        seed=options.seed,
        sampler=task.samplers(options.sampler),
        guidance_scale=guidance_of(run),
        precision=c.precision,
        device=c.device,
        examples=examples_of(run, part, task, c.device, first=first),
        facts={"what": "run", "step": c.state.step, "samples_seen": c.state.samples_seen},
        on_step=lambda *_: workers.agree(),  # all leave at the same call, or none
        span=(first, last),  # without networks that are frozen as they were drawn
    )
    train = _images(c, c.samples, "train", made.size)
    measured = measure(
        made,
        metrics=options.metrics,
        extractor=options.extractor,
        against=_images(c, part.samples, part.split, made.size),
        train=train,
        batch_size=options.batch_size,
        device=c.device,
        workers=workers,
        keep=c.folder.evaluation(c.state.step) / ".kept",
        seed=options.seed,
        skip_unscorable=True,  # what the data does not allow must not end what it trains
    )
    # made by all processes, over which networks may be split
    near = made.read([pair.image for pair in measured.pairs]) if measured.pairs else None
    c.world.lead(partial(_draw, c.folder.evaluation(c.state.step), part, measured, near, train))
    return measured


def _images(c: "Context", samples: Samples, split: str, size: tuple[int, int]) -> DataImages:
    """Images of the data in the size of those that are made, which is another if the last networks make none."""
    config, name = c.run.data, f"the {split} data of {c.run.output}"
    if size != config.size:
        config = replace(config, image_size=size, preprocessing=None)
    return DataImages(samples, config, name=name, seed=c.run.seed, facts={"split": split})


def _draw(folder: Path, part: Part, measured: Measured, near: Seen | None, train: DataImages) -> None:
    """The pictures of an evaluation: the first images, and those that are too near to an image of training."""
    end = f"-{part.split}" if part.final else ""
    make_folder(folder)
    sheet = grid(measured.grid) if measured.originals is None else pairs(measured.originals, measured.grid)
    save_png(sheet, folder / f"grid{end}.png")
    if measured.pairs and near is not None:
        nearest = train.read([pair.train for pair in measured.pairs])
        save_png(memorised_sheet(measured.pairs, near, nearest), folder / f"memorised{end}.png")


def _keep(c: "Context", part: Part, measured: Measured, seconds: float) -> None:
    """Log the scores, and write them with all that they are scores of."""
    end = f"/{part.split}" if part.final else ""
    c.log({f"{row.key}{end}": row.value for row in measured.rows} | {"perf/evaluate_seconds": seconds})
    if not c.world.leads:
        return
    append_results(c.folder.results, measured.rows)
    measured.forget()
    notes = [*measured.notes, *(note for row in measured.rows for note in row.notes)]
    for note in dict.fromkeys(notes):
        if c.evaluation and note not in c.evaluation.told:
            c.evaluation.told.add(note)
            c.tracker.say(note)


def _decides(c: "Context", measured: Measured) -> bool:
    """Whether the score that says which checkpoint is the best has its best value so far."""
    wanted, scores = c.run.checkpoint.best, c.state.scores
    if wanted == VALIDATION:
        return False
    found = [row for row in measured.rows if wanted in (row.score, row.key.removeprefix("evaluate/"))]
    if not found:
        return False
    row = found[0]
    if scores.decided_by != (now := _what_decides(row)):
        if scores.best is not None and c.world.leads:
            c.tracker.say(
                f"{row.score} is measured in another way than at step {scores.best.step}, the best one so far, and "
                "does not compare with it: the best checkpoint is looked for anew"
            )
        scores.forget_best(now)
    score = Score(c.state.step, row.value, row.error)
    return scores.decide(score, lower=row.better == "lower", influence=measured.influences.get(row.key))


def _what_decides(row: Result) -> str:
    """A score, and all that it depends on besides the weights."""
    told = repr(how_measured(row.as_dict()))
    return f"{row.key.removeprefix('evaluate/')} ({blake2b(told.encode(), digest_size=8).hexdigest()})"


def _weights(c: "Context") -> str:
    """A hash of the weights that make the images, as of a run that is read; every process must ask."""
    found = {
        f"{name} {type(stage.sampled).__name__.removeprefix('FSDP')}": full_tensors(
            stage.sampled.state_dict(), keep=c.world.leads
        )
        for name, stage in c.state.stages.items()
    }
    return str(c.world.from_leader(digest_of_weights(found) if c.world.leads else ""))
