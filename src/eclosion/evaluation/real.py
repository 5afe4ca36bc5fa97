"""Images that are there already: in a folder, or in a source of data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclosion.config.schema import DataConfig
from eclosion.data.batch import Batch, Skip
from eclosion.data.folder import FolderSource
from eclosion.data.images import decode, to_rgb
from eclosion.data.loader import Loader
from eclosion.data.source import Samples, array_shapes
from eclosion.data.transforms import transform_of
from eclosion.errors import DataError
from eclosion.evaluation.images import Seen
from eclosion.metrics.metric import Need
from eclosion.registry import dump
from eclosion.rng import generator
from eclosion.sampling.examples import in_order
from eclosion.sampling.pictures import to_uint8

__all__ = ["DataImages", "FolderImages", "InOrder", "PairedImages", "channels_first", "digest_of"]

# The picture that `eclosion sample` puts beside numbered images.
GRID = "grid.png"
# Options of a `DataConfig` that decide the pixels of an image which is read in order.
DECIDING = ("image_size", "resize", "interpolation", "preprocessing", "decode", "background")


class FolderImages:
    """The images of a folder, all of one size.

    Attributes:
        root: the folder.
        size: height and width in pixels.
    """

    def __init__(
        self, root: Path, *, size: tuple[int, int] | None = None, count: int | None = None, seed: int = 0
    ) -> None:
        """Find the images; the first is looked at.

        Args:
            root: the folder, searched with its sub-folders. `grid.png` beside numbered images is left out.
            size: height and width that images are brought to, the shorter side scaled and the rest cropped; None
                takes them as they are, which must then be of one size.
            count: how many; fewer than there are is a choice that follows from the seed. None takes all.
            seed: of the choice.

        Raises:
            DataError: if there are none, or fewer than `count`, or the first cannot be read.
        """
        self.root = root
        try:
            self._samples = FolderSource(root=root).open()
        except DataError as error:
            raise DataError(str(error).replace("data.source.root: ", "")) from error
        names = [name for name in self._samples.names if not _is_grid(name, self._samples.names)]
        chosen = _chosen(len(names), count, seed, what=str(root))
        self._names = [names[i] for i in chosen]
        self._wanted = size
        self.size = size or self._picture(0).shape[:2]
        self._facts = {"what": "folder", "name": str(root), "size": list(self.size), "resized": size is not None}

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.root)

    @property
    def names(self) -> Sequence[str]:
        """The path of each image below the folder."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """Of names, lengths and times of the files: another picture under an old name must not pass for the old."""
        stats = [(name, (self.root / name).stat()) for name in self._names]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return digest_of("folder", str(self.root.resolve()), self._wanted, files)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Which folder, and the size of its images."""
        return self._facts

    @property
    def brings(self) -> frozenset[Need]:
        """Nothing but pixels."""
        return frozenset()

    def __len__(self) -> int:
        return len(self._names)

    def read(self, indices: Sequence[int]) -> Seen:
        """The images of these numbers.

        Raises:
            DataError: naming one that cannot be read, or is not of the size of the first.
        """
        pictures = [self._picture(i) for i in indices]
        for i, picture in zip(indices, pictures, strict=True):
            if picture.shape[:2] != self.size:
                (height, width), (h, w) = self.size, picture.shape[:2]
                raise DataError(
                    f"{self.root / self._names[i]}: is {w}x{h} pixels (width x height), and {self._names[0]} is "
                    f"{width}x{height}. Images that are scored have one size; give image_size, or --image-size, to "
                    "resize them."
                )
        names = [str(self.root / self._names[i]) for i in indices]
        return Seen(channels_first(np.stack(pictures)), names)

    def _picture(self, index: int) -> Any:
        """uint8 [H, W, 3].

        Raises:
            BadSample: if it cannot be read.
        """
        path = self.root / self._names[index]
        image = to_rgb(decode(path, str(path)), name=str(path))
        if self._wanted is None or (image.height, image.width) == self._wanted:
            return np.asarray(image)
        config = DataConfig(source=FolderSource(root=self.root), image_size=self._wanted, decode="exact")
        return np.transpose(transform_of(config).prepare(image, str(path)), (1, 2, 0))


class PairedImages:
    """The images of a folder, each with its original: the file of the same name in another folder, or the only one of
    that name with another suffix.

    Attributes:
        size: height and width in pixels, of both.
    """

    def __init__(self, images: FolderImages, originals: FolderImages) -> None:
        """Nothing is read yet.

        Raises:
            DataError: naming an image that has no original.
        """
        places = {name: i for i, name in enumerate(originals.names)}
        alike = _only([_stem(name) for name in originals.names])
        found = {name: places.get(name, alike.get(_stem(name))) for name in images.names}
        missing = [name for name, place in found.items() if place is None]
        if missing:
            raise DataError(
                f"{images.root / missing[0]}: has no original (as {len(missing)} of {len(images)} images): there is no "
                f"{originals.root / missing[0]}, nor one image of that name with another suffix."
            )
        self._images, self._originals = images, originals
        self._places = [place for place in found.values() if place is not None]
        self.size = images.size

    @property
    def name(self) -> str:
        """The folder of the images."""
        return self._images.name

    @property
    def fingerprint(self) -> str:
        """Of the images and of the originals."""
        return digest_of("pairs", self._images.fingerprint, self._originals.fingerprint)

    @property
    def facts(self) -> Mapping[str, Any]:
        """As of the images, and where the originals are."""
        return {**self._images.facts, "originals": self._originals.name}

    @property
    def brings(self) -> frozenset[Need]:
        """The originals."""
        return frozenset({"originals"})

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Seen:
        """The images of these numbers, and their originals.

        Raises:
            DataError: naming one that cannot be read, or is not of the size of the first.
        """
        originals = self._originals.read([self._places[i] for i in indices]).pixels
        return replace(self._images.read(indices), originals=originals)


