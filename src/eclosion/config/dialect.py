"""What a config dialect is: another program's settings, translated at the door."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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
