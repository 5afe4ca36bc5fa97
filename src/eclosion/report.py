"""One static page per run."""

from eclosion.rundir import RunDir

__all__ = ["write_report"]


def write_report(folder: RunDir) -> None:
    """Write `report.html` from what stands in the run folder."""
