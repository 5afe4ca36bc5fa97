"""A text and tensors in one file, sealed with a hash: it stands whole under its name, and is checked when it is read.

Plain safetensors, whose metadata has one entry, "sealed": a sha256 over the text and over name, type, shape and bytes
of each tensor; a space; the text. One, as safetensors writes several in any order, and equal content gives equal bytes.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eclosion.errors import EnvironmentProblem, printable

__all__ = ["PARTIAL", "Unsealed", "read_sealed", "text_of", "text_tensor", "write_sealed"]

SEALED = "sealed"
# What the name of a file on its way ends with.
PARTIAL = ".partial"


class Unsealed(Exception):
    """A file that is no sealed one, or whose bytes are not those that were sealed; says why, on one line."""


def write_sealed(path: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a file so that under its name there is all of it, durably, or what was there before.

    Args:
        path: the file; its folder is made.
        text: whatever says what the tensors are.
        tensors: on the CPU, contiguous.

    Raises:
        EnvironmentProblem: if the disk is full, read-only or broken.
    """
    data = save(dict(tensors), {SEALED: f"{_seal(text, tensors)} {text}"})
    aside = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written ({error.strerror}). It takes {len(data) / 1e6:.1f} MB: make room, or choose "
            "another place."
        ) from error


def read_sealed(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors of a file.

    Raises:
        FileNotFoundError: if there is none.
        Unsealed: if it cannot be read, or is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if SEALED not in said:
                raise Unsealed("it is not of eclosion's making")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, MemoryError) as error:
        words = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise Unsealed(printable(" ".join(words.split()))) from error
    seal, _, text = said[SEALED].partition(" ")
    if seal != _seal(text, tensors):
        raise Unsealed("its sha256 is not the one that it was written with")
    return text, tensors


def text_tensor(text: str) -> Tensor:
    """A text of any length as a tensor, uint8 [bytes]: a header holds short ones only."""
    return torch.frombuffer(bytearray(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8)


def text_of(tensor: Tensor) -> str:
    """What `text_tensor` was given.

    Raises:
        ValueError: if it is no text.
    """
    return bytes(tensor.numpy()).decode("utf-8", "surrogateescape")


def _seal(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            rows: Any = tensor.contiguous().numpy()
            digest.update(rows)
    return digest.hexdigest()
