"""Weights of DALLE2-pytorch's U-Nets, by the names of our own.

Each tensor of the original is one of ours with the same shape under another name, or is one that its network never
used. So whatever is kept per parameter goes the same way: weights, their averages, the moments of an optimizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eclosion.config.dalle2_unet import unet_options
from eclosion.errors import CheckpointError, ConfigError
from eclosion.models.unclip import Stage, stages
from eclosion.models.unclip_unet import UnclipUNet

__all__ = ["OriginalParameter", "network_options", "original_parameters", "translate_unet"]

# Differences that an error message names before it only counts them.
NAMED = 6


@dataclass(frozen=True)
class OriginalParameter:
    """One parameter of an original U-Net.

    Attributes:
        name: there, without the `unets.0.` or `0.ema_model.` of a checkpoint.
        shape: there and here.
        ours: its name in `UnclipUNet`; None for one that the original never used.
    """

    name: str
    shape: tuple[int, ...]
    ours: str | None


def network_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the `UnclipUNet` that an original U-Net's weights fit, with the original's numbers.

    Args:
        config: arguments of the original's constructor, after its decoder has overwritten some:
            `cond_on_image_embeds`, `cond_on_text_encodings`, `channels`, `channels_out`, `lowres_cond`,
            `lowres_noise_cond`. Unknown keys are passed over.

    Raises:
        ConfigError: if nothing says how wide the network is, or how long an embedding that it wants.
    """
    options = unet_options(config)
    if "base_channels" not in options:
        raise ConfigError("the config of a U-Net has no dim.")
    for kind in ("image", "text"):
        conditioned = options.pop(f"{kind}_conditioned", False)
        if conditioned and f"{kind}_embed_dim" not in options:
            raise ConfigError(f"the config of a U-Net that is conditioned on {kind} has no {kind}_embed_dim.")
        if not conditioned:
            options.pop(f"{kind}_embed_dim", None)
    options.pop("gradient_checkpointing", None)  # how it was trained, not what it is
    return options | {"mid_self_attention": True, "compat": True}  # attend_at_middle had no effect


def original_parameters(config: Mapping[str, Any]) -> list[OriginalParameter]:
    """All parameters of an original U-Net, in the order in which they are registered there.

    Its optimizer counts those with two dimensions or more first, then the others, each in this order; all in this
    order if it does not decay weights.

    Args:
        config: as for `network_options`.

    Raises:
        ConfigError: if options do not fit together.
    """
    with torch.device("meta"):
        net = UnclipUNet(**network_options(config))
    shapes = {key: tuple(p.shape) for key, p in net.named_parameters()}
    unused = _unused(net.config, shapes)
    found = []
    for old, new in _prefixes(net.config, plain=config.get("init_cross_embed") not in (None, True)):
        for suffix in ("", ".weight", ".bias"):
            ours = new + suffix if new + suffix in shapes else None
            if ours or old + suffix in unused:
                shape = shapes[ours] if ours else unused[old + suffix]
                found.append(OriginalParameter(old + suffix, shape, ours))
    return found


def translate_unet(state: Mapping[str, Tensor], config: Mapping[str, Any], *, name: str = "U-Net") -> dict[str, Tensor]:
    """An original U-Net's tensors by the names of `UnclipUNet(**network_options(config))`.

    Args:
        state: one tensor per parameter of the original: weights, averages, or moments of an optimizer.
        config: as for `network_options`.
        name: what an error message calls the network.

    Returns:
        Every parameter of ours, and none besides; the tensors are those of `state`.

    Raises:
        CheckpointError: naming what is missing, what has no place and what has another shape.
    """
    parameters = original_parameters(config)
    problems = _differences(state, parameters)
    if problems:
        raise CheckpointError(f"{name}: these are not the weights of its config: {'; '.join(problems)}.")
    return {p.ours: state[p.name] for p in parameters if p.ours is not None}


def _differences(state: Mapping[str, Tensor], parameters: Sequence[OriginalParameter]) -> list[str]:
    wanted = {p.name: p for p in parameters}
    kinds = {
        "missing": [p.name for p in parameters if p.name not in state and p.ours],
        "without a place": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} is {list(state[key].shape)} instead of {list(p.shape)}"
            for key, p in wanted.items()
            if key in state and tuple(state[key].shape) != p.shape
        ],
    }
    return [f"{len(found)} {kind} ({_some(found)})" for kind, found in kinds.items() if found]


