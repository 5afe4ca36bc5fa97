"""Where the rows of embedding arrays come from: from .npy files, or with the samples themselves."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eclosion.data.embedding_record import FILE, read_record
from eclosion.data.embeddings import Kind, array_problem, by_number
from eclosion.data.folder import FolderSamples
from eclosion.data.npy import open_npy
from eclosion.data.source import Sample, Samples, ShardedSamples
from eclosion.errors import DataError

__all__ = ["ARRAYS", "Rows", "digest_of_order", "find_rows"]

# Folder of arrays -> what kind they are, and what a sample calls its own. There is none for `text_embed`: arrays beside
# shards hold one vector per token.
ARRAYS: dict[str, tuple[Kind, str]] = {"img_emb": ("image", "image_embed"), "text_emb": ("text", "text_encodings")}
# Files that are kept open, and rows of them that go into the hash that tells them apart.
MAX_OPEN, NUM_LOOKED_AT = 32, 64


class Rows(Protocol):
    """The rows of one kind of array, one per sample of the source.

    Attributes:
        dtype: of their numbers.
        dims: shape of each.
        digest: equal for equal rows.
    """

    dtype: np.dtype[Any]
    dims: tuple[int, ...]
    digest: str

    def row(self, index: int, sample: Sample) -> NDArray[Any]:
        """The row of sample `index` of the source."""
        ...


def find_rows(samples: Samples, given: Mapping[str, Path | None]) -> dict[str, Rows]:
    """What is given, or else what the source brings, by the names in `ARRAYS`.

    Args:
        samples: the opened source.
        given: file or folder of each kind, if any.

    Raises:
        DataError: if what is given is damaged, or does not go with the samples.
    """
    brought = samples.array_shapes if isinstance(samples, ShardedSamples) else {}
    found: dict[str, Rows] = {}
    for name, (kind, field) in ARRAYS.items():
        path = given[name]
        if path is not None:
            _refuse_others(path.expanduser(), samples)
            found[name] = _Given(path.expanduser(), kind, len(samples))
        elif field in brought:
            found[name] = _Brought(field, brought[field])
    return found


def digest_of_order(samples: Samples) -> str:
    """Hash of which images samples are, in their order; of a folder, wherever it lies and whatever its captions are."""
    digest = blake2b(digest_size=16)
    names: Iterable[str] = map(samples.name, range(len(samples)))
    if isinstance(samples, FolderSamples):
        names = samples.names
    else:
        digest.update(samples.fingerprint.encode())
    for name in names:
        digest.update(f"{name!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _refuse_others(path: Path, samples: Samples) -> None:
    """Refuse embeddings that are not finished, or say that they are of other samples."""
    record = read_record(path)
    if record is None:
        return
    if not record.done:
        raise DataError(f"{path}: {FILE} says that not all embeddings are made. Run `eclosion embed` again first.")
    if record.order is None:
        raise DataError(
            f"{path}: {FILE} says that its rows go by the keys of shards. Name the folder as img_embeddings_url of "
            "these shards instead."
        )
    if record.order != digest_of_order(samples):
        raise DataError(
            f"{path}: {FILE} says that these are embeddings of other samples, or in another order. Make them from the "
            "same source."
        )


class _Brought:
    """Rows that a source reads with its samples; its fingerprint covers them."""

    dtype = np.dtype(np.float32)
    digest = "of the source"

    def __init__(self, field: str, dims: tuple[int, ...]) -> None:
        self._field, self.dims = field, dims

    def row(self, index: int, sample: Sample) -> NDArray[Any]:
        return sample.arrays[self._field]


class _Given:
    """Rows in files, one file after the other; memory-mapped."""

    def __init__(self, path: Path, kind: Kind, num_samples: int) -> None:
        self._map = lru_cache(MAX_OPEN)(_map)
        self._files = _files(path)
        lengths = [self._length(file, kind) for file in self._files]
        self._ends = np.cumsum(lengths)
        first = self._map(self._files[0])
        self.dims: tuple[int, ...] = first.shape[1:]
        self.dtype = first.dtype
        total = int(self._ends[-1])
        if total != num_samples:
            raise DataError(
                f"{path}: has {total} rows, and the source has {num_samples} samples. There must be one row for each "
                "sample, in the order of the source; a row of zeros for a sample without embedding."
            )
        self.digest = self._digest(total)

    def row(self, index: int, sample: Sample | None = None) -> NDArray[Any]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[file - 1]) if file else 0
        row: NDArray[Any] = self._map(self._files[file])[index - start]
        return row

    def _length(self, file: Path, kind: Kind) -> int:
        """Rows in a file, which must be of the form of the first."""
        array, first = self._map(file), self._map(self._files[0])
        if problem := array_problem(array, kind):
            raise DataError(f"{file}: {problem}")
        if (array.shape[1:], array.dtype) != (first.shape[1:], first.dtype):
            raise DataError(
                f"{file}: holds {array.dtype.name} rows of {list(array.shape[1:])}, and {self._files[0]} holds "
                f"{first.dtype.name} rows of {list(first.shape[1:])}. All must be equal."
            )
        return len(array)

    def _digest(self, total: int) -> str:
        """Hash of the form and of some rows, spread evenly: a change elsewhere is not noticed."""
        digest = blake2b(repr((total, self.dims, self.dtype.str)).encode(), digest_size=16)
        for index in np.unique(np.linspace(0, total - 1, NUM_LOOKED_AT).astype(int)).tolist():
            digest.update(self.row(index).tobytes())
        return digest.hexdigest()


def _map(file: Path) -> NDArray[Any]:
    return open_npy(file, str(file))


def _files(path: Path) -> list[Path]:
    """The files of a kind of embeddings, in their order."""
    if not path.is_dir():
        return [path]
    names = by_number((entry.name for entry in path.iterdir()), str(path))
    if not names:
        raise DataError(f"{path}: holds no files NAME_<digits>.npy. Give a .npy file, or a folder of such files.")
    return [path / names[number] for number in sorted(names)]
