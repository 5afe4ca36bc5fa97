"""A whole file from wherever it is to this disk: complete, checked, and under its name only then."""

import errno
import hashlib
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eclosion.data.places import Checksum, Patience, Persistence, Place, Stopped, Stream, Transient, scheme_of
from eclosion.data.remote import open_stream
from eclosion.errors import DataError, EnvironmentProblem

__all__ = ["PARTIAL", "download", "durable", "transfer", "writing"]

PARTIAL, JOURNAL = ".partial", ".partial.json"
# How often a waiting transfer looks whether it is still wanted and fast enough.
TICK_SECONDS = 0.05
# Pieces that are read ahead of the disk.
PIECES_AHEAD = 2
# Room is asked for in such steps where the size of a file is not known.
GROWTH = 64 << 20  # bytes
# What a download that can be gone on with loses at most by a kill.
KEPT_EVERY = 64 << 20  # bytes
# Downloads that a certain checksum may reject before it is believed.
MAX_MISMATCHES = 3

# Called before a file grows, with the size that it needs and a size that would save asking again soon; returns the
# size that it may have, or raises.
MakeRoom = Callable[[int, int], int]

# Stores whose ETags look like hashes of the content and are none, such as buckets that encrypt.
_etag_is_no_hash: set[str] = set()


def download(
    place: Place,
    to: Path,
    *,
    patience: Patience | None = None,
    stop: threading.Event | None = None,
    max_bytes: int | None = None,
    resume: bool = False,
) -> Place:
    """Fetch a whole file: written aside, checked, made durable and renamed.

    Tries that fail are repeated with growing waits, and go on where the last one ended if the server allows. A command
    is run once.

    Args:
        place: the file, as `stat` saw it.
        to: where it shall be; replaced if it is there.
        patience: how long it may take.
        stop: when set, it ends soon.
        max_bytes: the most that is taken.
        resume: whether what came before a failure, a signal or a kill stays, and the next call with this goes on with
            it; then no other process may fetch to the same path.

    Returns:
        The place with the size, and the version if it was known, of what was fetched.

    Raises:
        NotFound: if it does not exist any more.
        DataError: if it may not be read, changed since `stat`, has more than `max_bytes`, or is not what its
            checksum says; or if a command fails.
        EnvironmentProblem: if the server keeps failing, or the file cannot be written.
        Stopped: if `stop` was set.
    """
    partial_path = to.with_name(f"{to.name}{PARTIAL}" if resume else f"{to.name}{PARTIAL}-{uuid.uuid4().hex}")
    journal = _Journal(to.with_name(f"{to.name}{JOURNAL}"), place) if resume else None
    with writing(partial_path):
        fd = os.open(partial_path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL), 0o644)
    way = _Transfer(
        place, fd, partial_path, patience or Patience(), stop or threading.Event(), _at_most(place, max_bytes)
    )
    way.journal = journal
    try:
        if journal is not None:
            journal.go_on(way)
        fetched = way.run()
        with writing(partial_path):
            os.fsync(fd)
            partial_path.replace(to)
            durable(to.parent)
        if journal is not None:
            journal.forget()
    except BaseException as error:
        with suppress(OSError):
            if journal is None or isinstance(error, DataError):  # what came is of no use
                partial_path.unlink()
                if journal is not None:
                    journal.path.unlink()
            else:
                journal.keep(way)
        raise
    finally:
        os.close(fd)
    return fetched


