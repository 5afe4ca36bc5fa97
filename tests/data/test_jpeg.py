"""Plain JPEG files: the same pixels, and the same complaints, whether the faster library is there or not."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from eclosion.data import jpeg
from eclosion.data.images import decode, decode_rgb, to_rgb
from eclosion.errors import BadSample

simplejpeg = pytest.importorskip("simplejpeg")

LIMIT = 10**8


@pytest.fixture
def tried_again():
    """That both libraries agree is tried when it is asked for, and again after the test."""
    jpeg._agrees_with_pillow.cache_clear()
    yield
    jpeg._agrees_with_pillow.cache_clear()


def scene(width, height, seed=0):
    """Colours that run into each other, with grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encoded(pixels, **options):
    return saved(Image.fromarray(pixels), "JPEG", **options)


def by_pillow(raw, scale=1):
    with Image.open(io.BytesIO(raw)) as image:
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        return np.asarray(image.convert("RGB"))


def rgb(picture):
    return picture if isinstance(picture, np.ndarray) else np.asarray(to_rgb(picture))


def outcome(call):
    """Pixels, or the complaint."""
    try:
        return rgb(call())
    except BadSample as error:
        return error.reason, str(error)


def assert_same(raw, at_least=None):
    """That the file is the same to whoever has the library and to whoever has not."""
    ours = outcome(lambda: decode_rgb(raw, "x", at_least=at_least))
    theirs = outcome(lambda: decode(raw, "x", at_least=at_least))
    if isinstance(ours, tuple) or isinstance(theirs, tuple):
        assert ours == theirs
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sampling", ["444", "440", "422", "420"])
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (7, 5), (33, 16), (16, 33), (47, 61)], ids=str)
def test_plain_files_have_the_pixels_that_pillow_gives_them(sampling, size):
    for quality in (10, 75, 100):
        raw = simplejpeg.encode_jpeg(scene(*size, seed=quality), quality, colorsubsampling=sampling)
        pixels = jpeg.decode(raw, max_pixels=LIMIT)
        assert pixels is not None
        np.testing.assert_array_equal(pixels, by_pillow(raw))


@pytest.mark.parametrize(
    "options",
    [
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"comment": b"a comment"},
        {"icc_profile": bytes(70_000)},
        {"dpi": (300, 300)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_files_that_only_say_more_are_plain_too(options):
    raw = encoded(scene(40, 30), **options)
    pixels = jpeg.decode(raw, max_pixels=LIMIT)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, by_pillow(raw))


@pytest.mark.parametrize("sampling", ["444", "440", "422", "420"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_scale_that_divides_both_sides_gives_the_pixels_of_pillows_draft(sampling, scale):
    for width, height in ((64, 64), (16, 32), (120, 88)):
        raw = simplejpeg.encode_jpeg(scene(width, height), 85, colorsubsampling=sampling)
        small = height // scale, width // scale
        pixels = jpeg.decode(raw, max_pixels=LIMIT, at_least=lambda size, small=small: small)
        assert pixels is not None
        assert pixels.shape == (*small, 3)
        np.testing.assert_array_equal(pixels, by_pillow(raw, scale))


def test_a_scale_that_leaves_part_of_a_pixel_is_left_to_pillow():
    raw = encoded(scene(65, 64))
    assert jpeg.decode(raw, max_pixels=LIMIT, at_least=lambda size: (16, 16)) is None
    assert decode_rgb(raw, "x", at_least=lambda size: (16, 16)).size == (17, 16)


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(scene(24, 16), exif=exif)


def without_jfif():
    raw = encoded(scene(24, 16))
    return raw[:2] + raw[20:]


OTHERS = {
    "progressive": lambda: encoded(scene(24, 16), progressive=True),
    "grey": lambda: encoded(scene(24, 16)[:, :, 0]),
    "inks": lambda: saved(Image.fromarray(scene(24, 16)).convert("CMYK"), "JPEG"),
    "RGB in the file": lambda: encoded(scene(24, 16), keep_rgb=True),
    "turned": lambda: with_orientation(6),
    "4:1:1": lambda: simplejpeg.encode_jpeg(scene(64, 16), colorsubsampling="411"),
    "no JFIF": without_jfif,
    "bytes after the end": lambda: encoded(scene(24, 16)) + b"\0",
    "PNG": lambda: saved(Image.fromarray(scene(24, 16)), "PNG"),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_everything_else_is_left_to_pillow(kind):
    raw = OTHERS[kind]()
    assert jpeg.decode(raw, max_pixels=LIMIT) is None
    assert_same(raw)


def test_too_many_pixels_are_found_in_the_header_and_pillow_says_so():
    raw = bytearray(encoded(scene(24, 16)))
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = b"\xff\xff\xff\xff"
    assert jpeg._size_of(bytes(raw)) == (65535, 65535)
    assert jpeg.decode(bytes(raw), max_pixels=LIMIT) is None
    with pytest.raises(BadSample) as caught:
        decode_rgb(bytes(raw), "x")
    assert caught.value.reason == "too_large"


def test_wherever_a_file_ends_it_is_the_same_with_and_without_the_library():
    whole = encoded(scene(16, 16))
    for kept in range(len(whole)):
        assert_same(whole[:kept])
        assert_same(whole[:kept] + b"\xff\xd9")


def test_damaged_files_are_the_same_with_and_without_the_library():
    draw, fast = random.Random(0), 0
    for number in range(400):
        raw = bytearray(encoded(scene(24, 17, seed=number % 5), restart_marker_blocks=2 * (number % 2)))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(raw) if number % 3 else 620)
            raw[at] = draw.choice([draw.randrange(256), 0xFF, 0, 0xD9, 0xDA, 0xC2, raw[at] ^ 1 << draw.randrange(8)])
        fast += jpeg.decode(bytes(raw), max_pixels=LIMIT) is not None
        assert_same(bytes(raw))
        assert_same(bytes(raw), at_least=lambda size: (5, 5))
    assert fast > 40  # damage that a decoder cannot see


@pytest.mark.parametrize("broken", ["one pixel", "an exception", "the size"])
def test_a_library_that_decodes_otherwise_is_left_alone(broken, monkeypatch, tried_again):
    real = simplejpeg.decode_jpeg

    def other(raw, **options):
        if broken == "an exception":
            raise TypeError("another version, with other arguments")
        pixels = real(raw, **options)
        if broken == "the size":
            return pixels[1:]
        pixels[-1, -1, -1] ^= 1
        return pixels

    raw = encoded(scene(24, 16))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", other)
    assert jpeg.decode(raw, max_pixels=LIMIT) is None
    np.testing.assert_array_equal(rgb(decode_rgb(raw, "x")), by_pillow(raw))


def test_without_the_library_pillow_decodes(monkeypatch):
    raw = encoded(scene(24, 16))
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert jpeg.decode(raw, max_pixels=LIMIT) is None
    np.testing.assert_array_equal(rgb(decode_rgb(raw, "x")), by_pillow(raw))
