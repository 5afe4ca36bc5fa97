"""Features of a set of images as a file that can be shared: `eclosion stats`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from eclosion.config.explain import checked
from eclosion.config.schema import DataConfig, RunConfig
from eclosion.data.folder import FolderSource
from eclosion.data.source import Source, Split, part_of_data
from eclosion.device import pick_device
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation.images import Images
from eclosion.evaluation.real import DataImages, FolderImages
from eclosion.evaluation.reference import LIMIT, reference_of, save_statistics
from eclosion.evaluation.statistics import SUFFIX
from eclosion.models.image_encoder import ImageEncoder
from eclosion.registry import dump, resolve
from eclosion.sampling.examples import opened, validation_source

__all__ = ["stats"]


def stats(
    source: RunConfig | Source,
    out: str | Path,
    *,
    extractor: Any = "efficientnet_lite0",
    num_images: int | None = None,
    split: Split | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_kept: int = LIMIT,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    cache: str | Path | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the features of a set of images, for `evaluate` to compare others with: here, or where the images are not.

    The file holds sums over all images, the features of some, and what they are of. Features are kept in the cache,
    too: a call that was stopped goes on where it was, and a later one of the same images takes no time.

    Args:
        source: a run's config, whose options say what is done to the images; or a source.
        out: the file to write, such as "butterflies.safetensors".
        extractor: the name of an encoder, a mapping of its name and options, the part, or what that builds.
        num_images: how many; fewer than there are is a choice that follows from the seed. None takes all.
        split: the part of the data; None takes what the source names, which is for training unless it says else.
        image_size: height and width that the images are brought to first, as one number or two. None takes a config's
            own; images of a folder as they are, if all are of one size; and other sources need it.
        num_kept: of how many images the features themselves are kept, as all scores but the Fréchet distance want
            them.
        seed: of the choice of images.
        batch_size: images that go through the encoder at once; what comes out does not depend on it.
        device: "auto", "cpu", "cuda" or "mps".
        cache: the folder where features are kept; None means the user's.
        on_image: told how many images are done, and of how many.

    Returns:
        `out`.

    Raises:
        ConfigError: if an option is wrong.
        DataError: if images cannot be read, or there are less than two.
        EnvironmentProblem: if the encoder is not there, or `out` cannot be written.
    """
    for name, value in (("batch_size", batch_size), ("num_kept", num_kept)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, and must be at least 1.")
    if num_images is not None and num_images < 2:
        raise ConfigError(f"num_images is {num_images}, and must be at least 2: one image has no spread.")
    path = Path(out).expanduser()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Give the name of a file in it, such as {path / f'stats{SUFFIX}'}.")
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path}: must end with {SUFFIX}, by which `eclosion evaluate` knows it.")
    with _images(source, split, image_size, num_images, seed) as images:
        if len(images) < 2:
            raise DataError(f"{images.name}: there is {len(images)} image, and statistics need at least two.")
        part, encoder = _encoder(extractor)
        encoder.to(pick_device(device))
        folder = None if cache is None else Path(cache)
        reference = reference_of(
            images, part, encoder, batch_size=batch_size, cache=folder, limit=num_kept, on_image=on_image
        )
        save_statistics(path, reference, images=images, part=part, encoder=encoder)
    return path


def _encoder(given: Any) -> tuple[Any, ImageEncoder]:
    """The part that a config names, if it is one, and the encoder."""
    if isinstance(given, ImageEncoder):
        return None, given
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        options = dict(given)
        given = checked(resolve("encoders", str(options.pop("name", ""))), options)
    return given, given.build()


@contextmanager
def _images(
    given: Any, split: Split | None, image_size: int | tuple[int, int] | None, count: int | None, seed: int
) -> Iterator[Images]:
    """The images, for as long as the block lasts."""
    source = given.data.source if isinstance(given, RunConfig) else given
    if split is not None:
        source = _part(given, split)
    if isinstance(source, FolderSource) and not isinstance(given, RunConfig):
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        yield FolderImages(source.root, size=size, count=count, seed=seed)
        return
    if isinstance(given, RunConfig):
        config = given.data if image_size is None else replace(given.data, image_size=image_size)
    elif image_size is None:
        raise ConfigError(
            "image_size is not given, and images of this source may be of any size. Give that of the images that will "
            "be compared with these."
        )
    else:
        config = DataConfig(source=source, image_size=image_size)
    facts = {} if split is None else {"split": split}
    name = str(dump(source).get("name", type(source).__name__))
    with opened(source) as samples:
        yield DataImages(samples, config, name=name, seed=seed, count=count, facts=facts)


def _part(given: Any, split: Split) -> Any:
    """The source of a part of the data."""
    if not isinstance(given, RunConfig):
        found: Any = part_of_data(given, split)
    else:
        found = validation_source(given) if split == "val" else part_of_data(given.data.source, split)
    if found is None:
        raise ConfigError(f"split is {split!r}, and this source has no such part. Leave it out to take all it has.")
    return found