class _Journal:
    """How much of a file that is on its way is durable on this disk, and of which version it is.

    Args:
        path: where that is written.
        place: the file.
    """

    def __init__(self, path: Path, place: Place) -> None:
        self.path, self._place, self._kept = path, place, 0

    def go_on(self, way: "_Transfer") -> None:
        """Let a transfer go on with what an earlier one left, if that is of the same version."""
        try:
            left = json.loads(self.path.read_bytes())
            position, of = int(left["position"]), (left["key"], left["resume_with"])
            versions = tuple(map(str, left["versions"]))
            checksum = Checksum(**left["checksum"]) if left["checksum"] else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        here = os.fstat(way.fd).st_size
        if of[0] != self._place.key or not self._place.version or not of[1] or not 0 < position <= here:
            return
        if self._place.size is not None:  # a server has nothing to say behind the last byte
            position = min(position, self._place.size - 1)
        way.position = way.furthest = self._kept = position
        way.resume_with, way.versions, way.room = str(of[1]), versions, position
        way.checksum = checksum
        if checksum is not None:
            way.hash_what_is_here()

    def keep(self, way: "_Transfer") -> None:
        """Make durable what has come, and then say so."""
        if not way.resume_with or not way.position:
            return
        os.fsync(way.fd)
        left = {"key": self._place.key, "position": way.position, "resume_with": way.resume_with}
        left |= {"versions": list(way.versions), "checksum": way.checksum and asdict(way.checksum)}
        aside = self.path.with_name(f"{self.path.name}-new")
        aside.write_text(json.dumps(left), encoding="utf-8")
        aside.replace(self.path)
        self._kept = way.position

    def forget(self) -> None:
        """Take back what was said, as the file is fetched from its beginning."""
        with writing(self.path):
            self.path.unlink(missing_ok=True)
        self._kept = 0

    def came(self, way: "_Transfer") -> None:
        """Called when more has come."""
        if way.position - self._kept >= KEPT_EVERY:
            self.keep(way)


def _at_most(place: Place, max_bytes: int | None) -> MakeRoom:
    def check(needed: int, wished: int) -> int:
        if max_bytes is None:
            return wished
        if needed > max_bytes:
            raise DataError(f"{place.shown}: has more than {max_bytes} bytes, and no more are taken.")
        return min(wished, max_bytes)

    return check


def transfer(
    place: Place,
    fd: int,
    path: Path,
    *,
    patience: Patience | None = None,
    stop: threading.Event | None = None,
    make_room: MakeRoom = lambda needed, wished: wished,
) -> Place:
    """Fetch a whole file into an open one. It is not made durable.

    Args:
        place: the file, as `stat` saw it.
        fd: of the open file; whatever is in it is overwritten.
        path: its name, for messages.
        patience: how long it may take.
        stop: when set, it ends soon.
        make_room: called before the file grows.

    Returns:
        The place with the size and version of what was fetched.

    Raises:
        As `download`.
    """
    patience = patience or Patience()
    stop = stop or threading.Event()
    return _Transfer(place, fd, path, patience, stop, make_room).run()


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the disk into one line.

    Args:
        path: what is written.
        needed: bytes that must go there.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error, needed) from None


def _unwritable(path: Path, error: OSError, needed: int | None = None) -> EnvironmentProblem:
    free = _free(path.parent)
    room = "" if needed is None else f" It needs {needed / 1e6:.1f} MB"
    if room and free is not None:
        room += f", and {free / 1e6:.1f} MB are free there"
    return EnvironmentProblem(
        f"{path}: cannot be written ({error.strerror}).{room + '.' if room else ''} "
        "Make room, choose another folder with ECLOSION_CACHE, or lower data.source.cache_limit_gb."
    )


def _free(folder: Path) -> int | None:
    """Bytes that may still be written to the disk of a folder; None if it cannot say."""
    try:
        info = os.statvfs(folder)
    except OSError:
        return None
    return info.f_bavail * info.f_frsize


