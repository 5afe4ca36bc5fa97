"""Variances, posteriors and the variational term, against distributions, closed forms and published numbers."""

import math
from itertools import pairwise
from typing import get_args

import pydantic
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from eclosion.diffusion.noise_schedule import JSD, Cosine, Level, Linear, NoiseSchedule, Quadratic, Sigmoid
from eclosion.diffusion.prediction import PredictionType, target, to_sample
from eclosion.diffusion.variance import (
    LearnedVariance,
    forward,
    log_variance,
    posterior,
    posteriors,
    split_variance,
    variational_bits,
)
from eclosion.registry import NOISE_SCHEDULES, describe, resolve

PREDICTION_TYPES = get_args(PredictionType)
CLEAN = Level(-1, 1.0, 0.0)
PAIRS = [
    (Level(9, 0.6, 0.8), Level(3, 0.8, 0.6)),  # variance is preserved
    (Level(9, 0.3, 0.7), Level(3, 0.8, 0.2)),  # rectified flow
    (Level(9, 0.0, 1.0), Level(3, 0.1, 0.9)),  # noise alone
    (Level(9, 0.3, 0.7), CLEAN),
]
# Signal far below the smallest float32 for most of the way, and then exactly 0.
STEEP = Linear(beta_start=0.2, beta_end=1.0, num_train_timesteps=2000)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that reach both ends of [-1, 1], and noise."""
    x_0, noise = torch.randn(2, count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x_0.clamp(-1, 1), noise


def every_schedule(T: int) -> list[NoiseSchedule]:
    parts = [resolve("noise_schedules", name) for name in NOISE_SCHEDULES]
    made = [part(num_train_timesteps=T) for part in parts]
    made += [part(num_train_timesteps=T, rescale_zero_terminal_snr=True) for part in (Linear, Cosine)]
    return [part.build() for part in made]


# ------------------------------------------------------------------ from one level to another


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        (Cosine(), [2.17895e-05, 0.00314601, 0.998998]),
        (Linear(), [5.45319e-05, 0.0100513, 0.02]),
        (Quadratic(), [5.0656e-05, 0.00572564, 0.0199997]),
        (Sigmoid(), [7.47562e-05, 0.0100361, 0.0199508]),
        (JSD(), [0.0005005, 0.00199601, 0.999]),
    ],
)
def test_posterior_variances_are_those_of_dalle2_pytorch(schedule, published):
    steps = posteriors(schedule.build())
    # Published with six digits, from float32.
    assert [steps[t].std ** 2 for t in (1, 500, 999)] == pytest.approx(published, rel=3e-5)
    assert steps[0].log_range[0] == pytest.approx(-46.0517, abs=1e-4)


def test_shares_in_the_posterior_mean_are_those_of_dalle2_pytorch():
    steps = [posteriors(Cosine().build())[t] for t in (0, 500, 999)]
    assert [step.from_x_0 for step in steps] == pytest.approx([1.0, 0.00436787, 0.00155689], rel=1e-5)
    assert [step.from_x_t for step in steps] == pytest.approx([0, 0.99535626, 0.0316227], rel=1e-5)


@pytest.mark.parametrize(("now", "then"), PAIRS[:3])
def test_the_posterior_is_the_product_of_two_normal_densities(now, then):
    """Bayes: x_s is normal around alpha_s x_0, and is seen through x_t, normal around ratio x_s."""
    ratio = now.alpha / then.alpha
    fresh = now.sigma**2 - ratio**2 * then.sigma**2
    variance = 1 / (1 / then.sigma**2 + ratio**2 / fresh)
    step = posterior(now, then)
    assert forward(now, then) == pytest.approx((ratio, fresh))
    assert step.std**2 == pytest.approx(variance)
    assert step.from_x_0 == pytest.approx(variance * then.alpha / then.sigma**2)
    assert step.from_x_t == pytest.approx(variance * ratio / fresh)


@pytest.mark.parametrize(("now", "then"), PAIRS)
def test_the_largest_variance_is_that_of_standard_normal_images(now, then):
    """By the covariance of x_s and x_t when x_0 and both noises are standard normal."""
    ratio = now.alpha / then.alpha
    var_s, var_t = then.alpha**2 + then.sigma**2, now.alpha**2 + now.sigma**2
    assert posterior(now, then).high == pytest.approx(var_s - (ratio * var_s) ** 2 / var_t)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), JSD(num_train_timesteps=10)])
def test_the_largest_variance_is_beta_where_variance_is_preserved(schedule):
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.build().alphas_cumprod])
    betas = (1 - abar[1:] / abar[:-1]).tolist()
    assert [step.high for step in posteriors(schedule.build())] == pytest.approx(betas, rel=1e-9)


def test_the_last_step_ends_exactly_at_the_image():
    for schedule in every_schedule(5):
        step = posterior(schedule.level(4), CLEAN)
        assert (step.from_x_0, step.from_x_t, step.std) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("T", [1, 2, 3, 20, 1000])
def test_limits_of_the_variance_are_finite_and_in_order(T):
    for schedule in [*every_schedule(T), STEEP.build()]:
        for step in posteriors(schedule):
            low, high = step.log_range
            assert math.log(0.99e-20) < low <= high + 1e-9 < 1e-6


# ------------------------------------------------------------------ the learned variance


def test_a_fraction_leads_from_the_smallest_to_the_largest_variance():
    v = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    low, high = math.log(0.01), math.log(0.04)
    learned = log_variance(LearnedVariance().fraction(v), low, high).exp()
    torch.testing.assert_close(learned, torch.tensor([0.01, 0.02, 0.04, 0.16]))


def test_a_constrained_fraction_is_a_sigmoid_on_top():
    v = torch.tensor([-1.0, 1.0, 40.0, -1e9])
    expected = torch.tensor([0.5, 1 / (1 + math.exp(-1)), 1.0, 0.0])
    torch.testing.assert_close(LearnedVariance(constrain_fraction=True).fraction(v), expected)


def test_the_prediction_is_the_first_half_of_the_channels():
    output = torch.arange(12.0).view(1, 6, 1, 2)
    prediction, v = split_variance(output)
    assert prediction.flatten().tolist() == list(range(6))
    assert v.flatten().tolist() == list(range(6, 12))


def by_distributions(prediction, fraction, x_0, noise, t, schedule, prediction_type) -> torch.Tensor:
    """The term for t > 0 in float64, from densities of x_s, with betas and without any shortcut."""
    expected = []
    abar = [1.0, *schedule.alphas_cumprod.tolist()]
    for i, level in enumerate(t.tolist()):
        now, before = abar[level + 1], abar[level]
        beta = 1 - now / before
        low = beta * (1 - before) / (1 - now)
        x_t = math.sqrt(now) * x_0[i].double() + math.sqrt(1 - now) * noise[i].double()
        output = prediction[i].double()
        guess = {
            "sample": output,
            "epsilon": (x_t - math.sqrt(1 - now) * output) / math.sqrt(now) if now > 0 else 0 * x_t,
            "v_prediction": math.sqrt(now) * x_t - math.sqrt(1 - now) * output,
            "flow": (x_t - math.sqrt(1 - now) * output) / (math.sqrt(now) + math.sqrt(1 - now)),
        }[prediction_type]

        def mean(image, x_t=x_t, now=now, before=before, beta=beta):
            from_image = math.sqrt(before) * beta / (1 - now)
            return from_image * image + math.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t

        learned = (fraction[i].double() * math.log(beta) + (1 - fraction[i].double()) * math.log(low)).exp()
        true = Normal(mean(x_0[i].double()), math.sqrt(low))
        expected.append(kl_divergence(true, Normal(mean(guess), learned.sqrt())).mean() / math.log(2))
    return torch.stack(expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "schedule", [Linear(), Cosine(), JSD(num_train_timesteps=20), Cosine(rescale_zero_terminal_snr=True)]
)
def test_the_term_is_the_divergence_of_two_normal_densities(schedule, prediction_type):
    levels = schedule.build()
    T = levels.num_train_timesteps
    t = torch.tensor([1, 2, T // 2, T - 2, T - 1])
    x_0, noise = batch(5)
    wanted = target(prediction_type, x_0, noise, t, levels)
    prediction = wanted + 0.1 * batch(5)[1].flip(0)
    fraction = 0.5 + 0.3 * batch(5)[1].flip(1)
    ours = variational_bits(prediction, fraction, wanted, x_0, t, levels, prediction_type)
    assert ours.dtype == torch.float32
    expected = by_distributions(prediction, fraction, x_0, noise, t, levels, prediction_type)
    # They know the target only through x_t, whose coefficients ours has in float32.
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-9)


def test_the_divergence_is_the_integral_that_defines_it():
    """One value at t = 1 of a schedule of two levels, summed up over a fine grid."""
    schedule, t = Cosine(num_train_timesteps=2).build(), torch.tensor([1])
    step = posteriors(schedule)[1]
    one = torch.ones(1, 1, 1, 1)
    bits = variational_bits(0.5 * one, 0.3 * one, 0.2 * one, 0.2 * one, t, schedule, "sample")
    low, high = step.log_range
    true = Normal(step.from_x_0 * 0.2, step.std)
    learned = Normal(step.from_x_0 * 0.5, math.exp((0.3 * high + 0.7 * low) / 2))
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64) * step.std + step.from_x_0 * 0.2
    integrand = true.log_prob(grid).exp() * (true.log_prob(grid) - learned.log_prob(grid))
    assert bits.item() == pytest.approx(torch.trapezoid(integrand, grid).item() / math.log(2), rel=1e-5)


def likelihood_of(values: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Our probability of pixel values when x_s has this mean and standard deviation; level 0 of a coarse schedule."""
    schedule = Linear(num_train_timesteps=2, beta_start=0.5, beta_end=0.6).build()
    low, high = posteriors(schedule)[0].log_range
    x_0 = values.float().view(-1, 1, 1, 1)
    fraction = torch.full_like(x_0, (2 * math.log(std) - low) / (high - low))
    t = torch.zeros(len(values), dtype=torch.int64)
    return 2 ** -variational_bits(torch.full_like(x_0, mean), fraction, x_0, x_0, t, schedule, "sample").double()


PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (-0.9, 0.5), (1.2, 0.2), (0.301, 0.01), (-3.0, 0.8)])
def test_the_likelihood_is_the_probability_of_a_normal_variable(mean, std):
    normal = Normal(torch.tensor(mean, dtype=torch.float64), std)
    edges = torch.cat([torch.zeros(1), normal.cdf(PIXELS[:-1] + 1 / 255), torch.ones(1)])
    # The distribution function is approximated to 2e-4; a probability is the difference of two.
    torch.testing.assert_close(likelihood_of(PIXELS, mean, std), edges.diff(), rtol=0, atol=4e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (-0.9, 0.02), (1.2, 0.2), (-3.0, 0.8), (0.5, 4.0)])
def test_the_likelihoods_of_all_256_values_add_up_to_one(mean, std):
    assert likelihood_of(PIXELS, mean, std).sum().item() == pytest.approx(1, abs=1e-5)


def test_an_impossible_pixel_costs_no_more_than_a_probability_of_1e_12():
    impossible = likelihood_of(PIXELS[[0, 100]], mean=30.0, std=0.01)
    assert impossible.tolist() == pytest.approx([1e-12, 1e-12], rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "constrain", "published"),
    [
        (Cosine(), False, {0: 1.35798, 1: 0.274226, 100: 0.00415075, 999: 215.026}),
        (Linear(), False, {0: 1.94899, 1: 0.292625, 100: 0.00442022, 999: 0.00439286}),
        (Quadratic(), False, {0: 1.94899, 1: 0.253221, 100: 0.00412533, 999: 0.0043959}),
        (Sigmoid(), False, {0: 2.2221, 1: 0.247966, 100: 0.00296193, 999: 0.00438184}),
        (Cosine(), True, {1: 0.230123, 100: 0.00411454, 999: 215.026}),
        (Linear(), True, {1: 0.244775, 100: 0.00438672, 999: 0.00439274}),
    ],
)
def test_the_term_is_that_of_dalle2_pytorch(schedule, constrain, published):
    """Where noise is predicted; its mean is wrong for the others. Made with version 1.15.6."""
    i = torch.arange(48, dtype=torch.float64).view(1, 3, 4, 4)
    x_0, noise = torch.sin(i).float(), torch.cos(2 * i).float()
    x_0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    prediction, v = (torch.cos(2 * i) + 0.8 * torch.sin(3 * i)).float(), (1 + 0.1 * torch.cos(5 * i)).float()
    learned = LearnedVariance(weight=1.0, constrain_fraction=constrain)
    for t, bits in published.items():
        ours = learned.per_image(prediction, v, noise, x_0, torch.tensor([t]), schedule.build(), "epsilon")
        # Theirs subtracts two means, and 1 from a distribution function, in float32.
        assert ours.item() == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_true_mean_less_the_networks_is_found_without_x_t(prediction_type):
    """Through x_t, to_sample and the posterior's shares it must come out the same, as an increase of the term."""
    schedule = Linear(num_train_timesteps=30).build()
    t = torch.tensor([1, 7, 29])
    x_0, noise = batch(3)
    wanted = target(prediction_type, x_0, noise, t, schedule)
    prediction, half = wanted + 0.2, torch.full_like(x_0, 0.5)
    bits, without_error = (
        variational_bits(p, half, wanted, x_0, t, schedule, prediction_type).double() for p in (prediction, wanted)
    )
    guess = to_sample(prediction_type, prediction, schedule.add_noise(x_0, noise, t), t, schedule)
    for i, level in enumerate(t.tolist()):
        step = posteriors(schedule)[level]
        error = (step.from_x_0 * (x_0[i] - guess[i])).double().square().mean()
        extra = error / 2 * math.exp(-sum(step.log_range) / 2) / math.log(2)
        assert (bits - without_error)[i].item() == pytest.approx(extra.item(), rel=1e-3)


