"""The decoder's U-Net: what it is told, what it refuses, and that its shortcuts change nothing."""

import dataclasses
import inspect
import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eclosion.errors import ConfigError
from eclosion.models import layers
from eclosion.models.layers import (
    CrossAttention,
    GainNorm,
    LinearAttention,
    MapGainNorm,
    ResBlock,
    SelfAttention,
    StandardizedConv2d,
    enlarge,
    folding_pays,
    timestep_embedding,
)
from eclosion.models.unclip import UnclipUNetModel
from eclosion.models.unclip_unet import UnclipUNet
from eclosion.registry import build

TINY = {
    "base_channels": 8,
    "channel_mults": (1, 2),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 6,
    "num_text_tokens": 5,
}
ALL_CONDITIONS = {
    "image_embed_dim": 10,
    "text_embed_dim": 7,
    "lowres_cond": True,
    "lowres_noise_cond": True,
    "self_cond": True,
}
NETS = {
    "plain": {},
    "everything told": ALL_CONDITIONS,
    "one stage": {"channel_mults": (1,), "image_embed_dim": 10},
    "image only as tokens": {"image_embed_dim": 10, "add_image_embed_to_time": False},
    "memory-efficient": {
        **ALL_CONDITIONS,
        "memory_efficient": True,
        "channel_mults": (2, 3),
        "self_attention": (False, True),
        "linear_attention": True,
        "combine_upsampled": True,
        "weight_standardization": True,
        "scale_skip_connection": True,
        "downsample_kernel_sizes": (2, 4),
        "upsample": "nearest",
        "conv_in_kernel_sizes": (3,),
        "conv_out_kernel_size": 3,
        "out_channels": 6,
        "num_image_tokens": 3,
        "num_time_tokens": 1,
        "mid_self_attention": False,
        "cosine_self_attention": True,
        "cosine_cross_attention": True,
    },
    "original's numbers": {**ALL_CONDITIONS, "compat": True, "self_attention": True, "combine_upsampled": True},
}
each_net = pytest.mark.parametrize("name", NETS)


def make(**options):
    """A small network whose last convolution is not zero, so that all of it shows in the output."""
    torch.manual_seed(0)
    net = UnclipUNet(**{**TINY, **options})
    nn.init.normal_(net.conv_out.weight)
    return net


def told(net, batch=3, size=(8, 12), seed=1):
    """Everything that a network wants to be told."""
    c, rng = net.config, torch.Generator().manual_seed(seed)
    image = (batch, c.in_channels, *size)
    given = {
        "sample": torch.randn(image, generator=rng),
        "timestep": torch.randint(0, 1000, (batch,), generator=rng),
    }
    if c.image_embed_dim:
        given["image_embed"] = torch.randn(batch, c.image_embed_dim, generator=rng)
    if c.text_embed_dim:
        given["text_encodings"] = torch.randn(batch, 3, c.text_embed_dim, generator=rng)
    if c.lowres_cond:
        given["lowres_cond"] = torch.randn(image, generator=rng)
    if c.lowres_noise_cond:
        given["lowres_noise_level"] = torch.randint(0, 1000, (batch,), generator=rng)
    if c.self_cond:
        given["self_cond"] = torch.randn(image, generator=rng)
    return given


def rows(given, index):
    return {key: value[index] for key, value in given.items()}


# --- the network as a module -----------------------------------------------------------------------------------------


@each_net
def test_the_output_has_the_image_s_size_and_every_parameter_a_gradient(name):
    """With no mask: what stands for "no embedding" is in the graph, too, or several processes would wait for it."""
    net = make(**NETS[name])
    given = told(net)
    out = net(**given)
    assert out.shape == (3, net.config.out_channels or 3, 8, 12)
    out.square().mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


