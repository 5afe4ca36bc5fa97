"""The cascade: what it refuses, what it draws, what its networks see, what it samples, what it exports."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eclosion import UnclipDecoderPipeline
from eclosion.config.explain import checked
from eclosion.data.batch import Batch
from eclosion.diffusion.lowres import LowResDraws, condition, resize
from eclosion.errors import ConfigError, DataError
from eclosion.registry import SAMPLERS, build
from eclosion.rng import generator
from eclosion.tasks.task import DataFacts
from eclosion.tasks.unclip_decoder import UnclipDecoder

MODEL = {
    "base_channels": 4,
    "channel_mults": [1, 2],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 4,
    "num_text_tokens": 3,
    "conv_in_kernel_sizes": [3],
}
FACTS = DataFacts(size=(16, 16), arrays={"image_embed": (5,), "text_encodings": (2, 6)})
COSINE = {"name": "cosine", "num_train_timesteps": 20}
DDPM = build("samplers", {"name": "ddpm", "num_inference_steps": 3})


def unet(**options):
    model = {**MODEL, **options.pop("model", {})}
    return {"noise_schedule": COSINE, **options, "model": model}


def options_of(*unets, **options):
    """A cascade from 8 to 16 pixels, if nothing else is said."""
    return {"unets": list(unets) or [unet(image_size=8), unet()], **options}


def make_task(*unets, facts=FACTS, shaken=True, **options):
    torch.manual_seed(0)
    task = build("tasks", {"name": "unclip_decoder", **options_of(*unets, **options)}).build(facts)
    if shaken:  # what every network starts with agrees with everything: its last convolution is zero
        for net in task.nets.values():
            nn.init.normal_(net.conv_out.weight, std=0.2)
    return task


def make_batch(n=3, size=(16, 16), seed=0):
    source = torch.Generator().manual_seed(seed)
    fields = {
        "image": torch.rand(n, 3, *size, generator=source) * 2 - 1,
        "image_embed": torch.randn(n, 5, generator=source),
        "text_encodings": torch.randn(n, 2, 6, generator=source),
    }
    return Batch(positions=range(n), weight=torch.ones(n), fields=fields)


def rngs(n=3, start=0, purpose="loss"):
    return [generator(0, purpose, p) for p in range(start, start + n)]


def rows(batch, chosen):
    return Batch(list(chosen), torch.ones(len(chosen)), {k: v[list(chosen)] for k, v in batch.fields.items()})


def given_to(task, name, batch, drawn=None):
    """What the loss calls a network with, the first call first."""
    calls = []

    class Watched(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x_t, t, **told):
            calls.append({"x_t": x_t, "t": t, **told})
            return self.net(x_t, t, **told)

    drawn = drawn or task.draw(name, batch, rngs(len(batch)))
    watched = task.with_nets({**task.nets, name: Watched(task.nets[name])})
    with torch.no_grad():
        losses = watched.loss(name, batch, drawn)
    return calls, drawn, losses


# --- options ---------------------------------------------------------------------------------------------------------

LOWRES = {"blur_kernel_size": 3}
RIGHT = unet(image_size=8)
WRONG = {
    "no network": ([], {}, ["unets: is empty"]),
    "too many": ([unet(image_size=2 * i + 2) for i in range(9)], {}, ["unets: has 9 networks"]),
    "order": ([unet(image_size=16), unet(image_size=8)], {}, ["unets[1].image_size: is 8 x 8, and a network before"]),
    "silent": (
        [unet(image_size=8, noise_schedule={"name": "linear", "rescale_zero_terminal_snr": True})],
        {},
        ["unets[0].noise_schedule.rescale_zero_terminal_snr: is true, and prediction_type is"],
    ),
    "same size twice": ([RIGHT, RIGHT], {}, ["unets[1].image_size: is 8 x 8, and a network before it makes 8 x 8"]),
    "one side": ([unet(image_size=[8, 4]), unet(image_size=[6, 8])], {}, ["unets[1].image_size: is 6 x 8"]),
    "size left out": ([unet(), unet(image_size=16)], {}, ["unets[0]: has no image_size"]),
    "odd": ([unet(image_size=[8, 9])], {}, ["unets[0].image_size: is 8 x 9, and must be a multiple of 2", "Use 8 x 8"]),
    "deep": (
        [unet(image_size=6, model={"channel_mults": [1, 1, 1]})],
        {},
        ["unets[0].image_size: is 6 x 6, and must be a multiple of 4", "2 times"],
    ),
    "memory": (
        [unet(image_size=6, model={"memory_efficient": True})],
        {},
        ["unets[0].image_size: is 6 x 6, and must be a multiple of 4", "2 times"],
    ),
    "lowres": ([unet(image_size=8, lowres=LOWRES)], {}, ["unets[0].lowres: is set for the first network"]),
    "crop": ([unet(image_size=8, crop_size=4)], {}, ["unets[0].crop_size: is set for the first network"]),
    "crop too large": ([RIGHT, unet(image_size=16, crop_size=18)], {}, ["unets[1].crop_size: is 18, and the images"]),
    "crop odd": (
        [RIGHT, unet(image_size=16, crop_size=7)],
        {},
        ["unets[1].crop_size: is 7, and must be a multiple of 2"],
    ),
    "flow": ([unet(image_size=8, prediction_type="flow")], {}, ["unets[0].prediction_type: is 'flow'"]),
    "another network": ([{"model": {"name": "diffusers"}, "image_size": 8}], {}, ["unets[0].model", "Use unclip_unet"]),
    "not told": (
        [unet(image_size=8, model={"image_conditioned": True})],
        {"unconditional": True},
        ["unets[0].model.image_conditioned: is true, and unconditional is true"],
    ),
    "not encoded": ([RIGHT], {"unconditional": True, "encoder": "efficientnet_lite0"}, ["encoder: is set"]),
    "one option, twice": (
        [RIGHT, unet(image_size=7)],
        {},
        ["unets[1].image_size: is 7 x 7, and a network before it makes 8 x 8", "Also, it is 7 x 7, and must be a mult"],
    ),
    "several": (
        [unet(image_size=7, lowres=LOWRES), unet(image_size=4, crop_size=8)],
        {},
        [
            "unets[0].image_size: is 7 x 7",
            "unets[0].lowres",
            "unets[1].image_size: is 4 x 4",
            "unets[1].crop_size: is 8",
        ],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_opened(name):
    unets, options, said = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        checked(UnclipDecoder, {"unets": unets, **options})
    problems = caught.value.problems
    assert len(problems) == sum(part.startswith(("unets", "encoder")) for part in said), problems
    for part in said:
        assert any(part in problem for problem in problems), problems


NO_ARRAYS = DataFacts(size=(16, 16))
WRONG_FOR_DATA = {
    "too large": (
        options_of(RIGHT, unet(image_size=32)),
        FACTS,
        ["unets[1].image_size is 32 x 32, and data.image_size"],
    ),
    "not larger": (
        options_of(unet(image_size=16), unet()),
        FACTS,
        ["unets[1].image_size is data.image_size, 16 x 16"],
    ),
    "odd": (options_of(), DataFacts((16, 17), (), FACTS.arrays), ["unets[1].image_size is data.image_size, 16 x 17"]),
    "stretched by the last": (
        options_of(unet(image_size=8), unet()),
        DataFacts((16, 24), (), FACTS.arrays),
        ["unets[0].image_size is 8 x 8, and the next network makes 16 x 24 of it"],
    ),
    "stretched": (
        options_of(unet(image_size=[8, 4]), unet(image_size=[8, 12]), unet()),
        DataFacts((16, 24), (), FACTS.arrays),
        ["Give both the same aspect ratio, such as 8 x 12 here."],
    ),
    "blur": (
        options_of(unet(image_size=2), unet(lowres={"blur_kernel_size": 5})),
        FACTS,
        ["unets[1].lowres.blur_kernel_size is 5, and the blurred images are 2 x 2"],
    ),
    "no embeddings": (options_of(), NO_ARRAYS, ["img_embeddings_url", "task.encoder"]),
    "no text": (
        options_of(unet(image_size=8, model={"text_conditioned": True})),
        DataFacts((16, 16), (), {"image_embed": (5,)}),
        ["text_embeddings_url"],
    ),
    "an upsampler that follows": (
        options_of(unet(image_size=8, model={"image_conditioned": False}), unet(model={"image_conditioned": True})),
        NO_ARRAYS,
        ["img_embeddings_url"],
    ),
    "a picture for an embedding": (
        options_of(),
        DataFacts((16, 16), (), {"image_embed": (4, 5)}),
        ["image_embed has the shape [4, 5] per image, and must be [D]"],
    ),
    "pooled text": (
        options_of(unet(image_size=8, model={"text_conditioned": True})),
        DataFacts((16, 16), (), {"image_embed": (5,), "text_encodings": (7,)}),
        ["text_encodings has the shape [7] per image, and must be [L, D]"],
    ),
    "another length": (
        options_of(unet(image_size=8, model={"text_conditioned": True}), image_embed_dim=6, text_embed_dim=7),
        FACTS,
        [
            "image_embed_dim is 6, and the image embeddings have 5",
            "text_embed_dim is 7, and the text embeddings have 6",
        ],
    ),
    "several": (
        options_of(RIGHT, unet(image_size=[16, 32])),
        NO_ARRAYS,
        ["unets[1].image_size is 16 x 32", "img_embeddings_url"],
    ),
}


@pytest.mark.parametrize("name", WRONG_FOR_DATA)
def test_what_does_not_fit_the_data_is_refused_all_at_once(name):
    options, facts, said = WRONG_FOR_DATA[name]
    with pytest.raises(ConfigError) as caught:
        build("tasks", {"name": "unclip_decoder", **options}).build(facts)
    for part in said:
        assert any(part in problem for problem in caught.value.problems), caught.value.problems
    assert all(problem.startswith("task.") for problem in caught.value.problems)
    assert len(caught.value.problems) == (2 if len(said) == 2 and name != "no embeddings" else 1)


def test_a_network_that_follows_nothing_needs_no_embeddings():
    assert make_task(unconditional=True, facts=NO_ARRAYS).wants == ()
    without = unet(image_size=8, model={"image_conditioned": False})
    assert make_task(without, unet(), facts=NO_ARRAYS).wants == ()


def test_the_image_embedding_is_for_the_first_network_unless_another_asks_for_it():
    task = make_task()
    assert [tier.follows for tier in task.tiers] == [["image"], []]
    asks = make_task(RIGHT, unet(model={"image_conditioned": True, "text_conditioned": True}))
    assert [tier.follows for tier in asks.tiers] == [["image"], ["image", "text"]]
    assert asks.wants == ("image_embed", "text_encodings")


# --- draws -----------------------------------------------------------------------------------------------------------

EVERYTHING = unet(
    lowres={"noise": True, "blur_sigma": [0.4, 0.9], "blur_kernel_size": [1, 5]},
    crop_size=6,
    model={"image_conditioned": True, "text_conditioned": True, "self_cond": True},
)


def test_an_image_draws_in_the_order_that_is_written_down():
    """Bits of runs depend on it."""
    drawn = make_task(RIGHT, EVERYTHING).draw("unet_1", make_batch(1), rngs(1))
    rng = generator(0, "loss", 0)
    assert drawn.t.item() == rng.integers(0, 20)
    assert drawn.noise.flatten().tolist() == rng.standard_normal(3 * 6 * 6, dtype="f4").tolist()
    assert (drawn.top.item(), drawn.left.item()) == (rng.integers(0, 11), rng.integers(0, 11))
    blurred = rng.random() < 0.5
    assert drawn.blur_sigma.item() == pytest.approx(rng.uniform(0.4, 0.9))
    size = 1 + 2 * rng.integers(3)
    assert drawn.blur_size.item() == (size if blurred else 1)
    assert drawn.level.item() == rng.integers(0, 1000)
    assert drawn.lowres_noise.flatten().tolist() == rng.standard_normal(3 * 6 * 6, dtype="f4").tolist()
    assert drawn.image_keep.item() == (rng.random() >= 0.1)
    assert drawn.text_keep.item() == (rng.random() >= 0.5)
    assert drawn.sees_estimate.item() == (rng.random() < 0.5)


def test_what_is_drawn_for_an_image_depends_on_its_own_generator():
    task, batch = make_task(RIGHT, EVERYTHING), make_batch(4)
    whole, last = task.draw("unet_1", batch, rngs(4)), task.draw("unet_1", rows(batch, [3]), rngs(1, start=3))
    for name, tensor in vars(whole).items():
        assert torch.equal(tensor[3:], getattr(last, name)), name


def test_a_network_draws_nothing_that_it_has_no_use_for():
    drawn = make_task().draw("unet_0", make_batch(), rngs())
    assert {name for name, tensor in vars(drawn).items() if tensor is not None} == {"t", "noise", "image_keep"}


def test_conditions_are_hidden_as_often_as_asked_and_independently():
    first = unet(image_size=2, model={"text_conditioned": True})
    task = make_task(first, facts=replace(FACTS, size=(2, 2)), image_dropout=0.2, text_dropout=0.6)
    drawn = task.draw("unet_0", Batch(range(2000), torch.ones(2000), {"image": torch.zeros(2000, 3, 2, 2)}), rngs(2000))
    image, text = ~drawn.image_keep, ~drawn.text_keep
    for hidden, share in ((image, 0.2), (text, 0.6), (image & text, 0.12)):
        # four standard deviations of a binomial
        assert abs(float(hidden.float().mean()) - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_validation_hides_nothing_and_draws_the_same_otherwise():
    task, batch = make_task(RIGHT, EVERYTHING, image_dropout=1.0, text_dropout=1.0), make_batch()
    trained, validated = task.draw("unet_1", batch, rngs()), task.validation_draw("unet_1", batch, rngs())
    assert not trained.image_keep.any()
    for name, tensor in vars(validated).items():
        if name in ("image_keep", "text_keep"):
            assert tensor is None
        else:
            assert torch.equal(tensor, getattr(trained, name)), name
    (call, *_), *_ = given_to(task, "unet_0", batch, task.validation_draw("unet_0", batch, rngs()))
    assert "image_keep_mask" not in call


# --- loss ------------------------------------------------------------------------------------------------------------


def test_each_network_is_trained_in_its_own_size_on_what_it_is_told():
    task, batch = make_task(), make_batch()
    (first,), drawn, losses = given_to(task, "unet_0", batch)
    assert first.keys() == {"x_t", "t", "image_embed", "image_keep_mask"}
    x_0 = resize(batch["image"], (8, 8))
    torch.testing.assert_close(first["x_t"], task.tiers[0].schedule.add_noise(x_0, drawn.noise, drawn.t))
    assert torch.equal(first["image_embed"], batch["image_embed"])
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    (second,), *_ = given_to(task, "unet_1", batch)
    assert second.keys() == {"x_t", "t", "lowres_cond"}
    assert second["x_t"].shape == second["lowres_cond"].shape == (3, 3, 16, 16)


@pytest.mark.parametrize(("how", "mean"), [("area", True), ("nearest", False)])
def test_images_reach_a_network_as_means_or_as_single_pixels(how, mean):
    task, batch = make_task(resize=how), make_batch()
    drawn = replace(task.draw("unet_0", batch, rngs()), noise=torch.zeros(3, 3, 8, 8))
    (call,), *_ = given_to(task, "unet_0", batch, drawn)
    image = batch["image"]
    corners = image.unflatten(2, (8, 2)).unflatten(4, (8, 2))
    wanted = corners.mean((3, 5)) if mean else corners[:, :, :, 0, :, 0]
    alpha = task.tiers[0].schedule.gather(drawn.t, 4)[0]
    torch.testing.assert_close(call["x_t"], alpha * wanted)


def test_a_crop_is_the_same_of_the_image_and_of_the_smaller_one():
    """Compared with cutting by hand what a network without crops sees."""
    low = {"noise": True, "blur_probability": 1.0}
    cropped = make_task(RIGHT, unet(lowres=low, crop_size=6), unconditional=True)
    batch, tier = make_batch(), cropped.tiers[1]
    (call,), drawn, _ = given_to(cropped, "unet_1", batch)
    blur = LowResDraws(drawn.blur_sigma, drawn.blur_size, None, None)
    shown, _ = condition(tier.lowres, batch["image"], blur, (16, 16), before=(8, 8))
    cut = [
        (slice(None), slice(int(top), int(top) + 6), slice(int(left), int(left) + 6))
        for top, left in zip(drawn.top, drawn.left, strict=True)
    ]
    assert len({str(c) for c in cut}) == 3  # each image has its own
    x_0 = torch.stack([image[c] for image, c in zip(batch["image"], cut, strict=True)])
    torch.testing.assert_close(call["x_t"], tier.schedule.add_noise(x_0, drawn.noise, drawn.t))
    small = torch.stack([image[c] for image, c in zip(shown, cut, strict=True)])
    noise = LowResDraws(None, None, drawn.level, drawn.lowres_noise)
    torch.testing.assert_close(call["lowres_cond"], condition(tier.lowres, small, noise, (6, 6))[0])
    assert torch.equal(call["lowres_noise_level"], drawn.level)


def test_half_of_the_images_see_the_estimate_that_sampling_would_show():
    task, batch = make_task(unet(image_size=8, model={"self_cond": True}), unet()), make_batch(8)
    (before, after), drawn, _ = given_to(task, "unet_0", batch)
    assert "image_keep_mask" not in before  # in sampling, too, the estimate follows the condition
    assert torch.equal(before["self_cond"], torch.zeros(8, 3, 8, 8))
    conditions = task.conditions(range(8), batch)
    denoise = task.tiers[0].denoiser(task.nets["unet_0"], conditions, 1.0, {})
    with torch.no_grad():
        estimate = denoise(after["x_t"], drawn.t)
    assert estimate.abs().max() == 1  # clipped
    seen = drawn.sees_estimate
    assert 0 < seen.sum() < 8
    torch.testing.assert_close(after["self_cond"][seen], estimate[seen])
    assert not after["self_cond"][~seen].any()


def test_an_estimate_leaves_no_trace_in_the_gradient_under_autocast():
    """Weights that autocast kept from the pass without gradient would have none in the pass with it."""
    task, batch = make_task(unet(image_size=8, model={"self_cond": True}), unet()), make_batch()
    drawn = task.draw("unet_0", batch, rngs())

    def gradients(shown):
        net = task.nets["unet_0"]
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = task.loss("unet_0", batch, replace(drawn, sees_estimate=shown))
        losses.sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in net.parameters()]

    none_shown = gradients(torch.zeros(3, dtype=torch.bool))
    without = gradients(None)
    for ours, theirs in zip(none_shown, without, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_does_not_depend_on_what_else_is_in_the_batch():
    task, batch = make_task(RIGHT, EVERYTHING), make_batch(3)
    with torch.no_grad():
        whole = task.loss("unet_1", batch, task.draw("unet_1", batch, rngs(3)))
        alone = task.loss("unet_1", rows(batch, [2]), task.draw("unet_1", rows(batch, [2]), rngs(1, start=2)))
    torch.testing.assert_close(whole[2:], alone, rtol=1e-5, atol=1e-6)


def test_images_need_not_be_square():
    facts = replace(FACTS, size=(12, 20))
    task = make_task(unet(image_size=[6, 10]), unet(lowres={"noise": True}), facts=facts)
    batch = make_batch(1, size=(12, 20))
    for name in task.nets:
        losses = task.loss(name, batch, task.draw(name, batch, rngs(1)))
        losses.sum().backward()
        assert all(p.grad is not None for p in task.nets[name].parameters())
    assert task.sizes == {"unet_0": (6, 10), "unet_1": (12, 20)}
    images = task.sample(task.conditions([0], batch), rngs(1), sampler=DDPM)
    assert images.shape == (1, 3, 12, 20)


def test_levels_count_as_the_weighting_says():
    plain, weighted = (make_task(unet(image_size=8, loss={"weighting": w}), unet()) for w in ("none", "min_snr"))
    batch = make_batch()
    drawn = plain.draw("unet_0", batch, rngs())
    with torch.no_grad():
        ratio = weighted.loss("unet_0", batch, drawn) / plain.loss("unet_0", batch, drawn)
    snr = plain.tiers[0].schedule.snr[drawn.t]
    torch.testing.assert_close(ratio, (snr.clamp(max=5) / snr).float(), rtol=1e-4, atol=1e-6)


def test_what_a_batch_lacks_is_said():
    task, batch = make_task(), make_batch()
    bare = Batch(batch.positions, batch.weight, {"image": batch["image"]})
    with pytest.raises(DataError, match="needs 'image_embed'"):
        task.loss("unet_0", bare, task.draw("unet_0", bare, rngs()))


# --- encoder ---------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """Mean colours, and how often they were asked for."""

    dim, fingerprint = 3, "mean colours"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, image):
        assert not torch.is_autocast_enabled("cpu")
        self.calls += 1
        return image.mean((2, 3)) * self.scale


@pytest.fixture
def encoded(monkeypatch):
    """A task whose embeddings a stand-in makes, and the stand-in."""
    from eclosion.models.encoders import EfficientNetLite0Encoder

    encoder = StandIn()
    monkeypatch.setattr(EfficientNetLite0Encoder, "build", lambda self: encoder)
    return make_task(encoder={"name": "efficientnet_lite0", "cache_gb": 0}, facts=NO_ARRAYS), encoder


def test_an_encoder_brings_what_the_data_does_not_and_is_not_trained(encoded):
    task, encoder = encoded
    image = make_batch()["image"]
    batch = Batch(range(3), torch.ones(3), {"image": image})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepared = task.prepare(batch)
    torch.testing.assert_close(prepared["image_embed"], image.mean((2, 3)))
    assert prepared["image_embed"].dtype == torch.float32
    assert not prepared["image_embed"].requires_grad
    for name in task.nets:
        task.loss(name, prepared, task.draw(name, prepared, rngs()))
    assert encoder.calls == 1
    assert encoder.scale not in {p for net in task.nets.values() for p in net.parameters()}
    assert task.nets["unet_0"].config.image_embed_dim == 3
    assert torch.equal(task.conditions(range(3), prepared)["image_embed"], prepared["image_embed"])


def test_an_encoder_is_asked_once_for_each_image_and_then_the_disk(encoded, monkeypatch, tmp_path):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path))
    _, encoder = encoded
    batch = Batch(range(3), torch.ones(3), {"image": make_batch()["image"]})
    options = {"name": "efficientnet_lite0", "cache_gb": 0.001}
    first, again = (make_task(encoder=options, facts=NO_ARRAYS).prepare(batch)["image_embed"] for _ in range(2))
    assert encoder.calls == 1
    assert torch.equal(first, again)
    torch.testing.assert_close(first, batch["image"].mean((2, 3)))


def test_an_encoder_that_makes_other_embeddings_than_told_is_refused(encoded):
    task, _ = encoded
    assert replace(task.options, image_embed_dim=3).build(NO_ARRAYS).image_embed_dim == 3
    with pytest.raises(ConfigError, match=r"image_embed_dim is 4, and the encoder makes 3 numbers"):
        replace(task.options, image_embed_dim=4).build(NO_ARRAYS)


def test_embeddings_of_the_data_come_before_those_of_an_encoder(monkeypatch):
    from eclosion.models.encoders import EfficientNetLite0Encoder

    monkeypatch.setattr(EfficientNetLite0Encoder, "build", lambda self: pytest.fail("is not needed"))
    task, batch = make_task(encoder="efficientnet_lite0"), make_batch()
    assert task.prepare(batch) is batch


# --- sampling --------------------------------------------------------------------------------------------------------


def sampled(task, batch, numbers=None, **options):
    numbers = range(len(batch)) if numbers is None else numbers
    conditions = task.conditions(list(numbers), rows(batch, numbers))
    seeds = [generator(0, "sample", i) for i in numbers]
    return task.sample(conditions, seeds, **{"sampler": DDPM, **options})


ALL = (
    unet(image_size=8, learned_variance={}, model={"text_conditioned": True, "self_cond": True}),
    unet(prediction_type="v_prediction", lowres={"noise": True}, model={"memory_efficient": True}),
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_makes_images_in_the_range(name):
    sampler = build("samplers", {"name": name, "num_inference_steps": 3})
    for clip in (True, False):
        images = sampled(make_task(*ALL, clip_sample=clip), make_batch(2), sampler=sampler)
        assert images.shape == (2, 3, 16, 16)
        assert images.dtype == torch.float32
        assert images.abs().max() <= 1


def test_an_image_depends_on_its_own_seed_and_conditions():
    task, batch = make_task(*ALL), make_batch(3)
    whole = sampled(task, batch)
    torch.testing.assert_close(sampled(task, batch, [2]), whole[2:], rtol=0, atol=1e-5)
    other = Batch(batch.positions, batch.weight, {**batch.fields, "image_embed": batch["image_embed"] + 1})
    assert (sampled(task, other) - whole).abs().max() > 1e-3


def test_a_cascade_can_be_left_and_entered_between_any_two_networks():
    three = [unet(image_size=4), unet(image_size=8, lowres={"noise": True}), unet()]
    task, batch = make_task(*three), make_batch(2)
    whole = sampled(task, batch)
    for place in range(2):
        small = sampled(task, batch, last=place)
        assert small.shape[2:] == task.tiers[place].size
        assert torch.equal(sampled(task, batch, first=place + 1, image=small), whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"first": 1}, "unet_1 enlarges what unet_0 makes"),
        ({"last": 2}, "this cascade has 0 to 1"),
        ({"first": 1, "last": 0}, "networks 1 to 0"),
        ({"sampler": [DDPM]}, "1 samplers, and 2 networks"),
        ({"guidance_scale": [1.0]}, "1 numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        sampled(make_task(), make_batch(1), **options)


def test_a_network_has_its_own_sampler_unless_a_list_says_otherwise():
    counts = []
    own = build("samplers", {"name": "ddim", "num_inference_steps": 2})
    task, batch = make_task(RIGHT, unet(sampler={"name": "ddim", "num_inference_steps": 2})), make_batch(1)
    sampled(task, batch, on_step=lambda i, n: counts.append((i, n)))
    assert counts == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2)]
    assert task.samplers(DDPM) == [DDPM, own]
    counts.clear()
    sampled(task, batch, sampler=[own, DDPM], on_step=lambda i, n: counts.append(n))
    assert counts == [2, 2, 3, 3, 3]


def test_guidance_of_two_goes_twice_as_far_from_the_hidden_condition():
    """One step of DDIM from pure noise is the estimate itself, which is affine in the network's output."""
    task, batch = make_task(unet(image_size=8, prediction_type="sample"), clip_sample=False), make_batch()
    one = build("samplers", {"name": "ddim", "num_inference_steps": 1})
    zero, plain, double = (sampled(task, batch, sampler=one, guidance_scale=s) for s in (0.0, 1.0, 2.0))
    inside = (zero.abs() < 0.99) & (plain.abs() < 0.99) & (double.abs() < 0.99)
    assert inside.float().mean() > 0.05
    torch.testing.assert_close((double - zero)[inside], 2 * (plain - zero)[inside], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(zero, plain)
    other = Batch(batch.positions, batch.weight, {**batch.fields, "image_embed": -batch["image_embed"]})
    assert torch.equal(sampled(task, other, sampler=one, guidance_scale=0.0), zero)


def test_guidance_hides_only_what_training_hid():
    both = unet(image_size=8, model={"text_conditioned": True})
    task = make_task(both, image_dropout=0.0)
    assert task.tiers[0].hidden == ["text"]
    batch = make_batch()
    other = Batch(batch.positions, batch.weight, {**batch.fields, "text_encodings": -batch["text_encodings"]})
    assert torch.equal(sampled(task, batch, guidance_scale=0.0), sampled(task, other, guidance_scale=0.0))


@pytest.mark.parametrize(
    ("options", "scale", "said"),
    [
        ({}, [1.0, 2.0], "unet_1 follows nothing. The numbers are for unet_0, unet_1, in this order: use 2,1."),
        ({}, [3.0, 2.0], "guidance_scale is 2, and unet_1 follows nothing. .*: use 3,1."),
        ({"unconditional": True}, 2.0, "unet_0 follows nothing. .*: use 1,1."),
        ({"image_dropout": 0.0}, 2.0, "task.image_dropout is 0"),
        ({}, [2.0, 1.0, 1.0], "3 numbers"),
    ],
)
def test_guidance_that_was_not_trained_for_is_refused_before_training(options, scale, said):
    with pytest.raises(ConfigError, match=said):
        make_task(**options).check_sampling(DDPM, scale)


def test_one_guidance_for_all_is_for_those_that_follow_something():
    task = make_task()
    task.check_sampling(DDPM, 3.0)
    assert torch.equal(
        sampled(task, make_batch(), guidance_scale=3.0), sampled(task, make_batch(), guidance_scale=[3.0, 1.0])
    )


def test_more_steps_than_levels_are_refused_for_each_network():
    many = {"name": "ddim", "num_inference_steps": 21}
    with pytest.raises(ConfigError, match="has only 20 levels"):
        make_task().check_sampling(build("samplers", many), 1.0)
    with pytest.raises(ConfigError, match="has only 20 levels"):
        make_task(RIGHT, unet(sampler=many)).check_sampling(DDPM, 1.0)


def test_the_smaller_image_is_noised_in_sampling_to_the_level_that_is_set():
    told = []
    task, batch = make_task(RIGHT, unet(lowres={"noise": True, "sample_noise_level": 0.35})), make_batch(2)

    def watch(module, args, kwargs):
        told.append(kwargs)

    task.nets["unet_1"].register_forward_pre_hook(watch, with_kwargs=True)
    small = torch.zeros(2, 3, 8, 8)
    sampled(task, batch, first=1, image=small)
    assert told[0]["lowres_noise_level"].tolist() == [350, 350]
    noise = told[0]["lowres_cond"]
    assert 0.5 < noise.std() < 1.5  # of a level with little image left
    assert all(torch.equal(call["lowres_cond"], noise) for call in told)


@pytest.mark.parametrize("name", ["image_embed", "text_encodings"])
def test_conditions_of_another_shape_than_the_networks_take_are_refused(name):
    task = make_task(*ALL)
    batch = make_batch()
    wrong = Batch(batch.positions, batch.weight, {**batch.fields, name: batch[name][..., :2]})
    with pytest.raises(ConfigError, match=f"{name} has the shape"):
        task.conditions(range(3), wrong)


# --- inpainting ------------------------------------------------------------------------------------------------------


def test_inpainting_keeps_what_is_known_and_finds_the_rest():
    task, batch = make_task(), make_batch(2)
    known = make_batch(2, seed=7)["image"]
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, :, :9] = True
    conditions = task.conditions(range(2), batch)
    made = task.inpaint(conditions, rngs(2), known=known, mask=mask, sampler=DDPM, num_resamples=2)
    keep = mask[:, None].expand_as(known)
    torch.testing.assert_close(made[keep], known[keep])
    free = task.sample(conditions, rngs(2), sampler=DDPM)
    assert not torch.allclose(made[~keep], free[~keep], atol=1e-3)
    other = torch.where(keep, known, -known)  # what lies outside of the mask has no influence
    again = task.inpaint(conditions, rngs(2), known=other, mask=mask, sampler=DDPM, num_resamples=2)
    assert torch.equal(again, made)


