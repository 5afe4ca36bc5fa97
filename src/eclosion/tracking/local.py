"""Checkpoints on this machine: saved to paths outside the run folder, and started from."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from eclosion.errors import ConfigError, DataError, EnvironmentProblem
from eclosion.redaction import shown
from eclosion.registry import part
from eclosion.rundir import RunDir
from eclosion.tracking.loading import tell_fetched
from eclosion.tracking.places import SaverOptions

__all__ = ["LocalLoader", "LocalSaver"]


@part
class LocalSaver(SaverOptions):
    """Copies on this machine, or on a disk that is mounted here.

    Each is written beside its place, compared byte by byte with its manifest, and then renamed, so that there is a
    whole checkpoint at every moment. Only checkpoints are replaced; anything else that stands in the place is left, and
    told.
    """

    # Folder that the paths are relative to, and never leave; none is the current directory.
    root: Annotated[str, Field(min_length=1)] | None = None

    def open(self, run: RunDir) -> "LocalCopies":
        """Ready to save.

        Raises:
            ConfigError: if the paths lead into the checkpoints of the run itself.
        """
        root = Path(self.root or ".").expanduser().resolve()
        return LocalCopies(self, root, run)


class LocalCopies:
    """Makes the copies."""

    def __init__(self, options: LocalSaver, root: Path, run: RunDir) -> None:
        self._options, self._root, self._run = options, root, run
        for path in (options.latest, options.best):
            if path is not None and "{" not in path:
                self._inside(path)
        if options.meta is not None:
            self._about(options.meta)

    def save(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Copy a checkpoint to the paths that it gets."""
        # not at the top: a config is checked without torch
        from eclosion.checkpoint.copying import copy_checkpoint, write_model

        write: Callable[[Path, Path], None] = copy_checkpoint if self._options.kind == "checkpoint" else write_model
        for path in self._options.targets(latest=latest, best=best, values=values):
            write(checkpoint, self._inside(path))

    def save_meta(self, files: Sequence[Path]) -> None:
        """Copy files about the run."""
        if self._options.meta is None:
            return
        folder = self._about(self._options.meta)
        taken = [file.name for file in files if (folder / file.name).exists()]
        if taken and not RunDir(folder).holds_run():
            raise ConfigError(f"track.save: {folder} holds a {taken[0]} that no run wrote. Give meta another folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                aside = folder / f".{file.name}.partial"
                shutil.copyfile(file, aside)
                aside.replace(folder / file.name)
        except OSError as error:
            raise EnvironmentProblem(f"{folder}: cannot be written ({error.strerror}). Mend that.") from error

    def _about(self, path: str) -> Path:
        """Where files about the run go: into that folder, also if it is a link."""
        self._inside(path)
        folder = self._inside(str((self._root / path).resolve()))
        if RunDir(folder).checkpoints.exists():
            raise ConfigError(f"track.save: {folder} is the folder of a run. Give meta another folder.")
        if RunDir(folder).config.exists() and not RunDir(folder).holds_run():
            raise ConfigError(f"track.save: {folder} holds a config.json that no run wrote. Give meta another folder.")
        return folder

    def _inside(self, path: str) -> Path:
        """Where a path leads; refused if that is outside the root, or among the run's own files.

        A link in the place itself is replaced, and not followed.
        """
        target = self._root / path
        real = target.parent.resolve() / target.name
        if not real.is_relative_to(self._root):
            raise ConfigError(f"track.save: {path} leads to {real}, outside {self._root}. Give a path inside it.")
        own = self._run.root.resolve()
        inside = real.relative_to(own).parts[:1] if real.is_relative_to(own) else ()
        if own.is_relative_to(real) or not self._run.own_names().isdisjoint(inside):
            raise ConfigError(f"track.save: {path} leads to {real}, where the run keeps its own. Choose another path.")
        return real


@part
class LocalLoader:
    """A checkpoint, a model, a run, a pipeline of diffusers, or a file of weights on this machine."""

    # The file or folder; relative to the current directory.
    path: Annotated[str, Field(min_length=1)]
    # Whether it is only taken where a run was before, whose own checkpoints are gone.
    only_when_resuming: bool = False

    def find(self) -> Path:
        """The path, if something stands there.

        Raises:
            DataError: if not.
        """
        path = Path(self.path).expanduser()
        if not path.exists():
            here = "" if path.is_absolute() else f" (current directory: {Path.cwd()})"
            raise DataError(
                f"start.path: {shown(str(path))} does not exist{here}. Give the path of a checkpoint, or start=null."
            )
        return path.resolve()

    def fetch(self, into: Path) -> Path:
        """The same, noted."""
        path = self.find()
        tell_fetched(into, loader="local", path=str(path))
        return path
