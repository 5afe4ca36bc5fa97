"""How far a number can be trusted."""

import math

from torch import Tensor

from eclosion.metrics.metric import Influence, Score

__all__ = ["of_mean", "of_share", "of_share_below", "with_error"]

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
    return _of_share(hits, count)


def of_share_below(values: Tensor, others: Tensor, place: int) -> Score:
    """The share of numbers that are at most as large as the `place`-th least of other numbers, which were drawn too.

    Of all that the others are drawn from, a part u lies below that one, which has the beta distribution of `place` and
    len(others) + 1 - place. How far the share follows u is taken in two ways, of which the wider counts:

    - some numbers are as small as can be, and the rest is drawn as the others are: what is not below goes with 1 - u.
      Where all are drawn alike, the hits are then beta-binomial;
    - as the numbers lie around the threshold: if they are dense there, a small change of u moves many across.

    Args:
        values: [N], N >= 1.
        others: [M], M >= 2.
        place: of the threshold among the others, 1 for the least; not the last.

    Source: Wilks 1941, https://doi.org/10.1214/aoms/1177731788, for u.
    """
    ordered, count, number = others.sort().values, len(values), len(others)
    hits = {at: int((values <= ordered[at - 1]).sum()) for at in _around(place, number)}
    low, high = min(hits), max(hits)
    density = (hits[high] - hits[low]) / count * (number + 1) / (high - low)
    below = place / (number + 1)  # the mean of u
    moved = below * (1 - below) / (number + 2)  # its variance
    rest = _of_share(hits[place], count, relative=moved / (1 - below) ** 2)
    near = _of_share(hits[place], count, constant=moved * density**2)
    assert rest.error is not None
    assert near.error is not None
    assert rest.interval is not None
    assert near.interval is not None
    ends = (min(rest.interval[0], near.interval[0]), max(rest.interval[1], near.interval[1]))
    return Score(rest.value, max(rest.error, near.error), ends)


def _around(place: int, number: int) -> tuple[int, int, int]:
    """A place, and those about two of its standard errors before and after it."""
    reach = math.ceil(2 * math.sqrt(place))
    return max(1, place - reach), place, min(number, place + reach)


def _of_share(hits: int, count: int, *, relative: float = 0.0, constant: float = 0.0) -> Score:
    """A share of which a threshold decides that was drawn itself.

    What is not hit is y, and x is expected. Its variance is x (1 - x) / n of its own draw, and (1 - 1/n) times that
    which the threshold makes, x^2 relative + constant. The interval holds each x that y is less than Z standard errors
    of that x away from: the roots of (x - y)^2 = Z^2 variance(x) are its ends.
    """
    y, own = (count - hits) / count, Z**2 / count
    relative, constant = (1 - 1 / count) * relative, (1 - 1 / count) * constant
    error = math.sqrt(y * (1 - y) / count + y**2 * relative + constant)
    square, half = 1 + own - Z**2 * relative, y + own / 2
    reach = math.sqrt(half**2 - square * (y**2 - Z**2 * constant))
    low = max(0.0, 1 - (half + reach) / square) if hits else 0.0  # rounding would leave some 1e-18
    high = min(1.0, 1 - (half - reach) / square) if hits < count else 1.0
    return Score(hits / count, error, (low, high))
