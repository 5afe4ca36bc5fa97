"""What a run starts from that has no checkpoint of its own: whatever the part in `start` names.

a checkpoint, or a run          goes on from it: weights, averages, optimizer, steps
a checkpoint of DALLE2-pytorch  the same, brought over as `eclosion import` does it
weights alone                   a model, a folder of diffusers, a safetensors file: training begins with them
"""

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from eclosion.checkpoint import storage
from eclosion.checkpoint.copying import is_model
from eclosion.checkpoint.store import CheckpointStore
from eclosion.checkpoint.weights import PIPELINE, differences, read_weights, said_beside
from eclosion.config.changes import compare, refuse
from eclosion.config.schema import RunConfig
from eclosion.errors import CheckpointError, DataError
from eclosion.importing.starting import import_for
from eclosion.registry import dump
from eclosion.rundir import RunDir
from eclosion.tracking.loading import FACTS, LoaderPart, fetched_facts
from eclosion.training.distributed import World, put
from eclosion.training.origin import Origin
from eclosion.training.signals import StopSignals
from eclosion.training.state import TrainState

__all__ = ["about_weights", "begin", "put_weights"]

# Options of a network that its weights do not depend on.
NOT_OF_WEIGHTS = ("sample_size", "dropout")


def begin(
    run: RunConfig,
    folder: RunDir,
    store: CheckpointStore,
    origin: Origin,
    *,
    world: World,
    stop: StopSignals,
    accept: bool,
) -> Origin:
    """Where a run goes on from, after what `start` names has been fetched, if it is that. Every process must come.

    Only the leading process fetches, once for all; the others wait however long it takes. What it fetched before, and
    is no longer needed, is removed.

    Raises:
        UserError: if it cannot be fetched, or is not of this run.
    """
    loader: LoaderPart | None = run.start
    if origin.checkpoint is not None or loader is None:
        world.lead(lambda: _tidy(folder, origin))
        return origin
    was_here = bool(world.lead(lambda: folder.config.exists() and not store.folders()))
    if loader.only_when_resuming and not was_here:
        return origin
    found = world.lead_slowly(lambda: _fetched(loader, folder), stop)
    began: Origin = world.lead(lambda: _origin(run, folder, found, origin, accept=accept))
    # What the run left is what goes on; its numbers stay.
    return replace(began, replaces=None) if loader.only_when_resuming else began


def put_weights(state: TrainState, path: Path) -> None:
    """Put weights into all networks and their averages; every process does.

    Raises:
        CheckpointError: naming what does not fit. Then nothing was put anywhere.
    """
    weights = read_weights(path, list(state.stages))
    wanted = {name: [stage.module, *(ema.net for ema in stage.emas)] for name, stage in state.stages.items()}
    told = [
        f"{name}: {line}" for name, nets in wanted.items() for line in differences(nets[0].state_dict(), weights[name])
    ]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        raise CheckpointError(f"{path} does not fit the networks of this run: {'; '.join(told[:5])}{more}.")
    _refuse_what_diverged(path, weights)
    for name, nets in wanted.items():
        for net in nets:
            ours = net.state_dict()
            for key, value in weights[name].items():
                put(ours[key], value)
    state.untrained = []


