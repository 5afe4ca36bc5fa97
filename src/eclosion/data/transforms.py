"""From a decoded picture to what the network sees.

Two stages. `Transform.prepare` is the same each time: colours, resize, centre crop; its result is kept in memory.
`Transform.augment` is random: random crop, mirror; it takes the generator that belongs to the image's position.
`to_float` is the one place where uint8 0..255 becomes float32 [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from eclosion.config.schema import DataConfig
from eclosion.data.images import to_rgb
from eclosion.errors import BadSample, ConfigError
from eclosion.rng import Generator

__all__ = ["Pixels", "Transform", "to_float"]

Pixels = NDArray[np.uint8]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Transform:
    """How the options of a `DataConfig` change a picture."""

    config: DataConfig
    background: tuple[int, int, int]

    @classmethod
    def of(cls, config: DataConfig) -> "Transform":
        """The transform that a config describes.

        Raises:
            ConfigError: if its background is no colour.
        """
        try:
            red, green, blue = ImageColor.getrgb(config.background)[:3]
        except ValueError as error:
            raise ConfigError(
                f"data.background: {config.background!r} is not a colour. "
                "Give a CSS colour name such as 'white', or '#rrggbb'."
            ) from error
        return cls(config, (red, green, blue))

    @property
    def crops_at_random(self) -> bool:
        """Whether the place of the crop is random."""
        return self.config.crop == "random" and self.config.resize != "stretch"

    @property
    def is_random(self) -> bool:
        """Whether `augment` does anything."""
        return self.crops_at_random or self.config.horizontal_flip

    def prepare(self, image: Image.Image, name: str) -> Pixels:
        """The part that is the same each time.

        Args:
            image: a decoded picture of any mode and size.
            name: what to call it in an error.

        Returns:
            uint8 [3, H, W]; of the config's image_size, or at least that if the crop is random.

        Raises:
            BadSample: reason "too_small" if it is smaller than the crop and is not resized.
        """
        resized = self._resize(to_rgb(image, self.background, name=name))
        height, width = self.config.size
        if resized.width < width or resized.height < height:
            raise BadSample(
                name,
                "too_small",
                f"is {resized.width}x{resized.height} pixels (width x height), smaller than the crop of "
                f'{width}x{height}. Set data.resize to "cover", or data.image_size to less.',
            )
        pixels = np.asarray(resized).transpose(2, 0, 1)
        if not self.crops_at_random:
            # Python's round, as torchvision's CenterCrop: half a pixel goes to the even side
            top, left = round((resized.height - height) / 2), round((resized.width - width) / 2)
            pixels = pixels[:, top : top + height, left : left + width]
        return np.ascontiguousarray(pixels)

    def augment(self, pixels: Pixels, rng: Generator) -> Pixels:
        """The random part.

        Args:
            pixels: what `prepare` gave.
            rng: the generator of this image's position.

        Returns:
            uint8 [3, H, W] of the config's image_size; a view.
        """
        height, width = self.config.size
        # drawn whether used or not, so that one option does not change what another draws
        mirrored = rng.random() < 0.5
        if self.crops_at_random:
            top = int(rng.integers(0, pixels.shape[1] - height + 1))
            left = int(rng.integers(0, pixels.shape[2] - width + 1))
            pixels = pixels[:, top : top + height, left : left + width]
        return pixels[:, :, ::-1] if mirrored and self.config.horizontal_flip else pixels

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self.config.size
        if self.config.resize == "none":
            return image
        size = (width, height) if self.config.resize == "stretch" else _covering(image.size, (width, height))
        return image if size == image.size else image.resize(size, FILTERS[self.config.interpolation])


def _covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) with the shape of `size` that covers `target`; rounded down, as torchvision does."""
    width, height = size
    if width * target[1] < height * target[0]:  # narrower than the target
        return target[0], max(target[1], target[0] * height // width)
    return max(target[0], target[1] * width // height), target[1]


def to_float(images: Sequence[Pixels], out: NDArray[np.float32]) -> None:
    """Scale images, uint8 [3, H, W] each, to [-1, 1], into float32 [B, 3, H, W].

    Equal, bit for bit, to torchvision's ToTensor and Normalize(0.5, 0.5): (v / 255 - 0.5) / 0.5.
    In NumPy, whose one thread per call does not compete with the network's for the cores.
    """
    for row, image in zip(out, images, strict=True):
        row[:] = image
    out /= 255
    out -= 0.5
    out *= 2  # exact, as is the division by 0.5
