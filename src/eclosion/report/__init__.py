"""One static page per run: `report.html`, made from the other files of the run folder."""

from contextlib import suppress
from pathlib import Path

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.report.page import render
from eclosion.report.reading import read_run
from eclosion.rundir import RunDir

__all__ = ["write_report"]


def write_report(run: str | Path) -> Path:
    """Write `report.html` from what stands in the run folder.

    The page carries its pictures, style and script in itself, loads nothing, and works from a file. Whatever is missing
    or damaged in the folder is left out and, where it matters, named on the page. A page that stood there before is
    replaced at once, so a reader never sees half of one.

    Args:
        run: a run folder.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if it is no run folder.
        EnvironmentProblem: if the page cannot be written.
    """
    folder = RunDir(Path(run))
    if not folder.root.is_dir():
        raise ConfigError(f"{run} is no run folder. `eclosion runs` lists runs.")
    page = render(read_run(folder)).encode()
    aside = folder.report.with_name(f".{folder.report.name}.partial")
    try:
        aside.write_bytes(page)
        aside.replace(folder.report)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise EnvironmentProblem(
            f"{folder.report}: cannot be written ({error.strerror}); it takes {len(page) / 1e6:.1f} MB. "
            "Make room or the folder writable; checkpoints are intact."
        ) from error
    return folder.report
