"""Images that networks make: those of a task, in training or read from a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eclosion.config.schema import DataConfig
from eclosion.data.batch import Batch
from eclosion.data.source import Samples, array_shapes
from eclosion.diffusion.lowres import resize
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation.images import Seen
from eclosion.evaluation.real import InOrder, channels_first, digest_of
from eclosion.metrics.metric import Need
from eclosion.registry import dump
from eclosion.sampling.examples import Examples, prepared
from eclosion.sampling.making import make_batch
from eclosion.sampling.pictures import to_uint8
from eclosion.sampling.trained import TrainedTask
from eclosion.tasks.task import Task

__all__ = [
    "DataClasses",
    "DataExamples",
    "TaskImages",
    "digest_of_weights",
    "follows_classes",
    "images_of_run",
    "weights_of",
]


class _Rows(NamedTuple):
    """What some images are made from."""

    examples: Examples
    captions: Sequence[str] | None


class DataExamples:
    """What images are made from, where a task follows conditions: samples of the data, read when they are wanted.

    Attributes:
        fingerprint: of the samples and of what is done to them.
        brings: what the samples have besides the image, and that they are the originals.
        encoder: the part that makes their embeddings; None if the samples bring them, or there is no such thing.
        embedding_dim: numbers in an embedding; None if that is not known.
    """

    def __init__(
        self, samples: Samples, config: DataConfig, task: Task, *, seed: int, device: torch.device, name: str = "data"
    ) -> None:
        """Nothing is read yet.

        Args:
            samples: open, and open for as long as this is in use.
            config: of the run's data.
            task: whose encoder makes what is missing.
            seed: of the run.
            device: where the task is.
            name: what to call them.
        """
        self._data = InOrder(samples, config, seed=seed)
        self._task, self._device, self.name = task, device, name
        self.fingerprint = self._data.fingerprint
        follows: set[Need] = {"conditions"} if "image_embed" in task.wants else set()
        self.brings: frozenset[Need] = frozenset({"originals", *(self._data.brings & {"captions"}), *follows})
        own, made = array_shapes(samples).get("image_embed"), getattr(task, "made", {}).get("image_embed")
        self.encoder = getattr(getattr(task, "options", None), "encoder", None) if own is None else None
        self.embedding_dim: int | None = next((shape[-1] for shape in (own, made) if shape), None)

    def __len__(self) -> int:
        return len(self._data)

    def rows(self, indices: Sequence[int]) -> _Rows:
        """The examples of some images.

        Raises:
            DataError: naming a sample that cannot be read.
            ConfigError: if nothing gives what the task follows.
        """
        batch, _ = self._data.read(self._data.drawn(indices))
        batch = replace(batch, positions=list(indices))
        examples = prepared(self._task, batch, self._device)
        missing = [name for name in self._task.wants if name not in examples.conditions]
        if missing:
            raise ConfigError(
                f"the networks follow {missing[0]}, which {self.name} has not, and no encoder of the task makes it "
                "(task.encoder). Evaluate on data that has it."
            )
        return _Rows(examples, batch.fields.get("caption"))


class DataClasses:
    """The classes of images, where a network knows classes and follows nothing else: they come as often as in the data.

    Attributes:
        fingerprint: of the samples.
        brings: nothing that metrics look at.
        encoder, embedding_dim: none.
    """

    brings: frozenset[Need] = frozenset()
    encoder: Any = None
    embedding_dim: int | None = None

    def __init__(self, samples: Samples, config: DataConfig, *, seed: int, name: str = "data") -> None:
        """Nothing is read yet; the arguments are those of `DataExamples`."""
        self._data, self.name = InOrder(samples, config, seed=seed), name
        self.fingerprint = digest_of("classes", self._data.fingerprint)

    def __len__(self) -> int:
        return len(self._data)

    def rows(self, indices: Sequence[int]) -> _Rows:
        """The classes of some images.

        Raises:
            DataError: naming a sample that cannot be read.
        """
        batch, _ = self._data.read(self._data.drawn(indices))
        given = Batch(list(indices), torch.ones(len(indices)), {"label": batch["label"]})
        return _Rows(Examples(given), None)


def follows_classes(task: Task) -> bool:
    """Whether a task is told a class for each image, and takes them in turn where nothing else is said."""
    return not task.wants and "label" in task.conditions([0])


class TaskImages:
    """Images that a task makes.

    Image i depends on the seed, on i, and on the i-th example; its last bits on the images that are made with it.

    Attributes:
        size: height and width in pixels.
        examples: what they are made from; None if that is nothing.
        encoder: the part that makes the embeddings which images follow; None if the data brings them, or nothing is
            followed.
        embedding_dim: numbers in such an embedding; None if that is not known.
    """

    def __init__(
        self,
        task: Task,
        *,
        name: str,
        weights: str,
        count: int,
        seed: int,
        sampler: Any,
        guidance_scale: float | Sequence[float] = 1.0,
        precision: Any = "no",
        device: torch.device,
        examples: DataExamples | DataClasses | None = None,
        facts: Mapping[str, Any] | None = None,
        on_step: OnStep | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:
        """Nothing is made yet.

        Args:
            task: on its device, in eval mode.
            name: what to call them.
            weights: tells the weights of its networks from others, as `weights_of` does.
            count: how many there are.
            seed: of their noise.
            sampler: for all networks, or a list with one for each.
            guidance_scale: the same.
            precision: of the networks.
            device: where they are.
            examples: what images are made from, if the task wants any; or their classes, which without it come in turn.
            facts: what else results say of them, such as the step.
            on_step: called before each call of a network; may raise.
            span: the places of the networks to begin and to end with; None is all. If it is not the first one that they
                begin with, they begin with small versions of the originals.

        Raises:
            ConfigError: if the task cannot use this sampler or guidance, or wants examples and gets none.
        """
        task.check_sampling(sampler, guidance_scale)
        sizes = list(task.sizes.values())
        first, last = span or (0, len(sizes) - 1)
        if (task.wants or first) and examples is None:
            raise ConfigError(f"{name}: its networks follow {' and '.join(task.wants)}. Give data that has it.")
        self._task, self._name, self._count, self._seed = task, name, count, seed
        self.examples = examples
        self._how = {"sampler": sampler, "guidance_scale": guidance_scale, "precision": precision, "on_step": on_step}
        self._how |= {"first": first, "last": last}
        self.size, self._begins = sizes[last], sizes[first - 1] if first else None
        self.encoder = None if self.examples is None else self.examples.encoder
        self.embedding_dim = None if self.examples is None else self.examples.embedding_dim
        samplers = sampler if isinstance(sampler, list | tuple) else [sampler]
        self._facts = {
            "what": "task",
            "name": name,
            "size": list(self.size),
            "seed": seed,
            "sampler": [dump(part) for part in samplers] if len(samplers) > 1 else dump(samplers[0]),
            "guidance_scale": dump(guidance_scale),
            "precision": precision,
            **({} if (first, last) == (0, len(sizes) - 1) else {"networks": list(task.sizes)[first : last + 1]}),
            **({"classes": examples.name} if isinstance(examples, DataClasses) else {}),
            **(facts or {}),
        }
        told = {key: self._facts[key] for key in ("seed", "sampler", "guidance_scale", "precision", "size")}
        told |= {"networks": self._facts["networks"]} if "networks" in self._facts else {}
        given = None if self.examples is None else self.examples.fingerprint
        self._fingerprint = digest_of("task", weights, told, given, count, device.type)

    @property
    def name(self) -> str:
        """What to call them."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Of weights, sampler, guidance, seed, number and examples."""
        return self._fingerprint

    @property
    def facts(self) -> Mapping[str, Any]:
        """How they are made."""
        return self._facts

    @property
    def brings(self) -> frozenset[Need]:
        """Originals, embeddings and captions, if the images are made from such."""
        return frozenset() if self.examples is None else self.examples.brings

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Seen:
        """Make the images of these numbers, all at once.

        Raises:
            DataError: naming one that is not finite, or an example that cannot be read.
        """
        rows = None if self.examples is None else self.examples.rows(indices)
        examples = None if rows is None else self._fitting(rows.examples)
        images = make_batch(self._task, indices, seed=self._seed, examples=examples, **self._how)
        names = [f"image {i} of {self._name}" for i in indices]
        self._check(images, names)
        originals = None if examples is None else examples.originals
        conditions = None if examples is None else examples.conditions.fields.get("image_embed")
        return Seen(
            channels_first(to_uint8(images)),
            names,
            originals=None if originals is None else channels_first(originals),
            captions=None if rows is None else rows.captions,
            conditions=conditions,
        )

    def _fitting(self, examples: Examples) -> Examples:
        """Originals in the size of what is made of them, and what the networks begin with."""
        if examples.image is None:
            return examples
        small = resize(examples.image, self._begins) if self._begins else None
        if tuple(examples.image.shape[2:]) == self.size:
            return replace(examples, image=small)
        return replace(examples, image=small, originals=to_uint8(resize(examples.image, self.size)))

    def _check(self, images: Tensor, names: Sequence[str]) -> None:
        finite = images.isfinite().flatten(1).all(1).cpu()
        if finite.all():
            return
        bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
        sampler = self._facts["sampler"]
        raise DataError(
            f"{bad[0]} is not finite (NaN or infinite, as {len(bad)} of {len(names)} made with it): made by "
            f"{sampler} with guidance_scale={self._facts['guidance_scale']} in precision {self._facts['precision']}. "
            "Use another sampler, more steps or an earlier checkpoint."
        )


