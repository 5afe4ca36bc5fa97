"""A picture of the samples that are nearest to a training image, each beside it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eclosion.errors import printable
from eclosion.evaluation.images import Seen
from eclosion.metrics.memorisation import Pair
from eclosion.rundir import LEGEND

__all__ = ["memorised_sheet"]

# In pixels of the sheet.
TILE, SEAM, GAP, FONT_SIZE, LINE = 128, 2, 14, 12, 15
MAX_COLUMNS = 4
TOO_NEAR, FRAME = "#c00000", "#d0d0d0"
HOW_TO_READ = (
    "Left a sample, right the training image nearest to it. Red: too near. Held out: share of real images outside the "
    "training set that are as near."
)


def memorised_sheet(pairs: Sequence[Pair], samples: Seen, nearest: Seen) -> Image.Image:
    """Each sample beside the training image that is nearest to it, with the distance and both names below.

    Where a sample counts as memorised, the distance is red.

    Args:
        pairs: at least one, in the order in which they are shown.
        samples: the sample of each pair.
        nearest: the training image of each pair; of the same size or another.

    Returns:
        A picture that says in its `info` how it is to be read.
    """
    height, width = samples.pixels.shape[-2:]
    tile = TILE, max(1, round(TILE * height / width))
    cell = 2 * tile[0] + SEAM, tile[1] + 3 * LINE
    columns = min(len(pairs), MAX_COLUMNS)
    top = GAP + LINE
    size = GAP + columns * (cell[0] + GAP), top + math.ceil(len(pairs) / columns) * (cell[1] + GAP)
    font: Any = ImageFont.load_default(FONT_SIZE)
    # as wide as the line above the pairs, if there are few of them
    sheet = Image.new("RGB", (max(size[0], math.ceil(font.getlength(HOW_TO_READ)) + 2 * GAP), size[1]), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), HOW_TO_READ, fill="black", font=font)
    for i, pair in enumerate(pairs):
        x, y = GAP + i % columns * (cell[0] + GAP), top + i // columns * (cell[1] + GAP) + GAP // 2
        for side, seen in enumerate((samples, nearest)):
            corner = x + side * (tile[0] + SEAM), y
            sheet.paste(_tile(seen.pixels[i], tile), corner)
            pen.rectangle((*corner, corner[0] + tile[0] - 1, y + tile[1] - 1), outline=FRAME)
        lines = [f"distance {pair.distance:.4g}, held out {pair.held_out:.2%}", samples.names[i], nearest.names[i]]
        for number, line in enumerate(lines):
            place = x, y + tile[1] + 2 + number * LINE
            colour = TOO_NEAR if pair.too_near and not number else "black"
            pen.text(place, _shortened(printable(line), font, cell[0]), fill=colour, font=font)
    sheet.info[LEGEND] = HOW_TO_READ
    return sheet


def _tile(pixels: Tensor, size: tuple[int, int]) -> Image.Image:
    """uint8 [3, H, W] as a picture: pixels stay squares where it is enlarged, and are averaged where it is not."""
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    smaller = image.width > size[0]
    return image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def _shortened(text: str, font: Any, width: int) -> str:
    """The end of a text, which of a file's name tells more than its beginning."""
    if font.getlength(text) <= width:
        return text
    kept = text[-width:]  # no letter is narrower than a pixel
    while kept and font.getlength(f"…{kept}") > width:
        kept = kept[1:]
    return f"…{kept}"
