"""The tables and lists of the page: data, checkpoints, events, environment, config."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from eclosion.report.markup import Html, clip, el, join, quiet, section
from eclosion.report.reading import Checkpoint, Run, dig

__all__ = ["checkpoints", "config", "data", "environment", "events"]

# What a page shows of long lists; the files hold the rest.
MAX_ROWS, MAX_OPTIONS = 300, 1000


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
    return quiet(f"The {MAX_ROWS} newest of {count:,}; all are in {file}.") if count > MAX_ROWS else None


def data(run: Run) -> Html:
    """What each epoch delivered and skipped, and why."""
    if not run.epochs:
        return section("Data", quiet("No epoch is finished yet."))
    delivered = sum(epoch["delivered"] for epoch in run.epochs if isinstance(epoch.get("delivered"), int))
    skipped = sum(sum(_reasons(epoch).values()) for epoch in run.epochs)
    word = "epoch" if len(run.epochs) == 1 else "epochs"
    total = f"{len(run.epochs):,} finished {word}: {delivered:,} images delivered, {skipped:,} skipped."
    rows = [
        (_count(epoch.get("epoch")), _count(epoch.get("delivered")), _count(sum(_reasons(epoch).values())), _why(epoch))
        for epoch in reversed(run.epochs[-MAX_ROWS:])
    ]
    heads = "epoch", "delivered", "skipped", "why, and which"
    return section(
        "Data",
        el("p", total),
        _table("Images delivered and skipped by epoch, newest first", heads, rows, numbers=3),
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


def checkpoints(run: Run) -> Html:
    """The checkpoints in the folder, with their sizes."""
    if not run.checkpoints:
        return section("Checkpoints", quiet("No checkpoint yet."))
    rows = [(f"{one.step:,}", _size(one), el("code", one.name)) for one in reversed(run.checkpoints[-MAX_ROWS:])]
    return section(
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


def events(run: Run) -> Html:
    """Starts, resumes, accepted changes and what else was said, in order."""
    if not run.events:
        return section("Events", quiet("Nothing is recorded yet."))
    items = (el("li", *_event(event), class_=_kind(event)) for event in run.events[-MAX_ROWS:])
    return section("Events", el("ol", *items, class_="events"), _cut(len(run.events), "events.jsonl"))


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


def environment(run: Run) -> Html:
    """Device, threads and versions of the last start, and the data's fingerprint."""
    rows = list(_dotted(run.environment))
    meta = run.checkpoints[-1].manifest.get("meta") if run.checkpoints else None
    if dig(meta, "fingerprint"):
        rows.append(("data fingerprint", dig(meta, "fingerprint")))
    if not rows:
        return section("Environment", quiet("Not recorded yet."))
    pairs = (el("div", el("dt", _named(key)), el("dd", _value(value))) for key, value in rows)
    return section("Environment", el("dl", *pairs, class_="pairs"))


def _named(key: str) -> str:
    return clip(key.removeprefix("packages.").replace("_", " "), 80)


def config(run: Run) -> Html:
    """Every option with its dotted key, as the command line takes it."""
    groups: dict[str, list[tuple[str, object]]] = {}
    for key, value in _dotted(run.config):
        groups.setdefault(key.partition(".")[0] if "." in key else "", []).append((key, value))
    if not groups:
        return section("Config", quiet("There is no readable config.json."))
    tables = (_options(name or "run", rows) for name, rows in groups.items())
    return section("Config", el("div", *tables, class_="config"))


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


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else clip(value, 80)
