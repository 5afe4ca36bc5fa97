"""From a task, or from a run folder, to images on disk."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eclosion.data.batch import Batch
from eclosion.data.folder import FolderSource
from eclosion.data.source import Samples, Split, part_of_data
from eclosion.diffusion.samplers import OnStep
from eclosion.errors import ConfigError, DataError
from eclosion.sampling.examples import (
    Examples,
    from_arrays,
    from_samples,
    opened,
    prepared,
    read_array,
    validation_source,
)
from eclosion.sampling.making import make_images
from eclosion.sampling.pictures import grid, pairs, save_png, to_uint8
from eclosion.sampling.trained import TrainedTask, load_trained
from eclosion.tasks.task import Task, place_of, samplers_for, span_of, within

__all__ = [
    "Examples",
    "TrainedTask",
    "grid",
    "load_trained",
    "make_images",
    "pairs",
    "sample",
    "save_png",
    "sheet_of",
    "to_uint8",
]

# How many images are made where nothing says it.
NUM_IMAGES = 16
# Of the file beside an image that holds its caption.
CAPTION_SUFFIX = ".txt"


def sample(
    folder: str | Path,
    *,
    num_images: int | None = None,
    seed: int = 0,
    sampler: str | None = None,
    num_inference_steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    embeddings: str | Path | NDArray[Any] | None = None,
    text_encodings: str | Path | NDArray[Any] | None = None,
    images: str | Path | None = None,
    from_data: Split | None = None,
    first: str | int | None = None,
    last: str | int | None = None,
    checkpoint: str | int = "latest",
    out: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    on_step: OnStep | None = None,
) -> Path:
    """Make images with a trained run.

    What a task follows, such as embeddings, comes from `embeddings`, `images` or `from_data`; without any of them from
    the run's validation data, or else from its training data. Image i is made from the i-th of them, and from the
    first again when all had their turn.

    Args:
        folder: a run folder, or one checkpoint in it.
        num_images: how many; none makes as many as there are embeddings or images, or else 16.
        seed: image i depends on this, on i, and on what it is made from.
        sampler: name of a sampler; none takes the run's own.
        num_inference_steps: network calls per image, for all networks or one number for each; none takes the
            sampler's default.
        guidance_scale: how strongly images follow their condition, for all networks or one number for each; 1 is off;
            none takes the run's own.
        embeddings: image embeddings, [N, dim], as an array or a .npy file.
        text_encodings: text to go with them, [N, tokens, dim], as an array or a .npy file.
        images: a folder of images, whose embeddings the run's encoder makes; and encodings of their captions, if it
            does so of those of the data, from a .txt file beside each.
        from_data: the first samples of a part of the run's data: "train", "val" or "test".
        first, last: the networks of a cascade to begin and to end with, by name or number. One that is not the first
            begins with small versions of `images` or of `from_data`; what it follows may then be given beside images,
            row by row in the order of their names. None makes images without networks that were frozen and never
            trained, as previews are made.
        checkpoint: of a run folder: "latest", "best" as `checkpoint.best` of the run says, or a step.
        out: where they go, without images in it; none makes a new folder inside the run's.
        batch_size: images made at once.
        device: "auto", "cpu", "cuda" or "mps".
        on_step: called with (step, steps) before each network call.

    Returns:
        The folder, which holds one PNG per image and `grid.png`, where originals, if there are any, stand above what
        was made from them.

    Raises:
        CheckpointError: if the run has no checkpoint.
        ConfigError: if an option is wrong, or does not go with the run or another option; if there are images in `out`.
        DataError: if embeddings or images cannot be read.
    """
    if out is not None:
        _refuse_images(Path(out))
    if (num_images is not None and num_images < 1) or batch_size < 1:
        raise ConfigError(f"num_images is {num_images} and batch_size is {batch_size}; both must be at least 1.")
    trained = load_trained(folder, checkpoint=checkpoint, device=device, encodes=images is not None)
    task, run = trained.task, trained.run
    span = _span(trained, first, last)
    samplers = samplers_for(task, run.sample.sampler, sampler, num_inference_steps)
    guidance = run.sample.guidance_scale if guidance_scale is None else guidance_scale
    task.check_sampling(samplers, guidance)
    given = _Given(embeddings, text_encodings, images, from_data, num_images)
    examples = _examples(trained, given, span)
    counted = num_images or (len(examples) if examples and given.is_counted else NUM_IMAGES)
    made = make_images(
        task,
        range(counted),
        seed=seed,
        sampler=samplers,
        guidance_scale=guidance,
        batch_size=batch_size,
        precision=trained.precision,
        on_step=on_step,
        examples=examples,
        first=span[0],
        last=span[1],
    )
    target = Path(out) if out else _new_folder(trained.folder.samples / f"step-{trained.step:08d}-seed-{seed}")
    for i, pixels in enumerate(made):
        save_png(Image.fromarray(pixels), target / f"{i:06d}.png")
    save_png(sheet_of(made, examples), target / "grid.png")
    return target


def _refuse_images(out: Path) -> None:
    """See that images which are there are neither replaced nor left among others.

    Raises:
        ConfigError: naming one of them.
    """
    there = sorted(path.name for path in out.glob("*.png"))
    if there:
        raise ConfigError(
            f"out: there are images in {out} already, such as {there[0]}. Name another folder, or remove it."
        )


def _new_folder(wanted: Path) -> Path:
    """The folder, or with -2, -3 and so on behind its name if it is there: made, and nobody else's."""
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


