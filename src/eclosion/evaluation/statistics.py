"""The features of a set of images as one file: to be shared, and what the cache keeps.

NAME.safetensors            sealed, as `eclosion.evaluation.sealed` says
    total       float64 [D]        sum of the features of all images
    outer       float64 [D, D]     sum of their outer products
    features    float32 [M, D]     of all images, or of as many as were kept, in an order that says nothing
    names       uint8 [bytes]      a JSON list of the names of those M images
    text        the fields of `Facts`, as JSON
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, Self

import torch
from torch import Tensor

from eclosion.errors import ConfigError, DataError, printable
from eclosion.evaluation.images import Images
from eclosion.evaluation.sealed import Unsealed, read_sealed, text_of, text_tensor, write_sealed
from eclosion.metrics.metric import Moments, Reference
from eclosion.models.image_encoder import ImageEncoder
from eclosion.registry import dump

__all__ = ["SUFFIX", "Facts", "device_of", "load_statistics", "read_statistics", "save_statistics"]

SUFFIX = ".safetensors"
WHAT, FORMAT = "statistics of images", 1
DTYPES = {"total": torch.float64, "outer": torch.float64, "features": torch.float32, "names": torch.uint8}


@dataclass(frozen=True)
class Facts:
    """What a file of statistics says of itself.

    Attributes:
        name: what the images are, for people.
        images: their fingerprint.
        told: what else is known of them, such as split and size.
        num_images: how many they are.
        num_kept: of how many the features are kept.
        dim: numbers in a feature.
        extractor: name and options of the encoder, as a config names it; empty if it came from Python.
        fingerprint: of the encoder: equal for encoders that make equal features.
        weights, resize: of the encoder.
        made_with: versions and device.
    """

    name: str
    images: str
    told: Mapping[str, Any]
    num_images: int
    num_kept: int
    dim: int
    extractor: Mapping[str, Any]
    fingerprint: str
    weights: str
    resize: str
    made_with: Mapping[str, str]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `as_json` gave.

        Raises:
            ValueError, TypeError, KeyError: if it is something else.
        """
        found = json.loads(text)
        if found.pop("what") != WHAT:
            raise ValueError("it holds something else")
        if (given := found.pop("format")) != FORMAT:
            raise ValueError(f"its format is {given}, and this version of eclosion reads {FORMAT}")
        facts = cls(**found)
        texts = (facts.name, facts.images, facts.fingerprint, facts.weights, facts.resize)
        counts = (facts.num_images, facts.num_kept, facts.dim)
        tables = (facts.told, facts.extractor, facts.made_with)
        if (
            not all(type(text) is str for text in texts)
            or not all(type(count) is int and count > 0 for count in counts)
            or not all(type(table) is dict for table in tables)
            or facts.num_kept > facts.num_images
        ):
            raise ValueError("what it says of itself makes no sense")
        return facts

    def as_json(self) -> str:
        """As text; equal for equal facts."""
        return json.dumps({"what": WHAT, "format": FORMAT, **asdict(self)}, sort_keys=True)


def device_of(encoder: ImageEncoder) -> torch.device:
    """Where its network is."""
    return next(iter(encoder.net.state_dict().values()), torch.empty(0)).device


def save_statistics(path: Path, reference: Reference, *, images: Images, part: Any, encoder: ImageEncoder) -> None:
    """Write a file of statistics, so that a reader never sees half of it.

    Args:
        path: the file to write.
        reference: the features.
        images: whose they are.
        part: the encoder as a config names it; one that was made in Python says nothing of its options.
        encoder: what made them.

    Raises:
        EnvironmentProblem: if it cannot be written.
    """
    facts = Facts(
        name=images.name,
        images=images.fingerprint,
        told=dump(dict(images.facts)),
        num_images=reference.moments.count,
        num_kept=len(reference.features),
        dim=reference.features.shape[1],
        extractor=_shareable(dump(part)) if is_dataclass(part) else {},
        fingerprint=encoder.fingerprint,
        weights=encoder.weights,
        resize=encoder.resize,
        made_with={
            "eclosion": version("eclosion"),
            "torch": str(torch.__version__),
            "device": device_of(encoder).type,
        },
    )
    tensors = {
        "total": reference.moments.total,
        "outer": reference.moments.outer,
        "features": reference.features,
        "names": text_tensor(json.dumps(list(reference.names))),
    }
    write_sealed(path, facts.as_json(), {name: tensor.contiguous() for name, tensor in tensors.items()})


def _shareable(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide features, without the folders of this machine: a path becomes its last part."""
    return {
        name: PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
        for name, value in options.items()
        if name != "cache_gb"
    }


def load_statistics(path: Path, encoder: ImageEncoder, what: str) -> Reference:
    """The features in a file, if they are of this encoder.

    Args:
        path: what `save_statistics` wrote.
        encoder: whose features they must be.
        what: the option that names the file, for messages.

    Raises:
        ConfigError: if they are of another encoder.
        DataError: if there is no such file, or it is damaged or something else.
    """
    reference, facts = read_statistics(path, what)
    if facts.fingerprint != encoder.fingerprint:
        options = ",".join(f"{name}={value}" for name, value in facts.extractor.items() if name != "name")
        called = ",".join(filter(None, (str(facts.extractor.get("name", "an encoder made in Python")), options)))
        raise ConfigError(
            f"{what}: {path} holds features of {printable(called)} (fingerprint {printable(facts.fingerprint[:12])}), "
            f"and the extractor here is another one (fingerprint {encoder.fingerprint[:12]}). Scores of different "
            "extractors do not compare: name that one, or make the statistics again with `eclosion stats`."
        )
    return reference


def read_statistics(path: Path, what: str = "against") -> tuple[Reference, Facts]:
    """The features in a file, and what it says of itself.

    Args:
        path: what `save_statistics` wrote.
        what: the option that names the file, for messages.

    Raises:
        DataError: if there is no such file, or it is damaged or something else.
    """
    try:
        text, tensors = read_sealed(path)
        facts = Facts.from_json(text)
        return _reference(facts, tensors), facts
    except FileNotFoundError:
        raise DataError(f"{what}: there is no file {path}. Make it with: eclosion stats SOURCE {path.name}") from None
    except (Unsealed, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{what}: {path} cannot be used: {printable(' '.join(str(error).split()))}. Wanted is a file that "
            "`eclosion stats` wrote; make it again, or copy it again."
        ) from error


def _reference(facts: Facts, tensors: Mapping[str, Tensor]) -> Reference:
    """What the tensors of a file are.

    Raises:
        ValueError, KeyError: if they are not what the file says, or hold what is no number.
    """
    shapes = {
        "total": [facts.dim],
        "outer": [facts.dim, facts.dim],
        "features": [facts.num_kept, facts.dim],
        "names": list(tensors["names"].shape[:1]),
    }
    for name, dtype in DTYPES.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or list(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, and must be {dtype} {shapes[name]}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")
    names = json.loads(text_of(tensors["names"]))
    if type(names) is not list or len(names) not in (0, facts.num_kept) or not all(type(n) is str for n in names):
        raise ValueError(f"it has no names of its {facts.num_kept} images")
    return Reference(Moments(facts.num_images, tensors["total"], tensors["outer"]), tensors["features"], tuple(names))
