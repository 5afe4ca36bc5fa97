"""Memorisation: copies are found, and fresh draws score what chance gives them."""

import numpy as np
import pytest
import torch
from scipy import stats

from eclosion.metrics.memorisation import Memorisation, Pair
from eclosion.metrics.metric import Evidence, Moments, Reference, Unscorable
from eclosion.metrics.uncertainty import of_share, of_share_below


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
    assert Memorisation().better == {"memorised": "lower", "nearer_than_held_out": "near 0.5"}
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
    train, step = 64 * torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    held_out = torch.cat([(train[1] + step[1]).expand(40, 3), (train[2] + 2 * step[2]).expand(60, 3)])
    found = values((train[0] + step[0]).expand(20, 3), held_out, train)
    assert found["nearer_than_held_out"] == pytest.approx(0.6 + 0.4 / 2)


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
    assert 0.85 < torch.tensor([one.error for one in share]).mean() / spread < 1.15


DRAWS = [(held_out, copied, nearer) for copied, nearer in [(0, 1), (0.3, 1), (0, 0.2)] for held_out in (100, 500)]


@pytest.mark.parametrize(("held_out", "copied", "nearer"), DRAWS)
def test_its_interval_holds_what_is_expected_of_fresh_draws_of_copies_and_of_images_that_are_nearer(
    held_out, copied, nearer
):
    """The nearest hundredth is told by one held-out image of 100, or by five of 500, which are drawn as well."""
    count, repeats, place = 1000, 400, (held_out + 1) // 100
    train, rng = torch.zeros(1, 1), np.random.default_rng(5)

    def share_of_a_draw():
        made = nearer * rng.exponential(size=count) * (rng.random(count) >= copied)
        others = torch.from_numpy(rng.exponential(size=(held_out, 1)))
        return Memorisation().scores(evidence(torch.from_numpy(made)[:, None], others, train))["memorised"]

    drawn = [share_of_a_draw() for _ in range(repeats)]
    above = stats.beta(place, held_out + 1 - place).expect(lambda u: (1 - u) ** (1 / nearer))
    expected = copied + (1 - copied) * (1 - above)
    covered = np.mean([one.interval[0] <= expected <= one.interval[1] for one in drawn])
    # how densely images lie around one held-out image is a guess
    least = 0.8 if (held_out, nearer) == (100, 0.2) else 0.95 - 4 * np.sqrt(0.95 * 0.05 / repeats)
    assert least < covered < 0.95 + 4 * np.sqrt(0.95 * 0.05 / repeats)
    told, spread = np.mean([one.error for one in drawn]), np.std([one.value for one in drawn])
    assert 0.85 < told / spread < 1.5


def test_the_error_of_a_share_below_a_drawn_threshold_is_that_of_the_beta_binomial_distribution():
    """Where as many are below it as are expected of draws from the distribution of the others."""
    score = of_share_below(some_below(40, 1010), torch.linspace(1, 2, 100), 4)
    assert score.value == pytest.approx(4 / 101)
    assert score.error == pytest.approx(stats.betabinom(1010, 4, 97).std() / 1010, rel=1e-9)


@pytest.mark.parametrize(("hits", "count"), [(0, 50), (1, 50), (25, 50), (50, 50), (7, 1000)])
def test_beside_many_others_the_threshold_counts_for_nothing(hits, count):
    whole = of_share_below(some_below(hits, count), torch.linspace(1, 2, 200_000), 2)
    alone = of_share(hits, count)
    assert whole.interval == pytest.approx(alone.interval, abs=1e-4)
    assert whole.error == pytest.approx(alone.error, abs=1e-4)


def test_copies_have_a_narrow_interval_however_few_are_held_out():
    low, high = of_share_below(some_below(1000, 1000), torch.linspace(1, 2, 20), 1).interval
    assert (low > 0.995, high) == (True, 1)


def some_below(hits, count):
    """Numbers of which so many are below all from 1 to 2, and the rest above."""
    return torch.cat([torch.zeros(hits), torch.full((count - hits,), 3.0)])


def test_none_memorised_still_has_an_upper_limit():
    held_out, train = features(99, 2), features(60, 3)
    score = Memorisation().scores(evidence(features(50, 1) + 100, held_out, train))["memorised"]
    assert score.value == 0
    assert 0.05 < score.interval[1] < 0.1


@pytest.mark.parametrize("rounding", [0, 1e-6], ids=["exact", "rounded"])
def test_a_few_held_out_images_that_are_copies_take_no_part(rounding):
    """With them, the nearest held-out image would be at distance 0, and only an exact copy as near."""
    train, held_out = features(60, 3), features(199, 2)
    made = torch.cat([features(20, 1), train[30:50] * (1 + 2 * rounding)])
    mixed = torch.cat([held_out[:100], train[:3] * (1 + rounding), held_out[100:]])
    assert values(made, mixed, train) == values(made, held_out, train)
    assert values(made, mixed, train)["memorised"] == 0.5
    known, wanted = (Memorisation().pairs(evidence(made, one, train), limit=40) for one in (mixed, held_out))
    assert known == wanted
    for score in Memorisation().scores(evidence(made, mixed, train)).values():
        assert score.notes == (
            "memorisation: copies of training images among the 202 held-out ones: 3. They are left out, and the other "
            "199 say how near is too near. Take them out of one of the parts.",
        )
    assert not any(score.notes for score in Memorisation().scores(evidence(made, held_out, train)).values())


def test_it_says_when_without_copies_too_few_are_held_out_for_its_quantile():
    train = features(60, 3)
    held_out = torch.cat([features(90, 2), train[:10]])
    notes = Memorisation().scores(evidence(features(20, 1), held_out, train))["memorised"].notes
    assert [note[:41] for note in notes[1:]] == ["memorisation: 90 held-out images have no "]


def test_held_out_images_that_were_trained_on_are_refused():
    train = features(60, 3)
    half = torch.cat([train[:25], features(25, 2)])
    assert values(features(20, 1), half, train)["nearer_than_held_out"] < 1
    with pytest.raises(Unscorable, match="memorisation: 26 of 50 held-out images are themselves among those trained"):
        values(features(20, 1), torch.cat([train[25:26], half[:-1]]), train)
    with pytest.raises(Unscorable, match="memorisation: 1 of 2 held-out images"):
        values(features(20, 1), half[24:26], train)
    with pytest.raises(Unscorable, match="memorisation: 50 of 50 held-out images are themselves"):
        values(features(20, 1), train[:50], train)


def test_it_says_when_too_few_are_held_out_for_its_quantile():
    assert list(Memorisation().problems(made=100, reference=99, dim=8)) == []
    assert next(iter(Memorisation().problems(made=100, reference=49, dim=8))) == (
        "memorisation: 49 held-out images have no nearest 0.01 of them: fresh draws score memorised = 0.02. Hold out "
        "100 or more."
    )
