"""Read a config, find its dialect, translate, override, validate: the one way in."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yaml import YAMLError

from eclosion.config.dialect import Dialect, Translation, name_keys
from eclosion.config.explain import checked, left_out, without_unknown
from eclosion.config.overrides import apply_overrides, read_override
from eclosion.config.schema import RunConfig
from eclosion.config.yaml_text import parse_yaml, yaml_problem
from eclosion.errors import ConfigError
from eclosion.redaction import cleaned, holds_token, remember_url
from eclosion.registry import DIALECTS, dump, resolve

__all__ = ["LoadedConfig", "leaves", "load", "translated"]

MAX_BYTES = 2**20
NOT_HERE = "and configs are kept and shown. Take it out, put it into the environment, and better make a new one."


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, and where each value came from.

    Attributes:
        run: the config.
        origins: dotted path of a value -> "override", "config", the dialect's name, or "default".
        notes: what the user should know about a translated config.
        keys: what a translated config calls the options, as in `Translation`.
    """

    run: RunConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)


def load(config: object, overrides: Sequence[str] = (), *, lenient: bool = False) -> LoadedConfig:
    """A checked config from a file, a mapping, a foreign object or a `RunConfig`.

    Args:
        config: path of a YAML, JSON or TOML file; or a mapping; or an object of a known dialect.
        overrides: texts such as "train.batch_size=32", in native words.
        lenient: whether keys that are unknown are left out with a note, and not refused.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    try:
        return _loaded(config, overrides, lenient=lenient)
    except ConfigError as error:
        raise ConfigError([cleaned(problem) for problem in error.problems]) from error
    except RecursionError as error:
        raise ConfigError("config: is nested deeper than any config is.") from error


def _loaded(config: object, overrides: Sequence[str], *, lenient: bool) -> LoadedConfig:
    name, translation = translated(config, lenient=lenient)
    tree, unknown = apply_overrides(translation.tree, overrides), list[str]()
    for _, text in _texts(tree):
        remember_url(text)
    if lenient:
        tree, unknown = without_unknown(RunConfig, tree)
    try:
        run = validate(tree)
    except ConfigError as error:
        name_keys(error, translation.keys)
        raise
    if told := [path for path, text in _texts(tree) if holds_token(text)]:
        raise ConfigError([f"{path}: holds a token or a key, {NOT_HERE}" for path in told])
    notes = [cleaned(note) for note in (*left_out(unknown), *translation.notes)]
    return LoadedConfig(run, dict(_origins(run, translation.tree, name, overrides)), tuple(notes), translation.keys)


def translated(config: object, *, lenient: bool = False) -> tuple[str, Translation]:
    """A config in native words, not checked yet, and where they are from: "config", or the name of a dialect."""
    if isinstance(config, RunConfig):
        raw: Mapping[str, Any] = dump(config, whole=True)
    elif isinstance(config, str | Path):
        raw = read_file(Path(config))
    else:
        raw = config if isinstance(config, Mapping) else attributes(config)
    for name in DIALECTS:
        dialect: Dialect = resolve("dialects", name)  # type: ignore[assignment]
        if dialect.recognises(raw):
            return name, dialect.translate(raw, lenient=lenient)
    return "config", Translation({str(key): value for key, value in raw.items()})


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that a config file holds.

    Raises:
        ConfigError: if the file is missing, too large, of an unknown kind, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). `eclosion init` writes a config.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB, which no config is.")
    try:
        text = content.decode()
        match path.suffix.lower():
            case ".yaml" | ".yml":
                tree = parse_yaml(text)
            case ".json":
                tree = json.loads(text)
            case ".toml":
                tree = tomllib.loads(text)
            case other:
                raise ConfigError(f"{path}: {other or 'no suffix'!r} is no kind of config. Use .yaml, .json or .toml.")
    except YAMLError as error:
        raise ConfigError(f"{path}: {yaml_problem(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested deeper than any config is.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, and must hold a mapping of settings.")
    tree.pop("$schema", None)  # for editors
    return tree


def attributes(config: object) -> dict[str, Any]:
    """The settings of an object: its attributes and its class's, annotated or not."""
    found: dict[str, Any] = {}
    for cls in reversed(type(config).__mro__[:-1]):
        found |= vars(cls)
    found |= getattr(config, "__dict__", {})
    hidden = (property, classmethod)
    return {k: v for k, v in found.items() if not (k.startswith("_") or callable(v) or isinstance(v, hidden))}


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """The config that a native tree describes; ConfigError with every problem in it."""
    return checked(RunConfig, {key: value for key, value in tree.items() if value is not None})  # a bare heading


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config tree with its path, such as "task.unets[0].image_size".

    Empty mappings are values, and so are lists, except those of mappings.
    """
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple) and tree and all(isinstance(item, Mapping) for item in tree):
        for i, item in enumerate(tree):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, tree


def _texts(tree: Any) -> Iterator[tuple[str, str]]:
    """Every text in a config tree, with its path."""
    for path, value in leaves(tree):
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str | Path):
                yield path, str(item)


def _origins(run: RunConfig, tree: Mapping[str, Any], name: str, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    overridden = {path: value for text in overrides for path, value in leaves(*reversed(read_override(text)))}
    written = {"override": overridden, name: dict(leaves(tree))}
    for path, _ in leaves(dump(run)):
        yield path, next((origin for origin, given in written.items() if _decides(path, given)), "default")


def _decides(path: str, given: Mapping[str, Any]) -> bool:
    """Whether a value was written at a path, or a mapping that is one value; a part's bare name is not its options."""
    above, _, last = path.rpartition(".")
    inside = any(key.startswith(f"{path}.") for key in given)
    of, bracket, _ = path.partition("[")  # a list, that was written as names or as a mapping
    listed = bool(bracket) and (of in given or any(key.startswith(f"{of}.") for key in given))
    return path in given or inside or listed or (last == "name" and above in given)
