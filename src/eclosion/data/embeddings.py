"""Folders of embeddings: one .npy file per shard, one row per sample.

    <prefix>_<digits>.npy       digits: the number of the shard, in any width
    image   (rows, dim)         pooled, one vector per image
    text    (rows, tokens, dim) one vector per token

as clip-retrieval and embedding-dataset-reordering write them. A row is asked for by the number of its shard and its
place in it, and each array is bound to that number: there is no current array that a sample could meet by mistake.
"""

import mmap
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from eclosion.data.npy import map_npy
from eclosion.data.remote import Place, listing, local_path, shown, stat
from eclosion.data.shard_index import SUFFIX as INDEX_SUFFIX
from eclosion.errors import BadSample, ConfigError, DataError

__all__ = ["EmbeddingFolder", "Files", "Kind", "array_problem", "by_number", "checked_row", "checked_rows"]

Kind = Literal["image", "text"]

# Arrays that are kept mapped: more than two windows of shuffled shards, and few enough for any limit of open files.
MAX_OPEN = 64
# Files that are asked for at a time where each answer takes a while.
NUM_ASKING = 16

_NAME = re.compile(r".*_(\d{1,18})\.npy", re.ASCII | re.DOTALL)
_OPTION = {"image": "data.source.img_embeddings_url", "text": "data.source.text_embeddings_url"}
_LAYOUT = {"image": "(rows, dim)", "text": "(rows, tokens, dim), one vector per token"}


class Files(Protocol):
    """What makes a file local: `eclosion.data.file_cache.FileCache`."""

    def open(self, place: Place) -> BinaryIO:
        """The content of a place, open for reading; it stays readable when the file is removed."""
        ...


