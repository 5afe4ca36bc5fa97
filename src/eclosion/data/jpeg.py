"""Plain JPEG files decoded by libjpeg-turbo at once, without Pillow's parser, to the same pixels.

The library simplejpeg is optional, and nothing may depend on whether it is there. So it is asked only for files that
leave no question: baseline JFIF of three components, 8 bit, in one scan, upright, with the usual sampling of colours,
with nothing in their header that means anything, and whole down to their end mark; at their full scale, or at a scale
that divides both sides. libjpeg-turbo must have nothing to remark about them. For everything else, damage included,
`decode` gives nothing, and Pillow says what is to be said.

Both hold a copy of libjpeg-turbo. That theirs give the same pixels on this machine is tried once in each process.
"""

from collections.abc import Callable
from functools import cache
from io import BytesIO
from struct import unpack_from

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    import simplejpeg
except ImportError:  # the extra "jpeg" is not installed
    simplejpeg = None

__all__ = ["AtLeast", "decode", "is_used", "scale_of"]

# Start of image, and the segment of JFIF with its usual length.
START = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"
START_BYTES = 2 + 2 + 16
END = b"\xff\xd9"
FRAME, HUFFMAN, SCAN, QUANTA, RESTART, PROFILE, COMMENT = 0xFFC0, 0xFFC4, 0xFFDA, 0xFFDB, 0xFFDD, 0xFFE2, 0xFFFE
# Bytes of the segments that describe a frame and a scan of three components, and of one table of quanta.
FRAME_BYTES, SCAN_BYTES, TABLE_BYTES = 17, 12, 65
# Samples of brightness for one of colour, across and down, as a frame spells them: 4:4:4, 4:4:0, 4:2:2 and 4:2:0.
SAMPLINGS = (0x11, 0x12, 0x21, 0x22)
# Below this, two scales could give the same size.
MIN_SIDE = 16
# From the height and width of an upright picture to those below which it must not be decoded.
AtLeast = Callable[[tuple[int, int]], tuple[int, int]]


def is_used() -> bool:
    """Whether plain files are decoded here: simplejpeg is installed, and gives the pixels that Pillow gives."""
    return simplejpeg is not None and _agrees_with_pillow()


def scale_of(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """The largest of 1, 2, 4 and 8 by which a picture can be divided and leaves the wanted height and width.

    Source: `JpegImageFile.draft` in Pillow.
    """
    if wanted[0] > size[0] // 2 or wanted[1] > size[1] // 2:
        return 1
    by = min(size[0] // wanted[0], size[1] // wanted[1])
    return next((scale for scale in (8, 4, 2) if by >= scale), 1)


def decode(raw: bytes, *, max_pixels: int, at_least: AtLeast | None = None) -> NDArray[np.uint8] | None:
    """The pixels of a plain JPEG, as Pillow gives them.

    Args:
        raw: content of a file, of any kind.
        max_pixels: pixels that a file may have.
        at_least: how small it may come out; none means at full size.

    Returns:
        uint8 [height, width, 3], RGB; or None if it is not plain, not whole or too large, or cannot be had in this
        way. Then Pillow has to be asked.
    """
    if not raw.startswith(START) or not raw.endswith(END) or not is_used():
        return None
    size = _size_of(raw)
    if size is None or size[0] * size[1] > max_pixels:
        return None
    scale = scale_of(size, at_least(size)) if at_least else 1
    if scale == 1:
        return _decoded(raw, size, 1)
    height, width = size
    if height % scale or width % scale or min(size) < MIN_SIDE:
        return None
    return _decoded(raw, (height // scale, width // scale), scale)


def _decoded(raw: bytes, size: tuple[int, int], scale: int) -> NDArray[np.uint8] | None:
    pixels: NDArray[np.uint8]
    try:
        if scale == 1:
            pixels = simplejpeg.decode_jpeg(raw)
        else:
            pixels = simplejpeg.decode_jpeg(raw, min_height=size[0], min_width=size[1], min_factor=scale)
    except ValueError:  # damaged, or it has a remark
        return None
    return pixels if pixels.shape[:2] == size else None


# The header that was found plain last, and the size in it: many a data set has the same one in all of its files.
_latest: tuple[bytes, tuple[int, int]] = (b"no file begins like this", (0, 0))


def _size_of(raw: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG file that begins with `START`; none if it is not plain."""
    global _latest
    header, size = _latest
    if raw.startswith(header) and len(raw) > len(header) + len(END):
        return size
    found = _plain_header(raw)
    if found is None:
        return None
    end, size = found
    _latest = raw[:end], size
    return size


def _plain_header(raw: bytes) -> tuple[int, tuple[int, int]] | None:
    """Bytes of the header of a JPEG file that begins with `START`, and height and width; none if it is not plain."""
    at, end, size = START_BYTES, len(raw) - SCAN_BYTES - len(END), None
    while at < end:
        marker, length = unpack_from(">HH", raw, at)
        if marker == SCAN:  # of all three components
            return (at + 2 + length, size) if size and length == SCAN_BYTES and raw[at + 4] == 3 else None
        if marker == FRAME:
            if size or length != FRAME_BYTES or at + length > end:
                return None
            bits, height, width, components, _, sampling, _, _, second, _, _, third, _ = unpack_from(
                ">BHHB3B3B3B", raw, at + 4
            )
            if (bits, components, second, third) != (8, 3, 0x11, 0x11) or sampling not in SAMPLINGS:
                return None
            if not height or not width:
                return None
            size = height, width
        elif marker == QUANTA:
            if length % TABLE_BYTES != 2:  # of 8 bit each
                return None
        elif marker == PROFILE:
            if length < 2 + 14 or not raw.startswith(b"ICC_PROFILE\0", at + 4):
                return None
        elif marker not in (HUFFMAN, RESTART, COMMENT):
            return None
        at += 2 + length
    return None


@cache
def _agrees_with_pillow() -> bool:
    """Whether both libraries give the same pixels, at each sampling and scale; noise shows any difference."""
    rng = np.random.default_rng(0)
    try:
        for sampling in ("444", "440", "422", "420"):
            for size in ((64, 48), (35, 51)):
                raw = simplejpeg.encode_jpeg(rng.integers(0, 256, (*size, 3), np.uint8), colorsubsampling=sampling)
                scales = [scale for scale in (1, 2, 4, 8) if not (size[0] % scale or size[1] % scale)]
                if not all(_agree(raw, size, scale) for scale in scales):
                    return False
    except Exception:  # noqa: BLE001 - whatever is the matter with it, there is Pillow
        return False
    return True


def _agree(raw: bytes, size: tuple[int, int], scale: int) -> bool:
    small = size[0] // scale, size[1] // scale
    with Image.open(BytesIO(raw), formats=("JPEG",)) as image:
        image.draft(None, small[::-1])
        pixels = _decoded(raw, small, scale)
        return _size_of(raw) == size and pixels is not None and np.array_equal(pixels, np.asarray(image))
