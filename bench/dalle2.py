"""A decoder that DALLE2-pytorch and we train from one checkpoint: its config, its data, and the sides of S3."""

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.row import NotMeasured
from bench.turns import Gate
from bench.work import ENDLESS, HeldWorld, Pictures
from eclosion.config.load import load
from eclosion.data.batch import Batch
from eclosion.data.source import Sample
from eclosion.importing import Imported, import_checkpoint
from eclosion.rundir import RunDir
from eclosion.tasks.task import DataFacts, Task
from eclosion.tasks.unclip_tier import Draws
from eclosion.training.loop import run_until_done
from eclosion.training.signals import StopSignals

__all__ = ["PEER", "Cascade", "Embedded", "Peer", "imported", "our_steps"]

# Environment variable with a Python interpreter that has the peer: it is no dependency of ours.
PEER = "ECLOSION_BENCH_DALLE2"
IMAGE_EMBED_DIM = 768  # of CLIP ViT-L/14
Facts = dict[str, Any]
# How long the peer may take to end when its input has.
LAST_SECONDS = 30
# As far as outputs and losses of order 1 may be apart, in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Cascade:
    """What is trained.

    Attributes:
        name: of the network, in the results.
        unets: all networks of the cascade, in the words of the original's config; image_embed_dim is put in.
        image_sizes: of each, in pixels.
        decoder: what else there is in that section.
        trained: which of them, from 0.
        batch_size: images per step.
    """

    name: str
    unets: list[dict[str, Any]]
    image_sizes: list[int]
    decoder: dict[str, Any]
    trained: int
    batch_size: int

    @property
    def size(self) -> int:
        """Height and width of the images that are trained on, in pixels."""
        return self.image_sizes[self.trained]

    def original_config(self) -> dict[str, Any]:
        """The config of both sides, as the peer's script reads it; its data is not read."""
        unets = [{**unet, "image_embed_dim": IMAGE_EMBED_DIM} for unet in self.unets]
        return {
            "seed": 0,
            "decoder": {"unets": unets, "image_sizes": self.image_sizes, **self.decoder},
            "data": {
                "webdataset_base_url": "unread/{}.tar",
                "img_embeddings_url": "unread",
                "batch_size": self.batch_size,
                "splits": {"train": 0.75, "val": 0.15, "test": 0.1},
            },
            "train": {"lr": 1e-4, "wd": 0.01, "warmup_steps": 500, "max_grad_norm": 0.5, "ema_beta": 0.999},
            "evaluate": {},
            "tracker": {"log": {"log_type": "console"}, "save": [{"save_to": "local", "save_latest_to": "latest.pth"}]},
        }


class Embedded:
    """Butterflies as tensors of the size that is trained on, each with an embedding that means nothing."""

    class_names: tuple[str, ...] = ()
    has_captions = False

    def __init__(self, number: int, resolution: int) -> None:
        pictures = Pictures(number, resolution)
        self.fingerprint = pictures.fingerprint
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures.images])
        self.image = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # uint8 [B, 3, H, W]
        embeds = np.random.default_rng(0).standard_normal((number, IMAGE_EMBED_DIM)).astype(np.float32)
        self.image_embed: NDArray[np.float32] = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
        self.array_shapes = {"image_embed": (IMAGE_EMBED_DIM,)}

    def __len__(self) -> int:
        return len(self.image)

    def name(self, index: int) -> str:
        """A sample's name in messages."""
        return f"picture {index}"

    def read(self, index: int) -> Sample:
        """A sample that no transform touches."""
        return Sample(self.image[index], self.name(index), arrays={"image_embed": self.image_embed[index]})

    def batch(self) -> dict[str, Tensor]:
        """All of them, images float32 in [0, 1]."""
        return {"image": self.image.float() / 255, "image_embed": torch.from_numpy(self.image_embed)}


# --------------------------------------------------------------------------------------------------------- the sides


