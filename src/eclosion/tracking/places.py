"""Options that savers share: which checkpoints they take, and what for."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

from eclosion.config.templates import Template, fill
from eclosion.registry import part

__all__ = ["Kind", "SaverOptions"]

# Whole checkpoints, which a run goes on from; or models: averaged weights, which are sampled and started from.
Kind = Literal["checkpoint", "model"]


@part
class SaverOptions:
    """What all savers have in common."""

    # Path that the newest checkpoint gets, such as "latest" or "models/{epoch}-{samples_seen}"; none saves none. It is
    # a folder, whatever its name. Known are {epoch}, {sample}, {step}, {samples_seen} and {best_validation_loss}, with
    # formats such as {step:08d}.
    latest: Template | None = None
    # The same for the checkpoint that scores best so far.
    best: Template | None = None
    # Folder for files about the run, such as its config; none saves none.
    meta: Template | None = None
    # What is saved: "checkpoint", all that a run goes on from, or "model", the averaged weights that make pictures.
    kind: Kind = "checkpoint"

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        given = [path for path in (self.latest, self.best, self.meta) if path is not None]
        if not given:
            raise ValueError("saves nothing. Give it at least one of latest, best and meta")
        twice = [path for path in given if given.count(path) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is the path of two things. Give each its own")
        return self

    def targets(self, *, latest: bool, best: bool, values: Mapping[str, int | float]) -> list[str]:
        """The paths that a checkpoint gets."""
        wanted = [self.latest if latest else None, self.best if best else None]
        return list(dict.fromkeys(fill(path, values) for path in wanted if path is not None))
