"""`eclosion stats`: from a config, a folder or a source to a file of statistics."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import eclosion
from eclosion.config.load import load
from eclosion.data.butterflies import ButterfliesSource
from eclosion.data.folder import FolderSource
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation.reference import read_statistics
from eclosion.models.image_encoder import ImageEncoder, Preprocess

SOURCE = ButterfliesSource(size=12, resolution=16)


class Mean(nn.Module):
    """The three mean colours."""

    def forward(self, pixels):
        return pixels.mean((2, 3))


def means(**changes):
    options = {"resize": (8, 8), "crop": None, "mean": (0.0,) * 3, "std": (1.0,) * 3} | changes
    return ImageEncoder(Mean(), Preprocess(**options), dim=3, normalize=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Five grey pictures of one size, each brighter than the one before."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def write(source, out, **options):
    return read_statistics(eclosion.stats(source, out, **{"extractor": means(), "device": "cpu"} | options))


def test_the_features_of_a_folder_are_those_of_its_pictures(folder, tmp_path):
    found, facts = write(FolderSource(root=folder), tmp_path / "stats.safetensors")
    expected = [50 * int(name.removesuffix(".png")[-1]) / 255 for name in found.names]
    assert found.features[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert sorted(found.names) == [f"{folder / f'{i}.png'}" for i in range(5)]
    assert found.moments.mean.tolist() == pytest.approx([100 / 255] * 3)
    assert (facts.name, facts.num_images, facts.told["size"]) == (str(folder), 5, [8, 8])


def test_a_config_says_which_part_of_the_data_and_what_is_done_to_it(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    config["validate"] = {"source": {"name": "butterflies", "size": 7, "resolution": 20, "seed": 1}}
    run = load(config).run
    train, told = write(run, tmp_path / "train.safetensors")
    assert (train.moments.count, told.told["size"], told.name) == (40, [16, 16], "butterflies")
    assert write(run, tmp_path / "same.safetensors", split="train")[1].num_images == 40
    val, told = write(run, tmp_path / "val.safetensors", split="val")
    assert (val.moments.count, told.told["split"]) == (7, "val")
    assert not set(val.features[:, 0].tolist()) & set(train.features[:, 0].tolist())
    assert write(run, tmp_path / "big.safetensors", image_size=20)[1].told["size"] == [20, 20]
    with pytest.raises(ConfigError, match="split is 'test', and this source has no such part"):
        write(run, tmp_path / "test.safetensors", split="test")


def test_fewer_images_are_a_choice_that_follows_from_the_seed(tmp_path):
    def names(seed):
        options = {"num_images": 5, "image_size": 16, "seed": seed}
        return set(write(SOURCE, tmp_path / f"{seed}.safetensors", **options)[0].names)

    assert len(names(0)) == 5
    assert names(0) == names(0) != names(1)


def test_fewer_features_may_be_kept_than_there_are_images(tmp_path):
    found, facts = write(SOURCE, tmp_path / "stats.safetensors", image_size=16, num_kept=4)
    whole, _ = write(SOURCE, tmp_path / "whole.safetensors", image_size=16)
    assert (facts.num_images, facts.num_kept) == (12, 4)
    assert torch.equal(found.moments.outer, whole.moments.outer)
    rows = dict(zip(whole.names, whole.features.tolist(), strict=True))
    assert [rows[name] for name in found.names] == found.features.tolist()


def test_what_cannot_be_is_said_before_anything_is_looked_at(folder, tmp_path):
    def refused(source, kind=ConfigError, out="stats.safetensors", **options):
        with pytest.raises(kind) as caught:
            eclosion.stats(source, tmp_path / out, **{"extractor": "no such"} | options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(SOURCE, batch_size=0) == "batch_size is 0, and must be at least 1."
    assert refused(SOURCE, num_images=1) == "num_images is 1, and must be at least 2: one image has no spread."
    assert refused(SOURCE, out=".").startswith(f"{tmp_path} is a folder. Give the name of a file in it")
    assert refused(SOURCE, out="a.pt").startswith(f"{tmp_path / 'a.pt'}: must end with .safetensors")
    assert refused(SOURCE).startswith("image_size is not given")
    assert "no such part" in refused(SOURCE, split="test")
    assert refused(SOURCE, image_size=16, extractor="efficientnet_lite1").startswith("'efficientnet_lite1' is not one")
    assert "holds 12 images, and 13 are asked for" in refused(SOURCE, DataError, num_images=13, image_size=16)
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    assert "there is 1 image" in refused(FolderSource(root=folder), DataError)


def test_pictures_of_several_sizes_need_a_size(folder, tmp_path):
    Image.new("RGB", (9, 8)).save(folder / "5.png")
    with pytest.raises(DataError, match=r"5\.png: is 9x8 pixels"):
        write(FolderSource(root=folder), tmp_path / "stats.safetensors")
    assert write(FolderSource(root=folder), tmp_path / "stats.safetensors", image_size=8)[1].num_images == 6


def test_the_command_writes_the_file_of_the_function_and_says_what_is_in_it(command, tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    words = ("--image-size", 16, "--n", 5, "--extractor", "efficientnet_lite0,image_size=32", "--device", "cpu")
    outcome = command("stats", "butterflies", path, "size=12", "resolution=16", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(
        f"5 images, features of 5 with 1,280 numbers each: {path}\nextractor efficientnet_lite0"
    )
    options = {"num_images": 5, "image_size": 16, "extractor": {"name": "efficientnet_lite0", "image_size": 32}}
    eclosion.stats(SOURCE, other, device="cpu", **options)
    assert path.read_bytes() == other.read_bytes()


def test_the_command_takes_a_config_and_a_folder(command, folder, make_config, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_config(tmp_path / "run")))
    words = ("--extractor", "efficientnet_lite0,image_size=32", "--device", "cpu")
    assert command("stats", config, tmp_path / "a.safetensors", "data.source.size=6", *words).out.startswith("6 images")
    assert command("stats", folder, tmp_path / "b.safetensors", *words).out.startswith("5 images")
    wrong = command("stats", tmp_path / "nothing", tmp_path / "c.safetensors", *words)
    assert (wrong.code, len(wrong.err.splitlines())) == (3, 1)


def test_an_unreadable_picture_is_named(folder, tmp_path):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"3\.png"):
        write(FolderSource(root=folder), tmp_path / "stats.safetensors")
    assert not (tmp_path / "stats.safetensors").exists()


def test_statistics_of_noise_have_its_mean_and_spread(tmp_path):
    """A closed form: the means of 8 x 8 uniform levels."""
    (tmp_path / "noise").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "noise" / f"{i:02}.png")
    found, _ = write(FolderSource(root=tmp_path / "noise"), tmp_path / "stats.safetensors")
    assert found.moments.mean.tolist() == pytest.approx([0.5] * 3, abs=0.02)
    spread = (255.0 / 256 * 257 / 256 / 12 * (256 / 255) ** 2 / 64) ** 0.5
    assert found.moments.covariance.diagonal().sqrt().tolist() == pytest.approx([spread] * 3, rel=0.35)
