"""Source, order and transforms -> batches, from any position of a run."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclosion.config.schema import DataConfig
from eclosion.data.batch import Batch, Skip
from eclosion.data.images import decode_rgb
from eclosion.data.ledger import NOT_BAD, Shards, left_out_of_budget, over_budget
from eclosion.data.order import Order
from eclosion.data.source import KeyedSamples, NeighbouringSamples, Sample, Samples, ShardedSamples, array_shapes
from eclosion.data.transforms import Pixels, scale, transform_of
from eclosion.errors import BadSample, ConfigError, DataError, UserError
from eclosion.rng import generator, integer_seed

__all__ = ["Loader"]

# Steps that are got ready while the network works on one.
STEPS_AHEAD = 3
# Images that one thread reads in one go: few, so that one batch keeps all threads busy.
CHUNK = 16
# How long threads are waited for when reading ends.
CLOSE_SECONDS = 5.0
# The newest tasks of threads that are remembered: more than can be under way.
MAX_BEGUN = 4096


class _Ready(NamedTuple):
    """A sample after the part of the transforms that is the same each time; or one that no transform touches."""

    name: str
    image: Pixels
    caption: str
    label: int
    arrays: Mapping[str, NDArray[np.float32]]
    is_final: bool = False

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + sum(array.nbytes for array in self.arrays.values())


@dataclass
class _Chunk:
    """What belongs to some consecutive images, besides their pixels."""

    weights: list[float] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)


@dataclass(frozen=True)
class _Rows:
    """Where some consecutive images of a batch go: float32 [n, 3, H, W], and the same for what else they bring."""

    image: NDArray[np.float32]
    arrays: Mapping[str, NDArray[np.float32]]

    def __getitem__(self, cut: slice) -> "_Rows":
        return _Rows(self.image[cut], {name: rows[cut] for name, rows in self.arrays.items()})


# Starts a task now or in a thread; what it returns waits for the result.
_Submit = Callable[..., Callable[[], _Chunk]]
# Stands in the place of a sample that cannot be read.
NOTHING = _Ready("", np.zeros((3, 1, 1), np.float32), "", 0, {})


class Loader:
    """The batches of a run.

    Images stand at positions 0, 1, 2, ... of a run. Step k takes the next `batch_size` of them; of these, process r
    of W takes the r-th of W equal, contiguous parts, and cuts it in order into micro-batches. What stands at a
    position depends on (seed, position) alone, so that neither the number of processes, nor of threads, nor the
    size of a micro-batch, nor where a run was resumed changes any image. A step may reach over the end of an epoch.
    """

    def __init__(
        self,
        samples: Samples,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make a loader; nothing is read yet.

        Args:
            samples: an opened source.
            config: transforms, order, threads, memory and budget for bad images.
            seed: the run's seed.
            batch_size: images per optimizer step, over all processes.
            micro_batch_size: images per batch, at most; none means as many as a step has on this process.
            rank: which process this is.
            world_size: how many processes share a step.

        Raises:
            ConfigError: if the batch cannot be shared evenly, or an option of the transforms or the order is wrong.
            DataError: if shards hold more samples that cannot be used than `data.max_bad_fraction` allows.
        """
        self.samples, self.config, self.seed = samples, config, seed
        self.batch_size, self.rank = batch_size, rank
        self.share, self.micro_batch_size = _split(batch_size, micro_batch_size, world_size)
        self._sharded = samples if isinstance(samples, ShardedSamples) else None
        if self._sharded and (error := _left_out(self._sharded, config.max_bad_fraction)):
            raise error
        self.order = _order(samples, self._sharded, config, seed)
        self.transform = transform_of(config)
        self._keyed = samples if isinstance(samples, KeyedSamples) else None
        self._neighbouring = samples if isinstance(samples, NeighbouringSamples) else None
        # what a random reading gave once must not be given again
        self._cache = _Cache(0 if self._keyed else int(config.cache_gb * 2**30))

    @cached_property
    def shards(self) -> Shards | None:
        """Where samples lie, for the ledger; None if not in shards."""
        if self._sharded is None:
            return None
        once = self.config.resample is False  # what was left out of a shard that is drawn twice is not left out twice
        left_out = self._sharded.left_out if once else [{} for _ in self._sharded.left_out]
        return Shards(self._sharded.shard_names, left_out, self.order.shard_at, self.order.shard_counts)

    def steps(self, start: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of one step after the other, without end.

        Close the iterator to stop its threads.

        Args:
            start: the position of the first image of the first step: the run's `samples_seen`.

        Raises:
            DataError: if more images of an epoch are bad than `data.max_bad_fraction` allows.
        """
        starts = count(start + self.rank * self.share, self.batch_size)
        bad: dict[int, int] = {}  # epoch -> skipped so far
        ahead = _Ahead(self._sharded, self.order) if self._sharded else None
        with closing(self._read_ahead(starts)) as steps:
            for begin in count(start, self.batch_size):
                if ahead:
                    ahead.move_to(begin)
                step = next(steps)
                for batch in step:
                    self._check_budget(batch.skipped, bad)
                yield step

    def batch_at(self, positions: Sequence[int]) -> Batch:
        """The images at some positions, read now, in this thread.

        Bad samples have weight 0 and are never an error here.
        """
        return self._start(positions, _now)()

    def _read_ahead(self, starts: Iterator[int]) -> Generator[list[Batch], None, None]:
        if self.config.num_threads == 0 or self._keyed:
            for begin in starts:
                yield [batch() for batch in self._start_step(begin, _now)]
            return
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.config.num_threads, thread_name_prefix="eclosion-data")
        begun: deque[Future[_Chunk]] = deque(maxlen=MAX_BEGUN)
        start_step = partial(self._start_step, submit=partial(_in_thread, pool, stop, begun))
        try:
            ahead = deque(start_step(begin) for begin in islice(starts, STEPS_AHEAD))
            for begin in starts:
                step = [batch() for batch in ahead.popleft()]
                # only now: the threads then share the interpreter with the network, and not with this wait
                ahead.append(start_step(begin))
                yield step
        finally:
            stop.set()  # what is queued ends at once
            pool.shutdown(wait=False)
            # a thread may wait for a server, until the samples are closed
            running = [future for future in begun if future.running()]
            if not running or not wait(running, CLOSE_SECONDS).not_done:
                pool.shutdown()

    def _start_step(self, begin: int, submit: _Submit) -> list[Callable[[], Batch]]:
        cuts = range(begin, begin + self.share, self.micro_batch_size)
        return [self._start(range(cut, cut + self.micro_batch_size), submit) for cut in cuts]

    def _start(self, positions: Sequence[int], submit: _Submit) -> Callable[[], Batch]:
        """Begin to read a batch; the result waits for it, and raises what its reading raised."""
        shapes = array_shapes(self.samples)
        rows = _Rows(
            np.empty((len(positions), 3, *self.config.size), np.float32),
            {name: np.zeros((len(positions), *shape), np.float32) for name, shape in shapes.items()},
        )
        cuts = range(0, len(positions), CHUNK)
        chunks = [submit(self._fill, rows[cut : cut + CHUNK], positions[cut : cut + CHUNK]) for cut in cuts]
        return lambda: self._collate(positions, rows, [chunk() for chunk in chunks])

    def _collate(self, positions: Sequence[int], rows: _Rows, chunks: Sequence[_Chunk]) -> Batch:
        weight = torch.tensor([weight for chunk in chunks for weight in chunk.weights])
        fields: dict[str, Tensor | list[str]] = {"image": torch.from_numpy(rows.image)}
        fields |= {name: torch.from_numpy(array) for name, array in rows.arrays.items()}
        if self.samples.class_names:
            fields["label"] = torch.tensor([label for chunk in chunks for label in chunk.labels], dtype=torch.int64)
        if self.samples.has_captions:
            fields["caption"] = [caption for chunk in chunks for caption in chunk.captions]
        return Batch(positions, weight, fields, [skip for chunk in chunks for skip in chunk.skipped])

    def _fill(self, out: _Rows, positions: Sequence[int], stopped: Callable[[], bool]) -> _Chunk:
        """Read some images into their rows of a batch; runs in any thread."""
        chunk = _Chunk()
        eight_bit: list[int] = []
        indices = self.order.indices(positions).tolist()
        together = self._read_together(indices)
        for row, (position, index) in enumerate(zip(positions, indices, strict=True)):
            if stopped():
                return chunk
            try:
                ready = self._ready(index, position, together)
                pixels = self._augmented(ready, position)
                chunk.weights.append(1.0)
            except BadSample as error:
                ready, pixels = NOTHING, NOTHING.image
                chunk.weights.append(0.0)
                chunk.skipped.append(_skip(position, error))
            out.image[row] = pixels  # now, while they are near
            if pixels.dtype == np.uint8:
                eight_bit.append(row)
            for name, array in ready.arrays.items():
                out.arrays[name][row] = array
            chunk.captions.append(ready.caption)
            chunk.labels.append(ready.label)
        scale(out.image, eight_bit)
        return chunk

    def _augmented(self, ready: _Ready, position: int) -> Pixels:
        if ready.is_final or not self.transform.is_random:
            return ready.image
        return self.transform.augment(ready.image, generator(self.seed, "augment", position), ready.name)

    def _read_together(self, indices: Sequence[int]) -> Mapping[int, Sample]:
        """What can be had at less cost now than one by one later."""
        missing = [index for index in indices if self._cache.get(index) is None]
        return self._neighbouring.read_together(missing) if self._neighbouring and missing else {}

    def _ready(self, index: int, position: int, together: Mapping[int, Sample]) -> _Ready:
        ready = self._cache.get(index)
        if ready is None:
            try:
                ready = self._prepare(together.get(index) or self._read(index, position))
            except UserError:
                raise
            except Exception as error:
                error.add_note(
                    f"while reading sample {index}, {self.samples.name(index)}, at position {position} of the run"
                )
                raise
            self._cache.put(index, ready)
        return ready

    def _read(self, index: int, position: int) -> Sample:
        if self._keyed:
            return self._keyed.read_keyed(index, integer_seed(self.seed, "augment", position))
        return self.samples.read(index)

    def _prepare(self, sample: Sample) -> _Ready:
        image, caption, label = sample.image, sample.caption or "", sample.label or 0
        if not isinstance(image, Tensor):
            at_least = self.transform.at_least
            picture = decode_rgb(image, sample.name, at_least=at_least) if isinstance(image, bytes) else image
            return _Ready(sample.name, self.transform.prepare(picture, sample.name), caption, label, sample.arrays)
        height, width = self.config.size
        if tuple(image.shape) != (3, height, width):
            raise DataError(
                f"{sample.name}: is a tensor {list(image.shape)}, and data.image_size asks for [3, {height}, {width}]. "
                "Tensors are used as they are: resize them in the data set, or set data.image_size."
            )
        return _Ready(sample.name, image.numpy(), caption, label, sample.arrays, is_final=True)

    def _check_budget(self, skipped: Sequence[Skip], bad: dict[int, int]) -> None:
        for skip in skipped:
            epoch = skip.position // self.order.num_samples
            bad[epoch] = bad.get(epoch, 0) + (skip.reason not in NOT_BAD)
            error = over_budget(skip, bad[epoch], self.order.num_samples, self.config.max_bad_fraction, self.shards)
            if error:
                raise error


class _Ahead:
    """Tells a source in shards, as a run goes on, which of them it needs next."""

    def __init__(self, samples: ShardedSamples, order: Order) -> None:
        self._samples, self._order, self._told = samples, order, -1

    def move_to(self, position: int) -> None:
        """Say what is needed from a position on, if that is news."""
        shard = self._order.shard_at(position)
        if shard != self._told:
            self._told = shard
            # two windows, or all there are and those after them that come again first
            number = min(2 * self._order.window + 2, 2 * len(self._samples.shard_sizes))
            self._samples.fetch_ahead(list(dict.fromkeys(islice(self._order.shards_from(position), number))))


class _Cache:
    """Samples kept in memory, until they fill it; the first ones stay. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._kept: dict[int, _Ready] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> _Ready | None:
        return self._kept.get(index)

    def put(self, index: int, ready: _Ready) -> None:
        if not self._free_bytes:
            return
        with self._lock:
            if index in self._kept or ready.nbytes > self._free_bytes:
                return
            self._free_bytes -= ready.nbytes
            # nothing of what was cropped away, and row after row, as it will be read again and again
            self._kept[index] = ready._replace(image=_rows(ready.image))


def _rows(image: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(image)


def _left_out(samples: ShardedSamples, max_bad_fraction: float) -> DataError | None:
    num_samples = sum(samples.shard_sizes) + sum(sum(reasons.values()) for reasons in samples.left_out)
    return left_out_of_budget(samples.left_out, samples.shard_names, num_samples, max_bad_fraction, samples.problems)


def _order(samples: Samples, sharded: ShardedSamples | None, config: DataConfig, seed: int) -> Order:
    problems = []
    if config.resample and sharded is None:
        problems.append("data.resample draws shards at random, and this source has none. Use data.shuffle instead.")
    if config.resample and config.shuffle:
        problems.append(
            "data.resample and data.shuffle exclude each other: shards are drawn at random, or each is visited once in "
            "a random order. Set data.shuffle=false, or data.resample=false."
        )
    if config.resample and config.epoch_samples is None:
        problems.append("data.resample has no end of its own. Say how many samples an epoch has: data.epoch_samples.")
    if config.epoch_samples is not None and not config.resample:
        problems.append("data.epoch_samples is for data.resample; without it an epoch is every sample once. Remove it.")
    if problems:
        raise ConfigError(problems)
    return Order(
        sharded.shard_sizes if sharded else [len(samples)],
        seed=seed,
        shuffle=config.shuffle,
        window=config.shuffle_window if sharded else 1,
        resampled=config.epoch_samples if config.resample else None,
    )


def _split(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Images of a step on each process, and of a micro-batch."""
    share, rest = divmod(batch_size, world_size)
    if rest:
        near = sorted({max(1, share) * world_size, (share + 1) * world_size})
        raise ConfigError(
            f"train.batch_size: {batch_size} images cannot be shared evenly by {world_size} processes. "
            f"Use a multiple of {world_size}, such as {' or '.join(map(str, near))}."
        )
    micro = min(micro_batch_size or share, share)
    if share % micro:
        fits = [str(n) for n in range(1, share + 1) if share % n == 0]
        whose = (
            f"each of {world_size} processes has {share} of the {batch_size}"
            if world_size > 1
            else f"a step has {share}"
        )
        raise ConfigError(
            f"train.micro_batch_size: {micro} does not divide the images of a step ({whose}). "
            f"Use one of {', '.join(fits)}."
        )
    return share, micro


def _skip(position: int, error: BadSample) -> Skip:
    return Skip(position, error.name, error.reason, str(error).removeprefix(f"{error.name}: "))


def _now(task: Callable[..., _Chunk], *args: object) -> Callable[[], _Chunk]:
    return partial(task, *args, lambda: False)


def _in_thread(
    pool: ThreadPoolExecutor,
    stop: threading.Event,
    begun: deque[Future[_Chunk]],
    task: Callable[..., _Chunk],
    *args: object,
) -> Callable[[], _Chunk]:
    future = pool.submit(task, *args, stop.is_set)
    begun.append(future)
    return future.result
