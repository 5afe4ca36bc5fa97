"""A curve as inline SVG that stretches with its column while its text and lines keep their size.

The lines stand in an inner picture of 1000 x 400 units that is stretched to the plot; ticks, labels and the cursor are
placed beside it in per cent.
"""

import json
from collections.abc import Sequence

from eclosion.report.curves import Axis, Series, linear_axis, log_axis, running_mean, runs, short, thin
from eclosion.report.markup import Html, clip, el, join

__all__ = ["HEIGHT", "KNOWN", "WIDTH", "chart", "heading", "switch_of", "ticks"]

WIDTH, HEIGHT = 1000, 400
# The running mean of fewer values says nothing.
MIN_SMOOTHED = 20

# What we know of our own metrics: the title, whether the axis begins at 0, whether there is noise to smooth.
KNOWN = {
    "train/loss": ("Loss", False, True),
    "validation/loss": ("Validation loss", False, False),
    "evaluate/kid": ("KID", True, False),
    "evaluate/fid": ("Fréchet distance", True, False),
    "evaluate/inception_score": ("Inception score", False, False),
    "evaluate/lpips": ("LPIPS", True, False),
    "evaluate/clip_score": ("CLIP score", False, False),
    "evaluate/cosine": ("Cosine to the embedding", False, False),
    "evaluate/precision": ("Precision", True, False),
    "evaluate/recall": ("Recall", True, False),
    "evaluate/density": ("Density", True, False),
    "evaluate/coverage": ("Coverage", True, False),
    "evaluate/memorised": ("Share that is memorised", True, False),
    "evaluate/nearer_than_held_out": ("Nearer to training than held-out ones", False, False),
    "validation/skipped": ("Validation images skipped", True, False),
    "train/grad_norm": ("Gradient norm", True, True),
    "train/lr": ("Learning rate", True, False),
    "perf/images_per_second": ("Images per second", True, True),
    "perf/data_wait": ("Share of time waiting for data", True, True),
    "perf/evaluate_seconds": ("Seconds per evaluation", True, False),
    "sys/memory_gb": ("Memory, GiB", True, False),
}


def chart(series: Series, *, index: int) -> Html:
    """The figure of one metric: title, last value, curve, and a remark about values that cannot be drawn.

    Args:
        series: the metric; needs no finite value.
        index: of this figure among those of the page.
    """
    base = next((name for name in KNOWN if series.name == name or series.name.startswith(f"{name}/")), None)
    title, from_zero, noisy = KNOWN[base] if base else (clip(series.name, 80), False, False)
    if base and series.name != base:
        title = f"{title}, {clip(series.name[len(base) + 1 :], 40)}"
    points = series.finite
    if not points:
        missing = el("p", "No finite value yet." if series.steps else "No value yet.", class_="quiet")
        return el("figure", el("figcaption", heading(title, series.name, base)), missing, class_="chart")
    smooth = noisy and len(points) >= MIN_SMOOTHED
    drawn = _Drawing(title, series, linear_axis(series.span, from_zero=from_zero), smooth)
    plots, switch = [drawn.svg()], None
    if "loss" in series.name and min(series.span) > 0:
        plots.append(_Drawing(title, series, log_axis(series.span), smooth).svg())
        switch = switch_of(title, index)
    step, last = points[-1]
    said = f"{short(last)} at step {step:,}"
    return el(
        "figure",
        el("figcaption", heading(title, series.name, base), switch, el("output", said, data_rest=said)),
        el("div", *plots, class_="plots"),
        _remark(series, explain=smooth and index == 0),  # once on a page
        class_="chart",
    )


def heading(title: str, name: str, base: str | None) -> Html:
    """The title of a figure; one of ours shows the name of the metric to a pointer."""
    return el("h3", title, title=clip(name, 200) if base else None)


def switch_of(title: str, index: int) -> Html:
    """What chooses between the two scales of a figure."""

    def choice(word: str, checked: bool) -> Html:
        radio = el("input", type="radio", name=f"scale-{index}", value=word, checked=checked)
        return el("label", radio, el("span", word))

    legend = el("legend", f"Scale of {title}", class_="unseen")
    return el("fieldset", legend, choice("linear", True), choice("log", False), class_="switch")


def _remark(series: Series, *, explain: bool) -> Html | None:
    lost = [step for step, value in zip(series.steps, series.values, strict=True) if value is None]
    parts = [series.remark] if series.remark else []
    if explain:
        parts.append("Faint: each value. Strong: the mean of its neighbours.")
    if lost:
        what = "1 value is" if len(lost) == 1 else f"{len(lost):,} values are"
        parts.append(f"{what} not finite, the first at step {lost[0]:,}; marked at the foot.")
    return el("p", " ".join(parts), class_="quiet") if parts else None


