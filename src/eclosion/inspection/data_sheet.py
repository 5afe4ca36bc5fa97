"""A picture of what the network will see."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eclosion.config.load import load
from eclosion.data.batch import Batch
from eclosion.data.loader import Loader
from eclosion.errors import ConfigError
from eclosion.sampling import save_png, to_uint8

__all__ = ["show_data"]

# In pixels of the sheet.
TILE, GAP, FONT_SIZE, LINE = 160, 10, 12, 15
MAX_LINES = 6
LETTERS = 26  # that fit under a tile
MAX_COLUMNS = 8


def show_data(
    config: object, overrides: Sequence[str] = (), *, out: str | Path = "data.png", num_images: int = 24
) -> Path:
    """Draw the first images of a run as the network sees them: resized, cropped, mirrored.

    Under each stand the file it came from, its class and its caption, or why it is skipped.

    Args:
        config: as for `train`.
        overrides: texts such as "data.crop=random".
        out: the picture to write, a PNG.
        num_images: how many; at least 1.

    Returns:
        `out`.

    Raises:
        ConfigError, DataError: if the config or the data is wrong.
    """
    if num_images < 1:
        raise ConfigError(f"num_images is {num_images}, and must be at least 1.")
    run = load(config, overrides).run
    samples = run.data.source.open()
    loader = Loader(samples, run.data, seed=run.seed, batch_size=num_images)
    positions = range(num_images)
    batch = loader.batch_at(positions)
    names = [samples.name(loader.order.index_at(p)) for p in positions]
    return save_png(_sheet(to_uint8(batch["image"]), _texts(batch, names, samples.class_names)), Path(out))


def _texts(batch: Batch, names: Sequence[str], class_names: Sequence[str]) -> list[str]:
    reasons = {skip.position: skip.detail for skip in batch.skipped}
    found = []
    for i, (position, name) in enumerate(zip(batch.positions, names, strict=True)):
        lines = [_shortened(name)]
        if position in reasons:
            lines += textwrap.wrap(f"SKIPPED: {reasons[position]}", LETTERS)
        else:
            lines += [f"class: {class_names[int(batch['label'][i])]}"] if "label" in batch else []
            lines += textwrap.wrap(batch["caption"][i], LETTERS) if "caption" in batch else []
        cut = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1]} …"] if len(lines) > MAX_LINES else lines
        found.append("\n".join(cut))
    return found


def _shortened(name: str) -> str:
    """The end of a file name, which tells more than its beginning."""
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"


def _sheet(images: NDArray[np.uint8], texts: Sequence[str]) -> Image.Image:
    count, height, width, _ = images.shape
    columns = min(count, MAX_COLUMNS)
    tile_height = round(TILE * height / width)
    row_height = tile_height + GAP + LINE * max(text.count("\n") + 1 for text in texts)
    size = (columns * (TILE + GAP) + GAP, math.ceil(count / columns) * row_height + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for i, (pixels, text) in enumerate(zip(images, texts, strict=True)):
        x, y = GAP + i % columns * (TILE + GAP), GAP + i // columns * row_height
        tile = Image.fromarray(pixels).resize((TILE, tile_height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        pen.multiline_text((x, y + tile_height + 2), text, fill="black", font=font, spacing=LINE - FONT_SIZE)
    return sheet


def _font() -> Any:
    return ImageFont.load_default(FONT_SIZE)
