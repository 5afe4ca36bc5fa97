"""How sure a classifier is of each image, and how many classes it sees.

p_i        probabilities of the classes for image i
p          their mean over images
IS         exp(mean_i KL(p_i | p)) = exp(H(p) - mean_i H(p_i)), H the entropy
"""

import math
from collections.abc import Iterator, Mapping
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

__all__ = ["InceptionScore"]

# Images in a split, below which the score is far from where it settles; papers take 5000.
SETTLED = 1000


@part
class InceptionScore:
    """How sure a classifier is of each image, and how evenly its classes come up: IS, with Inception's logits.

    Between 1 and the number of classes; the fewer images in a split, the smaller. It looks at no reference: images of
    one thing score low however good they are, and a copy of the training set scores best.

    The images are divided into `splits` parts in a random order; the score is the mean over parts and
    `inception_score_std` their standard deviation, as torchmetrics gives them. If `splits` does not divide the number
    of images, the last part is smaller, or there are fewer parts, and a note says so.

    Source: Salimans et al. 2016, https://arxiv.org/abs/1606.03498.
    """

    # The encoder whose classes it looks at; none takes the evaluation's.
    extractor: Annotated[Any, PartOf("encoders")] | None = None
    # Parts that the images are divided into.
    splits: Annotated[int, Field(ge=1)] = 10
    # Whether the extractor is asked for its class logits; false takes its features for logits, whatever they are.
    wants_logits: bool = True

    looks_at: ClassVar[LooksAt] = "features"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ()

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"inception_score": "higher", "inception_score_std": "lower"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if a part would hold fewer than two images.
        """
        enough(f"inception_score with splits={self.splits}", {"made": made}, 2 * self.splits)
        size = math.ceil(made / self.splits)
        parts = math.ceil(made / size)
        last = made - (parts - 1) * size
        if last == 1:
            raise ConfigError(
                f"inception_score: {made} images with splits={self.splits} are parts of {size} and a last one of 1, "
                f"which scores 1 whatever it shows. Use {made - 1} images, or a multiple of {self.splits}."
            )
        if last < size:
            yield (
                f"inception_score: {made} images with splits={self.splits} are {parts} parts: {parts - 1} of {size} "
                f"images, and one of {last}, which counts as much. For {self.splits} equal ones use "
                f"{made - made % self.splits} images."
            )
        if made < SETTLED * self.splits:
            yield (
                f"inception_score: there are {size} images in a part, and the score grows with their number. Compare "
                "it only at the same n and splits; papers take 50 000 in 10."
            )

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            DataError: if a logit is not finite.
        """
        logits = rows("inception_score", "made", evidence.made)
        order = torch.from_numpy(generator(evidence.seed, "inception_score").permutation(len(logits)))
        parts = torch.chunk(logits[order], self.splits)
        surprises = [_divergences(one) for one in parts]
        values = torch.stack([one.mean().exp() for one in surprises])
        spread = float(values.std()) if len(values) > 1 else 0.0
        errors = torch.stack([_error(one) for one in surprises]) * values
        error = float(errors.square().sum().sqrt()) / len(errors)
        moved = torch.empty(len(logits), dtype=torch.float64)
        moved[order] = torch.cat([one * value for one, value in zip(surprises, values, strict=True)]).double()
        return {
            "inception_score": with_error(float(values.mean()), error, Influence(moved)),
            "inception_score_std": Score(spread),
        }


def _divergences(logits: Tensor) -> Tensor:
    """KL(p_i | p) of each image: float64 [n]. It is also how much more of that image would move the mean of them."""
    log_each = logits.log_softmax(1)
    log_mean = log_each.logsumexp(0) - math.log(len(logits))
    return (log_each.exp() * (log_each - log_mean)).sum(1)


def _error(values: Tensor) -> Tensor:
    """The standard error of a mean; 0 if it is of one value."""
    return (values.var(correction=0) / max(1, len(values) - 1)).sqrt()
