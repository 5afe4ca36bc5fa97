"""How members of a tar shard are read: one by one, or those of small samples that lie close together at once."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from eclosion.data.file_cache import FileCache
from eclosion.data.remote import Place, local_path
from eclosion.data.shard_index import KINDS, Request, ShardIndex
from eclosion.errors import BadSample

__all__ = ["KIND", "MAX_MEMBER_BYTES", "OpenedShard", "Run", "Shard"]

# Kind of member -> its column in the index.
KIND = {kind: column for column, kind in enumerate(KINDS)}
# Longest member that is read at all.
MAX_MEMBER_BYTES = 512 * 2**20
# Samples up to so many bytes are read ahead of need; larger ones would only take memory.
MAX_SMALL_BYTES = 2**16
# Bytes that are read at once, at most, and bytes between two samples that are read although nobody wants them.
MAX_RUN_BYTES = 2**17
MAX_GAP_BYTES = 2**13


@dataclass(frozen=True)
class Shard:
    """One shard: its number, and where it is."""

    number: int
    place: Place

    @property
    def name(self) -> str:
        """What to call it in messages and in the ledger."""
        return self.place.shown

    def member(self, index: ShardIndex, sample: int, kind: str = "image") -> str:
        """What to call a member in messages: shard, member and where it begins."""
        return f"{self.name}: {index.member(sample, kind)} at byte {index.offsets.item(sample, KIND[kind])}"

    def request(self, cache: FileCache) -> Request:
        """How its index is asked for; the shard is fetched only if no index of it is kept."""
        here = local_path(self.place.url)
        return Request(
            path=here or partial(cache.path, self.place),
            url=str(here or self.name),
            version=self.place.version,
            size=self.place.size,
            identity=self.place.key,
        )


class OpenedShard:
    """One shard as it is read. Its file is closed when nobody holds this any more."""

    def __init__(self, shard: Shard, index: ShardIndex, cache: FileCache) -> None:
        self.shard, self.index = shard, index
        with cache.open(shard.place) as file:
            self._fd = os.dup(file.fileno())
        finalize(self, os.close, self._fd)
        self._found_spans: dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        # a fetched file is marked as used by changing its time
        self._stamp = self._now() if local_path(shard.place.url) else None

    def name(self, sample: int, kind: str = "image") -> str:
        """What to call a member in messages."""
        return self.shard.member(self.index, sample, kind)

    def has(self, sample: int, kind: str) -> bool:
        """Whether a sample has such a member."""
        return bool(self.index.offsets.item(sample, KIND[kind]) >= 0)

    def member(self, sample: int, kind: str, *, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """The content of a member.

        Raises:
            BadSample: reason "too_large", "unreadable", or "changed" if the shard is not what was indexed.
        """
        column = KIND[kind]
        offset, size = self.index.offsets.item(sample, column), self.index.sizes.item(sample, column)
        if size > limit:
            raise BadSample(self.name(sample, kind), "too_large", f"has {size} bytes, and the limit is {limit}.")
        try:
            found = os.pread(self._fd, size, offset)
        except OSError as error:
            raise BadSample(self.name(sample, kind), "unreadable", f"cannot be read ({error.strerror}).") from error
        if len(found) != size:
            raise self._changed(sample, kind)
        return found

    def check_unchanged(self, sample: int) -> None:
        """See that what was read of a sample is of the file that was opened.

        Raises:
            BadSample: reason "changed".
        """
        if not self.is_unchanged():
            raise self._changed(sample, "image")

    def is_unchanged(self) -> bool:
        """Whether the file is still the one that was opened, as far as its size and its time of change say so."""
        return self._stamp is None or self._now() == self._stamp

    def runs(self, samples: Sequence[int], columns: tuple[int, ...]) -> Iterator[tuple[list[int], "Run"]]:
        """Small samples that lie close to each other, and what their part of the shard holds.

        Args:
            samples: those that are wanted; what cannot be read is left out.
            columns: which of `KINDS` are wanted of them.
        """
        run: list[int] = []
        first = last = 0  # bytes of the run
        starts, ends = self._spans(columns)
        spans = zip(starts[samples].tolist(), ends[samples].tolist(), samples, strict=True)
        for start, end, sample in sorted(spans):
            if end - start > MAX_SMALL_BYTES:
                continue
            if run and not (start <= last + MAX_GAP_BYTES and end <= first + MAX_RUN_BYTES):
                yield from self._run(run, first, last)
                run = []
            first, last = (first, max(last, end)) if run else (start, end)
            run.append(sample)
        if run:
            yield from self._run(run, first, last)

    def _spans(self, columns: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the members of each sample of the shard begin and end, whatever lies between them."""
        found = self._found_spans.get(columns)
        if found is None:
            starts, sizes = self.index.offsets[:, columns], self.index.sizes[:, columns]
            ends = (starts + sizes).max(axis=1)
            found = np.where(starts < 0, ends[:, None], starts).min(axis=1), ends
            self._found_spans[columns] = found
        return found

    def _run(self, samples: list[int], start: int, end: int) -> Iterator[tuple[list[int], "Run"]]:
        try:
            found = os.pread(self._fd, end - start, start)
        except OSError:
            return
        if len(found) == end - start:
            yield samples, Run(self, found, start)

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _changed(self, sample: int, kind: str) -> BadSample:
        return BadSample(
            self.name(sample, kind),
            "changed",
            "the shard has changed since it was indexed. Leave shards as they are while a run reads them.",
        )


class Run:
    """Some bytes of a shard, of which samples are made as of the shard itself."""

    def __init__(self, opened: OpenedShard, found: bytes, start: int) -> None:
        self.shard, self.index, self.has, self.name = opened.shard, opened.index, opened.has, opened.name
        self._found, self._start = found, start
        self._offset, self._size = opened.index.offsets.item, opened.index.sizes.item

    def member(self, sample: int, kind: str, *, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """As `OpenedShard.member`, of which there is nothing to be said: it is small, and was read."""
        column = KIND[kind]
        start = self._offset(sample, column) - self._start
        return self._found[start : start + self._size(sample, column)]
