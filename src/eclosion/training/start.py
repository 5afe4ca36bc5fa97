"""How a run starts: its folder, its networks, and where it goes on from."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eclosion.checkpoint.lock import RunLock
from eclosion.checkpoint.storage import Loaded
from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.changes import compare
from eclosion.config.schema import RunConfig, steps_in
from eclosion.data.batch import Batch, Skip
from eclosion.data.ledger import Ledger
from eclosion.data.loader import Loader
from eclosion.data.source import Samples
from eclosion.device import environment, pick_device, pick_precision
from eclosion.errors import ConfigError, did_you_mean
from eclosion.exporting import export_task
from eclosion.registry import dump
from eclosion.report import write_report
from eclosion.rng import integer_seed
from eclosion.rundir import RunDir
from eclosion.sampling import load_trained
from eclosion.tasks.task import DataFacts, Task
from eclosion.tracking.tracker import Tracker, write_json
from eclosion.training.distributed import World
from eclosion.training.signals import StopSignals
from eclosion.training.state import Stage, TrainState

__all__ = ["Context", "Every", "start"]


@dataclass(frozen=True)
class Every:
    """How many steps lie between two of each kind."""

    log: int
    checkpoint: int
    sample: int


@dataclass
class Context:
    """Everything a run works with, made once at its start.

    Attributes:
        run, world: the config, and the processes that share the work.
        folder: the run folder.
        device, precision: where and how networks run.
        samples, loader, ledger: the data, its batches by position, and their account.
        task: on the prepared networks.
        state: what changes as the run goes.
        store, tracker: checkpoints, and numbers; only the leading process writes.
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
    every: Every
    meta: dict[str, Any]
    _recorded: int = 0
    _skipped: list[Skip] = field(default_factory=list)

    def looks_at_device(self) -> bool:
        """Whether a scalar may be read now: on a CPU always, else only when something else reads one."""
        every, state = self.every, self.state
        return self.device.type == "cpu" or any(map(state.due, (every.log, every.checkpoint, every.sample)))

    def account(self, micro_batches: Sequence[Batch]) -> None:
        """Enter a step into the ledger; processes pool what they skipped when an epoch ends."""
        self._skipped += [skip for batch in micro_batches for skip in batch.skipped]
        epoch = len(self.samples)
        if self.state.samples_seen // epoch > self._recorded // epoch:
            self._settle()

    def _settle(self) -> None:
        skipped = [skip for part in self.world.gather(self._skipped) for skip in part]
        if self.world.leads:
            for skip in skipped:
                self.tracker.say(f"skipped {skip.name}: {skip.detail}", position=skip.position, reason=skip.reason)
            self.ledger.record(range(self._recorded, self.state.samples_seen), skipped)
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
            self.store.save(self.state.step, files, state, self.meta, wait=wait)
        self.world.barrier()

    def preview_missing(self) -> bool:
        """Whether the grid of this step was due and is not there: at step 0, or after a kill."""
        missing = self.state.due(self.every.sample) and not self.folder.sample_grid(self.state.step).exists()
        return bool(self.world.from_leader(missing))

    def finish(self) -> None:
        """What follows the last step: the checkpoint on disk, the pipeline, the report."""
        self.store.close()
        self.world.barrier()
        if not self.world.leads:
            return
        if self.run.export != "no":
            trained = load_trained(self.folder.root, device="cpu")
            export_task(trained.task, self.run, self.meta, self.state.step, self.folder.root)
            self.tracker.say(f"pipeline written to {self.folder.root}")
        self.tracker.say("finished", step=self.state.step)
        write_report(self.folder.root)


