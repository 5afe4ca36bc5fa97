"""How different each image looks from its original."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from eclosion.metrics.features import enough, rows
from eclosion.metrics.metric import Better, Evidence, LooksAt, Need, Score
from eclosion.metrics.uncertainty import of_mean
from eclosion.registry import part

__all__ = ["PerceptualDistance"]


@part
class PerceptualDistance:
    """How different each image looks from its original, to a network fitted to what people call alike: LPIPS.

    For tasks that make an image again, such as a decoder from its embedding. 0 is the same picture.

    Source: Zhang et al. 2018, https://arxiv.org/abs/1801.03924.
    """

    # Backbone; alex is the usual one.
    net_type: Literal["alex", "vgg", "squeeze"] = "alex"
    # Whether the score is the mean over images, or their sum.
    reduction: Literal["mean", "sum"] = "mean"
    # File of the backbone's weights, as torchvision publishes it; none looks where torch keeps downloads, and fetches
    # it if need be.
    weights: Path | None = None
    # File of the heads that were fitted to people's judgement; none takes that of the package torchmetrics or lpips.
    heads: Path | None = None

    # It has a network of its own, which looks at two images at once.
    extractor: ClassVar[None] = None

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("originals",)

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"lpips": "lower"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if there are fewer than two images.
        """
        enough("lpips", {"made": made}, 2)
        yield from ()

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            DataError: if a distance is not finite.
        """
        assert evidence.distances is not None
        mean = of_mean(rows("lpips", "made", evidence.distances[:, None])[:, 0])
        return {"lpips": mean if self.reduction == "mean" else _times(mean, len(evidence.distances))}


def _times(score: Score, factor: int) -> Score:
    assert score.error is not None
    assert score.interval is not None
    assert score.influence is not None
    low, high = score.interval
    times = score.influence.times(factor)
    return Score(score.value * factor, score.error * factor, (low * factor, high * factor), times)
