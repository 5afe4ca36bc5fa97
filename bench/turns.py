"""Two or more sides that work in turns: one step of each, again and again, in one process."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol

from bench.row import Spread

__all__ = ["Contender", "Gate", "Side", "alternate", "idle_helpers_cpu"]

# Names of threads that work for a side beside its own; their CPU time counts.
HELPERS = ("eclosion-data",)
# A helper is idle if its clock stands still for so long.
IDLE_SECONDS = 0.002


class _Closed(BaseException):
    """Leaves a side's work at a gate."""


class Gate:
    """Where a side waits for its turn. Called at the same place of every step, it divides the work into steps."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._began = (0.0, 0.0)
        self.last = (0.0, 0.0)

    def __call__(self) -> None:
        """End a step and wait for the next turn; in the thread that works."""
        cpu, wall = time.thread_time(), time.perf_counter()
        self.last = (cpu - self._began[0], wall - self._began[1])
        self._done.release()
        self._go.acquire()
        if self._closed:
            raise _Closed
        self._began = (time.thread_time(), time.perf_counter())

    def wait(self) -> None:
        """Wait until the step at hand has ended, or the work."""
        self._done.acquire()

    def open(self) -> None:
        """Let the work go on for one step."""
        self._go.release()

    def close(self) -> None:
        """Let the work leave at this gate."""
        self._closed = True
        self._go.release()

    def over(self) -> None:
        """Wake whoever waits, because the work has ended."""
        self._done.release()


class Contender:
    """Work in a thread of its own, done one step at a time.

    All sides of a comparison are made in this way, so that none has the advantage of the main thread,
    whose memory is managed otherwise.

    Args:
        work: called with a `Gate`, which it must call at one place of every step; it may go on for ever.
    """

    def __init__(self, work: Callable[[Gate], None]) -> None:
        self._work, self._gate = work, Gate()
        self._error: BaseException | None = None
        self._helped = 0.0
        self._thread = threading.Thread(target=self._run, name="bench", daemon=True)

    def __enter__(self) -> "Contender":
        self._thread.start()
        self._gate.wait()  # everything before the first step
        self._raise()
        self._helped = _helpers_cpu()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gate.close()
        self._thread.join()

    def step(self) -> tuple[float, float]:
        """Do one step.

        Returns:
            CPU seconds, helpers' included, and seconds on the wall, during which helpers may have worked beside.
        """
        self._gate.open()
        self._gate.wait()
        self._raise()
        cpu, wall = self._gate.last
        helped = idle_helpers_cpu()
        cpu, self._helped = cpu + helped - self._helped, helped
        return cpu, wall

    def steps(self, number: int) -> tuple[float, float]:
        """Do some steps; the mean of what `step` returns."""
        done = [self.step() for _ in range(number)]
        return sum(cpu for cpu, _ in done) / number, sum(wall for _, wall in done) / number

    def _run(self) -> None:
        try:
            self._work(self._gate)
            self._error = RuntimeError("the work ended before the measurement")
        except _Closed:
            pass
        except BaseException as error:  # noqa: BLE001  (raised again, in the thread that measures)
            self._error = error
        finally:
            self._gate.over()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Side(Protocol):
    """Whatever takes turns: a `Contender`, or another process."""

    def steps(self, number: int) -> tuple[float, float]:
        """Do some steps; the mean of their CPU seconds, and of their seconds on the wall."""
        ...


def alternate(sides: Mapping[str, Side], *, rounds: int, warmups: int, steps: int = 1) -> dict[str, dict[str, Spread]]:
    """Seconds per step of each side, which take turns.

    Args:
        sides: by name. Who comes first changes from round to round.
        rounds: that count.
        warmups: rounds before them, that do not.
        steps: consecutive steps of a side in one round; its value is their mean. More than one where
            not every step is the same, such as one in ten that logs.

    Returns:
        By side, then by clock: "cpu" and "wall".
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(warmups + rounds):
        for name in _rotated(list(sides), i):
            value = sides[name].steps(steps)
            if i >= warmups:
                seconds[name].append(value)
    return {
        name: {"cpu": Spread(tuple(c for c, _ in values)), "wall": Spread(tuple(w for _, w in values))}
        for name, values in seconds.items()
    }


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def _helpers_cpu() -> float:
    """CPU seconds of all helper threads so far."""
    total = 0.0
    for thread in threading.enumerate():
        if thread.name.startswith(HELPERS) and thread.ident is not None:
            total += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return total


def idle_helpers_cpu() -> float:
    """CPU seconds of all helper threads so far, once they are idle: so that none works in another side's turn."""
    now = _helpers_cpu()
    while now > 0:
        before = now
        time.sleep(IDLE_SECONDS)
        now = _helpers_cpu()
        if now == before:
            break
    return now
