"""The sheet shows what the loader gives, with the right words below."""

import numpy as np
import pytest
from PIL import Image

from eclosion import ConfigError, DataError, show_data
from eclosion.config.load import load
from eclosion.data.loader import Loader
from eclosion.inspection import data_sheet
from eclosion.sampling import to_uint8


def test_each_tile_is_the_image_that_training_sees_at_its_position(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    with Image.open(show_data(config, out=tmp_path / "s.png", num_images=9)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    run = load(config).run
    seen = to_uint8(Loader(run.data.source.open(), run.data, seed=run.seed, batch_size=9).batch_at(range(9))["image"])
    assert run.data.horizontal_flip  # augmented as in training
    # the first row has eight tiles; each pixel of an image is a square of ten
    for i in range(8):
        x, y = 10 + i * 170, 10
        tile = pixels[y : y + 160, x : x + 160]
        np.testing.assert_array_equal(tile[5::10, 5::10], seen[i])


def test_below_a_tile_stand_its_file_its_class_and_its_caption(make_config, tmp_path):
    run = load(make_config(tmp_path / "run")).run
    samples = run.data.source.open()
    loader = Loader(samples, run.data, seed=0, batch_size=2)
    names = [samples.name(loader.order.index_at(p)) for p in range(2)]
    texts = data_sheet._texts(loader.batch_at(range(2)), names, samples.class_names)
    for position, text in enumerate(texts):
        sample = samples.read(loader.order.index_at(position))
        name, label, caption = text.split("\n", 2)
        assert (name, label) == (sample.name, f"class: {samples.class_names[sample.label]}")
        assert sample.caption.startswith(caption.replace("\n", " ").removesuffix(" …"))


def test_an_image_that_will_be_skipped_says_why(tmp_path):
    Image.effect_noise((8, 8), 50).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    config = {"output": "x", "data": {"source": {"name": "folder", "root": str(tmp_path)}, "image_size": 8}}
    run = load(config).run
    samples = run.data.source.open()
    loader = Loader(samples, run.data, seed=0, batch_size=2)
    names = [samples.name(loader.order.index_at(p)) for p in range(2)]
    texts = dict(zip(names, data_sheet._texts(loader.batch_at(range(2)), names, ()), strict=True))
    assert "SKIPPED: the image ends" in texts[str(tmp_path / "broken.png")]
    assert "SKIPPED" not in texts[str(tmp_path / "good.png")]
    assert texts[str(tmp_path / "good.png")].endswith("good.png")
    show_data(config, out=tmp_path / "out" / "sheet.png", num_images=2)


def test_what_is_wrong_is_told(make_config, tmp_path):
    with pytest.raises(ConfigError, match="num_images is 0, and must be at least 1"):
        show_data(make_config(tmp_path / "run"), num_images=0)
    with pytest.raises(DataError, match="does not exist"):
        show_data(make_config(tmp_path / "run"), ["data.source={name: folder, root: /none}"], out=tmp_path / "s.png")
