"""`eclosion demo`, in a few steps: what it leaves; how good the picture is takes a person to say."""

import json

import numpy as np
import pytest
from PIL import Image

from eclosion import ConfigError, demo, demonstration
from eclosion.config.load import load
from eclosion.config.yaml_text import parse_yaml
from eclosion.demonstration import LINE, MARGIN, _real
from eclosion.inspection.recipes import recipes
from eclosion.rundir import RunDir

TINY = (
    "preset: null\n    options: {block_out_channels: [8, 8], down_block_types: [DownBlock2D, DownBlock2D], "
    "up_block_types: [UpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 4}"
)


@pytest.fixture(scope="module", autouse=True)
def small():
    """The recipe with a network and a sampler that take no time."""
    text = recipes()["butterflies"]
    assert "preset: tiny" in text
    assert "num_images: 8" in text
    text = text.replace("preset: tiny", TINY).replace(
        "num_images: 8", "sampler: {name: ddim, num_inference_steps: 2}\n  num_images: 8"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demonstration, "recipes", lambda: {"butterflies": text})
        yield


@pytest.fixture(scope="module")
def shown(small, tmp_path_factory):
    """The picture of a demo that was far too short."""
    return demo(tmp_path_factory.mktemp("demo") / "run", steps=2)


def test_it_ends_with_a_picture_in_the_run_folder_and_prints_its_path(shown, command):
    run = shown.parent
    with Image.open(shown) as picture:
        assert picture.format == "PNG"
        assert picture.width > 8 * 32 * 3
    outcome = command("demo", "--output", run, "--steps", 2)
    assert outcome.code == 0
    assert "already finished at step 2 of 2" in outcome.out
    assert outcome.out.splitlines()[-1] == f"Samples beside real images: {shown}"


def test_a_second_demo_with_more_steps_goes_on(shown):
    before = shown.read_bytes()
    demo(shown.parent, steps=3)
    assert shown.read_bytes() != before
    events = [json.loads(line)["event"] for line in RunDir(shown.parent).events.read_text().splitlines()]
    assert any(event.startswith("resuming at step 2 of 3") for event in events)


def test_the_lower_grid_holds_real_images_of_each_class_in_its_column(shown):
    run = load(parse_yaml(recipes()["butterflies"])).run
    samples = run.data.source.open()
    real = _real(run)
    assert len(real) == 2 * len(samples.class_names)
    with Image.open(shown) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    top = picture.height - MARGIN - 2 * (32 * 3 + 2) - 2
    for i in range(len(samples.class_names)):
        x, y = MARGIN + 2 + i * (32 * 3 + 2), top + 2
        np.testing.assert_array_equal(pixels[y + 1 : y + 96 : 3, x + 1 : x + 96 : 3], real[i])
    assert top > LINE


def test_no_steps_are_refused(command, tmp_path):
    with pytest.raises(ConfigError, match="steps is 0, and must be at least 1"):
        demo(tmp_path / "run", steps=0)
    assert command("demo", "--output", tmp_path / "run", "--steps", -1).code == 2
    assert not (tmp_path / "run").exists()
