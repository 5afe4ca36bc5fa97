"""A source as the command line names it."""

from collections.abc import Sequence
from typing import Any

from eclosion.config.explain import checked
from eclosion.config.load import load
from eclosion.config.overrides import apply_overrides
from eclosion.registry import names, resolve

__all__ = ["source_of"]

CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def source_of(text: str, overrides: Sequence[str], *, otherwise: str, option: str) -> Any:
    """The source of a config file; a source by its name; or else the text as an option of one kind of source.

    Args:
        text: such as "config.yaml", "butterflies" or "path/to/images".
        overrides: of the config, such as "data.source.size=100"; without a config, of the source alone: "size=100".
        otherwise: name of the source that takes any other text.
        option: the option of that source which the text is.

    Raises:
        ConfigError: if something of it is wrong.
    """
    if text.lower().endswith(CONFIG_SUFFIXES):
        return load(text, overrides).run.data.source
    if text in names("sources"):
        return checked(resolve("sources", text), apply_overrides({}, overrides))
    return checked(resolve("sources", otherwise), apply_overrides({option: text}, overrides))