def ticks(x: Axis, y: Axis) -> Html:
    """The rules, nicks and labels of a plot."""
    marks: list[Html] = []
    for value, label in y.ticks:
        top = f"{round(100 * (1 - y.place(value)), 2)}%"
        marks.append(el("line", class_="rule", x1="0", x2="100%", y1=top, y2=top))
        marks.append(el("text", label, class_="y", x="0", y=top))
    for value, label in x.ticks:
        left = f"{round(100 * x.place(value), 2)}%"
        marks.append(el("line", class_="nick", x1=left, x2=left, y1="100%", y2="100%"))
        marks.append(el("text", label, class_="x", x=left, y="100%"))
    return join(*marks)


class _Drawing:
    """One series on one pair of axes."""

    def __init__(self, title: str, series: Series, y: Axis, smooth: bool) -> None:
        self.title, self.series, self.y = title, series, y
        self.x = linear_axis([0, series.steps[-1]], tight=True)
        self.kept = thin(series.values)
        self.means = running_mean(series.values, self.kept) if smooth else []
        self.heights = [v for i in self.kept if (v := series.values[i]) is not None]

    def svg(self) -> Html:
        """The plot, with the points that its readout can show."""
        kind = "log" if self.y.log else "linear"
        return el(
            "svg",
            ticks(self.x, self.y),
            self._floor(),
            self._lines(),
            self._dot() if len(self.kept) == 1 else None,
            el("line", class_="cursor", y1="0", y2="100%"),
            el("circle", class_="cursor", r=4),
            class_=f"plot {kind}",
            role="img",
            tabindex=0,
            aria_label=self._said(),
            data_points=json.dumps(self._points(), separators=(",", ":")),
        )

    def _left(self, step: float) -> float:
        return round(100 * self.x.place(step), 2)

    def _top(self, value: float) -> float:
        return round(100 * (1 - self.y.place(value)), 2)

    def _lines(self) -> Html:
        return el(
            "svg",
            el("path", class_="band", d=self._band()) if self.series.low else None,
            el("path", class_="raw" if self.means else "mean", d=self._path(self.heights)),
            el("path", class_="mean", d=self._path(self.means)) if self.means else None,
            el("path", class_="lost", d=self._lost()),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            preserveAspectRatio="none",
            width="100%",
            height="100%",
        )

    def _path(self, heights: Sequence[float]) -> str:
        """One line for each run of values; a value alone becomes a line of no length, which a round cap makes a dot."""
        pieces = []
        for run in runs(self.series.values, self.kept):
            corners = [self._corner(self.series.steps[self.kept[place]], heights[place]) for place in run]
            pieces.append(f"M{'L'.join(corners)}" + ("h0" if len(corners) == 1 else ""))
        return "".join(pieces)

    def _band(self) -> str:
        """The area between the ends of the interval, one piece for each run of values; a line where it is one value."""
        low, high = (dict(zip(self.series.steps, ends, strict=True)) for ends in (self.series.low, self.series.high))
        pieces = []
        for run in runs(self.series.values, self.kept):
            steps = [step for place in run if low[step := self.series.steps[self.kept[place]]] is not None]
            up = [self._corner(step, value) for step in steps if (value := high[step]) is not None]
            down = [self._corner(step, value) for step in reversed(steps) if (value := low[step]) is not None]
            pieces.append(f"M{'L'.join(up + down)}Z" if up else "")
        return "".join(pieces)

    def _floor(self) -> Html | None:
        if self.series.floor is None:
            return None
        y = f"{self._top(self.series.floor)}%"
        return el("line", class_="floor", x1="0", x2="100%", y1=y, y2=y)

    def _corner(self, step: int, value: float) -> str:
        return f"{self._left(step) / 100 * WIDTH:.1f} {self._top(value) / 100 * HEIGHT:.1f}"

    def _lost(self) -> str:
        steps = [s for s, value in zip(self.series.steps, self.series.values, strict=True) if value is None]
        places = dict.fromkeys(f"{self._left(step) / 100 * WIDTH:.0f}" for step in steps)
        return "".join(f"M{place} {HEIGHT}v-14" for place in places)

    def _dot(self) -> Html:
        step = self.series.steps[self.kept[0]]
        return el("circle", class_="dot", r=4, cx=f"{self._left(step)}%", cy=f"{self._top(self.heights[0])}%")

    def _points(self) -> list[list[object]]:
        """[left %, top %, step, readout] of each point drawn."""
        found: list[list[object]] = []
        for place, (index, value) in enumerate(zip(self.kept, self.heights, strict=True)):
            said = f"{short(value)}, mean {short(self.means[place])}" if self.means else short(value)
            ends = [around[index] for around in (self.series.low, self.series.high) if around]
            if ends and None not in ends:
                said += f" ({' to '.join(short(end) for end in ends if end is not None)})"
            step = self.series.steps[index]
            found.append([self._left(step), self._top(value), step, said])
        return found

    def _said(self) -> str:
        (first, a), (last, b) = self.series.finite[0], self.series.finite[-1]
        values = [v for _, v in self.series.finite]
        scale = ", logarithmic scale" if self.y.log else ""
        return (
            f"{self.title} by step{scale}: {short(a)} at step {first:,}, {short(b)} at step {last:,}; "
            f"lowest {short(min(values))}, highest {short(max(values))}. Arrow keys read single values."
        )
