"""Where a run goes on from: its own newest checkpoint, another's, or scratch."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.changes import Change, compare, refuse
from eclosion.config.schema import RunConfig, last_step
from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import dump
from eclosion.rundir import RunDir

__all__ = ["Origin", "clear", "find_origin"]

# Hidden before it is removed, so that a kill half-way leaves no part of an old run to go on from.
REMOVED = ".removed-checkpoints"
# What a run calls its checkpoints, pictures and event files, and what a killed save leaves.
OURS = re.compile(r"step-\d{8,}(\.png)?|\.(partial|replaced)-.+|events\.out\.tfevents\..+")


@dataclass(frozen=True)
class Origin:
    """Where a run goes on from.

    Attributes:
        checkpoint: the folder to load; None starts from scratch.
        replaces: what stands in the run folder and gives way, in words; None if nothing does.
        changes: the keys whose values are not those of the checkpoint; all of them may change.
        started_from: the checkpoint of another run, or the weights, that this one began with, if any.
        weights: the file or folder whose weights are put into the networks, if it is not a checkpoint.
        facts: what is known of it: where it is from, and which version of it.
    """

    checkpoint: Path | None = None
    replaces: str | None = None
    changes: Sequence[Change] = field(default_factory=tuple)
    started_from: str | None = None
    weights: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def find_origin(
    run: RunConfig, folder: RunDir, store: CheckpointStore, *, epoch_samples: int, resume: str, accept: bool
) -> Origin:
    """Decide where a run goes on from; nothing on disk is touched.

    In this order: its own newest whole checkpoint; the checkpoint that `resume` names; scratch.

    Raises:
        ConfigError: if the folder holds another run, or keys have changed that may not.
        CheckpointError: if there are checkpoints and none is whole.
    """
    named = _named(resume)
    own = store.latest() if resume != "never" else next(iter(store.folders()), None)
    if own is None:
        left = "what a run left that never saved" if folder.config.exists() else None
        if left and not folder.holds_run():
            raise ConfigError(f"{folder.config}: no run wrote that. Choose another output folder.")
        if named is None:
            return Origin(replaces=left)
        before = store.load(named).manifest.meta
        changes = compare(before["config"], dump(run))
        refuse(changes, accept=accept, where=str(named))
        return Origin(named, replaces=left, changes=changes, started_from=str(named.resolve()))
    if resume == "never":
        if not run.overwrite:
            raise ConfigError(
                f"{folder.root} already holds a run at {own.name}. Go on with --resume auto, choose another output "
                "folder, or set overwrite=true."
            )
        return Origin(replaces=f"the run at {own.name}")
    loaded = store.load(own)
    meta: dict[str, Any] = dict(loaded.manifest.meta)
    if named is not None and meta.get("started_from") != str(named.resolve()):
        raise ConfigError(
            f"{folder.root} already holds a run at {own.name}, and {resume} is another. Choose another output folder."
        )
    changes = compare(meta["config"], dump(run))
    different = any(change.kind == "identity" for change in changes)
    if run.overwrite and (different or _finished(run, loaded.state, epoch_samples)):
        return Origin(replaces=f"the run at {own.name}")
    refuse(changes, accept=accept, where=str(own))
    return Origin(own, changes=changes, started_from=meta.get("started_from"))


def _named(resume: str) -> Path | None:
    """The checkpoint that `resume` names, or None for "auto" and "never"."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume)
    if not (path / "manifest.json").is_file():
        hint = did_you_mean(resume, ("auto", "never"), limit=0)
        raise ConfigError(
            f"resume is {resume!r}, which is no checkpoint.{hint} Give auto, never, or the path of a checkpoint, "
            "such as runs/a/checkpoints/step-00001000."
        )
    return path


def _finished(run: RunConfig, state: dict[str, Any], epoch_samples: int) -> bool:
    last = last_step(
        run.train.duration,
        step=state["step"],
        samples_seen=state["samples_seen"],
        batch_size=run.train.batch_size,
        epoch_samples=epoch_samples,
    )
    return bool(state["step"] >= last)


def clear(folder: RunDir) -> None:
    """Remove what a run wrote, and nothing else that stands in its folder. Only under the run's lock."""
    hidden = folder.root / REMOVED
    _remove_ours(hidden, folder.checkpoints)  # of a time before, that was killed
    if folder.checkpoints.exists():
        folder.checkpoints.rename(hidden)
        _remove_ours(hidden, folder.checkpoints)
    for place in (folder.samples, folder.evaluations, folder.tensorboard):
        _remove_ours(place, place)
    for path in (folder.tracking, folder.replay, folder.start):
        shutil.rmtree(path, ignore_errors=not path.exists())
    files = (folder.config, folder.metrics, folder.ledger, folder.events, folder.results, folder.report)
    for path in (*files, folder.error_log):
        path.unlink(missing_ok=True)


def _remove_ours(place: Path, back: Path) -> None:
    """Remove what a run wrote into a folder; the rest stands in `back` afterwards."""
    for entry in list(place.iterdir()) if place.is_dir() else []:
        if not OURS.fullmatch(entry.name):
            if place != back:
                back.mkdir(exist_ok=True)
                entry.rename(back / entry.name)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