@each_net
def test_with_some_embeddings_hidden_every_parameter_matters(name):
    """A gradient that is zero everywhere belongs to a parameter that is wired to nothing."""
    net = make(**NETS[name])
    given = told(net)
    keep = torch.tensor([True, False, True])
    masks = {"image_keep_mask": net.config.image_embed_dim, "text_keep_mask": net.config.text_embed_dim}
    net(**given, **{key: keep for key, used in masks.items() if used}).square().mean().backward()
    # A bias before a norm of its own channels alone is taken away again.
    idle = [n for n, p in net.named_parameters() if p.grad.abs().max() == 0]
    assert idle == []


@each_net
def test_every_convolution_sees_maps_with_channels_first(name):
    """A sum with a map of tokens may have its layout, and hands it on to all that follows, which is slow on a CPU."""
    net, layouts = make(**NETS[name]), []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.GroupNorm):
            layer.register_forward_pre_hook(lambda _, given: layouts.append(given[0].is_contiguous()))
    net(**told(net))
    assert layouts
    assert all(layouts)


@each_net
def test_an_image_does_not_depend_on_its_batch(name):
    net = make(**NETS[name]).eval()
    given = told(net)
    with torch.no_grad():
        together = net(**given)
        alone = torch.cat([net(**rows(given, slice(i, i + 1))) for i in range(3)])
    # Norms of small numbers make 1e-7 a thousand times larger in the memory-efficient one.
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)


@each_net
def test_a_saved_network_comes_back_with_the_same_bits(name, tmp_path):
    net = make(**NETS[name]).eval()
    net.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    back = UnclipUNet.from_pretrained(tmp_path)
    given = told(net)
    with torch.no_grad():
        assert torch.equal(net(**given), back(**given))


@each_net
def test_nothing_is_random_nor_read_on_the_host_nor_moved(name):
    """So forward and backward can be captured as a CUDA graph, and a loss depends on its arguments alone."""
    net = make(**NETS[name])
    given = told(net)
    before = torch.get_rng_state()
    with Operations() as seen:
        net(**given).square().mean().backward()
    assert torch.equal(torch.get_rng_state(), before)
    hosts = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal"}
    assert not seen.names & hosts
    assert not {
        n for n in seen.names if any(word in n for word in ("rand", "normal_", "uniform", "dropout", "bernoulli"))
    }


