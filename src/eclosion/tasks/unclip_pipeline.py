"""A trained cascade as a diffusers pipeline: one folder with the networks and all that their images depend on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from torch import Tensor

from eclosion.data.batch import Batch
from eclosion.errors import ConfigError
from eclosion.models import unclip_unet  # noqa: F401 - diffusers loads networks of imported modules alone
from eclosion.registry import build
from eclosion.tasks.task import place_of, samplers_for
from eclosion.tasks.unclip_given import (
    ROWS,
    Pictures,
    as_output,
    check_output,
    count_of,
    images_given,
    known_given,
    rngs_given,
    rows_given,
)

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
        image_embeds: Tensor | NDArray[Any] | None = None,
        *,
        text_encodings: Tensor | NDArray[Any] | None = None,
        num_images: int | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | Sequence[int | None] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sampler: Any = None,
        first: str | int = 0,
        last: str | int | None = None,
        image: Pictures | None = None,
        inpaint_image: Pictures | None = None,
        inpaint_mask: Tensor | NDArray[Any] | None = None,
        inpaint_resample_times: int = 5,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Make one image for each embedding.

        Images are taken as `output_type` gives them: as one of PIL or a list of such, as an array float [B, H, W, 3]
        in [0, 1], or as a tensor [B, 3, H, W] in [-1, 1].

        Args:
            image_embeds: [B, D], as in training; a tensor or an array.
            text_encodings: [B, L, D], one vector per token, the same; for a decoder that follows text.
            num_images: how many, for a decoder that follows nothing; otherwise as many as there are embeddings.
            seeds: one for each image; or a single number, with which image i is that of `eclosion sample --seed`.
            generator: of torch, one for all or one for each image, instead of seeds; without either, images are
                new ones each time.
            num_inference_steps: noise levels visited by every network, or a list with one number for each.
            guidance_scale: for every network that follows something, or a list with one number for each.
            sampler: a sampler's name, or its name and options, for every network instead of its own.
            first, last: the networks to begin and to end with, by name or number, both included; none is the last.
            image: where `first` is not 0, the B images to begin with, of any size.
            inpaint_image: B images of which a part is kept, and the rest made anew. Of any size and in the shape of
                what the networks make; needs samplers that can take steps back: ddpm, ddim or euler.
            inpaint_mask: bool [B, H, W] in the size of inpaint_image, true where it is kept.
            inpaint_resample_times: how often each step is taken, so that the new part fits the kept one.
            output_type: "pil", "np" (float [B, H, W, 3] in [0, 1]) or "pt" (float [B, 3, H, W] in [-1, 1]).
            return_dict: whether an object with `images` comes back, or a tuple.
            callback: called with (step, steps) of the network at work, before each call of it.

        Raises:
            ConfigError: if something is missing, is of another kind, or does not fit the decoder.
            DataError: if embeddings, encodings or images have another shape or are not finite, or an embedding is all
                zero.
        """
        task = self.task
        begins, ends = _span(task, first, last)
        samplers = samplers_for(task, build("samplers", self.config.sampler), sampler, num_inference_steps)
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        task.check_sampling(samplers, guidance)
        check_output(output_type)
        examples = rows_given(image_embed=image_embeds, text_encodings=text_encodings)
        small = images_given(image, "image")
        if small is not None and not begins:
            raise ConfigError("image is given, and unet_0 begins with noise. Leave it out, or say first=1.")
        known = known_given(inpaint_image, inpaint_mask, inpaint_resample_times)
        count = count_of({**examples, "image": small, "inpaint_image": known.get("known")}, num_images)
        if missing := [name for name in task.wanted(begins, ends) if name not in examples]:
            raise ConfigError(f"this decoder follows {' and '.join(ROWS[name] for name in missing)}; none is given.")
        conditions = task.conditions(range(count), Batch(range(count), torch.ones(count), examples))
        make = partial(task.inpaint, **known) if known else task.sample
        images = make(
            conditions,
            rngs_given(count, seeds, generator),
            sampler=samplers,
            guidance_scale=guidance,
            on_step=callback,
            first=begins,
            last=ends,
            image=small,
        )
        shown = as_output(images, output_type)
        return ImagePipelineOutput(images=shown) if return_dict else (shown,)


def _span(task: Any, first: str | int, last: str | int | None) -> tuple[int, int | None]:
    """The places of the networks to begin and to end with; none is the last."""
    return place_of(first, task.nets, what="first"), None if last is None else place_of(last, task.nets, what="last")
