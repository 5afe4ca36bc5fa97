"""Whether images are copies of training images."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from eclosion.metrics.features import enough, nearest, rows
from eclosion.metrics.metric import Better, Evidence, LooksAt, Moments, Need, Reference, Score, Unscorable
from eclosion.metrics.uncertainty import of_share_below, with_error
from eclosion.registry import PartOf, part

__all__ = ["Memorisation", "Pair"]

# An image this near to a training image, in lengths of its features, is that image: float32 keeps seven digits, and a
# network's sums lose two or three of them from one device to another.
SAME = 1e-4


class Pair(NamedTuple):
    """An image and the training image that is nearest to it.

    Attributes:
        image: number of the image, a row of `made`.
        train: number of the training image, a row of `train.features` and of `train.names`.
        distance: between their features.
        held_out: share of the held-out images that are as near to a training image, or nearer; without copies.
        too_near: whether the image counts as memorised.
    """

    image: int
    train: int
    distance: float
    held_out: float
    too_near: bool


@part
class Memorisation:
    """Whether images are nearer to training images than real images are that were never trained on.

    `memorised` is the share of images that are as near to a training image as the nearest `quantile` of the held-out
    ones: what is drawn afresh scores `quantile`, copies score 1. `nearer_than_held_out` is the chance that an image is
    nearer to the training set than a held-out image is: 1/2 for fresh draws, 1 for copies, less for images unlike any.
    Neither says how good images are: noise is far from all, and scores 0 in both.

    Error and interval of `memorised` count that the held-out images, which say how near is too near, were drawn, too.

    The reference has to be held out: images of the same kind that were not trained on. Those of it that are copies of
    training images all the same are left out, and a note says how many.

    Source: the second score is that of Meehan et al. 2020, https://arxiv.org/abs/2004.05675, over all of the space.
    """

    # The encoder whose features it looks at; none takes the evaluation's.
    extractor: Annotated[Any, PartOf("encoders")] | None = None
    # Share of the held-out images that lies too near to the training images by chance.
    quantile: Annotated[float, Field(gt=0, lt=0.5)] = 0.01

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("reference", "train")

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"memorised": "lower", "nearer_than_held_out": "near 0.5"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if there are fewer than two images of a kind.
        """
        enough("memorisation", {"made": made, "held-out": reference}, 2)
        expected = self._place(reference) / (reference + 1)
        if expected > self.quantile:
            yield (
                f"memorisation: {reference} held-out images have no nearest {self.quantile:.3g} of them: fresh draws "
                f"score memorised = {expected:.2g}. Hold out {math.ceil(1 / self.quantile)} or more."
            )

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            Unscorable: if most held-out images are copies of training images, or hardly any is not.
            ConfigError: if features of too few held-out images were kept.
            DataError: if a feature is not finite.
        """
        found = self._look(evidence)
        scores = {
            "memorised": of_share_below(found.made, found.held_out, self._place(len(found.held_out))),
            "nearer_than_held_out": _chance_of_less(found.made, found.held_out),
        }
        return {name: replace(score, notes=found.notes) for name, score in scores.items()}

    def pairs(self, evidence: Evidence, *, limit: int = 16) -> list[Pair]:
        """The images that are nearest to a training image, with that one; nearest first, at most `limit`."""
        found = self._look(evidence)
        return [
            Pair(
                image,
                int(found.train[image]),
                float(found.made[image]),
                float((found.held_out <= found.made[image]).double().mean()),
                bool(found.made[image] <= found.threshold),
            )
            for image in found.made.argsort(stable=True)[:limit].tolist()
        ]

    def fresh(self, held_out: Reference, train: Reference) -> Reference:
        """Those of the held-out images whose features were kept that are no copies of training images.

        Raises:
            DataError: if a feature is not finite.
        """
        features = rows("memorisation", "held-out", held_out.features)
        far, _ = nearest(features, rows("memorisation", "training", train.features))
        kept = held_out.features[~_copies(far, features)]
        return Reference(Moments.of(kept), kept)

    def _place(self, held_out: int) -> int:
        """Which of the held-out distances, from the least, is the threshold: a fresh draw is below the k-th of M with
        probability k / (M + 1).
        """
        return max(1, math.floor(self.quantile * (held_out + 1)))

    def _look(self, evidence: Evidence) -> "_Distances":
        assert evidence.reference is not None
        assert evidence.train is not None
        train = rows("memorisation", "training", evidence.train.features)
        made, which = nearest(rows("memorisation", "made", evidence.made), train)
        features = rows("memorisation", "held-out", evidence.reference.features)
        counts = {"made": len(made), "dim": train.shape[1]}
        known = list(self.problems(reference=len(features), **counts))  # of those that were kept
        every, _ = nearest(features, train)
        held_out = every[~_copies(every, features)]
        notes: list[str] = []
        if copies := len(every) - len(held_out):
            if copies > len(every) / 2 or len(held_out) < 2:
                raise Unscorable(
                    f"memorisation: {copies} of {len(every)} held-out images are themselves among those trained on, so "
                    "nothing tells copies from likeness. Compare with a part that was not trained on, such as "
                    "split=val."
                )
            notes.append(
                f"memorisation: copies of training images among the {len(every)} held-out ones: {copies}. They are "
                f"left out, and the other {len(held_out)} say how near is too near. Take them out of one of the parts."
            )
            notes += [] if known else self.problems(reference=len(held_out), **counts)
        threshold = float(held_out.sort().values[self._place(len(held_out)) - 1])
        return _Distances(made, which, held_out, threshold, tuple(notes))


@dataclass(frozen=True)
class _Distances:
    """To the nearest training image.

    Attributes:
        made: float64 [N], of each image.
        train: int64 [N], which training image that is.
        held_out: float64 [M], of each held-out image that is no copy.
        threshold: what is as near as this, or nearer, counts as memorised.
        notes: on what was left out.
    """

    made: Tensor
    train: Tensor
    held_out: Tensor
    threshold: float
    notes: tuple[str, ...]


def _copies(distances: Tensor, features: Tensor) -> Tensor:
    """Which images are training images, by their distances to the nearest, [N]: bool [N]."""
    limits: Tensor = SAME * torch.linalg.vector_norm(features, dim=1)
    return distances <= limits


def _chance_of_less(x: Tensor, y: Tensor) -> Score:
    """The chance that one of `x` is less than one of `y`, equals counting half.

    Source: the error is that of DeLong et al. 1988, https://doi.org/10.2307/2531595.
    """
    above = (_above(x, y) + _above(x, y, equal=True)) / 2  # of each x, the share of y above it
    below = 1 - (_above(y, x) + _above(y, x, equal=True)) / 2  # of each y, the share of x below it
    score = with_error(float(above.mean()), math.sqrt(float(above.var()) / len(x) + float(below.var()) / len(y)))
    assert score.interval is not None
    return Score(score.value, score.error, (max(0.0, score.interval[0]), min(1.0, score.interval[1])))


def _above(x: Tensor, y: Tensor, *, equal: bool = False) -> Tensor:
    """Of each x, the share of y that is larger, or as large."""
    return 1 - torch.searchsorted(y.sort().values, x, right=not equal).double() / len(y)
