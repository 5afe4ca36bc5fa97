"""The parts there are, with their options."""

import inspect
from dataclasses import dataclass

from eclosion.errors import ConfigError, MissingExtraError, did_you_mean
from eclosion.registry import TABLES, Option, describe, names, resolve

__all__ = ["PartInfo", "list_parts"]


@dataclass(frozen=True)
class PartInfo:
    """A part as `eclosion list` shows it.

    Attributes:
        table: where its name stands, such as "samplers".
        name: what a config calls it.
        summary: the first line of its documentation, or how to install what it needs.
        options: its options, empty if it cannot be loaded.
    """

    table: str
    name: str
    summary: str
    options: list[Option]


def list_parts(table: str | None = None) -> list[PartInfo]:
    """All parts, or those of one table, by name.

    Args:
        table: such as "samplers"; none means all.

    Raises:
        ConfigError: if there is no such table.
    """
    if table is not None and table not in TABLES:
        raise ConfigError(f"{table!r} is no table of parts.{did_you_mean(table, TABLES)}")
    return [_info(key, name) for key in ([table] if table else TABLES) for name in sorted(names(key))]


def _info(table: str, name: str) -> PartInfo:
    try:
        found = resolve(table, name)
    except MissingExtraError as error:
        return PartInfo(table, name, str(error), [])
    if not inspect.isclass(found):  # a dialect, which is a value
        return PartInfo(table, name, _first_line(inspect.getmodule(found.recognises)), [])
    return PartInfo(table, name, _first_line(found), describe(found))


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")
