"""Which config an import goes by, what it says of each network of the original, and the run that it describes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclosion.config import dalle2
from eclosion.config.dialect import Translation
from eclosion.config.load import read_file, validate
from eclosion.config.overrides import apply_overrides
from eclosion.config.schema import RunConfig
from eclosion.errors import ConfigError
from eclosion.importing.original import OriginalFile

__all__ = ["Settings", "arguments_of", "decoder_of", "native_run", "original_config", "translated"]


@dataclass(frozen=True)
class Settings:
    """What the original was told.

    Attributes:
        tree: its config, as of its JSON file.
        where: the file that it is from, for messages.
        embedded: whether that is a checkpoint.
    """

    tree: Mapping[str, Any]
    where: str
    embedded: bool

    @property
    def decoder(self) -> Mapping[str, Any]:
        """Section `decoder`, which has U-Nets."""
        return decoder_of(self.tree, self.where)


def original_config(files: Sequence[OriginalFile], config: str | Path | Mapping[str, Any] | None) -> Settings:
    """The settings of DALLE2-pytorch that the files were made with: given, or from the first file that holds them.

    Raises:
        ConfigError: if there are none, or a file of settings cannot be read.
    """
    if isinstance(config, Mapping):
        return Settings(config, "config", embedded=False)
    if config is not None:
        return Settings(read_file(Path(config)), str(config), embedded=False)
    for file in files:
        if file.config is not None:
            return Settings(file.config, f"{file.path}: config", embedded=True)
    raise ConfigError(
        f"{', '.join(str(file.path) for file in files)}: holds no config. Give the JSON file that it was trained with: "
        "--config decoder.json."
    )


def decoder_of(tree: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Section `decoder` of the original's settings, with at least one U-Net."""
    decoder = tree.get("decoder")
    unets = decoder.get("unets") if isinstance(decoder, Mapping) else None
    if not isinstance(unets, list | tuple) or not unets or not all(isinstance(unet, Mapping) for unet in unets):
        raise ConfigError(
            f"{where}: has no decoder.unets. Give the JSON file of DALLE2-pytorch that the checkpoint was trained with."
        )
    return decoder  # type: ignore[return-value]


