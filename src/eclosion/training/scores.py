"""What validation has found so far: which step scored best, as checkpoints keep it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Score", "Scores"]


@dataclass(frozen=True)
class Score:
    """A validation loss, and the step that it belongs to."""

    step: int
    loss: float


@dataclass
class Scores:
    """The best losses of a run.

    Attributes:
        measured_on: what they were measured on; losses on something else do not compare.
        step: of the newest validation; -1 before the first.
        best: the lowest sum over all trained networks; the checkpoint of its step is the best.
        networks: the lowest loss of each network, which may be of another step.
    """

    measured_on: str = ""
    step: int = -1
    best: Score | None = None
    networks: dict[str, Score] = field(default_factory=dict)

    def record(self, step: int, losses: Mapping[str, float]) -> bool:
        """Enter a validation.

        Args:
            step: updates so far; the losses of untrained networks, at 0, are not compared.
            losses: by network; one that is not finite is never the best.

        Returns:
            Whether the sum is the lowest so far.
        """
        self.step = step
        if step == 0:
            return False
        for name, loss in losses.items():
            if _is_better(loss, self.networks.get(name)):
                self.networks[name] = Score(step, loss)
        total = math.fsum(losses.values())
        if not _is_better(total, self.best):
            return False
        self.best = Score(step, total)
        return True

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Scores":
        """What `as_dict` gave; a checkpoint of a run without validation kept nothing."""
        best, networks = kept.get("best"), kept.get("networks", {})
        return cls(
            measured_on=kept.get("measured_on", ""),
            step=kept.get("step", -1),
            best=Score(**best) if best else None,
            networks={name: Score(**score) for name, score in networks.items()},
        )


def _is_better(loss: float, best: Score | None) -> bool:
    return math.isfinite(loss) and (best is None or loss < best.loss)
