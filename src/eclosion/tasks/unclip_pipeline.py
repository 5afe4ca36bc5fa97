"""A trained cascade as a diffusers pipeline: one folder with the networks and all that their images depend on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import snapshot_download
from torch import Tensor

from eclosion.data.batch import Batch
from eclosion.errors import ConfigError
from eclosion.models import unclip_unet  # noqa: F401 - diffusers loads networks of imported modules alone
from eclosion.registry import build
from eclosion.rng import Generator, generator

__all__ = ["UnclipDecoderPipeline"]

# What a pipeline consists of.
FILES = ["model_index.json", "unet_*/config.json", "unet_*/*.safetensors", "unet_*/*.safetensors.index.json"]


class UnclipDecoderPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Images from embeddings, by a cascade of U-Nets.

    Loaded by `UnclipDecoderPipeline.from_pretrained(...)` from a folder, or by its name from the Hugging Face hub.
    Image i is that of `eclosion sample` if its seed, its embedding, and the sampler and guidance are the same.

    Args:
        unet_0, unet_1, ...: the networks, from low to high resolution.
        decoder: the options of the task (`task`), the `size` of the data's images, and the numbers in an embedding
            (`image_embed_dim`, `text_embed_dim`).
        sampler: what removes noise where a call names nothing else: a sampler's name, or its name and options.
        guidance_scale: how strongly images follow, where a call says nothing else.
    """

    model_cpu_offload_seq = "unet_0->unet_1->unet_2->unet_3->unet_4->unet_5->unet_6->unet_7"
    _optional_components = [f"unet_{i}" for i in range(1, 8)]  # noqa: RUF012  # diffusers wants a list

    def __init__(
        self,
        unet_0: Any,
        unet_1: Any = None,
        unet_2: Any = None,
        unet_3: Any = None,
        unet_4: Any = None,
        unet_5: Any = None,
        unet_6: Any = None,
        unet_7: Any = None,
        *,
        decoder: dict[str, Any] | None = None,  # of diffusers, that what has no default is a network
        sampler: Any = "dpm_solver",
        guidance_scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        nets = (unet_0, unet_1, unet_2, unet_3, unet_4, unet_5, unet_6, unet_7)
        self.register_modules(**{f"unet_{i}": net for i, net in enumerate(nets)})
        self.register_to_config(decoder=decoder, sampler=sampler, guidance_scale=guidance_scale)

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """Bring a pipeline from the Hugging Face hub, without anything that could be run; `from_pretrained` calls it.

        That of diffusers wants a Python file beside each network that is not its own.
        """
        known = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        given = {name: options[name] for name in known if options.get(name) is not None}
        return str(snapshot_download(pretrained_model_name, allow_patterns=FILES, **given))

    @property
    def task(self) -> Any:
        """The task on these networks, `eclosion.tasks.unclip_decoder.UnclipDecoderTask`."""
        decoder = self.config.decoder
        options = build("tasks", decoder["task"])
        return options.on(
            {f"unet_{i}": getattr(self, f"unet_{i}") for i in range(len(options.unets))},
            size=tuple(decoder["size"]),
            image_embed_dim=decoder["image_embed_dim"],
            text_embed_dim=decoder["text_embed_dim"],
        )

    @torch.no_grad()
    def __call__(
        self,
        image_embeds: Tensor | None = None,
        *,
        text_encodings: Tensor | None = None,
        num_images: int | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | Sequence[int | None] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sampler: Any = None,
        first: int = 0,
        last: int | None = None,
        image: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Make one image for each embedding.

        Args:
            image_embeds: float [B, D], as in training.
            text_encodings: float [B, L, D], one vector per token; for a decoder that follows text.
            num_images: how many, for a decoder that follows nothing; otherwise as many as there are embeddings.
            seeds: one for each image; or a single number, with which image i is that of `eclosion sample --seed`.
            generator: of torch, one for all or one for each image, instead of seeds; without either, images are
                new ones each time.
            num_inference_steps: noise levels visited by every network, or a list with one number for each.
            guidance_scale: for every network that follows something, or a list with one number for each.
            sampler: a sampler's name, or its name and options, for every network instead of its own.
            first, last: places of the networks to begin and to end with, both included; none is the last.
            image: where `first` is not 0, the images to begin with, [B, 3, h, w] in [-1, 1].
            output_type: "pil", "np" (float [B, H, W, 3] in [0, 1]) or "pt" (float [B, 3, H, W] in [-1, 1]).
            return_dict: whether an object with `images` comes back, or a tuple.
            callback: called with (step, steps) of the network at work, before each call of it.

        Raises:
            ConfigError: if something is missing, or does not fit the decoder.
        """
        task = self.task
        given = {"image_embed": image_embeds, "text_encodings": text_encodings}
        examples = {name: value.to(self.device).float() for name, value in given.items() if value is not None}
        count = _count(examples, image, num_images)
        if missing := [name for name in task.wants if name not in examples and _needed(task, name, first, last)]:
            names = {"image_embed": "image_embeds", "text_encodings": "text_encodings"}
            raise ConfigError(f"this decoder follows {' and '.join(names[name] for name in missing)}; none is given.")
        conditions = task.conditions(range(count), Batch(range(count), torch.ones(count), examples))
        images = task.sample(
            conditions,
            _rngs(count, seeds, generator),
            sampler=self._samplers(task, sampler, num_inference_steps),
            guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
            on_step=callback,
            first=first,
            last=last,
            image=image,
        )
        shown = _as(images, output_type)
        return ImagePipelineOutput(images=shown) if return_dict else (shown,)

    def _samplers(self, task: Any, sampler: Any, steps: int | Sequence[int | None] | None) -> list[Any]:
        """The sampler of each network, with as many steps as asked for."""
        named = build("samplers", self.config.sampler if sampler is None else sampler)
        chosen = task.samplers(named) if sampler is None else [named] * len(task.tiers)
        counts = [steps] * len(chosen) if steps is None or isinstance(steps, int) else list(steps)
        if len(counts) != len(chosen):
            raise ConfigError(
                f"num_inference_steps has {len(counts)} numbers, and there are {len(chosen)} networks. Give one for "
                "each, or one for all."
            )
        return [
            part if n is None else dataclasses.replace(part, num_inference_steps=n)
            for part, n in zip(chosen, counts, strict=True)
        ]


def _needed(task: Any, name: str, first: int, last: int | None) -> bool:
    """Whether one of the networks that run follows a condition."""
    kind = {"image_embed": "image", "text_encodings": "text"}[name]
    end = len(task.tiers) if last is None else last + 1
    return any(kind in tier.follows for tier in task.tiers[first:end])


def _count(examples: Mapping[str, Tensor], image: Tensor | None, num_images: int | None) -> int:
    counts = {name: len(value) for name, value in (*examples.items(), ("image", image)) if value is not None}
    if num_images is not None:
        counts["num_images"] = num_images
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ConfigError(f"how many images are asked for is not clear: {said}. Give as many of each.")
    return next(iter(counts.values()), 1)


def _rngs(
    count: int, seeds: int | Sequence[int] | None, theirs: torch.Generator | Sequence[torch.Generator] | None
) -> list[Generator]:
    """One generator per image."""
    if isinstance(seeds, int):
        return [generator(seeds, "sample", i) for i in range(count)]
    if seeds is None:
        each = [theirs] * count if theirs is None or isinstance(theirs, torch.Generator) else list(theirs)
        seeds = [int(torch.randint(2**62, (1,), generator=one, device=one.device if one else "cpu")) for one in each]
    if len(seeds) != count:
        raise ConfigError(f"there are {len(seeds)} seeds or generators, and {count} images. Give one for each, or one.")
    return [generator(seed, "sample", 0) for seed in seeds]


def _as(images: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images
    pixels = images.add(1).div(2).permute(0, 2, 3, 1).cpu().float().numpy()
    if output_type == "np":
        return pixels
    if output_type == "pil":
        return DiffusionPipeline.numpy_to_pil(np.asarray(pixels))
    raise ConfigError(f"output_type is {output_type!r}, and must be 'pil', 'np' or 'pt'.")