def about_weights(run: RunConfig, state: TrainState, path: Path) -> list[str]:
    """What says that weights were made for something else than what this run does with them, one line each.

    They fit, so that only what is written beside them can tell.
    """
    if (path / storage.MANIFEST).is_file():
        before = storage.read_manifest(path).meta.get("config", {})
        changed = [change for change in compare(before, dump(run)) if change.path.startswith("task.")]
        return [f"the weights are from a run with another {change}" for change in changed]
    told = []
    for name, stage in state.stages.items():
        ours = {**getattr(stage.module, "config", {}), "prediction_type": getattr(run.task, "prediction_type", None)}
        for key, theirs in said_beside(path, name).items():
            if key not in NOT_OF_WEIGHTS and ours.get(key) is not None and _plain(ours[key]) != _plain(theirs):
                told.append(f"the weights of {name} were made with {key} {theirs!r}, and this run has {ours[key]!r}")
    return told


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _refuse_what_diverged(path: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, tensors in weights.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: {name}: {key} is not finite. Give other weights.")


def _tidy(folder: RunDir, origin: Origin) -> None:
    """Remove what was fetched, when the run has a checkpoint of its own."""
    own = origin.checkpoint is not None and origin.checkpoint.parent == folder.checkpoints
    if own and folder.start.is_dir():
        shutil.rmtree(folder.start, ignore_errors=True)


def _fetched(loader: LoaderPart, folder: RunDir) -> Path:
    folder.start.mkdir(parents=True, exist_ok=True)
    (folder.start / FACTS).unlink(missing_ok=True)
    return loader.fetch(folder.start)


def _origin(run: RunConfig, folder: RunDir, found: Path, origin: Origin, *, accept: bool) -> Origin:
    """The origin that a file or folder makes: a checkpoint to go on from, or weights."""
    facts = dict(fetched_facts(folder.start))
    where = str(facts.get("url") or facts.get("path") or found)
    origin = replace(origin, started_from=where, facts=facts)
    checkpoint = _checkpoint(run, folder, found)
    if checkpoint is None:
        return replace(origin, weights=found)
    manifest = storage.verify(checkpoint)
    _check_kept(_Kept, {"meta": manifest.meta}, checkpoint)
    if is_model(manifest.meta):
        return replace(origin, weights=checkpoint)
    _check_kept(_KeptByRun, {"meta": manifest.meta, "state": storage.read(checkpoint, verified=True).state}, checkpoint)
    changes = compare(manifest.meta["config"], dump(run))
    refuse(changes, accept=accept, where=where)
    return replace(origin, checkpoint=checkpoint, changes=changes)


class _Meta(BaseModel):
    config: dict[str, Any]


class _Kept(BaseModel):
    """What every checkpoint and model says that somebody may have made by hand."""

    meta: _Meta


class _MetaOfRun(_Meta):
    fingerprint: str | None
    environment: dict[str, Any]
    facts: dict[str, Any]


class _State(BaseModel):
    step: Annotated[int, Field(ge=0, strict=True)]
    samples_seen: Annotated[int, Field(ge=0, strict=True)]
    losses: dict[str, tuple[float, float]]
    last_loss: dict[str, float]
    untrained: list[str] = []
    validation: dict[str, Any] = {}
    ledger: dict[str, Any] = {}


class _KeptByRun(BaseModel):
    """And what a run needs to go on from it."""

    meta: _MetaOfRun
    state: _State


def _check_kept(kept: type[BaseModel], found: Mapping[str, Any], checkpoint: Path) -> None:
    try:
        kept.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{checkpoint}: is whole, and not as a run writes it: {where}: {first['msg'].lower()}. Give another."
        ) from None


def _checkpoint(run: RunConfig, folder: RunDir, found: Path) -> Path | None:
    """The checkpoint or model that a file or folder is, holds, or is brought over to; None if it is weights alone."""
    if (found / storage.MANIFEST).is_file():
        return found
    if found.is_dir():
        inside = RunDir(found)
        if inside.checkpoints.is_dir() and not (found / PIPELINE).is_file():
            latest = CheckpointStore(inside).latest()
            if latest is None:
                raise CheckpointError(f"{found}: holds no checkpoint. Give the folder of a run that has trained.")
            return latest
        return None
    if found.suffix == ".safetensors":
        return None
    if zipfile.is_zipfile(found):
        return import_for(run, found, folder.start / "imported")
    raise DataError(
        f"{found}: is nothing that a run can start from: no checkpoint, model or run folder, no folder of diffusers, "
        "no .safetensors file, and no checkpoint of DALLE2-pytorch."
    )