def test_inpainting_needs_samplers_that_can_go_back():
    task, batch = make_task(RIGHT, unet(sampler="dpm_solver")), make_batch(1)
    given = {"known": batch["image"], "mask": torch.ones(1, 16, 16, dtype=torch.bool), "sampler": DDPM}
    with pytest.raises(ConfigError, match="the sampler of unet_1, DPMSolver, cannot"):
        task.inpaint(task.conditions([0], batch), rngs(1), **given)
    task.inpaint(task.conditions([0], batch), rngs(1), last=0, **given)


# --- pipeline --------------------------------------------------------------------------------------------------------


def reloaded(task, folder, **options):
    task.pipeline("unclip", **options).save_pretrained(folder)
    pipeline = UnclipDecoderPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_makes_the_images_of_the_task(tmp_path):
    task, batch = make_task(*ALL), make_batch(2)
    pipeline = reloaded(task, tmp_path, sampler=DDPM, guidance_scale=[2.0, 1.0])
    given = {"image_embeds": batch["image_embed"], "text_encodings": batch["text_encodings"]}
    wanted = sampled(task, batch, guidance_scale=2.0)
    assert torch.equal(pipeline(**given, seeds=0, output_type="pt").images, wanted)
    one = {name: value[1:] for name, value in given.items()}
    made = pipeline(**one, seeds=[5], num_inference_steps=[2, 4], guidance_scale=1.0, output_type="pt").images
    parts = [replace(DDPM, num_inference_steps=n) for n in (2, 4)]
    wanted = task.sample(task.conditions([0], rows(batch, [1])), [generator(5, "sample", 0)], sampler=parts)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)
    (image, _) = pipeline(**given, sampler="ddim", num_inference_steps=1).images
    assert image.size == (16, 16)


