"""What validation and evaluation have found so far: which step scored best, as checkpoints keep it.

Two checkpoints are compared image by image, as both are measured on the same images with the same noise: how much the
loss of an image differs from one image to another falls out, and what remains says whether one is better.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from eclosion.errors import CheckpointError
from eclosion.metrics.metric import Influence

__all__ = ["Score", "Scores", "is_better", "paired_difference"]

# One checkpoint is better than another if it is so by this many standard errors of the difference: of two that are
# equally good, the later one is taken for better once in forty-four times.
CERTAIN = 2.0
# The entry of a checkpoint that holds the losses of single images.
ENTRY = "validation"
VALIDATION = "validation"
# No network is called so.
MADE, REFERENCE = "influence/made", "influence/reference"


@dataclass(frozen=True)
class Score:
    """A number, and the step that it belongs to.

    Attributes:
        step: updates so far.
        value: the number.
        error: its standard error; None if it has none, or if it is not needed for a comparison.
    """

    step: int
    value: float
    error: float | None = None


@dataclass
class Scores:
    """The best of a run.

    Attributes:
        measured_on: what validation losses are measured on; those on something else do not compare.
        step: of the newest validation; -1 before the first.
        evaluated: the step of the newest evaluation; -1 before the first.
        decided_by: what `best` is the best of: validation, or a score and all that it depends on.
        best: the checkpoint of its step is the best.
        networks: the lowest validation loss of each network, which may be of another step.
        losses: float64 [N], the losses of single images that belong to `networks`, by network, and under "" those that
            belong to `best`, summed over networks; NaN for an image that could not be read. If a score decides, under
            `MADE` and `REFERENCE` how much each image moves the best one.
    """

    measured_on: str = ""
    step: int = -1
    evaluated: int = -1
    decided_by: str = VALIDATION
    best: Score | None = None
    networks: dict[str, Score] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def record(self, step: int, losses: Mapping[str, Tensor]) -> bool:
        """Enter a validation.

        Args:
            step: updates so far; the losses of untrained networks, at 0, are not compared.
            losses: of single images by network, float64 [N]; NaN for an image that could not be read. If another one is
                not finite, it is never the best.

        Returns:
            Whether it is the best so far, and validation says which is.
        """
        self.step = step
        if step == 0:
            return False
        for name, own in losses.items():
            self._enter(step, name, own, self.networks.get(name))
        if self.decided_by != VALIDATION:
            return False
        found = self._enter(step, "", sum(losses.values(), torch.zeros(())), self.best)
        return found is not None

    def _enter(self, step: int, name: str, losses: Tensor, best: Score | None) -> Score | None:
        """The new best under this name, if it is that."""
        mean = mean_of(losses)
        kept = self.losses.get(name)
        if not math.isfinite(mean):
            return None
        if best is not None and not (mean < best.value if kept is None else is_better(losses, kept)):
            return None
        score = Score(step, mean)
        self.losses[name] = losses.clone()
        if name:
            self.networks[name] = score
        else:
            self.best = score
        return score

    def decide(self, score: Score, *, lower: bool, influence: Influence | None = None) -> bool:
        """Enter a score that says which checkpoint is the best; whether it is the best so far.

        Args:
            score: of the checkpoint at hand; one that is not finite is never the best.
            lower: whether lower is better.
            influence: of each image on the score; of two checkpoints, image i starts from the same noise.
        """
        if not math.isfinite(score.value):
            return False
        now = _tensors_of(influence)
        if self.best is not None:
            gain = (self.best.value - score.value) * (1 if lower else -1)
            doubt = _paired_error(now, {key: self.losses.get(key) for key in (MADE, REFERENCE)})
            if doubt is None:  # as of two independent numbers, which is more than it is
                doubt = math.hypot(score.error or 0.0, self.best.error or 0.0)
            if gain <= CERTAIN * doubt:
                return False
        self.best = score
        self._drop_best()
        self.losses |= now
        return True

    def _drop_best(self) -> None:
        for key in ("", MADE, REFERENCE):
            self.losses.pop(key, None)

    def forget_validation(self, measured_on: str) -> None:
        """Begin validation anew, on something else."""
        self.measured_on, self.step, self.networks = measured_on, -1, {}
        self.losses = {name: kept for name, kept in self.losses.items() if name in ("", MADE, REFERENCE)}
        if self.decided_by == VALIDATION:
            self.forget_best(VALIDATION)

    def forget_best(self, decided_by: str) -> None:
        """Begin to look for the best anew, by something else."""
        self.decided_by, self.best = decided_by, None
        self._drop_best()

    def as_dict(self) -> dict[str, Any]:
        """As JSON data, without what `tensors` gives."""
        kept = {key: getattr(self, key) for key in ("measured_on", "step", "evaluated", "decided_by")}
        return kept | {
            "best": None if self.best is None else asdict(self.best),
            "networks": {name: asdict(score) for name, score in self.networks.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """The losses of single images."""
        return {f"losses.{name}" if name else "losses": kept for name, kept in self.losses.items()}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Scores":
        """What `as_dict` and `tensors` gave; a checkpoint of a run without validation kept nothing.

        Raises:
            CheckpointError: if they do not belong together.
        """
        best, networks = kept.get("best"), kept.get("networks", {})
        losses = {name.removeprefix("losses").removeprefix("."): value.clone() for name, value in tensors.items()}
        if any(value.ndim != 1 or value.dtype != torch.float64 for value in losses.values()):
            raise CheckpointError(f"{ENTRY} of the checkpoint does not hold losses of single images.")
        return cls(
            measured_on=kept.get("measured_on", ""),
            step=kept.get("step", -1),
            evaluated=kept.get("evaluated", -1),
            decided_by=kept.get("decided_by", VALIDATION),
            best=_score(best) if best else None,
            networks={name: _score(score) for name, score in networks.items()},
            losses=losses,
        )


def _score(kept: Mapping[str, Any]) -> Score:
    value = kept["loss"] if "loss" in kept else kept["value"]  # as it was called before there were others
    return Score(kept["step"], value, kept.get("error"))


def mean_of(losses: Tensor) -> float:
    """The mean over images that could be read; NaN if there is none.

    Args:
        losses: float64 [N], NaN for an image that could not be read.
    """
    known = losses[~losses.isnan()].tolist()
    # exactly rounded, so that it is the same in whichever order processes bring the images
    return math.fsum(known) / len(known) if known and all(map(math.isfinite, known)) else math.nan


def error_of(losses: Tensor) -> float:
    """The standard error of that mean over images drawn anew; NaN for fewer than two."""
    known = losses[~losses.isnan()]
    mean = mean_of(losses)
    if len(known) < 2 or not math.isfinite(mean):
        return math.nan
    variance = math.fsum(((known - mean) ** 2).tolist()) / (len(known) - 1)
    return math.sqrt(variance / len(known))


def paired_difference(losses: Tensor, best: Tensor) -> tuple[float, float]:
    """By how much losses lie above others of the same images: the mean difference, and its standard error.

    Args:
        losses, best: float64 [N], NaN for an image that could not be read.

    Returns:
        NaN for the error if fewer than two images have both.
    """
    difference = losses - best
    return mean_of(difference), error_of(difference)


def _tensors_of(influence: Influence | None) -> dict[str, Tensor]:
    if influence is None:
        return {}
    found = {MADE: influence.made, REFERENCE: influence.reference}
    return {key: value.double().clone() for key, value in found.items() if value is not None}


def _paired_error(now: Mapping[str, Tensor], best: Mapping[str, Tensor | None]) -> float | None:
    """The standard error of the difference of two scores of the same images; None if that is not known.

    How much an image moves a score adds up over images, so the variance of the difference is that of a mean.
    """
    variance = 0.0
    for key in (MADE, REFERENCE):
        ours, theirs = now.get(key), best.get(key)
        if ours is None and theirs is None and key == REFERENCE:
            continue
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        variance += error_of(ours - theirs) ** 2
    return math.sqrt(variance) if math.isfinite(variance) else None


def is_better(losses: Tensor, best: Tensor) -> bool:
    """Whether losses lie below others of the same images beyond doubt: by two standard errors of the difference.

    With one image there is no such error, and lower is better.
    """
    if losses.shape != best.shape:
        return mean_of(losses) < mean_of(best)
    mean, error = paired_difference(losses, best)
    return mean < -CERTAIN * (error if math.isfinite(error) else 0.0)
