"""What a run folder says, read so that nothing missing or damaged in it stops a reader."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from eclosion.config.schema import steps_in
from eclosion.report.curves import HUGE, Series
from eclosion.rundir import RunDir, step_of
from eclosion.tracking.tracker import is_over

__all__ = ["Checkpoint", "Run", "dig", "finite", "is_count", "read_run"]

MANIFEST, STATE = "manifest.json", "state.json"
# Below it a number is taken for 0: logarithms of the rest stay in range.
TINY = 1e-100


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint; its manifest is empty when it is missing or damaged."""

    step: int
    name: str
    manifest: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file that the manifest names."""
        entries = self.manifest.get("files")
        found = [dig(entry, "size") for entry in entries.values()] if isinstance(entries, dict) else []
        return [size for size in found if is_count(size)]


@dataclass(frozen=True)
class Run:
    """Everything that a report shows.

    Attributes:
        name: of the run folder.
        config: the native config.
        series: metrics over steps, by name in the order of their first appearance.
        samples_seen: images behind the last line of metrics; None before the first.
        epochs, events: the lines of the ledger and of the events.
        grids: (step, path) of the sample grids, rising.
        checkpoints: rising.
        results: the rows of all evaluations.
        best: what the newest checkpoint says of the best one: its step, its score, and what decided.
        notes: one sentence per file that could not be read in full.
    """

    name: str
    config: dict[str, Any]
    series: dict[str, Series]
    samples_seen: int | None
    epochs: list[dict[str, Any]]
    events: list[dict[str, Any]]
    grids: list[tuple[int, Path]]
    checkpoints: list[Checkpoint]
    results: list[dict[str, Any]]
    best: dict[str, Any]
    notes: list[str]

    @property
    def step(self) -> int:
        """The last step that left something in the folder."""
        logged = [series.steps[-1] for series in self.series.values()]
        saved = [checkpoint.step for checkpoint in self.checkpoints]
        told = [step for event in self.events if is_count(step := event.get("step"))]
        return max([0, *logged, *saved, *told, *(step for step, _ in self.grids)])

    @property
    def finished(self) -> bool:
        """Whether the run has finished since its last start."""
        return is_over(self.events)

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch, once an epoch or a checkpoint is there to say so."""
        told = [epoch.get("index_count") for epoch in self.epochs]
        told += [dig(checkpoint.manifest, "meta", "facts", "num_samples") for checkpoint in self.checkpoints]
        counts = [count for count in told if is_count(count) and count]
        return counts[-1] if counts else None

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None while a duration in epochs waits for the number of samples."""
        duration, batch_size = dig(self.config, "train", "duration"), dig(self.config, "train", "batch_size")
        if not isinstance(duration, str) or not is_count(batch_size) or not batch_size:
            return None
        if "epoch" in duration and self.num_samples is None:
            return None
        try:
            return steps_in(duration, batch_size=batch_size, epoch_samples=self.num_samples or 1)
        except (ValueError, OverflowError):
            return None

    @property
    def environment(self) -> dict[str, Any]:
        """Device, threads and versions of the last start."""
        told = [checkpoint.manifest.get("meta") for checkpoint in self.checkpoints] + list(self.events)
        found = [dig(record, "environment") for record in told]
        return next((record for record in reversed(found) if isinstance(record, dict)), {})


def read_run(folder: RunDir) -> Run:
    """Read a run folder; what cannot be read is left out and noted."""
    notes: list[str] = []
    series, samples_seen = _read_metrics(folder.metrics, notes)
    checkpoints = sorted(
        (
            Checkpoint(step, path.name, _read_object(path / MANIFEST, notes))
            for path in _entries(folder.checkpoints)
            if (step := step_of(path)) is not None
        ),
        key=lambda checkpoint: checkpoint.step,
    )
    return Run(
        name=folder.root.resolve().name,
        config=_read_object(folder.config, notes),
        series=series,
        samples_seen=samples_seen,
        epochs=list(_read_lines(folder.ledger, notes)),
        events=list(_read_lines(folder.events, notes)),
        grids=sorted(
            (step, path)
            for path in _entries(folder.samples)
            if path.suffix == ".png" and (step := step_of(path.with_suffix(""))) is not None
        ),
        checkpoints=checkpoints,
        results=_read_results(folder.results, notes),
        best=_read_best(folder, checkpoints, notes),
        notes=notes,
    )


def dig(tree: object, *keys: str) -> Any:
    """The value under these keys of nested objects, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, Series], int | None]:
    points: dict[str, dict[int, float | None]] = {}
    samples_seen = None
    for line in _read_lines(path, notes):
        step = line.pop("step", None)
        seen = line.pop("samples_seen", None)
        if not is_count(step):
            continue
        samples_seen = seen if is_count(seen) else samples_seen
        for name, value in line.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                points.setdefault(name, {})[step] = finite(value)
    found = {name: sorted(values.items()) for name, values in points.items()}
    return {
        name: Series(name, [s for s, _ in line], [v for _, v in line]) for name, line in found.items()
    }, samples_seen


def _read_results(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows = _read_object(path, notes).get("results")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _read_best(folder: RunDir, checkpoints: list[Checkpoint], notes: list[str]) -> dict[str, Any]:
    """{step, value, by}; empty if nothing was compared yet."""
    if not checkpoints:
        return {}
    scores = dig(_read_object(folder.checkpoints / checkpoints[-1].name / STATE, notes), "validation")
    step, value, by = dig(scores, "best", "step"), finite(dig(scores, "best", "value")), dig(scores, "decided_by")
    if not is_count(step) or value is None:
        return {}
    return {"step": step, "value": value, "by": str(by or "validation")}


def finite(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= HUGE:  # NaN is caught too
        return None
    return float(value) if abs(value) > TINY else 0.0


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number that may count something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; a kill may have torn the last."""
    damaged = 0
    for line in filter(bytes.strip, _bytes(path, notes).splitlines()):
        record = _parse(line)
        damaged += record is None
        if record is not None:
            yield record
    if damaged:
        notes.append(f"{path.name}: {damaged:,} line{'s' if damaged > 1 else ''} could not be read.")


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    content = _bytes(path, notes)
    record = _parse(content)
    if content and record is None:
        notes.append(f"{path.parent.name}/{path.name}: is not a JSON object.")
    return record or {}


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _bytes(path: Path, notes: list[str]) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({error.strerror}).")
        return b""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
