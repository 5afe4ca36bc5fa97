"""Writing shards: what is in them, that a stopped call is finished by the next, and what is refused."""

import errno
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eclosion import sharding
from eclosion.checkpoint.lock import RunLock
from eclosion.data.butterflies import ButterfliesSource
from eclosion.data.clipart import ClipartSource
from eclosion.data.folder import FolderSource
from eclosion.data.source import Sample
from eclosion.data.torch_dataset import TorchDatasetSamples
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import BadSample, ConfigError, DataError, EnvironmentProblem, LockedError
from eclosion.rundir import RunDir
from eclosion.sharding import WrittenShards, shard

SOURCE = ButterfliesSource(size=23, resolution=16)


def contents(folder):
    """Path -> bytes of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(tar):
    """Key -> suffix -> bytes, by the standard library."""
    found = {}
    with tarfile.open(tar) as file:
        for member in file:
            assert member.isreg()
            key, _, suffix = member.name.partition(".")
            found.setdefault(key, {})[suffix] = file.extractfile(member).read()
    return found


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def message(kind, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(rows=23, dims=(4,), dtype="f4"):
    return np.random.default_rng(0).normal(size=(rows, *dims)).astype(dtype)


def array(path, *, dims=(4,), rows=23, dtype="f4"):
    np.save(path, numbers(rows, dims, dtype))
    return path


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of the butterflies in five shards, with two kinds of embeddings, written in one go."""
    folder = tmp_path_factory.mktemp("whole")
    array(folder / "image.npy", dtype="f2")
    array(folder / "text.npy", dims=(3, 2), dtype=">f8")
    return write(folder, folder / "out")


def write(arrays, out, source=SOURCE, **options):
    given = {"image_embeddings": arrays / "image.npy", "text_embeddings": arrays / "text.npy"}
    shard(source, out, samples_per_shard=5, **given, **options)
    return out


def test_shards_hold_the_pixels_captions_labels_and_names_of_the_source_in_its_order(tmp_path):
    result = shard(SOURCE, tmp_path / "out", samples_per_shard=10)
    assert result == WrittenShards(tmp_path / "out", 3, 23, {})
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "shards.json",
    ]
    samples = SOURCE.open()
    for number, size in enumerate([10, 10, 3]):
        found = read(result.folder / f"{number:05d}.tar")
        assert list(found) == [f"{number:05d}{place:04d}" for place in range(size)]
        for place, files in enumerate(found.values()):
            sample = samples.read(10 * number + place)
            assert list(files) == ["png", "txt", "cls", "json"]
            assert np.array_equal(pixels(files["png"]), np.asarray(sample.image))
            assert files["txt"].decode() == sample.caption
            assert int(files["cls"]) == sample.label
            assert json.loads(files["json"]) == {"name": sample.name}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same_samples(whole):
    webdataset = pytest.importorskip("webdataset")
    url = f"{whole}/{{00000..00004}}.tar"
    found = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode("pil"))
    gc.collect()  # it leaves its files open
    samples = SOURCE.open()
    assert [sample["__key__"] for sample in found] == [f"{i // 5:05d}{i % 5:04d}" for i in range(23)]
    for index, sample in enumerate(found):
        wanted = samples.read(index)
        assert np.array_equal(np.asarray(sample["png"]), np.asarray(wanted.image))
        assert (sample["txt"], sample["cls"], sample["json"]) == (wanted.caption, wanted.label, {"name": wanted.name})


def test_our_own_source_reads_the_same_samples_with_their_embeddings(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    out = shutil.copytree(whole, tmp_path / "out")  # the index is kept beside the shards
    found = WebDatasetSource(
        webdataset_base_url=f"{out}/{{}}.tar",
        shard_width=5,
        labels=True,
        img_embeddings_url=f"{out}/img_emb",
        text_embeddings_url=f"{out}/text_emb",
    ).open()
    samples, image, text = SOURCE.open(), numbers(dtype="f2"), numbers(dims=(3, 2), dtype=">f8")
    assert len(found) == 23
    for index in range(23):
        sample, wanted = found.read(index), samples.read(index)
        assert np.array_equal(pixels(sample.image), np.asarray(wanted.image))
        assert (sample.caption, sample.label) == (wanted.caption, wanted.label)
        assert sample.arrays["image_embed"].tolist() == image[index].astype("f4").tolist()
        assert sample.arrays["text_encodings"].tolist() == text[index].astype("f4").tolist()
    found.close()


def test_arrays_hold_the_row_of_each_sample_in_the_dtype_they_came_in(whole):
    image, text = numbers(dtype="f2"), numbers(dims=(3, 2), dtype=">f8")
    for number in range(5):
        cut = slice(5 * number, 5 * number + 5)
        for name, wanted in (("img_emb", image), ("text_emb", text)):
            found = np.load(whole / name / f"{name}_{number:05d}.npy")
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted[cut])


