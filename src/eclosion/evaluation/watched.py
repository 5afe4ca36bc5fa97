"""The first images of an evaluation, remembered for its picture."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from eclosion.evaluation.collecting import each
from eclosion.evaluation.images import Images, Seen, Workers
from eclosion.sampling.pictures import Pixels

__all__ = ["Watched"]

# Images of the grid.
NUM_SHOWN = 32


class Watched:
    """Images, of which the first are remembered when they are made."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._seen: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.name, self.fingerprint = images.name, images.fingerprint
        self.facts, self.brings = images.facts, images.brings

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Seen:
        """The images of these numbers."""
        seen = self._images.read(indices)
        for row, index in enumerate(indices):
            if index < NUM_SHOWN:
                self._seen[index] = seen.pixels[row], None if seen.originals is None else seen.originals[row]
        return seen

    def first(self, workers: Workers, batch_size: int) -> tuple[Pixels, Pixels | None]:
        """The first images, and their originals; those of batches that were made before a stop are made again."""
        wanted = range(min(NUM_SHOWN, len(self)))
        seen = {index: pair for part in workers.gather(self._seen) for index, pair in part.items()}
        for start in range(0, len(wanted), batch_size):
            batch = range(start, min(start + batch_size, len(self)))  # the same images together, for the same bits
            if any(index not in seen for index in batch if index in wanted):
                each(workers, partial(self._read_for_all, batch))
                seen |= self._seen
        pixels = torch.stack([seen[index][0] for index in wanted])
        originals = [original for index in wanted if (original := seen[index][1]) is not None]
        return _rows_last(pixels), _rows_last(torch.stack(originals)) if originals else None

    def _read_for_all(self, indices: Sequence[int]) -> None:
        self.read(indices)


def _rows_last(pixels: Tensor) -> Pixels:
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
