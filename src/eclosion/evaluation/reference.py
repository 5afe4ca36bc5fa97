"""Images that others are compared with: each goes through an encoder once, and what comes out is kept on this disk.

    <folder>/<key>.safetensors      statistics, as `eclosion.evaluation.statistics` says; its time is when it was used
    <folder>/<key>.making/          what is done of it; whoever makes it holds the lock in there

    key = hash of the images' fingerprint and the encoder's, and of what decides the last bits: kind of device and torch

The lock is the operating system's, which takes it back when its owner ends, however it ends. Whoever finds it taken
waits. A file gets its name when it is whole, and is checked when it is read: one that is damaged is made again.
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eclosion.checkpoint.lock import RunLock, holder
from eclosion.data.file_cache import cache_folder
from eclosion.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, LockedError
from eclosion.evaluation.collecting import Progress, collect, led
from eclosion.evaluation.images import ALONE, Images, Workers
from eclosion.evaluation.statistics import (
    SUFFIX,
    device_of,
    load_statistics,
    read_statistics,
    save_statistics,
)
from eclosion.metrics.metric import Reference
from eclosion.models.image_encoder import ImageEncoder
from eclosion.rng import generator
from eclosion.rundir import RunDir

__all__ = ["kept_images", "load_statistics", "read_statistics", "reference_of", "save_statistics"]

# Part of every key: to be raised when this package makes other numbers of the same images.
VERSION = 1
# Rows whose features are kept; 20 000 of 2048 numbers take 160 MB.
LIMIT = 20_000
# Disk space for all files together; those that were used longest ago are removed.
CACHE_GB = 4.0
MAKING = ".making"
POLL_SECONDS = 0.2


def reference_of(
    images: Images,
    part: Any,
    encoder: ImageEncoder,
    *,
    batch_size: int = 64,
    workers: Workers = ALONE,
    cache: Path | None = None,
    limit: int = LIMIT,
    on_image: Callable[[int, int], None] | None = None,
) -> Reference:
    """The features of some images, looked up or made.

    What comes out is the same, bit for bit, for any batch size and number of processes, and after a stop; as far as the
    encoder gives the same, whose last digits depend on the device and, on a CPU, on the number of threads.

    Args:
        images: whose features they are.
        part: the encoder as a config names it, which the file tells of.
        encoder: on its device.
        batch_size: images that go through the encoder at once, in each process.
        workers: the processes that share the work; all of them get the features.
        cache: the folder where they are kept; None means `references` in `cache_folder()`. The first process's counts.
        limit: sums are over all images, and this many features are kept; `kept_images` says whose.
        on_image: told how many images are done, and of how many; not called when all are there already.

    Raises:
        ConfigError: if the limit is less than 1.
        DataError: in all processes, if there are no images, one cannot be read, or has no finite features.
    """
    if limit < 1:
        raise ConfigError(f"limit is {limit}, and must be at least 1.")
    if len(images) == 0:
        raise DataError(f"{images.name}: there are no images, so nothing can be compared with them.")
    shelf = _Shelf(cache or cache_folder() / "references", images, part, encoder, limit)
    found = _found_or_locked(shelf, workers)
    if found is not None:
        return found
    try:
        made = collect(
            images,
            encoder,
            kept_images(images, limit),
            batch_size=batch_size,
            workers=workers,
            progress=shelf.progress,
            on_image=on_image or (lambda done, total: None),
        )
        if made is not None:
            shelf.put(made)
    finally:
        shelf.release()
    reference: Reference = workers.from_leader(made)
    return reference


def kept_images(images: Images, limit: int = LIMIT) -> NDArray[np.int64]:
    """Which images the features that are kept belong to: row i of them to image kept_images(...)[i].

    A choice that follows from the images' fingerprint, in an order that says nothing of theirs.
    """
    rng = generator(0, "reference", images.fingerprint)
    return rng.choice(len(images), min(limit, len(images)), replace=False, shuffle=True).astype(np.int64)


def _found_or_locked(shelf: "_Shelf", workers: Workers) -> Reference | None:
    """What is there, maybe after another call has made it; or None, and the right to make it."""
    told = False
    while True:
        found, is_ours, owner = led(workers, shelf.look)
        if found is not None or is_ours:
            return found
        if not told and workers.rank == 0:
            warnings.warn(f"{shelf.path}: waiting for {owner}, which makes it.", stacklevel=3)
        told = True
        time.sleep(POLL_SECONDS)
        workers.agree()


class _Shelf:
    """Where the features of some images are kept; only the leader uses it.

    Attributes:
        path: their file.
        progress: what is done of it; None if nothing can be kept.
    """

    def __init__(self, folder: Path, images: Images, part: Any, encoder: ImageEncoder, limit: int) -> None:
        self._images, self._part, self._encoder = images, part, encoder
        asked = (VERSION, images.fingerprint, len(images), encoder.fingerprint, encoder.dim, limit)
        machine = (device_of(encoder).type, str(torch.__version__))
        key = hashlib.sha256(repr((asked, machine)).encode()).hexdigest()[:32]
        self.path, self._making = folder / f"{key}{SUFFIX}", folder / f"{key}{MAKING}"
        self._lock = RunLock(RunDir(self._making))
        self.progress: Progress | None = Progress(self._making, key)

    def look(self) -> tuple[Reference | None, bool, str]:
        """What is there; or whether it is ours to make it, and else who does."""
        found = self._read()
        if found is not None:
            return found, False, ""
        try:
            self._making.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            self._cannot(error.strerror or error)
            return None, True, ""
        except LockedError:
            return None, False, holder(RunDir(self._making)) or "another process"
        except CheckpointError as error:
            self._cannot(error)
            return None, True, ""
        found = self._read()  # another process was faster
        if found is not None:
            self._finish()
        return found, found is None, ""

    def _read(self) -> Reference | None:
        if not self.path.is_file():
            return None
        try:
            reference, facts = read_statistics(self.path, "cache")
        except DataError as error:
            warnings.warn(f"{error} It is made again now.", stacklevel=4)
            return None
        if (facts.images, facts.fingerprint) != (self._images.fingerprint, self._encoder.fingerprint):
            return None  # it was put there by hand
        with suppress(OSError):  # a folder that can only be read
            _use(self.path)
        return reference

    def put(self, reference: Reference) -> None:
        """Keep what was made."""
        if self.progress is None:
            return
        try:
            save_statistics(self.path, reference, images=self._images, part=self._part, encoder=self._encoder)
        except EnvironmentProblem as error:
            return self._cannot(error.__cause__ or error)
        self._finish()
        with suppress(OSError):  # others share the folder; what is left is removed next time
            _remove_others(self.path, int(CACHE_GB * 2**30))

    def _finish(self) -> None:
        shutil.rmtree(self._making, ignore_errors=True)  # and the lock with it: whoever gets another finds the file
        self._lock.release()

    def release(self) -> None:
        """Give the lock back; what was done stays for the next call."""
        self._lock.release()

    def _cannot(self, reason: object) -> None:
        self.progress = None
        warnings.warn(
            f"{self.path.parent}: features cannot be kept ({reason}), and are made again each time. Choose another "
            "folder with ECLOSION_CACHE.",
            stacklevel=4,
        )


def _use(path: Path) -> None:
    """Note that a file is used now."""
    path.touch()


def _remove_others(mine: Path, limit_bytes: int) -> None:
    """Remove what was used longest ago, finished or not, but not `mine`, while all takes more than the limit."""
    found = []
    for path in mine.parent.iterdir():
        if path.name.endswith((SUFFIX, MAKING)):
            with suppress(FileNotFoundError):  # another process is at it, too
                files = [path, *(path.iterdir() if path.is_dir() else ())]
                stats = [file.stat() for file in files]
                found.append((max(s.st_mtime_ns for s in stats), sum(s.st_size for s in stats), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if path == mine or total <= limit_bytes:
            continue
        with _unused(path) as is_free:
            if is_free:
                _remove(path)
                total -= size


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether nobody is making what is in a folder; nobody begins to meanwhile."""
    if not path.is_dir():
        yield True
        return
    try:
        with RunLock(RunDir(path)):
            yield True
    except CheckpointError:
        yield False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
