"""What an evaluation found, as rows that say all that a number means; and the file that holds them."""

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eclosion.errors import EnvironmentProblem
from eclosion.metrics.metric import Better, Score
from eclosion.tracking.tracker import write_json

__all__ = ["Extractor", "Floor", "Result", "append_results", "check_results", "key_of", "read_results"]

# What tells the images that others are compared with from others; the rest of the facts follow from it.
TELLING = ("what", "name", "file", "step", "split", "fingerprint")


@dataclass(frozen=True)
class Extractor:
    """What looked at the images.

    Attributes:
        name: as a config names it.
        options: of the part.
        weights: a hash of its weights.
        fingerprint: of all that decides its features.
        resize: what brings images to its size, such as "bicubic antialiased".
    """

    name: str
    options: Mapping[str, Any]
    weights: str
    fingerprint: str
    resize: str


@dataclass(frozen=True)
class Floor:
    """The same score of real images, against other real images where it compares: what a perfect generator would get.

    Attributes:
        value, error, interval: as in `Result`.
        n: real images that stood in for those that are scored.
        n_reference: real images that they were compared with; None if the score compares with none.
    """

    value: float
    error: float | None
    interval: tuple[float, float] | None
    n: int
    n_reference: int | None

    @classmethod
    def of(cls, score: Score, *, n: int, n_reference: int | None) -> "Floor":
        """A score of so many images against so many others, or of the part of them that it says."""
        n, n_reference = score.counts or (n, n_reference)
        return cls(score.value, score.error, score.interval, n, n_reference)


@dataclass(frozen=True)
class Result:
    """One score, and all that it is a score of.

    Attributes:
        score: its name, such as "kid".
        metric: the part that gave it, as a config names it, with its options.
        value: the number.
        error: its standard error; None if there is none.
        interval: the 95 % interval; None if there is none.
        better: which way is better.
        n: images that were scored: those that the metric looked at.
        n_reference: images that they were compared with: those that it looked at; None if it compares with none.
        seed: of what the metric draws.
        floor: the score of real images against real ones; None if there is none.
        extractor: what looked at the images; None if the score needs none.
        made, against: facts of the images that are scored, and of those that they are compared with: what, name,
            fingerprint, size, and where there are such things sampler, steps, guidance_scale, seed, step, split.
        train: the same of the images that were trained on; None if the score does not look at them.
        notes: what a reader must know, such as that n is too small.
    """

    score: str
    metric: Mapping[str, Any]
    value: float
    error: float | None
    interval: tuple[float, float] | None
    better: Better
    n: int
    n_reference: int | None
    seed: int
    floor: Floor | None
    extractor: Extractor | None
    made: Mapping[str, Any]
    against: Mapping[str, Any] | None
    notes: Sequence[str] = ()
    train: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """What `metrics.jsonl` calls it, such as "evaluate/kid/efficientnet_lite0"."""
        return key_of(self.score, self.extractor.name if self.extractor else None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; a number that is not finite becomes null."""
        return _finite(asdict(self))  # type: ignore[no-any-return]


def key_of(score: str, extractor: str | None) -> str:
    """What `metrics.jsonl` calls a score, by its name and that of what looked at the images."""
    return f"evaluate/{score}/{extractor}" if extractor else f"evaluate/{score}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_results(path: Path, rows: Sequence[Result]) -> None:
    """Add rows to a file {"results": [...]}; one of the same score of the same things takes the place of the old.

    Raises:
        EnvironmentProblem: if it cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = {_identity(row): row for row in read_results(path)}
            for row in (row.as_dict() for row in rows):
                found.pop(_identity(row), None)  # the new one stands last
                found[_identity(row)] = row
            write_json(path, {"results": list(found.values())})
    except OSError as error:
        raise EnvironmentProblem(f"{path}: the results cannot be written ({error.strerror}).") from error


def check_results(path: Path) -> None:
    """See that rows can be added to a file: before they are computed.

    Raises:
        EnvironmentProblem: if it is something else, or its folder cannot be written.
    """
    try:
        with _locked(path):
            read_results(path)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: the results cannot be written ({error.strerror}).") from error


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; empty if it is not there.

    Raises:
        EnvironmentProblem: if it is something else.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_bytes())["results"]
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError("its results are no list of mappings")
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EnvironmentProblem(
            f"{path} is no file of results ({type(error).__name__}: {error}). Move it away."
        ) from error


def _identity(row: Mapping[str, Any]) -> str:
    """Equal for rows of which the new one replaces the old: the same score of the same images, made in the same way."""
    made = {key: value for key, value in row.get("made", {}).items() if key != "fingerprint"}
    others = [
        {key: value for key, value in (row.get(name) or {}).items() if key in TELLING} for name in ("against", "train")
    ]
    counts = [row.get(name) for name in ("n", "n_reference", "seed")]
    extractor = (row.get("extractor") or {}).get("fingerprint")
    told = (row.get("score"), row.get("metric"), counts, made, others, extractor)
    return json.dumps(told, sort_keys=True, default=str)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that add rows; the operating system gives the lock back however its owner ends."""
    with path.with_name(f".{path.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
