"""Curves and pictures for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboard  # noqa: F401  (torch's writer needs it; named here so that its absence is told as such)
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

from eclosion.registry import part
from eclosion.rundir import RunDir

__all__ = ["TensorBoardLogger"]


@part
class TensorBoardLogger:
    """Event files in the run folder; look at them with `tensorboard --logdir RUN`."""

    def open(self) -> "EventFiles":
        """Ready to start."""
        return EventFiles()


class EventFiles:
    """Writes TensorBoard's event files."""

    def start(self, run: RunDir, config: Mapping[str, Any], *, num_steps: int, step: int) -> None:
        """Begin, or go on after `step` updates; what stands behind them is hidden."""
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1, flush_secs=10)

    def log(self, numbers: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """One point per curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, path: Path, *, step: int) -> None:
        """A picture under "samples"."""
        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Lines of text are for the terminal."""

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()
