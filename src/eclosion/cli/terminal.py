"""How results look on a terminal, and as JSON."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eclosion.errors import UserError

if TYPE_CHECKING:  # for types alone: they import torch
    from eclosion.diagnosis import Diagnosis
    from eclosion.evaluation.evaluating import Evaluation
    from eclosion.evaluation.results import Floor, Result
    from eclosion.inspection.checking import Check
    from eclosion.inspection.indexing import IndexReport
    from eclosion.inspection.parts import PartInfo
    from eclosion.inspection.runs import RunInfo

__all__ = [
    "as_json",
    "counting_bar",
    "phases_bar",
    "print_check",
    "print_diagnosis",
    "print_evaluation",
    "print_index",
    "print_parts",
    "print_runs",
    "sampling_bar",
]

# Columns of a table in a file or a pipe, where there is no window to fit into.
PLAIN_WIDTH = 160


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def as_json(value: Any) -> str:
    """A result of ours as JSON text."""
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, UserError):
        return {"kind": type(value).__name__, "exit_code": value.exit_code, "message": str(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such number
    return str(value) if isinstance(value, Path) else value


def _table(*headings: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headings))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    """Add a row of plain text: what comes from files may hold rich's markup."""
    table.add_row(*(Text(str(cell)) for cell in cells))


# --- check ---------------------------------------------------------------------------------------------------------


def print_check(check: "Check") -> None:
    """Settings with their origins, networks, and what the run amounts to."""
    console = _console()
    if check.settings:
        settings = _table("key", "value", "origin")
        for setting in check.settings:
            _row(settings, setting.path, json.dumps(setting.value), setting.origin)
        console.print(settings, "")
    if check.networks:
        console.print(_networks(check), "")
    facts = _table("", "")
    for name, fact in _facts(check):
        _row(facts, name, fact)
    if facts.row_count:
        console.print(facts)
    for note in check.notes:
        console.print(Text(f"note: {note}"))
    if not check.problems:
        console.print("No problem found.")


def _networks(check: "Check") -> Table:
    table = _table("network", "block", "parameters", right=[2])
    for net in check.networks:
        for block, size in net.blocks.items():
            _row(table, net.name, block, f"{size:,}")
        rate = f" at {net.learning_rate:g}" if len(check.networks) > 1 else ""  # each may have its own
        _row(table, net.name, f"total, trained{rate}" if net.trained else "total, frozen", f"{net.parameters:,}")
    return table


def _facts(check: "Check") -> Iterator[tuple[str, str]]:
    if check.data:
        data = check.data
        yield "images", f"{data.num_samples:,}"
        yield "classes", f"{len(data.class_names)}: {_listed(data.class_names)}" if data.class_names else "none"
        yield "captions", "yes" if data.has_captions else "none"
    if check.validation:
        yield "validation", f"{check.validation.num_samples:,} images"
    for told in check.evaluation:
        yield "evaluation", told
    if check.plan:
        plan = check.plan
        yield "steps", f"{plan.num_steps:,}, {plan.steps_per_epoch:,.4g} in an epoch"
        yield "epochs", f"{plan.epochs:,.4g}"
        yield "images seen", f"{plan.num_samples:,}"
    if check.device:
        yield "device", f"{check.device}, precision {check.precision}"
    if check.checkpoint_bytes:
        yield "checkpoint", f"{_bytes(check.checkpoint_bytes)} each, {_bytes(check.free_bytes)} free on the disk"
    if check.standing:
        yield "output", check.standing


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# --- runs ----------------------------------------------------------------------------------------------------------


def print_runs(runs: Sequence["RunInfo"], folder: Path) -> None:
    """One line per run."""
    console = _console()
    if not runs:
        console.print(Text(f"No runs below {folder}."))
        return
    table = _table("run", "state", "step", "of", "loss", "updated", right=[2, 3, 4])
    for run in runs:
        loss = "" if run.loss is None or not math.isfinite(run.loss) else f"{run.loss:.4f}"
        cells = ["" if value is None else value for value in (run.step, run.num_steps)]
        _row(table, run.folder, run.state, *cells, loss, _ago(run.updated))
    console.print(table)


def _ago(when: datetime) -> str:
    seconds = (datetime.now(UTC) - when).total_seconds()
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now" if seconds < 10 else f"{seconds:.0f} seconds ago"


# --- list ----------------------------------------------------------------------------------------------------------


