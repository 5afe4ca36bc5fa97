"""Checkpoints among the files of a run at Weights & Biases: saved there, and started from."""

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from eclosion.config.templates import check_path
from eclosion.config.wandb import RunPath
from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.registry import part
from eclosion.rundir import RunDir
from eclosion.tracking.loading import tell_fetched
from eclosion.tracking.places import SaverOptions
from eclosion.tracking.pointers import POINTER, pointer_to
from eclosion.tracking.wandb_process import ask, check_installed

__all__ = ["WandbLoader", "WandbSaver"]

MANIFEST = "manifest.json"
# How long a saver waits for the logger to begin the run at wandb.
LOGGER_SECONDS = 60.0
# How long an upload may take: this, and what its bytes take at this many a second.
PATIENCE_SECONDS, SLOWEST = 300.0, 200_000


@part
class WandbSaver(SaverOptions):
    """Files of a run at Weights & Biases; the key is in WANDB_API_KEY or ~/.netrc.

    Each checkpoint is a folder of its own below its path, with `current.json` beside it, which names the newest; the
    one before is removed when that is uploaded. The loader `wandb` takes the path. While the run at wandb is offline,
    the newest files of each path stand in `tracking/wandb-files` of the run folder, for `wandb sync`.
    """

    # The run, as "entity/project/run_id"; none takes the one that the logger `wandb` of this run writes to.
    run_path: RunPath | None = None
    # Whether everybody may see the project; else nothing is sent to one that is shown without a key.
    public: bool = False

    def open(self, run: RunDir) -> "WandbFiles":
        """Ready to save.

        Raises:
            MissingExtraError: if wandb is not installed.
        """
        check_installed()
        return WandbFiles(self, run)


@dataclass(frozen=True)
class _Target:
    """A run at wandb.

    Attributes:
        entity: who owns it; None is the default of the key.
        project, run_id: which it is.
        offline: whether wandb is not asked now.
        begun: whether it is known to be there.
    """

    entity: str | None
    project: str
    run_id: str
    offline: bool
    begun: bool = True

    @property
    def path(self) -> str:
        """As wandb writes it."""
        return "/".join(word for word in (self.entity, self.project, self.run_id) if word)


