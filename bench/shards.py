"""S4: tar shards through our source and loader, against webdataset's own pipeline."""

import gc
import io
import json
import math
import multiprocessing
import resource
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bench import webdataset_peer as peer
from bench.machine import Contention, wait_until_idle
from bench.row import Clock, Goal, Row, Spread
from bench.turns import idle_helpers_cpu
from bench.work import grainy_jpegs, scratch_folder
from eclosion.config.schema import DataConfig
from eclosion.data import jpeg
from eclosion.data.batch import Batch
from eclosion.data.loader import CHUNK, Loader
from eclosion.data.webdataset import WebDatasetSamples, WebDatasetSource

__all__ = ["shards"]

RAW_GOAL = Goal(8, 15, lower_is_better=False)
SMALL_GOAL = Goal(5, 7, lower_is_better=False)
LARGE_GOAL = Goal(2.2, 2.7, lower_is_better=False)
IMAGE_SIZE = 64
# Threads on our side, processes on the other.
NUM_WORKERS = 2
# Seconds that each comparison waits until the load of the one before has passed.
PATIENCE_SECONDS = 180
# Batches whose pixels are compared before anything is measured.
NUM_COMPARED = 4
# Spreads are in seconds per so many samples.
PER = 1000

PREPROCESS = get_args(peer.Preprocess)
# Goes through some samples once; returns how many, when nothing is under way any more.
Pass = Callable[[], int]


@dataclass(frozen=True)
class Plan:
    """How much is read.

    Attributes:
        small, large: shards, and samples in each, of images at 64 and at 512 pixels.
        num_pictures: different images at either size; samples repeat them.
        raw_passes: times that a round goes through the small images if they are not decoded.
        batch_size: images in a batch; it divides what each worker gets.
        warmups, rounds: before measuring, and measured.
    """

    small: tuple[int, int]
    large: tuple[int, int]
    num_pictures: int
    raw_passes: int
    batch_size: int
    warmups: int
    rounds: int


FULL = Plan((8, 1024), (4, 192), num_pictures=64, raw_passes=6, batch_size=64, warmups=2, rounds=7)
QUICK = Plan((2, 32), (2, 16), num_pictures=4, raw_passes=1, batch_size=16, warmups=1, rounds=2)


@dataclass(frozen=True)
class _Shards:
    """Shards in a folder.

    Attributes:
        folder: where they lie.
        num_shards, num_samples: how many they are, and how many samples they hold together.
        resolution: height and width of the images.
        suffixes: of the members of each sample.
        mean_bytes: of an image.
    """

    folder: Path
    num_shards: int
    num_samples: int
    resolution: int
    suffixes: tuple[str, ...]
    mean_bytes: int

    @property
    def paths(self) -> list[str]:
        """All shards, in their order."""
        return [str(self.folder / f"{number:05d}.tar") for number in range(self.num_shards)]

    @property
    def source(self) -> WebDatasetSource:
        """What reads them on our side."""
        return WebDatasetSource(webdataset_base_url=str(self.folder / "{}.tar"), shard_width=5)

    def facts(self) -> dict[str, Any]:
        """What both sides read."""
        return {
            "shards": self.num_shards,
            "samples": self.num_samples,
            "members": list(self.suffixes),
            "image_px": self.resolution,
            "mean_image_bytes": self.mean_bytes,
        }


