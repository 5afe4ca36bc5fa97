"""Outputs of DALLE2-pytorch's U-Net over a table of options, for the tests to compare with.

Needs DALLE2-pytorch 1.15.6, which nothing else in this project does; in an environment of its own:

    pip install dalle2-pytorch==1.15.6
    python scripts/make_unclip_golden.py

Weights and inputs come from `tensor`, whose numbers depend on a name and a shape alone, so that only outputs need to be
kept: tests/models/golden/unclip_outputs.safetensors, and unclip_parameters.json with the names and shapes of every
network's parameters as a hash. One network is kept with the weights that the original itself drew, as a state dict.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "tests/models/golden"
OUTPUTS, PARAMETERS, WHOLE = "unclip_outputs.safetensors", "unclip_parameters.json", "unclip_whole.safetensors"


@dataclass(frozen=True)
class Case:
    """One network of the original, and what it is called with.

    Attributes:
        unet: arguments of its constructor, beside those of `COMMON`.
        batch: images.
        size: height and width.
        drop_image, drop_text: whether the embedding and the text are replaced by what is learned for none.
        text_length: tokens in the text encodings.
        estimate: whether an earlier estimate is given, if the network looks at one.
    """

    unet: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    size: tuple[int, int] = (8, 8)
    drop_image: bool = False
    drop_text: bool = False
    text_length: int = 5
    estimate: bool = True


# Small, and with no two sizes alike by chance.
COMMON: dict[str, Any] = {"dim": 16, "dim_mults": (1, 2), "cond_dim": 10, "attn_heads": 2, "attn_dim_head": 6}
IMAGE: dict[str, Any] = {"cond_on_image_embeds": True, "image_embed_dim": 12}
TEXT: dict[str, Any] = {"cond_on_text_encodings": True, "text_embed_dim": 7, "max_text_len": 6}
LOWRES: dict[str, Any] = {"lowres_cond": True, "lowres_noise_cond": True}

CASES: dict[str, Case] = {
    "unconditional": Case(),
    "image": Case(IMAGE, batch=3),
    "image, none": Case(IMAGE, drop_image=True),
    "image, one of a batch": Case(IMAGE, batch=1),
    "image, not square": Case(IMAGE, size=(6, 10)),
    "image, variance": Case({**IMAGE, "channels_out": 6}, batch=3),
    "image, tokens": Case({**IMAGE, "num_image_tokens": 3, "num_time_tokens": 1}),
    "image, many tokens": Case({**IMAGE, "num_image_tokens": 17, "num_time_tokens": 5}),
    "image, only as tokens": Case({**IMAGE, "add_image_embeds_to_time": False}),
    "image, only as tokens, none": Case({**IMAGE, "add_image_embeds_to_time": False}, drop_image=True),
    "image, as wide as a token": Case({**IMAGE, "cond_dim": 12}, batch=1),
    "image, as wide as a token, none": Case({**IMAGE, "cond_dim": 12, "num_image_tokens": 1}, batch=1, drop_image=True),
    "text": Case({**TEXT}, batch=3),
    "text, longer than its place": Case({**TEXT, "max_text_len": 3}, text_length=9),
    "text, none": Case(TEXT, drop_text=True),
    "text, many tokens": Case({**TEXT, "max_text_len": 40}),
    "text and image": Case({**TEXT, **IMAGE}, batch=3),
    "text and image, neither": Case({**TEXT, **IMAGE}, drop_image=True, drop_text=True),
    "one stage": Case({"dim_mults": (1,), **IMAGE}, size=(5, 7)),
    "three stages": Case({"dim_mults": (1, 2, 3), "num_resnet_blocks": (1, 3, 2), **IMAGE}, batch=3),
    "blocks and groups per stage": Case({"num_resnet_blocks": [2, 1], "resnet_groups": [4, 16]}),
    "one block": Case({"num_resnet_blocks": 1, "resnet_groups": 2, **IMAGE}),
    "width of tokens by default": Case({"cond_dim": None, **IMAGE}),
    "self-attention": Case({"self_attn": True}, batch=3),
    "self-attention in one stage": Case({"self_attn": (False, True), "attn_heads": 3, "attn_dim_head": 5, **IMAGE}),
    "linear attention": Case({"sparse_attn": True}, batch=3, size=(6, 8)),
    "linear and self-attention": Case({"sparse_attn": True, "self_attn": [True, False], "attn_heads": 4}),
    "cosine self-attention": Case({"cosine_sim_self_attn": True, "self_attn": True}),
    "cosine cross-attention": Case({"cosine_sim_cross_attn": True, **IMAGE}, batch=3),
    "both cosine, text": Case({"cosine_sim_cross_attn": True, "cosine_sim_self_attn": True, **TEXT}),
    "attention at the middle switched off": Case({"attend_at_middle": False, **IMAGE}),
    "no attention at the middle, linear": Case({"attend_at_middle": False, "sparse_attn": True}),
    "low resolution": Case({"lowres_cond": True}, batch=3),
    "low resolution with noise": Case(LOWRES, batch=3),
    "low resolution, image, variance": Case({**LOWRES, **IMAGE, "channels_out": 6}),
    "estimate": Case({"self_cond": True}),
    "estimate not given": Case({"self_cond": True, **IMAGE}, estimate=False),
    "estimate and low resolution": Case({"self_cond": True, **LOWRES}, batch=1),
    "grey": Case({"channels": 1, "self_cond": True, **LOWRES}),
    "four channels": Case({"channels": 4, "channels_out": 8, **IMAGE}),
    "plain first convolution": Case({"init_cross_embed": False}),
    "plain first convolution of 3": Case({"init_cross_embed": False, "init_conv_kernel_size": 3, **LOWRES}),
    "kernels of the first convolution": Case({"init_cross_embed_kernel_sizes": (5, 3)}),
    "one kernel of the first convolution": Case({"init_cross_embed_kernel_sizes": [5]}),
    "last convolution of 3": Case({"final_conv_kernel_size": 3, **LOWRES}),
    "last convolution of 5": Case({"final_conv_kernel_size": 5, "channels_out": 6}),
    "kernels halve": Case({"cross_embed_downsample": True, **IMAGE}),
    "other kernels halve": Case({"cross_embed_downsample": True, "cross_embed_downsample_kernel_sizes": (6, 2, 4)}),
    "kernels that are not asked for": Case({"cross_embed_downsample_kernel_sizes": (2, 6), "init_conv_kernel_size": 3}),
    "nearest": Case({"pixel_shuffle_upsample": False}),
    "nearest, memory-efficient": Case({"pixel_shuffle_upsample": False, "memory_efficient": True}),
    "memory-efficient": Case({"memory_efficient": True, **IMAGE}, size=(12, 8)),
    "memory-efficient from a wide stage": Case({"memory_efficient": True, "dim_mults": (2, 3, 4), **LOWRES}),
    "memory-efficient, everything": Case(
        {
            "memory_efficient": True,
            "dim_mults": (1, 2, 3),
            "num_resnet_blocks": (1, 2, 1),
            "resnet_groups": (4, 8, 16),
            "self_attn": (False, False, True),
            "sparse_attn": True,
            "cross_embed_downsample": True,
            "combine_upsample_fmaps": True,
            "scale_skip_connection": True,
            "resnet_weight_standardization": True,
            "self_cond": True,
            "channels_out": 6,
            **TEXT,
            **IMAGE,
            **LOWRES,
        },
        batch=3,
        size=(8, 16),
    ),
    "scaled skips": Case({"scale_skip_connection": True, **IMAGE}),
    "scaled skips, three stages": Case({"scale_skip_connection": True, "dim_mults": (1, 1, 2)}),
    "standardised kernels": Case({"resnet_weight_standardization": True, **IMAGE}),
    "combined": Case({"combine_upsample_fmaps": True}),
    "combined, three stages, not square": Case(
        {"combine_upsample_fmaps": True, "dim_mults": (1, 2, 4), **IMAGE}, size=(8, 12)
    ),
    "combined, standardised": Case(
        {"combine_upsample_fmaps": True, "resnet_weight_standardization": True, "memory_efficient": True}
    ),
    "activations computed twice": Case({"checkpoint_during_training": True, **IMAGE}),
    "activations computed twice, memory-efficient": Case(
        {"checkpoint_during_training": True, "memory_efficient": True}
    ),
    "first width said twice": Case({"init_dim": 16, "out_dim": 5}),
    "output width said, too": Case({"out_dim": 7, "init_dim": 16, "channels_out": 3, **IMAGE}),
}
# The network that is kept with the weights that the original drew.
WHOLE_CASE = Case(
    {
        "dim_mults": (1, 2),
        "num_resnet_blocks": 1,
        "sparse_attn": True,
        "self_attn": (False, True),
        "combine_upsample_fmaps": True,
        **TEXT,
        **IMAGE,
        **LOWRES,
    },
    batch=3,
)


def tensor(name: str, shape: tuple[int, ...], *, scale: float = 1.0) -> Tensor:
    """Numbers between -scale and scale that depend on a name and a shape alone; float32."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.Philox(key=key).random_raw(max(1, math.prod(shape)))
    numbers = (raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1
    return torch.from_numpy((numbers * scale).astype(np.float32)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter of the original: large enough that whatever is done wrong with it is seen in the output."""
    if name.endswith((".g", "norm.weight", "norm_cond.weight", "norm_mid_cond.weight")):
        return 1 + tensor(name, shape, scale=0.5)
    if len(shape) < 2 or name.startswith("null_") or name.endswith("null_kv"):
        return tensor(name, shape)
    return tensor(name, shape, scale=math.sqrt(3 / math.prod(shape[1:])))


def inputs(case: Case) -> dict[str, Tensor]:
    """What the network is called with, by the names of our own."""
    unet = COMMON | case.unet
    image = (case.batch, unet.get("channels", 3), *case.size)
    given = {
        "sample": tensor("sample", image, scale=1.7),
        "timestep": (tensor("timestep", (case.batch,)).abs() * 999).long(),
    }
    if unet.get("cond_on_image_embeds"):
        given["image_embed"] = tensor("image_embed", (case.batch, unet["image_embed_dim"]))
    if unet.get("cond_on_text_encodings"):
        text = tensor("text", (case.batch, case.text_length, unet["text_embed_dim"]))
        text[0, 1] = 0  # no token there
        text[-1, 3:] = 0
        given["text_encodings"] = text
    if unet.get("lowres_cond"):
        given["lowres_cond"] = tensor("lowres_cond", image)
    if unet.get("lowres_noise_cond"):
        given["lowres_noise_level"] = (tensor("level", (case.batch,)).abs() * 999).long()
    if unet.get("self_cond") and case.estimate:
        given["self_cond"] = tensor("self_cond", image)
    return given


def original(case: Case) -> Any:
    """The original's network, with the weights that it draws."""
    from dalle2_pytorch import Unet  # only where it is installed

    return Unet(**(COMMON | case.unet)).eval()


@torch.no_grad()
def output_of(net: Any, case: Case) -> Tensor:
    """What the original makes of a case's inputs."""
    given = inputs(case)
    names = {"sample": "x", "timestep": "time", "lowres_cond": "lowres_cond_img"}
    renamed = {names.get(key, key): value.clone() for key, value in given.items()}
    drops = {"image_cond_drop_prob": float(case.drop_image), "text_cond_drop_prob": float(case.drop_text)}
    return net(**{"image_embed": None, **renamed, **drops})  # type: ignore[no-any-return]


def fill(net: Any) -> None:
    """Give the original's network the weights of the table."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))


def digest(parameters: list[tuple[str, tuple[int, ...]]]) -> str:
    """A hash of names and shapes, in their order."""
    lines = [f"{name} {'x'.join(map(str, shape))}" for name, shape in parameters]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main() -> None:
    """Write the golden files."""
    GOLDEN.mkdir(exist_ok=True)
    outputs, parameters = {}, {}
    for name, case in CASES.items():
        net = original(case)
        fill(net)
        outputs[name] = output_of(net, case)
        parameters[name] = digest([(key, tuple(p.shape)) for key, p in net.named_parameters()])
        print(f"{name:45} {outputs[name].std():8.3f} {sum(p.numel() for p in net.parameters()):9}")
    save_file(outputs, GOLDEN / OUTPUTS)
    (GOLDEN / PARAMETERS).write_text(json.dumps(parameters, indent=1) + "\n")

    torch.manual_seed(0)
    net = original(WHOLE_CASE)
    with torch.no_grad():
        net.to_out.weight.normal_()  # drawn as zeros, with which every network agrees
    state = {f"weight.{key}": value.half().float() for key, value in net.state_dict().items()}
    net.load_state_dict({key.removeprefix("weight."): value for key, value in state.items()})
    half = {key: value.half() for key, value in state.items()}  # exact: they were rounded first
    save_file({**half, "output": output_of(net, WHOLE_CASE)}, GOLDEN / WHOLE)
    sizes = {path.name: path.stat().st_size for path in sorted(GOLDEN.iterdir())}
    print(sizes, sum(sizes.values()))


if __name__ == "__main__":
    sys.exit(main())
