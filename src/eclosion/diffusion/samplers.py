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

A network with self-conditioning is handed zeros in its first call, and then in each call the estimate of
x_0 that came out of the call before, at whatever level that was: in Heun's second look, that of the first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field
from torch import Tensor

from eclosion.diffusion.denoiser import Denoiser, Estimate
from eclosion.diffusion.noise_schedule import Level, NoiseSchedule
from eclosion.diffusion.variance import log_variance, posterior
from eclosion.errors import ConfigError
from eclosion.registry import part
from eclosion.rng import Generator, randn

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolver",
    "Euler",
    "Heun",
    "Level",
    "OnStep",
    "Sampler",
    "Spacing",
    "Walk",
    "Walker",
    "counted",
    "levels",
]

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
    return [schedule.level(int(t)) for t in (*times, -1)]


@dataclass(frozen=True)
class Walk:
    """A way from noise to image in steps that remember nothing, so that inpainting can go back on it.

    Attributes:
        path: the levels visited, most noise first, and the clean image at the end.
        eta: standard deviation of the fresh noise of a step, as a share of the posterior's.
        learns_variance: whether a variance that the network has learned takes the posterior's place; the
            mean stays that of the posterior.
    """

    path: list[Level]
    eta: float
    learns_variance: bool = False

    def start(self, x: Tensor) -> Tensor:
        """Standard normal noise, scaled to the first level."""
        return _start(x, self.path[0])

    def step(self, x: Tensor, estimate: Estimate, now: Level, then: Level, rngs: Sequence[Generator]) -> Tensor:
        """x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + noise, float32 [B, C, H, W], for any two levels.

        Args:
            x: x_t.
            estimate: what the denoiser says of it.
            now: the level of x_t.
            then: the level to go to.
            rngs: one generator per image; nothing is drawn for a step to the clean image.
        """
        step = posterior(now, then)
        std = self.eta * step.std
        calm = replace(then, sigma=math.sqrt(max(0.0, then.sigma**2 - std**2)))
        x = _flow(x, estimate.x_0, now, calm)
        if std == 0:
            return x
        noise = randn(rngs, x.shape[1:]).to(x.device)
        if self.learns_variance and estimate.fraction is not None:
            return x + (log_variance(estimate.fraction, *step.log_range) / 2).exp() * noise
        return x + std * noise


@runtime_checkable
class Walker(Protocol):
    """A sampler whose steps remember nothing."""

    def walk(self, schedule: NoiseSchedule) -> Walk:
        """The levels that it visits, and how it steps from one to the next."""
        ...


@part
class DDPM:
    """Steps back through the noise levels, with fresh noise in each; the slowest, and the reference.

    Each step draws from the posterior of x_s given x_t and the estimate of x_0, whose variance
    is the smaller of the paper's two choices ("fixed_small" in diffusers). A network that has
    learned the variance says itself where it lies between the two, for the levels visited ("learned_range").

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equations 6 and 7, for any two levels;
    Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 15.
    """

    # Noise levels visited; none means all that the network was trained on.
    num_inference_steps: NumSteps | None = None
    # Which levels are visited when it is fewer than all.
    timestep_spacing: Spacing = "trailing"

    def __call__(
        self, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Turn standard normal noise [B, C, H, W] into images of the same shape."""
        return _follow(self.walk(denoise.schedule), denoise, x, rngs, on_step)

    def walk(self, schedule: NoiseSchedule) -> Walk:
        """The levels that it visits, and how it steps from one to the next."""
        n = self.num_inference_steps or schedule.num_train_timesteps
        return Walk(levels(schedule, n, self.timestep_spacing), eta=1.0, learns_variance=True)


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
        return _follow(self.walk(denoise.schedule), denoise, x, rngs, on_step)

    def walk(self, schedule: NoiseSchedule) -> Walk:
        """The levels that it visits, and how it steps from one to the next."""
        return Walk(levels(schedule, self.num_inference_steps, self.timestep_spacing), self.eta)


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
        return _follow(self.walk(denoise.schedule), denoise, x, rngs, on_step)

    def walk(self, schedule: NoiseSchedule) -> Walk:
        """The levels that it visits, and how it steps from one to the next."""
        return Walk(levels(schedule, self.num_inference_steps, self.timestep_spacing), 0.0)


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
        estimate = counted(denoise, on_step, sum(1 + _has_second_look(*step) for step in pairwise(path)))
        x = _start(x, path[0])
        for now, then in pairwise(path):
            x_0 = estimate(x, now).x_0
            ahead = _flow(x, x_0, now, then)
            if _has_second_look(now, then):
                noise = (x - now.alpha * x_0) / now.sigma
                noise_ahead = (ahead - then.alpha * estimate(ahead, then).x_0) / then.sigma
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
        estimate = counted(denoise, on_step, len(path) - 1)
        x = _start(x, path[0])
        x_0_before: Tensor | None = None
        h_before = math.inf
        for now, then in pairwise(path):
            x_0 = estimate(x, now).x_0
            h = _lambda(then) - _lambda(now)
            data = x_0
            if x_0_before is not None and math.isfinite(h) and math.isfinite(h_before):
                data = x_0 + (h / h_before / 2) * (x_0 - x_0_before)
            x = _flow(x, data, now, then)
            x_0_before, h_before = x_0, h
        return x


def _follow(walk: Walk, denoise: Denoiser, x: Tensor, rngs: Sequence[Generator], on_step: OnStep | None) -> Tensor:
    """All steps of a walk, one after the other."""
    assert len(rngs) == len(x)  # or images would share their noise by broadcasting
    estimate = counted(denoise, on_step, len(walk.path) - 1)
    x = walk.start(x)
    for now, then in pairwise(walk.path):
        x = walk.step(x, estimate(x, now), now, then, rngs)
    return x


def _start(x: Tensor, first: Level) -> Tensor:
    """Noise with the variance that images of variance 1 have at the first level: 1 where variance is preserved."""
    return x.float() * math.hypot(first.alpha, first.sigma)


def _flow(x: Tensor, x_0: Tensor, now: Level, then: Level) -> Tensor:
    """alpha_s x_0 + sigma_s eps: the same image and the same noise, mixed as at the next level."""
    keep = then.sigma / now.sigma
    return keep * x + (then.alpha - now.alpha * keep) * x_0


def _lambda(level: Level) -> float:
    """Half the logarithm of the signal to noise ratio; -inf for noise alone, inf for the clean image."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf


def counted(denoise: Denoiser, on_step: OnStep | None, num_calls: int) -> Callable[[Tensor, Level], Estimate]:
    """The denoiser for one batch's way through the levels: announces each call, and hands on its estimate to the next.

    Args:
        denoise: what is called.
        on_step: called before each call with its number and `num_calls`; may raise.
        num_calls: how many there will be.
    """
    calls = iter(range(num_calls))
    before: Tensor | None = None

    def estimate(x: Tensor, level: Level) -> Estimate:
        nonlocal before
        call = next(calls)
        if on_step is not None:
            on_step(call, num_calls)
        made = denoise.estimate(x, level.t, before)
        before = made.x_0
        return made

    return estimate
