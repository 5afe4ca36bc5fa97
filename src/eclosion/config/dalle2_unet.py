"""The U-Nets of DALLE2-pytorch in our words: one table of names, and what a name alone does not say."""

from collections.abc import Mapping
from typing import Any

from eclosion.errors import ConfigError

__all__ = ["DALLE2_NAMES", "unet_options"]

# Option of the original's U-Net -> ours; None where a note below says what becomes of it.
DALLE2_NAMES: dict[str, str | None] = {
    "dim": "base_channels",
    "dim_mults": "channel_mults",
    "num_resnet_blocks": "layers_per_block",
    "resnet_groups": "norm_num_groups",
    "resnet_weight_standardization": "weight_standardization",
    "self_attn": "self_attention",
    "sparse_attn": "linear_attention",
    "attend_at_middle": "mid_self_attention",  # had no effect: the bottleneck always had self-attention
    "attn_heads": "num_attention_heads",
    "attn_dim_head": "attention_head_dim",
    "cosine_sim_self_attn": "cosine_self_attention",
    "cosine_sim_cross_attn": "cosine_cross_attention",
    "cond_dim": "cross_attention_dim",
    "num_image_tokens": "num_image_tokens",
    "num_time_tokens": "num_time_tokens",
    "max_text_len": "num_text_tokens",
    "cond_on_image_embeds": "image_conditioned",
    "cond_on_text_encodings": "text_conditioned",
    "add_image_embeds_to_time": "add_image_embed_to_time",
    "self_cond": "self_cond",
    "init_cross_embed": "conv_in_kernel_sizes",  # true: several kernels; false: one
    "init_cross_embed_kernel_sizes": "conv_in_kernel_sizes",
    "init_conv_kernel_size": "conv_in_kernel_sizes",
    "final_conv_kernel_size": "conv_out_kernel_size",
    "cross_embed_downsample": "downsample_kernel_sizes",  # true: the kernels; false: none
    "cross_embed_downsample_kernel_sizes": "downsample_kernel_sizes",
    "pixel_shuffle_upsample": "upsample",  # true: "pixel_shuffle"; false: "nearest"
    "memory_efficient": "memory_efficient",
    "scale_skip_connection": "scale_skip_connection",
    "combine_upsample_fmaps": "combine_upsampled",
    "checkpoint_during_training": "gradient_checkpointing",
    # What a network is told follows from the cascade and from the data:
    "image_embed_dim": "image_embed_dim",
    "text_embed_dim": "text_embed_dim",
    "channels": "in_channels",
    "channels_out": "out_channels",
    "lowres_cond": "lowres_cond",
    "lowres_noise_cond": "lowres_noise_cond",
    # Any value but that of `dim` failed in the first forward pass of the original.
    "init_dim": None,
    # Had no effect.
    "out_dim": None,
}
# Names whose values stay as they are.
RENAMED = {
    old: new
    for old, new in DALLE2_NAMES.items()
    if new not in (None, "conv_in_kernel_sizes", "downsample_kernel_sizes", "upsample")
}
# What stands for an option of several kernels that is not given: the defaults of the original.
KERNELS: dict[str, Any] = {
    "init_cross_embed": True,
    "init_cross_embed_kernel_sizes": (3, 7, 15),
    "init_conv_kernel_size": 7,
    "cross_embed_downsample": False,
    "cross_embed_downsample_kernel_sizes": (2, 4),
}


def unet_options(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one of the original's U-Nets in our words, in the order of `DALLE2_NAMES`.

    Keys that are None, or not in `DALLE2_NAMES`, are left out: who reads a file refuses those that are unknown.

    Args:
        unet: arguments of the original's constructor, as its config files have them.

    Returns:
        Options of the part "unclip_unet", and as far as given the six that depend on the cascade and the data:
        `in_channels`, `out_channels`, `image_embed_dim`, `text_embed_dim`, `lowres_cond`, `lowres_noise_cond`.

    Raises:
        ConfigError: if `init_dim` is not `dim`.
    """
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in unet.items()}
    if given.get("init_dim") not in (None, given.get("dim")):
        raise ConfigError(f"init_dim is {given['init_dim']}, and can only be dim, {given.get('dim')}. Leave it out.")
    options = {str(new): given[old] for old, new in RENAMED.items() if given.get(old) is not None}
    options |= _kernels(given)
    if given.get("pixel_shuffle_upsample") is not None:
        options["upsample"] = "pixel_shuffle" if given["pixel_shuffle_upsample"] else "nearest"
    return options


def _kernels(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the kernels that enter the network and that halve the resolution, if anything is said of them."""
    said = {key for key in KERNELS if given.get(key) is not None}
    of = KERNELS | {key: given[key] for key in said}
    options: dict[str, Any] = {}
    if any(key.startswith("init_") for key in said):
        several = _ascending(of["init_cross_embed_kernel_sizes"])
        options["conv_in_kernel_sizes"] = several if of["init_cross_embed"] else [of["init_conv_kernel_size"]]
    if any(key.startswith("cross_embed_downsample") for key in said):
        several = _ascending(of["cross_embed_downsample_kernel_sizes"])
        options["downsample_kernel_sizes"] = several if of["cross_embed_downsample"] else None
    return options


def _ascending(sizes: Any) -> Any:
    """Kernels as the original sorts them; what is no list of numbers is left for the check of our own options."""
    numbers = isinstance(sizes, list | tuple) and all(isinstance(size, int) for size in sizes)
    return sorted(sizes) if numbers else sizes
