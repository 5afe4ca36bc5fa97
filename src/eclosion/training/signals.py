"""Signals that ask a run to stop: noted at once, acted on between two micro-batches."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["StopRequested", "StopSignals"]

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A launcher may pass on a signal that its children got already; only a later one is somebody who insists.
INSISTS_SECONDS = 1.0


class StopRequested(BaseException):
    """Leaves sampling or start-up when a signal has come; the loop turns it into a checkpoint."""


class StopSignals:
    """While in use, the first signal is noted, and one that comes a second later ends the process at once.

    Attributes:
        received: number of the signal, or 0.
        saves_first: whether there is something to save, so that stopping waits for the loop; until
            then, during start-up, a signal leaves through `StopRequested` wherever it comes.
    """

    def __init__(self) -> None:
        self.received = 0
        self.saves_first = False
        self._noted: float | None = None  # when this process was first asked, which another may have been before
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is not None:
            if now - self._noted > INSISTS_SECONDS:
                os._exit(128 + number)
            return
        self._noted = now
        self.received = self.received or number
        if not self.saves_first:
            raise StopRequested

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """A wait that a signal may end at once, through `StopRequested`, as nothing is under way in it."""
        before, self.saves_first = self.saves_first, False
        try:
            self.on_step()
            yield
        finally:
            self.saves_first = before

    def on_step(self, *_: object) -> None:
        """Leave through `StopRequested` if a signal has come; called inside long work."""
        if self.received:
            raise StopRequested
