"""Randomness as a function of position.

Nothing random about an image of a run is state: `generator(seed, purpose, position)` gives
the same numbers whenever, wherever and in whatever order it is asked for. So a run resumes
from two integers, and splitting a batch differently changes no draw.

The stream is Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), keyed with
128 bits of BLAKE2b over the position, so that two positions share a stream with negligible chance.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Generator", "generator", "integer_seed", "randint", "randn", "uniform"]


def generator(seed: int, *position: str | int) -> Generator:
    """The random stream that belongs to one position of a run.

    Args:
        seed: the run's seed.
        position: what the numbers are for and where, such as ("loss", "unet", 17).
    """
    key = _Key(np.frombuffer(_key(seed, position, 16), np.uint64))
    return Generator(Philox(key))  # type: ignore[arg-type]  # NumPy takes any ISeedSequence, its stubs do not


class _Key(ISeedSequence):
    """A Philox key as it is: `Philox(key=...)` first asks the system for entropy, and then does not use it."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        return self.words


def integer_seed(seed: int, *position: str | int) -> int:
    """A 63-bit seed for a library that keeps a global stream, such as dropout in torch."""
    return int.from_bytes(_key(seed, position, 8), "little") >> 1


def _key(seed: int, position: Sequence[str | int], size: int) -> bytes:
    text = repr((seed, *position)).encode()
    return hashlib.blake2b(text, digest_size=size).digest()


def randn(rngs: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 [B, *shape]; row i comes from rngs[i] alone."""
    out = np.empty((len(rngs), *shape), np.float32)
    for row, rng in zip(out, rngs, strict=True):
        rng.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(out)


def randint(rngs: Sequence[Generator], low: int, high: int) -> Tensor:
    """Whole numbers in [low, high), int64 [B]; number i comes from rngs[i] alone."""
    return torch.tensor([int(rng.integers(low, high)) for rng in rngs], dtype=torch.int64)


def uniform(rngs: Sequence[Generator]) -> Tensor:
    """Numbers in [0, 1), float64 [B]; number i comes from rngs[i] alone."""
    return torch.tensor([float(rng.random()) for rng in rngs], dtype=torch.float64)
