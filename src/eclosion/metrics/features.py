"""Features as every metric takes them, and which of them lie near each other."""

import torch
from torch import Tensor

from eclosion.errors import ConfigError, DataError

__all__ = ["chosen", "distances", "enough", "nearest", "rows"]

# Rows whose distances to all others are held at once: 1024 x 20 000 distances are 160 MB.
BLOCK = 1024


def rows(metric: str, what: str, features: Tensor) -> Tensor:
    """Features in float64, [N, D].

    Args:
        metric: who asks, for messages.
        what: which images these are, such as "made".
        features: [N, D].

    Raises:
        DataError: naming the first image whose features are not all finite.
    """
    broken = (~features.isfinite().all(1)).nonzero()
    if len(broken):
        raise DataError(
            f"{metric}: {what} image {int(broken[0])} has features that are not finite numbers ({len(broken)} of "
            f"{len(features)} images do). The extractor cannot read such an image, or its weights are damaged."
        )
    return features.double()


def enough(metric: str, counts: dict[str, int], least: int) -> None:
    """Refuse sets that a score cannot be computed from.

    Args:
        metric: who asks, for messages.
        counts: number of images by what they are.
        least: how many of each it takes.

    Raises:
        ConfigError: naming the first set that is too small.
    """
    for what, count in counts.items():
        if count < least:
            raise ConfigError(f"{metric}: {count} {what} images, and it takes at least {least}. Use more images.")


def chosen(features: Tensor, count: int, order: Tensor) -> Tensor:
    """As many rows as asked for, or all if there are no more: those that come first in `order`."""
    return features if len(features) <= count else features[order[:count]]


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of each row from each: float64 [N, M], to about 1e-8 of the size of the features."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return squares.clamp(min=0).sqrt()


def nearest(x: Tensor, y: Tensor | None, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k-th nearest row of `y` to each row of `x`.

    Args:
        x: float64 [N, D].
        y: float64 [M, D]; none takes the other rows of `x`.
        k: 1 is the nearest.

    Returns:
        The distance, float64 [N], exact: 0 for equal rows; and the number of that row, int64 [N].
    """
    others = x if y is None else y
    found = torch.empty(len(x), dtype=torch.int64)
    for start in range(0, len(x), BLOCK):
        far = distances(x[start : start + BLOCK], others)
        if y is None:
            far[torch.arange(len(far)), torch.arange(start, start + len(far))] = torch.inf
        found[start : start + BLOCK] = far.topk(k, largest=False).indices[:, -1]
    return torch.linalg.vector_norm(x - others[found], dim=1), found
