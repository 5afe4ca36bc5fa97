"""What is to be said of an import: what differs, what was not there, what was left behind."""

from collections.abc import Iterator, Sequence

from eclosion.config.schema import RunConfig
from eclosion.importing.networks import Network
from eclosion.importing.original import OriginalFile

__all__ = ["notes_of"]


def notes_of(
    run: RunConfig,
    files: Sequence[OriginalFile],
    networks: Sequence[Network],
    *,
    step: int,
    samples_seen: int | None,
    compat: bool,
) -> Iterator[str]:
    """One line for each thing that is not as in the original, or not as in a run of ours."""
    if compat:
        yield (
            "the networks give the original's numbers, also where those were wrong (task.unets.*.model.compat); the "
            "data reaches their size as there: one pixel is picked of several (task.resize nearest)."
        )
    else:
        yield (
            "the networks give other numbers than the original, which they were not trained for: self-attention is "
            "scaled by 1/sqrt(d). Train them on before you judge their images."
        )
    yield from _about_averages(run, files, networks)
    yield from _about_steps(run, networks, step, samples_seen)
    yield from _about_embeddings(run)
    for network in networks:
        yield from network.notes
        yield from _about_optimizer(run, network)
    if any(file.kind == "checkpoint" for file in files):
        yield (
            "validation losses and the order of the data are not taken over: which checkpoint is best is decided anew, "
            "and the epoch that was under way begins anew."
        )


def _about_averages(run: RunConfig, files: Sequence[OriginalFile], networks: Sequence[Network]) -> Iterator[str]:
    for file in files:
        if file.kind == "model":
            yield (
                f"{file.path}: holds averages and no other weights, no moments and no counters: training goes on from "
                "the averages, with an optimizer that begins anew."
            )
    without = [network.name for network in networks if network.average is None]
    told = {f"unet_{i}" for file in files if file.kind == "model" for i in file.unets}
    if run.ema.decays and set(without) - told:
        yield f"{_all(sorted(set(without) - told))}: no average in the file; it begins as the weights."
    if not run.ema.decays and len(without) < len(networks):
        yield "the averages in the files are left out, as train.use_ema of the config is false."


def _about_embeddings(run: RunConfig) -> Iterator[str]:
    task, source = run.task, run.data.source
    follows = any(task.follows("image", i) for i in range(len(task.unets)))
    if follows and task.encoder is None and getattr(source, "img_embeddings_url", "") is None:
        yield (
            "no checkpoint says where image embeddings come from, as the original takes CLIP out of its config. Images "
            "can be made from an array of them; to train on, import with --config and the JSON file that was trained "
            "with, or with --set data.source.img_embeddings_url=..."
        )


def _about_optimizer(run: RunConfig, network: Network) -> Iterator[str]:
    """Where the optimizer of the file was set otherwise than the config says."""
    own = run.optimizer.networks.get(network.name)
    for key, was in network.options.items():
        special = getattr(own, key, None)
        now = getattr(run.optimizer, key) if special is None else special
        if was != now:
            yield (
                f"{network.name}: {key} of its optimizer was {was}, and the config says {now}, with which it goes on. "
                f"--set optimizer.{key}=... changes that."
            )


def _about_steps(run: RunConfig, networks: Sequence[Network], step: int, samples_seen: int | None) -> Iterator[str]:
    told = {network.name for network in networks if network.steps is not None}
    fresh = [network.name for network in networks if not network.has_moments and network.name in told]
    if fresh:
        yield f"{_all(fresh)}: no moments in the file; the optimizer begins anew."
    behind = {network.name: network.steps for network in networks if network.steps not in (None, step)}
    if behind:
        each = ", ".join(f"{name} has {steps}" for name, steps in behind.items())
        yield (
            f"the run counts {step} steps, and {each}: its learning rate, if it still warms up, goes by the count of "
            "the run."
        )
    if step and samples_seen is None:
        yield f"no file says how many images were seen; {step} steps of {run.train.batch_size} images are counted."


def _all(names: Sequence[str]) -> str:
    return " and ".join(names)
