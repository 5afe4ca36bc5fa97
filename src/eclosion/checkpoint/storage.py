"""One checkpoint on disk: a folder that is either whole or invisible.

    .partial-<step>-<uuid>/         invisible: a save at work, or what a killed one left
    step-00001000/
        unet.safetensors            one file per entry, plain safetensors, no pickle
        unet.ema.safetensors
        unet.optimizer.safetensors
        state.json                  integers and what else resumes the run
        manifest.json               written last: size and sha256 of the others, and of itself

The order of a save: write each file, fsync it, read it back; then the manifest; fsync the folder; rename it to its
name; fsync the parent. So whatever has the name of a checkpoint was whole on disk before it got that name.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eclosion.checkpoint import disk
from eclosion.errors import CheckpointError
from eclosion.rundir import step_of

__all__ = [
    "DamagedError",
    "FileEntry",
    "Loaded",
    "Manifest",
    "glance",
    "read",
    "read_manifest",
    "verify",
    "write",
]

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"

_ENTRY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_JSON_LIMIT = 64 << 20  # bytes; far above any state.json of ours, far below what would hurt
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class DamagedError(CheckpointError):
    """The bytes on disk are not those that were saved; another checkpoint may still be whole."""


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows about one file: its size in bytes and the sha256 of its content, in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a checkpoint.

    Attributes:
        step: optimizer updates before it was taken.
        files: by file name, suffix included.
        meta: whatever the writer wants known without loading, such as hashes, versions and the device.
    """

    step: int
    files: Mapping[str, FileEntry]
    meta: Mapping[str, Any]
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory; `files` holds tensors by entry ("unet.ema"), then by name."""

    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    manifest: Manifest


# --- write ---------------------------------------------------------------------------------------------------------


def write(
    final: Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], meta: Mapping[str, Any]
) -> Manifest:
    """Write a checkpoint so that `final` appears whole and durable, or not at all.

    A checkpoint that has this name already is kept if it is valid and holds the same, else replaced.

    Args:
        final: the folder to make; its name states the step, as in `RunDir.checkpoint`.
        files: tensors by entry, such as "unet.ema", then by name. Contiguous CPU tensors are written from where
            they are; nobody may change them meanwhile.
        state, meta: JSON objects without NaN or infinity.

    Raises:
        CheckpointError: if the disk is full, read-only or broken; what was there before is intact.
        ValueError, TypeError: if `state` or `meta` is not JSON, or an entry cannot be a file name.
    """
    step = step_of(final)
    if step is None:
        raise ValueError(f"{final.name} does not state a step; take the folder from RunDir.checkpoint")
    contents = {f"{_entry(name)}.safetensors": _safetensors(tensors) for name, tensors in files.items()}
    contents[STATE] = [memoryview(_json(state))]
    meta = json.loads(_json(meta))
    sizes = {name: sum(buffer.nbytes for buffer in buffers) for name, buffers in contents.items()}
    with disk.saving(final, needed := sum(sizes.values())), disk.unpublished(final) as partial:
        disk.check_space(final.parent, needed)
        partial.mkdir()
        # Hashes the memory while this thread waits for the disk. All file operations stay in this thread.
        with _helper() as hasher:
            digests = {name: hasher.submit(_sha256, buffers) for name, buffers in contents.items()}
            for name, buffers in contents.items():
                disk.write_file(partial / name, buffers)
            entries = {name: FileEntry(size, digests[name].result()) for name, size in sizes.items()}
        manifest = Manifest(step, entries, meta)
        disk.write_file(partial / MANIFEST, [memoryview(_manifest_bytes(manifest))])
        disk.fsync_folder(partial)
        _publish(partial, final, manifest)
    return manifest


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Give a whole checkpoint its name; one that has it already gives way, unless it is the same."""
    if not final.exists():
        partial.rename(final)
        disk.fsync_folder(final.parent)
    elif _is_valid_and_equal(final, manifest):
        shutil.rmtree(partial)
    else:
        _replace(partial, final)


def _replace(partial: Path, final: Path) -> None:
    aside = disk.hidden(final, disk.REPLACED)
    final.rename(aside)  # a kill between the two renames leaves .replaced-*, which `tidy` puts back
    try:
        partial.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    disk.fsync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)  # the save is done; `tidy` removes at the next start what is left


def _is_valid_and_equal(folder: Path, manifest: Manifest) -> bool:
    try:
        return verify(folder) == manifest
    except DamagedError:
        return False


@contextmanager
def _helper() -> Iterator[ThreadPoolExecutor]:
    """One thread; what waits for it is dropped when the block fails."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(buffers: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _safetensors(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The buffers that make one safetensors file: header length, header, then each tensor's memory.

    Tensors of wider types come first and the header is padded with spaces, so that each is aligned in a mapped file.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    buffers, offset = [memoryview(b"")], 0
    for name in names:
        dtype = _DTYPES.get(tensors[name].dtype)
        if dtype is None or name in header:
            raise ValueError(f"{name!r} of type {tensors[name].dtype} cannot be stored in a safetensors file")
        buffers.append(buffer := _memory(tensors[name]))
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + buffer.nbytes],
        }
        offset += buffer.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffers[0] = memoryview(len(text).to_bytes(8, "little") + text)
    return buffers


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _entry(name: str) -> str:
    if not _ENTRY.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a checkpoint file; use letters, digits, '.', '_' and '-'")
    return name


def _json(value: Mapping[str, Any]) -> bytes:
    raw = json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode()
    if len(raw) > _JSON_LIMIT:
        raise ValueError(f"{len(raw)} bytes of JSON are too many; put what is large into a tensor")
    return raw


def _manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as a JSON object whose last member is the sha256 of all that stands before it."""
    body = {
        "format_version": manifest.format_version,
        "step": manifest.step,
        "files": {name: {"size": e.size, "sha256": e.sha256} for name, e in manifest.files.items()},
        "meta": manifest.meta,
    }
    return _sealed(_json(body).removesuffix(b"\n}") + b",\n")


