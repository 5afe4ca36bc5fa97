"""Checkpoints outside their run: whole copies under any name, and models, which hold only what makes pictures.

A copy is made beside its place and moved there when every byte of it has been compared with its manifest. What stands
in that place already gives way only if it is a checkpoint.
"""

import ctypes
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from eclosion.checkpoint import disk, storage
from eclosion.checkpoint.storage import MANIFEST, DamagedError, Loaded
from eclosion.errors import CheckpointError, printable

__all__ = ["MODEL", "averages", "copy_checkpoint", "is_model", "recover", "refuse_others", "write_model"]

# How long a copy waits for another into the same folder.
WAIT_SECONDS = 60.0
# What a model says of itself under "kind".
MODEL = "model"


def is_model(meta: Mapping[str, Any]) -> bool:
    """Whether the manifest is that of a model: weights without what training goes on with."""
    return meta.get("kind") == MODEL


def copy_checkpoint(checkpoint: Path, final: Path) -> None:
    """A whole copy of a checkpoint, or of a model, under another name.

    Args:
        checkpoint: a whole one.
        final: the folder to make or to replace; its name may be any.

    Raises:
        CheckpointError: if `final` is something else than a checkpoint, the disk fails or is full, or the checkpoint
            is damaged; what stood there before is intact.
    """
    manifest = storage.glance(checkpoint)
    needed = sum(entry.size for entry in manifest.files.values())
    with _in_place_of(final, needed) as aside:
        aside.mkdir()
        for name in [*manifest.files, MANIFEST]:
            shutil.copyfile(checkpoint / name, aside / name)
            _fsync(aside / name)
        storage.verify(aside)
        disk.fsync_folder(aside)


def write_model(checkpoint: Path, final: Path) -> None:
    """The averaged weights of a checkpoint as a model, which can be sampled, exported and started from.

    Args:
        checkpoint: a whole one.
        final: the folder to make or to replace; its name may be any.

    Raises:
        CheckpointError: as `copy_checkpoint`.
    """
    loaded = storage.read(checkpoint, verified=True)
    files, numbers = averages(loaded), loaded.state
    state: dict[str, Any] = {key: numbers[key] for key in ("step", "samples_seen", "untrained") if key in numbers}
    needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    with _in_place_of(final, needed) as aside:
        made = aside.with_name(f"{aside.name}-model") / f"step-{loaded.manifest.step:08d}"
        try:
            storage.write(made, files, state, {**loaded.manifest.meta, "kind": MODEL})
            made.rename(aside)
        finally:
            shutil.rmtree(made.parent, ignore_errors=True)


def averages(loaded: Loaded) -> dict[str, dict[str, Tensor]]:
    """The weights that make pictures, by network: its first average, or itself if it has none."""
    if is_model(loaded.manifest.meta):
        return dict(loaded.files)
    names = [name for name in loaded.files if f"{name}.optimizer" in loaded.files]
    return {name: loaded.files.get(f"{name}.ema", loaded.files[name]) for name in names}


def refuse_others(final: Path) -> None:
    """Raise CheckpointError if something else than a checkpoint stands at a path: it is not ours to replace."""
    if not os.path.lexists(final):
        return
    cure = "It is not replaced. Move it away, or save to another path."
    try:
        if final.is_symlink():
            raise DamagedError("a link")
        known = {*storage.read_manifest(final).files, MANIFEST}
    except CheckpointError:
        raise CheckpointError(f"{final}: is something else than a checkpoint of ours. {cure}") from None
    more = sorted(path.name for path in final.iterdir() if path.name not in known)
    if more:
        raise CheckpointError(f"{final}: holds {printable(more[0])}, which is no part of a checkpoint. {cure}")


def recover(final: Path) -> None:
    """Put back a checkpoint that a killed copy had set aside, and remove what else one left beside its place."""
    if not final.parent.is_dir():
        return
    for path in final.parent.iterdir():
        stem, _, tail = path.name.removesuffix("-model").rpartition("-")
        if len(tail) != 32 or not path.is_dir() or path.is_symlink():
            continue
        if stem == f"{disk.REPLACED}{final.name}" and not final.exists():
            path.rename(final)
        elif stem in (f"{disk.REPLACED}{final.name}", f"{disk.PARTIAL}{final.name}"):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _in_place_of(final: Path, needed: int) -> Iterator[Path]:
    """A path beside `final`, for a folder that takes its place when the block has made it whole."""
    with disk.saving(final, needed):
        disk.make_folder(final.parent)
        with _alone(final.parent, final):
            recover(final)
            refuse_others(final)
            disk.check_space(final.parent, needed)
            aside = final.parent / f"{disk.PARTIAL}{final.name}-{uuid.uuid4().hex}"
            try:
                yield aside
                _move(aside, final)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise


def _move(aside: Path, final: Path) -> None:
    if final.is_dir() and not final.is_symlink() and _exchange(aside, final):
        disk.fsync_folder(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
        return
    old = final.parent / f"{disk.REPLACED}{final.name}-{uuid.uuid4().hex}"
    if final.exists():
        final.rename(old)  # a kill between the two renames leaves it so, and `recover` puts it back
    try:
        aside.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    disk.fsync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's place at once; False where the system cannot.

    Source: renameat2(2), RENAME_EXCHANGE = 2, AT_FDCWD = -100.
    """
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(swap(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0)


@contextmanager
def _alone(folder: Path, final: Path) -> Iterator[None]:
    """While no other process copies into a folder; where it cannot be locked, without that."""
    with disk.opened(folder, os.O_RDONLY) as fd:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"{final}: another process has been saving to {folder} for {WAIT_SECONDS:.0f} s. Give each run "
                        "a folder of its own."
                    ) from None
                time.sleep(0.05)
                continue
            except OSError:
                pass
            break
        yield


def _fsync(path: Path) -> None:
    with disk.opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)
