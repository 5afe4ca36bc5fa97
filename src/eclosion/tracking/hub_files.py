"""Which files go to the Hugging Face hub and come from it: those on a short list, and nothing that lies beside them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eclosion.errors import ConfigError

__all__ = ["INDEX", "MANIFEST", "Entry", "checkpoint_files", "chosen", "is_pipeline", "may_be_sent", "pipeline_files"]


@dataclass(frozen=True)
class Entry:
    """A file in a commit: its path, its size in bytes, and its sha256 (large files) or else its git blob id."""

    path: str
    size: int
    sha256: str | None
    blob: str


# The files that make a folder a pipeline, and a checkpoint.
INDEX, MANIFEST = "model_index.json", "manifest.json"
# What a part of a pipeline may consist of: settings, and weights without pickle.
_OF_A_PART = re.compile(
    r"(config|scheduler_config|preprocessor_config|tokenizer_config|tokenizer|special_tokens_map|vocab)\.json|merges\.txt"
    r"|[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors(\.index\.json)?"
)
# What is taken from a repository, of a folder in it; more only if its file is named.
_TAKEN = re.compile(r".*\.(safetensors|json)|(.*/)?merges\.txt")
_NAMED = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def may_be_sent(path: str) -> bool:
    """Whether a file of that name is of a kind that we put into repositories."""
    name = path.rpartition("/")[2]
    return name in (INDEX, MANIFEST, "state.json") or _OF_A_PART.fullmatch(name) is not None


def checkpoint_files(folder: Path, listed: Iterable[str], under: str = "") -> dict[str, Path]:
    """The files that the manifest of a checkpoint lists, and the manifest, by their paths below `under`."""
    return {f"{under}/{name}" if under else name: folder / name for name in (*listed, MANIFEST)}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a diffusers pipeline."""
    return (folder / INDEX).is_file()


def pipeline_files(folder: Path) -> dict[str, Path]:
    """The files that a diffusers pipeline consists of, by their paths in it.

    Only the parts that its index names are looked at; what else stands in the folder stays there.

    Raises:
        ConfigError: if it is no pipeline, or a part of it has no files that may be sent.
    """
    found = {INDEX: folder / INDEX}
    for name in _parts(folder / INDEX):
        here = {
            f"{name}/{path.name}": path
            for path in sorted((folder / name).glob("*"))
            if _OF_A_PART.fullmatch(path.name) and path.is_file() and not path.is_symlink()
        }
        if not here or (folder / name).is_symlink():
            raise ConfigError(f"{folder / name}: holds none of the files that a part of a pipeline consists of.")
        found |= here
    return found


def _parts(index: Path) -> list[str]:
    """The sub-folders that the index of a pipeline names: `"unet": ["diffusers", "UNet2DModel"]`."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        parts = {name: value for name, value in listed.items() if isinstance(value, list) and value != [None, None]}
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{index.parent}: is no diffusers pipeline, which has a file {INDEX}.") from None
    if not all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in parts):
        raise ConfigError(f"{index}: names a part that is no name of a folder.")
    return list(parts)


def chosen(entries: Sequence[Entry], path: str | None, repo: str) -> list[Entry]:
    """The files of a repository that `path` stands for: a file, the files in a folder, or all; only what may be taken.

    Raises:
        ConfigError: if there are none; it names what there is.
    """
    if path is not None and (one := [entry for entry in entries if entry.path == path]):
        if not path.endswith(_NAMED):
            raise ConfigError(f"{repo}: {path} is no file of weights. Files of weights end in {', '.join(_NAMED)}.")
        return one
    prefix = f"{path.rstrip('/')}/" if path else ""
    below = [entry for entry in entries if entry.path.startswith(prefix)]
    names = {entry.path[len(prefix) :] for entry in below}
    if not names & {MANIFEST, INDEX} and not any(name.endswith(".safetensors") for name in names if "/" not in name):
        raise ConfigError(f"{repo}: {path or 'it'} holds no checkpoint, model or pipeline.{_offered(entries)}")
    return [entry for entry in below if _TAKEN.fullmatch(entry.path)]


def _offered(entries: Sequence[Entry]) -> str:
    """The paths in a repository that could have been meant."""
    folders = [entry.path.rpartition("/")[0] for entry in entries if entry.path.endswith((f"/{MANIFEST}", f"/{INDEX}"))]
    files = [entry.path for entry in entries if entry.path.endswith(_NAMED)]
    found = sorted(set(folders)) or sorted(files)
    return f" Give path, such as {', '.join(found[:5])}." if found else ""
