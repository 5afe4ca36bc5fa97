"""Learning rate over time, clipping, and an AdamW whose step needs no word from the host."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eclosion.config.schema import OptimizerConfig

__all__ = ["AdamW", "LossScale", "grad_norm", "learning_rate"]

# What is kept for each parameter, in the order in which the kernel takes it.
SLOTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) with one kernel for the whole step.

    The kernel is that of torch.optim.AdamW(fused=True), and the numbers are the same. What that class does around
    it, a walk over all parameters in Python and one addition per parameter to count steps, takes several times as
    long as the kernel where parameters are small.

    Attributes:
        parameters: those that are trained.
        lr: learning rate of the next step.
        slots: what it keeps for each parameter: "step", float32 scalar; "exp_avg" and "exp_avg_sq", like the parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config, self.lr = config, config.learning_rate
        device = self.parameters[0].device
        self._counts = torch.zeros(len(self.parameters), device=device)  # one tensor, so that one call counts a step
        self.slots: dict[nn.Parameter, dict[str, Tensor]] = {
            p: {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for p, count in zip(self.parameters, self._counts, strict=True)
        }
        slots = self.slots.values()
        lists = [_local(p) for p in self.parameters], *([_local(s[k]) for s in slots] for k in SLOTS)
        decays = [config.weight_decay if _decays(p, config) else 0.0 for p in self.parameters]
        self._groups = [  # one kernel for each
            _Group(decay, which, [[tensors[i] for i in which] for tensors in lists])
            for decay in sorted(set(decays))
            if (which := [i for i, own in enumerate(decays) if own == decay])
        ]

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Move the parameters that have a gradient.

        Args:
            grad_scale: float32 scalar on the device, by which gradients are divided as they are read.
            found_inf: float32 scalar on the device; nothing changes where it is 1.
        """
        used = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        one = 1 if found_inf is None else 1 - found_inf
        if len(used) == len(self.parameters):
            self._counts.add_(one)
        else:
            self._counts[used] += one
        for group in self._groups:
            self._move(group, grad_scale, found_inf)

    def _move(self, group: "_Group", grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        grads = [self.parameters[i].grad for i in group.which]
        lists = group.lists
        if any(grad is None for grad in grads):
            lists = [[t for t, grad in zip(tensors, grads, strict=True) if grad is not None] for tensors in lists]
        weights, first, second, steps = lists
        if weights:
            torch._fused_adamw_(
                weights,
                [_local(grad) for grad in grads if grad is not None],
                first,
                second,
                [],
                steps,
                lr=self.lr,
                beta1=self.config.betas[0],
                beta2=self.config.betas[1],
                weight_decay=group.weight_decay,
                eps=self.config.epsilon,
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )


@dataclass(frozen=True)
class _Group:
    """Parameters with one weight decay.

    Attributes:
        weight_decay: theirs.
        which: their places among all.
        lists: their weights, and their slots in the order of `SLOTS`.
    """

    weight_decay: float
    which: list[int]
    lists: list[list[Tensor]]


def _decays(parameter: Tensor, config: OptimizerConfig) -> bool:
    return config.decay == "all" or parameter.ndim >= 2


def _local(tensor: Tensor) -> Tensor:
    """The share of this process, of a tensor that is split over processes."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


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
    # one call for all tensors, on the CPU too, where torch.nn.utils.get_total_norm makes one for each
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]


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
