"""From any source to webdataset shards, with arrays of embeddings beside them.

    shards.json                  what was asked for; when all is done, also what each shard holds
    00000.tar                    one sample after the other: <key>.png, <key>.txt, <key>.cls, <key>.json
    img_emb/img_emb_00000.npy    row i belongs to sample i of 00000.tar
    img_emb/embeddings.json      which encoder made them, if `eclosion embed` said so
    text_emb/text_emb_00000.npy

    key = number of the shard (5 digits) + place in the shard (4 digits); more digits where they are needed

Equal samples give equal bytes. A sample that is left out leaves a gap in the keys and a row of zeros, so that a key
still names its row.

Each file is written aside, made durable, and renamed; the arrays of a shard before its tar, so that a tar never stands
without them. Which shards stand is kept on disk, and a later call goes on from there.
"""

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eclosion.checkpoint.disk import make_folder
from eclosion.checkpoint.lock import RunLock
from eclosion.data.embedding_record import FILE, EmbeddingRecord, as_text, of_shards, read_record
from eclosion.data.folder import FolderSamples
from eclosion.data.images import decode, to_rgb
from eclosion.data.ledger import left_out_of_budget
from eclosion.data.source import KeyedSamples, Sample, Samples, ShardedSamples, Source
from eclosion.errors import BadSample, ConfigError, DataError, printable
from eclosion.rundir import RunDir
from eclosion.sampling import to_uint8
from eclosion.sharding.disk import aside, make_durable, publish, replace, writing
from eclosion.sharding.record import Finished, Record
from eclosion.sharding.rows import ARRAYS, Rows, find_rows

__all__ = ["OnShard", "WrittenShards", "shard"]

# Called with how many shards are done, and of how many.
OnShard = Callable[[int, int], None]

# Digits in a key, unless more are needed.
SHARD_WIDTH, INDEX_WIDTH = 5, 4
# First bytes of an image file -> its suffix, for the formats that `eclosion.data.images` reads.
SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


@dataclass(frozen=True)
class WrittenShards:
    """What a folder of shards holds.

    Attributes:
        folder: where they are.
        num_shards: how many.
        num_samples: samples in them.
        skipped: samples of the source that were left out, by reason.
    """

    folder: Path
    num_shards: int
    num_samples: int
    skipped: Mapping[str, int]


