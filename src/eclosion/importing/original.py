"""What a checkpoint of DALLE2-pytorch holds, in either of the two forms that its trainer writes.

    checkpoint      model, version, steps, optim0 ..., sched0 ..., ema, and as the trainer was told also epoch, sample,
                    next_task, validation_losses, samples_seen, config
    model           model, version, config; the averages stand in the place of the weights

and, from those who wrote their own training, the decoder's state dict alone. A file comes from a stranger: each value
is looked at before it is used.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from eclosion.checkpoint import disk
from eclosion.checkpoint.foreign import Inert, read_torch_file
from eclosion.errors import CheckpointError, printable

__all__ = ["OriginalFile", "OriginalUnet", "read_original"]

T = TypeVar("T")

# A version in a `model` file is an object of one of these, which differ from release to release of packaging.
INERT = (
    "packaging.version.Version",
    "packaging.version._Version",
    "packaging._structures.InfinityType",
    "packaging._structures.NegativeInfinityType",
)
# Keys of the decoder's state dict that are not weights of a U-Net: tables that follow from the config, and an encoder
# that older files hold and nothing here needs.
PASSED_OVER = ("noise_schedulers", "lowres_conds", "clip")
MAX_UNETS = 64


@dataclass(frozen=True)
class OriginalUnet:
    """What one file holds of one U-Net; tensors by the original's names.

    Attributes:
        path: the file.
        index: the U-Net's place in the cascade, from 0.
        weights: its parameters.
        average: their exponential moving average; None if the file has none.
        optimizer: state dict of its optimizer; None if the file has none.
        schedule: state dict of its learning rate's schedule; None if the file has none.
        steps: optimizer updates behind it; None if the file does not say.
    """

    path: Path
    index: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any] | None
    schedule: Mapping[str, Any] | None
    steps: int | None


@dataclass(frozen=True)
class OriginalFile:
    """One checkpoint of DALLE2-pytorch.

    Attributes:
        path: the file.
        kind: what wrote it; "weights" is a decoder's state dict.
        version: of DALLE2-pytorch, as far as the file says.
        config: what the original was told, defaults included; None if the file does not say.
        unets: those whose weights the file holds; others were masked out.
        num_unets: networks in the cascade, those included that are masked out.
        alphas_cumprod: noise levels of each network, float32 [T].
        samples_seen: images behind it; None if the file does not say.
        epoch: passes over the data behind it; None if the file does not say.
    """

    path: Path
    kind: Literal["checkpoint", "model", "weights"]
    version: str | None
    config: Mapping[str, Any] | None
    unets: Mapping[int, OriginalUnet]
    num_unets: int
    alphas_cumprod: Mapping[int, Tensor]
    samples_seen: int | None
    epoch: int | None


def read_original(path: Path) -> OriginalFile:
    """Read a checkpoint of DALLE2-pytorch's decoder; nothing in it is run.

    Raises:
        CheckpointError: if the file cannot be read, or is something else.
    """
    content = read_torch_file(path, inert=INERT)
    alone = any(str(key).startswith("unets.") for key in content)
    values = {"model": content} if alone else content
    model = _wanted(path, "model", values.get("model"), dict, "a mapping from names to tensors")
    parts = _by_network(path, model)
    averages = _averages(path, values)
    steps = _steps(path, values)
    unets = {
        i: OriginalUnet(
            path=path,
            index=i,
            weights=weights,
            average=averages.get(i),
            optimizer=_maybe(path, f"optim{i}", values.get(f"optim{i}"), dict, "the state dict of an optimizer"),
            schedule=_maybe(path, f"sched{i}", values.get(f"sched{i}"), dict, "the state dict of a schedule"),
            steps=steps.get(i),
        )
        for i, weights in sorted(parts["unets"].items())
    }
    if not unets:
        raise CheckpointError(
            f"{path}: holds no weights of a U-Net (unets.0 ...). This imports decoders of DALLE2-pytorch; a prior, or "
            "the checkpoint of another program, is something else."
        )
    levels = "alphas_cumprod"
    schedules = {i: tables[levels] for i, tables in parts["noise_schedulers"].items() if levels in tables}
    return OriginalFile(
        path=path,
        kind="weights" if alone else "checkpoint" if "steps" in values else "model",
        version=_version(values.get("version")),
        config=_settings(path, values.get("config")),
        unets=unets,
        num_unets=1 + max([*unets, *schedules, *steps]),
        alphas_cumprod=schedules,
        samples_seen=_count(path, "samples_seen", values.get("samples_seen")),
        epoch=_count(path, "epoch", values.get("epoch")),
    )


def _by_network(path: Path, model: Mapping[Any, Any]) -> dict[str, dict[int, dict[str, Tensor]]]:
    """The decoder's tensors by kind ("unets", "noise_schedulers"), then by network, then by name."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {"unets": {}, "noise_schedulers": {}}
    strange = []
    for key, value in model.items():
        kind, _, rest = str(key).partition(".")
        number, _, name = rest.partition(".")
        if kind in found and name:
            tensor = _wanted(path, f"model.{key}", value, Tensor, "a tensor")
            found[kind].setdefault(_place(path, f"model.{key}", number), {})[name] = tensor
        elif kind not in PASSED_OVER:
            strange.append(printable(str(key))[:80])
    if any(key.startswith("vaes.") for key in strange):
        raise CheckpointError(
            f"{path}: holds an autoencoder ({strange[0]}): a latent cascade, which eclosion does not have."
        )
    if strange and found["unets"]:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise CheckpointError(
            f"{path}: model holds {', '.join(strange[:3])}{more}, and unets.N..., noise_schedulers.N..., "
            "lowres_conds.N... and clip... are known. Was it written by a decoder of DALLE2-pytorch?"
        )
    return found