def shards(*, quick: bool) -> Iterator[Row]:
    """Without decoding, then decoded at their size, then decoded at eight times the size that is wanted."""
    plan = QUICK if quick else FULL
    with scratch_folder() as folder:
        small = grainy_jpegs(plan.num_pictures, IMAGE_SIZE)
        pairs = _write(folder / "small", plan.small, IMAGE_SIZE, small, ("jpg", "txt"))
        triples = _write(folder / "triples", plan.small, IMAGE_SIZE, small, ("jpg", "txt", "json"))
        yield _raw_row(plan, triples, "same shards, of which ours leaves out the .json", quick)
        yield _raw_row(plan, pairs, "same members", quick)
        for num_workers in (0, NUM_WORKERS):
            for preprocess in PREPROCESS:
                yield _batch_row(plan, pairs, "exact", num_workers, preprocess, "cpu", SMALL_GOAL, "same decode", quick)
        resolution = 8 * IMAGE_SIZE
        large = grainy_jpegs(plan.num_pictures, resolution)
        photos = _write(folder / "large", plan.large, resolution, large, ("jpg", "txt"))
        defaults = "our defaults against theirs"
        for preprocess in PREPROCESS:
            yield _batch_row(plan, photos, "exact", NUM_WORKERS, preprocess, "wall", None, "same decode", quick)
            yield _batch_row(plan, photos, "scaled", NUM_WORKERS, preprocess, "wall", LARGE_GOAL, defaults, quick)


def _raw_row(plan: Plan, data: _Shards, comparison: str, quick: bool) -> Row:
    """Contents of members, in the order of the shards, in the thread that asks."""
    opening = _opening(data)
    samples = data.source.open()
    contention = _begin(quick)
    sides: dict[str, Pass] = {
        "ours": lambda: _read_all(samples, plan.raw_passes),
        "peer": lambda: sum(1 for _ in range(plan.raw_passes) for _ in peer.raw(data.paths)),
    }
    seconds = _in_turns(sides, plan, plan.raw_passes * data.num_samples)
    samples.close()
    return _row(
        case=f"{data.resolution} px, {' + '.join(data.suffixes)}, not decoded",
        comparison=comparison,
        clock="cpu",
        seconds=seconds,
        work={
            "both": data.facts() | {"order": "of the shards", "workers": 0},
            "ours": {"reads": f"as the loader does, {CHUNK} samples at a time: images' bytes, captions as text"},
            "peer": {"pipeline": "WebDataset(shards, shardshuffle=False): all members' bytes"},
        },
        contention=contention,
        goal=RAW_GOAL,
        extra=opening,
        notes=["Our index is made before, once for each shard, and kept beside it: see index_seconds."],
        quick=quick,
    )


def _batch_row(
    plan: Plan,
    data: _Shards,
    decode: str,
    num_workers: int,
    preprocess: peer.Preprocess,
    clock: Clock,
    goal: Goal | None,
    comparison: str,
    quick: bool,
) -> Row:
    """Batches of decoded images with their captions."""
    config = DataConfig(
        source=data.source,
        image_size=IMAGE_SIZE,
        decode=decode,
        shuffle=False,
        cache_gb=0,
        num_threads=num_workers,
    )
    agreement = _agreement(plan, data, config, preprocess)
    contention = _begin(quick)
    seconds = _batches_in_turns(plan, data, config, preprocess)
    where = f"{num_workers} threads against {num_workers} processes" if num_workers else "in the training thread"
    return _row(
        case=f"JPEG {data.resolution} px -> batch of {plan.batch_size} at {IMAGE_SIZE} px, {where}",
        comparison=f"{comparison}; theirs by {preprocess}",
        clock=clock,
        seconds=seconds,
        work={
            "both": data.facts()
            | {
                "order": "of the shards",
                "batch": f"float32 [{plan.batch_size}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] in [-1, 1], and captions",
                "filter": "bicubic, antialiased; centre crop",
                "workers": num_workers,
            }
            | agreement,
            "ours": {
                "decode": decode,
                "decoder": "simplejpeg" if jpeg.is_used() else "Pillow",
                "loader": f"{num_workers} threads",
                "kept_in_memory": "nothing",
            },
            "peer": {
                "decode": "exact",
                "loader": f"DataLoader, {num_workers} processes, persistent",
                "decoder": "Pillow",
                "pipeline": f'WebDataset.decode("pil").to_tuple.map_tuple.batched; {preprocess}',
            },
        },
        contention=contention,
        goal=goal,
        extra={},
        notes=[
            "CPU time is that of all threads and worker processes.",
            "Ours keeps decoded images in memory by default, which makes later epochs cheap; here it may not.",
        ],
        quick=quick,
    )


