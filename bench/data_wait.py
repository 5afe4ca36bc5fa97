"""S5: how much of the time of a real run goes into waiting for data, from a folder of JPEGs."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import peer
from bench.machine import Contention
from bench.row import Goal, Row, Spread
from bench.work import COMPUTE_BOUND, SMOKE, Network, facts, grainy_jpegs, our_config, our_work, scratch_folder
from eclosion import train
from eclosion.rundir import RunDir

__all__ = ["data_wait"]

GOAL = Goal(0.01, 0.003)


@dataclass(frozen=True)
class Plan:
    """How much is trained: `num_images` files of `resolution` pixels, seen `num_epochs` times."""

    network: Network
    num_images: int
    resolution: int
    num_epochs: int = 2


FULL = Plan(COMPUTE_BOUND, num_images=64, resolution=512)
QUICK = Plan(SMOKE, num_images=4, resolution=64)


@dataclass(frozen=True)
class _Step:
    """Seconds of one step, and how many of them were spent waiting for its batch."""

    seconds: float
    waited: float


def data_wait(*, quick: bool) -> Iterator[Row]:
    """The first epoch, which decodes, and a later one, which finds small pictures in memory."""
    plan = QUICK if quick else FULL
    with scratch_folder() as folder:
        files = _jpegs(folder / "images", plan)
        for precision, comparison in [("no", "same dtype, fp32"), ("auto", "our defaults against theirs")]:
            contention = Contention.begin()
            ours = _our_epochs(folder / f"run-{precision}", folder / "images", plan, precision)
            theirs = _peer_epochs(files, plan)
            load = contention.end()
            for i, epoch in [(0, "first epoch"), (plan.num_epochs - 1, "later epoch")]:
                yield _row(plan, precision, f"{comparison}, {epoch}", ours[i], theirs[i], load, files, quick)


def _row(
    plan: Plan,
    precision: str,
    comparison: str,
    ours: Sequence[_Step],
    theirs: Sequence[_Step],
    load: dict[str, Any],
    files: Sequence[Path],
    quick: bool,
) -> Row:
    network = plan.network
    return Row(
        row="S5",
        case=f"{network.name}, JPEG {plan.resolution} px -> {network.image_size} px, batch {network.batch_size}",
        comparison=comparison,
        measured="waiting for the batch of one step",
        result_is="share of our time that is spent waiting for data",
        result=_share(ours),
        unit="share",
        clock="wall",
        ours={"wall": Spread(tuple(step.waited for step in ours))},
        peer={"wall": Spread(tuple(step.waited for step in theirs))},
        work={
            "both": facts(network) | {"files": len(files), "mean_bytes": _mean_bytes(files)},
            "ours": our_work(precision, None, 1),
            "peer": peer.peer_work("no", pictures="decoded from their files each time"),
        },
        load=load,
        goal=GOAL,
        extra={
            "peer_share": _share(theirs),
            "our_step_seconds": Spread(tuple(step.seconds for step in ours)).as_dict(),
            "peer_step_seconds": Spread(tuple(step.seconds for step in theirs)).as_dict(),
        },
        notes=[
            "A whole run of eclosion.train; the share is perf/data_wait of metrics.jsonl, weighted by time.",
            "A run hides its reading behind its own steps, so the sides run one after the other, not in turns.",
        ],
        quick=quick,
    )


def _our_epochs(output: Path, images: Path, plan: Plan, precision: str) -> list[list[_Step]]:
    """A run with the loader as it is by default, cut into epochs."""
    batch_size = plan.network.batch_size
    config = our_config(
        output,
        plan.network,
        precision=precision,
        num_threads=None,
        log_every=1,
        source={"name": "folder", "root": str(images)},
        duration=f"{plan.num_epochs} epochs",
    )
    lines = [json.loads(line) for line in RunDir(train(config)).metrics.read_text().splitlines()]
    steps = []
    for line in lines:
        seconds = batch_size / line["perf/images_per_second"]
        steps.append(_Step(seconds, line["perf/data_wait"] * seconds))
    return _cut(steps, plan)


def _peer_epochs(files: Sequence[Path], plan: Plan) -> list[list[_Step]]:
    """The peer's loop over the same files, cut into epochs."""
    network = plan.network
    clock = _Clocked(peer.loader(files, network.image_size, network.batch_size))
    peer.train(network.build(), clock, precision="no", num_epochs=plan.num_epochs)
    return _cut(clock.steps, plan)


class _Clocked:
    """Batches, and how long each was waited for and worked on."""

    def __init__(self, batches: Iterable[peer.Batch]) -> None:
        self._batches = batches
        self.steps: list[_Step] = []

    def __iter__(self) -> Iterator[peer.Batch]:
        began = time.perf_counter()
        for batch in self._batches:
            arrived = time.perf_counter()
            yield batch
            now = time.perf_counter()
            self.steps.append(_Step(now - began, arrived - began))
            began = now


def _cut(steps: Sequence[_Step], plan: Plan) -> list[list[_Step]]:
    length = plan.num_images // plan.network.batch_size
    return [list(steps[i * length : (i + 1) * length]) for i in range(plan.num_epochs)]


def _share(steps: Sequence[_Step]) -> float:
    return sum(step.waited for step in steps) / sum(step.seconds for step in steps)


def _jpegs(folder: Path, plan: Plan) -> list[Path]:
    """Butterflies with grain, as files of photographic size."""
    folder.mkdir()
    files = []
    for i, jpeg in enumerate(grainy_jpegs(plan.num_images, plan.resolution)):
        files.append(path := folder / f"{i:05d}.jpg")
        path.write_bytes(jpeg)
    return files


def _mean_bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files) // len(files)
