"""Memorisation: copies are found, and fresh draws score what chance gives them."""

import numpy as np
import pytest
import torch

from eclosion.errors import DataError
from eclosion.metrics.memorisation import Memorisation, Pair
from eclosion.metrics.metric import Evidence, Moments, Reference


def features(count, seed, *, dim=3):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)))


def evidence(made, held_out, train):
    return Evidence(made, Reference(Moments.of(held_out), held_out), Reference(Moments.of(train), train))


def values(made, held_out, train, **options):
    return {name: one.value for name, one in Memorisation(**options).scores(evidence(made, held_out, train)).items()}


def test_it_agrees_with_a_search_through_all_pairs():
    made, held_out, train = features(30, 1), features(49, 2), features(40, 3)
    near = [np.sort([min(np.linalg.norm(x - t) for t in train.numpy()) for x in s.numpy()]) for s in (made, held_out)]
    found = values(made, held_out, train, quantile=0.1)
    assert found["memorised"] == np.mean(near[0] <= near[1][4])  # the fifth of 49 has a tenth below it
    assert found["nearer_than_held_out"] == pytest.approx(np.mean(near[0][:, None] < near[1]))


def test_fresh_draws_score_what_chance_gives_them():
    drawn = [values(features(40, 3 * s), features(99, 3 * s + 1), features(60, 3 * s + 2)) for s in range(200)]
    assert np.mean([one["memorised"] for one in drawn]) == pytest.approx(0.01, abs=0.004)
    assert np.mean([one["nearer_than_held_out"] for one in drawn]) == pytest.approx(0.5, abs=0.02)


def test_copies_are_found_and_named():
    held_out, train = features(99, 2), features(60, 3)
    made = torch.cat([features(8, 1), train[[11, 4]]])
    found = values(made, held_out, train)
    assert found["memorised"] == 0.2
    pairs = Memorisation().pairs(evidence(made, held_out, train), limit=3)
    assert pairs[:2] == [Pair(8, 11, 0.0, 0.0, True), Pair(9, 4, 0.0, 0.0, True)]
    assert pairs[2].too_near is False
    assert pairs[2].distance == pytest.approx(float((made[pairs[2].image] - train[pairs[2].train]).norm()))
    assert values(train, held_out, train) == {"memorised": 1, "nearer_than_held_out": 1}


def test_equal_distances_count_half():
    train = features(60, 3)
    held_out = torch.cat([train[:40], features(60, 2)])
    assert values(train[:20], held_out, train)["nearer_than_held_out"] == pytest.approx(0.6 + 0.4 / 2)


def test_its_errors_are_how_far_the_scores_spread():
    drawn = [
        Memorisation(quantile=0.2).scores(evidence(features(80, 2 * s), features(400, 2 * s + 1), features(60, 999)))
        for s in range(200)
    ]
    order = [one["nearer_than_held_out"] for one in drawn]
    spread = torch.tensor([one.value for one in order]).std()
    assert 0.85 < torch.tensor([one.error for one in order]).mean() / spread < 1.15
    share = [one["memorised"] for one in drawn]
    spread = torch.tensor([one.value for one in share]).std()
    # given the threshold, which moves from draw to draw too
    assert 0.7 < torch.tensor([one.error for one in share]).mean() / spread < 1.1


def test_none_memorised_still_has_an_upper_limit():
    held_out, train = features(99, 2), features(60, 3)
    score = Memorisation().scores(evidence(features(50, 1) + 100, held_out, train))["memorised"]
    assert score.value == 0
    assert 0.05 < score.interval[1] < 0.1


def test_held_out_images_that_were_trained_on_are_refused():
    train = features(60, 3)
    with pytest.raises(DataError, match="memorisation: 50 of 50 held-out images are themselves among those trained on"):
        values(features(20, 1), train[:50], train)


def test_it_says_when_too_few_are_held_out_for_its_quantile():
    assert list(Memorisation().problems(made=100, reference=99, dim=8)) == []
    assert next(iter(Memorisation().problems(made=100, reference=49, dim=8))) == (
        "memorisation: 49 held-out images have no nearest 0.01 of them: fresh draws score memorised = 0.02. Hold out "
        "100 or more."
    )
