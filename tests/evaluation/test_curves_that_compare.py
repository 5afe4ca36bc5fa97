"""Curves of scores in the report: only of numbers that were measured in one way."""

from types import SimpleNamespace

import pytest

from eclosion.report.around import surrounded
from eclosion.report.curves import Series

KID = "evaluate/kid/tiny"


def row(step, value, **changes):
    return {
        "score": "kid",
        "metric": {"name": "kid", "degree": 3},
        "value": value,
        "n": 10,
        "n_reference": 20,
        "seed": 0,
        "extractor": {"name": "tiny", "fingerprint": "abc"},
        "made": {"what": "run", "step": step, "sampler": {"name": "ddim"}, "guidance_scale": 1.0, "seed": 0},
        "against": {"split": "val", "fingerprint": "y"},
    } | changes


def curve(rows):
    series = Series(KID, [row["made"]["step"] for row in rows], [row["value"] for row in rows])
    return surrounded(SimpleNamespace(series={KID: series}, results=rows))[KID]


def test_points_that_were_measured_in_the_same_way_are_all_drawn():
    found = curve([row(1, 0.5), row(2, 0.25)])
    assert (list(found.steps), list(found.values)) == ([1, 2], [0.5, 0.25])
    assert "left out" not in found.remark


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"n": 11}, "n"),
        ({"metric": {"name": "kid", "degree": 2}}, "metric"),
        ({"extractor": {"name": "tiny", "fingerprint": "other"}}, "extractor"),
        ({"against": {"split": "val", "fingerprint": "other"}}, "reference"),
        ({"made": row(1, 0.5)["made"] | {"sampler": {"name": "euler"}}}, "sampler"),
        ({"made": row(1, 0.5)["made"] | {"guidance_scale": 3.0}}, "guidance"),
        ({"made": row(1, 0.5)["made"] | {"precision": "bf16"}}, "precision"),
        ({"made": row(1, 0.5)["made"] | {"size": [8, 8]}}, "size"),
        ({"made": row(1, 0.5)["made"] | {"networks": ["unet_0"]}}, "networks"),
        ({"train": {"fingerprint": "other"}}, "training images"),
    ],
)
def test_points_that_do_not_compare_with_the_newest_are_left_out_and_that_is_said(changes, which):
    found = curve([row(1, 0.5, **changes), row(2, 0.25)])
    assert (list(found.steps), list(found.values)) == ([2], [0.25])
    assert f"1 earlier point left out, measured in another way: {which}." in found.remark
