"""What each score makes of images that are wrong in a known way: `python docs/metrics_study.py docs`.

Writes examples/degradations_numbers.md and images/degradations.png. Butterflies are drawn, so there are as many real
images as one likes, and what is wrong with the others is known exactly.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from eclosion.config.schema import DataConfig
from eclosion.data.butterflies import ButterfliesSource
from eclosion.evaluation.images import Seen
from eclosion.evaluation.makers import Features
from eclosion.evaluation.measuring import Measured, measure
from eclosion.evaluation.real import DataImages
from eclosion.evaluation.rows import rows_of
from eclosion.metrics.metric import Need
from eclosion.models.encoders import EfficientNetLite0Encoder
from eclosion.sampling import save_png

Pixels = NDArray[np.uint8]  # [H, W, 3]
NUM_IMAGES, NUM_TRAINED = 500, 1000
METRICS = ["kid", "fid", "precision_recall", "memorisation", "inception_score", "cosine"]
# Score -> how a row calls it, and how many digits say something.
SHOWN = {
    "kid": ("KID x 1000", 1),
    "fid": ("FID", 1),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "density": ("density", 2),
    "coverage": ("coverage", 2),
    "memorised": ("memorised", 2),
    "nearer_than_held_out": ("nearer", 2),
    "inception_score": ("Inception score", 2),
    "cosine": ("cosine", 2),
}
COLOUR = "blue"
POOL = 20  # images to choose one of its colour from, of which there are eight


def butterflies(seed: int, count: int) -> DataImages:
    """Drawn images; others for another seed."""
    source = ButterfliesSource(size=count, seed=seed)
    return DataImages(source.open(), DataConfig(source=source, image_size=64), name=f"butterflies, seed {seed}")


def of_colour(colour: str, seed: int, count: int) -> list[int]:
    """The numbers of the first images with wings of one colour."""
    samples = ButterfliesSource(size=POOL * count, seed=seed).open()
    wanted = samples.class_names.index(colour)
    return list(islice((i for i in range(len(samples)) if samples.read(i).label == wanted), count))


@dataclass(frozen=True)
class Changed:
    """Images of which each is changed by its number; some may be taken again and again.

    Attributes:
        images: what is changed.
        name: what is wrong with them.
        change: from a picture and its number.
        which: the image that stands at each place.
        embeddings: what the images at the same places should show, float32 [N, D].
    """

    images: DataImages
    name: str
    change: Callable[[Pixels, int], Pixels]
    which: Sequence[int]
    embeddings: torch.Tensor

    @property
    def fingerprint(self) -> str:
        return f"{self.images.fingerprint} {self.name} {list(self.which)}"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"what": "study", "name": self.name, "size": [64, 64]}

    @property
    def brings(self) -> frozenset[Need]:
        return frozenset({"conditions"})

    def __len__(self) -> int:
        return len(self.which)

    def read(self, indices: Sequence[int]) -> Seen:
        pictures = self.images.read([self.which[i] for i in indices]).pixels.permute(0, 2, 3, 1).numpy()
        changed = [self.change(picture, i) for picture, i in zip(pictures, indices, strict=True)]
        pixels = torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()
        return Seen(pixels, [str(i) for i in indices], conditions=self.embeddings[list(indices)])


def same(picture: Pixels, number: int) -> Pixels:
    return picture


def blur(radius: float) -> Callable[[Pixels, int], Pixels]:
    return lambda picture, _: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noise(deviation: float) -> Callable[[Pixels, int], Pixels]:
    def change(picture: Pixels, number: int) -> Pixels:
        drawn = np.random.default_rng(number).normal(0, deviation, picture.shape)
        return (picture + drawn).clip(0, 255).round().astype(np.uint8)

    return change


def sets(count: int, trained: DataImages, encoder: Any) -> list[Changed]:
    """Real images, and images that are wrong in a known way, `count` of each."""
    real = butterflies(2, count)
    look = Features(encoder.build(), torch.device("cpu"))
    embeddings = rows_of(real, {"embeddings": look}, batch_size=32)["embeddings"]
    everything = range(count)

    def made(name: str, *, change: Any = same, images: DataImages = real, which: Sequence[int] = everything) -> Changed:
        return Changed(images, name, change, which, embeddings)

    return [
        made("real"),
        made("blurred, radius 0.7", change=blur(0.7)),
        made("blurred, radius 1.5", change=blur(1.5)),
        made("noise, 10 of 255", change=noise(10)),
        made("noise, 40 of 255", change=noise(40)),
        made("25 images, again and again", which=[i % 25 for i in everything]),
        made("one image, again and again", which=[0] * count),
        made(f"{COLOUR} ones only", images=butterflies(3, POOL * count), which=of_colour(COLOUR, 3, count)),
        made("half of them trained on", images=trained, change=half_of(real)),
        made("all of them trained on", images=trained),
    ]


def half_of(real: DataImages) -> Callable[[Pixels, int], Pixels]:
    """Every second image is a real one of its own."""

    def change(picture: Pixels, number: int) -> Pixels:
        if number % 2:
            return picture
        return real.read([number]).pixels[0].permute(1, 2, 0).numpy()

    return change


def study(count: int = NUM_IMAGES, trained: int = NUM_TRAINED, *, cache: Path | None = None) -> dict[str, Measured]:
    """The scores of each set, by what is wrong with it."""
    encoder = EfficientNetLite0Encoder()
    training, held_out = butterflies(0, trained), butterflies(1, count)
    return {
        made.name: measure(
            made,
            metrics=METRICS,
            extractor=encoder,
            against=held_out,
            train=training,
            batch_size=32,
            device=torch.device("cpu"),
            cache=cache,
        )
        for made in sets(count, training, encoder)
    }


# --- the page --------------------------------------------------------------------------------------------------------


def value(name: str, number: float) -> float:
    return 1000 * number if name == "kid" else number


def table(found: Mapping[str, Measured]) -> str:
    """The scores with their standard errors, and the floor, as Markdown."""
    first = {row.score: row for row in next(iter(found.values())).rows}
    names = [name for name in SHOWN if name in first]
    lines = [
        "| images | " + " | ".join(SHOWN[name][0] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for what, measured in found.items():
        rows = {row.score: row for row in measured.rows}
        lines.append(f"| {what} | " + " | ".join(_cell(name, rows[name]) for name in names) + " |")
    floors = [first[name].floor for name in names]
    said = ["" if floor is None else _cell(name, floor) for name, floor in zip(names, floors, strict=True)]
    lines.append("| *real against real* | " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def _cell(name: str, row: Any) -> str:
    digits = SHOWN[name][1]
    error = "" if row.error is None else f" ± {value(name, row.error):.{digits}f}"
    return f"{value(name, row.value):.{digits}f}{error}"


ROW, THUMB, LABEL, BAR = 52, 48, 190, 92


def picture(found: Mapping[str, Measured]) -> Image.Image:
    """A row for each set: what is wrong, three of its images, and a bar for each score."""
    names = [row.score for row in next(iter(found.values())).rows if row.score in SHOWN]
    names = [name for name in SHOWN if name in names]
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    left = LABEL + 3 * (THUMB + 2) + 14
    sheet = Image.new("RGB", (left + len(names) * (BAR + 10), ROW * len(found) + 28), "white")
    pen = ImageDraw.Draw(sheet)
    for k, name in enumerate(names):
        pen.text((left + k * (BAR + 10), 8), SHOWN[name][0], fill="black", font=small)
    for i, (what, measured) in enumerate(found.items()):
        top = 26 + i * ROW
        pen.text((6, top + THUMB / 2), what, fill="black", font=font, anchor="lm")
        for j, pixels in enumerate(measured.grid[1:4]):
            sheet.paste(Image.fromarray(pixels).resize((THUMB, THUMB)), (LABEL + j * (THUMB + 2), top))
        rows = {row.score: row for row in measured.rows}
        for k, name in enumerate(names):
            _bar(pen, left + k * (BAR + 10), top, rows[name], name, _longest(found, name), small)
    return sheet


def _longest(found: Mapping[str, Measured], name: str) -> float:
    """The value of the longest bar; one that is more than twice as long as all others is cut off."""
    second, highest = sorted(row.value for m in found.values() for row in m.rows if row.score == name)[-2:]
    return second if 0 < 2 * second < highest else highest


def _bar(pen: ImageDraw.ImageDraw, x: int, top: int, row: Any, name: str, highest: float, font: Any) -> None:
    scale, middle = BAR / highest if highest > 0 else 0.0, top + 18
    length = min(max(1.0, row.value * scale), BAR)
    pen.rectangle((x, middle - 8, x + length, middle + 8), fill="#4477aa")
    if row.value > highest:
        pen.line((x + BAR - 12, middle + 10, x + BAR - 6, middle - 10), fill="white", width=3)
    if row.interval is not None and row.value <= highest:
        low, high = (x + min(max(0.0, end * scale), BAR) for end in row.interval)
        pen.line((low, middle, high, middle), fill="black", width=2)
    pen.text((x, middle + 10), f"{value(name, row.value):.{SHOWN[name][1]}f}", fill="#333333", font=font)


def main(docs: Path) -> None:
    """Measure, and write the page's numbers and its picture."""
    found = study()
    (docs / "examples" / "degradations_numbers.md").write_text(table(found), encoding="utf-8")
    save_png(picture(found), docs / "images" / "degradations.png")
    print(table(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