def test_a_generator_of_torch_decides_the_images_of_a_pipeline(tmp_path):
    task = make_task(unconditional=True, facts=NO_ARRAYS)
    pipeline = reloaded(task, tmp_path, sampler=DDPM)

    def images(generator):
        return pipeline(num_images=2, generator=generator, output_type="np", num_inference_steps=2).images

    one = images(torch.Generator().manual_seed(3))
    assert one.shape == (2, 16, 16, 3)
    assert one.min() >= 0
    assert one.max() <= 1
    assert (one == images(torch.Generator().manual_seed(3))).all()
    assert (one != images(torch.Generator().manual_seed(4))).any()
    assert (images([torch.Generator().manual_seed(s) for s in (1, 2)])[1] != one[1]).any()


def test_a_pipeline_says_what_it_misses(tmp_path):
    pipeline = reloaded(make_task(*ALL), tmp_path)
    batch = make_batch(2)
    with pytest.raises(ConfigError, match="image_embeds and text_encodings; none is given"):
        pipeline(num_images=1)
    with pytest.raises(ConfigError, match="2 of image_embed, 3 of num_images"):
        pipeline(batch["image_embed"], num_images=3)
    with pytest.raises(ConfigError, match="1 seeds or generators, and 2 images"):
        pipeline(batch["image_embed"], text_encodings=batch["text_encodings"], seeds=[1])
    with pytest.raises(ConfigError, match="image_embed has the shape"):
        pipeline(batch["image_embed"][:, :2], text_encodings=batch["text_encodings"])
    with pytest.raises(ConfigError, match="'ddpm' is no pipeline for a cascade"):
        make_task().pipeline("ddpm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_makes_nearly_the_same_images(dtype, tmp_path):
    task, batch = make_task(*ALL), make_batch(2)
    pipeline = reloaded(task, tmp_path, sampler=DDPM)
    given = {"image_embeds": batch["image_embed"], "text_encodings": batch["text_encodings"]}
    exact = pipeline(**given, seeds=0, output_type="pt").images
    half, halved = pipeline.to(dtype), {name: value.to(dtype) for name, value in given.items()}
    for what in (given, halved):
        made = half(**what, seeds=0, guidance_scale=2.0, output_type="pt").images
        assert made.dtype == torch.float32
        made = half(**what, seeds=0, output_type="pt").images
        assert 0 < (made - exact).abs().mean() < 0.1


def test_the_samplers_see_float32_whatever_the_network_computes_in():
    """An estimate from a network in bfloat16 is no coarser than its output: x_t does not round."""
    task, batch = make_task(unet(image_size=8)), make_batch(1)
    seen = []
    task.nets["unet_0"].bfloat16().register_forward_pre_hook(lambda net, args: seen.append(args[0].dtype))
    made = sampled(task, batch)
    assert set(seen) == {torch.bfloat16}
    assert not torch.equal(made, made.bfloat16().float())


def test_a_pipeline_offers_no_offloading_that_it_cannot_keep(tmp_path):
    with pytest.raises(ValueError, match="cannot be enabled"):
        reloaded(make_task(*ALL), tmp_path).enable_model_cpu_offload()


def test_a_pipeline_takes_arrays_and_any_images_that_it_gives(tmp_path):
    task, batch = make_task(*ALL), make_batch(2)
    pipeline = reloaded(task, tmp_path, sampler=DDPM)
    tensors = {"image_embeds": batch["image_embed"], "text_encodings": batch["text_encodings"]}
    wanted = pipeline(**tensors, seeds=0, output_type="pt").images
    arrays = {name: value.double().numpy() for name, value in tensors.items()}
    assert torch.equal(pipeline(**arrays, seeds=0, output_type="pt").images, wanted)
    assert torch.equal(pipeline(**arrays, seeds=np.int64(0), output_type="pt").images, wanted)
    seeds = pipeline(**arrays, seeds=np.arange(2), output_type="pt").images
    assert torch.equal(pipeline(**arrays, seeds=[0, 1], output_type="pt").images, seeds)
    enlarged = {}
    for form in ("pt", "np", "pil"):
        small = pipeline(**tensors, seeds=0, last="unet_0", output_type=form).images
        enlarged[form] = pipeline(image=small, first="unet_1", seeds=0, output_type="pt").images
    assert torch.equal(enlarged["pt"], wanted)
    torch.testing.assert_close(enlarged["np"], wanted, rtol=0, atol=1e-4)
    assert (enlarged["pil"] - wanted).abs().mean() < 0.02  # 256 levels
    one = pipeline(image=small[0], first=1, seeds=0, output_type="pt").images
    torch.testing.assert_close(one, enlarged["pil"][:1], rtol=0, atol=1e-5)


EMBED, TEXT = torch.ones(2, 5), torch.ones(2, 2, 6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_inference_steps": 0}, "sampler: num_inference_steps: Input should be greater than or equal to 1"),
        ({"num_inference_steps": 21}, "has only 20 levels"),
        ({"num_inference_steps": [1, 2, 3]}, "num_inference_steps has 3 numbers, and the networks of this task are"),
        ({"sampler": "ddmp"}, "sampler: 'ddmp' is not one of the samplers. Did you mean 'ddpm'"),
        ({"image_embeds": EMBED[0]}, r"image_embeds: is an array \[5\] of float32, and image_embeds is rows x dim"),
        ({"image_embeds": EMBED * math.nan}, "image_embeds row 0: holds NaN or infinity"),
        ({"image_embeds": EMBED * torch.tensor([[1], [0]])}, "image_embeds row 1: is all zero"),
        ({"image_embeds": [[1.0] * 5]}, "image_embeds is of type list, and must be a tensor or an array"),
        ({"text_encodings": TEXT.log10() / 0}, "text_encodings row 0: holds NaN"),
        ({"image": torch.zeros(2, 3, 8, 8)}, "image is given, and unet_0 begins with noise"),
        ({"image": "a.png", "first": 1}, "image is of type str, and must be images of PIL, an array float"),
        ({"image": torch.zeros(2, 8, 8), "first": 1}, r"image is \[2, 8, 8\] of float32, and must be"),
        ({"image": torch.full((2, 3, 8, 8), math.inf), "first": 1}, "image: holds NaN or infinity"),
        ({"image": [Image.new("RGB", (8, n)) for n in (8, 9)], "first": 1}, "image: its images are of several sizes"),
        ({"first": "unet_2"}, "first: 'unet_2' is no network of this task"),
        ({"seeds": 1.5}, "seeds is 1.5, and must be a whole number"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_pipeline_cannot_use_is_one_line_before_any_image_is_made(options, said, tmp_path):
    pipeline = reloaded(make_task(*ALL), tmp_path)
    given = {"image_embeds": EMBED, "text_encodings": TEXT, **options}
    with pytest.raises((ConfigError, DataError), match=said) as error:
        pipeline(**given, callback=lambda *_: pytest.fail("an image is being made"))
    assert "\n" not in str(error.value)


def test_a_pipeline_keeps_the_part_of_an_image_that_is_masked(tmp_path):
    """As the task inpaints, in whatever form the images come."""
    task, batch = make_task(), make_batch(2)
    pipeline = reloaded(task, tmp_path, sampler=DDPM)
    known = make_batch(2, seed=7)["image"]
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, :, :9] = True
    given = {"image_embeds": batch["image_embed"], "seeds": 0, "output_type": "pt"}
    made = pipeline(**given, inpaint_image=known, inpaint_mask=mask, inpaint_resample_times=2).images
    conditions, rngs = task.conditions(range(2), batch), [generator(0, "sample", i) for i in range(2)]
    assert torch.equal(made, task.inpaint(conditions, rngs, known=known, mask=mask, sampler=DDPM, num_resamples=2))
    array = known.permute(0, 2, 3, 1).numpy() / 2 + 0.5
    again = pipeline(**given, inpaint_image=array, inpaint_mask=mask.numpy(), inpaint_resample_times=2).images
    torch.testing.assert_close(again, made, rtol=0, atol=1e-4)
    default = pipeline(**given, inpaint_image=known, inpaint_mask=mask).images
    assert not torch.equal(default, made)  # each step five times


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inpaint_mask": None}, "inpaint_image is given without inpaint_mask"),
        ({"inpaint_image": None}, "inpaint_mask is given without inpaint_image"),
        ({"inpaint_mask": torch.ones(2, 8, 8)}, r"inpaint_mask is \[2, 8, 8\] of float32, and must be \[2, 9, 8\]"),
        ({"inpaint_mask": Image.new("L", (8, 9))}, "inpaint_mask is of type Image, and must be"),
        ({"inpaint_image": torch.zeros(3, 3, 9, 8)}, r"must be \[3, 9, 8\] of bool"),
        ({"inpaint_resample_times": 0}, "inpaint_resample_times is 0, and must be at least 1"),
        ({"sampler": "dpm_solver"}, "the sampler of unet_0, DPMSolver, cannot. Use ddpm or ddim"),
        ({"num_images": 3}, "2 of image_embed, 2 of inpaint_image, 3 of num_images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_pipeline_cannot_inpaint_is_said(options, said, tmp_path):
    pipeline = reloaded(make_task(), tmp_path, sampler=DDPM)
    given = {"inpaint_image": torch.zeros(2, 3, 9, 8), "inpaint_mask": torch.ones(2, 9, 8, dtype=torch.bool), **options}
    with pytest.raises(ConfigError, match=said):
        pipeline(EMBED, **given)
