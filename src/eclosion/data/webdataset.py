"""Images in tar shards as webdataset has them, with embeddings beside them or inside."""

import json
import os
import threading
from bisect import bisect_right
from codecs import BOM_UTF8
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eclosion.data.embeddings import EmbeddingFolder, Kind, checked_row
from eclosion.data.file_cache import FileCache
from eclosion.data.npy import parse_npy
from eclosion.data.remote import local_path, stat_all
from eclosion.data.shard_index import ShardIndex, indices
from eclosion.data.shard_reading import KIND, OpenedShard, Run, Shard
from eclosion.data.shard_urls import NO_NUMBER, expand
from eclosion.data.source import Sample
from eclosion.data.splits import Splits, divide
from eclosion.errors import BadSample, DataError
from eclosion.redaction import scheme_of
from eclosion.registry import part

__all__ = ["WebDatasetSamples", "WebDatasetSource"]

# Longest caption and longest .json that are read, in bytes.
MAX_TEXT_BYTES = 1_048_576
# Classes that a network may be asked to know; a hostile .cls must not cost memory.
MAX_CLASSES = 100_000
# Samples of a shard that are tried to find out what embeddings it holds.
MAX_TRIED = 100
# Shards whose file and index are kept open: few enough for any limit of open files.
MAX_OPEN = 128

Selection = NDArray[np.int64]
NOTHING: Selection = np.empty(0, np.int64)
OnShard = Callable[[int, int], None]


