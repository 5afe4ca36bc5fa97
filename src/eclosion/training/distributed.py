"""Several processes on one run. Nothing else knows torch.distributed.

Started by torchrun, each process finds its rank in the environment. The order of samples is a
function of position, so processes need not agree on it; they meet in the gradients, in the
decision to stop, and before and after a checkpoint.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eclosion.errors import ConfigError, UserError
from eclosion.training.signals import StopRequested, StopSignals

__all__ = ["World", "world"]

T = TypeVar("T")

# Long enough for a slow disk, short enough that a dead process does not hold the others for hours.
TIMEOUT = timedelta(minutes=10)
# How often processes meet while one of them is at work for all.
TICK_SECONDS = 0.2


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def split(self, net: nn.Module, how: str) -> nn.Module:
        """The network with its weights divided among all processes, if `how` is "fsdp"."""
        if self.size > 1 and how == "fsdp":
            from torch.distributed.fsdp import fully_shard  # not in every build of torch

            # The outermost part, too, is split again after use: an average that was sampled must not keep old weights.
            for block in _blocks(net):
                fully_shard(block)
            fully_shard(net, reshard_after_forward=True)
        return net

    def prepare(self, net: nn.Module, how: str) -> nn.Module:
        """The network as the loop calls it: its gradients are averaged over all processes."""
        if self.size == 1 or how == "fsdp":
            return net
        device = next(net.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)

    def without_sync(self, net: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """The context of a forward and backward pass; only the last micro-batch of a step exchanges gradients."""
        if isinstance(net, nn.parallel.DistributedDataParallel):
            return nullcontext() if last else net.no_sync()
        if self.size > 1:
            net.set_requires_gradient_sync(last)  # type: ignore[operator]  # what fsdp adds to a module
        return nullcontext()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def highest(self, value: int) -> int:
        """The largest of one whole number from each process; a few microseconds on the host."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group())
        return int(box)

    def agree_to_stop(self, stop: StopSignals) -> None:
        """Leave through `StopRequested` on every process if a signal has come to any."""
        found = self.highest(stop.received)
        if found:  # one that comes while they meet stays noted, and is agreed on at the next meeting
            stop.received = found
            raise StopRequested

    def wait_for(self, stop: StopSignals, fetch: Callable[[], T]) -> T:
        """What `fetch` gets: a wait for data that a signal may end at once, through `StopRequested` on every process.

        The next meeting of processes after such a wait must be `agree_to_stop`. A process that leaves goes there
        straight away; the others wait there for it already, or come there, or leave their own wait.
        It is no context manager, as a signal between its end and that of the block would pass it by.
        """
        try:
            with stop.leaving():
                return fetch()
        except StopRequested:
            self.agree_to_stop(stop)
            raise

    def gather(self, value: Any) -> list[Any]:
        """One small object from each process, in the order of their ranks, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=_host_group())
        return found

    def lead(self, work: Callable[[], T]) -> T:
        """What the leading process gets from `work`, on every process; a `UserError` of it is raised on all."""
        outcome: tuple[T | None, str | None, int] = (None, None, 0)
        failure: UserError | None = None
        if self.leads:
            try:
                outcome = (work(), None, 0)
            except UserError as error:
                failure, outcome = error, (None, str(error), error.exit_code)
        result, message, code = self.from_leader(outcome)
        if failure is not None:
            raise failure
        if message is not None:
            told = UserError(f"process {self.rank} stops with process 0: {message}")
            told.exit_code = code
            raise told
        return result  # type: ignore[no-any-return]

    def lead_slowly(self, work: Callable[[], T], stop: StopSignals) -> T:
        """As `lead`, for work that may take long; a signal leaves through `StopRequested` on every process.

        Processes meet again and again meanwhile, as they would take one that does not come for dead.
        """
        if self.size == 1:
            return work()
        done: Future[T] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001 - raised by the process that waits for it
                done.set_exception(error)

        before, stop.saves_first = stop.saves_first, True  # noted, so that all leave at the same meeting
        try:
            if self.leads:
                threading.Thread(target=do, name="eclosion-lead", daemon=True).start()
            while not self.from_leader(done.done()):
                self.agree_to_stop(stop)
                time.sleep(TICK_SECONDS)
        finally:
            stop.saves_first = before
        return self.lead(done.result)

    def from_leader(self, value: Any) -> Any:
        """The leader's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_host_group())
        return box[0]


_groups: dict[str, Any] = {}


def _host_group() -> Any:
    return _groups.get("host")


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, which are split one by one."""
    return [block for child in net.children() if isinstance(child, nn.ModuleList) for block in child]


@contextmanager
def world(device_type: str) -> Iterator[World]:
    """Join the processes that torchrun started; alone if there are none.

    Args:
        device_type: "cuda" or "cpu"; decides how gradients travel.

    Raises:
        ConfigError: if the environment names a world that cannot be.
    """
    size = _number("WORLD_SIZE", "1")
    if size == 1:
        yield World()
        return
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK", "0")
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            "Start torchrun with a smaller --nproc-per-node."
        )
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    own = torch.device("cuda", local_rank) if device_type == "cuda" else None
    dist.init_process_group("nccl" if own else "gloo", timeout=TIMEOUT, device_id=own)
    _groups["host"] = dist.new_group(backend="gloo", timeout=TIMEOUT) if device_type == "cuda" else None
    try:
        yield World(rank, size, local_rank)
        dist.barrier()  # without it, processes that end at different times abort each other
    finally:
        _groups.clear()
        dist.destroy_process_group()


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdigit():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, and {name} is {value!r}, which is no number. "
            "Start several processes with torchrun, or unset WORLD_SIZE for one."
        )
    return int(value)


def full_tensors(tensors: dict[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The same tensors, whole. Those split over processes are gathered, one at a time; every process must ask.

    Args:
        tensors: by name.
        keep: whether this process wants them; another takes part, and keeps nothing of those that were gathered.
    """
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            whole = tensor.full_tensor()
            found[name] = whole.cpu() if keep else whole.new_empty(0)
        else:
            found[name] = tensor
    return found


def put(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be split over processes."""
    with torch.no_grad():
        from torch.distributed.tensor import DTensor, distribute_tensor  # only here: slow to import

        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)
