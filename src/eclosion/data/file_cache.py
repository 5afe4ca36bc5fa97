"""Remote files on this disk: fetched once for all threads and processes, within a limit.

    <folder>/files/<key>            a whole file, checked; its time is when it was last used
    <folder>/files/<key>.partial    one on its way; whoever writes it holds its lock
    <folder>/files/.lock            held while room is made, and while a whole file gets its name

All locks are those of the operating system, which takes them back when their owner ends, however it ends: so nothing
that a killed process leaves behind blocks anybody, and a partial file that can be locked is an orphan.
"""

import errno
import fcntl
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from eclosion.data.download import PARTIAL, durable, transfer, writing
from eclosion.data.places import NotFound, Patience, Place, Stopped, local_path
from eclosion.errors import ConfigError, DataError, EnvironmentProblem, UserError

__all__ = ["FileCache", "cache_folder"]

# The option that the limit comes from, for messages.
OPTION = "data.source.cache_limit_gb"
LOCK = ".lock"
# Errors of an open that are the machine's and not the file's.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# How often a file that another process fetches, or room, is looked for.
POLL_SECONDS = 0.03
# Files that are fetched ahead at the same time.
NUM_THREADS = 2
# What may be fetched ahead and not used yet, as a share of the limit; the rest is for what is in use.
AHEAD_SHARE = 0.5
# Evictions between the moment a file is made local and the moment it is opened that are put up with.
MAX_LOST_RACES = 20
# How long `close` waits for a thread that a disk holds up.
CLOSE_SECONDS = 10.0

_OURS = re.compile(rf"[0-9a-f]{{32}}({re.escape(PARTIAL)})?")


def cache_folder() -> Path:
    """Where files and indexes are kept: `ECLOSION_CACHE`, or the user's cache folder."""
    if given := os.environ.get("ECLOSION_CACHE"):
        return Path(given).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "eclosion"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "eclosion"


@dataclass
class _Fetch:
    """A file that a thread of this process is fetching.

    Attributes:
        done: its path, or why there is none.
        urgent: whether somebody waits for it.
    """

    done: "Future[Path]" = field(default_factory=Future)
    urgent: bool = False