def _sealed(head: bytes) -> bytes:
    return head + b'  "sha256": "' + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'


# --- read ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, itself checked; the other files are not looked at.

    Raises:
        DamagedError: if it is missing, altered, or not this folder's.
        CheckpointError: if it cannot be read, or a newer eclosion wrote it.
    """
    path = folder / MANIFEST
    raw = _read_small(path)
    head, mark, _ = raw.rpartition(b'  "sha256": "')
    if not mark or _sealed(head) != raw:
        raise DamagedError(f"{path} is damaged: its content is not what its own sha256 states.")
    body = _parsed(raw, path)
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {repr(version)[:40]}, and this eclosion reads {FORMAT_VERSION}. "
            "Install the version that wrote it."
        )
    manifest = _manifest(body, path)
    if step_of(folder) not in (None, manifest.step):
        raise DamagedError(f"{folder} is damaged: its manifest.json is of step {manifest.step}.")
    return manifest


def _manifest(body: Mapping[str, Any], path: Path) -> Manifest:
    try:
        files = {str(name): FileEntry(int(e["size"]), str(e["sha256"])) for name, e in body["files"].items()}
        manifest = Manifest(int(body["step"]), files, dict(body["meta"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is not the manifest of a checkpoint ({repr(error)[:200]}).") from None
    bad = [name for name in files if not _ENTRY.fullmatch(name)]
    if bad or STATE not in files:
        what = repr(bad[0][:100]) if bad else "no state.json"
        raise DamagedError(f"{path} is not the manifest of a checkpoint: it lists {what}.")
    return manifest


def glance(folder: Path) -> Manifest:
    """The manifest, after a look at the size of each file; finds what is missing or cut short, not a flipped bit."""
    manifest = read_manifest(folder)
    for name, entry in sorted(manifest.files.items()):
        with _reading(folder / name) as (_, size):
            if size != entry.size:
                raise DamagedError(
                    f"{folder / name} is damaged: it has {size} bytes, and manifest.json states {entry.size}."
                )
    return manifest


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest; several files at once.

    Raises:
        DamagedError: naming the first file, by name, that is not as it was saved.
        CheckpointError: if it cannot be read for another reason.
    """
    manifest = glance(folder)
    names = sorted(manifest.files)
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(lambda name: _file_sha256(folder / name), names), strict=True):
            if digest != manifest.files[name].sha256:
                raise DamagedError(f"{folder / name} is damaged: its sha256 is not the one in manifest.json.")
    return manifest


def _file_sha256(path: Path) -> str:
    """Read, not mapped: a disk that fails under a mapped file kills the process instead of raising."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(disk.CHUNK))
    with _reading(path) as (fd, _):
        while count := os.readv(fd, [buffer]):
            digest.update(buffer[:count])
    return digest.hexdigest()


def read(folder: Path, *, verified: bool) -> Loaded:
    """Load a checkpoint.

    Args:
        folder: as given to `write`.
        verified: whether every byte is compared with the manifest before a tensor is handed out; without, only the
            size of each file is. Hashing leaves the files in the page cache, where loading finds them.

    Returns:
        Tensors on the CPU, mapped from the files: a page is read when it is first touched, and changing a tensor
        does not change the file.
    """
    manifest = verify(folder) if verified else glance(folder)
    names = [name for name in manifest.files if name.endswith(".safetensors")]
    files = {name.removesuffix(".safetensors"): _read_safetensors(folder / name) for name in names}
    return Loaded(files, _parsed(_read_small(folder / STATE), folder / STATE), manifest)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with disk.explained(path, "read", "Mend that and start again."), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {disk.reason(error)}.") from None


def _read_small(path: Path) -> bytes:
    with _reading(path) as (fd, size):
        if size > _JSON_LIMIT:
            raise DamagedError(f"{path} is damaged: {size} bytes are too many for this file.")
        raw = b""
        while len(raw) < size and (more := os.read(fd, size - len(raw))):
            raw += more
    return raw


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged: it is not a JSON object.")
    return value


@contextmanager
def _reading(path: Path) -> Iterator[tuple[int, int]]:
    """A file's descriptor and size in bytes.

    A file that is gone, or that the disk cannot give back, is damage. Missing rights or a shortage of memory are not:
    passing over a good checkpoint for them would throw away work.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedError(f"{path} is damaged: it is not a file.")
        with disk.opened(path, os.O_RDONLY) as fd:
            yield fd, os.fstat(fd).st_size
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise DamagedError(f"{path} is missing, and its checkpoint is damaged.") from None
        if error.errno == errno.EIO:
            raise DamagedError(f"{path} is damaged: the disk cannot read it ({os.strerror(errno.EIO)}).") from None
        raise CheckpointError(f"{path} cannot be read: {disk.reason(error)}. Mend that and start again.") from None
