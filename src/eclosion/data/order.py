"""Which sample comes next: a function of the seed and the position alone."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eclosion.rng import generator

__all__ = ["Order"]

Indices = NDArray[np.uint32] | NDArray[np.int64]


class Order:
    """The order in which a run visits its samples.

    Position p lies in epoch p // N; each epoch visits every sample once, in an order of its own that
    follows from (seed, epoch). Nothing needs to be drawn to get there, so any position costs the same.
    Safe to use from several threads.
    """

    def __init__(self, num_samples: int, *, seed: int, shuffle: bool) -> None:
        """Make an order.

        Args:
            num_samples: samples per epoch, N >= 1.
            seed: the run's seed.
            shuffle: whether each epoch has its own order; off keeps 0, 1, ..., N-1.
        """
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {num_samples}")
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._lock = threading.Lock()
        self._permutations: dict[int, Indices] = {}  # epoch -> order; at most two

    def index_at(self, position: int) -> int:
        """The sample at a position of the run."""
        return int(self.indices([position])[0])

    def indices(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """The samples at some positions, int64 [len(positions)]."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if not self.shuffle:
            return places
        out = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            out[mask] = self._permutation(epoch)[places[mask]]
        return out

    def _permutation(self, epoch: int) -> Indices:
        with self._lock:
            if epoch not in self._permutations:
                # the loader runs ahead over the end of an epoch, and back never: keep the newest and this one
                self._permutations = dict(sorted(self._permutations.items())[-1:])
                self._permutations[epoch] = self._draw(epoch)
            return self._permutations[epoch]

    def _draw(self, epoch: int) -> Indices:
        order: Indices = np.arange(self.num_samples, dtype=np.int64)
        if self.num_samples <= np.iinfo(np.uint32).max:
            order = order.astype(np.uint32)  # kept for the whole epoch: half the memory
        generator(self.seed, "order", epoch).shuffle(order)
        return order
