"""Make the built-in clip art: src/eclosion/data/clipart_pictures/ from two Debian packages.

    apt-get download openclipart-png openclipart-svg
    for package in openclipart-*.deb; do dpkg -x "$package" unpacked; done
    python scripts/make_clipart.py unpacked/usr/share/openclipart

With `--check` nothing is written: what would be written is compared with what is there. The pictures are
equal byte for byte under the Pillow and libwebp that index.json names; other versions may compress differently.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "src" / "eclosion" / "data" / "clipart_pictures"
PACKAGES = ("openclipart-png 1:0.18+dfsg-19", "openclipart-svg 1:0.18+dfsg-19")
PUBLIC_DOMAIN = ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")

SIZE = 64
MARGIN = 2
QUALITY = 82

# Folder in the package -> category.
CATEGORIES = {
    "animals": "animal",
    "buildings": "building",
    "food": "food",
    "plants": "plant",
    "tools": "tool",
    "transportation": "transport",
}
# Folders of signs, of one motif many times over, and of weapons.
LEFT_OUT_FOLDERS = ("transportation/roadsigns", "transportation/aiga-symbols", "tools/weapons")
# A picture whose title, keywords or file name has one of these words is no coloured picture of a thing.
LEFT_OUT_WORDS = set(
    "sign signs symbol symbols roadsign icon logo flag map maps silhouette contour contorno outline bw inkpen blueprint "
    "bullethole gun guns weapon weapons bomb explosive tank tile pattern border frame diagram tux linux debian"
    .split()
)  # fmt: skip
LEFT_OUT_PHRASES = ("b and w", "b & w", "b &amp; w", "bianco e nero", "road sign")

# At least this share of the square must be painted, in at least this mean difference of the strongest and weakest channel.
MIN_COVERAGE = 0.10
MIN_CHROMA = 14.0
MAX_ASPECT = 3.0
# Root mean square difference of two pictures, 16 pixels wide on white, below which they count as the same.
MIN_DIFFERENCE = 12.0

DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Drawing:
    """One file of the packages: path without suffix, and what its SVG says of it."""

    path: str
    category: str
    title: str
    author: str
    keywords: tuple[str, ...]


def drawings(root: Path) -> Iterator[Drawing]:
    """All drawings of the six categories whose SVG states the public domain dedication, in the order of their paths."""
    for file in sorted((root / "svg").rglob("*.svg"), key=lambda file: file.as_posix()):
        path = file.relative_to(root / "svg").with_suffix("").as_posix()
        category = CATEGORIES.get(path.partition("/")[0])
        if category is None or path.startswith(LEFT_OUT_FOLDERS):
            continue
        work = ElementTree.parse(file).getroot().find(".//{*}metadata//{*}Work")
        if work is None or not _is_public_domain(work):
            continue
        keywords = (_line(item.text) for item in work.findall(f"{DC}subject//{{*}}li"))
        yield Drawing(
            path=path,
            category=category,
            title=_line(work.findtext(f"{DC}title")),
            author=_line(work.findtext(f"{DC}creator//{DC}title")),
            keywords=tuple(sorted({word.lower() for word in keywords if word and not word.startswith("hash")})),
        )


def _is_public_domain(work: ElementTree.Element) -> bool:
    licences = [item.get(f"{RDF}resource") for item in work.iter() if item.tag.endswith("}license")]
    return bool(licences) and all(licence in PUBLIC_DOMAIN for licence in licences)


def _line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def is_wanted(drawing: Drawing) -> bool:
    """Whether its words speak of a coloured picture of a thing."""
    text = f"{drawing.title} {drawing.path} {' '.join(drawing.keywords)}".lower()
    return not (LEFT_OUT_WORDS & set(re.split(r"[^a-z]+", text)) or any(p in text for p in LEFT_OUT_PHRASES))


def picture(file: Path) -> Image.Image | None:
    """The drawing cut to what is painted and fitted into a square, RGBA, or None if it is pale, empty or a strip."""
    with Image.open(file) as opened:
        whole = opened.convert("RGBA")
    box = whole.getchannel("A").point(lambda level: 255 * (level > 8)).getbbox()
    if box is None:
        return None
    cut = whole.crop(box)
    if max(cut.size) > MAX_ASPECT * min(cut.size):
        return None
    scale = (SIZE - 2 * MARGIN) / max(cut.size)
    width, height = (max(1, round(length * scale)) for length in cut.size)
    small = cut.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    square.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return square if _is_colourful(square) else None


def _is_colourful(square: Image.Image) -> bool:
    pixels = np.asarray(square, np.float64)
    alpha = pixels[..., 3] / 255
    chroma = pixels[..., :3].max(axis=2) - pixels[..., :3].min(axis=2)
    return bool(alpha.mean() >= MIN_COVERAGE and (chroma * alpha).sum() / alpha.sum() >= MIN_CHROMA)


def small(square: Image.Image) -> NDArray[np.float64]:
    """The picture as it is compared with others: 16 pixels wide on white, flat."""
    white = Image.new("RGBA", square.size, "white")
    white.alpha_composite(square)
    return np.asarray(white.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float64).ravel()
