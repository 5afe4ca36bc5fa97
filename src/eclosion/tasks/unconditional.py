"""Images from nothing, or from a class: one network in pixel space (Ho et al. 2020, https://arxiv.org/abs/2006.11239)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from eclosion.data.batch import Batch
from eclosion.diffusion import prediction
from eclosion.diffusion.denoiser import Denoiser
from eclosion.diffusion.loss import Loss, draw_noise, draw_timesteps
from eclosion.diffusion.noise_schedule import NoiseSchedule
from eclosion.diffusion.samplers import OnStep, levels
from eclosion.errors import ConfigError, UserError
from eclosion.registry import PartOf, part
from eclosion.rng import Generator, randn, uniform
from eclosion.tasks.task import DataFacts, is_silent, one_each

__all__ = ["Unconditional", "UnconditionalTask"]

NET = "unet"


@part
class Unconditional:
    """Images from nothing, or from a class when the data has labels."""

    # The network that is trained.
    model: Annotated[Any, PartOf("models", "diffusers")] = "diffusers"
    # How much noise each timestep adds.
    noise_schedule: Annotated[Any, PartOf("noise_schedules", "cosine")] = "cosine"
    # What the network predicts: the noise, the clean image, or a mix of both that is well scaled at every
    # timestep; "flow" goes with rectified_flow.
    prediction_type: prediction.PredictionType = "v_prediction"
    # How the prediction is compared with its target.
    loss: Loss = field(default_factory=Loss)
    # Whether the network is told each image's class; needs data with labels.
    class_conditional: bool = False
    # Share of images whose class is hidden, so that guidance can be used.
    class_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    # Whether the estimate of the clean image is kept in [-1, 1] while sampling.
    clip_sample: bool = True

    def build(self, facts: DataFacts) -> "UnconditionalTask":
        """The task on a new network.

        Raises:
            ConfigError: if the network does not fit the data, or the options do not fit each other.
        """
        flow = type(self.noise_schedule).__name__ == "RectifiedFlow"
        if flow != (self.prediction_type == "flow"):
            raise ConfigError(
                f"task.prediction_type {self.prediction_type!r} and task.noise_schedule do not go together: "
                "'flow' needs rectified_flow, and rectified_flow needs 'flow'."
            )
        if is_silent(self.noise_schedule, self.prediction_type):
            raise ConfigError(
                "task.prediction_type is 'epsilon', and task.noise_schedule.rescale_zero_terminal_snr is true: the "
                "last level is noise alone, which says nothing of the image. Use v_prediction or sample, or set that "
                "to false."
            )
        if self.class_conditional and not facts.class_names:
            raise ConfigError("task.class_conditional is true, and the data source has no labels. Set it to false.")
        if type(self.model).__name__ == "UnclipUNetModel":
            raise ConfigError("task.model unclip_unet follows embeddings, and this task has none. Use diffusers.")
        classes = len(facts.class_names) if self.class_conditional else 0
        net = self.model.build(size=facts.size, num_classes=classes + 1 if classes else 0)
        return UnconditionalTask(
            options=self, nets={NET: net}, schedule=self.noise_schedule.build(), size=facts.size, num_classes=classes
        )


@dataclass(frozen=True)
class Draws:
    """What is random about a batch.

    Attributes:
        t: timesteps, int64 [B].
        noise: float32 [B, 3, H, W].
        label: class indices with hidden ones replaced by the null class, int64 [B]; None without classes.
    """

    t: Tensor
    noise: Tensor
    label: Tensor | None


@dataclass(frozen=True)
class UnconditionalTask:
    """One network that removes noise from images.

    Attributes:
        options: the part it was built from.
        nets: {"unet": network}.
        schedule: noise levels.
        size: height and width in pixels.
        num_classes: classes the network knows besides the null class; 0 without classes.
    """

    options: Unconditional
    nets: dict[str, nn.Module]
    schedule: NoiseSchedule
    size: tuple[int, int]
    num_classes: int

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """{"unet": height and width}."""
        return {NET: self.size}

    @property
    def wants(self) -> tuple[str, ...]:
        """Nothing: classes come in turn."""
        return ()

    def wanted(self, first: int, last: int | None) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def made(self) -> Mapping[str, tuple[int, ...]]:
        """Nothing."""
        return {}

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch

    def draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Draws:
        """Timesteps, noise and hidden classes; row i comes from rngs[i] alone, in this order."""
        return self._draws(batch, rngs, self.options.class_dropout)

    def validation_draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Draws:
        """As `draw`, and no class is hidden."""
        return self._draws(batch, rngs, 0.0)

    def _draws(self, batch: Batch, rngs: Sequence[Generator], class_dropout: float) -> Draws:
        image = batch["image"]
        t = draw_timesteps(self.options.loss, rngs, self.schedule.num_train_timesteps)
        noise = draw_noise(self.options.loss, rngs, image.shape[1:])
        label = None
        if self.num_classes:
            hidden = uniform(rngs) < class_dropout
            label = batch["label"].to(image.device).masked_fill(hidden.to(image.device), self.num_classes)
        return Draws(t.to(image.device, non_blocking=True), noise.to(image.device, non_blocking=True), label)

    def noise_level(self, name: str, drawn: Draws) -> Tensor:
        """The timestep of each image, as a share of all."""
        return drawn.t / self.schedule.num_train_timesteps

    def loss(self, name: str, batch: Batch, drawn: Draws) -> Tensor:
        """Mean over each image of the distance between prediction and target; float32 [B]."""
        x_0, kind = batch["image"], self.options.prediction_type
        x_t = self.schedule.add_noise(x_0, drawn.noise, drawn.t)
        output = self._call(x_t, drawn.t, drawn.label)
        target = prediction.target(kind, x_0, drawn.noise, drawn.t, self.schedule)
        return self.options.loss.per_image(output.float(), target, drawn.t, self.schedule, kind)

    def conditions(self, indices: Sequence[int], examples: Batch | None = None) -> Batch:
        """Classes: those of the examples, or else in turn; or nothing."""
        turns = torch.tensor([i % self.num_classes for i in indices]) if self.num_classes else None
        label = turns if examples is None or turns is None else examples["label"]
        fields = {} if label is None else {"label": label}
        return Batch(positions=list(indices), weight=torch.ones(len(indices)), fields=fields)

    def samplers(self, default: Any) -> list[Any]:
        """The default, as the network has none of its own."""
        return [default]

    def check_sampling(self, sampler: Any, guidance_scale: float | Sequence[float]) -> None:
        """Refuse guidance that was not trained for, and more steps than there are noise levels.

        Raises:
            ConfigError: naming what to change.
        """
        (guidance_scale,) = one_each(guidance_scale, self.nets, what="guidance_scale")
        if guidance_scale != 1 and self.num_classes and self.options.class_dropout == 0:
            raise ConfigError(
                f"guidance_scale is {guidance_scale:g}, and task.class_dropout is 0, so the network never learns to do "
                "without its class. Set task.class_dropout=0.1, or guidance_scale=1."
            )
        self._denoiser(None, guidance_scale)
        (sampler,) = sampler if isinstance(sampler, Sequence) else [sampler]
        levels(self.schedule, sampler.num_inference_steps or self.schedule.num_train_timesteps, "trailing")

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
        """Images [B, 3, H, W] in [-1, 1]; image i comes from its class and rngs[i] alone."""
        (guidance_scale,) = one_each(guidance_scale, self.nets, what="guidance_scale")
        (sampler,) = sampler if isinstance(sampler, Sequence) else [sampler]
        device = next(self.nets[NET].parameters()).device
        label = conditions["label"].to(device) if self.num_classes else None
        denoise = self._denoiser(label, guidance_scale)
        noise = randn(rngs, (3, *self.size)).to(device)
        return sampler(denoise, noise, rngs, on_step=on_step).clamp(-1, 1)  # type: ignore[no-any-return]

    def with_nets(self, nets: Mapping[str, nn.Module]) -> "UnconditionalTask":
        """The same task on other networks."""
        return replace(self, nets=dict(nets))

    def pipeline(self, kind: str | None = None, *, sampler: Any = None, guidance_scale: Any = 1.0) -> Any:
        """A pipeline that makes the same images, with whatever number of steps it is called.

        Args:
            kind: "ddpm" or "ddim"; none is the first.
            sampler, guidance_scale: not looked at, as these pipelines hold neither.

        Raises:
            ConfigError: for another kind.
            UserError: with classes or rectified flow, for which diffusers has no pipeline in pixel space.
        """
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline  # heavy: only when a pipeline is wanted

        if kind not in (None, "ddpm", "ddim"):
            raise ConfigError(f"{kind!r} is no pipeline for one network in pixel space. Use ddpm or ddim.")
        if self.num_classes or self.options.prediction_type == "flow":
            kind = "a class-conditional network" if self.num_classes else "rectified flow"
            raise UserError(f"diffusers has no pipeline for {kind} in pixel space. Use `eclosion sample` instead.")
        scheduler = self._scheduler()
        if kind == "ddim":
            return DDIMPipeline(unet=self.nets[NET], scheduler=DDIMScheduler.from_config(scheduler.config))
        return DDPMPipeline(unet=self.nets[NET], scheduler=scheduler)

    def _denoiser(self, label: Tensor | None, guidance_scale: float) -> Denoiser:
        def without_class(x: Tensor, t: Tensor) -> Tensor:
            null = torch.full((len(x),), self.num_classes, dtype=torch.int64, device=x.device)
            return self._call(x, t, null)

        return Denoiser(
            net=lambda x, t: self._call(x, t, label),
            schedule=self.schedule,
            prediction_type=self.options.prediction_type,
            clip_sample=self.options.clip_sample,
            uncond=without_class if self.num_classes else None,
            guidance_scale=guidance_scale,
        )

    def _call(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        labels = {} if label is None else {"class_labels": label}
        return self.nets[NET](x, t, **labels, return_dict=False)[0]  # type: ignore[no-any-return]

    def _scheduler(self) -> Any:
        """The diffusers scheduler with these noise levels: by its name there if it has one, else by its betas."""
        from diffusers import DDPMScheduler

        steps = self.schedule.num_train_timesteps
        common: dict[str, Any] = {
            "num_train_timesteps": steps,
            "prediction_type": self.options.prediction_type,
            "clip_sample": self.options.clip_sample,
            "timestep_spacing": "trailing",
        }
        options = self.options.noise_schedule
        common |= {key: getattr(options, key) for key in ("beta_start", "beta_end") if hasattr(options, key)}
        wanted = self.schedule.alphas_cumprod
        for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            scheduler = DDPMScheduler(beta_schedule=name, **common)
            if torch.allclose(scheduler.alphas_cumprod.double(), wanted, rtol=1e-4, atol=1e-7):
                return scheduler
        before = torch.cat([wanted.new_ones(1), wanted[:-1]])
        return DDPMScheduler(trained_betas=(1 - wanted / before).tolist(), **common)
