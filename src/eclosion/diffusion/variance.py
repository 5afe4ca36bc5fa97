"""How much noise a step back puts in, and a network that learns it.

    t, s         a noise level and the next, less noisy one; after the last comes the clean image: alpha 1, sigma 0
    low          variance of x_s given x_t and x_0: right if the image were known
    high         variance of x_s given x_t if images were standard normal noise; beta_t where variance is preserved
    v, f         what the network says of each value, and the fraction f = (v + 1) / 2 of the way from low to high
    mu, lambda   mean and logarithm of the variance of x_s as the network has it

The variance lies between low and high, as its logarithm (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672,
equation 15): lambda = f ln high + (1 - f) ln low. Nothing keeps f in [0, 1] unless `constrain_fraction` does.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, assert_never

import torch
from pydantic import Field
from torch import Tensor

from eclosion.diffusion.noise_schedule import Level, NoiseSchedule
from eclosion.diffusion.prediction import PredictionType
from eclosion.registry import part

__all__ = [
    "LearnedVariance",
    "Posterior",
    "forward",
    "log_variance",
    "posterior",
    "posteriors",
    "split_variance",
    "variational_bits",
]

# A variance of 0, as after the last step, has no logarithm. DALLE2-pytorch and diffusers put this one in its place.
SMALLEST_VARIANCE = 1e-20
# Beyond it, float32 has no room left for the squares and quotients of variances. No schedule comes near.
LARGEST_VARIANCE = 1e20
# Half the distance of two neighbours among the 256 values of a pixel, in [-1, 1].
HALF_STEP = 1 / 255


@dataclass(frozen=True)
class Posterior:
    """x_s, given x_t and x_0, is normal with mean from_x_0 x_0 + from_x_t x_t.

    Attributes:
        from_x_0: share of the image in the mean.
        from_x_t: share of the noisy image in the mean.
        std: standard deviation; 0 if s is the clean image.
        high: the largest variance that makes sense when x_0 is not known; its square root is not below std.
    """

    from_x_0: float
    from_x_t: float
    std: float
    high: float

    @property
    def log_range(self) -> tuple[float, float]:
        """ln low and ln high, natural logarithms of variances; never below that of 1e-20."""
        low, high = max(self.std**2, SMALLEST_VARIANCE), max(self.high, SMALLEST_VARIANCE)
        return math.log(low), math.log(high)


def forward(now: Level, then: Level) -> tuple[float, float]:
    """How x_t at `now` comes from x_s at `then`: its mean as a share of x_s, and its variance around that.

    The share is alpha_t / alpha_s, and the variance sigma_t^2 less what is left of sigma_s^2: beta_t for
    neighbours where variance is preserved.
    """
    ratio = now.alpha / then.alpha if then.alpha > 0 else 0.0
    return ratio, max(0.0, now.sigma**2 - (ratio * then.sigma) ** 2)


def posterior(now: Level, then: Level) -> Posterior:
    """What is known of x_s at `then` from x_t at `now`, for any two levels, next to each other or not.

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 7, without assuming that
    alpha^2 + sigma^2 = 1; `high` is the upper one of its section 3.2.
    """
    ratio, fresh = forward(now, then)
    power = (then.alpha**2 + then.sigma**2) / (now.alpha**2 + now.sigma**2)
    return Posterior(
        from_x_0=fresh * then.alpha / now.sigma**2,
        from_x_t=ratio * (then.sigma / now.sigma) ** 2,
        std=math.sqrt(fresh) * then.sigma / now.sigma,
        high=fresh * power,
    )


def posteriors(schedule: NoiseSchedule) -> list[Posterior]:
    """The posterior of one step back from each of the T levels; from level 0 it is to the clean image."""
    levels = [schedule.level(t) for t in range(-1, schedule.num_train_timesteps)]
    return [posterior(now, then) for then, now in pairwise(levels)]


@part
class LearnedVariance:
    """The network has twice as many output channels, and says with the second half how sure it is of each value.

    The second half learns from a term of its own, the variational bound, which does not reach the first.

    Source: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, section 3.1.
    """

    # Weight of the variational term beside the loss of the prediction.
    weight: Annotated[float, Field(ge=0)] = 0.001
    # Whether a sigmoid keeps each variance between the smallest and the largest that make sense.
    constrain_fraction: bool = False

    def fraction(self, v: Tensor) -> Tensor:
        """How far each variance is on the way from low to high; float32, of the shape of v."""
        f = (v.float() + 1) / 2
        return f.sigmoid() if self.constrain_fraction else f

    def per_image(
        self,
        prediction: Tensor,
        v: Tensor,
        target: Tensor,
        x_0: Tensor,
        t: Tensor,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
    ) -> Tensor:
        """The weighted variational term, float32 [B], to be added to the loss of the prediction.

        Args:
            prediction: first half of the network's output [B, C, H, W], of any float type.
            v: second half.
            target: what the prediction should be, see prediction.target.
            x_0: clean images in [-1, 1].
            t: int64 [B], noise levels.
            schedule: gives the variances.
            prediction_type: what is predicted.
        """
        f = self.fraction(v)
        return self.weight * variational_bits(prediction, f, target, x_0, t, schedule, prediction_type)


def split_variance(output: Tensor) -> tuple[Tensor, Tensor]:
    """A network's prediction and its v, each [B, C, H, W], from its output [B, 2C, H, W]."""
    assert output.shape[1] % 2 == 0
    prediction, v = output.chunk(2, dim=1)
    return prediction, v


