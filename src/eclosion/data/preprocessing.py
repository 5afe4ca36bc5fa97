"""Transforms of torchvision, by their names, each image with randomness of its own.

What a config asks for in `data.preprocessing`, in the place of the options that `eclosion.data.transforms` obeys.
Pictures come to the first transform in mode RGB, by the rules in `eclosion.data.images`; what the last one gives,
a picture or a tensor, is scaled to [-1, 1] here. The leading transforms that are the same each time are done once,
and what they give is kept in memory.

torchvision draws from torch's global stream, which the network's dropout uses too, in another thread. `_Drawing`
hands a generator of the image's own to every call that draws, so that the global stream stays as it is and an image
depends on its position alone.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from eclosion.config.schema import DataConfig
from eclosion.data.images import Picture, extent, to_rgb
from eclosion.data.transforms import Pixels, background_of, check_pixels
from eclosion.errors import BadSample, ConfigError, DataError, UserError, did_you_mean
from eclosion.rng import Generator, generator

__all__ = ["Preprocessing"]

# Public classes of torchvision.transforms that a config cannot use, and why.
REFUSED = {
    "Compose": "is what data.preprocessing itself is: write its transforms one after the other",
    "FiveCrop": "makes five pictures of one",
    "Lambda": "needs code, and a config holds none",
    "LinearTransformation": "needs a matrix over all pixels, which no config holds",
    "Normalize": "is not needed: eclosion itself scales images to [-1, 1]. Leave it out",
    "RandomApply": "takes other transforms, which are no option. Many transforms have an option 'p' of their own",
    "RandomChoice": "takes other transforms, which are no option",
    "RandomOrder": "takes other transforms, which are no option",
    "TenCrop": "makes ten pictures of one",
}
# The same each time, from a picture to a picture.
FIXED = ("Resize", "CenterCrop", "Pad", "Grayscale")
# The same each time, and between pictures and tensors.
CONVERSIONS = ("ToTensor", "PILToTensor", "ConvertImageDtype", "ToPILImage")
# What may stand before a resize without hindering that the file is decoded at the size which the resize needs.
SCALE_FREE = ("Grayscale", "RandomGrayscale", "RandomHorizontalFlip", "RandomVerticalFlip", "ToTensor")
# Filters that take the mean over all pixels that become one, if antialiased; NEAREST does not.
SMOOTH = tuple(InterpolationMode[name] for name in ("BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"))
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float64": torch.float64}
# Bicubic filters overshoot the range of a tensor, by less than this times the range; more is a mistake.
OVERSHOOT = 1.0
# How often the transforms are tried before a run, and on pictures of how many pixels at most.
NUM_DRAWS = 8
MAX_TRIED_PIXELS = 2**22

# torch's functions that draw numbers, and take a generator.
DRAWS = frozenset(
    getattr(where, name)
    for where, names in (
        (torch, "bernoulli binomial multinomial normal poisson rand randint randn randperm"),
        (torch, "_sample_dirichlet _standard_gamma"),
        (
            Tensor,
            "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_",
        ),
    )
    for name in names.split()
)


class _Drawing(TorchFunctionMode):
    """Inside it, in this thread, torch draws from a generator of its own where none is given."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DRAWS:
            return func(*args, **{"generator": self._generator, **(kwargs or {})})
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """One transform, ready to be called."""

    name: str
    apply: Callable[[Any], Any]


