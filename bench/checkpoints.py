"""S6: how long a save holds up training. S7: how long loading takes. Against torch.save and torch.load."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.machine import Contention
from bench.row import Goal, Row, Spread
from bench.work import COMPUTE_BOUND, SMOKE, Network, Pictures, facts, our_config, scratch_folder
from eclosion.checkpoint import storage
from eclosion.checkpoint.storage import Loaded
from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.load import load as load_config
from eclosion.training.context import Context
from eclosion.training.distributed import World
from eclosion.training.drawing import draw
from eclosion.training.signals import StopSignals
from eclosion.training.start import start

__all__ = ["load", "save"]

SAVE_GOAL, LOAD_GOAL = Goal(0.12, 0.06), Goal(0.25, 0.15)
WARMUPS, ROUNDS = 2, 9


class _Other:
    """The same state as a script keeps it: network, averages and optimizer of torch, in one file.

    Args:
        network: what is trained.
        path: the file.
    """

    def __init__(self, network: Network, path: Path) -> None:
        self.path = path
        self._net, self._ema = network.build(), network.build()
        self._optimizer = torch.optim.AdamW(self._net.parameters())
        for p in self._net.parameters():
            p.grad = torch.randn_like(p)
        self._optimizer.step()  # makes the moments
        self._optimizer.zero_grad()

    def save(self) -> None:
        """Write everything with torch.save."""
        parts = {"model": self._net, "ema": self._ema, "optimizer": self._optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": 1}, self.path)

    def read(self) -> dict[str, Any]:
        """What torch.load gives."""
        return torch.load(self.path, weights_only=True)

    def load(self) -> None:
        """Read, and put it into the networks and the optimizer."""
        state = self.read()
        self._net.load_state_dict(state["model"])
        self._ema.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])


@dataclass
class _Run:
    """A run after two steps, so that the optimizer has its moments.

    Attributes:
        context: as the loop has it.
        step_seconds: how long its second step took on the wall.
        other: the peer's side.
    """

    context: Context
    step_seconds: float
    other: _Other

    def take(self, loaded: Loaded) -> None:
        """Put what our store gave into the networks and the optimizer."""
        self.context.state.load(loaded.files, loaded.state, leads=True)

    def wait(self) -> None:
        """Until our save in the background is on disk."""
        while self.context.store.busy:
            time.sleep(0.005)
        self.context.store.check()


@contextmanager
def _run(network: Network) -> Iterator[_Run]:
    with scratch_folder() as folder:
        config = load_config(our_config(folder / "run", network)).run
        pictures = Pictures(2 * network.batch_size, network.image_size)
        with start(config, pictures, world=World(), stop=StopSignals(), resume="never", accept=False) as context:
            steps = context.loader.steps(0)
            seconds = [_train_one(context, next(steps)) for _ in range(2)]
            steps.close()
            yield _Run(context, seconds[-1], _Other(network, folder / "other.pt"))


def _train_one(context: Context, batches: Any) -> float:
    """One step in fp32, the slower precision; seconds on the wall."""
    began = time.perf_counter()
    state = context.state
    stage = state.trained[0]
    batch = batches[0]
    drawn = draw(context.task, stage.name, batch, context.run.seed, state.step, 0, 0)
    stage.accumulate(context.task.loss(stage.name, batch, drawn), batch.weight)
    stage.update(state.step, state.num_steps)
    state.advance()
    context.account(batches)
    return time.perf_counter() - began


def save(*, quick: bool) -> Iterator[Row]:
    """S6: `Context.save`, as the loop calls it, against torch.save."""
    network = SMOKE if quick else COMPUTE_BOUND
    warmups, rounds = _times(quick)
    ours, theirs, written = [], [], []
    with _run(network) as run:
        contention = Contention.begin()
        for _ in range(warmups + rounds):
            theirs.append(_seconds(run.other.save))
            run.other.path.unlink()
            ours.append(_seconds(run.context.save))
            written.append(ours[-1][1] + _seconds(run.wait)[1])
            _advance(run.context)
        load = contention.end()
        ours_spread, theirs_spread = _spreads(ours[warmups:]), _spreads(theirs[warmups:])
        stall = ours_spread["wall"].median
        yield Row(
            row="S6",
            case=_case(network),
            comparison="same state, fp32",
            measured="how long the loop stands still for one save",
            result_is="our stall over torch.save",
            result=stall / theirs_spread["wall"].median,
            clock="wall",
            ours=ours_spread,
            peer=theirs_spread,
            work=_work(network, "snapshot; then written, fsynced, hashed and read back in the background"),
            load=load,
            goal=SAVE_GOAL,
            extra={
                "stall_in_steps": stall / run.step_seconds,
                "at_most_one_step": stall <= run.step_seconds,
                "first_stall_seconds": ours[0][1],
                "seconds_until_on_disk": Spread(tuple(written[warmups:])).as_dict(),
            },
            notes=[
                "torch.save leaves its file to the page cache; ours is on disk and verified when it counts as saved.",
                "The first save also allocates the buffers of the snapshot; later ones use them again.",
            ],
            quick=quick,
        )


def load(*, quick: bool) -> Iterator[Row]:
    """S7: a checkpoint of ours, with every byte verified and without, against torch.load; files in the page cache."""
    network = SMOKE if quick else COMPUTE_BOUND
    with _run(network) as run:
        run.other.save()
        run.context.save(wait=True)
        folder = run.context.folder
        checkpoint = folder.checkpoint(run.context.state.step)

        def verified() -> Loaded:
            with CheckpointStore(folder) as store:  # a new one, which has verified nothing yet
                return store.load(checkpoint)

        def unverified() -> Loaded:
            return storage.read(checkpoint, verified=False)

        for name, read in [("verified", verified), ("unverified", unverified)]:
            whole = partial(_take_ours, run, read), run.other.load
            yield _load_row(network, name, "from the file into the networks and the optimizer", whole, LOAD_GOAL, quick)
            call = read, run.other.read
            yield _load_row(network, f"{name}, the call alone", "the call", call, None, quick)


def _load_row(
    network: Network,
    name: str,
    measured: str,
    sides: tuple[Callable[[], Any], Callable[[], Any]],
    goal: Goal | None,
    quick: bool,
) -> Row:
    """One way to load, by us and by torch, in turns."""
    warmups, rounds = _times(quick)
    contention = Contention.begin()
    seconds = [(_seconds(sides[0]), _seconds(sides[1])) for _ in range(warmups + rounds)][warmups:]
    ours, theirs = _spreads([mine for mine, _ in seconds]), _spreads([other for _, other in seconds])
    return Row(
        row="S7",
        case=_case(network),
        comparison=f"same state, fp32, {name}",
        measured=measured,
        result_is="our load over torch.load",
        result=ours["wall"].median / theirs["wall"].median,
        clock="wall",
        ours=ours,
        peer=theirs,
        work=_work(network, f"mapped, {name}"),
        load=contention.end(),
        goal=goal,
        notes=[
            "Ours maps the files, so the call alone returns before all bytes are in memory. The copy into the networks "
            "reads them, on both sides; so that is what the goal is held against.",
            "torch.load verifies nothing. All files are in the page cache.",
        ],
        quick=quick,
    )


def _take_ours(run: _Run, read: Callable[[], Loaded]) -> None:
    run.take(read())


def _advance(context: Context) -> None:
    """Count a step that was not made, so that the next checkpoint gets a name of its own."""
    context.state.advance()
    context.account([])


def _seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this thread and seconds on the wall; what `work` returns is let go outside of them."""
    cpu, wall = time.thread_time(), time.perf_counter()
    kept = work()
    seconds = time.thread_time() - cpu, time.perf_counter() - wall
    del kept
    return seconds


def _spreads(seconds: list[tuple[float, float]]) -> dict[str, Spread]:
    return {"cpu": Spread(tuple(c for c, _ in seconds)), "wall": Spread(tuple(w for _, w in seconds))}


def _times(quick: bool) -> tuple[int, int]:
    return (1, 2) if quick else (WARMUPS, ROUNDS)


def _case(network: Network) -> str:
    return f"{network.name}: weights, EMA, two moments"


def _work(network: Network, ours: str) -> dict[str, Any]:
    both = facts(network)
    state = {"parameters": both["parameters"], "state_mb": round(both["parameters"] * 4 * 4 / 1e6, 1)}
    return {"both": state, "ours": {"checkpoint": ours}, "peer": {"checkpoint": "torch.save, torch.load"}}
