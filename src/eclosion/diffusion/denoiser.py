"""From a network to an estimate of the clean image: the one thing that samplers call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eclosion.diffusion.noise_schedule import NoiseSchedule
from eclosion.diffusion.prediction import PredictionType, to_sample
from eclosion.diffusion.variance import LearnedVariance, split_variance
from eclosion.errors import ConfigError

__all__ = ["Denoiser", "Estimate", "Network", "threshold"]

# (x_t [B, C, H, W], t int64 [B]) -> what the prediction type says, [B, C, H, W]; or [B, 2C, H, W] with a learned
# variance. With self-conditioning it takes the earlier estimate of x_0 as a third argument, float32 [B, C, H, W].
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Estimate:
    """What a denoiser says of x_t.

    Attributes:
        x_0: the clean image, float32 [B, C, H, W], clipped if the denoiser clips.
        fraction: how far the variance of each value is on the way from its lower to its upper limit, see
            variance.py; float32 of the same shape, or None without a learned variance.
    """

    x_0: Tensor
    fraction: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A network together with what its output means.

    Attributes:
        net: called with x_t and t, its condition bound to it.
        schedule: the noise levels it was trained on.
        prediction_type: what it predicts.
        clip_sample: whether estimates are clamped to [-1, 1]; right for pixels, wrong for latents.
        dynamic_threshold: quantile of the absolute values of an estimate, above which it is clamped
            and then scaled into [-1, 1]; takes the place of clip_sample. None is off.
        uncond: the network with its condition dropped, for guidance.
        guidance_scale: 1 follows the condition as trained, and costs one call of the network; any
            other number extrapolates from uncond through net, and costs two.
        learned_variance: what the second half of the output channels means; None if there is none. It is
            the condition's own: guidance extrapolates the prediction alone.
        self_conditioned: whether the networks take an earlier estimate of x_0 as third argument, the one that
            this denoiser made: guided and clipped. To train one, make the estimate by a denoiser that
            clips alike, without gradient, and put zeros in its place for about half of the images
            (Chen et al. 2022, https://arxiv.org/abs/2208.04202).
    """

    net: Network
    schedule: NoiseSchedule
    prediction_type: PredictionType
    clip_sample: bool = False
    dynamic_threshold: float | None = None
    uncond: Network | None = None
    guidance_scale: float = 1.0
    learned_variance: LearnedVariance | None = None
    self_conditioned: bool = False

    def __post_init__(self) -> None:
        if self.guidance_scale != 1 and self.uncond is None:
            raise ConfigError(
                f"guidance_scale is {self.guidance_scale:g}, and this network has no condition to follow. "
                "Set guidance_scale=1, or train with a condition that is dropped now and then."
            )
        if self.dynamic_threshold is not None and not 0 < self.dynamic_threshold <= 1:
            raise ConfigError(
                f"dynamic_threshold is {self.dynamic_threshold:g}, and must be a quantile: above 0 and at most 1, "
                "for example 0.995."
            )

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The estimate of x_0 alone, float32 [B, C, H, W]; see `estimate`."""
        return self.estimate(x_t, t).x_0

    def estimate(self, x_t: Tensor, t: int | Tensor, previous: Tensor | None = None) -> Estimate:
        """What the network makes of x_t; it runs under the caller's autocast.

        Args:
            x_t: noisy images, float32 [B, C, H, W].
            t: their noise level, or one for each as int64 [B].
            previous: an earlier estimate of x_0, float32 of the same shape, for networks with
                self-conditioning; None hands them zeros.
        """
        if isinstance(t, int):
            t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        output, v = self._outputs(x_t, t, previous)
        x_0 = to_sample(self.prediction_type, output, x_t.float(), t, self.schedule)
        if self.dynamic_threshold is not None:
            x_0 = threshold(x_0, self.dynamic_threshold)
        elif self.clip_sample:
            x_0 = x_0.clamp(-1, 1)
        return Estimate(x_0, None if v is None or self.learned_variance is None else self.learned_variance.fraction(v))

    def _outputs(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network's prediction in float32, guided, and what it says of the variance, as it is.

        x_0 and eps are affine in the output with the same x_t, so guiding the output guides them alike.
        """
        output, v = self._call(self.net, x_t, t, previous)
        if self.uncond is None or self.guidance_scale == 1:
            return output, v
        uncond, _ = self._call(self.uncond, x_t, t, previous)
        return uncond + self.guidance_scale * (output - uncond), v  # Ho & Salimans 2022, arXiv 2207.12598, eq. 6

    def _call(self, net: Network, x_t: Tensor, t: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.self_conditioned:
            output = net(x_t, t, torch.zeros_like(x_t) if previous is None else previous).float()
        else:
            output = net(x_t, t).float()
        if self.learned_variance is None:
            return output, None
        assert output.shape[1] == 2 * x_t.shape[1]
        return split_variance(output)


def threshold(x_0: Tensor, quantile: float) -> Tensor:
    """Images scaled into [-1, 1] so that no more than 1 - quantile of their values saturate.

    An image whose quantile is within [-1, 1] already is only clamped.

    Source: Saharia et al. 2022, https://arxiv.org/abs/2205.11487, section 2.3.
    """
    # Row by row: older releases of torch refuse the quantile of more than 16 million numbers at once.
    rows = [torch.quantile(row, quantile) for row in x_0.abs().flatten(1)]
    s = torch.stack(rows).clamp(min=1).view(-1, *(1,) * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s
