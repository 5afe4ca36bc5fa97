"""From images to rows of numbers, one for each image, in their order: with several processes, and on from a stop.

A row is a function of its image alone: the features that an extractor finds, the distance from an original, the
encoding of a caption. Images are cut into batches in one way, whatever the number of processes, and the rows of a batch
are kept on disk as soon as they are there. So one process and two, and a stop in between, give the same bits.

    <keep>/<key>/00000000-00000016.safetensors      the rows of 16 images, sealed as `eclosion.evaluation.sealed` says
"""

import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from eclosion.errors import DataError, EnvironmentProblem, OutOfMemory
from eclosion.evaluation.collecting import each
from eclosion.evaluation.images import ALONE, Images, Seen, Workers
from eclosion.evaluation.sealed import Unsealed, read_sealed, write_sealed
from eclosion.evaluation.statistics import SUFFIX

__all__ = ["OnImage", "RowMaker", "forget_rows", "rows_of"]

# Called with how many images are done, and of how many.
OnImage = Callable[[int, int], None]
Rows = dict[str, Tensor]

# Part of every key: to be raised when the same images give other rows.
VERSION = 1
KEY = re.compile(r"[0-9a-f]{32}")
# What a stopped evaluation left is given up after a week.
MAX_AGE_SECONDS = 7 * 86400


class RowMaker(Protocol):
    """What makes rows.

    Attributes:
        fingerprint: of all that decides a row, besides the image.
    """

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, seen: Seen) -> Tensor:
        """float32 [B, D] on the CPU; each row depends on its own image alone."""
        ...


def rows_of(
    images: Images,
    extractors: Mapping[str, RowMaker],
    *,
    batch_size: int,
    workers: Workers = ALONE,
    keep: Path | None = None,
    on_image: OnImage | None = None,
) -> Rows:
    """The rows of all images, from each of some extractors.

    Every process goes through the same number of batches, the last of which are made twice if need be: networks that
    are split over processes need that.

    Args:
        images: what is looked at.
        extractors: by name.
        batch_size: images that are read and looked at together.
        workers: the processes that share the work; all of them get all rows.
        keep: a folder where finished batches stay, for an equal call to go on from; None keeps none.
        on_image: told how many images are done, and of how many, at the start and after each round of batches.

    Returns:
        float32 [N, D] per name, in the order of the images, on the CPU.

    Raises:
        DataError: naming an image that cannot be read, or has no finite row; on all processes.
        OutOfMemory: if a batch is too large for the device.
    """
    count = len(images)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    kept = _Kept(keep / _key(images, extractors, batch_size)) if keep is not None and workers.rank == 0 else None
    found: dict[int, Rows] = workers.from_leader(kept.read(batches, extractors) if kept else {})
    missing = [number for number in range(len(batches)) if number not in found]
    tell = on_image or (lambda done, total: None)
    done = sum(len(batches[number]) for number in found)
    tell(done, count)
    for first in range(0, len(missing), workers.size):
        workers.agree()
        mine = missing[min(first + workers.rank, len(missing) - 1)]
        made = each(workers, partial(_batch, images, extractors, batches[mine]))
        for place, rows in enumerate(made):
            number = missing[min(first + place, len(missing) - 1)]
            if number not in found:
                found[number] = rows
                done += len(batches[number])
                if kept:
                    kept.write(batches[number], rows)
        tell(done, count)
    return {name: torch.cat([found[number][name] for number in range(len(batches))]) for name in extractors}


def forget_rows(images: Images, extractors: Mapping[str, RowMaker], *, batch_size: int, keep: Path) -> None:
    """Remove what an equal call of `rows_of` kept, and what others left long ago."""
    shutil.rmtree(keep / _key(images, extractors, batch_size), ignore_errors=True)
    with suppress(OSError):
        for folder in keep.iterdir():
            if KEY.fullmatch(folder.name) and folder.stat().st_mtime < time.time() - MAX_AGE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        keep.rmdir()  # if it is empty


def _key(images: Images, extractors: Mapping[str, RowMaker], batch_size: int) -> str:
    makers = sorted((name, maker.fingerprint) for name, maker in extractors.items())
    told = repr((VERSION, torch.__version__, images.fingerprint, len(images), batch_size, makers))
    return blake2b(told.encode(), digest_size=16).hexdigest()


def _batch(images: Images, extractors: Mapping[str, RowMaker], indices: Sequence[int]) -> Rows:
    """The rows of some images."""
    try:
        seen = images.read(indices)
        rows = {name: maker(seen) for name, maker in extractors.items()}
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{images.name}: {len(indices)} images at once are too many for this device. Use a smaller batch_size."
        ) from error
    for name, values in rows.items():
        finite = values.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = seen.names[int(finite.logical_not().nonzero()[0])]
            looks = name.partition(" ")[0]
            raise DataError(f"{bad}: {looks} makes numbers of it that are not finite. Look at it, or leave it out.")
    return rows


# --- on disk ---------------------------------------------------------------------------------------------------------


class _Kept:
    """The folder of finished batches; a disk that cannot be written is told of once, and costs only the going on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._writes = folder, True

    def read(self, batches: Sequence[range], extractors: Mapping[str, RowMaker]) -> dict[int, Rows]:
        """The finished ones, by number."""
        found = {}
        for number, batch in enumerate(batches):
            rows = self._rows(batch)
            if rows is not None and rows.keys() == set(extractors):
                found[number] = rows
        return found

    def _rows(self, batch: range) -> Rows | None:
        try:
            return read_sealed(self._path(batch))[1]
        except (FileNotFoundError, Unsealed):
            return None

    def write(self, batch: range, rows: Rows) -> None:
        """Keep the rows of a batch."""
        if not self._writes:
            return
        try:
            write_sealed(self._path(batch), "", {name: values.contiguous() for name, values in rows.items()})
        except EnvironmentProblem as error:
            self._writes = False
            warnings.warn(f"{error} Until then, an evaluation that is stopped begins anew.", stacklevel=3)

    def _path(self, batch: range) -> Path:
        return self._folder / f"{batch.start:08d}-{batch.stop:08d}{SUFFIX}"
