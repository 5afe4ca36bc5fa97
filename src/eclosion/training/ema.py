"""Exponential moving averages of a network's weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ema", "warmed_up"]

CHUNK = 64


def warmed_up(decay: float, step: int) -> float:
    """The decay after `step` updates: (1 + step) / (10 + step) until that exceeds `decay`.

    Early weights are poor, and with a full decay they would stay in the average for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """One average: a copy of the network, in eval mode, that follows it.

    Args:
        net: the network that is followed.
        copy: a copy of it, which becomes the average.
        decay: share of the old average that an update keeps.
        warmup: whether the decay is small at first.

    Attributes:
        decay: share of the old average that an update keeps.
        net: the averaged network; what previews, evaluation and export use.
    """

    def __init__(self, net: nn.Module, copy: nn.Module, decay: float, *, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.net = copy.eval().requires_grad_(False)
        self._averages, self._weights = _tensors(copy), _tensors(net)

    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Move the average towards the network's present weights.

        Args:
            step: optimizer updates before this one.
            skip: float32 scalar on the device; where it is 1 the average stays as it is, with no
                word from the host. None on a CPU, where the caller has looked already.
        """
        weight = 1 - (warmed_up(self.decay, step) if self.warmup else self.decay)
        if skip is None:
            torch._foreach_lerp_(self._averages, self._weights, weight)
        else:
            # A weight that is a tensor has no fast kernel of its own; a few tensors at a time keep the copies small.
            for start in range(0, len(self._weights), CHUNK):
                averages, weights = self._averages[start : start + CHUNK], self._weights[start : start + CHUNK]
                difference = torch._foreach_sub(weights, averages)
                torch._foreach_mul_(difference, (1 - skip) * weight)
                torch._foreach_add_(averages, difference)


@torch.no_grad()
def _tensors(net: nn.Module) -> list[Tensor]:
    """The floating-point parameters and buffers; of those split over processes, the share of this one."""
    found: Sequence[Any] = [*net.parameters(), *net.buffers()]
    return [t.to_local() if hasattr(t, "to_local") else t.detach() for t in found if t.is_floating_point()]
