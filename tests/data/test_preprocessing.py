"""torchvision's transforms by name: against torchvision itself, seeded, and whatever the number of threads."""

import inspect
import io
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from enum import Enum

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torchvision import transforms as tv

from eclosion.config.changes import compare
from eclosion.config.load import load
from eclosion.config.schema import DataConfig
from eclosion.data.folder import FolderSource
from eclosion.data.images import decode
from eclosion.data.preprocessing import REFUSED, Preprocessing, _resized, _smallest_crop
from eclosion.data.transforms import Transform, to_float, transform_of
from eclosion.errors import BadSample, ConfigError, DataError, MissingExtraError
from eclosion.registry import dump
from eclosion.rng import generator

NAMES = sorted(n for n, cls in vars(tv).items() if inspect.isclass(cls) and not issubclass(cls, Enum))
# What a transform needs, or does more with.
OPTIONS = {
    "CenterCrop": {"size": 32},
    "ColorJitter": {"brightness": 0.4, "contrast": [0.5, 1.5], "saturation": 0.4, "hue": 0.1},
    "ConvertImageDtype": {"dtype": "float64"},
    "GaussianBlur": {"kernel_size": 5},
    "Grayscale": {"num_output_channels": 1},
    "Pad": {"padding": [1, 2], "fill": [10, 20, 30]},
    "RandomAffine": {"degrees": 30, "translate": [0.1, 0.2], "shear": [1, 2, 3, 4], "interpolation": "bilinear"},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomCrop": {"size": [34, 33], "padding": 2},
    "RandomGrayscale": {"p": 0.5},
    "RandomPosterize": {"bits": 3},
    "RandomResizedCrop": {"size": 33, "interpolation": "bicubic"},
    "RandomRotation": {"degrees": [-20, 20], "fill": [1, 2, 3]},
    "RandomSolarize": {"threshold": 100},
    "Resize": {"size": 35, "interpolation": "lanczos"},
}
TENSORS_ONLY = {"ConvertImageDtype", "RandomErasing", "ToPILImage"}
SAME_EACH_TIME = {"Resize", "CenterCrop", "Pad", "Grayscale", "ToTensor", "PILToTensor", "ConvertImageDtype"}
SAME_EACH_TIME |= {"ToPILImage"}
WORDS = {
    "bilinear": tv.InterpolationMode.BILINEAR,
    "bicubic": tv.InterpolationMode.BICUBIC,
    "lanczos": tv.InterpolationMode.LANCZOS,
    "float64": torch.float64,
}


def config(preprocessing, size=32, **options):
    return DataConfig(source=FolderSource(root="."), image_size=size, preprocessing=preprocessing, **options)


def transform(preprocessing, size=32, **options):
    return transform_of(config(preprocessing, size, **options))


def picture(width, height):
    """Noise over a ramp, so that every filter and every place gives numbers of its own."""
    noise = np.random.default_rng(width * height).integers(0, 156, (height, width, 3))
    return Image.fromarray((noise + np.linspace(0, 99, width)[:, None]).astype(np.uint8))


def around(name):
    """A mapping with one transform, and what it needs before it and after it to arrive at 32x32."""
    before = {"ToTensor": True} if name in TENSORS_ONLY else {}
    after = {} if name == "CenterCrop" else {"CenterCrop": {"size": 32}}
    return {**before, name: OPTIONS.get(name, True), **after}


def theirs(mapping):
    """The same transforms, composed by torchvision."""
    steps = [(n, {} if options is True else options) for n, options in mapping.items()]
    words = [{k: WORDS.get(v, v) if isinstance(v, str) else v for k, v in options.items()} for _, options in steps]
    return tv.Compose([getattr(tv, n)(**options) for (n, _), options in zip(steps, words, strict=True)])


