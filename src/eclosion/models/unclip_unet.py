"""The U-Net of image decoders in the manner of DALL-E 2, as DALLE2-pytorch built it.

A noisy image goes down through stages of halved resolution, through a bottleneck, and up again; what was in each
stage skips over to its counterpart. All residual blocks are told one time vector: the timestep, and with it the image
embedding and the noise in a smaller image. All but those of the first stage look at context tokens, made of timestep
and image embedding; the two in the bottleneck look at text tokens as well.

Letters in shapes: B images, H x W pixels, D base channels, T = 4 D, E numbers in an image embedding, K width of the
context tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from eclosion.models.layers import (
    Combiner,
    LinearAttention,
    MultiKernelConv,
    NearestUpsample,
    PixelShuffleUpsample,
    PixelUnshuffleDownsample,
    ResBlock,
    SelfAttention,
    recompute,
    timestep_embedding,
)
from eclosion.models.unclip import COMBINER_GROUPS, Stage, stages

__all__ = ["UnclipUNet"]

Options = Mapping[str, Any]


class UnclipUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """U-Net told a timestep and, as its options say, an image embedding, text encodings and a smaller image.

    Nothing in it is random: which images go without their embedding or text in training is an argument. No parameter
    is left out of any forward pass, so that DistributedDataParallel need not look for unused ones.

    Args:
        in_channels: channels of the image, of a smaller image and of an earlier estimate.
        out_channels: channels of the output; None means in_channels.
        image_embed_dim: E; None for a network that gets no image embedding.
        text_embed_dim: numbers in the encoding of a text token; None for a network that gets no text.
        lowres_cond: whether it sees a smaller image, enlarged.
        lowres_noise_cond: whether it is told how much noise that image carries.
        (others): as in `eclosion.models.unclip.UnclipUNetModel`, each with a comment.

    Raises:
        ConfigError: if options do not fit together, with one message for each.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        base_channels: int = 64,
        channel_mults: Sequence[int] = (1, 2, 4, 8),
        layers_per_block: int | Sequence[int] = 2,
        norm_num_groups: int | Sequence[int] = 8,
        self_attention: bool | Sequence[bool] = False,
        linear_attention: bool = False,
        mid_self_attention: bool = True,
        num_attention_heads: int = 16,
        attention_head_dim: int = 32,
        cosine_self_attention: bool = False,
        cosine_cross_attention: bool = False,
        cross_attention_dim: int | None = None,
        num_image_tokens: int = 4,
        num_time_tokens: int = 2,
        num_text_tokens: int = 256,
        add_image_embed_to_time: bool = True,
        self_cond: bool = False,
        conv_in_kernel_sizes: Sequence[int] = (3, 7, 15),
        conv_out_kernel_size: int = 1,
        downsample_kernel_sizes: Sequence[int] | None = None,
        upsample: Literal["pixel_shuffle", "nearest"] = "pixel_shuffle",
        memory_efficient: bool = False,
        scale_skip_connection: bool = False,
        combine_upsampled: bool = False,
        weight_standardization: bool = False,
        compat: bool = False,
        in_channels: int = 3,
        out_channels: int | None = None,
        image_embed_dim: int | None = None,
        text_embed_dim: int | None = None,
        lowres_cond: bool = False,
        lowres_noise_cond: bool = False,
    ) -> None:
        super().__init__()
        options: Options = self.config
        plan = stages(options)
        context_dim = _context_dim(options)

        self.conv_in = MultiKernelConv(
            in_channels * (1 + self_cond + lowres_cond), base_channels, kernel_sizes=conv_in_kernel_sizes
        )
        self.time_embedding = TimeEmbedding(base_channels, context_dim, num_time_tokens)
        self.image_embedding = (
            ImageEmbedding(
                image_embed_dim,
                4 * base_channels,
                context_dim,
                num_image_tokens,
                in_time=add_image_embed_to_time,
                compat=compat,
            )
            if image_embed_dim
            else None
        )
        self.text_embedding = TextEmbedding(text_embed_dim, context_dim, num_text_tokens) if text_embed_dim else None
        self.noise_level_embedding = NoiseLevelEmbedding(base_channels) if lowres_noise_cond else None
        # A single stage looks at no tokens, and what is never used must not be there.
        self.norm_context = nn.LayerNorm(context_dim) if len(plan) > 1 else None
        self.norm_mid_context = nn.LayerNorm(context_dim)

        first, last = plan[0], plan[-1]
        self.block_in = _resblock(options, base_channels, base_channels, first.groups) if memory_efficient else None
        self.down_blocks = nn.ModuleList(DownBlock(stage, options) for stage in plan)
        self.mid_block = MidBlock(last.inner, last.groups, options)
        self.up_blocks = nn.ModuleList(UpBlock(stage, options) for stage in reversed(plan))
        self.combiner = (
            Combiner([s.inner for s in reversed(plan)], base_channels, groups=COMBINER_GROUPS, compat=compat)
            if combine_upsampled
            else None
        )
        combined = base_channels * (2 + len(plan) * combine_upsampled)
        self.block_out = _resblock(options, combined, base_channels, first.groups)
        self.conv_out = nn.Conv2d(
            base_channels + in_channels * lowres_cond,
            out_channels or in_channels,
            conv_out_kernel_size,
            padding=conv_out_kernel_size // 2,
        )
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @property
    def size_factor(self) -> int:
        """Height and width of an image must be multiples of this."""
        num_stages = len(self.config.channel_mults)
        return int(2 ** (num_stages if self.config.memory_efficient else num_stages - 1))

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Compute the activations of residual blocks twice instead of keeping them."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or recompute)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        image_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        lowres_cond: Tensor | None = None,
        lowres_noise_level: Tensor | None = None,
        self_cond: Tensor | None = None,
        image_keep_mask: Tensor | None = None,
        text_keep_mask: Tensor | None = None,
    ) -> Tensor:
        """The prediction for a batch of noisy images.

        What the network was built for must be given, except an earlier estimate; nothing else may be.

        Args:
            sample: noisy images [B, in_channels, H, W]; H and W multiples of `size_factor`.
            timestep: noise levels as the schedule counts them, 0 to num_train_timesteps - 1; [B], or one for all.
            image_embed: one embedding per image [B, E].
            text_encodings: one encoding per token [B, any number, text_embed_dim]; a token whose encoding is all
                zeros counts as none.
            lowres_cond: the smaller images enlarged to the size of sample, in [-1, 1] plus their noise,
                [B, in_channels, H, W].
            lowres_noise_level: how much noise those carry, in steps from 0 to 999 [B].
            self_cond: an earlier estimate [B, in_channels, H, W]; None means zeros.
            image_keep_mask: bool [B], false for images that go without their embedding; None keeps all.
            text_keep_mask: bool [B], false for images that go without their text; None keeps all.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: if something is missing, is too much, or has the wrong shape.
        """
        self._check_image(sample, timestep)
        told = {
            "image_embed": image_embed,
            "text_encodings": text_encodings,
            "lowres_cond": lowres_cond,
            "lowres_noise_level": lowres_noise_level,
            "self_cond": self_cond,
            "image_keep_mask": image_keep_mask,
            "text_keep_mask": text_keep_mask,
        }
        self._check_told(sample, told)
        time, context, mid_context = self._contexts(timestep.expand(len(sample)), told)
        if self.config.self_cond and self_cond is None:
            self_cond = torch.zeros_like(sample)
        seen = [x for x in (sample, self_cond, lowres_cond) if x is not None]
        x = first = self.conv_in(torch.cat(seen, dim=1))
        if self.block_in is not None:
            x = self.block_in(x, time)
        skips: list[Tensor] = []
        for block in self.down_blocks:
            x, passed = block(x, time, context)
            skips += passed
        x = self.mid_block(x, time, mid_context)
        maps = []
        for block in self.up_blocks:
            passed = [skips.pop() for _ in block.blocks]  # type: ignore[union-attr]
            x, before = block(x, passed, time, context)
            maps.append(before)

        if self.combiner is not None:
            x = self.combiner(x, maps)
        x = self.block_out(torch.cat([x, first], dim=1), time)
        return self.conv_out(x if lowres_cond is None else torch.cat([x, lowres_cond], dim=1))  # type: ignore[no-any-return]

    def _contexts(self, timestep: Tensor, told: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the blocks are told: time vector [B, T], context tokens, and those of the bottleneck, [B, any, K]."""
        time, tokens = self.time_embedding(timestep)
        if self.noise_level_embedding is not None:
            time = time + self.noise_level_embedding(told["lowres_noise_level"])
        if self.image_embedding is not None:
            in_time, image_tokens = self.image_embedding(told["image_embed"], told["image_keep_mask"])
            time = time if in_time is None else time + in_time
            tokens = torch.cat([tokens, image_tokens], dim=1)
        context = None if self.norm_context is None else self.norm_context(tokens)
        if self.text_embedding is not None:
            text = self.text_embedding(told["text_encodings"], told["text_keep_mask"])
            tokens = torch.cat([tokens, text], dim=1)
        return time, context, self.norm_mid_context(tokens)

    def _check_image(self, sample: Tensor, timestep: Tensor) -> None:
        factor, channels = self.size_factor, self.config.in_channels
        if not _fits(sample, (None, channels, None, None)):
            raise ValueError(f"sample has shape {list(sample.shape)}, and must be [B, {channels}, H, W].")
        height, width = sample.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"sample is {height} x {width} pixels, and both must be multiples of {factor}: this network halves the "
                f"resolution {factor.bit_length() - 1} times."
            )
        if timestep.ndim and not _fits(timestep, (len(sample),)):
            raise ValueError(f"timestep has shape {list(timestep.shape)}, and must be [{len(sample)}], or one for all.")

    def _check_told(self, sample: Tensor, told: Mapping[str, Tensor | None]) -> None:
        options, batch, image_shape = self.config, len(sample), tuple(sample.shape)
        image, text = options.image_embed_dim, options.text_embed_dim
        # name -> whether the network was built for it, whether it must then be given, its shape
        wanted: dict[str, tuple[bool, bool, tuple[int | None, ...]]] = {
            "image_embed": (bool(image), True, (batch, image)),
            "text_encodings": (bool(text), True, (batch, None, text)),
            "lowres_cond": (options.lowres_cond, True, image_shape),
            "lowres_noise_level": (options.lowres_noise_cond, True, (batch,)),
            "self_cond": (options.self_cond, False, image_shape),
            "image_keep_mask": (bool(image), False, (batch,)),
            "text_keep_mask": (bool(text), False, (batch,)),
        }
        for name, (used, needed, shape) in wanted.items():
            tensor = told[name]
            if tensor is None and used and needed:
                raise ValueError(f"{name} is missing, and this network was built for it.")
            if tensor is not None and not used:
                raise ValueError(f"{name} is given, and this network was built without it. Leave it out.")
            if tensor is not None and not _fits(tensor, shape):
                sizes = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(f"{name} has shape {list(tensor.shape)}, and must be [{sizes}].")


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    sizes = zip(tensor.shape, shape, strict=False)
    return tensor.ndim == len(shape) and all(want is None or have == want for have, want in sizes)


def _context_dim(options: Options) -> int:
    return int(options["cross_attention_dim"] or options["base_channels"])


# --- what the network is told ----------------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """The timestep as a vector for all residual blocks and as context tokens."""

    def __init__(self, base_channels: int, context_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.base_channels, self.num_tokens = base_channels, num_tokens
        time_dim = 4 * base_channels
        self.hidden = nn.Linear(base_channels, time_dim)
        self.to_tokens = nn.Linear(time_dim, num_tokens * context_dim)
        self.to_vector = nn.Linear(time_dim, time_dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B] as vector [B, T] and tokens [B, num_tokens, K]."""
        waves = timestep_embedding(timestep, self.base_channels).to(self.hidden.weight.dtype)
        hidden = F.gelu(self.hidden(waves))
        return self.to_vector(hidden), self.to_tokens(hidden).unflatten(1, (self.num_tokens, -1))


class NoiseLevelEmbedding(nn.Module):
    """The noise in a smaller image as a vector that is added to the timestep's."""

    def __init__(self, base_channels: int) -> None:
        super().__init__()
        self.base_channels = base_channels
        self.hidden = nn.Linear(base_channels, 4 * base_channels)
        self.to_vector = nn.Linear(4 * base_channels, 4 * base_channels)

    def forward(self, level: Tensor) -> Tensor:
        """Levels [B] as vector [B, T]."""
        waves = timestep_embedding(level, self.base_channels).to(self.hidden.weight.dtype)
        return self.to_vector(F.gelu(self.hidden(waves)))  # type: ignore[no-any-return]


class ImageEmbedding(nn.Module):
    """An image embedding as a vector for all residual blocks and as context tokens, with learned ones for none."""

    def __init__(
        self, embed_dim: int, time_dim: int, context_dim: int, num_tokens: int, *, in_time: bool, compat: bool
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.null_tokens = nn.Parameter(torch.randn(1, num_tokens, context_dim))
        self.null_vector = nn.Parameter(torch.randn(1, time_dim)) if in_time else None
        # The original leaves an embedding as wide as a token as it is.
        skips = compat and embed_dim == context_dim
        self.to_tokens = None if skips else nn.Linear(embed_dim, num_tokens * context_dim)
        self.to_vector = nn.Linear(embed_dim, time_dim) if in_time else None

    def forward(self, image_embed: Tensor, keep: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Embeddings [B, E] as vector [B, T], if it is wanted, and tokens [B, num_tokens, K].

        With compat and E = K all tokens of an image are its embedding, as in the original for a batch of one; of
        more images the original mixes the embeddings, or fails.
        """
        keep = _all_if_none(keep, image_embed)
        if self.to_tokens is None:
            tokens = image_embed[:, None].expand(-1, self.num_tokens, -1)
        else:
            tokens = self.to_tokens(image_embed).unflatten(1, (self.num_tokens, -1))
        tokens = torch.where(keep[:, None, None], tokens, self.null_tokens)
        if self.to_vector is None:
            return None, tokens
        return torch.where(keep[:, None], F.gelu(self.to_vector(image_embed)), self.null_vector), tokens  # type: ignore[arg-type]


class TextEmbedding(nn.Module):
    """Text encodings as a fixed number of tokens: a learned one stands at each place without text."""

    def __init__(self, embed_dim: int, context_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.null_tokens = nn.Parameter(torch.randn(1, num_tokens, context_dim))
        self.to_tokens = nn.Linear(embed_dim, context_dim)

    def forward(self, encodings: Tensor, keep: Tensor | None) -> Tensor:
        """Encodings [B, any, embed_dim] as tokens [B, num_tokens, K]."""
        length = self.null_tokens.shape[1]
        encodings = encodings[:, :length]
        present = (encodings != 0).any(-1) & _all_if_none(keep, encodings)[:, None]
        missing = length - encodings.shape[1]
        tokens = F.pad(self.to_tokens(encodings), (0, 0, 0, missing))
        return torch.where(F.pad(present, (0, missing))[..., None], tokens, self.null_tokens)


def _all_if_none(keep: Tensor | None, like: Tensor) -> Tensor:
    """The mask, or one that is true everywhere: so what is learned for "none" has a gradient in each pass, if zero."""
    return torch.ones(len(like), dtype=torch.bool, device=like.device) if keep is None else keep


# --- stages ----------------------------------------------------------------------------------------------------------


def _resblock(options: Options, in_channels: int, out_channels: int, groups: int, *, looks: bool = False) -> ResBlock:
    """A residual block; `looks` says whether it looks at context tokens."""
    return ResBlock(
        in_channels,
        out_channels,
        time_dim=4 * options["base_channels"],
        groups=groups,
        context_dim=_context_dim(options) if looks else None,
        cosine=options["cosine_cross_attention"],
        standardize=options["weight_standardization"],
        compat=options["compat"],
    )


def _attention(options: Options, kind: str | None, channels: int) -> nn.Module:
    heads: dict[str, Any] = {
        "heads": options["num_attention_heads"],
        "head_dim": options["attention_head_dim"],
        "compat": options["compat"],
    }
    if kind == "full":
        return SelfAttention(channels, cosine=options["cosine_self_attention"], **heads)
    return LinearAttention(channels, **heads) if kind == "linear" else nn.Identity()


def _downsample(options: Options, in_channels: int, out_channels: int) -> nn.Module:
    sizes = options["downsample_kernel_sizes"]
    if sizes is None:
        return PixelUnshuffleDownsample(in_channels, out_channels)
    return MultiKernelConv(in_channels, out_channels, kernel_sizes=sizes, stride=2)


class DownBlock(nn.Module):
    """A stage on the way to the bottleneck.

    In the memory-efficient order the resolution is halved on entering, else on leaving, where the last stage keeps it.
    """

    def __init__(self, stage: Stage, options: Options) -> None:
        super().__init__()
        first, width = options["memory_efficient"], stage.skip
        self.enter = _downsample(options, stage.outer, stage.inner) if first else nn.Identity()
        self.block = _resblock(options, width, width, stage.groups)
        self.blocks = nn.ModuleList(
            _resblock(options, width, width, stage.groups, looks=stage.cross_attention) for _ in range(stage.layers)
        )
        self.attention = _attention(options, stage.attention, width)
        mixes = first or stage.last
        self.leave = nn.Conv2d(width, stage.inner, 1) if mixes else _downsample(options, width, stage.inner)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The map for the next stage, and what skips the bottleneck, in order."""
        x = self.block(self.enter(x), time)
        skips = []
        for block in self.blocks:
            x = block(x, time, context)
            skips.append(x)
        x = self.attention(x)
        skips.append(x)
        return self.leave(x), skips


class MidBlock(nn.Module):
    """The bottleneck."""

    def __init__(self, channels: int, groups: int, options: Options) -> None:
        super().__init__()
        self.block_1 = _resblock(options, channels, channels, groups, looks=True)
        self.attention = _attention(options, "full" if options["mid_self_attention"] else None, channels)
        self.block_2 = _resblock(options, channels, channels, groups, looks=True)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Map to map."""
        return self.block_2(self.attention(self.block_1(x, time, context)), time, context)  # type: ignore[no-any-return]


class UpBlock(nn.Module):
    """A stage on the way from the bottleneck; its resolution is doubled on leaving, unless it has that of the image."""

    def __init__(self, stage: Stage, options: Options) -> None:
        super().__init__()
        self.skip_scale = 0.5**0.5 if options["scale_skip_connection"] else 1.0
        self.blocks = nn.ModuleList(
            _resblock(options, stage.inner + stage.skip, stage.inner, stage.groups, looks=stage.cross_attention)
            for _ in range(stage.layers + 1)
        )
        self.attention = _attention(options, stage.attention, stage.inner)
        upsample = PixelShuffleUpsample if options["upsample"] == "pixel_shuffle" else NearestUpsample
        doubles = options["memory_efficient"] or stage.index > 0
        self.leave = upsample(stage.inner, stage.outer) if doubles else nn.Identity()

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], time: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The map for the next stage, and the map before its resolution was doubled.

        `skips` holds one map for each block, the last that went down first.
        """
        for block, skip in zip(self.blocks, skips, strict=True):
            scaled = skip if self.skip_scale == 1 else skip * self.skip_scale
            x = block(torch.cat([x, scaled], dim=1), time, context)
        x = self.attention(x)
        return self.leave(x), x
