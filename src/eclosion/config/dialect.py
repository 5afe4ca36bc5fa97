"""What a config dialect is: another program's settings, translated at the door."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from eclosion.errors import ConfigError, UserError

__all__ = ["Dialect", "Translation", "name_keys"]


@dataclass(frozen=True)
class Translation:
    """A foreign config in native words.

    Attributes:
        tree: the native config, as nested mappings.
        notes: what the user should know, such as a key that is accepted and has no effect, one line each.
        keys: option, as problems name it -> what the foreign config calls it.
    """

    tree: dict[str, Any]
    notes: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)


def name_keys(error: UserError, keys: Mapping[str, str]) -> None:
    """Let each problem of an error end with what the file calls the options that it names.

    Args:
        error: tells of them in native words, in which they stand on the command line.
        keys: those of the file's `Translation`.
    """
    if isinstance(error, ConfigError):
        error.problems = [_with_keys(problem, keys) for problem in error.problems]
        error.args = ("\n".join(error.problems),)
    elif keys:
        error.args = (_with_keys(str(error), keys),)


def _with_keys(problem: str, keys: Mapping[str, str]) -> str:
    named = [f"{option} is {key}" for option, key in keys.items() if _names(problem, option)]
    return f"{problem} In the file, {'; '.join(named)}." if named else problem


def _names(problem: str, option: str) -> bool:
    """Whether the option itself is named, and not one that begins or ends as it does."""
    return re.search(rf"(?<![\w.]){re.escape(option)}(?![\w\[]|\.\w)", problem) is not None


class Translate(Protocol):
    """Settings in native words."""

    def __call__(self, settings: Mapping[str, Any], *, lenient: bool = False) -> Translation:
        """The same settings; unknown keys are left out with a note if `lenient`. Raises ConfigError."""
        ...


@dataclass(frozen=True)
class Dialect:
    """How to recognise and translate the configs of another program.

    Attributes:
        recognises: whether a mapping of settings is written in this dialect.
        translate: the same settings in native words.
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    translate: Translate