def as_floats(result):
    """A result of torchvision as the network sees it, float32 [3, H, W], by other means than ours."""
    tensor = tv.ToTensor()(result) if isinstance(result, Image.Image) else result
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    return ((tensor.clamp(0, 1) - 0.5) / 0.5).expand(3, -1, -1).numpy()


def seen(preprocessing, pixels, position):
    """What the network sees at a position."""
    if preprocessing.is_random:
        pixels = preprocessing.augment(pixels, generator(0, "augment", position))
    out = np.empty((1, 3, *pixels.shape[1:]), np.float32)
    to_float([pixels], out)
    return out[0]


def seeded(compose, image, position):
    """torchvision's own result, its global stream seeded as ours is at a position."""
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(0, "augment", position).integers(2**63)))
        return as_floats(compose(image))


def global_streams():
    return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_transform_is_refused_with_a_reason_or_drawn_by_position_alone(name):
    if name in REFUSED:
        with pytest.raises(ConfigError) as caught:
            transform({name: True})
        assert str(caught.value) == f"data.preprocessing.{name} {REFUSED[name]}."
        return
    before = global_streams()
    ours, compose, image = transform(around(name)), theirs(around(name)), picture(44, 40)
    pixels = ours.prepare(image, "x")
    assert ours.is_random == (name not in SAME_EACH_TIME)
    alone = [seen(ours, pixels, position) for position in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda position: seen(ours, pixels, position), range(8)))
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(alone, [seeded(compose, image, position) for position in range(8)])
    assert ours.is_random == any(not np.array_equal(alone[0], other) for other in alone[1:])
    assert global_streams() == before


def test_the_global_stream_of_another_thread_is_left_alone():
    """The network draws its dropout while threads augment; its numbers must be those that it draws alone."""
    busy = transform({"RandomResizedCrop": {"size": 32}, "RandAugment": True, "AugMix": True})
    pixels = busy.prepare(picture(44, 40), "x")
    with torch.random.fork_rng(), ThreadPoolExecutor(3) as pool:
        torch.manual_seed(5)
        alone = [torch.rand(1).item() for _ in range(300)]
        torch.manual_seed(5)
        futures = [pool.submit(seen, busy, pixels, position) for position in range(24)]
        beside = []
        while len(beside) < 300 or not all(future.done() for future in futures):
            beside.append(torch.rand(1).item())
        assert not any(future.exception() for future in futures)
    assert beside[:300] == alone


def test_a_generator_that_is_given_is_not_replaced():
    from eclosion.data.preprocessing import _Drawing

    with _Drawing(3):
        own = torch.rand(2, generator=torch.Generator().manual_seed(9))
    assert torch.equal(own, torch.rand(2, generator=torch.Generator().manual_seed(9)))


def test_transforms_are_applied_in_the_order_in_which_they_are_written():
    image = picture(44, 40)
    shrunk = {"Resize": {"size": [32, 32]}, "CenterCrop": {"size": 32}}
    cropped = dict(reversed(shrunk.items()))
    results = [transform(mapping).prepare(image, "x") for mapping in (shrunk, cropped)]
    np.testing.assert_array_equal(results[0].transpose(1, 2, 0), np.asarray(tv.Resize((32, 32))(image)))
    np.testing.assert_array_equal(results[1].transpose(1, 2, 0), np.asarray(tv.CenterCrop(32)(image)))


def test_false_switches_a_transform_off_and_true_takes_its_defaults():
    mapping = {"Resize": {"size": [32, 32]}, "RandomHorizontalFlip": False, "Lambda": False, "ToTensor": True}
    assert transform(mapping).config == config({"Resize": {"size": [32, 32]}, "ToTensor": {}})
    assert not transform(mapping).is_random


def test_without_any_transform_images_are_taken_as_they_are():
    image = picture(32, 32)
    for empty in ({}, {"ToTensor": True}):
        np.testing.assert_array_equal(transform(empty).prepare(image, "x").transpose(1, 2, 0), np.asarray(image))


