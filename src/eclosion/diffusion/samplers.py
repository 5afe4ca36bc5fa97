"""Algorithms that remove noise, all called as `sampler(denoise, x, rngs)`.

    t, s         a noise level and the next, less noisy one; after the last comes the clean image: alpha 1, sigma 0
    x            x_t, then x_s
    x_0, eps     what the denoiser estimates, and the noise that this leaves in x_t: (x_t - alpha_t x_0) / sigma_t
    z            fresh standard normal noise
    lambda       log(alpha / sigma)

Images are float32 and coefficients are Python floats, that is float64. Each estimate enters as x_0,
never as x / alpha, so that a first level without any signal (alpha = 0, as in zero terminal SNR and
rectified flow) needs no special case.

Every sampler takes `x`, standard normal noise [B, C, H, W], and `rngs`, one generator per image;
image i depends on x[i] and rngs[i] alone. `on_step(i, n)` is called before network call i of n, and
may raise to interrupt. The result is x_0, float32 [B, C, H, W]; it lies in [-1, 1] only if the
denoiser clips. Gradients and autocast are the caller's choice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field
from torch import Tensor

from eclosion.diffusion.denoiser import Denoiser
from eclosion.diffusion.noise_schedule import NoiseSchedule
from eclosion.errors import ConfigError
from eclosion.registry import part
from eclosion.rng import Generator, randn

__all__ = ["DDIM", "DDPM", "DPMSolver", "Euler", "Heun", "Level", "OnStep", "Sampler", "Spacing", "levels"]

OnStep = Callable[[int, int], None]
Spacing = Literal["trailing", "linspace", "leading"]
NumSteps = Annotated[int, Field(ge=1)]


class Sampler(Protocol):
    """What each part in this file is."""

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        ...


@dataclass(frozen=True)
class Level:
    """One stop on the way from noise to image: x = alpha x_0 + sigma eps, and t for the network."""

    t: int
    alpha: float
    sigma: float


def levels(schedule: NoiseSchedule, num_inference_steps: int, spacing: Spacing) -> list[Level]:
    """The noise levels that a sampler visits, most noise first, and the clean image at the end.

    Args:
        schedule: the levels that the network was trained on.
        num_inference_steps: how many of them are visited.
        spacing: "trailing" starts at the last level T-1, "linspace" has both ends, and "leading" has
            t = 0 but starts below T-1, though x is noise alone: it is there to compare with others.

    Returns:
        num_inference_steps + 1 levels; the last has t = -1.

    Raises:
        ConfigError: if more levels are wanted than the schedule has.

    Source: Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2.
    """
    T, n = schedule.num_train_timesteps, num_inference_steps
    if n > T:
        raise ConfigError(
            f"num_inference_steps is {n}, and the noise schedule has only {T} levels. "
            f"Set num_inference_steps to at most {T}, or num_train_timesteps to at least {n}."
        )
    if spacing == "trailing":
        times = np.round(T - np.arange(n) * T / n) - 1
    elif spacing == "linspace":
        times = np.round(np.linspace(T - 1, 0, n))
    else:
        times = np.arange(n - 1.0, -1, -1) * (T // n)
    visited = [Level(t, float(schedule.alphas[t]), float(schedule.sigmas[t])) for t in map(int, times)]
    return [*visited, Level(-1, 1.0, 0.0)]


@part
class DDPM:
    """Steps back through the noise levels, with fresh noise in each; the slowest, and the reference.

    Each step draws from the posterior of x_s given x_t and the estimate of x_0, whose variance
    is the smaller of the paper's two choices ("fixed_small" in diffusers).

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equations 6 and 7, for any two levels.
    """

    # Noise levels visited; none means all that the network was trained on.
    num_inference_steps: NumSteps | None = None
    # Which levels are visited when it is fewer than all.
    timestep_spacing: Spacing = "trailing"

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        n = self.num_inference_steps or denoise.schedule.num_train_timesteps
        return _stochastic(levels(denoise.schedule, n, self.timestep_spacing), 1.0, denoise, x, rngs, on_step)


@part
class DDIM:
    """Takes larger steps than DDPM, with as much fresh noise as `eta` says.

    Source: Song et al. 2020, https://arxiv.org/abs/2010.02502, equations 12 and 16.
    """

    # Noise levels visited, which is the number of network calls.
    num_inference_steps: NumSteps = 50
    # Fresh noise per step: 0 is deterministic, 1 is as much as DDPM adds.
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Which levels are visited; "trailing" starts where the noise is, "leading" is what older programs do.
    timestep_spacing: Spacing = "trailing"

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        path = levels(denoise.schedule, self.num_inference_steps, self.timestep_spacing)
        return _stochastic(path, self.eta, denoise, x, rngs, on_step)


@part
class Euler:
    """First-order steps along the probability flow; the plain sampler of rectified flow.

    Deterministic. Straight steps in x / alpha against sigma / alpha are those of DDIM with eta = 0,
    and of x against s in rectified flow, so this is DDIM by the name under which it is looked for.

    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1 without its lines 6 to 8.
    """

    # Noise levels visited, which is the number of network calls.
    num_inference_steps: NumSteps = 50
    # Which levels are visited; "trailing" starts where the noise is, "leading" is what older programs do.
    timestep_spacing: Spacing = "trailing"

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        path = levels(denoise.schedule, self.num_inference_steps, self.timestep_spacing)
        return _stochastic(path, 0.0, denoise, x, rngs, on_step)


@part
class Heun:
    """Second-order steps along the probability flow, at two network calls each.

    Deterministic. Each step takes a straight step in x / alpha against sigma / alpha, looks at the
    noise from there, and takes the step again with the mean of both. The last step, to the clean
    image, and steps out of (almost) pure noise take one look.

    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1.
    """

    # Noise levels visited; takes up to twice as many network calls, less one.
    num_inference_steps: NumSteps = 20
    # Which levels are visited; "trailing" starts where the noise is, "leading" is what older programs do.
    timestep_spacing: Spacing = "trailing"

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        path = levels(denoise.schedule, self.num_inference_steps, self.timestep_spacing)
        estimate = _counted(denoise, on_step, sum(1 + _has_second_look(*step) for step in pairwise(path)))
        x = _start(x, path[0])
        for now, then in pairwise(path):
            x_0 = estimate(x, now)
            ahead = _flow(x, x_0, now, then)
            if _has_second_look(now, then):
                noise = (x - now.alpha * x_0) / now.sigma
                noise_ahead = (ahead - then.alpha * estimate(ahead, then)) / then.sigma
                gain = then.alpha / now.alpha
                ahead = gain * x + (then.sigma - now.sigma * gain) * (noise + noise_ahead) / 2
            x = ahead
        return x


def _has_second_look(now: Level, then: Level) -> bool:
    """Whether a step of Heun is corrected.

    The correction multiplies the difference of two estimates by alpha_s / alpha_t. Other steps have
    less than 8 there; the one out of pure noise has infinity, or thousands with the cosine schedule,
    and would wreck the image. A single step of first order leaves the whole of second order.
    """
    return then.sigma > 0 and then.alpha < 10 * now.alpha


@part
class DPMSolver:
    """DPM-Solver++(2M): second-order steps at one network call each; the best for few steps.

    Deterministic. Each step extrapolates from the last two estimates of x_0; the first and the
    last are of first order.

    Source: Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2.
    """

    # Noise levels visited, which is the number of network calls.
    num_inference_steps: NumSteps = 20
    # Which levels are visited; "trailing" starts where the noise is, "leading" is what older programs do.
    timestep_spacing: Spacing = "trailing"

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        path = levels(denoise.schedule, self.num_inference_steps, self.timestep_spacing)
        estimate = _counted(denoise, on_step, len(path) - 1)
        x = _start(x, path[0])
        x_0_before: Tensor | None = None
        h_before = math.inf
        for now, then in pairwise(path):
            x_0 = estimate(x, now)
            h = _lambda(then) - _lambda(now)
            data = x_0
            if x_0_before is not None and math.isfinite(h) and math.isfinite(h_before):
                data = x_0 + (h / h_before / 2) * (x_0 - x_0_before)
            x = _flow(x, data, now, then)
            x_0_before, h_before = x_0, h
        return x


def _stochastic(
    path: Sequence[Level], eta: float, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], on_step: OnStep | None
) -> Tensor:
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std z, with std = eta times that of the posterior."""
    assert len(rngs) == len(x)  # or images would share their noise by broadcasting
    estimate = _counted(denoise, on_step, len(path) - 1)
    x = _start(x, path[0])
    for now, then in pairwise(path):
        std = eta * _posterior_std(now, then)
        calm = Level(then.t, then.alpha, math.sqrt(max(0.0, then.sigma**2 - std**2)))
        x = _flow(x, estimate(x, now), now, calm)
        if std > 0:
            x = x + std * randn(rngs, x.shape[1:]).to(x.device)
    return x