@part
class WebDatasetSource:
    """Tar shards as webdataset has them: `key.jpg`, `key.txt`, ... one after the other, one sample per key.

    Images are members with the suffix bmp, gif, jpeg, jpg, png or webp, in any case. A `.txt` is the caption, a `.cls`
    the number of the class. Embeddings lie in folders of arrays, or in the shards as `.npy` or `.img_emb.npy` for the
    image and `.text_emb.npy` for the text. Everything else is left alone.

    Shards are read in place by an index of their members, which is made when they are first opened and kept. Remote
    shards are fetched whole into a cache, ahead of need.
    """

    # Where the shards are: a path or URL in which {} stands for the number, or a list such as {00000..00099}.tar.
    # Local, http(s), any protocol of fsspec such as s3, gs or hf, and "pipe:command" if that is allowed on the command
    # line.
    webdataset_base_url: Annotated[str, Field(min_length=1)]
    # Folder of image embeddings, NAME_<shard number>.npy each, one row per sample; none takes those in the shards.
    img_embeddings_url: str | None = None
    # Folder of text encodings, NAME_<shard number>.npy each, rows x tokens x dim; none takes those in the shards.
    text_embeddings_url: str | None = None
    # First shard.
    start_shard: Annotated[int, Field(ge=0)] = 0
    # Last shard, itself included; none takes all that the folder has.
    end_shard: Annotated[int, Field(ge=0)] | None = None
    # Digits of the shard number in the URL.
    shard_width: Annotated[int, Field(ge=1, le=18)] = 6
    # Digits at the end of a key that are the row of its embeddings.
    index_width: Annotated[int, Field(ge=1, le=18)] = 4
    # Whether shards between the first and the last may be missing.
    skip_missing_shards: bool = False
    # Whether captions are read, from .txt members: "optional" gives an empty caption to a sample that has none.
    captions: Literal["optional", "required", "off"] = "optional"
    # Key of the caption in .json members, such as "caption", instead of .txt.
    caption_key: str | None = None
    # Whether the numbers in .cls members are the classes of the images.
    labels: bool = False
    # How the shards are divided; with too few shards, samples are.
    splits: Splits = field(default_factory=Splits)
    # Which part of them this is.
    split: Literal["train", "val", "test"] = "train"
    # Which shards are in which part follows from this and the list of shards alone.
    split_seed: Annotated[int, Field(ge=0)] = 0
    # Disk space for fetched shards, in GiB.
    cache_limit_gb: Annotated[float, Field(gt=0)] = 50.0

    def of_split(self, split: Literal["train", "val", "test"]) -> "WebDatasetSource | None":
        """The same shards for another split; None if it has no share of them."""
        return replace(self, split=split) if getattr(self.splits, split) > 0 else None

    @property
    def caption_kind(self) -> str:
        """Which member of a sample holds its caption."""
        return "json" if self.caption_key else "txt"

    def open(self) -> "WebDatasetSamples":
        """Index the shards, and choose those of the split.

        Raises:
            ConfigError: if an option is wrong.
            DataError: if there are no shards, some are missing, or embeddings do not go with them.
        """
        shares = self.splits.shares()
        cache = FileCache(
            limit_bytes=int(self.cache_limit_gb * 2**30),
            num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # of torchrun, on this machine
        )
        try:
            return self._open(cache, shares)
        except BaseException:  # a signal, too, must end what is being fetched
            cache.close()
            raise

    def _open(self, cache: FileCache, shares: Mapping[str, float]) -> "WebDatasetSamples":
        shards, missing = self.locate()
        parts, by_sample = _divide(self, cache, shards, shares)
        arrays = _arrays(self, cache, shards, parts)
        chosen = [
            _choose(self, shard, index, which, arrays, is_mine=by_sample or which is None or len(which) > 0)
            for shard, index, which in zip(shards, self.index(cache, shards), parts[self.split], strict=True)
        ]
        return WebDatasetSamples(
            source=self,
            cache=cache,
            shards=shards,
            chosen=chosen,
            arrays=arrays,
            splits=_names_by_split(shards, parts),
            notes=_notes(missing, by_sample, len(shards)),
        )

    def locate(self) -> tuple[list[Shard], list[str]]:
        """The shards that there are, and the names of those that are missing.

        Raises:
            ConfigError: if the URL is wrong.
            DataError: if there are no shards, or some are missing.
        """
        urls, missing = expand(
            self.webdataset_base_url,
            start_shard=self.start_shard,
            end_shard=self.end_shard,
            shard_width=self.shard_width,
            skip_missing=self.skip_missing_shards,
        )
        places = stat_all(url.url for url in urls)
        gone = [url.shown for url, place in zip(urls, places, strict=True) if place is None]
        if gone:
            raise DataError(f"{gone[0]}: does not exist any more. Start again when the shards are as they shall be.")
        return [Shard(url.number, place) for url, place in zip(urls, places, strict=True) if place], missing

    def index(
        self, cache: FileCache, shards: Sequence[Shard], *, on_shard: OnShard | None = None
    ) -> Generator[ShardIndex, None, None]:
        """What is in each shard, in their order: from the kept index, or by looking now.

        Args:
            cache: where remote shards, and indexes that cannot stand beside their shard, are kept.
            shards: from `locate`.
            on_shard: called with how many are done, and of how many.
        """
        requests = [shard.request(cache) for shard in shards]
        with closing(indices(requests, cache=cache.folder, num_workers=os.cpu_count() or 1)) as found:
            for done, index in enumerate(found, 1):
                if on_shard:
                    on_shard(done, len(shards))
                yield index


def _divide(
    source: WebDatasetSource, cache: FileCache, shards: Sequence[Shard], shares: Mapping[str, float]
) -> tuple[dict[str, list[Selection | None]], bool]:
    """Per split and shard, which of its samples belong to the split (None: all); and whether samples were divided."""
    by_shard = divide(len(shards), shares, seed=source.split_seed)
    if by_shard is not None:
        inside = {name: set(some.tolist()) for name, some in by_shard.items()}
        return {
            name: [None if s in some else NOTHING for s in range(len(shards))] for name, some in inside.items()
        }, False
    sizes = [len(index) for index in source.index(cache, shards)]
    by_sample = divide(sum(sizes), shares, seed=source.split_seed)
    if by_sample is None:
        wanted = ", ".join(f"{name} {share:g}" for name, share in shares.items() if share)
        raise DataError(
            f"data.source.splits: {sum(sizes)} samples in {shards[0].name}{_more(shards)} are too few for {wanted}, "
            "each of which must get one. Set data.source.splits.train=1 and the others to 0, or bring more data."
        )
    ends = np.cumsum(sizes)
    return {name: _per_shard(samples, ends) for name, samples in by_sample.items()}, True


