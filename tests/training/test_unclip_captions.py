"""A DALLE2-pytorch config whose CLIP makes image embeddings and text encodings while it trains, from shards alone."""

import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from eclosion import ConfigError, DataError, check, export, sample, shard, train
from eclosion.data.source import Sample
from eclosion.models.encoders import ClipEncoder
from eclosion.rundir import RunDir

SMALL = {
    "dim": 8,
    "dim_mults": [1, 2],
    "num_resnet_blocks": 1,
    "resnet_groups": 4,
    "attn_heads": 2,
    "attn_dim_head": 4,
    "max_text_len": 12,
}


class Pictures:
    """Eight pictures of one colour each, half of them with a caption that says which."""

    fingerprint, class_names, has_captions, root = "pictures", (), True, None

    def __init__(self, captions=True):
        self._captions = captions

    def __len__(self):
        return 8

    def name(self, index):
        return f"{index}.png"

    def read(self, index):
        caption = ("a red cat", "blue", None, "")[index % 4] if self._captions else None
        return Sample(Image.new("RGB", (16, 16), (32 * index, 0, 255 - 32 * index)), self.name(index), caption)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return shard(Pictures(), tmp_path_factory.mktemp("shards") / "out", samples_per_shard=4).folder


def config_of(shards, clip, **decoder):
    return {
        "decoder": {
            "unets": [
                {**SMALL, "image_embed_dim": 24, "text_embed_dim": 16, "cond_on_text_encodings": True},
                {**SMALL, "cond_on_text_encodings": True, "text_embed_dim": 16},
            ],
            "image_sizes": [8, 16],
            "timesteps": 20,
            "clip": {"make": "openai", "model": str(clip)},
            **decoder,
        },
        "data": {
            "webdataset_base_url": f"{shards}/{{}}.tar",
            "shard_width": 5,
            "batch_size": 4,
            "num_workers": 0,
            "splits": {"train": 0.5, "val": 0.5, "test": 0},
        },
        "train": {"epochs": 2, "n_sample_images": 2, "save_every_n_samples": 8},
    }


def overrides(folder, *more):
    sampler = [f"task.unets[{i}].sampler={{name: ddim, num_inference_steps: 2}}" for i in (0, 1)]
    return [f"output={folder}", "train.duration=4 steps", "sample.guidance_scale=2", *sampler, *more]


def trained(config, overrides):
    """A run, or what stops it; what is said of the translation of its config is in other tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(config, overrides)


@pytest.fixture(scope="module")
def run(shards, tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLOSION_CACHE", str(folder / "cache"))
        return trained(config_of(shards, tiny_clip), overrides(folder / "run"))


def test_nothing_is_wrong_with_it_and_the_checkpoint_says_what_encoders_made(
    run, shards, tiny_clip, tmp_path, monkeypatch
):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    found = check(config_of(shards, tiny_clip), overrides(tmp_path / "run"))
    assert found.problems == []
    assert "where they hold none, decoder.clip makes them of the captions (.txt)." in " ".join(found.notes)
    facts = json.loads((RunDir(run).checkpoint(4) / "manifest.json").read_text())["meta"]["facts"]
    assert (facts["arrays"], facts["made"]) == ({}, {"image_embed": [24], "text_encodings": [12, 16]})
    logged = set().union(*(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()))
    assert {"train/loss/unet_0", "validation/loss/unet_1"} <= logged


def test_captions_are_what_it_learns_from(run, shards, tiny_clip, tmp_path, monkeypatch, results):
    """The negative control: with other captions of the same pictures, another network."""
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    made = ClipEncoder.build_text

    def shouted(self):
        encoder = made(self)
        tokenize = encoder._tokenize
        encoder._tokenize = lambda caption: tokenize(f"{caption}?")
        return encoder

    monkeypatch.setattr(ClipEncoder, "build_text", shouted)
    other = trained(config_of(shards, tiny_clip), overrides(tmp_path / "run"))
    assert results(other)["hashes"] != results(run)["hashes"]


def test_it_goes_on_with_the_same_bits_also_without_what_was_kept(
    run, shards, tiny_clip, tmp_path, monkeypatch, results
):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(RunDir(tmp_path / "run").checkpoint(4))
    trained(config_of(shards, tiny_clip), overrides(tmp_path / "run"))
    assert results(tmp_path / "run") == results(run)


def test_images_are_made_from_captions_of_the_data_or_beside_the_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))

    def pixels(name, **options):
        folder = sample(run, out=tmp_path / name, num_images=2, **options)
        return [np.asarray(Image.open(folder / f"00000{i}.png")) for i in range(2)]

    assert len(pixels("data", from_data="train")) == 2
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), "red").save(pictures / f"{i}.png")
    with pytest.raises(ConfigError) as refused:
        pixels("refused", images=pictures)
    assert str(refused.value) == (
        f"the networks of this run follow text_encodings, and there are no captions in {pictures} to make them of "
        "(NAME.txt beside each image). Give text_encodings and embeddings."
    )
    for i, caption in enumerate(("a red cat", "blue")):
        (pictures / f"{i}.txt").write_text(caption)
    first = pixels("first", images=pictures)
    (pictures / "1.txt").write_text("a red cat?")
    second = pixels("second", images=pictures)
    assert [np.array_equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False]


def test_a_trained_run_is_exported_without_its_encoder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipEncoder, "build", None)
    monkeypatch.setattr(ClipEncoder, "build_text", None)
    assert (export(run, tmp_path / "out") / "model_index.json").is_file()


def test_shards_without_any_caption_are_refused_in_one_line(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    bare = shard(Pictures(captions=False), tmp_path / "bare", samples_per_shard=4).folder
    (problem,) = check(config_of(bare, tiny_clip), overrides(tmp_path / "run")).problems
    assert "and no captions that task.encoder could make them of" in str(problem)
    with pytest.raises(ConfigError, match=r"no captions that task\.encoder could make them of"):
        trained(config_of(bare, tiny_clip), overrides(tmp_path / "run"))


def test_validation_data_without_captions_is_refused_before_the_first_step(shards, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "val").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "val" / "a.png")
    more = f"validate.source={{name: folder, root: {tmp_path / 'val'}}}"
    with pytest.raises(DataError, match=r"validate: has no captions, and task\.encoder"):
        trained(config_of(shards, tiny_clip), overrides(tmp_path / "run", more))
