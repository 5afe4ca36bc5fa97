"""The numbers behind a curve: which points to draw, their running mean, the range and ticks of an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["HUGE", "MAX_POINTS", "Axis", "Series", "linear_axis", "log_axis", "running_mean", "runs", "short", "thin"]

MAX_POINTS = 600
# Beyond it a number is taken for not finite: sums and differences of the rest stay in range.
HUGE = 1e100
# Width of the running mean to each side, as a share of all points.
HALF_WINDOW = 1 / 40


@dataclass(frozen=True)
class Series:
    """One metric over the steps of a run.

    Attributes:
        name: as in metrics.jsonl.
        steps: rising.
        values: one per step; None where the number was not finite.
        low, high: ends of the 95 % interval around each value, None where there is none; empty if there is none at all.
        floor: what the best there can be has; None if that is not known.
        remark: what has to be said of the curve.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    floor: float | None = None
    remark: str = ""

    @property
    def span(self) -> list[float]:
        """All numbers that a plot of it has to hold."""
        around = [v for v in (*self.low, *self.high, self.floor) if v is not None]
        return [v for v in self.values if v is not None] + around

    @property
    def finite(self) -> list[tuple[int, float]]:
        """(step, value) of those that can be drawn."""
        return [(step, v) for step, v in zip(self.steps, self.values, strict=True) if v is not None]


def thin(values: Sequence[float | None], limit: int = MAX_POINTS) -> list[int]:
    """Indices of the values to draw: all if they are few, else those that keep the picture the same.

    The first, the last, and of each bucket between them the lowest and the highest, so that no spike is lost.

    Returns:
        At most `limit` rising indices of values that are not None.
    """
    found = [(value, i) for i, value in enumerate(values) if value is not None]
    if len(found) <= limit:
        return [i for _, i in found]
    kept = {found[0], found[-1]}
    buckets = (limit - 2) // 2
    for b in range(buckets):
        bucket = found[b * len(found) // buckets : (b + 1) * len(found) // buckets]
        kept |= {min(bucket), max(bucket)}
    return sorted(i for _, i in kept)


def running_mean(values: Sequence[float | None], at: Sequence[int]) -> list[float]:
    """Mean of the neighbours of each index in `at`.

    The window is even at the start, where a loss falls steeply, and reaches back only at the end, so that the last
    mean is one of many values. Each window is summed by itself: a running sum would not recover from a spike.
    """
    reach = max(1, round(len(values) * HALF_WINDOW))
    means = []
    for i in at:
        before = min(i, reach)
        after = min(before, len(values) - 1 - i)
        window = [v for v in values[i - before : i + after + 1] if v is not None]
        means.append(math.fsum(window) / len(window))
    return means


def runs(values: Sequence[float | None], at: Sequence[int]) -> list[list[int]]:
    """Places in `at` that a line may join: those with no missing value between them."""
    missing = list(accumulate((value is None for value in values), initial=0))
    found: list[list[int]] = []
    for place, index in enumerate(at):
        if place and missing[index] == missing[at[place - 1]]:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@dataclass(frozen=True)
class Axis:
    """A range, linear or logarithmic, with its ticks.

    Attributes:
        low, high: the ends of the axis; low < high.
        log: whether equal distances are equal ratios; then low > 0.
        ticks: (value, label), rising.
    """

    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]

    def place(self, value: float) -> float:
        """Where the value stands, from 0 (low) to 1 (high)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], *, from_zero: bool = False, tight: bool = False, count: int = 5) -> Axis:
    """An axis with about `count` ticks at 1, 2 or 5 times a power of ten.

    Args:
        values: at least one.
        from_zero: whether 0 belongs to it; it does anyhow when the values come near.
        tight: whether it ends at the values, instead of a little beyond.
        count: ticks wanted.
    """
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # constant, but for rounding
        low, high = (min(0.0, 1.25 * low), max(0.0, 1.25 * high)) if high or low else (0.0, 1.0)
    elif not tight:
        room = 0.05 * (high - low)
        bottom = min(low, 0.0) if from_zero or 0 < low < 0.4 * high else low
        low, high = (bottom if bottom == 0 else bottom - room), high + room
    step = _nice_step((high - low) / count)
    marks = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, False, _labelled(marks, step))


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis for values above 0, with ticks at powers of ten or, over few of them, between as well."""
    low, high = min(values) / 1.15, max(values) * 1.15
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / 6)
    factors = (1,) if last - first > 3 else (1, 2, 5)
    marks = [f * 10.0**k for k in range(first, last + 1, every) for f in factors]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) < 2:
        return Axis(low, high, True, [t for t in linear_axis([low, high], tight=True).ticks if t[0] > 0])
    return Axis(low, high, True, [(mark, short(mark)) for mark in inside])


def _nice_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))


def _labelled(marks: Sequence[float], step: float) -> list[tuple[float, str]]:
    """Marks with labels of equal precision; far from 1 in thousands, millions or powers of ten."""
    largest = max(map(abs, marks), default=0.0)
    if largest < 1e-2 or largest >= 1e9:
        return [(mark, _power_of_ten(mark)) for mark in marks]
    unit, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return [(mark, "0" if abs(mark) < step / 2 else f"{mark / unit:,.{digits}f}{suffix}") for mark in marks]


def _power_of_ten(value: float) -> str:
    if value == 0:
        return "0"
    digits, power = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def short(value: float) -> str:
    """The value in about four digits: 0.05123, 1,234, 2.5e-5."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return _power_of_ten(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
