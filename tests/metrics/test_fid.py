"""The Fréchet distance: the numbers of other implementations, at any rank, and an error that is true."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from eclosion.errors import ConfigError, DataError
from eclosion.metrics.fid import FrechetDistance, frechet_distance
from eclosion.metrics.metric import Evidence, Moments, Reference


def features(count, dim, seed, *, scale=1.0, shift=0.0):
    """Correlated features with tails heavier than a Gaussian's."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((dim, dim)) * np.linspace(1, 0.05, dim)[:, None]
    rows = rng.standard_normal((count, dim)) * (0.7 + 0.6 * rng.random((count, 1)))
    return torch.from_numpy(rows * scale @ mixing + shift)


def reference(rows):
    return Reference(Moments.of(rows), rows.float())


def score(made, other):
    return FrechetDistance().scores(Evidence(made, reference(other)))["fid"]


def by_scipy(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root.real)


class Extractor(nn.Module):
    """Features for torchmetrics, in float64 so that both compute from the same numbers."""

    num_features = 6

    def forward(self, images):
        weights = np.random.default_rng(3).standard_normal((3 * 4 * 4, self.num_features))
        return (images.flatten(1).double() / 255) @ torch.from_numpy(weights)


def test_it_agrees_with_torchmetrics():
    """An independent implementation, with the same extractor on the same images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(1)
    real, made = (torch.from_numpy(rng.integers(low, 256, (90, 3, 4, 4), np.uint8)) for low in (0, 40))
    theirs = FrechetInceptionDistance(feature=Extractor())
    theirs.update(real[:50], real=True)
    theirs.update(real[50:], real=True)
    theirs.update(made, real=False)
    extract = Extractor()
    ours = frechet_distance(Moments.of(extract(made)), Moments.of(extract(real)))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("counts", [(200, 300), (20, 300), (300, 20), (20, 25)], ids=str)
def test_it_agrees_with_scipy_at_any_rank(counts):
    """With fewer images than dimensions covariances are singular: one of them, or both."""
    made, real = features(counts[0], 40, 1, scale=1.2, shift=0.1), features(counts[1], 40, 2)
    # a root of a singular matrix is only as exact as the root of the rounding
    assert score(made, real.float()).value == pytest.approx(by_scipy(made, real.float()), rel=1e-5)


def test_of_singular_covariances_it_is_that_within_their_common_space():
    """Rotated into a larger space, points are as far from each other as they were."""
    made, real = features(30, 8, 1, shift=0.3), features(40, 8, 2)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(5).standard_normal((64, 8)))[0].T)
    small = frechet_distance(Moments.of(made), Moments.of(real))
    assert frechet_distance(Moments.of(made @ rotation), Moments.of(real @ rotation)) == pytest.approx(small, rel=1e-9)


def test_of_covariances_that_commute_it_has_a_closed_form():
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    made, real = corners * torch.tensor([3.0, 1.0]) + 2, corners * torch.tensor([1.0, 2.0])
    # of either axis: (difference of means)^2 + (difference of standard deviations)^2, the variance of +-1 being 4/3
    assert frechet_distance(Moments.of(made), Moments.of(real)) == pytest.approx(4 + 4 + (4 + 1) * 4 / 3, rel=1e-12)


@pytest.mark.parametrize("count", [500, 300, 60, 20])
def test_a_set_is_at_no_distance_from_itself(count):
    rows = features(count, 40, 1)
    trace = float(Moments.of(rows).covariance.trace())
    assert 0 <= score(rows, rows).value < 1e-6 * trace  # nor at less, by rounding


def test_images_that_are_all_the_same_are_scored():
    real = features(50, 8, 1)
    one = real[:1].expand(30, -1)
    spread = real - real.mean(0)
    expected = ((one[0] - real.mean(0)) ** 2).sum() + (spread**2).sum() / 49
    assert score(one, real).value == pytest.approx(float(expected), rel=1e-6)


def test_moments_of_parts_add_to_those_of_the_whole():
    made, real = features(60, 8, 1, shift=0.3), features(80, 8, 2)
    parts = Moments.of(made[:13]) + Moments.of(made[13:])
    whole = frechet_distance(Moments.of(made), Moments.of(real))
    assert frechet_distance(parts, Moments.of(real)) == pytest.approx(whole, rel=1e-12)


def test_its_error_is_how_far_it_spreads_from_draw_to_draw():
    drawn = [score(features(300, 6, 2 * s, shift=0.2), features(400, 6, 2 * s + 1)) for s in range(150)]
    spread = torch.tensor([one.value for one in drawn]).std()
    told = torch.tensor([one.error for one in drawn]).mean()
    assert 0.85 < told / spread < 1.3


def test_its_error_counts_all_reference_images_also_those_whose_features_were_not_kept():
    made, real = features(2000, 6, 1, shift=0.2), features(400, 6, 2)
    part = Reference(Moments.of(real), real[:200].float())
    few = Reference(Moments.of(real[:200]), real[:200].float())
    errors = [FrechetDistance().scores(Evidence(made, one))["fid"].error for one in (part, few)]
    assert errors[0] < 0.9 * errors[1]


def test_it_says_when_the_number_of_images_is_too_small_for_it():
    part = FrechetDistance()
    assert list(part.problems(made=50_000, reference=50_000, dim=2048)) == []
    assert "singular" in next(iter(part.problems(made=2000, reference=50_000, dim=2048)))
    assert "biased upwards" in next(iter(part.problems(made=50_000, reference=5000, dim=2048)))
    with pytest.raises(ConfigError, match="fid: 1 reference images, and it takes at least 2"):
        list(part.problems(made=10, reference=1, dim=8))


def test_an_image_without_finite_features_is_named():
    made = features(20, 4, 1)
    made[7, 2] = torch.nan
    with pytest.raises(DataError, match=r"fid: made image 7 has features that are not finite numbers \(1 of 20"):
        score(made, features(20, 4, 2))
