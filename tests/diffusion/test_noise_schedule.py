"""Noise schedules, against diffusers, closed forms and published numbers."""

import math

import pydantic
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from eclosion.diffusion.noise_schedule import (
    JSD,
    Cosine,
    Linear,
    NoiseSchedule,
    Quadratic,
    RectifiedFlow,
    ScaledLinear,
    Sigmoid,
    cosine_alphas_cumprod,
    jsd_alphas_cumprod,
    linear_alphas_cumprod,
    quadratic_alphas_cumprod,
    rescale_zero_terminal_snr,
    sigmoid_alphas_cumprod,
)
from eclosion.errors import ConfigError
from eclosion.registry import NOISE_SCHEDULES, describe, resolve

RESCALABLE = [Linear, ScaledLinear, Quadratic, Sigmoid, Cosine]
# Theirs multiply 1000 float32 numbers, each wrong by up to 6e-8.
FLOAT32_PRODUCT = {"rtol": 1e-4, "atol": 1e-7}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Linear(), {"beta_schedule": "linear"}),
        (Linear(beta_start=1e-3, beta_end=0.2, num_train_timesteps=100), {"beta_schedule": "linear"}),
        (ScaledLinear(), {"beta_schedule": "scaled_linear"}),
        (Quadratic(), {"beta_schedule": "scaled_linear"}),
        (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (Cosine(num_train_timesteps=7), {"beta_schedule": "squaredcos_cap_v2"}),
        (Sigmoid(), {"beta_schedule": "sigmoid"}),
    ],
)
def test_a_schedule_agrees_with_the_one_of_diffusers(ours, theirs):
    limits = {k: getattr(ours, k) for k in ("beta_start", "beta_end") if hasattr(ours, k)}
    expected = DDPMScheduler(num_train_timesteps=ours.num_train_timesteps, **limits, **theirs).alphas_cumprod
    torch.testing.assert_close(ours.build().alphas_cumprod.float(), expected, **FLOAT32_PRODUCT)


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        (Cosine(), [0.99995869, 0.99991256, 0.84588796, 0.49228516, 0.14317864, 2.428767e-09]),
        (Linear(), [0.99989998, 0.99978012, 0.52142304, 0.07779666, 0.0033001583, 4.0358296e-05]),
        (Quadratic(), [0.99989998, 0.99979734, 0.82001024, 0.33127457, 0.038149659, 0.00073341245]),
        (Sigmoid(), [0.99985081, 0.99970102, 0.90279889, 0.29888764, 0.0056229187, 3.9681821e-05]),
        (JSD(), [0.999, 0.998, 0.749, 0.499, 0.249, 0]),
    ],
)
def test_a_schedule_has_the_numbers_of_dalle2_pytorch(schedule, published):
    abar = schedule.build().alphas_cumprod[[0, 1, 250, 500, 750, 999]]
    # The numbers were read off float32 buffers.
    torch.testing.assert_close(abar, torch.tensor(published, dtype=torch.float64), rtol=2e-6, atol=1e-12)


def test_the_cosine_schedule_is_its_closed_form_where_no_beta_is_capped():
    T, offset = 50, 0.008
    u = torch.arange(1, T, dtype=torch.float64) / T
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    expected = f / math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    torch.testing.assert_close(cosine_alphas_cumprod(T)[:-1], expected, rtol=1e-12, atol=0)


def test_the_cosine_schedule_caps_its_last_beta():
    abar = cosine_alphas_cumprod(10, max_beta=0.9)
    assert (abar[-1] / abar[-2]).item() == pytest.approx(0.1, rel=1e-12)


def test_the_linear_schedule_is_the_product_of_its_betas():
    expected = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000))
    assert Linear().build().alphas_cumprod[-1].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_agrees_with_diffusers(name):
    part = {"linear": Linear, "scaled_linear": Quadratic, "squaredcos_cap_v2": Cosine}[name]
    theirs = DDIMScheduler(
        beta_schedule=name, beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True
    ).alphas_cumprod
    ours = part(rescale_zero_terminal_snr=True).build().alphas_cumprod
    # Theirs go through betas in float32, which costs the small entries some digits.
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("part", RESCALABLE)
def test_rescaling_makes_the_last_level_pure_noise_and_keeps_the_first(part):
    plain, rescaled = part().build(), part(rescale_zero_terminal_snr=True).build()
    assert rescaled.alphas[-1] == 0
    assert rescaled.sigmas[-1] == 1
    assert rescaled.alphas[0].item() == pytest.approx(plain.alphas[0].item(), rel=1e-14)
    assert rescaled.zero_terminal_snr
    assert not plain.zero_terminal_snr


def test_rescaling_the_only_level_leaves_pure_noise():
    assert Linear(num_train_timesteps=1, rescale_zero_terminal_snr=True).build().alphas.tolist() == [0.0]


def test_rescaling_is_a_straight_line_in_the_square_root():
    abar = Linear().build().alphas_cumprod
    a, b = abar.sqrt(), rescale_zero_terminal_snr(abar).sqrt()
    slope = (b[1:] - b[:-1]) / (a[1:] - a[:-1])
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-8, atol=0)


