"""Each option of DALLE2-pytorch's U-Nets and decoder changes what is computed: a network, its loss, or its images."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from eclosion.config.load import load
from eclosion.data.batch import Batch
from eclosion.errors import ConfigError
from eclosion.rng import generator
from eclosion.tasks.task import DataFacts

SMALL = {
    "dim": 8,
    "dim_mults": [1, 2],
    "num_resnet_blocks": 1,
    "resnet_groups": 4,
    "attn_heads": 2,
    "attn_dim_head": 4,
    "max_text_len": 3,
    "init_cross_embed_kernel_sizes": [3, 5],
}
BASE = {
    "decoder": {
        "unets": [
            {**SMALL, "image_embed_dim": 5, "text_embed_dim": 6, "cond_on_text_encodings": True},
            {**SMALL, "init_cross_embed": False},
        ],
        "image_sizes": [4, 8],
        "timesteps": 20,
        "sample_timesteps": 3,
    },
    "data": {"webdataset_base_url": "{}.tar", "img_embeddings_url": "image", "text_embeddings_url": "text"},
}
FIRST, SECOND, DECODER = "decoder.unets[0].", "decoder.unets[1].", "decoder."
NOISE = {DECODER + "use_noise_for_lowres_cond": True}
# Whatever a key changes first: the shapes of the weights ("network"), the loss of equal draws, or images.
LIVE = [
    (FIRST + "dim", 16, {}, "network"),
    (FIRST + "dim_mults", [1, 1], {}, "network"),
    (FIRST + "cond_on_text_encodings", False, {SECOND + "cond_on_text_encodings": True}, "network"),
    (FIRST + "cond_dim", 16, {}, "network"),
    (FIRST + "num_image_tokens", 2, {}, "network"),
    (FIRST + "num_time_tokens", 1, {}, "network"),
    (FIRST + "self_attn", [False, True], {}, "network"),
    (FIRST + "attend_at_middle", False, {}, "network"),
    (FIRST + "attn_dim_head", 8, {}, "network"),
    (FIRST + "attn_heads", 4, {}, "network"),
    (FIRST + "sparse_attn", True, {}, "network"),
    (FIRST + "cosine_sim_cross_attn", True, {}, "loss"),
    (FIRST + "cosine_sim_self_attn", True, {}, "loss"),
    (FIRST + "max_text_len", 2, {}, "network"),
    (FIRST + "add_image_embeds_to_time", False, {}, "network"),
    (FIRST + "self_cond", True, {}, "network"),
    (FIRST + "init_cross_embed", False, {}, "network"),
    (FIRST + "init_cross_embed_kernel_sizes", [3, 7], {}, "network"),
    (SECOND + "init_conv_kernel_size", 3, {}, "network"),
    (FIRST + "final_conv_kernel_size", 3, {}, "network"),
    (FIRST + "resnet_groups", 2, {}, "loss"),
    (FIRST + "resnet_weight_standardization", True, {}, "loss"),
    (FIRST + "num_resnet_blocks", [1, 2], {}, "network"),
    (FIRST + "cross_embed_downsample", True, {}, "network"),
    (FIRST + "cross_embed_downsample_kernel_sizes", [2, 6], {FIRST + "cross_embed_downsample": True}, "network"),
    (FIRST + "memory_efficient", True, {}, "network"),
    (FIRST + "scale_skip_connection", True, {}, "loss"),
    (FIRST + "pixel_shuffle_upsample", False, {}, "network"),
    (FIRST + "combine_upsample_fmaps", True, {}, "network"),
    (DECODER + "image_sizes", [4, 6], {}, "loss"),
    (DECODER + "timesteps", 30, {}, "loss"),
    (DECODER + "sample_timesteps", [3, 2], {}, "images"),
    (DECODER + "sample_timesteps", [None, 3], {}, "images"),
    (DECODER + "loss_type", "l1", {}, "loss"),
    (DECODER + "beta_schedule", ["cosine", "linear"], {}, "loss"),
    (DECODER + "beta_schedule", None, {}, "loss"),
    (DECODER + "learned_variance", [True, True], {}, "network"),
    (DECODER + "learned_variance_constrain_frac", True, {}, "loss"),
    (DECODER + "vb_loss_weight", 0.1, {}, "loss"),
    (DECODER + "predict_x_start", [False, True], {}, "loss"),
    (DECODER + "predict_v", [True, False], {}, "loss"),
    (DECODER + "image_cond_drop_prob", 0.9, {}, "loss"),
    (DECODER + "text_cond_drop_prob", 0.0, {}, "loss"),
    (DECODER + "unconditional", True, {}, "network"),
    (DECODER + "random_crop_sizes", [None, 4], {}, "loss"),
    (DECODER + "use_noise_for_lowres_cond", [True], {}, "network"),
    (DECODER + "use_blur_for_lowres_cond", [False], NOISE, "loss"),
    (DECODER + "lowres_downsample_first", False, {}, "loss"),
    (DECODER + "blur_prob", 1.0, {}, "loss"),
    (DECODER + "blur_sigma", [1.0, 2.0], {}, "loss"),
    (DECODER + "blur_kernel_size", [5, 7], {DECODER + "blur_sigma": 2.0}, "loss"),
    (DECODER + "lowres_noise_sample_level", 0.9, NOISE, "images"),
    (DECODER + "clip_denoised", False, {}, "images"),
    (DECODER + "clip_x_start", False, {}, "images"),
    (DECODER + "use_dynamic_thres", True, {}, "images"),
    (DECODER + "dynamic_thres_percentile", 0.5, {DECODER + "use_dynamic_thres": True}, "images"),
    (DECODER + "p2_loss_weight_gamma", [0.0, 0.5], {}, "loss"),
    (DECODER + "p2_loss_weight_k", 2.0, {DECODER + "p2_loss_weight_gamma": 1.0}, "loss"),
    (DECODER + "ddim_sampling_eta", 1.0, {}, "images"),
    ("train.cond_scale", [3.0, 1.0], {}, "images"),
    ("seed", 3, {}, "network"),
]


def changed(tree, changes):
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        *above, last = (int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path))
        here = tree
        for key in above:
            here = here[key] if isinstance(key, int) else here.setdefault(key, {})
        here[last] = value
    return tree


def cascade(changes):
    """A config with some changes, and its task on networks that say something."""
    run = load(changed(BASE, changes)).run
    torch.manual_seed(run.seed)
    task = run.task.build(DataFacts(size=run.data.size, arrays={"image_embed": (5,), "text_encodings": (3, 6)}))
    for net in task.nets.values():
        nn.init.normal_(net.conv_out.weight, std=0.3)  # it is zero at first
    return run, task


def batch_of_six():
    source = torch.Generator().manual_seed(0)
    fields = {
        "image": torch.rand(6, 3, 8, 8, generator=source) * 2 - 1,
        "image_embed": torch.randn(6, 5, generator=source),
        "text_encodings": torch.randn(6, 3, 6, generator=source),
    }
    return Batch(positions=range(6), weight=torch.ones(6), fields=fields)


def rngs():
    return [generator(0, p) for p in range(6)]


def weights(run, task):
    """Names and shapes of the weights, and the first of them, which follows from the seed."""
    shapes = [(name, key, p.shape) for name, net in task.nets.items() for key, p in net.named_parameters()]
    return shapes, next(task.nets["unet_0"].parameters()).flatten()[0]


@torch.no_grad()
def losses(run, task):
    batch = batch_of_six()
    return [task.loss(name, batch, task.draw(name, batch, rngs())) for name in task.nets]


def images(run, task):
    conditions, scale = task.conditions(range(6), batch_of_six()), run.sample.guidance_scale
    return task.sample(conditions, rngs(), sampler=run.sample.sampler, guidance_scale=scale)


COMPUTED = {"network": weights, "loss": losses, "images": images}
KEPT = {}


def kept(changes, what):
    """What a config computes, once for all tests."""
    name = json.dumps(changes)
    if name not in KEPT:
        KEPT[name] = {"cascade": cascade(changes)}
    if what not in KEPT[name]:
        KEPT[name][what] = str(COMPUTED[what](*KEPT[name]["cascade"]))
    return KEPT[name][what]


def first_difference(changes, context):
    """The first thing that is computed otherwise than with `context` alone."""
    made = cascade({**context, **changes})
    return next((what for what in COMPUTED if str(COMPUTED[what](*made)) != kept(context, what)), None)


@pytest.mark.parametrize(("key", "value", "context", "what"), LIVE, ids=[f"{key}={value}" for key, value, _, _ in LIVE])
def test_each_option_changes_what_is_computed(key, value, context, what):
    assert first_difference({key: value}, context) == what


def test_what_has_no_effect_changes_nothing():
    """The control: the same is computed twice, and keys that are only accepted leave it so."""
    dead = {
        FIRST + "out_dim": 7,
        SECOND + "cond_on_image_embeds": True,
        SECOND + "channels_out": 9,
        DECODER + "image_size": 1,
        DECODER + "auto_normalize_img": False,
        DECODER + "predict_x_start_for_latent_diffusion": True,
        "train.static_graph": False,
    }
    assert first_difference(dead, {}) is None


@pytest.mark.parametrize("name", ["cosine", "linear", "quadratic", "jsd", "sigmoid"])
def test_every_schedule_trains_and_samples_with_finite_numbers_at_every_level(name):
    """jsd, and linear and quadratic with 20 levels, end in noise alone, where the original divides by zero."""
    config = {DECODER + "beta_schedule": name, DECODER + "sample_timesteps": None, DECODER + "learned_variance": True}
    run, task = cascade(config)
    batch = batch_of_six()
    for name in task.nets:
        drawn = task.draw(name, batch, rngs())
        for t in (0, 1, 18, 19):
            losses_at_t = task.loss(name, batch, replace(drawn, t=torch.full((6,), t)))
            assert losses_at_t.isfinite().all()
            losses_at_t.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.nets[name].parameters())
    assert images(run, task).isfinite().all()


def test_activations_are_computed_twice_where_that_is_asked_for():
    _, task = cascade({FIRST + "checkpoint_during_training": True})
    assert [net.is_gradient_checkpointing for net in task.nets.values()] == [True, False]
    assert first_difference({FIRST + "checkpoint_during_training": True}, {}) is None


def test_embeddings_of_another_length_are_refused():
    with pytest.raises(ConfigError) as error:
        cascade({FIRST + "image_embed_dim": 7, FIRST + "text_embed_dim": 8})
    assert error.value.problems == [
        "task.image_embed_dim is 7, and the image embeddings have 5 numbers. Change it, or bring other embeddings.",
        "task.text_embed_dim is 8, and the text embeddings have 6 numbers. Change it, or bring other embeddings.",
    ]