def test_the_usual_pipeline_is_kept_as_bytes_and_seen_as_totensor_and_normalize_make_it():
    mapping = {"Resize": {"size": 32}, "CenterCrop": {"size": 32}, "ToTensor": True}
    pixels = transform(mapping).prepare(picture(77, 50), "x")
    assert pixels.dtype == np.uint8
    out = np.empty((1, 3, 32, 32), np.float32)
    to_float([pixels], out)
    compose = tv.Compose([tv.Resize(32), tv.CenterCrop(32), tv.ToTensor(), tv.Normalize([0.5], [0.5])])
    assert torch.equal(torch.from_numpy(out[0]), compose(picture(77, 50)))


def test_it_agrees_with_the_options_that_say_the_same():
    mapping = {"Resize": {"size": 32, "interpolation": "bicubic"}, "CenterCrop": {"size": 32}}
    built_in = Transform.of(DataConfig(source=FolderSource(root="."), image_size=32))
    for size in [(77, 50), (50, 77), (20, 31), (33, 32)]:
        wanted = built_in.prepare(picture(*size), "x")
        np.testing.assert_array_equal(transform(mapping).prepare(picture(*size), "x"), wanted)


@pytest.mark.parametrize("size", [(333, 250), (250, 333), (331, 331), (1001, 142)])
def test_a_file_that_was_decoded_smaller_looks_as_the_options_make_it(size):
    """Also where its sides are no multiples of the scale, so that its outermost pixels reach over the edge."""
    file = io.BytesIO()
    picture(*size).save(file, "JPEG")
    ours = transform({"Resize": {"size": 32, "interpolation": "bicubic"}, "CenterCrop": {"size": 32}})
    built_in = Transform.of(DataConfig(source=FolderSource(root="."), image_size=32))
    images = [decode(file.getvalue(), "x", at_least=way.at_least) for way in (ours, built_in)]
    assert images[0].size == images[1].size != size
    np.testing.assert_array_equal(ours.prepare(images[0], "x"), built_in.prepare(images[1], "x"))


def test_what_is_the_same_each_time_is_done_before_images_are_kept():
    """A large original does not stay in memory."""
    big = picture(400, 300)
    resized = transform({"Resize": {"size": 40}, "RandomCrop": {"size": 32}, "ToTensor": True})
    assert resized.prepare(big, "x").shape == (3, 40, 53)
    assert transform({"RandomResizedCrop": {"size": 32}}).prepare(big, "x").shape == (3, 300, 400)


def test_alpha_is_flattened_before_the_first_transform():
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    pixels = transform({"CenterCrop": {"size": 32}}, background="#102030").prepare(image, "x")
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array([[[0x10]], [[0x20]], [[0x30]]]), (3, 32, 32)))


