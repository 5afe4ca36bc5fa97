"""Several curves on one pair of axes: the parts of a loss, from clean images to noise."""

import json
from collections.abc import Mapping, Sequence

from eclosion.report.chart import HEIGHT, WIDTH, heading, switch_of, ticks
from eclosion.report.curves import Axis, Series, linear_axis, log_axis, runs, short, thin
from eclosion.report.markup import Html, clip, el, join

__all__ = ["family"]


def family(title: str, name: str, parts: Sequence[Series], *, index: int) -> Html:
    """The figure of a metric's parts, the first the strongest line.

    Args:
        title: of the figure.
        name: of the metric that they are parts of.
        parts: from clean to noise; those without a finite value are left out.
        index: of this figure among those of the page.
    """
    drawn = [part for part in parts if part.finite]
    if not drawn:
        return join()
    values = [value for part in drawn for value in part.span]
    last = max(part.steps[-1] for part in drawn)
    x = linear_axis([0, last], tight=True)
    plots, switch = [_plot(title, drawn, x, linear_axis(values))], None
    if min(values) > 0:
        plots.append(_plot(title, drawn, x, log_axis(values)))
        switch = switch_of(title, index)
    said = f"{_readout([dict(part.finite) for part in drawn], last)} at step {last:,}"
    remark = "The noise levels in equal parts. Strong: images that are nearly clean; faint: nearly noise."
    return el(
        "figure",
        el("figcaption", heading(title, name, name), switch, el("output", said, data_rest=said)),
        el("div", *plots, class_="plots"),
        el("p", remark, class_="quiet"),
        class_="chart",
    )


def _plot(title: str, parts: Sequence[Series], x: Axis, y: Axis) -> Html:
    lines = [
        el("path", class_="mean", d=_path(part, x, y), stroke_opacity=f"{_strength(i, len(parts)):.2f}")
        for i, part in reversed(list(enumerate(parts)))  # the strongest last, on top
    ]
    inside = el("svg", *lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none", width="100%", height="100%")
    return el(
        "svg",
        ticks(x, y),
        inside,
        el("line", class_="cursor", y1="0", y2="100%"),
        el("circle", class_="cursor", r=4),
        class_=f"plot {'log' if y.log else 'linear'}",
        role="img",
        tabindex=0,
        aria_label=clip(_said(title, parts, y), 600),
        data_points=json.dumps(_points(parts, x, y), separators=(",", ":")),
    )


def _strength(place: int, count: int) -> float:
    return 1.0 - 0.8 * place / max(1, count - 1)


def _path(part: Series, x: Axis, y: Axis) -> str:
    kept = thin(part.values)
    pieces = []
    for run in runs(part.values, kept):
        corners = [_corner(part, kept[place], x, y) for place in run]
        pieces.append(f"M{'L'.join(corners)}" + ("h0" if len(corners) == 1 else ""))
    return "".join(pieces)


def _corner(part: Series, index: int, x: Axis, y: Axis) -> str:
    value = part.values[index]
    assert value is not None
    return f"{x.place(part.steps[index]) * WIDTH:.1f} {(1 - y.place(value)) * HEIGHT:.1f}"


def _points(parts: Sequence[Series], x: Axis, y: Axis) -> list[list[object]]:
    """[left %, top %, step, readout] for each step of the first part that is drawn."""
    first, values = parts[0], [dict(part.finite) for part in parts]
    found: list[list[object]] = []
    for index in thin(first.values):
        step, value = first.steps[index], first.values[index]
        assert value is not None
        place = [round(100 * x.place(step), 2), round(100 * (1 - y.place(value)), 2)]
        found.append([*place, step, _readout(values, step)])
    return found


def _readout(parts: Sequence[Mapping[int, float]], step: int) -> str:
    """The values of the first and the last part at a step."""
    ends = {"clean": parts[0].get(step), "noise": parts[-1].get(step)}
    return ", ".join(f"{name} {'–' if value is None else short(value)}" for name, value in ends.items())


def _said(title: str, parts: Sequence[Series], y: Axis) -> str:
    ends = [f"{short(part.finite[0][1])} to {short(part.finite[-1][1])}" for part in parts]
    scale = ", logarithmic scale" if y.log else ""
    return f"{title} by step{scale}, from clean to noise: {'; '.join(ends)}. Arrow keys read single values."
