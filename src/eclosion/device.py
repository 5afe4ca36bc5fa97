"""Where a run computes and in which precision, and what of the machine decides its bits."""

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from eclosion.errors import ConfigError

__all__ = ["autocast", "environment", "has_fast_bf16", "memory_gb", "pick_device", "pick_precision"]

Precision = Literal["no", "fp16", "bf16"]


def pick_device(wanted: str, *, local_rank: int = 0) -> torch.device:
    """The device that a config asks for.

    Args:
        wanted: "auto", "cpu", "cuda" or "mps"; "auto" takes a GPU if there is one.
        local_rank: which GPU of this machine, when several processes train.

    Raises:
        ConfigError: if there is no such device here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if mps else "cpu"
    if (wanted == "cuda" and not cuda) or (wanted == "mps" and not mps):
        raise ConfigError(
            f"train.device is {wanted!r}, and torch finds no such device here. Use train.device=auto or cpu."
        )
    return torch.device("cuda", local_rank) if wanted == "cuda" else torch.device(wanted)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def pick_precision(wanted: str, device: torch.device) -> Precision:
    """The precision that a config asks for; "auto" is bf16 where the hardware has it."""
    if wanted == "auto":
        return "bf16" if has_fast_bf16(device) else "no"
    return wanted  # type: ignore[return-value]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The context in which networks run; weights stay float32."""
    if precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def environment(device: torch.device) -> dict[str, Any]:
    """What decides the bits of a run besides its config: recorded, and compared on resume."""
    packages = ("eclosion", "torch", "diffusers", "numpy", "pillow")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device in GiB; on a CPU, the memory this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0