def durable(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no fsync of folders
            raise
    finally:
        os.close(fd)


@dataclass
class _Transfer:
    """One file on its way.

    Attributes:
        position: the bytes 0 .. position of the file stand on disk, all of one version.
        furthest: the largest `position` that counted as progress.
        room: the size that the file may have by now.
        total: bytes of the whole file, if known.
        resume_with: how to ask for the rest.
        checksum: what the file must hash to, if known.
        digest: hash of what stands on disk.
        rejected: hashes of whole files that were not what they must be.
        journal: told of what has come, if it is to outlast this process.
    """

    place: Place
    fd: int
    path: Path
    patience: Patience
    stop: threading.Event
    make_room: MakeRoom
    position: int = 0
    furthest: int = 0
    room: int = 0
    total: int | None = None
    versions: tuple[str, ...] = ()
    resume_with: str = ""
    checksum: Checksum | None = None
    digest: Any = None
    rejected: list[str] = field(default_factory=list)
    journal: "_Journal | None" = None

    def run(self) -> Place:
        self.persistence = Persistence(self.place.shown, self.patience, self.stop)
        while True:
            try:
                self._try()
                self._check_content()
            except Transient as failure:
                if scheme_of(self.place.url) == "pipe":
                    raise DataError(f"{self.place.shown}: {failure}. The command was ended.") from None
                if failure.start_over:
                    self.resume_with = ""
                self.persistence.wait(failure)
                continue
            with writing(self.path):
                os.ftruncate(self.fd, self.position)
            return Place(self.place.url, self.position, self.place.version or next(iter(self.versions), ""))

    def _try(self) -> None:
        """Fetch what is missing, as far as one connection goes."""
        start = self.position if self.resume_with else 0
        reader = _Reader(partial(open_stream, self.place, start, self.resume_with, self.patience))
        try:
            for piece in reader.pieces(self.patience, self.stop):
                if isinstance(piece, bytes):
                    self._write(piece)
                else:
                    self._begin(piece)
        finally:
            reader.leave()
        if self.total is not None and self.position < self.total:
            raise Transient(f"the file ends after {self.position} of {self.total} bytes")

    def _begin(self, stream: Stream) -> None:
        self._check_version(stream)
        if stream.start == 0:
            if self.journal is not None:
                self.journal.forget()  # before anything is written over
            self.position, self.checksum = 0, stream.checksum
            if self.checksum and not self.checksum.certain and _store_of(self.place) in _etag_is_no_hash:
                self.checksum = None
            self.digest = hashlib.new(self.checksum.algorithm, usedforsecurity=False) if self.checksum else None
            self.versions, self.resume_with = stream.versions, stream.resume_with
        elif stream.start != self.position or not _same(self.versions, stream.versions):
            raise Transient("the server sends another part than was asked for", start_over=True)
        self.total = stream.total if stream.total is not None else self.place.size
        if self.total is not None:
            self._grow(self.total)

    def hash_what_is_here(self) -> None:
        """Catch up with the hash of a file that another process began to fetch."""
        assert self.checksum is not None
        self.digest = hashlib.new(self.checksum.algorithm, usedforsecurity=False)
        at = 0
        with writing(self.path):
            while at < self.position:
                piece = os.pread(self.fd, min(GROWTH >> 6, self.position - at), at)
                self.digest.update(piece)
                at += len(piece)

    def _check_version(self, stream: Stream) -> None:
        """Refuse another version than the one that was seen: what is known of the file would not be true of it."""
        sizes = (self.place.size, stream.total)
        if _contradicts(self.place.version, stream.versions) or (None not in sizes and sizes[0] != sizes[1]):
            raise DataError(
                f"{self.place.shown}: the file changed after this run had looked at it. Leave files as they are while "
                "a run reads them, and start again."
            )

    def _write(self, piece: bytes) -> None:
        end = self.position + len(piece)
        if self.total is not None and end > self.total:
            raise Transient(f"the server sends more than the {self.total} bytes that it announced", start_over=True)
        self._grow(end)
        with writing(self.path, self.total):
            left = memoryview(piece)
            while left:
                written = os.pwrite(self.fd, left, end - len(left))
                left = left[written:]
        if self.digest is not None:
            self.digest.update(piece)
        self.position = end
        if self.journal is not None:
            with writing(self.path):
                self.journal.came(self)
        if self.position >= self.furthest + self.patience.min_bytes:
            self.furthest = self.position
            self.persistence.progressed()

    def _grow(self, num_bytes: int) -> None:
        """Make room before the bytes come."""
        if num_bytes <= self.room:
            return
        wished = num_bytes if self.total is not None else num_bytes + GROWTH
        self.room = self.make_room(num_bytes, wished)
        free = _free(self.path.parent)
        if self.total is not None and free is not None and num_bytes - self.position > free:
            raise _unwritable(self.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), num_bytes)

    def _check_content(self) -> None:
        """Compare the hash of the whole file with the store's.

        Raises:
            Transient: if they differ and it is too early to say why.
            DataError: if they differ again and again.
        """
        if self.checksum is None or self.digest.hexdigest() == self.checksum.hexdigest:
            return
        found = self.digest.hexdigest()
        if not self.checksum.certain and found in self.rejected:
            _etag_is_no_hash.add(_store_of(self.place))  # the same bytes twice: not they are wrong
            return
        self.rejected.append(found)
        what = f"the content has {self.checksum.algorithm} {found}, and the store says {self.checksum.hexdigest}"
        if len(self.rejected) == MAX_MISMATCHES:
            raise DataError(f"{self.place.shown}: {what}. Upload the file again.")
        raise Transient(what, start_over=True)  # nothing of it is worth keeping


