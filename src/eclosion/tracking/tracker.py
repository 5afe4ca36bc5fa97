"""Where a run's numbers and pictures go: metrics.jsonl always, and the loggers that its config names."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from eclosion.redaction import cleaned
from eclosion.rundir import RunDir

__all__ = ["Logger", "Tracker", "append_line", "is_over", "keep_lines", "write_json"]


class Logger(Protocol):
    """A part that shows or stores numbers; started once, by the process that writes the run folder."""

    def start(self, run: RunDir, config: Mapping[str, Any], *, num_steps: int, step: int) -> None:
        """Begin, or go on after `step` updates."""
        ...

    def log(self, numbers: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """Show numbers by name."""
        ...

    def log_image(self, path: Path, *, step: int) -> None:
        """Show a picture that was written to the run folder."""
        ...

    def say(self, text: str) -> None:
        """Show one line of what is happening."""
        ...

    def close(self) -> None:
        """End; nothing may be lost."""
        ...


@runtime_checkable
class Following(Logger, Protocol):
    """A logger that works beside the loop, and has something to say of that."""

    def ending(self) -> None:
        """Make an end; `close` waits for it."""
        ...

    def news(self) -> list[str]:
        """Lines that have not been shown yet."""
        ...


class Tracker:
    """Writes metrics.jsonl and events.jsonl, and hands everything on to the loggers."""

    def __init__(self, run: RunDir, loggers: Sequence[Logger], config: Mapping[str, Any], *, num_steps: int) -> None:
        self.run, self.loggers, self.config, self.num_steps = run, loggers, config, num_steps
        self._following = [logger for logger in loggers if isinstance(logger, Following)]

    def start(self, step: int) -> None:
        """Begin, or go on after `step` updates; numbers of later steps, from before a crash, are dropped."""
        keep_lines(self.run.metrics, lambda line: line["step"] <= step)
        keep_lines(self.run.events, lambda line: True)
        for logger in self.loggers:
            logger.start(self.run, self.config, num_steps=self.num_steps, step=step)

    def log(self, numbers: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """Keep and show numbers by name."""
        known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        append_line(self.run.metrics, {"step": step, "samples_seen": samples_seen, **known})
        for logger in self.loggers:
            logger.log(numbers, step=step, samples_seen=samples_seen)
        for text in self._news():
            self.say(text)

    def forget(self, prefix: str, *, step: int) -> None:
        """Drop the lines of metrics.jsonl of a step with numbers whose names begin so, as they are made again."""

        def wanted(line: Mapping[str, Any]) -> bool:
            return line["step"] != step or not any(name.startswith(prefix) for name in line)

        keep_lines(self.run.metrics, wanted)

    def log_image(self, path: Path, *, step: int) -> None:
        """Show a picture."""
        for logger in self.loggers:
            logger.log_image(path, step=step)

    def say(self, text: str, **facts: Any) -> None:
        """Show one line of what is happening, and keep it with its facts in events.jsonl."""
        self.note(text, **facts)
        for logger in self.loggers:
            logger.say(cleaned(text))

    def note(self, text: str, **facts: Any) -> None:
        """Keep one line with its facts in events.jsonl."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.run.events, {"time": now, "event": cleaned(text), **facts})

    def close(self) -> None:
        """End all loggers: those that follow first, as what they leave undone is shown by the others."""
        for follower in self._following:
            follower.ending()  # all at once, as each may take a while
        for follower in self._following:
            follower.close()
        shown_by = [logger for logger in self.loggers if logger not in self._following]
        for text in self._news():  # shown and not kept: the last line of events.jsonl says how the run ended
            for logger in shown_by:
                logger.say(text)
            if not shown_by:
                warnings.warn(text, stacklevel=2)
        for logger in shown_by:
            logger.close()

    def _news(self) -> list[str]:
        return [text for follower in self._following for text in follower.news()]


def is_over(events: Iterable[Mapping[str, Any]], before: bool = False) -> bool:
    """Whether a run has finished since its last start, by lines of its events.jsonl.

    Args:
        events: the lines.
        before: what the lines before these said.
    """
    over = before
    for event in events:
        over = event.get("event") == "finished" or (over and "environment" not in event)
    return over


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, in a single write so that a kill leaves at most one torn line at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())


def keep_lines(path: Path, wanted: Callable[[Any], bool]) -> None:
    """Drop the lines of a JSON-lines file that are not wanted, and a torn one at its end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if wanted(record):
            kept.append(line + b"\n")
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(b"".join(kept))
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