def shard(
    source: Source | Samples,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    image_embeddings: str | Path | None = None,
    text_embeddings: str | Path | None = None,
    skip_bad: bool = False,
    num_workers: int = 2,
    on_shard: OnShard | None = None,
) -> WrittenShards:
    """Write the samples of a source as webdataset shards, in their order.

    Image files are copied as they are, after they were decoded to see that they are whole; pictures that have no file
    become PNG, in eight-bit RGB, on white where they are transparent. A call that was stopped goes on with what is
    missing; when nothing is, it does nothing.

    Args:
        source: a source, or one that is open, such as `TorchDatasetSamples(dataset)`.
        out: the folder to write; new, empty, or begun by an equal call.
        samples_per_shard: samples in each shard; the last may have fewer.
        image_embeddings: a .npy file (samples, dim) with a row for each sample of the source, in its order; or a
            folder of files NAME_<digits>.npy, whose rows follow one another in the order of their numbers. None: what
            the source brings itself, if anything.
        text_embeddings: the same, (samples, tokens, dim).
        skip_bad: whether a sample that cannot be read is left out and counted; else it is an error.
        num_workers: threads, each at work on a shard of its own.
        on_shard: told how many shards are done, at the start and after each.

    Raises:
        ConfigError: if an option is wrong, or the folder holds something else.
        DataError: if a sample cannot be read, or embeddings do not go with the samples.
        EnvironmentProblem: if the folder cannot be written, or another process writes to it.
    """
    for name, value in (("samples_per_shard", samples_per_shard), ("num_workers", num_workers)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, and must be at least 1.")
    given = {"img_emb": image_embeddings, "text_emb": text_embeddings}
    samples: Samples = source.open() if hasattr(source, "open") else source
    try:
        if isinstance(samples, ShardedSamples) and not skip_bad:
            _refuse_left_out(samples)
        rows = find_rows(samples, {name: None if path is None else Path(path) for name, path in given.items()})
        made_by = None if image_embeddings is None else read_record(Path(image_embeddings).expanduser())
        plan = _Plan(samples, Path(out).expanduser(), samples_per_shard, rows, skip_bad, made_by)
        with writing(plan.out):
            plan.record.check()
            done = plan.record.kept(plan.is_whole)
        if not skip_bad:
            _refuse_gaps(done.values())
        if len(done) < plan.num_shards or plan.record.aside.exists():
            done = _write(plan, num_workers, on_shard or (lambda done, total: None))
        skipped = Counter(sample["reason"] for shard in done.values() for sample in shard.skipped)
        for reasons in samples.left_out if isinstance(samples, ShardedSamples) else ():
            skipped.update(reasons)
        num_samples = sum(shard.num_samples for shard in done.values())
        return WrittenShards(plan.out, plan.num_shards, num_samples, dict(sorted(skipped.items())))
    finally:
        if isinstance(samples, ShardedSamples) and samples is not source:
            samples.close()


class _Plan:
    """What is to be written, and where."""

    def __init__(
        self,
        samples: Samples,
        out: Path,
        samples_per_shard: int,
        rows: Mapping[str, Rows],
        skip_bad: bool,
        made_by: EmbeddingRecord | None,
    ) -> None:
        if len(samples) == 0:
            raise DataError("The source has no samples, so there are no shards to write.")
        self.samples, self.out, self.samples_per_shard = samples, out, samples_per_shard
        self.rows, self.skip_bad, self.made_by = rows, skip_bad, made_by
        self.num_shards = -(-len(samples) // samples_per_shard)
        self.record = Record(
            out,
            {
                "source": samples.fingerprint,
                "samples": len(samples),
                "samples_per_shard": samples_per_shard,
                **{name: rows[name].digest if name in rows else None for name in ARRAYS},
            },
            of=Finished,
        )
        self._shard_width = max(SHARD_WIDTH, len(str(self.num_shards - 1)))
        self._index_width = max(INDEX_WIDTH, len(str(samples_per_shard - 1)))
        self._one_at_a_time = threading.Lock() if isinstance(samples, KeyedSamples) else None

    def indices(self, number: int) -> range:
        """The samples of a shard."""
        first = number * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, len(self.samples)))

    def key(self, index: int) -> str:
        """The key of a sample."""
        number, place = divmod(index, self.samples_per_shard)
        return f"{number:0{self._shard_width}d}{place:0{self._index_width}d}"

    def tar(self, number: int) -> Path:
        """The file of a shard."""
        return self.out / f"{number:0{self._shard_width}d}.tar"

    def array(self, number: int, name: str) -> Path:
        """The file of an array; `name` is one of `ARRAYS`."""
        return self.out / name / f"{name}_{number:0{self._shard_width}d}.npy"

    def array_header(self, number: int, name: str) -> bytes:
        """What stands before the rows of an array."""
        rows, file = self.rows[name], io.BytesIO()
        shape = (len(self.indices(number)), *rows.dims)
        descr = np.lib.format.dtype_to_descr(rows.dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        return file.getvalue()

    def row_bytes(self, name: str) -> int:
        """Length of a row."""
        return prod(self.rows[name].dims) * self.rows[name].dtype.itemsize

    def is_whole(self, shard: Finished) -> bool:
        """Whether all files of a shard that was finished once are as long as they were."""
        if not 0 <= shard.shard < self.num_shards:
            return False
        lengths = {self.tar(shard.shard): shard.num_bytes}
        for name in self.rows:
            header = len(self.array_header(shard.shard, name))
            lengths[self.array(shard.shard, name)] = header + len(self.indices(shard.shard)) * self.row_bytes(name)
        return all(path.is_file() and path.stat().st_size == length for path, length in lengths.items())

    def read(self, index: int) -> Sample:
        """A sample of the source."""
        if self._one_at_a_time is None:
            return self.samples.read(index)
        with self._one_at_a_time:
            return self.samples.read(index)


def _write(plan: _Plan, num_workers: int, on_shard: OnShard) -> dict[int, Finished]:
    """Write the shards that are missing; all of them, by number."""
    with writing(plan.record.aside):
        make_folder(plan.record.aside)
    with RunLock(RunDir(plan.record.aside)):
        plan.record.check()  # another call may have been faster
        done = plan.record.kept(plan.is_whole)
        plan.record.begin(done.values())
        with writing(plan.out):
            for name in plan.rows:
                make_folder(plan.out / name)
        todo = [number for number in range(plan.num_shards) if number not in done]
        on_shard(len(done), plan.num_shards)
        with closing(_in_threads(plan, todo, num_workers)) as shards:
            for shard in shards:
                done[shard.shard] = shard
                on_shard(len(done), plan.num_shards)
        if plan.made_by:
            folder = plan.out / "img_emb"
            replace(folder / FILE, as_text(of_shards(plan.made_by, plan.samples.fingerprint)), plan.record.aside)
        plan.record.finish(
            [done[number] for number in range(plan.num_shards)], class_names=list(plan.samples.class_names)
        )
    return done


def _refuse_left_out(samples: ShardedSamples) -> None:
    """Refuse to leave out in silence what cannot be read of shards."""
    num_samples = sum(samples.shard_sizes) + sum(sum(reasons.values()) for reasons in samples.left_out)
    error = left_out_of_budget(samples.left_out, samples.shard_names, num_samples, 0.0, samples.problems)
    if error:
        raise DataError(
            f"{str(error).partition(', and data.max_bad_fraction')[0]}. Repair them, or leave them out with skip_bad."
        )


def _refuse_gaps(done: Iterable[Finished]) -> None:
    for sample in (sample for shard in done for sample in shard.skipped):
        raise DataError(
            f"{sample['name']}: was left out of the shards that stand already ({sample['reason']}), and now a bad "
            "sample is an error. Go on with skip_bad, or use a new folder."
        )


class _Stopped(Exception):
    """Another shard failed, or the caller gave up."""


def _in_threads(plan: _Plan, todo: Sequence[int], num_workers: int) -> Generator[Finished, None, None]:
    """Write shards; each is given as soon as it stands. Close the iterator to stop the threads."""
    stop, one_writes = threading.Event(), threading.Lock()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="eclosion-shard") as pool:
        try:
            waiting = [pool.submit(_write_shard, plan, number, stop.is_set, one_writes) for number in todo]
            for shard in as_completed(waiting):
                yield shard.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _write_shard(plan: _Plan, number: int, stopped: Callable[[], bool], one_writes: threading.Lock) -> Finished:
    """Write one shard and its arrays aside, and put them in their places."""
    folder, path = plan.record.aside, plan.tar(number)
    arrays = {name: plan.array(number, name) for name in plan.rows}
    shard = Finished(number)
    with ExitStack() as stack:
        files = {each: stack.enter_context(aside(folder, each)) for each in (*arrays.values(), path)}
        tar = tarfile.TarFile(path.name, "w", files[path], format=tarfile.USTAR_FORMAT)
        for name, array in arrays.items():
            with writing(array):
                files[array].write(plan.array_header(number, name))
        for index in plan.indices(number):
            if stopped():
                raise _Stopped
            members, rows = _content(plan, index, shard)
            with writing(path):
                for suffix, content in members.items():
                    _add(tar, f"{plan.key(index)}.{suffix}", content)
            for name, array in arrays.items():
                with writing(array):
                    files[array].write(rows[name])
        with writing(path):
            tar.close()
            shard.num_bytes = files[path].tell()
        for each, file in files.items():
            with writing(each):
                make_durable(file)
        for array in arrays.values():
            publish(folder, array)
        with one_writes:
            plan.record.append(shard)
        publish(folder, path)
    return shard


