"""The page: what it says about a run, section by section."""

import base64
import hashlib
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from importlib import resources

from eclosion.report.around import bands_of, surrounded
from eclosion.report.chart import KNOWN, chart
from eclosion.report.curves import Series, short
from eclosion.report.family import family
from eclosion.report.grids import BUDGET, Grid, choose, embed
from eclosion.report.markup import Html, clip, el, join, quiet, section
from eclosion.report.reading import Run, dig
from eclosion.report.tables import checkpoints, config, data, environment, events

__all__ = ["render"]

# What a page shows at most; the file holds the rest.
MAX_CURVES = 60
LOSS = "train/loss"
VALIDATION = "validation/loss"


def render(run: Run) -> str:
    """The whole page."""
    style, script = _file("page.css"), _file("page.js")
    parts = {
        "policy": _policy(style, script),
        "title": join(f"{clip(run.name, 80)} · {_state(run)} · eclosion"),
        "style": style,
        "header": _header(run),
        "main": join(
            _results(run), _curves(run), data(run), checkpoints(run), events(run), environment(run), config(run)
        ),
        "notes": join(*(el("p", note) for note in run.notes)),
        "script": script,
    }
    # one pass: what the data says is never looked at for further names
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _file("page.html"))


def _file(name: str) -> Html:
    return Html((resources.files(__package__) / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> Html:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return Html(
        f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


# --- head ----------------------------------------------------------------------------------------------------------


def _state(run: Run) -> str:
    if run.finished:
        return f"finished at step {run.step:,}"
    return f"step {run.step:,} of {run.num_steps:,}" if run.num_steps else f"step {run.step:,}"


def _header(run: Run) -> Html:
    end = run.step if run.finished else run.num_steps
    share = min(run.step / end, 1.0) if end else 0.0
    state = "finished" if run.finished else "not finished"
    return join(
        el("p", "eclosion", el("span", " run report"), class_="house"),
        el("h1", clip(run.name, 120)),
        el("p", *_subtitle(run), class_="subtitle") if run.config else None,
        el(
            "div",
            el("span", state, class_=f"badge {'good' if run.finished else 'open'}"),
            el("span", _progress(run)),
            class_="state",
        ),
        el("progress", max=1, value=f"{share:.4f}", aria_label="Share of the run that is done") if end else None,
        el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in _facts(run)), class_="facts"),
    )


def _progress(run: Run) -> str:
    if run.finished:
        return f"step {run.step:,}"
    if run.num_steps:
        return f"step {run.step:,} of {run.num_steps:,} ({min(run.step / run.num_steps, 1):.0%})"
    duration = dig(run.config, "train", "duration")
    return f"step {run.step:,}" + (f" of {clip(duration, 40)}" if isinstance(duration, str) else "")


def _subtitle(run: Run) -> Iterator[str]:
    """What is trained on what, as far as the config says."""
    task, source = dig(run.config, "task", "name"), dig(run.config, "data", "source", "name")
    size = dig(run.config, "data", "image_size")
    yield clip(task, 60) if task else "a task without a name"
    yield f" on {clip(source, 60)}" if source else ""
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    yield f" at {clip(width, 12)} × {clip(height, 12)} pixels" if size else ""


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """The few numbers that one asks for first."""
    if run.samples_seen is not None:
        yield "images seen", f"{run.samples_seen:,}"
        if run.num_samples:
            yield "epochs", f"{run.samples_seen / run.num_samples:,.1f}"
    loss = [value for _, value in _loss(run).finite]
    if loss:
        last = loss[-max(1, len(loss) // 40) :]
        yield ("loss, latest mean" if len(last) > 1 else "latest loss"), short(statistics.fmean(last))
    if run.best:
        by = "validation loss" if run.best["by"] == "validation" else clip(run.best["by"].partition(" (")[0], 40)
        yield f"best {by}", f"{short(run.best['value'])} at step {run.best['step']:,}"
    speed = run.series.get("perf/images_per_second")
    if speed and speed.finite:
        yield "images per second, median", short(statistics.median(value for _, value in speed.finite))
    if run.environment.get("device"):
        yield "device", clip(run.environment["device"], 60)


def _loss(run: Run) -> Series:
    """The loss of the first network that has one."""
    found = sorted(name for name in run.series if name == LOSS or name.startswith(f"{LOSS}/"))
    return run.series[found[0]] if found else Series(LOSS, [], [])


# --- pictures and curves -------------------------------------------------------------------------------------------


def _results(run: Run) -> Html:
    return section("Results", el("div", _grids(run), chart(_loss(run), index=0), class_="results"))


def _grids(run: Run) -> Html:
    if not run.grids:
        return el("div", el("h3", "Samples"), quiet("No sample grid yet."), class_="samples")
    chosen = choose(run.grids)
    grids = [embed(step, path, budget=BUDGET // len(chosen)) for step, path in chosen]
    unreadable = [grid.name for grid in grids if not grid.source]
    grids = [grid for grid in grids if grid.source]
    left_out = len(run.grids) - len(grids) - len(unreadable)
    return el(
        "div",
        el("div", el("h3", "Samples"), el("output", f"step {grids[-1].step:,}") if grids else None, class_="heading"),
        el("div", *(_frame(grid, shown=grid is grids[-1]) for grid in grids), class_="frames"),
        _slider(grids) if len(grids) > 1 else None,
        quiet(f"{left_out:,} more grids are in the run folder.") if left_out else None,
        quiet(f"Cannot be read: {', '.join(unreadable)}.") if unreadable else None,
        quiet("Some are compressed here; the files are exact.") if any(grid.reduced for grid in grids) else None,
        *(quiet(legend) for legend in sorted({clip(grid.legend, 200) for grid in grids if grid.legend})),
        class_="samples",
    )


def _frame(grid: Grid, *, shown: bool) -> Html:
    words = f"Grid of images sampled after {grid.step:,} steps"
    picture = el("img", src=grid.source, alt=words, width=grid.width, height=grid.height)
    return el("figure", picture, el("figcaption", f"step {grid.step:,}"), class_=f"frame{' on' if shown else ''}")


def _slider(grids: Sequence[Grid]) -> Html:
    last = len(grids) - 1
    steps = json.dumps([f"step {grid.step:,}" for grid in grids])
    slider = el(
        "input",
        type="range",
        id="which",
        min=0,
        max=last,
        value=last,
        data_steps=steps,
        aria_label="Step of the sample grid",
        aria_valuetext=f"step {grids[-1].step:,}",
    )
    ends = el("span", f"{grids[0].step:,}"), el("span", f"{grids[-1].step:,}")
    return el("div", slider, el("div", *ends, class_="ends", aria_hidden="true"), class_="slider")


def _curves(run: Run) -> Html:
    order = list(KNOWN)
    drawn, bands = surrounded(run), bands_of(run)
    names = sorted(set(drawn) - {_loss(run).name}, key=lambda name: (_rank(name, order), name))
    charts: list[Html] = []
    for name in names[:MAX_CURVES]:
        charts.append(chart(drawn[name], index=len(charts) + 1))
        if name in bands:
            title = "Loss by noise level" + clip(name.removeprefix(VALIDATION).replace("/", ", "), 40)
            charts.append(family(title, name, bands[name], index=len(charts) + 1))
    more = len(names) - MAX_CURVES
    return section(
        "Curves",
        el("div", *charts, class_="curves") if charts else quiet("No numbers were logged yet."),
        quiet(f"{more:,} more metrics are in metrics.jsonl.") if more > 0 else None,
    )


def _rank(name: str, order: Sequence[str]) -> int:
    return next((i for i, known in enumerate(order) if name == known or name.startswith(f"{known}/")), len(order))