def test_embeddings_may_come_in_several_files_in_the_order_of_their_numbers(tmp_path):
    rows = numbers()
    (tmp_path / "in").mkdir()
    for number, cut in ((2, slice(0, 7)), (10, slice(7, 8)), (11, slice(8, 23))):  # as text, 10 comes before 2
        np.save(tmp_path / f"in/emb_{number}.npy", rows[cut])
    (tmp_path / "in/README").touch()
    out = shard(SOURCE, tmp_path / "out", samples_per_shard=4, image_embeddings=tmp_path / "in").folder
    found = [np.load(out / f"img_emb/img_emb_{number:05d}.npy") for number in range(6)]
    assert np.array_equal(np.concatenate(found), rows)


def test_two_runs_give_the_same_bytes_whatever_the_number_of_workers(tmp_path, whole):
    assert contents(write(whole.parent, tmp_path / "out", num_workers=1)) == contents(whole)
    assert contents(write(whole.parent, tmp_path / "more", num_workers=7)) == contents(whole)


def test_members_have_no_time_and_no_owner(whole):
    with tarfile.open(whole / "00000.tar") as file:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in file} == {(0, 0, 0, "", "", 0o644)}


def test_image_files_are_copied_as_they_are_and_named_by_what_they_are(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    (tmp_path / "in/cat").mkdir(parents=True)
    kinds = {"a.JPEG": "jpg", "b.png": "png", "c.webp": "webp", "d.gif": "gif", "e.bmp": "bmp", "f.png": "jpg"}
    for name, kind in kinds.items():
        picture.save(tmp_path / "in/cat" / name, kind.upper().replace("JPG", "JPEG"))
        (tmp_path / "in/cat" / f"{name[0]}.txt").write_text(f"file {name}")
    source = FolderSource(root=tmp_path / "in", caption_suffix=".txt", class_names_from_folders=True)
    out = shard(source, tmp_path / "out").folder
    found = read(out / "00000.tar").values()
    for (name, kind), files in zip(kinds.items(), found, strict=True):
        assert files == {
            kind: (tmp_path / "in/cat" / name).read_bytes(),
            "txt": f"file {name}".encode(),
            "cls": b"0",
            "json": json.dumps({"name": f"cat/{name}"}).encode(),  # not where the folder lies
        }
    assert json.loads((out / "shards.json").read_text())["class_names"] == ["cat"]


def test_transparent_pictures_are_flattened_on_white(tmp_path):
    source = ClipartSource(categories=["music"])
    files = read(shard(source, tmp_path).folder / "00000.tar")
    drawing = source.open().read(0).image
    white = Image.new("RGBA", drawing.size, "white")
    wanted = np.asarray(Image.alpha_composite(white, drawing).convert("RGB")).astype(int)
    assert np.abs(pixels(files["000000000"]["png"]).astype(int) - wanted).max() <= 1  # they round otherwise


def test_tensors_become_pictures_of_their_eight_bits(tmp_path):
    levels = torch.arange(3 * 8 * 12).reshape(3, 8, 12).to(torch.uint8)
    dataset = TorchDatasetSamples([levels, levels.float() / 127.5 - 1, (levels[:1], "grey")])
    files = list(read(shard(dataset, tmp_path).folder / "00000.tar").values())
    assert np.array_equal(pixels(files[0]["png"]), levels.permute(1, 2, 0))
    assert files[1]["png"] == files[0]["png"]
    assert np.array_equal(pixels(files[2]["png"])[:, :, 2], levels[0])
    assert [list(one) for one in files] == [["png", "json"]] * 3


def test_a_data_set_of_the_user_is_read_by_one_thread_at_a_time(tmp_path):
    class Shy:
        busy = threading.Lock()

        def __len__(self):
            return 40

        def __getitem__(self, index):
            assert self.busy.acquire(blocking=False)
            try:
                return Image.new("RGB", (64, 64), (index, 0, 0))
            finally:
                self.busy.release()

    out = shard(TorchDatasetSamples(Shy()), tmp_path, samples_per_shard=5, num_workers=4).folder
    assert pixels(read(out / "00007.tar")["000070004"]["png"])[0, 0].tolist() == [39, 0, 0]


def test_what_a_source_brings_itself_is_kept(tmp_path):
    class Sharded(Broken):
        shard_sizes, shard_names, left_out, problems, notes, splits, closed = (23,), ("all",), ({},), (), (), None, 0

        @property
        def array_shapes(self):
            return {"image_embed": (4,), "text_encodings": (3, 2)}

        def read(self, index):
            one = super().read(index)
            arrays = {"image_embed": numbers()[index], "text_encodings": numbers(dims=(3, 2))[index]}
            return Sample(one.image, one.name, one.caption, one.label, arrays)

        def fetch_ahead(self, shards):
            pass

        def close(self):
            self.closed += 1

    samples = Sharded()
    out = shard(samples, tmp_path / "out", text_embeddings=array(tmp_path / "x.npy", dims=(5, 1))).folder
    assert np.array_equal(np.load(out / "img_emb/img_emb_00000.npy"), numbers())
    assert np.array_equal(np.load(out / "text_emb/text_emb_00000.npy"), numbers(dims=(5, 1)))  # what is given wins
    assert samples.closed == 0  # whoever opened it closes it


def test_keys_grow_with_what_they_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SHARD_WIDTH", 1)
    monkeypatch.setattr(sharding, "INDEX_WIDTH", 1)
    dataset = TorchDatasetSamples([Image.new("RGB", (1, 1))] * 122)
    out = shard(dataset, tmp_path, samples_per_shard=11).folder
    names = [f"{number:02d}" for number in range(12)]
    assert sorted(path.stem for path in out.glob("*.tar")) == names
    assert list(read(out / "11.tar")) == ["1100"]
    assert list(read(out / "07.tar"))[-1] == "0710"


# bad samples


def test_a_bad_sample_is_an_error_that_names_it(tmp_path):
    assert message(DataError, shard, Broken(12), tmp_path / "out", samples_per_shard=5, num_workers=1) == (
        "butterfly-000012: the image ends early. Repair or remove this sample, or leave such samples out with skip_bad."
    )
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"00000.tar", "00001.tar"}
    assert list((tmp_path / "out").rglob("*.new")) == []