def print_parts(parts: Sequence["PartInfo"]) -> None:
    """Each part with its options."""
    console = _console()
    table = ""
    for part in parts:
        if part.table != table:
            table = part.table
            console.print(Text(f"{table.replace('_', ' ').upper()}", style="bold"))
        console.print(Text.assemble("  ", (part.name, "bold"), f"  {part.summary}"))
        options = _table("", "", "", "")
        for option in part.options:
            _row(options, f"      {option.name}", option.type, f"= {option.default}", option.text)
        if part.options:
            console.print(options)


# --- doctor --------------------------------------------------------------------------------------------------------


def print_diagnosis(diagnosis: "Diagnosis") -> None:
    """One line per finding."""
    console = _console()
    table = _table("", "", "")
    for finding in diagnosis.findings:
        _row(table, "OK" if finding.ok else "FAILED", finding.name, finding.text)
    console.print(table)


# --- sample --------------------------------------------------------------------------------------------------------


@contextmanager
def sampling_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar over the calls of the network at work, from the start again for each batch and network of a cascade.

    What it gives is `on_step`. Nothing where there is no terminal.
    """
    from rich.progress import Progress  # only one command needs it

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("sampling", total=None)

        def on_step(step: int, steps: int) -> None:
            progress.update(task, total=steps, completed=step + 1)

        yield on_step


# --- evaluate ------------------------------------------------------------------------------------------------------


def print_evaluation(found: "Evaluation") -> None:
    """One line per score, with what a reader must know of it."""
    console = _console()
    against = f", against {found.against}" if found.against else ""
    console.print(Text(f"{found.n:,} images: {found.what}{against}"))
    table = _table("score", "value", "", "95 % interval", "real against real", "n", "better", "extractor", right=[1, 5])
    for row in found.results:
        known = [_error(row), _interval(row), _floor(row.floor)]
        _row(table, row.score, _number(row.value), *known, _counts(row), row.better, _extractor(row))
    console.print(table)
    for note in found.notes:
        console.print(Text(f"note: {note}"))
    if found.written:
        console.print(Text(f"Written: {', '.join(map(str, found.written))}"))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _error(row: "Result | Floor") -> str:
    return "" if row.error is None else f"± {row.error:.2g}"


def _interval(row: "Result") -> str:
    return "" if row.interval is None else f"{_number(row.interval[0])} to {_number(row.interval[1])}"


def _floor(floor: "Floor | None") -> str:
    return "" if floor is None else " ".join(filter(None, [_number(floor.value), _error(floor), f"({_counts(floor)})"]))


def _counts(row: "Result | Floor") -> str:
    return f"{row.n:,}" if row.n_reference is None else f"{row.n:,} and {row.n_reference:,}"


def _extractor(row: "Result") -> str:
    return f"{row.extractor.name} {row.extractor.weights}" if row.extractor else ""


@contextmanager
def phases_bar() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """A bar for each phase of some work, with the time that is left; gives `on_phase` and `on_image`.

    Nothing where there is no terminal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        now = [progress.add_task("starting", total=None)]

        def on_phase(phase: str) -> None:
            progress.stop_task(now[0])
            now[0] = progress.add_task(phase, total=None)

        yield on_phase, lambda done, total: progress.update(now[0], completed=done, total=total)


# --- index ---------------------------------------------------------------------------------------------------------


def print_index(report: "IndexReport") -> None:
    """What shards hold, and every problem."""
    console = _console()
    facts = _table("", "")
    _row(facts, "samples", f"{report.num_samples:,} in {len(report.shards):,} shards")
    sizes = [shard.num_samples for shard in report.shards]
    _row(facts, "in a shard", f"{min(sizes):,} to {max(sizes):,}")
    for title, counts in (("members", report.members), ("left alone", report.ignored)):
        _row(facts, title, ", ".join(f"{count:,} {suffix}" for suffix, count in counts.items()) or "none")
    if report.missing:
        _row(facts, "missing", f"{len(report.missing):,} shards: {_listed(report.missing, 3)}")
    console.print(facts)
    for problem in report.problems:
        console.print(Text(f"problem: {problem}"))
    if not report.problems:
        console.print("No problem found.")


@contextmanager
def counting_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are done one by one; what it gives is told how many are done, and of how many."""
    from rich.progress import Progress  # only a few commands need it

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
