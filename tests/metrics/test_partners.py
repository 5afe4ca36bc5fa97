"""Metrics that put something beside each image: a caption, an embedding, its original."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eclosion.errors import ConfigError, DataError
from eclosion.metrics.clip_score import ClipScore
from eclosion.metrics.cosine import Cosine
from eclosion.metrics.lpips import PerceptualDistance
from eclosion.metrics.metric import Evidence


def features(count, seed, *, dim=5, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)) + shift).float()


class TinyClip:
    """A CLIP for torchmetrics that reads embeddings from a table."""

    config = SimpleNamespace()

    def __init__(self, images, texts):
        self.images, self.texts = images, texts

    def to(self, device):
        return self

    def __call__(self, images=None, text=None, **options):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return {"input_ids": torch.tensor([int(one) for one in text]), "attention_mask": torch.ones(len(text), 1)}

    def get_image_features(self, pixels):
        return self.images[pixels[:, 0, 0, 0].long()]

    def get_text_features(self, ids, mask):
        return self.texts[ids]


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_the_clip_score_agrees_with_torchmetrics(shift):
    """An independent implementation; where images and captions disagree, both stop at 0."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    images, texts = features(12, 1, shift=0.5), features(12, 2, shift=shift)
    clip = TinyClip(images, texts)
    theirs = CLIPScore(model_name_or_path=lambda: (clip, clip))
    pixels = torch.arange(12)[:, None, None, None].expand(12, 3, 2, 2)
    theirs.update(pixels, [str(number) for number in range(12)])
    ours = ClipScore().scores(Evidence(images, partners=texts))["clip_score"]
    assert ours.value == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert (ours.value == 0) == (shift < 0)


def test_what_it_looks_at_depends_on_what_images_are_compared_with():
    assert ClipScore().needs == ("captions",)
    assert ClipScore(against="original").needs == ("originals",)


def test_cosines_are_those_of_each_pair_and_of_all_others():
    made, conditions = features(9, 1, shift=0.5), features(9, 2, shift=0.5)
    table = torch.nn.functional.cosine_similarity(made[:, None], conditions[None], dim=2).double()
    scores = Cosine().scores(Evidence(made, partners=conditions))
    assert scores["cosine"].value == pytest.approx(float(table.diagonal().mean()), rel=1e-5)
    assert scores["cosine"].error == pytest.approx(float(table.diagonal().std()) / 3, rel=1e-5)
    others = table[~torch.eye(9, dtype=torch.bool)].mean()
    assert scores["cosine_to_others"].value == pytest.approx(float(others), rel=1e-5)


def test_embeddings_of_another_encoder_are_refused():
    with pytest.raises(ConfigError) as error:
        Cosine().scores(Evidence(features(9, 1), partners=features(9, 2, dim=7)))
    assert str(error.value) == (
        "cosine: features of images have 5 numbers, and what they are compared with has 7: another encoder made them. "
        "Name that one as cosine's extractor."
    )


def test_lpips_is_the_mean_or_the_sum_over_images_as_torchmetrics_has_it():
    from torchmetrics.functional.image.lpips import _lpips_compute

    distances = torch.rand(11, generator=torch.Generator().manual_seed(0))
    for reduction in ("mean", "sum"):
        score = PerceptualDistance(reduction=reduction).scores(Evidence(features(11, 1), distances=distances))["lpips"]
        assert score.value == pytest.approx(float(_lpips_compute(distances, reduction)), rel=1e-6)
        assert score.interval[0] < score.value < score.interval[1]
    distances[3] = torch.inf
    with pytest.raises(DataError, match="lpips: made image 3 has"):
        PerceptualDistance().scores(Evidence(features(11, 1), distances=distances))