@pytest.mark.parametrize("T", [1, 2, 3, 5, 19, 20, 1000])
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_a_schedule_of_any_length_is_finite_and_goes_from_image_to_noise(name, T):
    part = resolve("noise_schedules", name)
    schedules = [part(num_train_timesteps=T).build()]
    if part in RESCALABLE:
        schedules.append(part(num_train_timesteps=T, rescale_zero_terminal_snr=True).build())
    for schedule in schedules:
        assert isinstance(schedule, NoiseSchedule)
        assert schedule.num_train_timesteps == len(schedule.snr) == T
        assert schedule.alphas.dtype == schedule.sigmas.dtype == torch.float64
        assert (schedule.alphas >= 0).all()
        assert (schedule.alphas < 1).all()
        assert (schedule.sigmas > 0).all()
        assert (schedule.sigmas <= 1).all()
        assert (schedule.alphas.diff() < 0).all()
        assert (schedule.sigmas.diff() > 0).all()
        assert (schedule.snr.diff() < 0).all()
        assert schedule.variance_preserving == (name != "rectified_flow" or T == 1)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_log_snr_is_the_logarithm_of_snr(name):
    schedule = resolve("noise_schedules", name)(num_train_timesteps=10).build()
    torch.testing.assert_close(schedule.log_snr, schedule.snr.log(), rtol=1e-12, atol=1e-12)


def test_rectified_flow_is_a_straight_line():
    schedule = RectifiedFlow(num_train_timesteps=4).build()
    assert schedule.sigmas.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert schedule.alphas.tolist() == [0.75, 0.5, 0.25, 0.0]


def test_noise_is_added_as_diffusers_adds_it():
    x_0, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 998, 999])
    expected = DDPMScheduler(beta_schedule="linear").add_noise(x_0, noise, t)
    x_t = Linear().build().add_noise(x_0, noise, t)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-5)


def test_coefficients_are_rounded_once_from_float64():
    schedule = Cosine().build()
    alpha, sigma = schedule.gather(torch.arange(1000), 4)
    assert alpha.shape == sigma.shape == (1000, 1, 1, 1)
    assert torch.equal(alpha.flatten(), schedule.alphas.float())
    assert torch.equal(sigma.flatten(), schedule.sigmas.float())


def test_a_schedule_first_used_in_inference_mode_can_be_trained_with():
    schedule = Linear().build()
    with torch.inference_mode():
        schedule.gather(torch.zeros(1, dtype=torch.int64), 4)
    weight = torch.ones(1, 3, 2, 2, requires_grad=True)
    alpha, _ = schedule.gather(torch.zeros(1, dtype=torch.int64), 4)
    (alpha * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (Linear, {"num_train_timesteps": 0}),
        (Linear, {"beta_start": 0}),
        (Linear, {"beta_end": 1.5}),
        (Cosine, {"max_beta": 0}),
        (Cosine, {"offset": -0.1}),
        (RectifiedFlow, {"beta_start": 0.1}),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(part, options):
    with pytest.raises(pydantic.ValidationError, match=next(iter(options))):
        part(**options)


BETAS = {
    "linear": linear_alphas_cumprod,
    "quadratic": quadratic_alphas_cumprod,
    "sigmoid": sigmoid_alphas_cumprod,
}


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("T", [2, 10, 19])
def test_betas_stretched_over_too_few_levels_are_refused(T, name):
    """DALLE2-pytorch scales them by 1000 / T, and gets the root of a negative number below T = 20."""
    k = 1000 / T
    with pytest.raises(
        ConfigError, match=rf"'{name}' with num_train_timesteps={T} has a beta of .* none can be above 1"
    ):
        BETAS[name](T, beta_start=1e-4 * k, beta_end=0.02 * k)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("T", [20, 21, 100])
def test_betas_stretched_over_enough_levels_are_finite_and_fall(T, name):
    k = 1000 / T
    abar = BETAS[name](T, beta_start=1e-4 * k, beta_end=0.02 * k)
    assert abar.isfinite().all()
    assert (abar >= 0).all()
    assert (abar.diff() < 0).all()


@pytest.mark.parametrize("part", [Linear, ScaledLinear, Quadratic, Sigmoid])
def test_a_beta_above_one_is_refused_before_anything_is_built(part):
    with pytest.raises(pydantic.ValidationError, match="beta_end"):
        part(num_train_timesteps=10, beta_start=0.01, beta_end=2.0)


def test_a_level_that_would_carry_no_noise_is_refused():
    with pytest.raises(ConfigError, match=r"'linear' with num_train_timesteps=1000 has a beta of 1e-20"):
        Linear(beta_start=1e-20).build()


def test_other_tables_are_gathered_like_the_schedules_own():
    schedule = Cosine(num_train_timesteps=7).build()
    t = torch.tensor([6, 0, 3])
    made = []

    def tables():
        made.append(1)
        return torch.stack([schedule.alphas, schedule.sigmas])

    for _ in range(2):
        alpha, sigma = schedule.gather_from("both", tables, t, 4)
        assert alpha.shape == sigma.shape == (3, 1, 1, 1)
        assert torch.equal(torch.stack([alpha, sigma]), torch.stack(schedule.gather(t, 4)))
    assert made == [1]


@pytest.mark.parametrize("alphas_cumprod", [cosine_alphas_cumprod, jsd_alphas_cumprod])
def test_a_schedule_without_levels_is_refused(alphas_cumprod):
    with pytest.raises(ValueError, match="at least 1"):
        alphas_cumprod(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_adding_noise_waits_for_nothing_on_the_device():
    schedule = Linear().build()
    x_0, noise = torch.randn(2, 4, 3, 8, 8, device="cuda")
    t = torch.tensor([0, 1, 500, 999], device="cuda")
    schedule.gather(t, 4)
    try:
        torch.cuda.set_sync_debug_mode("error")
        x_t = schedule.add_noise(x_0, noise, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(x_t.cpu(), schedule.add_noise(x_0.cpu(), noise.cpu(), t.cpu()))


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_every_option_of_a_schedule_is_documented(name):
    part = resolve("noise_schedules", name)
    assert part.__doc__
    assert all(option.text for option in describe(part))
