"""What is wrong with the cascade of a DALLE2-pytorch decoder config: its lists, networks, sizes and schedules."""

import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from eclosion.config.dalle2_data import arrival
from eclosion.config.dalle2_per_unet import blurs, for_upsamplers, per_unet, schedules
from eclosion.config.dalle2_schema import Decoder, DecoderFile, Unet
from eclosion.config.dalle2_unet import DALLE2_NAMES, unet_options
from eclosion.config.explain import checked
from eclosion.errors import ConfigError
from eclosion.registry import resolve

__all__ = ["TOLD", "problems_of_cascade"]

# What our network is told when it is built, and is no option of it.
TOLD = ("in_channels", "out_channels", "image_embed_dim", "text_embed_dim", "lowres_cond", "lowres_noise_cond")
# A pipeline of diffusers must name its networks one by one.
MAX_UNETS = 8
# With fewer levels, those schedules, stretched from 1000, would let noise take more than all of the variance.
MIN_STRETCHED = 20
STRETCHED = ("linear", "quadratic", "sigmoid")
# Keys that may have one value per U-Net.
PER_UNET = (
    "decoder.image_sizes",
    "decoder.beta_schedule",
    "decoder.sample_timesteps",
    "decoder.predict_x_start",
    "decoder.predict_v",
    "decoder.p2_loss_weight_gamma",
    "decoder.random_crop_sizes",
    "train.lr",
    "train.wd",
    "train.warmup_steps",
    "train.max_grad_norm",
    "train.cond_scale",
    "train.unet_training_mask",
)


def problems_of_cascade(file: DecoderFile, unets: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per problem, each with its path.

    Args:
        file: the config.
        unets: the options of each U-Net that the config gives.
    """
    counts = list(_wrong_counts(file))
    cascade = [] if counts else _wrong_cascade(file)  # which would be about the wrong U-Net
    return [*counts, *_wrong_networks(unets), *cascade]


def _wrong_counts(file: DecoderFile) -> Iterator[str]:
    """Lists that are not as long as there are U-Nets."""
    count = len(file.decoder.unets)
    if count > MAX_UNETS:
        yield f"decoder.unets has {count} U-Nets, and {MAX_UNETS} are the most."
    given = f"and there {'is 1 U-Net' if count == 1 else f'are {count} U-Nets'}"
    for path in PER_UNET:
        value = attrgetter(path)(file)
        if isinstance(value, list) and len(value) != count:
            yield f"{path} has {_entries(value)}, {given}. Give one for each."
    if isinstance(variance := file.decoder.learned_variance, list) and len(variance) > count:
        yield f"decoder.learned_variance has {_entries(variance)}, {given}. Give at most one for each."
    for key in ("use_noise_for_lowres_cond", "use_blur_for_lowres_cond"):
        value = getattr(file.decoder, key)
        if isinstance(value, list) and len(value) not in (count - 1, count):
            yield f"decoder.{key} has {_entries(value)}, {given}. Give one for each, with or without the first."
    if file.decoder.image_sizes is None and count > 1:
        yield f"decoder.image_sizes is required: one size for each of {count} U-Nets, from low to high resolution."
    elif file.decoder.image_sizes is None and file.decoder.image_size is None:
        yield "decoder.image_sizes is required: a list of the size of each U-Net's images, such as [64]."


def _entries(value: Sequence[Any]) -> str:
    return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}"


def _wrong_networks(unets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What our own network says of its options, in the original's words."""
    for i, unet in enumerate(unets):
        try:
            options = unet_options(unet)
            checked(resolve("models", "unclip_unet"), {k: v for k, v in options.items() if k not in TOLD})
        except ConfigError as error:
            for problem in error.problems:
                said = _in_their_words(problem, unet)
                yield f"decoder.unets[{i}]{': ' if said.startswith('config: ') else '.'}{said.removeprefix('config: ')}"


def _in_their_words(problem: str, unet: Mapping[str, Any]) -> str:
    several = unet.get("init_cross_embed", True)
    words = {new: old for old, new in DALLE2_NAMES.items() if new is not None}
    words |= {
        "conv_in_kernel_sizes": "init_cross_embed_kernel_sizes" if several else "init_conv_kernel_size",
        "downsample_kernel_sizes": "cross_embed_downsample_kernel_sizes",
    }
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda word: words.get(word[0], word[0]), problem)


