"""The names a batch may carry, and what to say when one is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eclosion.errors import DataError

__all__ = ["Batch", "Skip"]

# name -> what it is; a batch carries nothing else
FIELDS = {
    "image": "float32 [B, 3, H, W] in [-1, 1]",
    "label": "int64 [B], index into the class names",
    "caption": "B texts",
    "image_embed": "float32 [B, D], pooled image embedding",
    "text_embed": "float32 [B, D], pooled text embedding",
    "text_encodings": "float32 [B, L, D], one vector per token",
}


@dataclass(frozen=True)
class Skip:
    """One sample that could not be delivered: its place in the run, its name and why."""

    position: int
    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Batch:
    """Images of consecutive positions of a run, with what belongs to them.

    A sample that could not be read keeps its place, filled with zeros, and has weight 0: so every
    batch has the same shape on every process, and no sample is delivered twice in its stead.

    Attributes:
        positions: the position of each image in the run.
        weight: float32 [B], 1 for a delivered image and 0 for a skipped one.
        fields: what the samples hold, by the names in `FIELDS`.
        skipped: the samples that have weight 0.
    """

    positions: Sequence[int]
    weight: Tensor
    fields: Mapping[str, Any]
    skipped: Sequence[Skip] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            have = ", ".join(sorted(self.fields)) or "nothing"
            raise DataError(
                f"The task needs {name!r} ({FIELDS.get(name, 'unknown')}), and the data source gives {have}. "
                "Choose a source that has it, or a task that does without."
            )
        return self.fields[name]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.fields.items()}
        return replace(self, weight=self.weight.to(device, non_blocking=True), fields=moved)