# ------------------------------------------------------------------ what the term promises


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_the_term_and_its_gradient_are_finite_at_every_level(T, prediction_type):
    for schedule in [*every_schedule(T), STEEP.build()]:
        last = schedule.num_train_timesteps - 1
        t = torch.tensor(sorted({0, min(1, last), last // 2, max(0, last - 1), last}))
        x_0, noise = batch(len(t))
        wanted = target(prediction_type, x_0, noise, t, schedule)
        for error in (0.0, 1e-3, 1.0, -1e4):
            for says in (0.0, -1.0, 1.0, 30.0, -30.0, 1e5, -1e5):
                v = torch.full_like(x_0, says).requires_grad_()
                for learned in (LearnedVariance(), LearnedVariance(constrain_fraction=True)):
                    losses = learned.per_image(wanted + error, v, wanted, x_0, t, schedule, prediction_type)
                    (gradient,) = torch.autograd.grad(losses.sum(), v)
                    assert losses.isfinite().all()
                    assert gradient.isfinite().all()


def test_the_term_teaches_the_variance_and_not_the_prediction():
    schedule, t = Cosine().build(), torch.tensor([0, 1, 500, 999])
    x_0, noise = batch(4)
    prediction, v = (noise + 0.5).requires_grad_(), torch.full_like(x_0, 0.9).requires_grad_()
    LearnedVariance().per_image(prediction, v, noise, x_0, t, schedule, "epsilon").sum().backward()
    assert prediction.grad is None
    assert (v.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_best_variance_is_the_true_one_plus_the_error_squared(prediction_type):
    """The divergence of two normal densities is smallest there; the slope must vanish, and change its sign."""
    schedule, t = Linear().build(), torch.tensor([300])
    x_0, noise = batch(1)
    wanted = target(prediction_type, x_0, noise, t, schedule)
    step = posteriors(schedule)[300]
    low, high = step.log_range
    prediction = wanted + 0.02
    guess = [
        to_sample(prediction_type, p, schedule.add_noise(x_0, noise, t), t, schedule) for p in (prediction, wanted)
    ]
    error = step.from_x_0 * (guess[0] - guess[1]).double()
    best = ((step.std**2 + error.square()).log() - low) / (high - low)

    def slope(at: torch.Tensor) -> torch.Tensor:
        v = (2 * at - 1).float().requires_grad_()
        LearnedVariance().per_image(prediction, v, wanted, x_0, t, schedule, prediction_type).sum().backward()
        return v.grad

    assert (slope(best - 0.1) < 0).all()
    assert (slope(best + 0.1) > 0).all()
    assert slope(best).abs().max() < 0.02 * slope(best + 0.1).abs().min()


def test_under_autocast_the_term_is_computed_in_float32():
    schedule, t = Cosine().build(), torch.tensor([0, 1, 500, 999])
    x_0, noise = batch(4)
    conv = torch.nn.Conv2d(3, 6, 1)
    learned = LearnedVariance(weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, v = split_variance(conv(noise))
        assert prediction.dtype == torch.bfloat16
        inside = learned.per_image(prediction, v, noise, x_0, t, schedule, "epsilon")
        inside.sum().backward()
    outside = learned.per_image(prediction.float(), v.float(), noise, x_0, t, schedule, "epsilon")
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert conv.weight.grad.isfinite().all()


def test_the_term_is_weighted_and_belongs_to_each_image_alone():
    schedule, t = Linear().build(), torch.tensor([0, 1, 500, 999])
    x_0, noise = batch(4)
    v = 0.3 * noise.flip(0)
    args = (noise + 0.1, v, noise, x_0, t)
    together = LearnedVariance(weight=0.25).per_image(*args, schedule, "epsilon")
    bits = variational_bits(noise + 0.1, (v + 1) / 2, noise, x_0, t, schedule, "epsilon")
    torch.testing.assert_close(together, 0.25 * bits, rtol=1e-6, atol=0)
    for i in range(4):
        alone = LearnedVariance(weight=0.25).per_image(*(x[i : i + 1] for x in args), schedule, "epsilon")
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=0)
    assert LearnedVariance().weight == 0.001


def test_a_schedule_first_used_in_inference_mode_can_teach_a_variance():
    schedule, t = Linear().build(), torch.tensor([0, 500])
    x_0, noise = batch(2)
    v = torch.zeros_like(x_0, requires_grad=True)
    with torch.inference_mode():
        LearnedVariance().per_image(noise, v, noise, x_0, t, schedule, "epsilon")
    LearnedVariance().per_image(noise, v, noise, x_0, t, schedule, "epsilon").sum().backward()
    assert v.grad.abs().sum() > 0


def test_each_prediction_type_has_tables_of_its_own():
    schedule, t = Linear().build(), torch.tensor([500])
    x_0, noise = batch(1)
    half = torch.full_like(x_0, 0.5)
    bits = {
        p: variational_bits(noise + 1, half, noise, x_0, t, schedule, p).item() for p in (*PREDICTION_TYPES, "epsilon")
    }
    assert len(set(bits.values())) == len(PREDICTION_TYPES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_term_waits_for_nothing_on_the_device():
    schedule, t = Linear().build(), torch.tensor([0, 1, 500, 999])
    x_0, noise = batch(4)
    args = (noise + 0.1, noise.flip(0), noise, x_0, t)
    on_device = [x.cuda() for x in args]
    LearnedVariance().per_image(*on_device, schedule, "epsilon")
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = LearnedVariance().per_image(*on_device, schedule, "epsilon")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(losses.cpu(), LearnedVariance().per_image(*args, schedule, "epsilon"))


@pytest.mark.parametrize("options", [{"weight": -1}, {"constrain": True}])
def test_a_learned_variance_that_makes_no_sense_is_refused(options):
    with pytest.raises(pydantic.ValidationError, match=next(iter(options))):
        LearnedVariance(**options)


def test_every_option_of_the_learned_variance_is_documented():
    assert LearnedVariance.__doc__
    assert all(option.text for option in describe(LearnedVariance))


def test_levels_of_a_schedule_follow_its_tables():
    schedule = Cosine(num_train_timesteps=5).build()
    path = [schedule.level(t) for t in range(-1, 5)]
    assert path[0] == CLEAN
    assert [level.alpha for level in path[1:]] == schedule.alphas.tolist()
    assert [level.sigma for level in path[1:]] == schedule.sigmas.tolist()
    assert all(a.sigma < b.sigma for a, b in pairwise(path))
