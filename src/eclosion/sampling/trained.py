"""A trained task, read from a checkpoint."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eclosion.checkpoint.store import CheckpointStore
from eclosion.config.load import validate
from eclosion.config.schema import RunConfig
from eclosion.device import pick_device, pick_precision
from eclosion.errors import CheckpointError, ConfigError, did_you_mean
from eclosion.rundir import RunDir, step_of
from eclosion.tasks.task import DataFacts, Task, span_of

__all__ = ["TrainedTask", "load_trained"]


@dataclass(frozen=True)
class TrainedTask:
    """A task read from a checkpoint, on its first average, ready to sample.

    Attributes:
        task: on the device, in eval mode.
        run: the config it was trained with.
        folder: the run folder that holds its checkpoint.
        step, samples_seen: optimizer updates and images behind it.
        untrained: networks that were frozen, and that nothing was ever loaded into: they make noise.
        meta: what the checkpoint says of itself: config, versions, data.
        device, precision: where and how it samples.
    """

    task: Task
    run: RunConfig
    folder: RunDir
    step: int
    samples_seen: int
    untrained: Sequence[str]
    meta: Mapping[str, Any]
    device: torch.device
    precision: Any

    @property
    def span(self) -> tuple[int, int]:
        """The places of the first and the last network to make images with, as previews are made."""
        return span_of(self.task.nets, self.untrained)


def load_trained(
    folder: str | Path, *, checkpoint: str | int = "latest", device: str = "auto", encodes: bool = False
) -> TrainedTask:
    """The trained task of a run folder or of one of its checkpoints.

    Args:
        folder: a run folder, or one checkpoint in it.
        checkpoint: of a run folder: "latest", "best" as `checkpoint.best` of the run says, or a step.
        device: "auto", "cpu", "cuda" or "mps".
        encodes: whether the encoder in the config is wanted, if there is one, although the data brought embeddings.

    Raises:
        CheckpointError: if there is none, or none that is whole.
        ConfigError: if `checkpoint` is something else, or says another than the folder is.
    """
    path = Path(folder)
    one = path if (path / "manifest.json").is_file() else None
    root = RunDir(_run_of(path) if one else path)
    store = CheckpointStore(root, keep_last=2, keep_every=None)
    if one and checkpoint != "latest":
        raise ConfigError(f"{path} is one checkpoint, and checkpoint={checkpoint} asks for another. Give the run.")
    found = one or _chosen(store, path, checkpoint)
    for warning in store.warnings:
        warnings.warn(warning, stacklevel=3)
    loaded = store.load(found)
    meta, state = loaded.manifest.meta, loaded.state
    run = validate(meta["config"])
    task = run.task.build(_facts(meta, run, encodes=encodes))
    where = pick_device(device)
    nets = {}
    for name, net in task.nets.items():
        _load(net, loaded.files.get(f"{name}.ema", loaded.files[name]), f"{found}: {name}")
        nets[name] = net.to(where).eval().requires_grad_(False)
    precision = pick_precision(run.train.mixed_precision, where)
    seen, untrained = state["samples_seen"], state.get("untrained", [])
    return TrainedTask(task.with_nets(nets), run, root, state["step"], seen, untrained, meta, where, precision)


def _run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint stands in; of a copy outside of one, the folder that holds it."""
    parent = checkpoint.parent
    return parent.parent if step_of(checkpoint) is not None and parent.resolve().name == "checkpoints" else parent


def _load(net: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:  # torch names every difference, over many lines
        raise CheckpointError(f"{what} does not fit the network that its config describes.") from error


def _facts(meta: Mapping[str, Any], run: RunConfig, *, encodes: bool) -> DataFacts:
    """What a task was told of its data when it was trained.

    Args:
        meta: what its checkpoint says of itself.
        run: the config it was trained with.
        encodes: whether its encoder makes what the data brought.
    """
    facts = meta["facts"]
    arrays, made = ({name: tuple(shape) for name, shape in facts.get(kind, {}).items()} for kind in ("arrays", "made"))
    encoder = getattr(run.task, "encoder", None)
    for name, makes in (("image_embed", "build"), ("text_encodings", "build_text")):
        if encodes and hasattr(encoder, makes) and name in arrays:
            made[name] = arrays.pop(name)
    return DataFacts(size=run.data.size, class_names=tuple(facts["class_names"]), arrays=arrays, made=made)


def _chosen(store: CheckpointStore, path: Path, checkpoint: str | int) -> Path:
    text = str(checkpoint)
    if text.isdigit():
        return store.run.checkpoint(int(text))  # told by `load` if it is not there
    if text not in ("latest", "best"):
        hint = did_you_mean(text, ("latest", "best"), limit=0)
        raise ConfigError(f"checkpoint is {text!r}, and must be latest, best or the number of a step.{hint}")
    latest = store.latest()
    if latest is None:
        raise CheckpointError(f"{path}: holds no checkpoint. Give the folder of a run that has trained.")
    if text == "latest":
        return latest
    best = store.load(latest).state.get("validation", {}).get("best")
    if best is None:
        raise CheckpointError(
            f"{path}: nothing says which checkpoint is the best. Set validate.every, or evaluate.every and "
            "checkpoint.best, or give a step."
        )
    folder = store.run.checkpoint(best["step"])
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the best checkpoint is not kept. Set checkpoint.keep_best=true.")
    return folder
