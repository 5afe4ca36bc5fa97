"""How far the standard errors of scores can be trusted, and those of a bootstrap: `python docs/interval_study.py docs`.

Writes explanation/uncertainty_numbers.md. Butterflies are drawn, so there are as many as one likes, and how a score
spreads from draw to draw can be seen. Features are brought to few numbers, so that it takes minutes.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from eclosion.config.schema import DataConfig
from eclosion.data.butterflies import ButterfliesSource
from eclosion.evaluation.images import Seen
from eclosion.evaluation.makers import Features
from eclosion.evaluation.real import DataImages
from eclosion.evaluation.rows import rows_of
from eclosion.metrics.metric import Evidence, Metric, Moments, Reference, Score
from eclosion.models.encoders import EfficientNetLite0Encoder
from eclosion.registry import build

POOL, DIM = 4000, 64
NUM_IMAGES, NUM_DRAWS, NUM_RESAMPLES = 250, 100, 200
SHOWN = {"kid": "KID", "fid": "FID", "precision": "precision", "recall": "recall", "coverage": "coverage"}
BLUR = 0.7


class Blurred:
    """Images with their details taken off."""

    def __init__(self, images: DataImages) -> None:
        """All of them."""
        self._images = images
        self.name, self.fingerprint = "blurred", f"{images.fingerprint} blurred"
        self.facts, self.brings = images.facts, images.brings

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Any) -> Seen:
        pictures = self._images.read(indices).pixels.permute(0, 2, 3, 1).numpy()
        changed = [np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(BLUR))) for p in pictures]
        return Seen(torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous(), [str(i) for i in indices])


def pools(size: int) -> dict[str, Tensor]:
    """Features of many images to draw from, float64 [size, DIM]: real ones, others, and those blurred."""
    look = Features(EfficientNetLite0Encoder().build(), torch.device("cpu"))

    def butterflies(seed: int) -> DataImages:
        source = ButterfliesSource(size=size, seed=seed)
        return DataImages(source.open(), DataConfig(source=source, image_size=64), name=f"butterflies, seed {seed}")

    images = {"real": butterflies(1), "others": butterflies(2), "blurred": Blurred(butterflies(3))}
    rows = {name: rows_of(one, {"features": look}, batch_size=32)["features"].double() for name, one in images.items()}
    middle = rows["real"].mean(0)
    axes = torch.linalg.eigh((rows["real"] - middle).T @ (rows["real"] - middle)).eigenvectors[:, -DIM:]
    return {name: (one - middle) @ axes for name, one in rows.items()}


@dataclass
class Draws:
    """What one score was in each draw.

    Attributes:
        values: the score.
        errors, resampled: its standard error, and the spread over resamples.
        intervals, percentiles: its 95 % interval, and that of the resamples.
    """

    values: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    resampled: list[float] = field(default_factory=list)
    intervals: list[tuple[float, float]] = field(default_factory=list)
    percentiles: list[tuple[float, float]] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """From draw to draw."""
        return float(np.std(self.values, ddof=1))

    def held(self, intervals: list[tuple[float, float]]) -> float:
        """The share of intervals that hold the mean over draws."""
        mean = np.mean(self.values)
        return float(np.mean([low <= mean <= high for low, high in intervals]))


def scores(metrics: list[Metric], made: Tensor, reference: Tensor) -> dict[str, Score]:
    """All scores of some features against others."""
    evidence = Evidence(made=made, reference=Reference(Moments.of(reference), reference))
    return {name: score for metric in metrics for name, score in metric.scores(evidence).items()}


def study(real: Tensor, made: Tensor, *, count: int, draws: int, resamples: int) -> dict[str, Draws]:
    """Draw `count` images of each kind again and again, and resample each draw with replacement."""
    metrics, rng = [build("metrics", name) for name in ("kid", "fid", "precision_recall")], np.random.default_rng(0)
    found: dict[str, Draws] = defaultdict(Draws)

    def pick(rows: Tensor, *, replace: bool) -> Tensor:
        return rows[torch.from_numpy(rng.choice(len(rows), count, replace=replace))]

    for _ in range(draws):
        ours, theirs = pick(made, replace=False), pick(real, replace=False)
        again = [scores(metrics, pick(ours, replace=True), pick(theirs, replace=True)) for _ in range(resamples)]
        for name, score in scores(metrics, ours, theirs).items():
            if name not in SHOWN:
                continue
            assert score.error is not None
            assert score.interval is not None
            values = [one[name].value for one in again]
            low, high = np.percentile(values, [2.5, 97.5])
            one = found[name]
            one.values.append(score.value)
            one.errors.append(score.error)
            one.resampled.append(float(np.std(values, ddof=1)))
            one.intervals.append(score.interval)
            one.percentiles.append((float(low), float(high)))
    return found


def lines(what: str, found: dict[str, Draws]) -> Iterator[str]:
    """A row of the table for each score."""
    for name, title in SHOWN.items():
        one = found[name]
        ours, theirs = np.mean(one.errors) / one.spread, np.mean(one.resampled) / one.spread
        held = [f"{100 * one.held(ends):.0f} %" for ends in (one.intervals, one.percentiles)]
        yield f"| {title} | {what} | {ours:.2f} | {held[0]} | {theirs:.2f} | {held[1]} |"


def main(docs: Path) -> None:
    """Draw, and write the table of the page."""
    rows = pools(POOL)
    table = [
        "| score | images | standard error / spread | interval holds | bootstrap's / spread | its interval holds |",
        "|---|---|---|---|---|---|",
    ]
    for what in ("others", "blurred"):
        found = study(rows["real"], rows[what], count=NUM_IMAGES, draws=NUM_DRAWS, resamples=NUM_RESAMPLES)
        table += lines("real" if what == "others" else what, found)
    text = "\n".join(table) + "\n"
    (docs / "explanation" / "uncertainty_numbers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
