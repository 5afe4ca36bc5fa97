"""Numbers, pictures and facts of a run at Weights & Biases."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import wandb
from pydantic import Field, model_validator

from eclosion.config.wandb import RunId
from eclosion.registry import part
from eclosion.rundir import RunDir
from eclosion.tracking.beside import Beside
from eclosion.tracking.feed import Facts, Row
from eclosion.tracking.following import Follower, Opened, Standing
from eclosion.tracking.wandb_projects import check_private
from eclosion.tracking.wandb_segments import last_step

__all__ = ["WandbLogger"]

# Seconds that wandb has to begin a run, and to upload what is left at its end.
INIT_SECONDS, FINISH_SECONDS = 20.0, 10.0
# The axis of its charts. Rows have it as wandb's own step too, as offline segments are put together by that.
AXIS = "step"


@part
class WandbLogger:
    """Numbers, pictures, config, environment and ledger at Weights & Biases; the key is in WANDB_API_KEY or ~/.netrc.

    They are read from the run folder by a process beside the run, which never waits for the network; what has not
    arrived is sent when it can be, or by `eclosion sync`.
    """

    # Who owns the project: a user or a team; none is the default of the key.
    entity: str | None = None
    # The project.
    project: Annotated[str, Field(min_length=1)] = "eclosion"
    # What the run is called; none is the name of its folder.
    run_name: str | None = None
    # Its id; none makes one, which is kept in the run folder.
    run_id: RunId | None = None
    # Whether a run with this run_id must be there already; else it is made where it is not.
    resume: bool = False
    # Whether a run that is started again goes on with its own run at wandb; else each start makes a new one.
    auto_resume: bool = True
    # Whether to send, or to write for `wandb sync`; none takes WANDB_MODE, and else sends.
    mode: Literal["online", "offline"] | None = None
    # Whether everybody may see the project; else nothing is sent to one that is shown without a key.
    public: bool = False

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.resume and self.run_id is None:
            raise ValueError("resume is true, and run_id is missing: say which run to go on with, or use auto_resume")
        return self

    def open(self) -> Follower:
        """Ready to start."""
        place = {"entity": self.entity, "project": self.project}
        return Follower(Beside(self, place=place, run_id=self.run_id), auto_resume=self.auto_resume)

    def service(self) -> "Wandb":
        """What is told of the run, in the process beside it."""
        return Wandb(self)

    def synced(self) -> "WandbLogger":
        """The same, as `eclosion sync` uses it."""
        return replace(self, mode="online", auto_resume=True)


class Wandb:
    """wandb as a service that is told of runs."""

    def __init__(self, options: WandbLogger) -> None:
        self.options = options
        self._run: Any = None

    def open(self, run: RunDir, standing: Standing, facts: Facts) -> Opened:
        """Begin the run with this id, or go on with it."""
        mode = self.options.mode or os.environ.get("WANDB_MODE", "online")
        # before there is a new segment
        last = last_step(run.tracking, standing.run_id) if mode == "offline" and standing.mode in ("", mode) else None
        run.tracking.mkdir(parents=True, exist_ok=True)
        with _nothing_left(run, standing.run_id):
            self._run = self._init(run, standing, facts, mode)
            _remove_logs(run)
            if mode == "online" and not self.options.public:
                check_private(self._run.settings.base_url, self._run.entity, self._run.project)
        self._run.define_metric(AXIS, hidden=True)
        self._run.define_metric("*", step_metric=AXIS)
        self._run.config.update(dict(facts.config), allow_val_change=True)
        self.describe(facts)
        if mode == "online":
            return Opened(self._run.url, self._run.starting_step - 1, mode)
        return Opened(None, last, mode)

    def _init(self, run: RunDir, standing: Standing, facts: Facts, mode: str) -> Any:
        return wandb.init(
            entity=self.options.entity,
            project=self.options.project,
            name=self.options.run_name or facts.name,
            id=standing.run_id,
            resume="must" if self.options.resume else "allow",
            settings=wandb.Settings(
                mode=mode,
                root_dir=str(run.tracking),
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_SECONDS)),
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=1.0,  # so much of an offline run may be lost to a kill
                console="off",
                silent=True,
                # The command line, the user and the repository may say what is not for everybody.
                x_disable_meta=True,
                x_save_requirements=False,
                disable_git=True,
                save_code=False,
            ),
        )

    def describe(self, facts: Facts) -> None:
        """Keep facts in the config and in the summary."""
        self._run.config.update({"environment": facts.environment}, allow_val_change=True)
        if facts.ledger:
            self._run.summary.update({"ledger": facts.ledger})

    def send(self, row: Row, service_step: int) -> None:
        """Log a row; wandb takes it at once and uploads it by itself."""
        seen = {} if row.samples_seen is None else {"samples_seen": row.samples_seen}
        pictures = {picture.name: wandb.Image(str(picture.path), caption=picture.caption) for picture in row.pictures}
        self._run.log({AXIS: row.step, **seen, **row.numbers, **pictures}, step=service_step, commit=True)

    def close(self, *, done: bool) -> None:
        """Wait for the upload."""
        run, self._run = self._run, None
        run.finish(exit_code=0 if done else 1)
        wandb.teardown()  # its process writes the end of an offline run when it ends


def _remove_logs(run: RunDir) -> None:
    """Remove wandb's logs, which show the signed addresses of uploads that fail; what it has open goes when it ends."""
    for pattern in ("wandb/*.log", "wandb/*/logs/*.log"):
        for path in run.tracking.glob(pattern):
            path.unlink(missing_ok=True)


@contextmanager
def _nothing_left(run: RunDir, run_id: str) -> Iterator[None]:
    """Remove what wandb writes for a run that it then fails to begin: there may be many attempts."""
    before = set(run.tracking.glob(f"wandb/*-{run_id}"))
    try:
        yield
    except BaseException:
        for folder in set(run.tracking.glob(f"wandb/*-{run_id}")) - before:
            shutil.rmtree(folder, ignore_errors=True)
        raise
