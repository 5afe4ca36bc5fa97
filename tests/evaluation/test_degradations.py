"""Scores of images that are wrong in a known way, as docs/metrics_study.py makes them."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SCRIPT = Path(__file__).parents[2] / "docs" / "metrics_study.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("efficientnet_lite_pytorch")
    spec = importlib.util.spec_from_file_location("metrics_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script, tmp_path_factory):
    """What is wrong -> score -> its value."""
    measured = script.study(120, 240, cache=tmp_path_factory.mktemp("references"))
    return {what: {row.score: row for row in one.rows} for what, one in measured.items()}


@pytest.mark.parametrize("score", ["kid", "fid"])
@pytest.mark.parametrize("names", [("real", "blurred, radius 1.5"), ("real", "noise, 10 of 255", "noise, 40 of 255")])
def test_distances_grow_with_what_is_wrong(score, names, found):
    values = [found[name][score].value for name in names]
    assert values == sorted(values)
    assert found[names[0]][score].interval[1] < found[names[1]][score].interval[0]


@pytest.mark.parametrize("score", ["kid", "fid"])
@pytest.mark.parametrize("name", ["one image, again and again", "blue ones only"])
def test_distances_grow_where_something_is_missing(score, name, found):
    assert found["real"][score].value < found[name][score].value


@pytest.mark.parametrize("score", ["recall", "coverage"])
@pytest.mark.parametrize("name", ["one image, again and again", "blue ones only", "blurred, radius 1.5"])
def test_recall_and_coverage_fall_where_something_is_missing(score, name, found):
    assert found[name][score].value < found["real"][score].value


def test_precision_falls_where_images_are_bad_and_not_where_they_are_few(found):
    precision = {name: scores["precision"].value for name, scores in found.items()}
    assert precision["noise, 40 of 255"] < precision["noise, 10 of 255"] < precision["real"]
    assert precision["one image, again and again"] >= precision["real"]


def test_memorised_images_are_found_and_only_they(found):
    share = {name: scores["memorised"].value for name, scores in found.items()}
    assert share["all of them trained on"] > 0.95
    assert share["half of them trained on"] == pytest.approx(0.5, abs=0.1)
    for name in ("real", "blurred, radius 1.5", "noise, 40 of 255", "one image, again and again"):
        assert share[name] < 0.1


def test_half_of_them_trained_on_is_half_of_them_each_once(script):
    trained = script.butterflies(0, 40)
    sets = script.sets(20, trained, script.EfficientNetLite0Encoder())
    (half,) = (made for made in sets if made.name == "half of them trained on")
    pictures, known = half.read(range(20)).pixels, trained.read(range(40)).pixels
    same = (pictures[:, None] == known).flatten(2).all(2)
    assert same.any(1).sum() == same.any(0).sum() == 10


def test_distances_do_not_see_that_images_are_those_of_training(found):
    """Which is why memorisation has a score of its own."""
    trained_on = found["all of them trained on"]["kid"]
    assert trained_on.interval[0] < found["real"]["kid"].interval[1]


def test_the_cosine_falls_with_what_is_wrong(found):
    cosine = {name: scores["cosine"].value for name, scores in found.items()}
    assert cosine["noise, 40 of 255"] < cosine["noise, 10 of 255"] < cosine["real"]
    assert cosine["blurred, radius 1.5"] < cosine["blurred, radius 0.7"] < cosine["real"] == pytest.approx(1)


def test_the_inception_score_falls_where_all_images_are_alike(found):
    score = {name: scores["inception_score"].value for name, scores in found.items()}
    assert score["one image, again and again"] == pytest.approx(1)
    assert score["blue ones only"] < score["real"]
