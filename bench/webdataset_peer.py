"""Shards through webdataset's own pipeline, put together as its manual does it.

Source: https://webdataset.github.io/webdataset/gettingstarted/. A `WebDataset` over a list of shards goes through each
tar from its first header to its last and groups members by key; `decode("pil")` makes pictures of images and texts of
captions; `to_tuple` and `map_tuple` pick and transform them; `batched` collates, inside the worker; a DataLoader
without batches of its own takes them from worker processes, among which the shards are divided.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

__all__ = ["Batches", "Preprocess", "batches", "raw"]

# Whose code resizes, crops and scales pictures: the least that does it, or torchvision's transforms, as is usual.
Preprocess = Literal["PIL and NumPy", "torchvision's transforms"]

# Images, float32 [B, 3, H, W] in [-1, 1], and their B captions.
Batches = Iterable[tuple[Tensor, list[str]]]


def raw(shards: Sequence[str]) -> Iterable[dict[str, Any]]:
    """The samples of one epoch, suffix -> content of the member."""
    return webdataset.WebDataset(list(shards), shardshuffle=False)


def batches(
    shards: Sequence[str],
    *,
    image_size: int,
    batch_size: int,
    num_workers: int,
    preprocess: Preprocess = "PIL and NumPy",
) -> Batches:
    """The batches of one epoch; workers stay for the next."""
    prepare = _Lean(image_size) if preprocess == "PIL and NumPy" else _usual(image_size)
    dataset = (
        webdataset.WebDataset(list(shards), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(prepare, _same)
        .batched(batch_size)
    )
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)


def _usual(size: int) -> Callable[[Image.Image], Tensor]:
    """What a training script writes."""
    return transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


class _Lean:
    """From a picture to what the network sees: what torchvision's transforms do, without their overhead.

    Resize of the shorter side (bicubic), centre crop, scale to [-1, 1].
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: Image.Image) -> Tensor:
        size, short = self._size, min(image.size)
        if short != size:
            width, height = (int(size * side / short) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if image.size != (size, size):
            left, top = (round((side - size) / 2) for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image).transpose(2, 0, 1)  # [3, H, W]
        return torch.from_numpy(pixels.astype(np.float32)).div_(255).sub_(0.5).div_(0.5)


def _same(caption: str) -> str:
    return caption
