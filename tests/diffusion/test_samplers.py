"""Samplers, against diffusers' schedulers, and against data whose exact denoiser is known."""

import math
from dataclasses import fields
from itertools import pairwise

import diffusers
import pydantic
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from eclosion.diffusion.denoiser import Denoiser
from eclosion.diffusion.noise_schedule import JSD, Cosine, Linear, NoiseSchedule, RectifiedFlow
from eclosion.diffusion.samplers import DDIM, DDPM, DPMSolver, Euler, Heun, levels
from eclosion.diffusion.variance import LearnedVariance, posterior
from eclosion.errors import ConfigError
from eclosion.registry import NOISE_SCHEDULES, SAMPLERS, describe, resolve
from eclosion.rng import generator, randn

SPACINGS = ["trailing", "linspace", "leading"]
DETERMINISTIC = [DDIM, Euler, Heun, DPMSolver]
# diffusers hands tensors to numpy in a way that numpy 2 is going to refuse.
THEIR_WARNING = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
# Both sides round to float32 in each step, and theirs computes its coefficients in float32 as well.
FLOAT32_STEPS = {"rtol": 1e-3, "atol": 1e-4}


def rngs(count: int, *position: str | int) -> list:
    return [generator(0, "sample", *position, i) for i in range(count)]


def noise(count: int = 2) -> torch.Tensor:
    return randn(rngs(count, "start"), (3, 4, 4))


