"""What is wrong with a config, in one line per problem, with its path."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import dump, part_of, resolve, type_name

__all__ = ["checked", "left_out", "without_unknown"]

T = TypeVar("T")

Path = Sequence[str | int]
# What pydantic calls an option that must be given and is not.
MISSING = ("missing", "missing_keyword_only_argument")
# What it calls one that there is not.
UNKNOWN = ("unexpected_keyword_argument", "invalid_key")


def checked(cls: type[T], tree: Mapping[str, Any], *, strict: bool = True) -> T:
    """What a tree of settings describes.

    Args:
        cls: a part or a section, such as `RunConfig`.
        tree: its options.
        strict: whether "4" is refused for 4, and 1 for true; some other programs take them.

    Raises:
        ConfigError: with every problem, one line each.
    """
    try:
        made = TypeAdapter(cls).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(_problems(error, tree, cls)) from None  # pydantic's words show half of what was given
    if strict and (wrong := _misread(made, tree)):
        raise ConfigError(wrong)
    return made


def without_unknown(cls: type[Any], tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A tree of settings without the keys that are no options, and what would be said of each.

    Args:
        cls: what the tree should describe; whatever else is wrong with it stays.
        tree: settings, left as they are.
    """
    kept, said = _copied(tree), list[str]()
    while found := list(_unknown(cls, kept)):  # behind one there may be others, as in a part whose name was wrong
        for path, problem in found:
            said.append(problem)
            above = kept
            for key in path[:-1]:
                above = above[key]
            del above[path[-1]]
    return kept, said


def left_out(unknown: Sequence[str]) -> list[str]:
    """The notes about unknown keys that were left out, from what `without_unknown` said."""
    return [f"{problem} It is left out." for problem in unknown]


def _unknown(cls: type[Any], tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Path of each key that is no option, and what there is to say."""
    try:
        TypeAdapter(cls).validate_python(dict(tree))
    except ValidationError as error:
        paths = set[tuple[str | int, ...]]()
        for problem in error.errors(include_url=False):
            path = _inside(problem["loc"], tree)
            if problem["type"] in UNKNOWN and path[-1:] == problem["loc"][-1:] and path not in paths:
                paths.add(path)
                yield path, _explain(path, problem, tree, cls)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def _problems(error: ValidationError, tree: Mapping[str, Any], root: type[Any]) -> list[str]:
    """One line per wrong setting; the branches of a union that refuse one value are one problem."""
    by_path: dict[tuple[str | int, ...], str] = {}
    for problem in error.errors(include_url=False):
        path = problem["loc"] if _lacks_option(problem) else _inside(problem["loc"], tree)
        by_path.setdefault(path, _explain(path, problem, tree, root))
    return list(by_path.values())


def _lacks_option(problem: Any) -> bool:
    """Whether an option is missing, and not an item of a list that is too short, which is a wrong value."""
    return problem["type"] in MISSING and isinstance(problem["loc"][-1], str)


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
    if kind in UNKNOWN:
        return f"{_dotted(path)} is not an option{_options_above(path, tree, root)}"
    if _lacks_option(problem):
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
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".") or "config"


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
    """The annotation of the field, of the list item, or of the value in a mapping, that a path leads to."""
    annotation: Any = root
    for key in path:
        if get_origin(annotation) is Annotated and not part_of(annotation):  # a list with bounds
            annotation = get_args(annotation)[0]
        items = get_args(annotation)
        if get_origin(annotation) is dict:
            annotation = items[1]
        elif isinstance(key, int):
            annotation = items[min(key, len(items) - 1)]
        else:
            annotation = {f.name: f.type for f in dataclasses.fields(_class_of(annotation, tree))}[key]
        annotation = _without_none(annotation)
        tree = tree[key]
    return annotation


def _without_none(annotation: Any) -> Any:
    """The part or the section that an annotation allows besides none; others stay as they are."""
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    if get_origin(annotation) not in (Union, UnionType) or len(choices) != 1:
        return annotation
    (choice,) = choices
    return choice if part_of(choice) or dataclasses.is_dataclass(choice) else annotation


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
