"""Images that a diffusers pipeline makes, from a folder on this disk."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eclosion.config.schema import DataConfig
from eclosion.data.source import Samples
from eclosion.device import pick_device
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, DataError, EnvironmentProblem
from eclosion.evaluation.images import Seen
from eclosion.evaluation.made import DataExamples, TaskImages, weights_of
from eclosion.evaluation.real import InOrder, channels_first, digest_of
from eclosion.metrics.metric import Need
from eclosion.models.libraries import without_bars
from eclosion.registry import build
from eclosion.rng import integer_seed
from eclosion.sampling.pictures import to_uint8
from eclosion.tasks.task import samplers_for

__all__ = ["FollowedData", "PipelineImages", "images_of_pipeline", "is_pipeline"]

# The file that makes a folder a pipeline.
INDEX = "model_index.json"
OURS = "UnclipDecoderPipeline"
# What rows call the numbers that networks compute with.
PRECISIONS: dict[Any, str] = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class FollowedData:
    """Data that a pipeline follows.

    Attributes:
        samples: open.
        config: what is done to them.
        seed: of what is random in that.
        name: what to call them.
    """

    samples: Samples
    config: DataConfig
    seed: int
    name: str


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline."""
    return (folder / INDEX).is_file()


def images_of_pipeline(
    folder: Path,
    *,
    count: int,
    seed: int,
    sampler: str | None,
    num_inference_steps: int | Sequence[int] | None,
    guidance_scale: float | Sequence[float] | None,
    device: str,
    followed: Callable[[], FollowedData],
    on_step: OnStep | None = None,
) -> "TaskImages | PipelineImages":
    """The images that a pipeline makes.

    Args:
        folder: what `save_pretrained` of diffusers wrote, or `eclosion export`.
        count: how many.
        seed: of their noise.
        sampler: name of a sampler, for pipelines of ours alone; None takes their own.
        num_inference_steps: None takes the pipeline's default.
        guidance_scale: the same.
        device: "auto", "cpu", "cuda" or "mps".
        followed: gives the data that is followed; called if it follows any.
        on_step: called before each call of a network, in pipelines of ours.

    Raises:
        EnvironmentProblem: if it cannot be loaded.
        ConfigError: if it does not take an option, or is of a kind that cannot be asked for images.
    """
    pipeline = _loaded(folder)
    if type(pipeline).__name__ != OURS:
        for option, value, kind in (("sampler", sampler, str), ("num_inference_steps", num_inference_steps, int)):
            if value is not None and (option == "sampler" or not isinstance(value, kind)):
                hint = "brings its own scheduler" if option == "sampler" else "has one network"
                raise ConfigError(f"{option} is {value!r}, and {type(pipeline).__name__} {hint}. Leave it out.")
        told = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        options = {name: value for name, value in told.items() if value is not None}
        return PipelineImages(
            folder, pipeline.to(pick_device(device)), count=count, seed=seed, options=options, followed=followed
        )
    where = pick_device(device)
    task = pipeline.to(where).task
    for net in task.nets.values():
        net.eval().requires_grad_(False)
    examples, facts = None, {"what": "pipeline"}
    if task.wants:
        data = followed()
        config = replace(data.config, image_size=list(task.sizes.values())[-1])
        examples = DataExamples(data.samples, config, task, seed=data.seed, device=where, name=data.name)
        facts["conditions"] = data.name
    return TaskImages(
        task,
        name=str(folder),
        weights=weights_of(task.nets),
        count=count,
        seed=seed,
        sampler=samplers_for(task, build("samplers", pipeline.config.sampler), sampler, num_inference_steps),
        guidance_scale=pipeline.config.guidance_scale if guidance_scale is None else guidance_scale,
        device=where,
        examples=examples,
        facts=facts,
        on_step=on_step,
    )


