"""Precision, recall, density and coverage: their definitions, pair by pair."""

import numpy as np
import pytest
import torch

from eclosion.errors import ConfigError
from eclosion.metrics import features as features_module
from eclosion.metrics import precision_recall
from eclosion.metrics.metric import Evidence, Moments, Reference
from eclosion.metrics.precision_recall import PARTS, PrecisionRecall


def features(count, seed, *, dim=4, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)) * scale + shift)


def score(made, real, **options):
    return PrecisionRecall(**options).scores(Evidence(made, Reference(Moments.of(real), real), seed=3))


def by_hand(made, real, k):
    """As the papers define them, with a loop for each quantifier."""

    def far(a, b):
        return float(((a - b) ** 2).sum() ** 0.5)

    def reach(rows, i):
        return sorted(far(rows[i], other) for j, other in enumerate(rows) if j != i)[k - 1]

    made, real = made.numpy(), real.numpy()
    made_reach, real_reach = ([reach(rows, i) for i in range(len(rows))] for rows in (made, real))
    balls = [sum(far(x, y) <= real_reach[i] for i, y in enumerate(real)) for x in made]
    recalled = [any(far(x, y) <= made_reach[j] for j, x in enumerate(made)) for y in real]
    covered = [any(far(x, y) <= real_reach[i] for x in made) for i, y in enumerate(real)]
    return {
        "precision": np.mean([n > 0 for n in balls]),
        "recall": np.mean(recalled),
        "density": np.mean(balls) / k,
        "coverage": np.mean(covered),
    }


@pytest.mark.parametrize(("k", "block"), [(1, 1024), (5, 1024), (3, 7)], ids=str)
def test_it_agrees_with_the_definitions_also_without_each_part(k, block, monkeypatch):
    """A brute-force reference, of the scores and of what the jackknife is made of."""
    monkeypatch.setattr(precision_recall, "BLOCK", block)
    made, real = features(40, 1, scale=0.8, shift=0.4), features(40, 2)
    found = precision_recall._compare(made, real, k)
    assert found.values() == pytest.approx(by_hand(made, real, k))
    kept = torch.arange(40) % PARTS != 4
    assert found.values(made_without=4) == pytest.approx(by_hand(made[kept], real, k))
    assert found.values(real_without=4) == pytest.approx(by_hand(made, real[kept], k))


def test_images_that_are_all_one_real_image_are_precise_and_recall_nothing_else():
    real = features(100, 1)
    scores = {name: one.value for name, one in score(real[:1].expand(100, -1), real).items()}
    assert scores["precision"] == 1
    assert scores["recall"] == pytest.approx(0.01)
    assert scores["coverage"] < 0.2


def test_of_a_larger_reference_as_many_are_drawn_as_there_are_images():
    made, real = features(50, 1), features(400, 2)
    order = torch.from_numpy(precision_recall.generator(3, "precision_recall").permutation(400))
    expected = by_hand(made, real[order[:50]], 5)
    assert {name: one.value for name, one in score(made, real).items()} == pytest.approx(expected)


def test_of_more_images_as_many_are_drawn_as_the_reference_has_and_a_note_says_so():
    made, real = features(400, 1), features(50, 2)
    order = torch.from_numpy(precision_recall.generator(3, "precision_recall", "made").permutation(400))
    found = score(made, real)
    expected = by_hand(made[order[:50]], real, 5)
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected)
    assert {one.counts for one in found.values()} == {(50, 50)}
    assert {one.counts for one in score(real, made).values()} == {(50, 50)}
    assert list(PrecisionRecall().problems(made=400, reference=50, dim=4))[1:] == [
        "precision_recall: the reference has 50 images, and the scores want two sets of one size: 50 of the 400 images "
        "are looked at. Compare with more images to look at all."
    ]
    assert len(list(PrecisionRecall().problems(made=50, reference=400, dim=4))) == 1


def test_its_errors_do_not_understate_how_far_the_scores_spread():
    drawn = [score(features(100, 2 * s, shift=0.5), features(100, 2 * s + 1)) for s in range(80)]
    for name in ("precision", "recall", "density", "coverage"):
        spread = torch.tensor([one[name].value for one in drawn]).std()
        told = torch.tensor([one[name].error for one in drawn]).mean()
        assert 0.9 < told / spread < 2, name


def test_a_share_of_all_images_has_an_interval_with_a_width():
    real = features(100, 1)
    precision = score(real, real)["precision"]
    assert precision.value == 1
    assert precision.interval[0] < 0.97
    assert precision.interval[1] == 1


def test_too_many_neighbours_are_refused_with_the_cure():
    with pytest.raises(ConfigError) as error:
        list(PrecisionRecall(neighbours=20).problems(made=1000, reference=20, dim=8))
    assert str(error.value) == (
        "precision_recall: neighbours is 20, and there are 20 reference images. Use more images, or neighbours=17 or "
        "less."
    )
    list(PrecisionRecall(neighbours=17).problems(made=20, reference=20, dim=8))
    assert score(features(20, 1), features(20, 2), neighbours=17)["coverage"].value == 1
    assert list(PrecisionRecall().problems(made=1000, reference=1000, dim=8)) == []


def test_nearest_is_exact_for_copies_and_skips_the_row_itself(monkeypatch):
    monkeypatch.setattr(features_module, "BLOCK", 3)
    rows = features(10, 1, shift=1000)
    distance, which = features_module.nearest(rows.flip(0), rows)
    assert distance.tolist() == [0] * 10
    assert which.tolist() == list(range(9, -1, -1))
    apart = torch.cdist(rows, rows).fill_diagonal_(torch.inf).sort(1)
    assert torch.equal(features_module.nearest(rows, None, 2)[1], apart.indices[:, 1])
