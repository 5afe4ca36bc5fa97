"""What a config dialect is: another program's settings, translated at the door."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Dialect", "Translation"]


@dataclass(frozen=True)
class Translation:
    """A foreign config in native words.

    Attributes:
        tree: the native config, as nested mappings.
        notes: what the user should know, such as a key that is accepted and has no effect, one line each.
    """

    tree: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """How to recognise and translate the configs of another program.

    Attributes:
        recognises: whether a mapping of settings is written in this dialect.
        translate: the same settings in native words; raises ConfigError.
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    translate: Callable[[Mapping[str, Any]], Translation]
