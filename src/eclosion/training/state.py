"""What a run changes as it goes: one stage per network, and the position in the data."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eclosion.config.schema import RunConfig
from eclosion.errors import CheckpointError
from eclosion.tasks.task import span_of
from eclosion.training.distributed import World, full_tensors, put
from eclosion.training.ema import Ema
from eclosion.training.optim import AdamW, LossScale, grad_norm, learning_rate
from eclosion.training.scores import ENTRY, Scores

__all__ = ["Stage", "TrainState"]

# Below this a float16 loss scale says that the gradients themselves overflow, not their scaling.
SMALLEST_SCALE = 2.0**-8


class Stage:
    """One network with its optimizer, learning rate and averages.

    Attributes:
        name: the network's name in its task.
        module: the network itself.
        net: the network as the loop calls it, wrapped for several processes.
        options: of its optimizer: those of all networks, and what differs for this one.
        max_grad_norm: of its gradients; None leaves them.
        emas: its averages, in the order of `ema.decays`.
        loss_sum: float64 scalar on the device, the losses of delivered images since the last log.
        loss_count: float64 scalar on the device, how many those were.
        norm: float32 scalar on the device, gradient norm of the last step, before clipping.
        failed_at: int64 scalar on the device, the first step that was not finite, or -1.
    """

    def __init__(
        self, name: str, module: nn.Module, config: RunConfig, *, world: World, device: torch.device, fp16: bool
    ) -> None:
        self.name, self.config, self.world, self.device = name, config, world, device
        train = config.train
        self.trained = name not in train.freeze
        layout = device.type == "cuda" if train.channels_last == "auto" else train.channels_last
        self.module = module.to(device)
        if layout:
            self.module.to(memory_format=torch.channels_last)
        self.module.train(self.trained)
        for p in self.module.parameters():
            p.requires_grad_(p.requires_grad and self.trained)  # a network may hold constants of its own
        if train.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()  # type: ignore[operator]
        copies = [copy.deepcopy(self.module) for _ in config.ema.decays]
        world.split(self.module, train.parallel)
        self.net = world.prepare(self.module, train.parallel) if self.trained else self.module
        self.emas = [
            Ema(self.module, world.split(average, train.parallel), decay, warmup=config.ema.warmup)
            for average, decay in zip(copies, config.ema.decays, strict=True)
        ]
        if train.compile:
            self.net.compile()
        self.options = config.optimizer.of_network(name)
        self.max_grad_norm = config.max_grad_norm_of(name)
        self.optimizer = AdamW(self.module.parameters(), self.options) if self.trained else None
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.scale = LossScale(device, enabled=fp16)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.loss_sum, self.loss_count = torch.zeros((2,), dtype=exact, device=device)
        self._step_sum, self._step_count = torch.zeros((2,), dtype=exact, device=device)
        self.norm = torch.zeros((), device=device)
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self._images = train.batch_size // world.size  # of one step, on this process

    @property
    def sampled(self) -> nn.Module:
        """The network that makes pictures: the first average, or the network itself if there is none."""
        return self.emas[0].net if self.emas else self.module

    def accumulate(self, losses: Tensor, weight: Tensor) -> None:
        """Add the gradients of one micro-batch.

        Args:
            losses: float32 [B], one per image.
            weight: float32 [B], 0 for an image that was not delivered.
        """
        weighted = losses * weight
        (weighted.sum() * (self.scale.value / self._images)).backward()  # type: ignore[no-untyped-call]
        self._step_sum += weighted.detach().sum()
        self._step_count += weight.sum()

    def update(self, step: int, num_steps: int) -> None:
        """Clip, step, follow with the averages; nothing is touched if anything is not finite.

        No scalar is read on the host except on a CPU, where it costs nothing.
        """
        assert self.optimizer is not None
        norm = grad_norm(self.parameters)
        overflow = ~torch.isfinite(norm)
        loss_failed = self.world.sum((~torch.isfinite(self._step_sum)).int()) > 0
        failed = loss_failed | (self.scale.value < SMALLEST_SCALE) if self.scale.enabled else loss_failed | overflow
        self.failed_at = torch.where((self.failed_at < 0) & failed, step, self.failed_at)
        self.norm = norm / self.scale.value
        skip = overflow | (self.failed_at >= 0)
        self.optimizer.lr = learning_rate(self.options, step, num_steps)
        self._step(skip)
        if self.device.type == "cuda":
            self._average(step, skip.float())
        elif not skip:
            self._average(step, None)
        self.scale.update(overflow)
        self.loss_sum += self._step_sum
        self.loss_count += self._step_count
        self.drop()

    def drop(self) -> None:
        """Forget the gradients and losses of the step at hand."""
        for p in self.parameters:
            p.grad = None
        self._step_sum.zero_()
        self._step_count.zero_()

    def _step(self, skip: Tensor) -> None:
        assert self.optimizer is not None
        divisor = self.scale.value
        if self.max_grad_norm is not None:
            divisor = divisor * (self.norm / self.max_grad_norm).clamp(min=1)
        if self.device.type == "mps":  # whose kernel divides no gradients
            if not skip:
                torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], float(divisor))
                self.optimizer.step()
        elif self.device.type == "cuda":
            self.optimizer.step(divisor, skip.float())
        elif not skip:
            # A divided gradient is written back, which takes a tenth of the step: not for nothing.
            self.optimizer.step(None if divisor == 1 else divisor)

    def _average(self, step: int, skip: Tensor | None) -> None:
        for ema in self.emas:
            ema.update(step, skip)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything to keep, by file and name. Every process must ask; weights split over processes are gathered."""
        keep = self.world.leads
        files = {self.name: full_tensors(self.module.state_dict(), keep=keep)}
        for suffix, ema in self._ema_files():
            files[f"{self.name}.{suffix}"] = full_tensors(ema.net.state_dict(), keep=keep)
        files[f"{self.name}.optimizer"] = self._scale_slots() | full_tensors(self._slots(), keep=keep)
        return files

    def _scale_slots(self) -> dict[str, Tensor]:
        if not self.scale.enabled:
            return {}
        return {"loss_scale": self.scale.value, "loss_scale.good_steps": self.scale.good_steps}

    def _ema_files(self) -> list[tuple[str, Ema]]:
        return [("ema" if i == 0 else f"ema-{ema.decay}", ema) for i, ema in enumerate(self.emas)]

    def _slots(self) -> dict[str, Tensor]:
        if self.optimizer is None:
            return {}
        names: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
        return {
            f"{names[p]}.{slot}": value for p, slots in self.optimizer.slots.items() for slot, value in slots.items()
        }

    def load(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `tensors` gave; CheckpointError names every difference."""
        _fill(self.module.state_dict(), files.get(self.name, {}), self.name)
        for suffix, ema in self._ema_files():
            _fill(ema.net.state_dict(), files.get(f"{self.name}.{suffix}", {}), f"{self.name}.{suffix}")
        slots = files.get(f"{self.name}.optimizer", {})
        for name, value in self._scale_slots().items():
            if name in slots:  # not when the precision was another one
                value.copy_(slots[name])
        if self.optimizer is None:
            return
        for name, p in self.module.named_parameters():
            if not p.requires_grad:
                continue
            ours = self.optimizer.slots[p]
            saved = {slot: slots[f"{name}.{slot}"] for slot in ours if f"{name}.{slot}" in slots}
            _fill(ours, saved, f"{self.name}.optimizer {name}")


def _fill(ours: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into ours, which must have the same names and shapes."""
    differences = [f"{name} is missing" for name in ours.keys() - saved.keys()]
    differences += [f"{name} is not known" for name in saved.keys() - ours.keys()]
    differences += [
        f"{name} is {list(saved[name].shape)}, wanted {list(ours[name].shape)}"
        for name in ours.keys() & saved.keys()
        if ours[name].shape != saved[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"{what} does not fit this run: {'; '.join(sorted(differences)[:3])}{more}.")
    for name, value in saved.items():
        put(ours[name], value)


@dataclass
class TrainState:
    """All that a checkpoint must hold.

    Attributes:
        stages: one per network, by name.
        batch_size: images per update, over all processes.
        num_steps: optimizer updates of the whole run.
        step: updates so far.
        samples_seen: images so far, over all processes; the position in the data.
        last_loss: loss at the last log, by stage.
        scores: what validation and evaluation have found.
        untrained: frozen networks that nothing was ever loaded into: they make noise.
    """

    stages: dict[str, Stage]
    batch_size: int
    num_steps: int = 0
    step: int = 0
    samples_seen: int = 0
    last_loss: dict[str, float] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)
    untrained: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.untrained = [name for name, stage in self.stages.items() if not stage.trained]

    @property
    def span(self) -> tuple[int, int]:
        """The places of the first and the last network to make pictures with: neighbours, none of them untrained."""
        return span_of(self.stages, self.untrained)

    @property
    def trained(self) -> list[Stage]:
        """The stages that the loop trains."""
        return [stage for stage in self.stages.values() if stage.trained]

    @property
    def done(self) -> bool:
        """Whether the run has made all its updates."""
        return self.step >= self.num_steps

    def due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps happens now; always after the last step; None is never."""
        return every_steps is not None and (self.step % every_steps == 0 or self.done)

    def advance(self) -> None:
        """Count one update."""
        self.step += 1
        self.samples_seen += self.batch_size

    def failed_at(self) -> tuple[str, int] | None:
        """The stage and step that were not finite, if any. Reads the device."""
        for stage in self.trained:
            step = int(stage.failed_at)
            if step >= 0:
                return stage.name, step
        return None

    def summary(self, world: World) -> dict[str, float]:
        """Loss, gradient norm and learning rate since the last call. Reads the device; every process must ask."""
        numbers: dict[str, float] = {}
        for stage in self.trained:
            end = f"/{stage.name}" if len(self.trained) > 1 else ""
            total = world.sum(torch.stack([stage.loss_sum, stage.loss_count]))
            if total[1]:  # else no image was delivered
                self.last_loss[stage.name] = numbers[f"train/loss{end}"] = float(total[0] / total[1])
            numbers[f"train/grad_norm{end}"] = float(stage.norm)
            assert stage.optimizer is not None
            numbers[f"train/lr{end}"] = stage.optimizer.lr
            stage.loss_sum.zero_()
            stage.loss_count.zero_()
        return numbers

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything to keep, by file and name. Every process must ask."""
        files = {name: tensors for stage in self.stages.values() for name, tensors in stage.tensors().items()}
        losses = self.scores.tensors()
        return files | ({ENTRY: losses} if losses else {})

    def numbers(self, world: World) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors. Every process must ask."""
        losses = {s.name: [float(world.sum(t.clone())) for t in (s.loss_sum, s.loss_count)] for s in self.trained}
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "losses": losses,
            "last_loss": self.last_loss,
            "validation": self.scores.as_dict(),
            "untrained": self.untrained,
        }

    def load(self, files: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any], *, leads: bool) -> None:
        """Put back what `tensors` and `numbers` gave; CheckpointError names every difference."""
        others = sorted({name.partition(".")[0] for name in files} - {*self.stages, ENTRY})
        if others:
            raise CheckpointError(f"the checkpoint holds {others[0]}, and this run has {', '.join(self.stages)} alone.")
        for stage in self.stages.values():
            stage.load(files)
            total, count = numbers["losses"].get(stage.name, (0, 0))
            stage.loss_sum.fill_(total if leads else 0)  # they are sums over processes
            stage.loss_count.fill_(count if leads else 0)
        self.step, self.samples_seen = numbers["step"], numbers["samples_seen"]
        self.last_loss = dict(numbers["last_loss"])
        self.scores = Scores.from_dict(numbers.get("validation", {}), files.get(ENTRY, {}))
        self.untrained = [name for name in numbers.get("untrained", ()) if not self.stages[name].trained]
