"""What stands around a curve: its 95 % interval, and what real images score."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from eclosion.evaluation.comparing import how_measured
from eclosion.report.curves import Series, short
from eclosion.report.reading import Run, dig, finite, is_count

__all__ = ["bands_of", "surrounded"]

LOSS, ERROR, BAND = "validation/loss", "validation/loss_error", "/band_"
SCORE = "evaluate/"
# Standard errors to either side that hold 95 %.
Z = 1.96


def surrounded(run: Run) -> dict[str, Series]:
    """The curves of a run that are drawn one by one, validation losses and scores with their intervals."""
    found = {}
    for name, series in run.series.items():
        if BAND in name and _is(name, LOSS, ERROR):
            continue  # drawn together
        if _is(name, ERROR) and name.replace(ERROR, LOSS, 1) in run.series:
            continue  # drawn around the loss
        if _is(name, LOSS) and (error := run.series.get(name.replace(LOSS, ERROR, 1))):
            series = _with_error(series, error)
        elif name.startswith(SCORE):
            series = _with_results(series, run.results)
        found[name] = series
    return found


def bands_of(run: Run) -> dict[str, list[Series]]:
    """The validation losses by noise level, from clean to noise: by the name of the loss that they are parts of."""
    found: dict[str, list[tuple[int, Series]]] = {}
    for name, series in run.series.items():
        whole, _, band = name.rpartition(BAND)
        if _is(whole, LOSS) and band.isdigit():
            found.setdefault(whole, []).append((int(band), series))
    return {whole: [series for _, series in sorted(parts, key=lambda part: part[0])] for whole, parts in found.items()}


def _is(name: str, *bases: str) -> bool:
    return any(name == base or name.startswith(f"{base}/") for base in bases)


def _with_error(series: Series, error: Series) -> Series:
    """The interval that a standard error at the same steps makes."""
    errors = dict(error.finite)
    spread = [(value, errors.get(step)) for step, value in zip(series.steps, series.values, strict=True)]
    known = [None if v is None or e is None else (v - Z * e, v + Z * e) for v, e in spread]
    return _with_interval(series, known, None, [])


def _with_results(series: Series, results: list[dict[str, Any]]) -> Series:
    """What results.json says of the same score at the same step.

    A curve is of numbers that compare: those that were measured in another way than the newest are left out.
    """
    rows = dict(_rows_of(series, results))
    last = next((rows[step] for step in reversed(series.steps) if step in rows), None)
    other = {step for step, row in rows.items() if last is not None and how_measured(row) != how_measured(last)}
    compare = [pair for pair in zip(series.steps, series.values, strict=True) if pair[0] not in other]
    series = replace(series, steps=[step for step, _ in compare], values=[value for _, value in compare])
    told = list(_told(last or {}))
    if other:
        which = ", ".join(sorted(set(_differences(rows, other, last or {}))))
        told.append(
            f"{len(other)} earlier point{'s' if len(other) > 1 else ''} left out, measured in another way: {which}."
        )
    known = [_interval(rows.get(step)) for step in series.steps]
    return _with_interval(series, known, finite(dig(last, "floor", "value")), told)


def _differences(rows: Mapping[int, dict[str, Any]], other: set[int], last: Mapping[str, Any]) -> Iterator[str]:
    wanted = how_measured(last)
    for step in other:
        yield from (name for name, value in how_measured(rows[step]).items() if value != wanted[name])


def _rows_of(series: Series, results: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows behind a curve, by step."""
    values = dict(series.finite)
    for row in results:
        extractor, step, split = dig(row, "extractor", "name"), dig(row, "made", "step"), dig(row, "against", "split")
        key = f"{SCORE}{row.get('score')}" + (f"/{extractor}" if extractor else "")
        named = series.name in (key, f"{key}/{split}") and dig(row, "made", "what") == "run"
        if named and is_count(step) and step in values and finite(row.get("value")) == values[step]:
            yield step, row


def _interval(row: Mapping[str, Any] | None) -> tuple[float, float] | None:
    ends = row.get("interval") if row else None
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = map(finite, ends)
    return None if low is None or high is None else (low, high)


def _told(row: Mapping[str, Any]) -> Iterator[str]:
    """What the last score is a score of."""
    counts = [row.get("n"), row.get("n_reference")]
    if is_count(counts[0]):
        against = (
            f" against {counts[1]:,} of {dig(row, 'against', 'split') or 'the reference'}"
            if is_count(counts[1])
            else ""
        )
        yield f"{counts[0]:,} images{against}."
    floor, error, n = (dig(row, "floor", name) for name in ("value", "error", "n"))
    if (floor := finite(floor)) is not None:
        spread = "" if finite(error) is None else f" ± {short(error)}"
        size = f" (n = {n:,})" if is_count(n) else ""
        yield f"Dashed: real images against real images, {short(floor)}{spread}{size}."
    if row.get("better") in ("lower", "higher", "near 0.5"):
        yield f"{str(row['better']).capitalize()} is better."


def _with_interval(
    series: Series, known: list[tuple[float, float] | None], floor: float | None, told: list[str]
) -> Series:
    shaded = ["Shaded: 95 % interval."] if any(known) else []
    return replace(
        series,
        low=[None if pair is None else pair[0] for pair in known],
        high=[None if pair is None else pair[1] for pair in known],
        floor=floor,
        remark=" ".join([*told, *shaded]),
    )