def images_of_run(
    trained: TrainedTask,
    *,
    count: int,
    seed: int,
    sampler: Any,
    guidance_scale: float | Sequence[float],
    examples: DataExamples | DataClasses | None = None,
    facts: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> TaskImages:
    """The images that a trained task makes, as its previews without networks that were never trained.

    The arguments are those of `TaskImages`.
    """
    return TaskImages(
        trained.task,
        name=f"{trained.folder.root} at step {trained.step}",
        weights=weights_of(trained.task.nets),
        count=count,
        seed=seed,
        sampler=sampler,
        guidance_scale=guidance_scale,
        precision=trained.precision,
        device=trained.device,
        examples=examples,
        facts={"what": "run", "step": trained.step, "samples_seen": trained.samples_seen, **(facts or {})},
        on_step=on_step,
        span=trained.span,
    )


def weights_of(nets: Mapping[str, nn.Module]) -> str:
    """A hash of all weights."""
    return digest_of_weights({f"{name} {type(net).__name__}": net.state_dict() for name, net in nets.items()})


def digest_of_weights(nets: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A hash of all weights, by what a network is called and its class, and then by name."""
    digest = blake2b(digest_size=16)
    for name, weights in nets.items():
        digest.update(name.encode())
        for key, value in sorted(weights.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
