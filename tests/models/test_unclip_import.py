"""Imported U-Nets of DALLE2-pytorch give the numbers that it gave."""

import importlib.util
import inspect
import json
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eclosion.config.dalle2_unet import DALLE2_NAMES, unet_options
from eclosion.errors import CheckpointError, ConfigError
from eclosion.models.unclip_import import network_options, original_parameters, translate_unet
from eclosion.models.unclip_unet import UnclipUNet

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("make_unclip_golden", ROOT / "scripts/make_unclip_golden.py")
golden = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = golden  # a dataclass looks its module up
_spec.loader.exec_module(golden)

OUTPUTS = load_file(golden.GOLDEN / golden.OUTPUTS)
PARAMETERS = json.loads((golden.GOLDEN / golden.PARAMETERS).read_text())
WHOLE = load_file(golden.GOLDEN / golden.WHOLE)
each_case = pytest.mark.parametrize("name", golden.CASES)
# What 1e-5 is measured in: outputs have a standard deviation of 1 to 3.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def config_of(case):
    return golden.COMMON | case.unet


def imported(case, state, **options):
    """Our network with the original's weights: each of its parameters is filled, or this fails."""
    config = config_of(case)
    with torch.device("meta"):
        net = UnclipUNet(**{**network_options(config), **options}).eval()
    net.load_state_dict(translate_unet(state, config), strict=True, assign=True)
    return net.requires_grad_()


@torch.no_grad()
def output_of(net, case):
    given = golden.inputs(case)
    none = torch.zeros(case.batch, dtype=torch.bool)
    masks = {"image_keep_mask": case.drop_image, "text_keep_mask": case.drop_text}
    return net(**given, **{key: none for key, dropped in masks.items() if dropped})


@cache
def parameters_of(name):
    return original_parameters(config_of(golden.CASES[name]))


def table_weights(name):
    return {p.name: golden.weight(p.name, p.shape) for p in parameters_of(name)}


# --- against the original's numbers, which are committed -------------------------------------------------------------


@each_case
def test_outputs_are_those_of_the_original(name):
    case = golden.CASES[name]
    torch.testing.assert_close(output_of(imported(case, table_weights(name)), case), OUTPUTS[name], **TOLERANCE)


@each_case
def test_names_shapes_and_order_are_those_of_the_original(name):
    assert golden.digest([(p.name, p.shape) for p in parameters_of(name)]) == PARAMETERS[name]


def test_a_state_dict_that_the_original_drew_is_imported():
    case = golden.WHOLE_CASE
    state = {k.removeprefix("weight."): v.float() for k, v in WHOLE.items() if k.startswith("weight.")}
    torch.testing.assert_close(output_of(imported(case, state), case), WHOLE["output"], **TOLERANCE)


@pytest.mark.parametrize("name", ["self-attention", "combined", "image"])
def test_without_compat_the_numbers_are_others(name):
    """The control: the tolerance sees what the original did otherwise."""
    case = golden.CASES[name]
    ours = output_of(imported(case, table_weights(name), compat=False), case)
    assert (ours - OUTPUTS[name]).abs().max() > 1e-3


def test_every_option_is_in_two_cases_or_more_and_both_batches_of_odd_size_and_images_that_are_not_square():
    told = Counter(key for case in golden.CASES.values() for key in case.unet)
    told.update(dict.fromkeys(golden.COMMON, 2))
    assert {key for key in DALLE2_NAMES if told[key] < 2} == set()
    assert len(golden.CASES) >= 30
    assert sum(case.batch % 2 for case in golden.CASES.values()) > 5
    assert sum(case.size[0] != case.size[1] for case in golden.CASES.values()) > 3


