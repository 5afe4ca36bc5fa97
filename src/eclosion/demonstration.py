"""`demo`: from nothing to butterflies in minutes, and a picture to show for it."""

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eclosion.config.load import load
from eclosion.config.schema import RunConfig
from eclosion.config.yaml_text import parse_yaml
from eclosion.data.loader import Loader
from eclosion.errors import ConfigError
from eclosion.inspection.recipes import recipes
from eclosion.rundir import RunDir
from eclosion.sampling import grid, load_trained, make_images, save_png, to_uint8
from eclosion.training.run import train

__all__ = ["demo"]

SAMPLE_ROWS, REAL_ROWS = 4, 2
SCALE = 3  # each pixel of a 32 px image becomes a square of 3 x 3
MARGIN, LINE = 12, 26  # px

Images = NDArray[np.uint8]  # [N, H, W, 3]


def demo(output: str | Path = "eclosion-demo", *, steps: int | None = None) -> Path:
    """Train on built-in butterflies and draw samples beside real ones, one column per colour.

    A demo that was stopped goes on; one that is finished draws its picture again.

    Args:
        output: the run folder.
        steps: optimizer steps; none takes the recipe's, about three and a half minutes on two cores.

    Returns:
        The picture, with what the network made above and real images below.

    Raises:
        ConfigError: if the folder holds another run, or steps is less than 1.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"steps is {steps}, and must be at least 1.")
    config: dict[str, Any] = parse_yaml(recipes()["butterflies"])
    overrides = [] if steps is None else [f"train.duration={steps} steps"]
    run = load(config | {"output": str(output)}, overrides).run
    folder = train(run, accept_changes=True)
    class_names = run.data.source.open().class_names
    picture = _picture(_samples(folder, len(class_names)), _real(run), class_names)
    return save_png(picture, RunDir(folder).inside("demo.png"))


def _samples(folder: Path, num_classes: int) -> Images:
    """Images of each class in turn, row by row."""
    trained = load_trained(folder)
    options = trained.run.sample
    return make_images(
        trained.task,
        range(SAMPLE_ROWS * num_classes),
        seed=options.seed,
        sampler=options.sampler,
        guidance_scale=options.guidance_scale,
        precision=trained.precision,
    )


def _real(run: RunConfig) -> Images:
    """The first images of the run, of each class in turn, row by row."""
    loader = Loader(run.data.source.open(), run.data, seed=run.seed, batch_size=1)
    columns: list[list[Images]] = [[] for _ in loader.samples.class_names]
    for position in count():
        batch = loader.batch_at([position])
        column = columns[int(batch["label"][0])]
        if len(column) < REAL_ROWS:
            column.append(to_uint8(batch["image"])[0])
        if all(len(column) == REAL_ROWS for column in columns):
            return np.stack([column[row] for row in range(REAL_ROWS) for column in columns])
    raise AssertionError("positions do not end")


def _picture(samples: Images, real: Images, class_names: tuple[str, ...]) -> Image.Image:
    """Both grids, one above the other, under the names of the classes."""
    columns = len(class_names)
    parts = [("made by the network", samples), ("real", real)]
    grids = [(title, grid(images, columns=columns, scale=SCALE)) for title, images in parts]
    width = grids[0][1].width
    height = LINE + sum(LINE + sheet.height for _, sheet in grids) + MARGIN
    picture = Image.new("RGB", (width + 2 * MARGIN, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for i, name in enumerate(class_names):
        pen.text((MARGIN + (i + 0.5) * width / columns, LINE / 2), name, fill="black", font=font, anchor="mm")
    y = LINE
    for title, sheet in grids:
        pen.text((MARGIN + 2, y + LINE / 2), title, fill="grey", font=font, anchor="lm")
        picture.paste(sheet, (MARGIN, y + LINE))
        y += LINE + sheet.height
    return picture
