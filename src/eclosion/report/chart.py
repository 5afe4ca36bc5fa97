"""A curve as inline SVG that stretches with its column while its text and lines keep their size.

The lines stand in an inner picture of 1000 x 400 units that is stretched to the plot; ticks, labels and the cursor are
placed beside it in per cent.
"""

import json
from collections.abc import Sequence

from eclosion.report.curves import Axis, Series, linear_axis, log_axis, running_mean, runs, short, thin
from eclosion.report.markup import Html, clip, el, join

__all__ = ["chart"]

WIDTH, HEIGHT = 1000, 400
# The running mean of fewer values says nothing.
MIN_SMOOTHED = 20

# What we know of our own metrics: the title, whether the axis begins at 0, whether there is noise to smooth.
KNOWN = {
    "train/loss": ("Loss", False, True),
    "validation/loss": ("Validation loss", False, False),
    "validation/skipped": ("Validation images skipped", True, False),
    "train/grad_norm": ("Gradient norm", True, True),
    "train/lr": ("Learning rate", True, False),
    "perf/images_per_second": ("Images per second", True, True),
    "perf/data_wait": ("Share of time waiting for data", True, True),
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
        return el("figure", el("figcaption", _heading(title, series.name, base)), missing, class_="chart")
    smooth = noisy and len(points) >= MIN_SMOOTHED
    drawn = _Drawing(title, series, linear_axis([v for _, v in points], from_zero=from_zero), smooth)
    plots, switch = [drawn.svg()], None
    if "loss" in series.name and min(v for _, v in points) > 0:
        plots.append(_Drawing(title, series, log_axis([v for _, v in points]), smooth).svg())
        switch = _switch(title, index)
    step, last = points[-1]
    said = f"{short(last)} at step {step:,}"
    return el(
        "figure",
        el("figcaption", _heading(title, series.name, base), switch, el("output", said, data_rest=said)),
        el("div", *plots, class_="plots"),
        _remark(series, explain=smooth and index == 0),  # once on a page
        class_="chart",
    )


def _heading(title: str, name: str, base: str | None) -> Html:
    return el("h3", title, title=clip(name, 200) if base else None)


def _switch(title: str, index: int) -> Html:
    def choice(word: str, checked: bool) -> Html:
        radio = el("input", type="radio", name=f"scale-{index}", value=word, checked=checked)
        return el("label", radio, el("span", word))

    legend = el("legend", f"Scale of {title}", class_="unseen")
    return el("fieldset", legend, choice("linear", True), choice("log", False), class_="switch")


def _remark(series: Series, *, explain: bool) -> Html | None:
    lost = [step for step, value in zip(series.steps, series.values, strict=True) if value is None]
    parts = []
    if explain:
        parts.append("Faint: each value. Strong: the mean of its neighbours.")
    if lost:
        what = "1 value is" if len(lost) == 1 else f"{len(lost):,} values are"
        parts.append(f"{what} not finite, the first at step {lost[0]:,}; marked at the foot.")
    return el("p", " ".join(parts), class_="quiet") if parts else None


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
            *(self._tick_y(value, label) for value, label in self.y.ticks),
            *(self._tick_x(value, label) for value, label in self.x.ticks),
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

    def _tick_y(self, value: float, label: str) -> Html:
        y = f"{self._top(value)}%"
        return join(el("line", class_="rule", x1="0", x2="100%", y1=y, y2=y), el("text", label, class_="y", x="0", y=y))

    def _tick_x(self, value: float, label: str) -> Html:
        x = f"{self._left(value)}%"
        return join(
            el("line", class_="nick", x1=x, x2=x, y1="100%", y2="100%"), el("text", label, class_="x", x=x, y="100%")
        )

    def _lines(self) -> Html:
        return el(
            "svg",
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
