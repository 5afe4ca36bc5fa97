"""Images through an encoder, once: sums over all of them, and the features of some.

A million images have more features than fit into memory. So sums are kept of all, and rows of those that were chosen
beforehand. Sums are over blocks of images, added in their order, each on one thread: the same bits for any batch size,
any number of processes, and after a stop.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclosion.data.transforms import to_float
from eclosion.errors import DataError, EnvironmentProblem, UserError
from eclosion.evaluation.images import Images, Workers
from eclosion.evaluation.sealed import Unsealed, read_sealed, text_of, text_tensor, write_sealed
from eclosion.evaluation.statistics import SUFFIX, device_of
from eclosion.metrics.metric import Moments, Reference
from eclosion.models.image_encoder import ImageEncoder

__all__ = ["Progress", "collect", "each", "led"]

T = TypeVar("T")
# What some work gave; or what is wrong, and the exit code.
Outcome = tuple[T | None, str | None, int]

# Images whose sums are made together; part of every result, as a sum depends on its order.
BLOCK = 256
# How often what is done is written down.
SAVE_SECONDS = 10.0
# How much longer than a save the work between two saves takes at least.
SAVE_RATIO = 20.0
SUMS = f"sums{SUFFIX}"


class _Sums:
    """What is known after the first images; only the leader has it.

    Attributes:
        chosen: numbers of the images whose features are kept, ascending.
        moments: over whole blocks; they change as images are added.
        rows, names: of the chosen among the images in `moments`, block by block.
    """

    def __init__(self, chosen: NDArray[np.int64], moments: Moments) -> None:
        self.chosen, self.moments = chosen, moments
        self.rows: list[Tensor] = []
        self.names: list[Sequence[str]] = []
        # As large as they will ever be: to allocate anew for each block would tear the heap to pieces.
        self._block = torch.empty(BLOCK, len(moments.total))
        self._exact = torch.empty_like(self._block, dtype=torch.float64)
        self._product = torch.empty_like(moments.outer)
        self._names: list[str] = []

    def add(self, features: Tensor, names: Sequence[str]) -> None:
        """The next images: float32 [B, D]."""
        while names:
            filled = len(self._names)
            number = min(BLOCK - filled, len(names))
            self._block[filled : filled + number] = features[:number]
            self._names += names[:number]
            features, names = features[number:], names[number:]
            if len(self._names) == BLOCK:
                self._sum()

    def finish(self) -> None:
        """All images were added; the last block may be short."""
        if self._names:
            self._sum()

    def _sum(self) -> None:
        count, first = len(self._names), self.moments.count
        which = self.chosen[slice(*np.searchsorted(self.chosen, [first, first + count]))] - first
        self.rows.append(self._block[torch.from_numpy(which)])
        self.names.append([self._names[i] for i in which.tolist()])
        exact = self._exact[:count].copy_(self._block[:count])
        with _one_thread():
            self.moments.total.add_(exact.sum(0))
            self.moments.outer.add_(torch.mm(exact.T, exact, out=self._product))
        self.moments = Moments(first + count, self.moments.total, self.moments.outer)
        self._names = []


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch's sums in this thread not depend on how many threads there are."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


class Progress:
    """What was collected so far, on disk, for an equal call to go on from.

        sums.safetensors            over the images of so many pieces
        rows-00000.safetensors      a piece: features and names of the chosen images among the next ones

    A piece is written before the sums that count it. What cannot be used, for whatever reason, is made again.
    """

    def __init__(self, folder: Path, asked: str) -> None:
        """Nothing is read or written yet.

        Args:
            folder: where; only one process may use it.
            asked: what must be equal for it to be of use.
        """
        self._folder, self._asked = folder, asked
        self._num_pieces = self._num_blocks = 0
        self._next = time.monotonic() + SAVE_SECONDS
        self._writes = True

    def load(self, sums: _Sums) -> _Sums:
        """What stands; or else what is given, empty sums."""
        try:
            said, tensors = self._read(SUMS)
            found = _Sums(sums.chosen, Moments(int(said["images"]), tensors["total"], tensors["outer"]))
            for number in range(int(said["pieces"])):
                _, piece = self._read(_piece(number))
                found.rows.append(piece["rows"])
                found.names.append(json.loads(text_of(piece["names"])))
            expected = int(np.searchsorted(sums.chosen, found.moments.count))
            if sum(map(len, found.rows)) != expected or sum(map(len, found.names)) != expected:
                raise Unsealed("rows are missing")
            if found.moments.outer.shape != sums.moments.outer.shape:
                raise Unsealed("it is of another encoder")
        except (Unsealed, FileNotFoundError, ValueError, KeyError, TypeError):
            return sums
        self._num_pieces = self._num_blocks = len(found.rows)
        return found

    def save_if_due(self, sums: _Sums) -> None:
        """As `save`, every few seconds; and more rarely where it takes long."""
        if time.monotonic() >= self._next:
            started = time.monotonic()
            self.save(sums)
            self._next = time.monotonic() + max(SAVE_SECONDS, SAVE_RATIO * (time.monotonic() - started))

    def save(self, sums: _Sums) -> None:
        """Write down what is new; a disk that fails is told of once, and costs nothing but that."""
        if not self._writes or len(sums.rows) == self._num_blocks:
            return
        names = [name for block in sums.names[self._num_blocks :] for name in block]
        piece = {"rows": torch.cat(sums.rows[self._num_blocks :]), "names": text_tensor(json.dumps(names))}
        said = {"asked": self._asked, "images": sums.moments.count, "pieces": self._num_pieces + 1}
        try:
            write_sealed(self._folder / _piece(self._num_pieces), json.dumps({"asked": self._asked}), piece)
            totals = {"total": sums.moments.total, "outer": sums.moments.outer}
            write_sealed(self._folder / SUMS, json.dumps(said), totals)
        except EnvironmentProblem as error:
            self._writes = False
            warnings.warn(f"{error} Until then, an evaluation that is stopped begins anew.", stacklevel=2)
        self._num_pieces, self._num_blocks = self._num_pieces + 1, len(sums.rows)

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        text, tensors = read_sealed(self._folder / name)
        said = json.loads(text)
        if said["asked"] != self._asked:
            raise Unsealed("it is of something else")
        return said, tensors


def _piece(number: int) -> str:
    return f"rows-{number:05d}{SUFFIX}"


def collect(
    images: Images,
    encoder: ImageEncoder,
    kept: NDArray[np.int64],
    *,
    batch_size: int,
    workers: Workers,
    progress: Progress | None,
    on_image: Callable[[int, int], None],
) -> Reference | None:
    """The features of all images.

    Args:
        images: each is read and encoded once.
        encoder: on its device.
        kept: numbers of the images whose features are kept, each once, in any order.
        batch_size: images that go through the encoder at once, in each process.
        workers: the processes that share the work.
        progress: where the leader notes what is done; None notes nothing.
        on_image: told how many images are done, and of how many.

    Returns:
        In the leader, the sums over all images and the features of those that are kept, in the order of `kept`. None
        in other processes.

    Raises:
        DataError: in all processes, if an image cannot be read or has features that are no numbers.
    """
    order = np.argsort(kept)
    sums = _Sums(kept[order], _nothing(encoder.dim))
    if progress and workers.rank == 0:
        sums = progress.load(sums)
    start, total = int(workers.from_leader(sums.moments.count)), len(images)
    on_image(start, total)
    while start < total:
        try:
            workers.agree()
        except BaseException:
            if progress and workers.rank == 0:
                progress.save(sums)
            raise
        stop = min(start + batch_size * workers.size, total)
        for features, names in each(workers, lambda: _share(images, encoder, range(start, stop), workers)):  # noqa: B023
            if workers.rank == 0:
                sums.add(features, names)
        start = stop
        if progress and workers.rank == 0:
            progress.save_if_due(sums)
        on_image(start, total)
    if workers.rank > 0:
        return None
    sums.finish()
    back = torch.from_numpy(np.argsort(order))
    names = [name for block in sums.names for name in block]
    return Reference(sums.moments, torch.cat(sums.rows)[back], tuple(names[i] for i in back.tolist()))


def _nothing(dim: int) -> Moments:
    return Moments(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))


def _share(images: Images, encoder: ImageEncoder, indices: Sequence[int], workers: Workers) -> tuple[Tensor, list[str]]:
    """Features, float32 [B, D] on the CPU, and names of the images that fall to this process.

    One to which none fall reads the last of them for nothing: making an image may take all processes.
    """
    ends = [len(indices) * rank // workers.size for rank in (workers.rank, workers.rank + 1)]
    mine = indices[slice(*ends)]
    features, names = _features(images, encoder, mine or indices[-1:])
    return features[: len(mine)], names[: len(mine)]


def _features(images: Images, encoder: ImageEncoder, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
    seen = images.read(indices)
    pixels = np.empty(seen.pixels.shape, np.float32)
    to_float(list(seen.pixels.numpy()), pixels)
    features = encoder(torch.from_numpy(pixels).to(device_of(encoder))).cpu()
    for name, is_finite in zip(seen.names, features.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise DataError(f"{name}: the extractor finds no finite features in it. Look at it, or leave it out.")
    return features, list(seen.names)


def each(workers: Workers, work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process, in all of them; a `UserError` of one ends all."""
    outcome, failure = _tried(work)
    return _given(workers.gather(outcome), failure)


def led(workers: Workers, work: Callable[[], T]) -> T:
    """What `work` gives in the leader, in all processes; a `UserError` of it ends all."""
    outcome, failure = _tried(work) if workers.rank == 0 else ((None, None, 0), None)
    shared: Outcome[T] = workers.from_leader(outcome)
    return _given([shared], failure)[0]


def _tried(work: Callable[[], T]) -> tuple[Outcome[T], UserError | None]:
    try:
        return (work(), None, 0), None
    except UserError as error:  # what is sent to others is text: not every exception survives the way
        return (None, str(error), error.exit_code), error


def _given(outcomes: Sequence[Outcome[T]], failure: UserError | None) -> list[T]:
    if failure is not None:
        raise failure
    for rank, (_, message, code) in enumerate(outcomes):
        if message is not None:
            told = UserError(f"stops with process {rank}: {message}")
            told.exit_code = code
            raise told
    return [value for value, _, _ in outcomes]  # type: ignore[misc]