def _store_of(place: Place) -> str:
    return place.shown.partition("://")[2].partition("/")[0]


def _same(known: Sequence[str], seen: Sequence[str]) -> bool:
    """Whether two answers are about one version; the second need not repeat all that the first said."""
    return bool(set(known) & set(seen)) and not any(_contradicts(version, seen) for version in known)


def _contradicts(known: str, seen: Sequence[str]) -> bool:
    """Whether a store says something else about a version than it did; what it did not say before is no answer."""
    if not known:
        return False
    kind = known.partition(" ")[0] if " " in known else ""
    return known not in seen and any((version.partition(" ")[0] if " " in version else "") == kind for version in seen)


class _Reader:
    """Reads a stream in a thread of its own, which is left behind if it hangs: no library promises that a read ends."""

    def __init__(self, open_it: Callable[[], Stream]) -> None:
        self._open_it = open_it
        self._received = 0
        self._stream: Stream | None = None
        self._items: queue.Queue[Stream | bytes | BaseException | None] = queue.Queue(PIECES_AHEAD)
        self._left = threading.Event()
        threading.Thread(target=self._read, name="eclosion-read", daemon=True).start()

    def pieces(self, patience: Patience, stop: threading.Event) -> Iterator[Stream | bytes]:
        """The open stream, then its bytes as they come.

        Raises:
            Transient: if they do not come, or too slowly.
            Stopped: if nobody wants them any more.
        """
        waited, received_then = 0.0, 0  # of a window: seconds spent here, and not with a slow disk
        while not stop.is_set():
            asked = time.monotonic()
            item = self._next()
            waited += time.monotonic() - asked
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if waited >= patience.window_seconds:
                if (received := self._received - received_then) < patience.min_bytes:
                    raise Transient(f"only {received} bytes came in {waited:.1f} s")
                waited, received_then = 0.0, self._received
            if item != b"":
                yield item
        raise Stopped

    def _next(self) -> Stream | bytes | BaseException | None:
        """What comes next: nothing yet (b""), the open stream, bytes, an error, or None at the end."""
        try:
            return self._items.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return b""

    def leave(self) -> None:
        """Forget the stream; the thread closes it as soon as it can."""
        self._left.set()
        if self._stream is not None:
            self._stream.kill()

    def _read(self) -> None:
        stream: Stream | None = None
        try:
            stream = self._stream = self._open_it()
            if self._left.is_set():  # while it was opened: then nobody else kills it
                stream.kill()
            self._put(stream)
            while not self._left.is_set() and (piece := stream.read()):
                self._received += len(piece)
                self._put(piece)
            if not self._left.is_set():
                stream.finish()
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._put(error)
        finally:
            if stream is not None:
                stream.close()

    def _put(self, item: Stream | bytes | BaseException | None) -> None:
        while not self._left.is_set():
            try:
                return self._items.put(item, timeout=TICK_SECONDS)
            except queue.Full:
                continue
