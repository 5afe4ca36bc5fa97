"""What images are made from, where a task follows conditions: samples of the data, a folder, or an array."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclosion.config.schema import DataConfig, RunConfig
from eclosion.data.batch import Batch
from eclosion.data.embeddings import checked_rows
from eclosion.data.loader import Loader
from eclosion.data.npy import open_npy
from eclosion.data.source import Samples, ShardedSamples, array_shapes, part_of_data
from eclosion.errors import ConfigError, DataError
from eclosion.sampling.pictures import Pixels, to_uint8
from eclosion.tasks.task import DataFacts, Task

__all__ = [
    "Examples",
    "check_alike",
    "from_arrays",
    "from_samples",
    "in_order",
    "opened",
    "prepared",
    "read_array",
    "validation_source",
]

# Images that are read, or encoded, in one go.
CHUNK = 16


@dataclass(frozen=True)
class Examples:
    """What images are made from; example k is row k.

    Attributes:
        conditions: a prepared batch with what the task wants, on the CPU.
        originals: the pictures that they were taken from, uint8 [N, H, W, 3]; None if there are none.
        image: the same in [-1, 1], float32 [N, 3, H, W]; what a later network of a cascade begins with.
    """

    conditions: Batch
    originals: Pixels | None = None
    image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.conditions)

    def rows(self, indices: Sequence[int]) -> "Examples":
        """The examples of some images: that of image i is i, from the first again when all had their turn."""
        which = [i % len(self) for i in indices]
        return Examples(
            _rows(self.conditions, which),
            None if self.originals is None else self.originals[which],
            None if self.image is None else self.image[which],
        )


def _rows(batch: Batch, which: Sequence[int]) -> Batch:
    fields = {
        name: values[list(which)] if isinstance(values, Tensor) else [values[i] for i in which]
        for name, values in batch.fields.items()
    }
    return Batch([batch.positions[i] for i in which], batch.weight[list(which)], fields)


def in_order(config: DataConfig) -> DataConfig:
    """The same data as its source has it: each sample once, in order, with no random crop and not mirrored.

    Random transforms of `preprocessing` stay, and do the same to an image each time.
    """
    return replace(
        config,
        shuffle=False,
        resample=False,
        epoch_samples=None,
        crop="center",
        horizontal_flip=False,
        cache_gb=0.0,  # the memory is for the images of training
    )


def validation_source(run: RunConfig) -> Any:
    """The source of the images that are not trained on; None if a run has none."""
    return run.validate.source or part_of_data(run.data.source, "val")


@contextmanager
def validation_data(run: RunConfig, facts: DataFacts) -> Iterator[Samples | None]:
    """The images that a run validates with, opened; None if it does not validate.

    Raises:
        ConfigError: if validation is asked for and there is no data for it.
        DataError: if the data cannot be opened, or is not alike that of training.
    """
    if run.validate.every is None:
        yield None
        return
    source = validation_source(run)
    if source is None:
        raise ConfigError(
            "validate.every is set, and there is nothing to validate with. Give data.source a validation part (for "
            "webdataset data.source.splits.val, for huggingface data.source.validation_split), or set validate.source; "
            "or leave validate.every out."
        )
    with opened(source) as samples:
        check_alike(samples, facts)
        yield samples


def check_alike(samples: Samples, facts: DataFacts, *, what: str = "validate") -> None:
    """Refuse data that a task would not understand as it does the training data.

    Args:
        samples: the data.
        facts: what is known of the training data.
        what: what asks for it, for the message.

    Raises:
        DataError: if its classes or arrays are others, or it lacks captions that something is made of.
    """
    if "text_encodings" in facts.made and not samples.has_captions:
        raise DataError(
            f"{what}: has no captions, and task.encoder makes text encodings of those of the training data. Both must "
            "be alike."
        )
    if samples.class_names and facts.class_names and samples.class_names != facts.class_names:
        raise DataError(
            f"{what}: its {len(samples.class_names)} classes ({_short(samples.class_names)}) are not the "
            f"{len(facts.class_names)} of the training data ({_short(facts.class_names)}). Both must be alike."
        )
    ours, theirs = dict(facts.arrays), dict(array_shapes(samples))
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            told = [str(list(shape)) if shape else "none" for shape in (theirs.get(name), ours.get(name))]
            raise DataError(f"{what}: {name} is {told[0]}, and {told[1]} in the training data. Both must be alike.")


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") if names else "none"


@contextmanager
def opened(source: Any) -> Iterator[Samples]:
    """The samples of a source; those in shards stop what they fetch when the block ends."""
    samples = source.open()
    try:
        yield samples
    finally:
        if isinstance(samples, ShardedSamples):
            samples.close()


def from_samples(samples: Samples, config: DataConfig, count: int | None, *, seed: int) -> Batch:
    """The first samples that can be read, on the CPU and not prepared.

    Args:
        samples: an opened source.
        config: of the run's data; `in_order` is applied.
        count: how many; None takes all.
        seed: of the run; random transforms follow from it.

    Raises:
        DataError: if none of them can be read.
    """
    loader = Loader(samples, in_order(config), seed=seed, batch_size=CHUNK)
    wanted = len(samples) if count is None else count
    found, problem = list[Batch](), ""
    for start in range(0, len(samples), CHUNK):
        batch = loader.batch_at(range(start, min(start + CHUNK, len(samples))))
        problem = problem or "".join(f"{skip.name}: {skip.detail}" for skip in batch.skipped[:1])
        found.append(_rows(batch, [i for i, weight in enumerate(batch.weight.tolist()) if weight]))
        if sum(map(len, found)) >= wanted:
            break
    whole = _joined(found)
    if not len(whole):
        raise DataError(f"none of the {len(samples)} images can be read: {problem}")
    return _rows(whole, range(min(wanted, len(whole))))


def from_arrays(**arrays: NDArray[np.float32]) -> Batch:
    """A batch of embeddings alone, such as image_embed=[N, D]."""
    count = len(next(iter(arrays.values())))
    fields = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(range(count), torch.ones(count), fields)


def read_array(
    given: str | Path | NDArray[Any], *, ndim: int, what: str, limit: int | None = None
) -> NDArray[np.float32]:
    """Embeddings in a .npy file, or given as an array: float32, a copy.

    Args:
        given: the file, or the array.
        ndim: how many dimensions it must have, rows included.
        what: the option, for messages.
        limit: rows that are wanted; None takes all.

    Raises:
        DataError: if the file is not there or no array that is allowed, or it has another shape.
        BadSample: if a row is all zero, or not finite.
    """
    name = str(given) if isinstance(given, str | Path) else what
    array = open_npy(Path(given), name) if isinstance(given, str | Path) else np.asarray(given)
    return checked_rows(array, ndim=ndim, what=what, name=name, limit=limit)


def prepared(
    task: Task,
    batch: Batch,
    device: torch.device,
    *,
    needed: Sequence[str] | None = None,
    agree: Callable[[], None] = lambda: None,
) -> Examples:
    """Examples of what a batch holds: an encoder adds what is needed, and is not asked for anything else.

    Args:
        task: what images are made with.
        batch: on the CPU.
        device: where the task is.
        needed: the fields that are; None is all that the task wants.
        agree: called before each few images; may raise.
    """
    needed = task.wants if needed is None else needed
    parts = []
    for start in range(0, len(batch), CHUNK):
        agree()
        part = _rows(batch, range(start, min(start + CHUNK, len(batch)))).to(device)
        if not all(name in part for name in needed):
            with torch.no_grad():
                part = task.prepare(part)
        fields = {name: part[name] for name in needed if name in part}
        parts.append(replace(part, fields=fields).to(torch.device("cpu")))
    image: Tensor | None = batch.fields.get("image")
    return Examples(_joined(parts), None if image is None else to_uint8(image), image)


def _joined(parts: Sequence[Batch]) -> Batch:
    fields = {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], Tensor)
        else [value for part in parts for value in part[name]]
        for name in parts[0].fields
    }
    return Batch([p for part in parts for p in part.positions], torch.cat([part.weight for part in parts]), fields)
