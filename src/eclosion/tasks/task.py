"""What the loop and the sampling code ask of a task."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError
from torch import Tensor, nn

from eclosion.config.schema import RunConfig
from eclosion.data.batch import Batch
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import build, dump
from eclosion.rng import Generator

__all__ = [
    "DataFacts",
    "Drawn",
    "Task",
    "TaskPart",
    "check_wishes",
    "is_silent",
    "one_each",
    "place_of",
    "samplers_for",
    "span_of",
    "within",
]

# a frozen dataclass of tensors, made and read by one task alone
Drawn = Any


@dataclass(frozen=True)
class DataFacts:
    """What a task must know of the data before it can build its networks.

    Attributes:
        size: height and width in pixels.
        class_names: the name of each label, or empty.
        arrays: shape of what else each sample brings, such as {"image_embed": (768,)}, by the names in
            `eclosion.data.batch.FIELDS`.
        has_captions: whether samples have captions.
        made: shape of what the task's encoders made of each sample when its networks were trained, by the same names;
            empty before training.
    """

    size: tuple[int, int]
    class_names: tuple[str, ...] = ()
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    has_captions: bool = False
    made: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Task(Protocol):
    """What is trained. Knows networks and mathematics; knows no optimizer, file, process or tracker.

    Attributes:
        nets: networks by name, in the order in which sampling calls them; always called through `__call__`, since
            they may be wrapped.
        sizes: height and width in pixels of what each network makes.
        wants: the fields that `conditions` takes from examples of the data, such as ("image_embed",); empty if it
            needs none.
        made: shape of what `prepare` adds to each sample, by the same names; empty if it adds nothing.
    """

    nets: dict[str, nn.Module]

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]: ...

    @property
    def wants(self) -> tuple[str, ...]: ...

    @property
    def made(self) -> Mapping[str, tuple[int, ...]]: ...

    def wanted(self, first: int, last: int | None) -> tuple[str, ...]:
        """Those of `wants` that the networks from one place in `nets` to another follow, both included; none is the
        last."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """The batch with what an encoder adds to it; what is there already is left. No gradient.

        Called once per batch, before all networks, on their device. Frozen encoders are the task's own, and not among
        `nets`. Skipped images keep their rows.
        """
        ...

    def draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Drawn:
        """Every random tensor of a prepared batch; row i comes from rngs[i] alone."""
        ...

    def validation_draw(self, name: str, batch: Batch, rngs: Sequence[Generator]) -> Drawn:
        """As `draw`, and no condition is dropped."""
        ...

    def noise_level(self, name: str, drawn: Drawn) -> Tensor:
        """How far up the noise levels of a network each image of a draw stands: [B], from 0, clean, to below 1."""
        ...

    def loss(self, name: str, batch: Batch, drawn: Drawn) -> Tensor:
        """One number per image: float32 [B], differentiable. No randomness but a network's own dropout."""
        ...

    def conditions(self, indices: Sequence[int], examples: Batch | None = None) -> Batch:
        """What the images `indices` of a preview are asked to show, one row each.

        Args:
            indices: their numbers; classes in turn follow from them.
            examples: a prepared batch whose row k belongs to indices[k]. Of `wants` it has those that the networks
                to be sampled need, and it need not have an image.

        Raises:
            ConfigError: if what it has is of another shape than the networks take.
        """
        ...

    def samplers(self, default: Any) -> list[Any]:
        """The sampler of each network, in the order of `nets`: its own, or `default`."""
        ...

    def check_sampling(self, sampler: Any, guidance_scale: float | Sequence[float]) -> None:
        """Refuse a sampler or a guidance that this task could not use, before anything is trained."""
        ...

    def sample(
        self,
        conditions: Batch,
        rngs: Sequence[Generator],
        *,
        sampler: Any,
        guidance_scale: float | Sequence[float] = 1.0,
        on_step: OnStep | None = None,
        first: int = 0,
        last: int | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], float32; image i comes from conditions[i] and rngs[i] alone.

        Args:
            conditions: what `conditions` gave.
            rngs: one generator per image.
            sampler: for the networks that have none of their own; or a list with one for each network of `nets`,
                which then takes the place of their own.
            guidance_scale: for all networks, or a list with one for each of `nets`.
            on_step: called with (step, steps) of the network at work, before each call of it.
            first, last: the places in `nets` of the networks to begin and to end with, both included; none is the
                last. The result has the size of network `last`.
            image: where `first` is not 0, the small images to begin with, [B, 3, h, w] in [-1, 1] of the size that
                network `first - 1` makes.

        Raises:
            DataError: if the conditions lack what one of these networks needs.
        """
        ...

    def with_nets(self, nets: Mapping[str, nn.Module]) -> "Task":
        """The same task on other networks, such as averages or data-parallel copies."""
        ...

    def pipeline(self, kind: str | None = None, *, sampler: Any = None, guidance_scale: Any = 1.0) -> Any:
        """A diffusers pipeline that holds the networks.

        Args:
            kind: which one, as in `export` of a config; none is the first that the task has.
            sampler, guidance_scale: what it uses unless it is called with others, if it can hold them.

        Raises:
            ConfigError: if the task has no pipeline of this kind.
            UserError: if there is none for this task at all.
        """
        ...


class TaskPart(Protocol):
    """A part that describes a task: its fields are its options."""

    def build(self, facts: DataFacts) -> Task:
        """The task, with networks drawn from torch's global generator, on the CPU."""
        ...


