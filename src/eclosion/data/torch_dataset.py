"""A user's own map-style data set, given from Python: `eclosion.train(config, dataset=...)`."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eclosion.data.embeddings import checked_row
from eclosion.data.source import Sample, Samples
from eclosion.errors import BadSample, ConfigError, DataError
from eclosion.registry import part

__all__ = ["DatasetSource", "TorchDatasetSamples"]

IMAGE_KEYS = ("image", "images", "pixel_values")
CAPTION_KEYS = ("caption", "text")
# name of an array that an item may bring -> its layout
ARRAYS = {"image_embed": "[dim]", "text_embed": "[dim]", "text_encodings": "[tokens, dim]"}
# Items whose content goes into the fingerprint, and whose range of values is looked at.
NUM_LOOKED_AT = 8


@runtime_checkable
class MapDataset(Protocol):
    """What torch calls a map-style data set; a list is one too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@part
class DatasetSource:
    """The data set that Python code gives to `eclosion.train(config, dataset=...)`."""

    def open(self) -> Samples:
        """Nothing is found without one."""
        raise ConfigError(
            "data.source is 'dataset', which stands for one given from Python: eclosion.train(config, dataset=...). "
            "Give one, or name another source."
        )


class TorchDatasetSamples:
    """The items of a `torch.utils.data.Dataset`, of a Hugging Face data set with its own transform, or of a list.

    An item is an image; or a tuple (image, label or caption); or a mapping with "image", "images" or "pixel_values",
    and if it has them "label", "caption" or "text", and "image_embed", "text_embed" or "text_encodings", whose shapes
    must be those of the first item. The image is one of

    - a PIL image of any mode, which then goes through the transforms of the config as any other;
    - a tensor [3, H, W], or [1, H, W] for grey, used as it is, with no resize, crop or flip: uint8 in 0..255, or
      floating point in [-1, 1] as `Normalize([0.5], [0.5])` makes it. H and W must be those of the config.

    Labels count if the classes have names: `class_names`, or the data set's own `classes` or `features["label"].names`.

    Items may be random. They are read in the training thread, and the global random streams of Python, NumPy and torch
    are seeded for each position of the run and put back after it: so a run that was resumed sees the same
    augmentations. Generators that the data set keeps for itself are out of reach.

    The fingerprint covers the number of items and the first 8 of them; a change elsewhere is not noticed.
    """

    def __init__(self, dataset: object, *, class_names: Sequence[str] = ()) -> None:
        """Look at the first items.

        Args:
            dataset: has `len(dataset)` and `dataset[i]`.
            class_names: the name of each label.

        Raises:
            DataError: if it is empty or no map-style data set, or its items have another form.
        """
        if not isinstance(dataset, MapDataset):
            raise DataError(
                f"dataset: a {type(dataset).__name__} has no length or no items by index. Give a map-style data set: "
                "dataset[i] is an image, a tuple (image, label or caption) or a mapping."
            )
        if len(dataset) == 0:
            raise DataError(f"dataset: the {type(dataset).__name__} is empty.")
        self._dataset = dataset
        first = self._first()
        _check_range([sample.image for sample in first if isinstance(sample.image, Tensor)])
        self.has_captions = first[0].caption is not None
        self.array_shapes = {name: array.shape for name, array in first[0].arrays.items()}
        self.class_names = _class_names(dataset, class_names) if first[0].label is not None else ()
        if class_names and not self.class_names:
            raise DataError(f"{first[0].name}: has no label, and class_names are given. Leave them out.")
        self.fingerprint = _fingerprint(len(dataset), first)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Which item it is."""
        return f"dataset[{index}]"

    def read(self, index: int) -> Sample:
        """Item `index`, with global random streams seeded with 0.

        Raises:
            BadSample: if it cannot be read.
        """
        return self.read_keyed(index, 0)

    def read_keyed(self, index: int, seed: int) -> Sample:
        """Item `index`, with global random streams seeded; not to be called from two threads at once.

        Args:
            index: which item.
            seed: the seed of the streams.

        Raises:
            BadSample: if it cannot be read, or lacks the caption or label that the first item has.
        """
        sample = self._item(index, seed)
        if self.has_captions and sample.caption is None:
            raise BadSample(sample.name, "caption", "has no caption, and the first item has one.")
        if self.class_names and (sample.label is None or not 0 <= sample.label < len(self.class_names)):
            raise BadSample(
                sample.name, "label", f"has label {sample.label}, and there are {len(self.class_names)} classes."
            )
        for array, shape in self.array_shapes.items():
            found = sample.arrays[array].shape if array in sample.arrays else None
            if found != shape:
                has = f"has {array} of shape {list(found)}" if found else f"has no {array}"
                raise BadSample(sample.name, "embedding", f"{has}, and that of the first item is {list(shape)}.")
        return replace(sample, arrays={name: sample.arrays[name] for name in self.array_shapes})

    def _item(self, index: int, seed: int) -> Sample:
        name = self.name(index)
        with _seeded(seed):
            try:
                item = self._dataset[index]
            except OSError as error:  # what Pillow raises for a broken file
                raise BadSample(name, "unreadable", f"cannot be read ({error}).") from error
        return _sample(item, name)

    def _first(self) -> list[Sample]:
        """The first items that can be read."""
        found, problem = list[Sample](), None
        for index in range(min(NUM_LOOKED_AT, len(self))):
            try:
                found.append(self._item(index, seed=0))
            except BadSample as error:
                problem = error
        if not found and problem is not None:
            raise problem
        return found


def _check_range(images: Sequence[Tensor]) -> None:
    """Refuse floating point tensors that look as if nothing normalised them: no image has a dark pixel."""
    floats = [image for image in images if image.is_floating_point()]
    if floats and all(bool((image >= 0).all()) for image in floats) and any(bool(image.any()) for image in floats):
        raise DataError(
            f"dataset: the first {len(floats)} floating point tensors have no value below 0, so they seem to be in "
            "[0, 1]. They must be in [-1, 1]: add transforms.Normalize([0.5], [0.5])."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random streams of Python, NumPy and torch's CPU, and put them back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _sample(item: object, name: str) -> Sample:
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        if image is None:
            have = ", ".join(map(str, item)) or "nothing"
            raise DataError(f"{name}: has {have}, and none of {', '.join(IMAGE_KEYS)}. Rename the key of the image.")
        caption = next((item[key] for key in CAPTION_KEYS if key in item), None)
        label, arrays = _label(item.get("label"), name), {key: _array(item, key, name) for key in ARRAYS if key in item}
        return Sample(_image(image, name), name, _text(caption, name), label, arrays)
    if isinstance(item, tuple | list) and len(item) in {1, 2}:
        image, what = item if len(item) == 2 else (item[0], None)
        if isinstance(what, str):
            return Sample(_image(image, name), name, what)
        return Sample(_image(image, name), name, label=_label(what, name))
    return Sample(_image(item, name), name)


def _array(item: Mapping[str, Any], key: str, name: str) -> NDArray[np.float32]:
    """An embedding of an item.

    Raises:
        BadSample: reason "no_embedding" or "not_finite".
        DataError: if it is no array of the right number of dimensions.
    """
    value = item[key].detach().cpu().float().numpy() if isinstance(item[key], Tensor) else np.asarray(item[key])
    if value.dtype.kind not in "fiu" or value.ndim != ARRAYS[key].count(",") + 1:
        raise DataError(
            f"{name}: {key} is an array {list(value.shape)} of {value.dtype.name}, and must be {ARRAYS[key]}, of "
            "floating point numbers."
        )
    return checked_row(value, f"{name} {key}")


def _image(image: object, name: str) -> Image.Image | Tensor:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, Tensor):
        raise DataError(
            f"{name}: is a {type(image).__name__}. An item must be a PIL image, a tensor [3, H, W], a tuple "
            "(image, label or caption) or a mapping with one of them."
        )
    if image.ndim != 3 or image.shape[0] not in {1, 3}:
        raise DataError(f"{name}: is a tensor {list(image.shape)}. It must be [3, H, W], or [1, H, W] for grey.")
    image = image.detach().cpu().expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise DataError(
            f"{name}: is a tensor of {image.dtype}. It must be uint8 in 0..255 or floating point in [-1, 1]."
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= -1 and high <= 1):  # also true of NaN
        raise DataError(
            f"{name}: its values run from {low:g} to {high:g}. Floating point tensors must be in [-1, 1], as "
            "transforms.Normalize([0.5], [0.5]) makes them; or give uint8 in 0..255."
        )
    return image.float()


def _text(value: object, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{name}: its caption is a {type(value).__name__}. It must be text.")


def _label(value: object, name: str) -> int | None:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if isinstance(value, Integral):
        return int(value)
    raise DataError(f"{name}: its label is a {type(value).__name__}. It must be a whole number.")


def _class_names(dataset: object, given: Sequence[str]) -> tuple[str, ...]:
    names = given or getattr(dataset, "classes", None)
    if not names:
        features = getattr(dataset, "features", None)
        names = getattr(features.get("label"), "names", None) if isinstance(features, Mapping) else None
    return tuple(map(str, names or ()))


def _fingerprint(num_items: int, first: Sequence[Sample]) -> str:
    digest = blake2b(str(num_items).encode(), digest_size=16)
    for sample in first:
        digest.update(repr((sample.caption, sample.label)).encode())
        for name, array in sorted(sample.arrays.items()):
            digest.update(repr((name, array.shape)).encode() + array.tobytes())
        image = sample.image
        assert not isinstance(image, bytes)  # an item is a picture
        pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image.convert("RGBA"))
        digest.update(repr((pixels.shape, pixels.dtype)).encode() + np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()