def _some(items: Sequence[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")


# --- names -----------------------------------------------------------------------------------------------------------

# Parts of a block, there and here, in the order of their registration there; those that are not in a block are passed
# over.
RES_BLOCK = {
    "time_mlp.1": "time",
    "cross_attn.null_kv": "cross_attention.null_kv",
    "cross_attn.norm.g": "cross_attention.norm.gain",
    "cross_attn.to_q": "cross_attention.to_q",
    "cross_attn.to_kv": "cross_attention.to_kv",
    "cross_attn.to_out.0": "cross_attention.to_out",
    "cross_attn.to_out.1.g": "cross_attention.norm_out.gain",
    "block1.project": "block_1.conv",
    "block1.norm": "block_1.norm",
    "block2.project": "block_2.conv",
    "block2.norm": "block_2.norm",
    "res_conv": "shortcut",
}
SELF_ATTENTION = {
    "fn.fn.null_kv": "null_kv",
    "fn.fn.norm.g": "norm.gain",
    "fn.fn.to_q": "to_q",
    "fn.fn.to_kv": "to_kv",
    "fn.fn.to_out.0": "to_out",
    "fn.fn.to_out.1.g": "norm_out.gain",
}
LINEAR_ATTENTION = {
    "fn.norm.g": "norm.gain",
    "fn.to_qkv": "to_qkv",
    "fn.to_out.0": "to_out",
    "fn.to_out.1.g": "norm_out.gain",
}
ATTENTION = {"full": SELF_ATTENTION, "linear": LINEAR_ATTENTION, None: {}}
# What stands before the stages and after them.
BEFORE = {
    "to_time_hiddens.1": "time_embedding.hidden",
    "to_time_tokens.0": "time_embedding.to_tokens",
    "to_time_cond.0": "time_embedding.to_vector",
    "image_to_tokens.0": "image_embedding.to_tokens",
    "to_image_hiddens.0": "image_embedding.to_vector",
    "norm_cond": "norm_context",
    "norm_mid_cond": "norm_mid_context",
    "text_to_cond": "text_embedding.to_tokens",
    "to_lowres_noise_cond.1": "noise_level_embedding.hidden",
    "to_lowres_noise_cond.3": "noise_level_embedding.to_vector",
}
NULLS = {
    "null_image_embed": "image_embedding.null_tokens",
    "null_image_hiddens": "image_embedding.null_vector",
    "null_text_embed": "text_embedding.null_tokens",
}

Pairs = Iterator[tuple[str, str]]


def _unused(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Parameters that the original has in every network, and never uses in one like this -> their shapes."""
    dim = options["cross_attention_dim"] or options["base_channels"]
    always = {
        "null_image_embed": (1, options["num_image_tokens"], dim),
        "null_image_hiddens": (1, 4 * options["base_channels"]),
        "null_text_embed": (1, options["num_text_tokens"], dim),
        "norm_cond.weight": (dim,),
        "norm_cond.bias": (dim,),
    }
    used = {old for old, new in NULLS.items() if new in shapes}
    if "norm_context.weight" in shapes:
        used |= {"norm_cond.weight", "norm_cond.bias"}
    return {name: shape for name, shape in always.items() if name not in used}


def _prefixes(options: Mapping[str, Any], *, plain: bool) -> Pairs:
    """What begins the names of parameters, there and here, in the order of their registration there.

    Args:
        options: of `UnclipUNet`.
        plain: whether the original's first convolution has one kernel, under a name of its own.
    """
    plan = stages(options)
    yield from NULLS.items()
    conv_in = _kernels("init_conv", "conv_in", options["conv_in_kernel_sizes"])
    yield from [("init_conv", "conv_in.convs.0")] if plain else conv_in
    yield from BEFORE.items()
    yield from _inside("init_resnet_block", "block_in", RES_BLOCK)
    for s, stage in enumerate(plan):
        yield from _down(f"downs.{s}", f"down_blocks.{s}", stage, options)
    for i, stage in enumerate(reversed(plan)):
        yield from _up(f"ups.{i}", f"up_blocks.{i}", stage, options)
    yield from _inside("mid_block1", "mid_block.block_1", RES_BLOCK)
    yield from _inside("mid_attn", "mid_block.attention", SELF_ATTENTION)
    yield from _inside("mid_block2", "mid_block.block_2", RES_BLOCK)
    for i in range(len(plan)):
        yield from _inside(
            f"upsample_combiner.fmap_convs.{i}", f"combiner.blocks.{i}", {"project": "conv", "norm": "norm"}
        )
    yield from _inside("final_resnet_block", "block_out", RES_BLOCK)
    yield "to_out", "conv_out"


def _down(old: str, new: str, stage: Stage, options: Mapping[str, Any]) -> Pairs:
    kernels = options["downsample_kernel_sizes"]
    yield f"{old}.0.1", f"{new}.enter.conv"
    yield from _kernels(f"{old}.0", f"{new}.enter", kernels)
    yield from _inside(f"{old}.1", f"{new}.block", RES_BLOCK)
    for r in range(stage.layers):
        yield from _inside(f"{old}.2.{r}", f"{new}.blocks.{r}", RES_BLOCK)
    yield from _inside(f"{old}.3", f"{new}.attention", ATTENTION[stage.attention])
    yield f"{old}.4.1", f"{new}.leave.conv"
    yield f"{old}.4", f"{new}.leave"
    yield from _kernels(f"{old}.4", f"{new}.leave", kernels)


def _up(old: str, new: str, stage: Stage, options: Mapping[str, Any]) -> Pairs:
    yield from _inside(f"{old}.0", f"{new}.blocks.0", RES_BLOCK)
    for r in range(stage.layers):
        yield from _inside(f"{old}.1.{r}", f"{new}.blocks.{r + 1}", RES_BLOCK)
    yield from _inside(f"{old}.2", f"{new}.attention", ATTENTION[stage.attention])
    leave = "net.0" if options["upsample"] == "pixel_shuffle" else "1"
    yield f"{old}.3.{leave}", f"{new}.leave.conv"


def _kernels(old: str, new: str, sizes: Sequence[int] | None) -> Pairs:
    return ((f"{old}.convs.{j}", f"{new}.convs.{j}") for j in range(len(sizes or ())))


def _inside(old: str, new: str, parts: Mapping[str, str]) -> Pairs:
    return ((f"{old}.{there}", f"{new}.{here}") for there, here in parts.items())