def _more(shards: Sequence[Shard]) -> str:
    return f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""


def _per_shard(samples: Selection, ends: NDArray[np.int64]) -> list[Selection | None]:
    starts = np.concatenate([[0], ends[:-1]])
    cuts = np.searchsorted(samples, ends)
    return [part - start for part, start in zip(np.split(samples, cuts[:-1]), starts, strict=True)]


def _names_by_split(shards: Sequence[Shard], parts: Mapping[str, Sequence[Selection | None]]) -> dict[str, list[str]]:
    """Split -> the shards that it has samples of."""
    return {
        name: [shard.name for shard, which in zip(shards, selections, strict=True) if which is None or len(which)]
        for name, selections in parts.items()
    }


def _notes(missing: Sequence[str], by_sample: bool, num_shards: int) -> list[str]:
    notes = []
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.append(f"{missing[0]}{more} do not exist, and are left out (data.source.skip_missing_shards).")
    if by_sample:
        notes.append(f"{num_shards} shards are too few for the splits, so samples are divided, and not shards.")
    return notes


@dataclass(frozen=True)
class _Array:
    """One kind of embedding that every sample brings.

    Attributes:
        name: as a batch calls it.
        shape: of one sample's.
        folder: where it lies, if beside the shards.
        kinds: the members that hold it, if in the shards; the first that a sample has.
    """

    name: str
    shape: tuple[int, ...]
    folder: EmbeddingFolder | None = None
    kinds: tuple[str, ...] = ()


def _arrays(
    source: WebDatasetSource,
    cache: FileCache,
    shards: Sequence[Shard],
    parts: Mapping[str, Sequence[Selection | None]],
) -> list[_Array]:
    """What embeddings there are; the first shard of each split is looked at."""
    looked_at = [first for selections in parts.values() if (first := _first(source, cache, shards, selections))]
    wanted: list[tuple[Kind, str | None, tuple[str, ...]]] = [
        ("image", source.img_embeddings_url, ("img_emb.npy", "npy")),
        ("text", source.text_embeddings_url, ("text_emb.npy",)),
    ]
    found = []
    for kind, url, kinds in wanted:
        if url is not None:
            numbers = _numbers(shards, kind)
            folder = EmbeddingFolder.open(url, kind=kind, cache=cache, shards=numbers, shard_width=source.shard_width)
            found.append(_beside(source, folder, looked_at))
        elif looked_at and (inside := _inside(kind, kinds, cache, *looked_at[0])):
            found.append(inside)
    return found


def _first(
    source: WebDatasetSource, cache: FileCache, shards: Sequence[Shard], selections: Sequence[Selection | None]
) -> tuple[Shard, ShardIndex] | None:
    """The first shard of a split that holds samples, if any does."""
    mine = [shard for shard, which in zip(shards, selections, strict=True) if which is None or len(which)]
    with closing(source.index(cache, mine)) as found:
        return next(((shard, index) for shard, index in zip(mine, found, strict=True) if len(index)), None)


def _beside(source: WebDatasetSource, folder: EmbeddingFolder, looked_at: Sequence[tuple[Shard, ShardIndex]]) -> _Array:
    """The embeddings in a folder, after a look at the arrays of some shards."""
    for shard, index in looked_at:
        try:
            num_rows, _ = folder.check(shard.number)
        except DataError:
            continue  # its samples are left out, if there may be so many
        rows = index.last_digits(source.index_width)
        if not ((rows >= 0) & (rows < num_rows)).any():
            raise DataError(
                f"data.source: no sample of {shard.name} has a row in its array of {num_rows} {folder.kind} "
                f"embeddings; the first, {index.key(0)!r}, asks for row {rows[0]}. The last "
                f"data.source.index_width={source.index_width} characters of a key are its row."
            )
    problem = None
    for number in sorted(folder.numbers) if folder.dims is None else ():
        try:
            folder.check(number)
            break
        except DataError as error:
            problem = problem or error
    if folder.dims is None:
        raise problem or DataError(f"data.source: none of the shards has {folder.kind} embeddings.")
    return _Array("image_embed" if folder.kind == "image" else "text_encodings", folder.dims, folder)


