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


@pytest.mark.parametrize(("count", "splits"), [(60, 10), (57, 10), (60, 1), (23, 10), (90, 40)], ids=str)
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
    assert list(InceptionScore(splits=4).problems(made=4000, reference=0, dim=1008)) == []
    assert math.isfinite(InceptionScore().scores(Evidence(logits(21, 1)))["inception_score"].error)


@pytest.mark.parametrize(
    ("count", "splits", "told"),
    [
        (
            23,
            10,
            "23 images with splits=10 are 8 parts: 7 of 3 images, and one of 2, which counts as much. "
            "For 10 equal ones use 20 images.",
        ),
        (
            57,
            10,
            "57 images with splits=10 are 10 parts: 9 of 6 images, and one of 3, which counts as much. "
            "For 10 equal ones use 50 images.",
        ),
    ],
)
def test_it_says_which_parts_there_are_if_they_are_not_equal(count, splits, told):
    found = list(InceptionScore(splits=splits).problems(made=count, reference=0, dim=1008))
    size = len(torch.chunk(logits(count, 1), splits)[0])
    assert found == [
        f"inception_score: {told}",
        f"inception_score: there are {size} images in a part, and the score grows with their number. Compare it only "
        "at the same n and splits; papers take 50 000 in 10.",
    ]


@pytest.mark.parametrize(("count", "splits"), [(22, 10), (91, 40)])
def test_a_part_of_one_image_is_refused_with_numbers_that_leave_none(count, splits):
    metric = InceptionScore(splits=splits)
    with pytest.raises(ConfigError) as error:
        list(metric.problems(made=count, reference=0, dim=1008))
    size = math.ceil(count / splits)
    assert str(error.value) == (
        f"inception_score: {count} images with splits={splits} are parts of {size} and a last one of 1, which scores 1 "
        f"whatever it shows. Use {count - 1} images, or a multiple of {splits}."
    )
    assert list(metric.problems(made=count - 1, reference=0, dim=1008))


def test_every_number_of_images_is_described_as_torch_divides_it_or_refused():
    for splits in (2, 7, 10):
        for count in range(2 * splits, 150):
            sizes = [len(one) for one in torch.chunk(torch.zeros(count), splits)]
            try:
                told = list(InceptionScore(splits=splits).problems(made=count, reference=0, dim=1008))
            except ConfigError:
                assert sizes[-1] == 1
                continue
            assert sizes[-1] > 1
            parts = f"{len(sizes)} parts: {len(sizes) - 1} of {sizes[0]} images, and one of {sizes[-1]}, "
            assert (parts in told[0]) == (len(set(sizes)) > 1), (count, splits)