@pytest.mark.parametrize(
    ("config", "numbers", "tensors"),
    [
        (
            {"dim": 128, "cond_dim": 64, "image_embed_dim": 768, "cond_on_image_embeds": True, "channels_out": 6},
            186_292_678,
            443,
        ),
        (
            {
                "dim": 16,
                "cond_dim": 16,
                "image_embed_dim": 768,
                "cond_on_image_embeds": True,
                "attn_heads": 4,
                "attn_dim_head": 16,
                "self_attn": [False, True, True, True],
                "channels_out": 6,
            },
            4_374_678,
            479,
        ),
        (
            {
                "dim": 320,
                "cond_dim": 512,
                "image_embed_dim": 768,
                "text_embed_dim": 768,
                "dim_mults": [1, 2, 3, 4],
                "num_resnet_blocks": 4,
                "attn_heads": 8,
                "attn_dim_head": 64,
                "sparse_attn": True,
                "memory_efficient": True,
                "self_attn": [False, True, True, True],
                "cond_on_image_embeds": True,
                "cond_on_text_encodings": True,
                "channels_out": 6,
            },
            956_805_318,
            757,
        ),
        (
            {
                "dim": 128,
                "cond_dim": 128,
                "dim_mults": [1, 2, 4],
                "memory_efficient": True,
                "lowres_cond": True,
                "lowres_noise_cond": True,
            },
            75_384_396,
            361,
        ),
        ({"dim": 32, "image_embed_dim": 512, "cond_on_image_embeds": True, "channels_out": 6}, 14_245_350, 443),
    ],
    ids=["dim 128", "dim 16", "dim 320", "upsampler", "dim 32"],
)
def test_networks_have_the_sizes_that_are_published(config, numbers, tensors):
    """Counted in the original; it has parameters that it never uses, and we leave those out."""
    parameters = original_parameters(config)
    assert (sum(torch.Size(p.shape).numel() for p in parameters), len(parameters)) == (numbers, tensors)
    with torch.device("meta"):
        net = UnclipUNet(**network_options(config))
    unused = sum(torch.Size(p.shape).numel() for p in parameters if p.ours is None)
    assert sum(p.numel() for p in net.parameters()) == numbers - unused


# --- against the original itself, where it is installed --------------------------------------------------------------

live = pytest.mark.skipif(
    importlib.util.find_spec("dalle2_pytorch") is None, reason="DALLE2-pytorch is not installed; nothing here needs it"
)


@live
@pytest.mark.filterwarnings("ignore")
@each_case
def test_outputs_and_gradients_are_those_of_the_original_that_is_installed(name):
    case = golden.CASES[name]
    torch.manual_seed(1)
    theirs = golden.original(case)
    last = theirs.to_out.weight  # drawn as zeros, with which every network agrees
    torch.nn.init.normal_(last, std=last[0].numel() ** -0.5)  # so that outputs are as large as 1
    parameters = original_parameters(config_of(case))
    registered = [(n, tuple(p.shape)) for n, p in theirs.named_parameters()]
    assert [(p.name, p.shape) for p in parameters] == registered

    ours = imported(case, theirs.state_dict())
    torch.testing.assert_close(output_of(ours, case), golden.output_of(theirs, case), **TOLERANCE)

    for net, function in ((ours, output_of), (theirs, golden.output_of)):
        function.__wrapped__(net, case).square().mean().backward()  # with gradients
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    mine = {n: p.grad for n, p in ours.named_parameters()}
    assert [p.name for p in parameters if p.ours is None and gradients[p.name] is not None] == []
    for p in (p for p in parameters if p.ours is not None):
        wanted = torch.zeros(p.shape) if gradients[p.name] is None else gradients[p.name]
        atol = 1e-4 * float(wanted.abs().max()) + 1e-6
        torch.testing.assert_close(
            mine[p.ours], wanted, rtol=1e-3, atol=atol, msg=lambda text, p=p: f"{p.name}: {text}"
        )


@live
@pytest.mark.filterwarnings("ignore")
def test_every_option_of_the_installed_original_has_a_name():
    from dalle2_pytorch import Unet

    options = set(inspect.signature(Unet.__init__).parameters) - {"self", "kwargs"}
    assert options == set(DALLE2_NAMES)


# --- translation -----------------------------------------------------------------------------------------------------


def test_a_moment_of_an_optimizer_goes_where_its_parameter_goes():
    """Each tensor is handed on as it is: nothing is split, joined, turned or scaled."""
    case = golden.CASES["memory-efficient, everything"]
    config = config_of(case)
    parameters = original_parameters(config)
    moments = {p.name: torch.full(p.shape, float(i)) for i, p in enumerate(parameters)}
    translated = translate_unet(moments, config)
    assert all(translated[p.ours] is moments[p.name] for p in parameters if p.ours)


def test_what_the_original_never_used_may_be_missing():
    case = golden.CASES["unconditional"]
    parameters = original_parameters(config_of(case))
    unused = {p.name for p in parameters if p.ours is None}
    assert unused == {"null_image_embed", "null_image_hiddens", "null_text_embed"}
    state = {p.name: torch.zeros(p.shape) for p in parameters if p.ours}
    assert len(translate_unet(state, config_of(case))) == len(state)


def test_differences_are_named():
    config = config_of(golden.CASES["unconditional"])
    state = {p.name: torch.zeros(p.shape) for p in original_parameters(config)}
    del state["mid_attn.fn.fn.to_q.weight"]
    state["clip.logit_scale"] = torch.zeros(())
    state["to_out.bias"] = torch.zeros(6)
    with pytest.raises(CheckpointError) as error:
        translate_unet(state, config, name="unet_0")
    assert str(error.value) == (
        "unet_0: these are not the weights of its config: 1 missing (mid_attn.fn.fn.to_q.weight); 1 without a place "
        "(clip.logit_scale); 1 of another shape (to_out.bias is [6] instead of [3])."
    )


