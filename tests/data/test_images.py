"""Decoding: every mode against an independent formula, every kind of damage against its reason."""

import io
import random
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from eclosion.data import images
from eclosion.data.images import decode, extent, to_rgb
from eclosion.errors import BadSample

RED, BLUE = (255, 0, 0), (10, 20, 200)


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def through(image, format="PNG", background="white", **options):
    """What training sees of an image that was saved to a file."""
    return np.asarray(to_rgb(decode(encoded(image, format, **options), "x"), background))


def over(colour, alpha, background):
    """Alpha compositing, in exact arithmetic, rounded to the nearest."""
    alpha = alpha[..., None].astype(np.float64) / 255
    return np.floor(alpha * colour + (1 - alpha) * np.array(background) + 0.5).astype(np.uint8)


def test_rgb_is_left_as_it_is():
    pixels = noise(7, 5, 3)
    np.testing.assert_array_equal(through(Image.fromarray(pixels)), pixels)


def test_grey_is_copied_to_three_channels():
    pixels = noise(7, 5)
    np.testing.assert_array_equal(through(Image.fromarray(pixels)), np.stack([pixels] * 3, -1))


def test_one_bit_becomes_black_and_white():
    bits = noise(7, 9, high=2).astype(bool)
    np.testing.assert_array_equal(through(Image.fromarray(bits)), np.stack([bits * np.uint8(255)] * 3, -1))


def test_a_palette_is_looked_up():
    indices, palette = noise(7, 5, high=16), noise(16, 3)
    image = Image.frombytes("P", (5, 7), indices.tobytes())
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(through(image), palette[indices])
    np.testing.assert_array_equal(through(image, "GIF"), palette[indices])


@pytest.mark.parametrize("background", ["white", "black", "#0a14c8", BLUE])
def test_alpha_is_flattened_on_the_background(background):
    pixels = noise(31, 17, 4)
    wanted = over(pixels[..., :3], pixels[..., 3], {"white": (255,) * 3, "black": (0,) * 3}.get(background, BLUE))
    np.testing.assert_array_equal(through(Image.fromarray(pixels), background=background), wanted)


def test_grey_with_alpha_is_flattened():
    pixels = noise(31, 17, 2)
    grey = np.stack([pixels[..., 0]] * 3, -1)
    np.testing.assert_array_equal(
        through(Image.frombytes("LA", (17, 31), pixels.tobytes()), background=RED),
        over(grey, pixels[..., 1], RED),
    )


def test_webp_with_alpha_is_flattened():
    pixels = noise(16, 16, 4)
    pixels[..., 3] = np.where(pixels[..., 3] > 127, 255, 128)
    seen = through(Image.fromarray(pixels), "WEBP", background=RED, lossless=True, exact=True)
    np.testing.assert_array_equal(seen, over(pixels[..., :3], pixels[..., 3], RED))


@pytest.mark.parametrize(
    "transparency", [3, bytes([255, 0, 128, 7] + [255] * 12)], ids=["one entry", "alpha per entry"]
)
def test_palette_transparency_is_flattened(transparency):
    indices, palette = noise(7, 5, high=16), noise(16, 3)
    image = Image.frombytes("P", (5, 7), indices.tobytes())
    image.putpalette(palette.tobytes())
    table = np.array(list(transparency) if isinstance(transparency, bytes) else [255] * 3 + [0] + [255] * 12)
    seen = through(image, background=BLUE, transparency=transparency)
    np.testing.assert_array_equal(seen, over(palette[indices], table[indices], BLUE))


def test_a_transparent_gif_is_flattened():
    indices, palette = noise(7, 5, high=16), noise(16, 3)
    image = Image.frombytes("P", (5, 7), indices.tobytes())
    image.putpalette(palette.tobytes())
    seen = through(image, "GIF", background=BLUE, transparency=3)
    np.testing.assert_array_equal(seen, over(palette[indices], np.where(indices == 3, 0, 255), BLUE))


def test_key_colours_are_transparent():
    grey = noise(9, 9, high=4)
    colour = np.stack([grey, grey * 2, grey * 3], -1)
    alpha = np.where(grey == 2, 0, 255)
    np.testing.assert_array_equal(
        through(Image.fromarray(grey), background=RED, transparency=2), over(np.stack([grey] * 3, -1), alpha, RED)
    )
    np.testing.assert_array_equal(
        through(Image.fromarray(colour), background=RED, transparency=(2, 4, 6)), over(colour, alpha, RED)
    )