def check_wishes(task: Task, run: RunConfig) -> None:
    """Refuse, before anything is trained, what would fail only later: freezing, pictures, the pipeline at the end.

    Raises:
        ConfigError: with every problem.
        UserError: if there is no pipeline for this task.
    """
    frozen = run.train.freeze
    problems = [
        f"train.freeze: {name!r} is no network of this task.{did_you_mean(name, task.nets)}"
        for name in frozen
        if name not in task.nets
    ]
    if set(frozen) >= set(task.nets):
        problems.append(f"train.freeze names every network ({', '.join(task.nets)}), so nothing would be trained.")
    problems += [
        f"optimizer.networks: {name!r} is no network of this task.{did_you_mean(name, task.nets)}"
        for name in run.optimizer.networks
        if name not in task.nets
    ]
    if run.sample.num_images:
        try:
            task.check_sampling(run.sample.sampler, run.sample.guidance_scale)
        except ConfigError as error:
            problems += [f"sample: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    if run.export != "no" or run.hub:
        task.pipeline(None if run.export == "no" else run.export)


def is_silent(noise_schedule: Any, prediction_type: str) -> bool:
    """Whether what is learned at the last level says nothing of the image: its noise, where there is noise alone."""
    return prediction_type == "epsilon" and getattr(noise_schedule, "rescale_zero_terminal_snr", False)


def one_each(value: float | Sequence[float], names: Iterable[str], *, what: str) -> list[float]:
    """A number for each network, from one for all or a list.

    Args:
        value: one number, or one for each network.
        names: of the networks, in order.
        what: the option, for the message.

    Raises:
        ConfigError: if the list has another length.
    """
    known = list(names)
    if isinstance(value, int | float):
        return [value] * len(known)
    if len(value) != len(known):
        listed = ", ".join(f"{number:g}" for number in value)
        raise ConfigError(
            f"{what} has {len(value)} numbers ({listed}), and the networks of this task are {', '.join(known)}. "
            "Give one number for each, or one for all."
        )
    return list(value)


def place_of(network: str | int, names: Iterable[str], *, what: str) -> int:
    """The place of a network in the order of a task's, from its name or its number.

    Raises:
        ConfigError: if there is none.
    """
    known = list(names)
    if isinstance(network, str) and network.isdigit():
        network = int(network)
    if isinstance(network, int) and 0 <= network < len(known):
        return network
    if network in known:
        return known.index(network)
    raise ConfigError(f"{what}: {network!r} is no network of this task.{did_you_mean(str(network), known)}")


def span_of(names: Iterable[str], untrained: Container[str], first: int | None = None) -> tuple[int, int]:
    """The places of the first and the last network to make images with: neighbours, none of them untrained.

    Args:
        names: of a task's networks, in order.
        untrained: those that would make noise.
        first: the place to begin with; None is that of the first that is trained.
    """
    fine = [name not in untrained for name in names]
    begin = fine.index(True) if first is None else first
    return begin, fine.index(False, begin) - 1 if False in fine[begin:] else len(fine) - 1


def within(names: Iterable[str], span: tuple[int, int]) -> str:
    """The networks of a span, in words: "unet_1", or "unet_1 to unet_2"."""
    first, *more = list(names)[span[0] : span[1] + 1]
    return f"{first} to {more[-1]}" if more else first


def samplers_for(task: Task, default: Any, sampler: Any, steps: int | Sequence[int | None] | None) -> list[Any]:
    """The sampler of each network: its own, unless another or a number of steps is given.

    Args:
        task: whose networks.
        default: the sampler of networks that have none of their own.
        sampler: another one for all networks: its name, or its name and options; None is none.
        steps: for all networks, or one number for each; None takes what the sampler says.

    Raises:
        ConfigError: if there is no such sampler, or there are not as many numbers as networks.
    """
    own = task.samplers(default)
    counts = list(steps) if isinstance(steps, Sequence) else [steps] * len(own)
    if len(counts) != len(own):
        raise ConfigError(
            f"num_inference_steps has {len(counts)} numbers, and the networks of this task are "
            f"{', '.join(task.nets)}. Give one number for each, or one for all."
        )
    return [_sampler(part if sampler is None else sampler, count) for part, count in zip(own, counts, strict=True)]


def _sampler(wanted: Any, steps: int | None) -> Any:
    try:
        part = build("samplers", wanted)
        return part if steps is None else build("samplers", dump(part) | {"num_inference_steps": steps})
    except ValueError as error:  # that of pydantic is one
        raise ConfigError(f"sampler: {_detail(error)}") from error


def _detail(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(": ".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors())