def log_variance(fraction: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """lambda = f ln high + (1 - f) ln low, float32 of the shape of `fraction`, for variances in [1e-20, 1e20].

    Outside of that range, where a network without constraint may wander, it is clamped, and has no gradient.

    Args:
        fraction: float32, how far on the way from low to high.
        low, high: natural logarithms of variances, such as `Posterior.log_range`.
    """
    between = fraction * high + (1 - fraction) * low
    return between.clamp(math.log(SMALLEST_VARIANCE), math.log(LARGEST_VARIANCE))


def variational_bits(
    prediction: Tensor,
    fraction: Tensor,
    target: Tensor,
    x_0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Tensor:
    """The term of level t in the variational bound, float32 [B], in bits per dimension.

    It is KL(q(x_s | x_t, x_0) || N(mu, exp lambda)) for t > 0, and for t = 0 the negative logarithm
    of the probability that N(mu, exp lambda) gives to the pixel's value among the 256. No gradient
    reaches the prediction, by way of mu: the term is there for the variance alone.

    The true mean less mu is from_x_0 times the error of x_0, and that is the error of the prediction times c,
    see loss.py; so x_t is not needed, and no two large numbers are subtracted. Where the
    level is noise alone and noise is predicted, the estimate of x_0 is 0, as in prediction.to_sample.

    Finite, and with finite gradients, at every level of every schedule. Computed in float32, under autocast too.

    Args:
        prediction: first half of the network's output [B, C, H, W], of any float type.
        fraction: float32, of the same shape, see LearnedVariance.fraction.
        target: what the prediction should be, see prediction.target.
        x_0: clean images in [-1, 1].
        t: int64 [B], noise levels.
        schedule: gives the variances.
        prediction_type: what is predicted; mu depends on it.

    Source: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, equations 4 to 7 and section 3.1.
    """
    name = f"variational bits of {prediction_type}"
    tables = schedule.gather_from(name, lambda: _tables(schedule, prediction_type), t, x_0.ndim)
    error_gain, image_gain, low, high = tables
    off = error_gain * (prediction.detach().float() - target.float()) + image_gain * x_0.float()
    learned = log_variance(fraction, low, high)
    bits = torch.where((t == 0).view(low.shape), _negative_log_likelihood(x_0, off, learned), _kl(off, low, learned))
    return bits.flatten(1).mean(1) / math.log(2)


def _tables(schedule: NoiseSchedule, prediction_type: PredictionType) -> Tensor:
    """float64 [4, T]: the gains that make true mean - mu of the prediction's error and of x_0, ln low and ln high."""
    rows = []
    for t, step in enumerate(posteriors(schedule)):
        level = schedule.level(t)
        gain = _error_of_x_0(prediction_type, level)
        blind = math.isinf(gain)
        rows.append((0.0 if blind else step.from_x_0 * gain, step.from_x_0 if blind else 0.0, *step.log_range))
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


def _error_of_x_0(prediction_type: PredictionType, level: Level) -> float:
    """x_0 less its estimate, for a prediction that is 1 too large; infinite for noise in noise alone."""
    alpha, sigma = level.alpha, level.sigma
    if prediction_type == "sample":
        return -1.0
    if prediction_type == "epsilon":
        return sigma / alpha if alpha > 0 else math.inf
    if prediction_type == "v_prediction":
        return sigma / (alpha**2 + sigma**2)
    if prediction_type == "flow":
        return sigma / (alpha + sigma)
    assert_never(prediction_type)


def _kl(off: Tensor, true: Tensor, learned: Tensor) -> Tensor:
    """KL(N(m, exp true) || N(m - off, exp learned)) of each value, in nats."""
    gap = true - learned
    return (gap.expm1() - gap + off.square() * (-learned).exp()) / 2


def _negative_log_likelihood(x_0: Tensor, off: Tensor, learned: Tensor) -> Tensor:
    """-ln of the probability that N(x_0 - off, exp learned) falls into the pixel's own 256th of [-1, 1], in nats.

    The first and the last 256th reach to infinity. A probability below 1e-12 counts as that.
    """
    per_std = (-learned / 2).exp()
    above, below = _normal_cdf((off + HALF_STEP) * per_std), _normal_cdf((HALF_STEP - off) * per_std)
    # Of both tails of one bin, the one in which the smaller numbers are: there differences keep their digits.
    apart = off.abs()
    inside = _normal_cdf((HALF_STEP - apart) * per_std) - _normal_cdf((-HALF_STEP - apart) * per_std)
    probability = torch.where(x_0 < -0.999, above, torch.where(x_0 > 0.999, below, inside))
    return -probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The standard normal distribution function to 2e-4, (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2.

    The approximation is that of the paper's own code, and of those that follow it, so that losses can
    be compared. Written as a sigmoid its tails keep their digits.

    Source: Page 1977, https://doi.org/10.2307/2346872.
    """
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
