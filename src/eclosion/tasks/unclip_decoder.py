"""Images from embeddings: a cascade of U-Nets, each enlarging what the one before made.

What one network draws, compares and samples is in unclip_tier.py, and what can be wrong with the options is in
unclip_checks.py. Nothing here knows where an embedding comes from: from CLIP, another encoder, sound, a brain.

Source: Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, section 2.1, as DALLE2-pytorch built it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from torch import Tensor, nn

from eclosion.data.batch import Batch
from eclosion.diffusion.lowres import Resize
from eclosion.diffusion.samplers import OnStep, Walker, levels
from eclosion.errors import ConfigError
from eclosion.registry import PartOf, dump, part
from eclosion.rng import Generator, generator
from eclosion.tasks.task import DataFacts, one_each
from eclosion.tasks.unclip_checks import problems_of_options, problems_with_arrays, problems_with_size
from eclosion.tasks.unclip_encoding import ImageEmbeds, TextEncodings
from eclosion.tasks.unclip_tier import CascadeUNet, Draws, Known, Tier

__all__ = ["UnclipDecoder", "UnclipDecoderTask"]

Fraction = Annotated[float, Field(ge=0, le=1)]


@part
class UnclipDecoder:
    """Images from embeddings: a cascade of U-Nets in the manner of DALL-E 2's decoder."""

    # The networks from low to high resolution; they are called unet_0, unet_1 and so on.
    unets: list[CascadeUNet]
    # Share of images whose embedding is hidden in training, so that guidance can be used.
    image_dropout: Fraction = 0.1
    # Share of images whose text is hidden in training, independent of the embedding.
    text_dropout: Fraction = 0.5
    # Whether the networks follow nothing.
    unconditional: bool = False
    # What makes the embedding of an image where the data brings none; and, if it is a CLIP, the encodings of text from
    # captions.
    encoder: Annotated[Any, PartOf("encoders")] | None = None
    # Numbers in an image embedding; another number in the data or the encoder is refused. None takes theirs.
    image_embed_dim: Annotated[int, Field(ge=1)] | None = None
    # Numbers in the encoding of a text token; the same.
    text_embed_dim: Annotated[int, Field(ge=1)] | None = None
    # Whether estimates of the clean image are kept in [-1, 1] while sampling.
    clip_sample: bool = True
    # Quantile of an estimate's absolute values above which it is clamped, and then scaled into [-1, 1]; takes the
    # place of clip_sample. None is off.
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    # How the images of the data reach the size of each network: "area" means over what a pixel covers; "nearest"
    # picks one pixel, which aliases, and is there for networks that were trained so.
    resize: Resize = "area"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        found = problems_of_options(self.unets, unconditional=self.unconditional, encoder=self.encoder)
        if found:
            by_path: dict[tuple[str | int, ...], str] = {}  # one message for each option, whatever is wrong with it
            for path, message in found:
                by_path[path] = f"{by_path[path]} Also, it {message}" if path in by_path else message
            raise ValidationError.from_exception_data("UnclipDecoder", [_as_error(*item) for item in by_path.items()])
        return self

    def build(self, facts: DataFacts) -> "UnclipDecoderTask":
        """The task on new networks.

        Raises:
            ConfigError: with every reason why the networks do not fit the data.
        """
        wanted = {field: any(self.follows(kind, i) for i in range(len(self.unets))) for kind, field in KINDS.items()}
        dims = {"image_embed": self.image_embed_dim, "text_encodings": self.text_embed_dim}
        found = problems_with_size(self.unets, facts.size)
        found += problems_with_arrays(facts, wanted=wanted, dims=dims, encoder=self.encoder)
        if found:
            raise ConfigError([_as_text(*problem) for problem in found])
        missing = {field for field in KINDS.values() if wanted[field] and field not in facts.arrays}
        encoder = ImageEmbeds(self.encoder, facts.made.get("image_embed")) if "image_embed" in missing else None
        text = TextEncodings(self.encoder, facts.made.get("text_encodings")) if "text_encodings" in missing else None
        shapes = dict(facts.arrays)
        for field, made in (("image_embed", encoder), ("text_encodings", text)):
            if made is not None:
                shapes[field] = made.shape
                _check_dim(field, dims[field], made.shape[-1])
        task = self.on(
            {},
            size=facts.size,
            image_embed_dim=_last(shapes.get("image_embed")),
            text_embed_dim=_last(shapes.get("text_encodings")),
            encoder=encoder,
            text_encoder=text,
        )
        return task.with_nets({tier.name: tier.build() for tier in task.tiers})

    def on(
        self,
        nets: Mapping[str, nn.Module],
        *,
        size: tuple[int, int],
        image_embed_dim: int | None,
        text_embed_dim: int | None,
        encoder: ImageEmbeds | None = None,
        text_encoder: TextEncodings | None = None,
    ) -> "UnclipDecoderTask":
        """The task on networks that are there already.

        Args:
            nets: unet_0 and so on.
            size: height and width of the data's images, in pixels.
            image_embed_dim: numbers in an image embedding; None if nothing follows one.
            text_embed_dim: numbers in the encoding of a text token; None if nothing follows one.
            encoder: makes image embeddings, if the data has none.
            text_encoder: makes text encodings, if the data has none.
        """
        tiers = [self._tier(i, size, image_embed_dim, text_embed_dim) for i in range(len(self.unets))]
        return UnclipDecoderTask(
            options=self,
            nets=dict(nets),
            tiers=tiers,
            size=size,
            image_embed_dim=image_embed_dim,
            text_embed_dim=text_embed_dim,
            encoder=encoder,
            text_encoder=text_encoder,
        )

    def follows(self, kind: str, i: int) -> bool:
        """Whether network i follows the embedding of an image ("image") or text ("text")."""
        model = self.unets[i].model
        wanted = model.text_conditioned if kind == "text" else model.image_conditioned
        return not self.unconditional and (i == 0 if wanted is None else bool(wanted))

    def _tier(self, i: int, size: tuple[int, int], image_embed_dim: int | None, text_embed_dim: int | None) -> Tier:
        options = self.unets[i]
        own = options.size(size)
        assert own is not None
        return Tier(
            name=f"unet_{i}",
            options=options,
            schedule=options.noise_schedule.build(),
            size=own,
            before=self.unets[i - 1].size(size) if i else None,
            image_embed_dim=image_embed_dim if self.follows("image", i) else None,
            text_embed_dim=text_embed_dim if self.follows("text", i) else None,
            image_dropout=self.image_dropout,
            text_dropout=self.text_dropout,
            clip_sample=self.clip_sample,
            dynamic_threshold=self.dynamic_threshold,
            resize=self.resize,
        )


