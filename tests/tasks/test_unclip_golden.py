"""Losses and samples of the cascade are those of DALLE2-pytorch's decoder, with its weights; or differ for a reason."""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eclosion.data.batch import Batch
from eclosion.diffusion.denoiser import Denoiser
from eclosion.diffusion.samplers import DDIM, DDPM, Walk, counted
from eclosion.models.unclip_import import network_options, original_parameters, translate_unet
from eclosion.registry import build
from eclosion.tasks import unclip_decoder
from eclosion.tasks.unclip_tier import Draws, Tier

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # under its own name: the one imports the other, and a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


table = script("make_unclip_golden")
golden = script("make_cascade_golden")
NUMBERS = load_file(golden.GOLDEN)
GIVEN = golden.inputs()
NETS = {}
DROPPED = {"image": "image_cond_drop_prob", "text": "text_cond_drop_prob"}
# Float32 all the way, and other orders of adding; losses are of the size of 1, samples in [0, 1].
LOSS, SAMPLE = {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 0, "atol": 1e-4}
# Sums of squares of huge numbers come first.
WEIGHTED = {"rtol": 1e-4, "atol": 0}


# --- the same decoder in our words -----------------------------------------------------------------------------------


def each(value, i):
    return value[i] if isinstance(value, tuple) else value


def our_model(case, i):
    options = network_options(golden.effective(case, i))
    told = ("in_channels", "out_channels", "image_embed_dim", "text_embed_dim", "lowres_cond", "lowres_noise_cond")
    text = bool(options.get("text_embed_dim"))
    return {key: value for key, value in options.items() if key not in told} | {"text_conditioned": text}


