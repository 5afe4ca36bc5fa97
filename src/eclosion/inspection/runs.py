"""The runs below a folder, and how far each is. Reads small files only, and never fails on a broken run."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from eclosion.checkpoint.lock import holder
from eclosion.rundir import RunDir, step_of

__all__ = ["RunInfo", "list_runs"]

State = Literal["running", "finished", "stopped", "failed"]
# Deeper than anybody keeps runs; keeps a search from a home folder from taking minutes.
MAX_DEPTH = 4
# The end of metrics.jsonl that is read; a line has a few hundred bytes.
TAIL_BYTES = 65_536


@dataclass(frozen=True)
class RunInfo:
    """A run as its folder tells it.

    Attributes:
        folder: the run folder.
        state: "running" if a process holds its lock; "finished"; "failed" if the last thing it left is a
            traceback; else "stopped".
        step: optimizer updates so far; None if it has told of none.
        num_steps: optimizer updates of the whole run; None if it does not say.
        loss: the last one logged.
        updated: when it last wrote, in UTC.
    """

    folder: Path
    state: State
    step: int | None
    num_steps: int | None
    loss: float | None
    updated: datetime


def list_runs(folder: str | Path = ".") -> list[RunInfo]:
    """The runs in a folder and its sub-folders, the one that wrote last first."""
    found = [_describe(RunDir(path)) for path in _run_folders(Path(folder), MAX_DEPTH)]
    return sorted(found, key=lambda run: run.updated, reverse=True)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    run = RunDir(folder)
    if run.config.is_file() and (run.events.exists() or run.checkpoints.is_dir()):
        yield folder
    elif depth > 0:
        for path in _sub_folders(folder):
            yield from _run_folders(path, depth - 1)


def _sub_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []  # a folder that cannot be listed holds no run that can
    return [folder / name for name in sorted(names)]


def _describe(run: RunDir) -> RunInfo:
    events, metrics = _last_lines(run.events), _last_lines(run.metrics)
    steps = [_whole(line.get("step")) for line in (events + metrics)[-1:] + metrics[-1:]]
    steps += [step_of(path) for path in _sub_folders(run.checkpoints)]
    losses = [line["train/loss"] for line in metrics if isinstance(line.get("train/loss"), int | float)]
    return RunInfo(
        folder=run.root,
        state=_state(run, events),
        step=max((step for step in steps if step is not None), default=None),
        num_steps=next((n for n in (_whole(line.get("num_steps")) for line in reversed(events)) if n), None),
        loss=losses[-1] if losses else None,
        updated=datetime.fromtimestamp(max(_written(run)), UTC),
    )


def _state(run: RunDir, events: list[dict[str, Any]]) -> State:
    if holder(run):
        return "running"
    last = events[-1] if events else {}
    if str(last.get("event", "")).startswith("finished"):
        return "finished"
    # A run that ends by itself says how; one that was killed says nothing.
    return "failed" if last.get("kind") not in (None, "Interrupted") else "stopped"


def _written(run: RunDir) -> list[float]:
    return [_modified(path) for path in (run.config, run.metrics, run.events, run.checkpoints, run.error_log)]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The objects at the end of a JSON-lines file; lines that are none are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # torn by a kill, or cut by the start of the tail
        if isinstance(value, dict):
            found.append(value)
    return found
