"""The account of every epoch: what was delivered, what was skipped and why. No sample is ever lost from it.

    delivered + skipped == samples in the epoch

is checked when an epoch ends, before its line is written; for data in shards also for each shard, and what their
index holds besides, and could not be asked for, counts as skipped.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eclosion.data.batch import Skip
from eclosion.errors import DataError, EnvironmentProblem

__all__ = ["NOT_BAD", "Ledger", "Shards", "left_out_of_budget", "over_budget"]

# Reasons to skip a sample that is whole, but is not meant for this run; no budget limits how many there are.
NOT_BAD = frozenset({"no_embedding"})


# Skipped samples that a line names; their number is exact beyond it.
MAX_NAMED = 100


def over_budget(
    last: Skip, skipped: int, num_samples: int, max_bad_fraction: float, shards: "Shards | None" = None
) -> DataError | None:
    """The error to raise when an epoch has more bad samples than it may have, or None.

    Args:
        last: the sample that was just skipped.
        skipped: how many were skipped in its epoch, this one included.
        num_samples: samples in an epoch.
        max_bad_fraction: share of them that may be skipped.
        shards: what they hold besides, and cannot be asked for, falls under the same budget.
    """
    epoch = last.position // num_samples
    if shards:
        skipped, num_samples = skipped + shards.num_bad, num_samples + shards.num_left_out
    allowed = int(max_bad_fraction * num_samples + 1e-6)  # 0.29 of 100 is 28.999999999999996
    if skipped <= allowed or last.reason in NOT_BAD:
        return None
    return DataError(
        f"{last.name}: {last.detail} {skipped} of {num_samples} samples of epoch {epoch} "
        f"cannot be used ({last.reason}), and data.max_bad_fraction={max_bad_fraction:g} allows {allowed}. "
        "Repair or remove the sample, or raise data.max_bad_fraction."
    )


def left_out_of_budget(
    left_out: Sequence[Mapping[str, int]],
    shard_names: Sequence[str],
    num_samples: int,
    max_bad_fraction: float,
    problems: Sequence[str] = (),
) -> DataError | None:
    """The error to raise when more samples cannot even be asked for than may be skipped, or None.

    Args:
        left_out: per shard, how many samples cannot be asked for, by reason.
        shard_names: what to call each shard.
        num_samples: samples in all shards, these included.
        max_bad_fraction: share of them that may be skipped.
        problems: what is known to be wrong, one line each.
    """
    bad = {
        name: {reason: count for reason, count in reasons.items() if reason not in NOT_BAD and count}
        for name, reasons in zip(shard_names, left_out, strict=True)
    }
    bad = {name: reasons for name, reasons in bad.items() if reasons}
    total = sum(sum(reasons.values()) for reasons in bad.values())
    allowed = int(max_bad_fraction * num_samples + 1e-6)
    if total <= allowed:
        return None
    first = "; ".join(
        f"{name}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        for name, reasons in list(bad.items())[:3]
    )
    more = f"; and {len(bad) - 3} more shards" if len(bad) > 3 else ""
    return DataError(
        (f"{problems[0]} " if problems else "")
        + f"{total} of {num_samples} samples cannot be used ({first}{more}), and data.max_bad_fraction="
        f"{max_bad_fraction:g} allows {allowed}. Repair the shards, or raise data.max_bad_fraction."
    )


@dataclass(frozen=True)
class Shards:
    """Where the samples of an epoch lie.

    Attributes:
        names: what to call each shard.
        left_out: per shard, how many samples its index holds that cannot be asked for, by reason.
        shard_at: position of the run -> shard.
        counts: epoch -> how many samples of each shard it visits.
    """

    names: Sequence[str]
    left_out: Sequence[Mapping[str, int]]
    shard_at: Callable[[int], int]
    counts: Callable[[int], Sequence[int] | NDArray[np.int64]]

    @cached_property
    def num_left_out(self) -> int:
        """How many samples cannot be asked for."""
        return sum(sum(reasons.values()) for reasons in self.left_out)

    @cached_property
    def num_bad(self) -> int:
        """How many of these count against the budget, in every epoch."""
        return sum(count for reasons in self.left_out for reason, count in reasons.items() if reason not in NOT_BAD)


@dataclass
class Ledger:
    """What a run delivered in the current epoch, and the file that holds finished ones.

    Attributes:
        path: the file, one JSON object per finished epoch; None keeps the account without a file.
        num_samples: samples in an epoch.
        max_bad_fraction: share of an epoch's samples that may be skipped.
        position: the first position that is not recorded.
        delivered: images of the current epoch that were delivered.
        skipped: how many were not, by reason.
        named: the first of them, as the file names them.
        shards: where the samples lie, if in shards.
        skipped_in: how many of the current epoch were skipped, by shard and reason.
    """

    path: Path | None
    num_samples: int
    max_bad_fraction: float = 0.0
    position: int = 0
    delivered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, Any]] = field(default_factory=list)
    shards: Shards | None = None
    skipped_in: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def restore(
        cls,
        state: Mapping[str, Any] | None,
        path: Path | None,
        *,
        num_samples: int,
        max_bad_fraction: float = 0.0,
        shards: Shards | None = None,
    ) -> "Ledger":
        """The ledger as it was when `state` was taken.

        Lines of epochs that were not finished then are removed from the file, as they will be written again.

        Args:
            state: what `state()` gave, from a checkpoint; None starts at position 0.
            path: the file.
            num_samples: samples in an epoch.
            max_bad_fraction: share of an epoch's samples that may be skipped.
            shards: where the samples lie, if in shards.

        Raises:
            DataError: if the account was kept for another number of samples.
            EnvironmentProblem: if the file cannot be written.
        """
        ledger = cls(path, num_samples, max_bad_fraction, shards=shards)
        if state is not None:
            if state["index_count"] != num_samples:
                raise DataError(
                    f"The checkpoint counts {state['index_count']} samples in an epoch, and data.source now has "
                    f"{num_samples}. Resume with the data that the run began with."
                )
            ledger.position, ledger.delivered = state["position"], state["delivered"]
            ledger.skipped, ledger.named = Counter(state["skipped"]), list(state["samples"])
            ledger.skipped_in = {shard: Counter(reasons) for shard, reasons in state.get("shards", {}).items()}
        if path is not None:
            _keep_epochs_before(path, ledger.epoch)
        return ledger

    @property
    def epoch(self) -> int:
        """The epoch that is under way."""
        return self.position // self.num_samples

    def state(self) -> dict[str, Any]:
        """The account of the current epoch, as plain JSON data for a checkpoint."""
        shards = {"shards": {name: dict(sorted(c.items())) for name, c in sorted(self.skipped_in.items())}}
        return {"position": self.position, **self._account(), **(shards if self.shards else {})}

    def record(self, positions: range, skipped: Sequence[Skip]) -> None:
        """Account for one step; called with every step, in order.

        Args:
            positions: the positions of the step's images, over all processes.
            skipped: those that were not delivered, of all processes.

        Raises:
            DataError: if more samples of an epoch are bad than `max_bad_fraction` allows.
            EnvironmentProblem: if the file cannot be written.
        """
        assert positions.start == self.position, (positions, self.position)
        assert positions.step == 1, positions
        where = {skip.position: skip for skip in skipped}
        assert len(where) == len(skipped), "a position was skipped twice"
        assert all(position in positions for position in where), (positions, sorted(where))
        while self.position < positions.stop:
            end = min(positions.stop, (self.epoch + 1) * self.num_samples)
            self._advance(end, [where[p] for p in sorted(where) if self.position <= p < end])

    def _advance(self, end: int, skipped: Sequence[Skip]) -> None:
        """Account for positions up to `end`, all of the current epoch."""
        for skip in skipped:
            self.skipped[skip.reason] += 1
            if self.shards:
                shard = self.shards.names[self.shards.shard_at(skip.position)]
                self.skipped_in.setdefault(shard, Counter())[skip.reason] += 1
            if len(self.named) < MAX_NAMED:
                self.named.append({"position": skip.position, "name": skip.name, "reason": skip.reason})
            error = over_budget(skip, self._bad(), self.num_samples, self.max_bad_fraction, self.shards)
            if error:
                raise error
        self.delivered += end - self.position - len(skipped)
        if end % self.num_samples == 0:
            self._finish_epoch()
        self.position = end

    def _finish_epoch(self) -> None:
        assert self.delivered + self.skipped.total() == self.num_samples, self._account()
        account = self._account()
        if self.shards:
            account |= self._by_shard(self.shards)
        if self.path is not None:
            _append(self.path, json.dumps(account, sort_keys=True) + "\n")
        self.delivered, self.skipped, self.named, self.skipped_in = 0, Counter(), [], {}

    def _bad(self) -> int:
        """How many samples of the current epoch were asked for and are bad."""
        return sum(count for reason, count in self.skipped.items() if reason not in NOT_BAD)

    def _by_shard(self, shards: Shards) -> dict[str, Any]:
        """What a finished line says of each shard, and totals that count what could not be asked for."""
        lines: dict[str, Any] = {}
        total = self.skipped.copy()
        for name, visited, left_out in zip(shards.names, shards.counts(self.epoch), shards.left_out, strict=True):
            skipped = self.skipped_in.get(name, Counter())
            delivered = int(visited) - skipped.total()
            assert delivered >= 0, (name, visited, skipped)
            lines[name] = {"delivered": delivered, "skipped": dict(sorted((skipped + Counter(left_out)).items()))}
            total += Counter(left_out)
        assert sum(line["delivered"] for line in lines.values()) == self.delivered, (lines, self._account())
        return {
            "index_count": self.delivered + total.total(),
            "skipped": dict(sorted(total.items())),
            "shards": lines,
        }

    def _account(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "index_count": self.num_samples,
            "delivered": self.delivered,
            "skipped": dict(sorted(self.skipped.items())),
            "samples": list(self.named),
        }


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror}).") from error


def _keep_epochs_before(path: Path, epoch: int) -> None:
    """Remove the lines of later epochs, and what a killed process left of a line; all at once or not at all."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(f"{line}\n" for line in text.split("\n") if _is_before(line, epoch))
    if kept == text:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror}).") from error


def _is_before(line: str, epoch: int) -> bool:
    try:
        return int(json.loads(line)["epoch"]) < epoch
    except (ValueError, KeyError, TypeError):
        return False
