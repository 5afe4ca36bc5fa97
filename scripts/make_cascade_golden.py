"""Losses and samples of DALLE2-pytorch's decoder, for the tests to compare with.

Needs DALLE2-pytorch 1.15.6, which nothing else in this project does; in an environment of its own:

    pip install dalle2-pytorch==1.15.6
    python scripts/make_cascade_golden.py

A cascade of two small U-Nets, 8 and 16 pixels. Weights, inputs and all that is random come from `tensor` of
make_unclip_golden.py, whose numbers depend on a name and a shape alone, so that only what comes out needs to be kept:
tests/tasks/golden/cascade.safetensors.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from make_unclip_golden import tensor, weight
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "tests/tasks/golden/cascade.safetensors"
SIZES, BATCH, TIMESTEPS = (8, 16), 3, 25

# For both networks, and for each.
COMMON: dict[str, Any] = {
    "dim": 16,
    "dim_mults": (1, 2),
    "cond_dim": 10,
    "attn_heads": 2,
    "attn_dim_head": 6,
    "num_resnet_blocks": 1,
}
FIRST: dict[str, Any] = {"image_embed_dim": 12}
TEXT: dict[str, Any] = {"cond_on_text_encodings": True, "text_embed_dim": 7, "max_text_len": 6}


@dataclass(frozen=True)
class Case:
    """A decoder of the original, and what is asked of it.

    Attributes:
        decoder: arguments of its constructor, beside `image_sizes`, `timesteps` and those of `PLAIN`.
        unets: arguments of each network's, beside `COMMON`.
        chance: what each question for a random number in [0, 1) is answered with; below one half blurs the smaller
            image, and shows an earlier estimate.
        text: whether text encodings are given.
        sample: arguments of `sample`; None for no samples.
        loss: the networks whose loss is asked for.
    """

    decoder: dict[str, Any] = field(default_factory=dict)
    unets: tuple[dict[str, Any], dict[str, Any]] = (FIRST, {})
    chance: float = 0.9
    text: bool = False
    sample: dict[str, Any] | None = None
    loss: tuple[int, ...] = (0, 1)


PLAIN: dict[str, Any] = {
    "beta_schedule": ("cosine", "cosine"),
    "learned_variance": False,
    "image_cond_drop_prob": 0.0,
    "text_cond_drop_prob": 0.0,
}
V: dict[str, Any] = {"predict_v": True}
X0: dict[str, Any] = {"predict_x_start": True}
BOTH_VARIANCES: dict[str, Any] = {"learned_variance": (True, True)}
NOISE: dict[str, Any] = {"use_noise_for_lowres_cond": True, "use_blur_for_lowres_cond": False}
FIRST_ALONE: dict[str, Any] = {"stop_at_unet_number": 1}
ESTIMATES: tuple[dict[str, Any], dict[str, Any]] = ({**FIRST, "self_cond": True}, {"self_cond": True})

CASES: dict[str, Case] = {
    "epsilon": Case(sample={}),
    "x0": Case(X0, sample={}),
    "v": Case(V, sample={}),
    "variance": Case(BOTH_VARIANCES, sample={}),
    "variance of the first": Case({"learned_variance": True}, loss=()),
    "variance, constrained": Case({**BOTH_VARIANCES, "learned_variance_constrain_frac": True}, sample=FIRST_ALONE),
    "variance, weighted": Case({**BOTH_VARIANCES, "vb_loss_weight": 0.5}),
    "variance of x0": Case({**X0, **BOTH_VARIANCES}, sample={}),
    "l1": Case({"loss_type": "l1"}),
    "huber": Case({"loss_type": "huber"}),
    "p2": Case({"p2_loss_weight_gamma": 1.0}),
    "p2, other": Case({"p2_loss_weight_gamma": (0.5, 1.5), "p2_loss_weight_k": 2.0}),
    "no schedule named": Case({"beta_schedule": None}, sample={}),
    "quadratic and sigmoid": Case({"beta_schedule": ("quadratic", "sigmoid")}),
    "blur": Case(chance=0.1),
    "blur, wide": Case({"blur_sigma": 1.3, "blur_kernel_size": 5}, chance=0.1),
    "blur, large": Case({"lowres_downsample_first": False}, chance=0.1),
    "noise": Case(NOISE),
    "noise, v": Case({**NOISE, **V, "lowres_noise_sample_level": 0.45}, sample={}),
    "noise and blur": Case({**NOISE, "use_blur_for_lowres_cond": True}, chance=0.1),
    "dropout": Case({"image_cond_drop_prob": 0.5}, loss=(0,)),
    "text": Case({"text_cond_drop_prob": 0.5}, ({**FIRST, **TEXT}, {}), text=True, loss=(0,)),
    "estimate, x0": Case(X0, ESTIMATES, chance=0.1, sample={}),
    "estimate not shown": Case({}, ESTIMATES, chance=0.9),
    "estimate, epsilon": Case({}, ESTIMATES, chance=0.1, sample={}),
    "guided": Case({"image_cond_drop_prob": 0.5}, loss=(), sample={"cond_scale": (2.5, 1.0)}),
    "guided, text": Case(
        {"image_cond_drop_prob": 0.5, "text_cond_drop_prob": 0.5},
        ({**FIRST, **TEXT}, {}),
        text=True,
        loss=(),
        sample={"cond_scale": (0.5, 1.0), **FIRST_ALONE},
    ),
    "guided, variance": Case(
        {"image_cond_drop_prob": 0.5, "learned_variance": True},
        loss=(),
        sample={"cond_scale": (2.5, 1.0), **FIRST_ALONE},
    ),
    "dynamic threshold": Case(
        {"use_dynamic_thres": True, "dynamic_thres_percentile": 0.8}, loss=(), sample=FIRST_ALONE
    ),
    "the second alone": Case(loss=(), sample={"start_at_unet_number": 2}),
    "ddim": Case({"sample_timesteps": (6, 6)}, loss=(), sample={}),
    "ddim, v": Case({**V, **NOISE, "sample_timesteps": (6, 4)}, loss=(), sample={}),
    "ddim, eta": Case({"sample_timesteps": (6, 6), "ddim_sampling_eta": 1.0}, loss=(), sample={}),
    "inpainting": Case(loss=(), sample={"inpaint": True, "stop_at_unet_number": 1, "inpaint_resample_times": 1}),
    "unconditional": Case({"unconditional": True}, ({}, {}), sample=FIRST_ALONE),
}


def effective(case: Case, i: int) -> dict[str, Any]:
    """Arguments of network i of the original after its decoder has overwritten some."""
    options = PLAIN | case.decoder
    variance, noise = options["learned_variance"], options.get("use_noise_for_lowres_cond", False)
    learned = variance[i] if isinstance(variance, tuple) else variance and i == 0
    return {
        **COMMON,
        **case.unets[i],
        "channels_out": 6 if learned else 3,
        "lowres_cond": i > 0,
        "lowres_noise_cond": i > 0 and noise,
        "cond_on_image_embeds": i == 0 and not options.get("unconditional", False),
    }


def steps(high: int) -> Tensor:
    """One of each kind: the first, one between, the last; int64 [BATCH]."""
    return torch.tensor([0, high // 3, high - 1])


def noise(size: int, number: int) -> Tensor:
    """The noise that a network of this size draws as its so-and-so-manieth; float32 [BATCH, 3, size, size]."""
    return tensor(f"noise {size} {number}", (BATCH, 3, size, size), scale=1.7)


def keeps(number: int) -> Tensor:
    """Which images keep a condition that is dropped for half of them: 0 the image embedding, 1 the text."""
    return torch.tensor([[True, False, True], [False, True, True]][number])


def inputs() -> dict[str, Tensor]:
    """What is given, by our names; images in [-1, 1]."""
    text = tensor("text", (BATCH, 5, 7))
    text[0, 1] = 0  # no token there
    return {
        "image": tensor("image", (BATCH, 3, SIZES[1], SIZES[1])),
        "image_embed": tensor("image_embed", (BATCH, 12)),
        "text_encodings": text,
        "small": tensor("small", (BATCH, 3, SIZES[0], SIZES[0])),
        "mask": tensor("mask", (BATCH, SIZES[1], SIZES[1])) > 0.2,
    }


def fitted(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter of the original; the last convolution's are small, so that estimates do not all leave [-1, 1]."""
    return weight(name, shape) * (0.3 if name.startswith("to_out.") else 1.0)


