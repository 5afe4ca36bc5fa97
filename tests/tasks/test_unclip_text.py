"""Text encodings that a cascade makes of captions: where they come from, what is kept, and what is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from eclosion.data.batch import Batch
from eclosion.errors import ConfigError
from eclosion.registry import build
from eclosion.rng import generator
from eclosion.tasks.task import DataFacts

UNET = {
    "model": {
        "base_channels": 4,
        "channel_mults": [1, 2],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 4,
        "num_text_tokens": 3,
        "conv_in_kernel_sizes": [3],
        "text_conditioned": True,
    },
    "noise_schedule": {"name": "cosine", "num_train_timesteps": 20},
}
FACTS = DataFacts(size=(8, 8), arrays={"image_embed": (5,)}, has_captions=True)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def part_of(clip, **options):
    encoder = clip if isinstance(clip, dict) or clip is None else {"name": "clip", "model": str(clip)}
    return build("tasks", {"name": "unclip_decoder", "unets": [UNET], "encoder": encoder, **options})


def batch_of(*captions, **fields):
    given = {"image": torch.zeros(len(captions), 3, 8, 8), "image_embed": torch.ones(len(captions), 5), **fields}
    return Batch(range(len(captions)), torch.ones(len(captions)), {**given, "caption": list(captions)})


def test_captions_become_the_encodings_of_clip_once_each(tiny_clip, cache_folder):
    task = part_of(tiny_clip).build(FACTS)
    assert task.made == {"text_encodings": (12, 16)}
    assert (task.text_embed_dim, task.encoder) == (16, None)
    wanted = build("encoders", {"name": "clip", "model": str(tiny_clip)}).build_text().tokens(["a cat", "a dog"])
    first = task.prepare(batch_of("a cat", "a dog", "a cat"))
    assert torch.equal(first["text_encodings"], wanted[[0, 1, 0]])
    again = part_of(tiny_clip).build(FACTS)  # as another process
    assert torch.equal(again.prepare(batch_of("a dog", "cat", "a cat"))["text_encodings"][[0, 2]], wanted[[1, 0]])
    caches = [task.text_encoder._cache, again.text_encoder._cache]
    assert [(cache.num_made, cache.num_found) for cache in caches] == [(2, 1), (1, 2)]
    assert [path.name for path in cache_folder.iterdir()] == ["text_encodings"]


def test_what_is_not_kept_is_made_alike(tiny_clip, cache_folder):
    kept = part_of(tiny_clip).build(FACTS)
    made = part_of({"name": "clip", "model": str(tiny_clip), "cache_gb": 0}).build(FACTS)
    batch = batch_of("a cat", "", "dog")
    assert torch.equal(made.prepare(batch)["text_encodings"], kept.prepare(batch)["text_encodings"])
    assert made.prepare(batch_of())["text_encodings"].shape == (0, 12, 16)


def test_encodings_of_the_data_come_before_those_of_an_encoder(tiny_clip, cache_folder):
    facts = DataFacts(size=(8, 8), arrays={"image_embed": (5,), "text_encodings": (2, 6)}, has_captions=True)
    task = part_of(tiny_clip).build(facts)
    assert (task.text_encoder, task.text_embed_dim) == (None, 6)
    batch = batch_of("a cat", text_encodings=torch.ones(1, 2, 6))
    assert task.prepare(batch) is batch


def test_one_clip_makes_both_where_the_data_brings_neither(tiny_clip):
    task = part_of(tiny_clip).build(DataFacts(size=(8, 8), has_captions=True))
    assert task.made == {"image_embed": (24,), "text_encodings": (12, 16)}
    batch = batch_of("a cat", "dog")
    bare = Batch(batch.positions, batch.weight, {name: batch[name] for name in ("image", "caption")})
    prepared = task.prepare(bare)
    assert prepared["image_embed"].shape == (2, 24)
    assert prepared["text_encodings"].shape == (2, 12, 16)


def test_an_image_without_a_caption_is_told_what_one_is_told_whose_text_is_hidden(tiny_clip):
    task = part_of(tiny_clip).build(FACTS)
    torch.manual_seed(0)
    for parameter in task.nets["unet_0"].parameters():  # so that text makes a difference from the start
        nn.init.normal_(parameter, std=0.2)
    batch = task.prepare(batch_of("a cat", "", " "))
    assert batch["text_encodings"][0].abs().sum() > 0
    assert not batch["text_encodings"][1:].any()
    drawn = task.validation_draw("unet_0", batch, [generator(0, "x", i) for i in range(3)])
    told = task.loss("unet_0", batch, drawn)
    hidden = task.loss("unet_0", batch, replace(drawn, text_keep=torch.zeros(3, dtype=torch.bool)))
    assert torch.equal(told[1:], hidden[1:])
    assert told[0] != hidden[0]


def test_a_caption_that_is_cut_is_told_of_once(tiny_clip):
    task = part_of(tiny_clip).build(FACTS)
    with pytest.warns(UserWarning, match="more than the 12 tokens that task.encoder sees, and its end is cut off"):
        task.prepare(batch_of("abcdefghijklmnop"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.prepare(batch_of("ponmlkjihgfedcba"))


def test_of_a_trained_task_the_encoder_is_built_when_an_image_needs_it(tiny_clip, monkeypatch):
    from eclosion.models.encoders import ClipEncoder

    def never(self):
        raise AssertionError("built")

    made = {"image_embed": (24,), "text_encodings": (12, 16)}
    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "build", never)
        patch.setattr(ClipEncoder, "build_text", never)
        task = part_of(tiny_clip).build(DataFacts(size=(8, 8), made=made))
    assert (task.image_embed_dim, task.text_embed_dim, task.made) == (24, 16, made)
    batch = batch_of("a cat")
    bare = Batch(batch.positions, batch.weight, {name: batch[name] for name in ("image", "caption")})
    assert task.prepare(bare)["image_embed"].shape == (1, 24)
    other = part_of(tiny_clip).build(DataFacts(size=(8, 8), made={"image_embed": (23,), "text_encodings": (12, 15)}))
    with pytest.raises(ConfigError, match=r"embeddings of images of 24 numbers, .* were trained on: 23\."):
        other.prepare(bare)
    with pytest.raises(ConfigError, match=r"encodings of text of 16 numbers, .* were trained on: 15\."):
        other.prepare(batch)


NO_CAPTIONS = DataFacts(size=(8, 8), arrays={"image_embed": (5,)})
LITE = {"name": "efficientnet_lite0"}


@pytest.mark.parametrize(
    ("encoder", "facts", "said"),
    [
        (None, NO_CAPTIONS, "task.unets: a network follows text (model.text_conditioned), and the data has no text"),
        (None, FACTS, "or make them of its captions with task.encoder=clip, or set model.text_conditioned to false."),
        (LITE, FACTS, "task.encoder is efficientnet_lite0, and reads no captions; a network follows text"),
        ({"name": "clip"}, NO_CAPTIONS, "no text encodings, and no captions that task.encoder could make them of."),
    ],
    ids=["no encoder", "no encoder, captions", "another encoder", "no captions"],
)
def test_text_that_nothing_encodes_is_refused_before_anything_is_fetched(encoder, facts, said):
    with pytest.raises(ConfigError) as caught:
        part_of(encoder).build(facts)
    (problem,) = caught.value.problems
    assert said in problem
    assert "data.source.text_embeddings_url" in problem


def test_encodings_of_another_length_than_the_config_says_are_refused(tiny_clip):
    with pytest.raises(ConfigError, match="text_embed_dim is 15, and the encoder makes 16 numbers"):
        part_of(tiny_clip, text_embed_dim=15).build(FACTS)
