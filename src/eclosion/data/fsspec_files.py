"""Files of object stores and hubs, through fsspec and the library that it has for their protocol.

Passwords, endpoints and regions come from where those libraries look for them: the environment and their own files.
"""

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from eclosion.data.places import Checksum, IsFolder, NotFound, Place, Transient, quoted, scheme_of, shown
from eclosion.errors import ConfigError, DataError, EnvironmentProblem, MissingExtraError, UserError

__all__ = ["FsspecStream", "look_up", "names_in", "store_of"]

T = TypeVar("T")

BLOCK = 8 << 20  # bytes of one request
# What stores call the version of a file, the best first: hashes and counters before times.
VERSIONS = (
    ("etag", ("ETag", "etag")),
    ("generation", ("generation",)),
    ("blob", ("blob_id",)),
    ("md5", ("md5Hash", "content_md5", "md5")),
    ("modified", ("LastModified", "last_modified", "updated", "mtime", "modified", "created")),
)
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PASSING = re.compile(r"Time(d)?out|Connect|Network|Disconnect|Payload|Incomplete|Throttl|SlowDown|Retryable")
_LOGIN = re.compile(r"Credential|Auth|Token|Login|Forbidden|Denied")


def look_up(url: str) -> Place:
    """Size and version of a file, without its content.

    Raises:
        NotFound: if there is no such file.
        DataError: if it is a folder, or may not be read.
        Transient: if the store may answer the next time.
    """
    info = _info(url)
    size = info.get("size")
    return Place(url, size if isinstance(size, int) else None, next(iter(_versions(info)), ""))


def names_in(folder_url: str) -> list[str]:
    """Names of the files and folders in a folder.

    Raises:
        NotFound: if there is no such folder.
        DataError: if it may not be listed.
        Transient: if the store may answer the next time.
    """

    def ask() -> list[str]:
        store, path = store_of(folder_url)
        store.invalidate_cache()  # or a listing that fsspec made earlier in this process comes back
        return [str(name) for name in store.ls(path, detail=False)]

    names = [name.rstrip("/").rpartition("/")[2] for name in _explained(folder_url, ask)]
    return [name for name in names if name]  # some stores keep an object of the folder's own name


class FsspecStream:
    """A file from a store, from some byte on, in requests of some megabytes; a `Stream`.

    Args:
        url: of the file.
        start: the first byte that is wanted.

    Raises:
        NotFound: if there is no such file.
        DataError: if it may not be read.
        Transient: if the store may answer the next time.
    """

    def __init__(self, url: str, start: int) -> None:
        self._url, self.start = url, start
        info = _info(url)
        if not isinstance(info.get("size"), int):
            raise DataError(f"{shown(url)}: the store does not say how long the file is. Fetch it yourself.")
        self._size: int = info["size"]
        self.total: int | None = self._size
        self.versions = _versions(info)
        self.resume_with = next(iter(self.versions), "")
        self.checksum = _checksum(info)
        self._position = start

    def read(self) -> bytes:
        """The next block; b"" at the end.

        Raises:
            Transient: if the store did not give it.
        """
        end = min(self._position + BLOCK, self._size)
        if self._position >= end:
            return b""
        store, path = store_of(self._url)
        block = _explained(self._url, lambda: _part(store, path, self._position, end))
        if len(block) != end - self._position:
            raise Transient(f"the store gave {len(block)} bytes where {end - self._position} were asked for")
        self._position = end
        return block

    def finish(self) -> None:
        """See that all blocks were of one version.

        Raises:
            Transient: if the file was written to meanwhile.
        """
        info = _info(self._url)
        if info.get("size") != self._size or (self.versions and _versions(info) != self.versions):
            raise Transient("the file changed while it was fetched", start_over=True)

    def close(self) -> None:
        """Nothing: stores are shared."""

    def kill(self) -> None:
        """Nothing: a request cannot be called back."""


