"""Whole checkpoints on their way out of the run folder: what a saver is, and the thread that feeds them."""

import hashlib
import json
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from eclosion.checkpoint.disk import link_files
from eclosion.config.templates import fill
from eclosion.errors import EnvironmentProblem, UserError
from eclosion.redaction import quoted
from eclosion.registry import dump
from eclosion.rundir import RunDir, step_of
from eclosion.tracking.tracker import write_json

__all__ = ["Saver", "SaverPart", "Saving"]

# How often a wait for savers looks up.
TICK_SECONDS = 0.05


class Saver(Protocol):
    """Takes whole checkpoints somewhere else. All its calls come from one thread, which is not the loop's.

    What fails raises a `UserError` of one line; the run goes on, and ends with an exit code that is not 0.
    """

    def save(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Take one checkpoint; returns when it is there, whole.

        Args:
            checkpoint: a folder as `checkpoint.storage` writes them, whole and on disk; it stays as it is during this
                call, and may be gone after it.
            latest: whether it is the newest; false when only a better score has made it worth saving.
            best: whether it scores best so far.
            values: what may stand in a path, by name: see `config.templates`.
        """
        ...

    def save_meta(self, files: Sequence[Path]) -> None:
        """Take files of the run folder, such as its config, to `meta`; nothing if the part names no such place.

        Called before the first checkpoint, and after the last.
        """
        ...


class SaverPart(Protocol):
    """A part of the table `savers`: says where checkpoints go.

    Attributes:
        latest, best: templates of the paths that the newest and the best checkpoint get; None saves none.
    """

    @property
    def latest(self) -> str | None: ...

    @property
    def best(self) -> str | None: ...

    def open(self, run: RunDir) -> Saver:
        """Ready to save the checkpoints of a run; nothing is sent yet, and what can be known to fail fails."""
        ...


@dataclass
class _Job:
    """One checkpoint, or files about the run, on the way to all savers.

    Attributes:
        step: of the checkpoint.
        checkpoint: a copy that stays until the job is done; None if there are only files.
        latest, best, values: as for `Saver.save`.
        files: about the run.
        only: the numbers of the savers that are to have it; None is all.
    """

    step: int
    checkpoint: Path | None = None
    latest: bool = False
    best: bool = False
    values: Mapping[str, int | float] = field(default_factory=dict)
    files: Sequence[Path] = ()
    only: frozenset[int] | None = None

    def is_for(self, i: int) -> bool:
        """Whether the saver of this number is to have it."""
        return self.only is None or i in self.only

    def targets(self, part: SaverPart) -> set[str]:
        """The paths that a saver gives this checkpoint."""
        wanted = [part.latest if self.latest else None, part.best if self.best else None]
        return {fill(path, self.values) for path in wanted if path is not None}


class Saving:
    """Hands whole checkpoints to all savers, in a thread of its own, so that nobody waits for them.

    A checkpoint that still waits when a newer one takes its paths is passed over. What has arrived is noted in the run
    folder, so that the next start sends what has not.

    Args:
        run: the run folder; this process holds its lock.
        parts: the savers of the config.
        savers: the same, opened; without, they are opened now.
    """

    def __init__(self, run: RunDir, parts: Sequence[SaverPart], savers: Sequence[Saver] | None = None) -> None:
        self._run, self._parts = run, parts
        self._savers = [part.open(run) for part in parts] if savers is None else savers
        self._arrived = _Arrived(run.saved)
        self._jobs: deque[_Job] = deque()
        self._turn = threading.Condition()
        self._at_work = self._closed = False
        self._untold: deque[str] = deque()
        self._failures: list[str] = []
        if parts:
            shutil.rmtree(run.outbox, ignore_errors=True)  # of a killed run; `catch_up` sends again what is missing
            threading.Thread(target=self._work, name="eclosion-save", daemon=True).start()

    # --- what the loop calls -------------------------------------------------------------------------------------

    def offer(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Let all savers have a checkpoint that is whole on disk; returns at once. May be called from any thread."""
        self._offer(checkpoint, latest=latest, best=best, values=values, only=None)

    def catch_up(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Let those savers have a checkpoint of before that it has not reached."""
        step = step_of(checkpoint) or 0
        for i, part in enumerate(self._parts):
            new = latest and part.latest is not None and self._arrived.step(part, "latest") != step
            top = best and part.best is not None and self._arrived.step(part, "best") != step
            if new or top:
                self._offer(checkpoint, latest=new, best=top, values=values, only=frozenset({i}))

    def meta(self, files: Sequence[Path]) -> None:
        """Let all savers have files about the run."""
        self._put(_Job(0, files=[file for file in files if file.is_file()]))

    def check(self) -> list[str]:
        """What has failed since the last call, one line each."""
        told = []
        while self._untold:
            told.append(self._untold.popleft())
        return told

    @property
    def left(self) -> int:
        """Checkpoints and files that are not where they should be yet."""
        with self._turn:
            return len(self._jobs) + self._at_work

    def wait(self, seconds: float | None = None) -> None:
        """Wait until everything is saved or has failed, or the time is over. A signal's handler may leave it."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.left and (deadline is None or time.monotonic() < deadline):
            time.sleep(TICK_SECONDS)

    def finish(self) -> None:
        """Wait until everything is saved.

        Raises:
            EnvironmentProblem: if anything failed since the start.
        """
        self.wait()
        if self._failures:
            more = f" (and {len(self._failures) - 1} more before)" if len(self._failures) > 1 else ""
            raise EnvironmentProblem(f"{self._failures[-1]}{more}")

    def close(self) -> None:
        """Take nothing more; what has not begun is left for the next start."""
        with self._turn:
            self._closed = True
            self._jobs.clear()
            self._turn.notify_all()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _offer(
        self,
        checkpoint: Path,
        *,
        latest: bool,
        best: bool,
        values: Mapping[str, int | float],
        only: frozenset[int] | None,
    ) -> None:
        wanted = [part for part in self._parts if (latest and part.latest) or (best and part.best)]
        if not wanted:
            return
        step = step_of(checkpoint) or 0
        kept = self._run.outbox / f"{checkpoint.name}-{uuid.uuid4().hex}"
        try:
            link_files(checkpoint, kept)
        except OSError as error:  # such as a full disk without links
            self._fail(f"step {step} cannot be set aside for saving: {error.strerror}.")
            return
        self._put(_Job(step, kept, latest, best, dict(values), only=only))

    def _put(self, job: _Job) -> None:
        with self._turn:
            if self._parts and not self._closed:
                self._jobs.append(job)
                self._drop_superseded()
                self._turn.notify_all()

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = self._jobs.popleft()
                self._at_work = True
            for i in range(len(self._parts)):
                if job.is_for(i):
                    self._hand_over(job, i)
            if job.checkpoint is not None:
                shutil.rmtree(job.checkpoint, ignore_errors=True)
            with self._turn:
                self._at_work = False

    def _hand_over(self, job: _Job, i: int) -> None:
        part, saver = self._parts[i], self._savers[i]
        try:
            if job.checkpoint is None:
                saver.save_meta(job.files)
            elif (targets := job.targets(part)) and not self._is_superseded(targets, i):
                latest, best = job.latest and part.latest is not None, job.best and part.best is not None
                saver.save(job.checkpoint, latest=latest, best=best, values=job.values)
                self._arrived.note(part, job.step, latest=latest, best=best)
        except Exception as error:  # noqa: BLE001 - every service has a library; the loop tells it, and the end fails
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {quoted(str(error))}."
            what = f"step {job.step}" if job.checkpoint is not None else "files about the run"
            self._fail(f"saving {what} to {dump(part).get('name', 'a saver')} failed: {said}")

    def _is_superseded(self, targets: set[str], i: int) -> bool:
        """Whether later checkpoints, which wait already, take all paths that a saver gives this one."""
        with self._turn:
            waiting = [job for job in self._jobs if job.checkpoint is not None and job.is_for(i)]
            later = [job.targets(self._parts[i]) for job in waiting]
        return targets <= set().union(*later)

    def _drop_superseded(self) -> None:
        """Forget checkpoints that wait for nothing, so that a slow saver does not keep their space."""
        for waiting in [job for job in self._jobs if job.checkpoint is not None]:
            behind = list(self._jobs)[self._jobs.index(waiting) + 1 :]
            wanted = False
            for i, part in enumerate(self._parts):
                later = [job.targets(part) for job in behind if job.checkpoint is not None and job.is_for(i)]
                wanted |= waiting.is_for(i) and not waiting.targets(part) <= set().union(*later)
            if not wanted and waiting.checkpoint is not None:
                self._jobs.remove(waiting)
                shutil.rmtree(waiting.checkpoint, ignore_errors=True)

    def _fail(self, line: str) -> None:
        line = f"{line} The run's own checkpoints are whole in {self._run.checkpoints}; start it again to save again."
        self._failures.append(line)
        self._untold.append(line)


class _Arrived:
    """Which step each saver has been given last, kept in a file of the run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._steps: dict[str, int] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._steps = {}  # then everything is sent again, which does no harm

    def step(self, part: SaverPart, which: str) -> int | None:
        return self._steps.get(self._key(part, which))

    def note(self, part: SaverPart, step: int, *, latest: bool, best: bool) -> None:
        wanted = {"latest": latest, "best": best}
        self._steps |= {self._key(part, which): step for which, now in wanted.items() if now}
        write_json(self._path, self._steps)

    def _key(self, part: SaverPart, which: str) -> str:
        """Of a saver with other options, nothing is known."""
        options = json.dumps(dump(part), sort_keys=True)
        return f"{which} {hashlib.blake2b(options.encode(), digest_size=8).hexdigest()}"
