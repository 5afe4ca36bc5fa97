"""`data.batch_size=32` from the command line."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from yaml import YAMLError

from eclosion.config.yaml_text import parse_yaml, yaml_problem
from eclosion.errors import ConfigError

__all__ = ["apply_overrides", "read_override"]

# One key of a path, with the places in lists that follow it: unets[0].
_KEY = re.compile(r"([^\[\]]+)((?:\[[0-9]{1,9}\])*)")


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of a config tree with some values replaced.

    Args:
        tree: nested mappings, as read from a file.
        overrides: texts `path.to.key=value`; the value is read as YAML, so `[1, 2]`, `null` and `true` work. A path may
            lead through a list that is there: `task.unets[1].image_size=64`.

    Raises:
        ConfigError: if a text is no override, or its path leads through something that is not a mapping.
    """
    result: dict[str, Any] = _copy(tree)
    for text in overrides:
        path, value = read_override(text)
        _put(result, _keys(path, text), value, text)
    return result


def read_override(text: str) -> tuple[str, Any]:
    """Path and value of a text `path.to.key=value`.

    Raises:
        ConfigError: if it is no override.
    """
    path, equals, value = text.partition("=")
    if not equals:
        raise _no_override(text)
    try:
        return path.strip(), parse_yaml(value)
    except YAMLError as error:
        raise ConfigError(f"{path}: {value!r} cannot be read: {yaml_problem(error)}") from error


def _no_override(text: str) -> ConfigError:
    return ConfigError(f"{text!r} is not an override. Write path.to.key=value, such as train.batch_size=32.")


def _keys(path: str, text: str) -> list[str | int]:
    """The steps of a path: names, and places in lists."""
    keys: list[str | int] = []
    for step in path.split("."):
        match = _KEY.fullmatch(step)
        if not match:
            raise _no_override(text)
        keys += [match[1], *map(int, re.findall("[0-9]+", match[2]))]
    return keys


def _put(tree: dict[str, Any], keys: list[str | int], value: Any, text: str) -> None:
    here: Any = tree
    for depth, (key, following) in enumerate(pairwise(keys), 1):
        below = here.get(key) if isinstance(key, str) else here[key]
        where = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys[:depth])[1:]
        if isinstance(following, int):
            if not isinstance(below, list) or following >= len(below):
                has = f"a list of {len(below)}" if isinstance(below, list) else repr(below)
                raise ConfigError(f"{text}: {where} is {has}, and has no [{following}].")
        else:
            if isinstance(below, str) and following != "name":
                below = {"name": below}  # `sampler: ddim` is short for `sampler: {name: ddim}`
            if below is None:
                below = {}
            if not isinstance(below, dict):
                raise ConfigError(f"{text}: {where} is {below!r}, which has no options. Change it whole.")
        here[key] = below
        here = below
    here[keys[-1]] = value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