class Peer:
    """The peer's process, which makes a step when it is told to.

    Attributes:
        folder: where it has written `checkpoint.pth` and `agreement.pt`.
        facts: what it says of itself.
    """

    def __init__(self, interpreter: str, cascade: Cascade, samples: Embedded, folder: Path) -> None:
        self.folder = folder / "peer"
        self.folder.mkdir()
        config, data = self.folder / "config.json", self.folder / "data.pt"
        config.write_text(json.dumps(cascade.original_config()), encoding="utf-8")
        torch.save(samples.batch(), data)
        script = Path(__file__).parent / "dalle2_peer.py"
        self._command = [interpreter, str(script), str(config), str(data), str(cascade.trained + 1), str(self.folder)]
        self._log = self.folder / "log.txt"
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment.pop("PYTHONPATH", None)
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
                )
            except OSError as error:
                raise NotMeasured(f"{PEER}={self._command[0]}: {error.strerror}. Give a Python interpreter.") from error
        try:
            self.facts = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def steps(self, number: int) -> tuple[float, float]:
        """Make some steps; the mean of their CPU seconds, and of their seconds on the wall."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its last words say more
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        seconds = self._answer()
        return seconds["cpu"], seconds["wall"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            if "No module named" in said:
                raise NotMeasured(
                    f"{PEER}={self._command[0]} lacks DALLE2-pytorch: {said.strip().splitlines()[-1]}. "
                    f"{self._command[0]} -m pip install dalle2-pytorch."
                )
            raise RuntimeError(f"{' '.join(self._command)} ended:\n{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def our_steps(gate: Gate, config: dict[str, Any], samples: Embedded, checkpoint: Path) -> None:
    """The loop of eclosion itself, unchanged, for ever; its gate lies between the loader and the first draw."""
    run_until_done(
        load(config).run, samples, world=HeldWorld(gate=gate), stop=StopSignals(), resume=str(checkpoint), accept=True
    )


# ------------------------------------------------------------------------------------------ from their weights to ours


def imported(cascade: Cascade, samples: Embedded, peer: Peer, folder: Path) -> tuple[dict[str, Any], Path, Facts]:
    """Our config for the peer's checkpoint, that checkpoint in our form, and what both networks have in common.

    Args:
        cascade: what is trained.
        samples: the data.
        peer: has written its checkpoint.
        folder: to be made; gets the checkpoint.

    Raises:
        RuntimeError: if the networks do not give the same numbers.
    """
    names = [f"unet_{i}" for i in range(len(cascade.unets))]
    frozen = [name for i, name in enumerate(names) if i != cascade.trained]
    found = import_checkpoint(
        peer.folder / "checkpoint.pth",
        folder,
        overrides=[
            "data.source=butterflies",
            f"data.image_size={cascade.image_sizes[-1]}",
            "data.preprocessing=null",
            "data.num_threads=0",
            f"train.freeze={json.dumps(frozen)}",
            f"train.duration={ENDLESS} steps",
            f"checkpoint.every={ENDLESS} steps",
            "validate.every=null",
            "sample.num_images=0",
            "track.every=10 steps",
            "track.log=[]",
        ],
    )
    config = json.loads(RunDir(found.folder).config.read_text(encoding="utf-8"))
    task = _task(config, samples, found)
    facts = _agreement(cascade, task, samples, peer)
    return config, RunDir(found.folder).checkpoint(found.step), facts


def _task(config: dict[str, Any], samples: Embedded, found: Imported) -> Task:
    run = load(config).run
    task: Task = run.task.build(DataFacts(size=run.data.size, arrays=samples.array_shapes))
    for network in found.networks:
        task.nets[network.name].load_state_dict(network.weights)
    return task


def _agreement(cascade: Cascade, task: Task, samples: Embedded, peer: Peer) -> Facts:
    """How far apart what both networks make of the same inputs is, and how much work they are."""
    theirs: dict[str, Tensor] = torch.load(peer.folder / "agreement.pt")
    name = f"unet_{cascade.trained}"
    net, images = task.nets[name], samples.batch()
    told = {"lowres_cond": theirs["lowres"], "lowres_noise_level": theirs["level"]} if cascade.trained else {}
    told |= {} if cascade.trained else {"image_embed": images["image_embed"]}
    with FlopCounterMode(display=False) as counter:
        output = net(theirs["noise"], theirs["t"], **told)
        output.sum().backward()
    found = {"output": float((output.detach() - theirs["output"]).abs().max())}
    if "loss" in theirs:
        keep = torch.ones(len(samples), dtype=torch.bool)
        fields = {"image": images["image"] * 2 - 1, "image_embed": images["image_embed"]}
        batch = Batch(range(len(samples)), torch.ones(len(samples)), fields)
        drawn = Draws(t=theirs["t"], noise=theirs["noise"], image_keep=keep)
        with torch.no_grad():
            found["loss"] = float((task.loss(name, batch, drawn).mean() - theirs["loss"]).abs())
    if max(found.values()) > TOLERANCE:
        raise RuntimeError(f"the two networks do not give the same numbers: {found}")
    return {
        "network": json.dumps(cascade.unets[cascade.trained]),
        "parameters": sum(p.numel() for p in net.parameters()),
        "image_size": cascade.size,
        "batch_size": cascade.batch_size,
        "our_gflop_per_step": round(counter.get_total_flops() / 1e9, 1),
        "peer_gflop_per_step": round(peer.facts["gflop_per_step"], 1),
        "largest_difference": found,
        "scale_of_outputs": float(theirs["output"].std()),
    }