@dataclass(frozen=True)
class Preprocessing:
    """How the transforms that a config names change a picture; the same methods as `eclosion.data.transforms`.

    Attributes:
        config: names the transforms and the size at which images have to arrive.
        background: colour behind transparent images.
        fixed: the leading transforms that are the same each time.
        varied: the others; empty if nothing is random.
    """

    config: DataConfig
    background: tuple[int, int, int]
    fixed: tuple[Step, ...]
    varied: tuple[Step, ...]

    @classmethod
    def of(cls, config: DataConfig) -> "Preprocessing":
        """The transforms that a config names, tried on synthetic pictures.

        Raises:
            ConfigError: if a name or an option is wrong, or no picture arrives at data.image_size.
        """
        steps: list[Step] = []
        problems: list[str] = []
        for name, options in [item for step in config.preprocessing or () for item in step.items()]:
            try:
                steps.append(_built(name, options))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        fixed, varied = _parted(steps)
        _try(steps, config.size)
        return cls(config, background_of(config), fixed, varied)

    @property
    def is_random(self) -> bool:
        """Whether `augment` does anything."""
        return bool(self.varied)

    def at_least(self, size: tuple[int, int]) -> tuple[int, int]:
        """How small a picture may be decoded: twice the size at which the target is taken from it.

        Args:
            size: height and width of the whole picture.

        Returns:
            Height and width; `size` itself if no pixel may be left out, as before a crop at the file's own scale.
        """
        first = next((step for step in self.fixed + self.varied if step.name not in SCALE_FREE), None)
        if self.config.decode == "exact" or first is None or first.name not in ("Resize", "RandomResizedCrop"):
            return size
        transform: Any = first.apply
        if transform.interpolation not in SMOOTH or transform.antialias is not True:
            return size
        if first.name == "Resize":
            height, width = _resized(size, transform)
            return 2 * height, 2 * width
        crop = _smallest_crop(size, transform.scale, transform.ratio)
        if min(crop) <= 0:
            return size
        zoom = max(2 * target / side for target, side in zip(transform.size, crop, strict=True))
        return math.ceil(zoom * size[0]), math.ceil(zoom * size[1])

    def prepare(self, image: Picture, name: str) -> Pixels:
        """The part that is the same each time.

        Args:
            image: a decoded picture of any mode and size.
            name: what to call it in an error.

        Returns:
            If nothing is random, what `augment` promises; otherwise uint8 [C, h, w], grey or RGB, of any size.

        Raises:
            BadSample: reason "preprocessing" if a transform cannot be applied to a picture of its size.
            DataError: if it does not arrive at data.image_size.
        """
        whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture, steps = to_rgb(whole, self.background, name=name), self.fixed
        if steps and steps[0].name == "Resize" and extent(picture) != (0, 0, *picture.size):
            picture, steps = _resize_extent(picture, steps[0].apply, name), steps[1:]
        picture = _through(steps, picture, name)
        if not self.varied:
            return self._arrived(picture, name).copy()  # row after row, as it is read
        rows: NDArray[np.uint8] = np.asarray(picture)  # [h, w, 3], or [h, w] if grey
        return rows[None] if rows.ndim == 2 else rows.transpose(2, 0, 1)

    def augment(self, pixels: Pixels, rng: Generator, name: str = "image") -> Pixels:
        """The random part.

        Args:
            pixels: what `prepare` gave.
            rng: the generator of this image's position.
            name: what to call it in an error.

        Returns:
            [3, H, W] of data.image_size: uint8 if the last transform gives that, otherwise float32 in [-1, 1].

        Raises:
            BadSample: reason "preprocessing" if a transform cannot be applied to a picture of its size.
            DataError: if it does not arrive at data.image_size, or its numbers leave 0..1.
        """
        rows = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        with _Drawing(int(rng.integers(2**63))):
            return self._arrived(_through(self.varied, Image.fromarray(rows), name), name)

    def _arrived(self, result: Image.Image | Tensor, name: str) -> Pixels:
        """What the last transform gave, if it is of the right size."""
        pixels = _pixels_of(result, name)
        if pixels.shape[1:] != self.config.size:
            raise DataError(f"{name}: {_wrong_size(self.config, pixels.shape[1:])}")
        return pixels


def _wrong_size(config: DataConfig, size: tuple[int, ...]) -> str:
    names = ", ".join(name for step in config.preprocessing or () for name in step)
    (height, width), (wanted_height, wanted_width) = size, config.size
    return (
        f"data.preprocessing ({names or 'empty'}) makes it {width}x{height} pixels (width x height), and "
        f"data.image_size asks for {wanted_width}x{wanted_height}. Let it end with a CenterCrop, or a Resize to "
        f"[{wanted_height}, {wanted_width}], or change data.image_size."
    )


