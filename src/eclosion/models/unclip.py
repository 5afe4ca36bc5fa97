"""The U-Net of image decoders in the manner of DALL-E 2: its options, and whether they fit together.

Without torch, so that a config is checked before anything is loaded; the network is in `unclip_unet`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from eclosion.errors import ConfigError
from eclosion.registry import part

if TYPE_CHECKING:
    from eclosion.models.unclip_unet import UnclipUNet

__all__ = ["COMBINER_GROUPS", "Stage", "UnclipUNetModel", "stages"]

Positive = Annotated[int, Field(ge=1)]
# Groups of the norms in the combiner; not an option of the original, either.
COMBINER_GROUPS = 8


@part
class UnclipUNetModel:
    """The U-Net of a DALL-E 2 style decoder, told the timestep, an image embedding, text encodings and a smaller image.

    Source: the decoder of Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, as DALLE2-pytorch built it.
    """

    # Channels of the first and last maps; even.
    base_channels: Annotated[int, Field(ge=4)] = 64
    # One stage per entry, each at half the resolution of the one before: its channels, in multiples of base_channels.
    channel_mults: list[Positive] = field(default_factory=lambda: [1, 2, 4, 8])
    # Residual blocks in a stage beside its first one; a number, or one per stage.
    layers_per_block: Positive | list[Positive] = 2
    # Groups of the group norms; a number, or one per stage.
    norm_num_groups: Positive | list[Positive] = 8
    # Which stages end with attention between all positions; one answer, or one per stage.
    self_attention: bool | list[bool] = False
    # Whether the stages without self-attention have linear attention, whose cost grows with the pixels, not their
    # square.
    linear_attention: bool = False
    # Whether the bottleneck has self-attention.
    mid_self_attention: bool = True
    # Heads of self- and linear attention.
    num_attention_heads: Positive = 16
    # Channels of each of those heads.
    attention_head_dim: Positive = 32
    # Whether self-attention compares directions only: queries and keys have length 1.
    cosine_self_attention: bool = False
    # Whether cross-attention compares directions only.
    cosine_cross_attention: bool = False
    # Channels of the tokens that cross-attention looks at; none means base_channels.
    cross_attention_dim: Positive | None = None
    # Tokens that the image embedding becomes.
    num_image_tokens: Positive = 4
    # Tokens that the timestep becomes.
    num_time_tokens: Positive = 2
    # Text tokens that the bottleneck looks at; shorter texts are filled up with learned ones, longer ones are cut.
    num_text_tokens: Positive = 256
    # Whether the image embedding reaches this network; none means the first network of a cascade only.
    image_conditioned: bool | None = None
    # Whether the text encodings reach this network.
    text_conditioned: bool = False
    # Whether the image embedding is also added to what every residual block is told, beside the timestep.
    add_image_embed_to_time: bool = True
    # Whether the network sees an earlier estimate of the image beside the noisy one.
    self_cond: bool = False
    # Sizes of the first convolution's kernels, all odd; of several, each is half as many channels as the one before.
    conv_in_kernel_sizes: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [3, 7, 15])
    # Size of the last convolution's kernel; odd.
    conv_out_kernel_size: Positive = 1
    # Sizes of the kernels that halve the resolution, all even, such as [2, 4]; none packs each 2 x 2 square of pixels
    # into channels.
    downsample_kernel_sizes: Annotated[list[Positive], Field(min_length=1)] | None = None
    # How the resolution is doubled: channels unpacked into pixels, or pixels repeated and smoothed.
    upsample: Literal["pixel_shuffle", "nearest"] = "pixel_shuffle"
    # Whether a stage halves the resolution before its blocks, and doubles it after them; saves memory in large images.
    memory_efficient: bool = False
    # Whether what skips the bottleneck is scaled by the root of one half.
    scale_skip_connection: bool = False
    # Whether the last block sees the outputs of all stages, enlarged.
    combine_upsampled: bool = False
    # Whether the kernels of residual blocks are standardised filter by filter.
    weight_standardization: bool = False
    # Whether the original's numbers are reproduced where they were wrong, for imported weights: self-attention
    # scaled by 1/d instead of 1/sqrt(d), norms that are coarser in half precision, enlarged maps that fade to zero
    # at their borders, and no projection of an image embedding of cross_attention_dim numbers.
    compat: bool = False
    # Whether this network's activations are computed twice to save memory; train.gradient_checkpointing is for all.
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        try:
            stages(asdict(self))
        except ConfigError as error:
            raise ValueError(" ".join(error.problems)) from error
        return self

    def build(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        image_embed_dim: int | None = None,
        text_embed_dim: int | None = None,
        lowres_cond: bool = False,
        lowres_noise_cond: bool = False,
    ) -> "UnclipUNet":
        """The network, with weights drawn from torch's global generator.

        Args:
            in_channels: channels of the noisy image, of a smaller image and of an earlier estimate.
            out_channels: channels of the output; none means in_channels, twice as many hold a variance as well.
            image_embed_dim: numbers in an image embedding; none for a network that gets none.
            text_embed_dim: numbers in the encoding of a text token; none for a network that gets none.
            lowres_cond: whether it sees a smaller image, enlarged.
            lowres_noise_cond: whether it is told how much noise that image carries.

        Raises:
            ConfigError: if what it is to be told contradicts its options.
        """
        from eclosion.models.unclip_unet import UnclipUNet  # loads torch and diffusers: not at start-up

        told = {"image_conditioned": image_embed_dim, "text_conditioned": text_embed_dim}
        for name, dim in told.items():
            if getattr(self, name) is not None and getattr(self, name) != (dim is not None):
                kind = name.removesuffix("_conditioned")
                raise ConfigError(
                    f"{name} is {str(getattr(self, name)).lower()}, and the network is built with "
                    f"{kind}_embed_dim={dim}. Change one of them."
                )
        options: dict[str, Any] = asdict(self)
        for name in (*told, "gradient_checkpointing"):
            del options[name]
        net = UnclipUNet(
            **options,
            in_channels=in_channels,
            out_channels=out_channels,
            image_embed_dim=image_embed_dim,
            text_embed_dim=text_embed_dim,
            lowres_cond=lowres_cond,
            lowres_noise_cond=lowres_noise_cond,
        )
        if self.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        return net  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stage:
    """One resolution of the network: what it holds, and how wide.

    Attributes:
        index: 0 for the stage nearest to the image.
        outer: channels on the side of the image.
        inner: channels on the side of the bottleneck.
        skip: channels of what skips the bottleneck.
        layers: residual blocks beside the first.
        groups: groups of its norms.
        attention: "full", "linear", or None.
        cross_attention: whether its blocks look at the context tokens.
        last: whether it is the one at the bottleneck.
    """

    index: int
    outer: int
    inner: int
    skip: int
    layers: int
    groups: int
    attention: Literal["full", "linear"] | None
    cross_attention: bool
    last: bool


def stages(options: Mapping[str, Any]) -> list[Stage]:
    """What each resolution holds, from the image to the bottleneck.

    Args:
        options: of `UnclipUNet` or of `UnclipUNetModel`.

    Raises:
        ConfigError: with one message per option that cannot be, or does not fit another.
    """
    _refuse(_wrong_counts(options))
    _refuse(_wrong_values(options))
    mults, base = options["channel_mults"], options["base_channels"]
    widths = [base, *(base * mult for mult in mults)]
    full = _per_stage(options["self_attention"], len(mults))
    linear = "linear" if options["linear_attention"] else None
    found = [
        Stage(
            index=s,
            outer=widths[s],
            inner=widths[s + 1],
            skip=widths[s + 1] if options["memory_efficient"] else widths[s],
            layers=_per_stage(options["layers_per_block"], len(mults))[s],
            groups=_per_stage(options["norm_num_groups"], len(mults))[s],
            attention="full" if full[s] else linear,  # type: ignore[arg-type]
            cross_attention=s > 0,
            last=s == len(mults) - 1,
        )
        for s in range(len(mults))
    ]
    _refuse(_wrong_widths(options, found))
    return found


def _per_stage(value: Any, num_stages: int) -> list[Any]:
    """One value for each stage, from one for all or from a sequence."""
    return list(value) if isinstance(value, Sequence) else [value] * num_stages


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


# Options that are whole numbers from 1 on, or lists of them -> the largest that is taken. A config may come from a
# stranger, and nothing is built, nor counted through, for hours.
COUNTS = {
    "base_channels": 65536,
    "channel_mults": 65536,
    "layers_per_block": 100,
    "norm_num_groups": 65536,
    "num_attention_heads": 65536,
    "attention_head_dim": 65536,
    "cross_attention_dim": 65536,
    "num_image_tokens": 65536,
    "num_time_tokens": 65536,
    "num_text_tokens": 65536,
    "conv_in_kernel_sizes": 255,
    "conv_out_kernel_size": 255,
    "downsample_kernel_sizes": 255,
    "in_channels": 65536,
    "out_channels": 65536,
    "image_embed_dim": 1 << 20,
    "text_embed_dim": 1 << 20,
}
LISTS = ("channel_mults", "conv_in_kernel_sizes", "downsample_kernel_sizes")
PER_STAGE = ("self_attention", "layers_per_block", "norm_num_groups")
MAX_STAGES, MAX_CHANNELS = 12, 1 << 20


def _wrong_counts(options: Mapping[str, Any]) -> list[str]:
    """What is no whole number, or too large a one."""
    problems = []
    for name, most in COUNTS.items():
        value = options.get(name)
        items = _per_stage(value, 1)
        listed = isinstance(value, list | tuple) or name not in LISTS
        if value is not None and not (listed and items and all(type(n) is int and 1 <= n <= most for n in items)):
            kind = "a list of whole numbers" if name in LISTS else "a whole number"
            problems.append(f"{name} is {_text(value)}, and must be {kind} from 1 to {most}.")
    return problems


def _wrong_values(options: Mapping[str, Any]) -> list[str]:
    """What options contradict each other, or stand for nothing that can be built."""
    base, mults = options["base_channels"], options["channel_mults"]
    problems = [
        f"{name} has {len(options[name])} entries, and channel_mults has {len(mults)} stages. Give one for each, "
        "or one for all."
        for name in PER_STAGE
        if len(_per_stage(options[name], len(mults))) != len(mults)
    ]
    if base < 4 or base % 2:
        problems.append(
            f"base_channels is {base}, and must be even, from 4 on: half of them are sines of the timestep."
        )
    if len(mults) > MAX_STAGES:
        problems.append(f"channel_mults has {len(mults)} stages, and {MAX_STAGES} are the most.")
    if mults[0] != 1 and not options["memory_efficient"]:
        problems.append(
            f"channel_mults starts with {mults[0]}, and must start with 1 unless memory_efficient is true: nothing "
            "stands between the first convolution and the first stage."
        )
    if options.get("lowres_noise_cond") and not options.get("lowres_cond"):
        problems.append("lowres_noise_cond is true, and lowres_cond is false: there is no smaller image with noise.")
    return problems + _wrong_kernels(options)


def _wrong_kernels(options: Mapping[str, Any]) -> list[str]:
    odd = [name for name in ("conv_in_kernel_sizes", "conv_out_kernel_size") if not _all_odd(options[name])]
    problems = [f"{name} is {_text(options[name])}, and must be odd: an even kernel shifts the image." for name in odd]
    sizes = options["downsample_kernel_sizes"]
    if sizes is not None and any(size % 2 for size in sizes):
        problems.append(f"downsample_kernel_sizes is {_text(sizes)}, and must be even: an odd kernel does not halve.")
    return problems


def _all_odd(sizes: Any) -> bool:
    return all(size % 2 for size in _per_stage(sizes, 1))


def _wrong_widths(options: Mapping[str, Any], found: Sequence[Stage]) -> list[str]:
    """What is wrong with the channels that follow from the options."""
    base, problems = options["base_channels"], []
    normed = {(base, found[0].groups)} | {(width, s.groups) for s in found for width in (s.skip, s.inner)}
    for width, groups in sorted(normed):
        if width % groups:
            problems.append(
                f"norm_num_groups {groups} does not divide the {width} channels of a stage. Change it, base_channels "
                "or channel_mults."
            )
    if options["combine_upsampled"] and base % COMBINER_GROUPS:
        problems.append(f"combine_upsampled needs base_channels that {COMBINER_GROUPS} divides, and it is {base}.")
    if max(width for width, _ in normed) > MAX_CHANNELS:
        problems.append(f"channel_mults makes stages of more than {MAX_CHANNELS} channels.")
    halved = [s.inner for s in found if options["memory_efficient"] or not s.last]
    split = {"conv_in_kernel_sizes": base, "downsample_kernel_sizes": min(halved, default=MAX_CHANNELS)}
    for name, width in split.items():
        kernels = options[name] or ()
        if 2 ** max(len(kernels) - 1, 0) > width:
            problems.append(
                f"{name} has {len(kernels)} kernels, too many for {width} channels: each gets half as many."
            )
    return problems


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)