class FileCache:
    """Makes files local. Safe to use from several threads, and by several processes with one folder.

    Files that are local already are used where they are. Others are fetched whole. Where they would take more than the
    limit, those that were used longest ago are removed first; so a path may lose its file while it is not open, and
    `open` is the safe way to a file. What was fetched ahead and not used yet is never removed for the sake of
    something else that is fetched ahead.

    What a command gave is kept under the command's text: remove the folder `files` if it would give something else now.

    Attributes:
        folder: where everything is kept.
        limit_bytes: what the files may take.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        limit_bytes: int,
        num_processes: int = 1,
        patience: Patience | None = None,
    ) -> None:
        """Make a cache; nothing is touched yet.

        Args:
            folder: where to keep files; none means `cache_folder()`.
            limit_bytes: what all files in it may take.
            num_processes: how many processes of this run share the folder, and what may be fetched ahead.
            patience: how long a file may take.
        """
        self.folder = cache_folder() if folder is None else folder
        self.limit_bytes = limit_bytes
        self._files = self.folder / "files"
        self._patience = patience or Patience()
        self._ahead_bytes = int(limit_bytes * AHEAD_SHARE / num_processes)
        self._stop = threading.Event()
        # guards all that follows; notified when there may be something to fetch ahead
        self._changed = threading.Condition()
        self._fetches: dict[str, _Fetch] = {}
        self._planned: dict[str, Place] = {}  # in the order of use
        self._ready: set[str] = set()  # planned and seen in the folder
        self._failed: dict[str, UserError] = {}  # planned
        self._threads: list[threading.Thread] = []
        self._is_tidy = False

    def __enter__(self) -> "FileCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def path(self, place: Place) -> Path:
        """A local file with the content of a place. It may be removed when room is needed, so open it at once.

        Raises:
            NotFound, DataError: if it does not exist any more, may not be read, or changed since `stat`.
            ConfigError: if it is larger than the limit.
            EnvironmentProblem: if the server keeps failing, or the cache folder cannot be written.
        """
        local = local_path(place.url)
        return self._fetched(place) if local is None else local

    def open(self, place: Place) -> BinaryIO:
        """The content of a place, open for reading; it stays readable when the file is removed to make room.

        Raises:
            As `path`; and DataError if a local file is not the one that `stat` saw.
        """
        if (local := local_path(place.url)) is not None:
            return _open_local(place, local)
        for _ in range(MAX_LOST_RACES):
            path = self._fetched(place)
            with writing(path), suppress(FileNotFoundError):
                return path.open("rb")
        raise EnvironmentProblem(
            f"{self._files}: files are removed as fast as they are fetched. Raise {OPTION}: other runs use the folder."
        )

    def fetch_ahead(self, places: Sequence[Place]) -> None:
        """Fetch files in the background, in this order, as far as there is room. Replaces what was planned before.

        A file that cannot be fetched is an error when it is asked for, and not before.
        """
        planned = {place.key: place for place in places if local_path(place.url) is None}
        with self._changed:
            self._check_open()
            self._planned = planned
            self._ready &= planned.keys()
            self._failed = {key: error for key, error in self._failed.items() if key in planned}
            if planned and not self._threads:
                # daemons: a program that does not close the cache must not hang at its end
                self._threads = [
                    threading.Thread(target=self._fetch_planned, name=f"eclosion-ahead-{i}", daemon=True)
                    for i in range(NUM_THREADS)
                ]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop what is under way; the cache cannot be used any more."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        until = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise RuntimeError("the cache is closed")

    def _fetched(self, place: Place) -> Path:
        """The path of a file in the folder; fetched by this thread, or by another that is at it."""
        key = place.key
        with self._changed:
            self._check_open()
            self._take(key)
            if error := self._failed.pop(key, None):
                raise error
            if fetch := self._fetches.get(key):
                fetch.urgent = True
            else:
                if self._is_there(place):
                    return self._files / key
                mine = self._fetches[key] = _Fetch(urgent=True)
        try:
            return self._fetch(place, mine) if fetch is None else fetch.done.result()
        except Stopped:
            raise RuntimeError("the cache was closed while a file was fetched") from None
        except UserError:
            with self._changed:
                self._failed.pop(key, None)
            raise

    def _take(self, key: str) -> None:
        """A planned file is used: there is room to fetch another."""
        if self._planned.pop(key, None):
            self._ready.discard(key)
            self._changed.notify_all()

    def _fetch_planned(self) -> None:
        """What a thread in the background does."""
        while True:
            with self._changed:
                while not self._stop.is_set() and (place := self._next_planned()) is None:
                    self._changed.wait()
                if self._stop.is_set() or place is None:
                    return
                fetch = self._fetches[place.key] = _Fetch()
            with suppress(UserError, Stopped):  # kept for whoever asks for the file
                self._fetch(place, fetch)

    def _next_planned(self) -> Place | None:
        """The first planned file that is not here, if it fits with all that come before it."""
        num_bytes = 0
        for key, place in self._planned.items():
            num_bytes += place.size if place.size is not None else self._ahead_bytes // 4
            if num_bytes > self._ahead_bytes:
                return None
            if key in self._ready or key in self._fetches or key in self._failed:
                continue
            if not self._is_there(place):
                return place
            self._ready.add(key)
        return None

    def _fetch(self, place: Place, fetch: _Fetch) -> Path:
        """Fetch a file, and tell all who wait for it."""
        key = place.key
        try:
            path = self._make_local(place, fetch)
        except BaseException as error:
            with self._changed:
                del self._fetches[key]
                if isinstance(error, UserError) and key in self._planned:
                    self._failed[key] = error
            fetch.done.set_exception(error)
            raise
        with self._changed:
            del self._fetches[key]
            if key in self._planned:
                self._ready.add(key)
        fetch.done.set_result(path)
        return path

    def _make_local(self, place: Place, fetch: _Fetch) -> Path:
        """Fetch a file, unless another process does or did."""
        if place.size is not None and place.size > self.limit_bytes:
            raise self._too_large(place, place.size)
        path = self._files / place.key
        partial_path = path.with_name(path.name + PARTIAL)
        watch = _Watch(partial_path, self._patience.deadline_seconds)
        with writing(self._files):
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        while not self._is_there(place):
            if self._stop.is_set():
                raise Stopped
            with _locked(partial_path) as fd:
                if fd is None:
                    watch.wait(place)
                    continue
                if self._is_there(place):  # by another process, a moment ago
                    partial_path.unlink()
                    break
                self._receive(place, fd, partial_path, path, fetch)
        return path

    def _receive(self, place: Place, fd: int, partial_path: Path, path: Path, fetch: _Fetch) -> None:
        try:
            self._tidy()
            transfer(
                place,
                fd,
                partial_path,
                patience=self._patience,
                stop=self._stop,
                make_room=lambda needed, wished: self._make_room(place, fd, fetch, needed, wished),
            )
            with writing(partial_path):
                os.fsync(fd)
                _use(partial_path)
                with self._alone():  # whoever counts the files while one gets its name would not see it
                    partial_path.replace(path)
                durable(self._files)
        except BaseException:
            with suppress(OSError):  # while its lock is held: so it is ours
                partial_path.unlink()
            raise

    def _is_there(self, place: Place) -> bool:
        """Whether the file is in the folder; if so, it counts as used now."""
        path = self._files / place.key
        try:
            size = path.stat().st_size
            if place.size is not None and size != place.size:  # cut by a disk that lost power, or by hand
                path.unlink()
                return False
            _use(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise EnvironmentProblem(
                f"{path}: the cache cannot be used ({error.strerror}). Choose another folder with ECLOSION_CACHE."
            ) from None
        return True

    def _make_room(self, place: Place, fd: int, fetch: _Fetch, needed: int, wished: int) -> int:
        """Remove what was used longest ago until a file may grow; it has its new size at once, for others to count.

        Returns:
            The size that it may have: `wished`, or `needed` where that is all that fits.
        """
        if needed > self.limit_bytes:
            raise self._too_large(place, needed)
        since = time.monotonic()
        while True:
            with self._alone():
                for size in (min(wished, self.limit_bytes), needed):
                    if self._evict(size, fd, fetch.urgent):
                        with writing(self._files / place.key, size):
                            os.ftruncate(fd, size)
                        return size
            if self._stop.wait(POLL_SECONDS):
                raise Stopped
            if time.monotonic() - since > self._patience.deadline_seconds:
                raise EnvironmentProblem(
                    f"{self._files}: there is no room for {place.shown} ({needed / 1e6:.1f} MB) beside what other "
                    f"processes are fetching. Raise {OPTION}."
                )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one, of all processes, who makes room or gives a whole file its name."""
        while True:
            with _locked(self._files / LOCK) as fd:
                if fd is not None:
                    yield
                    return
            if self._stop.wait(POLL_SECONDS):
                raise Stopped

    def _evict(self, size: int, fd: int, urgent: bool) -> bool:
        """Make room for `size` bytes in the file `fd`, or remove nothing."""
        own = os.fstat(fd)
        with self._changed:
            planned = set(self._ready)
        free = self.limit_bytes - size
        evictable = []
        for name, status in _kept_in(self._files):
            if (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino):
                continue
            free -= status.st_size
            if not name.endswith(PARTIAL) and (urgent or name not in planned):
                evictable.append((name in planned, status.st_mtime_ns, name, status.st_size))
        victims = []
        for _, _, name, num_bytes in sorted(evictable):
            if free >= 0:
                break
            victims.append(name)
            free += num_bytes
        if free < 0:
            return False
        with writing(self._files):
            for name in victims:
                (self._files / name).unlink(missing_ok=True)
        return True

    def _tidy(self) -> None:
        """Remove, once, what killed processes left half-way."""
        with self._changed:
            if self._is_tidy:
                return
            self._is_tidy = True
        for partial_path in self._files.glob(f"*{PARTIAL}"):
            with suppress(OSError, EnvironmentProblem), _locked(partial_path, create=False) as fd:
                if fd is not None:
                    partial_path.unlink()

    def _too_large(self, place: Place, num_bytes: int) -> ConfigError:
        more = " and more" if place.size is None else ""
        return ConfigError(
            f"{OPTION}: {place.shown} has {_gib(num_bytes)} GiB{more}, and the cache "
            f"may hold {_gib(self.limit_bytes)} GiB. Raise {OPTION} so that several shards fit, or make smaller shards."
        )


