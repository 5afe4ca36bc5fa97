"""One network of a cascade: its options, what is random about it, its loss, and the images that it makes.

    x_0        the clean image in this network's size, in training a crop of it
    t, noise   noise level and noise of x_t = alpha_t x_0 + sigma_t noise
    told       what the network is given beside x_t and t: embedding, text, the smaller image, an earlier estimate

What an image draws in training, each from its own generator and in this order: timestep; noise, in the size of the
crop; row and column of the crop; whether and how the smaller image is blurred (see lowres.py), the level of
its noise, that noise in the size of the crop; whether the image embedding is hidden; whether the text is hidden;
whether the network sees an earlier estimate. A network draws only what it has a use for. Bits of runs depend on it.

In sampling it draws: noise of the smaller image, the noise it starts from, then what the sampler asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from eclosion.data.batch import Batch
from eclosion.diffusion import prediction
from eclosion.diffusion.denoiser import Denoiser, Network
from eclosion.diffusion.inpainting import known_in_size, repaint
from eclosion.diffusion.loss import Loss, draw_noise, draw_timesteps
from eclosion.diffusion.lowres import (
    LowRes,
    LowResDraws,
    Resize,
    condition,
    draw_lowres,
    draw_lowres_for_sampling,
    resize,
)
from eclosion.diffusion.noise_schedule import NoiseSchedule
from eclosion.diffusion.samplers import OnStep
from eclosion.diffusion.variance import LearnedVariance, split_variance
from eclosion.registry import PartOf, part
from eclosion.rng import Generator, randint, randn, uniform

__all__ = ["CascadeUNet", "Draws", "Known", "Tier"]

CHANNELS = 3
Positive = Annotated[int, Field(ge=1)]
Told = dict[str, Tensor]


@part
class CascadeUNet:
    """One network of a cascade: what it is, and how it is trained and sampled."""

    # The network; what it is told follows from its place in the cascade.
    model: Annotated[Any, PartOf("models", "unclip_unet")] = "unclip_unet"
    # Height and width of the images it makes, in pixels; one number means a square. None is for the last network
    # only, and takes data.image_size.
    image_size: Positive | tuple[Positive, Positive] | None = None
    # How much noise each timestep adds.
    noise_schedule: Annotated[Any, PartOf("noise_schedules", "cosine")] = "cosine"
    # What it predicts: the noise, the clean image, or a mix of both that is well scaled at every timestep; "flow" goes
    # with rectified_flow.
    prediction_type: prediction.PredictionType = "epsilon"
    # Whether it learns the variance of its steps as well, in as many more output channels; none is off.
    learned_variance: LearnedVariance | None = None
    # How the prediction is compared with its target.
    loss: Loss = field(default_factory=Loss)
    # How the image of the network before is shown to it; none takes the defaults. Not for the first network.
    lowres: LowRes | None = None
    # Side of the random squares that it is trained on, in pixels, the same for the image and the smaller one; none
    # trains on whole images. Not for the first network.
    crop_size: Positive | None = None
    # The algorithm that removes its noise; none takes that of `sample`.
    sampler: Annotated[Any, PartOf("samplers")] | None = None

    def size(self, otherwise: tuple[int, int] | None) -> tuple[int, int] | None:
        """Height and width of its images in pixels.

        Args:
            otherwise: what none stands for.
        """
        if self.image_size is None:
            return otherwise
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@dataclass(frozen=True)
class Draws:
    """What is random about a batch; None where a network has no use for it.

    Attributes:
        t: timesteps, int64 [B].
        noise: float32 [B, 3, h, w] in the size of the crop, or of the network if there is none.
        top, left: first row and column of the crop, int64 [B].
        blur_sigma, blur_size, level: of the smaller image, see `LowResDraws`; float32 [B], int64 [B], int64 [B].
        lowres_noise: float32 like `noise`.
        image_keep, text_keep: bool [B], false where the condition is hidden; None hides none.
        sees_estimate: bool [B], whether the network sees an earlier estimate.
    """

    t: Tensor
    noise: Tensor
    top: Tensor | None = None
    left: Tensor | None = None
    blur_sigma: Tensor | None = None
    blur_size: Tensor | None = None
    level: Tensor | None = None
    lowres_noise: Tensor | None = None
    image_keep: Tensor | None = None
    text_keep: Tensor | None = None
    sees_estimate: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """The same on a device; the copy need not have arrived when this returns."""
        given: dict[str, Any] = {name: x for name, x in vars(self).items() if x is not None}
        return Draws(**{name: x.to(device, non_blocking=True) for name, x in given.items()})


@dataclass(frozen=True)
class Known:
    """The part of the images that is known beforehand, for inpainting.

    Attributes:
        image: float32 [B, 3, H, W] in [-1, 1]; outside of the mask it may hold anything.
        mask: bool [B, H, W], true where the image is known.
        num_resamples: how often each step is taken, see `repaint`.
    """

    image: Tensor
    mask: Tensor
    num_resamples: int


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A network's place in the cascade, without its weights.

    Attributes:
        name: of the network, such as "unet_0".
        options: its own.
        schedule: its noise levels.
        size: height and width of its images, in pixels.
        before: those of the network before; None for the first.
        image_embed_dim: numbers in an image embedding; None if the network gets none.
        text_embed_dim: numbers in the encoding of a text token; None if the network gets none.
        image_dropout, text_dropout: probability that a condition is hidden in training.
        clip_sample, dynamic_threshold: how estimates of x_0 are kept in [-1, 1], see `Denoiser`.
        resize: how images of the data reach its size.
    """

    name: str
    options: CascadeUNet
    schedule: NoiseSchedule
    size: tuple[int, int]
    before: tuple[int, int] | None
    image_embed_dim: int | None
    text_embed_dim: int | None
    image_dropout: float
    text_dropout: float
    clip_sample: bool
    dynamic_threshold: float | None
    resize: Resize

    @property
    def lowres(self) -> LowRes:
        """How the smaller image is shown to the network."""
        return self.options.lowres or LowRes()

    @property
    def follows(self) -> list[str]:
        """The conditions that the network is told: "image" for an embedding, "text"."""
        dims = {"image": self.image_embed_dim, "text": self.text_embed_dim}
        return [kind for kind, dim in dims.items() if dim]

    @property
    def hidden(self) -> list[str]:
        """Those that training hides now and then, which guidance can lead away from."""
        dropout = {"image": self.image_dropout, "text": self.text_dropout}
        return [kind for kind in self.follows if dropout[kind] > 0]

    def build(self) -> nn.Module:
        """The network, with weights drawn from torch's global generator."""
        # What it is told is settled here, and not asked of its options again.
        told = {"image_conditioned": bool(self.image_embed_dim), "text_conditioned": bool(self.text_embed_dim)}
        return replace(self.options.model, **told).build(  # type: ignore[no-any-return]
            in_channels=CHANNELS,
            out_channels=CHANNELS * (1 if self.options.learned_variance is None else 2),
            image_embed_dim=self.image_embed_dim,
            text_embed_dim=self.text_embed_dim,
            lowres_cond=self.before is not None,
            lowres_noise_cond=self.before is not None and self.lowres.noise,
        )

    # --- training ----------------------------------------------------------------------------------------------------

    def draw(self, rngs: Sequence[Generator]) -> Draws:
        """Every random tensor of a batch, on the CPU; row i comes from rngs[i] alone, in the order told above."""
        options, crop = self.options, self.options.crop_size
        shape = (CHANNELS, *((crop, crop) if crop else self.size))
        drawn: dict[str, Any] = {
            "t": draw_timesteps(options.loss, rngs, self.schedule.num_train_timesteps),
            "noise": draw_noise(options.loss, rngs, shape),
        }
        if crop:
            drawn["top"], drawn["left"] = (randint(rngs, 0, length - crop + 1) for length in self.size)
        if self.before is not None:
            low = draw_lowres(self.lowres, rngs, shape)
            drawn |= {"blur_sigma": low.sigma, "blur_size": low.kernel_size}
            drawn |= {"level": low.level, "lowres_noise": low.noise}
        if self.image_embed_dim:
            drawn["image_keep"] = uniform(rngs) >= self.image_dropout
        if self.text_embed_dim:
            drawn["text_keep"] = uniform(rngs) >= self.text_dropout
        if options.model.self_cond:
            drawn["sees_estimate"] = uniform(rngs) < 0.5
        return Draws(**drawn)

    def loss(self, net: nn.Module, batch: Batch, drawn: Draws) -> Tensor:
        """The distance of the prediction from its target, and the variational term; float32 [B], differentiable."""
        options, kind = self.options, self.options.prediction_type
        images = batch["image"].float()
        x_0 = self._cropped(resize(images, self.size, how=self.resize), drawn)
        x_t = self.schedule.add_noise(x_0, drawn.noise, drawn.t)
        shown = self._shown_in_training(images, drawn)
        told = self._told(batch, drawn.image_keep, drawn.text_keep) | shown
        if drawn.sees_estimate is not None:
            told["self_cond"] = self._earlier(net, x_t, drawn, self._told(batch) | shown)
        output: Tensor = net(x_t, drawn.t, **told).float()
        target = prediction.target(kind, x_0, drawn.noise, drawn.t, self.schedule)
        learned = options.learned_variance
        if learned is None:
            return options.loss.per_image(output, target, drawn.t, self.schedule, kind)
        predicted, v = split_variance(output)
        losses = options.loss.per_image(predicted, target, drawn.t, self.schedule, kind)
        return losses + learned.per_image(predicted, v, target, x_0, drawn.t, self.schedule, kind)

    def _told(self, batch: Batch, image_keep: Tensor | None = None, text_keep: Tensor | None = None) -> Told:
        """The conditions that this network is built for, by the names of its arguments."""
        told: Told = {}
        if self.image_embed_dim:
            told["image_embed"] = batch["image_embed"]
            if image_keep is not None:
                told["image_keep_mask"] = image_keep
        if self.text_embed_dim:
            told["text_encodings"] = batch["text_encodings"]
            if text_keep is not None:
                told["text_keep_mask"] = text_keep
        return told

    def _shown_in_training(self, images: Tensor, drawn: Draws) -> Told:
        """The smaller image as the network before might have made it; nothing for the first network."""
        if self.before is None:
            return {}
        blur = LowResDraws(drawn.blur_sigma, drawn.blur_size, None, None)
        enlarged, _ = condition(self.lowres, images, blur, self.size, before=self.before)
        cropped = self._cropped(enlarged, drawn)
        # Noise after the crop: it is the same for each pixel, and most of them are never looked at.
        noise = LowResDraws(None, None, drawn.level, drawn.lowres_noise)
        height, width = cropped.shape[2:]
        return _as_told(*condition(self.lowres, cropped, noise, (height, width)))

    def _cropped(self, images: Tensor, drawn: Draws) -> Tensor:
        """The square of each image that is trained on, [B, C, crop_size, crop_size]; the images if there is none."""
        if drawn.top is None or drawn.left is None or self.options.crop_size is None:
            return images
        steps = torch.arange(self.options.crop_size, device=images.device)
        rows, columns = drawn.top[:, None] + steps, drawn.left[:, None] + steps  # [B, crop_size]
        each = torch.arange(len(images), device=images.device)[:, None, None]
        found = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]  # [B, crop, crop, C]
        return found.permute(0, 3, 1, 2).contiguous()

    def _earlier(self, net: nn.Module, x_t: Tensor, drawn: Draws, told: Told) -> Tensor:
        """The estimate of x_0 that a step before would have left, and zeros for half of the images.

        No condition is hidden: in sampling, too, both sides of the guidance see an estimate that follows them.
        """
        assert drawn.sees_estimate is not None
        with torch.no_grad():
            estimate = self._denoiser(_bound(net, told))(x_t, drawn.t)
        return torch.where(drawn.sees_estimate.view(-1, 1, 1, 1), estimate, 0)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        net: nn.Module,
        conditions: Batch,
        rngs: Sequence[Generator],
        *,
        sampler: Any,
        guidance_scale: float,
        image: Tensor | None = None,
        known: Known | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images [B, 3, *size] in [-1, 1], float32; image i comes from conditions[i], image[i] and rngs[i] alone.

        Args:
            net: the network, on the device of the conditions.
            conditions: what the images follow.
            rngs: one generator per image.
            sampler: removes the noise.
            guidance_scale: how strongly they follow their conditions; 1 for a network that follows nothing.
            image: what the network before made, float32 [B, 3, H, W]; None for the first.
            known: what the images are to have in common with others.
            on_step: see samplers.py.
        """
        device = next(net.parameters()).device
        shape = (CHANNELS, *self.size)
        shown: Told = {}
        if self.before is not None:
            assert image is not None
            low = draw_lowres_for_sampling(self.lowres, rngs, shape).to(device)
            small = resize(image.float().to(device), self.before, how=self.lowres.resize)
            shown = _as_told(*condition(self.lowres, small, low, self.size))
        denoise = self.denoiser(net, conditions, guidance_scale, shown)
        x = randn(rngs, shape).to(device)
        if known is None:
            x = sampler(denoise, x, rngs, on_step=on_step)
        else:
            part, mask = known_in_size(known.image.to(device), known.mask.to(device), self.size, how=self.resize)
            again = known.num_resamples
            x = repaint(sampler, denoise, x, rngs, known=part, mask=mask, num_resamples=again, on_step=on_step)
        return x.clamp(-1, 1)

    def denoiser(
        self, net: nn.Module, conditions: Batch, guidance_scale: float, shown: Mapping[str, Tensor]
    ) -> Denoiser:
        """The network, bound to conditions and to the smaller image, with both hidden for guidance.

        Args:
            net: the network.
            conditions: what the images follow, on its device.
            guidance_scale: 1 if nothing can be hidden.
            shown: the smaller image and the level of its noise, by the names of the network's arguments.
        """
        told = self._told(conditions)
        none = torch.zeros(len(conditions), dtype=torch.bool, device=next(net.parameters()).device)
        masks = {f"{kind}_keep_mask": none for kind in self.hidden}
        return replace(
            self._denoiser(_bound(net, {**told, **shown})),
            uncond=_bound(net, {**told, **shown, **masks}) if masks else None,
            guidance_scale=guidance_scale,
        )

    def _denoiser(self, network: Network) -> Denoiser:
        return Denoiser(
            net=network,
            schedule=self.schedule,
            prediction_type=self.options.prediction_type,
            clip_sample=self.clip_sample,
            dynamic_threshold=self.dynamic_threshold,
            learned_variance=self.options.learned_variance,
            self_conditioned=self.options.model.self_cond,
        )


def _as_told(shown: Tensor, level: Tensor | None) -> Told:
    return {"lowres_cond": shown} | ({} if level is None else {"lowres_noise_level": level})


def _bound(net: nn.Module, told: Mapping[str, Tensor]) -> Network:
    """The network as a denoiser calls it: what it sees is in its own precision, whatever that of the samplers."""
    dtype = next(net.parameters()).dtype

    def seen(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    told = {name: seen(x) for name, x in told.items()}

    def call(x_t: Tensor, t: Tensor, previous: Tensor | None = None) -> Tensor:
        earlier = {} if previous is None else {"self_cond": seen(previous)}
        return net(seen(x_t), t, **told, **earlier)  # type: ignore[no-any-return]

    return call
