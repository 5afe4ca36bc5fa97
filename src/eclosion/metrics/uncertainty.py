"""How far a number can be trusted."""

import math

from torch import Tensor

from eclosion.metrics.metric import Influence, Score

__all__ = ["of_mean", "of_share", "with_error"]

# Standard errors to either side of a normal estimate that hold 95 %.
Z = 1.959963984540054


def with_error(value: float, error: float, influence: Influence | None = None) -> Score:
    """A score that is spread as a normal number with this standard error."""
    return Score(value, error, (value - Z * error, value + Z * error), influence)


def of_mean(values: Tensor) -> Score:
    """The mean of numbers that were drawn apart, one per image: [N], N >= 2."""
    values = values.double()
    return with_error(float(values.mean()), float(values.std()) / math.sqrt(len(values)), Influence(values))


def of_share(hits: int, count: int) -> Score:
    """The share of images that something holds for; its interval has a width even where none or all are hit.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    share = hits / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    low = middle - reach if hits else 0.0  # rounding would leave some 1e-18
    high = middle + reach if hits < count else 1.0
    return Score(share, math.sqrt(share * (1 - share) / count), (low, high))
