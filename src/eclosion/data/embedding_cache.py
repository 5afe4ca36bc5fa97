"""What encoders make of images and of captions, on disk, so that each is made once.

    <folder>/<fingerprint>-<device>-<version of torch>-<dim>x<buckets>.rows     one file per encoder

    file    = buckets, all of one size
    bucket  = 8 times (key, check), then 8 rows; an unused one is zeros, which the file system does not store
    key     = SHA-256 of an image's shape and numbers, float32; or of a caption's bytes
    check   = BLAKE2b of key and row, 16 bytes
    row     = float32, little endian; of a caption the encodings of all its tokens, one after the other

The bucket of a row follows from its key; of the eight places in it, one that is free is taken, or else one at random
is taken again. Nothing is ever locked: a row counts only if its key and its check are right, so what a killed process,
another process or a damaged disk leaves in a place is a row that was not made yet. A row is written before its key.

Device and version are in the name because they change the last bits of an embedding: a run that goes on gets the bits
that it would have made itself.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Protocol, Self
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclosion.data.file_cache import cache_folder
from eclosion.errors import EnvironmentProblem

__all__ = ["EmbeddingCache", "Encoder", "EncodingCache", "TokenEncoder"]

WAYS = 8
KEY_BYTES, CHECK_BYTES = 32, 16
ENTRY_BYTES = KEY_BYTES + CHECK_BYTES
SUFFIX = ".rows"

Row = NDArray[np.float32]


class Encoder(Protocol):
    """What makes embeddings, such as `eclosion.models.image_encoder.ImageEncoder`."""

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that make equal embeddings."""
        ...

    def __call__(self, image: Tensor) -> Tensor:
        """Embeddings, float32 [B, dim], of images [B, 3, H, W] in [-1, 1]; each depends on its own image alone."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """This encoder, on a device."""
        ...


class TokenEncoder(Protocol):
    """What makes encodings of captions, such as `eclosion.models.text_encoder.TextEncoder`."""

    @property
    def dim(self) -> int:
        """Numbers in the encoding of a token."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of a caption."""
        ...

    @property
    def num_cut(self) -> int:
        """Captions that had more tokens, so far."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that make equal encodings."""
        ...

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Encodings, float32 [B, num_tokens, dim], where the encoder is; each depends on its own caption alone."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """This encoder, on a device."""
        ...


class EmbeddingCache:
    """An encoder that looks up the images which it, or another process, has seen before.

    Attributes:
        encoder: makes the embeddings that are not there.
        dim: numbers in an embedding.
        num_found, num_made: images that were looked up, and images that went through the encoder.
    """

    def __init__(self, folder: Path | None, encoder: Encoder, *, limit_gb: float = 4.0) -> None:
        """Make a cache; no file is touched yet.

        Args:
            folder: where embeddings are kept; none means `embeddings` in `cache_folder()`.
            encoder: makes them.
            limit_gb: what its file may take, in GiB; 0 keeps nothing. Files of other encoders, those that were used
                longest ago, are removed when all together take more.
        """
        self.encoder = encoder
        self.dim = encoder.dim
        self.num_found = self.num_made = 0
        self._kept = _Kept(cache_folder() / "embeddings" if folder is None else folder, encoder, self.dim, limit_gb)

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that make equal embeddings."""
        return self.encoder.fingerprint

    def to(self, device: torch.device | str) -> Self:
        """This cache, with its encoder on a device."""
        self.encoder.to(device)
        return self

    def __call__(self, image: Tensor) -> Tensor:
        """Embeddings, float32 [B, dim], where the images are.

        Args:
            image: [B, 3, H, W] in [-1, 1], on the device of the encoder.

        Raises:
            EnvironmentProblem: if the folder cannot be written.
        """
        if not self._kept.limit_bytes:
            self.num_made += len(image)
            return self.encoder(image)
        found, made = self._kept.rows(_keys(image), lambda which: self.encoder(image[which]), image.device)
        self.num_made += made
        self.num_found += len(image) - made
        return found


