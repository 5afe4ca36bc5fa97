"""Where the members of a tar file begin and end: a strict walk over its headers.

Nothing is extracted, no link is followed, and a name is only ever text. What is understood:

Headers      old (V7), POSIX ustar with its prefix, GNU. The checksum must hold, as a sum of bytes or, as some old
             programs have it, of signed bytes.
Long names   GNU (L) and POSIX extended headers (x: path and size). Long link names (K) and what global headers (g) say
             about times and owners are passed over; a global path or size is refused, as it would hold for all.
Sizes        octal or base 256; from 0 up to what is left of the file.
Types        regular files are members to read. Directories, links, devices and sparse files are told apart, so that
             they can be counted.
End          two blocks of zeros, and after them only zeros. One block of zeros at the very end of the file counts as
             well: a file cut there has lost nothing. Without any, the tar may have been cut between two members, and
             that is damage, as is anything behind the end (a second tar, or a header overwritten by zeros).

Contents have no checksum in a tar, nor have long names: a changed byte in them cannot be seen here.

Format: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format".
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import adler32

from eclosion.errors import DataError, printable

__all__ = ["Member", "TarDamage", "entries", "members", "short"]

BLOCK = 512
# A long name or an extended header may not claim more.
MAX_EXTENSION_BYTES = 65_536
# As the longest path that Linux opens.
MAX_NAME_BYTES = 4096
# Headers in a row that only say something about the member after them.
MAX_EXTENSIONS = 16
# Blocks that go on with the list of a sparse file's holes, 21 in each.
MAX_SPARSE_BLOCKS = 10_000
# Zeros behind the end: tar fills its last record, of 10 KiB unless it is told otherwise, of 10 MiB at most.
MAX_PADDING = 16 * 2**20
# Bytes read at once: the headers of a few small members. More is wasted where members are large.
WINDOW = 16_384
ZEROS = bytes(BLOCK)

FILE = "file"
SPARSE = ord("S")
# What a header's type stands for; every other one is "special".
TYPES = {
    ord("0"): FILE,
    0: FILE,
    ord("7"): FILE,
    ord("1"): "hard link",
    ord("2"): "symbolic link",
    ord("3"): "device",
    ord("4"): "device",
    ord("5"): "directory",
    ord("6"): "named pipe",
    SPARSE: "sparse file",
}
# Types whose size, if they state one, is not that of any content in the tar.
WITHOUT_CONTENT = frozenset(b"123456")
EXTENSIONS = frozenset(b"LKxXg")
OCTAL = re.compile(rb" *([0-7]+)[ \0]*\Z")
# First bytes of what people take for a tar, what to call it and what to do.
NO_TARS = (
    (b"\x1f\x8b", "is gzip-compressed: decompress it (gunzip)."),
    (b"BZh", "is bzip2-compressed: decompress it (bunzip2)."),
    (b"\xfd7zXZ\0", "is xz-compressed: decompress it (unxz)."),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed: decompress it (unzstd)."),
    (b"\x04\x22\x4d\x18", "is lz4-compressed: decompress it (unlz4)."),
    (b"PK\3\4", "is a zip file: unpack it and write a tar."),
    (b"PAR1", "is a Parquet file. Only tar files can be shards."),
    (b"version https://git-lfs", "is a Git LFS pointer: fetch what it stands for (git lfs pull)."),
    (b"<", "is a web page or XML: look whether its address is right."),
)


class Member(NamedTuple):
    """One member of a tar.

    Attributes:
        name: its path; bytes that are not UTF-8 as surrogates (PEP 383).
        offset: where its content begins, in bytes from the start of the tar.
        size: bytes of content.
        type: "file", or one of the other `TYPES`, or "special".
    """

    name: str
    offset: int
    size: int
    type: str = FILE


class TarDamage(DataError):
    """A tar that cannot be read to its end.

    Attributes:
        offset: where the walk had to stop, in bytes from the start of the tar.
        detail: what is wrong there; the message without the name of the tar.
        member: name of the member whose header was read and whose content is cut off, if that is what is wrong.
    """

    def __init__(self, name: str, offset: int, detail: str, *, member: str | None = None) -> None:
        self.offset, self.member = offset, member
        self.detail = f"byte {offset}: {detail}"
        super().__init__(f"{name}, {self.detail}")


class _Broken(Exception):
    """What is wrong with a tar, as long as nobody said where."""

    def __init__(
        self, detail: str, *, cure: str = "Fetch or write the shard again.", member: str | None = None
    ) -> None:
        self.member = member
        super().__init__(f"{detail} {cure}".strip())


def members(file: BinaryIO | Path, name: str) -> Iterator[Member]:
    """The regular files in a tar, in their order.

    Args:
        file: the tar, or its path.
        name: what to call it in an error.

    Raises:
        TarDamage: where the tar is not as it should be; after all members before.
    """
    if isinstance(file, Path):
        with file.open("rb", buffering=0) as opened:
            yield from members(opened, name)
    else:
        yield from (entry for entry in entries(file, name) if entry.type == FILE)


def entries(file: BinaryIO, name: str) -> Iterator[Member]:
    """All that is in a tar: regular files, and what is none.

    Read in windows, and not through a memory map: a file that shrinks meanwhile, or a disk that fails, is then an
    error and not a crash. The position of `file` is not kept.

    Args:
        file: the tar, unbuffered for best speed.
        name: what to call it in an error.

    Raises:
        TarDamage: where the tar is not as it should be; after all members before.
    """
    total = file.seek(0, os.SEEK_END)
    window, start, offset = b"", 0, 0
    extra = _Extensions()
    try:
        while True:
            block = window[offset - start : offset - start + BLOCK]
            if len(block) < BLOCK:
                window, start = _read(file, offset, WINDOW), offset
                block = window[:BLOCK]
            if not _is_header(block):
                if block != ZEROS or extra.count:
                    raise _no_header(block, offset, extra)
                _check_end(file, offset, total)
                return
            kind, content, size = block[156], offset + BLOCK, _size(block, extra)
            if kind in EXTENSIONS:
                if size > MAX_EXTENSION_BYTES:
                    raise _Broken(f"an extended header claims {size} bytes, and the limit is {MAX_EXTENSION_BYTES}.")
                payload = window[content - start : content - start + size]
                extra.add(block[156:157], payload if len(payload) == size else _read(file, content, size), size)
                offset = content + (size + BLOCK - 1 & -BLOCK)
                continue
            path = _name(block, extra)
            member_type = TYPES[SPARSE] if extra.is_sparse else TYPES.get(kind, "special")
            if kind in WITHOUT_CONTENT:
                size = 0
            elif kind == 0 and path.endswith(b"/"):  # how old tars mark directories
                member_type, size = "directory", 0
            elif kind == SPARSE:
                content = _after_sparse_map(file, block, content)
            if extra.count:
                extra = _Extensions()
            shown = path.decode("utf-8", "surrogateescape")
            if content + size > total:
                missing = content + size - total
                raise _Broken(f"member {short(shown)} ends {missing} bytes early: the shard is cut off.", member=shown)
            yield Member(shown, content, size, member_type)
            offset = content + (size + BLOCK - 1 & -BLOCK)
    except _Broken as broken:
        raise TarDamage(name, min(offset, total), str(broken), member=broken.member) from None


def short(text: str, *, max_length: int = 200) -> str:
    """A member's name as one short line of printable characters."""
    if len(text) > max_length:
        text = f"{text[: max_length // 2]}...{text[-max_length // 2 :]}"
    return printable(text)


