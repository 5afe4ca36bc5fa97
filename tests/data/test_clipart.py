"""The clip art that is installed with eclosion: whole, readable, and from where its provenance says."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from eclosion.config.load import load
from eclosion.data import clipart
from eclosion.data.clipart import CATEGORIES, ClipartSource
from eclosion.errors import BadSample, ConfigError, DataError

FOLDER = files("eclosion.data") / "clipart_pictures"


@pytest.fixture(scope="module")
def samples():
    return ClipartSource().open()


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def test_every_picture_has_the_sha256_that_the_index_says():
    pack, index = (FOLDER / "pictures.pack").read_bytes(), json.loads((FOLDER / "index.json").read_text("utf-8"))
    end = 0
    for row in index["pictures"]:
        assert row["offset"] == end, "pictures lie one after the other"
        end += row["length"]
        assert hashlib.sha256(pack[row["offset"] : end]).hexdigest() == row["sha256"], row["path"]
    assert end == len(pack)


def test_every_picture_has_its_provenance(samples):
    told = json.loads((FOLDER / "provenance.json").read_text("utf-8"))
    assert "Public domain" in told["licence"]
    assert {package["name"] for package in told["packages"]} == {"openclipart-png", "openclipart-svg"}
    assert [samples.name(i) for i in range(len(samples))] == list(told["pictures"])
    for path, row in told["pictures"].items():
        assert len(row["png_sha256"]) == len(row["svg_sha256"]) == 64, path


def test_every_picture_is_read_the_same_in_any_order_from_any_thread(samples):
    forwards = [samples.read(i) for i in range(len(samples))]
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(ClipartSource().open().read, reversed(range(len(samples)))))
    for one, other in zip(forwards, reversed(backwards), strict=True):
        assert one.image.tobytes() == other.image.tobytes(), one.name
        assert (one.name, one.caption, one.label) == (other.name, other.caption, other.label)


def test_every_picture_is_a_coloured_thing_on_a_transparent_ground(samples):
    for i in range(len(samples)):
        image = samples.read(i).image
        assert (image.mode, image.size) == ("RGBA", (64, 64))
        pixels = np.asarray(image, np.float64)
        alpha = pixels[..., 3] / 255
        assert alpha[:2].max() == 0, f"{samples.name(i)} has no margin"
        assert alpha.mean() > 0.05, f"{samples.name(i)} is empty"
        assert pixels[..., :3][alpha > 0.5].std() > 10, f"{samples.name(i)} is blank"


def test_no_two_pictures_are_alike(samples):
    small = np.array(
        [np.asarray(on_white(samples.read(i).image).resize((16, 16)), np.float32).ravel() for i in range(len(samples))]
    )
    squares = (small**2).sum(axis=1)
    apart = (squares[:, None] + squares - 2 * small @ small.T) / small.shape[1]
    np.fill_diagonal(apart, np.inf)
    # Root mean square of 8 of 255 levels: two scans of one drawing are below it, two colours of one balloon above.
    i, j = np.unravel_index(apart.argmin(), apart.shape)
    assert apart.min() > 8**2, (samples.name(int(i)), samples.name(int(j)))


def test_the_label_is_the_category_and_every_category_has_pictures(samples):
    assert samples.class_names == CATEGORIES
    labels = [samples.read(i).label for i in range(len(samples))]
    counts = np.bincount(labels, minlength=len(CATEGORIES))
    assert len(counts) == len(CATEGORIES)
    assert counts.min() >= 15


def test_captions_are_plain_phrases(samples):
    for i in range(len(samples)):
        caption = samples.read(i).caption
        assert caption.startswith("a clip art picture of "), caption
        assert caption == " ".join(caption.split())
        assert caption.replace(",", "").replace("-", "").replace(" ", "").isalpha(), caption


def test_categories_choose_pictures_and_class_names():
    some = ClipartSource(categories=["plant", "animal"]).open()
    assert some.class_names == ("animal", "plant")
    assert 0 < len(some) < len(ClipartSource().open())
    labels = {some.read(i).label for i in range(len(some))}
    assert labels == {0, 1}
    first = next(i for i in range(len(some)) if "mushroom" in some.name(i))
    assert some.class_names[some.read(first).label] == "plant"
    assert some.fingerprint != ClipartSource().open().fingerprint
    assert some.fingerprint == ClipartSource(categories=["animal", "plant"]).open().fingerprint


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (["animel"], r"'animel' is not a category of the clip art\. Did you mean 'animal'\? Options: animal, .*\."),
        ([], r"names no category\. Leave it out for all of them: animal, .*\."),
    ],
)
def test_a_wrong_category_is_one_line_with_a_hint(categories, message):
    config = {"output": "runs/a", "data": {"source": {"name": "clipart", "categories": categories}}}
    with pytest.raises(ConfigError, match=rf"^data\.source\.categories: {message}$"):
        load(config)


def test_an_index_outside_the_set_is_refused(samples):
    with pytest.raises(IndexError, match=f"picture {len(samples)} of {len(samples)}"):
        samples.read(len(samples))


def test_a_damaged_pack_is_said_before_training(tmp_path, monkeypatch):
    folder = tmp_path / "clipart_pictures"
    folder.mkdir()
    (folder / "index.json").write_bytes((FOLDER / "index.json").read_bytes())
    pack = bytearray((FOLDER / "pictures.pack").read_bytes())
    pack[1000] ^= 1
    (folder / "pictures.pack").write_bytes(pack)
    monkeypatch.setattr(clipart, "files", lambda package: tmp_path)
    clipart._shipped.cache_clear()
    try:
        with pytest.raises(DataError, match=r"pictures\.pack: its sha256 is not the one in index\.json\. Install"):
            ClipartSource().open()
        (folder / "pictures.pack").unlink()
        with pytest.raises(DataError, match="the clip art cannot be read"):
            ClipartSource().open()
    finally:
        clipart._shipped.cache_clear()


def test_a_picture_that_cannot_be_decoded_is_a_bad_sample():
    broken = ClipartSource().open()
    broken._pack = bytes(len(broken._pack))
    with pytest.raises(BadSample, match=f"^{broken.name(0)}: cannot be decoded"):
        broken.read(0)
