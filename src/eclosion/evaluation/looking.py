"""Who looks at the images for a metric: the encoders of an evaluation, and the rows that they make."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eclosion.config.explain import checked
from eclosion.errors import ConfigError
from eclosion.evaluation.makers import Captions, Conditions, Distances, Features, Originals
from eclosion.evaluation.results import Extractor, key_of
from eclosion.evaluation.rows import RowMaker
from eclosion.metrics.lpips import PerceptualDistance
from eclosion.metrics.metric import Evidence, Metric, Reference
from eclosion.models.image_encoder import ImageEncoder
from eclosion.models.lpips import PairDistance, lpips_network
from eclosion.registry import dump, resolve

__all__ = ["Look", "Looks", "extractor_of", "part_named", "problem_with_dim", "problems_with_keys"]


def part_named(table: str, value: Any) -> Any:
    """A part from its name, a mapping of its name and options, or itself.

    Raises:
        ConfigError: if there is no such part, or an option is wrong.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    options = dict(value)
    name = str(options.pop("name", ""))
    try:
        return checked(resolve(table, name), options)
    except ConfigError as error:
        told = [problem if repr(name) in problem else f"{name}: {problem}" for problem in error.problems]
        raise ConfigError(told) from error


def extractor_of(metric: Metric, extractor: Any, made_by: Any = None) -> Any:
    """The encoder whose features a metric looks at; None if it has a network of its own.

    Args:
        metric: the metric.
        extractor: of metrics that name none.
        made_by: the encoder that made the embeddings which images follow; None if they came with the data. What is
            compared with them has to be of the same one.
    """
    if isinstance(metric, PerceptualDistance):
        return None
    if metric.extractor is not None:
        return metric.extractor
    return made_by if "conditions" in metric.needs and made_by is not None else extractor


def problems_with_keys(metrics: Sequence[Metric], extractor: Any, made_by: Any = None) -> list[str]:
    """What is wrong with two metrics whose scores would have one key, and so one curve; the arguments are as above."""
    found: dict[str, Metric] = {}
    problems = []
    for metric in metrics:
        part = extractor_of(metric, extractor, made_by)
        name = metric.net_type if isinstance(metric, PerceptualDistance) else _name(part)
        keys = [key_of(score, name) for score in metric.better]
        if taken := next((key for key in keys if key in found), None):
            both = " and ".join(_told_apart(found[taken], metric))
            problems.append(
                f"{both} would both be {taken}. Keep one of them, and score the other apart with `eclosion evaluate`."
            )
        found |= dict.fromkeys(keys, metric)
    return problems


def _told_apart(*metrics: Metric) -> list[str]:
    """What two metrics are called, with the options in which they differ."""
    options = [dump(metric) for metric in metrics]
    differ = [key for key in {**options[0], **options[1]} if options[0].get(key) != options[1].get(key)]
    return [
        ",".join([str(own["name"]), *(f"{key}={own[key]}" for key in differ if key in own and key != "name")])
        for own in options
    ]


def problem_with_dim(metric: Metric, extractor: Any, dim: int, given: int | None) -> str | None:
    """What is wrong if a metric compares features with embeddings that images follow, and these are of another encoder.

    Args:
        metric: the metric.
        extractor: whose features it looks at.
        dim: numbers in a feature.
        given: numbers in an embedding; None if that is not known.
    """
    if "conditions" not in metric.needs or given in (None, dim):
        return None
    name = dump(metric)["name"]
    return (
        f"{name}: images are made from embeddings of {given} numbers, and {_name(extractor)} gives {dim}. Set the "
        f"extractor of {name} to the encoder that made them, or leave {name} out."
    )


