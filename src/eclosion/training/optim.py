"""Learning rate over time, clipping, and an AdamW whose step needs no word from the host."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from eclosion.config.schema import OptimizerConfig

__all__ = ["LossScale", "adamw", "grad_norm", "learning_rate"]


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one kernel for the whole step."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of the update that follows `step` updates.

    It rises in a straight line over the warm-up, reaching its full value on the first update after
    it; then it stays, falls in a straight line, or follows half a cosine, to 0 after the last update.

    Args:
        config: the optimizer's options.
        step: updates so far, from 0.
        num_steps: updates of the whole run.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    match config.lr_schedule:
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return config.learning_rate


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, float32 scalar on their device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class LossScale:
    """The factor by which a loss is multiplied so that float16 gradients do not vanish.

    Halved after a step whose gradients overflow, which is skipped; doubled after 2000 that do not
    (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2). In other precisions it is 1.

    Attributes:
        value: float32 scalar on the device.
        good_steps: int32 scalar, steps since the last change.
    """

    GROWTH_STEPS = 2000

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Follow one step; `overflow` is a boolean scalar on the device."""
        if not self.enabled:
            return
        self.good_steps = torch.where(overflow, 0, self.good_steps + 1).to(torch.int32)
        grow = self.good_steps >= self.GROWTH_STEPS
        self.value = torch.where(overflow, self.value / 2, torch.where(grow, self.value * 2, self.value))
        self.good_steps = torch.where(grow, 0, self.good_steps).to(torch.int32)