def our_unet(case, i):
    given = golden.PLAIN | case.decoder
    schedule = (each(given["beta_schedule"], i)) or ("cosine", "linear")[i]
    options = {"num_train_timesteps": golden.TIMESTEPS}
    if schedule not in ("cosine", "jsd"):
        scale = 1000 / golden.TIMESTEPS
        options |= {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    variance = given["learned_variance"]
    gamma = each(given.get("p2_loss_weight_gamma", 0.0), i)
    unet = {
        "model": our_model(case, i),
        "image_size": golden.SIZES[i],
        "noise_schedule": {"name": schedule, **options},
        "prediction_type": "v_prediction"
        if given.get("predict_v")
        else "sample"
        if given.get("predict_x_start")
        else "epsilon",
        "loss": {"kind": given.get("loss_type", "l2")}
        | ({"weighting": "p2", "p2_gamma": gamma, "p2_k": given.get("p2_loss_weight_k", 1)} if gamma else {}),
    }
    if variance[i] if isinstance(variance, tuple) else variance and i == 0:
        unet["learned_variance"] = {
            "weight": given.get("vb_loss_weight", 0.001),
            "constrain_fraction": given.get("learned_variance_constrain_frac", False),
        }
    if i:
        unet["lowres"] = {
            "resize": "nearest",
            "downsample_first": given.get("lowres_downsample_first", True),
            "blur_probability": 0.5 if given.get("use_blur_for_lowres_cond", True) else 0.0,
            "blur_sigma": given.get("blur_sigma", 0.6),
            "blur_kernel_size": given.get("blur_kernel_size", 3),
            "noise": given.get("use_noise_for_lowres_cond", False),
            "sample_noise_level": given.get("lowres_noise_sample_level", 0.2),
        }
    return unet


def our_task(case, **options):
    """The task with the weights of the table."""
    given = golden.PLAIN | case.decoder
    config = {
        "name": "unclip_decoder",
        "unets": [our_unet(case, i) for i in range(2)],
        "image_dropout": given["image_cond_drop_prob"],
        "text_dropout": given["text_cond_drop_prob"],
        "unconditional": given.get("unconditional", False),
        "dynamic_threshold": given.get("dynamic_thres_percentile", 0.95) if given.get("use_dynamic_thres") else None,
        "resize": "nearest",
    }
    task = build("tasks", config | options).on({}, size=(16, 16), image_embed_dim=12, text_embed_dim=7)
    return task.with_nets({tier.name: our_net(tier, golden.effective(case, i)) for i, tier in enumerate(task.tiers)})


def our_net(tier, original):
    """The network of a tier with the weights of the table; made once for all cases that have the same."""
    key = repr(original)
    if key not in NETS:
        NETS[key] = tier.build()
        state = {p.name: golden.fitted(p.name, p.shape) for p in original_parameters(original)}
        NETS[key].load_state_dict(translate_unet(state, original), strict=True)
    return NETS[key]


def batch():
    fields = {name: GIVEN[name] for name in ("image", "image_embed", "text_encodings")}
    return Batch(range(golden.BATCH), torch.ones(golden.BATCH), fields)


def drawn(case, i):
    """What the original draws for a loss, in its order: a noisy smaller image comes before the noise."""
    given = golden.PLAIN | case.decoder
    size, low = golden.SIZES[i], {}
    noisy = i == 1 and given.get("use_noise_for_lowres_cond", False)
    if i == 1:
        blurred = case.chance < 0.5
        low["blur_sigma"] = torch.full((golden.BATCH,), given.get("blur_sigma", 0.6))
        low["blur_size"] = torch.full((golden.BATCH,), given.get("blur_kernel_size", 3) if blurred else 1)
        if not given.get("use_blur_for_lowres_cond", True):
            low = {}
    if noisy:
        low |= {"level": golden.steps(1000), "lowres_noise": golden.noise(size, 0)}
    masks = iter(range(2))
    keep = {f"{kind}_keep": golden.keeps(next(masks)) for kind in DROPPED if i == 0 and given[DROPPED[kind]]}
    estimate = (
        {"sees_estimate": torch.full((golden.BATCH,), case.chance < 0.5)} if case.unets[i].get("self_cond") else {}
    )
    return Draws(golden.steps(golden.TIMESTEPS), golden.noise(size, int(noisy)), **low, **keep, **estimate)


class Replayed:
    """A generator of one image that gives the noise of the table, in turn."""

    def __init__(self, size, row):
        self.size, self.row, self.number = size, row, 0

    def standard_normal(self, dtype, out):
        out[:] = golden.noise(self.size, self.number)[self.row].numpy()
        self.number += 1


class OriginalDDIM:
    """The original's steps: from below the last level to level 0, where it stops with noise left in the image."""

    def __init__(self, num_inference_steps, eta):
        self.num_inference_steps, self.eta = num_inference_steps, eta

    def __call__(self, denoise, x, rngs, *, on_step=None):
        schedule = denoise.schedule
        times = torch.linspace(0, schedule.num_train_timesteps, self.num_inference_steps + 2)[:-1].int().tolist()
        walk = Walk([schedule.level(t) for t in reversed(times)], self.eta)
        estimate = counted(denoise, on_step, len(times) - 1)
        for now, then in pairwise(walk.path):
            quiet = Walk(walk.path, self.eta if then.t else 0.0)
            made = estimate(x, now)
            if then.t or not self.eta:
                x = quiet.step(x, made, now, then, rngs)
            else:  # there its noise is missing, though room was made for it
                x = _without_its_noise(x, made.x_0, now, then, self.eta)
        return x


def _without_its_noise(x, x_0, now, then, eta):
    ratio = (now.alpha / then.alpha) ** 2
    c1 = eta * math.sqrt((1 - ratio) * then.sigma**2 / now.sigma**2)
    return then.alpha * x_0 + math.sqrt(then.sigma**2 - c1**2) * (x - now.alpha * x_0) / now.sigma


def samplers(case):
    steps = case.decoder.get("sample_timesteps")
    return [OriginalDDIM(n, case.decoder.get("ddim_sampling_eta", 0.0)) for n in steps] if steps else [DDPM(), DDPM()]


def samples(case, monkeypatch, *, sampler=None, task=None):
    """Ours in [0, 1], with the original's noise."""
    task, asked = task or our_task(case), case.sample or {}
    streams = {tier.name: [Replayed(tier.size[0], row) for row in range(golden.BATCH)] for tier in task.tiers}
    monkeypatch.setattr(unclip_decoder, "_streams", lambda rngs, names: streams)
    first = asked.get("start_at_unet_number", 1) - 1
    options = {
        "sampler": sampler or samplers(case),
        "guidance_scale": asked.get("cond_scale", 1.0),
        "first": first,
        "last": asked.get("stop_at_unet_number", 2) - 1,
        "image": GIVEN["small"] if first else None,
    }
    conditions = task.conditions(range(golden.BATCH), batch())
    rngs = [None] * golden.BATCH
    if asked.get("inpaint"):
        options |= {"known": GIVEN["image"], "mask": GIVEN["mask"], "num_resamples": asked["inpaint_resample_times"]}
        return (task.inpaint(conditions, rngs, **options) + 1) / 2
    return (task.sample(conditions, rngs, **options) + 1) / 2


# --- equal -----------------------------------------------------------------------------------------------------------

DIFFERENT = {f"{name}: loss {i}" for name in ("variance of x0", "estimate, epsilon") for i in range(2)}
DIFFERENT |= {"guided, variance: samples"}
equal_losses = [key for key in NUMBERS if ": loss" in key and key not in DIFFERENT]
equal_samples = [key for key in NUMBERS if ": samples" in key and key not in DIFFERENT]


@pytest.mark.parametrize("key", equal_losses)
def test_the_loss_is_that_of_the_original(key):
    name, _, i = key.replace("loss ", "").partition(": ")
    case, i = golden.CASES[name], int(i)
    task = our_task(case, clip_sample=False)  # of an earlier estimate: the original clips it in sampling alone
    with torch.no_grad():
        losses = task.loss(f"unet_{i}", batch(), drawn(case, i))
    assert losses.shape == (golden.BATCH,)
    torch.testing.assert_close(losses.mean(), NUMBERS[key], **(WEIGHTED if "weighted" in name else LOSS))


@pytest.mark.parametrize("key", equal_samples)
def test_samples_are_those_of_the_original(key, monkeypatch):
    case = golden.CASES[key.removesuffix(": samples")]
    wanted = NUMBERS[key].clamp(0, 1)  # its DDIM leaves the range
    torch.testing.assert_close(samples(case, monkeypatch), wanted, **SAMPLE)


# --- different on purpose: each test also does it as the original does, and then arrives at its number ----------------


def our_loss(case, i, **options):
    with torch.no_grad():
        return our_task(case, clip_sample=False, **options).loss(f"unet_{i}", batch(), drawn(case, i)).mean()


@pytest.mark.parametrize("i", range(2))
def test_learned_variance_of_another_prediction_than_noise_has_the_mean_of_that_prediction(i, monkeypatch):
    """The original takes every prediction for noise there."""
    case = golden.CASES["variance of x0"]
    theirs = NUMBERS[f"variance of x0: loss {i}"]
    assert our_loss(case, i) != pytest.approx(float(theirs), rel=1e-2)
    task, draws = our_task(case), drawn(case, i)
    learned = type(task.tiers[i].options.learned_variance)
    per_image = learned.per_image

    def as_noise(self, predicted, v, target, x_0, t, schedule, kind):
        return per_image(self, predicted, v, draws.noise, x_0, t, schedule, "epsilon")

    monkeypatch.setattr(learned, "per_image", as_noise)
    torch.testing.assert_close(our_loss(case, i), theirs, **LOSS)


@pytest.mark.parametrize("i", range(2))
def test_the_earlier_estimate_in_training_is_what_sampling_shows_an_estimate_of_the_image(i, monkeypatch):
    """The original shows the raw prediction in training, here noise, and in sampling the image."""
    case = golden.CASES["estimate, epsilon"]
    theirs = NUMBERS[f"estimate, epsilon: loss {i}"]
    assert our_loss(case, i) != pytest.approx(float(theirs), rel=1e-3)
    monkeypatch.setattr(Tier, "_earlier", lambda self, net, x_t, drawn, told: net(x_t, drawn.t, **told))
    torch.testing.assert_close(our_loss(case, i), theirs, **LOSS)


def test_guidance_leaves_the_learned_variance_alone(monkeypatch):
    """It is the condition's own; the original extrapolates it as well."""
    case, theirs = golden.CASES["guided, variance"], NUMBERS["guided, variance: samples"]
    assert (samples(case, monkeypatch) - theirs).abs().max() > 0.01

    def outputs(self, x_t, t, previous):
        ours, v = self._call(self.net, x_t, t, previous)
        if self.guidance_scale == 1:
            return ours, v
        none, u = self._call(self.uncond, x_t, t, previous)
        return none + self.guidance_scale * (ours - none), u + self.guidance_scale * (v - u)

    monkeypatch.setattr(Denoiser, "_outputs", outputs)
    torch.testing.assert_close(samples(case, monkeypatch), theirs, **SAMPLE)


def test_ddim_starts_where_the_noise_is_and_ends_at_an_image(monkeypatch):
    """The original starts below the last level, ends at level 0, whose noise stays in, and leaves the range."""
    case, theirs = golden.CASES["ddim"], NUMBERS["ddim: samples"]
    assert theirs.min() < -0.01
    asked = []

    class Watched(Denoiser):
        def estimate(self, x_t, t, previous=None):
            asked.append(int(t))
            return super().estimate(x_t, t, previous)

    monkeypatch.setattr("eclosion.tasks.unclip_tier.Denoiser", Watched)
    ours = samples(case, monkeypatch, sampler=DDIM(num_inference_steps=6))
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert asked == [24, 20, 16, 11, 7, 3] * 2  # from T - 1, and from 3 straight to the image
