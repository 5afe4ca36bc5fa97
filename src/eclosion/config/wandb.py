"""What runs are called at Weights & Biases."""

import re
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["RunId", "RunPath"]

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PATH = re.compile(r"([A-Za-z0-9_.-]+/){1,2}[A-Za-z0-9_.-]+")


def _check_id(run_id: str) -> str:
    if not _ID.fullmatch(run_id):
        raise ValueError(f"{run_id!r} is not the id of a run, of at most 64 letters, digits and ._-")
    return run_id


def _check_path(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not the path of a run, such as entity/project/run_id")
    return path


RunId = Annotated[str, AfterValidator(_check_id)]
# "entity/project/run_id", or "project/run_id" for a run of one's own.
RunPath = Annotated[str, AfterValidator(_check_path)]
