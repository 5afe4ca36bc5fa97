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
from eclosion.evaluation.results import Extractor
from eclosion.evaluation.rows import RowMaker
from eclosion.metrics.lpips import PerceptualDistance
from eclosion.metrics.metric import Evidence, Metric, Reference
from eclosion.models.image_encoder import ImageEncoder
from eclosion.models.lpips import PairDistance, lpips_network
from eclosion.registry import dump, resolve

__all__ = ["Look", "Looks", "part_named"]


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

    def __init__(self, device: torch.device, extractor: Any, conditions: Any) -> None:
        """Nothing is built yet.

        Args:
            device: where they compute.
            extractor: the encoder of metrics that name none.
            conditions: the encoder that made what images are made from, if that is known.
        """
        self._device, self._extractor, self._conditions = device, extractor, conditions
        self._built: dict[str, ImageEncoder] = {}

    def at(self, metric: Metric) -> Look:
        """How to look for a metric."""
        if isinstance(metric, PerceptualDistance):
            return self._distance(metric)
        part = metric.extractor or ("conditions" in metric.needs and self._conditions) or self._extractor
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