def sheet_of(images: NDArray[np.uint8], examples: Examples | None) -> Image.Image:
    """The grid of some images, 0, 1, 2 and so on, with the originals of their examples if there are any."""
    originals = None if examples is None else examples.rows(range(len(images))).originals
    return grid(images) if originals is None else pairs(originals, images)


# --- what to sample with -----------------------------------------------------------------------------------------


def _span(trained: TrainedTask, first: str | int | None, last: str | int | None) -> tuple[int, int]:
    """The places of the first and the last network, none of which makes noise."""
    names, untrained = list(trained.task.nets), trained.untrained
    begins = None if first is None else place_of(first, names, what="first")
    ends = None if last is None else place_of(last, names, what="last")
    begin, reached = span_of(names, untrained, begins)
    end = reached if ends is None else ends
    used = {*names[begin : end + 1], *(names[place] for place in (begins, ends) if place is not None)}
    if noisy := [name for name in names if name in used and name in untrained]:
        raise ConfigError(
            f"{noisy[0]}: frozen, and never trained, so that it makes noise. Leave first and last out, which makes "
            f"images with {within(names, trained.span)} alone."
        )
    if begin > end:
        raise ConfigError(f"first is {names[begin]} and last is {names[end]}, which comes before it. Turn them round.")
    if (begins is None and begin > 0) or (ends is None and end < len(names) - 1):
        told = f"images are made with {within(names, (begin, end))} alone"
        warnings.warn(f"{', '.join(untrained)}: frozen, and never trained; {told}", stacklevel=3)
    return begin, end


# --- what to make images from ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """What the caller named to make images from, and how many images."""

    embeddings: str | Path | NDArray[Any] | None
    text_encodings: str | Path | NDArray[Any] | None
    images: str | Path | None
    from_data: Split | None
    count: int | None

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays, by the names of a batch's fields."""
        named = {"image_embed": self.embeddings, "text_encodings": self.text_encodings}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def words(self) -> list[str]:
        """The options that are given, of those that exclude each other."""
        named = {"embeddings": self.arrays, "images": self.images, "from_data": self.from_data}
        return [word for word, value in named.items() if value]

    @property
    def is_counted(self) -> bool:
        """Whether it says how many images there are."""
        return bool(self.arrays) or self.images is not None


def _examples(trained: TrainedTask, given: _Given, span: tuple[int, int]) -> Examples | None:
    """What images are made from; None if the networks follow nothing and begin with the first.

    Raises:
        ConfigError: if more than one thing is named, or one that these networks do nothing with.
        DataError: if it cannot be read.
    """
    task, first = trained.task, span[0]
    needed = task.wanted(*span)
    if not needed and not first:
        if given.words:
            whose = f"asked for ({within(task.nets, span)})" if task.wants else "of this run"
            raise ConfigError(f"{given.words[0]}: the networks {whose} follow nothing. Leave it out.")
        return None
    beside = first and given.images is not None and given.from_data is None  # images to begin with, and what they show
    if len(given.words) > 1 and not beside:
        raise ConfigError(f"{' and '.join(given.words)}: images are made from one of them. Leave the others out.")
    rows = _rows_given(task, given, needed, first) if given.arrays else {}
    if rows and not first:
        return Examples(from_arrays(**rows))
    try:
        with opened(_source(trained, given)) as samples:
            full, small = _read(trained, samples, given, first)
            _check_rows(len(samples), rows)
    except DataError as error:
        if given.images is None:
            raise
        raise DataError(str(error).replace("data.source.root", "images")) from error
    places = list(full.positions)  # an image that cannot be read is left out with its row
    full = replace(full, fields={**full.fields, **{name: torch.from_numpy(row[places]) for name, row in rows.items()}})
    examples = prepared(task, full, trained.device, needed=needed)
    missing = [name for name in needed if name not in examples.conditions]
    if missing:
        raise ConfigError(_missing(missing[0], given, needed, makes=missing[0] in task.made))
    return examples if small is None else replace(examples, originals=to_uint8(small), image=small)