def test_sixteen_bit_grey_is_scaled_by_its_range_and_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    wanted = np.floor(values.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)
    assert wanted.min() == 0
    assert wanted.max() == 255
    np.testing.assert_array_equal(through(Image.fromarray(values)), np.stack([wanted] * 3, -1))
    for same in (Image.fromarray(values.astype(np.int32)), Image.fromarray(values.astype(">u2"))):
        np.testing.assert_array_equal(np.asarray(to_rgb(same)), np.stack([wanted] * 3, -1))


def png(width, height, depth, colour_type, rows, *extra):
    """A PNG file from raw scan lines: an encoder for what Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_the_key_colour_of_sixteen_bit_grey_is_transparent():
    values = noise(4, 6, high=3).astype(np.uint16) * 20000
    key = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 20000)
    raw = png(
        6, 4, 16, 0, [row.astype(">u2").tobytes() for row in values], key + struct.pack(">I", zlib.crc32(key[4:]))
    )
    grey = np.stack([np.floor(values * (255 / 65535) + 0.5)] * 3, -1)
    seen = np.asarray(to_rgb(decode(raw, "x"), RED))
    np.testing.assert_array_equal(seen, over(grey, np.where(values == 20000, 0, 255), RED))


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colour_keeps_the_upper_byte(channels):
    values = noise(4, 6, channels, high=65536, dtype=np.uint16)
    raw = png(6, 4, 16, {3: 2, 4: 6}[channels], [row.astype(">u2").tobytes() for row in values])
    seen, wanted = np.asarray(to_rgb(decode(raw, "x"), RED)), (values >> 8).astype(np.uint8)
    if channels == 4:
        wanted = over(wanted[..., :3], wanted[..., 3], RED)
    np.testing.assert_array_equal(seen, wanted)


def test_cmyk_is_converted_ink_by_ink():
    inks = noise(31, 17, 4).astype(np.int64)
    image = Image.frombytes("CMYK", (17, 31), inks.astype(np.uint8).tobytes())
    wanted = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    np.testing.assert_allclose(np.asarray(to_rgb(image)).astype(int), wanted, atol=1)


def cmyk_jpeg():
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, :8, 0], inks[:, 8:, 3] = 255, 128  # cyan beside grey
    return encoded(Image.frombytes("CMYK", (16, 16), inks.tobytes()), "JPEG", quality=100)


def test_cmyk_jpeg_with_adobes_inverted_inks_has_its_true_colours():
    raw = cmyk_jpeg()
    assert b"Adobe" in raw
    seen = np.asarray(to_rgb(decode(raw, "x"))).astype(int)
    np.testing.assert_allclose(seen[:, :7], np.broadcast_to([0, 255, 255], (16, 7, 3)), atol=3)
    np.testing.assert_allclose(seen[:, 9:], np.broadcast_to([127, 127, 127], (16, 7, 3)), atol=3)


def test_cmyk_jpeg_without_adobes_marker_holds_plain_inks():
    raw = cmyk_jpeg()
    start = raw.index(b"\xff\xee")  # the marker that holds "Adobe"
    plain = raw[:start] + raw[start + 2 + int.from_bytes(raw[start + 2 : start + 4], "big") :]
    inverted = 255 - np.asarray(decode(raw, "x"))
    np.testing.assert_array_equal(np.asarray(decode(plain, "x")), inverted)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_other_colour_spaces_become_rgb(mode):
    pixels = np.asarray(Image.fromarray(noise(4, 4, 3)).resize((16, 16)))
    seen = np.asarray(to_rgb(Image.fromarray(pixels).convert(mode))).astype(int)
    np.testing.assert_allclose(seen, pixels, atol=8)  # a round trip through eight bits


def test_premultiplied_alpha_is_divided_out():
    pixels = np.full((4, 4, 4), (200, 100, 50, 128), np.uint8)
    seen = np.asarray(to_rgb(Image.fromarray(pixels).convert("RGBa"), RED)).astype(int)
    np.testing.assert_allclose(seen, over(pixels[..., :3], pixels[..., 3], RED), atol=1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    # the eight orientations of the EXIF standard, as operations on rows and columns
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    stored = np.asarray(Image.fromarray(noise(2, 3, 3)).resize((24, 16), Image.Resampling.NEAREST))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    seen = through(Image.fromarray(stored), format, exif=exif, **options).astype(int)
    np.testing.assert_allclose(seen, undo(stored), atol=3 if format == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"]
)
def test_a_broken_exif_block_counts_as_upright(exif):
    pixels = np.full((8, 8, 3), 77, np.uint8)
    np.testing.assert_allclose(through(Image.fromarray(pixels), "JPEG", exif=exif).astype(int), pixels, atol=2)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, (0, 255, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    seen = through(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(seen, np.broadcast_to(RED, (8, 8, 3)))


def test_numbers_without_a_known_range_are_refused():
    with pytest.raises(BadSample, match=r"^f: is in Pillow's mode 'F', whose range is not known. Convert it to RGB.$"):
        to_rgb(Image.fromarray(np.zeros((2, 2), np.float32)), name="f")
    with pytest.raises(BadSample, match=r"^i: has whole numbers outside 0..65535"):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, np.int32)), name="i")


def test_tiff_is_refused_by_name():
    with pytest.raises(BadSample) as caught:
        decode(encoded(Image.new("RGB", (4, 4)), "TIFF"), "a.png")
    assert str(caught.value) == "a.png: is a TIFF file, which is not read. Convert it to JPEG, PNG, WebP, GIF or BMP."
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "empty", "x: the file is empty."),
        (b"hello, I am a text", "not_an_image", "x: is not an image that can be read (JPEG, PNG, WebP, GIF or BMP)."),
        (
            b"%PDF-1.7 ...",
            "not_an_image",
            "x: is a PDF file, which is not read. Convert it to JPEG, PNG, WebP, GIF or BMP.",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image", None),
    ],
)
def test_what_is_no_image_is_named(data, reason, message):
    with pytest.raises(BadSample) as caught:
        decode(data, "x")
    assert caught.value.reason == reason
    assert message is None or str(caught.value) == message


def test_a_path_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(BadSample) as caught:
        decode(tmp_path / "gone.png", "gone.png")
    assert (caught.value.reason, str(caught.value)) == ("missing", "gone.png: the file does not exist (any more).")
    with pytest.raises(BadSample) as caught:
        decode(tmp_path, "folder")
    assert (caught.value.reason, str(caught.value)) == (
        "unreadable",
        "folder: the file cannot be read (Is a directory).",
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_file_that_ends_early_is_never_half_an_image(format):
    whole = encoded(Image.fromarray(noise(64, 64, 3)), format)
    for kept in (0.3, 0.6, 0.9):
        with pytest.raises(BadSample) as caught:
            decode(whole[: int(len(whole) * kept)], "x")
        assert caught.value.reason == "truncated", (kept, caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {"interlace": 0}),
        ("GIF", {"interlace": 1}),
        ("BMP", {}),
    ],
)
def test_wherever_a_file_ends_it_gives_all_of_its_pixels_or_an_error(format, options):
    whole = encoded(Image.fromarray(noise(6, 6, 3)), format, **options)
    wanted, refused = np.asarray(to_rgb(decode(whole, "x"))), 0
    for kept in range(len(whole)):
        try:
            seen = to_rgb(decode(whole[:kept], "x"))
        except BadSample:
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(seen), wanted, err_msg=f"{kept} of {len(whole)} bytes")
    assert refused >= len(whole) - 20  # PNG: two checksums and the end mark


def test_a_flipped_bit_in_a_png_is_never_another_image():
    whole = encoded(Image.fromarray(noise(6, 6, 3)), "PNG")
    wanted = np.asarray(to_rgb(decode(whole, "x")))
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            seen = to_rgb(decode(bytes(flipped), "x"))
        except BadSample:
            continue
        np.testing.assert_array_equal(np.asarray(seen), wanted)


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000)], ids=["over the limit", "over twice the limit"])
def test_too_many_pixels_are_an_error_before_any_is_decoded(size):
    raw = png(*size, 8, 2, [])
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        with pytest.raises(BadSample) as caught:
            decode(raw, "x")
    assert caught.value.reason == "too_large"
    assert f"{size[0] * size[1]} pixels, and the limit is {images.MAX_PIXELS}" in str(caught.value)
    assert not shown


def test_the_limit_holds_though_pillows_was_lifted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadSample, match="has 400000000 pixels, and the limit is 89478485"):
        decode(png(20_000, 20_000, 8, 2, []), "x")


def test_no_warning_leaks_from_pillow():
    """Not from odd EXIF, a bad animation header, or transparency in a palette; in any thread."""
    whole = encoded(
        Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\0\0\xf0\xf0\0\0"
    )
    palette = Image.new("P", (4, 4))
    palette.putpalette(list(range(48)))
    files = [whole, encoded(palette, "PNG", transparency=bytes(range(16)))]
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda raw=raw: to_rgb(decode(raw, "x"))) for raw in files * 4]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not [str(warning.message) for warning in shown]


def mutations(rng: random.Random, whole: bytes) -> bytes:
    raw = bytearray(whole)
    for _ in range(rng.choice([1, 3, 20])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(1, len(raw))] if rng.random() < 0.3 else raw)


def check_hostile(rounds: int) -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
    wholes = [encoded(Image.fromarray(noise(16, 16, 3)), f, **({} if f == "BMP" else {"exif": exif})) for f in formats]
    refused = []
    for _ in range(rounds):
        try:
            assert to_rgb(decode(mutations(rng, rng.choice(wholes)), "x")).mode == "RGB"
        except BadSample as error:
            refused.append(str(error))
    assert len(refused) > rounds / 10
    assert not [message for message in refused if "\n" in message]


def test_damaged_bytes_give_an_image_or_one_line():
    check_hostile(400)


@pytest.mark.slow
def test_many_damaged_bytes_give_an_image_or_one_line():
    check_hostile(20_000)


def test_a_path_and_its_bytes_give_the_same_image(tmp_path: Path):
    raw = encoded(Image.fromarray(noise(5, 5, 3)), "PNG")
    (tmp_path / "a.png").write_bytes(raw)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png", "a")), np.asarray(decode(raw, "a")))


def smooth(width, height):
    """Soft waves in three colours: a picture that looks the same at any scale."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(3 * x + 2 * y), np.cos(5 * x - y), np.sin(4 * y) * np.cos(2 * x)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))