def test_many_differences_are_counted():
    config = config_of(golden.CASES["unconditional"])
    with pytest.raises(CheckpointError) as error:
        translate_unet({}, config)
    message = str(error.value)
    assert message.count(".weight") + message.count(".bias") == 6
    assert message.endswith(" more).")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the config of a U-Net has no dim"),
        ({"dim": 16, "init_dim": 32}, "init_dim is 32, and can only be dim, 16. Leave it out."),
        ({"dim": 16, "cond_on_image_embeds": True}, "conditioned on image has no image_embed_dim"),
        ({"dim": 16, "cond_on_text_encodings": True}, "conditioned on text has no text_embed_dim"),
        ({"dim": 16, "dim_mults": [2, 4]}, "channel_mults starts with 2"),
        ({"dim": 16, "dim_mults": 4}, "channel_mults is 4, and must be a list of whole numbers"),
        ({"dim": "16"}, "base_channels is '16', and must be a whole number"),
        ({"dim": 16, "num_resnet_blocks": 10**12}, "layers_per_block is 1000000000000, and must be"),
        ({"dim": 16, "init_cross_embed_kernel_sizes": "357"}, "conv_in_kernel_sizes is '357', and must be a list"),
        ({"dim": 16, "cross_embed_downsample": True, "cross_embed_downsample_kernel_sizes": 4}, "must be a list"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        original_parameters(config)


# --- names of options ------------------------------------------------------------------------------------------------

# A value of each of the original's options that is not its default -> the option of ours that it changes.
OTHER_VALUES = {
    "dim": 32,
    "dim_mults": [1, 3],
    "num_resnet_blocks": [1, 2],
    "resnet_groups": 4,
    "resnet_weight_standardization": True,
    "self_attn": True,
    "sparse_attn": True,
    "attend_at_middle": False,
    "attn_heads": 2,
    "attn_dim_head": 5,
    "cosine_sim_self_attn": True,
    "cosine_sim_cross_attn": True,
    "cond_dim": 9,
    "num_image_tokens": 5,
    "num_time_tokens": 3,
    "max_text_len": 8,
    "cond_on_image_embeds": True,
    "cond_on_text_encodings": True,
    "add_image_embeds_to_time": False,
    "self_cond": True,
    "init_cross_embed": False,
    "init_cross_embed_kernel_sizes": [3, 5],
    "final_conv_kernel_size": 3,
    "cross_embed_downsample": True,
    "pixel_shuffle_upsample": False,
    "memory_efficient": True,
    "scale_skip_connection": True,
    "combine_upsample_fmaps": True,
    "checkpoint_during_training": True,
    "image_embed_dim": 12,
    "text_embed_dim": 13,
    "channels": 1,
    "channels_out": 6,
    "lowres_cond": True,
    "lowres_noise_cond": True,
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_each_option_of_the_original_says_something_in_our_words(key):
    assert DALLE2_NAMES[key] in unet_options({key: OTHER_VALUES[key]})
    assert unet_options({key: None}) == {}


def test_kernels_that_depend_on_another_option_are_said_with_it():
    assert unet_options({"init_cross_embed": False, "init_conv_kernel_size": 5})["conv_in_kernel_sizes"] == [5]
    assert unet_options({"init_conv_kernel_size": 5})["conv_in_kernel_sizes"] == [3, 7, 15]
    assert unet_options({"init_cross_embed_kernel_sizes": [9, 3]})["conv_in_kernel_sizes"] == [3, 9]
    sizes = {"cross_embed_downsample_kernel_sizes": [4, 2]}
    assert unet_options({"cross_embed_downsample": True, **sizes})["downsample_kernel_sizes"] == [2, 4]
    assert unet_options(sizes)["downsample_kernel_sizes"] is None


def test_only_what_had_no_effect_has_no_name_and_every_option_of_ours_can_be_said():
    assert {old for old, new in DALLE2_NAMES.items() if new is None} == {"init_dim", "out_dim"}
    ours = set(inspect.signature(UnclipUNet.__init__).parameters) - {"self", "compat"}
    assert ours <= set(DALLE2_NAMES.values())


def test_the_options_are_those_of_the_part():
    from eclosion.registry import build

    cascade = {"in_channels", "out_channels", "image_embed_dim", "text_embed_dim", "lowres_cond", "lowres_noise_cond"}
    options = unet_options(OTHER_VALUES | {"dim_mults": (1, 2), "init_dim": 32, "out_dim": 7})
    part = build("models", {"name": "unclip_unet", **{k: v for k, v in options.items() if k not in cascade}})
    net = part.build(**{k: v for k, v in options.items() if k in cascade})
    assert net.config.base_channels == 32