def _numbers(shards: Sequence[Shard], kind: Kind) -> set[int]:
    """The numbers of the shards, by which arrays are found; each must be of one shard alone."""
    by_number: dict[int, Shard] = {}
    for shard in shards:
        if shard.number == NO_NUMBER:
            raise DataError(f"{shard.name}: has no number in its name, so its {kind} embeddings cannot be found.")
        if other := by_number.get(shard.number):
            raise DataError(
                f"{other.name} and {shard.name} are both shard {shard.number}, so their {kind} embeddings cannot be "
                "told apart. Use one folder of shards and one of embeddings for each run, or number the shards anew."
            )
        by_number[shard.number] = shard
    return set(by_number)


def _look(folder: EmbeddingFolder, number: int) -> tuple[int | None, str | None]:
    """Rows of a shard's array, and what is wrong with it; neither if it is elsewhere, and seen when it is read."""
    if number in folder.numbers and local_path(folder.places[number].url) is None:
        return None, None
    try:
        return folder.check(number)[0], None
    except DataError as error:
        return 0, str(error)


def _inside(kind: Kind, kinds: tuple[str, ...], cache: FileCache, shard: Shard, index: ShardIndex) -> _Array | None:
    """The embeddings in the shards, as the first sample of this one has them that has a whole one."""
    samples, which = np.nonzero(index.offsets[:, [KIND[k] for k in kinds]] >= 0)
    if not len(samples):
        return None
    opened, problem = OpenedShard(shard, index, cache), None
    ranks = {"image": {1: "image_embed"}, "text": {1: "text_embed", 2: "text_encodings"}}[kind]
    for sample, column in list(zip(samples.tolist(), which.tolist(), strict=True))[:MAX_TRIED]:
        name = opened.name(sample, kinds[column])
        try:
            array = parse_npy(opened.member(sample, kinds[column]), name)
        except DataError as error:
            problem = problem or error
            continue
        if array.ndim in ranks and array.size:
            return _Array(ranks[array.ndim], array.shape, kinds=kinds)
        wanted = "[dim]" if kind == "image" else "[dim] or [tokens, dim]"
        problem = problem or DataError(f"{name}: holds an array {list(array.shape)}, wanted {wanted}.")
    assert problem is not None
    raise problem


@dataclass(frozen=True)
class _Chosen:
    """Which samples of a shard can be asked for.

    Attributes:
        samples: their numbers in the index, int64; None means all.
        size: how many they are.
        left_out: how many others of the split there are, by reason.
        digest: of its index.
        problems: what is wrong with the shard or its arrays, one line each.
        num_classes: one more than the largest class in it.
        has_captions: whether any of them has a member for the caption.
    """

    samples: Selection | None
    size: int
    left_out: Mapping[str, int]
    digest: str
    problems: Sequence[str]
    num_classes: int
    has_captions: bool


def _choose(
    source: WebDatasetSource,
    shard: Shard,
    index: ShardIndex,
    which: Selection | None,
    arrays: Sequence[_Array],
    *,
    is_mine: bool,
) -> _Chosen:
    """What of a shard can be asked for; its damage counts if it `is_mine`, a shard of this split."""
    inside = np.ones(len(index), bool)
    if which is not None:
        inside[:] = False
        inside[which] = True
    left_out: Counter[str] = Counter()
    for reason, has in _requirements(source, shard, index, arrays) if inside.any() else ():
        missing = inside & ~has
        left_out[reason] += int(missing.sum())
        inside &= has
    if index.problem and is_mine:
        left_out["damaged_shard"] += 1  # at least one sample is lost; how many cannot be known
    samples = np.flatnonzero(inside)
    return _Chosen(
        samples=None if len(samples) == len(index) else samples,
        size=len(samples),
        left_out={reason: count for reason, count in left_out.items() if count},
        digest=index.digest,
        problems=_problems(shard, index, arrays) if is_mine else (),
        num_classes=int(index.labels.max(initial=-1)) + 1,
        has_captions=bool((index.offsets[samples, KIND[source.caption_kind]] >= 0).any()),
    )


