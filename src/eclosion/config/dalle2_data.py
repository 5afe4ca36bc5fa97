"""The data of DALLE2-pytorch's decoder configs in our words: shards, and how images reach the size of the cascade."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclosion.config.dalle2_per_unet import encodes, follows, sizes_of
from eclosion.config.dalle2_schema import Clip, DecoderFile

__all__ = ["Arrival", "arrival", "clip_side", "data_tree"]

Size = tuple[int, int]

# Transforms after which all images have one size, that of their option `size`.
CROPS = ("RandomResizedCrop", "RandomCrop", "CenterCrop")
# Transforms that leave the size as it is.
KEEP = (
    "ToTensor",
    "PILToTensor",
    "ToPILImage",
    "ConvertImageDtype",
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    "Grayscale",
    "RandomGrayscale",
    "ColorJitter",
    "GaussianBlur",
    "RandomErasing",
    "RandomAutocontrast",
    "RandomEqualize",
    "RandomInvert",
    "RandomPosterize",
    "RandomSolarize",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomPerspective",
    "RandAugment",
    "AutoAugment",
    "TrivialAugmentWide",
    "AugMix",
)
# The original goes on without what it cannot read, however much that is.
MAX_BAD_FRACTION = 0.01
# Side of the images that CLIP sees, where neither its folder nor the end of its name says it.
CLIP_SIDE = 224
CLIP_SIDES = {"RN50x4": 288, "RN50x16": 384, "RN50x64": 448}


@dataclass(frozen=True)
class Arrival:
    """How images come out of the data.

    Attributes:
        options: of the native section `data`: image_size, and what makes it.
        size: height and width in pixels.
        added: whether the config leaves images of different sizes, so that they are brought to one.
    """

    options: Mapping[str, Any]
    size: Size
    added: bool


def data_tree(file: DecoderFile) -> dict[str, Any]:
    """The native section `data` of a config in which nothing is wrong."""
    data, train = file.data, file.train
    source = {
        "name": "webdataset",
        "webdataset_base_url": data.webdataset_base_url,
        "img_embeddings_url": data.img_embeddings_url if follows(file, "image") else None,
        "text_embeddings_url": data.text_embeddings_url if follows(file, "text") else None,
        "start_shard": data.start_shard,
        "end_shard": data.end_shard,
        "shard_width": data.shard_width,
        "index_width": data.index_width,
        "skip_missing_shards": True,  # the original goes on without them
        "splits": {"train": data.splits.train, "val": data.splits.val, "test": data.splits.test},
        "split_seed": file.seed,
    }
    return {
        "source": source,
        **arrival(file).options,
        "shuffle": data.shuffle_train,
        "resample": data.resample_train,
        "epoch_samples": train.epoch_samples if data.resample_train else None,
        "max_bad_fraction": MAX_BAD_FRACTION,
        "num_threads": data.num_workers,
    }


def clip_side(clip: Clip) -> int:
    """Height and width of the images that a CLIP sees, as far as its folder or its name says."""
    name = clip.model.removesuffix("-quickgelu")
    named = re.search(r"[@_-](\d{3})(px)?$", name)
    return _side_in(clip.model) or (int(named[1]) if named else CLIP_SIDES.get(name, CLIP_SIDE))


def _side_in(folder: str) -> int | None:
    """What the config of a CLIP that transformers saved says; None without one, as the encoder tells what is wrong."""
    try:
        side = json.loads((Path(folder).expanduser() / "config.json").read_text())["vision_config"]["image_size"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: ~ of nobody
        return None
    return side if type(side) is int and side > 0 else None


def arrival(file: DecoderFile) -> Arrival:
    """How images come out of `data.preprocessing`, and what is added so that all have one size.

    The U-Nets make theirs of them, smaller ones. Where nothing says a size it is that of the last U-Net; or the one
    that CLIP sees, if that is larger, as it would see little in smaller ones.
    """
    largest = max(sizes_of(file))
    side = max(largest, clip_side(file.decoder.clip)) if file.decoder.clip and encodes(file) else largest
    steps = file.data.preprocessing
    if all(name in ("ToTensor", "RandomHorizontalFlip") and not options for name, options in _items(steps)):
        flips = any(name == "RandomHorizontalFlip" for name, _ in _items(steps))
        return Arrival({"image_size": side, "horizontal_flip": flips}, (side, side), True)
    steps = [*steps]
    size = _after(steps, None)
    added = not isinstance(size, tuple)
    if isinstance(size, int):  # the shorter side alone
        steps.append({"CenterCrop": {"size": size}})
        size = (size, size)
    elif size is None:
        steps[:0] = [{"Resize": {"size": side}}, {"CenterCrop": {"size": side}}]
        size = _after(steps, None)
        if not isinstance(size, tuple):
            steps.append({"CenterCrop": {"size": side}})
            size = (side, side)
    return Arrival({"image_size": size[0] if size[0] == size[1] else list(size), "preprocessing": steps}, size, added)


def _items(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    return [item for step in steps for item in step.items()]


def _after(steps: Sequence[Mapping[str, Any]], size: Size | int | None) -> Size | int | None:
    """What is known of the size after some transforms: both sides, the shorter one, or nothing."""
    for name, options in _items(steps):
        wanted = _size(options.get("size"))
        if name in CROPS:
            size = (wanted, wanted) if isinstance(wanted, int) else wanted
        elif name == "Resize":
            known_square = isinstance(size, tuple) and size[0] == size[1]
            size = (wanted, wanted) if isinstance(wanted, int) and known_square else wanted
            size = None if options.get("max_size") is not None else size
        elif name not in KEEP:
            size = None
    return size


def _size(option: Any) -> Size | int | None:
    """Both sides, one number that is given for them, or None for what is no size."""
    sides = list(option) if isinstance(option, list | tuple) else [option]
    if not all(type(side) is int and side > 0 for side in sides) or not 1 <= len(sides) <= 2:
        return None
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
