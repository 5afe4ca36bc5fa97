"""What a perfect generator would score: real images against other real images."""

from dataclasses import dataclass

import torch

from eclosion.errors import ConfigError
from eclosion.metrics.memorisation import Memorisation
from eclosion.metrics.metric import Evidence, Metric, Moments, Reference, Score, Unscorable
from eclosion.rng import generator

__all__ = ["Floor", "floor"]


@dataclass(frozen=True)
class Floor:
    """Scores of real images, against other real images where the metric compares.

    Attributes:
        scores: by name, as the metric gives them.
        made: real images that stood in for those that are scored.
        reference: other real images that they were compared with; None if the metric compares with none.
    """

    scores: dict[str, Score]
    made: int
    reference: int | None


def floor(
    metric: Metric, reference: Reference, made: int, seed: int = 0, train: Reference | None = None
) -> Floor | None:
    """The scores of a part of the reference against the rest of it.

    Args:
        metric: what is scored.
        reference: real images; of those whose features were kept, a part is drawn with `seed`.
        made: images that the evaluation scores; as many are drawn, or half of the reference if it has too few, or all
            of it for a metric that compares with none.
        seed: of that draw, and of what the metric draws.
        train: images that were trained on, for a metric that needs them.

    Returns:
        None if there are too few images, or such that they have no score, or if the metric looks at something else than
        sets of images.
    """
    here = {"reference", "train"} if train is not None else {"reference"}
    compares = "reference" in metric.needs
    kept = reference.features
    if isinstance(metric, Memorisation) and train is not None:
        kept = metric.fresh(reference, train).features  # copies that were held out by mistake are not what chance gives
    part = min(made, len(kept) // 2 if compares else len(kept))
    if not set(metric.needs) <= here or part == 0:
        return None
    order = torch.from_numpy(generator(seed, "floor").permutation(len(kept)))
    drawn, rest = kept[order[:part]], kept[order[part:]]
    other = Reference(Moments.of(rest), rest) if compares else None
    evidence = Evidence(made=drawn, reference=other, train=train, seed=seed)
    try:
        for _ in metric.problems(made=part, reference=len(rest), dim=kept.shape[1]):
            pass  # what holds for the scores holds for their floor
        return Floor(metric.scores(evidence), part, len(rest) if compares else None)
    except (ConfigError, Unscorable):
        return None
