"""RePaint: the rest of an image of which a part is known, from a network that was not trained for it.

At each level the known part is put in, noised to that level, and then all of it takes a step. A single
step hardly makes both parts agree, so it is taken back and repeated: noise is added again, as much
as lies between the two levels, and the part to be found gets another chance to follow the known one.

Source: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, algorithm 1, with steps repeated one at a time.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from eclosion.diffusion.denoiser import Denoiser
from eclosion.diffusion.lowres import Resize, resize
from eclosion.diffusion.noise_schedule import Level
from eclosion.diffusion.samplers import OnStep, Sampler, Walker, counted
from eclosion.diffusion.variance import forward
from eclosion.errors import ConfigError
from eclosion.rng import Generator, randn

__all__ = ["known_in_size", "repaint"]


def repaint(
    sampler: Sampler,
    denoise: Denoiser,
    x: Tensor,
    rngs: Sequence[Generator],
    *,
    known: Tensor,
    mask: Tensor,
    num_resamples: int = 5,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn standard normal noise into images that have a part in common with `known`.

    Image i depends on x[i], known[i], mask[i] and rngs[i] alone. Each rng draws the noise of the
    known part, then that of the step, then that of the way back, each for a whole image.

    Args:
        sampler: DDPM, DDIM or Euler; its steps must remember nothing.
        denoise: the network and what its output means.
        x: standard normal noise [B, C, H, W].
        rngs: one generator per image.
        known: images float32 [B, C, H, W] in the range of the network's, [-1, 1] for pixels; what they
            hold outside of the mask has no influence.
        mask: bool [B, H, W], true where the image is known.
        num_resamples: how often each step is taken, but the last, which ends at the clean image. More is
            slower, and fits better; 1 takes none back.
        on_step: called before each network call with its number and their count,
            num_resamples (n - 1) + 1 for n levels; may raise to interrupt.

    Returns:
        float32 [B, C, H, W], equal to `known` where the mask is true.

    Raises:
        ConfigError: if the sampler's steps depend on those before, or num_resamples is below 1.
    """
    if not isinstance(sampler, Walker):
        name = type(sampler).__name__
        raise ConfigError(f"inpainting takes steps back, which {name} cannot. Use the sampler 'ddpm' or 'ddim'.")
    if num_resamples < 1:
        raise ConfigError(f"num_resamples is {num_resamples}, and must be at least 1: each step is taken once.")
    assert len(rngs) == len(x)  # or images would share their noise by broadcasting
    assert known.shape == x.shape
    assert mask.dtype == torch.bool
    assert mask.shape == (len(x), *x.shape[2:])
    walk = sampler.walk(denoise.schedule)
    estimate = counted(denoise, on_step, num_resamples * (len(walk.path) - 2) + 1)
    keep, known = mask.unsqueeze(1), known.float()
    x = walk.start(x)
    for now, then in pairwise(walk.path):
        times = num_resamples if then.sigma > 0 else 1
        for again in reversed(range(times)):
            x = torch.where(keep, now.alpha * known + now.sigma * _noise(rngs, x), x)
            x = walk.step(x, estimate(x, now), now, then, rngs)
            if again:
                x = _back(x, now, then, rngs)
    return torch.where(keep, known, x)


def known_in_size(known: Tensor, mask: Tensor, size: tuple[int, int], *, how: Resize = "area") -> tuple[Tensor, Tensor]:
    """The known images and their mask in another size, for one network of a cascade.

    A pixel is known only if all of the pixels that it is made of are, since what is unknown may hold anything.

    Args:
        known: float32 [B, C, H, W].
        mask: bool [B, H, W], true where the image is known.
        size: height and width in pixels.
        how: see `lowres.resize`.

    Returns:
        float32 [B, C, *size] and bool [B, *size].
    """
    keep = mask.unsqueeze(1)
    unknown = resize((~keep).float(), size, how=how)
    return resize(torch.where(keep, known.float(), 0), size, how=how), unknown.squeeze(1) == 0


def _back(x: Tensor, now: Level, then: Level, rngs: Sequence[Generator]) -> Tensor:
    """x_t from x_s: as much noise more as lies between the two levels."""
    ratio, fresh = forward(now, then)
    return ratio * x + math.sqrt(fresh) * _noise(rngs, x)


def _noise(rngs: Sequence[Generator], x: Tensor) -> Tensor:
    return randn(rngs, x.shape[1:]).to(x.device)