def crooked(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth network without any symmetry that could hide a mistake."""
    s = (t.view(-1, 1, 1, 1) + 1) / 1000
    return torch.tanh(0.8 * x + s - 0.3) * (1.1 - 0.4 * s) + 0.1 * x.mean((2, 3), keepdim=True)


def denoiser(schedule: NoiseSchedule, prediction_type: str = "epsilon", **options) -> Denoiser:
    return Denoiser(net=crooked, schedule=schedule, prediction_type=prediction_type, **options)


def run_diffusers(scheduler, x: torch.Tensor, n: int) -> torch.Tensor:
    scheduler.set_timesteps(n)
    return follow_diffusers(scheduler, x)


def follow_diffusers(scheduler, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        output = crooked(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)))
        x = scheduler.step(output, t, x).prev_sample
    return x


# ------------------------------------------------------------------ against diffusers


@pytest.mark.parametrize("n", [2, 3, 7, 20, 50, 333, 999, 1000])  # with one, their linspace starts at t = 0
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_visited_levels_are_those_of_diffusers(spacing, n):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    path = levels(Linear().build(), n, spacing)
    assert [level.t for level in path] == [*scheduler.timesteps.tolist(), -1]


@pytest.mark.parametrize("T", [1, 2, 3, 5, 10, 64, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_visited_levels_fall_strictly_and_end_clean(spacing, T):
    schedule = Linear(num_train_timesteps=T).build()
    for n in range(1, min(T, 100) + 1):
        path = levels(schedule, n, spacing)
        assert len(path) == n + 1
        assert all(now.t > then.t for now, then in pairwise(path))
        assert (path[-1].alpha, path[-1].sigma) == (1.0, 0.0)
        assert spacing == "leading" or path[0].t == T - 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("n", [50, 1000])
def test_ddpm_agrees_with_diffusers_draw_for_draw(n, prediction_type, monkeypatch):
    """Their variance type fixed_small is our posterior variance."""
    theirs_rngs = rngs(2, "z")
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: randn(theirs_rngs, shape[1:]))
    scheduler = diffusers.DDPMScheduler(
        variance_type="fixed_small", prediction_type=prediction_type, clip_sample=True, timestep_spacing="trailing"
    )
    expected = run_diffusers(scheduler, noise(), n)
    sampler = DDPM(num_inference_steps=n)
    ours = sampler(denoiser(Linear().build(), prediction_type, clip_sample=True), noise(), rngs(2, "z"))
    torch.testing.assert_close(ours, expected, **FLOAT32_STEPS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_agrees_with_diffusers_draw_for_draw(clip, eta, prediction_type):
    """Theirs takes the noise from the clipped image only when asked to."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", prediction_type=prediction_type, clip_sample=clip, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(50)
    theirs_rngs, x = rngs(2, "z"), noise()
    for t in scheduler.timesteps:
        output = crooked(x, torch.full((2,), float(t)))
        z = randn(theirs_rngs, x.shape[1:])
        step = scheduler.step(output, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z)
        x = step.prev_sample
    ours = DDIM(eta=eta)(denoiser(Linear().build(), prediction_type, clip_sample=clip), noise(), rngs(2, "z"))
    torch.testing.assert_close(ours, x, **FLOAT32_STEPS)


def crooked_with_variance(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A prediction, and variances on both sides of their limits."""
    return torch.cat([crooked(x, t), 1.5 * torch.cos(3 * x + 0.01 * t.view(-1, 1, 1, 1))], dim=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("n", [3, 50, 1000])
def test_ddpm_with_a_learned_variance_agrees_with_diffusers_draw_for_draw(n, prediction_type, monkeypatch):
    """Also in fewer steps than levels, where both limits of the variance are those of the longer step.

    Theirs adds noise in the last step too unless that starts at t = 0, so there their image is taken before it.
    """
    theirs_rngs, x = rngs(2, "z"), noise()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: randn(theirs_rngs, shape[1:]))
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range", prediction_type=prediction_type, clip_sample=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        step = scheduler.step(crooked_with_variance(x, torch.full((2,), float(t))), t, x)
        x = step.prev_sample
    x = step.pred_original_sample
    denoise = Denoiser(
        net=crooked_with_variance,
        schedule=Linear().build(),
        prediction_type=prediction_type,
        clip_sample=True,
        learned_variance=LearnedVariance(),
    )
    ours = DDPM(num_inference_steps=n)(denoise, noise(), rngs(2, "z"))
    torch.testing.assert_close(ours, x, **FLOAT32_STEPS)


def test_ddim_from_pure_noise_agrees_with_diffusers():
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    expected = run_diffusers(scheduler, noise(), 20)
    schedule = Linear(rescale_zero_terminal_snr=True).build()
    ours = DDIM(num_inference_steps=20)(denoiser(schedule, "v_prediction"), noise(), rngs(2))
    torch.testing.assert_close(ours, expected, **FLOAT32_STEPS)


@THEIR_WARNING
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 5, 20, 50])
def test_dpm_solver_agrees_with_diffusers(n, spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        timestep_spacing=spacing,
    )
    # It has spacings of its own, and takes ours.
    scheduler.set_timesteps(timesteps=[level.t for level in levels(Linear().build(), n, spacing)[:-1]])
    expected = follow_diffusers(scheduler, noise())
    ours = DPMSolver(num_inference_steps=n, timestep_spacing=spacing)(denoiser(Linear().build()), noise(), rngs(2))
    torch.testing.assert_close(ours, expected, **FLOAT32_STEPS)


@THEIR_WARNING
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_euler_agrees_with_diffusers(schedule):
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule=schedule, timestep_spacing="trailing")
    ours = {"linear": Linear(), "squaredcos_cap_v2": Cosine()}[schedule].build()
    # Theirs starts from x / alpha. With the cosine schedule that is 20 000 times the noise in float32.
    x = noise() / ours.alphas[-1].item()
    tolerance = FLOAT32_STEPS if schedule == "linear" else {"rtol": 1e-2, "atol": 1e-2}
    expected = run_diffusers(scheduler, x, 30)
    torch.testing.assert_close(Euler(num_inference_steps=30)(denoiser(ours), noise(), rngs(2)), expected, **tolerance)


@THEIR_WARNING
@pytest.mark.parametrize("n", [5, 20])
def test_heun_agrees_with_diffusers(n):
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"
    )
    schedule = Linear().build()
    expected = run_diffusers(scheduler, noise() / schedule.alphas[-1].item(), n)
    ours = Heun(num_inference_steps=n)(denoiser(schedule), noise(), rngs(2))
    torch.testing.assert_close(ours, expected, **FLOAT32_STEPS)


def test_euler_along_a_rectified_flow_agrees_with_diffusers():
    n = 28  # 27 divides 999, so that their levels are ours without rounding
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(n)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(crooked(x, torch.full((2,), float(t) - 1)), t, x).prev_sample
    sampler = Euler(num_inference_steps=n, timestep_spacing="linspace")
    ours = sampler(denoiser(RectifiedFlow().build(), "flow"), noise(), rngs(2))
    torch.testing.assert_close(ours, x, **FLOAT32_STEPS)


# ------------------------------------------------------------------ against closed forms

MEAN, STD = 0.4, 0.25


def exact_for_gaussian(schedule: NoiseSchedule) -> Denoiser:
    """E[x_0 | x_t] for images whose pixels are independently normal."""

    def net(x, t):
        alpha, sigma = (c.double() for c in schedule.gather(t, 4))
        share = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + share * (x.double() - alpha * MEAN)

    return Denoiser(net=net, schedule=schedule, prediction_type="sample")


def exact_flow(schedule: NoiseSchedule, x: torch.Tensor, end: tuple[float, float] = (1.0, 0.0)) -> torch.Tensor:
    """Where the probability flow takes x: it keeps how many standard deviations each pixel is off."""
    (alpha, sigma), (alpha_end, sigma_end) = (schedule.alphas[-1].item(), schedule.sigmas[-1].item()), end
    off = (x.double() - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    return alpha_end * MEAN + math.hypot(alpha_end * STD, sigma_end) * off


def flow_error(sampler, schedule: NoiseSchedule) -> float:
    x = noise(4)
    return (sampler(exact_for_gaussian(schedule), x, rngs(4)) - exact_flow(schedule, x)).abs().max().item()


@pytest.mark.parametrize("part", DETERMINISTIC)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Cosine(rescale_zero_terminal_snr=True), RectifiedFlow()])
def test_deterministic_samplers_follow_the_exact_probability_flow(part, schedule):
    # What is left is the last step, from t = 0 to the clean image, and rounding.
    limit = 0.01 if part in (DDIM, Euler) else 1e-3
    assert flow_error(part(num_inference_steps=1000), schedule.build()) < limit


@pytest.mark.parametrize(
    ("part", "order"), [(DDIM, 1), (Euler, 1), (Heun, 2), (DPMSolver, 2)], ids=lambda p: getattr(p, "__name__", p)
)
def test_the_error_falls_with_the_order_of_the_sampler(part, order):
    """Twice as many steps leave half the error of first order, and a quarter of second order.

    The levels are even in log SNR, so that all steps shrink alike. The step from t = 0 to the clean
    image is the same for any number of steps, and its exact result is known too.
    """
    log_snr = torch.linspace(8, -8, 961, dtype=torch.float64)
    schedule = NoiseSchedule(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())
    denoise, x = exact_for_gaussian(schedule), noise(4)
    at_t_0 = exact_flow(schedule, x, (schedule.alphas[0].item(), schedule.sigmas[0].item()))
    exact = denoise(at_t_0, 0)
    errors = [
        (part(num_inference_steps=n + 1, timestep_spacing="linspace")(denoise, x, rngs(4)) - exact).abs().max().item()
        for n in (30, 60, 120)
    ]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert measured == pytest.approx([order, order], abs=0.15)


@pytest.mark.parametrize(
    "sampler",
    [DDPM(), DDIM(num_inference_steps=1000, eta=1), DDIM(num_inference_steps=1000, eta=0.5)],
    ids=["ddpm", "eta=1", "eta=0.5"],
)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), RectifiedFlow()])
def test_stochastic_samplers_reach_the_mean_and_variance_of_the_data(sampler, schedule):
    x = randn(rngs(8, "many"), (3, 32, 32))
    images = sampler(exact_for_gaussian(schedule.build()), x, rngs(8, "z")).double()
    # 24 576 values know the mean to 0.0016 and the standard deviation to 0.5 %; 1000 steps add about as much.
    assert images.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert images.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("schedule", [Linear(num_train_timesteps=50), Cosine(num_train_timesteps=50), JSD()])
def test_ddpm_has_the_mean_and_variance_that_the_paper_predicts(schedule):
    """Ho et al. 2020, equation 7, followed for two moments instead of for pixels, with betas."""
    levels_ = schedule.build()
    abar = [1.0, *levels_.alphas_cumprod.tolist()]
    mean, variance = 0.0, 1.0
    for now, before in zip(abar[:0:-1], abar[-2::-1], strict=True):
        beta = 1 - now / before
        share = (
            math.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)
        )  # E[x_0 | x_t] = MEAN + share (x_t - sqrt(abar) MEAN)
        to_x_0 = math.sqrt(before) * beta / (1 - now)
        to_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - now)
        mean = to_x_0 * (MEAN + share * (mean - math.sqrt(now) * MEAN)) + to_x_t * mean
        variance = (to_x_0 * share + to_x_t) ** 2 * variance + beta * (1 - before) / (1 - now)
    images = DDPM()(exact_for_gaussian(levels_), randn(rngs(8, "many"), (3, 32, 32)), rngs(8, "z")).double()
    # 24 576 values: standard deviations of 0.0016 and 0.5 %.
    assert images.mean().item() == pytest.approx(mean, abs=0.005)
    assert images.std().item() == pytest.approx(math.sqrt(variance), rel=0.015)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 4, 50])
def test_ddim_takes_normal_images_exactly_where_its_equation_says(n, eta, spacing):
    """Song et al. 2020, equation 12, followed in float64 with the exact noise of normal images, draw for draw."""
    schedule, x = Linear().build(), noise(4)
    ours = DDIM(num_inference_steps=n, eta=eta, timestep_spacing=spacing)(exact_for_gaussian(schedule), x, rngs(4, "z"))
    z_rngs, x = rngs(4, "z"), x.double()
    path = [level.t for level in levels(schedule, n, spacing)]
    assert spacing == "leading" or path[0] == 999
    assert path[-1] == -1
    for t, s in pairwise(path):
        abar_t, abar_s = schedule.alphas_cumprod[t].item(), schedule.alphas_cumprod[s].item() if s >= 0 else 1.0
        # d log p / dx of a normal density is -(x - mean) / variance, and the noise is that times -sigma.
        eps = math.sqrt(1 - abar_t) * (x - math.sqrt(abar_t) * MEAN) / (abar_t * STD**2 + 1 - abar_t)
        std = eta * math.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
        image = (x - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        x = math.sqrt(abar_s) * image + math.sqrt(1 - abar_s - std**2) * eps
        if std > 0:
            x = x + std * randn(z_rngs, x.shape[1:])
    # Without any noise left; x in float32 loses 6e-8 in each step.
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [Linear(rescale_zero_terminal_snr=True), RectifiedFlow()])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_with_the_true_variance_few_steps_of_ddpm_are_exact_for_normal_images(n, schedule):
    """Looking back, x_s given x_t is normal for normal images, so DDPM with its mean and variance errs nowhere.

    What is missing is the variance of the last step, in which nothing is drawn. The variance
    of the posterior alone leaves too little.
    """
    levels_ = schedule.build()
    path = levels(levels_, n, "trailing")
    exact = exact_for_gaussian(levels_)

    def spread(level):
        """Variance of x_0 given x_t."""
        return STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)

    fractions = {}
    for now, then in list(pairwise(path))[:-1]:
        step = posterior(now, then)
        low, high = step.log_range
        fractions[now.t] = (math.log(step.std**2 + step.from_x_0**2 * spread(now)) - low) / (high - low)
        assert 0 < fractions[now.t] < 1

    def net(x, t):
        v = torch.full_like(x, 2 * fractions.get(int(t[0]), 0.5) - 1)
        return torch.cat([exact.net(x, t), v.double()], 1)

    denoise = Denoiser(net=net, schedule=levels_, prediction_type="sample", learned_variance=LearnedVariance())
    images = DDPM(num_inference_steps=n)(denoise, randn(rngs(8, "many"), (3, 32, 32)), rngs(8, "z")).double()
    # 24 576 values: standard deviations of 0.0016 and 0.5 %.
    assert images.mean().item() == pytest.approx(MEAN, abs=0.006)
    assert images.var().item() == pytest.approx(STD**2 - spread(path[-2]), rel=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_one_known_image_is_found_exactly_in_any_number_of_steps(T, schedule, name):
    known = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    levels_ = resolve("noise_schedules", schedule)(num_train_timesteps=T).build()
    denoise = Denoiser(net=lambda x, t: known.expand_as(x), schedule=levels_, prediction_type="sample")
    for n in range(1, T + 1):
        for spacing in SPACINGS:
            sampler = resolve("samplers", name)(num_inference_steps=n, timestep_spacing=spacing)
            torch.testing.assert_close(sampler(denoise, noise(1), rngs(1)), known, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [*NOISE_SCHEDULES, "rescaled", "steep"])
def test_every_sampler_is_finite_on_every_schedule(schedule, name, prediction_type):
    unusual = {
        "rescaled": Linear(rescale_zero_terminal_snr=True, num_train_timesteps=100),
        # Signal far below the smallest float32 for most of the way, and then exactly 0.
        "steep": Linear(beta_start=0.2, beta_end=1.0, num_train_timesteps=2000),
    }
    part = unusual.get(schedule) or resolve("noise_schedules", schedule)(num_train_timesteps=100)
    denoise = denoiser(part.build(), prediction_type, clip_sample=True)
    out = resolve("samplers", name)(num_inference_steps=12)(denoise, noise(), rngs(2))
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 1


def test_ddpm_visits_all_levels_unless_told_otherwise():
    calls = []
    schedule = Cosine(num_train_timesteps=37).build()
    DDPM()(denoiser(schedule), noise(), rngs(2), on_step=lambda i, n: calls.append((i, n)))
    assert calls == [(i, 37) for i in range(37)]


def test_ddim_with_full_noise_is_ddpm():
    denoise = denoiser(Linear().build(), "v_prediction")
    a = DDIM(num_inference_steps=40, eta=1)(denoise, noise(), rngs(2, "z"))
    b = DDPM(num_inference_steps=40)(denoise, noise(), rngs(2, "z"))
    assert torch.equal(a, b)


def test_heun_is_not_wrecked_by_the_first_step_out_of_pure_noise():
    """Corrected like the others, that step would leave errors of 9 at 5 steps; DDIM leaves less than 0.1."""
    for schedule in (Cosine(), Cosine(rescale_zero_terminal_snr=True), RectifiedFlow()):
        heun = flow_error(Heun(num_inference_steps=5), schedule.build())
        assert heun < flow_error(DDIM(num_inference_steps=5), schedule.build())


# ------------------------------------------------------------------ what every sampler promises


def every_sampler(n: int = 10) -> list:
    return [resolve("samplers", name)(num_inference_steps=n) for name in SAMPLERS] + [
        DDIM(num_inference_steps=n, eta=1)
    ]


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(sampler):
    denoise = denoiser(Linear().build(), "v_prediction")
    together = sampler(denoise, noise(4), rngs(4, "z"))
    for i in range(4):
        alone = sampler(denoise, noise(4)[i : i + 1], rngs(4, "z")[i : i + 1])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_only_fresh_noise_is_drawn_and_none_for_the_last_step(sampler):
    stochastic = isinstance(sampler, DDPM) or getattr(sampler, "eta", 0) > 0
    used, same = rngs(2, "z"), rngs(2, "z")
    sampler(denoiser(Linear().build(), "v_prediction"), noise(), used)
    randn(same, (9 if stochastic else 0, 3, 4, 4))
    assert [rng.random() for rng in used] == [rng.random() for rng in same]


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_sampling_twice_gives_the_same_bits_and_leaves_the_noise_alone(sampler):
    denoise, x = denoiser(Cosine().build(), "v_prediction"), noise()
    first = sampler(denoise, x, rngs(2, "z"))
    assert torch.equal(first, sampler(denoise, x, rngs(2, "z")))
    assert torch.equal(x, noise())


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), RectifiedFlow()])
@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_every_network_call_is_announced_before_it_is_made(sampler, schedule):
    events = []
    denoise = Denoiser(
        net=lambda x, t: events.append("net") or x, schedule=schedule.build(), prediction_type="v_prediction"
    )
    sampler(denoise, noise(), rngs(2), on_step=lambda i, n: events.append((i, n)))
    n = events[0][1]
    assert events == [event for i in range(n) for event in ((i, n), "net")]


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_on_step_can_interrupt(sampler):
    def stop(i, n):
        if i == 3:
            raise KeyboardInterrupt

    calls = []
    denoise = Denoiser(net=lambda x, t: calls.append(t) or x, schedule=Linear().build(), prediction_type="v_prediction")
    with pytest.raises(KeyboardInterrupt):
        sampler(denoise, noise(), rngs(2), on_step=stop)
    assert len(calls) == 3


@pytest.mark.parametrize("sampler", every_sampler(11), ids=repr)
def test_more_steps_than_levels_are_refused(sampler):
    with pytest.raises(ConfigError, match=r"num_inference_steps is 11, and the noise schedule has only 10 levels"):
        sampler(denoiser(Linear(num_train_timesteps=10).build()), noise(), rngs(2))


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_images_are_float32_whatever_the_network_computes_in(sampler):
    denoise = Denoiser(net=lambda x, t: x.bfloat16(), schedule=Linear().build(), prediction_type="epsilon")
    assert sampler(denoise, noise().double(), rngs(2)).dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_of_a_sampler_is_documented_and_checked(name):
    part = resolve("samplers", name)
    assert part.__doc__
    assert all(option.text for option in describe(part))
    assert {"num_inference_steps", "timestep_spacing"} <= {field.name for field in fields(part)}
    for wrong in ({"num_inference_steps": 0}, {"timestep_spacing": "even"}, {"steps": 3}):
        with pytest.raises(pydantic.ValidationError, match=next(iter(wrong))):
            part(**wrong)


@pytest.mark.parametrize("sampler", [DDPM(num_inference_steps=3), DDIM(num_inference_steps=3, eta=1)], ids=repr)
def test_images_cannot_share_a_generator(sampler):
    with pytest.raises(AssertionError):
        sampler(denoiser(Linear().build()), noise(2), rngs(1))


# ------------------------------------------------------------------ learned variance, self-conditioning, clamping


@pytest.mark.parametrize(
    "sampler",
    [s for s in every_sampler() if not isinstance(s, DDPM)],
    ids=repr,
)
def test_only_ddpm_uses_a_learned_variance(sampler):
    schedule = Linear().build()
    learned = Denoiser(
        net=crooked_with_variance, schedule=schedule, prediction_type="epsilon", learned_variance=LearnedVariance()
    )
    assert torch.equal(sampler(learned, noise(), rngs(2, "z")), sampler(denoiser(schedule), noise(), rngs(2, "z")))


def test_a_variance_learned_to_be_the_smallest_is_that_of_the_posterior():
    schedule = Cosine().build()
    smallest = Denoiser(
        net=lambda x, t: torch.cat([crooked(x, t), torch.full_like(x, -1.0)], 1),
        schedule=schedule,
        prediction_type="v_prediction",
        learned_variance=LearnedVariance(),
    )
    ours = DDPM(num_inference_steps=30)(smallest, noise(), rngs(2, "z"))
    plain = DDPM(num_inference_steps=30)(denoiser(schedule, "v_prediction"), noise(), rngs(2, "z"))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", [*NOISE_SCHEDULES, "rescaled", "steep"])
def test_ddpm_is_finite_whatever_variance_was_learned(schedule):
    unusual = {
        "rescaled": Linear(rescale_zero_terminal_snr=True, num_train_timesteps=100),
        "steep": Linear(beta_start=0.2, beta_end=1.0, num_train_timesteps=2000),
    }
    levels_ = (unusual.get(schedule) or resolve("noise_schedules", schedule)(num_train_timesteps=100)).build()
    for says in (0.0, -1e4, 1e4):
        denoise = Denoiser(
            net=lambda x, t, says=says: torch.cat([crooked(x, t), torch.full_like(x, says)], 1),
            schedule=levels_,
            prediction_type="epsilon",
            clip_sample=True,
            learned_variance=LearnedVariance(),
        )
        for n in (3, 12):
            assert DDPM(num_inference_steps=n)(denoise, noise(), rngs(2)).isfinite().all()


class Watched:
    """A network with self-conditioning that depends on the earlier estimate, and remembers what it was handed."""

    def __init__(self) -> None:
        self.handed: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        self.handed.append(previous)
        return crooked(x, t) + 0.3 * torch.cos(2 * previous)


class Remembering(Denoiser):
    """A denoiser that keeps its estimates."""

    def estimate(self, x_t, t, previous=None):
        made = super().estimate(x_t, t, previous)
        self.net.__dict__.setdefault("made", []).append(made.x_0)
        return made


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_self_conditioning_hands_on_the_clipped_estimate_of_the_call_before(sampler):
    net = Watched()
    denoise = Remembering(
        net=net, schedule=Linear().build(), prediction_type="epsilon", clip_sample=True, self_conditioned=True
    )
    for _ in range(2):  # nothing is left over from an earlier batch
        net.handed, net.made = [], []
        sampler(denoise, noise(), rngs(2, "z"))
        assert len(net.handed) == len(net.made) == (19 if isinstance(sampler, Heun) else 10)
        assert torch.equal(net.handed[0], torch.zeros(2, 3, 4, 4))
        for handed, made in zip(net.handed[1:], net.made, strict=False):
            assert torch.equal(handed, made)
            assert handed.abs().max() <= 1


@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_with_everything_on_an_image_does_not_depend_on_the_rest_of_its_batch(sampler):
    def net(x, t, previous):
        return crooked_with_variance(x + 0.2 * previous, t)

    denoise = Denoiser(
        net=net,
        uncond=lambda x, t, previous: 0.5 * net(x, t, previous),
        guidance_scale=3.0,
        schedule=Cosine().build(),
        prediction_type="epsilon",
        dynamic_threshold=0.9,
        learned_variance=LearnedVariance(),
        self_conditioned=True,
    )
    together = sampler(denoise, noise(3), rngs(3, "z"))
    assert together.abs().max() <= 1
    for i in range(3):
        alone = sampler(denoise, noise(3)[i : i + 1], rngs(3, "z")[i : i + 1])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), JSD(), RectifiedFlow()])
@pytest.mark.parametrize("sampler", every_sampler(), ids=repr)
def test_the_result_is_the_last_estimate_of_the_image_without_noise(sampler, schedule):
    """So it is clamped whenever estimates are; DALLE2-pytorch stops one level above, and leaves [-1, 1]."""
    net = Watched()
    denoise = Remembering(
        net=net, schedule=schedule.build(), prediction_type="v_prediction", clip_sample=True, self_conditioned=True
    )
    out = sampler(denoise, noise(), rngs(2, "z"))
    assert torch.equal(out, net.made[-1])
    assert out.abs().max() <= 1
