"""From what files hold of a cascade to the networks of a checkpoint of ours: weights, averages, optimizer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eclosion.errors import CheckpointError, printable
from eclosion.importing.original import OriginalFile, OriginalUnet
from eclosion.models.unclip_import import OriginalParameter, original_parameters, translate_unet

__all__ = ["Network", "collect", "translate"]

SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Network:
    """One network in our own names.

    Attributes:
        name: such as "unet_0".
        weights: float32, by parameter.
        average: the same for its average; None if the file has none.
        slots: what the optimizer keeps, by parameter and slot, as `Stage` names them.
        has_moments: whether the slots are those of the file; else they are those of an optimizer that has not begun.
        steps: optimizer updates behind it; None if the file does not say.
        options: of its optimizer: learning_rate, betas, epsilon and weight_decay, as far as the file says them.
        notes: what of the file has no place here, one line each.
    """

    name: str
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    slots: Mapping[str, Tensor]
    has_moments: bool
    steps: int | None
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def collect(files: Sequence[OriginalFile], num_unets: int) -> list[OriginalUnet]:
    """The U-Nets of a cascade, each from the one file that holds it.

    Args:
        files: checkpoints of the same cascade, in each of which some networks may be masked out.
        num_unets: networks in the cascade.

    Raises:
        CheckpointError: naming every network that no file holds, or more than one does.
    """
    problems, found = [], []
    for i in range(num_unets):
        holders = [file.unets[i] for file in files if i in file.unets]
        if len(holders) == 1:
            found.append(holders[0])
        elif holders:
            paths = " and ".join(str(unet.path) for unet in holders)
            problems.append(f"unet_{i} is in {paths}. Leave all but one of them out.")
        else:
            paths = ", ".join(str(file.path) for file in files)
            problems.append(
                f"unet_{i} of {num_unets} is in none of the files ({paths}): it was masked out. Give the file that "
                "holds it as well."
            )
    if problems:
        raise CheckpointError(" ".join(problems))
    return found


def translate(unet: OriginalUnet, arguments: Mapping[str, Any]) -> Network:
    """An original U-Net in our names.

    Args:
        unet: from a file.
        arguments: of the original's constructor, as for `network_options`.

    Raises:
        CheckpointError: naming the file, the network, and what is missing, unexpected, of another shape or not finite.
    """
    name, where = f"unet_{unet.index}", f"{unet.path}: unet_{unet.index}"
    parameters = original_parameters(arguments)
    weights = _floats(translate_unet(unet.weights, arguments, name=where))
    average = unet.average and _floats(translate_unet(unet.average, arguments, name=f"{where}, its average"))
    moments = _Moments(f"{unet.path}: optim{unet.index}", parameters, unet.optimizer) if unet.optimizer else None
    slots = moments.slots() if moments else dict(_fresh(parameters))
    _refuse_what_diverged(where, {"weights": weights, "average": average or {}, "optimizer": slots})
    return Network(
        name=name,
        weights=weights,
        average=average,
        slots=slots,
        has_moments=moments is not None,
        steps=unet.steps,
        options=moments.options() if moments else {},
        notes=tuple(f"{name}: {note}" for note in _left_behind(unet, moments)),
    )


def _refuse_what_diverged(where: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for kind, named in tensors.items():
        bad = [name for name, tensor in named.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise CheckpointError(
                f"{where}: {len(bad)} tensors of its {kind} are not finite (the first is {bad[0]}): that training had "
                "diverged. Give an earlier checkpoint."
            )


def _left_behind(unet: OriginalUnet, moments: "_Moments | None") -> Iterator[str]:
    """What of a network has no place here, and what became something else."""
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in unet.weights.values()} - {"float32"})
    if types:
        yield f"its weights were {' and '.join(types)}, and are float32 here."
    extra = sorted(moments.unknown) if moments else []
    if extra:
        yield f"its optimizer kept {', '.join(extra)}, which eclosion's has no place for."
    if unet.schedule and "T_max" in unet.schedule:
        yield "its learning rate followed a cosine, which --set optimizer.lr_schedule=cosine asks for here."


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def _fresh(parameters: Sequence[OriginalParameter]) -> Iterator[tuple[str, Tensor]]:
    """The slots of an optimizer that has not begun."""
    for p in parameters:
        if p.ours is not None:
            yield from _slots_of(p, {})


def _slots_of(p: OriginalParameter, entry: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield f"{p.ours}.step", torch.tensor(float(entry.get("step", 0.0)))
    for slot in SLOTS:
        yield f"{p.ours}.{slot}", entry[slot].detach().float().contiguous() if entry else torch.zeros(p.shape)


class _Moments:
    """The state of torch's Adam or AdamW, which counts parameters instead of naming them.

    With weight decay the original has two groups: parameters of two dimensions and more, then the others, each in the
    order of their registration; without, one group with all.

    Args:
        where: the file and the optimizer, for messages.
        parameters: of the original's network, in the order of their registration.
        state_dict: of its optimizer.
    """

    def __init__(self, where: str, parameters: Sequence[OriginalParameter], state_dict: Mapping[str, Any]) -> None:
        self.where = where
        self.groups = self._groups(state_dict.get("param_groups"))
        matrices = [p for p in parameters if len(p.shape) >= 2]
        others = [p for p in parameters if len(p.shape) < 2]
        wanted = [matrices, others] if len(self.groups) == 2 else [parameters]
        sizes, have = [len(group) for group in wanted], [len(group["params"]) for group in self.groups]
        if have != sizes:
            raise CheckpointError(
                f"{where}: has groups of {have} parameters, and the network of its config has groups of {sizes}. Is "
                "this the config that it was trained with?"
            )
        state = state_dict.get("state")
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{where}.state is a {type(state).__name__}, and must be a mapping.")
        self.entries = [
            (p, self._entry(p, key, state.get(key)))
            for group, ps in zip(self.groups, wanted, strict=True)
            for p, key in zip(ps, group["params"], strict=True)
        ]

    def _groups(self, groups: Any) -> list[Mapping[str, Any]]:
        whole = isinstance(groups, list) and 1 <= len(groups) <= 2
        if not whole or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups):
            raise CheckpointError(
                f"{self.where}.param_groups is not what torch.optim.AdamW keeps: one or two groups with their params."
            )
        keys = [key for group in groups for key in group["params"]]
        if any(type(key) is not int for key in keys) or len(set(keys)) != len(keys):
            raise CheckpointError(f"{self.where}.param_groups: params must be different whole numbers.")
        return list(groups)

    def _entry(self, p: OriginalParameter, key: int, entry: Any) -> Mapping[str, Any]:
        """What is kept for one parameter; empty if it never had a gradient."""
        if entry is None:
            return {}
        where = f"{self.where}.state.{key} ({p.name})"
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{where} is a {type(entry).__name__}, and must be a mapping.")
        for slot in SLOTS:
            value = entry.get(slot)
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{where} has no {slot}. Was the optimizer Adam or AdamW?")
            if tuple(value.shape) != p.shape:
                raise CheckpointError(f"{where}: {slot} is {list(value.shape)}, and must be {list(p.shape)}.")
        step: Any = entry.get("step")
        counted = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
        if not (counted and 0 <= float(step) < math.inf):
            raise CheckpointError(f"{where} has no step.")
        return entry

    def slots(self) -> dict[str, Tensor]:
        """By our names; what never had a gradient begins anew."""
        return dict(pair for p, entry in self.entries if p.ours is not None for pair in _slots_of(p, entry))

    @property
    def unknown(self) -> set[str]:
        """What it kept for parameters that ours does not."""
        return {printable(str(key))[:40] for _, entry in self.entries for key in entry} - {*SLOTS, "step"}

    def options(self) -> dict[str, Any]:
        """How it was set, in our words, as far as it says so in numbers."""
        group = self.groups[0]
        said = {
            "learning_rate": group.get("initial_lr", group.get("lr")),
            "weight_decay": group.get("weight_decay"),
            "epsilon": group.get("eps"),
        }
        found: dict[str, Any] = {key: float(value) for key, value in said.items() if isinstance(value, int | float)}
        betas = group.get("betas")
        if isinstance(betas, list | tuple) and all(isinstance(beta, int | float) for beta in betas):
            found["betas"] = tuple(map(float, betas))
        return found
