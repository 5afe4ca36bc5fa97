"""Make the pictures of the clip-art example: `python docs/clipart_pictures.py runs/clipart docs/images`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eclosion.data.loader import Loader
from eclosion.inspection.data_sheet import show_data
from eclosion.rundir import RunDir
from eclosion.sampling import grid, load_trained, make_images, save_png, to_uint8

Pixels = NDArray[np.uint8]
COLUMNS, ROWS = 10, 5  # one column per class
FONT = ImageFont.load_default(15)


def main(run: Path, out: Path) -> None:
    """Samples, loss curve, nearest training images, and the data itself."""
    trained = load_trained(run)
    options = trained.run.sample
    samples = make_images(
        trained.task,
        range(COLUMNS * ROWS),
        seed=options.seed,
        sampler=options.sampler,
        guidance_scale=options.guidance_scale,
        precision=trained.precision,
    )
    names = list(trained.meta["facts"]["class_names"])
    save_png(with_heads(grid(samples, columns=COLUMNS, scale=3), names), out / "clipart-samples.png")
    save_png(loss_curve(RunDir(run)), out / "clipart-loss.png")
    found, distance = nearest(samples, training_images(trained.run))
    pairs = np.stack([samples[:20], found[:20]], axis=1).reshape(-1, *samples.shape[1:])
    save_png(grid(pairs, columns=8, scale=3), out / "clipart-nearest.png")
    show_data(trained.run, [], out=out / "clipart-data.png", num_images=24)
    print(f"distance to the nearest training image, root mean square in levels of 255: {np.round(distance).tolist()}")


def training_images(run: Any) -> Pixels:
    """Every training image once, uint8 [N, H, W, 3]."""
    samples = run.data.source.open()
    loader = Loader(samples, run.data, seed=run.seed, batch_size=1)
    return to_uint8(loader.batch_at(range(len(samples)))["image"])


def nearest(samples: Pixels, training: Pixels) -> tuple[Pixels, NDArray[np.float64]]:
    """For each sample the training image, mirrored or not, at the smallest Euclidean distance, and that distance."""
    pool = np.concatenate([training, training[:, :, ::-1]]).astype(np.float32)
    found, distances = [], []
    for sample in samples.astype(np.float32):
        squares = ((pool - sample) ** 2).mean(axis=(1, 2, 3))
        found.append(pool[squares.argmin()].astype(np.uint8))
        distances.append(float(np.sqrt(squares.min())))
    return np.stack(found), np.array(distances)


def with_heads(picture: Image.Image, heads: list[str]) -> Image.Image:
    """A grid with a word above each column."""
    sheet = Image.new("RGB", (picture.width, picture.height + 24), "white")
    sheet.paste(picture, (0, 24))
    pen = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        pen.text(((i + 0.5) * picture.width / len(heads), 12), head, fill="black", font=FONT, anchor="mm")
    return sheet


def loss_curve(run: RunDir, *, width: int = 720, height: int = 320) -> Image.Image:
    """The logged training loss by step, faint, and the mean of 15 neighbours."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = np.array([line["step"] for line in lines])
    loss = np.array([line["train/loss"] for line in lines])
    smooth = np.convolve(np.pad(loss, 7, mode="edge"), np.ones(15) / 15, mode="valid")
    picture = Image.new("RGB", (width, height), "white")
    pen, left, bottom, top = ImageDraw.Draw(picture), 56, height - 40, 16
    highest = float(np.ceil(loss.max() * 10) / 10)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + (width - left - 28) * step / steps[-1], bottom - (bottom - top) * value / highest

    for tick in np.linspace(0, highest, 5):
        pen.line([place(0, tick), place(steps[-1], tick)], fill="#e4e0d8")
        pen.text((left - 8, place(0, tick)[1]), f"{tick:.2f}", fill="#555", font=FONT, anchor="rm")
    for tick in np.linspace(0, steps[-1], 5):
        pen.text((place(tick, 0)[0], bottom + 16), f"{tick:.0f}", fill="#555", font=FONT, anchor="mm")
    pen.line([place(s, v) for s, v in zip(steps, loss, strict=True)], fill="#efc3a8", width=1)
    pen.line([place(s, v) for s, v in zip(steps, smooth, strict=True)], fill="#b84a1b", width=3, joint="curve")
    pen.text((width - 20, top + 10), "training loss by step", fill="#555", font=FONT, anchor="rm")
    return picture


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
