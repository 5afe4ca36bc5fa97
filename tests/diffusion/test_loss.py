"""The loss and its draws, against independent formulas and distributions."""

from statistics import NormalDist
from typing import get_args

import numpy as np
import pydantic
import pytest
import torch

from eclosion.diffusion.loss import Loss, draw_noise, draw_timesteps, min_snr_weight, p2_weight
from eclosion.diffusion.noise_schedule import JSD, Cosine, Linear
from eclosion.diffusion.prediction import PredictionType, target, to_sample
from eclosion.registry import NOISE_SCHEDULES, describe, resolve
from eclosion.rng import generator

PREDICTION_TYPES = get_args(PredictionType)


def rngs(count: int, *position: str | int) -> list[np.random.Generator]:
    return [generator(0, "loss", *position, i) for i in range(count)]


def two(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = 2 * torch.randn(2, count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return a, b


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("l1", np.abs),
        ("l2", np.square),
        ("huber", lambda e: np.where(np.abs(e) <= 0.5, e**2 / 2, 0.5 * (np.abs(e) - 0.25))),
    ],
)
def test_each_image_has_the_mean_distance_of_its_own_pixels(kind, formula):
    a, b = two(5)
    t = torch.arange(5)
    losses = Loss(kind=kind, huber_delta=0.5).per_image(a, b, t, Linear().build(), "epsilon")
    expected = formula(a.double().numpy() - b.double().numpy()).mean(axis=(1, 2, 3))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)


