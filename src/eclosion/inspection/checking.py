"""What a config would do, found out without training."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from eclosion.checkpoint import storage
from eclosion.checkpoint.lock import holder
from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.changes import compare, refuse
from eclosion.config.dialect import name_keys
from eclosion.config.explain import checked
from eclosion.config.load import LoadedConfig, leaves, load, translated
from eclosion.config.overrides import apply_overrides
from eclosion.config.schema import DataConfig, RunConfig, steps_in
from eclosion.data.ledger import NOT_BAD, over_budget
from eclosion.data.loader import Loader
from eclosion.data.source import Samples, ShardedSamples, array_shapes
from eclosion.device import pick_device, pick_precision
from eclosion.errors import ConfigError, EnvironmentProblem, UserError
from eclosion.evaluation.plan import check_evaluation, check_needs, count_of, open_parts
from eclosion.registry import build, dump
from eclosion.rundir import RunDir
from eclosion.sampling.examples import from_samples, validation_data, validation_source
from eclosion.tasks.task import DataFacts, Task, check_wishes
from eclosion.tracking.local import LocalLoader, LocalSaver

__all__ = ["Check", "DataCount", "Network", "Plan", "Setting", "check"]

# Images that are decoded to see whether they can be; the first ones that training would take.
MAX_LOOKED_AT = 64


@dataclass(frozen=True)
class Setting:
    """One key of the config: its dotted path, the value in effect, and where that came from.

    `origin` is "override", "config", the name of a dialect, or "default".
    """

    path: str
    value: Any
    origin: str


@dataclass(frozen=True)
class DataCount:
    """What a source holds.

    Attributes:
        num_samples: images in an epoch.
        class_names: name of each label, or empty.
        has_captions: whether images have captions.
        fingerprint: hash of what the samples are.
    """

    num_samples: int
    class_names: tuple[str, ...]
    has_captions: bool
    fingerprint: str


@dataclass(frozen=True)
class Network:
    """The size of one network.

    Attributes:
        name: its name in the task.
        trained: False for a frozen one.
        learning_rate: after warm-up; 0 for a frozen one.
        parameters: how many numbers it learns.
        blocks: the same by top-level block; they sum to `parameters`.
    """

    name: str
    trained: bool
    learning_rate: float
    parameters: int
    blocks: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """How long a run takes, counted in all units.

    Attributes:
        num_steps: optimizer updates.
        num_samples: images seen, repeats included.
        epochs: passes over the data.
        steps_per_epoch: optimizer updates in one pass.
    """

    num_steps: int
    num_samples: int
    epochs: float
    steps_per_epoch: float


@dataclass
class Check:
    """All that is known of a config before it runs.

    Attributes:
        settings: every key with its value and origin; empty if the config is not valid.
        notes: what the user should know, one line each.
        data: None if the data cannot be opened.
        validation: what a validation looks at; None without one, or if its data cannot be opened.
        evaluation: what is compared with what, one line for each part of the data; empty without evaluation.
        networks: empty if they cannot be built.
        plan: None without data.
        device, precision: where and how training would compute.
        checkpoint_bytes: size of one checkpoint on disk, to within a percent.
        free_bytes: free space where checkpoints go.
        standing: what is in the output folder, and so what `train` would do.
        problems: what would stop the run, in the order in which it was found.
    """

    settings: list[Setting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: DataCount | None = None
    validation: DataCount | None = None
    evaluation: list[str] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)
    plan: Plan | None = None
    device: str = ""
    precision: str = ""
    checkpoint_bytes: int = 0
    free_bytes: int = 0
    standing: str = ""
    problems: list[UserError] = field(default_factory=list)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """A block whose error is a problem found, once for all blocks that end in it, and not the end of the check."""
        try:
            yield
        except UserError as error:
            if str(error) not in map(str, self.problems):
                self.problems.append(error)


def check(config: object, overrides: Sequence[str] = (), *, lenient: bool = False) -> Check:
    """Look at everything that can be known before training, and find all problems at once.

    Args:
        config: path of a YAML, JSON or TOML file; a mapping; or the config object of the Hugging Face tutorial.
        overrides: texts such as "train.batch_size=32".
        lenient: whether unknown keys are left out with a note, and not refused.
    """
    found = Check()
    loaded = None
    with found.looking():
        loaded = load(config, overrides, lenient=lenient)
    if loaded:
        _look_at_run(found, loaded)
        for problem in found.problems:
            name_keys(problem, loaded.keys)
    else:
        _look_at_data_alone(found, config, overrides)
    return found


def _look_at_run(found: Check, loaded: LoadedConfig) -> None:
    run = loaded.run
    found.settings = [Setting(path, value, loaded.origins[path]) for path, value in leaves(dump(run))]
    found.notes = list(loaded.notes)
    samples: Samples | None = None
    with found.looking():
        samples = run.data.source.open()
        found.data = _count(samples)
        found.notes += samples.notes if isinstance(samples, ShardedSamples) else []
    # Stands in for data that cannot be opened, so that the rest is looked at all the same.
    stand_in = samples or build("sources", {"name": "butterflies", "size": 1}).open()
    with found.looking():
        loader = Loader(
            stand_in,
            run.data if samples else replace(run.data, resample=False, epoch_samples=None),
            seed=run.seed,
            batch_size=run.train.batch_size,
            micro_batch_size=run.train.micro_batch_size,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )
        if samples is not None:
            found.plan = _plan(run, loader.order.num_samples)
            _look_at_images(found, loader)
    task: Task | None = None
    with found.looking():
        if task := _build(run, samples, stand_in):
            found.networks = [_measure(name, net, run) for name, net in task.nets.items()]
            found.checkpoint_bytes = sum(_checkpoint_bytes(net, run, name) for name, net in task.nets.items())
            check_wishes(task, run)
    if samples is not None:
        facts = replace(_facts(run, samples), made=task.made if task else {})
        with found.looking():
            _look_at_validation(found, run, facts)
        if task is not None:
            with found.looking():
                _look_at_evaluation(found, run, samples, facts, task)
    with found.looking():
        device = pick_device(run.train.device)
        found.device, found.precision = str(device), pick_precision(run.train.mixed_precision, device)
    with found.looking():
        _look_at_disk(found, run)
    with found.looking():
        _look_at_places(run)
    with found.looking():
        found.standing = _standing(run, found.plan)


def _look_at_places(run: RunConfig) -> None:
    """What this machine has to say of where copies go, and of what the run starts from; no service is asked."""
    for saver in run.track.save:
        if isinstance(saver, LocalSaver):
            saver.open(RunDir(Path(run.output)))
    if isinstance(run.start, LocalLoader) and not run.start.only_when_resuming:
        run.start.find()


def _look_at_data_alone(found: Check, config: object, overrides: Sequence[str]) -> None:
    """The data of a config that is wrong elsewhere."""
    try:
        tree = apply_overrides(translated(config)[1].tree, overrides)
        data = checked(DataConfig, tree.get("data") or {})
    except (UserError, RecursionError):
        return  # known already
    with found.looking():
        found.data = _count(data.source.open())


def _count(samples: Samples) -> DataCount:
    return DataCount(len(samples), samples.class_names, samples.has_captions, samples.fingerprint)


def _plan(run: RunConfig, epoch_samples: int) -> Plan:
    batch_size = run.train.batch_size
    steps = steps_in(run.train.duration, batch_size=batch_size, epoch_samples=epoch_samples)
    return Plan(steps, steps * batch_size, steps * batch_size / epoch_samples, epoch_samples / batch_size)


def _look_at_images(found: Check, loader: Loader) -> None:
    """Decode the first images of the run; raises if more are bad than may be."""
    num_samples = loader.order.num_samples
    batch = loader.batch_at(range(min(loader.batch_size, num_samples, MAX_LOOKED_AT)))
    bad = 0
    for skip in batch.skipped:
        bad += skip.reason not in NOT_BAD
        error = over_budget(skip, bad, num_samples, loader.config.max_bad_fraction, loader.shards)
        if error:
            raise error
        found.notes.append(f"{skip.name}: {skip.detail} It will be skipped.")


def _look_at_validation(found: Check, run: RunConfig, facts: DataFacts) -> None:
    """Open the validation data, and decode one of its images."""
    with validation_data(run, facts) as validation:
        if validation is None:
            if validation_source(run) and run.evaluate.every is None:
                found.notes.append("there is validation data, and it is not used: validate.every is none.")
            return
        from_samples(validation, run.data, 1, seed=run.seed)
        whole, wanted = _count(validation), run.validate.num_samples
        found.validation = replace(whole, num_samples=min(wanted or whole.num_samples, whole.num_samples))
        if wanted and wanted > whole.num_samples:
            found.notes.append(f"validate.num_samples is {wanted}, and there are {whole.num_samples}; all are used.")


def _look_at_evaluation(found: Check, run: RunConfig, samples: Samples, facts: DataFacts, task: Task) -> None:
    """Open what images are compared with, and load what looks at them."""
    check_evaluation(run, task)
    if run.evaluate.every is None:
        return
    with open_parts(run, samples, facts) as (parts, notes):
        found.notes += notes
        for part in parts:
            told = f"{count_of(run, part, task):,} images against the {len(part.samples):,} of {part.split}"
            found.evaluation.append(told + (", after the last step" if part.final else ""))
            found.notes += [note for note in check_needs(run, part, task) if note not in found.notes]


def _facts(run: RunConfig, samples: Samples) -> DataFacts:
    return DataFacts(
        size=run.data.size,
        class_names=samples.class_names,
        arrays=array_shapes(samples),
        has_captions=samples.has_captions,
    )


def _build(run: RunConfig, samples: Samples | None, stand_in: Samples) -> Task | None:
    """The task; None if it cannot be built on what stands in for the data, which may lack what the data has."""
    try:
        task: Task = run.task.build(_facts(run, stand_in))
    except ConfigError:
        if samples is None:
            return None
        raise
    return task


def _measure(name: str, net: nn.Module, run: RunConfig) -> Network:
    sizes = {block: _num_parameters(module) for block, module in net.named_children()}
    blocks = {block: size for block, size in sizes.items() if size}
    total = _num_parameters(net)
    loose = total - sum(blocks.values())
    trained = name not in run.train.freeze
    learning_rate = run.optimizer.of_network(name).learning_rate if trained else 0.0
    return Network(name, trained, learning_rate, total, blocks | ({"other": loose} if loose else {}))


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _checkpoint_bytes(net: nn.Module, run: RunConfig, name: str) -> int:
    """Weights and each average in full; two moments per trained parameter."""
    weights: int = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    moments = 0 if name in run.train.freeze else 2 * sum(p.numel() * p.element_size() for p in net.parameters())
    return weights * (1 + len(run.ema.decays)) + moments


def _look_at_disk(found: Check, run: RunConfig) -> None:
    folder = Path(run.output).absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise EnvironmentProblem(f"{folder} cannot be written to. Choose another output folder.")
    found.free_bytes = shutil.disk_usage(folder).free
    decides = run.validate.every if run.checkpoint.best == "validation" else run.evaluate.every
    best = run.checkpoint.keep_best and decides is not None
    kept = run.checkpoint.keep_last + best + 1  # the newest is written before the oldest is removed
    needed = kept * found.checkpoint_bytes
    if needed > found.free_bytes:
        raise EnvironmentProblem(
            f"{run.output}: {kept} checkpoints need {needed / 1e6:.1f} MB, and {found.free_bytes / 1e6:.1f} MB are "
            "free. Make room, or choose another output folder."
        )


def _standing(run: RunConfig, plan: Plan | None) -> str:
    """What is in the output folder; raises what `train` would raise because of it."""
    folder = RunDir(Path(run.output))
    if owner := holder(folder):
        raise EnvironmentProblem(f"{folder.root} is in use by {owner}. Wait until that ends.")
    newest = _newest(folder)
    if newest is None:
        return "no run is there; training starts from scratch"
    num_steps = plan.num_steps if plan else 0
    if run.overwrite and plan and newest.step >= num_steps:
        return f"the finished run there is replaced (overwrite), at step {newest.step}"
    changes = compare(newest.meta["config"], dump(run))
    if run.overwrite and any(change.kind == "identity" for change in changes):
        return f"another run is there, at step {newest.step}, and is replaced (overwrite)"
    refuse(changes, accept=False, where=str(folder.checkpoint(newest.step)))
    if plan and newest.step >= num_steps:
        return f"the run there is finished, at step {newest.step}"
    return f"the run there goes on from step {newest.step}"


def _newest(folder: RunDir) -> storage.Manifest | None:
    """The manifest of the newest checkpoint whose files have the right sizes."""
    for path in CheckpointStore(folder).folders():
        try:
            return storage.glance(path)
        except storage.DamagedError:
            continue
    return None