def _problems(shard: Shard, index: ShardIndex, arrays: Sequence[_Array]) -> list[str]:
    """What is wrong with a shard or its arrays, one line each."""
    looked = [_look(array.folder, shard.number)[1] for array in arrays if array.folder and len(index)]
    return [problem for problem in [index.problem, *looked] if problem]


def _requirements(
    source: WebDatasetSource, shard: Shard, index: ShardIndex, arrays: Sequence[_Array]
) -> Iterable[tuple[str, NDArray[np.bool_]]]:
    """Reason to leave a sample out -> which samples need not be, in the order in which they are told."""
    yield "no_image", index.offsets[:, KIND["image"]] >= 0
    if source.captions == "required":
        yield "no_caption", index.offsets[:, KIND[source.caption_kind]] >= 0
    if source.labels:
        yield "no_label", index.labels >= 0
    for array in arrays:
        if array.folder is None:
            yield "no_embedding", np.any(index.offsets[:, [KIND[kind] for kind in array.kinds]] >= 0, axis=1)
            continue
        rows = index.last_digits(source.index_width)
        yield "no_row_in_key", rows >= 0
        _check_rows(source, shard, index, rows)
        num_rows, _ = _look(array.folder, shard.number)
        if num_rows == 0:
            yield "embedding_shard", np.zeros(len(index), bool)
        elif num_rows is not None:
            yield "no_embedding", rows < num_rows


def _check_rows(source: WebDatasetSource, shard: Shard, index: ShardIndex, rows: NDArray[np.int64]) -> None:
    """Refuse that two samples ask for one row: one of them would get another's embedding."""
    order = np.argsort(rows, kind="stable")
    same = np.flatnonzero((np.diff(rows[order]) == 0) & (rows[order][1:] >= 0))
    for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if index.key(first) != index.key(second):  # else it is the same sample twice
            raise DataError(
                f"{shard.name}: {index.key(first)!r} and {index.key(second)!r} both ask for row {rows[first]} of the "
                f"embeddings. The last data.source.index_width={source.index_width} characters of a key are its row: "
                "give as many as it has digits for it."
            )