def store_of(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the file's path in it.

    Raises:
        ConfigError: if fsspec does not know the protocol.
        MissingExtraError: if a library is missing.
    """
    scheme = scheme_of(url)
    if "::" in url:
        raise ConfigError(f"{shown(url)}: URLs chained with :: are not read. Give the URL of the file itself.")
    try:
        # not at the top: most runs read local files, and need not have it
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise MissingExtraError(f"{scheme}://", "remote") from None
    try:
        store, path = url_to_fs(url)
    except ImportError:
        raise MissingExtraError(f"{scheme}://", "remote") from None
    except ValueError:
        raise ConfigError(
            f"{shown(url)}: {scheme}:// is not a protocol that fsspec knows, or the rest does not fit it. "
            "Use a path, http://, https://, s3://, gs://, hf:// or another of fsspec's."
        ) from None
    return store, str(path)


def _info(url: str) -> Mapping[str, Any]:
    store, path = store_of(url)

    def ask() -> Mapping[str, Any]:
        if scheme_of(url) != "hf":  # there, what is asked for anew comes without its version
            with suppress(TypeError):  # stores that keep no listings do not know the word
                return store.info(path, refresh=True)  # type: ignore[no-any-return]
        return store.info(path)  # type: ignore[no-any-return]

    info = _explained(url, ask)
    if info.get("type") == "directory":
        raise IsFolder(f"{shown(url)}: is a folder, and a file is wanted.")
    return info


def _part(store: Any, path: str, start: int, end: int) -> bytes:
    if not store.async_impl:  # these open a file for it, which by default reads far ahead of what is asked for
        with suppress(TypeError):
            return bytes(store.cat_file(path, start=start, end=end, cache_type="none"))
    return bytes(store.cat_file(path, start=start, end=end))


def _explained(url: str, action: Callable[[], T]) -> T:
    """What an action returns; what any store's library raises becomes one of our errors.

    Raises:
        NotFound: if there is no such file.
        DataError: if it may not be read.
        EnvironmentProblem: if nobody is logged in, or the library fails in a way that will not pass.
        Transient: if it may pass.
    """
    try:
        return action()
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{shown(url)}: does not exist.") from None
    except PermissionError as error:
        raise DataError(f"{shown(url)}: may not be read ({quoted(str(error)) or 'no permission'}).") from None
    except Exception as error:  # noqa: BLE001 - every store has a library, and every library errors of its own
        raise _failure(url, error) from None


def _failure(url: str, error: Exception) -> Exception:
    kind = type(error).__name__
    said = quoted(str(error))
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in {408, 425, 429}
    if status == 404:
        return NotFound(f"{shown(url)}: does not exist (404 Not Found).")
    if refused or _LOGIN.search(kind):
        return DataError(f"{shown(url)}: may not be read ({kind}: {said}). Log in to the store, or check the URL.")
    if isinstance(error, OSError) or status is not None or _PASSING.search(kind):
        return Transient(f"the store failed ({kind}: {said})")
    return EnvironmentProblem(f"{shown(url)}: the library for {scheme_of(url)}:// failed ({kind}: {said}).")


def _versions(info: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for kind, names in VERSIONS:
        value = next((info[name] for name in names if info.get(name)), None)
        if value is not None:
            found.append(f"{kind} {value}")
    return tuple(found)


def _checksum(info: Mapping[str, Any]) -> Checksum | None:
    """The hash of a file, from what Google, Azure and the Hugging Face Hub say, or from the ETag of S3."""
    stated = info.get("md5Hash") or info.get("content_md5")
    if isinstance(stated, str):
        with suppress(binascii.Error, ValueError):
            if len(digest := base64.b64decode(stated, validate=True)) == 16:
                return Checksum("md5", digest.hex(), certain=True)
    large = info.get("lfs")
    sha256 = large.get("sha256") if isinstance(large, Mapping) else getattr(large, "sha256", None)
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        return Checksum("sha256", sha256, certain=True)
    etag = _MD5.fullmatch(str(info.get("ETag", "")))
    return Checksum("md5", etag[1], certain=False) if etag and "LastModified" in info else None
