"""S11: from the start of a process to the end of its first step."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from bench.machine import Contention
from bench.row import Goal, Row, Spread
from bench.work import SMOKE, TINY, Network, Pictures, facts, our_config, our_work, scratch_folder
from eclosion.rundir import RunDir

__all__ = ["startup"]

GOAL = Goal(0.5, 0.3)
NUM_PICTURES = 32
LIMIT_SECONDS = 300


def startup(*, quick: bool) -> Iterator[Row]:
    """Both processes in turns, without and with the picture that ours makes of itself before it begins."""
    network = SMOKE if quick else TINY
    with scratch_folder() as folder:
        images = _folder(folder / "images", network)
        for precision, num_images, comparison in [
            ("no", 0, "same work, fp32, no preview"),
            ("auto", 16, "our defaults (bf16, preview of 16 images first) against theirs"),
        ]:
            yield _row(folder, images, network, precision, num_images, comparison, quick)
            if quick:
                return


def _row(
    folder: Path, images: Path, network: Network, precision: str, num_images: int, comparison: str, quick: bool
) -> Row:
    warmups, rounds = (0, 1) if quick else (2, 7)
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    contention = Contention.begin()
    for i in range(warmups + rounds):
        ours = _our_command(folder / f"ours-{num_images}-{i}", images, network, precision, num_images)
        peer = _peer_command(folder / f"peer-{num_images}-{i}", images, network)
        for side, (command, sign) in {"ours": ours, "peer": peer}.items():
            seconds[side].append(_first_step(command, sign, folder))
    timed = {side: values[warmups:] for side, values in seconds.items()}
    spreads = {
        side: {"cpu": Spread(tuple(c for c, _ in values)), "wall": Spread(tuple(w for _, w in values))}
        for side, values in timed.items()
    }
    return Row(
        row="S11",
        case=f"{network.name}, {network.image_size} px, batch {network.batch_size}",
        comparison=comparison,
        measured="from the start of the process until its first step is done",
        result_is="our time over the peer's",
        result=spreads["ours"]["wall"].median / spreads["peer"]["wall"].median,
        clock="wall",
        ours=spreads["ours"],
        peer=spreads["peer"],
        work={
            "both": facts(network),
            "ours": our_work(precision, None, 1) | {"command": "python -m eclosion train", "preview": num_images},
            "peer": {"command": "bench/peer_script.py", "dtype": "fp32"},
        },
        load=contention.end(),
        goal=GOAL,
        extra={"cpu_result": spreads["ours"]["cpu"].median / spreads["peer"]["cpu"].median},
        notes=["The peer imports what its script imports, but for accelerate, which would make it slower."],
        quick=quick,
    )


def _our_command(
    output: Path, images: Path, network: Network, precision: str, num_images: int
) -> tuple[list[str], Path]:
    """What starts our side, and the file that appears with its first step."""
    source = {"name": "folder", "root": str(images)}
    config = our_config(output, network, precision=precision, num_threads=None, log_every=1, source=source)
    config["sample"]["num_images"] = num_images
    config["track"]["log"] = ["console"]
    path = output.with_suffix(".json")
    path.write_text(json.dumps(config), encoding="utf-8")
    return [sys.executable, "-m", "eclosion", "train", str(path)], RunDir(output).metrics


def _peer_command(output: Path, images: Path, network: Network) -> tuple[list[str], Path]:
    script = Path(__file__).parent / "peer_script.py"
    options = json.dumps({**network.options, "sample_size": network.image_size})
    return [sys.executable, str(script), str(images), options, str(network.batch_size), str(output)], output


def _first_step(command: Sequence[str], sign: Path, home: Path) -> tuple[float, float]:
    """Start a process, wait for the file that its first step writes, and end it.

    Returns:
        CPU seconds until it was ended, and seconds on the wall until the file was seen.
    """
    environment = os.environ | {"HF_HOME": str(home / "huggingface"), "HF_HUB_OFFLINE": "1"}
    log = home / "output.txt"
    cpu = _children_cpu()
    with log.open("wb") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            while not sign.exists() or not sign.stat().st_size:
                if process.poll() is not None or time.perf_counter() - began > LIMIT_SECONDS:
                    raise RuntimeError(f"{' '.join(command)} made no step:\n{log.read_text()[-2000:]}")
                time.sleep(0.002)
            wall = time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
    return _children_cpu() - cpu, wall


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _folder(path: Path, network: Network) -> Path:
    """Pictures as PNG files."""
    path.mkdir()
    images: list[Image.Image] = Pictures(NUM_PICTURES, network.image_size).images
    for i, image in enumerate(images):
        image.save(path / f"{i:03d}.png")
    return path
