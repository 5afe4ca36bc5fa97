"""Whether this machine and this installation can train: a list of findings, and a trial."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from eclosion.checkpoint.store import CheckpointStore
from eclosion.device import environment, has_fast_bf16, pick_device
from eclosion.errors import UserError
from eclosion.rundir import RunDir
from eclosion.training.run import train

__all__ = ["Diagnosis", "Finding", "doctor"]

PACKAGES = ("eclosion", "torch", "diffusers", "safetensors", "numpy", "pillow", "pydantic")
# extra -> the library it installs, and what that is good for
EXTRAS = {
    "datasets": ("datasets", "data.source huggingface: the hub, parquet, save_to_disk folders"),
    "tensorboard": ("tensorboard", "track.log tensorboard: curves and pictures in TensorBoard"),
    "remote": ("fsspec", "shards in S3 and other remote stores"),
    "transforms": ("torchvision", "data.preprocessing by torchvision's names"),
    "clip": ("transformers", "the encoders clip, dinov2 and transformers_vision"),
    "efficientnet": ("efficientnet_lite_pytorch", "the encoder efficientnet_lite0"),
    "metrics": ("lpips", "the metric lpips, and what efficientnet gives"),
    "jpeg": ("simplejpeg", "plain JPEG files, decoded faster to the same pixels"),
}
# Less than this and not even a small run can keep its checkpoints.
LOW_DISK_BYTES = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, what was found, and whether training can do with it."""

    name: str
    text: str
    ok: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which they are shown."""

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether every finding is fine."""
        return all(finding.ok for finding in self.findings)


def doctor(*, self_test: bool = True) -> Diagnosis:
    """Look at versions, device, memory, disk and optional libraries, and try out training.

    Args:
        self_test: whether to train a tiny network for a few seconds in a temporary folder, twice: once without a
            break and once stopped and resumed. Both must end with the same bits.
    """
    findings = [*_versions(), *_machine(), *_extras()]
    if self_test:
        findings.append(_self_test())
    return Diagnosis(findings)


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, f"is not installed. Run: pip install {package}", ok=False)


def _machine() -> Iterator[Finding]:
    device = pick_device("auto")
    yield Finding("device", f"{device.type}: {environment(device)['device']}")
    precision = "yes, mixed_precision auto takes it" if has_fast_bf16(device) else "not in hardware; auto is float32"
    yield Finding("bfloat16", precision)
    yield Finding("threads", f"{torch.get_num_threads()} for arithmetic, on {os.cpu_count()} processors")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_device = f", {torch.cuda.mem_get_info()[1] / 2**30:.1f} GiB on the GPU" if device.type == "cuda" else ""
    yield Finding("memory", f"{memory / 2**30:.1f} GiB{on_device}")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", f"{free / 1e9:.1f} GB free in {Path.cwd()}", ok=free >= LOW_DISK_BYTES)


def _extras() -> Iterator[Finding]:
    for extra, (library, purpose) in EXTRAS.items():
        there = find_spec(library) is not None
        word = "installed" if there else f'not installed; pip install "eclosion[{extra}]"'
        yield Finding(f"extra {extra}", f"{word}. For {purpose}.")


def _self_test() -> Finding:
    """Train four steps; train two, stop and go on for two more; compare every file of the last checkpoints."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="eclosion-doctor-") as folder:
            whole, halves = Path(folder) / "whole", Path(folder) / "halves"
            train(_trial(whole, num_steps=4))
            train(_trial(halves, num_steps=2))
            train(_trial(halves, num_steps=4), accept_changes=True)
            different = _differences(whole, halves)
    except UserError as error:
        return Finding("self-test", str(error), ok=False)
    if different:
        return Finding(
            "self-test", f"a resumed run differs from one without a break in {', '.join(different)}.", ok=False
        )
    seconds = time.monotonic() - started
    return Finding("self-test", f"train, save and resume give the same bits ({seconds:.1f} s)")


def _trial(folder: Path, *, num_steps: int) -> dict[str, Any]:
    """A config that does everything a run does, in a fraction of a second."""
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    size = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8, "dropout": 0.1}
    return {
        "output": str(folder),
        "data": {
            "source": {"name": "butterflies", "size": 64, "resolution": 16},
            "image_size": 16,
            "horizontal_flip": True,
        },
        "task": {"model": {"preset": None, "options": size | blocks}},
        "train": {"duration": num_steps, "batch_size": 8, "micro_batch_size": 4},
        "sample": {"every": 4, "num_images": 2, "sampler": {"name": "ddim", "num_inference_steps": 2}},
        "checkpoint": {"every": 2},
        "track": {"log": []},
    }


def _differences(one: Path, other: Path) -> list[str]:
    """Files of tensors in the newest checkpoints whose content is not the same."""
    hashes = [
        {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")}
        for manifest in (CheckpointStore(RunDir(run)).load(4).manifest for run in (one, other))
    ]
    return sorted(name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name))