# What a user calls the fields of a batch that are given as arrays, and how many dimensions they have.
ARRAYS = {"image_embed": ("embeddings", 2), "text_encodings": ("text_encodings", 3)}


def _rows_given(task: Task, given: _Given, needed: Sequence[str], first: int) -> dict[str, NDArray[np.float32]]:
    """The arrays, read and checked, by the names of a batch's fields."""
    if first and given.images is None:
        raise ConfigError(
            f"{given.words[0]}: {list(task.nets)[first]} begins with images. Give images as well, one for each row; or "
            "from_data alone."
        )
    unknown = [name for name in given.arrays if name not in task.wants]
    missing = [] if first else [name for name in needed if name not in given.arrays]
    if unknown or missing:
        wanted = " and ".join(needed or task.wants) or "nothing"
        raise ConfigError(
            f"embeddings: this task follows {wanted}, and {' and '.join(given.arrays)} is given. Give all that it "
            "follows, as embeddings and text_encodings, and nothing else."
        )
    limit = None if first else given.count
    arrays = {
        name: read_array(array, ndim=ARRAYS[name][1], what=ARRAYS[name][0], limit=limit)
        for name, array in given.arrays.items()
    }
    counts = {ARRAYS[name][0]: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        told = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise ConfigError(f"{told} are given. Each image needs one of both.")
    try:
        task.conditions([0], from_arrays(**{name: array[:1] for name, array in arrays.items()}))
    except ConfigError as error:
        files = ", ".join(str(array) for array in given.arrays.values() if isinstance(array, str | Path))
        raise ConfigError([f"{files or 'embeddings'}: {problem}" for problem in error.problems]) from error
    return arrays


def _check_rows(num_images: int, rows: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse rows that do not go with the images, one for each."""
    for name, array in rows.items():
        if len(array) != num_images:
            raise ConfigError(
                f"{num_images} images and {len(array)} {ARRAYS[name][0]} are given. Give one row for each image, in "
                "the order of their names."
            )


def _source(trained: TrainedTask, given: _Given) -> Any:
    """Where the images are that images are made from; captions in a folder are read if something is made of them."""
    run = trained.run
    if given.images is not None:
        root = Path(given.images)
        makes = "text_encodings" in trained.task.made and "text_encodings" not in given.arrays
        reads = makes and any(root.rglob(f"*{CAPTION_SUFFIX}"))
        return FolderSource(root=root, caption_suffix=CAPTION_SUFFIX if reads else None)
    if given.from_data is None:
        return validation_source(run) or run.data.source
    found = validation_source(run) if given.from_data == "val" else part_of_data(run.data.source, given.from_data)
    if found is None:
        raise ConfigError(
            f"from_data is {given.from_data!r}, and the data of this run has no such part. Use train, or give images."
        )
    return found


def _read(trained: TrainedTask, samples: Samples, given: _Given, first: int) -> tuple[Batch, Tensor | None]:
    """The samples as in training; and, if the first networks are left out, of the size that the last of them makes."""
    run, count = trained.run, given.count or (None if given.is_counted else NUM_IMAGES)
    if not first:
        return from_samples(samples, run.data, count, seed=run.seed), None
    # pictures that are small already must come through as they are
    plain = replace(run.data, preprocessing=None, resize="cover", decode="exact")
    full = from_samples(samples, plain, count, seed=run.seed)
    size = list(trained.task.sizes.values())[first - 1]
    small = from_samples(samples, replace(plain, image_size=size), count, seed=run.seed)
    return full, small["image"]


def _missing(field: str, given: _Given, needed: Sequence[str], *, makes: bool) -> str:
    """What to say where nothing gives what the networks follow."""
    if field != "image_embed":
        where = f" in {given.images}" if given.images is not None else ""
        why = f"and there are no captions{where} to make them of (NAME.txt beside each image)"
        return (
            f"the networks of this run follow {field}, {why if makes else 'which are not there'}. Give "
            f"{' and '.join(ARRAYS[name][0] for name in reversed(needed))}."
        )
    where = f"in {given.images}" if given.images is not None else "of the data"
    return (
        f"this run has no encoder (task.encoder is none), so nothing makes embeddings of the images {where}. Make them "
        "with `eclosion embed`, with the encoder that made those it was trained on, and give them as embeddings."
    )
