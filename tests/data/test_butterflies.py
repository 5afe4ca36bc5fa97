"""The drawn butterflies: the same everywhere, symmetric, and as their captions say."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from eclosion.config.load import load
from eclosion.data.butterflies import BACKGROUNDS, MARKS, SHAPES, WINGS, ButterfliesSource, Butterfly, draw, hatch
from eclosion.errors import ConfigError

GOLDEN = Path(__file__).parent / "butterflies_golden.png"


def pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, np.float64)


def plain(butterfly: Butterfly, **changes: object) -> Butterfly:
    """The same butterfly upright, without pattern and border, on a ground that is like no wing."""
    bare = {
        "pattern": "plain",
        "mark": None,
        "border": None,
        "backdrop": "even",
        "background": "turquoise",
        "angle": 0.0,
    }
    return replace(butterfly, **(bare | changes))  # type: ignore[arg-type]


def nearest(colour: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((colour - np.array(palette[name])) ** 2).sum()))


def frame(image: Image.Image) -> NDArray[np.float64]:
    """The outermost pixels, [N, 3]."""
    a = pixels(image)
    return np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]])


def test_pictures_are_those_that_were_drawn_when_they_were_last_looked_at():
    """Committed pixels; an edge may differ by a rounding on another processor, a picture may not."""
    samples = ButterfliesSource().open()
    strip = np.concatenate([pixels(samples.read(i).image) for i in range(8)], axis=1)
    with Image.open(GOLDEN) as golden:
        off = np.abs(strip - pixels(golden)).max(axis=2) > 2
    assert off.mean() < 0.001


def test_a_picture_depends_on_seed_and_index_alone():
    one, other = ButterfliesSource().open(), ButterfliesSource().open()
    forwards = [one.read(i).image.tobytes() for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(lambda i: other.read(i).image.tobytes(), reversed(range(24))))
    assert forwards == backwards[::-1]
    assert ButterfliesSource(seed=1).open().read(0).image.tobytes() != forwards[0]


def test_no_two_of_the_first_five_hundred_are_equal():
    samples = ButterfliesSource(resolution=32).open()
    assert len({samples.read(i).image.tobytes() for i in range(500)}) == 500


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_an_upright_butterfly_is_its_own_mirror_image(resolution):
    for i in range(40):
        upright = replace(hatch(0, i), angle=0.0, backdrop="even")
        image = draw(upright, resolution)
        assert np.abs(pixels(image) - pixels(ImageOps.mirror(image))).mean() < 2, i


def test_a_turned_butterfly_is_not_its_own_mirror_image():
    """The control of the test above: its measure does see a wing that is out of place."""
    image = draw(replace(hatch(0, 0), angle=0.18, backdrop="even"), 64)
    assert np.abs(pixels(image) - pixels(ImageOps.mirror(image))).mean() > 8


def test_the_wings_have_the_colour_that_the_caption_says():
    for i in range(100):
        butterfly = hatch(0, i)
        a = pixels(draw(plain(butterfly), 64)).reshape(-1, 3)
        wing = a[np.abs(a - np.array(BACKGROUNDS["turquoise"])).max(axis=1) > 60]
        votes = Counter(nearest(colour, WINGS | {"body": (44, 30, 26)}) for colour in wing[::5])
        assert votes.most_common(1)[0][0] == butterfly.colour, (i, butterfly.caption, votes)


@pytest.mark.parametrize("what", ["mark", "border"])
def test_pattern_and_border_have_the_colour_that_the_caption_says(what):
    """What a pattern or border changes in the picture has its colour, measured where it changes most."""
    for i in range(100):
        butterfly = hatch(0, i)
        if (colour := getattr(butterfly, what)) is None:
            continue
        worn = {"pattern": butterfly.pattern, "mark": colour} if what == "mark" else {"border": colour}
        before, after = (pixels(draw(plain(butterfly, **changes), 128)) for changes in ({}, worn))
        change = np.abs(after - before).sum(axis=2)
        changed = after[change > 0.8 * change.max()]
        eye = {"black", "white"} if butterfly.pattern == "eyespots" and what == "mark" else set()
        assert nearest(np.median(changed, axis=0), MARKS) in {colour} | eye, (i, butterfly.caption)


def test_the_background_has_the_colour_that_the_caption_says():
    for i in range(200):
        butterfly = hatch(0, i)
        assert nearest(np.median(frame(draw(butterfly, 32)), axis=0), BACKGROUNDS) == butterfly.background, i


def test_a_butterfly_lies_within_its_picture():
    """Its shadow may fall over the edge, which darkens by less than a wing would change it."""
    for i in range(400):
        butterfly = replace(hatch(0, i), backdrop="even")
        ground = np.array(BACKGROUNDS[butterfly.background])
        stray = float(np.abs(frame(draw(butterfly, 32)) - ground).max())
        assert stray < 80, (i, butterfly.shape)


def test_a_caption_tells_every_attribute():
    samples = ButterfliesSource().open()
    for i in range(200):
        told = samples.attributes(i)
        caption = samples.read(i).caption
        words = [told["colour"], told["shape"], f"on a {told['background']} background"]
        words += [f"{told['mark']} {told['pattern']}"] if told["mark"] else []
        words += [f"{told['border']} borders"] if told["border"] else []
        assert all(word in caption for word in words), (told, caption)
        assert (" with " in caption) == bool(told["mark"] or told["border"])


def test_a_caption_reads_as_english():
    butterfly = replace(
        hatch(0, 0), colour="orange", shape="broad-winged", border="black", pattern="spots", mark="white"
    )
    told = replace(butterfly, background="green").caption
    assert told == "an orange broad-winged butterfly with black borders and white spots on a green background"


@pytest.mark.parametrize("label", ["colour", "shape", "pattern"])
def test_the_label_is_the_attribute_that_was_asked_for(label):
    samples = ButterfliesSource(label=label, resolution=32, size=300).open()
    labels = [samples.read(i).label for i in range(len(samples))]
    assert [samples.class_names[k] for k in labels] == [samples.attributes(i)[label] for i in range(len(samples))]
    # With at most 8 classes a missing one among 300 has a chance below 1e-16.
    assert set(labels) == set(range(len(samples.class_names)))


@pytest.mark.parametrize("options", [{"size": 7}, {"resolution": 32}, {"seed": 1}, {"label": "shape"}])
def test_the_fingerprint_tells_other_options_apart(options):
    assert ButterfliesSource(**options).open().fingerprint == ButterfliesSource(**options).open().fingerprint
    assert ButterfliesSource(**options).open().fingerprint != ButterfliesSource().open().fingerprint


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_the_set_is_refused(index):
    samples = ButterfliesSource(size=10).open()
    with pytest.raises(IndexError, match=f"butterfly {index} of 10"):
        samples.read(index)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", [8, 33, 256])
def test_every_shape_is_drawn_at_odd_and_extreme_resolutions(shape, resolution):
    first = next(b for b in (hatch(0, i) for i in range(200)) if b.shape == shape)
    image = draw(first, resolution)
    assert image.mode == "RGB"
    assert image.size == (resolution, resolution)


def test_a_wrong_option_is_one_line_that_names_it():
    config = {"output": "runs/a", "data": {"source": {"name": "butterflies", "label": "color"}}}
    with pytest.raises(ConfigError, match=r"^data\.source\.label .*'color'.*colour, shape, pattern.*$"):
        load(config)
