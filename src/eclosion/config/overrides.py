"""`data.batch_size=32` from the command line."""

from collections.abc import Iterable
from typing import Any

from yaml import YAMLError

from eclosion.config.yaml_text import parse_yaml, yaml_problem
from eclosion.errors import ConfigError

__all__ = ["apply_overrides"]


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of a config tree with some values replaced.

    Args:
        tree: nested mappings, as read from a file.
        overrides: texts `path.to.key=value`; the value is read as YAML, so `[1, 2]`, `null` and `true` work.

    Raises:
        ConfigError: if a text is no override, or its path leads through something that is not a mapping.
    """
    result: dict[str, Any] = _copy(tree)
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{text!r} is not an override. Write path.to.key=value, such as train.batch_size=32.")
        try:
            parsed = parse_yaml(value)
        except YAMLError as error:
            raise ConfigError(f"{path}: {value!r} cannot be read: {yaml_problem(error)}") from error
        _put(result, keys, parsed, text)
    return result


def _put(tree: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        below = tree.get(key)
        if isinstance(below, str) and keys[depth] != "name":
            below = {"name": below}  # `sampler: ddim` is short for `sampler: {name: ddim}`
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{text}: {'.'.join(keys[:depth])} is {below!r}, which has no options. Change it whole.")
        tree[key] = below
        tree = below
    tree[keys[-1]] = value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
