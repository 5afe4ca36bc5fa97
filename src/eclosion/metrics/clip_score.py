"""How well images fit their captions, in the eyes of CLIP."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from eclosion.metrics.agreement import cosines
from eclosion.metrics.features import enough
from eclosion.metrics.metric import Better, Evidence, LooksAt, Need, Score
from eclosion.metrics.uncertainty import of_mean
from eclosion.registry import PartOf, part

__all__ = ["ClipScore"]


@part
class ClipScore:
    """How well images fit their captions, or their originals, in the eyes of CLIP.

    The mean cosine of their embeddings, times 100, and at least 0.
    `clip_score_to_others` is the same between each image and all other images' captions or originals: what is scored
    without looking at what was asked for.

    Source: Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with the factor and the limit of torchmetrics.
    """

    # Which CLIP; its text half reads the captions.
    extractor: Annotated[Any, PartOf("encoders")] = "clip"
    # What each image is compared with: its caption, or the image that it was made from.
    against: Literal["caption", "original"] = "caption"

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("captions",) if self.against == "caption" else ("originals",)

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"clip_score": "higher", "clip_score_to_others": "lower"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if there are fewer than two images.
        """
        enough("clip_score", {"made": made}, 2)
        yield from ()

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            ConfigError: if images and captions were not read by the same encoder.
            DataError: if a feature is not finite.
        """
        own, others = cosines("clip_score", evidence)
        return {"clip_score": _at_least_0(of_mean(100 * own)), "clip_score_to_others": _at_least_0(Score(100 * others))}


def _at_least_0(score: Score) -> Score:
    interval = score.interval and (max(0.0, score.interval[0]), max(0.0, score.interval[1]))
    return Score(max(0.0, score.value), score.error, interval, score.influence)