@contextmanager
def start(
    run: RunConfig, samples: Samples, *, world: World, stop: StopSignals, resume: str, accept: bool
) -> Iterator[Context]:
    """Prepare everything, and go on from where the run stands.

    A run starts from, in this order: its own newest whole checkpoint; the checkpoint that `resume`
    names; scratch.

    Raises:
        ConfigError: if the folder holds another run, or the config does not fit the data or itself.
        LockedError: if another process writes to the folder.
        CheckpointError: if there are checkpoints and none is whole.
    """
    folder = RunDir(Path(run.output))
    device = pick_device(run.train.device, local_rank=world.local_rank)
    precision = pick_precision(run.train.mixed_precision, device)
    if run.train.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    num_steps = steps_in(run.train.duration, batch_size=run.train.batch_size, epoch_samples=len(samples))
    with ExitStack() as stack:
        if world.leads:
            stack.enter_context(RunLock(folder))
        world.barrier()
        store = CheckpointStore(folder, keep_last=run.checkpoint.keep_last, keep_every=run.checkpoint.keep_every)
        stack.callback(store.close)
        found, changes = world.from_leader(
            _find(run, folder, store, num_steps, resume, accept) if world.leads else None
        )
        loaded = store.load(found) if found else None

        loader = Loader(
            samples,
            run.data,
            seed=run.seed,
            batch_size=run.train.batch_size,
            micro_batch_size=run.train.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        facts = DataFacts(size=run.data.size, class_names=samples.class_names)
        torch.default_generator.manual_seed(integer_seed(run.seed, "weights"))
        task = run.task.build(facts)
        _check_frozen(run, task)
        stages = {
            name: Stage(name, net, run, world=world, device=device, fp16=precision == "fp16")
            for name, net in task.nets.items()
        }
        state = TrainState(stages, num_steps, run.train.batch_size)
        meta = _meta(run, samples, facts, device, precision, world) | {"started_from": _origin(loaded, found, folder)}
        tracker = Tracker(folder, [part.open() for part in run.track.log], dump(run), num_steps=num_steps)
        if loaded:
            _check_data(loaded, meta, found)
            state.load(loaded.files, loaded.state, leads=world.leads)
        ledger = Ledger.restore(
            loaded.state["ledger"] if loaded else None,
            folder.ledger if world.leads else None,
            num_samples=len(samples),
            max_bad_fraction=run.data.max_bad_fraction,
        )
        if world.leads:
            write_json(folder.config, dump(run))
            tracker.start(state.step)
            stack.callback(tracker.close)
            _tell(tracker, state, store, loaded, found, changes, meta)
        c = Context(
            run=run,
            world=world,
            folder=folder,
            device=device,
            precision=precision,
            samples=samples,
            loader=loader,
            ledger=ledger,
            task=task.with_nets({name: stage.net for name, stage in stages.items()}),
            state=state,
            store=store,
            tracker=tracker,
            every=_every(run, len(samples)),
            meta=meta,
            _recorded=state.samples_seen,
        )
        stop.saves_first = True
        yield c


def _find(
    run: RunConfig, folder: RunDir, store: CheckpointStore, num_steps: int, resume: str, accept: bool
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and the accepted changes since."""
    store.clean_orphans()
    own = store.latest() if resume != "never" else next(iter(store.folders()), None)
    if own is not None:
        if resume not in ("auto", "never"):
            if store.load(own).manifest.meta["started_from"] == str(Path(resume).resolve()):
                return _find(run, folder, store, num_steps, "auto", accept)  # the same command again
            raise ConfigError(
                f"{folder.root} already holds a run at {own.name}, and {resume} is another. "
                "Choose another output folder."
            )
        if resume == "never" and not run.overwrite:
            raise ConfigError(
                f"{folder.root} already holds a run at {own.name}. Go on with --resume auto, choose another output "
                "folder, or set overwrite=true."
            )
        if resume == "auto":
            before = store.load(own)
            finished = before.state["step"] >= num_steps
            try:
                changes = compare(before.manifest.meta["config"], dump(run), accept=accept, where=str(own))
                if not (run.overwrite and finished):
                    return own, [str(change) for change in changes]
            except ConfigError:
                if not run.overwrite:
                    raise
        _clear(folder)
        return None, []
    if resume in ("auto", "never"):
        return None, []
    before = store.load(Path(resume))
    changes = compare(before.manifest.meta["config"], dump(run), accept=accept, where=resume)
    return Path(resume), [str(change) for change in changes]


def _origin(loaded: Loaded | None, found: Path | None, folder: RunDir) -> str | None:
    """The checkpoint of another run that this one began with, if any."""
    if loaded is None or found is None:
        return None
    if found.resolve().is_relative_to(folder.root.resolve()):
        return loaded.manifest.meta["started_from"]  # type: ignore[no-any-return]
    return str(found.resolve())


def _clear(folder: RunDir) -> None:
    """Remove what a run wrote, and nothing else that stands in its folder."""
    for path in (folder.checkpoints, folder.samples, folder.tensorboard, folder.replay):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.config, folder.metrics, folder.ledger, folder.events, folder.report, folder.error_log):
        path.unlink(missing_ok=True)


def _check_frozen(run: RunConfig, task: Task) -> None:
    unknown = [name for name in run.train.freeze if name not in task.nets]
    if unknown:
        raise ConfigError(
            [f"train.freeze: {name!r} is no network of this task.{did_you_mean(name, task.nets)}" for name in unknown]
        )
    if set(run.train.freeze) == set(task.nets):
        raise ConfigError(f"train.freeze names every network ({', '.join(task.nets)}), so nothing would be trained.")


def _check_data(loaded: Loaded, meta: dict[str, Any], found: Path) -> None:
    before, now = loaded.manifest.meta["fingerprint"], meta["fingerprint"]
    if before != now:
        raise ConfigError(
            f"The data is not what {found} was trained on: its fingerprint was {before}, and is {now}. "
            "Put the data back, or choose another output folder."
        )


def _meta(
    run: RunConfig, samples: Samples, facts: DataFacts, device: torch.device, precision: str, world: World
) -> dict[str, Any]:
    return {
        "config": dump(run),
        "fingerprint": samples.fingerprint,
        "facts": {"class_names": list(facts.class_names), "num_samples": len(samples)},
        "environment": environment(device) | {"precision": precision, "world_size": world.size},
    }


def _every(run: RunConfig, epoch_samples: int) -> Every:
    def steps(duration: str) -> int:
        return steps_in(duration, batch_size=run.train.batch_size, epoch_samples=epoch_samples)

    return Every(steps(run.track.every), steps(run.checkpoint.every), steps(run.sample.every))


def _tell(
    tracker: Tracker,
    state: TrainState,
    store: CheckpointStore,
    loaded: Loaded | None,
    found: Path | None,
    changes: Sequence[str],
    meta: dict[str, Any],
) -> None:
    """Say how the run starts, and whatever may make its bits differ from before."""
    for warning in store.warnings:
        tracker.say(warning)
    if loaded is None:
        tracker.say(
            f"training from scratch, {state.num_steps} steps",
            num_steps=state.num_steps,
            environment=meta["environment"],
        )
        return
    for change in changes:
        tracker.say(f"accepted change {change}")
    before, now = loaded.manifest.meta["environment"], meta["environment"]
    different = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    if different:
        tracker.say(f"not the machine or versions of before, so the bits may differ: {'; '.join(different)}")
    word = "already finished" if state.done else "resuming"
    tracker.say(
        f"{word} at step {state.step} of {state.num_steps}, from {found}", num_steps=state.num_steps, environment=now
    )
