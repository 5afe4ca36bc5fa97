"""A source and an encoder as the command line names them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eclosion.config.explain import checked
from eclosion.config.load import load, read_file
from eclosion.config.overrides import apply_overrides
from eclosion.errors import ConfigError
from eclosion.redaction import scheme_of
from eclosion.registry import names, resolve

__all__ = ["encoder_of", "shards_or_text", "source_of", "source_or_config", "source_or_shards"]

CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def source_of(text: str, overrides: Sequence[str], *, otherwise: str, option: str) -> Any:
    """The source of a config file; a source by its name; or else the text as an option of one kind of source.

    Args:
        text: such as "config.yaml", "butterflies" or "path/to/images".
        overrides: of the config, such as "data.source.size=100"; without a config, of the source alone: "size=100", or
            as messages about it say it, "data.source.size=100".
        otherwise: name of the source that takes any other text.
        option: the option of that source which the text is.

    Raises:
        ConfigError: if something of it is wrong.
    """
    if text.lower().endswith(CONFIG_SUFFIXES):
        return load(text, overrides).run.data.source
    given = [override.removeprefix("data.source.") for override in overrides]
    if text in names("sources"):
        return checked(resolve("sources", text), apply_overrides({}, given))
    return checked(resolve("sources", otherwise), apply_overrides({option: text}, given))


def source_or_shards(text: str, overrides: Sequence[str]) -> Any:
    """As `source_of`; any other text is the URL of shards if it looks like one, or else a folder of images."""
    if _is_shards(text):
        return source_of(text, overrides, otherwise="webdataset", option="webdataset_base_url")
    return source_of(text, overrides, otherwise="folder", option="root")


def shards_or_text(text: str | None) -> Any:
    """The source of shards if a text looks like their URL, or else the text as it is."""
    return text if text is None or not _is_shards(text) else source_or_shards(text, [])


def _is_shards(text: str) -> bool:
    return "{" in text or text.lower().endswith(".tar") or bool(scheme_of(text))


def source_or_config(text: str, overrides: Sequence[str]) -> Any:
    """As `source_or_shards`; of a config file all, as its options say what is done to the images."""
    if text.lower().endswith(CONFIG_SUFFIXES):
        return load(text, overrides).run
    return source_or_shards(text, overrides)


def encoder_of(text: str | None, source: str, overrides: Sequence[str]) -> Any:
    """The encoder that a text names; without one, that of the config.

    Args:
        text: such as "efficientnet_lite0", "clip,model=ViT-B/32" or "encoder.yaml" with its name and options.
        source: as `source_of` takes it.
        overrides: of the config, if the source is one.

    Raises:
        ConfigError: if something of it is wrong, or nothing names an encoder.
    """
    if text is None:
        if source.lower().endswith(CONFIG_SUFFIXES):
            encoder = getattr(load(source, overrides).run.task, "encoder", None)
            if encoder is not None:
                return encoder
        raise ConfigError(f"Name an encoder: --encoder={', '.join(sorted(names('encoders')))}.")
    if text.lower().endswith(CONFIG_SUFFIXES):
        options = read_file(Path(text))
        name = str(options.pop("name", ""))
    else:
        name, *given = text.split(",")
        options = apply_overrides({}, given)
    return checked(resolve("encoders", name), options)
