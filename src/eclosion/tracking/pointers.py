"""Places in stores without renames: which of the folders there is the current one.

    <place>/step-00001000-1a2b3c4d/     a whole checkpoint, its manifest uploaded last
    <place>/current.json                the name of the folder to take, written when that is whole

One small file is replaced at once wherever files are kept, so that a reader finds the old checkpoint or the new one.
"""

import json
import re

from eclosion.errors import DataError

__all__ = ["FOLDER", "POINTER", "pointed_to", "pointer_to"]

POINTER = "current.json"
FOLDER = re.compile(r"step-\d{8,}-[0-9a-f]{8}")


def pointer_to(folder: str, step: int) -> bytes:
    """The content of the file that points to a folder."""
    return json.dumps({"checkpoint": folder, "step": step}, indent=2).encode() + b"\n"


def pointed_to(raw: bytes, where: str) -> str:
    """The folder that such a file points to.

    Raises:
        DataError: if it is no such file.
    """
    try:
        folder = json.loads(raw)["checkpoint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        folder = None
    if not isinstance(folder, str) or not FOLDER.fullmatch(folder):
        raise DataError(f"{where}{POINTER} names no checkpoint. Save it again.")
    return folder