def test_numbers_that_overshoot_are_clipped_and_numbers_of_another_range_are_refused():
    squares = np.kron(np.indices((9, 9)).sum(0) % 2, np.ones((3, 3)))  # black and white
    checks = Image.fromarray((255 * squares).astype(np.uint8)).convert("RGB")
    sharp = transform({"ToTensor": True, "Resize": {"size": [32, 32], "interpolation": "bicubic", "antialias": False}})
    pixels = sharp.prepare(checks, "x")
    raw = tv.Resize((32, 32), tv.InterpolationMode.BICUBIC, antialias=False)(tv.ToTensor()(checks))
    assert raw.min() < -0.05
    assert raw.max() > 1.05
    assert (pixels.min(), pixels.max()) == (-1, 1)
    with pytest.raises(ConfigError) as caught:
        transform({"ToTensor": True, "CenterCrop": {"size": 64}, "Pad": {"padding": 4, "fill": 128}}, 72)
    assert str(caught.value) == (
        "tried on a picture of 72x72 pixels: data.preprocessing makes numbers from 0 to 128 of it, and must keep to "
        "0..1. After ToTensor that is also the range of values that fill or erase."
    )


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        (
            {"RandomResizdCrop": {"size": 32}},
            "data.preprocessing.RandomResizdCrop is not a transform in torchvision.transforms. "
            "Did you mean 'RandomResizedCrop'?",
        ),
        (
            {"InterpolationMode": True},
            "data.preprocessing.InterpolationMode is not a transform in torchvision.transforms.",
        ),
        (
            {"functional": True},
            "data.preprocessing.functional is not a transform in torchvision.transforms.",
        ),
        (
            {"Resize": {"sise": 32, "size": 32}},
            "data.preprocessing.Resize.sise is not an option of Resize. Did you mean 'size'? "
            "Options: antialias, interpolation, max_size, size.",
        ),
        (
            {"CenterCrop": True},
            "data.preprocessing.CenterCrop.size is required. Options: size.",
        ),
        (
            {"ToTensor": {"scale": 1}},
            "data.preprocessing.ToTensor.scale is not an option of ToTensor. It has no options.",
        ),
        (
            {"Resize": {"size": 32, "interpolation": "bicubik"}},
            "data.preprocessing.Resize.interpolation is 'bicubik', which it cannot be. Did you mean 'bicubic'? "
            "Options: bicubic, bilinear, box, hamming, lanczos, nearest, nearest-exact.",
        ),
        (
            {"Resize": {"size": 32, "interpolation": 3}},
            "data.preprocessing.Resize.interpolation is 3, which it cannot be. "
            "Options: bicubic, bilinear, box, hamming, lanczos, nearest, nearest-exact.",
        ),
        (
            {"RandomHorizontalFlip": {"p": "often"}, "CenterCrop": {"size": [1, 2, 3]}},
            "data.preprocessing.CenterCrop refuses size=[1, 2, 3]: Please provide only two dimensions (h, w) for "
            "size. Options: size.",
        ),
        (
            {"RandomErasing": {"p": 0.01}, "ToTensor": True},
            "tried on a picture of 32x32 pixels: data.preprocessing.RandomErasing fails on a picture ('Image' object "
            "has no attribute 'shape'). ToTensor makes tensors of pictures, and has to stand before what takes tensors "
            "and after what takes pictures.",
        ),
        (
            {"Resize": {"size": 64}, "CenterCrop": {"size": 48}},
            "data.preprocessing (Resize, CenterCrop) makes images of 48x48 pixels (width x height), and "
            "data.image_size asks for 32x32. Change one of them.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_told_before_a_run(mapping, problem):
    with pytest.raises(ConfigError) as caught:
        transform(mapping)
    assert caught.value.problems == [problem]


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        transform({"Rezise": {"size": 3}, "CenterCrop": {"sise": 3}, "Lambda": True})
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "data.preprocessing.Rezise",
        "data.preprocessing.CenterCrop.sise",
        "data.preprocessing.CenterCrop.size",
        "data.preprocessing.Lambda",
    ]


def test_a_step_that_fails_for_one_image_is_a_bad_sample_that_names_it():
    crop = transform({"RandomCrop": {"size": 32}})
    pixels = crop.prepare(picture(40, 20), "a.tar: 7.jpg")
    with pytest.raises(BadSample) as caught:
        crop.augment(pixels, generator(0, "augment", 0), "a.tar: 7.jpg")
    assert caught.value.reason == "preprocessing"
    assert str(caught.value) == (
        "a.tar: 7.jpg: data.preprocessing.RandomCrop fails: "
        "Required crop size (32, 32) is larger than input image size (20, 40)."
    )


