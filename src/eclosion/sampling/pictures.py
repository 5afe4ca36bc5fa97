"""From numbers to pictures on disk: uint8, grids, PNG files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eclosion.rundir import LEGEND

__all__ = ["PAIRS", "grid", "pairs", "save_png", "to_uint8"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

GAP = 2
# A tile of a grid is about this wide, in pixels.
TILE = 96
MAX_COLUMNS = 8
# How a grid that holds originals is to be read.
PAIRS = "Rows in pairs: originals above, the images made from them below."


def to_uint8(images: torch.Tensor) -> Pixels:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]: the one place where images leave the network's range."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images: Pixels, *, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of many, row by row on white.

    Args:
        images: uint8 [N, H, W, 3].
        columns: images in a row; none makes the picture about square.
        scale: each pixel becomes a square of this many; none makes small images about 96 px wide.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = scale or max(1, round(TILE / width))
    cell_h, cell_w = height * scale + GAP, width * scale + GAP
    sheet = Image.new("RGB", (columns * cell_w + GAP, math.ceil(count / columns) * cell_h + GAP), "white")
    for i, pixels in enumerate(images):
        tile = _enlarged(pixels, (width * scale, height * scale))
        sheet.paste(tile, (GAP + i % columns * cell_w, GAP + i // columns * cell_h))
    return sheet


def pairs(originals: Pixels, images: Pixels, *, columns: int | None = None) -> Image.Image:
    """Originals in a row, and under each the image that was made from it; then the next such pair of rows.

    Args:
        originals: uint8 [N, h, w, 3].
        images: uint8 [N, H, W, 3]; the smaller of both kinds is enlarged to the size of the other.
        columns: images in a row; none takes 8, or as many as there are.

    Returns:
        A picture that says in its `info` how it is to be read.
    """
    columns = columns or min(len(images), MAX_COLUMNS)
    size = max(originals.shape[2], images.shape[2]), max(originals.shape[1], images.shape[1])
    alike = [np.stack([np.asarray(_enlarged(pixels, size)) for pixels in some]) for some in (originals, images)]
    blank: NDArray[np.uint8] = np.full((-len(images) % columns, *alike[0].shape[1:]), 255, np.uint8)
    rows = [np.concatenate([some, blank]).reshape(-1, columns, *some.shape[1:]) for some in alike]
    sheet = grid(np.stack(rows, axis=1).reshape(-1, *alike[0].shape[1:]), columns=columns)
    sheet.info[LEGEND] = PAIRS
    return sheet


def _enlarged(pixels: Pixels, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a picture, with its legend if it has one, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    said = PngInfo()
    if LEGEND in image.info:
        said.add_text(LEGEND, image.info[LEGEND])
    image.save(aside, format="PNG", pnginfo=said)
    aside.replace(path)
    return path
