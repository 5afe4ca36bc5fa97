"""What the network predicts, and the way from there to the clean image.

    x_0, eps        the clean image, and the noise in x_t
    alpha, sigma    alpha_t and sigma_t of the noise schedule: x_t = alpha x_0 + sigma eps
    epsilon         the network predicts eps
    sample          the network predicts x_0
    v_prediction    the network predicts v = alpha eps - sigma x_0   (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)
    flow            the network predicts u = eps - x_0               (Liu et al. 2022, https://arxiv.org/abs/2209.03003)

Solving two linear equations for x_0, without assuming that alpha^2 + sigma^2 = 1:

    epsilon         x_0 = (x_t - sigma eps) / alpha
    v_prediction    x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    flow            x_0 = (x_t - sigma u) / (alpha + sigma)

All images are float32 [B, C, H, W], and t is int64 [B].
"""

from typing import Literal, assert_never

import torch
from torch import Tensor

from eclosion.diffusion.noise_schedule import NoiseSchedule

__all__ = ["PredictionType", "target", "to_epsilon", "to_sample"]

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]


def target(prediction_type: PredictionType, x_0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What the network should have answered for x_t made of `x_0` and `noise`; float32 [B, C, H, W]."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    if prediction_type == "flow":
        return noise - x_0
    if prediction_type == "v_prediction":
        alpha, sigma = schedule.gather(t, x_0.ndim)
        return alpha * noise - sigma * x_0
    assert_never(prediction_type)


def to_sample(
    prediction_type: PredictionType, output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """The estimate of x_0 that a network's output means; float32 [B, C, H, W].

    Where alpha is 0, noise predicted in pure noise says nothing about the image: the estimate for
    epsilon is then 0, the middle of [-1, 1], and never infinite.
    """
    if prediction_type == "sample":
        return output
    alpha, sigma = schedule.gather(t, x_t.ndim)
    if prediction_type == "epsilon":
        return (x_t - sigma * output) * _inverse(alpha)
    if prediction_type == "v_prediction":
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
    if prediction_type == "flow":
        return (x_t - sigma * output) / (alpha + sigma)
    assert_never(prediction_type)


def to_epsilon(x_0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The noise that is in x_t if the clean image is x_0; float32 [B, C, H, W]."""
    alpha, sigma = schedule.gather(t, x_t.ndim)
    return (x_t - alpha * x_0) / sigma


def _inverse(alpha: Tensor) -> Tensor:
    """1 / alpha, and 0 where alpha is 0."""
    return torch.where(alpha > 0, 1 / alpha, torch.zeros_like(alpha))
