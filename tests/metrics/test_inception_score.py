"""The Inception Score: torchmetrics' numbers, and where it must end."""

import math

import numpy as np
import pytest
import torch

from eclosion.errors import ConfigError
from eclosion.metrics.inception_score import InceptionScore
from eclosion.metrics.metric import Evidence
from eclosion.rng import generator


def logits(count, seed, *, classes=12):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, classes)) * 2)


@pytest.mark.parametrize(("count", "splits"), [(60, 10), (57, 10), (60, 1)], ids=str)
@pytest.mark.filterwarnings("ignore:std..:UserWarning")  # theirs, of the deviation of one split
def test_it_agrees_with_torchmetrics(count, splits, monkeypatch):
    """An independent implementation, which is made to put the images into the same order."""
    from torchmetrics.image.inception import InceptionScore as Theirs

    rows = logits(count, 1)
    with pytest.warns(UserWarning, match="large memory footprint"):
        theirs = Theirs(feature=torch.nn.Identity(), splits=splits)
    theirs.update(rows)
    order = torch.from_numpy(generator(5, "inception_score").permutation(count))
    monkeypatch.setattr(torch, "randperm", lambda n: order)
    mean, std = theirs.compute()
    ours = InceptionScore(splits=splits).scores(Evidence(rows, seed=5))
    assert ours["inception_score"].value == pytest.approx(float(mean), rel=1e-6)
    assert ours["inception_score_std"].value == pytest.approx(0.0 if splits == 1 else float(std), rel=1e-6)


def test_it_lies_between_one_and_the_number_of_classes():
    sure = torch.eye(8, dtype=torch.float64).repeat(10, 1) * 1000
    score = InceptionScore(splits=1).scores(Evidence(sure))["inception_score"]
    assert score.value == pytest.approx(8, rel=1e-12)
    same = logits(1, 1).expand(80, -1)
    assert InceptionScore().scores(Evidence(same))["inception_score"].value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("splits", [1, 4])
def test_its_error_is_how_far_it_spreads_from_draw_to_draw(splits):
    drawn = [
        InceptionScore(splits=splits).scores(Evidence(logits(400, 1000 + seed)))["inception_score"]
        for seed in range(200)
    ]
    spread = torch.tensor([one.value for one in drawn]).std()
    assert 0.85 < torch.tensor([one.error for one in drawn]).mean() / spread < 1.2


def test_it_says_when_there_are_too_few_images_in_a_split():
    assert list(InceptionScore().problems(made=50_000, reference=0, dim=1008)) == []
    assert "grows with their number" in next(iter(InceptionScore().problems(made=1000, reference=0, dim=1008)))
    with pytest.raises(ConfigError, match="inception_score with splits=10: 19 made images, and it takes at least 20"):
        list(InceptionScore().problems(made=19, reference=0, dim=1008))
    assert math.isfinite(InceptionScore().scores(Evidence(logits(21, 1)))["inception_score"].error)
