"""From a decoded picture to what the network sees.

Two stages. `Transform.prepare` is the same each time: colours, resize, centre crop; its result is kept in memory.
`Transform.augment` is random: random crop, mirror; it takes the generator that belongs to the image's position.
`to_float` is the one place where uint8 0..255 becomes float32 [-1, 1].

`eclosion.data.preprocessing` does the same with torchvision's transforms; `transform_of` knows which of them a
config asks for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from eclosion.config.schema import DataConfig
from eclosion.data.images import MAX_PIXELS, Picture, extent, to_rgb
from eclosion.errors import BadSample, ConfigError, MissingExtraError
from eclosion.rng import Generator

if TYPE_CHECKING:
    from eclosion.data.preprocessing import Preprocessing

__all__ = ["Pixels", "Transform", "background_of", "check_pixels", "scale", "to_float", "transform_of"]

# [3, H, W]: uint8 0..255, or float32 in [-1, 1].
Pixels = NDArray[np.uint8] | NDArray[np.float32]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Numbers that `to_float` goes through twice in a row, so that the second time they are still near: 512 KiB.
NEAR = 2**17


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

    def prepare(self, image: Picture, name: str) -> Pixels:
        """The part that is the same each time.

        Args:
            image: a decoded picture of any mode and size.
            name: what to call it in an error.

        Returns:
            uint8 [3, H, W]; of the config's image_size, or at least that if the crop is random. A view of rows of
            RGB, read-only.

        Raises:
            BadSample: reason "too_small" if it is smaller than the crop and is not resized; "too_large" if it is so
                long and thin that it has too many pixels where it covers the target.
        """
        if isinstance(image, np.ndarray) and image.shape[:2] == self.config.size:
            return image.transpose(2, 0, 1)
        rows = self._resize(image, name)
        height, width = self.config.size
        if rows.shape[0] < height or rows.shape[1] < width:
            raise BadSample(
                name,
                "too_small",
                f"is {rows.shape[1]}x{rows.shape[0]} pixels (width x height), smaller than the crop of "
                f'{width}x{height}. Set data.resize to "cover", or data.image_size to less.',
            )
        if not self.crops_at_random:
            # Python's round, as torchvision's CenterCrop: half a pixel goes to the even side
            top, left = round((rows.shape[0] - height) / 2), round((rows.shape[1] - width) / 2)
            rows = rows[top : top + height, left : left + width]
        return rows.transpose(2, 0, 1)

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

    def _resize(self, image: Picture, name: str) -> NDArray[np.uint8]:
        """The picture at the size from which the crop is taken, uint8 [h, w, 3]."""
        if isinstance(image, Image.Image):
            image = to_rgb(image, self.background, name=name)
            before, box = image.size, extent(image)
        else:
            before = image.shape[1], image.shape[0]
            box = 0, 0, *before
        size = self._resized(before, box)
        if size == before:
            return np.asarray(image)
        check_pixels(before[::-1], size[::-1], name)
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return np.asarray(picture.resize(size, FILTERS[self.config.interpolation], box))

    def _resized(self, size: tuple[int, int], box: tuple[float, float, float, float]) -> tuple[int, int]:
        """Width and height that a picture is resized to, which fills a part of its pixels."""
        height, width = self.config.size
        if self.config.resize == "none":
            return size
        left, top, right, bottom = box
        covering = _covering((right - left, bottom - top), (width, height))
        return (width, height) if self.config.resize == "stretch" else covering


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
    scale(out, [row for row, image in enumerate(images) if image.dtype == np.uint8])


def scale(values: NDArray[np.float32], rows: Sequence[int]) -> None:
    """From 0..255 to [-1, 1], in place: some rows of float32 [B, 3, H, W], in ascending order."""
    near = max(1, NEAR // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(rows), near):
        some = rows[start : start + near]
        is_block = some[-1] - some[0] == len(some) - 1
        for block in [values[some[0] : some[-1] + 1]] if is_block else [values[row] for row in some]:
            block /= 127.5  # (v / 255) * 2, rounded in the same way, as doubling is exact
            block -= 1  # (x - 0.5) * 2 likewise
