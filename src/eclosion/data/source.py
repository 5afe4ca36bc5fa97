"""What a data source promises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

__all__ = [
    "DividedSource",
    "KeyedSamples",
    "NeighbouringSamples",
    "Sample",
    "Samples",
    "ShardedSamples",
    "Source",
    "Split",
    "array_shapes",
    "part_of_data",
]

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Sample:
    """One image as its source holds it, before any transform.

    Attributes:
        image: the bytes of an image file, or a decoded picture, in whatever mode and size the source has; or a
            tensor [3, H, W] that is already what the network shall see (uint8 0..255, or float32 in
            [-1, 1]), which no transform touches.
        name: the file or member it came from, for messages and the ledger.
        caption: text that describes it, if the source has any.
        label: index into the source's class names, if it has any.
        arrays: what else belongs to it, float32, by the names in `eclosion.data.batch.FIELDS`.
    """

    image: bytes | Image | Tensor
    name: str
    caption: str | None = None
    label: int | None = None
    arrays: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class Samples(Protocol):
    """An opened source: a fixed number of samples, each readable by its index from any thread.

    Attributes:
        fingerprint: a short hash of what the samples are; equal for equal data, however often it is opened.
        class_names: the name of each label, or empty when samples have no label.
        has_captions: whether samples have captions.
    """

    fingerprint: str
    class_names: tuple[str, ...]
    has_captions: bool

    def __len__(self) -> int:
        """How many samples an epoch has, readable or not."""
        ...

    def name(self, index: int) -> str:
        """The file or member that holds a sample; costs no decoding."""
        ...

    def read(self, index: int) -> Sample:
        """One sample; an image file need not be decoded, as whoever asks knows best at which size.

        Raises:
            BadSample: if it cannot be read.
        """
        ...


def array_shapes(samples: Samples) -> Mapping[str, tuple[int, ...]]:
    """Shape of each array that every sample brings, by the names in `eclosion.data.batch.FIELDS`.

    Samples tell of them in an attribute `array_shapes`; those without one bring none.
    """
    found: Mapping[str, tuple[int, ...]] = getattr(samples, "array_shapes", {})
    return found


@runtime_checkable
class ShardedSamples(Protocol):
    """Samples that lie in shards, files of many samples each, of which few should be in use at a time.

    Indices count through the shards one after the other.

    Attributes:
        shard_sizes: samples of each shard that can be asked for.
        shard_names: what to call each shard.
        left_out: per shard, how many samples it holds besides, which cannot be asked for, by reason.
        array_shapes: shape of each array that every sample brings, by the names in `eclosion.data.batch.FIELDS`.
        problems: what is wrong with them, one line each.
        notes: what the user should know of the shards, problems included, one line each.
        splits: name of a split -> the shards that it has samples of.
    """

    shard_sizes: Sequence[int]
    shard_names: Sequence[str]
    left_out: Sequence[Mapping[str, int]]
    array_shapes: Mapping[str, tuple[int, ...]]
    problems: Sequence[str]
    notes: Sequence[str]
    splits: Mapping[str, Sequence[str]]

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Told which shards will be read next, in their order, so that remote ones can be on their way."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


@runtime_checkable
class NeighbouringSamples(Protocol):
    """Samples of which some can be read together at less cost than one after the other."""

    def read_together(self, indices: Sequence[int]) -> Mapping[int, Sample]:
        """Index -> sample, of those that can be read together at once, and are fine.

        Whichever is not among them, for any reason, must be asked for by `read`, which says what is wrong with it.
        Raises nothing that concerns a single sample.
        """
        ...


@runtime_checkable
class KeyedSamples(Protocol):
    """Samples whose reading may itself be random, such as a user's own data set with augmentation.

    They are read in the training thread, one after the other, with a seed that belongs to the position
    in the run; and never kept, because the next epoch may see them otherwise.
    """

    def read_keyed(self, index: int, seed: int) -> Sample:
        """As `Samples.read`; whatever is random about it follows from the seed.

        Raises:
            BadSample: if it cannot be read.
        """
        ...


class Source(Protocol):
    """A part that finds samples: its fields are its options."""

    def open(self) -> Samples:
        """Find the samples without decoding them.

        Raises:
            DataError: if there are none.
        """
        ...


@runtime_checkable
class DividedSource(Protocol):
    """A source whose samples are divided into parts: to train on, to validate with, to test with."""

    def of_split(self, split: Split) -> Source | None:
        """The source of a part of the same data; None if there is no such part."""
        ...


def part_of_data(source: Source, split: Split) -> Source | None:
    """The source of a part of the data that a source belongs to; None if there is no such part.

    A source that is not divided is all for training.
    """
    if isinstance(source, DividedSource):
        return source.of_split(split)
    return source if split == "train" else None
