"""A frozen network that turns images into embeddings, and what an image has to be before the network sees it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ImageEncoder", "Preprocess", "Preprocessing", "hash_of_tensors", "in_chunks"]

# Part of every fingerprint: to be raised when this file makes other numbers of the same weights and options.
VERSION = 1
# Images that go through the network together, on a CPU and on other devices. Always as many, filled up if need be: the
# order in which a matrix product adds depends on its shape, so an embedding would depend on how many images came along.
CHUNK = {"cpu": 8}
DEVICE_CHUNK = 32

# Digits of a hash of weights that are shown.
DIGITS = 16

Triple = tuple[float, float, float]


class Preprocessing(Protocol):
    """From an image to what a network was trained on: a frozen dataclass, whose fields are what decides it."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        ...

    @property
    def filter(self) -> str:
        """How images are resized, in words; scores of images that were resized in other ways cannot be compared."""
        ...

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image once it is resized, before anything is cut off."""
        ...

    def __call__(self, image: Tensor) -> Tensor:
        """What the network sees, float32 [B, 3, h, w], of images [B, 3, H, W] in [-1, 1], each for itself."""
        ...


@dataclass(frozen=True)
class Preprocess:
    """From an image to what a network was trained on.

    Attributes:
        resize: height and width that an image gets; or one number, its new shorter side.
        crop: height and width that are cut out of its middle after that; none if `resize` is both.
        mean, std: of each channel, for values in 0..1.
        interpolation: as torch names it; antialiased, unless it is "nearest-exact".
        scale: what white is before mean and std.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: Triple
    std: Triple
    interpolation: Literal["bicubic", "bilinear", "nearest-exact"] = "bicubic"
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.resize, tuple)
        return self.resize

    @property
    def filter(self) -> str:
        """How images are resized, in words."""
        return "nearest" if self.interpolation == "nearest-exact" else f"{self.interpolation} antialiased"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image once it is resized, before the crop."""
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = self.resize, int(self.resize * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)

    def __call__(self, image: Tensor) -> Tensor:
        """What the network sees: float32 [B, 3, h, w].

        Args:
            image: [B, 3, H, W] in [-1, 1].
        """
        pixels = image.float() / 2 + 0.5
        size = self.resized(*pixels.shape[-2:])
        # first across, then down, and what a cubic filter overshoots cut off each time: as Pillow does, within one of
        # its 255 levels; but for images that become much less high, which Pillow 13 resizes the other way round
        for height, width in ((pixels.shape[-2], size[1]), size):
            if (height, width) != tuple(pixels.shape[-2:]):
                smooth = self.interpolation != "nearest-exact"
                pixels = F.interpolate(pixels, (height, width), mode=self.interpolation, antialias=smooth).clamp(0, 1)
        height, width = self.size
        # Python's round, as torchvision's CenterCrop: half a pixel goes to the even side
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        pixels = pixels[..., top : top + height, left : left + width]
        mean, std = (torch.tensor(numbers, device=pixels.device)[:, None, None] for numbers in (self.mean, self.std))
        return (pixels * self.scale - mean) / std


class ImageEncoder:
    """A frozen network that turns images into embeddings.

    The embedding of an image does not depend on the images that come with it.

    Attributes:
        net: from [B, 3, h, w], as `preprocess` makes them, to [B, dim].
        preprocess: from images to what the network sees.
        dim: numbers in an embedding.
        normalize: whether embeddings have length 1.
        notes: what has to be known of it before its numbers are published, one line each.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: Preprocessing,
        *,
        dim: int,
        normalize: bool,
        weights: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """A network as it is, on the device where it is.

        Args:
            net, preprocess, dim, normalize, notes: as the attributes.
            weights: sha256 of the file that the weights are from, where people know it by that.
        """
        self.net = net.float().eval().requires_grad_(False)
        self.preprocess, self.dim, self.normalize, self.notes = preprocess, dim, normalize, tuple(notes)
        self._file = weights

    @property
    def resize(self) -> str:
        """How images are resized to what the network sees, such as "bicubic antialiased"."""
        return self.preprocess.filter

    @cached_property
    def weights(self) -> str:
        """What the weights are: the first 16 digits of the sha256 of their file, or of the tensors themselves."""
        return (self._file or hash_of_tensors(self.net, sha256()).hexdigest())[:DIGITS]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides an embedding: weights, preprocessing and options; computed when first asked for."""
        preprocess: Any = self.preprocess  # a dataclass
        digest = sha256(repr((VERSION, type(self.net).__name__, astuple(preprocess), self.normalize)).encode())
        digest.update(repr(getattr(self.net, "options", None)).encode())
        return hash_of_tensors(self.net, digest).hexdigest()[:32]

    def to(self, device: torch.device | str) -> Self:
        """This encoder, on a device."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Embeddings, float32 [B, dim], where the images are.

        Args:
            image: [B, 3, H, W] in [-1, 1], of any size, on the device of the network.
        """
        return self.encode(self.preprocess(image))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings, float32 [B, dim], of what `preprocess` gave."""
        chunk = CHUNK.get(pixels.device.type, DEVICE_CHUNK)
        embed = in_chunks(self.net, pixels, size=chunk) if len(pixels) else pixels.new_empty(0, self.dim)
        return F.normalize(embed, dim=1) if self.normalize else embed


def in_chunks(net: Callable[..., Tensor], *rows: Tensor, size: int) -> Tensor:
    """What a network makes of rows, float32 [B, ...], each as if it had come alone.

    Args:
        net: from tensors [size, ...] to one tensor [size, ...].
        rows: what it is given, each [B, ...] with B >= 1.
        size: how many go through it together.
    """
    found = []
    for part in zip(*(torch.split(one, size) for one in rows), strict=True):
        given = len(part[0])
        full = [
            torch.cat([one, one[-1:].expand(size - given, *one.shape[1:])]) if given < size else one for one in part
        ]
        with torch.autocast(part[0].device.type, enabled=False):  # the same in any run's precision
            found.append(net(*full)[:given].float())
    return torch.cat(found)


def hash_of_tensors(net: nn.Module, digest: "hashlib._Hash") -> "hashlib._Hash":
    """A digest, with all weights of a network taken into it."""
    for name, tensor in sorted(net.state_dict().items()):
        if tensor.is_floating_point():  # the others are counters and tables of places
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()))
    return digest
