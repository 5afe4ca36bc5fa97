"""A checkpoint of DALLE2-pytorch that a run of its own config starts from."""

import shutil
from pathlib import Path

from eclosion.config.schema import RunConfig
from eclosion.errors import ConfigError
from eclosion.importing import write_run
from eclosion.importing.fitting import check_fits, facts_of
from eclosion.importing.networks import collect, translate
from eclosion.importing.original import read_original
from eclosion.importing.settings import arguments_of, original_config

__all__ = ["import_for"]


def import_for(run: RunConfig, file: Path, out: Path) -> Path:
    """Bring a checkpoint of the original over for a run; nothing in it is run.

    Args:
        run: the config that goes on with it, whose networks must be those of the file.
        file: that the original's trainer saved. It holds its config.
        out: a folder of ours for what comes of it; replaced if it is there.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: if the run is of other networks, or the file holds no config.
        CheckpointError: if the file cannot be read, or is not what it should be.
    """
    unets = getattr(run.task, "unets", None)
    if not unets:
        raise ConfigError(f"{file}: is a checkpoint of DALLE2-pytorch's decoder, and task is not unclip_decoder.")
    files = [read_original(file)]
    try:
        settings = original_config(files, None)
    except ConfigError as error:
        raise ConfigError(
            f"{file}: holds no config, so that nothing says what its networks are. Bring it over with "
            f"`eclosion import {file.name} RUN --config decoder.json`, and train RUN."
        ) from error
    arguments = arguments_of(settings.decoder)
    compat = bool(unets[0].model.compat)
    if len(arguments) != len(unets):
        raise ConfigError(f"{file}: is of a cascade of {len(arguments)} networks, and task.unets has {len(unets)}.")
    found = collect(files, len(unets))
    check_fits(run, arguments, files, compat=compat)
    networks = [translate(unet, options) for unet, options in zip(found, arguments, strict=True)]
    step = max(network.steps or 0 for network in networks)
    samples_seen = files[0].samples_seen
    seen = step * run.train.batch_size if samples_seen is None else samples_seen
    if out.exists():
        shutil.rmtree(out)
    return write_run(out, run, networks, files, step=step, samples_seen=seen, facts=facts_of(run, arguments))
