"""The denoiser: what a network's output means, guided and clipped."""

from typing import get_args

import pytest
import torch

from eclosion.diffusion.denoiser import Denoiser, threshold
from eclosion.diffusion.noise_schedule import Linear, RectifiedFlow
from eclosion.diffusion.prediction import PredictionType, target, to_epsilon, to_sample
from eclosion.diffusion.variance import LearnedVariance
from eclosion.errors import ConfigError

SCHEDULE = Linear().build()
T = torch.tensor([10, 300])


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x_0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x_0, noise


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_perfect_network_yields_the_image(prediction_type):
    x_0, noise = images()
    answer = target(prediction_type, x_0, noise, T, SCHEDULE)
    denoise = Denoiser(net=lambda x, t: answer, schedule=SCHEDULE, prediction_type=prediction_type)
    torch.testing.assert_close(denoise(SCHEDULE.add_noise(x_0, noise, T), T), x_0, rtol=1e-5, atol=1e-5)


def test_one_level_for_all_is_handed_to_the_network_as_one_for_each():
    seen = []
    denoise = Denoiser(net=lambda x, t: seen.append(t) or x, schedule=RectifiedFlow().build(), prediction_type="sample")
    denoise(images()[0], 7)
    assert torch.equal(seen[0], torch.tensor([7, 7]))


def test_guidance_extrapolates_the_noise():
    """Guidance is defined on epsilon; it must come out the same whatever the network predicts."""
    x_t, _ = images()
    cond, uncond = images()
    expected = uncond + 3.0 * (cond - uncond)
    for prediction_type in get_args(PredictionType):
        as_output = [target(prediction_type, _image_of(eps, x_t), eps, T, SCHEDULE) for eps in (cond, uncond)]
        denoise = Denoiser(
            net=lambda x, t, out=as_output: out[0],
            uncond=lambda x, t, out=as_output: out[1],
            schedule=SCHEDULE,
            prediction_type=prediction_type,
            guidance_scale=3.0,
        )
        eps = to_epsilon(denoise(x_t, T), x_t, T, SCHEDULE)
        torch.testing.assert_close(eps, expected, rtol=1e-3, atol=1e-3)  # divided by sigma = 0.04


