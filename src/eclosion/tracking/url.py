"""What a run starts from, by URL: fetched whole, checked, and under its name only then."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, model_validator

from eclosion.data.download import download
from eclosion.data.places import IsFolder, NotFound, Place
from eclosion.data.remote import stat
from eclosion.errors import DataError, EnvironmentProblem
from eclosion.redaction import scheme_of, shown
from eclosion.registry import part
from eclosion.tracking.loading import tell_fetched
from eclosion.tracking.pointers import POINTER, pointed_to

__all__ = ["UrlLoader"]

MANIFEST = "manifest.json"
HERE = ("localhost", "127.0.0.1", "::1")  # names of this machine
MAX_SMALL = 64 << 20  # bytes of a manifest
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def _fetchable(url: str) -> str:
    if scheme_of(url) in ("", "pipe"):
        raise ValueError("must be a URL such as https://example.org/model.safetensors; a path goes with name: local")
    return url


@part
class UrlLoader:
    """A file, or a folder with a manifest, from https://, s3:// or another protocol of fsspec.

    What breaks off is taken up where it broke, also by the next start of a run that was stopped or killed, if the
    server allows. However many processes train, it is fetched once.
    """

    # Where it is: a checkpoint of DALLE2-pytorch or a .safetensors file; or a checkpoint or model of ours, which over
    # https is a folder whose URL ends with "/".
    url: Annotated[str, AfterValidator(_fetchable)]
    # The sha256 of the file, or of a folder's manifest.json, in hexadecimal; anything else is refused.
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    # The most that is fetched, in 10^9 bytes.
    max_gb: Annotated[float, Field(gt=0)] = 20.0
    # Whether it is only fetched where a run was before, whose own checkpoints are gone.
    only_when_resuming: bool = False

    @model_validator(mode="after")
    def _is_what_it_was(self) -> Self:
        if scheme_of(self.url) == "http" and self.sha256 is None and urlsplit(self.url).hostname not in HERE:
            raise ValueError("url is http://, on which anybody may change it. Take https://, or give sha256")
        return self

    def fetch(self, into: Path) -> Path:
        """Fetch it, unless that very version was fetched before.

        Raises:
            DataError: if it does not exist, may not be read, is too large, or is not what it must be.
            EnvironmentProblem: if the server keeps failing, or the disk is full.
        """
        with _of_start():
            if self.url.endswith("/"):
                return self._folder(self.url, into)
            try:
                place = stat(self.url)
            except IsFolder:
                return self._folder(f"{self.url}/", into)
            return self._file(place, into)

    # --- a file --------------------------------------------------------------------------------------------------

    def _file(self, place: Place, into: Path) -> Path:
        self._check_size(place.size or 0)
        target = into / place.key / _name_of(self.url)
        if not (place.version and target.is_file()):
            target.parent.mkdir(parents=True, exist_ok=True)
            download(place, target, max_bytes=self._most, resume=True)
        found = _sha256(target)
        self._check_sha256(found, target)
        tell_fetched(into, loader="url", url=place.shown, size=target.stat().st_size, sha256=found)
        return target

    # --- a folder ------------------------------------------------------------------------------------------------

    def _folder(self, url: str, into: Path) -> Path:
        """A checkpoint or model: its manifest, and then the files that this lists."""
        from eclosion.checkpoint import storage  # not at the top: a config is checked without torch

        url = self._current(url, into)
        aside = into / f"manifest-{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}"
        aside.mkdir(parents=True, exist_ok=True)
        self._small(f"{url}{MANIFEST}", aside / MANIFEST)
        found = _sha256(aside / MANIFEST)
        self._check_sha256(found, aside / MANIFEST)
        manifest = storage.read_manifest(aside)
        folder = into / found[:32]
        if not folder.is_dir():
            self._check_size(sum(entry.size for entry in manifest.files.values()))
            partial = into / f"{found[:32]}.partial"  # stays when this is stopped, and is gone on with
            partial.mkdir(exist_ok=True)
            for name, entry in manifest.files.items():
                if not _is_whole(partial / name, entry.size, entry.sha256):
                    self._part(f"{url}{name}", partial / name, entry.size)
            (aside / MANIFEST).replace(partial / MANIFEST)
            storage.verify(partial)
            partial.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        tell_fetched(into, loader="url", url=shown(url), step=manifest.step, sha256=found)
        return folder

    def _current(self, url: str, into: Path) -> str:
        """The folder that a place stands for now: the one that it points to, or itself."""
        pointer = into / f"{POINTER}.fetched"
        try:
            self._small(f"{url}{POINTER}", pointer)
        except NotFound:
            return url
        try:
            return f"{url}{pointed_to(pointer.read_bytes(), shown(url))}/"
        finally:
            pointer.unlink()

    def _small(self, url: str, to: Path) -> None:
        download(stat(url), to, max_bytes=MAX_SMALL)

    def _part(self, url: str, to: Path, size: int) -> None:
        place = stat(url)
        if place.size not in (None, size):
            raise DataError(f"{place.shown}: has {place.size} bytes, and its manifest states {size}. Save it again.")
        download(place, to, max_bytes=size, resume=True)

    # --- checks --------------------------------------------------------------------------------------------------

    @property
    def _most(self) -> int:
        return int(self.max_gb * 1e9)

    def _check_size(self, size: int) -> None:
        if size > self._most:
            raise DataError(
                f"{shown(self.url)}: has {size / 1e9:.3g} GB, and start.max_gb is {self.max_gb:g}. Nothing was fetched."
            )

    def _check_sha256(self, found: str, path: Path) -> None:
        if self.sha256 not in (None, found):
            path.unlink()
            raise DataError(
                f"{shown(self.url)}: the content has sha256 {found}, and start.sha256 is {self.sha256}. It is not used."
            )


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_of(url: str) -> str:
    """The last word of a URL's path, if it can name a file."""
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    return name if _NAME.fullmatch(name) else "download"


@contextmanager
def _of_start() -> Iterator[None]:
    """Messages about fetched data, in the words of what a run starts from."""
    try:
        yield
    except EnvironmentProblem as error:
        cure = "Make room, choose another folder with ECLOSION_CACHE, or lower data.source.cache_limit_gb."
        if cure not in str(error):
            raise
        raise EnvironmentProblem(str(error).replace(cure, "Make room.")) from error
    except OSError as error:
        raise EnvironmentProblem(f"{error.filename}: cannot be written ({error.strerror}). Make room.") from error