def test_a_prediction_of_half_precision_is_compared_in_float32():
    a, b = two(2)
    t = torch.zeros(2, dtype=torch.int64)
    losses = Loss().per_image(a.bfloat16(), b, t, Linear().build(), "epsilon")
    assert losses.dtype == torch.float32
    expected = (a.bfloat16().double() - b.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_min_snr_weights_are_those_of_the_paper(name, gamma):
    schedule = resolve("noise_schedules", name)(num_train_timesteps=200).build()
    snr = schedule.snr[schedule.snr > 0]
    t = torch.arange(len(snr))
    expected = {
        "epsilon": snr.clamp(max=gamma) / snr,
        "sample": snr.clamp(max=gamma),
        "flow": snr.clamp(max=gamma) / (snr.sqrt() + 1) ** 2,
    }
    if schedule.variance_preserving:
        expected["v_prediction"] = snr.clamp(max=gamma) / (snr + 1)
    for prediction_type, weight in expected.items():
        ours = min_snr_weight(t, schedule, prediction_type, gamma=gamma)
        torch.testing.assert_close(ours, weight.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["linear", "cosine", "rectified_flow"])
def test_min_snr_counts_the_error_of_the_image_whatever_is_predicted(name, prediction_type):
    """One error of x_0 must cost the same, min(snr, gamma) times its square, in every prediction type."""
    schedule = resolve("noise_schedules", name)(num_train_timesteps=20).build()
    t = torch.arange(19)  # the last level may be noise alone, where epsilon says nothing of x_0
    x_0, noise = (x.double() for x in two(19))
    alpha, sigma = schedule.alphas[:19].view(-1, 1, 1, 1), schedule.sigmas[:19].view(-1, 1, 1, 1)
    x_t = alpha * x_0 + sigma * noise
    wanted = target(prediction_type, x_0, noise, t, schedule)
    output = wanted + 0.1 * torch.randn(19, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    error = to_sample(prediction_type, output, x_t, t, schedule) - x_0
    expected = schedule.snr[:19].clamp(max=5) * error.square().flatten(1).mean(1)
    losses = Loss(weighting="min_snr").per_image(output, wanted, t, schedule, prediction_type)
    # x_t and its coefficients are rounded to float32, and the error of x_0 shows it divided by alpha.
    torch.testing.assert_close(losses.double(), expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "p2"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", [JSD(num_train_timesteps=3), Linear(rescale_zero_terminal_snr=True)])
def test_pure_noise_costs_a_finite_loss_and_gradient(schedule, prediction_type, weighting):
    levels = schedule.build()
    t = torch.full((2,), schedule.num_train_timesteps - 1)
    prediction, wanted = two(2)
    prediction.requires_grad_()
    losses = Loss(weighting=weighting).per_image(prediction, wanted, t, levels, prediction_type)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(prediction.grad).all()


def test_the_weight_of_pure_noise_is_the_limit_of_the_levels_before_it():
    schedule = Linear(rescale_zero_terminal_snr=True).build()
    t = torch.tensor([999])
    weights = {p: min_snr_weight(t, schedule, p).item() for p in PREDICTION_TYPES}
    assert weights == {"epsilon": 1.0, "sample": 0.0, "v_prediction": 0.0, "flow": 0.0}


def test_p2_weights_are_those_of_dalle2_pytorch():
    weights = p2_weight(torch.tensor([0, 500, 999]), Cosine().build())
    torch.testing.assert_close(weights, torch.tensor([4.1284e-05, 0.50771, 1.0]), rtol=5e-5, atol=0)


def test_p2_multiplies_the_loss():
    a, b = two(3)
    t = torch.tensor([0, 500, 999])
    schedule = Cosine().build()
    plain = Loss().per_image(a, b, t, schedule, "sample")
    weighted = Loss(weighting="p2", p2_gamma=0.5, p2_k=2.0).per_image(a, b, t, schedule, "sample")
    expected = plain.double() * (2.0 + schedule.snr[t]) ** -0.5
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_draws_of_an_image_do_not_depend_on_its_batch(sampling):
    loss = Loss(timestep_sampling=sampling, offset_noise=0.1)
    together = rngs(4)
    t = draw_timesteps(loss, together, 1000)
    noise = draw_noise(loss, together, (3, 4, 4))
    for i in (3, 0, 2):
        alone = rngs(4)[i : i + 1]
        assert torch.equal(draw_timesteps(loss, alone, 1000), t[i : i + 1])
        assert torch.equal(draw_noise(loss, alone, (3, 4, 4)), noise[i : i + 1])


def test_an_image_draws_its_timestep_then_its_noise_then_its_offset():
    loss = Loss(offset_noise=0.1)
    rng, same = rngs(1)[0], rngs(1)[0]
    t = draw_timesteps(loss, [rng], 1000)
    noise = draw_noise(loss, [rng], (3, 4, 4))
    assert t.item() == same.integers(0, 1000)
    pixels = same.standard_normal((3, 4, 4), dtype=np.float32)
    offset = same.standard_normal((3, 1, 1), dtype=np.float32)
    np.testing.assert_allclose(noise[0].numpy(), pixels + 0.1 * offset, rtol=1e-6, atol=1e-7)


def test_timesteps_are_uniform_over_all_levels():
    t = draw_timesteps(Loss(), rngs(20000), 10)
    assert t.dtype == torch.int64
    share = torch.bincount(t, minlength=10) / len(t)
    # Each share has a standard deviation of 0.002.
    torch.testing.assert_close(share, torch.full((10,), 0.1), rtol=0, atol=0.01)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
def test_logit_normal_timesteps_have_normal_logits(mean, std):
    T, count = 1000, 20000
    loss = Loss(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    t = draw_timesteps(loss, rngs(count), T).numpy()
    for quantile in (0.1, 0.5, 0.9):
        logit = NormalDist(mean, std).inv_cdf(quantile)
        expected = T / (1 + np.exp(-logit))
        # A share has a standard deviation of at most 0.0035.
        assert (t < expected).mean() == pytest.approx(quantile, abs=0.015)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_single_level_is_always_drawn(sampling):
    loss = Loss(timestep_sampling=sampling, logit_mean=50.0)
    assert draw_timesteps(loss, rngs(5), 1).tolist() == [0] * 5


def test_a_logit_far_out_draws_the_last_level():
    loss = Loss(timestep_sampling="logit_normal", logit_mean=100.0)
    assert draw_timesteps(loss, rngs(3), 1000).tolist() == [999] * 3


def test_offset_noise_shifts_channels_with_its_standard_deviation():
    noise = draw_noise(Loss(offset_noise=0.5), rngs(4000), (2, 4, 4))
    assert noise.dtype == torch.float32
    means = noise.mean((2, 3))
    # Variance of a channel's mean: 1/16 of the noise, and 0.25 of the offset; known to 1.6 %.
    assert means.var().item() == pytest.approx(1 / 16 + 0.25, rel=0.06)
    # The two channels have offsets of their own.
    assert abs(torch.corrcoef(means.T)[0, 1].item()) < 0.06
    # Inside a channel it is standard normal as before.
    assert (noise - means[:, :, None, None]).var().item() == pytest.approx(15 / 16, rel=0.03)


def test_without_offset_noise_nothing_more_is_drawn():
    rng, same = rngs(1)[0], rngs(1)[0]
    draw_noise(Loss(), [rng], (3, 4, 4))
    same.standard_normal((3, 4, 4), dtype=np.float32)
    assert rng.random() == same.random()


@pytest.mark.parametrize(
    "options", [{"kind": "l3"}, {"huber_delta": 0}, {"p2_k": 0}, {"offset_noise": -1}, {"gama": 1}]
)
def test_a_loss_that_makes_no_sense_is_refused(options):
    with pytest.raises(pydantic.ValidationError, match=next(iter(options))):
        Loss(**options)


def test_every_option_of_the_loss_is_documented():
    assert all(option.text for option in describe(Loss))
