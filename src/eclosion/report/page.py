"""The page: what it says about a run, section by section."""

import base64
import hashlib
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from eclosion.report.chart import KNOWN, chart
from eclosion.report.curves import Series, short
from eclosion.report.grids import Grid, choose, embed
from eclosion.report.markup import Html, clip, el, join
from eclosion.report.reading import Checkpoint, Run, dig

__all__ = ["render"]

# What a page shows of long lists; the files hold the rest.
MAX_CURVES, MAX_ROWS, MAX_OPTIONS = 60, 300, 1000
LOSS = "train/loss"


def render(run: Run) -> str:
    """The whole page."""
    style, script = _file("page.css"), _file("page.js")
    parts = {
        "policy": _policy(style, script),
        "title": join(f"{clip(run.name, 80)} · {_state(run)} · eclosion"),
        "style": style,
        "header": _header(run),
        "main": join(
            _results(run), _curves(run), _data(run), _checkpoints(run), _events(run), _environment(run), _config(run)
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


def _section(title: str, *children: object, **attributes: object) -> Html:
    name = title.lower().replace(" ", "-")
    return el("section", el("h2", title, id=name), *children, aria_labelledby=name, **attributes)


def _quiet(text: str) -> Html:
    return el("p", text, class_="quiet")


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else clip(value, 80)


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
    loss = _finite(run, LOSS)
    if loss:
        last = loss[-max(1, len(loss) // 40) :]
        yield ("loss, mean of the end" if len(last) > 1 else "last loss"), short(statistics.fmean(last))
    speed = _finite(run, "perf/images_per_second")
    if speed:
        yield "images per second, median", short(statistics.median(speed))
    if run.environment.get("device"):
        yield "device", clip(run.environment["device"], 60)


def _finite(run: Run, name: str) -> list[float]:
    return [value for _, value in run.series[name].finite] if name in run.series else []


# --- pictures and curves -------------------------------------------------------------------------------------------


def _results(run: Run) -> Html:
    loss = run.series.get(LOSS, Series(LOSS, [], []))
    return _section("Results", el("div", _grids(run), chart(loss, index=0), class_="results"))


def _grids(run: Run) -> Html:
    if not run.grids:
        return el("div", el("h3", "Samples"), _quiet("No sample grid yet."), class_="samples")
    grids = [embed(step, path) for step, path in choose(run.grids)]
    unreadable = [grid.name for grid in grids if not grid.source]
    grids = [grid for grid in grids if grid.source]
    left_out = len(run.grids) - len(grids) - len(unreadable)
    return el(
        "div",
        el("div", el("h3", "Samples"), el("output", f"step {grids[-1].step:,}") if grids else None, class_="heading"),
        el("div", *(_frame(grid, shown=grid is grids[-1]) for grid in grids), class_="frames"),
        _slider(grids) if len(grids) > 1 else None,
        _quiet(f"{left_out:,} more grids are in the run folder.") if left_out else None,
        _quiet(f"Cannot be read: {', '.join(unreadable)}.") if unreadable else None,
        _quiet("Some are compressed here; the files are exact.") if any(grid.reduced for grid in grids) else None,
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
    names = sorted(set(run.series) - {LOSS}, key=lambda name: (_rank(name, order), name))
    charts = [chart(run.series[name], index=i) for i, name in enumerate(names[:MAX_CURVES], 1)]
    more = len(names) - len(charts)
    return _section(
        "Curves",
        el("div", *charts, class_="curves") if charts else _quiet("No numbers were logged yet."),
        _quiet(f"{more:,} more metrics are in metrics.jsonl.") if more else None,
    )


def _rank(name: str, order: Sequence[str]) -> int:
    return next((i for i, known in enumerate(order) if name == known or name.startswith(f"{known}/")), len(order))


# --- tables --------------------------------------------------------------------------------------------------------


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: int) -> Html:
    """A table in a box that scrolls; the first `numbers` columns are numbers."""

    def cell(row: Sequence[object], i: int) -> Html:
        kind = "number" if i < numbers else None
        return el("th", row[i], scope="row", class_=kind) if i == 0 else el("td", row[i], class_=kind)

    head = el("tr", *(el("th", h, scope="col", class_="number" if i < numbers else None) for i, h in enumerate(heads)))
    body = (el("tr", *(cell(row, i) for i in range(len(row)))) for row in rows)
    table = el("table", el("caption", caption, class_="unseen"), el("thead", head), el("tbody", *body))
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cut(count: int, file: str) -> Html | None:
    return _quiet(f"The {MAX_ROWS} newest of {count:,}; all are in {file}.") if count > MAX_ROWS else None


def _data(run: Run) -> Html:
    if not run.epochs:
        return _section("Data", _quiet("No epoch is finished yet."))
    delivered = sum(epoch["delivered"] for epoch in run.epochs if isinstance(epoch.get("delivered"), int))
    skipped = sum(sum(_reasons(epoch).values()) for epoch in run.epochs)
    word = "epoch" if len(run.epochs) == 1 else "epochs"
    total = f"{len(run.epochs):,} finished {word}: {delivered:,} images delivered, {skipped:,} skipped."
    rows = [
        (_count(epoch.get("epoch")), _count(epoch.get("delivered")), _count(sum(_reasons(epoch).values())), _why(epoch))
        for epoch in run.epochs[-MAX_ROWS:]
    ]
    heads = "epoch", "delivered", "skipped", "why, and which"
    return _section(
        "Data",
        el("p", total),
        _table("Images delivered and skipped, by epoch", heads, rows, numbers=3),
        _cut(len(run.epochs), "ledger.jsonl"),
    )


def _reasons(epoch: dict[str, Any]) -> dict[str, int]:
    skipped = epoch.get("skipped")
    return {k: v for k, v in skipped.items() if isinstance(v, int)} if isinstance(skipped, dict) else {}


def _why(epoch: dict[str, Any]) -> Html | None:
    reasons, samples = _reasons(epoch), epoch.get("samples")
    if not reasons:
        return None
    said = ", ".join(f"{clip(reason, 60)} {count:,}" for reason, count in reasons.items())
    named = [one for one in samples if isinstance(one, dict)] if isinstance(samples, list) else []
    if not named:
        return join(said)
    items = (el("li", el("code", clip(one.get("name"), 200)), f" {clip(one.get('reason'), 60)}") for one in named)
    return el("details", el("summary", said), el("ul", *items))


def _checkpoints(run: Run) -> Html:
    if not run.checkpoints:
        return _section("Checkpoints", _quiet("No checkpoint yet."))
    rows = [
        (f"{one.step:,}", _size(one), el("code", one.name))
        for one in reversed(run.checkpoints[-MAX_ROWS:])
    ]
    return _section(
        "Checkpoints",
        _table("Checkpoints, newest first", ("step", "size", "folder"), rows, numbers=2),
        _cut(len(run.checkpoints), "checkpoints"),
    )


def _size(checkpoint: Checkpoint) -> str:
    total = sum(checkpoint.sizes)
    if not total:
        return "no manifest"
    unit, word = next(((u, w) for u, w in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if total >= u), (1.0, "bytes"))
    return f"{total / unit:,.1f} {word}" if unit > 1 else f"{total:,} bytes"


def _events(run: Run) -> Html:
    if not run.events:
        return _section("Events", _quiet("Nothing is recorded yet."))
    items = (el("li", *_event(event), class_=_kind(event)) for event in run.events[-MAX_ROWS:])
    return _section("Events", el("ol", *items, class_="events"), _cut(len(run.events), "events.jsonl"))


def _event(event: dict[str, Any]) -> Iterator[object]:
    yield clip(event.get("event", "unnamed"), 600)
    facts = {k: v for k, v in event.items() if k not in ("event", "environment")}
    if facts:
        said = ", ".join(f"{clip(name, 40)} {_count(value)}" for name, value in list(facts.items())[:8])
        yield el("span", f" {said}", class_="quiet")


def _kind(event: dict[str, Any]) -> str:
    """How an event is marked, by how the loop words it."""
    text = str(event.get("event"))
    kinds = {"training": "start", "resuming": "start", "accepted": "change", "finished": "end", "skipped": "lost"}
    return kinds.get(text.partition(" ")[0], "other")


def _environment(run: Run) -> Html:
    rows = list(_dotted(run.environment))
    meta = run.checkpoints[-1].manifest.get("meta") if run.checkpoints else None
    if dig(meta, "fingerprint"):
        rows.append(("data fingerprint", dig(meta, "fingerprint")))
    if not rows:
        return _section("Environment", _quiet("Not recorded yet."))
    pairs = (el("div", el("dt", _named(key)), el("dd", _value(value))) for key, value in rows)
    return _section("Environment", el("dl", *pairs, class_="pairs"))


def _named(key: str) -> str:
    return clip(key.removeprefix("packages.").replace("_", " "), 80)


def _config(run: Run) -> Html:
    groups: dict[str, list[tuple[str, object]]] = {}
    for key, value in _dotted(run.config):
        groups.setdefault(key.partition(".")[0] if "." in key else "", []).append((key, value))
    if not groups:
        return _section("Config", _quiet("There is no readable config.json."))
    tables = (_options(name or "run", rows) for name, rows in groups.items())
    return _section("Config", el("div", *tables, class_="config"))


def _options(name: str, rows: Sequence[tuple[str, object]]) -> Html:
    body = (el("tr", el("th", clip(key, 160), scope="row"), el("td", _value(value))) for key, value in rows)
    return el("table", el("caption", clip(name, 80)), el("tbody", *body))


def _value(value: object) -> str:
    return clip(value if isinstance(value, str) and value else json.dumps(value))


def _dotted(tree: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The leaves of nested objects and lists with their dotted keys, in order; a list of plain values is a leaf."""
    waiting, found = [("", tree)], 0
    while waiting and found < MAX_OPTIONS:
        key, value = waiting.pop()
        children = _children(value)
        if children:
            waiting += [(f"{key}.{name}" if key else name, child) for name, child in reversed(children)]
        elif key:
            found += 1
            yield key, value


def _children(value: object) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return [(str(i), one) for i, one in enumerate(value)]
    return []