def _row(
    *,
    case: str,
    comparison: str,
    clock: Clock,
    seconds: Mapping[str, Mapping[str, Spread]],
    work: Mapping[str, Any],
    contention: Contention,
    goal: Goal | None,
    extra: Mapping[str, Any],
    notes: Sequence[str],
    quick: bool,
) -> Row:
    ours, theirs = seconds["ours"], seconds["peer"]
    ratios = {name: theirs[name].median / ours[name].median for name in ("cpu", "wall")}
    per_second = {
        f"{side}_samples_per_{name}_second": round(PER / spreads[name].median)
        for side, spreads in seconds.items()
        for name in ("cpu", "wall")
    }
    return Row(
        row="S4",
        case=case,
        comparison=comparison,
        measured=f"{PER} samples",
        result_is="the peer's time over ours",
        result=ratios[clock],
        clock=clock,
        ours=ours,
        peer=theirs,
        work=work,
        load=contention.end(),
        goal=goal,
        extra={"cpu_result": ratios["cpu"], "wall_result": ratios["wall"], **per_second, **extra},
        notes=notes,
        quick=quick,
    )


# ------------------------------------------------------------------------------------------------------- the sides


def _read_all(samples: WebDatasetSamples, passes: int) -> int:
    number = 0
    for _ in range(passes):
        for start in range(0, len(samples), CHUNK):
            indices = range(start, min(start + CHUNK, len(samples)))
            together = samples.read_together(indices)
            number += sum(1 for index in indices if together.get(index) or samples.read(index))
    return number


def _opening(data: _Shards) -> dict[str, float]:
    """Seconds on the wall to open the shards for the first time, and once their index is kept."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        data.source.open().close()
        seconds.append(time.perf_counter() - began)
    return {"index_seconds": seconds[0], "open_seconds": seconds[1]}


def _batches_in_turns(
    plan: Plan, data: _Shards, config: DataConfig, preprocess: peer.Preprocess
) -> dict[str, dict[str, Spread]]:
    """The loader's threads and the peer's processes live from the first round to the last."""
    samples = data.source.open()
    theirs = _PeerPass(
        peer.batches(
            data.paths,
            image_size=IMAGE_SIZE,
            batch_size=plan.batch_size,
            num_workers=config.num_threads,
            preprocess=preprocess,
        )
    )
    with closing(Loader(samples, config, seed=0, batch_size=plan.batch_size).steps(0)) as steps:

        def ours() -> int:
            taken = islice(steps, data.num_samples // plan.batch_size)
            number = sum(len(batch) for step in taken for batch in step)
            idle_helpers_cpu()  # the steps that are got ready for the next round belong to this one
            return number

        # the peer first: its processes begin as copies of this one, which should have no other threads then
        seconds = _in_turns({"peer": theirs, "ours": ours}, plan, data.num_samples)
    samples.close()
    theirs.close()
    return seconds


class _PeerPass:
    """Batches of one epoch after the other, counted; and the end of the processes that make them."""

    def __init__(self, batches: peer.Batches) -> None:
        self._batches = batches

    def __call__(self) -> int:
        return sum(len(images) for images, _ in self._batches)

    def close(self) -> None:
        self._batches = ()
        gc.collect()
        for process in multiprocessing.active_children():
            process.join()


def _agreement(plan: Plan, data: _Shards, config: DataConfig, preprocess: peer.Preprocess) -> dict[str, Any]:
    """How the pixels of both sides compare.

    Raises:
        RuntimeError: if the captions differ, or both decode exactly and the pixels do.
    """
    samples = data.source.open()
    loader = Loader(samples, config, seed=0, batch_size=plan.batch_size)
    theirs = peer.batches(
        data.paths, image_size=IMAGE_SIZE, batch_size=plan.batch_size, num_workers=0, preprocess=preprocess
    )
    signal_to_noise: list[float] = []
    with closing(loader.steps(0)) as steps:
        for (batch,), (images, captions) in islice(zip(steps, theirs, strict=False), NUM_COMPARED):
            if batch["caption"] != captions or (config.decode == "exact" and not torch.equal(batch["image"], images)):
                raise RuntimeError("the two sides do not do the same work")
            signal_to_noise += _psnr(batch, images)
    samples.close()
    if config.decode == "exact":
        return {"agreement": "pixels are equal, bit for bit"}
    return {"agreement": "pixels differ", "least_psnr_db": round(min(signal_to_noise), 1)}


def _psnr(batch: Batch, images: Tensor) -> list[float]:
    """Peak signal to noise ratio of each image, in dB; the peak of [-1, 1] is 2."""
    errors = (batch["image"] - images).square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(4 / error) if error else math.inf for error in errors]


# -------------------------------------------------------------------------------------------------------- the clocks


def _begin(quick: bool) -> Contention:
    if not quick:
        wait_until_idle(PATIENCE_SECONDS)
    return Contention.begin()


def _in_turns(sides: Mapping[str, Pass], plan: Plan, num_samples: int) -> dict[str, dict[str, Spread]]:
    """Seconds per `PER` samples, by side and clock; who comes first changes from round to round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(plan.warmups + plan.rounds):
        for name in reversed(names) if i % 2 else names:
            value = _timed(sides[name], num_samples)
            if i >= plan.warmups:
                seconds[name].append(value)
    return {
        name: {"cpu": Spread(tuple(c for c, _ in values)), "wall": Spread(tuple(w for _, w in values))}
        for name, values in seconds.items()
    }


