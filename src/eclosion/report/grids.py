"""The sample grids of a run as data URLs, few and small enough for one page."""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from eclosion.report.markup import Html
from eclosion.rundir import LEGEND

__all__ = ["BUDGET", "MAX_GRIDS", "Grid", "choose", "embed"]

MAX_GRIDS = 24
# Bytes of all pictures together; in base64 they take a third more.
BUDGET = 6_600_000
# A picture above this is not opened: it is no grid of ours, and would fill the memory.
MAX_PIXELS = 100_000_000

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Grid:
    """One picture of a page.

    Attributes:
        step: when it was made.
        name: of its file.
        source: data URL; empty if the file cannot be shown.
        width, height: pixels of the file.
        reduced: whether the page holds a compressed copy.
        legend: how it is to be read, as the file says it; empty if it says nothing.
    """

    step: int
    name: str
    source: Html
    width: int
    height: int
    reduced: bool = False
    legend: str = ""


def choose(grids: Sequence[tuple[int, Path]], limit: int = MAX_GRIDS) -> list[tuple[int, Path]]:
    """At most `limit` of the grids, evenly spread, the first and the last among them."""
    if len(grids) <= limit:
        return list(grids)
    return [grids[round(i * (len(grids) - 1) / (limit - 1))] for i in range(limit)]


def embed(step: int, path: Path, *, budget: int) -> Grid:
    """The grid, unchanged if it fits into `budget` bytes, else as a smaller WebP; without a source if it is damaged."""
    try:
        content = path.read_bytes()
        width, height = _size(content)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.load()
            legend = str(image.info.get(LEGEND, ""))
            if len(content) <= budget:
                return Grid(step, path.name, _url("png", content), width, height, legend=legend)
            reduced = _reduce(image.convert("RGB"), budget)
            return Grid(step, path.name, _url("webp", reduced), width, height, reduced=True, legend=legend)
    except (OSError, ValueError, SyntaxError):  # missing, cut short, or no PNG at all
        return Grid(step, path.name, Html(), 0, 0)


def _size(content: bytes) -> tuple[int, int]:
    """Width and height, from the head of the file: before Pillow makes room for them."""
    if not content.startswith(_PNG) or len(content) < 24:
        raise ValueError("no PNG")
    width, height = struct.unpack(">II", content[16:24])
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError("no size for a grid")
    return width, height


def _reduce(image: Image.Image, budget: int) -> bytes:
    """The picture as WebP, in the largest of a few sizes that fits; the last is taken anyhow."""
    for side in (1600, 1200, 800, 400):
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "WEBP", quality=88, method=2)
        if out.tell() <= budget:
            break
    return out.getvalue()


def _url(kind: str, content: bytes) -> Html:
    return Html(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
