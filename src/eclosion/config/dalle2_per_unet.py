"""What a decoder config of DALLE2-pytorch says of each of its U-Nets."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from eclosion.config.dalle2_schema import Decoder, DecoderFile

__all__ = [
    "blurs",
    "encodes",
    "encodes_text",
    "followed",
    "follows",
    "for_upsamplers",
    "given_unets",
    "per_unet",
    "schedules",
    "sizes_of",
    "text_dims",
]


def per_unet(value: Any, count: int) -> list[Any]:
    """One value for each U-Net, from one for all or a list."""
    return list(value) if isinstance(value, list) else [value] * count


def for_upsamplers(value: bool | list[bool], count: int) -> list[bool]:
    """An answer for each U-Net, false for the first, from one for all others or a list with or without the first."""
    given = list(value) if isinstance(value, list) else [value] * (count - 1)
    return [False, *given[len(given) - (count - 1) :]]


def given_unets(file: DecoderFile, raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each U-Net that a config gives, as they were read.

    Args:
        file: the config.
        raw: what it was read from.
    """
    return [
        {field.name: asdict(unet)[field.name] for field in fields(unet) if field.name in options}
        for unet, options in zip(file.decoder.unets, raw["decoder"]["unets"], strict=True)
    ]


def sizes_of(file: DecoderFile) -> list[int]:
    """Height and width of the images of each U-Net; 1 in place of none."""
    decoder = file.decoder
    if decoder.image_sizes is not None:
        return list(decoder.image_sizes) or [1]
    return [decoder.image_size or 1]


def schedules(decoder: Decoder) -> list[str]:
    """The noise schedule of each U-Net; null is linear for the last of several, and cosine for the others."""
    count = len(decoder.unets)
    if decoder.beta_schedule is None:
        return ["cosine"] * max(count - 1, 1) + ["linear"] * (count > 1)
    return per_unet(decoder.beta_schedule, count)


def blurs(decoder: Decoder) -> list[bool]:
    """Whether the small image of each U-Net is blurred in training."""
    return for_upsamplers(decoder.use_blur_for_lowres_cond, len(decoder.unets))


def followed(decoder: Decoder, i: int) -> list[str]:
    """What a U-Net follows: "image", "text"."""
    if i >= len(decoder.unets) or decoder.unconditional:
        return []
    return ["image"] * (i == 0) + ["text"] * bool(decoder.unets[i].cond_on_text_encodings)


def follows(file: DecoderFile, kind: str) -> bool:
    """Whether a U-Net follows the embedding of an image ("image") or text ("text")."""
    if file.decoder.unconditional:
        return False
    return kind == "image" or any(unet.cond_on_text_encodings for unet in file.decoder.unets)


def encodes(file: DecoderFile) -> bool:
    """Whether CLIP makes the embeddings of images while training."""
    return file.decoder.clip is not None and follows(file, "image") and file.data.img_embeddings_url is None


def encodes_text(file: DecoderFile) -> bool:
    """Whether CLIP makes the encodings of captions while training, unless the shards hold them."""
    return file.decoder.clip is not None and follows(file, "text") and file.data.text_embeddings_url is None


def text_dims(decoder: Decoder) -> list[int]:
    """The lengths of the encodings of text tokens that the U-Nets which follow text name, each once."""
    wanted = [u.text_embed_dim for i, u in enumerate(decoder.unets) if "text" in followed(decoder, i)]
    return sorted({dim for dim in wanted if dim is not None})
