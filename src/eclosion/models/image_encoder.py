"""A frozen network that turns images into embeddings, and what an image has to be before the network sees it."""

from dataclasses import astuple, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ImageEncoder", "Preprocess"]

# Part of every fingerprint: to be raised when this file makes other numbers of the same weights and options.
VERSION = 1
# Images that go through the network together, on a CPU and on other devices. Always as many, filled up if need be: the
# order in which a matrix product adds depends on its shape, so an embedding would depend on how many images came along.
CHUNK = {"cpu": 8}
DEVICE_CHUNK = 32

Triple = tuple[float, float, float]


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
        # its 255 levels
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
    """

    def __init__(self, net: nn.Module, preprocess: Preprocess, *, dim: int, normalize: bool) -> None:
        self.net = net.float().eval().requires_grad_(False)
        self.preprocess, self.dim, self.normalize = preprocess, dim, normalize

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides an embedding: weights, preprocessing and options; computed when first asked for."""
        digest = sha256(repr((VERSION, type(self.net).__name__, astuple(self.preprocess), self.normalize)).encode())
        digest.update(repr(getattr(self.net, "options", None)).encode())
        for name, tensor in sorted(self.net.state_dict().items()):
            if tensor.is_floating_point():  # the others are counters and tables of places
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()))
        return digest.hexdigest()[:32]

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
        found = [self._chunk(part, chunk) for part in torch.split(pixels, chunk)] if len(pixels) else []
        embed = torch.cat(found) if found else pixels.new_empty(0, self.dim)
        return F.normalize(embed, dim=1) if self.normalize else embed

    def _chunk(self, pixels: Tensor, size: int) -> Tensor:
        missing = size - len(pixels)
        full = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
        with torch.autocast(pixels.device.type, enabled=False):  # the same embedding in any run's precision
            out: Tensor = self.net(full)
        return out[: len(pixels)].float()
