"""What a shard holds, by sample: where each member begins and how long it is.

Consecutive members with the same key are one sample, as in the webdataset library. The key is a member's path up to
the first dot of its base name, the suffix is the rest, in lower case. Members without a key (no dot, or a name that
begins with one) and metadata (`__name__`) do not end a sample; a member with another key does, whatever its suffix.
A key that comes back later begins a new sample. Of each sample, `KINDS` are known; any other suffix, a second image
and a repeated suffix are passed over and counted. A group in which no member is known is no sample.

Of a shard that is damaged, the members before the damage count. The sample in which the walk ended is left out, as
members of it may be lost: all samples that are listed were followed by a member with another key or by the shard's
proper end.

An index is kept in a safetensors file, beside a local shard (`00000.tar.index`) or in a cache folder. It belongs to
the shard's size and version (time of change, ETag); checksums in it cover all of it, and what it says is checked
against the shard's size. One that does not hold is built again without a word.
"""

import json
import os
import stat
import subprocess
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from eclosion.data.images import SUFFIXES
from eclosion.data.tar import BLOCK, FILE, Member, TarDamage, entries, short
from eclosion.errors import DataError, EnvironmentProblem

__all__ = ["KINDS", "Request", "ShardIndex", "index_of", "indices", "kept_index"]

KINDS = ("image", "txt", "json", "cls", "npy", "img_emb.npy", "text_emb.npy")
# Suffix in lower case -> index into KINDS.
COLUMNS = {suffix[1:]: 0 for suffix in SUFFIXES} | {kind: column for column, kind in enumerate(KINDS) if column}
LABEL = KINDS.index("cls")
MAX_LABEL_BYTES = 20
# Removals from the cache between the moment a shard is fetched and the moment it is read that are put up with.
MAX_LOST_RACES = 20
MAX_LABEL = 2**31 - 1
# Suffixes that `ignored` tells apart; a hostile shard has a million.
MAX_IGNORED = 100