class WandbFiles:
    """Uploads, or keeps for `wandb sync`."""

    def __init__(self, options: WandbSaver, run: RunDir) -> None:
        self._options, self._run = options, run

    def save(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Upload a checkpoint to the paths that it gets."""
        # not at the top: a config is checked without torch
        from eclosion.checkpoint import storage
        from eclosion.checkpoint.copying import write_model
        from eclosion.checkpoint.disk import link_files

        step = storage.read_manifest(checkpoint).step
        name = f"step-{step:08d}-{uuid.uuid4().hex[:8]}"
        target = self._target()
        for path in self._options.targets(latest=latest, best=best, values=values):
            with TemporaryDirectory(dir=checkpoint.parent, prefix="wandb-") as aside:
                place = Path(aside) / path
                place.mkdir(parents=True)
                if self._options.kind == "checkpoint":
                    link_files(checkpoint, place / name)
                else:
                    write_model(checkpoint, place / name)
                (place / POINTER).write_bytes(pointer_to(name, step))
                files = sorted((place / name).iterdir(), key=lambda file: (file.name == MANIFEST, file.name))
                self._put(target, Path(aside), [*files, place / POINTER], path, current=name)

    def save_meta(self, files: Sequence[Path]) -> None:
        """Upload files about the run."""
        meta = self._options.meta
        if meta is None or not files:
            return
        self._run.outbox.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._run.outbox, prefix="wandb-") as aside:
            place = Path(aside) / meta
            place.mkdir(parents=True)
            copies = [Path(shutil.copyfile(file, place / file.name)) for file in files]
            self._put(self._target(), Path(aside), copies, meta)

    def _target(self) -> _Target:
        """Where files go: the run that is named, or the one that this run logs to."""
        if self._options.run_path is not None:
            *entity, project, run_id = self._options.run_path.split("/")
            return _Target(entity[0] if entity else None, project, run_id, _is_offline(self._run))
        until = time.monotonic() + LOGGER_SECONDS
        found = _standing(self._run)
        while not (found and (found.begun or found.offline)) and _logger(self._run) and time.monotonic() < until:
            time.sleep(0.1)
            found = _standing(self._run)
        if found and not (found.begun or found.offline):
            raise EnvironmentProblem(
                f"the run {found.path} at wandb has not begun, so that nothing can be saved to it."
            )
        if found is None:
            raise ConfigError(
                "track.save wandb: there is no run at wandb to save to. Add wandb to track.log, or give run_path as "
                "entity/project/run_id."
            )
        return found

    def _put(
        self, target: _Target, root: Path, files: Sequence[Path], path: str, *, current: str | None = None
    ) -> None:
        names = [str(file.resolve()) for file in files]
        seconds = PATIENCE_SECONDS + sum(file.stat().st_size for file in files) / SLOWEST
        if not target.offline:
            ask(
                "put",
                seconds=seconds,
                run_path=target.path,
                root=str(root.resolve()),
                files=names,
                path=path,
                current=current,
                public=self._options.public,
            )
            return
        all_of_path = self._run.tracking.resolve() / "wandb-files" / blake2b(path.encode(), digest_size=8).hexdigest()
        own = all_of_path / uuid.uuid4().hex[:8]  # wandb tells segments apart by the second alone
        own.mkdir(parents=True)
        where = {"entity": target.entity, "project": target.project, "run_id": target.run_id}
        ask("keep", seconds=seconds, **where, to=str(own), root=str(root.resolve()), files=names)
        for before in all_of_path.iterdir():
            if before != own:
                shutil.rmtree(before, ignore_errors=True)


@part
class WandbLoader:
    """A file of a run at Weights & Biases, or a checkpoint that the saver `wandb` put there."""

    # The path among the run's files.
    path: Annotated[str, AfterValidator(check_path)]
    # The run, as "entity/project/run_id"; none takes the one that this run has written to before.
    run_path: RunPath | None = None
    # The most that is fetched, in 10^9 bytes.
    max_gb: Annotated[float, Field(gt=0)] = 20.0
    # Whether it is only fetched where a run was before, whose own checkpoints are gone.
    only_when_resuming: bool = False

    def fetch(self, into: Path) -> Path:
        """Fetch it.

        Raises:
            ConfigError: if no run is known.
            DataError: if there is no such run or file, it is too large, or it is not what its manifest says.
            EnvironmentProblem: if wandb does not answer.
        """
        standing = None if self.run_path else _standing(RunDir(into.parent))
        run_path = self.run_path or (standing and standing.path)
        if not run_path:
            raise ConfigError("start.run_path: this run has not written to wandb yet. Give entity/project/run_id.")
        root = into.resolve() / "wandb"
        place: str = ask("fetch", run_path=run_path, path=self.path, to=str(root), most=int(self.max_gb * 1e9))
        found = root / place
        facts: dict[str, int] = {"size": found.stat().st_size}
        if found.is_dir():
            from eclosion.checkpoint import storage  # not at the top: a config is checked without torch

            facts = {"step": storage.verify(found).step}
        tell_fetched(into, loader="wandb", url=f"wandb:{run_path}/{found.relative_to(root)}", **facts)
        return found


def _logger(run: RunDir) -> Mapping[str, Any] | None:
    """The options of the logger `wandb` of a run; None if it has none."""
    try:
        log = json.loads(run.config.read_text(encoding="utf-8"))["track"]["log"]
    except (OSError, ValueError, KeyError):
        return None
    return next((logger for logger in log if isinstance(logger, dict) and logger.get("name") == "wandb"), None)


def _is_offline(run: RunDir) -> bool:
    """Whether wandb is not asked: as the logger says, or else the environment."""
    mode = (_logger(run) or {}).get("mode") or os.environ.get("WANDB_MODE", "online")
    return bool(mode == "offline")


def _standing(run: RunDir) -> _Target | None:
    """The run at wandb that a run writes to, as its logger has noted it; None if it has not."""
    try:
        told = json.loads(run.follower("wandb").read_text(encoding="utf-8"))
        place = told["place"]
        begun = bool(told.get("mode"))
        return _Target(place.get("entity"), place["project"], told["run_id"], _is_offline(run), begun)
    except (OSError, ValueError, KeyError):
        return None