@contextmanager
def fixed(chance: float) -> Iterator[None]:
    """Let everything that the original draws come from names."""
    drawn: Counter[int] = Counter()
    masks = iter(range(100))

    def normal(shape: Any) -> Tensor:
        number = drawn[shape[-1]]
        drawn[shape[-1]] += 1
        return noise(shape[-1], number)

    def mask(shape: Any, prob: float, device: Any = None) -> Tensor:
        return torch.full(shape, prob == 1) if prob in (0, 1) else keeps(next(masks)).view(shape)

    with (
        mock.patch("torch.randn", lambda shape, **_: normal(shape)),
        mock.patch("torch.randn_like", lambda x: normal(x.shape)),
        mock.patch("torch.randint", lambda low, high, shape, **_: steps(high)),
        mock.patch("random.random", return_value=chance),
        mock.patch("dalle2_pytorch.dalle2_pytorch.prob_mask_like", mask),
    ):
        yield


def original(case: Case) -> Any:
    """The original's decoder with the weights of the table."""
    from dalle2_pytorch import Decoder, Unet  # only where it is installed

    unets = [Unet(**COMMON, **unet) for unet in case.unets]
    decoder = Decoder(unet=unets, image_sizes=SIZES, timesteps=TIMESTEPS, **(PLAIN | case.decoder)).eval()
    with torch.no_grad():
        for unet in decoder.unets:
            for name, parameter in unet.named_parameters():
                parameter.copy_(fitted(name, tuple(parameter.shape)))
    return decoder


