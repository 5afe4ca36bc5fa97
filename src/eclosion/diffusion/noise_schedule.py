"""How much image and how much noise there is at each noise level, and the schedules that say so.

    T            number of noise levels; t = 0 .. T-1, least noise first
    x_0, eps     the clean image, and standard normal noise of its shape
    x_t          alpha_t x_0 + sigma_t eps
    beta_t       share of the variance that step t replaces by noise
    abar_t       product of (1 - beta) up to t; alpha_t = sqrt(abar_t) where variance is preserved
    snr_t        alpha_t^2 / sigma_t^2

Everything is float64 here; `gather` hands out float32 on the device of the images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from eclosion.errors import ConfigError
from eclosion.registry import part

__all__ = [
    "JSD",
    "Cosine",
    "Level",
    "Linear",
    "NoiseSchedule",
    "Quadratic",
    "RectifiedFlow",
    "ScaledLinear",
    "Sigmoid",
    "cosine_alphas_cumprod",
    "jsd_alphas_cumprod",
    "linear_alphas_cumprod",
    "quadratic_alphas_cumprod",
    "rescale_zero_terminal_snr",
    "sigmoid_alphas_cumprod",
    "variance_preserving",
]


@dataclass(frozen=True)
class Level:
    """One stop on the way from noise to image: x = alpha x_0 + sigma eps, and t for the network."""

    t: int
    alpha: float
    sigma: float


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels of a diffusion process: x_t = alphas[t] x_0 + sigmas[t] eps.

    Attributes:
        alphas: float64 [T] on the CPU, how much of the image is left; may end at 0.
        sigmas: float64 [T] on the CPU, how much noise there is.
    """

    alphas: Tensor
    sigmas: Tensor
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _more_tables: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.alphas.dtype == self.sigmas.dtype == torch.float64
        assert self.alphas.shape == self.sigmas.shape == (max(1, self.alphas.numel()),)
        assert bool(((self.alphas >= 0) & (self.sigmas > 0)).all())

    @property
    def num_train_timesteps(self) -> int:
        """The number of noise levels, T."""
        return len(self.alphas)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alphas squared, float64 [T]: the share of the image's variance left in x_t."""
        return self.alphas**2

    @property
    def snr(self) -> Tensor:
        """Signal to noise ratio of each level, float64 [T]; 0 where nothing is left of the image."""
        return (self.alphas / self.sigmas) ** 2

    @property
    def log_snr(self) -> Tensor:
        """Natural logarithm of `snr`, float64 [T]; -inf where it is 0."""
        return 2 * (self.alphas.log() - self.sigmas.log())

    @cached_property
    def variance_preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 is 1 at every level."""
        return bool(torch.allclose(self.alphas**2 + self.sigmas**2, torch.ones_like(self.alphas), rtol=0, atol=1e-9))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last level is noise alone, so that predicting its noise says nothing about the image."""
        return bool(self.alphas[-1] == 0)

    def level(self, t: int) -> Level:
        """Noise level t, or the clean image for t = -1."""
        return Level(t, float(self.alphas[t]), float(self.sigmas[t])) if t >= 0 else Level(-1, 1.0, 0.0)

    def gather(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, to be multiplied with a batch.

        Reads nothing back from the device. The first call for a device copies the tables there, so
        make one before a CUDA graph is captured.

        Args:
            t: int64 [B], noise levels, on the device of the images.
            ndim: number of dimensions of the batch, 4 for images.

        Returns:
            Two float32 tensors [B, 1, ...] with `ndim` dimensions, on t's device.
        """
        if t.device not in self._tables:
            self._tables[t.device] = self.alphas.float().to(t.device), self.sigmas.float().to(t.device)
        alphas, sigmas = self._tables[t.device]
        shape = (-1, *(1,) * (ndim - 1))
        return alphas[t].view(shape), sigmas[t].view(shape)

    def gather_from(self, name: str, make: Callable[[], Tensor], t: Tensor, ndim: int) -> tuple[Tensor, ...]:
        """Like `gather`, for other numbers that each level has.

        The tables stay with the schedule, so that a captured CUDA graph never loses them.

        Args:
            name: of the tables; they are made at the first call with it for a device.
            make: float64 [K, T] on the CPU, K tables.
            t: int64 [B], noise levels, on the device of the images.
            ndim: number of dimensions of the batch, 4 for images.

        Returns:
            K float32 tensors [B, 1, ...] with `ndim` dimensions, on t's device.
        """
        if (name, t.device) not in self._more_tables:
            self._more_tables[name, t.device] = make().float().to(t.device)
        rows = self._more_tables[name, t.device][:, t]
        return tuple(row.view(-1, *(1,) * (ndim - 1)) for row in rows)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, float32 [B, C, H, W].

        Args:
            x_0: clean images [B, C, H, W].
            noise: standard normal, of the same shape.
            t: int64 [B], the noise level of each image, on the same device.
        """
        alpha, sigma = self.gather(t, x_0.ndim)
        return alpha * x_0 + sigma * noise


def variance_preserving(alphas_cumprod: Tensor) -> NoiseSchedule:
    """The schedule whose alpha_t^2 is `alphas_cumprod`, float64 [T], and whose variances add up to 1."""
    return NoiseSchedule(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch sqrt(abar) so that its last entry is exactly 0 and its first one stays.

    Sampling starts from noise alone, so training must have seen a level that is noise alone;
    otherwise the network learns to read the mean brightness out of what is left at level T-1.

    Args:
        alphas_cumprod: float64 [T], decreasing.

    Returns:
        float64 [T]; for T = 1 the only level becomes noise alone.

    Source: Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1.
    """
    alphas = alphas_cumprod.sqrt()
    first, last = alphas[0], alphas[-1]
    if len(alphas) == 1 or bool(first == last):
        return torch.zeros_like(alphas)
    return ((alphas - last) * (first / (first - last))) ** 2


def linear_alphas_cumprod(num_train_timesteps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """abar for betas that rise evenly from `beta_start` to `beta_end`; float64 [T].

    Raises:
        ConfigError: if a beta is above 1, or too small for float64.

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 4.
    """
    return _alphas_cumprod(_ramp(beta_start, beta_end, num_train_timesteps), "linear")


def quadratic_alphas_cumprod(num_train_timesteps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """abar for betas whose square roots rise evenly; float64 [T].

    Raises:
        ConfigError: if a beta is above 1, or too small for float64.

    Source: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, whose code calls it linear and
    diffusers calls scaled_linear.
    """
    return _alphas_cumprod(_ramp(math.sqrt(beta_start), math.sqrt(beta_end), num_train_timesteps) ** 2, "quadratic")


def sigmoid_alphas_cumprod(num_train_timesteps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """abar for betas that rise from `beta_start` to `beta_end` along a sigmoid over [-6, 6]; float64 [T].

    Raises:
        ConfigError: if a beta is above 1, or too small for float64.

    Source: Xu et al. 2022 (GeoDiff), https://arxiv.org/abs/2203.02923.
    """
    ramp = torch.sigmoid(_ramp(-6.0, 6.0, num_train_timesteps))
    return _alphas_cumprod(beta_start + (beta_end - beta_start) * ramp, "sigmoid")


def jsd_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    """abar for betas 1/T, 1/(T-1), ..., 1: it falls evenly from 1 - 1/T to exactly 0; float64 [T].

    Source: Sohl-Dickstein et al. 2015, https://arxiv.org/abs/1503.03585, section 2.4.1 (binomial case).
    """
    _check_timesteps(num_train_timesteps)
    # The product telescopes: (T-1)/T * (T-2)/(T-1) * ... = (T-1-t)/T, without its rounding errors.
    return torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float64) / num_train_timesteps


def cosine_alphas_cumprod(num_train_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Cumulative signal power of the cosine schedule.

    Entry t is the share of the image's variance left in x_t, from close to 1
    (clean) down to close to 0 (noise). Computed in float64: in float32 the first
    betas lose half their digits.

    Args:
        num_train_timesteps: number of noise levels, T >= 1.
        offset: keeps the first beta away from zero; fraction of T.
        max_beta: upper limit for each beta; without it the last one is 1 and
            x_T carries no signal at all.

    Returns:
        float64 tensor of shape [T], strictly decreasing, in (0, 1).

    Raises:
        ValueError: if num_train_timesteps is less than 1.

    Source: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 17.
    """
    _check_timesteps(num_train_timesteps)
    u = _ramp(0.0, 1.0, num_train_timesteps + 1)
    f = torch.cos((u + offset) / (1 + offset) * (math.pi / 2)) ** 2
    return _alphas_cumprod((1 - f[1:] / f[:-1]).clamp(max=max_beta), "cosine")


def _ramp(start: float, end: float, length: int) -> Tensor:
    _check_timesteps(length)
    return torch.linspace(start, end, length, dtype=torch.float64)


def _alphas_cumprod(betas: Tensor, name: str) -> Tensor:
    """abar for these betas.

    Raises:
        ConfigError: if a beta is no share of a variance: below the resolution of float64, where the
            level would carry no noise, or above 1, where the noise would be the root of a negative number.
            The usual betas, stretched by 1000 / T, do that in fewer than 20 levels.
    """
    where = f"the noise schedule {name!r} with num_train_timesteps={len(betas)}"
    if not bool((1 - betas < 1).all()):  # also where it is not a number
        raise ConfigError(
            f"{where} has a beta of {betas.min().item():g}, and each must be above 1e-16 to add any noise. "
            "Raise beta_start."
        )
    if bool((betas > 1).any()):
        raise ConfigError(
            f"{where} has a beta of {betas.max().item():g}, and none can be above 1. Lower beta_end; "
            "or take more timesteps (20 or more for betas scaled by 1000 / num_train_timesteps), or 'cosine'."
        )
    return torch.cumprod(1 - betas, dim=0)


def _check_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}, and must be at least 1.")


def _finish(alphas_cumprod: Tensor, zero_terminal_snr: bool) -> NoiseSchedule:
    return variance_preserving(rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod)


NumTimesteps = Annotated[int, Field(ge=1)]
BetaStart = Annotated[float, Field(gt=0, lt=1)]
BetaEnd = Annotated[float, Field(gt=0, le=1)]


@part
class Linear:
    """Noise variance that rises evenly, as in the first DDPM paper."""

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000
    # Share of the variance that the first level replaces by noise.
    beta_start: BetaStart = 1e-4
    # Share of the variance that the last level replaces by noise.
    beta_end: BetaEnd = 0.02
    # Whether the levels are stretched so that the last one is noise alone; needs a prediction type other than epsilon.
    rescale_zero_terminal_snr: bool = False

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        abar = linear_alphas_cumprod(self.num_train_timesteps, beta_start=self.beta_start, beta_end=self.beta_end)
        return _finish(abar, self.rescale_zero_terminal_snr)


@part
class ScaledLinear:
    """Noise variance whose square root rises evenly, between the limits that Stable Diffusion uses."""

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000
    # Share of the variance that the first level replaces by noise (0.0001 is diffusers' default).
    beta_start: BetaStart = 0.00085
    # Share of the variance that the last level replaces by noise (0.02 is diffusers' default).
    beta_end: BetaEnd = 0.012
    # Whether the levels are stretched so that the last one is noise alone; needs a prediction type other than epsilon.
    rescale_zero_terminal_snr: bool = False

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        abar = quadratic_alphas_cumprod(self.num_train_timesteps, beta_start=self.beta_start, beta_end=self.beta_end)
        return _finish(abar, self.rescale_zero_terminal_snr)


@part
class Quadratic:
    """Noise variance whose square root rises evenly, between the limits of the linear schedule."""

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000
    # Share of the variance that the first level replaces by noise.
    beta_start: BetaStart = 1e-4
    # Share of the variance that the last level replaces by noise.
    beta_end: BetaEnd = 0.02
    # Whether the levels are stretched so that the last one is noise alone; needs a prediction type other than epsilon.
    rescale_zero_terminal_snr: bool = False

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        abar = quadratic_alphas_cumprod(self.num_train_timesteps, beta_start=self.beta_start, beta_end=self.beta_end)
        return _finish(abar, self.rescale_zero_terminal_snr)


@part
class Sigmoid:
    """Noise variance that rises along a sigmoid: slowly at both ends."""

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000
    # Share of the variance that the first level replaces by noise.
    beta_start: BetaStart = 1e-4
    # Share of the variance that the last level replaces by noise.
    beta_end: BetaEnd = 0.02
    # Whether the levels are stretched so that the last one is noise alone; needs a prediction type other than epsilon.
    rescale_zero_terminal_snr: bool = False

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        abar = sigmoid_alphas_cumprod(self.num_train_timesteps, beta_start=self.beta_start, beta_end=self.beta_end)
        return _finish(abar, self.rescale_zero_terminal_snr)


@part
class Cosine:
    """Signal that falls along a squared cosine, called squaredcos_cap_v2 by diffusers; good for small images."""

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000
    # Keeps the first level away from no noise at all; a fraction of num_train_timesteps.
    offset: Annotated[float, Field(ge=0)] = 0.008
    # Upper limit for the share of the variance that one level replaces by noise.
    max_beta: Annotated[float, Field(gt=0, le=1)] = 0.999
    # Whether the levels are stretched so that the last one is noise alone; needs a prediction type other than epsilon.
    rescale_zero_terminal_snr: bool = False

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        abar = cosine_alphas_cumprod(self.num_train_timesteps, offset=self.offset, max_beta=self.max_beta)
        return _finish(abar, self.rescale_zero_terminal_snr)


@part
class JSD:
    """Signal whose variance falls evenly to exactly 0; the last level is noise alone."""

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        return variance_preserving(jsd_alphas_cumprod(self.num_train_timesteps))


@part
class RectifiedFlow:
    """Straight lines from image to noise: x_t = (1 - s) x_0 + s eps with s = (t + 1) / T.

    Source: Liu et al. 2022, https://arxiv.org/abs/2209.03003. Goes with the prediction type flow.
    """

    # Number of noise levels.
    num_train_timesteps: NumTimesteps = 1000

    def build(self) -> NoiseSchedule:
        """The noise levels."""
        s = torch.arange(1, self.num_train_timesteps + 1, dtype=torch.float64) / self.num_train_timesteps
        return NoiseSchedule(1 - s, s)