# What networks can follow -> the field of a batch that holds it.
KINDS = {"image": "image_embed", "text": "text_encodings"}


def _check_dim(field: str, wanted: int | None, made: int) -> None:
    if wanted not in (None, made):
        say = f"is {wanted}, and the encoder makes {made} numbers. Change it, or the encoder."
        raise ConfigError(_as_text((f"{field.partition('_')[0]}_embed_dim",), say))


def _last(shape: Sequence[int] | None) -> int | None:
    return None if shape is None else shape[-1]


def _as_error(path: tuple[str | int, ...], message: str) -> InitErrorDetails:
    return {"type": PydanticCustomError("part", "{message}", {"message": message}), "loc": path, "input": None}


def _as_text(path: tuple[str | int, ...], message: str) -> str:
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return f"task{where} {message}" if message.startswith(("is ", "has ")) else f"task{where}: {message}"


@dataclass(frozen=True)
class UnclipDecoderTask:
    """A cascade of networks that make images from embeddings.

    Attributes:
        options: the part it was built from.
        nets: unet_0 and so on, from low to high resolution.
        tiers: what each of them is, in the same order.
        size: height and width of the data's images, in pixels.
        image_embed_dim: numbers in an image embedding; None if the data has none.
        text_embed_dim: numbers in the encoding of a text token; None if the data has none.
        encoder: makes image embeddings; None if the data brings them, or nothing follows them. Not trained, and not
            in checkpoints.
        text_encoder: makes text encodings of captions; the same.
    """

    options: UnclipDecoder
    nets: dict[str, nn.Module]
    tiers: Sequence[Tier]
    size: tuple[int, int]
    image_embed_dim: int | None
    text_embed_dim: int | None
    encoder: ImageEmbeds | None = None
    text_encoder: TextEncodings | None = None

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width in pixels of what each network makes."""
        return {tier.name: tier.size for tier in self.tiers}

    @property
    def wants(self) -> tuple[str, ...]:
        """What the networks follow, by the names of a batch's fields."""
        return self.wanted(0, None)

    def wanted(self, first: int, last: int | None) -> tuple[str, ...]:
        """What the networks from one place to another follow, both included; none is the last."""
        tiers = self.tiers[first : None if last is None else last + 1]
        return tuple(field for kind, field in KINDS.items() if any(kind in tier.follows for tier in tiers))

    @property
    def made(self) -> dict[str, tuple[int, ...]]:
        """Shape of what the encoders make of each sample, by the names of a batch's fields."""
        encoders = {"image_embed": self.encoder, "text_encodings": self.text_encoder}
        return {field: encoder.shape for field, encoder in encoders.items() if encoder is not None}

    # --- training ----------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Batch:
        """The batch with what encoders make of it: float32, embeddings [B, D] of its images, encodings [B, L, D] of its
        captions if it has any."""
        added = {}
        if self.encoder is not None and "image_embed" not in batch:
            added["image_embed"] = self.encoder(batch["image"])
        if self.text_encoder is not None and "text_encodings" not in batch and "caption" in batch:
            added["text_encodings"] = self.text_encoder(batch["caption"], batch.weight.device)
        return replace(batch, fields={**batch.fields, **added}) if added else batch

    def draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Draws:
        """Every random tensor of a batch; row i comes from rngs[i] alone, in the order that unclip_tier.py tells."""
        return self._tier(name).draw(rngs).to(batch["image"].device)

    def validation_draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Draws:
        """As `draw`, and no condition is hidden."""
        return replace(self.draw(name, batch, rngs), image_keep=None, text_keep=None)

    def noise_level(self, name: str, drawn: Draws) -> Tensor:
        """The timestep of each image, as a share of all of that network."""
        return drawn.t / self._tier(name).schedule.num_train_timesteps

    def loss(self, name: str, batch: Batch, drawn: Draws) -> Tensor:
        """Distance between prediction and target, and what learned variance adds; float32 [B]."""
        return self._tier(name).loss(self.nets[name], batch, drawn)

    def _tier(self, name: str) -> Tier:
        return next(tier for tier in self.tiers if tier.name == name)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def conditions(self, indices: Sequence[int], examples: Batch | None = None) -> Batch:
        """What images are asked to show: the embeddings and the text of examples.

        Args:
            indices: the numbers of the images.
            examples: row k is for indices[k]; it may lack what the networks that are sampled do not follow.

        Raises:
            ConfigError: if an embedding or a text is of another length than the networks take.
        """
        fields = {} if examples is None else {name: examples[name] for name in self.wants if name in examples}
        dims = {"image_embed": self.image_embed_dim, "text_encodings": self.text_embed_dim}
        for name, values in fields.items():
            ndim = {"image_embed": 2, "text_encodings": 3}[name]
            if values.ndim != ndim or values.shape[-1] != dims[name] or len(values) != len(indices):
                wanted = ", ".join(map(str, [len(indices), *(["any"] * (ndim - 2)), dims[name]]))
                raise ConfigError(
                    f"{name} has the shape {list(values.shape)}, and must have [{wanted}], as in training."
                )
        return Batch(positions=list(indices), weight=torch.ones(len(indices)), fields=fields)

    def samplers(self, default: Any) -> list[Any]:
        """The sampler of each network: its own, or `default`."""
        return [default if tier.options.sampler is None else tier.options.sampler for tier in self.tiers]

    def check_sampling(self, sampler: Any, guidance_scale: float | Sequence[float]) -> None:
        """Refuse guidance that was not trained for, and more steps than there are noise levels.

        Raises:
            ConfigError: naming what to change.
        """
        self._guidance(guidance_scale)
        for tier, chosen in zip(self.tiers, self._samplers(sampler), strict=True):
            levels(tier.schedule, chosen.num_inference_steps or tier.schedule.num_train_timesteps, "trailing")

    @torch.no_grad()
    def sample(
        self,
        conditions: Batch,
        rngs: Sequence[Generator],
        *,
        sampler: Any,
        guidance_scale: float | Sequence[float] = 1.0,
        on_step: OnStep | None = None,
        first: int = 0,
        last: int | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], float32; image i comes from conditions[i], image[i] and rngs[i] alone.

        Whatever a network draws depends on its place in the cascade, and not on which networks ran before: a cascade
        that is left and entered again between two networks makes the same images.

        Args:
            conditions: what `conditions` gave.
            rngs: one generator per image; each draws one number for every network.
            sampler: for the networks that have none of their own; a list has one for each, which then counts.
            guidance_scale: for all networks that follow something, or a list with one for each.
            on_step: called with (step, steps) of the network at work, before each call of it.
            first, last: places of the networks to begin and to end with, both included; none is the last.
            image: where `first` is not 0, the images to begin with, [B, 3, h, w] in [-1, 1].

        Raises:
            ConfigError: if there is no such network, or it begins with nothing.
            DataError: if the conditions lack what one of these networks follows.
        """
        return self._run(conditions, rngs, sampler, guidance_scale, on_step, first, last, image, None)

    @torch.no_grad()
    def inpaint(
        self,
        conditions: Batch,
        rngs: Sequence[Generator],
        *,
        known: Tensor,
        mask: Tensor,
        sampler: Any,
        num_resamples: int = 5,
        guidance_scale: float | Sequence[float] = 1.0,
        on_step: OnStep | None = None,
        first: int = 0,
        last: int | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """As `sample`, and the images have a part in common with `known`, in the size of each network.

        Args:
            known: float32 [B, 3, H, W] in [-1, 1], of any size.
            mask: bool [B, H, W], true where the image is known.
            num_resamples: how often each step is taken, see inpainting.py.

        Raises:
            ConfigError: also if a sampler cannot take steps back.
        """
        part = Known(known.float(), mask, num_resamples)
        for place, chosen in enumerate(self._samplers(sampler)):
            if first <= place <= (len(self.tiers) - 1 if last is None else last) and not isinstance(chosen, Walker):
                raise ConfigError(
                    f"inpainting takes steps back, which the sampler of {self.tiers[place].name}, "
                    f"{type(chosen).__name__}, cannot. Use ddpm or ddim."
                )
        return self._run(conditions, rngs, sampler, guidance_scale, on_step, first, last, image, part)

    def _run(
        self,
        conditions: Batch,
        rngs: Sequence[Generator],
        sampler: Any,
        guidance_scale: float | Sequence[float],
        on_step: OnStep | None,
        first: int,
        last: int | None,
        image: Tensor | None,
        known: Known | None,
    ) -> Tensor:
        """The networks from `first` to `last`, each on what the one before made."""
        self._check_span(first, last, image)
        samplers, scales = self._samplers(sampler), self._guidance(guidance_scale)
        streams = _streams(rngs, [tier.name for tier in self.tiers])
        made = image
        for place in range(first, len(self.tiers) if last is None else last + 1):
            tier = self.tiers[place]
            made = tier.sample(
                self.nets[tier.name],
                conditions.to(next(self.nets[tier.name].parameters()).device),
                streams[tier.name],
                sampler=samplers[place],
                guidance_scale=scales[place],
                image=made if place else None,
                known=known,
                on_step=on_step,
            )
        assert made is not None
        return made

    def _check_span(self, first: int, last: int | None, image: Tensor | None) -> None:
        count = len(self.tiers)
        end = count - 1 if last is None else last
        if not 0 <= first <= end < count:
            raise ConfigError(f"the networks {first} to {end} are asked for, and this cascade has 0 to {count - 1}.")
        if first and image is None:
            raise ConfigError(
                f"unet_{first} enlarges what unet_{first - 1} makes, and there is no image to begin with. Give one, or "
                "begin with network 0."
            )

    def _samplers(self, sampler: Any) -> list[Any]:
        if not isinstance(sampler, list | tuple):
            return self.samplers(sampler)
        if len(sampler) != len(self.tiers):
            raise ConfigError(f"there are {len(sampler)} samplers, and {len(self.tiers)} networks. Give one for each.")
        return list(sampler)

    def _guidance(self, scale: float | Sequence[float]) -> list[float]:
        """How strongly each network follows its conditions. One number for all is not for those that follow nothing."""
        scales = one_each(scale, self.sizes, what="guidance_scale")
        for_all = isinstance(scale, int | float) and any(tier.follows for tier in self.tiers)
        found, problems = [], []
        for tier, wanted in zip(self.tiers, scales, strict=True):
            meant = 1.0 if for_all and not tier.follows else wanted
            if meant != 1 and not tier.hidden:
                problems.append(f"guidance_scale is {meant:g}, and {tier.name} {self._why_no_guidance(tier, scales)}")
            found.append(meant)
        if problems:
            raise ConfigError(problems)
        return found

    def _why_no_guidance(self, tier: Tier, scales: Sequence[float]) -> str:
        if tier.follows:
            options = " and ".join(f"task.{kind}_dropout" for kind in tier.follows)
            return (
                f"never learns to do without what it follows, as {options} is 0. Set that to 0.1, or guidance_scale "
                "to 1."
            )
        own = [scale if scale != 1 else max(scales) for scale in scales]  # as meant, of numbers in another order
        fine = ",".join(f"{one:g}" if other.hidden else "1" for one, other in zip(own, self.tiers, strict=True))
        return f"follows nothing. The numbers are for {', '.join(self.sizes)}, in this order: use {fine}."

    def with_nets(self, nets: Mapping[str, nn.Module]) -> "UnclipDecoderTask":
        """The same task on other networks."""
        return replace(self, nets=dict(nets))

    # --- export ------------------------------------------------------------------------------------------------------

    def pipeline(self, kind: str | None = None, *, sampler: Any = "dpm_solver", guidance_scale: Any = 1.0) -> Any:
        """An `UnclipDecoderPipeline`, which makes the same images.

        Args:
            kind: "unclip", or none for that.
            sampler, guidance_scale: what it uses unless it is called with others.

        Raises:
            ConfigError: for another kind.
        """
        from eclosion.tasks.unclip_pipeline import UnclipDecoderPipeline  # loads diffusers: only when it is wanted

        if kind not in (None, "unclip"):
            raise ConfigError(f"{kind!r} is no pipeline for a cascade. Use unclip.")
        parts: dict[str, Any] = {
            **self.nets,
            "decoder": {
                "task": dump(replace(self.options, encoder=None)),
                "size": list(self.size),
                "image_embed_dim": self.image_embed_dim,
                "text_embed_dim": self.text_embed_dim,
            },
            "sampler": dump(sampler),
            "guidance_scale": guidance_scale,
        }
        return UnclipDecoderPipeline(**parts)


def _streams(rngs: Sequence[Generator], names: Sequence[str]) -> dict[str, list[Generator]]:
    """A generator for each network and image: stream i of a network follows from rngs[i] and its name alone."""
    seeds = [rng.integers(0, 2**63, size=len(names)) for rng in rngs]
    return {name: [generator(int(row[i]), "sample", name) for row in seeds] for i, name in enumerate(names)}
