"""Paths with numbers of the run in them, such as "models/{epoch}-{samples_seen}.pth", and where they may lead."""

import re
import string
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from eclosion.errors import did_you_mean

__all__ = ["EXAMPLE", "Template", "check_path", "check_template", "fill"]

# All that may stand in a path, with a value of its kind: passes over the data so far, images since the last one began,
# optimizer updates, images, and the lowest validation loss, nan without one.
EXAMPLE: dict[str, int | float] = {
    "epoch": 3,
    "sample": 1000,
    "step": 5000,
    "samples_seen": 80000,
    "best_validation_loss": 0.25,
}
# Zeros in front, a width, digits after the point, and how: all that a file name needs.
_FORMAT = re.compile(r"0?\d{0,2}(\.\d{1,2})?[dfeg]?")
MAX_PATH = 500


def fill(template: str, values: Mapping[str, int | float]) -> str:
    """The path with its numbers; knows names and plain formats such as {step:08d}, and nothing else.

    Raises:
        ValueError: if it asks for anything else.
    """
    text = ""
    for literal, name, form, conversion in string.Formatter().parse(template):
        text += literal
        if name is None:
            continue
        if name not in values:
            raise ValueError(f"{{{name}}} is not known in a path.{did_you_mean(name, values)}")
        if conversion or not _FORMAT.fullmatch(form or ""):
            raise ValueError(f"{{{name}}} has a format other than such as {{{name}:08d}} or {{{name}:.4f}}")
        text += format(values[name], form or "")
    return text


def check_path(path: str) -> str:
    """A relative path that stays inside the place it is relative to, in its shortest form.

    Raises:
        ValueError: if it does not.
    """
    parts = PurePosixPath(path).parts
    if not parts or path != path.strip() or len(path) > MAX_PATH or not path.isprintable() or "\\" in path:
        raise ValueError(f"{path!r} is not the path of a file or folder")
    if path.startswith(("/", "~")) or ".." in parts or re.match(r"[A-Za-z]:", path):
        raise ValueError(f"{path!r} leads elsewhere: give a path without '..' that is relative to its place")
    return str(PurePosixPath(path))


def check_template(template: str) -> str:
    """A path with numbers in it, in its shortest form.

    Raises:
        ValueError: if it asks for something else than numbers of the run, or leads elsewhere.
    """
    check_path(fill(template, EXAMPLE))
    return str(PurePosixPath(template))


# The field type of a path with numbers in it: wrong ones are refused when a config is checked.
Template = Annotated[str, AfterValidator(check_template)]