def told(case: Case) -> dict[str, Tensor]:
    """Embeddings and text by the original's names."""
    given = inputs()
    names = [] if case.decoder.get("unconditional") else ["image_embed"]
    return {name: given[name] for name in (*names, *(["text_encodings"] if case.text else []))}


@torch.no_grad()
def outcome(case: Case) -> dict[str, Tensor]:
    """The losses, scalars, and the samples in [0, 1]."""
    given, found = inputs(), {}
    decoder = original(case)
    for i in case.loss:
        with fixed(case.chance):
            found[f"loss {i}"] = decoder((given["image"] + 1) / 2, unet_number=i + 1, **told(case))
    if case.sample is not None:
        more: dict[str, Any] = dict(case.sample)
        if more.get("start_at_unet_number"):
            more["image"] = (given["small"] + 1) / 2
        if more.pop("inpaint", False):
            more |= {"inpaint_image": (given["image"] + 1) / 2, "inpaint_mask": given["mask"]}
        with fixed(case.chance):
            found["samples"] = decoder.sample(batch_size=BATCH, **told(case), **more)
    return found


def main() -> None:
    """Write the golden file."""
    outputs = {}
    for name, case in CASES.items():
        for key, value in outcome(case).items():
            outputs[f"{name}: {key}"] = value.contiguous()
            inside = ((value > 0) & (value < 1)).float().mean()
            print(f"{name + ': ' + key:40} {list(value.shape)!s:20} {value.mean():9.4f} {inside:6.2f}")
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(outputs, GOLDEN)
    print(GOLDEN.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