class WebDatasetSamples:
    """The samples of a split, counted through its shards. Any of them can be read at any time, from any thread.

    Attributes:
        class_names: "0", "1", ... up to the largest class of all shards, or empty.
        has_captions: whether captions are read, and there are any.
        fingerprint: hash of the shards' members and of what decides which samples are used.
        shard_sizes, shard_names, left_out, array_shapes, notes: as in `ShardedSamples`.
        splits: split -> the shards that it has samples of.
    """

    def __init__(
        self,
        *,
        source: WebDatasetSource,
        cache: FileCache,
        shards: Sequence[Shard],
        chosen: Sequence[_Chosen],
        arrays: Sequence[_Array],
        splits: Mapping[str, list[str]],
        notes: Sequence[str],
    ) -> None:
        self.splits = splits
        self._source, self._cache, self._arrays = source, cache, arrays
        pairs = [(shard, c) for shard, c in zip(shards, chosen, strict=True) if c.size or c.left_out]
        self._shards, self._chosen = [shard for shard, _ in pairs], [c for _, c in pairs]
        self.shard_names = _distinct([shard.name for shard in self._shards])
        self.shard_sizes = [c.size for c in self._chosen]
        self.left_out = [c.left_out for c in self._chosen]
        self.array_shapes = {array.name: array.shape for array in arrays}
        self.problems = [problem for c in self._chosen for problem in c.problems]
        self.notes = [*notes, *_left_out_note(self.left_out, sum(self.shard_sizes)), *self.problems]
        self._ends = list(accumulate(self.shard_sizes))
        if not len(self):
            raise DataError(_nothing(source, splits[source.split], self.left_out, self.notes))
        num_classes = max(c.num_classes for c in chosen) if source.labels else 0
        if num_classes > MAX_CLASSES:
            name = next(s.name for s, c in zip(shards, chosen, strict=True) if c.num_classes > MAX_CLASSES)
            raise DataError(
                f"{name}: has class {num_classes - 1}, and the limit is {MAX_CLASSES} classes. Mend its .cls."
            )
        self.class_names = tuple(str(label) for label in range(num_classes))
        self.has_captions = source.captions != "off" and any(c.has_captions for c in chosen)
        in_shards = [kind for array in arrays for kind in array.kinds]
        caption = [source.caption_kind] if self.has_captions else []
        self._columns = tuple(KIND[kind] for kind in ("image", *caption, *in_shards))
        self.fingerprint = self._hash()
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, OpenedShard] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        """Shard, member, and the byte at which it begins."""
        shard, sample = self._find(index)
        with self._lock:
            opened = self._opened.get(shard)
        return self._shards[shard].member(opened.index if opened else self._index(shard), sample)

    def read(self, index: int) -> Sample:
        """One sample; its image is the bytes of the member.

        Raises:
            BadSample: if something of it cannot be read, or it has no embedding.
        """
        shard, sample = self._find(index)
        opened = self._open(shard)
        found = self._sample(opened, sample)
        opened.check_unchanged(sample)
        return found

    def read_together(self, indices: Sequence[int]) -> Mapping[int, Sample]:
        """Samples of few bytes, those that are neighbours with one look at the disk; as in `NeighbouringSamples`.

        Those of shards that are open: to open one may mean to fetch it, for which nobody should wait who must stop.
        """
        by_shard: dict[int, dict[int, int]] = {}
        for index in indices:
            shard, sample = self._find(index)
            by_shard.setdefault(shard, {})[sample] = index
        found: dict[int, Sample] = {}
        for shard, wanted in by_shard.items():
            opened = self._if_open(shard)
            if opened is None:
                continue
            samples = self._small_samples(opened, list(wanted))
            if opened.is_unchanged():
                found |= {wanted[sample]: content for sample, content in samples.items()}
        return found

    def _small_samples(self, opened: OpenedShard, samples: Sequence[int]) -> dict[int, Sample]:
        found: dict[int, Sample] = {}
        for run, content in opened.runs(samples, self._columns):
            for sample in run:
                with suppress(DataError):  # `read` will say it
                    found[sample] = self._sample(content, sample)
        return found

    def _sample(self, members: OpenedShard | Run, sample: int) -> Sample:
        image = members.member(sample, "image")
        arrays = {array.name: self._array(array, members, sample) for array in self._arrays}
        label = int(members.index.labels[sample]) if self._source.labels else None
        return Sample(image, members.name(sample), self._caption(members, sample), label, arrays)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch the files of these shards in the background, if they are elsewhere."""
        places = []
        for shard in shards:
            places.append(self._shards[shard].place)
            number = self._shards[shard].number
            folders = [array.folder for array in self._arrays if array.folder]
            places += [folder.places[number] for folder in folders if number in folder.places]
        self._cache.fetch_ahead(places)

    def close(self) -> None:
        """Stop what is being fetched, and let go of all files."""
        self._cache.close()
        with self._lock:
            self._opened.clear()

    def _find(self, index: int) -> tuple[int, int]:
        """Which shard, and which sample of its index."""
        shard = bisect_right(self._ends, index)
        chosen = self._chosen[shard]
        place = index - self._ends[shard] + chosen.size
        return shard, place if chosen.samples is None else int(chosen.samples[place])

    def _if_open(self, shard: int) -> OpenedShard | None:
        with self._lock:
            if shard in self._opened:
                self._opened.move_to_end(shard)
            return self._opened.get(shard)

    def _open(self, shard: int) -> OpenedShard:
        if opened := self._if_open(shard):
            return opened
        try:
            # both may fetch it: other shards must not wait for this one
            opened = OpenedShard(self._shards[shard], self._index(shard), self._cache)
        except DataError as error:
            name = self._shards[shard].name
            raise BadSample(name, "unreadable_shard", str(error).removeprefix(f"{name}: ")) from error
        with self._lock:
            self._opened[shard] = opened
            while len(self._opened) > MAX_OPEN:
                self._opened.popitem(last=False)
        return opened

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard, as it was when the shards were looked through."""
        index = next(self._source.index(self._cache, [self._shards[shard]]))
        if index.digest != self._chosen[shard].digest:
            place = self._shards[shard].place
            cure = "Leave shards as they are while a run reads them."
            if scheme_of(place.url) == "pipe":
                cure = "The command must give the same bytes each time it is run."
            raise DataError(f"{place.shown}: has changed since the run began. {cure}")
        return index

    def _array(self, array: _Array, opened: OpenedShard | Run, sample: int) -> NDArray[np.float32]:
        if array.folder is not None:
            row = int(opened.index.key(sample)[-self._source.index_width :])  # the index has seen that it is a number
            return array.folder.row(opened.shard.number, row)
        kind = next(kind for kind in array.kinds if opened.has(sample, kind))
        return _embedding(opened.member(sample, kind), opened.name(sample, kind), array.shape)

    def _caption(self, opened: OpenedShard | Run, sample: int) -> str | None:
        if not self.has_captions:
            return None
        kind = self._source.caption_kind
        if not opened.has(sample, kind):
            return ""
        data = opened.member(sample, kind, limit=MAX_TEXT_BYTES)
        caption = _text(data, partial(opened.name, sample, kind), self._source.caption_key)
        if not caption and self._source.captions == "required":
            raise BadSample(opened.name(sample, kind), "caption", "the caption is empty.")
        return caption

    def _hash(self) -> str:
        digest = blake2b(digest_size=16)
        source = self._source
        options = (
            source.captions,
            source.caption_key,
            source.labels,
            source.index_width,
            sorted(self.array_shapes.items()),
        )
        digest.update(repr(options).encode())
        for shard, chosen in zip(self._shards, self._chosen, strict=True):
            digest.update(f"{shard.number} {chosen.digest}".encode())
            digest.update(b"all" if chosen.samples is None else chosen.samples.tobytes())
        for array in self._arrays:
            if array.folder:
                digest.update(array.folder.fingerprint.encode())
        return digest.hexdigest()