def _stem(name: str) -> str:
    """A name without its suffix."""
    return str(Path(name).with_suffix(""))


def _only(words: Sequence[str]) -> dict[str, int]:
    """The places of the words that stand there once."""
    counts = Counter(words)
    return {word: i for i, word in enumerate(words) if counts[word] == 1}


def _is_grid(name: str, names: Sequence[str]) -> bool:
    return name == GRID and all(other == GRID or Path(other).stem.isdigit() for other in names)


class DataImages:
    """Images of a source, in its order, as a network sees them in training, but not cropped or mirrored at random.

    Attributes:
        size: height and width in pixels.
    """

    def __init__(
        self,
        samples: Samples,
        config: DataConfig,
        *,
        name: str,
        seed: int = 0,
        count: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            samples: open, and open for as long as this is in use.
            config: what is done to the images, and how many may be bad.
            name: what to call them.
            seed: of transforms that are random, and of the choice.
            count: how many; fewer than there are is a choice that follows from the seed. None takes all.
            facts: what else results say of them, such as the split.

        Raises:
            DataError: if there are fewer than `count`.
        """
        self._data = InOrder(samples, config, seed=seed)
        self._chosen = _chosen(len(samples), count, seed, what=name)
        self._name, self.size = name, config.size
        self._told = dict(facts or {})

    @property
    def name(self) -> str:
        """What to call them."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Of the samples, of which of them, and of what is done to them."""
        chosen = None if len(self._chosen) == len(self._data) else list(self._chosen)
        return digest_of("data", self._data.fingerprint, chosen)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Which data, and the size of its images."""
        return {"what": "data", "name": self._name, "size": list(self.size), **self._told}

    @property
    def brings(self) -> frozenset[Need]:
        """Captions and embeddings, if the samples have them."""
        return self._data.brings

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, indices: Sequence[int]) -> Seen:
        """The images of these numbers.

        Raises:
            DataError: naming one that cannot be read, if `max_bad_fraction` does not allow it.
        """
        places = [self._chosen[i] for i in indices]
        batch, names = self._data.read(places)
        return Seen(
            channels_first(to_uint8(batch["image"])),
            names,
            captions=batch.fields.get("caption"),
            conditions=batch.fields.get("image_embed"),
        )


class InOrder:
    """Samples by their place in the source, the same each time.

    A sample that cannot be read, where `max_bad_fraction` allows that, leaves its place to the next that can.

    Attributes:
        fingerprint: of the samples and of what is done to them.
        brings: what they have besides the image.
    """

    def __init__(self, samples: Samples, config: DataConfig, *, seed: int) -> None:
        self._samples, self._config = samples, config
        self._loader = Loader(samples, in_order(config), seed=seed, batch_size=1)
        self._bad: dict[int, Skip] = {}
        self._order: NDArray[np.int64] | None = None
        self.allowed = int(config.max_bad_fraction * len(samples) + 1e-6)  # 0.29 of 100 is 28.999999999999996
        options = {name: dump(getattr(config, name)) for name in DECIDING}
        # transforms of `preprocessing` may be random, and then follow from the seed
        self.fingerprint = digest_of(samples.fingerprint, options, seed if config.preprocessing else None)
        has: dict[Need, bool] = {
            "captions": samples.has_captions,
            "conditions": "image_embed" in array_shapes(samples),
        }
        self.brings: frozenset[Need] = frozenset(name for name, there in has.items() if there)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, places: Sequence[int]) -> tuple[Batch, list[str]]:
        """The samples at these places as a batch, all of them readable, and their names.

        Raises:
            DataError: naming a sample that cannot be read, if that is one too many.
        """
        now = list(places)
        while True:
            batch = self._loader.batch_at(now)
            if not batch.skipped:
                return batch, [self._samples.name(place) for place in now]
            for skip in batch.skipped:
                self._enter(skip)
            now = [self._next(place) for place in now]

    def drawn(self, numbers: Sequence[int]) -> list[int]:
        """The places of the samples that images of these numbers are made from.

        Sources are often sorted, and a few images must stand for all: so it is a drawn order, the same each time; when
        all had their turn, from the first again.
        """
        if self._order is None:
            self._order = generator(0, "examples", self._samples.fingerprint).permutation(len(self))
        return [int(self._order[number % len(self)]) for number in numbers]

    def _enter(self, skip: Skip) -> None:
        self._bad[skip.position] = skip
        if len(self._bad) > self.allowed:
            raise DataError(
                f"{skip.name}: {skip.detail} That makes {len(self._bad)} of {len(self)} images that cannot be read, "
                f"and data.max_bad_fraction={self._config.max_bad_fraction:g} allows {self.allowed}. Repair or remove "
                "them."
            )

    def _next(self, place: int) -> int:
        while place in self._bad:
            place = (place + 1) % len(self)
        return place


def _chosen(available: int, count: int | None, seed: int, *, what: str) -> Sequence[int]:
    """The numbers of as many as are wanted, in their order."""
    if count is None or count == available:
        return range(available)
    if count > available:
        raise DataError(f"{what}: holds {available} images, and {count} are asked for. Ask for fewer, or give more.")
    return sorted(generator(seed, "evaluate", "choice").permutation(available)[:count].tolist())


def channels_first(pixels: Any) -> Tensor:
    """uint8 [B, H, W, 3] as a tensor [B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.transpose(pixels, (0, 3, 1, 2))))


def digest_of(*told: object) -> str:
    """A short hash of what is told."""
    return blake2b(repr(told).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
