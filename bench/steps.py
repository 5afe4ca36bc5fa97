"""S1: what our loop adds to forward and backward. S2: its speed against the peer's loop."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.machine import Contention
from bench.peer import peer_steps, peer_work
from bench.row import Goal, Row, Spread
from bench.turns import Contender, Gate, alternate
from bench.work import (
    COMPUTE_BOUND,
    SMOKE,
    TINY,
    Network,
    Pictures,
    bare_steps,
    facts,
    our_config,
    our_steps,
    our_work,
    scratch_folder,
)

__all__ = ["overhead", "speed"]


@dataclass(frozen=True)
class Plan:
    """How a network is measured.

    Attributes:
        network: the network.
        rounds, warmups: of `alternate`.
        steps: of each side in a round.
        log_every: steps between two of our log lines; divides `steps`, so that each round pays for its share.
        num_pictures: few enough that the warm-up sees them all.
    """

    network: Network
    rounds: int
    warmups: int
    steps: int
    log_every: int
    num_pictures: int


PLANS = {
    "tiny": Plan(TINY, rounds=15, warmups=2, steps=20, log_every=10, num_pictures=64),
    # A step takes a second: one per round, each of which logs, ten times as often as by default.
    "28 M": Plan(COMPUTE_BOUND, rounds=9, warmups=2, steps=1, log_every=1, num_pictures=8),
    "quick": Plan(SMOKE, rounds=2, warmups=1, steps=2, log_every=2, num_pictures=4),
}
# The compute-bound goal is stated for fp32: in bf16 the same work beside it weighs more, because the network is faster.
OVERHEAD_GOALS = {
    ("tiny", "no"): Goal(0.20, 0.14),
    ("tiny", "auto"): Goal(0.20, 0.14),
    ("28 M", "no"): Goal(0.05, 0.04),
}
SPEED_GOALS = {
    ("tiny", "same"): Goal(1.4, 1.6, lower_is_better=False),
    ("28 M", "same"): Goal(1.05, 1.08, lower_is_better=False),
    ("28 M", "defaults"): Goal(1.55, 1.7, lower_is_better=False),
}


def overhead(*, quick: bool) -> Iterator[Row]:
    """S1: our loop with everything on against bare forward and backward, in fp32 and in our default precision."""
    for name in ["quick"] if quick else ["tiny", "28 M"]:
        for precision, comparison in [("no", "same dtype, fp32"), ("auto", "same dtype, our default precision")]:
            num_threads = 0 if precision == "no" else None
            goal = OVERHEAD_GOALS.get((name, precision))
            yield _overhead(PLANS[name], precision, num_threads, comparison, goal, quick)


def _overhead(
    plan: Plan, precision: str, num_threads: int | None, comparison: str, goal: Goal | None, quick: bool
) -> Row:
    bare = partial(bare_steps, network=plan.network, precision=precision)
    timed, load = _measure(plan, precision, num_threads, bare)
    ratio = timed["ours"]["cpu"].median / timed["peer"]["cpu"].median
    ours = our_work(precision, num_threads, plan.log_every)
    return Row(
        row="S1",
        case=_case(plan.network),
        comparison=comparison,
        measured="one step; the peer is bare forward and backward on tensors that lie ready",
        result_is="CPU time that our loop adds, as a share of bare forward and backward",
        result=ratio - 1,
        unit="share",
        clock="cpu",
        ours=timed["ours"],
        peer=timed["peer"],
        work={"both": facts(plan.network), "ours": ours, "peer": {"dtype": ours["dtype"]}},
        load=load,
        goal=goal,
        extra={"wall_result": _wall_ratio(timed) - 1},
        notes=_notes(plan),
        quick=quick,
    )


def speed(*, quick: bool) -> Iterator[Row]:
    """S2: our loop against the peer's, in its dtype and in the defaults of both."""
    for name in ["quick"] if quick else ["tiny", "28 M"]:
        for key in ("same", "defaults"):
            yield _speed(PLANS[name], key == "defaults", SPEED_GOALS.get((name, key)), quick)


def _speed(plan: Plan, defaults: bool, goal: Goal | None, quick: bool) -> Row:
    precision, num_threads = ("auto", None) if defaults else ("no", 0)
    pictures = Pictures(plan.num_pictures, plan.network.image_size)
    peer = partial(peer_steps, network=plan.network, pictures=pictures, precision="no")
    timed, load = _measure(plan, precision, num_threads, peer)
    return Row(
        row="S2",
        case=_case(plan.network),
        comparison="our defaults against theirs" if defaults else "same dtype, fp32",
        measured="one step",
        result_is="steps per CPU second, ours over the peer's",
        result=timed["peer"]["cpu"].median / timed["ours"]["cpu"].median,
        clock="cpu",
        ours=timed["ours"],
        peer=timed["peer"],
        work={
            "both": facts(plan.network),
            "ours": our_work(precision, num_threads, plan.log_every),
            "peer": peer_work("no"),
        },
        load=load,
        goal=goal,
        extra={"wall_result": 1 / _wall_ratio(timed)},
        notes=_notes(plan),
        quick=quick,
    )


def _measure(
    plan: Plan, precision: str, num_threads: int | None, peer: Callable[[Gate], None]
) -> tuple[dict[str, dict[str, Spread]], dict[str, Any]]:
    """Seconds per step of "ours" and "peer", and the load meanwhile."""
    pictures = Pictures(plan.num_pictures, plan.network.image_size)
    with scratch_folder() as folder, ExitStack() as stack:
        config = our_config(
            folder / "run", plan.network, precision=precision, num_threads=num_threads, log_every=plan.log_every
        )
        contention = Contention.begin()
        sides = {
            "ours": stack.enter_context(Contender(partial(our_steps, config=config, pictures=pictures))),
            "peer": stack.enter_context(Contender(peer)),
        }
        timed = alternate(sides, rounds=plan.rounds, warmups=plan.warmups, steps=plan.steps)
        return timed, contention.end()


def _wall_ratio(timed: dict[str, dict[str, Spread]]) -> float:
    return timed["ours"]["wall"].median / timed["peer"]["wall"].median


def _case(network: Network) -> str:
    return f"{network.name}, {network.image_size} px, batch {network.batch_size}"


def _notes(plan: Plan) -> list[str]:
    return [
        "The loop is eclosion.training.loop.run_until_done itself, held between two steps.",
        f"{plan.rounds} rounds after {plan.warmups}, {plan.steps} steps of each side in a round.",
    ]
