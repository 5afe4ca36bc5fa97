"""Files that other programs wrote with torch.save, which may come from strangers: nothing in them is ever run.

Such a file is a zip archive of tensors and one pickle, and a pickle is a program. Before anything is loaded, the
archive's directory and every instruction of the pickle are looked at; only those that make plain data and tensors pass.
Then `torch.load(weights_only=True)` loads it, and what came out is looked at once more: its size in memory, for
example, is that of the file and not what a few bytes claim.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from eclosion.checkpoint import disk
from eclosion.errors import CheckpointError, printable

__all__ = ["Inert", "read_torch_file"]

# A file of a billion parameters with averages and moments has a directory and a pickle of about a megabyte.
MAX_DIRECTORY = 64 << 20  # bytes
MAX_PICKLE = 16 << 20  # bytes
MAX_VALUES = 10_000_000
MAX_DEPTH = 64  # containers inside each other
MAX_TUPLES = 8  # tuples inside each other: the hash of thousands overflows the stack of the interpreter

STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# All that a pickle may name, and torch's loader knows itself.
GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}Storage" for name in STORAGES),
}
# What protocol 2, which torch.save writes, needs for plain data and tensors; nothing that takes away what was made, as
# then a pickle is no tree any more.
OPCODES = {
    *("PROTO", "GLOBAL", "BINPERSID", "REDUCE", "NEWOBJ", "BUILD", "STOP"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
    *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"),
}


class Inert:
    """Stands for an object of a class that is not needed: it keeps what it was made from, and does nothing.

    Attributes:
        args: what its constructor was given.
        state: what it held.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        """An object that does not look at what it is given."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


def read_torch_file(path: Path, *, inert: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping that torch.save wrote to a file: plain data and tensors.

    Args:
        path: the file.
        inert: full names of classes whose objects may occur; each becomes an `Inert`.

    Returns:
        Mappings, lists, tuples, texts, numbers, None, `Inert` and tensors. Tensors are on the CPU and mapped from the
        file: a page is read when it is first touched.

    Raises:
        CheckpointError: if the file cannot be read, is no archive of torch.save, is damaged, would become larger in
            memory than it is, or names anything that plain data does not need.
    """
    with disk.explained(path, "read", "Check the path and its permissions."):
        with path.open("rb") as file:
            raw = _pickle_of(path, file)
        _look_through(path, raw, frozenset(inert))
        value = _load(path, inert)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, and a checkpoint is a mapping.")
    _look_at(path, value)
    return dict(value)


# --- the archive -----------------------------------------------------------------------------------------------------


def _pickle_of(path: Path, file: BinaryIO) -> bytes:
    """The pickle of an archive all of whose members are as large as they look."""
    size = file.seek(0, io.SEEK_END)
    directory = _directory_size(file, size)
    if directory is None:
        raise CheckpointError(
            f"{path}: is not a file of torch.save since torch 1.6, which is a zip archive. Save it again with such a "
            "torch, or give another file."
        )
    if directory > MAX_DIRECTORY:
        raise CheckpointError(f"{path}: lists its members in {directory} bytes, more than any checkpoint needs.")
    try:
        with zipfile.ZipFile(file) as archive:
            pickle = _checked_members(path, archive.infolist(), size)
            for member in archive.infolist():
                _check_sum(archive, member)
            return archive.read(pickle)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise CheckpointError(f"{path}: is damaged ({disk.reason(error)}). Copy it again.") from error


def _directory_size(file: BinaryIO, size: int) -> int | None:
    """Bytes of the directory at the end of a zip archive, as torch.save writes it: without a comment."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        return None
    short = struct.unpack("<I", end[12:16])[0]
    if short != 0xFFFFFFFF:
        return int(short)
    if len(tail) < 98 or tail[:4] != b"PK\x06\x06":  # the larger record, right before its locator and the short one
        return None
    return int(struct.unpack("<Q", tail[40:48])[0])


def _checked_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> zipfile.ZipInfo:
    pickles = [m for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    names = {m.filename.lower() for m in members}  # torch's own reader takes no notice of the case
    if len(pickles) != 1 or len(names) != len(members):
        raise CheckpointError(f"{path}: is a zip archive, and not one that torch.save wrote.")
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: is a TorchScript archive, which holds code. It is not loaded.")
    packed = [m for m in members if m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size]
    claimed = sum(m.file_size for m in members)
    if packed or claimed > size:
        raise CheckpointError(
            f"{path}: claims {claimed} bytes of content in a file of {size}. torch.save does not pack what it writes; "
            "this file is not loaded."
        )
    if pickles[0].file_size > MAX_PICKLE:
        raise CheckpointError(f"{path}: has a pickle of {pickles[0].file_size} bytes, more than any checkpoint needs.")
    return pickles[0]


def _check_sum(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end, which compares it with its check sum; torch may have been told to write none."""
    if not member.CRC:
        del member.CRC
    with archive.open(member) as content:
        while content.read(disk.CHUNK):
            pass


