"""The native config of a run: its fixed sections and their options.

The comment above a field is that option's entry in the reference.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from eclosion.config.hub import HubConfig
from eclosion.registry import PartOf, dump, part

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EmaConfig",
    "EvaluateConfig",
    "NetworkOptimizer",
    "OptimizerConfig",
    "RunConfig",
    "SampleConfig",
    "TrackConfig",
    "TrainConfig",
    "ValidateConfig",
    "last_step",
    "steps_in",
]

_DURATION = re.compile(r"\s*(\d[\d_]*)\s*(steps?|samples?|epochs?)\s*$")
_ONE = _DURATION.pattern.removesuffix("$")


def _duration(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value} steps"
    return value


def _check_duration(value: str) -> str:
    match = _DURATION.match(value)
    if not match or int(match[1]) < 1:
        raise ValueError(f"must be like '1000 steps', '100000 samples' or '50 epochs', not {value!r}")
    return f"{int(match[1])} {match[2].rstrip('s')}s"


# "1000 steps", "100000 samples" or "50 epochs"; a bare number counts steps.
Duration = Annotated[
    str,
    BeforeValidator(_duration),
    AfterValidator(_check_duration),
    WithJsonSchema(
        {"title": "duration", "type": ["string", "integer"], "pattern": f"^{_DURATION.pattern}", "minimum": 1}
    ),
]


def _check_interval(value: str) -> str:
    return " or ".join(_check_duration(one) for one in value.split(" or "))


# A duration, or several, of which the shortest counts: "100000 samples or 1 epoch".
Interval = Annotated[
    str,
    BeforeValidator(_duration),
    AfterValidator(_check_interval),
    WithJsonSchema(
        {"title": "duration", "type": ["string", "integer"], "pattern": f"^{_ONE}(or{_ONE})*$", "minimum": 1}
    ),
]


def steps_in(duration: str, *, batch_size: int, epoch_samples: int) -> int:
    """Optimizer steps that a duration such as "50 epochs" takes, rounded up to whole batches.

    Args:
        duration: as in a config; of several, as in "100000 samples or 1 epoch", the shortest counts.
        batch_size: images per optimizer step, over all processes.
        epoch_samples: images in one pass over the data.
    """
    units = {"steps": batch_size, "samples": 1, "epochs": epoch_samples}
    each = [one.split() for one in _check_interval(duration).split(" or ")]
    return math.ceil(min(int(amount) * units[unit] for amount, unit in each) / batch_size)


def last_step(duration: str, *, step: int, samples_seen: int, batch_size: int, epoch_samples: int) -> int:
    """The optimizer step at which a run is done, seen from where it stands; its batch size may have changed before.

    Args:
        duration: of the whole run, as in a config.
        step, samples_seen: updates and images so far.
        batch_size: images per step from here on.
        epoch_samples: images in one pass over the data.
    """
    amount, unit = _check_duration(duration).split()
    if unit == "steps":
        return int(amount)
    samples = int(amount) * (epoch_samples if unit == "epochs" else 1)
    return step + max(0, math.ceil((samples - samples_seen) / batch_size))


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Guidance = Annotated[float, Field(ge=0)]


def _steps_of(value: object) -> object:
    """The transforms of `data.preprocessing` as a list in their order, each a mapping from its name to its options.

    A list, as an order that is kept in a mapping is lost where keys are sorted. What is switched off is left out.
    """
    given = [{name: options} for name, options in value.items()] if isinstance(value, Mapping) else value
    if not isinstance(given, list) or not all(isinstance(step, Mapping) and len(step) == 1 for step in given):
        raise ValueError("must be a mapping from names in torchvision.transforms to true, false or their options")
    steps: list[dict[str, Any]] = []
    for name, options in (next(iter(step.items())) for step in given):
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is not the name of a transform")
        if not isinstance(options, bool | Mapping) or not all(isinstance(key, str) for key in _keys(options)):
            raise ValueError(f"{name} is {options!r}, and must be true, false or a mapping of its options")
        if options is not False:
            steps.append({name: {} if options is True else dict(options)})
    return steps


def _keys(options: bool | Mapping[Any, Any]) -> Iterable[Any]:
    return () if isinstance(options, bool) else options


_STEP = {"type": "object", "additionalProperties": {"type": ["boolean", "object"]}}
# {Resize: {size: 64}, CenterCrop: {size: 64}, ColorJitter: false}, or a list of such mappings of one transform each.
Steps = Annotated[
    list[dict[str, Any]],
    BeforeValidator(_steps_of),
    WithJsonSchema(
        {
            "title": "mapping from names in torchvision.transforms to true, false or their options",
            "anyOf": [_STEP, {"type": "array", "items": {**_STEP, "minProperties": 1, "maxProperties": 1}}],
        }
    ),
]
# The options that `data.preprocessing` takes the place of, and how it says them.
REPLACED = {
    "resize": "Resize",
    "interpolation": "Resize: {interpolation: ...}",
    "crop": "RandomCrop",
    "horizontal_flip": "RandomHorizontalFlip",
}


@part
class DataConfig:
    """Which images, and what the network sees of them."""

    # Where the images come from: the name of a source, with its options.
    source: Annotated[Any, PartOf("sources")]
    # Height and width of the images that the network sees, in pixels; one number means a square.
    image_size: Positive | tuple[Positive, Positive] = 64
    # How an image reaches image_size: "cover" scales its shorter side and crops the rest, "stretch" changes its
    # aspect ratio, "none" only crops.
    resize: Literal["cover", "stretch", "none"] = "cover"
    # Filter of the resize; all are antialiased.
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    # Which part is kept when an image is larger than image_size.
    crop: Literal["center", "random"] = "center"
    # Whether each image is mirrored with probability one half.
    horizontal_flip: bool = False
    # Transforms of torchvision instead of resize, interpolation, crop and horizontal_flip: names in
    # torchvision.transforms, each with true or a mapping of its options, applied in the order in which they are
    # written; false switches one off. They have to arrive at image_size.
    preprocessing: Steps | None = None
    # How JPEG files are decoded: "scaled" at 1/2, 1/4 or 1/8 of their size where that leaves at least twice what is
    # needed, which is faster and looks the same; "exact" at their full size, bit for bit as Pillow does it.
    decode: Literal["scaled", "exact"] = "scaled"
    # Colour behind transparent images: a CSS colour name or "#rrggbb".
    background: str = "white"
    # Whether each epoch has its own order; off keeps the order of the source.
    shuffle: bool = True
    # Shards whose samples are mixed when data in shards is shuffled; more mix better, and keep more shards in use.
    shuffle_window: Positive = 16
    # Whether shards are drawn at random, with replacement, instead of each being visited once; for data in shards.
    resample: bool = False
    # Samples in an epoch of shards drawn at random.
    epoch_samples: Positive | None = None
    # Share of an epoch's images that may be skipped because they cannot be read; 0 stops at the first.
    max_bad_fraction: Fraction = 0.0
    # Threads that decode images; 0 decodes in the training thread.
    num_threads: NonNegative = 2
    # Memory for decoded images, in GiB; images beyond it are decoded again in each epoch.
    cache_gb: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        both = [name for name in REPLACED if getattr(self, name) != getattr(DataConfig, name)]
        if both and self.preprocessing is not None:
            raise ValueError(
                f"preprocessing takes the place of {', '.join(REPLACED)}, and {' and '.join(both)} is set as well. "
                f"Remove one of them; preprocessing says it as {' and '.join(REPLACED[name] for name in both)}"
            )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@part
class NetworkOptimizer:
    """What differs for one network; an option that is none is as for all of them."""

    # Learning rate after warm-up.
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    # Decoupled weight decay.
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    # Steps over which the learning rate rises from 0.
    lr_warmup_steps: NonNegative | None = None
    # Gradients are scaled so that their norm is at most this; "off" leaves them.
    max_grad_norm: Annotated[float, Field(gt=0)] | Literal["off"] | None = None


@part
class OptimizerConfig:
    """AdamW and its learning rate over time."""

    # Learning rate after warm-up.
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    # Decay of the running means of the gradient and of its square.
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    # Added to the root of the second moment.
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    # Decoupled weight decay.
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # Which parameters it shrinks: all, or "matrices", those of two and more dimensions, which leaves out biases and the
    # gains of norms.
    decay: Literal["all", "matrices"] = "all"
    # Shape of the learning rate after warm-up; linear and cosine end at 0 on the last step.
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Steps over which the learning rate rises from 0.
    lr_warmup_steps: NonNegative = 0
    # What differs for single networks: a mapping from a network's name to its learning_rate, weight_decay,
    # lr_warmup_steps and max_grad_norm, each of which may be left out.
    networks: dict[str, NetworkOptimizer] = field(default_factory=dict)

    def of_network(self, name: str) -> "OptimizerConfig":
        """The options for one network: those of all, and what differs for it."""
        own = self.networks.get(name, NetworkOptimizer())
        options = ("learning_rate", "weight_decay", "lr_warmup_steps")
        return replace(self, **{key: value for key in options if (value := getattr(own, key)) is not None})


@part
class EmaConfig:
    """Exponential moving averages of the weights; samples are made with the first."""

    # One average per decay, each between 0 and 1; an empty list keeps none.
    decays: list[Decay] = field(default_factory=lambda: [0.9999])
    # Whether the decay rises as (1 + step) / (10 + step) until it reaches its value.
    warmup: bool = True


@part
class TrainConfig:
    """How long, in which batches, and in which precision."""

    # How long to train: "1000 steps", "100000 samples" or "50 epochs"; rounded up to a whole batch.
    duration: Duration = "100 epochs"
    # Images per optimizer step, over all processes and micro-batches.
    batch_size: Positive = 16
    # Images per forward pass on one process; none means as many as a step has there. Smaller saves memory.
    micro_batch_size: Positive | None = None
    # Gradients are scaled so that their norm is at most this; none leaves them.
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    # "auto" takes bf16 where the hardware has it, else no; fp16 scales the loss.
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    # Networks that are not trained, by name.
    freeze: list[str] = field(default_factory=list)
    # Whether activations are computed twice to save memory.
    gradient_checkpointing: bool = False
    # Memory layout for convolutions; "auto" is on for CUDA and off on a CPU, where it is slow.
    channels_last: Literal["auto"] | bool = "auto"
    # Whether the networks are compiled; costs minutes at start.
    compile: bool = False
    # Where to train: "auto" takes a GPU if there is one.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # How several processes share the work: "ddp" copies the networks, "fsdp" splits them.
    parallel: Literal["ddp", "fsdp"] = "ddp"
    # Whether algorithms that give the same bits each time are taken where there are any; torch warns of others.
    deterministic: bool = True


@part
class SampleConfig:
    """The pictures that a run makes of itself as it goes."""

    # How often a grid is made; one is also made before the first and after the last step. "5000 samples or 1 epoch" is
    # as often as the shorter of the two says.
    every: Interval = "1000 steps"
    # Images in the grid; 0 makes none.
    num_images: NonNegative = 16
    # The algorithm that removes noise.
    sampler: Annotated[Any, PartOf("samplers", "dpm_solver")] = "dpm_solver"
    # How strongly images follow their condition; 1 is off. A list has one number for each network.
    guidance_scale: Guidance | list[Guidance] = 1.0
    # Image i of every grid starts from noise that depends on this and i alone.
    seed: NonNegative = 0


@part
class ValidateConfig:
    """The loss on images that are not trained on, with the averaged networks and the same noise each time."""

    # How often: "1000 steps", "100000 samples" or "1 epochs"; also before the first and after the last step. None is
    # off.
    every: Interval | None = None
    # How many images, from the first in the order of the source; none takes all.
    num_samples: Positive | None = None
    # Where the images come from; none takes the validation part of data.source.
    source: Annotated[Any, PartOf("sources")] | None = None


@part
class EvaluateConfig:
    """Scores of images that a run makes of itself, against images that it is compared with."""

    # How often: "1000 steps", "100000 samples" or "10 epochs"; also after the last step. None is off.
    every: Interval | None = None
    # Images that are made; where they follow conditions, at most as many as there are samples to take them from.
    num_samples: Annotated[int, Field(ge=2)] = 1000
    # What is measured.
    metrics: list[Annotated[Any, PartOf("metrics")]] = field(default_factory=lambda: ["kid"])
    # The network whose features are compared, for metrics that do not name one.
    extractor: Annotated[Any, PartOf("encoders")] = "efficientnet_lite0"
    # The part of the data that the images are compared with, and whose conditions they follow; val is train where the
    # data has no such part, which a note says.
    split: Literal["train", "val", "test"] = "val"
    # Another part that is compared with as well after the last step, such as test; none is no other.
    final_split: Literal["train", "val", "test"] | None = None
    # The algorithm that removes noise; one of few steps, as many images are made.
    sampler: Annotated[Any, PartOf("samplers", "dpm_solver")] = "dpm_solver"
    # How strongly images follow their condition; 1 is off. A list has one number for each network; none takes that of
    # the pictures, sample.guidance_scale.
    guidance_scale: Guidance | list[Guidance] | None = None
    # Image i starts from noise that depends on this and i alone.
    seed: NonNegative = 0
    # Images made, or seen by the extractor, at once on one process.
    batch_size: Positive = 16


@part
class CheckpointConfig:
    """When the state of a run is written, and how much of it is kept."""

    # How often a checkpoint is written; one is also written after the last step and when a signal stops the run.
    # "5000 samples or 1 epoch" is as often as the shorter of the two says.
    every: Interval = "1000 steps"
    # How many of the newest checkpoints are kept; at least two.
    keep_last: Annotated[int, Field(ge=2)] = 2
    # Checkpoints whose step is a multiple of this are kept for good.
    keep_every: Positive | None = None
    # Whether the best checkpoint is written and kept as well.
    keep_best: bool = True
    # What says which one is the best: "validation", its loss; or a score of `evaluate`, such as "kid" or, where several
    # extractors look, "kid/inception".
    best: Annotated[str, Field(min_length=1)] = "validation"


@part
class TrackConfig:
    """Where numbers and pictures go; metrics.jsonl is always written."""

    # How often numbers are logged.
    every: Interval = "10 steps"
    # Where else they go.
    log: list[Annotated[Any, PartOf("loggers")]] = field(default_factory=lambda: ["console"])
    # Where checkpoints and models go besides the run folder.
    save: list[Annotated[Any, PartOf("savers")]] = field(default_factory=list)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        loggers = [dump(logger)["name"] for logger in self.log]
        if twice := sorted({name for name in loggers if loggers.count(name) > 1}):
            raise ValueError(f"log names {twice[0]} twice. Name each logger once")
        taken: set[tuple[str, str]] = set()
        for saver in self.save:
            place = {**dump(saver), "kind": None}
            paths = {path for key in ("latest", "best", "meta") if (path := place.pop(key, None))}
            here = {(repr(sorted(place.items())), path) for path in paths}
            if taken & here:
                path = min(path for _, path in taken & here)
                raise ValueError(f"save gives the path {path!r} twice in the same place. Give each saver its own paths")
            taken |= here
        return self


@part
class RunConfig:
    """Everything that decides a run."""

    # Folder of the run: config, checkpoints, numbers and pictures.
    output: Annotated[str, Field(min_length=1)]
    # Which images, and what the network sees of them.
    data: DataConfig
    # Whether a finished or different run in the folder is replaced; an unfinished run of this config is always
    # continued.
    overwrite: bool = False
    # The diffusers pipeline written into the folder when training is done: "ddpm" or "ddim" for one network, "unclip"
    # for a cascade.
    export: Literal["no", "ddpm", "ddim", "unclip"] = "no"
    # What is trained: networks, noise and loss.
    task: Annotated[Any, PartOf("tasks", "unconditional")] = "unconditional"
    # Everything random in a run follows from this number.
    seed: NonNegative = 0
    # How long, in which batches, and in which precision.
    train: TrainConfig = field(default_factory=TrainConfig)
    # AdamW and its learning rate over time.
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Averages of the weights.
    ema: EmaConfig = field(default_factory=EmaConfig)
    # Pictures made along the way.
    sample: SampleConfig = field(default_factory=SampleConfig)
    # The loss on images that are not trained on.
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    # Scores of images made along the way.
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # When the state is written.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Where numbers and copies of checkpoints go.
    track: TrackConfig = field(default_factory=TrackConfig)
    # What a run that has no checkpoint of its own starts from; none is scratch.
    start: Annotated[Any, PartOf("loaders")] | None = None
    # Where the finished pipeline goes on the Hugging Face hub; none pushes nothing.
    hub: HubConfig | None = None

    @model_validator(mode="after")
    def _best_comes(self) -> Self:
        validates = self.checkpoint.best == "validation" and self.validate.every is not None
        for saver in self.track.save:
            if any("{best_validation_loss" in (path or "") for path in (saver.latest, saver.best)) and not validates:
                raise ValueError(
                    "track.save has a path with {best_validation_loss}, which there is only with validate.every and "
                    "checkpoint.best=validation"
                )
        if not any(saver.best for saver in self.track.save):
            return self
        if not self.checkpoint.keep_best:
            raise ValueError("track.save has a path for the best checkpoint, and checkpoint.keep_best is false")
        section = "validate" if self.checkpoint.best == "validation" else "evaluate"
        if getattr(self, section).every is None:
            raise ValueError(
                f"track.save has a path for the best checkpoint, which nothing decides: set {section}.every, or remove "
                "the path"
            )
        return self

    def max_grad_norm_of(self, network: str) -> float | None:
        """The limit of a network's gradient norm: its own, or that of all; None leaves gradients as they are."""
        own = self.optimizer.networks.get(network, NetworkOptimizer()).max_grad_norm
        limit = self.train.max_grad_norm if own is None else own
        return None if limit == "off" else limit
