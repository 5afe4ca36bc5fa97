"""Files of weights that are published: given by path, found where torch keeps downloads, or fetched; and read.

A file is told by its sha256. It is read from safetensors, or else with `torch.load(weights_only=True)`: code in it is
never run.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.models.libraries import UNREADABLE, quietly, said

__all__ = ["Published", "WeightsFile", "fill", "find", "read"]

# How long a server may be silent, and how much is asked for at a time.
PATIENCE_SECONDS = 30
BLOCK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file of weights that everybody means.

    Attributes:
        url: where it is.
        sha256: what it is; or the first digits, as far as they are published.
    """

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def kept(self) -> Path:
        """Where torch's own downloads of it are, and so those of the libraries that use it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights on this disk.

    Attributes:
        path: where it is.
        sha256: what it is.
        standard: whether it is the published one.
    """

    path: Path
    sha256: str
    standard: bool


def find(owner: str, published: Published, given: Path | None, *, sha256: str | None = None, cure: str) -> WeightsFile:
    """The file of an owner's weights, which is fetched if it is not on this disk.

    Args:
        owner: what to call it in an error, such as "encoder inception".
        published: the file that everybody means.
        given: another file, or the same in another place; none looks where torch keeps downloads.
        sha256: what the file must have, or its first digits; none means that of the published one, or with `given` any.
        cure: what can be used meanwhile, as the end of an error.

    Raises:
        EnvironmentProblem: if there is no such file and it cannot be fetched, or it is another one.
    """
    path = published.kept if given is None else given.expanduser()
    wanted = sha256 or (published.sha256 if given is None else "")
    if given is not None and not path.is_file():
        raise EnvironmentProblem(f"{owner}: there is no file {given}. Give the path of {published.name}. {cure}")
    try:
        if given is None and not path.is_file():
            _fetch(published.url, path, wanted)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, HTTPException, ValueError) as error:
        if given is not None or path.is_file():
            raise EnvironmentProblem(f"{owner}: {path} cannot be read ({said(error)}).") from error
        raise EnvironmentProblem(
            f"{owner}: {path.name} is not in {path.parent} and cannot be fetched from {published.url} "
            f"({said(error)}). Put the file there, or give its path as weights. {cure}"
        ) from error
    if not found.startswith(wanted):
        hint = "Delete it, and it is fetched again" if given is None else "Give the right file, or leave out sha256"
        raise EnvironmentProblem(
            f"{owner}: {path} is damaged or another file: its sha256 begins with {found[:16]}, and should with "
            f"{wanted[:16]}. {hint}."
        )
    return WeightsFile(path, found, found.startswith(published.sha256))


def _fetch(url: str, to: Path, sha256: str) -> None:
    """Put what an address holds into a file, which is there only when it is whole and right."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.{uuid4().hex}.partial")  # of this process: others may fetch the same
    digest = hashlib.sha256()
    try:
        with urlopen(url, timeout=PATIENCE_SECONDS) as answer, partial.open("xb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                digest.update(block)
        if not digest.hexdigest().startswith(sha256):
            raise OSError(f"the {partial.stat().st_size} bytes that came are not those of the file, by their sha256")
        partial.replace(to)
    except HTTPError as error:
        error.close()  # it is the server's answer, and open
        raise
    finally:
        partial.unlink(missing_ok=True)


def read(owner: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, on the CPU.

    Raises:
        EnvironmentProblem: if it cannot be read, or holds something else.
    """
    try:
        with quietly():
            held = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
        if not isinstance(held, Mapping) or not all(isinstance(one, Tensor) for one in held.values()):
            raise TypeError("it holds something else than tensors by their names")
    except (*UNREADABLE, EOFError, zipfile.BadZipFile) as error:
        raise EnvironmentProblem(f"{owner}: {path} cannot be read as weights ({said(error)}).") from error
    return {str(name): tensor for name, tensor in held.items()}


def _unpickled(path: Path) -> object:
    """What `torch.save` wrote, as far as it is tensors and their names."""
    is_zip = zipfile.is_zipfile(path)  # as torch writes now; what is published may be older
    if is_zip:
        with zipfile.ZipFile(path) as archive:  # a member that is packed could become far larger than its file
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its members are compressed, as torch does not write them")
    # mapped, not read: VGG's half a gigabyte is mostly layers that nobody asks for
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE:
        raise
    except Exception as error:  # whatever a loader makes of bytes that are no file of its own
        raise ValueError(f"{type(error).__name__}: {error}") from error


def fill(owner: str, own: Mapping[str, Tensor], path: Path, *, wanted: str) -> None:
    """Give a network all of its weights from a file.

    Args:
        owner: what to call it in an error.
        own: its weights, to be written over, by the names that they have in the file; what else the file holds is of
            layers that it does without.
        path: the file.
        wanted: which file has them, for an error.

    Raises:
        ConfigError: if one is missing, of another shape, or not finite.
        EnvironmentProblem: if the file cannot be read.
    """
    tensors = read(owner, path)
    for name, weight in own.items():
        problem = None
        if name not in tensors:
            problem = f"has no {name}"
        elif tensors[name].shape != weight.shape:
            problem = f"has {name} of shape {list(tensors[name].shape)}, and not {list(weight.shape)}"
        elif not (tensors[name].is_floating_point() and tensors[name].layout is torch.strided):
            problem = f"has {name} of {tensors[name].dtype}, and not of floating point numbers"
        elif not tensors[name].isfinite().all():
            problem = f"has numbers in {name} that are not finite"
        if problem:
            raise ConfigError(f"{owner}: {path} {problem}: it is damaged, or of another network. Give {wanted}.")
        weight.copy_(tensors[name])