class EmbeddingFolder:
    """The embeddings of a data set, by the number of the shard and the row in it.

    Safe to use from several threads. Memory-mapped: a row costs the reading of that row.

    Attributes:
        kind: "image" or "text".
        places: shard number -> the file that holds its array.
        dims: shape of every row, (dim,) or (tokens, dim); the first array that is opened decides. None before.
    """

    def __init__(self, kind: Kind, url: str, places: Mapping[int, Place], problems: Mapping[int, str], cache: Files):
        """Use `EmbeddingFolder.open`."""
        self.kind, self.places = kind, dict(places)
        self.dims: tuple[int, ...] | None = None
        self._url, self._cache = url, cache
        self._lock = threading.Lock()
        self._arrays: OrderedDict[int, NDArray[Any]] = OrderedDict()  # most recently used last
        self._problems = dict(problems)  # shard number -> why it has no array

    @classmethod
    def open(
        cls, url: str, *, kind: Kind, cache: Files, shards: Collection[int] | None = None, shard_width: int = 6
    ) -> "EmbeddingFolder":
        """Find the arrays; none is opened yet.

        Args:
            url: a folder; or a file in which {} stands for the shard number, which is needed where folders cannot be
                listed, as with http.
            kind: "image" or "text".
            cache: makes remote files local.
            shards: numbers of the shards that are in use; others are left alone. None: all, which needs a folder.
            shard_width: digits of the number in place of {}.

        Raises:
            ConfigError: if the URL has the wrong form, or its folder cannot be listed.
            DataError: if there are no arrays, or two for one shard.
        """
        assert kind in get_args(Kind), kind
        if "{" in url or "}" in url:
            urls = _of_template(url, kind, shards, shard_width)
        else:
            urls = _of_folder(url, kind, shards)
        places, problems = _find(urls)
        if not places and (shards is None or shards):
            said = f": {next(iter(problems.values()))}" if problems else "."
            raise DataError(f"{_OPTION[kind]}: none of the shards has an array in {shown(url)}{said}")
        return cls(kind, url, places, problems, cache)

    @property
    def numbers(self) -> set[int]:
        """The shards that have an array."""
        return set(self.places)

    @property
    def fingerprint(self) -> str:
        """Hash of the names and sizes of the files; no content, no time."""
        files = [(number, _base(place.url), place.size) for number, place in sorted(self.places.items())]
        return blake2b(repr((self.kind, files)).encode(), digest_size=16).hexdigest()

    def check(self, number: int) -> tuple[int, tuple[int, ...]]:
        """Rows of a shard's array, and the shape of each; a remote file is fetched for it.

        Raises:
            DataError: if the shard has no array, or it is damaged or of another shape than the others.
        """
        array = self._array(number)
        return len(array), array.shape[1:]

    def row(self, number: int, row: int) -> NDArray[np.float32]:
        """One embedding: float32 [dim] or [tokens, dim], a copy.

        Args:
            number: of the shard.
            row: place of the sample in it; -1 for a sample whose key has no number.

        Raises:
            BadSample: reason "no_embedding" if the row is all zero or there is none, "embedding_shard" if the array is
                missing or damaged, "not_finite" if the row holds NaN or infinity.
        """
        try:
            array = self._array(number)
            self._check_length(number, array)
        except DataError as error:
            raise self._bad_shard(number, str(error)) from error
        name = f"{self._name(number)} row {row}"
        if row < 0:
            raise BadSample(name, "no_embedding", "the key of the sample does not end in the number of a row.")
        if row >= len(array):
            raise BadSample(name, "no_embedding", f"the array has {len(array)} rows, and no row {row}.")
        return checked_row(array[row], name)

    def _name(self, number: int) -> str:
        place = self.places.get(number)
        return place.shown if place else f"{_OPTION[self.kind]}, shard {number}"

    def _bad_shard(self, number: int, message: str) -> BadSample:
        name = self._name(number)
        return BadSample(name, "embedding_shard", message.removeprefix(f"{name}: "))

    def _array(self, number: int) -> NDArray[Any]:
        """The array of a shard, mapped now or before. What is wrong with one is found once, and remembered."""
        with self._lock:
            if number in self._problems:
                raise DataError(self._problems[number])
            if number in self._arrays:
                self._arrays.move_to_end(number)
                return self._arrays[number]
        try:
            array = self._map(number)  # two threads may both do it, and no thread waits for another's shard
        except DataError as error:
            self._set_problem(number, str(error))
            raise
        with self._lock:
            self._arrays[number] = array
            self._arrays.move_to_end(number)
            while len(self._arrays) > MAX_OPEN:
                self._arrays.popitem(last=False)
        return array

    def _map(self, number: int) -> NDArray[Any]:
        place = self.places.get(number)
        if place is None:
            raise DataError(f"{self._name(number)}: there is no array for it in {shown(self._url)}.")
        with self._cache.open(place) as file:
            array = map_npy(file.fileno(), place.shown)
        if problem := array_problem(array, self.kind):
            raise DataError(f"{place.shown}: {problem}")
        with self._lock:
            dims = self.dims = self.dims or array.shape[1:]
        if array.shape[1:] != dims:
            raise DataError(
                f"{place.shown}: its rows are {list(array.shape[1:])}, and those of the first array that was opened "
                f"are {list(dims)}. All must be equal."
            )
        return array

    def _check_length(self, number: int, array: NDArray[Any]) -> None:
        """See that the file is still as long as the map: reading behind its end would kill the process."""
        assert isinstance(array.base, mmap.mmap)
        if array.base.size() < len(array.base):
            message = f"{self._name(number)}: the file became shorter while it was in use."
            self._set_problem(number, message)
            raise DataError(message)

    def _set_problem(self, number: int, message: str) -> None:
        with self._lock:
            self._problems[number] = message
            self._arrays.pop(number, None)


