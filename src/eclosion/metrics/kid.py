"""The distance between two sets of features under a polynomial kernel.

k(x, y)    (gamma x.y + coef) ** degree
n, m       images that are scored, images of the reference
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from eclosion.errors import ConfigError
from eclosion.metrics.features import enough, rows
from eclosion.metrics.metric import Better, Evidence, Influence, LooksAt, Need, Score
from eclosion.metrics.uncertainty import with_error
from eclosion.registry import PartOf, part
from eclosion.rng import generator

__all__ = ["KernelDistance"]

# Rows whose kernel with as many others is held at once: 32 MB.
BLOCK = 2048
# Fewer images than these, and the interval is wider than most differences.
FEW = 100


@part
class KernelDistance:
    """Squared distance between images and reference under a polynomial kernel: KID, with Inception's features.

    It is unbiased at any number of images, so it can be below 0, and comes with its standard error: the score to report
    unless there are tens of thousands of images.

    All pairs are compared once. With `subsets`, it is instead the mean over random subsets, and `kid_std` their
    standard deviation, as torchmetrics gives them; subsets share images, so that says little of how far the mean can be
    trusted. Its standard error is that of all pairs, and what the draw of subsets adds.

    Source: Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401.
    """

    # The encoder whose features it looks at; none takes the evaluation's.
    extractor: Annotated[Any, PartOf("encoders")] | None = None
    # Number of random subsets whose distances are averaged; none compares all images once.
    subsets: Annotated[int, Field(ge=1)] | None = None
    # Images of either set in a subset.
    subset_size: Annotated[int, Field(ge=2)] = 1000
    # Degree of the kernel (gamma x.y + coef) ** degree.
    degree: Annotated[int, Field(ge=1)] = 3
    # Factor of the inner product; none takes one over the numbers in a feature.
    gamma: Annotated[float, Field(gt=0)] | None = None
    # Constant of the kernel.
    coef: Annotated[float, Field(gt=0)] = 1.0

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("reference",)

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"kid": "lower"} if self.subsets is None else {"kid": "lower", "kid_std": "lower"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if there are fewer than two images of a kind, or fewer than a subset holds.
        """
        counts = {"made": made, "reference": reference}
        enough("kid", counts, 2)
        for what, count in counts.items():
            if self.subsets is not None and count < self.subset_size:
                raise ConfigError(
                    f"kid: subset_size is {self.subset_size}, and there are {count} {what} images. Use more images, "
                    f"subset_size={count} or less, or leave subsets out: all images are then compared once."
                )
        if min(made, reference) < FEW:
            yield f"kid: {min(made, reference)} images tell only large differences apart: look at its interval."

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            ConfigError: if features of too few reference images were kept.
            DataError: if a feature is not finite.
        """
        assert evidence.reference is not None
        made = rows("kid", "made", evidence.made)
        reference = rows("kid", "reference", evidence.reference.features)
        list(self.problems(made=len(made), reference=len(reference), dim=made.shape[1]))  # of those that were kept
        if self.subsets is None:
            return {"kid": self._score(made, reference)}
        drawn = [
            self._score(_subset(made, self.subset_size, evidence.seed, "made", number), other)
            for number in range(self.subsets)
            for other in [_subset(reference, self.subset_size, evidence.seed, "reference", number)]
        ]
        values = torch.tensor([one.value for one in drawn], dtype=torch.float64)
        error = drawn[0].error if len(drawn) == 1 else _error_of_mean(values, self._score(made, reference))
        assert error is not None
        return {"kid": with_error(float(values.mean()), error), "kid_std": Score(float(values.std(correction=0)))}

    def _score(self, made: Tensor, reference: Tensor) -> Score:
        within, across, beyond = self._pairs(made), self._pairs(made, reference), self._pairs(reference)
        value = within.mean + beyond.mean - 2 * across.mean
        influence = Influence(2 * (within.by_row - across.by_row), 2 * (beyond.by_row - across.by_column))
        return with_error(value, math.sqrt(_variance(within, across, beyond)), influence)

    def _pairs(self, x: Tensor, other: Tensor | None = None) -> "_Pairs":
        """Averages of the kernel over pairs of images, one of each set; without another, over pairs of two of `x`."""
        gamma = 1 / x.shape[1] if self.gamma is None else self.gamma
        alone, y = other is None, x if other is None else other
        by_row, by_column = x.new_zeros(len(x)), y.new_zeros(len(y))
        squares = 0.0
        for top in range(0, len(x), BLOCK):
            for left in range(top if alone else 0, len(y), BLOCK):
                down, across = slice(top, top + BLOCK), slice(left, left + BLOCK)
                kernel = (gamma * x[down] @ y[across].T + self.coef) ** self.degree
                mirrored = alone and left > top
                if alone and not mirrored:
                    kernel.fill_diagonal_(0)
                by_row[down] += kernel.sum(1)
                by_column[across] += kernel.sum(0)
                squares += float((kernel**2).sum()) * (2 if mirrored else 1)
                if mirrored:
                    by_row[across] += kernel.sum(0)
        count = len(x) * (len(x) - 1) if alone else len(x) * len(y)
        per_row = len(y) - 1 if alone else len(y)
        return _Pairs(by_row / per_row, by_row / per_row if alone else by_column / len(x), squares / count)


@dataclass(frozen=True)
class _Pairs:
    """Averages of the kernel over pairs of images.

    Attributes:
        by_row, by_column: float64 [n] and [m], over the pairs that an image takes part in.
        square: of the kernel's square.
    """

    by_row: Tensor
    by_column: Tensor
    square: float

    @property
    def mean(self) -> float:
        return float(self.by_row.mean())

    @property
    def interaction(self) -> float:
        """Variance of what is left of the kernel once each image's own average is taken off."""
        rows, columns = ((one - self.mean).square().mean() for one in (self.by_row, self.by_column))
        return max(0.0, self.square - self.mean**2 - float(rows) - float(columns))


def _variance(within: _Pairs, across: _Pairs, beyond: _Pairs) -> float:
    """The variance of the distance over draws of both sets.

    The spread of what single images contribute, which is what counts while the sets differ; the averages that it is
    taken of are noisy themselves, by twice what pairs contribute, of which only once belongs to the variance.

    Source: the decomposition of Hoeffding 1948, https://doi.org/10.1214/aoms/1177730196, for both sets.
    """
    n, m = len(across.by_row), len(across.by_column)
    ours = (within.by_row - across.by_row).var() / n
    theirs = (beyond.by_row - across.by_column).var() / m
    pairs = within.interaction / n**2 + 2 * across.interaction / (n * m) + beyond.interaction / m**2
    return max(4 * float(ours + theirs) - 2 * pairs, 2 * pairs)


def _error_of_mean(drawn: Tensor, whole: Score) -> float:
    """The standard error of the mean over subsets: they are drawn apart, and in the mean over all draws, it is `whole`.

    Args:
        drawn: float64 [S], the distance between each two subsets, S >= 2.
        whole: that between all images.
    """
    assert whole.error is not None
    return math.sqrt(whole.error**2 + float(drawn.var()) / len(drawn))


def _subset(features: Tensor, size: int, seed: int, what: str, number: int) -> Tensor:
    order = generator(seed, "kid", what, number).permutation(len(features))[:size]
    return features[torch.from_numpy(order)]