def _built(name: str, options: Mapping[str, Any]) -> Step:
    """The transform of that name, with those options; ConfigError with all that is wrong with them."""
    where = f"data.preprocessing.{name}"
    known: dict[str, Any] = {
        key: cls for key, cls in vars(tv).items() if inspect.isclass(cls) and not issubclass(cls, Enum)
    }
    if name not in known:
        raise ConfigError(f"{where} is not a transform in torchvision.transforms.{did_you_mean(name, known)}")
    if name in REFUSED:
        raise ConfigError(f"{where} {REFUSED[name]}.")
    parameters = inspect.signature(known[name]).parameters
    told = f" Options: {', '.join(sorted(parameters))}." if parameters else " It has no options."
    problems = [
        f"{where}.{key} is not an option of {name}.{did_you_mean(key, parameters) if parameters else told}"
        for key in options
        if key not in parameters
    ]
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    problems += [f"{where}.{key} is required.{told}" for key in required if key not in options]
    if problems:
        raise ConfigError(problems)
    values = {key: _value(f"{where}.{key}", value, parameters[key]) for key, value in options.items()}
    try:
        return Step(name, known[name](**values))
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ConfigError(f"{where} refuses {given}: {_said(error)}{told}") from error


def _value(where: str, value: object, parameter: inspect.Parameter) -> object:
    """An option as torchvision wants it: texts stand for members of an enumeration, and for number types."""
    if isinstance(parameter.default, Enum):
        choices: dict[str, object] = {str(member.value): member for member in type(parameter.default)}
    elif parameter.name == "dtype":
        choices = dict(DTYPES)
    else:
        return value
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{where} is {value!r}, which it cannot be.{did_you_mean(str(value), choices)}")
    return choices[value]


def _parted(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The leading steps that are the same each time, and the others, without what changes nothing in the end."""
    if [step.name for step in steps if step.name in CONVERSIONS] == ["ToTensor"] and steps[-1].name == "ToTensor":
        steps = steps[:-1]  # all that it would do is to scale to [0, 1], as `to_float` does too
    if all(step.name in FIXED + CONVERSIONS for step in steps):
        return tuple(steps), ()
    cut = next(i for i, step in enumerate(steps) if step.name not in FIXED)
    return tuple(steps[:cut]), tuple(steps[cut:])


def _try(steps: Sequence[Step], wanted: tuple[int, int]) -> None:
    """Find before a run what cannot work: a transform that fails, or images that never have the wanted size."""
    steps = deepcopy(list(steps))
    for step in steps:
        if getattr(step.apply, "p", 0):
            step.apply.p = 1.0  # type: ignore[attr-defined]  # so that what it may do is tried
    arrived: set[tuple[int, ...]] = set()
    failure: BadSample | None = None
    for zoom in (1, 2, 4, 16):
        size = zoom * wanted[0], zoom * wanted[1]
        if zoom > 2 and (arrived or size[0] * size[1] > MAX_TRIED_PIXELS):
            break
        for draw in range(NUM_DRAWS if zoom == 1 else 1):
            try:
                arrived.add(_tried(steps, size, draw))
            except BadSample as error:  # such as a crop that is larger than the picture
                failure = error
            except DataError as error:
                raise ConfigError(str(error)) from error
    if failure and not arrived:
        raise ConfigError(str(failure)) from failure
    if len(arrived) == 1 and wanted not in arrived:
        (height, width), names = arrived.pop(), ", ".join(step.name for step in steps)
        raise ConfigError(
            f"data.preprocessing ({names}) makes images of {width}x{height} pixels (width x height), and "
            f"data.image_size asks for {wanted[1]}x{wanted[0]}. Change one of them."
        )


def _tried(steps: Sequence[Step], size: tuple[int, int], draw: int) -> tuple[int, ...]:
    """Height and width of what becomes of a synthetic picture."""
    noise = Image.fromarray(generator(draw, "picture").integers(0, 256, (*size, 3), np.uint8))
    name = f"tried on a picture of {size[1]}x{size[0]} pixels"
    with _Drawing(draw):
        return _pixels_of(_through(steps, noise, name), name).shape[1:]


def _through(steps: Sequence[Step], image: Any, name: str) -> Any:
    """What becomes of a picture or a tensor."""
    for step in steps:
        try:
            if step.name == "Resize":
                height, width = tv.functional.get_dimensions(image)[1:]
                check_pixels((height, width), _resized((height, width), step.apply), name)
            image = step.apply(image)
        except (UserError, MemoryError):
            raise
        except (TypeError, AttributeError, NotImplementedError) as error:
            kind = "a tensor" if isinstance(image, Tensor) else "a picture"
            raise DataError(
                f"{name}: data.preprocessing.{step.name} fails on {kind} ({_said(error)[:-1]}). ToTensor makes tensors "
                "of pictures, and has to stand before what takes tensors and after what takes pictures."
            ) from error
        except Exception as error:  # whatever each of them raises when a picture is too small for it
            raise BadSample(name, "preprocessing", f"data.preprocessing.{step.name} fails: {_said(error)}") from error
    return image


def _pixels_of(result: Image.Image | Tensor, name: str) -> Pixels:
    """What the last transform gave as [3, h, w]: uint8, or float32 in [-1, 1]."""
    if isinstance(result, Image.Image):
        kind = f"a picture in mode {result.mode}"
        rows = np.asarray(result)
        pixels: NDArray[Any] = rows[None] if rows.ndim == 2 else rows.transpose(2, 0, 1)
    else:
        kind = f"a tensor {list(result.shape)} of {str(result.dtype).removeprefix('torch.')}"
        pixels = (result.float() if result.is_floating_point() else result).numpy()
    if pixels.ndim != 3 or len(pixels) not in (1, 3) or pixels.dtype not in (np.uint8, np.float32):
        raise DataError(f"{name}: data.preprocessing makes {kind} of it, and must make RGB or grey, of uint8 or float.")
    if len(pixels) == 1:
        pixels = np.repeat(pixels, 3, axis=0)
    return pixels if pixels.dtype == np.uint8 else _scaled(pixels, name)


def _scaled(pixels: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """From [0, 1] to [-1, 1]."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise DataError(
            f"{name}: data.preprocessing makes numbers from {low:.3g} to {high:.3g} of it, and must keep to 0..1. "
            "After ToTensor that is also the range of values that fill or erase."
        )
    scaled: NDArray[np.float32] = np.clip(pixels, 0, 1)
    scaled -= 0.5
    scaled *= 2  # exact
    return scaled


