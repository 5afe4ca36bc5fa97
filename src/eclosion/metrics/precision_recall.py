"""How many images look real, and how much of what is real they show.

k          neighbours; the ball of an image reaches to the k-th nearest of its own set
N          images that are scored, M of the reference: as many
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from eclosion.errors import ConfigError
from eclosion.metrics.features import BLOCK, chosen, distances, enough, rows
from eclosion.metrics.metric import Better, Evidence, LooksAt, Need, Score
from eclosion.metrics.uncertainty import of_share, with_error
from eclosion.registry import PartOf, part
from eclosion.rng import generator

__all__ = ["PrecisionRecall"]

# Parts of a set that are left out in turn, to see how far the scores depend on which images there are.
PARTS = 10
# Fewer images than these leave balls so wide that nearly everything lies in one.
FEW = 500


@part
class PrecisionRecall:
    """How many images look real (precision, density), and how much of what is real they show (recall, coverage).

    An image looks real if it lies in the ball of a real one, which reaches to the `neighbours`-th nearest of its kind;
    density counts those balls. A real image is recalled if it lies in the ball of a made one, and covered if a made one
    lies in its own. Density and coverage give less to outliers, whose balls are wide.

    All four depend on both numbers of images, so these are made equal: of the larger set, as many are drawn with the
    seed as the other one has, and a note says so where images to score are left out. Standard errors are a jackknife's,
    over tenths of either set; they rather overstate.

    Source: Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991; Naeem et al. 2020,
    https://arxiv.org/abs/2002.09797.
    """

    # The encoder whose features it looks at; none takes the evaluation's.
    extractor: Annotated[Any, PartOf("encoders")] | None = None
    # The neighbour that an image's ball reaches to; papers take 3 for precision and recall, 5 for density and coverage.
    neighbours: Annotated[int, Field(ge=1)] = 5

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("reference",)

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if an image has too few others for a ball.
        """
        counts = {"made": made, "reference": reference}
        enough("precision_recall", counts, 4)
        for what, count in counts.items():
            left = count - math.ceil(count / PARTS)
            if left <= self.neighbours:
                raise ConfigError(
                    f"precision_recall: neighbours is {self.neighbours}, and there are {count} {what} images. Use more "
                    f"images, or neighbours={left - 1} or less."
                )
        if min(made, reference) < FEW:
            yield (
                f"precision_recall: {min(made, reference)} images are far from each other, so each one's ball is wide: "
                "compare these scores only at the same n, and with the real images' own."
            )
        if made > reference:
            yield (
                f"precision_recall: the reference has {reference} images, and the scores want two sets of one size: "
                f"{reference} of the {made} images are looked at. Compare with more images to look at all."
            )

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            ConfigError: if features of too few reference images were kept.
            DataError: if a feature is not finite.
        """
        assert evidence.reference is not None
        made = rows("precision_recall", "made", evidence.made)
        kept = rows("precision_recall", "reference", evidence.reference.features)
        list(self.problems(made=len(made), reference=len(kept), dim=made.shape[1]))  # of those that were kept
        count = min(len(made), len(kept))
        found = _compare(
            chosen(made, count, _order(len(made), evidence.seed, "made")),
            chosen(kept, count, _order(len(kept), evidence.seed)),
            self.neighbours,
        )
        values = found.values()
        spread = [
            _jackknife([found.values(**{side: p}) for p in range(PARTS)]) for side in ("made_without", "real_without")
        ]
        errors = {name: math.hypot(*(one[name] for one in spread)) for name in values}
        bounded = {name: _bounded(with_error(values[name], errors[name]), name, count) for name in values}
        return {name: replace(score, counts=(count, count)) for name, score in bounded.items()}


def _order(count: int, seed: int, *what: str) -> Tensor:
    return torch.from_numpy(generator(seed, "precision_recall", *what).permutation(count))


@dataclass(frozen=True)
class _Found:
    """Which image lies in whose ball, with all images and without each part of either set.

    Attributes:
        made_part: int64 [N], the part that a made image belongs to.
        real_part: int64 [M].
        balls: int64 [1 + PARTS, N], the real balls that each made image lies in: of all, then without each part.
        recalled: bool [1 + PARTS, M], whether a real image lies in a made ball: of all, then without each part.
        nearest: float64 [PARTS, M], from each real image to the nearest made one of each part.
        reach: float64 [1 + PARTS, M], of the real balls.
        k: neighbours.
    """

    made_part: Tensor
    real_part: Tensor
    balls: Tensor
    recalled: Tensor
    nearest: Tensor
    reach: Tensor
    k: int

    def values(self, *, made_without: int | None = None, real_without: int | None = None) -> dict[str, float]:
        """The scores; without a part of one of the sets, if it is named."""
        made = slice(None) if made_without is None else self.made_part != made_without
        real = slice(None) if real_without is None else self.real_part != real_without
        made_variant, real_variant = (0 if left is None else left + 1 for left in (made_without, real_without))
        balls = self.balls[real_variant][made]
        parts = [p for p in range(PARTS) if p != made_without]
        covered = self.nearest[parts].amin(0) <= self.reach[real_variant]
        return {
            "precision": float((balls > 0).double().mean()),
            "recall": float(self.recalled[made_variant][real].double().mean()),
            "density": float(balls.double().mean()) / self.k,
            "coverage": float(covered[real].double().mean()),
        }


def _compare(made: Tensor, real: Tensor, k: int) -> _Found:
    """Look at each pair of images once."""
    made_part, real_part = (torch.arange(len(one)) % PARTS for one in (made, real))
    made_reach, real_reach = _reach(made, made_part, k), _reach(real, real_part, k)
    balls = torch.zeros(1 + PARTS, len(made), dtype=torch.int64)
    recalled = torch.zeros(1 + PARTS, len(real), dtype=torch.bool)
    nearest = torch.full((PARTS, len(real)), torch.inf, dtype=torch.float64)
    for start in range(0, len(made), BLOCK):
        block = slice(start, start + BLOCK)
        far = distances(made[block], real)
        for variant in range(1 + PARTS):
            balls[variant, block] = (far <= real_reach[variant]).sum(1)
            recalled[variant] |= (far <= made_reach[variant, block, None]).any(0)
        for number in range(PARTS):
            members = far[made_part[block] == number]
            if len(members):
                nearest[number] = nearest[number].minimum(members.amin(0))
    return _Found(made_part, real_part, balls, recalled, nearest, real_reach, k)


def _reach(features: Tensor, part: Tensor, k: int) -> Tensor:
    """How far to the k-th nearest: float64 [1 + PARTS, N], of all, then without each part.

    Images of the part that is left out have -1: nothing lies in their balls.
    """
    reach = torch.empty(1 + PARTS, len(features), dtype=torch.float64)
    for start in range(0, len(features), BLOCK):
        block = slice(start, start + BLOCK)
        far = distances(features[block], features)
        far[torch.arange(len(far)), torch.arange(start, start + len(far))] = torch.inf
        # of each part the k nearest: the k nearest of any parts together are among them
        near = [far[:, members].topk(min(k, int(members.sum())), largest=False).values for members in _members(part)]
        for variant in range(1 + PARTS):
            rest = torch.cat([one for number, one in enumerate(near) if number != variant - 1], 1)
            reach[variant, block] = rest.topk(k, largest=False).values[:, -1]
    for number, members in enumerate(_members(part)):
        reach[1 + number, members] = -1
    return reach


def _members(part: Tensor) -> list[Tensor]:
    return [part == number for number in range(PARTS)]


def _jackknife(without: list[dict[str, float]]) -> dict[str, float]:
    """Standard errors from the scores without each part.

    Source: Shao & Wu 1989, https://doi.org/10.1214/aos/1176347263.
    """
    errors = {}
    for name in without[0]:
        values = torch.tensor([one[name] for one in without], dtype=torch.float64)
        errors[name] = math.sqrt((PARTS - 1) * float(values.var(correction=0)))
    return errors


def _bounded(score: Score, name: str, count: int) -> Score:
    """Its interval within what the score can be.

    All but density are shares of `count` images. The interval of a share is at least as wide as drawing them makes it:
    where all are hit, no part that is left out changes the share.
    """
    assert score.interval is not None
    low, high = score.interval
    if name == "density":
        return Score(score.value, score.error, (max(0.0, low), high))
    drawn = of_share(round(score.value * count), count).interval
    assert drawn is not None
    return Score(score.value, score.error, (max(0.0, min(low, drawn[0])), min(1.0, max(high, drawn[1]))))
