"""The images of a source, and which row of which array each one's embedding goes to."""

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from eclosion.data.file_cache import FileCache
from eclosion.data.shard_index import KINDS, ShardIndex
from eclosion.data.shard_reading import MAX_MEMBER_BYTES, Shard
from eclosion.data.shard_urls import NO_NUMBER
from eclosion.data.source import KeyedSamples, Sample, Samples, ShardedSamples, Source
from eclosion.data.tar import short
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import BadSample, DataError, printable
from eclosion.sharding.rows import digest_of_order

__all__ = ["DETAILS", "Array", "Images", "Read", "images_of"]

NAME = "img_emb"
# Digits in the name of an array of a source that is not in shards, unless more are needed.
WIDTH = 5
IMAGE = KINDS.index("image")
# Rows that an array may have beyond ten for each sample of its shard; a wrong index_width must not cost a disk.
SPARE_ROWS = 100_000
# Shards that are fetched ahead.
SHARDS_AHEAD = 3

# Why a sample has no image, or its embedding no row.
DETAILS = {
    "no_image": "it has no image.",
    "no_row_in_key": "its key does not end in a number, which would be its row.",
    "damaged_shard": "at least one sample of the shard is lost.",
}

Read = Callable[[], Sample]


@dataclass(frozen=True)
class Array:
    """One array that is to be written.

    Attributes:
        place: of it among all.
        file: its name.
        num_rows: rows in it.
        num_images: images whose embeddings it holds, if they can be read.
        lost: key, name and reason of each sample that has no image or no row.
    """

    place: int
    file: str
    num_rows: int
    num_images: int
    lost: Sequence[dict[str, str]] = ()


class Images(Protocol):
    """Images, and the row of each.

    Attributes:
        fingerprint: of them.
        order: hash of which they are in their order, if rows follow from that.
        layout: what else decides which row is whose.
        arrays: all of them.
    """

    fingerprint: str
    order: str | None
    layout: Mapping[str, Any]
    arrays: Sequence[Array]

    def of(self, array: Array) -> Iterator[tuple[int, str, Read]]:
        """Row, key, and how it is read, of each image of an array."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


def images_of(source: Source | Samples, rows_per_array: int) -> Images:
    """The images of a source, and where their embeddings go; to be closed.

    Raises:
        DataError: if there are none, or shards do not say which row is whose.
    """
    if isinstance(source, WebDatasetSource):
        return _OfShards(source)
    return _OfSamples(source, rows_per_array)


class _OfSamples:
    """The samples of any source, one row after the other."""

    def __init__(self, source: Source | Samples, rows_per_array: int) -> None:
        self._is_mine = hasattr(source, "open")
        samples: Samples = source.open() if hasattr(source, "open") else source
        if len(samples) == 0:
            raise DataError("The source has no samples, so there is nothing to embed.")
        self._samples, self._rows_per_array = samples, rows_per_array
        self._one_at_a_time = threading.Lock() if isinstance(samples, KeyedSamples) else None
        self.fingerprint = samples.fingerprint
        self.order: str | None = digest_of_order(samples)
        self.layout: Mapping[str, Any] = {"rows_per_array": rows_per_array}
        starts = range(0, len(samples), rows_per_array)
        width = max(WIDTH, len(str(len(starts) - 1)))
        sizes = [min(rows_per_array, len(samples) - start) for start in starts]
        self.arrays: Sequence[Array] = [
            Array(k, f"{NAME}_{k:0{width}d}.npy", size, size) for k, size in enumerate(sizes)
        ]

    def of(self, array: Array) -> Iterator[tuple[int, str, Read]]:
        first = array.place * self._rows_per_array
        for row in range(array.num_rows):
            yield row, str(first + row), partial(self._read, first + row)

    def close(self) -> None:
        if self._is_mine and isinstance(self._samples, ShardedSamples):
            self._samples.close()

    def _read(self, index: int) -> Sample:
        if self._one_at_a_time is None:
            return self._samples.read(index)
        with self._one_at_a_time:
            return self._samples.read(index)


class _OfShards:
    """The images of webdataset shards; the number at the end of a key is the row."""

    order: str | None = None

    def __init__(self, source: WebDatasetSource) -> None:
        self._source = source
        self._cache = FileCache(limit_bytes=int(source.cache_limit_gb * 2**30))
        try:
            self._shards, _ = source.locate()
            _refuse_equal_numbers(self._shards)
            digest = blake2b(repr(source.index_width).encode(), digest_size=16)
            arrays: list[Array] = []
            self._digests = list[str]()
            with closing(source.index(self._cache, self._shards)) as indices:
                for shard, index in zip(self._shards, indices, strict=True):
                    digest.update(f"{shard.number} {index.digest}".encode())
                    arrays.append(_array_of(source, shard, index, len(arrays)))
                    self._digests.append(index.digest)
            self.arrays: Sequence[Array] = arrays
        except BaseException:
            self._cache.close()
            raise
        self.fingerprint = digest.hexdigest()
        self.layout: Mapping[str, Any] = {"index_width": source.index_width}

    def of(self, array: Array) -> Iterator[tuple[int, str, Read]]:
        ahead = self._shards[array.place : array.place + SHARDS_AHEAD]
        self._cache.fetch_ahead([shard.place for shard in ahead])
        shard = self._shards[array.place]
        index = next(self._source.index(self._cache, [shard]))
        if index.digest != self._digests[array.place]:
            raise DataError(
                f"{shard.name}: has changed since this began. Leave shards as they are while they are read."
            )
        with self._cache.open(shard.place) as file:
            opened = _Opened(shard, index, file)
        rows = index.last_digits(self._source.index_width)
        for sample in np.flatnonzero((index.offsets[:, IMAGE] >= 0) & (rows >= 0)).tolist():
            yield int(rows[sample]), index.key(sample), partial(opened.read, sample)

    def close(self) -> None:
        self._cache.close()


def _array_of(source: WebDatasetSource, shard: Shard, index: ShardIndex, place: int) -> Array:
    """The array that goes with a shard."""
    rows, has_image = index.last_digits(source.index_width), index.offsets[:, IMAGE] >= 0
    num_rows = int(rows.max(initial=-1)) + 1
    if num_rows > 10 * len(index) + SPARE_ROWS:
        raise DataError(
            f"{shard.name}: its {len(index)} samples ask for {num_rows} rows, as the last {source.index_width} "
            "characters of a key are its row. Give index_width as many as count the samples of a shard."
        )
    _refuse_equal_rows(shard, index, rows, source.index_width)
    lost = [
        {"key": printable(index.key(sample)), "name": f"{shard.name}: {short(index.key(sample))}", "reason": reason}
        for reason, which in (("no_image", ~has_image), ("no_row_in_key", has_image & (rows < 0)))
        for sample in np.flatnonzero(which).tolist()
    ]
    if index.problem:  # at least one sample is lost; how many cannot be known
        lost.append({"key": "", "name": index.problem.rstrip("."), "reason": "damaged_shard"})
    file = f"{NAME}_{shard.number:0{_width(source, shard)}d}.npy"
    return Array(place, file, num_rows, int((has_image & (rows >= 0)).sum()), lost)


def _width(source: WebDatasetSource, shard: Shard) -> int:
    """Digits of a shard's number in its own name, or else in the URL."""
    digits = re.findall(r"[0-9]+", PurePosixPath(shard.name).name.partition(".")[0])
    return len(digits[-1]) if digits and int(digits[-1]) == shard.number else source.shard_width


