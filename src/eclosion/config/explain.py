"""What is wrong with a config, in one line per problem, with its path."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import dump, part_of, resolve, type_name

__all__ = ["checked"]

T = TypeVar("T")

Path = Sequence[str | int]
# What pydantic calls an option that must be given and is not.
MISSING = ("missing", "missing_keyword_only_argument")


def checked(cls: type[T], tree: Mapping[str, Any]) -> T:
    """What a tree of settings describes.

    Args:
        cls: a part or a section, such as `RunConfig`.
        tree: its options.

    Raises:
        ConfigError: with every problem, one line each.
    """
    try:
        made = TypeAdapter(cls).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(_problems(error, tree, cls)) from error
    if wrong := _misread(made, tree):
        raise ConfigError(wrong)
    return made


def _problems(error: ValidationError, tree: Mapping[str, Any], root: type[Any]) -> list[str]:
    """One line per wrong setting; the branches of a union that refuse one value are one problem."""
    by_path: dict[tuple[str | int, ...], str] = {}
    for problem in error.errors(include_url=False):
        path = problem["loc"] if problem["type"] in MISSING else _inside(problem["loc"], tree)
        by_path.setdefault(path, _explain(path, problem, tree, root))
    return list(by_path.values())


def _misread(made: Any, tree: Mapping[str, Any]) -> list[str]:
    """The settings that were taken for something else than was written, such as `true` for 1; one line each."""
    return [
        _wrong_type(path, written, tree, type(made))
        for path, written, taken in _pairs((), tree, dump(made))
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
    """The part of an error's location that leads to a value in the config, without names of union branches."""
    found: list[str | int] = []
    for key in location:
        if not _holds(tree, key):
            break
        tree = tree[key]
        found.append(key)
    return tuple(found)


def _holds(tree: Any, key: str | int) -> bool:
    if isinstance(tree, list | tuple):
        return isinstance(key, int) and key < len(tree)
    return isinstance(tree, Mapping) and key in tree


def _explain(path: tuple[str | int, ...], problem: Any, tree: Mapping[str, Any], root: type[Any]) -> str:
    kind = problem["type"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return f"{_dotted(path)} is not an option{_options_above(path, tree, root)}"
    if kind in MISSING:
        return f"{_dotted(path)} is required."
    if kind in ("part", "value_error"):  # our own words
        message = re.sub(r"^Value error, ", "", problem["msg"])
        return f"{_dotted(path)}: {message}" if message.endswith((".", "?")) else f"{_dotted(path)}: {message}."
    return _wrong_type(path, problem["input"], tree, root)


def _wrong_type(path: Path, value: Any, tree: Mapping[str, Any], root: type[Any]) -> str:
    annotation = _annotation_at(path, tree, root)
    wanted = "a mapping of options" if dataclasses.is_dataclass(annotation) else type_name(annotation)
    return f"{_dotted(path)} is {_shown(value)}, and must be {wanted}."


def _shown(value: Any) -> str:
    """A value as it is written in a config, or what kind of thing it is."""
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, str | int | float | list | tuple):
        return repr(value)
    return "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "config"


def _options_above(path: Path, tree: Mapping[str, Any], root: type[Any]) -> str:
    """The part that refuses an option if it has a name, the nearest option, and all of them."""
    *above, key = path
    value: Any = tree
    for step in above:
        value = value[step]
    annotation = _annotation_at(above, tree, root)
    cls = _class_of(annotation, value)
    owner = f" of {_name_in(annotation, value)!r}" if part_of(annotation) else ""
    options = [f.name for f in dataclasses.fields(cls)]
    return f"{owner}.{did_you_mean(str(key), options)}" if options else f"{owner}, which has none."


def _annotation_at(path: Path, tree: Any, root: type[Any]) -> Any:
    """The annotation of the field, or of the list item, that a path leads to."""
    annotation: Any = root
    for key in path:
        if isinstance(key, int):
            items = get_args(annotation)
            annotation = items[min(key, len(items) - 1)]
        else:
            annotation = {f.name: f.type for f in dataclasses.fields(_class_of(annotation, tree))}[key]
        tree = tree[key]
    return annotation


def _class_of(annotation: Any, value: Any) -> Any:
    """The section, or the part that a piece of config names, at an annotation."""
    held = part_of(annotation)
    return resolve(held.table, _name_in(annotation, value)) if held else annotation


def _name_in(annotation: Any, value: Any) -> str:
    held = part_of(annotation)
    name = value if isinstance(value, str) else value.get("name", held.default if held else None)
    if not isinstance(name, str):
        raise ConfigError(f"{value!r} names no part.")
    return name
