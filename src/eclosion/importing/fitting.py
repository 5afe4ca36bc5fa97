"""Whether a run and the files that it is to go on from are of the same cascade."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from eclosion.config.schema import RunConfig
from eclosion.errors import ConfigError
from eclosion.importing.original import OriginalFile
from eclosion.importing.settings import Settings, arguments_of, translated
from eclosion.models.unclip_import import network_options, original_parameters
from eclosion.models.unclip_unet import UnclipUNet
from eclosion.registry import dump

__all__ = ["check_fits", "facts_of"]

# Shares of variance that this far apart are of another schedule; ours keep a little away from 0 where theirs end there.
SCHEDULE_TOLERANCE = 2e-3


def check_fits(
    run: RunConfig, arguments: Sequence[Mapping[str, Any]], files: Sequence[OriginalFile], *, compat: bool
) -> None:
    """Refuse what would make the imported networks others than they were.

    Args:
        run: that is to go on.
        arguments: of the constructor of each of the original's U-Nets, from the config that is gone by.
        files: what is imported.
        compat: whether the networks give the original's numbers.

    Raises:
        ConfigError: with every difference between the config and what the files say of themselves.
    """
    problems: list[str] = []
    for file in files:
        problems += _wrong_count(file, len(arguments))
        problems += _wrong_options(file, arguments)
        problems += _wrong_noise(file, run)
    problems += _wrong_networks(run, arguments, compat=compat)
    if problems:
        raise ConfigError(problems)


def facts_of(run: RunConfig, arguments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of its data: the shapes of what the networks were told."""
    shapes: dict[str, list[int]] = {}
    for unet in arguments:
        if unet["cond_on_image_embeds"]:
            shapes["image_embed"] = [unet["image_embed_dim"]]
        if unet["cond_on_text_encodings"]:
            shapes["text_encodings"] = [unet.get("max_text_len") or 256, unet["text_embed_dim"]]
    where = {"image_embed": "img_embeddings_url", "text_encodings": "text_embeddings_url"}
    made = [name for name in shapes if run.task.encoder is not None and not getattr(run.data.source, where[name], None)]
    return {
        "class_names": [],
        "num_samples": None,
        "arrays": {name: shape for name, shape in shapes.items() if name not in made},
        "made": {name: shape for name, shape in shapes.items() if name in made},
    }


def _wrong_count(file: OriginalFile, count: int) -> Iterator[str]:
    if file.num_unets > count or (file.alphas_cumprod and file.num_unets != count):
        yield (
            f"{file.path}: is of a cascade of {file.num_unets} networks, and decoder.unets of the config has {count}. "
            "Give the config that it was trained with."
        )


def _wrong_options(file: OriginalFile, arguments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Options of a network, where the file says them and the config says others."""
    if file.config is None:
        return
    settings = Settings(file.config, f"{file.path}: config", embedded=True)
    try:
        translated(settings)
    except ConfigError:  # it is not gone by, and the weights say whether the other one is right
        return
    own = arguments_of(settings.decoder)
    for i in file.unets:
        if i < min(len(own), len(arguments)):
            was, given = _options(own[i]), _options(arguments[i])
            for key in (key for key in was if was[key] != given[key]):
                yield (
                    f"{file.path}: unet_{i} was trained with {key} {was[key]}, and the config says {given[key]}. Give "
                    "the config that it was trained with."
                )


def _wrong_noise(file: OriginalFile, run: RunConfig) -> Iterator[str]:
    """Noise levels, which a file holds as numbers."""
    for i, unet in enumerate(run.task.unets):
        theirs, ours = file.alphas_cumprod.get(i), unet.noise_schedule.build().alphas_cumprod
        if theirs is None:
            continue
        if len(ours) != theirs.numel():
            yield (
                f"{file.path}: unet_{i} was trained with {theirs.numel()} noise levels, and decoder.timesteps of the "
                f"config is {len(ours)}."
            )
        elif not torch.allclose(ours, theirs.detach().double().reshape(-1), rtol=0, atol=SCHEDULE_TOLERANCE):
            yield (
                f"{file.path}: unet_{i} was trained with other noise levels than those of "
                f"{dump(unet.noise_schedule)['name']!r}, which the config says. Mend decoder.beta_schedule."
            )


def _wrong_networks(run: RunConfig, arguments: Sequence[Mapping[str, Any]], *, compat: bool) -> Iterator[str]:
    """Networks of the run that are not those of the original."""
    image = next((unet.get("image_embed_dim") for unet in arguments if unet["cond_on_image_embeds"]), None)
    text = next((unet.get("text_embed_dim") for unet in arguments if unet["cond_on_text_encodings"]), None)
    task = run.task.on({}, size=run.data.size, image_embed_dim=image, text_embed_dim=text)
    for tier, unet in zip(task.tiers, arguments, strict=True):
        with torch.device("meta"):  # without memory for its weights
            net = tier.build()
        have, wanted = _plain(net), _options(unet) | {"compat": compat}
        for key in (key for key in wanted if have[key] != wanted[key]):
            yield f"{tier.name}: {key} is {have[key]} in the run, and must be {wanted[key]}."
        more = sorted(net.state_dict().keys() - {p.ours for p in original_parameters(unet)})
        if more:
            yield (
                f"{tier.name}: the original has no {more[0]}, as its cond_dim is its image_embed_dim. Leave out "
                "--no-compat."
            )


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the network that an original U-Net's weights fit, defaults included."""
    with torch.device("meta"):
        return _plain(UnclipUNet(**network_options(arguments)))


def _plain(net: UnclipUNet) -> dict[str, Any]:
    """A network's options without what the library adds, comparable."""
    options = {key: value for key, value in net.config.items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
