"""S3: training one U-Net of a decoder, our loop against DALLE2-pytorch's own trainer, from one checkpoint."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.dalle2 import PEER, Cascade, Embedded, Peer, imported, our_steps
from bench.machine import Contention, wait_until_idle
from bench.row import Goal, NotMeasured, Row, Spread
from bench.turns import Contender, Side, alternate
from bench.work import CPU, scratch_folder
from eclosion.device import pick_precision

__all__ = ["decoder"]


@dataclass(frozen=True)
class Plan:
    """How a network is measured.

    Attributes:
        cascade: that it is in.
        rounds, warmups: of `alternate`; one step of each side in a round.
    """

    cascade: Cascade
    rounds: int = 9
    warmups: int = 2


# As small as the field trains at 64 pixels: 53 M parameters, attention where maps are small.
BASE = Plan(
    Cascade(
        "decoder",
        unets=[{"dim": 64, "dim_mults": [1, 2, 4, 8], "cond_dim": 128, "self_attn": [False, False, True, True]}],
        image_sizes=[64],
        decoder={"beta_schedule": ["cosine"], "learned_variance": [True]},
        trained=0,
        batch_size=4,
    )
)
# Its upsampler, memory-efficient and without attention, told a smaller image with blur and noise. The network before it
# is not trained here, and tiny.
UPSAMPLER = Plan(
    Cascade(
        "upsampler",
        unets=[
            {"dim": 16, "dim_mults": [1, 2], "num_resnet_blocks": 1},
            {"dim": 64, "dim_mults": [1, 2, 4], "memory_efficient": True},
        ],
        image_sizes=[32, 64],
        decoder={
            "beta_schedule": ["cosine", "linear"],
            "learned_variance": [False, False],
            "use_noise_for_lowres_cond": [True],
            "use_blur_for_lowres_cond": [True],
        },
        trained=1,
        batch_size=4,
    )
)
SMOKE_UNET = {"dim": 8, "dim_mults": [1, 2], "num_resnet_blocks": 1}
SMOKE = [
    Plan(replace(BASE.cascade, unets=[SMOKE_UNET], image_sizes=[16], batch_size=2), rounds=2, warmups=1),
    Plan(
        replace(UPSAMPLER.cascade, unets=[SMOKE_UNET, SMOKE_UNET], image_sizes=[8, 16], batch_size=2),
        rounds=2,
        warmups=1,
    ),
]
PATIENCE_SECONDS = 60
# Of our precisions; the peer's is fp32, its script's default.
GOALS = {"no": Goal(1.15, 1.3, lower_is_better=False), "auto": Goal(1.9, 2.3, lower_is_better=False)}


def decoder(*, quick: bool) -> Iterator[Row]:
    """Our loop in the peer's fp32 and in our default precision; both and the peer in turns.

    Raises:
        NotMeasured: if there is no interpreter that has the peer.
    """
    interpreter = os.environ.get(PEER)
    if not interpreter:
        raise NotMeasured(
            "needs DALLE2-pytorch, in an environment of its own: `python -m venv peer`, `peer/bin/pip install "
            f"dalle2-pytorch`, and then {PEER}=peer/bin/python."
        )
    for plan in SMOKE if quick else [BASE, UPSAMPLER]:
        yield from _rows(plan, interpreter, quick)


def _rows(plan: Plan, interpreter: str, quick: bool) -> Iterator[Row]:
    cascade = plan.cascade
    if not quick:
        wait_until_idle(PATIENCE_SECONDS)  # from what the plan before left
    contention = Contention.begin()
    with scratch_folder() as folder:
        samples = Embedded(cascade.batch_size, cascade.image_sizes[-1])
        # The peer's process ends before the load is read: only of one that has ended is known what it used.
        with ExitStack() as stack:
            peer = stack.enter_context(Peer(interpreter, cascade, samples, folder))
            config, checkpoint, both = imported(cascade, samples, peer, folder / "imported")
            sides: dict[str, Side] = {"peer": peer}
            for precision in GOALS:
                train = config["train"] | {"mixed_precision": precision}
                own = config | {"output": str(folder / f"ours-{precision}"), "train": train}
                steps = partial(our_steps, config=own, samples=samples, checkpoint=checkpoint)
                sides[precision] = stack.enter_context(Contender(steps))
            timed = alternate(sides, rounds=plan.rounds, warmups=plan.warmups)
        load = contention.end()
    for precision in GOALS:
        yield _row(plan, precision, timed[precision], timed["peer"], both, peer.facts, load, quick)


def _row(
    plan: Plan,
    precision: str,
    ours: Mapping[str, Spread],
    theirs: Mapping[str, Spread],
    both: Mapping[str, Any],
    peer: Mapping[str, Any],
    load: Mapping[str, Any],
    quick: bool,
) -> Row:
    cascade = plan.cascade
    return Row(
        row="S3",
        case=f"{cascade.name}, {cascade.size} px, batch {cascade.batch_size}",
        comparison="same dtype, fp32" if precision == "no" else "our default precision against theirs",
        measured="one step",
        result_is="images per CPU second, ours over the peer's",
        result=theirs["cpu"].median / ours["cpu"].median,
        clock="cpu",
        ours=ours,
        peer=theirs,
        work={"both": both, "ours": _our_work(precision), "peer": {**PEER_WORK, **peer}},
        load=load,
        goal=GOALS[precision],
        extra={
            "wall_result": theirs["wall"].median / ours["wall"].median,
            "our_images_per_cpu_second": cascade.batch_size / ours["cpu"].median,
            "peer_images_per_cpu_second": cascade.batch_size / theirs["cpu"].median,
        },
        notes=_notes(plan, peer),
        quick=quick,
    )


PEER_WORK: dict[str, Any] = {
    "dtype": "fp32",
    "optimizer": "AdamW, torch's default, through accelerate",
    "clip": 0.5,
    "ema": "every tenth step, ema-pytorch",
    "lr_schedule": "500 steps of warm-up",
    "draws": "torch's global generator",
    "loader": "none, the same tensors in each step",
    "log": "none",
}


def _our_work(precision: str) -> dict[str, Any]:
    return {
        "dtype": {"no": "fp32"}.get(name := pick_precision(precision, CPU), name),
        "torch": torch.__version__,
        "optimizer": "AdamW, fused",
        "clip": 0.5,
        "ema": "every step",
        "lr_schedule": "500 steps of warm-up",
        "draws": "keyed by position, one generator per image",
        "loader": "0 threads, the same tensors in each step",
        "log": "metrics.jsonl every 10 steps",
    }


def _notes(plan: Plan, peer: Mapping[str, Any]) -> list[str]:
    theirs, ours = (version.partition("+")[0] for version in (peer["torch"], torch.__version__))
    notes = [
        "Ours is eclosion.training.loop.run_until_done itself, held between two steps; the peer is its DecoderTrainer, "
        "built from its own config and held between two steps.",
        "Both began with one checkpoint of the peer, which ours imported.",
        "Nine in ten of the peer's steps leave its average alone, so its median does not show what that costs; each "
        "of ours moves it.",
        "Ours multiplies the projections of cross-attention first, which is exact. GFLOP are counted by torch, which "
        "does not count our kernel of self-attention.",
        f"{plan.rounds} rounds after {plan.warmups}, one step of each side in a round.",
    ]
    return notes if theirs == ours else [*notes, f"The peer has torch {theirs}, and ours is {ours}."]
