"""The kernel distance: the numbers of other implementations, unbiased, with an error that is true."""

import numpy as np
import pytest
import torch

from eclosion.errors import ConfigError
from eclosion.metrics import kid
from eclosion.metrics.kid import KernelDistance
from eclosion.metrics.metric import Evidence, Moments, Reference
from eclosion.rng import generator

KERNELS = [{}, {"degree": 2, "gamma": 0.3, "coef": 0.5}]


def features(count, seed, *, dim=6, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)) + shift).float()


def score(made, real, **options):
    return KernelDistance(**options).scores(Evidence(made, Reference(Moments.of(real), real), seed=7))


def by_hand(x, y, degree=3, gamma=None, coef=1.0):
    """Every pair in turn."""
    x, y = x.double().tolist(), y.double().tolist()
    gamma = gamma or 1 / len(x[0])

    def mean(pairs):
        kernels = [(gamma * sum(a * b for a, b in zip(one, two, strict=True)) + coef) ** degree for one, two in pairs]
        return sum(kernels) / len(kernels)

    within = [mean([(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    return sum(within) - 2 * mean([(a, b) for a in x for b in y])


@pytest.mark.parametrize("options", KERNELS, ids=str)
def test_it_is_the_unbiased_mean_over_all_pairs(options, monkeypatch):
    made, real = features(23, 1, shift=0.5), features(31, 2)
    whole = score(made, real, **options)["kid"]
    assert whole.value == pytest.approx(by_hand(made, real, **options), rel=1e-10)
    monkeypatch.setattr(kid, "BLOCK", 7)
    blocks = score(made, real, **options)["kid"]
    assert (blocks.value, blocks.error) == pytest.approx((whole.value, whole.error), rel=1e-10)


@pytest.mark.parametrize("options", KERNELS, ids=str)
def test_its_subsets_agree_with_torchmetrics_draw_by_draw(options, monkeypatch):
    """An independent implementation, which is made to draw the same subsets."""
    from torchmetrics.image.kid import KernelInceptionDistance

    made, real = features(40, 1, shift=0.5).double(), features(50, 2).double()
    with pytest.warns(UserWarning, match="large memory footprint"):
        theirs = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=5, subset_size=20, **options)
    theirs.update(real, real=True)
    theirs.update(made, real=False)
    drawn = (
        torch.from_numpy(generator(7, "kid", what, number).permutation(count))
        for number in range(5)
        for what, count in (("reference", 50), ("made", 40))
    )
    monkeypatch.setattr(torch, "randperm", lambda count: next(drawn))
    mean, std = theirs.compute()
    ours = score(made, real, subsets=5, subset_size=20, **options)
    assert ours["kid"].value == pytest.approx(float(mean), rel=1e-6)
    assert ours["kid_std"].value == pytest.approx(float(std), rel=1e-6)


def test_subsets_of_all_images_are_all_images():
    made, real = features(30, 1, shift=0.5), features(30, 2)
    whole = score(made, real)["kid"].value
    subsets = score(made, real, subsets=3, subset_size=30)
    assert subsets["kid"].value == pytest.approx(whole, rel=1e-10)
    assert subsets["kid_std"].value == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("shift", "counts"), [(0.0, (60, 60)), (0.0, (40, 200)), (0.4, (60, 120))], ids=str)
def test_it_is_unbiased_and_its_error_is_how_far_it_spreads(shift, counts):
    """Also where both sets are alike, and all that spreads is what pairs contribute."""
    drawn = [score(features(counts[0], 2 * s, shift=shift), features(counts[1], 2 * s + 1))["kid"] for s in range(300)]
    values = torch.tensor([one.value for one in drawn])
    truth = score(features(3000, 1001, shift=shift), features(3000, 1002))["kid"].value if shift else 0.0
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5 + (0.02 if shift else 0)
    told = torch.tensor([one.error for one in drawn]).square().mean().sqrt()
    assert 0.85 < told / values.std() < 1.3  # where the sets are alike it rather overstates
    held = sum(one.interval[0] <= truth <= one.interval[1] for one in drawn)
    assert held > 0.9 * len(drawn)


@pytest.mark.parametrize("subsets", [1, 4])
def test_the_error_of_the_mean_over_subsets_is_how_far_it_spreads(subsets):
    """Images and subsets are drawn anew each time."""
    drawn = []
    for s in range(200):
        made, real = features(50, 2 * s, shift=0.4), features(70, 2 * s + 1)
        evidence = Evidence(made, Reference(Moments.of(real), real), seed=s)
        drawn.append(KernelDistance(subsets=subsets, subset_size=20).scores(evidence)["kid"])
    spread = torch.tensor([one.value for one in drawn]).std()
    told = torch.tensor([one.error for one in drawn]).square().mean().sqrt()
    assert 0.85 < told / spread < 1.2
    assert all(one.interval[0] < one.value < one.interval[1] for one in drawn)


def test_too_few_images_for_a_subset_are_refused_with_the_cure():
    with pytest.raises(ConfigError) as error:
        list(KernelDistance(subsets=10).problems(made=1000, reference=300, dim=8))
    assert str(error.value) == (
        "kid: subset_size is 1000, and there are 300 reference images. Use more images, subset_size=300 or less, or "
        "leave subsets out: all images are then compared once."
    )
    assert list(KernelDistance().problems(made=1000, reference=300, dim=8)) == []
    assert "look at its interval" in next(iter(KernelDistance().problems(made=1000, reference=30, dim=8)))
