"""What a user's word stands for: a run, a pipeline, a folder, statistics, data, or images as they are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclosion.config.explain import checked
from eclosion.config.load import load
from eclosion.config.overrides import apply_overrides
from eclosion.config.schema import DataConfig, RunConfig
from eclosion.data.folder import FolderSource
from eclosion.errors import ConfigError, DataError, did_you_mean
from eclosion.evaluation.pipelines import is_pipeline
from eclosion.registry import names, resolve
from eclosion.rundir import RunDir

__all__ = ["Folder", "Pipeline", "Run", "Statistics", "kind_of", "known"]

CONFIGS = (".yaml", ".yml", ".json", ".toml")
STATISTICS = ".safetensors"
KINDS = (
    "a run folder, one of its checkpoints, a diffusers pipeline folder, a folder of images, a config file, or the name "
    "of a source"
)


@dataclass(frozen=True)
class Run:
    """A run folder, or one of its checkpoints."""

    path: Path


@dataclass(frozen=True)
class Pipeline:
    """The folder of a diffusers pipeline."""

    path: Path


@dataclass(frozen=True)
class Folder:
    """A folder of images."""

    path: Path


@dataclass(frozen=True)
class Statistics:
    """A file that `eclosion stats` wrote."""

    path: Path


def kind_of(found: Any) -> str:
    """What to call what `known` found, for messages."""
    words = {Run: "a run", Pipeline: "a pipeline", Folder: "a folder of images", Statistics: "a file of statistics"}
    return words.get(type(found), "data" if isinstance(found, RunConfig) else "images as they are")


def known(value: Any, option: str) -> Any:
    """What a user's word stands for: one of the kinds above, a `RunConfig`, or images as they are.

    Args:
        value: text, a path, a config, a source, or images.
        option: for messages.

    Raises:
        ConfigError: if it is none of them.
        DataError: if there is nothing of that name.
    """
    if isinstance(value, RunConfig):
        return value
    if isinstance(value, FolderSource):
        return Folder(value.root.expanduser())
    if dataclasses.is_dataclass(value) and hasattr(value, "open"):
        return RunConfig(output=type(value).__name__, data=DataConfig(source=value))
    if hasattr(value, "read") and isinstance(getattr(value, "facts", None), Mapping):
        return value
    if not isinstance(value, str | Path):
        raise ConfigError(f"{option} is a {type(value).__name__}, and must be {KINDS}.")
    text, path = str(value), Path(value).expanduser()
    name, *options = text.split(",")
    if isinstance(value, str) and name in names("sources"):  # "butterflies,size=100"
        source = checked(resolve("sources", name), apply_overrides({}, options))
        return RunConfig(output=text, data=DataConfig(source=source))
    if path.is_file():
        if path.suffix == STATISTICS:
            return Statistics(path)
        if path.suffix.lower() in CONFIGS:
            return load(path).run
        raise ConfigError(f"{option}: {path} is a file of no kind that is known. Give {KINDS}.")
    if not path.is_dir():
        hint = did_you_mean(text, names("sources"), limit=0) if "/" not in text else ""
        raise DataError(f"{option}: there is no {path} (working folder: {Path.cwd()}).{hint} Give {KINDS}.")
    run = RunDir(path)
    is_run = run.config.is_file() and (run.checkpoints.is_dir() or run.events.is_file())
    if is_run or (path / "manifest.json").is_file():  # the latter is one checkpoint
        return Run(path)
    return Pipeline(path) if is_pipeline(path) else Folder(path)