def test_a_sample_that_is_left_out_leaves_a_gap_and_a_row_of_zeros_and_is_counted(tmp_path, whole):
    out = tmp_path / "out"
    write(whole.parent, out, Broken(6, 8, 20), skip_bad=True)
    assert list(read(out / "00001.tar")) == ["000010000", "000010002", "000010004"]
    for name in ("img_emb", "text_emb"):
        found, wanted = (np.load(folder / name / f"{name}_00001.npy") for folder in (out, whole))
        assert not found[[1, 3]].any()
        assert np.array_equal(found[[0, 2, 4]], wanted[[0, 2, 4]])
    assert (out / "00002.tar").read_bytes() == (whole / "00002.tar").read_bytes()
    manifest = json.loads((out / "shards.json").read_text())
    assert manifest["num_samples"] == 20
    assert [len(one["skipped"]) for one in manifest["shards"]] == [0, 2, 0, 0, 1]
    assert manifest["shards"][4]["skipped"] == [{"key": "000040000", "name": "butterfly-000020", "reason": "truncated"}]


def test_all_of_a_shard_may_be_bad(tmp_path):
    result = shard(Broken(*range(5, 10)), tmp_path / "out", samples_per_shard=5, skip_bad=True)
    assert (result.num_shards, result.num_samples, result.skipped) == (5, 18, {"truncated": 5})
    assert read(tmp_path / "out/00001.tar") == {}


