"""The results as a table for the documentation: `python -m bench.table bench/results/NAME.json`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["markdown"]

HEAD = ["", "case", "comparison", "ours", "peer", "result", "goal", "verdict"]


def markdown(results: Mapping[str, Any]) -> str:
    """A table with one line per row, and what it was measured on.

    Args:
        results: what `python -m bench` writes.
    """
    lines = [_line(HEAD), _line(["---"] * len(HEAD)), *(_line(_cells(row)) for row in results["rows"])]
    missing = [f"Not measured: {name} {why}" for name, why in results.get("not_measured", {}).items()]
    return "\n".join([*lines, "", *missing, _machine(results["machine"]), ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    clock, unit = row["clock"], row["unit"]
    return [
        row["row"],
        row["case"],
        row["comparison"],
        _spread(row["ours"].get(clock)),
        _spread(row["peer"].get(clock)),
        f"{number(row['result'], unit)} {'CPU' if clock == 'cpu' else 'wall'}",
        _goal(row["goal"], unit),
        row["verdict"],
    ]


def number(value: float, unit: str) -> str:
    """A share in percent, a ratio with a times sign."""
    return f"{100 * value:.2g} %" if unit == "share" and abs(value) < 0.1 else _coarse(value, unit)


def _coarse(value: float, unit: str) -> str:
    return f"{100 * value:.0f} %" if unit == "share" else f"{value:.2f}x"


def _goal(goal: Mapping[str, Any] | None, unit: str) -> str:
    if goal is None:
        return "-"
    sign = "<=" if goal["lower_is_better"] else ">="
    return f"{sign} {number(goal['ship'], unit)} ({number(goal['stretch'], unit)})"


def _spread(spread: Mapping[str, Any] | None) -> str:
    """Median, and the range in brackets, in milliseconds."""
    if spread is None:
        return "-"
    low, middle, high = (_milliseconds(spread[key]) for key in ("min", "median", "max"))
    return f"{middle} ms ({low} to {high})"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _machine(machine: Mapping[str, Any]) -> str:
    packages = machine["packages"]
    return (
        f"Measured on {machine['cpu']}, {machine['usable_cores']} cores, {machine['memory_gb']:.0f} GiB, with "
        f"{machine['torch_threads']} thread for torch; Python {machine['python']}, torch {packages['torch']}, "
        f"diffusers {packages['diffusers']}. Each cell holds the median, and the range over the rounds in brackets; "
        "goals are followed by stretch goals in brackets."
    )


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