def _refuse_equal_numbers(shards: Sequence[Shard]) -> None:
    by_number: dict[int, Shard] = {}
    for shard in shards:
        if shard.number == NO_NUMBER:
            raise DataError(f"{shard.name}: has no number in its name, so no name of an array would go with it.")
        other = by_number.setdefault(shard.number, shard)
        if other is not shard:
            raise DataError(
                f"{other.name} and {shard.name} are both shard {shard.number}, so their arrays would have one name. "
                "Embed one folder of shards at a time, or number the shards anew."
            )


def _refuse_equal_rows(shard: Shard, index: ShardIndex, rows: NDArray[np.int64], index_width: int) -> None:
    """Refuse that two samples ask for one row: one of them would get the other's embedding."""
    order = np.argsort(rows, kind="stable")
    same = np.flatnonzero((np.diff(rows[order]) == 0) & (rows[order][1:] >= 0))
    if len(same):
        first, second = (int(order[same[0] + i]) for i in (0, 1))
        raise DataError(
            f"{shard.name}: {index.key(first)!r} and {index.key(second)!r} both ask for row {rows[first]}, as the last "
            f"{index_width} characters of a key are its row. Give index_width as many as tell them apart."
        )


class _Opened:
    """A shard as it is read; its file is closed when nobody holds this any more."""

    def __init__(self, shard: Shard, index: ShardIndex, file: BinaryIO) -> None:
        self._shard, self._index, self._fd = shard, index, os.dup(file.fileno())
        finalize(self, os.close, self._fd)

    def read(self, sample: int) -> Sample:
        """The image of a sample.

        Raises:
            BadSample: reason "too_large", "unreadable" or "changed".
        """
        name = self._shard.member(self._index, sample)
        offset, size = int(self._index.offsets[sample, IMAGE]), int(self._index.sizes[sample, IMAGE])
        if size > MAX_MEMBER_BYTES:
            raise BadSample(name, "too_large", f"has {size} bytes, and the limit is {MAX_MEMBER_BYTES}.")
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise BadSample(name, "unreadable", f"cannot be read ({error.strerror}).") from error
        if len(data) != size:
            raise BadSample(name, "changed", "the shard became shorter while it was read.")
        return Sample(data, name)
