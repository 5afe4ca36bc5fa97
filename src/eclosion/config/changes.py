"""What may change when a run is resumed.

Identity keys decide what the run is: other values make it another run. Schedule keys decide how
it goes on: a change is the user's word, and is recorded. All other keys are free.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eclosion.config.load import leaves, validate
from eclosion.errors import ConfigError
from eclosion.registry import dump

__all__ = ["Change", "compare", "kind_of", "refuse"]

IDENTITY = (
    "seed",
    "task",
    "data.source",
    "data.image_size",
    "data.resize",
    "data.interpolation",
    "data.crop",
    "data.horizontal_flip",
    "data.preprocessing",
    "data.decode",
    "data.background",
    "data.shuffle",
    "data.shuffle_window",
    "data.resample",
    "data.epoch_samples",
    "ema.decays",
)
SCHEDULE = (
    "train.duration",
    "train.batch_size",
    "train.max_grad_norm",
    "train.mixed_precision",
    "train.freeze",
    "optimizer",
    "ema.warmup",
    "data.max_bad_fraction",
)
FREE = (
    "output",
    "overwrite",
    "export",
    "data.num_threads",
    "data.source.cache_limit_gb",
    "data.source.validation_split",
    "data.cache_gb",
    "task.encoder.cache_gb",
    "task.unets.sampler",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.channels_last",
    "train.compile",
    "train.device",
    "train.parallel",
    "train.deterministic",
    "sample",
    "validate",
    "evaluate",
    "checkpoint",
    "track",
    "start",
    "hub",
)
# Free keys that decide in which order numbers are added: the run goes on as before, but for its last bits.
ROUNDING = ("train.micro_batch_size", "train.channels_last", "train.compile", "train.parallel", "train.deterministic")
Kind = Literal["identity", "schedule", "free"]


def kind_of(path: str) -> Kind:
    """Which of the three classes a key belongs to; a key that stands in none is an identity key."""

    key = re.sub(r"\[\d+\]", "", path)  # whichever of a list it is

    def under(prefixes: tuple[str, ...]) -> bool:
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)

    return "schedule" if under(SCHEDULE) else "free" if under(FREE) else "identity"


@dataclass(frozen=True)
class Change:
    """One key whose value is not the one the run was started with."""

    path: str
    before: Any
    after: Any

    @property
    def kind(self) -> Kind:
        """Which of the three classes the key belongs to."""
        return kind_of(self.path)

    @property
    def rounds(self) -> bool:
        """Whether the last bits of a run depend on the key."""
        return self.path in ROUNDING

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r}"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """All keys whose values differ between two native configs, in the order of their names.

    A key that an older version did not have yet had the value that is its default now.
    """
    old, new = dict(leaves(_completed(before))), dict(leaves(after))
    return [Change(p, old.get(p), new.get(p)) for p in sorted(old.keys() | new.keys()) if old.get(p) != new.get(p)]


def _completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the keys that it lacks; as it is, if it does not describe a run any more."""
    try:
        completed: Mapping[str, Any] = dump(validate(tree))
    except ConfigError:
        return tree
    return completed


def refuse(changes: Sequence[Change], *, accept: bool, where: str) -> None:
    """Let a run go on with changed keys, or say why not.

    Args:
        changes: since the checkpoint.
        accept: whether the user accepts changed schedule keys.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: if identity keys changed, or schedule keys changed and that is not accepted.
    """
    identity = [c for c in changes if c.kind == "identity"]
    if identity:
        raise ConfigError(
            [f"{c} would make it another run than the one in {where}." for c in identity]
            + ["Put the values back, or choose another output folder."]
        )
    schedule = [c for c in changes if c.kind == "schedule"]
    if schedule and not accept:
        raise ConfigError(
            [f"{c} changes how the run in {where} goes on." for c in schedule]
            + ["Put the values back, or pass --accept-changes."]
        )
