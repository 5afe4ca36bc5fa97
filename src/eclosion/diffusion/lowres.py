"""What an upsampling network of a cascade sees of the image that it enlarges.

In training the small image is made from the large one, and then spoiled a little, because in sampling
it comes from the network before, which errs: blurred, and noised to a level that the network is
told. In sampling it is noised to a fixed level, and not blurred.

All images are float32 [B, C, H, W] in [-1, 1].

Source: Ho et al. 2021 (conditioning augmentation), https://arxiv.org/abs/2106.15282; that networks are told the
level, and that blurs differ from image to image: Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, section 2.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from eclosion.diffusion.noise_schedule import Linear, NoiseSchedule
from eclosion.errors import ConfigError
from eclosion.registry import part
from eclosion.rng import Generator, randint, randn

__all__ = [
    "NUM_NOISE_LEVELS",
    "LowRes",
    "LowResDraws",
    "Resize",
    "condition",
    "draw_lowres",
    "draw_lowres_for_sampling",
    "gaussian_blur",
    "resize",
]

NUM_NOISE_LEVELS = 1000

Resize = Literal["area", "nearest"]
Sigma = Annotated[float, Field(gt=0)]
KernelSize = Annotated[int, Field(ge=1)]


@part
class LowRes:
    """How the small image of an upsampling network is made and spoiled."""

    # How images change their size: "area" means over what a pixel covers, and is smooth where images grow; "nearest"
    # picks one pixel, which aliases, and is there for networks that were trained so.
    resize: Resize = "area"
    # Whether the small image is made in the size of the network before, and then enlarged; otherwise its large
    # original is brought to the size of this network, so that it differs from the target by blur and noise alone.
    downsample_first: bool = True
    # Share of the images that are blurred in training; 0 is off.
    blur_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    # Standard deviation of the blur in pixels of the small image; or a range [low, high], drawn for each image.
    blur_sigma: Sigma | tuple[Sigma, Sigma] = 0.6
    # Width of the blur's kernel in pixels, odd; or a range [low, high], drawn for each image among the odd numbers.
    blur_kernel_size: KernelSize | tuple[KernelSize, KernelSize] = 3
    # Whether noise is added, at a level that is drawn in training for each image, and told to the network.
    noise: bool = False
    # Level of that noise in sampling, as a fraction of the 1000 levels of a linear schedule.
    sample_noise_level: Annotated[float, Field(ge=0, le=1)] = 0.2

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for name, (low, high) in {"blur_sigma": self.sigmas, "blur_kernel_size": self.kernel_sizes}.items():
            if low > high:
                raise ValueError(f"{name} is [{low}, {high}], and must be a range that begins with the smaller number")
        if even := [size for size in self.kernel_sizes if size % 2 == 0]:
            raise ValueError(f"blur_kernel_size is {even[0]}, and must be odd, so that the kernel has a middle")
        return self

    @property
    def sigmas(self) -> tuple[float, float]:
        """The smallest and the largest standard deviation of the blur, in pixels of the small image."""
        return self.blur_sigma if isinstance(self.blur_sigma, tuple) else (self.blur_sigma, self.blur_sigma)

    @property
    def kernel_sizes(self) -> tuple[int, int]:
        """The smallest and the largest width of the blur's kernel, in pixels of the small image."""
        sizes = self.blur_kernel_size
        return sizes if isinstance(sizes, tuple) else (sizes, sizes)


@dataclass(frozen=True)
class LowResDraws:
    """What is random about the small images of a batch; all on the CPU when drawn.

    Attributes:
        sigma: standard deviation of the blur in pixels, float32 [B]; None where nothing is ever blurred.
        kernel_size: width of its kernel in pixels, int64 [B], odd; 1 leaves an image as it is.
        level: level of the noise, int64 [B] in [0, 1000); None without noise.
        noise: standard normal, float32 [B, C, H, W] in the size of the large image; None without noise.
    """

    sigma: Tensor | None
    kernel_size: Tensor | None
    level: Tensor | None
    noise: Tensor | None

    def to(self, device: torch.device) -> "LowResDraws":
        """The same on a device; the copy need not have arrived when this returns."""
        moved = (
            None if x is None else x.to(device, non_blocking=True)
            for x in (self.sigma, self.kernel_size, self.level, self.noise)
        )
        return LowResDraws(*moved)


def draw_lowres(options: LowRes, rngs: Sequence[Generator], shape: Sequence[int]) -> LowResDraws:
    """The blur and the noise of each small image in training; row i comes from rngs[i] alone.

    Each image draws whether it is blurred, then how far if that is a range, then how wide if that is
    a range, then the level of its noise, then the noise; a blur that is not used is drawn all the same.

    Args:
        options: say what is drawn at all.
        rngs: one generator per image.
        shape: of one image as the network sees it, [C, H, W].
    """
    blurs = [_draw_blur(options, rng) for rng in rngs] if options.blur_probability > 0 else None
    sigma = None if blurs is None else torch.tensor([sigma for sigma, _ in blurs], dtype=torch.float32)
    kernel_size = None if blurs is None else torch.tensor([size for _, size in blurs], dtype=torch.int64)
    if not options.noise:
        return LowResDraws(sigma, kernel_size, None, None)
    level = randint(rngs, 0, NUM_NOISE_LEVELS)
    return LowResDraws(sigma, kernel_size, level, randn(rngs, shape))