# The arrays of a kept index, for N samples and the k kinds that occur: type and number of dimensions.
ARRAYS: Mapping[str, tuple[type[np.generic], int]] = {
    "key_bytes": (np.uint8, 1),  # [bytes of all keys]
    "key_ends": (np.int64, 1),  # [N]
    "labels": (np.int64, 1),  # [N]
    "offsets": (np.int64, 2),  # [N, k]
    "sizes": (np.int64, 2),  # [N, k]
    "spellings": (np.int16, 2),  # [N, k]
}
FORMAT = 1
# With fewer, to start processes takes longer than it saves.
MIN_SHARDS_FOR_PROCESSES = 8
DONE = b"done\n"
SUFFIX = ".index"
# An index takes less room than the headers it stands for; what is larger by more than its own header is none.
INDEX_HEADER_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, N of them, in their order.

    Attributes:
        url: what to call the shard.
        key_bytes: all keys one after the other, UTF-8, uint8.
        key_ends: where each key ends in `key_bytes`, int64 [N].
        offsets: where each member's content begins, int64 [N, len(KINDS)]; -1 where a sample has no such member.
        sizes: bytes of each member's content, int64 [N, len(KINDS)]; -1 where there is none.
        labels: the number in the .cls member, int64 [N]; -1 where there is none in 0..2**31 - 1.
        ignored: what was passed over -> how many members: other suffixes, "png (second image)", "txt (repeated)",
            "directory", "cls (no number)", ...
        problem: why the walk ended early, on one line with shard and offset; none if it did not.
        digest: hash of keys, members and labels; equal for tars with equal layout, wherever they lie.
        suffixes: suffixes as the shard spells them.
        spellings: index into `suffixes`, int16 [N, len(KINDS)]; -1 where there is no member.
    """

    url: str
    key_bytes: NDArray[np.uint8]
    key_ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    ignored: Mapping[str, int]
    problem: str | None
    digest: str
    suffixes: tuple[str, ...]
    spellings: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, index: int) -> str:
        """The key of a sample, with its folders; bytes that are not UTF-8 as surrogates."""
        encoded = self._all_keys[self.key_starts.item(index) : self.key_ends.item(index)]
        return encoded.decode("utf-8", "surrogateescape")

    def member(self, index: int, kind: str) -> str:
        """The name of a sample's member, such as "0001.JPG", fit to be shown.

        Args:
            index: which sample.
            kind: one of `KINDS`; if the sample has none, its usual name is given.
        """
        code = self.spellings.item(index, KINDS.index(kind))
        suffix = self.suffixes[code] if code >= 0 else kind
        return short(f"{self.key(index)}.{suffix}")

    @cached_property
    def _all_keys(self) -> bytes:
        return self.key_bytes.tobytes()

    @cached_property
    def key_starts(self) -> NDArray[np.int64]:
        """Where each key begins in `key_bytes`, int64 [N]."""
        return np.concatenate([np.zeros(1, np.int64), self.key_ends])[:-1]

    @cached_property
    def columns(self) -> NDArray[np.intp]:
        """Which of `KINDS` occur, as indices."""
        return np.flatnonzero((self.offsets >= 0).any(0))

    def counts(self) -> dict[str, int]:
        """How many samples have a member of each kind that occurs."""
        found = (self.offsets >= 0).sum(0).tolist()
        return {kind: count for kind, count in zip(KINDS, found, strict=True) if count}

    def by_suffix(self) -> dict[str, int]:
        """How many members that are read have each suffix, in lower case."""
        found: Counter[str] = Counter()
        codes, counts = np.unique(self.spellings[self.spellings >= 0], return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            found[self.suffixes[code].lower()] += count
        return dict(found)

    def last_digits(self, width: int) -> NDArray[np.int64]:
        """The number that the last characters of each key spell, int64 [N]; -1 where they are no digits.

        Args:
            width: how many characters, 1 to 18; a shorter key counts as a whole.
        """
        if not 1 <= width <= 18:
            raise ValueError(f"width is {width}, and must be 1 to 18")
        value = np.zeros(len(self), np.int64)
        is_number = np.ones(len(self), bool)
        for place in range(width):
            at = self.key_ends - 1 - place
            inside = at >= self.key_starts
            digit = self.key_bytes[np.maximum(at, 0)].astype(np.int64) - ord("0")
            is_number &= ~inside | ((digit >= 0) & (digit <= 9))
            value += np.where(inside, digit, 0) * 10**place
        return np.where(is_number, value, -1)


def index_of(
    path: Path, *, url: str, version: str, cache: Path, refresh: bool = False, identity: str = ""
) -> ShardIndex:
    """The index of a shard: the kept one if it belongs to the shard as it is, else a new one, which is kept.

    Beside the shard if that is local, and else, or if its folder cannot be written to, in the cache folder; if that
    cannot be written to either, it is not kept. Safe with several processes: each writes aside and renames.

    Args:
        path: the shard, as a local file.
        url: where the shard comes from, without credentials: it is shown, and stored. The path itself if it is local.
        version: what changes when the shard changes: time of change, ETag.
        cache: folder for indices that have no other place.
        refresh: whether to build it even if one is kept.
        identity: what tells a remote shard from all others, where its URL as it is shown does not.

    Raises:
        DataError: if there is no such file.
        EnvironmentProblem: if it cannot be read.
    """
    places = _places(url, cache, path, identity)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{short(url)}: is no file. A shard is a tar file.")
        kept = None if refresh else _find(places, url, status.st_size, version)
        if kept is not None:  # it may be empty
            return kept
        with path.open("rb", buffering=0) as file:
            index = _build(file, url)
            now = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise DataError(f"{short(url)}: the shard does not exist.") from error
    except OSError as error:
        raise EnvironmentProblem(f"{short(url)}: the shard cannot be read ({error.strerror}).") from error
    if (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns):  # else it is of no version
        for place, name in places:
            if _keep(place, index, _Shard(name, status.st_size, version)):
                break
    return index


def kept_index(*, url: str, size: int, version: str, cache: Path, identity: str = "") -> ShardIndex | None:
    """The index of a remote shard if the cache folder has it; so that the shard need not be fetched for it.

    Args:
        url: as given to `index_of`.
        size: bytes of the shard, as its store says.
        version: as given to `index_of`.
        cache: as given to `index_of`.
        identity: as given to `index_of`.
    """
    return _find(_places(url, cache, None, identity), url, size, version)


@dataclass(frozen=True)
class Request:
    """A shard whose index is wanted.

    Attributes:
        path: the shard, or what fetches it and returns its path; called in some thread.
        url: as for `index_of`.
        version: as for `index_of`.
        size: its bytes; if that and its version are known, a remote shard whose index is kept is not fetched.
        identity: as for `index_of`.
    """

    path: Path | Callable[[], Path]
    url: str
    version: str
    size: int | None = None
    identity: str = ""


def indices(
    requests: Sequence[Request], *, cache: Path, num_workers: int, refresh: bool = False
) -> Generator[ShardIndex, None, None]:
    """The indices of many shards, in their order, several at a time.

    Threads fetch shards and load indices. To build them is work for the interpreter, of which threads get no more
    done than one: for that, each thread starts a process, unless the shards are few.

    Args:
        requests: the shards.
        cache: as for `index_of`.
        num_workers: how many threads.
        refresh: as for `index_of`.

    Raises:
        DataError, EnvironmentProblem: of the first shard that is missing or cannot be read.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="eclosion-index")
    builders = _Builders() if num_workers > 1 and len(requests) >= MIN_SHARDS_FOR_PROCESSES else None
    ahead: deque[Future[ShardIndex]] = deque()
    try:
        for request in requests:
            ahead.append(pool.submit(_answer, request, cache, refresh, builders))
            if len(ahead) >= 4 * num_workers:  # so that what is not asked for yet takes no memory
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # not waited for: what is being fetched may take long, and ends when its cache is closed
        pool.shutdown(wait=False, cancel_futures=True)
        if builders:
            builders.close()


