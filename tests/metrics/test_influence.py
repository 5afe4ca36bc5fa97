"""How much each image moves a score, against scores without it."""

from dataclasses import replace

import pytest
import torch

from eclosion.metrics.metric import Evidence, Moments, Reference
from eclosion.registry import build

SCORES = {
    "kid": ("kid", {}),
    "fid": ("fid", {}),
    "inception_score": ("inception_score", {"splits": 1}),
    "lpips": ("lpips", {}),
    "lpips of a sum": ("lpips", {"reduction": "sum"}),
    "cosine": ("cosine", {}),
}


def evidence():
    """400 images and 300 real ones, of 4 features."""
    rng = torch.Generator().manual_seed(0)
    made, real = torch.randn(400, 4, generator=rng) * 1.3 + 0.4, torch.randn(300, 4, generator=rng)
    partners, distances = torch.randn(400, 4, generator=rng) + made, torch.rand(400, generator=rng)
    return Evidence(made, Reference(Moments.of(real), real), partners=partners, distances=distances)


def without(seen, i):
    keep = torch.arange(len(seen.made)) != i
    return replace(seen, made=seen.made[keep], partners=seen.partners[keep], distances=seen.distances[keep])


def without_real(seen, i):
    kept = seen.reference.features[torch.arange(len(seen.reference.features)) != i]
    return replace(seen, reference=Reference(Moments.of(kept), kept))


@pytest.mark.parametrize("case", SCORES)
def test_it_is_what_leaving_an_image_out_changes(case):
    name, options = SCORES[case]
    metric, seen = build("metrics", {"name": name, **options}), evidence()
    score = metric.scores(seen)[name]
    for side, leave_out in {"made": without, "reference": without_real}.items():
        told = getattr(score.influence, side)
        if told is None:
            assert "reference" not in metric.needs
            continue
        count = len(told)
        chosen = range(0, count, 13)
        changes = torch.tensor([score.value - metric.scores(leave_out(seen, i))[name].value for i in chosen])
        if case == "lpips of a sum":
            changes = changes - score.value / count  # a sum has one less to add
        found, expected = told - told.mean(), (count - 1) * changes
        assert torch.corrcoef(torch.stack([found[::13], expected.double()]))[0, 1] > 0.999
        torch.testing.assert_close(found[::13], expected.double(), rtol=0.05, atol=0.1 * float(found.std()))


@pytest.mark.parametrize("case", SCORES)
def test_its_spread_is_the_standard_error_of_the_score(case):
    name, options = SCORES[case]
    score = build("metrics", {"name": name, **options}).scores(evidence())[name]
    sides = [side for side in (score.influence.made, score.influence.reference) if side is not None]
    error = sum(float(side.var()) / len(side) for side in sides) ** 0.5
    assert error == pytest.approx(score.error, rel=0.05)
