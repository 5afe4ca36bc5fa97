"""The forms of what a cascade's pipeline takes and gives: checked, and converted from and to those of its task."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from eclosion.data.embeddings import checked_rows
from eclosion.errors import ConfigError, DataError
from eclosion.rng import Generator, generator

__all__ = [
    "ROWS",
    "Pictures",
    "as_output",
    "check_output",
    "count_of",
    "images_given",
    "known_given",
    "rngs_given",
    "rows_given",
]

# Images as a pipeline takes and gives them.
Pictures = Image | Sequence[Image] | NDArray[Any] | Tensor

# The field of a batch -> what a pipeline calls it.
ROWS = {"image_embed": "image_embeds", "text_encodings": "text_encodings"}
FORMS = ("pil", "np", "pt")


def rows_given(**given: Any) -> dict[str, Tensor]:
    """Embeddings [B, D] and encodings [B, L, D], float32 on the CPU, by the names of a batch's fields.

    Raises:
        ConfigError: if one is no tensor and no array.
        DataError: if one has another number of dimensions, or a row is all zero or not finite.
    """
    found = {}
    for field, value in given.items():
        if value is not None:
            ndim = {"image_embed": 2, "text_encodings": 3}[field]
            array = _array(value, ROWS[field])
            found[field] = torch.from_numpy(checked_rows(array, ndim=ndim, what=ROWS[field], name=ROWS[field]))
    return found


def _array(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, Tensor):
        # numpy has no bfloat16
        value = (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise ConfigError(f"{name} is {_kind(value)}, and must be a tensor or an array.")
    return value


def images_given(value: Pictures | None, name: str) -> Tensor | None:
    """Images in one of the forms that a pipeline gives them in: float32 [B, 3, H, W] in [-1, 1].

    Raises:
        ConfigError: if they are in another form.
        DataError: if they are not finite.
    """
    if value is None:
        return None
    if isinstance(value, Image):
        value = [value]
    if isinstance(value, list | tuple):
        images = _from_pil(value, name)
    elif isinstance(value, np.ndarray) and value.ndim == 4 and value.dtype.kind == "f":
        images = torch.from_numpy(np.ascontiguousarray(value, np.float32)).permute(0, 3, 1, 2) * 2 - 1
    else:
        images = value.float() if isinstance(value, Tensor) and value.is_floating_point() else torch.empty(0)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ConfigError(
            f"{name} is {_kind(value)}, and must be images of PIL, an array float [B, H, W, 3] in [0, 1], or a tensor "
            "[B, 3, H, W] in [-1, 1]."
        )
    if not images.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinity.")
    return images


def _from_pil(pictures: Sequence[Any], name: str) -> Tensor:
    if not all(isinstance(one, Image) for one in pictures):
        return torch.empty(0)
    if len({one.size for one in pictures}) > 1:
        raise ConfigError(f"{name}: its images are of several sizes. Bring them to one.")
    return (
        torch.stack([torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1) for one in pictures]) / 127.5 - 1
    )


def _kind(value: Any) -> str:
    if not isinstance(value, np.ndarray | Tensor):
        return f"of type {type(value).__name__}"
    return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def known_given(image: Pictures | None, mask: Any, num_resamples: int) -> dict[str, Any]:
    """What a task's `inpaint` takes more than `sample`; nothing if there is no image of which a part is kept.

    Raises:
        ConfigError: if one is given without the other, or the mask is not of its size.
        DataError: if the image is not finite.
    """
    known = images_given(image, "inpaint_image")
    if (known is None) != (mask is None):
        given, other = ("inpaint_mask", "inpaint_image") if known is None else ("inpaint_image", "inpaint_mask")
        raise ConfigError(f"{given} is given without {other}. Give both: an image, and where it is kept.")
    if known is None:
        return {}
    wanted = [len(known), *known.shape[2:]]
    keep = torch.as_tensor(mask) if isinstance(mask, np.ndarray) and mask.dtype == bool else mask
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or list(keep.shape) != wanted:
        raise ConfigError(
            f"inpaint_mask is {_kind(mask)}, and must be {wanted} of bool, the size of inpaint_image: true where it is "
            "kept."
        )
    if not isinstance(num_resamples, int) or num_resamples < 1:
        raise ConfigError(
            f"inpaint_resample_times is {num_resamples}, and must be at least 1: each step is taken once."
        )
    return {"known": known, "mask": keep, "num_resamples": num_resamples}


def count_of(given: Mapping[str, Tensor | None], num_images: int | None) -> int:
    """How many images are asked for.

    Args:
        given: what has a row for each of them.
        num_images: what was said.
    """
    counts = {name: len(value) for name, value in given.items() if value is not None}
    if num_images is not None:
        counts["num_images"] = num_images
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ConfigError(f"how many images are asked for is not clear: {said}. Give as many of each.")
    count = next(iter(counts.values()), 1)
    if count < 1:
        raise ConfigError(f"num_images is {count}, and must be at least 1.")
    return count


def rngs_given(count: int, seeds: Any, theirs: torch.Generator | Sequence[torch.Generator] | None) -> list[Generator]:
    """One generator per image.

    Args:
        count: how many images.
        seeds: one number, or one for each; None draws them.
        theirs: generators of torch to draw them from, one or one for each; None is torch's own.
    """
    if seeds is None:
        each = [theirs] * count if theirs is None or isinstance(theirs, torch.Generator) else list(theirs)
        seeds = [int(torch.randint(2**62, (1,), generator=one, device=one.device if one else "cpu")) for one in each]
    try:  # a number of numpy is another key than the same number
        if not hasattr(seeds, "__len__"):
            return [generator(operator.index(seeds), "sample", i) for i in range(count)]
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise ConfigError(f"seeds is {seeds}, and must be a whole number, or one for each image.") from error
    if len(seeds) != count:
        raise ConfigError(f"there are {len(seeds)} seeds or generators, and {count} images. Give one for each, or one.")
    return [generator(seed, "sample", 0) for seed in seeds]


def check_output(output_type: str) -> None:
    """Refuse a form of images that there is not, before any is made."""
    if output_type not in FORMS:
        raise ConfigError(f"output_type is {output_type!r}, and must be 'pil', 'np' or 'pt'.")


def as_output(images: Tensor, output_type: str) -> Any:
    """Images [B, 3, H, W] in [-1, 1] in the form that is asked for."""
    if output_type == "pt":
        return images
    pixels = images.add(1).div(2).permute(0, 2, 3, 1).cpu().float().numpy()
    return pixels if output_type == "np" else DiffusionPipeline.numpy_to_pil(np.asarray(pixels))