@pytest.mark.parametrize("mapping", [{"Resize": {"size": 32}}, {"RandomHorizontalFlip": True, "Resize": {"size": 32}}])
def test_an_image_that_arrives_at_another_size_stops_with_its_name_and_the_cure(mapping):
    shorter_side = transform(mapping)
    with pytest.raises(DataError) as caught:  # from the first if nothing is random, or else from the second
        shorter_side.augment(
            shorter_side.prepare(picture(64, 48), "cats/a.png"), generator(0, "augment", 0), "cats/a.png"
        )
    assert not isinstance(caught.value, BadSample)
    assert str(caught.value) == (
        f"cats/a.png: data.preprocessing ({', '.join(mapping)}) makes it 42x32 pixels (width x height), and "
        "data.image_size asks for 32x32. Let it end with a CenterCrop, or a Resize to [32, 32], or change "
        "data.image_size."
    )


def test_a_long_thin_image_is_not_scaled_beyond_all_memory():
    thin = Image.new("RGB", (300_000, 1))
    with pytest.raises(BadSample, match=r"is 300000x1 pixels .* would be 9600000x32 when it is resized") as caught:
        transform({"Resize": {"size": 32}, "CenterCrop": {"size": 32}}).prepare(thin, "x")
    assert caught.value.reason == "too_large"


SIZES = [(40, 30), (31, 97), (200, 64), (64, 64), (33, 500)]


@pytest.mark.parametrize("options", [{"size": 24}, {"size": [24]}, {"size": [20, 30]}, {"size": 24, "max_size": 40}])
@pytest.mark.parametrize("size", SIZES)
def test_the_size_after_a_resize_is_known_beforehand(size, options):
    resize = tv.Resize(**options)
    width, height = resize(Image.new("L", size)).size
    assert _resized(size[::-1], resize) == (height, width)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6), (0.001, 0.01)])
@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (1.0, 1.0), (0.2, 0.4)])
@pytest.mark.parametrize("size", SIZES)
def test_no_random_crop_is_smaller_than_was_reckoned_with(size, ratio, scale):
    image = Image.new("L", size)
    height, width = _smallest_crop(size[::-1], scale, ratio)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = np.array([tv.RandomResizedCrop.get_params(image, scale, ratio)[2:] for _ in range(150)])
    assert drawn[:, 0].min() >= round(height)
    assert drawn[:, 1].min() >= round(width)


@pytest.mark.parametrize(
    ("mapping", "wanted"),
    [
        ({"Resize": {"size": 32}, "CenterCrop": {"size": 32}}, (64, 106)),
        ({"Resize": {"size": [32, 32]}}, (64, 64)),
        ({"RandomHorizontalFlip": True, "ToTensor": True, "Resize": {"size": [32, 32]}}, (64, 64)),
        ({"RandomResizedCrop": {"size": 32, "scale": [0.25, 1], "ratio": [1, 1]}}, (100, 166)),
        ({"CenterCrop": {"size": 32}}, (300, 500)),
        ({"RandomCrop": {"size": 64}, "Resize": {"size": 32}}, (300, 500)),
        ({"GaussianBlur": {"kernel_size": 3}, "Resize": {"size": [32, 32]}}, (300, 500)),
        ({"Resize": {"size": [32, 32], "interpolation": "nearest"}}, (300, 500)),
        ({"ToTensor": True, "Resize": {"size": [32, 32], "antialias": False}}, (300, 500)),
        ({"RandomResizedCrop": {"size": 32, "scale": [0, 1]}}, (300, 500)),
        ({}, (300, 500)),
    ],
    ids=str,
)
def test_a_file_may_be_decoded_smaller_only_if_a_resize_comes_first(mapping, wanted):
    # for the random crop: 64 / sqrt(0.25 * 300 * 500) of each side
    assert transform(mapping).at_least((300, 500)) == wanted
    assert transform(mapping, decode="exact").at_least((300, 500)) == (300, 500)