def arguments_of(decoder: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each U-Net the arguments of the original's constructor, after its decoder has overwritten some.

    Args:
        decoder: section `decoder` of settings that `translated` has taken.
    """
    unets = decoder["unets"]
    conditional = not decoder.get("unconditional")
    channels = decoder.get("channels") or 3
    learned = _first_only(decoder.get("learned_variance", True), len(unets))
    noisy = _upsamplers(decoder.get("use_noise_for_lowres_cond", False), len(unets))
    return [
        {
            "dim_mults": (1, 2, 4, 8),
            **unet,
            "cond_on_image_embeds": conditional and i == 0,
            "cond_on_text_encodings": conditional and bool(unet.get("cond_on_text_encodings")),
            "channels": channels,
            "channels_out": channels * 2 if learned[i] else channels,
            "lowres_cond": i > 0,
            "lowres_noise_cond": noisy[i],
        }
        for i, unet in enumerate(unets)
    ]


def _first_only(value: Any, count: int) -> list[bool]:
    """A flag of the decoder for each network; what is not said is off, so that one answer is for the first alone."""
    given = list(value) if isinstance(value, list | tuple) else [value]
    return [bool(flag) for flag in (given + [False] * count)[:count]]


def _upsamplers(value: Any, count: int) -> list[bool]:
    """A flag of the upsamplers for each network; one answer is for all of them, and the first network is none."""
    given = list(value) if isinstance(value, list | tuple) else [value] * (count - 1)
    if len(given) == count - 1:
        given = [False, *given]
    return [bool(flag) for flag in (given + [False] * count)[:count]]


# Where the original wrote and what it measured, in the place of what cannot be mended in a checkpoint.
ELSEWHERE: dict[str, Any] = {"tracker": {}, "evaluate": {}}
# Stands for an address that is not known, until the config is translated.
UNKNOWN = "unknown"


def _keep_numbers(task: dict[str, Any], *, compat: bool) -> None:
    """Set in a native section `task` whether networks and the images they see are as in the original."""
    for i, unet in enumerate(task["unets"]):
        unet["model"]["compat"] = compat
        if compat and i:  # the smaller image of the data; one that a network made is enlarged alike either way
            unet["lowres"] = {**(unet.get("lowres") or {}), "resize": "nearest"}
    if compat:
        task["resize"] = "nearest"


def _for_import(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint without what has no meaning any more, and with what the original takes out of it.

    The first is a mask, as each file had its own and all networks come together here, and the device, which every
    checkpoint states and the original never obeyed. The second is CLIP: of a network that was told what CLIP made of
    the images, a checkpoint does not say where embeddings come from.
    """
    train, data = tree.get("train"), tree.get("data")
    if isinstance(train, Mapping):
        train = {key: value for key, value in train.items() if key not in ("unet_training_mask", "device")}
    if isinstance(data, Mapping):
        decoder = decoder_of(tree, "config")
        text = any(unet.get("cond_on_text_encodings") for unet in decoder["unets"])
        wanted = {"img_embeddings_url": True, "text_embeddings_url": text}
        wanted = {} if decoder.get("unconditional") or decoder.get("clip") else wanted
        unknown = [key for key, told in wanted.items() if told and not data.get(key)]
        data = {**data, **dict.fromkeys(unknown, UNKNOWN)}
    return {**tree, "train": train, "data": data, **ELSEWHERE}


# What the original's code does where its README says something else; files were made by its code.
DEFAULTS: dict[str, dict[str, Any]] = {"decoder": {"beta_schedule": None}, "train": {"ema_beta": 0.999}}


def _with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was written, with the defaults that the original took.

    Without the checkpoint that it may have loaded at its start: what is imported takes its place.
    """
    sections = {key: {**defaults, **_section(tree, key)} for key, defaults in DEFAULTS.items()}
    if "tracker" in tree:
        sections["tracker"] = {key: value for key, value in _section(tree, "tracker").items() if key != "load"}
    return {**tree, **sections}


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = tree.get(key)
    return section if isinstance(section, Mapping) else {}


def translated(settings: Settings, *, lenient: bool = False) -> Translation:
    """What the original was told in native words; ConfigError with every problem in it."""
    if settings.embedded:
        found = dalle2.translate(_for_import(settings.tree), lenient=True)
        del found.tree["checkpoint"]["keep_best"]  # as a run of ours, it keeps its best
        return found
    return dalle2.translate(_with_defaults(settings.tree), lenient=lenient)


def native_run(
    settings: Settings, *, output: str, overrides: Sequence[str], compat: bool, lenient: bool
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run that goes on from the files, and what is to be said of its config.

    Args:
        settings: of the original.
        output: the run folder.
        overrides: texts such as "train.batch_size=32".
        compat: whether the networks give the original's numbers where those were wrong.
        lenient: whether unknown keys are left out with a note; those in a checkpoint always are.

    Raises:
        ConfigError: with every problem.
    """
    try:
        translation = translated(settings, lenient=lenient)
        native = translation.tree
        _keep_numbers(native["task"], compat=compat)
        # A finished run that may be overwritten would begin from scratch, in the place of what was imported.
        native |= {"output": output, "overwrite": False}
        source = native["data"]["source"]
        native["data"]["source"] = {key: None if value == UNKNOWN else value for key, value in source.items()}
        run = validate(apply_overrides(native, overrides))
    except ConfigError as error:
        cure = [f"This is the config in {settings.where.partition(': ')[0]}; --config takes its place."]
        raise ConfigError([*error.problems, *(cure if settings.embedded else [])]) from error
    # A config in a checkpoint states every default, and with them much that has no effect.
    return run, () if settings.embedded else translation.notes
