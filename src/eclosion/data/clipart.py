"""Public-domain clip art that is installed with eclosion: small drawings with captions and categories.

Where they come from and under which licence stands beside them, in clipart_pictures/PROVENANCE.md.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated

from PIL import Image
from pydantic import AfterValidator

from eclosion.data.source import Sample
from eclosion.errors import BadSample, DataError, did_you_mean
from eclosion.registry import part

__all__ = ["CATEGORIES", "Clipart", "ClipartSource"]

CATEGORIES = ("animal", "building", "clothing", "food", "music", "plant", "sport", "tool", "toy", "transport")


@dataclass(frozen=True)
class _Picture:
    """One row of index.json."""

    path: str
    category: str
    caption: str
    offset: int
    length: int
    sha256: str


@cache
def _shipped() -> tuple[bytes, tuple[_Picture, ...]]:
    """The pack and its index, read once: together about a megabyte.

    Raises:
        DataError: if they are not the files that were installed.
    """
    folder = files("eclosion.data") / "clipart_pictures"
    try:
        pack, index = (folder / "pictures.pack").read_bytes(), json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the clip art cannot be read ({error}). Install eclosion again.") from error
    if hashlib.sha256(pack).hexdigest() != index["sha256"]:
        raise DataError(f"{folder}/pictures.pack: its sha256 is not the one in index.json. Install eclosion again.")
    return pack, tuple(_Picture(**row) for row in index["pictures"])


class Clipart:
    """The opened clip art."""

    has_captions = True

    def __init__(self, categories: Sequence[str]) -> None:
        self._pack, pictures = _shipped()
        self._pictures = [picture for picture in pictures if picture.category in categories]
        self.class_names = tuple(name for name in CATEGORIES if name in categories)
        what = repr([(one.path, one.category, one.caption, one.sha256) for one in self._pictures])
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        """Where the drawing lies in the packages it came from, without suffix."""
        return self._at(index).path

    def read(self, index: int) -> Sample:
        """Decode one picture: RGBA, 64 pixels wide and high.

        Raises:
            BadSample: if it cannot be decoded.
        """
        one = self._at(index)
        try:
            with Image.open(io.BytesIO(self._pack[one.offset : one.offset + one.length]), formats=("WEBP",)) as opened:
                image = opened.convert("RGBA")
        except OSError as error:
            raise BadSample(one.path, "undecodable", f"cannot be decoded ({error}). Install eclosion again.") from error
        return Sample(image, one.path, one.caption, self.class_names.index(one.category))

    def _at(self, index: int) -> _Picture:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return self._pictures[index]


def _known(categories: list[str] | None) -> list[str] | None:
    if categories == []:
        raise ValueError(f"names no category. Leave it out for all of them: {', '.join(CATEGORIES)}.")
    for name in categories or ():
        if name not in CATEGORIES:
            raise ValueError(f"{name!r} is not a category of the clip art.{did_you_mean(name, CATEGORIES)}")
    return categories


@part
class ClipartSource:
    """686 public-domain drawings of things, 64 pixels wide and high on a transparent ground, installed with eclosion.

    The class of a picture is its category; its caption says what it shows.
    """

    # Any of animal, building, clothing, food, music, plant, sport, tool, toy and transport; none means all.
    categories: Annotated[list[str] | None, AfterValidator(_known)] = None

    def open(self) -> Clipart:
        """The drawings; none is decoded yet.

        Raises:
            DataError: if the installed files are damaged.
        """
        return Clipart(self.categories or CATEGORIES)
