"""`demo`: from nothing to butterflies in minutes, and a picture to show for it."""

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

ROWS, COLUMNS = 5, 5
MARGIN, HEADING = 16, 32  # px


def demo(output: str | Path = "eclosion-demo", *, steps: int | None = None) -> Path:
    """Train on built-in butterflies and draw samples beside real ones.

    A demo that was stopped goes on; one that is finished draws its picture again.

    Args:
        output: the run folder.
        steps: optimizer steps; none takes the recipe's, about three minutes on two cores.

    Returns:
        The picture: samples on the left, real images on the right.

    Raises:
        ConfigError: if the folder holds another run, or steps is less than 1.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"steps is {steps}, and must be at least 1.")
    config: dict[str, Any] = parse_yaml(recipes()["butterflies"])
    overrides = [] if steps is None else [f"train.duration={steps} steps"]
    run = load(config | {"output": str(output)}, overrides).run
    folder = train(run, accept_changes=True)
    picture = _side_by_side(_samples(folder), _real(run))
    return save_png(picture, RunDir(folder).inside("demo.png"))


def _samples(folder: Path) -> NDArray[np.uint8]:
    trained = load_trained(folder)
    return make_images(
        trained.task,
        range(ROWS * COLUMNS),
        seed=trained.run.sample.seed,
        sampler=trained.run.sample.sampler,
        guidance_scale=trained.run.sample.guidance_scale,
        precision=trained.precision,
    )


def _real(run: RunConfig) -> NDArray[np.uint8]:
    loader = Loader(run.data.source.open(), run.data, seed=run.seed, batch_size=ROWS * COLUMNS)
    return to_uint8(loader.batch_at(range(ROWS * COLUMNS))["image"])


def _side_by_side(samples: NDArray[np.uint8], real: NDArray[np.uint8]) -> Image.Image:
    halves = [("made by the network", grid(samples, columns=COLUMNS)), ("real", grid(real, columns=COLUMNS))]
    width, height = halves[0][1].size
    picture = Image.new("RGB", (2 * width + 3 * MARGIN, height + HEADING + MARGIN), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    for i, (heading, half) in enumerate(halves):
        x = MARGIN + i * (width + MARGIN)
        pen.text((x + 2, 6), heading, fill="black", font=font)
        picture.paste(half, (x, HEADING))
    return picture
