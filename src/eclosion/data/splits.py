"""Which shards are for training, which for validation, which for testing: a function of the list and a seed alone."""

import math
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eclosion.errors import ConfigError
from eclosion.registry import part
from eclosion.rng import generator

__all__ = ["Splits", "divide"]

Share = Annotated[float, Field(ge=0, le=1)]


@part
class Splits:
    """Shares of the data; they sum to 1."""

    # What is trained on.
    train: Share = 1.0
    # What validation looks at.
    val: Share = 0.0
    # What tests look at.
    test: Share = 0.0

    def shares(self) -> dict[str, float]:
        """Name -> share.

        Raises:
            ConfigError: if they do not sum to 1.
        """
        shares = {"train": self.train, "val": self.val, "test": self.test}
        if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            said = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ConfigError(f"data.source.splits: {said} sum to {sum(shares.values()):g}. They must sum to 1.")
        return shares


def divide(number: int, shares: Mapping[str, float], *, seed: int) -> dict[str, NDArray[np.int64]] | None:
    """Divide things 0 .. number-1 at random: name -> which, sorted. Every thing is in exactly one.

    Each share gets its proportion, rounded so that the largest remainders are rounded up; a share of 0 gets none.

    Returns:
        None if there are too few things for every share above 0 to get one.
    """
    exact = {name: share * number for name, share in shares.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    missing = number - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:missing]:
        counts[name] += 1
    if any(shares[name] > 0 and counts[name] == 0 for name in shares):
        return None
    order = generator(seed, "splits").permutation(number)
    ends = np.cumsum(list(counts.values()))
    return {name: np.sort(part) for name, part in zip(counts, np.split(order, ends[:-1]), strict=True)}
