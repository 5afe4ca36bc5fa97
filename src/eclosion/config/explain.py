"""What is wrong with a config, in one line per problem, with its path."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from eclosion.config.schema import RunConfig
from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import PartOf, dump, resolve, type_name

__all__ = ["misread", "problems"]

Path = Sequence[str | int]


def problems(error: ValidationError, tree: Mapping[str, Any]) -> list[str]:
    """One line per wrong setting; the branches of a union that refuse one value are one problem.

    Args:
        error: what pydantic says.
        tree: the config that it says it of.
    """
    by_path: dict[tuple[str | int, ...], str] = {}
    for problem in error.errors(include_url=False):
        path = _inside(problem["loc"], tree)
        by_path.setdefault(path, _explain(path, problem, tree))
    return list(by_path.values())


def misread(run: RunConfig, tree: Mapping[str, Any]) -> list[str]:
    """The settings that were taken for something else than was written, such as `true` for 1; one line each."""
    return [
        _wrong_type(path, written, tree)
        for path, written, taken in _pairs((), tree, dump(run))
        if isinstance(taken, int | float | bool)
        and (isinstance(written, str) or isinstance(written, bool) != isinstance(taken, bool))
    ]


def _pairs(path: tuple[str | int, ...], written: Any, taken: Any) -> Any:
    """Each value that was written, with its path and what it was taken for."""
    if isinstance(written, Mapping) and isinstance(taken, Mapping):
        for key in written.keys() & taken.keys():
            yield from _pairs((*path, key), written[key], taken[key])
    elif isinstance(written, list | tuple) and isinstance(taken, list | tuple):
        for i, (one, other) in enumerate(zip(written, taken, strict=False)):
            yield from _pairs((*path, i), one, other)
    else:
        yield path, written, taken


def _inside(location: Path, tree: Any) -> tuple[str | int, ...]:
    """An error's location without the names of union branches; the last key may be one that is missing."""
    found: list[str | int] = []
    for key in location:
        if isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        elif isinstance(tree, list | tuple) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        elif isinstance(tree, Mapping) and key == location[-1]:
            return (*found, key)
        else:
            break
        found.append(key)
    return tuple(found)


def _explain(path: tuple[str | int, ...], problem: Any, tree: Mapping[str, Any]) -> str:
    where, kind = _dotted(path), problem["type"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return f"{where} is not an option{_options_above(path, tree)}"
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"{where} is required."
    if kind in ("part", "value_error"):  # our own words
        message = re.sub(r"^Value error, ", "", problem["msg"])
        return f"{where}: {message}" if message.endswith((".", "?")) else f"{where}: {message}."
    return _wrong_type(path, problem["input"], tree)


def _wrong_type(path: Path, value: Any, tree: Mapping[str, Any]) -> str:
    given = repr(value) if isinstance(value, str | int | float | list | tuple | None) else f"a {type(value).__name__}"
    annotation = _annotation_at(path, tree)
    wanted = "a mapping of options" if dataclasses.is_dataclass(annotation) else type_name(annotation)
    return f"{_dotted(path)} is {given}, and must be {wanted}."


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "config"


def _options_above(path: Path, tree: Mapping[str, Any]) -> str:
    """The part that refuses an option if it has a name, the nearest option, and all of them."""
    *above, key = path
    value: Any = tree
    for step in above:
        value = value[step]
    annotation = _annotation_at(above, tree)
    cls = _class_of(annotation, value)
    owner = f" of {_name_in(annotation, value)!r}" if _part(annotation) else ""
    return f"{owner}.{did_you_mean(str(key), [f.name for f in dataclasses.fields(cls)])}"


def _annotation_at(path: Path, tree: Any) -> Any:
    """The annotation of the field, or of the list item, that a path leads to."""
    annotation: Any = RunConfig
    for key in path:
        if isinstance(key, int):
            items = next((a for a in (annotation, *get_args(annotation)) if isinstance(tree, list) and get_args(a)), Any)
            arguments = get_args(items)
            annotation = arguments[min(key, len(arguments) - 1)] if arguments else Any
        else:
            fields = {f.name: f.type for f in dataclasses.fields(_class_of(annotation, tree))}
            annotation = fields.get(key, Any)
        tree = tree[key] if isinstance(tree, list | tuple) or key in tree else None
    return annotation


def _class_of(annotation: Any, value: Any) -> Any:
    """The section, or the part that a piece of config names, at an annotation."""
    held = _part(annotation)
    return resolve(held.table, _name_in(annotation, value)) if held else annotation


def _name_in(annotation: Any, value: Any) -> str:
    held = _part(annotation)
    name = value if isinstance(value, str) else value.get("name", held.default if held else None)
    if not isinstance(name, str):
        raise ConfigError(f"{value!r} names no part.")
    return name


def _part(annotation: Any) -> PartOf | None:
    return next((item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, PartOf)), None)
