"""How a run starts: its folder, its networks, and where it goes on from."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import deterministic

from eclosion.checkpoint.lock import RunLock
from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.schema import RunConfig, last_step, steps_in
from eclosion.data.ledger import Ledger
from eclosion.data.loader import Loader
from eclosion.data.source import Samples, ShardedSamples, array_shapes
from eclosion.device import environment, pick_device, pick_precision
from eclosion.errors import ConfigError
from eclosion.evaluation.plan import check_evaluation
from eclosion.exporting import clean_exports, refuse_untrained
from eclosion.pushing import ask_hub
from eclosion.registry import dump
from eclosion.rng import integer_seed
from eclosion.rundir import RunDir
from eclosion.tasks.task import DataFacts, Task, check_wishes, within
from eclosion.tracking.saving import Saver, Saving
from eclosion.tracking.tracker import Tracker, write_json
from eclosion.training.beginning import about_weights, begin, put_weights
from eclosion.training.context import Context, Every
from eclosion.training.distributed import World
from eclosion.training.evaluating import open_evaluation
from eclosion.training.origin import Origin, clear, find_origin
from eclosion.training.scores import VALIDATION, Scores
from eclosion.training.signals import StopSignals
from eclosion.training.state import Stage, TrainState
from eclosion.training.validation import Validation, open_validation

__all__ = ["start"]

# How long a run that ends early waits for its savers; it must be gone 25 seconds after a signal.
GRACE_SECONDS = 5.0


@contextmanager
def start(
    run: RunConfig, samples: Samples, *, world: World, stop: StopSignals, resume: str, accept: bool
) -> Iterator[Context]:
    """Prepare everything, and go on from where the run stands.

    A run starts from, in this order: its own newest whole checkpoint; the checkpoint that `resume`
    names, or else `start` in the config; the weights that `start` names; scratch.

    Raises:
        ConfigError: if the folder holds another run, or the config does not fit the data or itself.
        LockedError: if another process writes to the folder.
        CheckpointError: if there are checkpoints and none is whole.
    """
    folder = RunDir(Path(run.output))
    device = pick_device(run.train.device, local_rank=world.local_rank)
    precision = pick_precision(run.train.mixed_precision, device)
    loader = Loader(
        samples,
        run.data,
        seed=run.seed,
        batch_size=run.train.batch_size,
        micro_batch_size=run.train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    epoch_samples = loader.order.num_samples
    with ExitStack() as stack:
        stack.enter_context(_deterministic(run.train.deterministic, device))
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the caller's stream is left as it was
        world.lead(lambda: _hold(stack, RunLock(folder)))
        store = stack.enter_context(
            CheckpointStore(folder, keep_last=run.checkpoint.keep_last, keep_every=run.checkpoint.keep_every)
        )
        origin = world.lead(lambda: _origin(run, folder, store, epoch_samples, resume, accept))
        origin = begin(run, folder, store, origin, world=world, stop=stop, accept=accept)
        loaded = store.load(origin.checkpoint) if origin.checkpoint else None

        facts = DataFacts(
            size=run.data.size,
            class_names=samples.class_names,
            arrays=array_shapes(samples),
            has_captions=samples.has_captions,
        )
        task, state = _networks(run, facts, world, device, fp16=precision == "fp16")
        facts = replace(facts, made=task.made)
        meta = _meta(run, samples, facts, epoch_samples, device, precision, world) | {
            "started_from": origin.started_from,
            "start": dict(origin.facts),
        }
        before, account = dict(loaded.manifest.meta) if loaded else None, None
        if loaded and before:
            _check_data(before, meta, str(origin.checkpoint))
            state.load(loaded.files, loaded.state, leads=world.leads)
            account = _account(loaded.state, state, epoch_samples)
            meta["start"] = meta["start"] or before.get("start", {})
        elif origin.weights:
            put_weights(state, origin.weights)
        if run.export != "no" or run.hub:
            cure = "Set export=no and leave hub out, or start from weights that hold it (start)."
            refuse_untrained(state.untrained, cure=cure)  # now, and not when all is trained
        validation = stack.enter_context(open_validation(run, facts, world))
        evaluation, told = stack.enter_context(open_evaluation(run, samples, facts, task, world, first=state.span[0]))
        notes = [*_compare_scores(run, state, validation, origin, folder), *told, *_about_previews(run, state)]
        notes += about_weights(run, state, origin.weights) if origin.weights else []
        notes += world.lead(lambda: ask_hub(run.hub))
        state.num_steps = _num_steps(run, state, epoch_samples)
        savers: list[Saver] = []
        world.lead(lambda: savers.extend(part.open(folder) for part in run.track.save))
        # Nothing of an old run is removed before the new one is known to be possible.
        if origin.replaces and world.leads:
            clear(folder)
        world.barrier()
        ledger = Ledger.restore(
            account,
            folder.ledger if world.leads else None,
            num_samples=epoch_samples,
            max_bad_fraction=run.data.max_bad_fraction,
            shards=loader.shards,
        )
        del loaded  # its tensors are mapped from files, whose space a pruned checkpoint would go on taking
        tracker = Tracker(folder, [part.open() for part in run.track.log], dump(run), num_steps=state.num_steps)
        if world.leads:
            write_json(folder.config, dump(run))
            tracker.start(state.step)
            stack.callback(tracker.close)
            for note in samples.notes if isinstance(samples, ShardedSamples) else []:
                tracker.say(note)
            _tell(tracker, state, store, origin, before, meta)
            for note in notes:
                tracker.say(note)
        saving = stack.enter_context(_saving(Saving(folder, run.track.save if world.leads else (), savers), tracker))
        c = Context(
            run=run,
            world=world,
            folder=folder,
            device=device,
            precision=precision,
            samples=samples,
            loader=loader,
            ledger=ledger,
            task=task,
            state=state,
            store=store,
            tracker=tracker,
            saving=saving,
            stop=stop,
            every=_every(run, epoch_samples),
            meta=meta,
            validation=validation,
            evaluation=evaluation,
            _recorded=state.samples_seen,
        )
        stop.saves_first = True
        c.send_again()
        with _failures_recorded(c):
            yield c


def _networks(
    run: RunConfig, facts: DataFacts, world: World, device: torch.device, *, fp16: bool
) -> tuple[Task, TrainState]:
    """The task on networks ready to train, with weights that follow from the seed, and their state."""
    torch.default_generator.manual_seed(integer_seed(run.seed, "weights"))
    task = run.task.build(facts)
    check_wishes(task, run)
    check_evaluation(run, task)
    stages = {name: Stage(name, net, run, world=world, device=device, fp16=fp16) for name, net in task.nets.items()}
    return task.with_nets({name: stage.net for name, stage in stages.items()}), TrainState(stages, run.train.batch_size)


def _num_steps(run: RunConfig, state: TrainState, epoch_samples: int) -> int:
    return last_step(
        run.train.duration,
        step=state.step,
        samples_seen=state.samples_seen,
        batch_size=run.train.batch_size,
        epoch_samples=epoch_samples,
    )


def _hold(stack: ExitStack, lock: RunLock) -> None:
    stack.enter_context(lock)


@contextmanager
def _deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Choose repeatable algorithms on a GPU, and put the choice of before back; on a CPU all are repeatable."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = deterministic  # its type is not told to checkers
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    memory.fill_uninitialized_memory = False  # it costs a kernel for every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def _failures_recorded(c: Context) -> Iterator[None]:
    """Leave a word in events.jsonl about how a run ended, if not by being done."""
    try:
        yield
    except Exception as error:
        if c.world.leads:
            c.tracker.note(f"ended at step {c.state.step}: {error}", step=c.state.step, kind=type(error).__name__)
        raise


@contextmanager
def _saving(saving: Saving, tracker: Tracker) -> Iterator[Saving]:
    """The savers, for a run that waits a moment for them when it is stopped, and tells what is left."""
    try:
        yield saving
    except BaseException as error:
        saving.wait(GRACE_SECONDS)
        for line in saving.check():
            tracker.say(line)
            error.add_note(line)
        if saving.left:
            left = f"{saving.left} saves are not where they should be yet. Start the run again, and they are sent."
            tracker.say(left)
            error.add_note(left)
        raise
    finally:
        saving.close()


def _origin(
    run: RunConfig, folder: RunDir, store: CheckpointStore, epoch_samples: int, resume: str, accept: bool
) -> Origin:
    store.clean_orphans()
    clean_exports(folder.root)
    return find_origin(run, folder, store, epoch_samples=epoch_samples, resume=resume, accept=accept)


def _check_data(before: Mapping[str, Any], meta: Mapping[str, Any], where: str) -> None:
    if before["fingerprint"] not in (None, meta["fingerprint"]):  # none: imported, and nobody knows the data
        raise ConfigError(
            f"The data is not what {where} was trained on: its fingerprint was {before['fingerprint']}, "
            f"and is {meta['fingerprint']}. "
            "Put the data back, or choose another output folder."
        )


def _account(loaded: Mapping[str, Any], state: TrainState, epoch_samples: int) -> dict[str, Any]:
    """The account of a checkpoint; an imported one has none, as its epochs had another order, and begins one anew."""
    if "ledger" in loaded:
        return dict(loaded["ledger"])
    state.samples_seen -= state.samples_seen % epoch_samples
    return Ledger(None, epoch_samples, position=state.samples_seen).state()


def _meta(
    run: RunConfig,
    samples: Samples,
    facts: DataFacts,
    epoch_samples: int,
    device: torch.device,
    precision: str,
    world: World,
) -> dict[str, Any]:
    splits = {"splits": dict(samples.splits)} if isinstance(samples, ShardedSamples) else {}
    arrays = {name: list(shape) for name, shape in facts.arrays.items()}
    return {
        "config": dump(run),
        "fingerprint": samples.fingerprint,
        "facts": {
            "class_names": list(facts.class_names),
            "arrays": arrays,
            "made": {name: list(shape) for name, shape in facts.made.items()},
            "num_samples": epoch_samples,
            **splits,
        },
        "environment": environment(device) | {"precision": precision, "world_size": world.size},
    }


def _every(run: RunConfig, epoch_samples: int) -> Every:
    def steps(duration: str) -> int:
        return steps_in(duration, batch_size=run.train.batch_size, epoch_samples=epoch_samples)

    validate, evaluate = run.validate.every, run.evaluate.every
    return Every(
        log=steps(run.track.every),
        checkpoint=steps(run.checkpoint.every),
        sample=steps(run.sample.every),
        validate=None if validate is None else steps(validate),
        evaluate=None if evaluate is None else steps(evaluate),
    )


def _compare_scores(
    run: RunConfig, state: TrainState, validation: Validation | None, origin: Origin, folder: RunDir
) -> list[str]:
    """Forget the validation losses that the next ones do not compare with; what to say of that."""
    if origin.checkpoint is not None and origin.checkpoint.parent != folder.checkpoints:
        state.scores = Scores()  # those of another folder, which holds the best checkpoint
    if (state.scores.decided_by == VALIDATION) != (run.checkpoint.best == VALIDATION):
        state.scores.forget_best(run.checkpoint.best)
    if validation is None:
        return []
    before, now = state.scores.measured_on, validation.measured_on([stage.name for stage in state.trained])
    if before != now:
        state.scores.forget_validation(now)
    if before in ("", now):
        return []
    return [f"validation is on {now}, and was on {before}: the best loss so far is forgotten"]


def _about_previews(run: RunConfig, state: TrainState) -> list[str]:
    if not state.untrained or not run.sample.num_images:
        return []
    shown = within(state.stages, state.span)
    return [f"{', '.join(state.untrained)}: frozen, and never trained; previews are made with {shown} alone"]


def _tell(
    tracker: Tracker,
    state: TrainState,
    store: CheckpointStore,
    origin: Origin,
    before: Mapping[str, Any] | None,
    meta: Mapping[str, Any],
) -> None:
    """Say how the run starts, and whatever may make its bits differ from before."""
    now = meta["environment"]
    if origin.replaces:
        tracker.say(f"replaced {origin.replaces}")
    for warning in store.warnings:
        tracker.say(warning)
    if now["device"].startswith("cpu") and now["precision"] == "fp16":
        tracker.say("fp16 is slow on a CPU; train.mixed_precision=auto takes what this machine is fast at")
    if before is None:
        what = f"the weights in {origin.started_from}" if origin.weights else "scratch"
        tracker.say(f"training from {what}, {state.num_steps} steps", num_steps=state.num_steps, environment=now)
        return
    for change in origin.changes:
        if change.kind == "schedule":
            tracker.say(f"accepted change {change}")
    then = before["environment"]
    different = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    different += [f"{c.path} was {c.before}, is {c.after}" for c in origin.changes if c.rounds]
    if different:
        tracker.say(f"not as before, so the last bits may differ: {'; '.join(different)}")
    word = "already finished" if state.done else "resuming"
    where = f"at step {state.step} of {state.num_steps}, from {origin.checkpoint}"
    tracker.say(f"{word} {where}", num_steps=state.num_steps, environment=now)
