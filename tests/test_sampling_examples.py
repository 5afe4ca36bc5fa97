"""Images from embeddings, from images and from the data: a small cascade that follows image embeddings."""

import io
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from eclosion import ConfigError, DataError, sample, shard, train
from eclosion.config.load import load
from eclosion.data.batch import Batch
from eclosion.data.transforms import transform_of
from eclosion.registry import ENCODERS, build, part
from eclosion.sampling import Examples, load_trained, make_images, pairs
from eclosion.tasks.unclip_decoder import UnclipDecoderTask

DIM = 6
UNET = {
    "name": "unclip_unet",
    "base_channels": 8,
    "channel_mults": [1, 2],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
}

# What a hardly trained network says of noise makes images all black and white; what it says of images does not.
UNIT = {"model": UNET, "prediction_type": "sample"}


def cascade(output, source, **task):
    """A cascade of 8 and 16 pixels, trained for two steps."""
    return {
        "output": str(output),
        "data": {"source": source, "image_size": 16, "horizontal_flip": True, "crop": "random"},
        "task": {"name": "unclip_decoder", "unets": [UNIT | {"image_size": 8}, UNIT], **task},
        "train": {"duration": "2 steps", "batch_size": 4, "mixed_precision": "no"},
        "optimizer": {"learning_rate": 0.04, "networks": {"unet_1": {"learning_rate": 0.02}}},
        "ema": {"decays": [0.5]},
        "sample": {"num_images": 3, "sampler": {"name": "ddim", "num_inference_steps": 2}, "guidance_scale": [2, 1]},
        "validate": {"every": 2},
        "track": {"every": 1},
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Sixteen butterflies in four shards, each with an embedding."""
    folder = tmp_path_factory.mktemp("shards")
    rows = np.random.default_rng(0).standard_normal((16, DIM)).astype("f4")
    butterflies = build("sources", {"name": "butterflies", "size": 16, "resolution": 20})
    np.save(folder / "rows.npy", rows)
    shard(butterflies, folder / "tars", samples_per_shard=4, image_embeddings=folder / "rows.npy")
    return {
        "name": "webdataset",
        "webdataset_base_url": str(folder / "tars" / "{}.tar"),
        "img_embeddings_url": str(folder / "tars" / "img_emb"),
        "shard_width": 5,
        "splits": {"train": 0.5, "val": 0.5},
    }


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLOSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train(cascade(tmp_path_factory.mktemp("runs") / "cascade", shards))


def pixels(folder, count):
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(count)])


def close(one, other):
    """A convolution may add in another order for another batch size: one level of 255 at most."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


def rows_of(source):
    """The samples of a source in order: pictures as the network sees them in validation, and embeddings."""
    samples = source.open()
    transform = transform_of(load({"output": "x", "data": {"source": "butterflies", "image_size": 16}}).run.data)
    read = [samples.read(i) for i in range(len(samples))]
    images = [transform.prepare(Image.open(io.BytesIO(one.image)), "x").transpose(1, 2, 0) for one in read]
    return np.stack(images), np.stack([one.arrays["image_embed"] for one in read])


def test_an_image_depends_on_its_own_seed_and_its_own_embedding_alone(run, tmp_path):
    rows = np.random.default_rng(1).standard_normal((5, DIM)).astype("f4")
    many = pixels(sample(run, embeddings=rows, seed=3, out=tmp_path / "many"), 5)
    few = pixels(sample(run, embeddings=rows[:2], seed=3, batch_size=1, out=tmp_path / "few"), 2)
    assert close(many[:2], few)
    other = rows.copy()
    other[1] *= -1
    changed = pixels(sample(run, embeddings=other, seed=3, out=tmp_path / "changed"), 5)
    assert [close(a, b) for a, b in zip(many, changed, strict=True)] == [True, False, True, True, True]
    reseeded = pixels(sample(run, embeddings=rows, seed=4, out=tmp_path / "reseeded"), 5)
    assert not any(close(a, b) for a, b in zip(many, reseeded, strict=True))


def test_more_images_than_embeddings_begin_with_the_first_again_and_differ(run, tmp_path):
    rows = np.random.default_rng(1).standard_normal((2, DIM)).astype("f4")
    images = pixels(sample(run, embeddings=rows, num_images=4, out=tmp_path / "four"), 4)
    same = pixels(sample(run, embeddings=np.concatenate([rows, rows]), out=tmp_path / "same"), 4)
    assert close(images, same)
    assert not close(images[0], images[2])


def test_a_file_of_embeddings_gives_what_the_array_gives(run, tmp_path):
    rows = np.random.default_rng(1).standard_normal((3, DIM)).astype("f2")
    np.save(tmp_path / "rows.npy", rows)
    from_file = pixels(sample(run, embeddings=tmp_path / "rows.npy", out=tmp_path / "a"), 3)
    assert np.array_equal(from_file, pixels(sample(run, embeddings=rows, out=tmp_path / "b"), 3))
    assert len(list((tmp_path / "a").glob("0*.png"))) == 3  # one for each row
    with Image.open(tmp_path / "a" / "grid.png") as sheet:
        assert sheet.info == {}  # there are no originals


@pytest.mark.parametrize("split", ["val", "train"])
def test_samples_of_the_data_give_their_embeddings_and_stand_above_what_is_made_of_them(split, run, shards, tmp_path):
    originals, rows = rows_of(build("sources", shards | {"split": split}))
    folder = sample(run, from_data=split, num_images=3, out=tmp_path / "data")
    assert close(pixels(folder, 3), pixels(sample(run, embeddings=rows[:3], out=tmp_path / "rows"), 3))
    sheet = Image.open(folder / "grid.png")
    assert sheet.info["legend"] == "Rows in pairs: originals above, the images made from them below."
    assert np.array_equal(np.asarray(sheet), np.asarray(pairs(originals[:3], pixels(folder, 3))))


def test_a_preview_shows_the_first_validation_images_and_is_what_sampling_gives(run, tmp_path):
    preview = Image.open(run / "samples" / "step-00000002.png")
    again = Image.open(sample(run, num_images=3, out=tmp_path / "again") / "grid.png")
    assert np.array_equal(np.asarray(preview), np.asarray(again))
    assert "Rows in pairs: originals above" in (run / "report.html").read_text()


def test_a_grid_of_pairs_has_each_image_under_its_original():
    originals, images = np.zeros((3, 4, 4, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
    for i in range(3):
        originals[i], images[i] = 10 + i, 20 + i
    sheet = np.asarray(pairs(originals, images, columns=2))[:, :, 0]
    side = (sheet.shape[0] - 2) // 4
    middles = [
        [int(sheet[2 + side * row + side // 2, 2 + side * column + side // 2]) for column in (0, 1)] for row in range(4)
    ]
    assert middles == [[10, 11], [20, 21], [12, 255], [22, 255]]


def test_each_network_has_its_own_steps_and_guidance(run, tmp_path, monkeypatch):
    calls = {}
    given = UnclipDecoderTask.sample

    def watched(self, *args, sampler, guidance_scale, **kwargs):
        calls.update(steps=[one.num_inference_steps for one in sampler], guidance_scale=guidance_scale)
        return given(self, *args, sampler=sampler, guidance_scale=guidance_scale, **kwargs)

    monkeypatch.setattr(UnclipDecoderTask, "sample", watched)
    rows = np.ones((1, DIM), "f4")
    sample(run, embeddings=rows, num_inference_steps=[3, 1], guidance_scale=[1.5, 1], out=tmp_path / "a")
    assert calls == {"steps": [3, 1], "guidance_scale": [1.5, 1]}
    sample(run, embeddings=rows, out=tmp_path / "b")
    assert calls == {"steps": [2, 2], "guidance_scale": [2, 1]}  # the run's own


def test_a_cascade_may_end_early_and_be_entered_later_with_pictures_as_they_are(run, tmp_path):
    rows = np.random.default_rng(1).standard_normal((2, DIM)).astype("f4")
    small = sample(run, embeddings=rows, last="unet_0", out=tmp_path / "small")
    (small / "grid.png").unlink()
    assert pixels(small, 2).shape == (2, 8, 8, 3)
    large = sample(run, images=small, first="unet_1", out=tmp_path / "large")
    assert pixels(large, 2).shape == (2, 16, 16, 3)
    assert np.array_equal(
        np.asarray(Image.open(large / "grid.png")), np.asarray(pairs(pixels(small, 2), pixels(large, 2)))
    )
    # rounded to 256 levels on their way, and enlarged alike
    trained = load_trained(run, device="cpu")
    examples = Examples(Batch([0, 1], torch.ones(2), {"image_embed": torch.from_numpy(rows)}))
    whole = make_images(
        trained.task, [0, 1], seed=0, sampler=trained.run.sample.sampler, guidance_scale=[2, 1], examples=examples
    )
    assert np.abs(whole.astype(int) - pixels(large, 2).astype(int)).mean() < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"embeddings": np.ones((2, 5), "f4")},
            r"embeddings: image_embed has the shape \[1, 5\], and must have \[1, 6\]",
        ),
        (
            {"embeddings": np.ones((2, 3, DIM), "f4")},
            r"is an array \[2, 3, 6\] of float32, and embeddings is rows x dim",
        ),
        ({"embeddings": np.ones((2, DIM)), "from_data": "val"}, "embeddings and from_data: images are made from one"),
        ({"text_encodings": np.ones((2, 3, 4))}, "this task follows image_embed, and text_encodings is given"),
        ({"embeddings": np.ones((2, DIM)), "first": 1}, "unet_1 begins with images. Give images as well"),
        ({"from_data": "test"}, "from_data is 'test', and the data of this run has no such part"),
        (
            {"num_inference_steps": [1, 2, 3]},
            "num_inference_steps has 3 numbers, and the networks of this task are unet_0, unet_1",
        ),
        (
            {"guidance_scale": [1, 2, 3]},
            r"guidance_scale has 3 numbers \(1, 2, 3\), and the networks of this task are unet_0, unet_1",
        ),
        ({"first": "unet_2"}, "first: 'unet_2' is no network of this task. Did you mean 'unet_[01]'"),
        ({"first": 1, "last": 0}, "first is unet_1 and last is unet_0, which comes before it"),
    ],
    ids=str,
)
def test_wishes_that_do_not_go_together_are_refused(options, message, run, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        sample(run, out=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


# --- what later networks follow --------------------------------------------------------------------------------------

TOKENS = (3, 4)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run whose upsampler follows the embedding, and text that the first network does not."""
    folder, draw = tmp_path_factory.mktemp("told"), np.random.default_rng(0).standard_normal
    np.save(folder / "rows.npy", draw((8, DIM)).astype("f4"))
    np.save(folder / "text.npy", draw((8, *TOKENS)).astype("f4"))
    butterflies = build("sources", {"name": "butterflies", "size": 8, "resolution": 16})
    given = {"image_embeddings": folder / "rows.npy", "text_embeddings": folder / "text.npy"}
    shard(butterflies, folder / "tars", samples_per_shard=4, **given)
    tars = folder / "tars"
    source = {"name": "webdataset", "webdataset_base_url": str(tars / "{}.tar"), "shard_width": 5}
    source |= {"img_embeddings_url": str(tars / "img_emb"), "text_embeddings_url": str(tars / "text_emb")}
    config = cascade(folder / "run", source)
    later = {**UNET, "image_conditioned": True, "text_conditioned": True, "num_text_tokens": 3}
    config["task"]["unets"][1] = {**UNIT, "model": later}
    config |= {"validate": {}, "sample": config["sample"] | {"num_images": 0, "guidance_scale": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLOSION_CACHE", str(folder / "cache"))
        return train(config)


@pytest.fixture
def small(tmp_path):
    """A folder of three small pictures."""
    (tmp_path / "small").mkdir()
    for i, one in enumerate(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)):
        Image.fromarray(one).save(tmp_path / "small" / f"{i}.png")
    return tmp_path / "small"


def conditions(count=3):
    draw = np.random.default_rng(2).standard_normal
    return {"embeddings": draw((count, DIM)).astype("f4"), "text_encodings": draw((count, *TOKENS)).astype("f4")}


def test_pictures_that_are_enlarged_follow_arrays_row_by_row(told, small, tmp_path):
    given = conditions()
    made = pixels(sample(told, images=small, first=1, **given, out=tmp_path / "made"), 3)
    trained = load_trained(told, device="cpu")
    images = torch.stack([torch.from_numpy(np.array(Image.open(small / f"{i}.png"))) for i in range(3)])
    fields = {"image_embed": given["embeddings"], "text_encodings": given["text_encodings"]}
    batch = Batch(range(3), torch.ones(3), {name: torch.from_numpy(value) for name, value in fields.items()})
    begin = images.permute(0, 3, 1, 2) / 127.5 - 1
    wanted = make_images(
        trained.task,
        range(3),
        seed=0,
        sampler=trained.run.sample.sampler,
        examples=Examples(batch, image=begin),
        first=1,
    )
    assert close(made, wanted)
    for name in given:
        other = {option: rows.copy() for option, rows in given.items()}
        other[name][1] *= -1000  # a hardly trained network hardly listens
        changed = pixels(sample(told, images=small, first=1, **other, out=tmp_path / name), 3)
        assert [close(a, b) for a, b in zip(made, changed, strict=True)] == [True, False, True]
    one = pixels(sample(told, images=small, first=1, num_images=1, **given, out=tmp_path / "one"), 1)
    assert close(one, made[:1])


def test_a_picture_that_cannot_be_read_is_left_out_with_its_row(told, small, tmp_path):
    given = conditions()
    made = pixels(sample(told, images=small, first=1, **given, out=tmp_path / "made"), 3)
    (small / "1.png").write_bytes(b"no picture")
    rest = sample(told, images=small, first=1, **given, out=tmp_path / "rest")
    assert not (rest / "000002.png").exists()
    assert close(pixels(rest, 1)[0], made[0])
    # the second has the noise of the second, on the picture and the row of the third
    swapped = {name: np.concatenate([rows[:1], rows[2:], rows[1:2]]) for name, rows in given.items()}
    (small / "2.png").rename(small / "1.png")
    (small / "2.png").write_bytes((small / "0.png").read_bytes())
    again = sample(told, images=small, first=1, **swapped, out=tmp_path / "again")
    assert close(pixels(rest, 2), pixels(again, 2))


def test_only_what_the_networks_that_run_follow_is_asked_for(told, tmp_path):
    given = conditions()
    early = sample(told, embeddings=given["embeddings"], last="unet_0", out=tmp_path / "early")
    both = sample(told, **given, last="unet_0", out=tmp_path / "both")
    assert np.array_equal(pixels(early, 3), pixels(both, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no encoder .task.encoder is none.*`eclosion embed`.*and give them as embeddings"),
        (("text_encodings",), "no encoder .task.encoder is none.*`eclosion embed`.*and give them as embeddings"),
        (("embeddings",), "follow text_encodings, which are not there. Give text_encodings and embeddings"),
    ],
    ids=["nothing", "text alone", "embeddings alone"],
)
def test_what_an_upsampler_follows_and_nothing_gives_is_asked_for(options, message, told, small):
    with pytest.raises(ConfigError, match=message):
        sample(told, images=small, first=1, **{name: conditions()[name] for name in options})


def test_arrays_that_do_not_go_with_the_pictures_are_refused(told, small):
    with pytest.raises(ConfigError, match=r"3 images and 2 embeddings are given\. Give one row for each image"):
        sample(told, images=small, first=1, **conditions(2))
    with pytest.raises(ConfigError, match="embeddings and images: images are made from one of them"):
        sample(told, images=small, **conditions())
    with pytest.raises(ConfigError, match="embeddings and from_data: images are made from one of them"):
        sample(told, from_data="train", first=1, **conditions())
    with pytest.raises(ConfigError, match="embeddings: this task follows image_embed and text_encodings, and image_em"):
        sample(told, embeddings=conditions()["embeddings"])


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'}"])
def test_a_file_that_holds_no_embeddings_is_one_line(content, run, tmp_path):
    (tmp_path / "rows.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"rows.npy: ") as error:
        sample(run, embeddings=tmp_path / "rows.npy")
    assert "\n" not in str(error.value)


def test_an_embedding_that_is_none_is_told_with_its_row(run):
    rows = np.ones((3, DIM), "f4")
    rows[2] = 0
    with pytest.raises(DataError, match="embeddings row 2: is all zero"):
        sample(run, embeddings=rows)


def test_without_an_encoder_pictures_are_refused_with_what_to_do(run, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"no encoder \(task.encoder is none\).*`eclosion embed`"):
        sample(run, images=tmp_path)


def test_a_folder_that_is_not_there_is_told_as_what_was_given(run, tmp_path):
    with pytest.raises(DataError, match=r"^images: ") as error:
        sample(run, images=tmp_path / "none")
    assert "data.source" not in str(error.value)


def test_a_run_that_follows_nothing_takes_nothing_to_follow(uninterrupted):
    with pytest.raises(ConfigError, match="embeddings: the networks of this run follow nothing"):
        sample(uninterrupted, embeddings=np.ones((2, DIM)))


def test_the_command_line_says_the_same(command, run, tmp_path):
    rows = np.random.default_rng(1).standard_normal((2, DIM)).astype("f4")
    np.save(tmp_path / "rows.npy", rows)
    options = ("--steps", "3,1", "--guidance-scale", "1.5,1", "--seed", 7, "--device", "cpu")
    done = command("sample", run, "--embeddings", tmp_path / "rows.npy", *options, "--out", tmp_path / "cli")
    assert (done.code, done.out) == (0, f"2 images and grid.png: {tmp_path / 'cli'}\n")
    here = sample(
        run, embeddings=rows, num_inference_steps=[3, 1], guidance_scale=[1.5, 1], seed=7, out=tmp_path / "here"
    )
    assert np.array_equal(pixels(tmp_path / "cli", 2), pixels(here, 2))
    out = tmp_path / "small"
    small = command(
        "sample", run, "--from-data", "val", "--n", 1, "--last", "unet_0", "--checkpoint", "best", "--out", out
    )
    assert small.out.startswith("1 images")
    assert pixels(out, 1).shape == (1, 8, 8, 3)
    wrong = command("sample", run, "--steps", "3;1")
    assert (wrong.code, wrong.err) == (2, "error: --steps is '3;1', and must be numbers such as 20 or 20,10.\n")


def test_validation_and_learning_rates_are_told_by_network(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/loss/unet_1" in line] == [0, 2]
    assert {line["train/lr/unet_1"] / line["train/lr/unet_0"] for line in lines if "train/lr/unet_0" in line} == {0.5}
    state = json.loads((run / "checkpoints" / "step-00000002" / "state.json").read_text())["validation"]
    assert state["networks"].keys() == {"unet_0", "unet_1"}
    assert state["best"]["value"] == pytest.approx(sum(score["value"] for score in state["networks"].values()))


# --- with an encoder -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_encoder(monkeypatch):
    """An encoder `fake`, which finds the mean colour of each half of an image; and how many images it has seen."""
    seen = []

    class Means:
        dim, fingerprint = DIM, "means"

        def to(self, device):
            return self

        def __call__(self, image):
            seen.append(len(image))
            return torch.cat([half.mean((2, 3)) for half in image.split(8, dim=3)], dim=1).float() + 2

    class Fake:
        # Nothing is kept.
        cache_gb: float = 0

        def build(self):
            return Means()

    Fake.__module__, Fake.__qualname__ = "fake_encoder", "Fake"
    module = ModuleType("fake_encoder")
    module.Fake = part(Fake)
    monkeypatch.setitem(sys.modules, "fake_encoder", module)
    monkeypatch.setitem(ENCODERS, "fake", "fake_encoder:Fake")
    return seen


def test_an_encoder_of_a_run_on_given_embeddings_is_there_for_pictures(fake_encoder, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    config = cascade(tmp_path / "run", shards, encoder="fake")
    config |= {"validate": {}, "sample": config["sample"] | {"num_images": 0}}
    run = train(config, ["train.duration=1 steps"])
    assert fake_encoder == []
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "pictures" / "a.png")
    made = sample(run, images=tmp_path / "pictures", out=tmp_path / "made")
    assert fake_encoder == [1]
    assert pixels(made, 1).shape == (1, 16, 16, 3)
    sample(run, images=tmp_path / "pictures", first=1, out=tmp_path / "large")
    assert fake_encoder == [1]  # unet_1 follows nothing


def test_an_encoder_sees_each_image_once_in_a_step_and_makes_what_pictures_are_sampled_from(fake_encoder, tmp_path):
    source = {"name": "butterflies", "size": 8, "resolution": 16}
    config = cascade(tmp_path / "run", source, encoder="fake")
    config["train"] |= {"duration": "3 steps", "batch_size": 4, "micro_batch_size": 2}
    config |= {"validate": {}, "sample": config["sample"] | {"num_images": 0}}
    run = train(config)
    assert fake_encoder == [2] * 6  # of two networks
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shown = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for i, one in enumerate(shown):
        Image.fromarray(one).save(pictures / f"{i}.png")
    made = sample(run, images=pictures, out=tmp_path / "made")
    halves = (shown.reshape(2, 16, 2, 8, 3).mean((1, 3)) / 127.5 - 1 + 2).reshape(2, 6).astype("f4")
    assert close(pixels(made, 2), pixels(sample(run, embeddings=halves, out=tmp_path / "rows"), 2))
    assert np.array_equal(np.asarray(Image.open(made / "grid.png")), np.asarray(pairs(shown, pixels(made, 2))))