def _averages(path: Path, values: Mapping[str, Any]) -> dict[int, dict[str, Tensor]]:
    """The averages of each network; those that had not begun to follow are left out."""
    ema = _maybe(path, "ema", values.get("ema"), dict, "a mapping from names to tensors") or {}
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in ema.items():
        number, _, rest = str(key).partition(".")
        kind, _, name = rest.partition(".")
        if kind == "ema_model" and name:
            tensor = _wanted(path, f"ema.{key}", value, Tensor, "a tensor")
            found.setdefault(_place(path, f"ema.{key}", number), {})[name] = tensor
    begun = {i: ema.get(f"{i}.initted", True) for i in found}
    return {i: tensors for i, tensors in found.items() if _number(path, f"ema.{i}.initted", begun[i])}


def _steps(path: Path, values: Mapping[str, Any]) -> dict[int, int]:
    """Updates of each network."""
    given = values.get("steps")
    if given is None:
        return {}
    if not isinstance(given, Tensor) or given.ndim != 1 or given.is_floating_point() or len(given) > MAX_UNETS:
        raise CheckpointError(f"{path}: steps is {_text(given)}, and must be whole numbers, one for each network.")
    return {i: max(0, int(count)) for i, count in enumerate(given.tolist())}


def _settings(path: Path, value: Any) -> dict[str, Any] | None:
    """Settings as their JSON file would hold them."""
    settings = _maybe(path, "config", value, dict, "a mapping of settings")
    try:
        plain: dict[str, Any] | None = json.loads(json.dumps(settings))
    except TypeError as error:
        raise CheckpointError(f"{path}: config holds more than settings ({disk.reason(error)}).") from error
    return plain


def _version(value: Any) -> str | None:
    """The version as text, from text or from the parts of an object that was not made."""
    if isinstance(value, str):
        return printable(value)[:40]
    state = value.state if isinstance(value, Inert) else None
    if isinstance(state, Mapping):
        inner = state.get("_version")
        state = inner.args if isinstance(inner, Inert) else None
    release = state[1] if isinstance(state, (list, tuple)) and len(state) > 1 else None
    if isinstance(release, tuple) and all(isinstance(number, int) for number in release):
        return ".".join(map(str, release))[:40]
    return None


# --- values from a stranger ------------------------------------------------------------------------------------------


def _wanted(path: Path, key: str, value: Any, kind: type[T], words: str) -> T:
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: {printable(key)[:120]} is {_text(value)}, and must be {words}.")
    return value


def _maybe(path: Path, key: str, value: Any, kind: type[T], words: str) -> T | None:
    return None if value is None else _wanted(path, key, value, kind, words)


def _place(path: Path, key: str, number: str) -> int:
    if number not in map(str, range(MAX_UNETS)):
        raise CheckpointError(f"{path}: {printable(key)[:120]} names no network from 0 to {MAX_UNETS - 1}.")
    return int(number)


def _number(path: Path, key: str, value: Any) -> float:
    """A number, or a tensor that holds one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise CheckpointError(f"{path}: {key} is {_text(value)}, and must be one number.")


def _count(path: Path, key: str, value: Any) -> int | None:
    if value is None:
        return None
    number = _number(path, key, value)
    if not (math.isfinite(number) and number >= 0 and number == int(number)):
        raise CheckpointError(f"{path}: {key} is {number}, and must be a count.")
    return int(number)


def _text(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (bool, int, float, str)):
        return printable(repr(value))[:60]
    return "missing" if value is None else f"a {type(value).__name__}"
