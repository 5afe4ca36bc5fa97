"""Prediction types, against diffusers and against the equations they solve."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from eclosion.diffusion.noise_schedule import Cosine, Linear, RectifiedFlow
from eclosion.diffusion.prediction import PredictionType, target, to_epsilon, to_sample
from eclosion.registry import NOISE_SCHEDULES, resolve

PREDICTION_TYPES = get_args(PredictionType)


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x_0, noise = torch.randn(2, count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x_0, noise


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_a_perfect_prediction_gives_back_the_image(name, prediction_type):
    schedule = resolve("noise_schedules", name)(num_train_timesteps=40).build()
    t = torch.arange(40)
    x_0, noise = images(40)
    x_t = schedule.add_noise(x_0, noise, t)
    back = to_sample(prediction_type, target(prediction_type, x_0, noise, t, schedule), x_t, t, schedule)
    error = (back - x_0).abs().flatten(1).amax(1)
    # Solving for x_0 divides the rounding of x_t, about 4e-7, by alpha where epsilon is predicted.
    limit = 1e-6 / schedule.alphas if prediction_type == "epsilon" else torch.full((40,), 2e-6)
    determined = schedule.alphas > 0 if prediction_type == "epsilon" else torch.ones(40, dtype=torch.bool)
    assert (error < limit)[determined].all()


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_the_noise_is_found_from_the_image(name):
    schedule = resolve("noise_schedules", name)(num_train_timesteps=40).build()
    t = torch.arange(40)
    x_0, noise = images(40)
    found = to_epsilon(x_0, schedule.add_noise(x_0, noise, t), t, schedule)
    error = (found - noise).abs().flatten(1).amax(1)
    assert (error < 1e-6 / schedule.sigmas).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [0, 300, 900])
def test_the_estimate_of_the_image_agrees_with_diffusers(prediction_type, t):
    output, x_t = images(2)
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    expected = scheduler.step(output, t, x_t).pred_original_sample
    ours = to_sample(prediction_type, output, x_t, torch.full((2,), t), Linear().build())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_velocity_agrees_with_diffusers():
    x_0, noise = images(4)
    t = torch.tensor([0, 10, 500, 999])
    expected = DDPMScheduler(beta_schedule="squaredcos_cap_v2").get_velocity(x_0, noise, t)
    torch.testing.assert_close(target("v_prediction", x_0, noise, t, Cosine().build()), expected, rtol=1e-4, atol=1e-5)


def test_the_flow_is_the_derivative_of_the_path():
    """x_t moves with s along a straight line, so its difference quotient is exact."""
    schedule = RectifiedFlow(num_train_timesteps=8).build()
    x_0, noise = images(1)
    here, there = torch.tensor([2]), torch.tensor([5])
    slope = (schedule.add_noise(x_0, noise, there) - schedule.add_noise(x_0, noise, here)) / (3 / 8)
    torch.testing.assert_close(target("flow", x_0, noise, here, schedule), slope, rtol=1e-5, atol=1e-5)


def test_velocity_is_solved_exactly_where_variance_is_not_preserved():
    schedule = RectifiedFlow(num_train_timesteps=10).build()
    t = torch.full((2,), 4)
    x_0, noise = images(2)
    v = target("v_prediction", x_0, noise, t, schedule)
    torch.testing.assert_close(to_sample("v_prediction", v, schedule.add_noise(x_0, noise, t), t, schedule), x_0)


def test_epsilon_in_pure_noise_means_no_image_and_no_infinity():
    schedule = Linear(rescale_zero_terminal_snr=True).build()
    output, x_t = images(1)
    assert torch.equal(to_sample("epsilon", output, x_t, torch.tensor([999]), schedule), torch.zeros_like(x_t))
    assert to_sample("epsilon", output, x_t, torch.tensor([998]), schedule).abs().max() > 1


def test_epsilon_in_pure_noise_has_a_finite_gradient():
    schedule = Linear(rescale_zero_terminal_snr=True).build()
    output = images(1)[0].requires_grad_()
    to_sample("epsilon", output, images(1)[1], torch.tensor([999]), schedule).sum().backward()
    assert torch.equal(output.grad, torch.zeros_like(output))
