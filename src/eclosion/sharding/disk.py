"""Files that appear whole, last, and for good, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from eclosion.checkpoint.disk import fsync_folder, reason
from eclosion.errors import EnvironmentProblem

__all__ = ["aside", "make_durable", "publish", "replace", "writing"]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failing disk into one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written: {reason(error)}; {_free(path)} free there. Finished files are whole: make "
            "room or mend the disk, and start again."
        ) from error


@contextmanager
def aside(folder: Path, final: Path) -> Iterator[BinaryIO]:
    """A file in `folder` to write to, which `publish` puts in the place of `final`; else nothing is left of it."""
    path = _name(folder, final)
    with writing(final):
        file = path.open("wb")
    try:
        yield file
    finally:
        with suppress(OSError):  # what cannot be written was reported when it failed first
            file.close()
        path.unlink(missing_ok=True)


def make_durable(file: BinaryIO) -> None:
    """Close a file once all of it is on disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def publish(folder: Path, final: Path) -> None:
    """Give a durable file that was written aside its place."""
    with writing(final):
        _name(folder, final).replace(final)
        fsync_folder(final.parent)


def replace(path: Path, text: str, folder: Path) -> None:
    """Write a whole text file, by way of `folder`."""
    with writing(path), aside(folder, path) as file:
        file.write(text.encode())
        make_durable(file)
        publish(folder, path)


def _name(folder: Path, final: Path) -> Path:
    return folder / f"{final.name}.new"


def _free(path: Path) -> str:
    try:
        info = os.statvfs(path.parent)
    except OSError:
        return "an unknown number of bytes is"
    return f"{info.f_bavail * info.f_frsize / 1e6:.1f} MB are"
