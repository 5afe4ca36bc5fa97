"""Progress on the terminal: a bar for people, plain lines for files and CI."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from eclosion.registry import part
from eclosion.rundir import RunDir

__all__ = ["ConsoleLogger"]

# Plain lines come at most this often, so that a log file of a long run stays readable.
LINE_SECONDS = 10.0


@part
class ConsoleLogger:
    """Progress, loss and speed on the terminal; a bar where there is one, else plain lines."""

    # Whether numbers are shown, or only what happens.
    numbers: bool = True

    def open(self) -> "Terminal":
        """Ready to start."""
        return Terminal(numbers=self.numbers)


class Terminal:
    """What a person sees of a run while it goes."""

    def __init__(self, *, numbers: bool = True) -> None:
        self._numbers = numbers
        console = Console(stderr=False)
        plain = os.environ.get("CI") == "true" or "NO_COLOR" in os.environ or not console.is_terminal
        self._console = Console(no_color=True, highlight=False, soft_wrap=True) if plain else console
        self._plain = plain
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._num_steps = self._first_step = 0
        self._started = self._last_line = time.monotonic()

    def start(self, run: RunDir, config: Mapping[str, Any], *, num_steps: int, step: int) -> None:
        """Begin, or go on after `step` updates."""
        self._num_steps, self._first_step = num_steps, step
        self._started = time.monotonic()
        self._last_line = -LINE_SECONDS
        if self._numbers and not self._plain:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=step, numbers="")
            self._bar.start()

    def log(self, numbers: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """Show loss, speed and the time that remains; what validation and evaluation found stays on the terminal."""
        if not self._numbers:
            return
        if any(key.startswith(("validation/", "evaluate/")) for key in numbers):
            told = [key for key in numbers if key.startswith(("validation/", "evaluate/"))]
            shortly = [key for key in told if "/band_" not in key and not key.startswith("validation/loss_error")]
            found = "  ".join(f"{key} {numbers[key]:.5g}" for key in shortly)
            self._console.print(f"step {step}/{self._num_steps}  {found}", markup=False)
            return
        shown = [f"{key.removeprefix('train/')} {numbers[key]:.4f}" for key in numbers if key.startswith("train/loss")]
        shown += [
            f"{key} {value:.4g}" for key, value in numbers.items() if not key.startswith(("train/", "perf/", "sys/"))
        ]
        if "perf/images_per_second" in numbers:
            shown.append(f"{numbers['perf/images_per_second']:.1f} images/s")
        shown.append(f"{_clock(self._remaining(step))} left")
        text = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or step == self._num_steps:
            self._last_line = time.monotonic()
            self._console.print(f"step {step}/{self._num_steps}  {text}", markup=False)

    def log_image(self, path: Path, *, step: int) -> None:
        """A terminal shows no pictures; the path stands in the report."""

    def say(self, text: str) -> None:
        """Show one line."""
        self._console.print(escape(text))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def _remaining(self, step: int) -> float:
        done = step - self._first_step
        return (time.monotonic() - self._started) / done * (self._num_steps - step) if done > 0 else 0.0


def _clock(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