class _Extensions:
    """What the headers before a member say about it.

    Attributes:
        count: how many such headers came.
        name: its name, if one of them gave it.
        records: of its POSIX extended header.
        is_sparse: whether its content has holes that are left out.
    """

    __slots__ = ("_seen", "count", "is_sparse", "name", "records")

    def __init__(self) -> None:
        self.count = 0
        self.name: bytes | None = None
        self.records: Mapping[bytes, bytes] = {}
        self.is_sparse = False
        self._seen = b""

    def add(self, kind: bytes, payload: bytes, size: int) -> None:
        """Take in one header's payload, which should have `size` bytes.

        Raises:
            _Broken: if it is malformed, or one too many.
        """
        if len(payload) < size:
            raise _Broken("the shard ends inside an extended header.")
        self.count += 1
        kind = b"x" if kind == b"X" else kind
        if self.count > MAX_EXTENSIONS or (kind in self._seen and kind != b"g"):
            raise _Broken("too many extended headers in a row.")
        self._seen += kind
        if kind == b"x":
            self.records = _records(payload)
            if path := self.records.get(b"path"):  # empty means as if it were not there
                self._rename(path)
            self.is_sparse = b"GNU.sparse." in payload and any(key.startswith(b"GNU.sparse.") for key in self.records)
        elif kind == b"L":
            self._rename(payload.partition(b"\0")[0])
        elif kind == b"g":
            for key in _records(payload).keys() & {b"path", b"size"}:
                raise _Broken(f"a global header sets the {key.decode()} of all members after it.")

    def _rename(self, name: bytes) -> None:
        if self.name is not None:
            raise _Broken("two extended headers give the name of one member.")
        if len(name) > MAX_NAME_BYTES:
            raise _Broken(f"a name has {len(name)} bytes, and the limit is {MAX_NAME_BYTES}.")
        self.name = name