class EncodingCache:
    """A text encoder that looks up the captions which it, or another process, has seen before.

    Attributes:
        encoder: makes the encodings that are not there.
        num_tokens, dim: tokens of a caption, and numbers in the encoding of each.
        num_found, num_made: captions that were looked up, and captions that went through the encoder.
    """

    def __init__(self, folder: Path | None, encoder: TokenEncoder, *, limit_gb: float = 4.0) -> None:
        """Make a cache; no file is touched yet.

        Args:
            folder: where encodings are kept; none means `text_encodings` in `cache_folder()`, apart from those of
                images, so that neither takes the other's space.
            encoder, limit_gb: as of `EmbeddingCache`. A caption of CLIP ViT-L/14 takes 0.24 MB.
        """
        self.encoder = encoder
        self.num_tokens, self.dim = encoder.num_tokens, encoder.dim
        self.num_found = self.num_made = 0
        place = cache_folder() / "text_encodings" if folder is None else folder
        self._kept = _Kept(place, encoder, self.num_tokens * self.dim, limit_gb)

    def __call__(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """Encodings, float32 [B, num_tokens, dim], on a device, to which the encoder goes.

        Raises:
            EnvironmentProblem: if the folder cannot be written.
        """
        self.encoder.to(device)
        if not self._kept.limit_bytes:
            self.num_made += len(captions)
            return self.encoder.tokens(captions)
        keys = [sha256(caption.encode("utf-8", "surrogatepass")).digest() for caption in captions]
        found, made = self._kept.rows(keys, lambda which: self._flat([captions[i] for i in which]), device)
        self.num_made += made
        self.num_found += len(captions) - made
        return found.reshape(len(captions), self.num_tokens, self.dim)

    def _flat(self, captions: Sequence[str]) -> Tensor:
        return self.encoder.tokens(captions).flatten(1)


class _Kept:
    """The rows that an encoder made, on each kind of device."""

    def __init__(self, folder: Path, encoder: Encoder | TokenEncoder, dim: int, limit_gb: float) -> None:
        self._folder, self._encoder, self._dim = folder, encoder, dim
        self.limit_bytes = int(limit_gb * 2**30)
        if self.limit_bytes < _bucket_bytes(dim):
            self.limit_bytes = 0
        self._tables: dict[str, _Table] = {}

    def rows(
        self, keys: Sequence[bytes], make: Callable[[list[int]], Tensor], device: torch.device
    ) -> tuple[Tensor, int]:
        """The rows of some keys, float32 [B, dim] on a device; and how many had to be made.

        Args:
            keys: of the rows; one that comes twice is made once.
            make: from the places of some keys to their rows.
            device: what they are made on.
        """
        table = self._table(device.type)
        rows = {key: row for key in dict.fromkeys(keys) if (row := table.get(key)) is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in rows}
        if missing:
            made = make(list(missing.values())).cpu().numpy()
            for key, row in zip(missing, made, strict=True):
                table.put(key, row)
                rows[key] = row
        found = np.stack([rows[key] for key in keys]) if keys else np.empty((0, self._dim), np.float32)
        return torch.from_numpy(found).to(device), len(missing)

    def _table(self, device: str) -> "_Table":
        """The file of this encoder's rows on a kind of device."""
        if device not in self._tables:
            num_buckets = self.limit_bytes // _bucket_bytes(self._dim)
            version = re.sub(r"[^\w.]", "_", torch.__version__)
            path = self._folder / f"{self._encoder.fingerprint}-{device}-{version}-{self._dim}x{num_buckets}{SUFFIX}"
            self._tables[device] = _Table(path, self._dim, num_buckets)
            _remove_others(path, self.limit_bytes)
        return self._tables[device]


class _Table:
    """Rows by key, in one file. Safe to use from several threads and processes."""

    def __init__(self, path: Path, dim: int, num_buckets: int) -> None:
        self._path, self._dim, self._num_buckets = path, dim, num_buckets
        self._writes = True
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            finalize(self, os.close, self._fd)
            if os.fstat(self._fd).st_size != (size := num_buckets * _bucket_bytes(dim)):
                os.ftruncate(self._fd, size)
            os.utime(path)  # used now
        except OSError as error:
            raise EnvironmentProblem(
                f"{path}: embeddings cannot be kept ({error.strerror}). Choose another folder with ECLOSION_CACHE, or "
                "keep none with cache_gb=0."
            ) from error

    def get(self, key: bytes) -> Row | None:
        """The row of a key; None if it is not there, or damaged."""
        start = self._bucket(key)
        try:
            entries = os.pread(self._fd, WAYS * ENTRY_BYTES, start)
            for way in range(WAYS):
                entry = entries[way * ENTRY_BYTES : (way + 1) * ENTRY_BYTES]
                if entry.startswith(key):
                    data = os.pread(self._fd, self._dim * 4, self._row(start, way))
                    return np.frombuffer(data, "<f4") if entry == key + _check(key, data) else None
        except OSError:  # a disk that cannot be read is one that does not have it
            return None
        return None

    def put(self, key: bytes, row: Row) -> None:
        """Keep a row; a disk that is full is told of once."""
        if not self._writes:
            return
        start, data = self._bucket(key), row.astype("<f4").tobytes()
        try:
            entries = os.pread(self._fd, WAYS * ENTRY_BYTES, start)
            kept = [entries[way * ENTRY_BYTES : way * ENTRY_BYTES + KEY_BYTES] for way in range(WAYS)]
            free = [way for way in range(WAYS) if kept[way] in (key, bytes(KEY_BYTES))]
            way = free[0] if free else key[8] % WAYS
            _write(self._fd, data, self._row(start, way))
            _write(self._fd, key + _check(key, data), start + way * ENTRY_BYTES)
        except OSError as error:
            self._writes = False
            warnings.warn(
                f"{self._path}: no more embeddings can be kept ({error.strerror}). They are made again each time.",
                stacklevel=2,
            )

    def _bucket(self, key: bytes) -> int:
        """Where a key's bucket begins."""
        return int.from_bytes(key[:8], "little") % self._num_buckets * _bucket_bytes(self._dim)

    def _row(self, start: int, way: int) -> int:
        return start + WAYS * ENTRY_BYTES + way * self._dim * 4


def _bucket_bytes(dim: int) -> int:
    return WAYS * (ENTRY_BYTES + dim * 4)


def _check(key: bytes, data: bytes) -> bytes:
    return blake2b(key + data, digest_size=CHECK_BYTES).digest()


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _keys(image: Tensor) -> list[bytes]:
    """A hash of each image [B, 3, H, W]."""
    shape = str(tuple(image.shape[1:])).encode()
    return [sha256(shape + row.tobytes()).digest() for row in image.detach().float().cpu().numpy()]


def _remove_others(mine: Path, limit_bytes: int) -> None:
    """Remove the files that were used longest ago, but not `mine`, while all together take more than the limit."""
    found = []
    for path in mine.parent.glob(f"*{SUFFIX}"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process is at it, too
            continue
        found.append((path != mine, status.st_mtime_ns, path, status.st_blocks * 512))
    total = sum(num_bytes for *_, num_bytes in found)
    for is_other, _, path, num_bytes in sorted(found):
        if is_other and total > limit_bytes:
            path.unlink(missing_ok=True)
            total -= num_bytes
