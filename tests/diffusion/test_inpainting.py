"""RePaint, against normal images, for which the rest of an image is known exactly."""

import math
from itertools import pairwise

import pytest
import torch

from eclosion.diffusion.denoiser import Denoiser
from eclosion.diffusion.inpainting import known_in_size, repaint
from eclosion.diffusion.noise_schedule import JSD, Cosine, Linear, NoiseSchedule, RectifiedFlow
from eclosion.diffusion.samplers import DDIM, DDPM, DPMSolver, Euler, Heun, levels
from eclosion.diffusion.variance import LearnedVariance, posterior
from eclosion.errors import ConfigError
from eclosion.rng import generator, randn

WALKERS = [DDPM(num_inference_steps=6), DDIM(num_inference_steps=6), DDIM(num_inference_steps=6, eta=0.7), Euler()]


def rngs(count: int, *position: str | int) -> list:
    return [generator(0, "inpaint", *position, i) for i in range(count)]


def crooked(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth network in which all pixels hang together."""
    s = (t.view(-1, 1, 1, 1) + 1) / 1000
    return torch.tanh(0.8 * x + s - 0.3) * (1.1 - 0.4 * s) + 0.1 * x.mean((2, 3), keepdim=True)


def scene(count: int = 3) -> dict[str, torch.Tensor]:
    """Known images, masks that differ, and noise to start from."""
    known = randn(rngs(count, "known"), (3, 6, 5)).clamp(-1, 1)
    mask = randn(rngs(count, "mask"), (6, 5)) > 0
    return {"x": randn(rngs(count, "x"), (3, 6, 5)), "known": known, "mask": mask}


def denoiser(schedule: NoiseSchedule, **options) -> Denoiser:
    return Denoiser(net=crooked, schedule=schedule, prediction_type="v_prediction", clip_sample=True, **options)


def paint(sampler, denoise: Denoiser, drawn: list, *, x, known, mask, **options) -> torch.Tensor:
    return repaint(sampler, denoise, x, drawn, known=known, mask=mask, **options)


# ------------------------------------------------------------------ what is known


@pytest.mark.parametrize("schedule", [Linear(), Cosine(rescale_zero_terminal_snr=True), JSD(), RectifiedFlow()])
@pytest.mark.parametrize("sampler", WALKERS, ids=repr)
def test_the_known_part_comes_back_to_the_bit_and_the_rest_in_range(sampler, schedule):
    given = scene()
    out = paint(sampler, denoiser(schedule.build()), rngs(3), **given, num_resamples=2)
    keep = given["mask"].unsqueeze(1).expand_as(out)
    assert torch.equal(out[keep], given["known"][keep])
    assert out.abs().max() <= 1
    assert out.dtype == torch.float32


def test_what_the_known_images_hold_elsewhere_does_not_matter():
    given, denoise = scene(), denoiser(Linear().build())
    expected = paint(DDPM(num_inference_steps=5), denoise, rngs(3), **given)
    keep = given["mask"].unsqueeze(1)
    given["known"] = torch.where(keep, given["known"], torch.nan)
    assert torch.equal(paint(DDPM(num_inference_steps=5), denoise, rngs(3), **given), expected)


def test_all_of_an_image_or_nothing_may_be_known():
    given, denoise = scene(), denoiser(Linear().build())
    given["mask"] = torch.ones_like(given["mask"])
    assert torch.equal(paint(DDPM(num_inference_steps=4), denoise, rngs(3), **given), given["known"])
    given["mask"] = torch.zeros_like(given["mask"])
    out = paint(DDIM(num_inference_steps=4), denoise, rngs(3), **given, num_resamples=1)
    assert torch.equal(out, DDIM(num_inference_steps=4)(denoise, given["x"], rngs(3)))


# ------------------------------------------------------------------ the rest

MEAN, STD, CORRELATION = 0.2, 0.5, 0.9
COVARIANCE = STD**2 * torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)
PAIRS = 4000


def exact_for_pairs(schedule: NoiseSchedule) -> Denoiser:
    """E[x_0 | x_t] for images of two columns that belong together, row by row."""

    def net(x, t):
        alpha, sigma = (float(c[t[0]]) for c in (schedule.alphas, schedule.sigmas))
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2).double())
        return MEAN + (x.double() - alpha * MEAN) @ gain.T

    return Denoiser(net=net, schedule=schedule, prediction_type="sample")


def right_column(sampler, schedule: NoiseSchedule, num_resamples: int) -> tuple[float, float, float]:
    """How the right column follows the known left one: slope and intercept of the line, and variance around it."""
    left = MEAN + STD * randn(rngs(1, "left"), (1, PAIRS, 1))
    known = torch.cat([left, torch.zeros_like(left)], 3)
    mask = torch.tensor([True, False]).expand(1, PAIRS, 2)
    x = randn(rngs(1, "x"), (1, PAIRS, 2))
    out = paint(
        sampler, exact_for_pairs(schedule), rngs(1), x=x, known=known, mask=mask, num_resamples=num_resamples
    ).double()
    a, b = out[0, 0, :, 0], out[0, 0, :, 1]
    (variance, covariance), (_, _) = torch.cov(torch.stack([a, b])).tolist()
    slope = covariance / variance
    intercept = (b.mean() - slope * a.mean()).item()
    return slope, intercept, (b - slope * a - intercept).var().item()


def followed(sampler, schedule: NoiseSchedule, num_resamples: int) -> tuple[float, float, float]:
    """The same without a single random number: mean and covariance of both columns, from step to step."""
    means = []
    for a in (0.0, 1.0):
        path, eta = levels(schedule, sampler.num_inference_steps, "trailing"), getattr(sampler, "eta", 1.0)
        mean, cov = torch.zeros(2).double(), (path[0].alpha ** 2 + path[0].sigma ** 2) * torch.eye(2).double()
        for now, then in pairwise(path):
            for again in reversed(range(num_resamples if then.sigma > 0 else 1)):
                mean = torch.tensor([now.alpha * a, mean[1]], dtype=torch.float64)
                cov = torch.diag(torch.tensor([now.sigma**2, cov[1, 1]], dtype=torch.float64))
                total = now.alpha**2 * COVARIANCE + now.sigma**2 * torch.eye(2).double()
                gain = now.alpha * COVARIANCE @ torch.linalg.inv(total)
                std = eta * posterior(now, then).std
                keep = math.sqrt(then.sigma**2 - std**2) / now.sigma
                image = then.alpha - now.alpha * keep
                step = keep * torch.eye(2).double() + image * gain
                mean = step @ mean + image * (MEAN - now.alpha * gain @ torch.full((2,), MEAN).double())
                cov = step @ cov @ step.T + std**2 * torch.eye(2).double()
                if again:
                    ratio = now.alpha / then.alpha
                    mean = ratio * mean
                    cov = ratio**2 * cov + (now.sigma**2 - ratio**2 * then.sigma**2) * torch.eye(2).double()
        means.append(mean[1].item())
    return means[1] - means[0], means[0], cov[1, 1].item()


@pytest.mark.parametrize("num_resamples", [1, 3])
@pytest.mark.parametrize("schedule", [Linear(), RectifiedFlow()])
@pytest.mark.parametrize("sampler", [DDPM(num_inference_steps=20), DDIM(num_inference_steps=20)], ids=repr)
def test_the_rest_is_painted_as_its_moments_predict(sampler, schedule, num_resamples):
    expected = followed(sampler, schedule.build(), num_resamples)
    # 4 000 pairs: standard deviations of at most 0.01, and 2.3 % of the variance.
    slope, intercept, variance = right_column(sampler, schedule.build(), num_resamples)
    assert (slope, intercept) == pytest.approx(expected[:2], abs=0.03)
    assert variance == pytest.approx(expected[2], rel=0.09)


@pytest.mark.parametrize("part", [DDPM, DDIM])
def test_with_resampling_the_rest_follows_the_known_part_as_it_should(part):
    """For normal images the right column is 0.9 times the left, and 0.2 times 0.1, with a variance of 0.0475."""
    schedule = Linear().build()
    sampler = part(num_inference_steps=250)
    slopes, intercepts, variances = zip(*(right_column(sampler, schedule, n) for n in (1, 10)), strict=True)
    assert slopes[0] < 0.7
    assert slopes[1] == pytest.approx(CORRELATION, abs=0.06)
    assert intercepts[1] == pytest.approx(MEAN * (1 - CORRELATION), abs=0.02)
    exact = STD**2 * (1 - CORRELATION**2)
    assert abs(variances[1] - exact) < abs(variances[0] - exact)
    assert variances[1] == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("num_resamples", [1, 4])
@pytest.mark.parametrize("schedule", [Linear(rescale_zero_terminal_snr=True), RectifiedFlow()])
def test_a_step_back_has_as_much_noise_as_the_level_it_goes_to(schedule, num_resamples):
    """With the true mean and variance of x_s, normal images stay what they are however often steps are taken back.

    With the noise of DALLE2-pytorch, sigma_t - sigma_s alpha_t / alpha_s, they would lose most of their variance.
    """
    levels_ = schedule.build()
    path = levels(levels_, 8, "trailing")

    def spread(level):
        """Variance of x_0 given x_t, for pixels that are independent of each other."""
        return STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)

    fractions = {}
    for now, then in list(pairwise(path))[:-1]:
        step = posterior(now, then)
        low, high = step.log_range
        fractions[now.t] = (math.log(step.std**2 + step.from_x_0**2 * spread(now)) - low) / (high - low)

    def net(x, t):
        alpha, sigma = (c.double() for c in levels_.gather(t, 4))
        mean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x.double() - alpha * MEAN)
        return torch.cat([mean, torch.full_like(mean, 2 * fractions.get(int(t[0]), 0.5) - 1)], 1)

    denoise = Denoiser(net=net, schedule=levels_, prediction_type="sample", learned_variance=LearnedVariance())
    x = randn(rngs(2, "x"), (3, 64, 64))
    nothing = torch.zeros(2, 64, 64, dtype=torch.bool)
    out = paint(
        DDPM(num_inference_steps=8),
        denoise,
        rngs(2),
        x=x,
        known=torch.zeros_like(x),
        mask=nothing,
        num_resamples=num_resamples,
    ).double()
    # 24 576 values: standard deviations of 0.003, and 0.9 % of the variance. Nothing is drawn in the last step.
    assert out.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert out.var().item() == pytest.approx(STD**2 - spread(path[-2]), rel=0.04)


# ------------------------------------------------------------------ what it promises


@pytest.mark.parametrize("sampler", WALKERS[:3], ids=repr)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(sampler):
    def net(x, t, previous):
        return torch.cat([crooked(x + 0.2 * previous, t), torch.cos(3 * x)], 1)

    denoise = Denoiser(
        net=net,
        schedule=Cosine().build(),
        prediction_type="v_prediction",
        clip_sample=True,
        learned_variance=LearnedVariance(),
        self_conditioned=True,
    )
    given = scene()
    together = paint(sampler, denoise, rngs(3), **given, num_resamples=3)
    for i in range(3):
        own = {name: tensor[i : i + 1] for name, tensor in given.items()}
        alone = paint(sampler, denoise, rngs(3)[i : i + 1], **own, num_resamples=3)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("num_resamples", [1, 2, 5])
def test_every_network_call_is_announced_and_the_last_step_is_taken_once(num_resamples):
    events, seen = [], []

    def net(x, t):
        events.append("net")
        seen.append(int(t[0]))
        return x

    denoise = Denoiser(net=net, schedule=Linear(num_train_timesteps=4).build(), prediction_type="v_prediction")
    paint(
        DDPM(),
        denoise,
        rngs(3),
        **scene(),
        num_resamples=num_resamples,
        on_step=lambda i, n: events.append((i, n)),
    )
    n = 3 * num_resamples + 1
    assert events == [event for i in range(n) for event in ((i, n), "net")]
    assert seen == [t for t in (3, 2, 1) for _ in range(num_resamples)] + [0]


@pytest.mark.parametrize(("sampler", "name"), [(Heun(), "Heun"), (DPMSolver(), "DPMSolver")])
def test_a_sampler_that_cannot_go_back_is_refused(sampler, name):
    with pytest.raises(ConfigError, match=rf"steps back, which {name} cannot. Use the sampler 'ddpm' or 'ddim'"):
        paint(sampler, denoiser(Linear().build()), rngs(3), **scene())


def test_taking_no_step_is_refused():
    with pytest.raises(ConfigError, match="num_resamples is 0"):
        paint(DDPM(), denoiser(Linear().build()), rngs(3), **scene(), num_resamples=0)


# ------------------------------------------------------------------ sizes of a cascade


def test_a_smaller_pixel_is_known_if_all_behind_it_are():
    known = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    known[0, 0, 0, 1] = torch.nan
    small, kept = known_in_size(known, mask, (2, 2))
    assert kept[0].tolist() == [[False, True], [True, True]]
    assert small[0, 0][kept[0]].tolist() == [4.5, 10.5, 12.5]
    assert known_in_size(known, mask, (2, 2), how="nearest")[1].all()


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 8), (16, 24), (11, 3)])
@pytest.mark.parametrize("how", ["area", "nearest"])
def test_what_is_unknown_never_reaches_a_known_pixel(size, how):
    """Two images that differ only in what is unknown must agree in every pixel that counts as known."""
    mask = randn(rngs(2, "mask"), (8, 8)) > -1
    known = randn(rngs(2, "known"), (3, 8, 8))
    other = torch.where(mask.unsqueeze(1), known, torch.inf)
    (a, kept), (b, same) = known_in_size(known, mask, size, how=how), known_in_size(other, mask, size, how=how)
    assert torch.equal(kept, same)
    assert torch.equal(a[kept.unsqueeze(1).expand_as(a)], b[kept.unsqueeze(1).expand_as(b)])
    assert kept.any()
    assert not kept.all()
