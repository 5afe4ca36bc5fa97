"""What a run folder says, step by step, read while it grows: the numbers and pictures that go to services.

All that a step says is one row. A step is whole when a later one has been logged, or when the run is over: until then
an evaluation may still add to it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image

from eclosion.rundir import LEGEND, RunDir, step_of
from eclosion.tracking.tracker import is_over

__all__ = ["Facts", "Feed", "Lines", "Picture", "Row"]

# Lines of a file that are held in memory at a time.
CHUNK = 1000
# The keys of a line of metrics.jsonl that are no numbers to draw.
PLACE = ("step", "samples_seen")


@dataclass(frozen=True)
class Picture:
    """A picture in a run folder, under the name that services show it by."""

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Row:
    """What a run says of one step.

    Attributes:
        step: optimizer updates so far.
        samples_seen: images so far; None where only a picture was made.
        numbers: by name, all finite.
        pictures: made at this step.
    """

    step: int
    samples_seen: int | None
    numbers: Mapping[str, float]
    pictures: Sequence[Picture]

    @property
    def names(self) -> list[str]:
        """The names of all that it holds."""
        return [*self.numbers, *(picture.name for picture in self.pictures)]

    def without(self, names: Sequence[str]) -> "Row":
        """The same without what has these names."""
        numbers = {name: value for name, value in self.numbers.items() if name not in names}
        pictures = [picture for picture in self.pictures if picture.name not in names]
        return Row(self.step, self.samples_seen, numbers, pictures)


@dataclass(frozen=True)
class Facts:
    """What a service is told of a run besides its rows.

    Attributes:
        name: the name of its folder.
        config: the native config, without secrets.
        environment: device, threads and versions of its last start.
        ledger: finished epochs, and how many images they delivered and skipped.
    """

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)


class Lines:
    """The objects of a JSON-lines file that grows, and that a run replaces when it drops lines.

    Attributes:
        path: the file; it need not be there yet.
        replaced: whether the last call of `read` began again at the top.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.replaced = path, False
        self._inode = self._at = 0

    def read(self, limit: int = CHUNK) -> list[dict[str, Any]]:
        """The next objects, at most `limit`; a line that is not finished is left for the next call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        found: list[dict[str, Any]] = []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            self.replaced = bool(self._at) and (inode != self._inode or not _ends_line(file, self._at))
            if self.replaced:
                self._at = 0
            self._inode = inode
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n") or len(found) == limit:
                    break
                self._at += len(line)
                record = _object(line)
                if record is not None:
                    found.append(record)
        return found


def _ends_line(file: IO[bytes], at: int) -> bool:
    """Whether a line ends right before a place: if not, it is another file that was given the same number."""
    file.seek(at - 1)
    return file.read(1) == b"\n"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None  # torn by a kill
    return record if isinstance(record, dict) else None


class Feed:
    """The rows of a run, in order, each once; and the facts of it."""

    def __init__(self, run: RunDir, config: Mapping[str, Any]) -> None:
        self.run = run
        self.facts = Facts(run.root.resolve().name, config)
        self.over = False
        self._metrics, self._events, self._ledger = Lines(run.metrics), Lines(run.events), Lines(run.ledger)
        self._lines: dict[int, dict[str, Any]] = {}
        self._newest = self._told = -1

    def rows(self, after: int, *, last: bool) -> Iterator[Row]:
        """The rows of step `after` and of those behind it that are whole.

        Args:
            after: a step; -1 is before the first.
            last: whether the step that was logged last is whole too.
        """
        while records := self._metrics.read():
            if self._metrics.replaced:
                self._lines, self._newest, self._told = {}, -1, -1
            for record in records:
                self._add(record)
            yield from self._whole(after, self._newest - 1)
        if last:
            yield from self._whole(after, self._newest)

    def rewind(self) -> None:
        """Let `rows` begin again at the top."""
        self._metrics = Lines(self.run.metrics)
        self._lines, self._newest, self._told = {}, -1, -1

    def look(self) -> bool:
        """Bring facts up to date; whether they have changed."""
        before = self.facts, self.over
        environment, ledger = self.facts.environment, self.facts.ledger
        while records := self._events.read():
            self.over = is_over(records, self.over)
            for record in records:
                environment = record.get("environment", environment)
        while records := self._ledger.read():
            ledger = _sum({} if self._ledger.replaced else ledger, records)
        self.facts = Facts(self.facts.name, self.facts.config, environment, ledger)
        return (self.facts, self.over) != before

    def _add(self, record: Mapping[str, Any]) -> None:
        step = record.get("step")
        if not isinstance(step, int):
            return
        self._lines[step] = {**self._lines.get(step, {}), **record}
        self._newest = max(self._newest, step)

    def _whole(self, after: int, upto: int) -> Iterator[Row]:
        """The rows from `after` up to a step, which are then forgotten."""
        pictures = self._pictures(after, upto)
        for step in sorted({step for step in self._lines if step <= upto} | set(pictures)):
            line = self._lines.pop(step, {})
            if step >= after:
                numbers = {name: value for name, value in line.items() if name not in PLACE and value is not None}
                yield Row(step, line.get("samples_seen"), numbers, pictures.get(step, []))

    def _pictures(self, after: int, upto: int) -> dict[int, list[Picture]]:
        """The pictures of the steps that come next, by step.

        Only up to the step that was logged last: what lies behind it was drawn before a crash, and is drawn again.
        """
        begin, self._told = max(after, self._told + 1), max(upto, self._told)
        found: dict[int, list[Picture]] = {}
        for name, path, step in _files(self.run):
            if step is not None and begin <= step <= upto:
                with suppress(OSError, SyntaxError, ValueError):  # one that cannot be read keeps nothing else back
                    found.setdefault(step, []).append(Picture(name, path, _caption(path, step)))
        return found


def _files(run: RunDir) -> Iterator[tuple[str, Path, int | None]]:
    """The pictures of a run, each with a name and its step."""
    for path in run.samples.glob("step-*.png"):
        yield "samples", path, step_of(path.with_suffix(""))
    for path in sorted(run.evaluations.glob("step-*/*.png")):
        yield f"evaluate/{path.stem}", path, step_of(path.parent)


def _caption(path: Path, step: int) -> str:
    """The step of a picture, and how the picture is to be read if it says that.

    Raises:
        OSError: if it is no picture.
    """
    with Image.open(path) as image:
        image.verify()
        legend = image.info.get(LEGEND)
    return f"step {step}. {legend}" if legend else f"step {step}"


def _sum(ledger: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The account of all finished epochs."""
    skipped = Counter(ledger.get("skipped", {}))
    for epoch in epochs:
        skipped.update(epoch.get("skipped", {}))
    return {
        "epochs": ledger.get("epochs", 0) + len(epochs),
        "delivered": ledger.get("delivered", 0) + sum(epoch.get("delivered", 0) for epoch in epochs),
        "skipped": dict(sorted(skipped.items())),
    }
