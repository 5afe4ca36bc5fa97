"""Recipes: each starts, and the examples in configs/ are the same files."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from eclosion import check, train
from eclosion.config.yaml_text import parse_yaml
from eclosion.errors import EnvironmentProblem
from eclosion.inspection.recipes import recipes, write_config
from eclosion.rundir import RunDir

EXAMPLES = Path(__file__).parents[2] / "configs"
TINY = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TINY_UNET = {"base_channels": 8, "channel_mults": [1, 1], "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture
def images(tmp_path):
    """Eight pictures of two classes."""
    for i in range(8):
        folder = tmp_path / "images" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 24), (30 * i, 100, 50)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_trains_as_it_stands_but_for_its_size_and_data(name, images, tmp_path):
    path = write_config(tmp_path / "config.yaml", recipe=name)
    overrides = [
        f"output={tmp_path / 'run'}",
        "train.duration=1 steps",
        "train.batch_size=4",
        "data.image_size=8",
        "sample.num_images=1",
        "sample.sampler.num_inference_steps=2",
        "export=no",
    ]
    recipe = parse_yaml(recipes()[name])
    source = recipe["data"]["source"]
    if "unets" in recipe["task"]:
        overrides += [f"task.unets=[{{image_size: 4, model: {TINY_UNET}}}, {{model: {TINY_UNET}}}]"]
        overrides += ["task.encoder={name: efficientnet_lite0, image_size: 32, cache_gb: 0}"]
    else:
        overrides += ["task.model.preset=null", f"task.model.options={TINY}"]
    if "root" in source:
        overrides.append(f"data.source.root={images}")
    if "path" in source:  # what stands on the hub needs a network: a folder in its place
        overrides.append(f"data.source={{name: folder, root: {images}}}")
    assert check(path, overrides).problems == []
    run = RunDir(train(path, overrides))
    assert run.checkpoint(1).is_dir()
    assert run.sample_grid(1).is_file()


def test_the_examples_are_the_recipes():
    assert {path.stem: path.read_text() for path in EXAMPLES.glob("*.yaml")} == recipes()


def test_each_recipe_begins_with_what_it_is_for():
    for text in recipes().values():
        assert text.startswith("# ")
        assert yaml.safe_load(text) == parse_yaml(text)  # the same to every reader of YAML


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"file/c.yaml cannot be written: (Not a directory|File exists)."):
        write_config(tmp_path / "file" / "c.yaml")
