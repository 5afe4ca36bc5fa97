"""Images that are evaluated: of a folder, of a source, of a task."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eclosion.config.load import load
from eclosion.data.batch import Batch
from eclosion.errors import ConfigError, DataError
from eclosion.evaluation.made import (
    DataClasses,
    DataExamples,
    TaskImages,
    follows_classes,
    images_of_run,
    weights_of,
)
from eclosion.evaluation.real import DataImages, FolderImages, PairedImages
from eclosion.registry import build
from eclosion.rng import generator
from eclosion.sampling import load_trained, make_images
from eclosion.sampling.examples import from_samples
from eclosion.sampling.pictures import to_uint8


def first_rows(pixels):
    """uint8 [B, 3, H, W] as pictures [B, H, W, 3]."""
    return pixels.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of noise, 6 wide and 5 high."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i:06d}.png")
    return root


# --- folders ---------------------------------------------------------------------------------------------------------


def test_images_of_a_folder_are_what_pillow_reads_in_the_order_of_names(folder):
    images = FolderImages(folder)
    seen = images.read([2, 0])
    wanted = [np.asarray(Image.open(folder / f"00000{i}.png")) for i in (2, 0)]
    assert np.array_equal(first_rows(seen.pixels), wanted)
    assert len(images) == 7
    assert images.size == (5, 6)
    assert seen.names[0] == str(folder / "000002.png")


def test_the_grid_beside_numbered_images_is_none_of_them(folder):
    Image.new("RGB", (40, 40)).save(folder / "grid.png")
    assert len(FolderImages(folder)) == 7
    Image.new("RGB", (6, 5)).save(folder / "butterfly.png")
    assert len(FolderImages(folder)) == 9


def test_an_image_of_another_size_is_named_with_both_sizes(folder):
    Image.new("RGB", (9, 8)).save(folder / "000004.png")
    with pytest.raises(DataError, match=r"000004\.png: is 9x8 pixels.*000000\.png is 6x5.*image_size"):
        FolderImages(folder).read(range(7))


def test_images_of_a_folder_can_be_brought_to_a_size_as_in_training(folder):
    Image.new("RGB", (9, 8)).save(folder / "000004.png")
    images = FolderImages(folder, size=(4, 4)).read(range(7)).pixels
    config = {"source": {"name": "folder", "root": str(folder)}, "image_size": 4, "decode": "exact"}
    data = load({"output": "x", "data": config}).run.data
    wanted = from_samples(data.source.open(), data, None, seed=0)["image"]
    assert np.array_equal(first_rows(images), to_uint8(wanted))


def test_an_image_that_cannot_be_read_is_named(folder):
    (folder / "000003.png").write_bytes((folder / "000002.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"000003\.png: .*truncated"):
        FolderImages(folder).read([3])


def test_some_images_of_a_folder_are_a_choice_that_follows_from_the_seed(folder):
    chosen = [FolderImages(folder, count=3, seed=seed).read(range(3)).names for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(chosen[0])
    with pytest.raises(DataError, match="holds 7 images, and 8 are asked for"):
        FolderImages(folder, count=8)


def test_another_picture_under_an_old_name_is_another_set(folder):
    before = FolderImages(folder).fingerprint
    assert FolderImages(folder).fingerprint == before
    path = folder / "000001.png"
    os.utime(path, ns=(1, 1))
    assert FolderImages(folder).fingerprint != before
    assert FolderImages(folder, size=(4, 4)).fingerprint != FolderImages(folder, size=(5, 5)).fingerprint


def test_originals_of_a_folder_are_the_files_of_the_same_name_in_another(folder, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for i in (4, 1):
        Image.new("RGB", (6, 5), (i, 0, 0)).save(made / f"00000{i}.png")
    images = PairedImages(FolderImages(made), FolderImages(folder, size=(5, 6)))
    seen = images.read([1])
    assert torch.equal(seen.originals, FolderImages(folder).read([4]).pixels)
    assert seen.pixels[0, 0, 0, 0] == 4
    assert images.brings == {"originals"}
    (folder / "000001.png").unlink()
    with pytest.raises(DataError, match=r"made/000001\.png: has no original \(as 1 of 2 images\)"):
        PairedImages(FolderImages(made), FolderImages(folder))


def test_an_original_may_have_another_suffix_if_it_is_the_only_one_of_its_name(folder, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    Image.new("RGB", (6, 5)).save(made / "000002.jpg")
    images = PairedImages(FolderImages(made), FolderImages(folder))
    assert torch.equal(images.read([0]).originals, FolderImages(folder).read([2]).pixels)
    Image.new("RGB", (6, 5)).save(folder / "000002.bmp")
    with pytest.raises(DataError, match=r"000002\.jpg: has no original"):
        PairedImages(FolderImages(made), FolderImages(folder))


def test_a_folder_that_is_not_there_or_empty_is_named_by_its_own_name(tmp_path):
    with pytest.raises(DataError, match=r"^the folder .*nowhere does not exist"):
        FolderImages(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^no images in "):
        FolderImages(tmp_path)


# --- data ------------------------------------------------------------------------------------------------------------


def data_of(**options):
    config = {"source": {"name": "butterflies", "size": 6, "resolution": 20}, "image_size": 16}
    return load({"output": "x", "data": config | options}).run.data


def test_images_of_data_are_what_a_network_is_validated_on(folder):
    data = data_of(crop="random", horizontal_flip=True, shuffle=True)
    images = DataImages(data.source.open(), data, name="butterflies")
    wanted = from_samples(data.source.open(), data, None, seed=0)
    seen = images.read([5, 1])
    assert np.array_equal(first_rows(seen.pixels), to_uint8(wanted["image"][[5, 1]]))
    assert seen.captions == [wanted["caption"][5], wanted["caption"][1]]
    assert images.brings == {"captions"}
    assert len(images) == 6


def test_what_is_done_to_the_data_is_in_its_fingerprint():
    def fingerprint(count=None, seed=0, **options):
        data = data_of(**options)
        return DataImages(data.source.open(), data, name="any", count=count, seed=seed).fingerprint

    assert fingerprint() == fingerprint(shuffle=False, horizontal_flip=True, num_threads=0) == fingerprint(seed=3)
    others = [
        fingerprint(image_size=8),
        fingerprint(resize="stretch"),
        fingerprint(count=3),
        fingerprint(count=3, seed=1),
    ]
    assert len({fingerprint(), *others}) == 5


def test_a_bad_image_is_named_or_left_to_the_next_where_the_budget_allows_it(folder):
    (folder / "000003.png").write_bytes(b"")
    config = {"source": {"name": "folder", "root": str(folder)}, "image_size": 4}
    strict = load({"output": "x", "data": config}).run.data
    with pytest.raises(DataError, match=r"000003\.png: the file is empty.*1 of 7.*max_bad_fraction=0 allows 0"):
        DataImages(strict.source.open(), strict, name="any").read(range(7))
    lenient = replace(strict, max_bad_fraction=0.15)
    seen = DataImages(lenient.source.open(), lenient, name="any").read(range(2, 5))
    assert [name[-5] for name in seen.names] == ["2", "4", "4"]
    assert torch.equal(seen.pixels[1], seen.pixels[2])


# --- tasks -----------------------------------------------------------------------------------------------------------

STEPS = {"name": "ddim", "num_inference_steps": 2}


def test_images_of_a_run_are_those_of_sampling(uninterrupted):
    trained, sampler = load_trained(uninterrupted, device="cpu"), build("samplers", STEPS)
    images = images_of_run(trained, count=5, seed=3, sampler=[sampler], guidance_scale=1.0)
    wanted = make_images(trained.task, [1, 4], seed=3, sampler=sampler)
    assert np.array_equal(first_rows(images.read([1, 4]).pixels), wanted)
    assert len(images) == 5
    assert images.size == (16, 16)
    assert images.brings == frozenset()
    assert images.facts["sampler"]["num_inference_steps"] == 2
    assert {key: images.facts[key] for key in ("what", "step", "seed")} == {"what": "run", "step": 12, "seed": 3}


def test_the_fingerprint_of_made_images_holds_all_that_makes_them(uninterrupted):
    trained = load_trained(uninterrupted, device="cpu")

    def fingerprint(count=5, seed=3, guidance_scale=1.0, **options):
        sampler = build("samplers", STEPS | options)
        return images_of_run(
            trained, count=count, seed=seed, sampler=[sampler], guidance_scale=guidance_scale
        ).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    others = [fingerprint(seed=4), fingerprint(count=6), fingerprint(num_inference_steps=3), fingerprint(name="euler")]
    next(trained.task.nets["unet"].parameters()).data.add_(1e-3)
    assert len({before, *others, fingerprint()}) == 6


def test_images_that_are_not_finite_are_named_with_what_made_them(uninterrupted):
    trained, sampler = load_trained(uninterrupted, device="cpu"), build("samplers", STEPS)
    next(trained.task.nets["unet"].parameters()).data.fill_(torch.nan)
    images = images_of_run(trained, count=5, seed=3, sampler=[sampler], guidance_scale=1.0)
    with pytest.raises(DataError, match=r"image 2 of .* at step 12 is not finite.*ddim.*guidance_scale=1"):
        images.read([2, 3])


class Follower:
    """A task whose images are the colours that its embeddings say, with some noise; without networks to speak of."""

    wants, sizes = ("image_embed",), {"unet_0": (16, 16)}

    def __init__(self):
        self.nets = {"unet_0": torch.nn.Linear(1, 1)}

    def check_sampling(self, sampler, guidance_scale):
        pass

    def prepare(self, batch):
        return replace(batch, fields={**batch.fields, "image_embed": batch["image"].mean((2, 3))})

    def conditions(self, indices, examples=None):
        return examples

    def sample(self, conditions, rngs, **options):
        return conditions["image_embed"][:, :, None, None].expand(-1, -1, 16, 16)


def test_what_images_are_made_from_comes_with_them():
    data, task = data_of(), Follower()
    examples = DataExamples(data.source.open(), data, task, seed=0, device=torch.device("cpu"))
    images = TaskImages(
        task, name="any", weights=weights_of(task.nets), count=8, seed=0, sampler=None, device=torch.device("cpu"),
        examples=examples,
    )  # fmt: skip
    batch = from_samples(data.source.open(), data, None, seed=0)
    own = int(drawn_order(data.source.open())[1])
    seen = images.read([1, 7])  # the eighth follows the second of six again
    assert np.array_equal(first_rows(seen.originals), to_uint8(batch["image"][[own, own]]))
    torch.testing.assert_close(seen.conditions, batch["image"].mean((2, 3))[[own, own]])
    assert seen.captions == [batch["caption"][own]] * 2
    assert images.brings == {"originals", "captions", "conditions"}
    assert torch.equal(seen.pixels[:, :, 0, 0], torch.from_numpy(to_uint8(seen.conditions[:, :, None, None]))[:, 0, 0])


def drawn_order(samples):
    """In which they are followed, whatever order they are sorted in."""
    return generator(0, "examples", samples.fingerprint).permutation(len(samples))


@pytest.fixture
def sorted_by_class(tmp_path):
    """Data of three classes: 2 of the first, 3 of the second and 15 of the third."""
    for name, count in (("a", 2), ("b", 3), ("c", 15)):
        (tmp_path / "sorted" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "sorted" / name / f"{i}.png")
    source = {"name": "folder", "root": str(tmp_path / "sorted"), "class_names_from_folders": True}
    return load({"output": "x", "data": {"source": source, "image_size": 4}}).run.data


class Coloured:
    """A task whose images have the red of their class."""

    wants, sizes = (), {"unet": (4, 4)}

    def __init__(self):
        self.nets = {"unet": torch.nn.Linear(1, 1)}

    def check_sampling(self, sampler, guidance_scale):
        pass

    def conditions(self, indices, examples=None):
        return examples if examples is not None else Batch(indices, torch.ones(len(indices)), {"label": torch.zeros(1)})

    def sample(self, conditions, rngs, **options):
        return (conditions["label"][:, None, None, None].float() / 127.5 - 1).expand(-1, 3, 4, 4)


def test_classes_come_as_often_as_in_the_data_and_few_images_are_not_of_the_first_one_alone(sorted_by_class):
    samples = sorted_by_class.source.open()
    assert [samples.read(i).label for i in range(20)] == [0] * 2 + [1] * 3 + [2] * 15
    task = Coloured()
    assert follows_classes(task)
    images = TaskImages(
        task, name="any", weights="", count=40, seed=0, sampler=None, device=torch.device("cpu"),
        examples=DataClasses(samples, sorted_by_class, seed=0, name="the val data"),
    )  # fmt: skip
    labels = [int(image[0, 0, 0]) for image in images.read(range(40)).pixels]
    assert labels[:20] == labels[20:] == [samples.read(int(i)).label for i in drawn_order(samples)]
    assert 2 in labels[:5]
    assert images.facts["classes"] == "the val data"
    assert images.brings == frozenset()


def test_a_task_that_follows_something_needs_it():
    task = Follower()
    with pytest.raises(ConfigError, match="its networks follow image_embed"):
        TaskImages(task, name="any", weights="", count=1, seed=0, sampler=None, device=torch.device("cpu"))