# --- the pickle ------------------------------------------------------------------------------------------------------


def _look_through(path: Path, raw: bytes, inert: frozenset[str]) -> None:
    """Read a pickle's instructions, and refuse it for the first that plain data and tensors do not need."""
    memo: dict[int, int] = {}
    stack: list[int | None] = []  # how many tuples are inside each other in each value; None is a mark
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name not in OPCODES:
                raise CheckpointError(_refusal(path, f"has the instruction {opcode.name}"))
            if opcode.name == "GLOBAL" and _dotted(argument) not in GLOBALS | inert:
                raise CheckpointError(_refusal(path, f"asks for {printable(_dotted(argument))[:100]}"))
            if _step(opcode, argument, stack, memo) > MAX_TUPLES:
                raise CheckpointError(_refusal(path, f"has more than {MAX_TUPLES} tuples inside each other"))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: its pickle is damaged ({disk.reason(error)[:100]}). Copy it again.") from error


def _dotted(argument: Any) -> str:
    return str(argument).replace(" ", ".", 1)


def _refusal(path: Path, why: str) -> str:
    return f"{path}: its pickle {why}, which no checkpoint needs. It is not loaded, and nothing in it was run."


def _step(opcode: Any, argument: Any, stack: list[int | None], memo: dict[int, int]) -> int:
    """Follow one instruction by the depth of tuples alone; returns that of what it made."""
    name = opcode.name
    if name == "MARK":
        stack.append(None)
        return 0
    if name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1] or 0
        return 0
    if name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
        return 0
    taken = _taken(opcode, stack)
    if opcode.stack_after:
        made = 1 + max(taken, default=0) if name.startswith("TUPLE") else 0
        stack.append(made)
        return made
    return 0


def _taken(opcode: Any, stack: list[int | None]) -> list[int]:
    """Take from the stack what an instruction takes, down to its mark if it has one."""
    taken: list[int] = []
    before = list(opcode.stack_before)
    if pickletools.markobject in before:
        while (top := stack.pop()) is not None:
            taken.append(top)
        before = before[: before.index(pickletools.markobject)]
    return taken + [stack.pop() or 0 for _ in before]


# --- the content -----------------------------------------------------------------------------------------------------


def _load(path: Path, inert: tuple[str, ...]) -> Any:
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in inert]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # whatever a loader makes of bytes that are made to break it
        why = disk.reason(error).partition(". ")[0][:100]  # not torch's advice to load it all the same
        raise CheckpointError(f"{path}: cannot be loaded ({why}). It is damaged, or made to do harm.") from error


def _look_at(path: Path, value: Any) -> None:
    """Refuse what is not plain data, what is nested without end, and tensors that claim more memory than they have."""
    for count, (depth, item) in enumerate(_items(value)):
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise CheckpointError(f"{path}: holds more values, or deeper ones, than any checkpoint. It is not loaded.")
        if isinstance(item, Tensor):
            _look_at_tensor(path, item)
        elif type(item) is int:
            if item.bit_length() > 64:
                raise CheckpointError(f"{path}: holds a whole number of {item.bit_length()} bits. It is not loaded.")
        elif not (item is None or isinstance(item, (str, bool, float, Mapping, list, tuple, Inert))):
            raise CheckpointError(f"{path}: holds {type(item).__name__}, which no checkpoint needs. It is not loaded.")


def _items(value: Any, depth: int = 0) -> Iterator[tuple[int, Any]]:
    """Every value with how deep it lies; one that lies in two places comes twice."""
    yield depth, value
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = chain.from_iterable(value.items())
    elif isinstance(value, (list, tuple)):
        inside = value
    elif isinstance(value, Inert):
        inside = (value.args, value.state)
    for item in inside:
        yield from _items(item, depth + 1)


def _look_at_tensor(path: Path, tensor: Tensor) -> None:
    shape = list(tensor.shape)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: holds a tensor that is not plain numbers. It is not loaded.")
    if math.prod(shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: claims a tensor of shape {shape} with fewer numbers than that.")