def _wrong_cascade(file: DecoderFile) -> Iterator[str]:
    """Sizes, crops, schedules and small images, U-Net by U-Net."""
    decoder = file.decoder
    count = len(decoder.unets)
    sizes = decoder.image_sizes or [decoder.image_size or 0]
    single = decoder.image_sizes is None
    if single and sizes[0] < 1:
        yield f"decoder.image_size is {sizes[0]}, and must be at least 1."
        return
    for i in range(1, count):
        if sizes[i] <= sizes[i - 1]:
            yield (
                f"decoder.image_sizes is {sizes}, and must rise from U-Net to U-Net. Order sizes and unets from low to "
                "high resolution."
            )
            break
    crops = per_unet(decoder.random_crop_sizes, count)
    if crops[0] is not None:
        yield f"decoder.random_crop_sizes[0] is {crops[0]}, and must be null: the first U-Net must learn whole images."
    for i, unet in enumerate(decoder.unets):
        yield from _wrong_size("decoder.image_size" if single else f"decoder.image_sizes[{i}]", sizes[i], i, unet)
        if i and crops[i] is not None:
            yield from _wrong_size(f"decoder.random_crop_sizes[{i}]", crops[i], i, unet)
            if crops[i] > sizes[i]:
                yield f"decoder.random_crop_sizes[{i}] is {crops[i]}, and the images of that U-Net are {sizes[i]}."
    yield from _wrong_schedules(decoder)
    yield from _wrong_lowres(file)
    size, largest = arrival(file).size, max(sizes)
    if min(size) < largest:
        yield (
            f"data.preprocessing makes images of {size[1]}x{size[0]} pixels, and the last U-Net makes "
            f"{largest}x{largest}: there is nothing larger to learn from. Change the size there, or "
            "decoder.image_sizes."
        )


def _wrong_size(path: str, size: int, i: int, unet: Unet) -> Iterator[str]:
    halvings = len(unet.dim_mults) - (0 if unet.memory_efficient else 1)
    if halvings > 0 and size % 2 ** min(halvings, 32):
        yield (
            f"{path} is {size}, and must be a multiple of {2 ** min(halvings, 32)}: decoder.unets[{i}] halves the "
            f"resolution {halvings} times. Change it, or dim_mults."
        )


def _wrong_schedules(decoder: Decoder) -> Iterator[str]:
    T = decoder.timesteps
    stretched = {name for name in schedules(decoder) if name in STRETCHED}
    for name in sorted(stretched if T < MIN_STRETCHED else ()):
        yield (
            f"decoder.timesteps is {T}, and {name} needs at least {MIN_STRETCHED}: with fewer, the last levels would "
            "add more noise than there is image. Raise it, or set beta_schedule to cosine."
        )
    several = isinstance(decoder.sample_timesteps, list)
    for i, steps in enumerate(per_unet(decoder.sample_timesteps, 1)):
        if steps is not None and steps > T:
            path = f"decoder.sample_timesteps[{i}]" if several else "decoder.sample_timesteps"
            yield f"{path} is {steps}, and there are {T} timesteps. Use at most as many."


def _wrong_lowres(file: DecoderFile) -> Iterator[str]:
    """The small images that upsamplers see."""
    decoder = file.decoder
    count = len(decoder.unets)
    for key in ("use_noise_for_lowres_cond", "use_blur_for_lowres_cond"):
        value = getattr(decoder, key)
        if isinstance(value, list) and len(value) == count and value[0]:
            yield f"decoder.{key}[0] is true, and must be false: the first U-Net sees no smaller image."
    noise, blur = for_upsamplers(decoder.use_noise_for_lowres_cond, count), blurs(decoder)
    for i in range(1, count):
        if not (noise[i] or blur[i]):
            yield (
                "decoder.use_blur_for_lowres_cond and use_noise_for_lowres_cond are both false for "
                f"decoder.unets[{i}]. It needs one of them: the images that it enlarges in sampling are not perfect."
            )
    low, wide = _ends(decoder.blur_sigma), _ends(decoder.blur_kernel_size)
    for key, (least, most) in {"blur_sigma": low, "blur_kernel_size": wide}.items():
        if least > most:
            yield f"decoder.{key} is [{least}, {most}], and must be a range that begins with the smaller number."
    if even := [side for side in wide if side % 2 == 0]:
        yield f"decoder.blur_kernel_size is {even[0]}, and must be odd, so that the kernel has a middle."
    for i in range(1, count if any(blur) else 0):
        blurred = (decoder.image_sizes or [1])[i - 1] if decoder.lowres_downsample_first else min(arrival(file).size)
        if blur[i] and max(wide) // 2 >= blurred:
            yield (
                f"decoder.blur_kernel_size is {max(wide)}, and the images that are blurred for decoder.unets[{i}] are "
                f"{blurred} pixels wide. Use at most {2 * blurred - 1}."
            )


def _ends(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)