def _records(payload: bytes) -> dict[bytes, bytes]:
    """The records of a POSIX extended header, each `<length> <key>=<value>\\n`."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(payload):
        space = payload.find(b" ", at, at + 8)
        digits = payload[at : max(space, at)]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = payload[space + 1 : end - 1].partition(b"=")
        # the slice is empty, and so without a key, unless the record ends behind its length
        if not key or not equals or payload[end - 1 : end] != b"\n":
            raise _Broken("an extended header is malformed.")
        found[key] = value
        at = end
    return found


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    while 0 < len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a block is right, counting its own eight bytes as spaces."""
    # With 0 to start from, the lower half of Adler-32 is the sum of the bytes modulo 65521: exact for 256 bytes,
    # and five times faster than sum().
    unsigned = (
        (adler32(block[:148], 0) & 0xFFFF)
        + (adler32(block[156:412], 0) & 0xFFFF)
        + (adler32(block[412:], 0) & 0xFFFF)
        + 256
    )
    if block[148:154] == b"%06o" % unsigned:
        return len(block) == BLOCK
    written = OCTAL.match(block[148:156])
    if not written or len(block) < BLOCK:
        return False
    signed = unsigned - 256 * sum(byte >= 128 for byte in block[:148] + block[156:])
    return int(written[1], 8) in (unsigned, signed)


def _size(block: bytes, extra: _Extensions) -> int:
    if (written := extra.records.get(b"size")) and block[156] not in EXTENSIONS:
        if written.isdigit() and len(written) <= 19:
            return int(written)
        raise _Broken(f"{_called(block, extra)} has a size that is no number ({_quoted(written)}).")
    field = block[124:136]
    if octal := OCTAL.match(field):
        return int(octal[1], 8)
    if field[0] == 0x80:  # base 256
        return int.from_bytes(field[1:], "big")
    wrong = "a negative size" if field[0] == 0xFF else f"a size that is no number ({_quoted(field)})"
    raise _Broken(f"{_called(block, extra)} has {wrong}.")


def _name(block: bytes, extra: _Extensions) -> bytes:
    if extra.name is not None:
        return extra.name
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":  # GNU keeps times there
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _called(block: bytes, extra: _Extensions) -> str:
    return f"member {short(_name(block, extra).decode('utf-8', 'surrogateescape'))}"


def _quoted(field: bytes) -> str:
    return short(repr(field)[2:-1], max_length=50)


def _after_sparse_map(file: BinaryIO, block: bytes, content: int) -> int:
    """Where the content of a sparse file begins: behind the blocks that go on with the list of its holes."""
    goes_on = block[482]
    for _ in range(MAX_SPARSE_BLOCKS):
        if not goes_on:
            return content
        block = _read(file, content, BLOCK)
        goes_on = block[504] if len(block) == BLOCK else 0
        content += BLOCK
    raise _Broken(f"a sparse file has more than {MAX_SPARSE_BLOCKS * 21} holes.")


def _check_end(file: BinaryIO, offset: int, total: int) -> None:
    """Refuse anything but zeros behind the first block of zeros."""
    at = offset + BLOCK
    while at < total and at - offset <= MAX_PADDING:
        chunk = _read(file, at, 65_536)
        if chunk.count(0) < len(chunk):
            at += len(chunk) - len(chunk.lstrip(b"\0"))
            what = "tars that were joined, or a part overwritten by zeros"
            raise _Broken(f"the tar ends here, and more follows at byte {at} ({what}).")
        at = at + len(chunk) if chunk else total  # became shorter
    if at < total:
        raise _Broken(f"the tar ends here, and {total - offset} bytes follow.")


def _no_header(block: bytes, offset: int, extra: _Extensions) -> _Broken:
    """What to say of a block that stands where a header should."""
    if offset == 0:
        for beginning, what in NO_TARS:
            if block.startswith(beginning):
                return _Broken(f"the shard {what}", cure="")
        if not block:
            return _Broken("the shard is empty.")
        if len(block) == BLOCK:
            return _Broken("the shard is no tar file: its first checksum is wrong.", cure="")
    if extra.count and not block.strip(b"\0"):
        return _Broken("an extended header is followed by no member.")
    if not block:
        return _Broken("the shard ends without its end mark: it may be cut off.")
    if len(block) < BLOCK:
        return _Broken("the shard ends inside a header: it is cut off.")
    return _Broken("a header's checksum is wrong: the shard is damaged here or before.")