def _content(plan: _Plan, index: int, shard: Finished) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The members of a sample by suffix, and its row of each array; of one that is left out none, and zeros."""
    try:
        sample = plan.read(index)
        members = _members(plan.samples, sample, index)
    except BadSample as error:
        if not plan.skip_bad:
            raise DataError(
                f"{error} Repair or remove this sample, or leave such samples out with skip_bad."
            ) from error
        shard.skipped.append({"key": plan.key(index), "name": printable(error.name), "reason": error.reason})
        return {}, {name: bytes(plan.row_bytes(name)) for name in plan.rows}
    except Exception as error:
        error.add_note(f"while reading sample {index}, {plan.samples.name(index)}")
        raise
    shard.num_samples += 1
    return members, {name: _bytes(rows.row(index, sample), rows.dtype) for name, rows in plan.rows.items()}


def _bytes(row: "np.ndarray[Any, Any]", dtype: "np.dtype[Any]") -> bytes:
    return row.astype(dtype, copy=False).tobytes()


def _members(samples: Samples, sample: Sample, index: int) -> dict[str, bytes]:
    """The files of a sample by suffix."""
    suffix, image = _image(sample)
    members = {suffix: image}
    if samples.has_captions and sample.caption is not None:
        try:
            members["txt"] = sample.caption.encode()
        except UnicodeEncodeError as error:
            raise BadSample(
                sample.name, "caption", f"its caption cannot be written as UTF-8 (character {error.start})."
            ) from error
    if samples.class_names and sample.label is not None:
        members["cls"] = str(sample.label).encode()
    # without the root of a folder: equal data gives equal bytes wherever it lies
    name = printable(samples.names[index]) if isinstance(samples, FolderSamples) else sample.name
    members["json"] = json.dumps({"name": name}).encode()
    return members


def _image(sample: Sample) -> tuple[str, bytes]:
    """An image as suffix and content of a file."""
    image = sample.image
    if isinstance(image, bytes):
        decode(image, sample.name)
        return next(suffix for start, suffix in SUFFIXES.items() if image.startswith(start)), image
    if isinstance(image, Tensor):
        pixels = image.permute(1, 2, 0).numpy() if image.dtype == torch.uint8 else to_uint8(image[None])[0]
        image = Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    to_rgb(image, name=sample.name).save(file, "PNG")
    return "png", file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 0644, and no time or owner
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
