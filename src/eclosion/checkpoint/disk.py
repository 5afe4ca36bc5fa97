"""File operations that a checkpoint is made of: durable, invisible until done, and failing in one line.

All go through `os`, so that a test can count them and let the k-th fail.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from eclosion.errors import CheckpointError

__all__ = [
    "REPLACED",
    "check_space",
    "explained",
    "fsync_folder",
    "hidden",
    "link_files",
    "make_folder",
    "opened",
    "reason",
    "remove",
    "saving",
    "tidy",
    "unpublished",
    "write_file",
]

CHUNK = 1 << 20  # bytes; fits the second-level cache
PARTIAL, REPLACED = ".partial-", ".replaced-"

_HIDDEN = re.compile(r"(?P<kind>\.partial-|\.replaced-)(?P<step>\d+)-[0-9a-f]{32}")


def write_file(path: Path, buffers: Sequence[memoryview]) -> None:
    """Write a new file, make it durable, and read it back to see that it holds what memory holds."""
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        for buffer in buffers:
            _write_all(fd, buffer)
        os.fsync(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        back = bytearray(CHUNK)
        for buffer in buffers:
            for chunk in _chunks(buffer):
                # startswith is a plain memcmp; comparing memoryviews goes byte by byte
                if os.readv(fd, [memoryview(back)[: chunk.nbytes]]) != chunk.nbytes or not back.startswith(chunk):
                    raise OSError(errno.EIO, f"{path.name} reads back as something else than what was written")


def _write_all(fd: int, buffer: memoryview) -> None:
    while buffer:
        buffer = buffer[os.write(fd, buffer) :]  # at most 2 GiB at a time


def _chunks(buffer: memoryview) -> Iterator[memoryview]:
    return (buffer[start : start + CHUNK] for start in range(0, buffer.nbytes, CHUNK))


def tidy(checkpoints: Path) -> None:
    """Remove what killed saves left behind, and put back what one had set aside. Only under the run's lock."""
    for path in list(checkpoints.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        final = checkpoints / f"step-{match['step']}"
        if match["kind"] == REPLACED and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)
    fsync_folder(checkpoints)


def remove(folder: Path) -> None:
    """Delete a checkpoint: invisible first, so that a kill half-way leaves no half checkpoint under its name."""
    folder.rename(aside := hidden(folder, PARTIAL))
    fsync_folder(folder.parent)
    shutil.rmtree(aside)


def hidden(final: Path, kind: str) -> Path:
    """A new name beside a checkpoint under which nobody takes it for one."""
    return final.parent / f"{kind}{final.name.removeprefix('step-')}-{uuid.uuid4().hex}"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems know no fsync of folders
                raise


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
        fsync_folder(folder.parent)


def link_files(folder: Path, to: Path) -> None:
    """The files of a folder in a new folder as well, where they stay when the first is removed.

    They take no room where the disk knows hard links, and are for whoever never writes into them.
    """
    to.mkdir(parents=True)
    for path in folder.iterdir():
        try:
            os.link(path, to / path.name)
        except OSError:  # a disk without links
            shutil.copyfile(path, to / path.name)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor, closed at the end; the close is checked, since some file systems report a full disk there."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


@contextmanager
def unpublished(final: Path) -> Iterator[Path]:
    """A path beside `final` to write to; whatever stands there is removed if the writing fails."""
    make_folder(final.parent)
    partial = hidden(final, PARTIAL)
    try:
        yield partial
    except BaseException:
        # Best effort: the cause matters more, and `tidy` comes at the next start.
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def explained(path: Path, what: str, cure: str) -> Iterator[None]:
    """Turn an error of the operating system into one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {what}: {reason(error)}. {cure}") from error


@contextmanager
def saving(final: Path, needed: int) -> Iterator[None]:
    """Turn a failing disk into one line with path, needed and free."""
    try:
        yield
    except OSError as error:
        free = _free(final.parent)
        raise CheckpointError(
            f"{final} cannot be saved: {reason(error)}. It needs {needed / 1e6:.1f} MB, and "
            f"{'an unknown number of' if free is None else f'{free / 1e6:.1f}'} MB are free there. "
            "Older checkpoints are intact; make room or mend the disk, and start again."
        ) from error


def check_space(folder: Path, needed: int) -> None:
    """Fail before the first byte if `needed` bytes do not fit."""
    free = _free(folder)
    if free is not None and needed > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(folder: Path) -> int | None:
    """Bytes that may still be written to the disk of a folder; None if it cannot say. Quotas do not show."""
    try:
        info = os.statvfs(folder)
    except OSError:
        return None
    return info.f_bavail * info.f_frsize


def reason(error: BaseException) -> str:
    """What an error says, on one line and without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