class PipelineImages:
    """Images of a pipeline that is called for some number of images, or with a caption for each.

    Image i depends on the seed, on i, and on the i-th caption.

    Attributes:
        size: height and width in pixels, as its network says.
    """

    def __init__(
        self,
        folder: Path,
        pipeline: Any,
        *,
        count: int,
        seed: int,
        options: Mapping[str, Any],
        followed: Callable[[], FollowedData],
    ) -> None:
        """Nothing is made yet.

        Args:
            folder: where it is from, for messages.
            pipeline: on its device.
            count: how many images.
            seed: of their noise.
            options: of each call, such as num_inference_steps.
            followed: gives the data whose captions it follows, if it takes any; their images are the originals.

        Raises:
            ConfigError: if it takes neither a number of images nor captions, or does not know an option.
        """
        known = inspect.signature(pipeline.__call__).parameters
        kind = type(pipeline).__name__
        if "batch_size" not in known and "prompt" not in known:
            raise ConfigError(
                f"{folder}: {kind} takes neither batch_size nor prompt, so it is not known how to ask it for images. "
                "Make them yourself, and score their folder."
            )
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ConfigError(f"{folder}: {kind} takes no {unknown[0]}. Leave it out.")
        self._pipeline, self._name, self._count, self._seed = pipeline, str(folder), count, seed
        self._options = options
        pipeline.set_progress_bar_config(disable=True)
        self.size = _size(pipeline)
        self._captions: InOrder | None = None
        conditions = {}
        if "batch_size" not in known:
            data = followed()
            self._captions = InOrder(data.samples, replace(data.config, image_size=self.size), seed=data.seed)
            if "captions" not in self._captions.brings:
                raise ConfigError(f"{folder}: {kind} follows captions, and {data.name} has none.")
            conditions = {"conditions": data.name}
        # of each call: what is asked for, or else what it does of its own accord
        defaults = {name: known[name].default for name in ("num_inference_steps", "guidance_scale") if name in known}
        asked = {name: value for name, value in {**defaults, **options}.items() if value is not inspect.Parameter.empty}
        steps, precision = asked.pop("num_inference_steps", None), PRECISIONS.get(getattr(pipeline, "dtype", None))
        self._facts = {
            "what": "pipeline",
            "name": str(folder),
            "size": list(self.size),
            "seed": seed,
            "sampler": {"name": type(pipeline.scheduler).__name__, "num_inference_steps": steps},
            **asked,
            **({"precision": precision} if precision else {}),
            **conditions,
        }
        nets = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        given = None if self._captions is None else self._captions.fingerprint
        scheduler = sorted((key, repr(value)) for key, value in pipeline.scheduler.config.items())
        self._fingerprint = digest_of(
            "pipeline", kind, weights_of(nets), scheduler, self._facts["sampler"], asked, precision, seed, count, given
        )

    @property
    def name(self) -> str:
        """The folder."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Of weights, scheduler, options, seed, number and captions."""
        return self._fingerprint

    @property
    def facts(self) -> Mapping[str, Any]:
        """How they are made."""
        return self._facts

    @property
    def brings(self) -> frozenset[Need]:
        """The captions that it follows, and the originals that belong to them."""
        return frozenset() if self._captions is None else frozenset({"captions", "originals"})

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def read(self, indices: Sequence[int]) -> Seen:
        """Make the images of these numbers, all at once.

        Raises:
            DataError: naming one that is not finite.
        """
        captions = originals = None
        asked: dict[str, Any] = {"batch_size": len(indices)}
        if self._captions is not None:
            batch, _ = self._captions.read(self._captions.drawn(indices))
            captions, originals = list(batch["caption"]), channels_first(to_uint8(batch["image"]))
            asked = {"prompt": captions}
        noise = [torch.Generator().manual_seed(integer_seed(self._seed, "sample", i)) for i in indices]
        made = self._pipeline(generator=noise, output_type="np", **asked, **self._options).images
        for i, image in zip(indices, made, strict=True):
            if not np.isfinite(image).all():
                raise DataError(
                    f"image {i} of {self._name} is not finite (NaN or infinite): made by {self._facts['sampler']}. Use "
                    "other options, or look at the weights."
                )
        pixels = np.rint(np.asarray(made) * 255).clip(0, 255).astype(np.uint8)
        names = [f"image {i} of {self._name}" for i in indices]
        return Seen(channels_first(pixels), names, originals=originals, captions=captions)


def _loaded(folder: Path) -> Any:
    """The pipeline of a folder, with nothing fetched and no code of others run."""
    from diffusers import DiffusionPipeline  # heavy: only when a pipeline is scored

    from eclosion.tasks.unclip_pipeline import UnclipDecoderPipeline

    try:
        name = json.loads((folder / INDEX).read_bytes())["_class_name"]
        cls: Any = UnclipDecoderPipeline if name == OURS else DiffusionPipeline
        with without_bars("diffusers"):
            return cls.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, low_cpu_mem_usage=False
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(
            f"{folder}: the pipeline cannot be loaded ({type(error).__name__}: {said}). Wanted is what save_pretrained "
            "of diffusers wrote, with safetensors."
        ) from error


def _size(pipeline: Any) -> tuple[int, int]:
    """Height and width of the images, in pixels.

    Raises:
        ConfigError: if nothing says that.
    """
    net = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(getattr(net, "config", None), "sample_size", None)
    if not size:
        raise ConfigError(
            f"{type(pipeline).__name__} does not say how large its images are. Make them yourself, and score their "
            "folder."
        )
    scale = int(getattr(pipeline, "vae_scale_factor", 1) or 1)
    height, width = (size, size) if isinstance(size, int) else size
    return height * scale, width * scale