def _timed(side: Pass, num_samples: int) -> tuple[float, float]:
    """Seconds per `PER` samples: of the processor, in all threads and processes, and on the wall."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    number = side()
    seconds = _cpu_seconds() - cpu, time.perf_counter() - wall
    if number != num_samples:
        raise RuntimeError(f"a pass gave {number} samples, and there are {num_samples}")
    return seconds[0] * PER / number, seconds[1] * PER / number


def _cpu_seconds() -> float:
    """CPU seconds of this process, and of its children, whether they run or have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = sum(time.clock_gettime(_clock_of(child.pid)) for child in multiprocessing.active_children() if child.pid)
    return time.process_time() + ended.ru_utime + ended.ru_stime + running


def _clock_of(pid: int) -> int:
    """What clock_getcpuclockid(3) gives on Linux, and Python does not have: `getrusage` waits for a child's end."""
    return (~pid << 3) | 2


# -------------------------------------------------------------------------------------------------------- the shards


def _write(
    folder: Path, size: tuple[int, int], resolution: int, pictures: Sequence[bytes], suffixes: tuple[str, ...]
) -> _Shards:
    """Shards as they are usually written: the members of a sample one after the other, keys with the shard's number."""
    folder.mkdir()
    num_shards, per_shard = size
    image = cycle(pictures)
    for number in range(num_shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(per_shard):
                key = f"{number:05d}{row:04d}"
                for suffix, content in _members(key, next(image), resolution).items():
                    if suffix in suffixes:
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    mean_bytes = sum(map(len, pictures)) // len(pictures)
    return _Shards(folder, num_shards, num_shards * per_shard, resolution, suffixes, mean_bytes)


def _members(key: str, image: bytes, resolution: int) -> dict[str, bytes]:
    caption = f"a drawing of a butterfly on a plain ground, number {int(key)}"
    about = {"caption": caption, "key": key, "status": "success", "width": resolution, "height": resolution}
    return {"jpg": image, "txt": caption.encode(), "json": json.dumps(about).encode()}
