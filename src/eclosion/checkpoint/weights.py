"""Weights of networks from files that hold nothing else: models of ours, folders of diffusers, safetensors.

a model                         <network>.safetensors and a manifest
a pipeline of diffusers         model_index.json, and a folder for each network
a network of diffusers          config.json and diffusion_pytorch_model.safetensors, in one piece or several
a file                          anything.safetensors; of several networks, with "<network>." before each name
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from eclosion.checkpoint import disk, storage
from eclosion.checkpoint.copying import averages
from eclosion.errors import CheckpointError, printable

__all__ = ["PIPELINE", "WEIGHTS", "differences", "read_weights", "said_beside"]

Weights = dict[str, dict[str, Tensor]]

# The file that makes a folder a pipeline of diffusers, and the one with the weights of a network.
PIPELINE, WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_JSON = 16 << 20  # bytes; far above the index of any network


def read_weights(path: Path, names: Sequence[str]) -> Weights:
    """The weights of networks, by network and name; mapped from files, so that only what is touched is read.

    Args:
        path: a folder or file as above.
        names: the networks that are wanted. Their weights are all there is, and are all there.

    Raises:
        CheckpointError: if a file cannot be read, is damaged, or is not of these networks.
    """
    if (path / storage.MANIFEST).is_file():
        found = averages(storage.read(path, verified=False))
    elif (path / PIPELINE).is_file():
        found = _pipeline(path, names)
    elif path.is_dir():
        found = _alone(path, _folder(path), names)
    else:
        found = _alone(path, _file(path), names)
    if found.keys() != set(names):
        have = ", ".join(sorted(printable(name)[:60] for name in found)) or "nothing"
        raise CheckpointError(f"{path} holds weights of {have}, and this run's networks are {', '.join(names)}.")
    return found


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What of a network's weights is missing, not known, of another shape or of another type, in words."""
    told = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    told += [f"{printable(name)[:100]} is not known" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        ours, theirs = wanted[name], found[name]
        if ours.shape != theirs.shape:
            told.append(f"{name} is {list(theirs.shape)}, wanted {list(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            told.append(f"{name} is {_type(theirs)}, wanted {_type(ours)}")
    return sorted(told)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _alone(path: Path, tensors: dict[str, Tensor], names: Sequence[str]) -> Weights:
    """The tensors of one place: of the one network that is wanted, or of several, whose names stand before theirs."""
    if len(names) == 1:
        return {names[0]: tensors}
    found: Weights = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        found.setdefault(name, {})[rest] = tensor
    return found


def _pipeline(path: Path, names: Sequence[str]) -> Weights:
    """The networks of a pipeline that are wanted by name; if one is, and the pipeline has one by any name, that one."""
    inside = [name for name in names if (path / name).is_dir()]
    if len(names) == 1 and not inside:
        others = [folder for folder in sorted(path.iterdir()) if (folder / WEIGHTS).is_file()]
        if len(others) == 1:
            return {names[0]: _folder(others[0])}
    return {name: _folder(path / name) for name in inside}


def _folder(path: Path) -> dict[str, Tensor]:
    """The weights of a network of diffusers; of several files, each tensor is in exactly one."""
    if (path / INDEX).is_file():
        found: dict[str, Tensor] = {}
        for file in sorted(set(_shards(path / INDEX))):
            more = _file(path / file)
            if twice := sorted(found.keys() & more.keys()):
                raise CheckpointError(f"{path / file} holds {twice[0]}, which another file of {path} holds as well.")
            found |= more
        return found
    if (path / WEIGHTS).is_file():
        return _file(path / WEIGHTS)
    raise CheckpointError(
        f"{path}: holds no {WEIGHTS}. Give a checkpoint, a model, a run folder, a folder that diffusers saved with "
        "safetensors, or a .safetensors file."
    )


def _shards(index: Path) -> Iterator[str]:
    with disk.explained(index, "read", "Mend that, and start again."):
        raw = index.read_bytes() if index.stat().st_size <= MAX_JSON else b""
    try:
        files = list(json.loads(raw)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is no index of weights: it has no weight_map.") from None
    for file in files:
        if not isinstance(file, str) or PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {printable(str(file))[:100]!r}, which is no file beside it.")
        yield file


def _file(path: Path) -> dict[str, Tensor]:
    try:
        with disk.explained(path, "read", "Mend that, and start again."), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {disk.reason(error)}.") from None


def said_beside(path: Path, name: str) -> dict[str, Any]:
    """What a folder of diffusers says of a network besides its weights: its options, and `prediction_type`."""
    folder = path / name if (path / PIPELINE).is_file() else path
    options = _json_object(folder / "config.json")
    schedule = _json_object(path / "scheduler" / "scheduler_config.json")
    told = {key: value for key, value in options.items() if not key.startswith("_")}
    return told | {key: schedule[key] for key in ("prediction_type",) if key in schedule}


def _json_object(file: Path) -> dict[str, Any]:
    """The content of a file; nothing if it cannot be read or is something else."""
    try:
        value = json.loads(file.read_bytes()) if file.stat().st_size <= MAX_JSON else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
