"""Arrays in .npy files that come from anyone: nothing is allocated, mapped or believed before it was checked.

    file    = "\\x93NUMPY", version (two bytes), length of the header, header, data
    header  = {'descr': '<f4', 'fortran_order': False, 'shape': (1000, 768), }

Versions 1 to 3 are read, with a header of at most 10 000 bytes that is a literal with exactly these three keys. Numbers
are floating point of 16, 32 or 64 bits, or integers, in either byte order, in C or in Fortran order. Objects, records,
text, booleans, complex numbers and times are refused. The data must be exactly as long as the shape says.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import ast
import errno
import math
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eclosion.errors import DataError, EnvironmentProblem

__all__ = ["map_npy", "open_npy", "parse_npy"]

MAGIC = b"\x93NUMPY"
# What NumPy itself accepts without being told to trust a file.
MAX_HEADER = 10_000
# Magic, version, and the longer of the two ways to store the length of the header.
MAX_PREFIX = len(MAGIC) + 2 + 4
# NumPy 1 allows 32 dimensions.
MAX_DIMENSIONS = 32
MAX_BYTES = 2**63 - 1

# What a header may be made of: names, whole numbers and brackets. No escape sequences, operators or other words, so
# that the parser that sees it next has nothing to compute or to warn of.
_TOKENS = re.compile(r"(?:[\s{}()\[\],:]|'[^'\\\n]*'|\"[^\"\\\n]*\"|\bTrue\b|\bFalse\b|\b\d++\b)*", re.ASCII)
_DTYPE = re.compile(r"[<>](?:f[248]|[iu][248])|[|<>][iu]1")
# Errors of an open that are the machine's and not the file's.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


@dataclass(frozen=True)
class _Header:
    """What stands before the data of an array.

    Attributes:
        dtype: of one number.
        shape: as in NumPy.
        order: "F" if the first index runs fastest.
        offset: bytes before the data.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    offset: int

    def over(self, buffer: mmap.mmap | bytes) -> NDArray[Any]:
        """The array whose data stands in a buffer; nothing is copied, and it cannot be written to."""
        return np.ndarray(self.shape, self.dtype, buffer, self.offset, order=self.order)


def open_npy(path: Path, name: str) -> NDArray[Any]:
    """The array in a file, as `map_npy`.

    Args:
        path: the file.
        name: what to call it in an error.

    Raises:
        DataError: if the file does not exist, cannot be read, or is no array that is allowed here.
        EnvironmentProblem: if this process may not open or map any more files.
    """
    with _explained(name):
        # without waiting, should it be a pipe
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return map_npy(fd, name)
        finally:
            os.close(fd)


def map_npy(fd: int, name: str) -> NDArray[Any]:
    """The array in an open file, as a read-only memory map: numbers are read from disk when they are looked at.

    Args:
        fd: the file, which may be closed and removed afterwards.
        name: what to call it in an error.

    Returns:
        An array whose `base` is the `mmap.mmap`, which is closed with the last array that uses it.

    Raises:
        As `open_npy`.
    """
    with _explained(name):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name}: is not a file. Give a .npy file.")
        header = _header(os.pread(fd, MAX_PREFIX + MAX_HEADER, 0), status.st_size, name)
        return header.over(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))


def parse_npy(data: bytes, name: str) -> NDArray[Any]:
    """The array in the bytes of a file, such as a member of a tar: a read-only view of them, not a copy.

    Args:
        data: the whole file.
        name: what to call it in an error.

    Raises:
        DataError: if it is no array that is allowed here.
    """
    return _header(data[: MAX_PREFIX + MAX_HEADER], len(data), name).over(data)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn an error of the operating system into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{name}: the file does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: the file shrank between the check and the map
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            raise EnvironmentProblem(f"{name}: cannot be opened ({error.strerror}). Raise `ulimit -n`.") from error
        raise DataError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _header(start: bytes, size: int, name: str) -> _Header:
    """Read and check the header.

    Args:
        start: the first bytes of the file, at least all of the header.
        size: bytes in the whole file.
        name: what to call it in an error.
    """
    text, offset = _text(start, size, name)
    fields = _fields(text, name)
    dtype, shape = _dtype(fields["descr"], name), _shape(fields["shape"], name)
    if not isinstance(fields["fortran_order"], bool):
        raise _damaged(name, "fortran_order is not True or False")
    # an axis of length 0 counts as 1, as NumPy wants even an empty array to be addressable
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize > MAX_BYTES:
        raise _damaged(name, f"its shape {_short(str(shape))} is more than any memory can hold")
    stated, found = math.prod(shape) * dtype.itemsize, size - offset
    if stated != found:
        what = "the file is truncated" if found < stated else "something stands behind the array"
        raise _damaged(name, f"holds {found} bytes of numbers, and {dtype.name} {shape} is {stated}; {what}")
    return _Header(dtype, shape, "F" if fields["fortran_order"] else "C", offset)


def _text(start: bytes, size: int, name: str) -> tuple[str, int]:
    """The literal in a header, and where the data begins."""
    if not start.startswith(MAGIC):
        raise DataError(f"{name}: is not a .npy file ({'it is empty' if size == 0 else 'it begins otherwise'}).")
    version = tuple(start[len(MAGIC) : len(MAGIC) + 2])
    if version not in {(1, 0), (2, 0), (3, 0)}:
        raise DataError(
            f"{name}: is a .npy file of version {'.'.join(map(str, version))}. Versions 1.0 to 3.0 are read."
        )
    begin = len(MAGIC) + (4 if version == (1, 0) else 6)
    length = int.from_bytes(start[len(MAGIC) + 2 : begin], "little")
    if size < begin or size - begin < length:
        raise _damaged(name, "the file ends within its header")
    if length > MAX_HEADER:
        raise _damaged(name, f"its header has {length} bytes, and the limit is {MAX_HEADER}")
    return start[begin : begin + length].decode("latin-1").strip(" \n"), begin + length


def _fields(text: str, name: str) -> Mapping[str, object]:
    if not _TOKENS.fullmatch(text):
        raise _damaged(name, f"its header is not a plain literal: {_short(text)!r}")
    try:
        fields = ast.literal_eval(text)
    # what the parser of Python raises for nonsense, for a thousand brackets, and for numbers of a thousand digits
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise _damaged(name, f"its header is not a plain literal: {_short(text)!r}") from error
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise _damaged(name, f"its header must have descr, fortran_order and shape, and is {_short(text)!r}")
    return fields


def _dtype(descr: object, name: str) -> np.dtype[Any]:
    if isinstance(descr, str) and _DTYPE.fullmatch(descr):
        return np.dtype(descr)
    if isinstance(descr, str) and re.fullmatch(r"\|?O\d?", descr):
        what = "Python objects, which are never read"
    elif isinstance(descr, list):
        what = "records"
    else:
        what = f"numbers of type {_short(repr(descr))}"
    raise DataError(f"{name}: holds {what}. Save it as float16, float32, float64 or an integer type.")


def _shape(shape: object, name: str) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(length) is int for length in shape):
        raise _damaged(name, f"its shape is {_short(repr(shape))}, and must be a tuple of whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise _damaged(name, f"it has {len(shape)} dimensions, and the limit is {MAX_DIMENSIONS}")
    return shape


def _damaged(name: str, detail: str) -> DataError:
    return DataError(f"{name}: the array is damaged: {detail}.")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
