"""How near the embeddings of images are to those that they were made from."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from eclosion.metrics.agreement import cosines
from eclosion.metrics.features import enough
from eclosion.metrics.metric import Better, Evidence, LooksAt, Need, Score
from eclosion.metrics.uncertainty import of_mean
from eclosion.registry import PartOf, part

__all__ = ["Cosine"]


@part
class Cosine:
    """The mean cosine between the embedding of each image and the embedding that it was made from.

    `cosine_to_others` is the same between each image and what all other images were made from: embeddings of unlike
    images are far from orthogonal, so a cosine says nothing without it.
    """

    # The encoder that made the embeddings which images are made from; none takes the evaluation's.
    extractor: Annotated[Any, PartOf("encoders")] | None = None

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("conditions",)

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"cosine": "higher", "cosine_to_others": "lower"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if there are fewer than two images.
        """
        enough("cosine", {"made": made}, 2)
        yield from ()

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            ConfigError: if the embeddings were made by another encoder.
            DataError: if a feature is not finite.
        """
        own, others = cosines("cosine", evidence)
        return {"cosine": of_mean(own), "cosine_to_others": Score(others)}