def test_one_may_go_on_with_skip_bad_and_not_back(tmp_path, whole):
    with pytest.raises(DataError, match=r"^butterfly-000012: "):
        write(whole.parent, tmp_path / "out", Broken(12), num_workers=1)
    write(whole.parent, tmp_path / "out", Broken(12), skip_bad=True)
    write(whole.parent, tmp_path / "straight", Broken(12), skip_bad=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert message(DataError, write, whole.parent, tmp_path / "out") == (
        "butterfly-000012: was left out of the shards that stand already (truncated), and now a bad sample is an "
        "error. Go on with skip_bad, or use a new folder."
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(lambda data: data[: len(data) // 2], "truncated"), (lambda data: b"II*\0" + data, "not_an_image")],
)
def test_image_files_are_decoded_before_they_are_copied(tmp_path, damage, reason):
    (tmp_path / "in").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for name in ("a", "b"):
        picture.save(tmp_path / f"in/{name}.jpg")
    (tmp_path / "in/b.jpg").write_bytes(damage((tmp_path / "in/b.jpg").read_bytes()))
    assert shard(FolderSource(root=tmp_path / "in"), tmp_path / "out", skip_bad=True).skipped == {reason: 1}


def test_a_caption_that_is_no_text_is_a_bad_sample(tmp_path):
    dataset = TorchDatasetSamples([(Image.new("RGB", (1, 1)), text) for text in ("é", "half \ud800")])
    assert message(DataError, shard, dataset, tmp_path) == (
        "dataset[1]: its caption cannot be written as UTF-8 (character 5). Repair or remove this sample, or leave such "
        "samples out with skip_bad."
    )


def test_another_error_of_a_source_keeps_its_type_and_says_where(tmp_path):
    class Buggy(Broken):
        def read(self, index):
            return {}[index] if index == 3 else super().read(index)

    with pytest.raises(KeyError) as caught:
        shard(Buggy(), tmp_path, skip_bad=True)
    assert caught.value.__notes__ == ["while reading sample 3, butterfly-000003"]


# stopping and going on


def test_progress_is_told_and_a_call_that_was_stopped_is_finished_by_the_next(tmp_path, whole):
    told = []

    def stop(done, total):
        told.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(whole.parent, tmp_path / "out", num_workers=1, on_shard=stop)
    assert told == [(0, 5), (1, 5), (2, 5)]
    assert not any(thread.name.startswith("eclosion-shard") for thread in threading.enumerate())
    manifest = json.loads((tmp_path / "out/shards.json").read_text())
    assert (manifest["done"], "shards" in manifest) == (False, False)
    stands = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("0000*.tar")}
    assert len(stands) in (2, 3)  # the thread may have been about to publish one more
    write(whole.parent, tmp_path / "out", on_shard=lambda done, total: told.append((done, total)))
    assert told[3:] == [(done, 5) for done in range(len(stands), 6)]
    assert {path: path.stat().st_ino for path in stands} == stands  # not written again
    assert contents(tmp_path / "out") == contents(whole)


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
        more = in_a_fork(lambda out=out: write(whole.parent, out, num_workers=1), at=at)
        for tar in out.glob("*.tar"):  # what has its name is whole, and has its arrays
            arrays = [f"{name}/{name}_{tar.stem}.npy" for name in ("img_emb", "text_emb")]
            assert all((out / one).read_bytes() == wanted[one] for one in arrays)
            assert tar.read_bytes() == wanted[tar.name]
        assert contents(write(whole.parent, out)) == wanted
        at += every
    assert at > 40


def test_a_finished_folder_is_left_alone_and_need_not_be_writable(tmp_path, whole, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in [whole, *whole.rglob("*")]}
    assert shard(SOURCE, whole, samples_per_shard=5, image_embeddings=whole.parent / "image.npy",
                 text_embeddings=whole.parent / "text.npy") == WrittenShards(whole, 5, 23, {})  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in [whole, *whole.rglob("*")]} == before


@pytest.mark.parametrize("name", ["00003.tar", "text_emb/text_emb_00003.npy"])
def test_a_file_that_is_lost_or_short_is_written_again(tmp_path, whole, name):
    out = write(whole.parent, tmp_path / "out")
    for hurt in (lambda path: path.unlink(), lambda path: os.truncate(path, 100)):
        hurt(out / name)
        write(whole.parent, out)
        assert contents(out) == contents(whole)


@pytest.mark.parametrize("call", range(1, 12))
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(tmp_path, whole, call, monkeypatch):
    calls, fsync = iter(range(1, 1000)), os.fsync

    def fill_up(fd):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fill_up)
        said = message(EnvironmentProblem, write, whole.parent, tmp_path / "out", num_workers=1)
    assert said.startswith(f"{tmp_path}/out")
    assert " cannot be written: No space left on device; " in said
    assert said.endswith("Finished files are whole: make room or mend the disk, and start again.")
    assert list((tmp_path / "out").rglob("*.new")) == []
    assert contents(write(whole.parent, tmp_path / "out")) == contents(whole)


