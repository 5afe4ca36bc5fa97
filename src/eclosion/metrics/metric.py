"""What a metric is, what it may look at, and what it gives."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from eclosion.errors import DataError

__all__ = [
    "Better",
    "Evidence",
    "Influence",
    "LooksAt",
    "Metric",
    "Moments",
    "Reference",
    "Score",
    "Unscorable",
    "num_looked_at",
]

# What an evaluation can put beside the images: a reference set, the images that were trained on, and, image by image,
# the original, the caption or the embedding that each was made from.
Need = Literal["reference", "train", "originals", "captions", "conditions"]
# Which way a score is better; "near 0.5" is for the chance that one image is before another, where 1/2 is fair.
Better = Literal["lower", "higher", "near 0.5"]
# What a metric looks at of a reference: the sums over all of its images, or the features of those that were kept.
LooksAt = Literal["moments", "features"]


class Unscorable(DataError):
    """The images are such that a metric has no score for them, however many there are; others may have one."""


@dataclass(frozen=True)
class Influence:
    """How much more of each image would move a score, up to a constant.

    Two scores of images that were made from the same noise, or from the same originals, against the same reference are
    compared by it: what moves both alike falls out.

    Attributes:
        made: float64 [N], of the images that are scored. Their variance / N is that of the score over draws of them.
        reference: float64 [M], of the images that they are compared with; None if there are none.
    """

    made: Tensor
    reference: Tensor | None = None

    def times(self, factor: float) -> "Influence":
        """That of a score that is this many times as large."""
        return Influence(self.made * factor, None if self.reference is None else self.reference * factor)


@dataclass(frozen=True)
class Score:
    """A number, and how far it can be trusted.

    Attributes:
        value: the number.
        error: its standard error; None if there is none.
        interval: the 95 % interval; None if there is none.
        influence: of each image on it; None if that is not known.
        notes: what a reader must know of it that only the images tell, one line each.
        counts: images that it is a score of, and images that these were compared with; None if those are all there are.
    """

    value: float
    error: float | None = None
    interval: tuple[float, float] | None = None
    influence: Influence | None = field(default=None, compare=False, repr=False)
    notes: tuple[str, ...] = ()
    counts: tuple[int, int] | None = None


@dataclass(frozen=True)
class Moments:
    """Sums over features, which add: those of two sets are those of both together.

    Attributes:
        count: rows.
        total: float64 [D], their sum.
        outer: float64 [D, D], the sum of their outer products.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """The sums over rows, [N, D]."""
        rows = features.double()
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], unbiased."""
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass(frozen=True)
class Reference:
    """The features of a set of images.

    Attributes:
        moments: over all of them.
        features: float32 [M, D] of all, or of as many as were kept, in an order that says nothing.
        names: of the images that `features` belongs to, or empty.
    """

    moments: Moments
    features: Tensor
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What a metric looks at. All rows are of one extractor, in the order of the images.

    Attributes:
        made: float32 [N, D], features of the images that are scored.
        reference: of the images that they are compared with, if the metric needs them.
        train: of the images that were trained on, if it needs them.
        partners: float32 [N, D], what belongs to each image: the features of its original or of its caption, or the
            embedding that it was made from.
        distances: float32 [N], of each image from its original.
        seed: of what a metric draws.
    """

    made: Tensor
    reference: Reference | None = None
    train: Reference | None = None
    partners: Tensor | None = None
    distances: Tensor | None = None
    seed: int = 0


class Metric(Protocol):
    """A part of the table `metrics`: its fields are its options.

    Attributes:
        extractor: the encoder whose features it looks at; None takes the evaluation's.
        looks_at: what it looks at of a reference, if it compares with one.
    """

    extractor: Any
    looks_at: ClassVar[LooksAt]

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        ...

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score by its name, and which way is better."""
        ...

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader of the scores must know of these counts, one line each.

        Args:
            made: images that are scored.
            reference: images that they are compared with: as many as `num_looked_at` says.
            dim: numbers in a feature.

        Raises:
            ConfigError: if a score cannot be computed from so few.
        """
        ...

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            Unscorable: if the images are such that they have no score.
            ConfigError: if there are too few.
            DataError: if something that it looks at is not finite.
        """
        ...


def num_looked_at(reference: Reference, metric: Metric) -> int:
    """How many images of a reference a metric looks at."""
    return reference.moments.count if metric.looks_at == "moments" else len(reference.features)
