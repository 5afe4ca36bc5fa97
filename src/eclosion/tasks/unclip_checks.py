"""What is wrong with the options of a cascade: each problem with the path of the option to change.

What follows from the options alone is found before anything is opened or built; what depends on the data, after.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eclosion.diffusion.lowres import LowRes
from eclosion.models.unclip import UnclipUNetModel
from eclosion.registry import dump
from eclosion.tasks.task import DataFacts, is_silent
from eclosion.tasks.unclip_tier import CascadeUNet

__all__ = ["MAX_UNETS", "Problem", "problems_of_options", "problems_with_arrays", "problems_with_size"]

# Where, below the task, and what.
Problem = tuple[tuple[str | int, ...], str]
Size = tuple[int, int]

# A pipeline of diffusers must name its networks one by one.
MAX_UNETS = 8


def problems_of_options(unets: Sequence[CascadeUNet], *, unconditional: bool, encoder: Any) -> list[Problem]:
    """What is wrong whatever the data is."""
    if not 1 <= len(unets) <= MAX_UNETS:
        given = "is empty" if not unets else f"has {len(unets)} networks"
        return [(("unets",), f"{given}, and must hold 1 to {MAX_UNETS} networks, from low to high resolution.")]
    if wrong := [(i, unet.model) for i, unet in enumerate(unets) if not isinstance(unet.model, UnclipUNetModel)]:
        hint = "is a network that follows no embeddings. Use unclip_unet."
        return [(("unets", i, "model"), hint) for i, _ in wrong]
    found = _wrong_order(unets)
    for i, unet in enumerate(unets):
        flow = type(unet.noise_schedule).__name__ == "RectifiedFlow"
        if flow != (unet.prediction_type == "flow"):
            does = f"is {unet.prediction_type!r}, and does not go with this noise_schedule"
            found.append((("unets", i, "prediction_type"), f"{does}: 'flow' needs rectified_flow, and it 'flow'."))
        if is_silent(unet.noise_schedule, unet.prediction_type):
            does = "is true, and prediction_type is 'epsilon': the last level is noise alone, which says nothing of the"
            cure = "image. Set it to false, or use the prediction_type v_prediction or sample."
            found.append((("unets", i, "noise_schedule", "rescale_zero_terminal_snr"), f"{does} {cure}"))
        if size := unet.size(None):
            found += _wrong_size(i, unet, size, "image_size")
        if unconditional:
            found += [
                (("unets", i, "model", name), "is true, and unconditional is true as well. Set one of them to false.")
                for name in ("image_conditioned", "text_conditioned")
                if getattr(unet.model, name)
            ]
    for name in ("lowres", "crop_size"):
        if getattr(unets[0], name) is not None:
            why = "it sees no smaller image" if name == "lowres" else "it must learn whole images"
            found.append((("unets", 0, name), f"is set for the first network, and {why}. Leave it out."))
    if unconditional and encoder is not None:
        found.append((("encoder",), "is set, and unconditional is true: nothing follows an embedding. Leave it out."))
    return found


def problems_with_size(unets: Sequence[CascadeUNet], data_size: Size) -> list[Problem]:
    """What is wrong with images of this height and width in pixels, for options that are right by themselves."""
    found: list[Problem] = []
    for i, unet in enumerate(unets):
        size, path = unet.size(data_size), ("unets", i, "image_size")
        before = unets[i - 1].size(data_size) if i else None
        mine: list[Problem] = []
        assert size is not None
        if unet.image_size is None:
            mine += _wrong_size(i, unet, size, "data.image_size")
            if before and not _is_larger(size, before):
                mine.append(
                    (path, f"is data.image_size, {_text(size)}, and the network before makes {_text(before)} already.")
                )
        elif any(side > there for side, there in zip(size, data_size, strict=True)):
            say = f"is {_text(size)}, and data.image_size is {_text(data_size)}: there is nothing larger to learn from."
            mine.append((path, f"{say} Set data.image_size to {_text(size)}, or this lower."))
        if before and not mine:
            mine += _wrong_shape(i, before, size)
        if i:
            lowres = unet.lowres or LowRes()
            mine += _wrong_blur(i, lowres, before if lowres.downsample_first else data_size)
        found += mine
    return found


def problems_with_arrays(
    facts: DataFacts, *, wanted: Mapping[str, bool], dims: Mapping[str, int | None], encoder: Any
) -> list[Problem]:
    """What is wrong with what samples of the data bring besides the image.

    Args:
        facts: what is known of the data.
        wanted: whether a network follows "image_embed" and "text_encodings".
        dims: how many numbers the options say that they have; none says nothing.
        encoder: what makes them where the data brings none.
    """
    arrays = facts.arrays
    found: list[Problem] = []
    layouts = {"image_embed": ("[D], one vector", 1), "text_encodings": ("[L, D], one vector per token", 2)}
    for name, (layout, ndim) in layouts.items():
        shape = list(arrays.get(name, ()))
        if shape and (len(shape) != ndim or 0 in shape):
            found.append((("unets",), f"the data's {name} has the shape {shape} per image, and must be {layout}."))
        elif shape and wanted[name] and dims[name] not in (None, shape[-1]):
            kind = name.partition("_")[0]
            have = f"the {kind} embeddings have {shape[-1]} numbers. Change it, or bring other embeddings."
            found.append(((f"{kind}_embed_dim",), f"is {dims[name]}, and {have}"))
    if wanted["image_embed"] and "image_embed" not in arrays and encoder is None:
        say = (
            "a network follows image embeddings, and the data has none. Say where they are with "
            "data.source.img_embeddings_url, or what makes them with task.encoder; or set task.unconditional=true."
        )
        found.append((("unets",), say))
    if wanted["text_encodings"] and "text_encodings" not in arrays and "text_encodings" not in facts.made:
        found += _cannot_read(facts, encoder)
    return found


def _cannot_read(facts: DataFacts, encoder: Any) -> list[Problem]:
    """Why nothing makes encodings of the captions, for data that has no encodings."""
    follows = "a network follows text (model.text_conditioned), and the data has no text encodings"
    cure = "Say where they are with data.source.text_embeddings_url, {}or set model.text_conditioned to false."
    if encoder is not None and not hasattr(encoder, "build_text"):
        name = dump(encoder)["name"]
        say = f"is {name}, and reads no captions; {follows}. {cure.format('use a CLIP, ')}"
        return [(("encoder",), say)]
    if encoder is None:
        also = "or make them of its captions with task.encoder=clip, " if facts.has_captions else ""
        return [(("unets",), f"{follows}. {cure.format(also)}")]
    if not facts.has_captions:
        return [(("unets",), f"{follows}, and no captions that task.encoder could make them of. {cure.format('')}")]
    return []


def _wrong_order(unets: Sequence[CascadeUNet]) -> list[Problem]:
    found: list[Problem] = []
    highest: Size | None = None
    for i, unet in enumerate(unets):
        size, path = unet.size(None), ("unets", i, "image_size")
        if size is None:
            if i + 1 < len(unets):
                say = "has no image_size. Only the last network may leave it out, which then takes data.image_size."
                found.append((("unets", i), say))
            continue
        if highest and not _is_larger(size, highest):
            say = f"is {_text(size)}, and a network before it makes {_text(highest)}."
            found.append((path, f"{say} Order the networks from low to high resolution."))
        highest = size
    return found


def _is_larger(size: Size, than: Size) -> bool:
    return size != than and all(mine >= theirs for mine, theirs in zip(size, than, strict=True))


def _wrong_shape(i: int, before: Size, size: Size) -> list[Problem]:
    """What a network would stretch of the images of the one before; one pixel is rounding."""
    (height, width), aspect = before, size[1] / size[0]
    if abs(width - height * aspect) <= 1 or abs(height - width / aspect) <= 1:
        return []
    fit = _text((height, round(height * aspect)))
    say = f"is {_text(before)}, and the next network makes {_text(size)} of it, which would stretch what is in it."
    return [(("unets", i - 1, "image_size"), f"{say} Give both the same aspect ratio, such as {fit} here.")]


def _wrong_size(i: int, unet: CascadeUNet, size: Size, name: str) -> list[Problem]:
    """What the network cannot halve as often as it does, and crops that are none."""
    stages = len(unet.model.channel_mults)
    factor = int(2 ** (stages if unet.model.memory_efficient else stages - 1))
    halves = f"must be a multiple of {factor}: this network halves the resolution {factor.bit_length() - 1} times"
    crop, found = unet.crop_size, list[Problem]()
    if any(side % factor for side in size):
        near = [max(factor, round(side / factor) * factor) for side in size]
        what = "is" if name == "image_size" else f"is {name},"
        say = f"{what} {_text(size)}, and {halves}. Use {_text(near)}, or fewer channel_mults."
        found.append((("unets", i, "image_size"), say))
    if crop is not None and crop > min(size):
        say = f"is {crop}, and the images of this network are {_text(size)}. Use at most {min(size)}, or none."
        found.append((("unets", i, "crop_size"), say))
    elif crop is not None and crop % factor:
        found.append((("unets", i, "crop_size"), f"is {crop}, and {halves}."))
    return found


def _wrong_blur(i: int, lowres: LowRes, blurred: Size | None) -> list[Problem]:
    assert blurred is not None
    widest = lowres.kernel_sizes[1] if lowres.blur_probability else 1
    if widest // 2 < min(blurred):
        return []
    say = f"is {widest}, and the blurred images are {_text(blurred)}. Use at most {2 * min(blurred) - 1}."
    return [(("unets", i, "lowres", "blur_kernel_size"), say)]


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