def test_a_write_that_fails_half_way_is_one_line_too(tmp_path, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
        said = message(EnvironmentProblem, write, whole.parent, tmp_path / "out", num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith(f"{tmp_path}/out/00000.tar cannot be written: File too large; ")
    assert list((tmp_path / "out").rglob("*.new")) == []
    assert contents(write(whole.parent, tmp_path / "out")) == contents(whole)


def test_two_writers_of_one_folder_exclude_each_other(tmp_path):
    with RunLock(RunDir(tmp_path / "out/.partial")):
        assert " is in use by process " in message(LockedError, shard, SOURCE, tmp_path / "out")


# what is refused


def test_another_call_for_the_same_folder_is_refused_with_both_values(tmp_path):
    out = shard(SOURCE, tmp_path / "out", samples_per_shard=10).folder
    assert message(ConfigError, shard, SOURCE, out, samples_per_shard=12) == (
        f"{out} was begun otherwise: samples_per_shard was 10 and is 12. Go on as it was begun, or use a new folder."
    )
    other = ButterfliesSource(size=23, resolution=16, seed=1)
    old, new = SOURCE.open().fingerprint, other.open().fingerprint
    assert f": source was {old} and is {new}. " in message(ConfigError, shard, other, out, samples_per_shard=10)
    given = {"samples_per_shard": 10, "image_embeddings": array(tmp_path / "x.npy")}
    assert ": img_emb was None and is " in message(ConfigError, shard, SOURCE, out, **given)


def test_embeddings_with_other_numbers_are_another_call(tmp_path):
    out = tmp_path / "out"
    shard(SOURCE, out, image_embeddings=array(tmp_path / "x.npy"))
    np.save(tmp_path / "x.npy", numbers() + 1)
    assert ": img_emb was " in message(ConfigError, shard, SOURCE, out, image_embeddings=tmp_path / "x.npy")


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    assert message(ConfigError, shard, SOURCE, tmp_path) == (
        f"{tmp_path} is not empty and has no shards.json. Choose a new folder for the shards."
    )
    assert message(ConfigError, shard, SOURCE, tmp_path / "mine.txt") == (
        f"{tmp_path}/mine.txt is a file. Give a folder for the shards."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 9, "asked": {}}', '{"format": 1, "asked": 0}', "\x80"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "shards.json").write_text(text, encoding="latin-1")
    said = message(DataError, shard, SOURCE, tmp_path)
    assert said.startswith(f"{tmp_path}/shards.json: cannot be understood (")
    assert said.endswith("). Use a new folder for the shards.")


def test_a_manifest_with_foreign_shards_is_named(tmp_path):
    shard(SOURCE, tmp_path)
    manifest = json.loads((tmp_path / "shards.json").read_text())
    (tmp_path / "shards.json").write_text(json.dumps(manifest | {"shards": [{"shard": 0, "evil": 1}]}))
    assert "shards.json: cannot be understood (" in message(DataError, shard, SOURCE, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0, and must be at least 1."),
        ({"num_workers": 0}, "num_workers is 0, and must be at least 1."),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, options, said):
    assert message(ConfigError, shard, SOURCE, tmp_path, **options) == said


def test_an_empty_source_is_refused(tmp_path):
    class Empty(Broken):
        def __len__(self):
            return 0

    assert message(DataError, shard, Empty(), tmp_path) == "The source has no samples, so there are no shards to write."


def test_embeddings_that_do_not_go_with_the_samples_are_refused_before_anything_is_written(tmp_path):
    x, out = tmp_path / "x.npy", tmp_path / "out"
    wanted = [
        (lambda: array(x, rows=22), "image", f"{x}: has 22 rows, and the source has 23 samples. There must be one row "
         "for each sample, in the order of the source; a row of zeros for a sample without embedding."),
        (lambda: array(x), "text", f"{x}: is an array of shape (23, 4), and text embeddings are (rows, tokens, dim), "
         "one vector per token. It seems to hold pooled embeddings."),
        (lambda: array(x, dims=(3, 2)), "image", f"{x}: is an array of shape (23, 3, 2), and image embeddings are "
         "(rows, dim)."),
        (lambda: array(x, dtype="i8"), "image", f"{x}: holds int64, and embeddings are floating point."),
        (lambda: x.write_bytes(b"junk"), "image", f"{x}: is not a .npy file (it begins otherwise)."),
        (x.unlink, "image", f"{x}: the file does not exist."),
    ]  # fmt: skip
    for make, kind, said in wanted:
        make()
        assert message(DataError, shard, SOURCE, out, **{f"{kind}_embeddings": x}) == said
    assert not out.exists()


def test_a_folder_of_embeddings_must_hold_arrays_of_one_form(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    assert message(DataError, shard, SOURCE, tmp_path / "out", image_embeddings=folder) == (
        f"{folder}: holds no files NAME_<digits>.npy. Give a .npy file, or a folder of such files."
    )
    array(folder / "x_0.npy", rows=20)
    array(folder / "x_1.npy", rows=3, dims=(5,))
    assert message(DataError, shard, SOURCE, tmp_path / "out", image_embeddings=folder) == (
        f"{folder}/x_1.npy: holds float32 rows of [5], and {folder}/x_0.npy holds float32 rows of [4]. All must be "
        "equal."
    )


def test_text_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array("x.npy")
    assert shard(SOURCE, "out", image_embeddings="x.npy").folder == Path("out")