def _draw_blur(options: LowRes, rng: Generator) -> tuple[float, int]:
    """Standard deviation and width of the kernel for one image; a width of 1 is no blur."""
    blurred = rng.random() < options.blur_probability
    (low, high), (narrow, wide) = options.sigmas, options.kernel_sizes
    sigma = low if low == high else float(rng.uniform(low, high))
    kernel_size = narrow if narrow == wide else narrow + 2 * int(rng.integers((wide - narrow) // 2 + 1))
    return sigma, kernel_size if blurred else 1


def draw_lowres_for_sampling(options: LowRes, rngs: Sequence[Generator], shape: Sequence[int]) -> LowResDraws:
    """The same for sampling: no blur, and noise at `sample_noise_level`; row i comes from rngs[i] alone.

    Args:
        options: say whether there is noise.
        rngs: one generator per image.
        shape: of one image as the network sees it, [C, H, W].
    """
    if not options.noise:
        return LowResDraws(None, None, None, None)
    level = min(int(options.sample_noise_level * NUM_NOISE_LEVELS), NUM_NOISE_LEVELS - 1)
    return LowResDraws(None, None, torch.full((len(rngs),), level, dtype=torch.int64), randn(rngs, shape))


def condition(
    options: LowRes,
    images: Tensor,
    drawn: LowResDraws,
    size: tuple[int, int],
    *,
    before: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the network is given beside the noisy image: the small image, enlarged, and the level of its noise.

    A pure function, of training and of sampling: there `images` come from the network before, have its
    size, and may be a little outside of [-1, 1].

    Args:
        options: how sizes change.
        images: float32 [B, C, H, W]; in training of any size, and as large as `size` or larger.
        drawn: from `draw_lowres` or `draw_lowres_for_sampling`, on the device of the images.
        size: height and width of this network's images, in pixels.
        before: height and width of the images of the network before, in training; None leaves
            the images in the size that they have.

    Returns:
        float32 [B, C, *size], and int64 [B] or None without noise.

    Raises:
        ConfigError: if the blur's kernel is wider than the small image allows.

    Source: the order of the steps is that of DALLE2-pytorch, so that its networks can be used.
    """
    small = images.float().clamp(-1, 1)
    if before is not None and options.downsample_first:
        small = resize(small, before, how=options.resize)
    if drawn.sigma is not None and drawn.kernel_size is not None:
        small = gaussian_blur(small, drawn.sigma, drawn.kernel_size, widest=options.kernel_sizes[1])
    shown = resize(small, size, how=options.resize)
    if drawn.level is None or drawn.noise is None:
        return shown, None
    return _augmentation().add_noise(shown, drawn.noise, drawn.level), drawn.level


@cache
def _augmentation() -> NoiseSchedule:
    """The noise levels of the small image; always these, whatever the network's own are."""
    return Linear(num_train_timesteps=NUM_NOISE_LEVELS).build()


def resize(images: Tensor, size: tuple[int, int], *, how: Resize = "area") -> Tensor:
    """Images in another size, float32 [B, C, *size]; those that have it already come back as they are.

    "area" takes the mean of the pixels that a new pixel covers if the size shrinks by whole numbers. It is
    bilinear if the image grows, and for other ratios too, with a filter that widens where it shrinks.

    Args:
        images: float32 [B, C, H, W], in any range, which they do not leave.
        size: height and width in pixels.
        how: "area", or "nearest" for one pixel each.
    """
    if images.shape[2:] == size:
        return images
    if how == "nearest":
        return F.interpolate(images, size, mode="nearest")
    if all(old % new == 0 for old, new in zip(images.shape[2:], size, strict=True)):
        return F.avg_pool2d(images, [old // new for old, new in zip(images.shape[2:], size, strict=True)])
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: Tensor, *, widest: int) -> Tensor:
    """Each image blurred by a Gaussian of its own, cut off at its own width; float32 [B, C, H, W].

    Rows, then columns; beyond the border the image goes on mirrored. Reads nothing back from the device.

    Args:
        images: float32 [B, C, H, W].
        sigma: standard deviations in pixels, float32 [B].
        kernel_size: widths in pixels, int64 [B], odd and at most `widest`; 1 leaves an image as it is.
        widest: the largest width that may occur, which decides how much is computed.

    Raises:
        ConfigError: if half of the widest kernel does not fit into the image.
    """
    reach = widest // 2
    if reach >= min(images.shape[2:]):
        height, width = images.shape[2:]
        raise ConfigError(
            f"blur_kernel_size is {widest}, and the blurred images have {height} x {width} pixels. "
            f"Set blur_kernel_size to at most {2 * min(height, width) - 1}."
        )
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    inside = offsets.abs() <= (kernel_size // 2).view(-1, 1)  # [B, widest]
    weights = torch.exp(-(offsets.square() / (2 * sigma.view(-1, 1).square()))) * inside
    kernel = weights / weights.sum(1, keepdim=True)
    padded = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    return _weighted_sum(_weighted_sum(padded, kernel, 3), kernel, 2)


def _weighted_sum(images: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Neighbours along `dim`, weighted image by image with `kernel`, float32 [B, K]; K - 1 pixels fewer.

    A sum of shifted copies: kernels are small, and the result does not depend on the batch, as it may for convolutions.
    """
    length = images.shape[dim] - kernel.shape[1] + 1
    weights = kernel.T.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1)  # [K, B, 1, 1, 1]
    out = images.narrow(dim, 0, length) * weights[0]
    for i in range(1, len(weights)):
        out = out + images.narrow(dim, i, length) * weights[i]
    return out
