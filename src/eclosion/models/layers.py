"""Building blocks of U-Nets: residual blocks that are told the time, attention, and changes of resolution.

Letters in shapes: B images, C channels, H x W pixels of a map, N = H W positions, J context tokens of width K,
h heads of width d, T numbers in the time vector. Maps are [B, C, H, W], tokens [B, N, C].

`compat` stands for the numbers of DALLE2-pytorch where they differ from what is right; for imported weights.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Combiner",
    "ConvBlock",
    "CrossAttention",
    "GainNorm",
    "LinearAttention",
    "MapGainNorm",
    "MultiKernelConv",
    "NearestUpsample",
    "PixelShuffleUpsample",
    "PixelUnshuffleDownsample",
    "ResBlock",
    "SelfAttention",
    "StandardizedConv2d",
    "enlarge",
    "folding_pays",
    "recompute",
    "timestep_embedding",
]

# Scale of the logits where queries and keys have length 1.
COSINE_SCALE = 16.0


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of a timestep, at frequencies from 1 down to 1/10000.

    Args:
        t: timesteps as they are, not rescaled, any real dtype [B].
        dim: even, at least 4.

    Returns:
        float32 [B, dim].

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5, with sines and cosines in two blocks.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function and keep none of its activations; they are computed again when gradients need them.

    Nothing here draws random numbers, so no state of a generator is kept, which could not be read during a capture.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


# --- norms -----------------------------------------------------------------------------------------------------------


def _epsilon(x: Tensor, compat: bool) -> float:
    """What is added to a variance. The original's depends on the dtype, so that training under autocast differs from
    sampling in float32.
    """
    return 1e-3 if compat and x.dtype != torch.float32 else 1e-5


class GainNorm(nn.Module):
    """Layer norm over the channels of tokens [..., C], with a gain and no bias."""

    def __init__(self, channels: int, *, compat: bool = False) -> None:
        super().__init__()
        self.compat = compat
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 at each position, times the gain."""
        return F.layer_norm(x, self.gain.shape, self.gain, eps=_epsilon(x, self.compat))


