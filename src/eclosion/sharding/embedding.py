"""From any source to arrays of image embeddings, as shards pair with them.

    embeddings.json        what was asked for; when all is done, also what each array holds
    img_emb_00000.npy      float32 (rows, dim); a row of zeros means that there is no embedding

Of webdataset shards, whatever their splits, there is one array for each, with its number, and the number at the end of
a sample's key is its row: what `img_embeddings_url` reads. Of any other source, the rows follow one another as its
samples do, `rows_per_array` of them in each array: what `eclosion shard --image-embeddings` takes.

Each array is written aside, made durable, and renamed. Which stand is kept on disk, and a later call goes on from
there.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclosion.checkpoint.disk import make_folder
from eclosion.checkpoint.lock import RunLock
from eclosion.config.explain import checked
from eclosion.data.embedding_record import FILE
from eclosion.data.images import decode, to_rgb
from eclosion.data.source import Samples, Source
from eclosion.data.transforms import check_pixels, to_float
from eclosion.device import pick_device
from eclosion.errors import BadSample, ConfigError, DataError, printable
from eclosion.models.image_encoder import ImageEncoder
from eclosion.registry import dump, resolve
from eclosion.rundir import RunDir
from eclosion.sharding.disk import aside, make_durable, publish, writing
from eclosion.sharding.images import DETAILS, Array, Images, Read, images_of
from eclosion.sharding.record import Finished, Record

__all__ = ["OnImage", "WrittenEmbeddings", "embed"]

# Called with how many images are done, and of how many.
OnImage = Callable[[int, int], None]

# Batches of images that are read ahead.
BATCHES_AHEAD = 3


@dataclass(frozen=True)
class WrittenEmbeddings:
    """What a folder of arrays holds.

    Attributes:
        folder: where they are.
        num_arrays: how many.
        num_rows: rows in them, those of zeros included.
        num_embedded: rows that hold an embedding.
        dim: numbers in each.
        mean_norm: mean length of the embeddings; 0 if there are none.
        fingerprint: of the encoder.
        skipped: samples without embedding, by reason.
    """

    folder: Path
    num_arrays: int
    num_rows: int
    num_embedded: int
    dim: int
    mean_norm: float
    fingerprint: str
    skipped: Mapping[str, int]


def embed(
    source: Source | Samples,
    out: str | Path,
    *,
    encoder: Any,
    rows_per_array: int = 1000,
    batch_size: int = 64,
    device: str = "auto",
    max_bad_fraction: float = 0.0,
    num_workers: int = 2,
    on_image: OnImage | None = None,
) -> WrittenEmbeddings:
    """Write the embedding of every image of a source, in arrays that shards pair with.

    Images are seen whole, at the size that the source has them, in RGB on white. A call that was stopped goes on with
    what is missing; when nothing is, it does nothing.

    Args:
        source: a source, or one that is open. Of webdataset shards all are taken, in whatever split they are.
        out: the folder to write; new, empty, or begun by an equal call.
        encoder: the name of an encoder, a mapping of its name and options, the part, or what that builds.
        rows_per_array: rows in each array of a source that is not in shards.
        batch_size: images that go through the encoder at once; what comes out does not depend on it.
        device: "auto", "cpu", "cuda" or "mps".
        max_bad_fraction: share of the samples that may be left without embedding because they cannot be read.
        num_workers: threads that read and resize images.
        on_image: told how many images are done, at the start and after each batch.

    Raises:
        ConfigError: if an option is wrong, or the folder holds something else.
        DataError: if more images cannot be read than may be, or shards do not say which row is whose.
        EnvironmentProblem: if the folder cannot be written, the encoder is not there, or another process writes.
    """
    for name, value in (("rows_per_array", rows_per_array), ("batch_size", batch_size), ("num_workers", num_workers)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, and must be at least 1.")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction is {max_bad_fraction:g}, and must be from 0 to 1.")
    described, build = _encoder(encoder)
    images = images_of(source, rows_per_array)
    with closing(images):
        made = build().to(pick_device(device))
        plan = _Plan(images, Path(out).expanduser(), described, made, max_bad_fraction)
        with writing(plan.out):
            plan.record.check()
            done = plan.record.kept(plan.is_whole)
        plan.count_bad(done)
        if len(done) < len(images.arrays) or plan.record.aside.exists():
            done = _write(plan, batch_size, num_workers, on_image or (lambda done, total: None))
    return _summary(plan, [done[array.place] for array in images.arrays])


def _encoder(given: Any) -> tuple[Mapping[str, Any], Callable[[], ImageEncoder]]:
    """What a config calls an encoder, and what gives it."""
    if isinstance(given, ImageEncoder):
        return {}, lambda: given
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        options = dict(given)
        given = checked(resolve("encoders", str(options.pop("name", ""))), options)
    return dump(given), given.build


@dataclass
class _Embedded(Finished):
    """What a finished array holds.

    Attributes:
        sum_of_norms: of its embeddings.
    """

    sum_of_norms: float = 0.0


class _Plan:
    """What is to be written, and where."""

    def __init__(
        self,
        images: Images,
        out: Path,
        described: Mapping[str, Any],
        encoder: ImageEncoder,
        max_bad_fraction: float,
    ) -> None:
        self.images, self.out, self.encoder = images, out, encoder
        self.record = Record(
            out,
            {
                "encoder": encoder.fingerprint,
                "dim": encoder.dim,
                "source": images.fingerprint,
                "order": images.order,
                **images.layout,
            },
            of=_Embedded,
            what="arrays",
            manifest=FILE,
            told={"encoder": described},
        )
        self.num_images = sum(array.num_images for array in images.arrays)
        self._num_samples = self.num_images + sum(len(array.lost) for array in images.arrays)
        self._max_bad_fraction, self._num_bad = max_bad_fraction, 0

    def count_bad(self, done: Mapping[int, Finished]) -> None:
        """Begin to count what has no embedding: in arrays that stand, and what the others are known to lack.

        Raises:
            DataError: if that is too much already.
        """
        self._num_bad = 0
        for array in self.images.arrays:
            for sample in done[array.place].skipped if array.place in done else array.lost:
                self.add_bad(sample["name"], sample["reason"], DETAILS.get(sample["reason"], "it has no embedding."))

    def add_bad(self, name: str, reason: str, detail: str) -> None:
        """Count a sample that has none.

        Raises:
            DataError: if it is one too many.
        """
        self._num_bad += 1
        allowed = int(self._max_bad_fraction * self._num_samples + 1e-6)  # 0.29 of 100 is 28.999999999999996
        if self._num_bad > allowed:
            raise DataError(
                f"{name}: {detail} ({reason}) That makes {self._num_bad} of {self._num_samples} samples without "
                f"embedding, and max_bad_fraction={self._max_bad_fraction:g} allows {allowed}. Repair or remove the "
                "sample, or raise max_bad_fraction."
            )

    def is_whole(self, embedded: Finished) -> bool:
        """Whether the file of an array that was finished once is as long as it was."""
        if not 0 <= embedded.shard < len(self.images.arrays):
            return False
        path = self.out / self.images.arrays[embedded.shard].file
        return path.is_file() and path.stat().st_size == embedded.num_bytes


def _summary(plan: _Plan, done: Sequence[_Embedded]) -> WrittenEmbeddings:
    num_embedded = sum(each.num_samples for each in done)
    skipped = Counter(sample["reason"] for each in done for sample in each.skipped)
    return WrittenEmbeddings(
        folder=plan.out,
        num_arrays=len(done),
        num_rows=sum(array.num_rows for array in plan.images.arrays),
        num_embedded=num_embedded,
        dim=plan.encoder.dim,
        mean_norm=sum(each.sum_of_norms for each in done) / max(num_embedded, 1),
        fingerprint=plan.encoder.fingerprint,
        skipped=dict(sorted(skipped.items())),
    )


def _write(plan: _Plan, batch_size: int, num_workers: int, on_image: OnImage) -> dict[int, _Embedded]:
    """Write the arrays that are missing; all of them, by place."""
    with writing(plan.record.aside):
        make_folder(plan.record.aside)
    with RunLock(RunDir(plan.record.aside)):
        plan.record.check()  # another call may have been faster
        done = plan.record.kept(plan.is_whole)
        plan.count_bad(done)
        plan.record.begin(done.values())
        todo = [array for array in plan.images.arrays if array.place not in done]
        count = _Count(on_image, plan.num_images, plan.num_images - sum(array.num_images for array in todo))
        with closing(_prepared(plan, todo, num_workers, BATCHES_AHEAD * batch_size)) as inputs:
            for array in todo:
                done[array.place] = _write_array(plan, array, inputs, batch_size, count)
        plan.record.finish([done[array.place] for array in plan.images.arrays])
    return done


@dataclass
class _Count:
    """Tells how many images are done."""

    on_image: OnImage
    total: int
    done: int

    def __post_init__(self) -> None:
        self.on_image(self.done, self.total)

    def add(self, number: int) -> None:
        """So many more are."""
        self.done += number
        self.on_image(self.done, self.total)


@dataclass(frozen=True)
class _Input:
    """An image as the network sees it.

    Attributes:
        row: of the array.
        key: of the sample.
        name: of its file or member.
        pixels: float32 [3, h, w]; or why there are none.
    """

    row: int
    key: str
    name: str
    pixels: Tensor | BadSample


def _prepared(plan: _Plan, arrays: Sequence[Array], num_workers: int, ahead: int) -> Generator[_Input, None, None]:
    """The images of some arrays in their order, read in threads. Close the iterator to stop them."""
    with ThreadPoolExecutor(num_workers, thread_name_prefix="eclosion-embed") as pool:
        try:
            waiting: deque[Future[_Input]] = deque()
            for array in arrays:
                for row, key, read in plan.images.of(array):
                    waiting.append(pool.submit(_prepare, plan.encoder, row, key, read))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(encoder: ImageEncoder, row: int, key: str, read: Read) -> _Input:
    try:
        sample = read()
        pixels = _pixels(sample.image, sample.name)
        preprocess = encoder.preprocess
        height, width = pixels.shape[1:]
        check_pixels((height, width), preprocess.resized(height, width), sample.name)
        return _Input(row, key, sample.name, preprocess(pixels[None])[0])
    except BadSample as error:
        return _Input(row, key, error.name, error)
    except Exception as error:
        error.add_note(f"while reading sample {key}")
        raise


def _pixels(image: Any, name: str) -> Tensor:
    """An image as a source holds it as float32 [3, H, W] in [-1, 1]."""
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        return image.float()
    if isinstance(image, Tensor):
        levels = image.numpy()
    else:
        picture = decode(image, name) if isinstance(image, bytes) else image
        levels = np.asarray(to_rgb(picture, name=name)).transpose(2, 0, 1)
    out = np.empty((1, *levels.shape), np.float32)
    to_float([levels], out)
    return torch.from_numpy(out[0])


def _write_array(plan: _Plan, array: Array, inputs: Iterator[_Input], batch_size: int, count: _Count) -> _Embedded:
    """Write one array aside, and put it in its place."""
    rows = np.zeros((array.num_rows, plan.encoder.dim), "<f4")
    embedded = _Embedded(array.place, skipped=list(array.lost))
    for start in range(0, array.num_images, batch_size):
        batch = [next(inputs) for _ in range(min(batch_size, array.num_images - start))]
        _embed_batch(plan, batch, rows, embedded)
        count.add(len(batch))
    folder, path = plan.record.aside, plan.out / array.file
    with aside(folder, path) as file:
        with writing(path):
            np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
            embedded.num_bytes = file.tell()
            make_durable(file)
        plan.record.append(embedded)
        publish(folder, path)
    return embedded


def _embed_batch(plan: _Plan, batch: Sequence[_Input], rows: NDArray[np.float32], embedded: _Embedded) -> None:
    """Embed some images, each into its row."""
    good = [(each, each.pixels) for each in batch if isinstance(each.pixels, Tensor)]
    if good:
        device = next(plan.encoder.net.parameters()).device
        made = plan.encoder.encode(torch.stack([pixels for _, pixels in good]).to(device)).cpu().numpy()
    bad = [(each, each.pixels) for each in batch if isinstance(each.pixels, BadSample)]
    for (each, _), row in zip(good, made if good else (), strict=True):
        if np.isfinite(row).all() and row.any():
            rows[each.row] = row
            embedded.num_samples += 1
            embedded.sum_of_norms += float(np.linalg.norm(row.astype(np.float64)))
        else:
            bad.append((each, BadSample(each.name, "not_finite", "its embedding is all zero, or not finite.")))
    for each, error in bad:
        plan.add_bad(error.name, error.reason, str(error).removeprefix(f"{error.name}: "))
        embedded.skipped.append({"key": printable(each.key), "name": printable(error.name), "reason": error.reason})
