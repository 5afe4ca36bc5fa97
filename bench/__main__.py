"""`python -m bench [S1 S2 ...] [--quick] [--out FILE]`: measure, print a table, write JSON."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: its threads would share the cores with the other side
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, load_average, wait_until_idle
from bench.row import NotMeasured, Row
from bench.table import markdown, number

# Row -> the function that measures it, and on what.
ROWS = {
    "S1": "bench.steps:overhead",
    "S2": "bench.steps:speed",
    "S3": "bench.decoder:decoder",
    "S4": "bench.shards:shards",
    "S5": "bench.data_wait:data_wait",
    "S6": "bench.checkpoints:save",
    "S7": "bench.checkpoints:load",
    "S11": "bench.startup:startup",
}
# How long a row waits for a quiet machine before it measures a busy one.
PATIENCE_SECONDS = 180


def main() -> None:
    """Measure the rows that the command line names."""
    options = _options()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": describe(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "rows": [],
        "not_measured": {},
    }
    for name in options.row or ROWS:
        if not options.quick:
            wait_until_idle(options.patience)
        try:
            for row in _measure(name)(quick=options.quick):
                results["rows"].append(row.as_dict())
                print(_told(row), file=sys.stderr, flush=True)
                _keep(results, options.out)  # after each row: some take minutes
        except NotMeasured as error:
            results["not_measured"][name] = str(error)
            print(f"{name}  not measured, {error}", file=sys.stderr, flush=True)
            _keep(results, options.out)
    print(markdown(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; none means all")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small, seconds, no verdict")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        help=f"seconds to wait for a quiet machine before each row ({PATIENCE_SECONDS})",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.row) - set(ROWS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such row. Rows: {', '.join(ROWS)}.")
    return options


def _keep(results: dict[str, Any], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _measure(name: str) -> Callable[..., Iterator[Row]]:
    module, _, function = ROWS[name].partition(":")
    return getattr(import_module(module), function)


def _told(row: Row) -> str:
    result = f"{number(row.result, row.unit)} ({row.clock})"
    return f"{row.row}  {row.case}, {row.comparison}: {result}, {row.verdict}; load {load_average():.2f}"


if __name__ == "__main__":
    main()
