"""From the bytes of an image file to eight-bit RGB: the rules.

Formats     JPEG, PNG, WebP, GIF and BMP. Every other format, TIFF included, is refused: convert it first.
Size        more than `MAX_PIXELS` pixels is an error, found before any pixel is decoded.
Damage      a file that ends before its last pixel is an error, never half an image. PNG holds checksums, and they are
            checked; the other formats have none.
Rotation    the orientation in EXIF is applied. An EXIF block that cannot be read counts as upright.
Animation   the first frame is taken.
Alpha       transparency, of an alpha channel, a palette entry or a key colour, is flattened on a background colour:
            out = round((alpha * colour + (255 - alpha) * background) / 255).
16 bit      grey v in 0..65535 becomes round(v * 255 / 65535). Of 16-bit colour Pillow reads the upper byte.
1 bit       becomes 0 and 255. Grey is copied into the three channels.
CMYK        R = (255 - C)(255 - K) / 255, and so on; JPEG files with Adobe's marker hold inverted inks, others do not.
Profiles    colour profiles are not applied: numbers are taken as sRGB.
Scale       who needs less than half of a JPEG's height and width may have it decoded at 1/2, 1/4 or 1/8 of them: each
            block of the file then gives fewer pixels, which are about the means of what it would have given. Where a
            side is no multiple of that, the last row or column reaches over the edge; `extent` says how far.
Libraries   Pillow; for plain JPEG files simplejpeg, if it is installed (`pip install "eclosion[jpeg]"`) and gives the
            pixels that Pillow gives on this machine. Nothing of what is read depends on whether it is there.
"""

import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# named, so that Pillow does not import the plugins of forty other formats when it first meets a WebP file
from PIL import ExifTags, Image, ImageChops, ImageOps, JpegImagePlugin, UnidentifiedImageError, WebPImagePlugin

from eclosion.data import jpeg
from eclosion.data.jpeg import AtLeast
from eclosion.errors import BadSample

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "SUFFIXES",
    "AtLeast",
    "Picture",
    "decode",
    "decode_rgb",
    "extent",
    "read_file",
    "to_rgb",
]

FORMATS = ("JPEG", "PNG", WebPImagePlugin.WebPImageFile.format, "GIF", "BMP")
# In lower case; files may spell them in any.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
# 9459 x 9459 pixels
MAX_PIXELS = 89_478_485
# What is not yet the size at which it is used: in any of Pillow's modes, or uint8 [height, width, 3], RGB.
Picture = Image.Image | NDArray[np.uint8]
# Orientation in EXIF -> where the right and the bottom edge of the stored picture are when it is upright.
EDGES = {
    1: ("right", "bottom"),
    2: ("left", "bottom"),
    3: ("left", "top"),
    4: ("right", "top"),
    5: ("bottom", "right"),
    6: ("bottom", "left"),
    7: ("top", "left"),
    8: ("top", "right"),
}
# Key in Pillow's `info` under which `decode` leaves what `extent` says.
EXTENT = "eclosion.extent"
# First bytes of formats that people bring and that are refused, for a message that helps.
REFUSED = (
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF"),
    (re.compile(rb"....ftyp(heic|heix|mif1|msf1)", re.DOTALL), "a HEIF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF"),
    (re.compile(rb"8BPS"), "a Photoshop"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"\s*<(\?xml|svg)"), "an SVG or XML"),
)
# Pillow's remarks about metadata that we do not use are dropped; its remark about a huge image is an error.
WARNING_RULES = (
    ("ignore", None, UserWarning, re.compile(r"PIL\."), 0),
    ("error", None, Image.DecompressionBombWarning, None, 0),
)