def _start(x: Tensor, first: Level) -> Tensor:
    """Noise with the variance that images of variance 1 have at the first level: 1 where variance is preserved."""
    return x.float() * math.hypot(first.alpha, first.sigma)


def _flow(x: Tensor, x_0: Tensor, now: Level, then: Level) -> Tensor:
    """alpha_s x_0 + sigma_s eps: the same image and the same noise, mixed as at the next level."""
    keep = then.sigma / now.sigma
    return keep * x + (then.alpha - now.alpha * keep) * x_0


def _posterior_std(now: Level, then: Level) -> float:
    """Standard deviation of x_s given x_t and x_0."""
    ratio = now.alpha / then.alpha if then.alpha > 0 else 0.0
    fresh = max(0.0, now.sigma**2 - (ratio * then.sigma) ** 2)  # variance of x_t given x_s
    return math.sqrt(fresh) * then.sigma / now.sigma


def _lambda(level: Level) -> float:
    """Half the logarithm of the signal to noise ratio; -inf for noise alone, inf for the clean image."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf


def _counted(denoise: Denoiser, on_step: OnStep | None, num_calls: int) -> Callable[[Tensor, Level], Tensor]:
    """The denoiser, announcing each of its calls."""
    calls = iter(range(num_calls))

    def estimate(x: Tensor, level: Level) -> Tensor:
        call = next(calls)
        if on_step is not None:
            on_step(call, num_calls)
        return denoise(x, level.t)

    return estimate
