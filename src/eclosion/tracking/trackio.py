"""Numbers, pictures and config of a run in Trackio, a local dashboard."""

import os
from typing import Annotated, Any

import trackio
from pydantic import Field

from eclosion.registry import part
from eclosion.rundir import RunDir
from eclosion.tracking.beside import Beside
from eclosion.tracking.feed import Facts, Row
from eclosion.tracking.following import Follower, Opened, Standing

__all__ = ["TrackioLogger"]


@part
class TrackioLogger:
    """Numbers, pictures, config and environment in Trackio's data base on this machine; look with `trackio show`.

    They are read from the run folder by a process beside the run. The data base lies in TRACKIO_DIR, or else in Hugging
    Face's cache.
    """

    # The project.
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "eclosion"
    # What the run is called; none is the name of its folder with an id. If there is a run of that name, rows are added.
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._ -]{0,99}$")] | None = None

    def open(self) -> Follower:
        """Ready to start."""
        return Follower(Beside(self, place={"project": self.project, "run_name": self.run_name}))

    def service(self) -> "Trackio":
        """What is told of the run, in the process beside it."""
        return Trackio(self)


class Trackio:
    """Trackio as a service that is told of runs."""

    def __init__(self, options: TrackioLogger) -> None:
        self.options = options
        self._run: Any = None

    def open(self, run: RunDir, standing: Standing, facts: Facts) -> Opened:
        """Begin the run, or go on with it."""
        for elsewhere in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
            os.environ.pop(elsewhere, None)  # this process tells the data base on this machine, and nobody else
        config = {**facts.config, "environment": facts.environment}
        self._run = trackio.init(
            project=self.options.project,
            name=self.options.run_name or f"{facts.name}-{standing.run_id}",
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        following = getattr(self._run, "_next_step", None)  # the step that it would count next
        return Opened(None, None if following is None else following - 1, mode="local")

    def describe(self, facts: Facts) -> None:
        """Trackio keeps what it was told first."""

    def send(self, row: Row, service_step: int) -> None:
        """Log a row."""
        seen = {} if row.samples_seen is None else {"samples_seen": row.samples_seen}
        pictures = {picture.name: trackio.Image(str(picture.path), caption=picture.caption) for picture in row.pictures}
        self._run.log({**seen, **row.numbers, **pictures}, step=service_step)

    def close(self, *, done: bool) -> None:
        """Write what is pending."""
        run, self._run = self._run, None
        run.finish()
