"""Everything a run works with, and what it does with several of them at once."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.schema import RunConfig
from eclosion.data.batch import Batch, Skip
from eclosion.data.ledger import NOT_BAD, Ledger
from eclosion.data.loader import Loader
from eclosion.data.source import Samples
from eclosion.diffusion.lowres import resize
from eclosion.exporting import export_trained
from eclosion.pushing import push_finished
from eclosion.report import write_report
from eclosion.rundir import RunDir
from eclosion.sampling import load_trained, to_uint8
from eclosion.sampling.examples import Examples, from_samples, opened, prepared, validation_source
from eclosion.tasks.task import Task
from eclosion.tracking.saving import TICK_SECONDS, Saving
from eclosion.tracking.tracker import Tracker
from eclosion.training.distributed import World
from eclosion.training.evaluating import Evaluation
from eclosion.training.scores import VALIDATION
from eclosion.training.signals import StopSignals
from eclosion.training.state import TrainState
from eclosion.training.validation import Validation

__all__ = ["Context", "Every"]

# Skipped samples that are told of one by one, each time the ledger is brought up to date; all are counted there.
MAX_TOLD = 20


@dataclass(frozen=True)
class Every:
    """How many steps lie between two of each kind; None is never."""

    log: int
    checkpoint: int
    sample: int
    validate: int | None = None
    evaluate: int | None = None


@dataclass
class Context:
    """Everything a run works with, made once at its start.

    Attributes:
        run, world: the config, and the processes that share the work.
        folder: the run folder.
        device, precision: where and how networks run.
        samples, loader, ledger: the data, its batches by position, and their account.
        validation: the data that is not trained on, if there is any to validate with.
        evaluation: what images are scored against, if they are.
        task: on the prepared networks.
        state: what changes as the run goes.
        store, tracker, saving: checkpoints, numbers, and what becomes of checkpoints; only the leading process writes.
        stop: where signals are noted.
        every: what happens how often.
        meta: what each checkpoint says of itself.
    """

    run: RunConfig
    world: World
    folder: RunDir
    device: torch.device
    precision: Any
    samples: Samples
    loader: Loader
    ledger: Ledger
    task: Task
    state: TrainState
    store: CheckpointStore
    tracker: Tracker
    saving: Saving
    stop: StopSignals
    every: Every
    meta: dict[str, Any]
    validation: Validation | None = None
    evaluation: Evaluation | None = None
    _recorded: int = 0
    _skipped: list[Skip] = field(default_factory=list)

    def looks_at_device(self) -> bool:
        """Whether a scalar may be read now: on a CPU always, else only when something else reads one."""
        every, state = self.every, self.state
        often = (every.log, every.checkpoint, every.sample, every.validate, every.evaluate)
        return self.device.type == "cpu" or any(map(state.due, often))

    def account(self, micro_batches: Sequence[Batch]) -> None:
        """Enter a step into the ledger; processes pool what they skipped when an epoch ends."""
        self._skipped += [skip for batch in micro_batches for skip in batch.skipped]
        epoch = self.loader.order.num_samples
        if self.state.samples_seen // epoch > self._recorded // epoch:
            self._settle()

    def _settle(self) -> None:
        skipped = [skip for part in self.world.gather(self._skipped) for skip in part]
        if self.world.leads:
            for skip in [skip for skip in skipped if skip.reason not in NOT_BAD][:MAX_TOLD]:
                self.tracker.say(f"skipped {skip.name}: {skip.detail}", position=skip.position, reason=skip.reason)
        # Only the ledger knows what all processes skipped; if that is too much, all must stop.
        self.world.lead(lambda: self.ledger.record(range(self._recorded, self.state.samples_seen), skipped))
        self._recorded, self._skipped = self.state.samples_seen, []

    def log(self, numbers: dict[str, float]) -> None:
        """Keep and show numbers."""
        if self.world.leads:
            self.tracker.log(numbers, step=self.state.step, samples_seen=self.state.samples_seen)

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint; every process must come, the leading one writes."""
        self._settle()
        files, numbers = self.state.tensors(), self.state.numbers(self.world)
        if self.world.leads:
            state = numbers | {"ledger": self.ledger.state()}
            best = self.state.scores.best if self.run.checkpoint.keep_best else None
            keep = best.step if best else None
            self.store.save(self.state.step, files, state, self.meta, keep=keep, wait=wait, then=self._offer())
        self.world.barrier()

    def _offer(self) -> Callable[[Path], None]:
        """What lets the savers have the checkpoint of this step, when it is on disk."""
        best, values = self.state.scores.best, self._values(self.state.samples_seen, self.state.step)
        is_best = best is not None and best.step == self.state.step
        return lambda folder: self.saving.offer(folder, latest=True, best=is_best, values=values)

    def _values(self, samples_seen: int, step: int) -> dict[str, int | float]:
        """What may stand in the paths of savers."""
        epoch, scores = self.loader.order.num_samples, self.state.scores
        known = scores.best is not None and scores.decided_by == VALIDATION
        return {
            "epoch": samples_seen // epoch,
            "sample": samples_seen % epoch,
            "step": step,
            "samples_seen": samples_seen,
            "best_validation_loss": scores.best.value if known and scores.best else math.nan,
        }

    def send_again(self) -> None:
        """Let savers have what is on disk and has not reached them, and files about the run."""
        if not self.run.track.save or not self.world.leads:
            return
        self.saving.meta(self._about())
        for step in {self.state.step, self.state.scores.best.step if self.state.scores.best else self.state.step}:
            folder, best = self.folder.checkpoint(step), self.state.scores.best
            if folder.is_dir():
                seen = self.state.samples_seen - (self.state.step - step) * self.run.train.batch_size
                self.saving.catch_up(
                    folder,
                    latest=step == self.state.step,
                    best=best is not None and best.step == step,
                    values=self._values(seen, step),
                )

    def tell_failed_saves(self) -> None:
        """Say what savers have failed at since the last step; the run goes on."""
        for line in self.saving.check():
            self.tracker.say(line)

    def _about(self) -> list[Path]:
        """The files about the run that savers may want."""
        return [self.folder.config, self.folder.ledger, self.folder.results]

    @contextmanager
    def evaluating(self) -> Iterator[Task]:
        """The task on the networks that make pictures, which are in eval mode inside the block."""
        nets = {name: stage.sampled for name, stage in self.state.stages.items()}
        before = {name: net.training for name, net in nets.items()}
        for net in nets.values():
            net.eval()
        try:
            yield self.task.with_nets(nets)
        finally:
            for name, net in nets.items():
                net.train(before[name])

    def preview_missing(self) -> bool:
        """Whether the grid of this step was due and is not there: at step 0, or after a kill."""
        missing = self.state.due(self.every.sample) and not self.folder.sample_grid(self.state.step).exists()
        return bool(self.world.from_leader(missing))

    def validation_missing(self) -> bool:
        """Whether the validation of this step was due and was not made: at step 0, or after a signal."""
        return self._missing(self.every.validate, self.state.scores.step, "validation/")

    def evaluation_missing(self) -> bool:
        """Whether the evaluation of this step was due and was not finished; never at step 0."""
        return self.state.step > 0 and self._missing(self.every.evaluate, self.state.scores.evaluated, "evaluate/")

    def _missing(self, every: int | None, newest: int, prefix: str) -> bool:
        """Whether something is due again; what a killed process logged of it, and did not save, is dropped."""
        missing = self.state.due(every) and newest != self.state.step
        if missing and self.world.leads:
            self.tracker.forget(prefix, step=self.state.step)
        return missing

    @cached_property
    def examples(self) -> Examples | None:
        """What previews are made from: the first samples of the validation data, or of the training data.

        If they do not begin with the first network, they begin with small versions of these.
        """
        count, (first, _) = self.run.sample.num_images, self.state.span
        if not count or not (self.task.wants or first):
            return None

        def read() -> Batch:
            with ExitStack() as stack:
                samples = self.validation.samples if self.validation else None
                if samples is None and (source := validation_source(self.run)):
                    samples = stack.enter_context(opened(source))
                return from_samples(samples or self.samples, self.run.data, count, seed=self.run.seed)

        batch = self.world.wait_for(self.stop, read)  # a server may keep it waiting
        agree = partial(self.world.agree_to_stop, self.stop)
        agree()
        examples = prepared(self.task, batch, self.device, agree=agree)
        if first:
            small = resize(batch["image"], list(self.task.sizes.values())[first - 1])
            examples = replace(examples, image=small, originals=to_uint8(small))
        return examples

    def finish(self) -> None:
        """What follows the last step: the checkpoint on disk, the pipeline, the report. Can be left and done again."""
        self.store.close()
        self.saving.meta(self._about())
        while self.world.highest(self.saving.left):  # all meet, as one that waits long would be taken for dead
            self.world.agree_to_stop(self.stop)
            time.sleep(TICK_SECONDS)
        self.tell_failed_saves()
        self.world.agree_to_stop(self.stop)
        self.stop.saves_first = False  # all is saved: a signal may now leave from anywhere
        self.world.barrier()
        self.world.lead_slowly(self._conclude, self.stop)  # an upload takes its time

    def _conclude(self) -> None:
        """What the leading process does at the end; what savers failed at comes last, and fails the run."""
        if self.run.export != "no":
            export_trained(load_trained(self.folder.root, device="cpu"), self.folder.root, pipeline=self.run.export)
            self.tracker.say(f"pipeline written to {self.folder.root}")
        if self.run.hub:
            self.tracker.say(f"pushing the pipeline to {self.run.hub.repo}")
            exported = self.run.export != "no"
            pushed = push_finished(self.run.hub, self.folder, step=self.state.step, exported=exported)
            self.tracker.say(f"pipeline pushed to {pushed.url}, commit {pushed.commit[:8]}", commit=pushed.commit)
        self.tracker.say("finished", step=self.state.step)
        write_report(self.folder.root)
        self.saving.finish()
