"""How well features of images agree with what belongs to each image."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eclosion.errors import ConfigError
from eclosion.metrics.features import rows
from eclosion.metrics.metric import Evidence

__all__ = ["cosines"]


def cosines(metric: str, evidence: Evidence) -> tuple[Tensor, float]:
    """Cosines of the images' features with their partners', and the mean cosine with all other images' partners.

    Args:
        metric: who asks, for messages.
        evidence: with partners.

    Returns:
        float64 [N], and a number: what a set of images scores whose partners were dealt out at random.

    Raises:
        ConfigError: if features and partners have different lengths: they were not made by the same encoder.
        DataError: if a feature is not finite.
    """
    assert evidence.partners is not None
    if evidence.made.shape[1] != evidence.partners.shape[1]:
        raise ConfigError(
            f"{metric}: features of images have {evidence.made.shape[1]} numbers, and what they are compared with "
            f"has {evidence.partners.shape[1]}: another encoder made them. Name that one as {metric}'s extractor."
        )
    made = F.normalize(rows(metric, "made", evidence.made), dim=1)
    partners = F.normalize(rows(metric, "partner", evidence.partners), dim=1)
    own = (made * partners).sum(1)
    n = len(own)
    others = (torch.dot(made.sum(0), partners.sum(0)) - own.sum()) / (n * (n - 1))
    return own, float(others)