def reduced(raw, height, width, name="x"):
    return decode(raw, name, at_least=lambda size: (height, width))


def psnr(one, other):
    """Peak signal to noise ratio, in dB."""
    difference = np.asarray(one).astype(np.float64) - np.asarray(other).astype(np.float64)
    return 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9))


@pytest.mark.parametrize(
    ("size", "at_least", "scale"),
    [
        ((512, 512), (128, 128), 4),
        ((512, 512), (129, 128), 2),
        ((512, 512), (64, 64), 8),
        ((512, 512), (16, 16), 8),  # no smaller scale is used
        ((1023, 600), (64, 128), 4),  # 1023 / 8 is less than 128
        ((1024, 600), (64, 128), 8),
        ((300, 400), (200, 150), 2),
        ((300, 400), (201, 150), 1),
        ((300, 400), (150, 200), 1),
        ((301, 401), (200, 150), 2),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_as_much_as_is_asked_for(size, at_least, scale):
    seen = reduced(encoded(smooth(*size), "JPEG"), *at_least)
    assert seen.size == (-(-size[0] // scale), -(-size[1] // scale))
    assert scale == 1 or (seen.height >= at_least[0] and seen.width >= at_least[1])


def test_the_size_of_the_upright_picture_is_what_is_asked_about():
    asked = []

    def at_least(size):
        asked.append(size)
        return size

    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        decode(encoded(smooth(40, 24), "JPEG", exif=exif), "x", at_least=at_least)
    assert asked == [(24, 40)] * 4 + [(40, 24)] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_jpeg_is_reduced_as_an_upright_one(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(smooth(320, 160), "JPEG", quality=95, exif=exif)
    whole = decode(raw, "x")
    height, width = whole.height // 4, whole.width // 4
    seen = reduced(raw, height, width)
    assert (seen.height, seen.width) == (height, width)
    assert psnr(seen, whole.resize((width, height), Image.Resampling.BOX)) > 40
    # three quarters of one side is more than half of it
    assert reduced(raw, height, 3 * width).size == whole.size


KINDS = {
    "colour": lambda: encoded(smooth(256, 192), "JPEG", quality=95),
    "progressive": lambda: encoded(smooth(256, 192), "JPEG", quality=95, progressive=True),
    "without subsampling": lambda: encoded(smooth(256, 192), "JPEG", quality=95, subsampling=0),
    "grey": lambda: encoded(smooth(256, 192).convert("L"), "JPEG", quality=95),
    "CMYK": lambda: encoded(smooth(256, 192).convert("CMYK"), "JPEG", quality=95),
    "CMYK without Adobe's marker": lambda: without_adobe(
        encoded(ImageChops.invert(smooth(256, 192).convert("CMYK")), "JPEG", quality=95)
    ),
    "several pictures": lambda: encoded(
        smooth(256, 192), "MPO", quality=95, save_all=True, append_images=[smooth(256, 192).rotate(180)]
    ),
}


def without_adobe(raw):
    start = raw.index(b"\xff\xee")  # the marker that holds "Adobe"
    return raw[:start] + raw[start + 2 + int.from_bytes(raw[start + 2 : start + 4], "big") :]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_jpeg_is_reduced_to_the_means_of_its_pixels(kind):
    raw = KINDS[kind]()
    whole, seen = decode(raw, "x"), reduced(raw, 48, 64)
    assert seen.size == (64, 48)
    assert seen.mode == whole.mode
    assert psnr(to_rgb(seen), to_rgb(whole).resize((64, 48), Image.Resampling.BOX)) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_jpeg_is_an_error_at_any_scale(kind):
    raw = KINDS[kind]()

    def fate(cut, **options):
        try:
            return decode(raw[:cut], "x", **options).mode
        except BadSample as error:
            return error.reason

    for cut in np.linspace(1, len(raw) - 1, 60).astype(int).tolist():
        assert fate(cut, at_least=lambda size: (24, 32)) == fate(cut), cut
    assert fate(len(raw) * 2 // 5, at_least=lambda size: (24, 32)) == "truncated"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_have_no_smaller_scale(format):
    raw = encoded(smooth(64, 48), format)
    np.testing.assert_array_equal(np.asarray(reduced(raw, 4, 4)), np.asarray(decode(raw, "x")))


def test_where_nothing_can_be_left_out_every_bit_is_pillows():
    for kind in KINDS.values():
        raw = kind()
        np.testing.assert_array_equal(np.asarray(reduced(raw, 97, 64)), np.asarray(decode(raw, "x")))
    raw = KINDS["colour"]()
    np.testing.assert_array_equal(np.asarray(decode(raw, "x")), np.asarray(Image.open(io.BytesIO(raw))))


def test_too_many_pixels_are_an_error_at_any_scale(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100 * 100)
    with pytest.raises(BadSample) as caught:
        reduced(encoded(smooth(128, 128), "JPEG"), 16, 16)
    assert caught.value.reason == "too_large"


def test_a_broken_exif_block_counts_as_upright_at_any_scale():
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\0\0\xf0\xf0\0\0"
    assert reduced(encoded(smooth(64, 32), "JPEG", exif=exif), 8, 16).size == (16, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_picture_says_which_part_of_its_outermost_pixels_it_fills(orientation):
    """Cut out by that part, it lies on the whole picture; its pixels alone are shifted against it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(smooth(329, 161), "JPEG", quality=95, exif=exif)
    whole, seen = decode(raw, "x"), decode(raw, "x", at_least=lambda size: (20, 20))
    assert {seen.width, seen.height} == {42, 21}  # 41.125 and 20.125 are filled
    filled = whole.resize((24, 24), Image.Resampling.BILINEAR)
    assert psnr(seen.resize((24, 24), Image.Resampling.BILINEAR, extent(seen)), filled) > 45
    assert psnr(seen.resize((24, 24), Image.Resampling.BILINEAR), filled) < 40
    assert extent(whole) == (0, 0, *whole.size)
    assert extent(to_rgb(seen.convert("CMYK"))) == extent(seen)