@pytest.mark.parametrize("name", ["resize", "interpolation", "crop", "horizontal_flip"])
def test_the_options_that_it_replaces_are_refused_beside_it(name):
    value = {"resize": "stretch", "interpolation": "bilinear", "crop": "random", "horizontal_flip": True}[name]
    data = {"source": "butterflies", "preprocessing": {"Resize": {"size": 64}}, name: value}
    with pytest.raises(ConfigError) as caught:
        load({"output": "run", "data": data})
    assert str(caught.value).startswith(
        "data: preprocessing takes the place of resize, interpolation, crop, horizontal_flip, and "
        f"{name} is set as well. Remove one of them; preprocessing says it as "
    )
    load({"output": "run", "data": data | {"preprocessing": None}})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"Resize": 64}, "Resize is 64, and must be true, false or a mapping of its options."),
        ({"Resize": [64, 64]}, "Resize is [64, 64], and must be true, false or a mapping of its options."),
        ({"Resize": {64: 64}}, "Resize is {64: 64}, and must be true, false or a mapping of its options."),
        ({3: True}, "3 is not the name of a transform."),
        ("Resize", "must be a mapping from names in torchvision.transforms to true, false or their options."),
        (["Resize"], "must be a mapping from names in torchvision.transforms to true, false or their options."),
    ],
    ids=str,
)
def test_what_is_no_mapping_of_options_is_told_when_a_config_is_read(value, problem):
    with pytest.raises(ConfigError) as caught:
        load({"output": "run", "data": {"source": "butterflies", "preprocessing": value}})
    assert str(caught.value) == f"data.preprocessing: {problem}"


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (None, True),
        ({}, True),
        ({"Resize": {"size": 64}, "ToTensor": True, "Pad": False}, True),
        ([{"Resize": {"size": 64}}, {"ToTensor": {}}], True),
        ({"Resize": 64}, False),
        ([{"Resize": {"size": 64}, "ToTensor": {}}], False),
        (["ToTensor"], False),
        ("ToTensor", False),
    ],
    ids=str,
)
def test_the_json_schema_for_editors_takes_what_a_config_may_say(value, taken):
    schema = TypeAdapter(DataConfig).json_schema()["properties"]["preprocessing"]
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == taken
    tree = {"output": "run", "data": {"source": "butterflies", "preprocessing": value}}
    with nullcontext() if taken else pytest.raises(ConfigError):
        load(tree)


def test_the_order_is_part_of_what_a_run_is_and_survives_sorted_keys():
    def loaded(mapping, *overrides):
        return load({"output": "run", "data": {"source": "butterflies", "preprocessing": mapping}}, overrides)

    one = loaded({"Resize": {"size": 70}, "CenterCrop": {"size": 64}})
    other = loaded({"CenterCrop": {"size": 64}, "Resize": {"size": 70}})
    stored = json.loads(json.dumps(dump(one.run), sort_keys=True))  # as checkpoints do
    assert load(stored).run == one.run
    assert compare(stored, dump(one.run)) == []
    changes = compare(stored, dump(other.run))
    assert {change.path.partition("[")[0] for change in changes} == {"data.preprocessing"}
    assert {change.kind for change in changes} == {"identity"}
    assert one.origins["data.preprocessing[0].Resize.size"] == "config"
    changed = loaded({"Resize": {"size": 70}}, "data.preprocessing.Resize.size=64")
    assert changed.run.data.preprocessing == [{"Resize": {"size": 64}}]
    assert changed.origins["data.preprocessing[0].Resize.size"] == "override"


def test_torchvision_is_imported_only_if_its_transforms_are_asked_for():
    code = (
        "import sys, eclosion.data.loader; from eclosion.data.transforms import transform_of; "
        "from eclosion.config.schema import DataConfig; from eclosion.data.folder import FolderSource; "
        "transform_of(DataConfig(source=FolderSource(root='.'))); assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "eclosion.data.preprocessing")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError) as caught:
        transform({"Resize": {"size": 32}})
    assert str(caught.value) == (
        'data.preprocessing needs an optional library. Install it with: pip install "eclosion[transforms]"'
    )


def test_the_built_in_options_are_used_without_it():
    assert isinstance(transform(None), Transform)
    assert isinstance(transform({}), Preprocessing)
