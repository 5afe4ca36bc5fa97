"""The machine that was measured, and whether it had anything else to do meanwhile."""

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eclosion.device import has_fast_bf16

__all__ = ["CROWDED", "Contention", "describe", "load_average", "wait_until_idle"]

# Load average from which a row counts as contended: one process of ours, and a fifth of a core of others.
CROWDED = 1.2
# Share of one core that other processes may use during a row.
OTHERS_CORES = 0.2
PACKAGES = (
    "eclosion",
    "torch",
    "torchvision",
    "diffusers",
    "datasets",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
    "safetensors",
)


def describe() -> dict[str, Any]:
    """Processor, memory, versions, threads and load of this machine."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "bf16_in_hardware": has_fast_bf16(torch.device("cpu")),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "nice": os.nice(0),
        "load_average": load_average(),
    }


def load_average() -> float:
    """Processes that ran or wanted to, on average over the last minute."""
    return os.getloadavg()[0]


def wait_until_idle(seconds: float) -> None:
    """Wait until the load average is below `CROWDED`, but not longer than this."""
    end = time.monotonic() + seconds
    while load_average() >= CROWDED and time.monotonic() < end:
        time.sleep(1)


@dataclass
class Contention:
    """A look at the machine's load, from the moment this is made.

    Attributes:
        load_before: load average at the beginning.
    """

    load_before: float
    _busy: float | None
    _own: float
    _wall: float

    @classmethod
    def begin(cls) -> "Contention":
        """Look now."""
        return cls(load_average(), _busy_seconds(), _own_seconds(), time.perf_counter())

    def end(self) -> dict[str, Any]:
        """The load since the beginning, and whether it makes a wall clock worthless.

        Our own background threads raise the load average while a row runs. So at its end a high one
        counts only if other processes used the processor, where the system can tell; and always if it cannot.
        """
        after, others = load_average(), self._others()
        shared = after >= CROWDED if others is None else others >= OTHERS_CORES
        return {
            "load_before": round(self.load_before, 2),
            "load_after": round(after, 2),
            "cores_used_by_others": None if others is None else round(others, 2),
            "contended": self.load_before >= CROWDED or shared,
        }

    def _others(self) -> float | None:
        busy, wall = _busy_seconds(), time.perf_counter() - self._wall
        if busy is None or self._busy is None:
            return None
        # The kernel counts in hundredths of a second, so that a very short row may come out below 0.
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / max(wall, 0.01))


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since boot, with those that a hypervisor took away; None if not Linux."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process, and of its children that ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    """Maker's name with family and model, which tell generations apart where a cloud hides the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def _memory_gb() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
