"""One line of the results: what was compared, what came out, and whether that reaches its goal."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Goal", "NotMeasured", "Row", "Spread", "Verdict"]

Verdict = Literal["passed", "stretch", "missed", "contended", "quick", "no goal"]
# Which of two clocks a row is judged by: CPU seconds of all threads of a side, or seconds on the wall.
Clock = Literal["cpu", "wall"]


class NotMeasured(Exception):
    """A row that this machine lacks something for; the message says what, and where to get it."""


@dataclass(frozen=True)
class Spread:
    """Seconds of several rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one, by which sides are compared."""
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"min": min(self.values), "median": self.median, "max": max(self.values), "values": list(self.values)}


@dataclass(frozen=True)
class Goal:
    """What a result should reach.

    Attributes:
        ship: reaching it is passing.
        stretch: reaching it is better still.
        lower_is_better: whether results should lie below.
    """

    ship: float
    stretch: float
    lower_is_better: bool = True

    def reached(self, result: float) -> Literal["passed", "stretch", "missed"]:
        """What a result earns."""
        sign = 1 if self.lower_is_better else -1
        if sign * result <= sign * self.stretch:
            return "stretch"
        return "passed" if sign * result <= sign * self.ship else "missed"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        row: the goal's name, such as "S1".
        case: network, size of the images, batch.
        comparison: "same dtype", "our defaults against theirs", or what else is on both sides.
        measured: what the seconds are, in words.
        result_is: what the result is, in words.
        result: the number that the goal is about, from the medians.
        clock: which clock the result comes from.
        ours, peer: seconds by clock. A share of time has no peer's seconds.
        work: what each side did, in facts that can be compared.
        load: what `Contention.end` gave.
        goal: what the result should reach; None for a row that stands beside another one.
        unit: of the result: a ratio, or a share of 1.
        extra: further numbers.
        notes: what a reader must know.
        quick: whether this was a smoke test, which has no verdict.
    """

    row: str
    case: str
    comparison: str
    measured: str
    result_is: str
    result: float
    clock: Clock
    ours: Mapping[str, Spread]
    peer: Mapping[str, Spread]
    work: Mapping[str, Any]
    load: Mapping[str, Any]
    goal: Goal | None = None
    unit: Literal["ratio", "share"] = "ratio"
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    quick: bool = False

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is reached; a busy machine or a smoke test never reaches one."""
        if self.quick:
            return "quick"
        if self.goal is None:
            return "no goal"
        return "contended" if self.load["contended"] else self.goal.reached(self.result)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain |= {side: {clock: s.as_dict() for clock, s in getattr(self, side).items()} for side in ("ours", "peer")}
        plain["goal"] = asdict(self.goal) if self.goal else None
        plain["notes"] = list(self.notes)
        return plain | {"verdict": self.verdict}