def _answer(request: Request, cache: Path, refresh: bool, builders: "_Builders | None") -> ShardIndex:
    if isinstance(request.path, Path):
        return _built(request, request.path, cache, refresh, builders)
    if not refresh and request.size is not None and request.version:
        kept = kept_index(
            url=request.url, size=request.size, version=request.version, cache=cache, identity=request.identity
        )
        if kept is not None:
            return kept
    for lost in range(MAX_LOST_RACES):
        path = request.path()
        try:
            return _built(request, path, cache, refresh, builders)
        except DataError:
            if path.exists() or lost == MAX_LOST_RACES - 1:
                raise
    raise AssertionError


def _built(request: Request, path: Path, cache: Path, refresh: bool, builders: "_Builders | None") -> ShardIndex:
    """The index of a shard that is here."""
    about = {"url": request.url, "version": request.version, "identity": request.identity}
    if builders and path.is_file():
        places = _places(request.url, cache, path, request.identity)
        kept = None if refresh else _find(places, request.url, path.stat().st_size, request.version)
        if kept is not None:
            return kept
        # if it did not work, whatever the reason, it is tried again here, and the error raised
        task = {**about, "path": str(path), "cache": str(cache), "refresh": refresh}
        refresh = not builders.build(task) and refresh
    return index_of(path, **about, cache=cache, refresh=refresh)


class _Builders:
    """A process for each thread that asks, to build and keep indices.

    Not of `multiprocessing`: its processes would import the main program, and run it again if it is a script without
    a guard. These end when their input does, and so with their parent.
    """

    COMMAND = (sys.executable, "-P", "-c", "from eclosion.data.shard_index import _serve; _serve()")

    def __init__(self) -> None:
        self._local = threading.local()
        self._started: list[subprocess.Popen[bytes]] = []

    def build(self, task: Mapping[str, object]) -> bool:
        """Have one index built and kept; false if that did not work."""
        process = self._process()
        if process is None or not process.stdin or not process.stdout:
            return False
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
            return process.stdout.readline() == DONE
        except OSError:  # it has ended
            return False

    def close(self) -> None:
        """End the processes; what they work on is not kept."""
        for process in self._started:
            process.kill()
            process.communicate()

    def _process(self) -> subprocess.Popen[bytes] | None:
        if not hasattr(self._local, "process"):
            try:
                self._local.process = subprocess.Popen(
                    self.COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # NumPy would start one for each core
                    start_new_session=True,  # Ctrl-C is for the parent
                )
                self._started.append(self._local.process)
            except OSError:
                self._local.process = None
        process: subprocess.Popen[bytes] | None = self._local.process
        return process


def _serve() -> None:
    """What a process of `_Builders` does: build an index for each line of its input."""
    for line in sys.stdin.buffer:
        task = json.loads(line)
        index_of(Path(task.pop("path")), cache=Path(task.pop("cache")), **task)
        sys.stdout.buffer.write(DONE)
        sys.stdout.buffer.flush()


# ---------------------------------------------------------------------------------------------------- building


def _build(file: BinaryIO, url: str) -> ShardIndex:
    table, problem = _Table(file), None
    try:
        for entry in entries(file, short(url)):
            table.add(entry)
    except TarDamage as damage:
        table.leave_out_unfinished(damage.member)
        problem = f"{damage.detail} {len(table)} samples before it are listed." if len(table) else damage.detail
    return table.index(url, problem)