def _left_out_note(left_out: Sequence[Mapping[str, int]], num_used: int) -> list[str]:
    """One line about what cannot be asked for, if there is anything."""
    reasons: Counter[str] = sum(map(Counter, left_out), Counter())
    if not reasons:
        return []
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return [f"{reasons.total()} of {reasons.total() + num_used} samples of the shards are left out: {said}."]


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as they are shown, which leave out queries and secrets, made different where they became equal."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _nothing(
    source: WebDatasetSource, shards: Sequence[str], left_out: Sequence[Mapping[str, int]], notes: Sequence[str]
) -> str:
    """What to say when a split has no sample that can be used."""
    if not shards:
        return f"data.source.split: {source.split} has no shards. Give it a share above 0 in data.source.splits."
    reasons: Counter[str] = sum(map(Counter, left_out), Counter())
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "they hold none"
    more = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
    told = f" {notes[0]}" if notes else ""
    return f"data.source: no sample of {shards[0]}{more} can be used for {source.split}: {why}.{told}"


def _embedding(data: bytes, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The array in a member.

    Raises:
        BadSample: reason "embedding", "no_embedding" or "not_finite".
    """
    try:
        array = parse_npy(data, name)
    except DataError as error:
        raise BadSample(name, "embedding", str(error).removeprefix(f"{name}: ")) from error
    if array.shape != shape:
        raise BadSample(name, "embedding", f"holds an array {list(array.shape)}, and others hold {list(shape)}.")
    return checked_row(array, name)


def _text(data: bytes, name: Callable[[], str], key: str | None) -> str:
    """A caption.

    Raises:
        BadSample: reason "caption".
    """
    try:
        text = data.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise BadSample(name(), "caption", f"is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    if key is None:
        return text.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(name(), "caption", f"is not JSON ({error}).") from error
    caption = value.get(key) if isinstance(value, dict) else 0
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise BadSample(name(), "caption", f"has no text {key!r} (data.source.caption_key).")
    return caption.strip()
