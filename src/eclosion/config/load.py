"""Read a config, find its dialect, translate, override, validate: the one way in."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from eclosion.config.dialect import Dialect, Translation
from eclosion.config.overrides import apply_overrides
from eclosion.config.schema import RunConfig
from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import DIALECTS, dump, resolve, table_of

__all__ = ["LoadedConfig", "leaves", "load"]

MAX_BYTES = 2**20


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, and where each value came from.

    Attributes:
        run: the config.
        origins: dotted path of a value -> "override", "config", the dialect's name, or "default".
        notes: what the user should know about a translated config.
    """

    run: RunConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


def load(config: object, overrides: Sequence[str] = ()) -> LoadedConfig:
    """A checked config from a file, a mapping, a foreign object or a `RunConfig`.

    Args:
        config: path of a YAML, JSON or TOML file; or a mapping; or an object of a known dialect.
        overrides: texts such as "train.batch_size=32", in native words.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    if isinstance(config, RunConfig):
        raw: Mapping[str, Any] = dump(config)
    elif isinstance(config, str | Path):
        raw = read_file(Path(config))
    else:
        raw = config if isinstance(config, Mapping) else attributes(config)
    name, translation = _translate(raw)
    tree = apply_overrides(translation.tree, overrides)
    run = validate(tree)
    return LoadedConfig(run, dict(_origins(run, translation.tree, name, overrides)), translation.notes)


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
                tree = yaml.safe_load(text)
            case ".json":
                tree = json.loads(text)
            case ".toml":
                tree = tomllib.loads(text)
            case other:
                raise ConfigError(f"{path}: {other or 'no suffix'!r} is no kind of config. Use .yaml, .json or .toml.")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, and must hold a mapping of settings.")
    return tree


def attributes(config: object) -> dict[str, Any]:
    """The settings of an object: its attributes and its class's, annotated or not."""
    found: dict[str, Any] = {}
    for cls in reversed(type(config).__mro__[:-1]):
        found |= vars(cls)
    found |= getattr(config, "__dict__", {})
    return {k: v for k, v in found.items() if not k.startswith("_") and not callable(v) and not isinstance(v, property)}


def _translate(raw: Mapping[str, Any]) -> tuple[str, Translation]:
    for name in DIALECTS:
        dialect: Dialect = resolve("dialects", name)  # type: ignore[assignment]
        if dialect.recognises(raw):
            return name, dialect.translate(raw)
    return "config", Translation({str(key): value for key, value in raw.items()})


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """The config that a native tree describes; ConfigError with every problem in it."""
    try:
        return TypeAdapter(RunConfig).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(_problems(error, tree)) from error


def _problems(error: ValidationError, tree: Mapping[str, Any]) -> list[str]:
    """One line per wrong setting; the branches of a union that refuse one value are one problem."""
    by_path: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        path, message = _explain(problem, tree)
        messages = by_path.setdefault(path, [])
        if message not in messages:
            messages.append(message)
    return [f"{path}: {' or '.join(m)}" if ":" not in m[0][:1] else f"{path}{m[0][1:]}" for path, m in by_path.items()]


def _explain(problem: Any, tree: Mapping[str, Any]) -> tuple[str, str]:
    location, kind = problem["loc"], problem["type"]
    if kind == "unexpected_keyword_argument":
        return _path(location), ":" + _unknown_key(location, tree)
    if kind in ("missing", "missing_keyword_only_argument"):
        return _path(location), ": is required."
    inside = _known_part(location, tree)
    value = problem["input"]
    given = f" (given: {value!r})" if isinstance(value, str | int | float | bool | None | list) else ""
    message = re.sub(r"^(Input|Value error,|Assertion failed,) ?", "", problem["msg"])
    if kind in ("part", "value_error"):  # our own words, which show the value where it helps
        given = ""
    return _path(inside), f"{message}{given}"


def _path(location: Sequence[str | int]) -> str:
    return ".".join(map(str, location)) or "config"


def _known_part(location: Sequence[str | int], tree: Any) -> tuple[str | int, ...]:
    """The part of an error's location that is a path in the config, without names of union branches."""
    inside: list[str | int] = []
    for key in location:
        if isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        elif isinstance(tree, list | tuple) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            break
        inside.append(key)
    return tuple(inside) or tuple(location)


def _unknown_key(location: Sequence[str | int], tree: Mapping[str, Any]) -> str:
    *above, key = location
    cls, name = _class_at(above, tree)
    owner = f" of {name!r}" if name else ""
    options = [f.name for f in dataclasses.fields(cls)]
    return f" is not an option{owner}.{did_you_mean(str(key), options)}"


def _class_at(location: Sequence[str | int], tree: Any) -> tuple[Any, str | None]:
    """The section or part whose options stand at a path, and its name in the config if it is a part."""
    cls: Any = RunConfig
    name: str | None = None
    for key in location:
        tree = tree[key]
        if isinstance(key, int):
            continue
        annotation = next(f.type for f in dataclasses.fields(cls) if f.name == key)
        table = table_of(annotation) or next(filter(None, map(table_of, get_args(annotation))), None)
        if table and not isinstance(tree, list):
            part = next(
                (getattr(f.default, "default", f.default) for f in dataclasses.fields(cls) if f.name == key), ""
            )
            name = tree if isinstance(tree, str) else tree.get("name", part)
            cls = resolve(table, str(name))
        elif table:
            cls, name = (table, None), None
        else:
            cls, name = annotation, None
    return cls, name


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config tree with its dotted path; lists and empty mappings are values."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _origins(run: RunConfig, tree: Mapping[str, Any], name: str, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    given = {path for path, _ in leaves(tree)}
    overridden = [text.partition("=")[0].strip() for text in overrides]
    for path, _ in leaves(dump(run)):
        if any(path == o or path.startswith(f"{o}.") for o in overridden):
            yield path, "override"
        else:
            written = any(path == g or path.startswith(f"{g}.") or path == f"{g}.name" for g in given)
            yield path, name if written else "default"
