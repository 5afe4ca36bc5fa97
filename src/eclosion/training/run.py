"""`train`: from a config to a run folder."""

import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eclosion.config.dialect import name_keys
from eclosion.config.load import LoadedConfig, load
from eclosion.config.schema import RunConfig
from eclosion.data.source import Samples, ShardedSamples
from eclosion.data.torch_dataset import TorchDatasetSamples
from eclosion.device import pick_device
from eclosion.errors import ConfigError, EnvironmentProblem, Interrupted, LockedError, OutOfMemory, UserError
from eclosion.redaction import cleaned
from eclosion.rundir import RunDir
from eclosion.training.distributed import world
from eclosion.training.loop import run_until_done
from eclosion.training.signals import StopRequested, StopSignals

__all__ = ["train"]

# How torch.distributed words the loss of another process.
LOST = ("Connection closed by peer", "Connection reset", "connection was closed", "NCCL", "Timed out waiting")


def train(
    config: object,
    overrides: Sequence[str] = (),
    *,
    dataset: Any = None,
    resume: str = "auto",
    accept_changes: bool = False,
    lenient: bool = False,
) -> Path:
    """Train a model, from scratch or from where the run stands.

    Args:
        config: path of a YAML, JSON or TOML file; a mapping; or the config object of the Hugging Face tutorial.
        overrides: texts such as "train.batch_size=32".
        dataset: a map-style `torch.utils.data.Dataset` to train on instead of `data.source`.
        resume: "auto" goes on from the newest whole checkpoint, "never" starts anew, and the path of a
            checkpoint starts from it.
        accept_changes: whether changed schedule keys, such as the duration, are accepted on resume.
        lenient: whether unknown keys of the config are left out with a warning, and not refused.

    Returns:
        The run folder.

    Raises:
        UserError: and its kin, each one line that says what to do.
    """
    if dataset is not None:
        overrides = [*overrides, "data.source=dataset"]
    loaded = load(config, overrides, lenient=lenient)
    for note in loaded.notes if os.environ.get("RANK", "0") == "0" else ():  # once, not by every process of torchrun
        warnings.warn(note, stacklevel=2)
    run = loaded.run
    with StopSignals() as stop, _told(loaded):
        try:
            samples = run.data.source.open() if dataset is None else TorchDatasetSamples(dataset)
            with _closing(samples), world(pick_device(run.train.device).type) as w:
                run_until_done(run, samples, world=w, stop=stop, resume=resume, accept=accept_changes)
        except StopRequested:
            raise Interrupted(
                stop.received,
                f"{run.output}: stopped before the first step or after the last; nothing was lost. Start it again.",
            ) from None
    return Path(run.output)


@contextmanager
def _closing(samples: Samples) -> Iterator[None]:
    """Let samples in shards stop what they fetch, when a run ends."""
    try:
        yield
    finally:
        if isinstance(samples, ShardedSamples):
            samples.close()


@contextmanager
def _told(loaded: LoadedConfig) -> Iterator[None]:
    """Turn what a machine may do to a run into one line; keep the traceback in the run folder."""
    run = loaded.run
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        raise
    except Exception as error:  # raised again, always
        if not isinstance(error, ConfigError | LockedError):  # the folder may be another run's
            _keep_traceback(run, error)
        told = _as_user_error(error, run)
        if isinstance(told, UserError):
            name_keys(told, loaded.keys)
        if told is error:
            raise
        raise told from error


def _keep_traceback(run: RunConfig, error: Exception) -> None:
    path = RunDir(Path(run.output)).error_log
    if path.parent.is_dir():
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(cleaned("".join(traceback.format_exception(error))) + "\n")
        except OSError:
            return  # a full disk must not hide the error itself


def _as_user_error(error: Exception, run: RunConfig) -> Exception:
    if isinstance(error, UserError):
        return error
    if _is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory with {run.train.batch_size} images a step. Set train.micro_batch_size lower (the result "
            "stays the same), train.gradient_checkpointing=true, or a smaller data.image_size, task.model or "
            "sample.num_images. Checkpoints are intact."
        )
    world_size = os.environ.get("WORLD_SIZE", "1")
    if isinstance(error, RuntimeError) and world_size != "1" and any(word in str(error) for word in LOST):
        return EnvironmentProblem(
            f"process {os.environ.get('RANK')} of {world_size} lost another one, which ended first: its message says "
            "why. Checkpoints are intact; start the run again to go on."
        )
    if isinstance(error, OSError):
        where = error.filename or run.output
        return EnvironmentProblem(f"{where}: {error.strerror or error}. Checkpoints are intact.")
    return error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in said or "out of memory" in said)
