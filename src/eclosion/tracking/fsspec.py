"""Checkpoints in object stores, such as s3:// and gs://, through fsspec."""

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from eclosion.data.fsspec_files import store_of
from eclosion.data.places import Patience, Persistence, Transient
from eclosion.errors import ConfigError, EnvironmentProblem, UserError
from eclosion.redaction import quoted, scheme_of, shown
from eclosion.registry import part
from eclosion.rundir import RunDir, is_config
from eclosion.tracking.places import SaverOptions
from eclosion.tracking.pointers import FOLDER, POINTER, pointer_to

__all__ = ["FsspecSaver"]

T = TypeVar("T")

MANIFEST, CONFIG = "manifest.json", "config.json"
# They have no folders, and would make a bucket that is not there.
OBJECT_STORES = frozenset({"abfs", "adl", "az", "gcs", "gs", "hf", "memory", "oci", "oss", "r2", "s3"})
# For how long a store is tried again that fails.
PATIENCE = Patience(deadline_seconds=60.0)


def _store_url(url: str) -> str:
    if scheme_of(url) in ("", "http", "https", "pipe"):
        raise ValueError("must be the URL of a store that can be written to, such as s3://bucket/folder")
    return url.rstrip("/")


@part
class FsspecSaver(SaverOptions):
    """Copies in a store that fsspec knows: s3://, gs://, abfs:// and others.

    Each checkpoint is a folder of its own below its path, with `current.json` beside it, which names the newest; the
    one before is removed when that is written. The loader `url` takes the path. Keys, endpoints and regions come from
    the environment or the store's own files.
    """

    # Where the paths begin: a bucket, or a folder in it.
    url: Annotated[str, AfterValidator(_store_url)]

    def open(self, run: RunDir) -> "StoreCopies":
        """Ready to save.

        Raises:
            ConfigError: if fsspec does not know the protocol.
            MissingExtraError: if a library for it is missing.
        """
        store_of(self.url)
        return StoreCopies(self)


class StoreCopies:
    """Makes the copies."""

    def __init__(self, options: FsspecSaver) -> None:
        self._options = options

    def save(self, checkpoint: Path, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> None:
        """Upload a checkpoint to the paths that it gets."""
        targets = self._options.targets(latest=latest, best=best, values=values)
        with _as_wanted(checkpoint, self._options.kind) as folder:
            for path in targets:
                self._upload(folder, f"{self._options.url}/{path}")

    def save_meta(self, files: Sequence[Path]) -> None:
        """Upload files about the run.

        Raises:
            ConfigError: if a config stands there that no run wrote.
        """
        if self._options.meta is None:
            return
        folder = f"{self._options.url}/{self._options.meta}"
        found = self._do(f"{folder}/{CONFIG}", lambda store, path: store.cat_file(path) if store.exists(path) else None)
        if found is not None and not is_config(found):
            raise ConfigError(f"{shown(folder)}: holds a {CONFIG} that no run wrote. Give meta another folder.")
        for file in files:
            self._put(file, f"{folder}/{file.name}")

    def _upload(self, folder: Path, url: str) -> None:
        from eclosion.checkpoint import storage  # not at the top: a config is checked without torch

        step = storage.read_manifest(folder).step
        name = f"step-{step:08d}-{uuid.uuid4().hex[:8]}"
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
            self._put(file, f"{url}/{name}/{file.name}")
        self._do(f"{url}/{POINTER}", lambda store, path: store.pipe_file(path, pointer_to(name, step)))
        self._remove_others(url, name)

    def _put(self, file: Path, url: str) -> None:
        """Upload a file, and see that it is as long there as here."""

        def put(store: Any, path: str) -> None:
            protocols = (store.protocol,) if isinstance(store.protocol, str) else store.protocol
            if OBJECT_STORES.isdisjoint(protocols):
                store.makedirs(store._parent(path), exist_ok=True)
            store.put_file(str(file), path)
            store.invalidate_cache()
            size, there = file.stat().st_size, store.info(path).get("size")
            if there != size:
                raise Transient(f"has {there} bytes after the upload of {size}")

        self._do(url, put)

    def _remove_others(self, url: str, name: str) -> None:
        """Remove the checkpoints of this place that are not the current one any more, and nothing else."""

        def remove(store: Any, path: str) -> None:
            store.invalidate_cache()
            for found in store.ls(path, detail=False):
                last = str(found).rstrip("/").rpartition("/")[2]
                if last != name and FOLDER.fullmatch(last):
                    store.rm(f"{path}/{last}", recursive=True)

        self._do(url, remove)

    def _do(self, url: str, action: Callable[[Any, str], T]) -> T:
        """What an action on a store returns; it is tried again for a while.

        Raises:
            EnvironmentProblem: if it keeps failing.
        """
        store, path = store_of(url)
        persistence = Persistence(shown(url), PATIENCE, threading.Event())
        while True:
            try:
                return action(store, path)
            except UserError:
                raise
            except (PermissionError, FileNotFoundError) as error:  # such as a bucket that does not exist
                said = quoted(str(error)) or type(error).__name__
                raise EnvironmentProblem(f"{shown(url)}: cannot be written ({said}). Mend that.") from error
            except Transient as failure:
                persistence.wait(failure)
            except Exception as error:  # noqa: BLE001 - every store has a library, and every library errors of its own
                persistence.wait(Transient(f"the store failed ({type(error).__name__}: {quoted(str(error))})"))


@contextmanager
def _as_wanted(checkpoint: Path, kind: str) -> Iterator[Path]:
    """The folder to upload: the checkpoint, or a model made of it."""
    if kind == "checkpoint":
        yield checkpoint
        return
    from eclosion.checkpoint.copying import write_model  # not at the top: a config is checked without torch

    with TemporaryDirectory(dir=checkpoint.parent, prefix="model-") as folder:
        model = Path(folder) / "model"
        write_model(checkpoint, model)
        yield model