def _resize_extent(picture: Image.Image, resize: Any, name: str) -> Image.Image:
    """What torchvision's Resize does, of a picture that does not fill the outermost of its pixels."""
    left, top, right, bottom = extent(picture)
    size = _resized((bottom - top, right - left), resize)
    check_pixels(picture.size[::-1], size, name)
    by = tv.functional.pil_modes_mapping[resize.interpolation]
    return picture.resize(size[::-1], by, (left, top, right, bottom))


def _resized(size: tuple[float, float], resize: Any) -> tuple[int, int]:
    """Height and width that torchvision's Resize gives a picture: both as given, or the shorter side and its shape."""
    sides = [resize.size] if isinstance(resize.size, int) else list(resize.size)
    if len(sides) == 2:
        return sides[0], sides[1]
    short, long = sides[0], int(sides[0] * max(size) // min(size))
    if resize.max_size is not None and long > resize.max_size:
        short, long = resize.max_size * short // long, resize.max_size
    return (short, long) if size[0] <= size[1] else (long, short)


def _smallest_crop(size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float]) -> tuple[float, float]:
    """Lower bounds of the height and the width that torchvision's RandomResizedCrop takes from a picture.

    Args:
        size: height and width of the picture.
        scale: share of its area that is taken, least and most.
        ratio: width over height of what is taken, least and most.
    """
    height, width = size
    area = height * width * scale[0]
    # where ten draws give nothing that fits, it takes the largest part from the middle with a permitted ratio
    middle = min(height, width / ratio[0]), min(width, height * ratio[1])
    return min(math.sqrt(area / ratio[1]), middle[0]), min(math.sqrt(area * ratio[0]), middle[1])


def _said(error: Exception) -> str:
    """An exception's own words, as one sentence."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith(".") else f"{words}."
