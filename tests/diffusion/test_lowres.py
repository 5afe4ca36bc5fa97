"""The small image of an upsampling network, against Pillow, SciPy, diffusers and published numbers."""

import json

import numpy as np
import pydantic
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from scipy import ndimage

from eclosion.diffusion.lowres import (
    LowRes,
    LowResDraws,
    condition,
    draw_lowres,
    draw_lowres_for_sampling,
    gaussian_blur,
    resize,
)
from eclosion.errors import ConfigError
from eclosion.registry import describe
from eclosion.rng import generator, randn

NOTHING = LowResDraws(None, None, None, None)


def rngs(count: int, *position: str | int) -> list[np.random.Generator]:
    return [generator(0, "lowres", *position, i) for i in range(count)]


def images(count: int, height: int, width: int) -> torch.Tensor:
    return randn(rngs(count, "image"), (3, height, width)).clamp(-1, 1)


def by_pillow(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Each channel resized by Pillow in float32, with the triangle filter."""
    flat = x.reshape(-1, *x.shape[2:]).numpy()
    made = [np.asarray(Image.fromarray(c).resize(size[::-1], Image.Resampling.BILINEAR)) for c in flat]
    return torch.from_numpy(np.stack(made)).view(*x.shape[:2], *size)


# ------------------------------------------------------------------ sizes


def test_shrinking_by_whole_numbers_takes_the_mean_of_what_a_pixel_covers():
    x = images(2, 12, 8)
    blocks = x.double().view(2, 3, 4, 3, 4, 2).mean((3, 5))
    torch.testing.assert_close(resize(x, (4, 4)).double(), blocks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (8, 5), (7, 13), (20, 9), (32, 16)])
def test_other_ratios_and_growing_are_those_of_pillow(size):
    x = images(2, 16, 12)
    torch.testing.assert_close(resize(x, size), by_pillow(x, size), rtol=1e-4, atol=2e-6)


def test_the_nearest_pixel_is_that_of_dalle2_pytorch():
    four, six = torch.arange(16.0).view(1, 1, 4, 4), torch.arange(36.0).view(1, 1, 6, 6)
    assert resize(four, (2, 2), how="nearest").flatten().tolist() == [0, 2, 8, 10]
    expected = [0, 1, 3, 4, 6, 7, 9, 10, 18, 19, 21, 22, 24, 25, 27, 28]
    assert resize(six, (4, 4), how="nearest").flatten().tolist() == expected


@pytest.mark.parametrize("how", ["area", "nearest"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (40, 33), (16, 4)])
def test_images_in_another_size_stay_in_their_range_and_grey_stays_grey(size, how):
    assert resize(3 * images(2, 16, 16), size, how=how).abs().max() <= 3 + 1e-6
    grey = resize(torch.full((1, 3, 16, 16), 0.7), size, how=how)
    torch.testing.assert_close(grey, torch.full((1, 3, *size), 0.7), rtol=1e-6, atol=0)


def test_images_that_have_the_size_are_left_alone():
    x = images(1, 16, 12)
    assert resize(x, (16, 12)) is x


# ------------------------------------------------------------------ blur


def test_a_blurred_pixel_is_that_of_dalle2_pytorch():
    """The identity matrix with a kernel of 3 and a standard deviation of 0.6."""
    x = torch.eye(3).view(1, 1, 3, 3)
    blurred = gaussian_blur(x, torch.tensor([0.6]), torch.tensor([3]), widest=3)[0, 0]
    expected = [[0.55594, 0.33304, 0.11073], [0.33304, 0.50058, 0.33304], [0.11073, 0.33304, 0.55594]]
    torch.testing.assert_close(blurred, torch.tensor(expected), rtol=0, atol=6e-6)


def test_each_image_is_blurred_by_its_own_gaussian():
    sigmas, sizes = [0.4, 0.6, 1.7, 3.0, 0.9], [3, 7, 9, 5, 1]
    x = images(5, 11, 14)
    blurred = gaussian_blur(x, torch.tensor(sigmas), torch.tensor(sizes), widest=9)
    for i, (sigma, size) in enumerate(zip(sigmas, sizes, strict=True)):
        expected = x[i].double().numpy()
        for axis in (1, 2):
            expected = ndimage.gaussian_filter1d(expected, sigma, axis=axis, mode="mirror", radius=size // 2)
        np.testing.assert_allclose(blurred[i].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_an_image_that_is_not_blurred_keeps_its_bits():
    x = images(3, 8, 8)
    blurred = gaussian_blur(x, torch.tensor([0.6, 0.6, 2.0]), torch.tensor([1, 5, 1]), widest=5)
    assert torch.equal(blurred[[0, 2]], x[[0, 2]])
    assert not torch.equal(blurred[1], x[1])


def test_a_blur_does_not_depend_on_the_rest_of_the_batch():
    x, sigma, size = images(4, 9, 9), torch.tensor([0.4, 0.6, 1.7, 3.0]), torch.tensor([3, 7, 1, 5])
    together = gaussian_blur(x, sigma, size, widest=7)
    for i in range(4):
        alone = gaussian_blur(x[i : i + 1], sigma[i : i + 1], size[i : i + 1], widest=7)
        assert torch.equal(alone[0], together[i])


def test_a_kernel_that_does_not_fit_into_the_image_is_refused():
    one = torch.ones(1)
    gaussian_blur(images(1, 4, 9), one, torch.tensor([7]), widest=7)
    with pytest.raises(ConfigError, match=r"blur_kernel_size is 9, and the blurred images have 4 x 9 pixels.*most 7"):
        gaussian_blur(images(1, 4, 9), one, torch.tensor([9]), widest=9)


# ------------------------------------------------------------------ draws

RANGES = {"blur_sigma": [0.4, 0.8], "blur_kernel_size": [3, 9], "noise": True}


def test_the_draws_of_an_image_do_not_depend_on_its_batch():
    for draw in (draw_lowres, draw_lowres_for_sampling):
        options = LowRes(**RANGES)
        together = draw(options, rngs(5), (3, 4, 4))
        for i in (4, 0, 2):
            alone = draw(options, rngs(5)[i : i + 1], (3, 4, 4))
            for name in ("sigma", "kernel_size", "level", "noise"):
                one, of_all = getattr(alone, name), getattr(together, name)
                assert (one is None and of_all is None) or torch.equal(one[0], of_all[i])


def test_an_image_draws_its_blur_then_its_level_then_its_noise():
    options = LowRes(**RANGES)
    for i in range(20):
        drawn = draw_lowres(options, rngs(20)[i : i + 1], (3, 4, 4))
        same = rngs(20)[i]
        blurred = same.random() < 0.5
        assert drawn.sigma.item() == pytest.approx(same.uniform(0.4, 0.8), rel=1e-6)
        size = 3 + 2 * same.integers(4)
        assert drawn.kernel_size.item() == (size if blurred else 1)
        assert drawn.level.item() == same.integers(0, 1000)
        assert np.array_equal(drawn.noise[0].numpy(), same.standard_normal((3, 4, 4), dtype=np.float32))


def test_only_what_is_used_is_drawn():
    rng, same = rngs(1)[0], rngs(1)[0]
    assert draw_lowres(LowRes(blur_probability=0), [rng], (3, 4, 4)) == NOTHING
    assert draw_lowres_for_sampling(LowRes(), [rng], (3, 4, 4)) == NOTHING
    assert rng.random() == same.random()
    draw_lowres(LowRes(), [rng], (3, 4, 4))  # one number: whether it is blurred
    same.random()
    assert rng.random() == same.random()


def test_blurs_and_levels_are_spread_as_they_should_be():
    drawn = draw_lowres(LowRes(**RANGES, blur_probability=0.3), rngs(8000), (1, 1, 1))
    blurred = drawn.kernel_size > 1
    # Shares of 8 000 images have standard deviations of at most 0.006, and of 2 400 blurred ones 0.01.
    assert blurred.float().mean().item() == pytest.approx(0.3, abs=0.02)
    sizes = drawn.kernel_size[blurred]
    assert [(sizes == size).float().mean().item() for size in (3, 5, 7, 9)] == pytest.approx([0.25] * 4, abs=0.04)
    assert drawn.sigma.min() >= 0.4
    assert drawn.sigma.max() <= 0.8
    assert drawn.sigma.mean().item() == pytest.approx(0.6, abs=0.01)
    assert [(drawn.level < limit).float().mean().item() for limit in (100, 500)] == pytest.approx([0.1, 0.5], abs=0.02)
    assert drawn.level.min() >= 0
    assert drawn.level.max() <= 999


def test_a_list_in_json_is_a_range_and_not_one_blur_for_rows_and_one_for_columns():
    """In DALLE2-pytorch a list of JSON is no tuple, and blurs rows and columns differently."""
    options = LowRes(**json.loads('{"blur_sigma": [0.4, 0.6], "blur_kernel_size": [3, 5], "blur_probability": 1}'))
    assert (options.sigmas, options.kernel_sizes) == ((0.4, 0.6), (3, 5))
    x = torch.zeros(6, 1, 9, 9)
    x[:, :, 4, 4] = 1
    shown, _ = condition(options, x, draw_lowres(options, rngs(6), (1, 9, 9)), (9, 9))
    torch.testing.assert_close(shown, shown.mT, rtol=1e-6, atol=1e-9)
    assert len({row.sum().item() for row in shown[:, 0, 4]}) > 3  # each image has its own


@pytest.mark.parametrize(
    ("level", "expected"), [(0.2, 200), (0.0, 0), (0.29, 290), (0.57, 570), (0.2009, 200), (0.999, 999), (1.0, 999)]
)
def test_images_are_noised_to_one_level_in_sampling(level, expected):
    drawn = draw_lowres_for_sampling(LowRes(noise=True, sample_noise_level=level), rngs(3), (3, 4, 4))
    assert drawn.level.tolist() == [expected] * 3
    assert torch.equal(drawn.noise, randn(rngs(3), (3, 4, 4)))
    assert drawn.sigma is drawn.kernel_size is None


def test_draws_move_to_a_device_together():
    moved = draw_lowres(LowRes(**RANGES), rngs(2), (3, 4, 4)).to(torch.device("meta"))
    assert {x.device.type for x in vars(moved).values()} == {"meta"}
    assert NOTHING.to(torch.device("meta")) == NOTHING


# ------------------------------------------------------------------ what the network sees


@pytest.mark.parametrize("T", [[0, 199, 999], [200, 200, 200]])
def test_noise_is_added_as_a_linear_schedule_of_diffusers_adds_it(T):
    x, noise, level = images(3, 8, 8), randn(rngs(3, "noise"), (3, 16, 16)), torch.tensor(T)
    shown, told = condition(LowRes(noise=True), x, LowResDraws(None, None, level, noise), (16, 16))
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
    torch.testing.assert_close(shown, scheduler.add_noise(by_pillow(x, (16, 16)), noise, level), rtol=1e-4, atol=2e-5)
    assert told is level


def test_in_training_an_image_is_shrunk_then_blurred_then_enlarged():
    x = images(3, 48, 48)
    drawn = LowResDraws(torch.tensor([0.6, 0.8, 1.0]), torch.tensor([3, 1, 5]), None, None)
    options = LowRes(blur_kernel_size=[3, 5])
    shown, told = condition(options, x, drawn, (24, 24), before=(12, 12))
    small = x.double().view(3, 3, 12, 4, 12, 4).mean((3, 5)).numpy()
    for i, (sigma, radius) in enumerate([(0.6, 1), (0.8, 0), (1.0, 2)]):
        for axis in (1, 2):
            small[i] = ndimage.gaussian_filter1d(small[i], sigma, axis=axis, mode="mirror", radius=radius)
    torch.testing.assert_close(shown, by_pillow(torch.from_numpy(small).float(), (24, 24)), rtol=1e-4, atol=1e-5)
    assert told is None


@pytest.mark.parametrize(
    ("size", "sigma", "published"),
    [
        (3, 0.6, [0.166379, 0.366551, 0.605651, 0.622491, 0.299827, 0.5, 0.647434, 0.388322]),
        (5, 1.5, [0.474037, 0.468156, 0.535443, 0.577745, 0.500732, 0.487992, 0.524445, 0.555678]),
    ],
)
def test_with_the_nearest_pixel_the_small_image_is_that_of_dalle2_pytorch(size, sigma, published):
    """8 x 8 pixels by way of 4 x 4; the upper left pixel of each square of the first two rows. Version 1.15.6."""
    x = (7 * torch.arange(64) % 11).float().view(1, 1, 8, 8) / 10
    options = LowRes(resize="nearest", blur_kernel_size=size, blur_sigma=sigma, blur_probability=1)
    drawn = draw_lowres(options, rngs(1), (1, 8, 8))
    shown, _ = condition(options, 2 * x - 1, drawn, (8, 8), before=(4, 4))
    assert torch.equal(shown[..., ::2, ::2], shown[..., 1::2, 1::2])
    expected = 2 * torch.tensor(published) - 1
    torch.testing.assert_close(shown[0, 0, :4:2, ::2].flatten(), expected, rtol=0, atol=3e-6)


def test_without_downsampling_first_the_large_image_is_blurred():
    x = images(2, 32, 32)
    drawn = LowResDraws(torch.tensor([0.6, 0.6]), torch.tensor([3, 3]), None, None)
    shown, _ = condition(LowRes(downsample_first=False), x, drawn, (16, 16), before=(8, 8))
    expected = resize(gaussian_blur(x, torch.tensor([0.6, 0.6]), torch.tensor([3, 3]), widest=3), (16, 16))
    assert torch.equal(shown, expected)


def test_in_sampling_the_image_of_the_network_before_is_clamped_and_enlarged():
    x = 1.5 * images(2, 8, 8)
    shown, told = condition(LowRes(), x, draw_lowres_for_sampling(LowRes(), rngs(2), (3, 16, 24)), (16, 24))
    torch.testing.assert_close(shown, by_pillow(x.clamp(-1, 1), (16, 24)), rtol=1e-5, atol=1e-6)
    assert told is None


def test_what_was_drawn_can_be_replayed_to_the_bit():
    options, x = LowRes(**RANGES), images(3, 32, 32)
    kept = x.clone()
    drawn = draw_lowres(options, rngs(3), (3, 24, 24))
    first = condition(options, x, drawn, (24, 24), before=(12, 12))
    again = condition(options, x, drawn, (24, 24), before=(12, 12))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(x, kept)


def test_under_autocast_the_small_image_has_the_same_bits():
    options, x = LowRes(**RANGES), images(3, 32, 32)
    drawn = draw_lowres(options, rngs(3), (3, 24, 24))
    plain, _ = condition(options, x, drawn, (24, 24), before=(12, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = condition(options, x, drawn, (24, 24), before=(12, 12))
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_small_image_waits_for_nothing_on_the_device():
    options, x = LowRes(**RANGES), images(3, 32, 32).cuda()
    drawn = draw_lowres(options, rngs(3), (3, 24, 24))
    on_device = drawn.to(torch.device("cuda"))
    condition(options, x, on_device, (24, 24), before=(12, 12))
    try:
        torch.cuda.set_sync_debug_mode("error")
        shown, _ = condition(options, x, on_device, (24, 24), before=(12, 12))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, _ = condition(options, x.cpu(), drawn, (24, 24), before=(12, 12))
    torch.testing.assert_close(shown.cpu(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_sigma": 0}, "blur_sigma"),
        ({"blur_sigma": [0.8, 0.4]}, "blur_sigma is .* begins with the smaller"),
        ({"blur_sigma": [0.4, 0.5, 0.6]}, "blur_sigma"),
        ({"blur_kernel_size": 4}, "blur_kernel_size is 4, and must be odd"),
        ({"blur_kernel_size": [3, 6]}, "blur_kernel_size is 6, and must be odd"),
        ({"blur_kernel_size": 0}, "blur_kernel_size"),
        ({"blur_probability": 1.5}, "blur_probability"),
        ({"sample_noise_level": 200}, "sample_noise_level"),
        ({"resize": "cubic"}, "resize"),
    ],
)
def test_a_small_image_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        LowRes(**options)


def test_every_option_of_the_small_image_is_documented():
    assert LowRes.__doc__
    assert all(option.text for option in describe(LowRes))
