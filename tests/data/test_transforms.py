"""Transforms against torchvision, which the tutorials use."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from eclosion.config.schema import DataConfig
from eclosion.data.folder import FolderSource
from eclosion.data.images import decode
from eclosion.data.transforms import Transform, to_float
from eclosion.errors import BadSample, ConfigError
from eclosion.rng import generator

FILTERS = {
    "bilinear": tv.InterpolationMode.BILINEAR,
    "bicubic": tv.InterpolationMode.BICUBIC,
    "lanczos": tv.InterpolationMode.LANCZOS,
}
SIZES = [(64, 48), (48, 64), (33, 97), (200, 131), (20, 15), (32, 32), (31, 32)]


def transform(**options):
    return Transform.of(DataConfig(source=FolderSource(root="."), **options))


def prepared(image, **options):
    """What `prepare` makes of an image, as rows of pixels."""
    return transform(**options).prepare(image, "x").transpose(1, 2, 0)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_stretch_is_bitwise_torchvisions_resize(size, interpolation):
    image = picture(*size)
    theirs = tv.Resize((32, 32), FILTERS[interpolation])(image)
    ours = prepared(image, image_size=32, resize="stretch", interpolation=interpolation)
    np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("size", SIZES)
def test_cover_is_bitwise_torchvisions_resize_and_center_crop(size):
    image = picture(*size)
    theirs = tv.CenterCrop(32)(tv.Resize(32, tv.InterpolationMode.BICUBIC)(image))
    np.testing.assert_array_equal(prepared(image, image_size=32), np.asarray(theirs))


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (33, 97), (200, 131)])
@pytest.mark.parametrize("target", [(16, 40), (40, 16), (24, 32)])
def test_cover_fills_any_rectangle_and_keeps_the_shape_of_things(size, target):
    # a ramp from left to right and one from top to bottom: their slopes tell the scale in each direction
    width, height = size
    ramp = np.zeros((height, width, 3), np.float64)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    seen = prepared(Image.fromarray(ramp.astype(np.uint8)), image_size=target, interpolation="bilinear")
    assert seen.shape == (*target, 3)
    scale = max(target[0] / height, target[1] / width)
    middle = seen[target[0] // 4 : -target[0] // 4, target[1] // 4 : -target[1] // 4].astype(float)
    slope_x = np.diff(middle[..., 0], axis=1).mean()
    slope_y = np.diff(middle[..., 1], axis=0).mean()
    assert slope_x == pytest.approx(255 / (width * scale), rel=0.12)
    assert slope_y == pytest.approx(255 / (height * scale), rel=0.12)


@pytest.mark.parametrize("size", [(40, 36), (33, 32), (32, 35)])
def test_without_resize_the_centre_is_kept(size):
    image = picture(*size)
    np.testing.assert_array_equal(prepared(image, image_size=32, resize="none"), np.asarray(tv.CenterCrop(32)(image)))


def test_an_image_smaller_than_the_crop_is_refused_with_the_cure():
    with pytest.raises(BadSample) as caught:
        transform(image_size=(32, 64), resize="none").prepare(picture(60, 40), "cats/a.png")
    assert caught.value.reason == "too_small"
    assert str(caught.value) == (
        "cats/a.png: is 60x40 pixels (width x height), smaller than the crop of 64x32. "
        'Set data.resize to "cover", or data.image_size to less.'
    )


def test_an_image_of_one_pixel_can_be_scaled_up():
    assert prepared(picture(1, 1), image_size=8).shape == (8, 8, 3)
    assert prepared(picture(1, 50), image_size=8).shape == (8, 8, 3)


def test_all_bytes_become_the_floats_of_totensor_and_normalize():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    out = np.empty((1, 3, 16, 16), np.float32)
    to_float([pixels.transpose(2, 0, 1)], out)
    theirs = tv.Compose([tv.ToTensor(), tv.Normalize([0.5], [0.5])])(Image.fromarray(pixels))
    assert torch.equal(torch.from_numpy(out[0]), theirs)
    assert (out.min(), out.max()) == (-1, 1)


def test_the_tutorials_preprocessing_is_reproduced_bit_for_bit():
    image = picture(173, 120)
    theirs = tv.Compose([tv.Resize((64, 64)), tv.ToTensor(), tv.Normalize([0.5], [0.5])])(image)
    ours = np.empty((1, 3, 64, 64), np.float32)
    to_float([transform(image_size=64, resize="stretch", interpolation="bilinear").prepare(image, "x")], ours)
    assert torch.equal(torch.from_numpy(ours[0]), theirs)


def test_nothing_is_random_unless_asked_for():
    assert not transform(image_size=8).is_random
    assert not transform(image_size=8, resize="stretch", crop="random").is_random
    assert transform(image_size=8, crop="random").is_random
    assert transform(image_size=8, horizontal_flip=True).is_random


def test_a_flip_mirrors_half_of_the_images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    flip = transform(image_size=8, horizontal_flip=True)
    mirrored = 0
    for position in range(2000):
        seen = flip.augment(pixels, generator(0, "augment", position))
        is_mirrored = np.array_equal(seen, pixels[:, :, ::-1])
        assert is_mirrored or np.array_equal(seen, pixels)
        mirrored += is_mirrored
    assert abs(mirrored - 1000) < 4 * 22.4  # four standard deviations of a fair coin


def test_a_random_crop_reaches_every_place_and_only_real_ones():
    rows, columns = np.mgrid[0:11, 0:9].astype(np.uint8)
    pixels = np.stack([rows, columns, columns], -1)
    crop = transform(image_size=(8, 6), resize="none", crop="random")
    whole = crop.prepare(Image.fromarray(pixels), "x")
    assert whole.shape == (3, 11, 9)
    corners = set()
    for position in range(300):
        seen = crop.augment(whole, generator(0, "augment", position)).transpose(1, 2, 0)
        top, left = map(int, seen[0, 0, :2])
        np.testing.assert_array_equal(seen, pixels[top : top + 8, left : left + 6])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(4) for left in range(4)}


def test_a_flip_is_the_same_with_and_without_a_random_crop():
    """One option does not change what another draws."""
    columns = np.broadcast_to(np.arange(8, dtype=np.uint8), (3, 8, 8))
    flip = transform(image_size=8, horizontal_flip=True)
    both = transform(image_size=8, horizontal_flip=True, crop="random")
    for position in range(50):
        alone = flip.augment(columns, generator(0, "augment", position))
        with_crop = both.augment(columns, generator(0, "augment", position))
        np.testing.assert_array_equal(alone, with_crop)


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(ConfigError) as caught:
        transform(background="whit")
    assert str(caught.value) == (
        "data.background: 'whit' is not a colour. Give a CSS colour name such as 'white', or '#rrggbb'."
    )


def test_the_background_shows_through_transparent_images():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    seen = prepared(image, image_size=4, background="#102030")
    np.testing.assert_array_equal(seen, np.broadcast_to([0x10, 0x20, 0x30], (4, 4, 3)))


def photo(width, height):
    """A JPEG file of a scene with edges, shades and grain."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    rng = np.random.default_rng(0)
    scene = np.zeros((height, width, 3))
    for _ in range(40):
        inside = (x - rng.random()) ** 2 + (y - rng.random()) ** 2 < rng.random() ** 2 / 9
        scene[inside] = rng.random(3) * (0.6 + 0.4 * x[inside, None])
    scene += rng.normal(0, 0.02, scene.shape)
    file = io.BytesIO()
    Image.fromarray((255 * scene.clip(0, 1)).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def both_ways(raw, **options):
    """What becomes of a file, decoded at a reduced scale and at its full size; and by how much it was reduced."""
    scaled, exact = transform(**options, decode="scaled"), transform(**options, decode="exact")
    small, whole = decode(raw, "x", at_least=scaled.at_least), decode(raw, "x", at_least=exact.at_least)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(Image.open(io.BytesIO(raw))))
    return scaled.prepare(small, "x"), exact.prepare(whole, "x"), whole.width / small.width


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"image_size": 64}, 4),
        ({"image_size": 32}, 8),
        ({"image_size": (32, 100)}, 2),
        ({"image_size": (128, 64), "resize": "stretch"}, 2),
    ],
    ids=str,
)
def test_a_reduced_scale_is_hard_to_see(options, scale):
    scaled, exact, reduction = both_ways(photo(640, 512), **options)
    assert reduction == scale
    error = np.mean((scaled.astype(np.float64) - exact) ** 2)
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 42  # dB; on photographs it is more


