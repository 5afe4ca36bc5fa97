"""Where files live, and what is there.

plain paths, file://       this machine
http://, https://          the standard library
pipe:command               what a command writes, only inside `pipes_allowed`
any other protocol         fsspec, with the extra `remote`: s3://, gs://, hf:// ...
"""

import stat as file_kinds
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from eclosion.data import fsspec_files, http_files
from eclosion.data.pipes import CommandStream, check_pipe, pipes_allowed
from eclosion.data.places import (
    Checksum,
    IsFolder,
    NotFound,
    Patience,
    Persistence,
    Place,
    Stream,
    Transient,
    local_path,
    one_line,
    scheme_of,
    shown,
    within,
)
from eclosion.errors import ConfigError, DataError

__all__ = [
    "IsFolder",
    "NotFound",
    "Patience",
    "Place",
    "listing",
    "local_path",
    "one_line",
    "open_stream",
    "pipes_allowed",
    "shown",
    "stat",
    "stat_all",
]

T = TypeVar("T")

CHUNK = 1 << 20  # bytes
# Questions about files that are asked at the same time.
NUM_ASKING = 16
# To learn that a server is away must not take as long as to sit out its restart in the middle of a training.
ASKING = Patience(deadline_seconds=60.0)


def stat(url: str, *, patience: Patience = ASKING) -> Place:
    """Size and version of a file. A command is not run for it, so that neither is known.

    Args:
        url: of the file.
        patience: for how long a server is asked again that fails.

    Raises:
        NotFound: if it does not exist.
        DataError: if it is a folder, or may not be read.
        ConfigError: if the URL is wrong, or is a command and commands are not allowed.
        MissingExtraError: if a library for the protocol is missing.
        EnvironmentProblem: if the server keeps failing.
    """
    scheme = scheme_of(url)
    if scheme == "pipe":
        check_pipe(url)
        return Place(url, None, "")
    if (path := local_path(url)) is not None:
        return _stat_local(url, path)
    if scheme in {"http", "https"}:
        return _asked(url, partial(http_files.look_up, url, patience), patience)
    return _asked(url, partial(fsspec_files.look_up, url), patience)


def stat_all(urls: Iterable[str], *, patience: Patience = ASKING) -> list[Place | None]:
    """`stat` of many files at the same time; None for each that does not exist.

    Raises:
        As `stat`, for anything else that is wrong.
    """

    def one(url: str) -> Place | None:
        with suppress(NotFound):
            return stat(url, patience=patience)
        return None

    listed = list(urls)
    num_threads = 1 if all(scheme_of(url) in {"", "file", "pipe"} for url in listed) else NUM_ASKING
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="eclosion-stat")
    try:
        return list(pool.map(one, listed))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, the rest need not be asked


def listing(folder_url: str, *, patience: Patience = ASKING) -> list[str] | None:
    """Names of the files and folders in a folder, sorted; None where that cannot be asked (http, commands).

    Args:
        folder_url: of the folder.
        patience: for how long a server is asked again that fails.

    Raises:
        NotFound: if it does not exist.
        DataError: if it may not be listed.
        MissingExtraError, EnvironmentProblem: as `stat`.
    """
    if scheme_of(folder_url) in {"http", "https", "pipe"}:
        return None
    if (path := local_path(folder_url)) is not None:
        return sorted(_names_in(path))
    # a listing of a million names takes its time
    slow = Patience(deadline_seconds=patience.deadline_seconds, timeout_seconds=10 * patience.timeout_seconds)
    return sorted(_asked(folder_url, partial(fsspec_files.names_in, folder_url), slow))


def open_stream(place: Place, start: int, resume_with: str, patience: Patience) -> Stream:
    """The bytes of a file from some byte on, or from the first if the rest cannot be had alone.

    Args:
        place: the file.
        start: the first byte that is wanted.
        resume_with: of an earlier stream, if `start` is not 0.
        patience: how long the other side may be silent.

    Raises:
        Transient: if another try may help.
        UserError: if not.
    """
    scheme = scheme_of(place.url)
    if scheme == "pipe":
        return CommandStream(place.url)
    if (path := local_path(place.url)) is not None:
        return _LocalStream(place.url, path)
    if scheme in {"http", "https"}:
        return http_files.HttpStream(place.url, start, resume_with, patience)
    return fsspec_files.FsspecStream(place.url, start)


def _asked(url: str, question: Callable[[], T], patience: Patience) -> T:
    """The answer to a question that is asked again while it fails."""
    persistence = Persistence(shown(url), patience)
    while True:
        try:
            return within(patience.timeout_seconds, question)
        except Transient as failure:
            persistence.wait(failure)


def _stat_local(url: str, path: Path) -> Place:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{shown(url)}: does not exist{_where(path)}.") from None
    except OSError as error:
        raise DataError(f"{shown(url)}: cannot be read ({error.strerror}).") from None
    except ValueError:  # a zero byte
        raise ConfigError(f"{shown(url)}: is not a path.") from None
    if file_kinds.S_ISDIR(status.st_mode):
        raise IsFolder(f"{shown(url)}: is a folder, and a file is wanted.")
    if not file_kinds.S_ISREG(status.st_mode):
        raise DataError(f"{shown(url)}: is no regular file. A file on disk is wanted.")
    return Place(url, status.st_size, str(status.st_mtime_ns))


def _names_in(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        raise NotFound(f"{shown(str(path))}: the folder does not exist{_where(path)}.") from None
    except NotADirectoryError:
        raise DataError(f"{shown(str(path))}: is a file, and a folder is wanted.") from None
    except OSError as error:
        raise DataError(f"{shown(str(path))}: the folder cannot be listed ({error.strerror}).") from None
    except ValueError:
        raise ConfigError(f"{shown(str(path))}: is not a path.") from None


def _where(path: Path) -> str:
    return "" if path.is_absolute() else f" (working folder: {Path.cwd()})"


class _LocalStream:
    """A file of this machine; a `Stream`."""

    resume_with = ""
    checksum: Checksum | None = None

    def __init__(self, url: str, path: Path) -> None:
        place = _stat_local(url, path)
        self.start, self.total = 0, place.size
        self.versions: tuple[str, ...] = (place.version,)
        self._name = shown(url)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror}).") from None

    def read(self) -> bytes:
        """The next bytes; b"" at the end."""
        try:
            return self._file.read(CHUNK)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror}).") from None

    def finish(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def kill(self) -> None:
        """Nothing: a disk that does not answer cannot be left."""