class _Table:
    """Collects members into samples."""

    EMPTY = array("q", [-1] * len(KINDS))
    UNSPELLED = array("h", [-1] * len(KINDS))

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.keys, self.key_lengths = bytearray(), array("i")
        self.offsets, self.sizes, self.spellings = array("q"), array("q"), array("h")
        self.labels = array("q")
        self.suffixes: dict[str, int] = {}
        self.ignored: dict[str, int] = {}
        # the group of members that the walk is in, and whether it is a sample yet
        self.group, self.is_sample = "", False

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, entry: Member) -> None:
        name, offset, size, entry_type = entry
        if entry_type != FILE:
            return self._ignore(entry_type)
        dot = _first_dot(name)
        if dot < 0:
            return self._ignore("no suffix")
        if name.startswith("__") and name.partition("/")[0].endswith("__"):
            return self._ignore("metadata")
        key, suffix = name[:dot], name[dot + 1 :]
        if key != self.group:
            self.group, self.is_sample = key, False
        column = COLUMNS.get(suffix.lower())
        if column is None:
            return self._ignore(suffix.lower())
        if not self.is_sample:
            self._begin(key)
        at = len(self.offsets) - len(KINDS) + column
        if self.offsets[at] >= 0:
            first = list(self.suffixes)[self.spellings[at]]
            return self._ignore(
                f"{suffix.lower()} ({'repeated' if first.lower() == suffix.lower() else 'second image'})"
            )
        self.offsets[at], self.sizes[at] = offset, size
        self.spellings[at] = self.suffixes.setdefault(suffix, len(self.suffixes))
        if column == LABEL:
            self.labels[-1] = self._label(offset, size)
        return None

    def leave_out_unfinished(self, cut_off: str | None) -> None:
        """End at damage.

        Args:
            cut_off: name of the member whose content is not whole, if its header could be read.
        """
        dot = _first_dot(cut_off) if cut_off is not None else -1
        if self.is_sample and (cut_off is None or dot < 0 or cut_off[:dot] == self.group):
            del self.offsets[-len(KINDS) :], self.sizes[-len(KINDS) :], self.spellings[-len(KINDS) :]
            del self.keys[len(self.keys) - self.key_lengths.pop() :]
            self.labels.pop()

    def index(self, url: str, problem: str | None) -> ShardIndex:
        offsets, sizes, spellings = (
            np.array(table).reshape(-1, len(KINDS)) for table in (self.offsets, self.sizes, self.spellings)
        )
        columns = np.flatnonzero((offsets >= 0).any(0))
        about = {
            "kinds": [KINDS[column] for column in columns],
            "suffixes": list(self.suffixes),
            "ignored": self.ignored,
            "problem": problem,
        }
        arrays: dict[str, NDArray[Any]] = {
            "key_bytes": np.frombuffer(bytes(self.keys), np.uint8),
            "key_ends": np.cumsum(np.array(self.key_lengths, np.int64)),
            "labels": np.array(self.labels),
            "offsets": np.ascontiguousarray(offsets[:, columns]),
            "sizes": np.ascontiguousarray(sizes[:, columns]),
            "spellings": np.ascontiguousarray(spellings[:, columns]),
        }
        return _assemble(url, about, arrays)

    def _begin(self, key: str) -> None:
        encoded = key.encode("utf-8", "surrogateescape")
        self.keys += encoded
        self.key_lengths.append(len(encoded))
        self.offsets.extend(self.EMPTY)
        self.sizes.extend(self.EMPTY)
        self.spellings.extend(self.UNSPELLED)
        self.labels.append(-1)
        self.is_sample = True

    def _label(self, offset: int, size: int) -> int:
        if size <= MAX_LABEL_BYTES:
            self.file.seek(offset)
            digits = self.file.read(size).strip()
            if digits.isdigit() and int(digits) <= MAX_LABEL:
                return int(digits)
        self._ignore("cls (no number)")
        return -1

    def _ignore(self, what: str) -> None:
        what = short(what, max_length=40)
        if what not in self.ignored and len(self.ignored) >= MAX_IGNORED:
            what = "other"
        self.ignored[what] = self.ignored.get(what, 0) + 1


