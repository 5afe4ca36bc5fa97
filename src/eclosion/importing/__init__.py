"""From checkpoints of DALLE2-pytorch to a run that goes on: `import_checkpoint`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eclosion.checkpoint import disk, storage
from eclosion.config.schema import RunConfig
from eclosion.device import environment
from eclosion.errors import ConfigError
from eclosion.importing.fitting import check_fits, facts_of
from eclosion.importing.networks import Network, collect, translate
from eclosion.importing.notes import notes_of
from eclosion.importing.original import OriginalFile, read_original
from eclosion.importing.settings import arguments_of, native_run, original_config
from eclosion.registry import dump
from eclosion.rundir import RunDir

__all__ = ["Imported", "import_checkpoint", "write_run"]


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Attributes:
        folder: the run folder.
        step, samples_seen: optimizer updates and images behind its checkpoint.
        networks: name -> optimizer updates behind it, in the order of the cascade; None if the file does not say.
        notes: what differs from the original, what was not taken over, and what to know, one line each.
    """

    folder: Path
    step: int
    samples_seen: int
    networks: Mapping[str, int | None]
    notes: Sequence[str]


def import_checkpoint(
    checkpoints: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    compat: bool = True,
    lenient: bool = False,
) -> Imported:
    """Make a run folder from checkpoints of DALLE2-pytorch's decoder; nothing in them is run.

    The folder holds what the original's trainer held, as far as there is a place for it: weights, averages, moments of
    the optimizer, counters. `train`, `sample` and `export` take it like any other.

    Args:
        checkpoints: a file that its trainer saved, or several of one cascade that was trained in parts. Each network
            is in exactly one of them.
        out: the run folder to make; must be new or empty. It appears whole or not at all.
        config: the JSON file, or its content, that the checkpoint was trained with; none takes it from the checkpoint.
        overrides: texts such as "data.source.webdataset_base_url=shards/{}.tar", in native words.
        compat: whether the networks give the original's numbers where those were wrong. They were trained so.
        lenient: whether unknown keys of `config` are left out with a note, and not refused.

    Raises:
        ConfigError: if `out` holds something, or the config is missing, wrong or of another cascade.
        CheckpointError: if a file cannot be read, is not what it should be, or networks are missing or there twice.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if not given:
        raise ConfigError("no checkpoint is given. Give the .pth files that DALLE2-pytorch saved, and last the folder.")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty. Choose a new folder for the run.")
    files = [read_original(Path(path)) for path in given]
    settings = original_config(files, config)
    unets = collect(files, len(settings.decoder["unets"]))
    run, said = native_run(settings, output=str(out), overrides=overrides, compat=compat, lenient=lenient)
    arguments = arguments_of(settings.decoder)
    check_fits(run, arguments, files, compat=compat)
    networks = [translate(unet, options) for unet, options in zip(unets, arguments, strict=True)]

    step = max(network.steps or 0 for network in networks)
    samples_seen = max((file.samples_seen for file in files if file.samples_seen is not None), default=None)
    notes = [*said, *notes_of(run, files, networks, step=step, samples_seen=samples_seen, compat=compat)]
    seen = step * run.train.batch_size if samples_seen is None else samples_seen
    write_run(target, run, networks, files, step=step, samples_seen=seen, facts=facts_of(run, arguments))
    return Imported(target, step, seen, {network.name: network.steps for network in networks}, notes)


def write_run(
    target: Path,
    run: RunConfig,
    networks: Sequence[Network],
    files: Sequence[OriginalFile],
    *,
    step: int,
    samples_seen: int,
    facts: Mapping[str, Any],
) -> Path:
    """Make a run folder with one checkpoint, beside its place, and move it there when it is whole.

    Returns:
        The checkpoint.
    """
    config = dump(run)
    meta = {
        "config": config,
        "fingerprint": None,  # nobody knows the data; the first resume accepts any
        "facts": facts,
        "environment": environment(torch.device("cpu")) | {"precision": "no", "world_size": 1},
        "started_from": None,
        "imported": [{"file": str(file.path), "kind": file.kind, "version": file.version} for file in files],
    }
    # Without an account of what was delivered, which tells a resume that the epochs so far had another order.
    state = {"step": step, "samples_seen": samples_seen, "losses": {}, "last_loss": {}}
    with disk.explained(target, "written", "Nothing of it was."), disk.unpublished(target) as aside:
        folder = RunDir(aside)
        storage.write(folder.checkpoint(step), dict(_entries(run, networks)), state, meta)
        text = json.dumps(config, indent=2) + "\n"
        disk.write_file(folder.config, [memoryview(text.encode())])
        disk.fsync_folder(aside)
        aside.rename(target)
        disk.fsync_folder(target.parent)
    return RunDir(target).checkpoint(step)


def _entries(run: RunConfig, networks: Sequence[Network]) -> dict[str, Mapping[str, Tensor]]:
    """What a checkpoint holds of each network, by file, as `Stage.tensors` gives it."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for network in networks:
        found[network.name] = network.weights
        for i, decay in enumerate(run.ema.decays):
            found[f"{network.name}.{'ema' if i == 0 else f'ema-{decay}'}"] = network.average or network.weights
        found[f"{network.name}.optimizer"] = network.slots
    return found
