"""From a run folder to images on disk."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eclosion import ConfigError, sample
from eclosion.errors import CheckpointError
from eclosion.registry import build
from eclosion.sampling import grid, load_trained, make_images, to_uint8


def pixels(folder, count):
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(count)])


def test_an_image_depends_on_its_own_seed_alone(uninterrupted, tmp_path):
    many = sample(uninterrupted, num_images=5, seed=3, out=tmp_path / "many", batch_size=5)
    few = sample(uninterrupted, num_images=2, seed=3, out=tmp_path / "few", batch_size=1)
    # a convolution may add in another order for another batch size: one level of 255 at most
    difference = pixels(many, 2).astype(int) - pixels(few, 2).astype(int)
    assert np.abs(difference).max() <= 1
    other = sample(uninterrupted, num_images=2, seed=4, out=tmp_path / "other")
    assert np.abs(pixels(other, 2).astype(int) - pixels(few, 2).astype(int)).mean() > 5


def test_sampling_twice_gives_the_same_files(uninterrupted, tmp_path):
    a, b = (sample(uninterrupted, num_images=2, sampler="ddpm", num_inference_steps=5, out=tmp_path / n) for n in "ab")
    assert np.array_equal(pixels(a, 2), pixels(b, 2))
    assert sorted(p.name for p in a.iterdir()) == ["000000.png", "000001.png", "grid.png"]


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm_solver", "euler", "heun"])
def test_every_sampler_is_obeyed(name, uninterrupted, tmp_path):
    folder = sample(uninterrupted, num_images=1, sampler=name, num_inference_steps=3, out=tmp_path / name)
    trained = load_trained(uninterrupted)
    wanted = make_images(trained.task, [0], seed=0, sampler=build("samplers", {"name": name, "num_inference_steps": 3}))
    assert np.array_equal(pixels(folder, 1), wanted)


def test_samples_come_from_the_first_average(uninterrupted):
    trained = load_trained(uninterrupted)
    average = load_file(uninterrupted / "checkpoints" / "step-00000012" / "unet.ema.safetensors")
    for name, value in trained.task.nets["unet"].state_dict().items():
        assert torch.equal(value, average[name])
    assert not trained.task.nets["unet"].training


def test_a_preview_is_what_sampling_the_checkpoint_gives(uninterrupted, tmp_path):
    folder = sample(uninterrupted, num_images=2, seed=0, out=tmp_path / "again", batch_size=2)
    preview = Image.open(uninterrupted / "samples" / "step-00000012.png")
    again = grid(pixels(folder, 2))
    assert np.array_equal(np.asarray(preview), np.asarray(again))


def test_one_checkpoint_can_be_named(uninterrupted, tmp_path):
    folder = sample(uninterrupted / "checkpoints" / "step-00000009", num_images=1, out=tmp_path / "nine")
    assert (folder / "grid.png").exists()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        sample(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dim"}, "Did you mean 'ddim'"),
        ({"num_inference_steps": 0}, "greater than or equal to 1"),
        ({"num_inference_steps": 5000}, "only 1000 levels"),
        ({"num_images": 0}, "must be at least 1"),
        ({"guidance_scale": 3.0}, "no condition to follow"),
    ],
)
def test_impossible_wishes_are_refused(options, message, uninterrupted, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sample(uninterrupted, out=tmp_path / "x", **options)


def test_the_way_out_of_the_networks_range_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 1 / 255]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


def test_a_grid_shows_its_images_in_order():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0], images[1], images[2] = 10, 20, 30
    sheet = np.asarray(grid(images, columns=2, scale=1))
    assert sheet.shape == (2 + 2 * 10, 2 + 2 * 10, 3)
    assert [int(sheet[y, x, 0]) for y, x in ((6, 6), (6, 16), (16, 6), (16, 16))] == [10, 20, 30, 255]


def test_a_checkpoint_sampled_by_name_keeps_its_folder_clean(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    folder = sample(run / "checkpoints" / "step-00000009", num_images=1)
    assert folder == run / "samples" / "step-00000009-seed-0"
    first = (folder / "000000.png").read_bytes()
    again = sample(run, checkpoint=9, num_images=1, num_inference_steps=5)
    assert again == run / "samples" / "step-00000009-seed-0-2"
    assert (folder / "000000.png").read_bytes() == first
    assert (again / "000000.png").read_bytes() != first
    assert not (run / "checkpoints" / "step-00000009" / "samples").exists()


def test_images_that_are_there_are_neither_replaced_nor_mixed_with_others(uninterrupted, tmp_path):
    folder = sample(uninterrupted, num_images=2, num_inference_steps=2, out=tmp_path / "made")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"out: there are images in .*made already, such as 000000\.png"):
        sample(uninterrupted, num_images=1, seed=1, num_inference_steps=2, out=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_a_checkpoint_alone_is_enough_to_sample(uninterrupted, tmp_path):
    """Its manifest holds the config, so nothing beside it is needed."""
    alone = tmp_path / "somewhere" / "else"
    shutil.copytree(uninterrupted / "checkpoints" / "step-00000012", alone)
    a = sample(alone, num_images=1, out=tmp_path / "a")
    b = sample(uninterrupted, num_images=1, out=tmp_path / "b")
    assert np.array_equal(pixels(a, 1), pixels(b, 1))
