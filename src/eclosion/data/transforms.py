"""From a decoded picture to what the network sees.

Two stages. `Transform.prepare` is the same each time: colours, resize, centre crop; its result is kept in memory.
`Transform.augment` is random: random crop, mirror; it takes the generator that belongs to the image's position.
`to_float` is the one place where uint8 0..255 becomes float32 [-1, 1].

`eclosion.data.preprocessing` does the same with torchvision's transforms; `transform_of` knows which of them a
config asks for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from eclosion.config.schema import DataConfig
from eclosion.data.images import MAX_PIXELS, extent, to_rgb
from eclosion.errors import BadSample, ConfigError, MissingExtraError
from eclosion.rng import Generator

if TYPE_CHECKING:
    from eclosion.data.preprocessing import Preprocessing

__all__ = ["Pixels", "Transform", "background_of", "check_pixels", "to_float", "transform_of"]

# [3, H, W]: uint8 0..255, or float32 in [-1, 1].
Pixels = NDArray[np.uint8] | NDArray[np.float32]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def transform_of(config: DataConfig) -> "Transform | Preprocessing":
    """The transform that a config describes: its `preprocessing`, or else its own options.

    Raises:
        ConfigError: if one of its options is wrong.
        MissingExtraError: if it asks for torchvision's transforms, and torchvision is not installed.
    """
    if config.preprocessing is None:
        return Transform.of(config)
    try:
        from eclosion.data.preprocessing import Preprocessing  # torchvision is optional, and slow to import
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "torchvision":
            raise MissingExtraError("data.preprocessing", "transforms") from error
        raise
    return Preprocessing.of(config)


def background_of(config: DataConfig) -> tuple[int, int, int]:
    """The colour behind transparent images: red, green, blue.

    Raises:
        ConfigError: if it is no colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(config.background)[:3]
    except ValueError as error:
        raise ConfigError(
            f"data.background: {config.background!r} is not a colour. "
            "Give a CSS colour name such as 'white', or '#rrggbb'."
        ) from error
    return red, green, blue


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
        return cls(config, background_of(config))

    @property
    def crops_at_random(self) -> bool:
        """Whether the place of the crop is random."""
        return self.config.crop == "random" and self.config.resize != "stretch"

    @property
    def is_random(self) -> bool:
        """Whether `augment` does anything."""
        return self.crops_at_random or self.config.horizontal_flip

    def at_least(self, size: tuple[int, int]) -> tuple[int, int]:
        """How small a picture may be decoded: twice the size at which the target is taken from it.

        Against the full decode, photographs at 64x64 pixels had a signal to noise ratio of 51 to 54 dB when decoded
        from 640x427 at 1/2, and of 44 to 50 dB from 512x512 at 1/4, which leaves just twice the target.

        Args:
            size: height and width of the whole picture.

        Returns:
            Height and width; `size` itself if no pixel may be left out.
        """
        if self.config.decode == "exact" or self.config.resize == "none":
            return size
        height, width = self.config.size
        return 2 * height, 2 * width  # both also hold for what covers the target, as it keeps the picture's shape

    def prepare(self, image: Image.Image, name: str) -> Pixels:
        """The part that is the same each time.

        Args:
            image: a decoded picture of any mode and size.
            name: what to call it in an error.

        Returns:
            uint8 [3, H, W]; of the config's image_size, or at least that if the crop is random.

        Raises:
            BadSample: reason "too_small" if it is smaller than the crop and is not resized; "too_large" if it is so
                long and thin that it has too many pixels where it covers the target.
        """
        resized = self._resize(to_rgb(image, self.background, name=name), name)
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

    def augment(self, pixels: Pixels, rng: Generator, name: str = "image") -> Pixels:
        """The random part.

        Args:
            pixels: what `prepare` gave.
            rng: the generator of this image's position.
            name: what to call it in an error; there is none here.

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

    def _resize(self, image: Image.Image, name: str) -> Image.Image:
        height, width = self.config.size
        if self.config.resize == "none":
            return image
        box = left, top, right, bottom = extent(image)
        covering = _covering((right - left, bottom - top), (width, height))
        size = (width, height) if self.config.resize == "stretch" else covering
        if size == image.size:
            return image
        check_pixels(image.size[::-1], size[::-1], name)
        return image.resize(size, FILTERS[self.config.interpolation], box)


def check_pixels(size: tuple[int, int], resized: tuple[int, int], name: str) -> None:
    """Refuse to resize a picture, heights and widths given, to more pixels than may be decoded.

    Raises:
        BadSample: reason "too_large".
    """
    if resized[0] * resized[1] > MAX_PIXELS:
        raise BadSample(
            name,
            "too_large",
            f"is {size[1]}x{size[0]} pixels (width x height), and would be {resized[1]}x{resized[0]} when it is "
            f"resized; the limit is {MAX_PIXELS} pixels. Crop it first.",
        )


def _covering(size: tuple[float, float], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) with the shape of `size` that covers `target`; rounded down, as torchvision does."""
    width, height = size
    if width * target[1] < height * target[0]:  # narrower than the target
        return target[0], max(target[1], int(target[0] * height // width))
    return max(target[0], int(target[1] * width // height)), target[1]


def to_float(images: Sequence[Pixels], out: NDArray[np.float32]) -> None:
    """Scale images [3, H, W] to [-1, 1], into float32 [B, 3, H, W]; float32 is there already, and is copied.

    Equal, bit for bit, to torchvision's ToTensor and Normalize(0.5, 0.5): (v / 255 - 0.5) / 0.5.
    In NumPy, whose one thread per call does not compete with the network's for the cores.
    """
    for row, image in zip(out, images, strict=True):
        row[:] = image
        if image.dtype == np.uint8:
            row /= 255
            row -= 0.5
            row *= 2  # exact, as is the division by 0.5