@dataclass(frozen=True)
class Look:
    """How the images are looked at for one metric.

    Attributes:
        key: the same for metrics that look in the same way.
        part: the encoder as a config names it.
        encoder: on the device; None for a metric that has a network of its own.
        extractor: what results say of it.
        makers: of the rows that are needed, by names that are the same for the same rows.
        made, partners, distances: the names of those rows.
        notes: what has to be known of the encoder.
    """

    key: str
    part: Any
    encoder: ImageEncoder | None
    extractor: Extractor | None
    makers: Mapping[str, RowMaker]
    made: str | None = None
    partners: str | None = None
    distances: str | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def evidence(self, rows: Mapping[str, Tensor], references: Mapping[str, Reference | None], seed: int) -> Evidence:
        """What the metric looks at."""
        count = len(next(iter(rows.values())))
        return Evidence(
            made=rows[self.made] if self.made else torch.empty(count, 0),
            reference=references.get(f"reference {self.key}"),
            train=references.get(f"train {self.key}"),
            partners=rows[self.partners] if self.partners else None,
            distances=rows[self.distances][:, 0] if self.distances else None,
            seed=seed,
        )


class Looks:
    """The encoders of an evaluation, each built once."""

    def __init__(self, device: torch.device, extractor: Any, made_by: Any) -> None:
        """Nothing is built yet.

        Args:
            device: where they compute.
            extractor, made_by: as of `extractor_of`.
        """
        self._device, self._extractor, self._made_by = device, extractor, made_by
        self._built: dict[str, ImageEncoder] = {}

    def at(self, metric: Metric) -> Look:
        """How to look for a metric."""
        if isinstance(metric, PerceptualDistance):
            return self._distance(metric)
        part = extractor_of(metric, self._extractor, self._made_by)
        if getattr(metric, "wants_logits", False):
            part = self._logits(part, metric)
        key = part.fingerprint if isinstance(part, ImageEncoder) else json.dumps(dump(part), sort_keys=True)
        encoder = self._encoder(key, part)
        name = _name(part)
        makers: dict[str, RowMaker] = {f"{name} {key}": Features(encoder, self._device)}
        partners = None
        if "originals" in metric.needs:
            partners = f"originals {key}"
            makers[partners] = Originals(encoder, self._device)
        elif "captions" in metric.needs:
            partners = f"captions {key}"
            makers[partners] = Captions(self._text(part, metric), self._device)
        elif "conditions" in metric.needs:
            partners = f"conditions {encoder.dim}"
            makers[partners] = Conditions(encoder.dim, name)
        told = Extractor(name, _options(part), encoder.weights, encoder.fingerprint, encoder.resize)
        return Look(key, part, encoder, told, makers, f"{name} {key}", partners, notes=encoder.notes)

    def _encoder(self, key: str, part: Any) -> ImageEncoder:
        if key not in self._built:
            self._built[key] = part if isinstance(part, ImageEncoder) else part.build()
        return self._built[key]

    def _distance(self, metric: PerceptualDistance) -> Look:
        network: PairDistance = lpips_network(metric.net_type, metric.weights, heads=metric.heads)
        name = f"distance {network.fingerprint}"
        told = Extractor(metric.net_type, {}, network.weights, network.fingerprint, network.resize)
        makers = {name: Distances(network, self._device)}
        return Look(name, metric, None, told, makers, distances=name, notes=network.notes)

    def _logits(self, part: Any, metric: Metric) -> Any:
        if not hasattr(part, "logits"):
            raise ConfigError(
                f"{dump(metric)['name']} needs an extractor that names classes, and {_name(part)} does not. Use "
                "inception or efficientnet_lite0."
            )
        return part.logits()

    def _text(self, part: Any, metric: Metric) -> Any:
        if not hasattr(part, "build_text"):
            raise ConfigError(
                f"{dump(metric)['name']} needs an extractor that reads captions, and {_name(part)} does not. Use clip."
            )
        return part.build_text()


def _name(part: Any) -> str:
    described = dump(part) if not isinstance(part, ImageEncoder) else {}
    return str(described.get("name", type(part).__name__))


def _options(part: Any) -> Mapping[str, Any]:
    return {} if isinstance(part, ImageEncoder) else {k: v for k, v in dump(part).items() if k != "name"}