def decode(data: bytes | Path, name: str, *, at_least: AtLeast | None = None) -> Image.Image:
    """The picture in an image file, upright, in the file's own mode.

    Args:
        data: the content of the file, or its path.
        name: what to call it in an error.
        at_least: how small the picture may come out, if it can be decoded smaller than it is stored. None means
            every pixel, as Pillow decodes them.

    Raises:
        BadSample: reason "missing", "unreadable", "empty", "not_an_image", "too_large", "truncated" or "damaged".
    """
    raw = data if isinstance(data, bytes) else read_file(data, name)
    if not raw:
        raise BadSample(name, "empty", "the file is empty.")
    _hush()
    try:
        with Image.open(BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(name, str(image.width * image.height))
            beyond = {}
            if at_least and isinstance(image, JpegImagePlugin.JpegImageFile):
                beyond = _scale_down(image, at_least)
            image.load()
            upright = _upright(_adobe(image))
            left, top, right, bottom = (beyond.get(edge, 0) for edge in ("left", "top", "right", "bottom"))
            if beyond:
                upright.info[EXTENT] = left, top, upright.width - right, upright.height - bottom
            return upright
    except UnidentifiedImageError as error:
        raise BadSample(name, "not_an_image", _not_an_image(raw)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, re.sub(r"\D*(\d+).*", r"\1", str(error))) from error
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # on a hostile file a decoder fails in ways that no list foresees
        raise _broken(name, raw, error) from error


def decode_rgb(raw: bytes, name: str, *, at_least: AtLeast | None = None) -> Picture:
    """As `decode`, for who wants RGB: the same pixels, but a plain JPEG's without Pillow where that is possible.

    Args:
        raw: the content of the file.
        name: as for `decode`.
        at_least: as for `decode`.

    Returns:
        uint8 [height, width, 3], or what `decode` gives.

    Raises:
        BadSample: as `decode`.
    """
    pixels = jpeg.decode(raw, max_pixels=MAX_PIXELS, at_least=at_least)
    return decode(raw, name, at_least=at_least) if pixels is None else pixels


def to_rgb(image: Image.Image, background: str | tuple[int, int, int] = "white", *, name: str = "image") -> Image.Image:
    """The picture in mode RGB, by the rules at the top of this file; itself if there is nothing to do.

    Args:
        image: a picture in any of Pillow's modes.
        background: colour behind transparent parts: a CSS name, "#rrggbb" or three numbers.
        name: what to call it in an error.

    Raises:
        BadSample: reason "mode" if its numbers have no known range, such as floating point.
    """
    _hush()
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(image, background, name)
    if image.mode in {"RGBa", "La"}:  # premultiplied
        image = image.convert(image.mode.upper())
    if image.has_transparency_data or image.mode in {"RGBA", "LA", "PA"}:
        image = image.convert("RGBA")
        return _flatten(image.convert("RGB"), image.getchannel("A"), background)
    if image.mode == "RGB":
        return image
    if image.mode in {"L", "1", "P", "RGBX", "CMYK", "YCbCr", "HSV"}:
        return image.convert("RGB")
    raise BadSample(name, "mode", f"is in Pillow's mode {image.mode!r}, whose range is not known. Convert it to RGB.")


def _flatten(colour: Image.Image, alpha: Image.Image, background: str | tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", colour.size, background)
    canvas.paste(colour, mask=alpha)
    return canvas


def _sixteen_bit_to_rgb(image: Image.Image, background: str | tuple[int, int, int], name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise BadSample(
            name, "mode", "has whole numbers outside 0..65535, whose range is not known. Convert it to RGB."
        )
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    return _flatten(grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)), background)


def read_file(path: Path, name: str) -> bytes:
    """The bytes of a file.

    Raises:
        BadSample: reason "missing" or "unreadable".
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadSample(name, "missing", "the file does not exist (any more).") from error
    except OSError as error:
        raise BadSample(name, "unreadable", f"the file cannot be read ({error.strerror}).") from error


def _hush() -> None:
    """Install `WARNING_RULES` unless they are there.

    Not `warnings.catch_warnings`: it is not safe while other threads decode.
    """
    for action, message, category, module, line in WARNING_RULES:
        if (action, message, category, module, line) not in warnings.filters:
            warnings.filterwarnings(action, category=category, module=module.pattern if module else "")  # type: ignore[arg-type]


def extent(image: Image.Image) -> tuple[float, float, float, float]:
    """The part of a decoded picture's pixels that the picture fills, as left, top, right and bottom edge.

    That is all of them, unless it was decoded at a reduced scale and has a side that is no multiple of it. It no
    longer holds once the picture was resized, cropped or turned.
    """
    edges: tuple[float, float, float, float] = image.info.get(EXTENT, (0, 0, *image.size))
    return edges


def _scale_down(image: JpegImagePlugin.JpegImageFile, at_least: AtLeast) -> dict[str, float]:
    """Have a JPEG decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 that leaves enough of it.

    Returns:
        By how many of the decoded pixels it will reach over the edges of the upright picture.
    """
    orientation = _orientation(image)
    turned = orientation >= 5
    height, width = at_least((image.width, image.height) if turned else (image.height, image.width))
    if turned:
        height, width = width, height
    drafted = None
    if jpeg.scale_of((image.height, image.width), (height, width)) > 1:
        drafted = image.draft(None, (width, height))  # None keeps the colours of the file
    if drafted is None:
        return {}
    right, bottom = drafted[1][2:]
    return dict(zip(EDGES[orientation], (image.width - right, image.height - bottom), strict=True))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in EDGES else 1
    except Exception:  # noqa: BLE001 - as in `_upright`
        return 1


def _adobe(image: Image.Image) -> Image.Image:
    """Undo Pillow's assumption that all CMYK in JPEG is inverted, where the file does not say so."""
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        return ImageChops.invert(image)
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:  # most are, and need no copy
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - an EXIF block can be broken in any way, and the pixels be whole
        return image


def _too_large(name: str, size: str) -> BadSample:
    return BadSample(name, "too_large", f"has {size} pixels, and the limit is {MAX_PIXELS}. Scale it down first.")


def _not_an_image(raw: bytes) -> str:
    found = next((what for start, what in REFUSED if start.match(raw)), None)
    wanted = "JPEG, PNG, WebP, GIF or BMP"
    if found:
        return f"is {found} file, which is not read. Convert it to {wanted}."
    return f"is not an image that can be read ({wanted})."


def _broken(name: str, raw: bytes, error: Exception) -> BadSample:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in said.lower() or _shorter_than_it_says(raw):
        return BadSample(name, "truncated", f"the image ends early: the file is truncated ({said}).")
    return BadSample(name, "damaged", f"the image is damaged ({said}).")


def _shorter_than_it_says(raw: bytes) -> bool:
    """Whether a WebP file states more bytes than there are."""
    return raw[:4] == b"RIFF" and int.from_bytes(raw[4:8], "little") + 8 > len(raw)
