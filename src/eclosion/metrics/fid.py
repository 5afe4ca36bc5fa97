"""The distance between two sets of features, each taken as a Gaussian.

mu, S      mean and covariance of a set of features
F          S = F F^T for the set that is scored
s, U       eigenvalues and eigenvectors of F^T S' F, S' the reference's covariance
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from eclosion.metrics.features import enough, rows
from eclosion.metrics.metric import Better, Evidence, Influence, LooksAt, Moments, Need, Score
from eclosion.metrics.uncertainty import with_error
from eclosion.registry import PartOf, part

__all__ = ["FrechetDistance", "frechet_distance"]


@part
class FrechetDistance:
    """Fréchet distance between the images and the reference, their features taken as Gaussian: FID, with Inception's.

    It is biased: the fewer images, the larger it is, even between two halves of the same real images. Compare it only
    at equal numbers of images, beside the same score of real images, and prefer `kid` below some ten thousand.

    Its standard error comes from how much each image moves it. The interval says how it spreads from draw to draw, and
    nothing about the bias.

    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
    """

    # The encoder whose features it looks at; none takes the evaluation's.
    extractor: Annotated[Any, PartOf("encoders")] | None = None

    looks_at: ClassVar[LooksAt] = "moments"

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be there besides the images."""
        return ("reference",)

    @property
    def better(self) -> Mapping[str, Better]:
        """Each score, and which way is better."""
        return {"fid": "lower"}

    def problems(self, *, made: int, reference: int, dim: int) -> Iterator[str]:
        """What a reader must know of these counts.

        Raises:
            ConfigError: if there are fewer than two images of a kind.
        """
        enough("fid", {"made": made, "reference": reference}, 2)
        fewest = min(made, reference)
        if fewest <= dim:
            yield (
                f"fid: {fewest} images cannot fill {dim} dimensions: their covariance is singular, and the distance is "
                "mostly bias. Report kid, or compare fid only with the real images' own at the same n."
            )
        elif fewest < 10 * dim:
            yield (
                f"fid: {fewest} images for {dim} dimensions: the distance is still biased upwards. Compare it only at "
                "the same n; papers take 10 000 to 50 000 images."
            )

    def scores(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by name.

        Raises:
            DataError: if a feature is not finite.
        """
        assert evidence.reference is not None
        made = rows("fid", "made", evidence.made)
        kept = rows("fid", "reference", evidence.reference.features)
        coupling = _couple(Moments.of(made), evidence.reference.moments)
        ours, theirs = coupling.influences(made, kept)
        if len(kept) < 2:  # the sums are all that the distance takes, and say nothing of its error
            return {"fid": Score(coupling.distance)}
        # the moments are of all reference images, of which some may have been kept
        variance = ours.var() / len(made) + theirs.var() / evidence.reference.moments.count
        return {"fid": with_error(coupling.distance, math.sqrt(float(variance)), Influence(ours, theirs))}


def frechet_distance(made: Moments, reference: Moments) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2), for covariances of any rank.

    Source: Dowson & Landau 1982, https://doi.org/10.1016/0047-259X(82)90077-X.
    """
    return _couple(made, reference).distance


@dataclass(frozen=True)
class _Coupling:
    """What the distance of two Gaussians is made of."""

    made: Moments
    reference: Moments
    factor: Tensor  # F, [D, r]
    inverse: Tensor  # F^-1, [r, D]
    values: Tensor  # s, [q], all > 0
    vectors: Tensor  # U, [r, q]

    @property
    def distance(self) -> float:
        """(S S')^1/2 has the trace of (F^T S' F)^1/2, which is symmetric: no eigenvalue strays off the real line."""
        shift = self.made.mean - self.reference.mean
        spread = self.made.covariance.trace() + self.reference.covariance.trace() - 2 * self.values.sqrt().sum()
        return max(float(shift @ shift + spread), 0.0)  # rounding may leave a trace of less, and no distance is

    def influences(self, made: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """How much more of each image would move the distance, up to a constant: [N] and [M].

        The distance has the derivatives 2 (mu - mu') by mu and I - T by S, where T = F^-T (F^T S' F)^1/2 F^-1 carries
        the one Gaussian into the other; and the same with its inverse on the other side.

        Args:
            made, reference: float64 [N, D] and [M, D], the rows that the moments are of.
        """
        shift = self.made.mean - self.reference.mean
        x, y = made - self.made.mean, reference - self.reference.mean
        root = self.values.sqrt()
        carried = (((self.vectors.T @ self.inverse @ x.T) ** 2) * root[:, None]).sum(0)
        carried_back = (((y @ self.factor @ self.vectors) ** 2) / root).sum(1)
        return (
            2 * x @ shift + (x**2).sum(1) - carried,
            -2 * y @ shift + (y**2).sum(1) - carried_back,
        )


def _couple(made: Moments, reference: Moments) -> _Coupling:
    factor, inverse = _factor(made.covariance)
    values, vectors = torch.linalg.eigh(factor.T @ reference.covariance @ factor)
    kept = values > _noise(values)
    return _Coupling(made, reference, factor, inverse, values[kept], vectors[:, kept])


def _factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """F with F F^T the covariance, [D, r], and its inverse, [r, D]: Cholesky's, or of eigenvectors if its rank is r."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        identity = torch.eye(len(factor), dtype=factor.dtype)
        return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > _noise(values)
    roots = values[kept].sqrt()
    return vectors[:, kept] * roots, (vectors[:, kept] / roots).T


def _noise(values: Tensor) -> float:
    """What rounding leaves of eigenvalues that are 0; their roots, many times 1e-8, would add up."""
    return float(values.abs().max()) * len(values) * torch.finfo(values.dtype).eps if len(values) else 0.0