class MapGainNorm(nn.Module):
    """Layer norm over the channels of a map, with a gain and no bias."""

    def __init__(self, channels: int, *, compat: bool = False) -> None:
        super().__init__()
        self.compat = compat
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 at each position, times the gain; computed in float32."""
        exact = x.float()
        variance, mean = torch.var_mean(exact, dim=1, correction=0, keepdim=True)
        return ((exact - mean) * torch.rsqrt(variance + _epsilon(x, self.compat)) * self.gain).to(x.dtype)


class StandardizedConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1.

    Source: Qiao et al. 2019, https://arxiv.org/abs/1903.10520.
    """

    compat = False

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to map."""
        epsilon = _epsilon(x, self.compat)
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + epsilon)
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


# --- residual blocks -------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """3 x 3 convolution, group norm, SiLU."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, standardize: bool = False, compat: bool = False
    ) -> None:
        super().__init__()
        self.conv = (StandardizedConv2d if standardize else nn.Conv2d)(in_channels, out_channels, 3, padding=1)
        if isinstance(self.conv, StandardizedConv2d):
            self.conv.compat = compat
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Map to map; `scale` and `shift` [B, C, 1, 1] change what was normalised to scale 1 and shift 0."""
        x = self.norm(self.conv(x))
        if scale is not None and shift is not None:
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResBlock(nn.Module):
    """Residual block that is told the time and may look at context tokens.

    Args:
        in_channels, out_channels: of its maps.
        time_dim: T.
        groups: of its norms.
        context_dim: K; none for a block that looks at no tokens.
        cosine: whether cross-attention compares directions only.
        standardize: whether kernels are standardised.
        compat: as at the top of the file.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any] = staticmethod(recompute)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int,
        groups: int,
        context_dim: int | None = None,
        cosine: bool = False,
        standardize: bool = False,
        compat: bool = False,
    ) -> None:
        super().__init__()
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.cross_attention = (
            CrossAttention(out_channels, context_dim, cosine=cosine, compat=compat) if context_dim else None
        )
        self.block_1 = ConvBlock(in_channels, out_channels, groups=groups, standardize=standardize, compat=compat)
        self.block_2 = ConvBlock(out_channels, out_channels, groups=groups, standardize=standardize, compat=compat)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        """Map to map.

        Args:
            x: [B, in_channels, H, W].
            time: time vector [B, T].
            context: tokens [B, J, K]; not looked at by a block without cross-attention.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._compute, x, time, context)  # type: ignore[no-any-return]
        return self._compute(x, time, context)

    def _compute(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        hidden = self.block_1(x, scale, shift)
        if self.cross_attention is not None:
            # A sum has the memory layout of its first term: that of the other, with channels last, would pass on to all
            # that follows, and on a CPU all of that is slower in it.
            hidden = hidden + self.cross_attention(hidden, context)
        hidden = self.block_2(hidden)
        return hidden + self.shortcut(x)  # type: ignore[no-any-return]


# --- attention -------------------------------------------------------------------------------------------------------


def _tokens(x: Tensor) -> Tensor:
    """Map [B, C, H, W] as tokens [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, N, C] as a map with the pixels of another."""
    return torch.unflatten(tokens.transpose(1, 2), 2, like.shape[2:])


class CrossAttention(nn.Module):
    """Attention of a map's positions to context tokens and one learned token.

    Of few tokens the products of projections come first: position x attends to key k with (Wq x) . k = x . (Wq' k),
    and what it gets from value v is Wo v. So queries and values of inner width h d are never made for each position,
    only J + 1 vectors of width C per head and image.
    """

    HEADS, WIDTH = 8, 64

    def __init__(self, channels: int, context_dim: int, *, cosine: bool = False, compat: bool = False) -> None:
        super().__init__()
        inner = self.HEADS * self.WIDTH
        self.cosine = cosine
        self.norm = GainNorm(channels, compat=compat)
        self.null_kv = nn.Parameter(torch.randn(2, self.WIDTH))  # shared by all heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * inner, bias=False)  # keys, then values
        self.to_out = nn.Linear(inner, channels, bias=False)
        self.norm_out = GainNorm(channels, compat=compat)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """What each position of a map gets from the tokens.

        Args:
            x: [B, C, H, W].
            context: [B, J, K].

        Returns:
            [B, C, H, W], to be added to x.
        """
        tokens = self.norm(_tokens(x))
        keys, values = self._keys_and_values(context)
        folds = not self.cosine and folding_pays(tokens.shape[1], keys.shape[1])
        attend = self._folded if folds else self._attend
        return _map(self.norm_out(attend(tokens, keys, values)), x)

    def _keys_and_values(self, context: Tensor) -> list[Tensor]:
        """Two of [B, J + 1, h, d], the learned one first."""
        both = torch.unflatten(self.to_kv(context), -1, (2, self.HEADS, self.WIDTH))
        null = self.null_kv[:, None].expand(len(context), 1, 2, self.HEADS, self.WIDTH).to(both.dtype)
        return list(torch.cat([null, both], dim=1).unbind(2))

    def _attend(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens [B, N, C] to tokens, position by position."""
        queries = torch.unflatten(self.to_q(tokens), -1, (self.HEADS, self.WIDTH))
        scale = self.WIDTH**-0.5
        if self.cosine:
            queries, keys, scale = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1), COSINE_SCALE
        queries, keys, values = (x.transpose(1, 2).to(values.dtype) for x in (queries, keys, values))
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return self.to_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _folded(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same as `_attend`, exactly but for rounding; see the class."""
        heads = (self.HEADS, self.WIDTH)
        to_q, to_out = torch.unflatten(self.to_q.weight, 0, heads), torch.unflatten(self.to_out.weight, 1, heads)
        by_key = torch.einsum("bjhd,hdc->bhjc", keys * self.WIDTH**-0.5, to_q).flatten(1, 2)
        by_value = torch.einsum("bjhd,chd->bhjc", values, to_out).flatten(1, 2)
        # Positions come last: a softmax over neighbours in memory that are so few is slow on a CPU.
        logits = torch.unflatten(by_key @ tokens.transpose(1, 2), 1, (self.HEADS, -1))  # [B, h, J + 1, N]
        weights = logits.softmax(2, dtype=torch.float32).flatten(1, 2).to(values.dtype)
        return weights.transpose(1, 2) @ by_value


def folding_pays(num_positions: int, num_keys: int) -> bool:
    """Whether cross-attention of so many positions to so many keys is faster with its projections multiplied first.

    By the count of products it is up to about 64 N / (N + 64) keys; measured on a CPU up to 40 N / (N + 64), by a
    factor of 1.1 with 7 keys at 4 x 4 pixels, 2.2 at 8 x 8 and 3.8 at 16 x 16 (float32, forward and backward).
    """
    return num_keys * (num_positions + CrossAttention.WIDTH) <= 40 * num_positions


class SelfAttention(nn.Module):
    """Attention between all positions of a map and one learned token, added to the map.

    All heads share keys and values (multi-query attention: Shazeer 2019, https://arxiv.org/abs/1911.02150).
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int, cosine: bool = False, compat: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim, self.cosine = heads, head_dim, cosine
        # The original scales the queries by 1/sqrt(d), then the logits once more.
        self.scale = COSINE_SCALE if cosine else 1 / head_dim if compat else head_dim**-0.5
        self.norm = GainNorm(channels, compat=compat)
        self.null_kv = nn.Parameter(torch.randn(2, head_dim))
        self.to_q = nn.Linear(channels, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(channels, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels, bias=False)
        self.norm_out = GainNorm(channels, compat=compat)

    def forward(self, x: Tensor) -> Tensor:
        """Map to map of the same shape."""
        tokens = self.norm(_tokens(x))
        both = self.to_kv(tokens)
        null = self.null_kv.flatten().expand(len(x), 1, -1).to(both.dtype)
        keys, values = torch.cat([null, both], dim=1).chunk(2, dim=-1)
        queries = torch.unflatten(self.to_q(tokens), -1, (self.heads, self.head_dim))
        if self.cosine:
            queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
        # With one set of keys, the heads of a position are as good as more positions.
        queries, keys, values = (t.to(values.dtype)[:, None] for t in (queries.flatten(1, 2), keys, values))
        out = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        out = self.to_out(torch.unflatten(out[:, 0], 1, (-1, self.heads)).flatten(2))
        return x + _map(self.norm_out(out), x)


class LinearAttention(nn.Module):
    """Attention whose cost grows with the positions, not their square, added to the map.

    Source: Shen et al. 2018, https://arxiv.org/abs/1812.01243; values have length 1.
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int, compat: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.norm = MapGainNorm(channels, compat=compat)
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm_out = MapGainNorm(channels, compat=compat)

    def forward(self, x: Tensor) -> Tensor:
        """Map to map of the same shape."""
        num_positions = x.shape[2] * x.shape[3]
        qkv = torch.unflatten(self.to_qkv(self.norm(x)).flatten(2), 1, (3, self.heads, self.head_dim))
        queries, keys, values = qkv.unbind(1)  # [B, h, d, N]
        queries = queries.softmax(2) * self.head_dim**-0.5
        keys = keys.softmax(3) / math.sqrt(num_positions)
        values = F.normalize(values, dim=2) / math.sqrt(num_positions)
        context = keys @ values.transpose(2, 3)  # [B, h, d, d]
        out = F.gelu(context.transpose(2, 3) @ queries).flatten(1, 2)
        return x + self.norm_out(self.to_out(torch.unflatten(out, 2, x.shape[2:])))  # type: ignore[no-any-return]


# --- convolutions that change resolution -----------------------------------------------------------------------------


class MultiKernelConv(nn.Module):
    """Convolutions of several sizes side by side, their outputs joined.

    Each has half of the channels of the one before; the last has what is left. With stride 1 kernels are odd, with
    stride 2 even, so that all outputs have one size.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_sizes: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        widths = [out_channels >> i for i in range(1, len(kernel_sizes))]
        widths.append(out_channels - sum(widths))
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, width, size, stride=stride, padding=(size - stride) // 2)
            for width, size in zip(widths, kernel_sizes, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map to map, of 1/stride its height and width."""
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class PixelUnshuffleDownsample(nn.Module):
    """Half the height and width: each square of 2 x 2 pixels becomes channels, which a 1 x 1 convolution mixes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, H/2, W/2]."""
        return self.conv(F.pixel_unshuffle(x, 2))  # type: ignore[no-any-return]


class PixelShuffleUpsample(nn.Module):
    """Twice the height and width: channels of a 1 x 1 convolution become squares of 2 x 2 pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 1)
        # The four pixels of a square start equal, so that there is no chequerboard (https://arxiv.org/abs/1707.02937).
        first = torch.empty_like(self.conv.weight[:out_channels])
        nn.init.kaiming_uniform_(first)
        with torch.no_grad():
            self.conv.weight.copy_(first.repeat_interleave(4, dim=0))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, 2 H, 2 W]."""
        return F.pixel_shuffle(F.silu(self.conv(x)), 2)


class NearestUpsample(nn.Module):
    """Twice the height and width: each pixel four times, smoothed by a 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[no-any-return]


class Combiner(nn.Module):
    """Joins the outputs of all stages, enlarged to the size of the last."""

    def __init__(self, in_channels: Sequence[int], channels: int, *, groups: int, compat: bool = False) -> None:
        super().__init__()
        self.compat = compat
        self.blocks = nn.ModuleList(ConvBlock(width, channels, groups=groups) for width in in_channels)

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """The map x [B, C, H, W], and after it `channels` channels from each of the maps."""
        size = (x.shape[2], x.shape[3])
        enlarged = [enlarge(item, size, fade=self.compat) for item in maps]
        return torch.cat([x, *(block(item) for block, item in zip(self.blocks, enlarged, strict=True))], dim=1)


def enlarge(x: Tensor, size: tuple[int, int], *, fade: bool = False) -> Tensor:
    """A map interpolated to a larger size by cubics (Keys 1981, a = -1/2), with the centres of both images aligned.

    Products with matrices, whose gradients have the same bits each time, as torch's own interpolation has not on CUDA.

    Args:
        x: [B, C, h, w].
        size: height and width, at least those of x.
        fade: whether there is black outside of the image, so that its borders fade, as in the original.
    """
    for dim, length in ((2, size[0]), (3, size[1])):
        if x.shape[dim] != length:
            weights = _cubic_weights(x.shape[dim], length, fade=fade, device=x.device).to(x.dtype)
            x = (x.movedim(dim, -1) @ weights.T).movedim(-1, dim)
    return x


def _cubic_weights(old: int, new: int, *, fade: bool, device: torch.device) -> Tensor:
    """What each new pixel takes of each old one; float32 [new, old]."""
    where = (torch.arange(new, device=device) + 0.5) * (old / new) - 0.5
    d = (where[:, None] - torch.arange(old, device=device)).abs()
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
    return weights if fade else weights / weights.sum(1, keepdim=True)