@pytest.mark.parametrize(
    "options",
    [{"image_size": 64, "resize": "none"}, {"image_size": 129}, {"image_size": (16, 161)}],
    ids=["no resize", "less than twice the height", "less than twice the width"],
)
def test_where_nothing_may_be_left_out_both_ways_are_equal_bit_for_bit(options):
    scaled, exact, reduction = both_ways(photo(640, 512), **options)
    assert reduction == 1
    np.testing.assert_array_equal(scaled, exact)


@pytest.mark.parametrize("resize", ["cover", "stretch"])
@pytest.mark.parametrize("size", [(64, 300), (512, 100), (999, 1001), (1000, 130), (257, 256)])
def test_a_reduced_picture_is_never_below_twice_the_size_at_which_it_is_used(size, resize):
    options = transform(image_size=(24, 40), resize=resize)
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JPEG")
    seen = decode(file.getvalue(), "x", at_least=options.at_least)
    covering = max(40 / size[0], 24 / size[1])  # of the whole picture, where it just covers the target
    used = (size[0] * covering, size[1] * covering) if resize == "cover" else (40, 24)
    assert seen.size == size or (seen.width >= 2 * used[0] and seen.height >= 2 * used[1])


def test_a_long_thin_image_is_not_scaled_beyond_all_memory():
    with pytest.raises(BadSample) as caught:
        transform(image_size=64).prepare(Image.new("RGB", (1, 50_000)), "thin.png")
    assert caught.value.reason == "too_large"
    assert str(caught.value) == (
        "thin.png: is 1x50000 pixels (width x height), and would be 64x3200000 when it is resized; the limit is "
        "89478485 pixels. Crop it first."
    )


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": (24, 40)},
        {"image_size": 8},
        {"image_size": (8, 12), "resize": "stretch"},
        {"image_size": 8, "resize": "none"},
        {"image_size": 8, "resize": "none", "crop": "random"},
    ],
    ids=str,
)
def test_pixels_and_a_picture_of_them_become_the_same(options):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    chosen = transform(**options)
    np.testing.assert_array_equal(chosen.prepare(pixels, "x"), chosen.prepare(Image.fromarray(pixels), "x"))
    with pytest.raises(BadSample, match="smaller than the crop of 99x99"):
        transform(image_size=99, resize="none").prepare(pixels, "x")


def test_scaling_has_the_bits_of_to_tensor_and_normalize():
    values = np.arange(256, dtype=np.uint8)
    out = np.empty((1, 1, 1, 256), np.float32)
    to_float([values[None, None]], out)
    wanted = torch.from_numpy(values).to(torch.float32).div(255).sub(0.5).div(0.5)
    assert torch.equal(torch.from_numpy(out[0, 0, 0]), wanted)


def test_what_is_scaled_already_is_copied_beside_bytes():
    ready = np.random.default_rng(0).random((3, 4, 4), np.float32) * 2 - 1
    pixels = np.full((3, 4, 4), 255, np.uint8)
    out = np.empty((3, 3, 4, 4), np.float32)
    to_float([pixels, ready, pixels], out)
    np.testing.assert_array_equal(out, [np.ones((3, 4, 4)), ready, np.ones((3, 4, 4))])