def checked_row(row: NDArray[Any], name: str) -> NDArray[np.float32]:
    """One embedding as float32: a copy.

    Args:
        row: its numbers, of any type and in any order of bytes.
        name: what to call it in an error.

    Raises:
        BadSample: reason "no_embedding" if it is all zero, "not_finite" if it holds NaN or infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite
        values = np.array(row, np.float32, order="C")
    if not values.any():
        raise BadSample(name, "no_embedding", "is all zero, which stands for no embedding.")
    if not np.isfinite(values).all():
        raise BadSample(name, "not_finite", "holds NaN or infinity, or numbers too large for float32.")
    return values


def checked_rows(
    array: NDArray[Any], *, ndim: int, what: str, name: str, limit: int | None = None
) -> NDArray[np.float32]:
    """Embeddings or encodings in one array, as float32: a copy.

    Args:
        array: one row for each image.
        ndim: how many dimensions it must have, rows included: 2 for embeddings, 3 for encodings.
        what: the option that it was given as, for errors.
        name: what to call it in an error.
        limit: rows that are wanted; None takes all.

    Raises:
        DataError: if it has another shape, or holds no numbers.
        BadSample: if a row is all zero, or not finite.
    """
    if array.ndim != ndim or array.size == 0 or array.dtype.kind not in "fiu":
        layout = {2: "rows x dim", 3: "rows x tokens x dim"}[ndim]
        raise DataError(f"{name}: is an array {list(array.shape)} of {array.dtype.name}, and {what} is {layout}.")
    return np.stack([checked_row(row, f"{name} row {i}") for i, row in enumerate(array[:limit])])


def by_number(names: Iterable[str], folder: str) -> dict[int, str]:
    """The names <prefix>_<digits>.npy among some: number -> name. All others are left alone.

    Args:
        names: of the files in a folder.
        folder: what to call it in an error.

    Raises:
        DataError: if two have the same number.
    """
    found: dict[int, str] = {}
    for name in sorted(names):
        if match := _NAME.fullmatch(name):
            number = int(match[1])
            if number in found:
                raise DataError(
                    f"{folder}: {found[number]} and {name} are both for shard {number}. Keep one of them; arrays of "
                    "another kind belong in a folder of their own."
                )
            found[number] = name
    return found


def array_problem(array: NDArray[Any], kind: Kind) -> str | None:
    """What makes an array unfit to hold embeddings, or None."""
    if array.ndim != {"image": 2, "text": 3}[kind]:
        hint = " It seems to hold pooled embeddings." if kind == "text" and array.ndim == 2 else ""
        return f"is an array of shape {array.shape}, and {kind} embeddings are {_LAYOUT[kind]}.{hint}"
    if array.dtype.kind != "f":
        return f"holds {array.dtype.name}, and embeddings are floating point."
    if not all(array.shape[1:]):
        return f"is an array of shape {array.shape}, whose rows hold no numbers."
    if not array.flags.c_contiguous:
        return (
            "is stored in Fortran order, in which a row is spread over the whole file. Save np.ascontiguousarray of it."
        )
    return None


def _base(url: str) -> str:
    return PurePosixPath(shown(url)).name


def _of_folder(url: str, kind: Kind, shards: Collection[int] | None) -> dict[int, str]:
    """Shard number -> URL of its array, from what the folder holds."""
    folder = url.rstrip("/") or "/"
    names = listing(folder)
    if names is None:
        raise ConfigError(
            f"{_OPTION[kind]}: {shown(url)} cannot be listed, so the names of the arrays are not known. Give their "
            "name with {} in place of the shard number, such as "
            f"{shown(folder)}/{'img_emb' if kind == 'image' else 'text_emb'}_{{}}.npy."
        )
    found = by_number(names, shown(folder))
    if not found:
        given = (PurePosixPath(name) for name in names)  # without what we keep there: it comes and goes
        suffixes = Counter(name.suffix or "no suffix" for name in given if INDEX_SUFFIX not in name.suffixes)
        held = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "nothing"
        raise DataError(
            f"{_OPTION[kind]}: {shown(folder)} holds no arrays NAME_<shard number>.npy; it holds {held}. Give the "
            "folder in which they are."
        )
    return {number: f"{folder}/{name}" for number, name in found.items() if shards is None or number in shards}


def _of_template(url: str, kind: Kind, shards: Collection[int] | None, shard_width: int) -> dict[int, str]:
    """Shard number -> URL its array should have."""
    before, braces, after = url.partition("{}")
    if not braces or re.search("[{}]", before + after):
        raise ConfigError(f"{_OPTION[kind]}: {shown(url)} must have {{}} once, in place of the shard number.")
    if not after.startswith(".npy"):
        raise ConfigError(f"{_OPTION[kind]}: {shown(url)} must end in {{}}.npy.")
    if shards is None:
        raise ConfigError(f"{_OPTION[kind]}: {shown(url)} needs the numbers of the shards. Give data.source.end_shard.")
    return {number: f"{before}{number:0{shard_width}d}{after}" for number in shards}


def _find(urls: Mapping[int, str]) -> tuple[dict[int, Place], dict[int, str]]:
    """The files that are there, and what is wrong with those that are not."""
    places, problems = dict[int, Place](), dict[int, str]()
    num_threads = NUM_ASKING if any(local_path(url) is None for url in urls.values()) else 1
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="eclosion-find")
    try:
        waiting = {number: pool.submit(stat, url) for number, url in sorted(urls.items())}
        for number, answer in waiting.items():
            try:
                places[number] = answer.result()
            except DataError as error:
                problems[number] = str(error)
    finally:
        pool.shutdown(cancel_futures=True)  # after another error, the rest need not be asked
    return places, problems
