"""One writer per run folder."""

import fcntl
import json
import os
import socket
import weakref
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType

from eclosion.errors import CheckpointError, LockedError
from eclosion.rundir import RunDir

__all__ = ["RunLock", "holder"]


class RunLock:
    """The right to write to a run folder, held by at most one owner on all machines that see it.

    The operating system gives the lock back when its owner ends, however it ends; so there is nothing stale to clean,
    and the file `lock` only tells others who the owner is.

    Raises on entry:
        LockedError: if another owner, in this process or another, holds it; at once.
        CheckpointError: if the folder cannot be locked.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._fd: int | None = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or say who has it."""
        if self._fd is not None:
            raise LockedError(f"{self.run.root} is locked by this very object already.")
        path = self.run.lock
        _forget_in_children(self)
        try:
            self.run.root.mkdir(parents=True, exist_ok=True)
            # Python opens files close-on-exec: a program that is started does not inherit the lock.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_owner(self._fd)
        except BlockingIOError:
            owner = _owner(path)
            self.release()
            raise LockedError(
                f"{self.run.root} is in use by {owner}. Wait until that ends, or give another output folder."
            ) from None
        except OSError as error:
            self.release()
            raise CheckpointError(
                f"{path} cannot be locked: {error.strerror}. Give an output folder that can be written to."
            ) from None

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)  # the file stays: removing it would let two owners lock two files of one name


def holder(run: RunDir) -> str | None:
    """Who holds the lock of a run, in words; None if nobody does."""
    try:
        fd = os.open(run.lock, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Shared, and given back at once: two that look do not see each other.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _owner(run.lock)
    finally:
        os.close(fd)
    return None


def _write_owner(fd: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(owner).encode() + b"\n", 0)


def _owner(path: Path) -> str:
    """Who wrote the lock file, in words; the owner may be about to write it."""
    try:
        with path.open("rb") as file:
            owner = json.loads(file.read(4096))
        words = f"process {int(owner['pid'])} on {str(owner['host'])[:100]}, since {str(owner['started'])[:40]}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process that has just started"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


_known: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_release_in_child)


def _release_in_child() -> None:
    """A forked child shares the descriptor, and would hold the lock after its parent's death; so it closes its own."""
    for lock in list(_known):
        lock.release()


def _forget_in_children(lock: RunLock) -> None:
    _watch_forks()
    _known.add(lock)