def _image_of(eps: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = SCHEDULE.gather(T, 4)
    return (x_t - sigma * eps) / alpha


@pytest.mark.parametrize(("scale", "calls"), [(1.0, ["net"]), (2.0, ["net", "uncond"]), (0.0, ["net", "uncond"])])
def test_guidance_costs_a_second_call_only_when_it_is_on(scale, calls):
    made = []

    def network(name):
        return lambda x, t: made.append(name) or x

    denoise = Denoiser(
        net=network("net"), uncond=network("uncond"), schedule=SCHEDULE, prediction_type="sample", guidance_scale=scale
    )
    denoise(images()[0], 0)
    assert made == calls


def test_guidance_without_a_condition_is_refused():
    with pytest.raises(ConfigError, match=r"guidance_scale is 3, and this network has no condition"):
        Denoiser(net=lambda x, t: x, schedule=SCHEDULE, prediction_type="sample", guidance_scale=3.0)


def test_an_impossible_quantile_is_refused():
    with pytest.raises(ConfigError, match=r"dynamic_threshold is 95"):
        Denoiser(net=lambda x, t: x, schedule=SCHEDULE, prediction_type="sample", dynamic_threshold=95)


def test_estimates_are_clipped_only_when_asked():
    x = 3 * images()[0]
    plain = Denoiser(net=lambda x, t: x, schedule=SCHEDULE, prediction_type="sample")
    clipped = Denoiser(net=lambda x, t: x, schedule=SCHEDULE, prediction_type="sample", clip_sample=True)
    assert torch.equal(plain(x, 0), x)
    assert torch.equal(clipped(x, 0), x.clamp(-1, 1))


def test_dynamic_thresholding_scales_each_image_by_its_own_quantile():
    x = torch.linspace(-2, 2, 401).expand(1, 1, 1, 401)
    x_0 = torch.cat([x, x / 4])
    out = threshold(x_0, 0.9)
    # |x| is spread evenly over [0, 2], so its 90 % quantile is 1.8; the second image is within [-1, 1].
    torch.testing.assert_close(out[0], (x[0] / 1.8).clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[1], x[0] / 4)


def test_dynamic_thresholding_takes_the_place_of_clipping():
    x = 3 * images()[0]
    both = Denoiser(
        net=lambda x, t: x, schedule=SCHEDULE, prediction_type="sample", clip_sample=True, dynamic_threshold=0.5
    )
    assert torch.equal(both(x, 0), threshold(x, 0.5))


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_the_network_runs_under_autocast_and_the_estimate_is_float32(prediction_type):
    conv = torch.nn.Conv2d(3, 3, 1)
    seen = []

    def net(x, t):
        seen.append(conv(x))
        return seen[-1]

    denoise = Denoiser(net=net, schedule=SCHEDULE, prediction_type=prediction_type)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = denoise(images()[0], 500)
    assert seen[0].dtype == torch.bfloat16
    assert out.dtype == torch.float32


# ------------------------------------------------------------------ learned variance


def two_halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs with and without a condition, [2, 6, 4, 4] each."""
    a, b = torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    return a, b


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_learned_variance_does_not_change_the_image(prediction_type):
    x_t, output = images()[0], two_halves()[0]
    plain = Denoiser(net=lambda x, t: output[:, :3], schedule=SCHEDULE, prediction_type=prediction_type)
    learned = Denoiser(
        net=lambda x, t: output,
        schedule=SCHEDULE,
        prediction_type=prediction_type,
        learned_variance=LearnedVariance(),
    )
    estimate = learned.estimate(x_t, T)
    assert torch.equal(estimate.x_0, plain(x_t, T))
    assert torch.equal(learned(x_t, T), plain(x_t, T))
    torch.testing.assert_close(estimate.fraction, (output[:, 3:] + 1) / 2)
    assert plain.estimate(x_t, T).fraction is None


def test_guidance_leaves_the_variance_to_the_condition():
    """DALLE2-pytorch guides all channels, so that a guided image is noised by a variance that nobody learned."""
    x_t, (cond, uncond) = images()[0], two_halves()
    guided = Denoiser(
        net=lambda x, t: cond,
        uncond=lambda x, t: uncond,
        schedule=SCHEDULE,
        prediction_type="epsilon",
        guidance_scale=7.0,
        learned_variance=LearnedVariance(constrain_fraction=True),
    )
    estimate = guided.estimate(x_t, T)
    assert torch.equal(estimate.fraction, torch.sigmoid((cond[:, 3:] + 1) / 2))
    eps = uncond[:, :3] + 7.0 * (cond[:, :3] - uncond[:, :3])
    torch.testing.assert_close(estimate.x_0, to_sample("epsilon", eps, x_t, T, SCHEDULE))


def test_guidance_dynamic_thresholding_and_a_learned_variance_go_together():
    """By hand: guide the first three channels, solve for x_0, clamp each image at its own quantile."""
    x_t, (cond, uncond) = images()[0], two_halves()
    denoise = Denoiser(
        net=lambda x, t: cond,
        uncond=lambda x, t: uncond,
        schedule=SCHEDULE,
        prediction_type="v_prediction",
        guidance_scale=8.0,
        clip_sample=True,
        dynamic_threshold=0.8,
        learned_variance=LearnedVariance(),
    )
    estimate = denoise.estimate(x_t, T)
    for i, t in enumerate(T.tolist()):
        alpha, sigma = SCHEDULE.alphas[t], SCHEDULE.sigmas[t]
        v = uncond[i, :3].double() + 8 * (cond[i, :3].double() - uncond[i, :3].double())
        x_0 = alpha * x_t[i].double() - sigma * v
        s = max(1.0, torch.quantile(x_0.abs().flatten(), 0.8).item())
        assert s > 1.5  # or the test would say nothing
        torch.testing.assert_close(estimate.x_0[i].double(), x_0.clamp(-s, s) / s, rtol=1e-4, atol=1e-5)
    assert torch.equal(estimate.fraction, (cond[:, 3:] + 1) / 2)


def test_under_autocast_the_fraction_is_float32():
    conv = torch.nn.Conv2d(3, 6, 1)
    denoise = Denoiser(
        net=lambda x, t: conv(x), schedule=SCHEDULE, prediction_type="epsilon", learned_variance=LearnedVariance()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate = denoise.estimate(images()[0], 500)
    assert estimate.fraction.dtype == estimate.x_0.dtype == torch.float32


def test_a_network_without_room_for_a_variance_is_noticed():
    denoise = Denoiser(
        net=lambda x, t: x, schedule=SCHEDULE, prediction_type="epsilon", learned_variance=LearnedVariance()
    )
    with pytest.raises(AssertionError):
        denoise(images()[0], 5)


# ------------------------------------------------------------------ self-conditioning


def test_both_networks_see_the_earlier_estimate_or_zeros():
    seen = []

    def network(x, t, previous):
        seen.append(previous)
        return x

    denoise = Denoiser(
        net=network,
        uncond=network,
        schedule=SCHEDULE,
        prediction_type="sample",
        guidance_scale=2.0,
        self_conditioned=True,
    )
    x_t, earlier = images()
    denoise.estimate(x_t, 5)
    denoise.estimate(x_t, 5, earlier)
    assert torch.equal(torch.stack(seen[:2]), torch.zeros(2, *x_t.shape))
    assert torch.equal(torch.stack(seen[2:]), torch.stack([earlier, earlier]))


def test_a_network_without_self_conditioning_is_not_told_of_the_earlier_estimate():
    x_t, earlier = images()
    denoise = Denoiser(net=lambda x, t: x, schedule=SCHEDULE, prediction_type="sample")
    assert torch.equal(denoise.estimate(x_t, 5, earlier).x_0, x_t)