@dataclass
class _Watch:
    """Waits for a file that another process fetches, as long as it grows.

    Attributes:
        path: of the file.
        deadline_seconds: how long it may stand still.
    """

    path: Path
    deadline_seconds: float
    _time: int = 0
    _since: float = field(default_factory=time.monotonic)

    def wait(self, place: Place) -> None:
        with suppress(OSError):
            if (written := self.path.stat().st_mtime_ns) != self._time:
                self._time, self._since = written, time.monotonic()
        if time.monotonic() - self._since > self.deadline_seconds:
            raise EnvironmentProblem(
                f"{place.shown}: another process fetches it to {self.path}, and has not got further for "
                f"{self.deadline_seconds:.0f} s. Continue or end that process."
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def _locked(path: Path, *, create: bool = True) -> Iterator[int | None]:
    """An open file that nobody else has locked, under this name; None if somebody has, or it is not there."""
    with writing(path):
        fd = _lock(path, create)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)  # and with it the lock


def _lock(path: Path, create: bool) -> int | None:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(fd), path.stat()
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass  # its last owner renamed or removed it while we waited
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _use(path: Path) -> None:
    """Note that a file is used now; by our clock, as that of file systems takes steps of milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _kept_in(folder: Path) -> list[tuple[str, os.stat_result]]:
    """The files of a cache, whole and partial, that are still there when they are looked at."""
    found = []
    with writing(folder), os.scandir(folder) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def _open_local(place: Place, path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"{place.shown}: does not exist any more.") from None
    except OSError as error:
        kind = EnvironmentProblem if error.errno in EXHAUSTED else DataError
        raise kind(f"{place.shown}: cannot be read ({error.strerror}).") from None
    status = os.fstat(file.fileno())
    if place.size not in {None, status.st_size} or place.version not in {"", str(status.st_mtime_ns)}:
        file.close()
        raise DataError(
            f"{place.shown}: the file changed after this run had looked at it. Leave files as they are while a run "
            "reads them, and start again."
        )
    return file


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g}"
