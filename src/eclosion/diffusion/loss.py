"""The loss of a diffusion model, one number per image, and the random numbers it needs.

    snr          alpha^2 / sigma^2, of the noise level t of an image
    gamma, k     of the weighting

min-SNR weights an error of x_0 with min(snr, gamma) (Hang et al. 2023, https://arxiv.org/abs/2303.09556).
A network that predicts something else errs in x_0 by its own error times c, see prediction.py, so
its loss is weighted with min(snr, gamma) c^2:

    sample          c = 1                             min(snr, gamma)
    epsilon         c = sigma / alpha                 min(snr, gamma) / snr
    v_prediction    c = sigma / (alpha^2 + sigma^2)   min(snr, gamma) / (snr + 1) where variance is preserved
    flow            c = sigma / (alpha + sigma)       min(snr, gamma) / (sqrt(snr) + 1)^2

Written with min(snr, gamma) = min(alpha^2, gamma sigma^2) / sigma^2, none divides by 0 where alpha is 0.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from eclosion.diffusion.noise_schedule import NoiseSchedule
from eclosion.diffusion.prediction import PredictionType
from eclosion.registry import part
from eclosion.rng import Generator, randint, randn

__all__ = ["Loss", "draw_noise", "draw_timesteps", "min_snr_weight", "p2_weight"]


@part
class Loss:
    """How far a prediction is from its target, and which noise levels count how much."""

    # Distance of each pixel: absolute (l1), squared (l2), or squared near 0 and absolute beyond huber_delta.
    kind: Literal["l1", "l2", "huber"] = "l2"
    # Error at which huber goes over from half the square to a straight line.
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    # Weight of each noise level: all equal, min-SNR, or P2 (perception prioritized).
    weighting: Literal["none", "min_snr", "p2"] = "none"
    # Signal to noise ratio above which min_snr stops to count cleaner levels more.
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    # Exponent of p2; 0 weights all levels equally.
    p2_gamma: Annotated[float, Field(ge=0)] = 1.0
    # Added to the signal to noise ratio in p2.
    p2_k: Annotated[float, Field(gt=0)] = 1.0
    # Strength of extra noise that is constant over each channel, so that the mean brightness is learned too; 0 is off.
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    # How noise levels are drawn: all alike, or most from the middle.
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    # Mean of the logit of t / T for logit_normal; above 0 prefers noisy levels.
    logit_mean: float = 0.0
    # Standard deviation of that logit.
    logit_std: Annotated[float, Field(gt=0)] = 1.0

    def per_image(
        self,
        prediction: Tensor,
        target: Tensor,
        t: Tensor,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
    ) -> Tensor:
        """The weighted mean over channels and pixels, float32 [B].

        Args:
            prediction: the network's output [B, C, H, W], of any float type.
            target: what it should be, of the same shape; see prediction.target.
            t: int64 [B], noise levels.
            schedule: gives their signal to noise ratios.
            prediction_type: what is predicted; min_snr depends on it.
        """
        losses = self._distance(prediction.float(), target.float()).flatten(1).mean(1)
        if self.weighting == "none":
            return losses
        if self.weighting == "min_snr":
            return losses * min_snr_weight(t, schedule, prediction_type, gamma=self.min_snr_gamma)
        return losses * p2_weight(t, schedule, gamma=self.p2_gamma, k=self.p2_k)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.kind == "l1":
            return F.l1_loss(prediction, target, reduction="none")
        if self.kind == "l2":
            return F.mse_loss(prediction, target, reduction="none")
        return F.huber_loss(prediction, target, reduction="none", delta=self.huber_delta)


def min_snr_weight(
    t: Tensor, schedule: NoiseSchedule, prediction_type: PredictionType, *, gamma: float = 5.0
) -> Tensor:
    """The min-SNR weight of each noise level, float32 [B]; finite at zero signal to noise too.

    Where alpha is 0 it is the limit: 1 for epsilon, and 0 for the others.
    """
    alpha, sigma = schedule.gather(t, 1)
    if prediction_type == "sample":
        return (alpha / sigma).square().clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma * (sigma / alpha).square()).clamp(max=1)  # sigma / 0 is infinite, and clamped
    capped = torch.minimum(alpha.square(), gamma * sigma.square())
    if prediction_type == "v_prediction":
        return capped / (alpha.square() + sigma.square()).square()
    if prediction_type == "flow":
        return capped / (alpha + sigma).square()
    assert_never(prediction_type)


def p2_weight(t: Tensor, schedule: NoiseSchedule, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """The P2 weight (k + snr)^-gamma of each noise level, float32 [B], whatever is predicted.

    Source: Choi et al. 2022, https://arxiv.org/abs/2204.00227, equation 8, where epsilon is predicted.
    """
    alpha, sigma = schedule.gather(t, 1)
    return (k + (alpha / sigma).square()).pow(-gamma)


def draw_timesteps(loss: Loss, rngs: Sequence[Generator], num_train_timesteps: int) -> Tensor:
    """A noise level for each image, int64 [B] in [0, T).

    Level i comes from rngs[i] alone. Call it before `draw_noise`: that order is part of what makes
    a run repeatable.

    Source of logit_normal: Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 3.1.
    """
    if loss.timestep_sampling == "uniform":
        return randint(rngs, 0, num_train_timesteps)
    logits = np.array([rng.normal(loss.logit_mean, loss.logit_std) for rng in rngs])
    levels = torch.from_numpy(logits).sigmoid() * num_train_timesteps
    return levels.long().clamp(max=num_train_timesteps - 1)  # the sigmoid of a large logit is 1


def draw_noise(loss: Loss, rngs: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """The noise for each image, float32 [B, *shape] on the CPU; row i comes from rngs[i] alone.

    With `offset_noise` each channel is shifted by a normal number of that standard deviation, drawn
    after the noise of its image. The sum is the noise: add it, and predict it.

    Args:
        loss: says how strong offset noise is.
        rngs: one generator per image.
        shape: of one image, [C, H, W].
    """
    noise = randn(rngs, shape)
    if loss.offset_noise > 0:
        channels, *pixels = shape
        noise += loss.offset_noise * randn(rngs, (channels, *(1 for _ in pixels)))
    return noise
