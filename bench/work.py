"""The work that is measured: networks, configs and pictures, the same for both sides."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.turns import Gate
from eclosion.config.load import load
from eclosion.data.butterflies import ButterfliesSource
from eclosion.data.source import Sample
from eclosion.device import autocast, pick_precision
from eclosion.training.distributed import World
from eclosion.training.loop import run_until_done
from eclosion.training.signals import StopSignals

__all__ = [
    "COMPUTE_BOUND",
    "CPU",
    "ENDLESS",
    "SMOKE",
    "TINY",
    "HeldWorld",
    "Network",
    "Pictures",
    "bare_steps",
    "facts",
    "gflop",
    "grainy_jpegs",
    "our_config",
    "our_steps",
    "our_work",
    "scratch_folder",
]

CPU = torch.device("cpu")
# More steps than any measurement makes: so no run here reaches its end, where everything is due at once.
ENDLESS = 1_000_000
# So that a drawing compresses about as badly as a photograph: standard deviation, of 255.
GRAIN = 6.0


@dataclass(frozen=True)
class Network:
    """A UNet2DModel and the batch it is measured with.

    Attributes:
        name: in the results.
        options: of UNet2DModel, `sample_size` left out.
        image_size: pixels in height and width.
        batch_size: images per step.
    """

    name: str
    options: dict[str, Any]
    image_size: int
    batch_size: int

    def build(self) -> nn.Module:
        """The network with the same random weights each time, in training mode."""
        from diffusers import UNet2DModel  # slow to import, and not every row needs it here

        torch.manual_seed(0)
        return UNet2DModel(sample_size=self.image_size, in_channels=3, out_channels=3, **self.options).train()


# The network of the Hugging Face tutorial with half its channels: 28.4 M parameters.
COMPUTE_BOUND = Network(
    "28 M",
    {
        "block_out_channels": (64, 64, 128, 128, 256, 256),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        "layers_per_block": 2,
    },
    image_size=64,
    batch_size=4,
)
# The same with a sixteenth of the channels at 16 px: nearly all of a step is Python and calls into torch.
TINY = Network(
    "tiny",
    {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 4,
    },
    image_size=16,
    batch_size=4,
)
# For smoke tests.
SMOKE = Network(
    "smoke",
    {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    image_size=16,
    batch_size=2,
)


class Pictures:
    """Butterflies, drawn beforehand at the size that the network sees, so that no side pays for decoding."""

    class_names: tuple[str, ...] = ()
    has_captions = False

    def __init__(self, number: int, resolution: int) -> None:
        source = ButterfliesSource(size=number, resolution=resolution).open()
        self.fingerprint = source.fingerprint
        self.images: list[Image] = [source.read(i).image for i in range(number)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """A sample's name in messages."""
        return f"picture {index}"

    def read(self, index: int) -> Sample:
        """A sample, decoded already."""
        return Sample(self.images[index], self.name(index))


def grainy_jpegs(number: int, resolution: int) -> list[bytes]:
    """Butterflies with grain, as JPEG files of photographic size."""
    source = ButterfliesSource(size=number, resolution=resolution).open()
    rng = np.random.default_rng(0)
    files = []
    for i in range(number):
        drawn = np.asarray(source.read(i).image, np.float32)
        grainy = np.clip(drawn + rng.normal(0, GRAIN, drawn.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        fromarray(grainy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="eclosion-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def our_config(
    output: Path,
    network: Network,
    *,
    precision: str = "no",
    num_threads: int | None = 0,
    log_every: int = 10,
    source: dict[str, Any] | None = None,
    duration: str = f"{ENDLESS} steps",
) -> dict[str, Any]:
    """A native config that does what the peer's script does by default, with an EMA.

    Args:
        output: the run folder.
        network: the network and its batch.
        precision: as in `train.mixed_precision`.
        num_threads: of the loader; None takes our default.
        log_every: steps between two log lines.
        source: as in `data.source`; unused by runs that are given their samples.
        duration: as in `train.duration`.
    """
    data: dict[str, Any] = {"source": source or {"name": "butterflies"}, "image_size": network.image_size}
    if num_threads is not None:
        data["num_threads"] = num_threads
    return {
        "output": str(output),
        "data": data,
        "task": {
            "model": {"preset": None, "options": {k: _plain(v) for k, v in network.options.items()}},
            "noise_schedule": "linear",
            "prediction_type": "epsilon",
        },
        "train": {"duration": duration, "batch_size": network.batch_size, "mixed_precision": precision},
        "optimizer": {
            "learning_rate": 1e-4,
            "betas": [0.95, 0.999],
            "weight_decay": 1e-6,
            "lr_schedule": "cosine",
            "lr_warmup_steps": 500,
        },
        "ema": {"decays": [0.9999]},
        "sample": {"every": f"{ENDLESS} steps", "num_images": 0},
        "checkpoint": {"every": f"{ENDLESS} steps"},
        "track": {"every": f"{log_every} steps", "log": []},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class HeldWorld(World):
    """What the loop asks once per step whether it shall stop; here it asks whose turn it is."""

    gate: Gate | None = None

    def agree_to_stop(self, stop: StopSignals) -> None:
        """Wait for the next turn."""
        assert self.gate is not None
        self.gate()


def our_steps(gate: Gate, config: dict[str, Any], pictures: Pictures) -> None:
    """The loop of eclosion itself, unchanged, for ever; its gate lies between the loader and the first draw."""
    run_until_done(load(config).run, pictures, world=HeldWorld(gate=gate), stop=StopSignals())


def bare_steps(gate: Gate, network: Network, precision: str) -> None:
    """Forward and backward on tensors that lie ready, for ever: what no trainer can save."""
    net = network.build()
    x, noise, t = _inputs(network)
    resolved = pick_precision(precision, CPU)
    while True:
        gate()
        with autocast(CPU, resolved):
            loss = nn.functional.mse_loss(net(x, t, return_dict=False)[0].float(), noise)
        loss.backward()
        for p in net.parameters():
            p.grad = None


def _inputs(network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy image and noise, float32 [B, 3, H, W], and timesteps, int64 [B]."""
    shape = (network.batch_size, 3, network.image_size, network.image_size)
    return torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, shape[:1])


def gflop(network: Network) -> float:
    """Floating-point operations of one forward and backward pass over a batch, in units of 1e9."""
    x, noise, t = _inputs(network)
    net = network.build()
    with FlopCounterMode(display=False) as counter:
        nn.functional.mse_loss(net(x, t, return_dict=False)[0], noise).backward()
    return counter.get_total_flops() / 1e9


def facts(network: Network) -> dict[str, Any]:
    """What both sides have in common."""
    parameters = sum(p.numel() for p in network.build().parameters())
    return {
        "network": f"UNet2DModel {network.options['block_out_channels']}",
        "parameters": parameters,
        "gflop_per_step": round(gflop(network), 3),
        "image_size": network.image_size,
        "batch_size": network.batch_size,
    }


def our_work(precision: str, num_threads: int | None, log_every: int) -> dict[str, Any]:
    """What our side does in each step."""
    return {
        "dtype": {"no": "fp32"}.get(name := pick_precision(precision, CPU), name),
        "optimizer": "AdamW, fused",
        "clip": 1.0,
        "ema": "every step",
        "lr_schedule": "cosine, 500 steps of warm-up",
        "draws": "keyed by position, one generator per image",
        "loader": f"{2 if num_threads is None else num_threads} threads, their CPU time counted",
        "log": f"metrics.jsonl every {log_every} steps",
    }
