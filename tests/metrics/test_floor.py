"""The floor: what real images score against others, and how every metric is asked for it."""

import numpy as np
import pytest
import torch

from eclosion.errors import ConfigError
from eclosion.metrics.floor import floor
from eclosion.metrics.metric import Evidence, Moments, Reference, Unscorable
from eclosion.registry import METRICS, build
from eclosion.rng import generator


def reference(count, seed, *, dim=5):
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim))).float()
    return Reference(Moments.of(rows), rows)


@pytest.mark.parametrize("name", ["fid", "kid", "precision_recall"])
@pytest.mark.parametrize(("made", "part"), [(30, 30), (90, 60)], ids=str)
def test_it_is_the_score_of_a_part_of_the_reference_against_the_rest(name, made, part):
    metric, real = build("metrics", name), reference(120, 1)
    order = torch.from_numpy(generator(4, "floor").permutation(120))
    drawn, rest = real.features[order[:part]], real.features[order[part:]]
    found = floor(metric, real, made, 4)
    assert (found.made, found.reference) == (part, 120 - part)
    assert found.scores == metric.scores(Evidence(drawn, Reference(Moments.of(rest), rest), seed=4))
    equal = {score.counts for score in found.scores.values()}
    assert equal == {(part, part) if name == "precision_recall" else None}


@pytest.mark.parametrize(("made", "part"), [(30, 30), (200, 120)], ids=str)
def test_of_a_score_that_compares_with_no_images_it_is_that_of_real_ones(made, part):
    metric, real = build("metrics", {"name": "inception_score", "splits": 2}), reference(120, 1)
    drawn = real.features[torch.from_numpy(generator(4, "floor").permutation(120))[:part]]
    found = floor(metric, real, made, 4)
    assert (found.made, found.reference) == (part, None)
    assert found.scores == metric.scores(Evidence(drawn, seed=4))


def test_memorisation_has_a_floor_where_there_are_training_images():
    metric, held_out = build("metrics", "memorisation"), reference(400, 1)
    assert floor(metric, held_out, 100) is None
    scores = floor(metric, held_out, 100, train=reference(60, 2)).scores
    assert scores["memorised"].value < 0.05
    assert abs(scores["nearer_than_held_out"].value - 0.5) < 4 * scores["nearer_than_held_out"].error


def test_held_out_images_that_are_copies_are_no_floor_of_memorisation():
    metric, held_out, train = build("metrics", "memorisation"), reference(40, 1), reference(60, 2)
    features = torch.cat([train.features[:40], held_out.features])
    mixed = Reference(Moments.of(features), features)
    assert floor(metric, mixed, 15, train=train) == floor(metric, held_out, 15, train=train)
    assert floor(metric, train, 15, train=train) is None


class NeverScorable:
    """A metric that has no score for any images."""

    needs, better = ("reference",), {}

    def problems(self, *, made, reference, dim):
        return iter(())

    def scores(self, evidence):
        raise Unscorable("no score")


def test_of_images_that_have_no_score_there_is_no_floor():
    assert floor(NeverScorable(), reference(40, 1), 15) is None


def test_what_compares_image_by_image_or_has_too_few_images_has_no_floor():
    for name in ("lpips", "clip_score", "cosine"):
        assert floor(build("metrics", name), reference(120, 1), 30) is None
    assert floor(build("metrics", {"name": "kid", "subsets": 3, "subset_size": 70}), reference(120, 1), 80) is None
    assert floor(build("metrics", {"name": "kid", "subsets": 3, "subset_size": 50}), reference(120, 1), 80).made == 60


def test_of_a_reference_that_keeps_too_few_features_only_sums_are_taken():
    real, made = reference(120, 1), reference(60, 2).features
    sums = Evidence(made, Reference(real.moments, real.features[:1]), real)
    score = build("metrics", "fid").scores(sums)["fid"]
    assert score.value == build("metrics", "fid").scores(Evidence(made, real))["fid"].value
    assert score.error is None
    for name in ("kid", "precision_recall", "memorisation"):
        with pytest.raises(ConfigError, match=rf"{name}: 1 (reference|held-out) images, and it takes at least"):
            build("metrics", name).scores(sums)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_the_scores_that_it_says_and_the_same_each_time(name):
    metric, made = build("metrics", name), reference(120, 3).features
    evidence = Evidence(made, reference(130, 1), reference(90, 2), made + 1, made[:, 0].abs(), seed=2)
    scores = metric.scores(evidence)
    assert scores.keys() == metric.better.keys()
    assert all(np.isfinite(one.value) for one in scores.values())
    assert all(one.error is None or one.interval[0] <= one.value <= one.interval[1] for one in scores.values())
    assert metric.scores(evidence) == scores
    assert all(isinstance(line, str) for line in metric.problems(made=120, reference=130, dim=5))
