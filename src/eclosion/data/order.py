"""Which sample comes next: a function of the seed and the position alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eclosion.rng import generator

__all__ = ["Order"]

Indices = NDArray[np.uint32] | NDArray[np.int64]

# Shuffled samples that are kept beside the two newest windows: a batch may reach over many small ones.
KEPT_SAMPLES = 1_000_000


@dataclass(frozen=True)
class _Visits:
    """The shards of one epoch, one after the other.

    Attributes:
        shards: which shard each visit is to, int64 [visits].
        ends: place in the epoch at which each visit ends, int64 [visits].
    """

    shards: NDArray[np.int64]
    ends: NDArray[np.int64]


class Order:
    """The order in which a run visits its samples.

    Samples lie in shards and are counted through them; a source without shards is one shard. Position p lies in
    epoch p // N, and what stands there follows from (seed, p). It is found by a search among the visits of that
    epoch, so any position costs the same, and nothing needs to be drawn to get there. An epoch is one of

    in order    every sample once, as the source has them;
    shuffled    every sample once: shards in an order of the epoch's own, and the samples of so many neighbours
                mixed, all of them equally likely at each place. A source of one shard is shuffled whole;
    resampled   shards drawn with replacement, each read in its order, until the epoch is full.

    Safe to use from several threads.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        shuffle: bool,
        window: int = 1,
        resampled: int | None = None,
    ) -> None:
        """Make an order.

        Args:
            shard_sizes: samples in each shard; at least one in all.
            seed: the run's seed.
            shuffle: whether each epoch has its own order.
            window: shards whose samples are mixed when shuffled.
            resampled: samples in an epoch of shards drawn with replacement; none visits every sample once.
        """
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        if self._sizes.sum() < 1:
            raise ValueError("an order needs at least one sample")
        self.seed, self.shuffle, self.window, self.resampled = seed, shuffle, window, resampled
        self.num_samples = int(self._sizes.sum()) if resampled is None else resampled
        self._lock = threading.Lock()
        self._visits: dict[int, _Visits] = {}  # epoch -> its visits; at most two
        self._windows: dict[tuple[int, int], Indices] = {}  # (epoch, window) -> its samples, shuffled; newest last

    def index_at(self, position: int) -> int:
        """The sample at a position of the run."""
        return int(self.indices([position])[0])

    def indices(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """The samples at some positions, int64 [len(positions)]."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        return _by_group(epochs, places, self._mixed if self.shuffle else self._straight)

    def shard_at(self, position: int) -> int:
        """The shard in which the sample at a position lies."""
        return int(np.searchsorted(self._starts, self.index_at(position), side="right")) - 1

    def shards_from(self, position: int) -> Iterator[int]:
        """The shards that a run needs from a position on, in the order in which they are needed, without end."""
        epoch, place = divmod(position, self.num_samples)
        first = self._first_visit(epoch, place)
        while True:
            yield from self._of_epoch(epoch).shards[first:].tolist()
            epoch, first = epoch + 1, 0

    def shard_counts(self, epoch: int) -> NDArray[np.int64]:
        """How many samples of each shard an epoch visits, int64 [shards]."""
        visits = self._of_epoch(epoch)
        lengths = np.diff(np.minimum(visits.ends, self.num_samples), prepend=0)
        return np.bincount(visits.shards, weights=lengths, minlength=len(self._sizes)).astype(np.int64)

    def _first_visit(self, epoch: int, place: int) -> int:
        visit = int(np.searchsorted(self._of_epoch(epoch).ends, place, side="right"))
        return visit - visit % self.window if self.shuffle else visit

    def _straight(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        visits = self._of_epoch(epoch)
        visit = np.searchsorted(visits.ends, places, side="right")
        shard = visits.shards[visit]
        return self._starts[shard] + places - (visits.ends[visit] - self._sizes[shard])

    def _mixed(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        visits = self._of_epoch(epoch)
        windows = np.searchsorted(visits.ends, places, side="right") // self.window
        return _by_group(windows, places, partial(self._inside, epoch, visits))

    def _inside(self, epoch: int, visits: _Visits, number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        first = number * self.window
        start = int(visits.ends[first - 1]) if first else 0
        return self._window(epoch, number, visits)[places - start].astype(np.int64, copy=False)

    def _of_epoch(self, epoch: int) -> _Visits:
        with self._lock:
            if epoch not in self._visits:
                # the loader runs ahead over the end of an epoch, and back never: keep the newest and this one
                self._visits = dict(sorted(self._visits.items())[-1:])
                self._visits[epoch] = self._draw_visits(epoch)
            return self._visits[epoch]

    def _draw_visits(self, epoch: int) -> _Visits:
        filled = np.flatnonzero(self._sizes)
        if self.resampled is not None:
            rng, drawn, missing = generator(self.seed, "resample", epoch), [], self.resampled
            while missing > 0:
                some = filled[rng.integers(0, len(filled), 1024)]
                drawn.append(some)
                missing -= int(self._sizes[some].sum())
            filled = np.concatenate(drawn)
        elif self.shuffle and len(filled) > 1:
            generator(self.seed, "shards", epoch).shuffle(filled)
        return _Visits(filled, np.cumsum(self._sizes[filled]))

    def _window(self, epoch: int, number: int, visits: _Visits) -> Indices:
        with self._lock:
            found = self._windows.get((epoch, number))
            if found is None:
                found = self._draw_window(epoch, number, visits)
                while len(self._windows) > 1 and sum(map(len, self._windows.values())) > KEPT_SAMPLES:
                    del self._windows[next(iter(self._windows))]
                self._windows[epoch, number] = found
            return found

    def _draw_window(self, epoch: int, number: int, visits: _Visits) -> Indices:
        shards = visits.shards[number * self.window : (number + 1) * self.window]
        parts = [np.arange(self._starts[s], self._starts[s] + self._sizes[s], dtype=np.int64) for s in shards]
        order: Indices = np.concatenate(parts)
        if order.max() <= np.iinfo(np.uint32).max:
            order = order.astype(np.uint32)  # half the memory
        where = (epoch,) if len(self._sizes) == 1 else (epoch, number)
        generator(self.seed, "order", *where).shuffle(order)
        return order


def _by_group(
    groups: NDArray[np.int64], places: NDArray[np.int64], look_up: Callable[[int, NDArray[np.int64]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """What `look_up` says of the places of each group; nearly always there is one."""
    if len(groups) and (groups == groups[0]).all():
        return look_up(int(groups[0]), places)
    out = np.empty_like(places)
    for group in np.unique(groups).tolist():
        mask = groups == group
        out[mask] = look_up(group, places[mask])
    return out