class Operations(TorchDispatchMode):
    """The names of all operations that torch carries out."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_the_host_check_sees_a_scalar_that_is_read():
    """The control."""
    with Operations() as seen:
        torch.ones(1).item()
    assert "_local_scalar_dense" in seen.names


@pytest.mark.parametrize("name", ["everything told", "memory-efficient"])
def test_activations_computed_twice_give_the_same_gradients_and_keep_fewer(name):
    net = make(**NETS[name]).train()
    given = told(net)

    def kept_and_gradients():
        net.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            net(**given).square().mean().backward()
        return sum(kept), {n: p.grad.clone() for n, p in net.named_parameters()}

    plain_kept, plain = kept_and_gradients()
    net.enable_gradient_checkpointing()
    twice_kept, twice = kept_and_gradients()
    assert all(torch.equal(plain[n], twice[n]) for n in plain)
    assert twice_kept < plain_kept / 2
    net.disable_gradient_checkpointing()
    assert kept_and_gradients()[0] == plain_kept


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("one stage", False),
        *(pytest.param("memory-efficient", twice, marks=pytest.mark.slow) for twice in (False, True)),
    ],
)
def test_it_is_one_graph_to_the_compiler(name, checkpointing):
    net = make(**NETS[name])
    if checkpointing:
        net.enable_gradient_checkpointing()
    given = told(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), net(**given), rtol=0, atol=2e-3)


@each_net
def test_half_precision_is_near_single_precision(name):
    net = make(**NETS[name]).eval()
    given = told(net)
    with torch.no_grad():
        exact = net(**given)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(**given)
        half = net.to(torch.bfloat16)(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()})
    # bfloat16 has 8 bits, and some dozen layers add up; what is wrong with a layer makes 1.
    for near in (mixed, half):
        error = (near.float() - exact).abs().mean() / exact.abs().mean()
        assert float(error) < 0.15


def test_a_layer_norm_is_right_in_half_precision_and_the_original_s_is_not():
    """At a standard deviation of 0.02 an epsilon of 1e-3 leaves a third of it."""
    x = (torch.randn(2, 16, 8, 8) * 0.02).bfloat16()
    for norm, shaped in ((GainNorm, x.flatten(2).transpose(1, 2)), (MapGainNorm, x)):
        dim = -1 if norm is GainNorm else 1
        right = norm(16).bfloat16()(shaped).float().std(dim).mean()
        original = norm(16, compat=True).bfloat16()(shaped).float().std(dim).mean()
        exact = norm(16, compat=True)(shaped.float()).std(dim).mean()
        torch.testing.assert_close(right, exact, rtol=0.01, atol=0)
        assert original < 0.7 * exact


# --- what it is told -------------------------------------------------------------------------------------------------


def test_a_mask_hides_embeddings_image_by_image():
    net = make(**ALL_CONDITIONS).eval()
    given, batch = told(net), torch.arange(3)
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        outs = {
            (image, text): net(**given, image_keep_mask=every & image, text_keep_mask=every & text)
            for image in (False, True)
            for text in (False, True)
        }
        image, text = torch.tensor([True, False, True]), torch.tensor([False, False, True])
        mixed = net(**given, image_keep_mask=image, text_keep_mask=text)
        other = told(net, seed=2)
        unseen = net(
            **{**given, "image_embed": other["image_embed"], "text_encodings": other["text_encodings"]},
            image_keep_mask=none,
            text_keep_mask=none,
        )
    wanted = torch.stack([outs[bool(image[i]), bool(text[i])][i] for i in batch])
    torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(unseen, outs[False, False])
    assert torch.equal(net(**given), outs[True, True])
    # The control: the four do differ.
    assert min((a - b).abs().max() for k, a in outs.items() for j, b in outs.items() if k < j) > 1e-3


def test_text_without_a_token_at_the_end_is_text_that_is_shorter():
    net = make(text_embed_dim=7).eval()
    given = told(net)
    text = given.pop("text_encodings")
    padded = torch.cat([text, torch.zeros(3, 1, 7)], dim=1)
    longer = torch.cat([text, torch.zeros(3, 2, 7), torch.randn(3, 4, 7)], dim=1)  # beyond num_text_tokens = 5
    no_text = torch.zeros(3, 3, 7)
    with torch.no_grad():
        out = net(**given, text_encodings=text)
        torch.testing.assert_close(out, net(**given, text_encodings=padded), rtol=0, atol=1e-4)
        torch.testing.assert_close(out, net(**given, text_encodings=longer), rtol=0, atol=1e-4)
        without = net(**given, text_encodings=text, text_keep_mask=torch.zeros(3, dtype=torch.bool))
        assert torch.equal(without, net(**given, text_encodings=no_text))
        assert torch.equal(without, net(**given, text_encodings=no_text[:, :0]))
    assert (out - without).abs().max() > 1e-3


def test_an_embedding_as_wide_as_a_token_is_projected_like_any_other():
    """The original left it as it is, and mixed the images of a batch."""
    net = make(image_embed_dim=6).eval()
    assert net.image_embedding.to_tokens.weight.shape == (4 * 6, 6)
    given = told(net, batch=4)  # num_image_tokens, where the original mixed without failing
    with torch.no_grad():
        before = net(**given)
        given["image_embed"][0] += 1
        after = net(**given)
    assert torch.equal(before[1:], after[1:])
    assert (before[0] - after[0]).abs().max() > 1e-4


def test_with_compat_such_an_embedding_is_every_token_of_its_own_image():
    net = make(image_embed_dim=6, compat=True, add_image_embed_to_time=False).eval()
    embed = torch.randn(4, 6)
    _, tokens = net.image_embedding(embed, None)
    assert torch.equal(tokens, embed[:, None].expand(4, 4, 6))


def test_an_earlier_estimate_that_is_not_given_is_zero():
    net = make(self_cond=True).eval()
    given = told(net)
    given["self_cond"] = torch.zeros_like(given["self_cond"])
    with torch.no_grad():
        zeros = net(**given)
        del given["self_cond"]
        assert torch.equal(net(**given), zeros)


def test_one_timestep_stands_for_all():
    net = make().eval()
    given = told(net)
    with torch.no_grad():
        one = net(given["sample"], torch.tensor(400))
        assert torch.equal(one, net(given["sample"], torch.full((3,), 400)))
    assert (one[0] - net(given["sample"], torch.tensor(401))[0]).abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample": torch.zeros(3, 3, 9, 12)},
            "sample is 9 x 12 pixels, and both must be multiples of 2: this network",
        ),
        ({"sample": torch.zeros(3, 4, 8, 8)}, r"sample has shape \[3, 4, 8, 8\], and must be \[B, 3, H, W\]"),
        ({"timestep": torch.zeros(2)}, r"timestep has shape \[2\], and must be \[3\], or one for all"),
        ({"image_embed": None}, "image_embed is missing, and this network was built for it"),
        ({"image_embed": torch.zeros(3, 11)}, r"image_embed has shape \[3, 11\], and must be \[3, 10\]"),
        ({"text_encodings": None}, "text_encodings is missing"),
        ({"text_encodings": torch.zeros(3, 7)}, r"text_encodings has shape \[3, 7\], and must be \[3, any, 7\]"),
        ({"lowres_cond": None}, "lowres_cond is missing"),
        (
            {"lowres_cond": torch.zeros(3, 3, 4, 6)},
            r"lowres_cond has shape \[3, 3, 4, 6\], and must be \[3, 3, 8, 12\]",
        ),
        ({"lowres_noise_level": None}, "lowres_noise_level is missing"),
        ({"image_keep_mask": torch.ones(1, dtype=bool)}, r"image_keep_mask has shape \[1\], and must be \[3\]"),
    ],
    ids=str,
)
def test_what_it_cannot_work_with_is_refused(change, message):
    net = make(**ALL_CONDITIONS)
    with pytest.raises(ValueError, match=message):
        net(**{**told(net), **change})


@pytest.mark.parametrize("name", [*ALL_CONDITIONS, "image_keep_mask", "text_keep_mask"])
def test_what_it_was_not_built_for_is_refused(name):
    given = {
        "image_embed_dim": "image_embed",
        "text_embed_dim": "text_encodings",
        "lowres_noise_cond": "lowres_noise_level",
    }
    name = given.get(name, name)
    net = make()
    with pytest.raises(ValueError, match=f"{name} is given, and this network was built without it. Leave it out."):
        net(**told(net), **{name: torch.zeros(3)})


@pytest.mark.parametrize(("memory_efficient", "factor"), [(False, 4), (True, 8)])
def test_the_factor_of_the_size_is_the_least_that_works(memory_efficient, factor):
    net = make(channel_mults=(1, 2, 2), memory_efficient=memory_efficient)
    assert net.size_factor == factor
    size = (factor, 3 * factor)
    assert net(torch.zeros(1, 3, *size), torch.tensor(0)).shape[2:] == size
    with pytest.raises(ValueError, match=f"multiples of {factor}: this network halves the resolution"):
        net(torch.zeros(1, 3, factor + factor // 2, factor), torch.tensor(0))


# --- options ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "channel_mults starts with 2, and must start with 1 unless memory_efficient": {"channel_mults": [2, 4]},
    "channel_mults is [], and must be a list of whole numbers": {"channel_mults": []},
    "channel_mults has 13 stages, and 12 are the most": {"channel_mults": [1] * 13},
    "channel_mults makes stages of more than 1048576 channels": {"channel_mults": [1, 65536], "base_channels": 32},
    "self_attention has 3 entries, and channel_mults has 2 stages": {"self_attention": [True, False, True]},
    "layers_per_block has 1 entries, and channel_mults has 2 stages": {"layers_per_block": [2]},
    "layers_per_block is 1000000000, and must be a whole number from 1 to 100": {"layers_per_block": 10**9},
    "norm_num_groups 3 does not divide the 8 channels": {"norm_num_groups": 3},
    "norm_num_groups 16 does not divide the 8 channels": {"norm_num_groups": [4, 16]},
    "base_channels is 7, and must be even": {"base_channels": 7, "norm_num_groups": 1},
    "conv_in_kernel_sizes is [3, 4], and must be odd": {"conv_in_kernel_sizes": [3, 4]},
    "conv_in_kernel_sizes has 5 kernels, too many for 8 channels": {"conv_in_kernel_sizes": [3, 5, 7, 9, 11]},
    "conv_out_kernel_size is 2, and must be odd": {"conv_out_kernel_size": 2},
    "downsample_kernel_sizes is [3], and must be even": {"downsample_kernel_sizes": [3]},
    "combine_upsampled needs base_channels that 8 divides, and it is 4": {
        "combine_upsampled": True,
        "base_channels": 4,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_do_not_fit_are_refused_when_the_network_is_built(message):
    with pytest.raises(ConfigError) as error:
        UnclipUNet(**{**TINY, **REFUSED[message]})
    assert any(problem.startswith(message) for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize("message", REFUSED)
def test_and_when_a_config_is_read_without_torch(message):
    options = {"name": "unclip_unet", **{k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items()}}
    with pytest.raises(ValidationError) as error:
        build("models", {**options, **REFUSED[message]})
    name = message.split()[0]
    assert name in str(error.value)


def test_a_noise_level_without_a_smaller_image_is_refused():
    with pytest.raises(ConfigError, match="lowres_noise_cond is true, and lowres_cond is false"):
        UnclipUNet(**TINY, lowres_noise_cond=True)


def test_the_part_and_the_network_have_the_same_options_and_defaults():
    def plain(value):
        return list(value) if isinstance(value, tuple) else value

    network = {n: p.default for n, p in inspect.signature(UnclipUNet.__init__).parameters.items() if n != "self"}
    part = dataclasses.asdict(UnclipUNetModel())
    beside = set(inspect.signature(UnclipUNetModel.build).parameters) - {"self"}
    assert set(network) - beside == set(part) - {"image_conditioned", "text_conditioned", "gradient_checkpointing"}
    assert {n: plain(network[n]) for n in network if n in part} == {n: part[n] for n in network if n in part}


def test_a_part_builds_the_network_that_it_describes():
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items()}
    part = build("models", {"name": "unclip_unet", **options, "text_conditioned": True, "gradient_checkpointing": True})
    net = part.build(in_channels=1, out_channels=2, image_embed_dim=10, text_embed_dim=7, lowres_cond=True)
    assert net(**told(net)).shape == (3, 2, 8, 12)
    assert net.is_gradient_checkpointing
    with pytest.raises(
        ConfigError, match="text_conditioned is true, and the network is built with text_embed_dim=None"
    ):
        part.build(image_embed_dim=10)
    with pytest.raises(
        ConfigError, match="image_conditioned is false, and the network is built with image_embed_dim=3"
    ):
        UnclipUNetModel(image_conditioned=False).build(image_embed_dim=3)


def test_the_bottleneck_without_self_attention_has_none():
    assert not any("mid_block.attention" in name for name, _ in make(mid_self_attention=False).named_parameters())


def test_linear_attention_stands_where_self_attention_does_not():
    net = make(self_attention=(True, False), linear_attention=True)
    kinds = [type(block.attention) for block in (*net.down_blocks, *net.up_blocks)]
    assert kinds == [SelfAttention, LinearAttention, LinearAttention, SelfAttention]


# --- building blocks, each against another way to compute it ---------------------------------------------------------


def test_timesteps_are_embedded_as_diffusers_does():
    t = torch.tensor([0, 1, 37, 999])
    theirs = get_timestep_embedding(t, 32, downscale_freq_shift=1)
    # An angle of up to 999 is rounded to 3e-5.
    torch.testing.assert_close(timestep_embedding(t, 32), theirs, rtol=0, atol=1e-4)


def self_attention_by_hand(module, x, scale):
    """Position by position, head by head, in the order of the definition."""
    batch, channels = x.shape[:2]
    tokens = x.flatten(2).transpose(1, 2)
    normed = F.layer_norm(tokens, (channels,)) * module.norm.gain
    keys, values = (normed @ module.to_kv.weight.T).split(module.head_dim, dim=-1)
    keys = torch.cat([module.null_kv[0].expand(batch, 1, -1), keys], dim=1)
    values = torch.cat([module.null_kv[1].expand(batch, 1, -1), values], dim=1)
    heads = []
    for w in module.to_q.weight.split(module.head_dim):
        queries = normed @ w.T
        if module.cosine:
            logits = 16 * torch.cosine_similarity(queries[:, :, None], keys[:, None], dim=-1)
        else:
            logits = queries @ keys.transpose(1, 2) * scale
        heads.append(logits.softmax(-1) @ values)
    out = F.layer_norm(torch.cat(heads, -1) @ module.to_out.weight.T, (channels,)) * module.norm_out.gain
    return x + out.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 1 / math.sqrt(6)), ({"compat": True}, 1 / 6), ({"cosine": True}, None)],
    ids=["default", "compat", "cosine"],
)
def test_self_attention_is_what_its_definition_says(options, scale):
    module = SelfAttention(8, heads=3, head_dim=6, **options)
    nn.init.uniform_(module.norm.gain)
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(module(x), self_attention_by_hand(module, x, scale), rtol=1e-4, atol=1e-5)


def test_linear_attention_is_what_its_definition_says():
    """Through the matrix of all pairs of positions, which it never makes."""
    module, x = LinearAttention(8, heads=3, head_dim=6), torch.randn(2, 8, 3, 5)
    q, k, v = (
        part.reshape(2, 3, 6, 15)
        for part in module.to_qkv(F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1)).chunk(3, dim=1)
    )
    pairs = torch.einsum("bhdi,bhdj->bhij", q.softmax(2) / math.sqrt(6), k.softmax(3)) / 15
    out = torch.einsum("bhij,bhdj->bhdi", pairs, v / v.norm(dim=2, keepdim=True))
    out = module.to_out(F.gelu(out).reshape(2, 18, 3, 5))
    out = F.layer_norm(out.movedim(1, -1), (8,)).movedim(-1, 1)
    torch.testing.assert_close(module(x), x + out, rtol=1e-4, atol=1e-5)


def cross_attention_pair(dtype, num_tokens, compat=False):
    """Outputs and gradients of both ways to compute cross-attention."""
    torch.manual_seed(0)
    module = CrossAttention(24, 10, compat=compat).to(dtype)
    x, context = torch.randn(3, 24, 8, 8, dtype=dtype), torch.randn(3, num_tokens, 10, dtype=dtype)
    results = []
    for attend in (module._attend, module._folded):
        module.zero_grad()
        here, there = x.clone().requires_grad_(), context.clone().requires_grad_()
        tokens = module.norm(here.flatten(2).transpose(1, 2))
        out = module.norm_out(attend(tokens, *module._keys_and_values(there)))
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        results.append([out.detach(), here.grad, there.grad, *(p.grad.clone() for p in module.parameters())])
    return results


@pytest.mark.parametrize("num_tokens", [1, 6, 20])
def test_folded_cross_attention_is_the_same_algebra(num_tokens):
    """In double precision the two ways differ by rounding alone, in outputs and in all gradients."""
    for plain, folded in zip(*cross_attention_pair(torch.float64, num_tokens), strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-6, atol=1e-6)  # the softmax is float32 in both


def test_folded_cross_attention_is_as_good_in_single_precision():
    for plain, folded in zip(*cross_attention_pair(torch.float32, 6), strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=2e-5)


def test_cross_attention_is_folded_where_it_was_measured_to_be_faster(monkeypatch):
    faster = {(16, 7), (64, 13), (64, 19), (256, 25), (256, 32), (1024, 7), (4096, 7)}
    slower = {(4, 3), (4, 7), (16, 13), (16, 25), (64, 33), (64, 41), (1024, 263)}
    assert all(folding_pays(*sizes) for sizes in faster)
    assert not any(folding_pays(*sizes) for sizes in slower)

    taken = []
    monkeypatch.setattr(CrossAttention, "_folded", lambda self, tokens, *_: taken.append("folded") or tokens)
    monkeypatch.setattr(CrossAttention, "_attend", lambda self, tokens, *_: taken.append("plain") or tokens)
    for cosine, num_tokens in ((False, 6), (False, 70), (True, 6)):
        CrossAttention(8, 10, cosine=cosine)(torch.zeros(1, 8, 8, 8), torch.zeros(1, num_tokens, 10))
    assert taken == ["folded", "plain", "plain"]  # directions are not linear, so they cannot be folded


def test_cosine_cross_attention_is_what_its_definition_says():
    module, x, context = CrossAttention(8, 10, cosine=True), torch.randn(2, 8, 3, 5), torch.randn(2, 4, 10)
    queries = module.to_q(F.layer_norm(x.flatten(2).transpose(1, 2), (8,))).view(2, 15, 8, 64)
    keys, values = (part.view(2, 4, 8, 64) for part in module.to_kv(context).chunk(2, dim=-1))
    keys = torch.cat([module.null_kv[0].expand(2, 1, 8, 64), keys], dim=1)
    values = torch.cat([module.null_kv[1].expand(2, 1, 8, 64), values], dim=1)
    logits = 16 * torch.cosine_similarity(queries[:, :, None], keys[:, None], dim=-1)  # [B, N, J + 1, h]
    out = torch.einsum("bnjh,bjhd->bnhd", logits.softmax(2), values).flatten(2)
    out = F.layer_norm(module.to_out(out), (8,)).transpose(1, 2).view_as(x)
    torch.testing.assert_close(module(x, context), out, rtol=1e-4, atol=1e-5)


def test_a_map_is_enlarged_as_torch_does_with_the_same_cubic():
    x = torch.randn(2, 3, 4, 6)
    theirs = F.interpolate(x, (16, 12), mode="bicubic", antialias=True)  # with antialias its cubic has a = -1/2
    torch.testing.assert_close(enlarge(x, (16, 12)), theirs, rtol=1e-4, atol=1e-5)
    assert enlarge(x, (4, 6)) is x


def test_the_original_s_borders_fade_and_ours_do_not():
    """0.797 at the edges of a white image grown from 32 to 64 pixels, as observed."""
    white = torch.ones(1, 1, 32, 32)
    torch.testing.assert_close(enlarge(white, (64, 64)), torch.ones(1, 1, 64, 64))
    faded = enlarge(white, (64, 64), fade=True)[0, 0]
    assert faded[0, 32] == pytest.approx(0.797, abs=5e-4)
    assert faded[32, 32] == pytest.approx(1, abs=1e-6)


def test_standardised_filters_have_mean_0_and_variance_1():
    conv, x = StandardizedConv2d(4, 5, 3, padding=1), torch.randn(2, 4, 6, 6)
    filters = conv.weight.detach().flatten(1)
    filters = (filters - filters.mean(1, keepdim=True)) / (filters.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    wanted = F.conv2d(x, filters.view_as(conv.weight), conv.bias, padding=1)
    torch.testing.assert_close(conv(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_new_network_predicts_zero_and_a_new_upsample_makes_no_pattern():
    torch.manual_seed(0)
    net = UnclipUNet(**TINY)
    given = told(net)
    assert not net(**given).any()
    doubled = layers.PixelShuffleUpsample(4, 6)(torch.randn(1, 4, 3, 3))
    assert torch.equal(doubled, F.interpolate(doubled[..., ::2, ::2], scale_factor=2))


def test_a_block_without_cross_attention_looks_at_no_tokens():
    block = ResBlock(8, 12, time_dim=16, groups=4)
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert torch.equal(block(x, time), block(x, time, torch.randn(2, 3, 10)))