def _first_dot(name: str) -> int:
    """Where the key of a name ends, or -1 if it has none."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return dot if dot > base else -1


# ---------------------------------------------------------------------------------------------------- keeping


@dataclass(frozen=True)
class _Shard:
    """What an index belongs to.

    Attributes:
        name: file name beside the shard, so that a folder can be moved and called by any path; URL in a cache.
        num_bytes: its size.
        version: what changes when it changes.
    """

    name: str
    num_bytes: int
    version: str


def _places(url: str, cache: Path, path: Path | None, identity: str) -> list[tuple[Path, str]]:
    """Where an index may be kept, the best place first, each with the name that the shard has there."""
    is_local = path is not None and (url.startswith("file:") or not (url.startswith("pipe:") or "://" in url))
    identity = str(path.absolute()) if path is not None and is_local else identity or url
    cached = (cache / "indices" / (_hash(identity)[:32] + SUFFIX), identity)
    return [(path.with_name(path.name + SUFFIX), path.name), cached] if path is not None and is_local else [cached]


def _find(places: Sequence[tuple[Path, str]], url: str, num_bytes: int, version: str) -> ShardIndex | None:
    for place, name in places:
        if (index := _load(place, url, _Shard(name, num_bytes, version))) is not None:
            return index
    return None


def _keep(place: Path, index: ShardIndex, shard: _Shard) -> bool:
    """Write an index to its place, all at once; false if it cannot be written."""
    partial = place.with_name(f".{place.name}.{uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_to_bytes(index, shard))
        partial.replace(place)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return False
    return True


def _to_bytes(index: ShardIndex, shard: _Shard) -> bytes:
    arrays = {name: getattr(index, name) for name in ARRAYS}
    for name, (_, num_dimensions) in ARRAYS.items():
        if num_dimensions == 2:
            arrays[name] = np.ascontiguousarray(arrays[name][:, index.columns])
    problem = index.problem.removeprefix(f"{short(index.url)}, ") if index.problem else None
    about = {
        "format": FORMAT,
        "shard": [shard.name, shard.num_bytes, shard.version],
        "kinds": [KINDS[column] for column in index.columns],
        "suffixes": index.suffixes,
        "ignored": index.ignored,
        "problem": problem,
        "digest": index.digest,
    }
    written = json.dumps(about)
    # one entry, as the library writes several in no fixed order
    return bytes(save(arrays, metadata={"index": f"{_hash(written)} {written}"}))


def _load(place: Path, url: str, shard: _Shard) -> ShardIndex | None:
    """A kept index, or none if it is missing, damaged or of something else."""
    try:
        status = place.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > shard.num_bytes + INDEX_HEADER_BYTES:
            return None
        with safe_open(place, framework="numpy") as opened:
            hashed, _, written = (opened.metadata() or {})["index"].partition(" ")
            if hashed != _hash(written):
                return None
            about = json.loads(written)
            if about["format"] != FORMAT or about["shard"] != [shard.name, shard.num_bytes, shard.version]:
                return None
            arrays = {name: opened.get_tensor(name) for name in ARRAYS}
            index = _assemble(url, about, arrays)
    except (OSError, SafetensorError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return index if index.digest == about["digest"] and _is_sound(index, shard.num_bytes) else None


def _assemble(url: str, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ShardIndex:
    """An index from its parts, as they are kept.

    Raises:
        IndexError, KeyError, TypeError, ValueError: if they do not fit together.
    """
    for name, (dtype, num_dimensions) in ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != num_dimensions:
            raise TypeError(name)
    columns = [KINDS.index(kind) for kind in about["kinds"]]
    full = dict(arrays)
    for name in ("offsets", "sizes", "spellings"):
        full[name] = np.full((len(arrays["key_ends"]), len(KINDS)), -1, arrays[name].dtype)
        full[name][:, columns] = arrays[name]
    return ShardIndex(
        url=url,
        ignored={str(what): int(count) for what, count in about["ignored"].items()},
        problem=None if about["problem"] is None else f"{short(url)}, {about['problem']}",
        digest=_digest(about, arrays),
        suffixes=tuple(map(str, about["suffixes"])),
        **full,
    )


def _digest(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    # SHA-256, which processors have instructions for: twice as fast as BLAKE2 there, and most of what loading costs
    digest = sha256(json.dumps([about["kinds"], about["suffixes"]]).encode())
    for name in ARRAYS:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()[:32]


def _is_sound(index: ShardIndex, num_bytes: int) -> bool:
    """Whether all that an index says can be: whoever wrote it, nothing outside of the shard is read."""
    num_samples, starts = len(index), index.key_starts
    if len(index.labels) != num_samples or (index.labels < -1).any() or (index.labels > MAX_LABEL).any():
        return False
    if (index.key_ends <= starts).any() or (num_samples and index.key_ends[-1] != len(index.key_bytes)):
        return False
    absent = index.offsets < 0
    fits = (index.offsets >= BLOCK) & (index.sizes >= 0) & (index.sizes <= num_bytes - index.offsets)
    spelled = (index.spellings >= 0) & (index.spellings < len(index.suffixes))
    return bool(np.where(absent, ~spelled, fits & spelled).all())


def _hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
