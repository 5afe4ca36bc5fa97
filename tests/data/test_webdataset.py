"""Shards as a source: the webdataset library's samples, in an order that nothing but the config decides."""

import gc
import http.server
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import tarfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eclosion.config.schema import DataConfig
from eclosion.data.ledger import Ledger
from eclosion.data.loader import Loader
from eclosion.data.pipes import pipes_allowed
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import BadSample, ConfigError, DataError

SIZE = 8
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
IMAGES = ("bmp", "gif", "jpeg", "jpg", "png", "webp")


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory):
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ECLOSION_CACHE", str(folder))
        yield folder


# ------------------------------------------------------------------------------------------------------- making shards


def picture(number, kind="PNG", size=SIZE):
    """An image file whose colour is its number, below 65536."""
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = number % 256, number // 256, 77
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def npy(values, dtype="f4"):
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype))
    return file.getvalue()


def write_tar(path, members, form="ustar"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def key(shard, row):
    return f"{shard:05d}{row:04d}"


def members(shard, row, first=0):
    """The members of a sample: a picture of its number, its key as caption, the shard as class."""
    return {
        "png": picture(first + row),
        "txt": key(shard, row).encode(),
        "cls": b"%d" % shard,
    }


def write(folder, sizes, change=None):
    """Shards of so many samples. `change(shard, row, members)` may change what a sample holds."""
    first = 0
    for shard, size in enumerate(sizes):
        content = []
        for row in range(size):
            found = members(shard, row, first)
            if change:
                change(shard, row, found)
            content += [(f"{key(shard, row)}.{suffix}", data) for suffix, data in found.items()]
        write_tar(folder / f"{shard:05d}.tar", content)
        first += size
    return folder


def embedding(shard, row):
    """Numbers that say to whom they belong, and fit into half precision."""
    return [shard + 1.0, row + 1.0]


def write_arrays(folder, sizes, *, name="img_emb_{:04d}.npy", dtype="f4", tokens=None):
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        rows = np.array([embedding(shard, row) for row in range(size)], dtype).reshape(size, 2)
        if tokens:
            rows = np.stack([rows * (token + 1) for token in range(tokens)], axis=1)
        np.save(folder / name.format(shard), rows)
    return folder


# ------------------------------------------------------------------------------------------------------ reading shards


def source(folder, **options):
    given = {"webdataset_base_url": str(folder / "{}.tar"), "shard_width": 5} | options
    return WebDatasetSource(**given)


def config(shards, **options):
    given = {"image_size": SIZE, "resize": "none", "num_threads": 0, "shuffle": False, "cache_gb": 0.0} | options
    return DataConfig(source=shards, **given)


def all_of(samples):
    return [samples.read(i) for i in range(len(samples))]


def assert_equal_samples(some, others):
    """That both hold the same samples by index, down to their names and embeddings."""
    assert some.keys() == others.keys()
    for index, one in some.items():
        other = others[index]
        assert (one.image, one.name, one.caption, one.label) == (other.image, other.name, other.caption, other.label)
        assert {name: array.tolist() for name, array in one.arrays.items()} == {
            name: array.tolist() for name, array in other.arrays.items()
        }


def loader(samples, options, **more):
    return Loader(samples, options, **({"seed": 0, "batch_size": 8} | more))


def first_steps(made, num_steps, start=0):
    with closing(made.steps(start)) as steps:
        return [batch for step in islice(steps, num_steps) for batch in step]


def delivered(batches):
    """(position, caption, number in the picture, class, arrays) of what has weight 1, in order."""
    found = []
    for batch in batches:
        pixels = ((batch["image"][:, :, 0, 0] + 1) * 127.5).round().long()
        for row, position in enumerate(batch.positions):
            if batch.weight[row]:
                number = int(pixels[row, 0] + 256 * pixels[row, 1])
                arrays = {k: v[row].tolist() for k, v in batch.fields.items() if k.startswith(("image_e", "text_e"))}
                label = int(batch["label"][row]) if "label" in batch else None
                found.append((position, batch["caption"][row], number, label, arrays))
    return found


def one_epoch(shards, **options):
    """What one epoch in file order delivers and skips."""
    with closing(shards.open()) as samples:
        batches = first_steps(
            loader(samples, config(shards, max_bad_fraction=1.0, **options), batch_size=len(samples)), 1
        )
        return delivered(batches), [skip for batch in batches for skip in batch.skipped], samples.left_out


def refusal(kind, call, *args, **options):
    """The one line that a call is refused with."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- the samples of the webdataset library


# The library leaves the files that it read open.
leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def library(*paths):
    """What the webdataset library reads: the bytes of each member by suffix."""
    found = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
    samples = [dict(sample) for sample in found]
    gc.collect()
    return samples


def check_against_library(samples, paths, *, with_arrays):
    """Every sample that has an image, member by member."""
    theirs = [sample for sample in library(*paths) if any(suffix in sample for suffix in IMAGES)]
    assert len(samples) == len(theirs)
    alone = all_of(samples)
    assert_equal_samples(samples.read_together(range(len(alone))), dict(enumerate(alone)))
    for ours, raw in zip(alone, theirs, strict=True):
        assert ours.image == next(raw[suffix] for suffix in raw if suffix in IMAGES)
        assert ours.caption == raw.get("txt", b"").decode().strip()
        assert ours.label == int(raw["cls"])
        assert f"{raw['__key__']}." in ours.name
        if with_arrays:
            image = np.load(io.BytesIO(raw["img_emb.npy"] if "img_emb.npy" in raw else raw["npy"]))
            np.testing.assert_array_equal(ours.arrays["image_embed"], image.astype(np.float32))
            text = np.load(io.BytesIO(raw["text_emb.npy"]))
            np.testing.assert_array_equal(ours.arrays["text_encodings"], text.astype(np.float32))


def rich_samples(num, long_names):
    """Samples with members of every kind, and some that are nobody's business."""
    rng, found = np.random.default_rng(0), []
    for i in range(num):
        suffix = ["jpg", "JPG", "Jpeg", "png", "PNG", "webp", "gif", "bmp"][i % 8]
        kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(suffix.lower(), suffix.upper())
        name = f"some/folder.v1/{'k' * (110 if long_names else 3)}{i:04d}"
        parts = {
            suffix: picture(i, kind),
            ["txt", "TXT"][i % 2]: f"  caption {i}, é\n".encode(),
            "cls": b" %d\n" % (i % 5),
            "json": json.dumps({"caption": f"json {i}", "width": 3}).encode(),
            ["npy", "img_emb.npy"][i % 2]: npy(rng.normal(size=5), "f2"),
            "text_emb.npy": npy(rng.normal(size=(3, 4)), "f8"),
            "seg.png": b"a mask",
            "pyd": b"cos\nsystem\n(S'false'\ntR.",
        }
        if i % 7 == 3:
            del parts["txt" if i % 2 == 0 else "TXT"]
        found.append((name, parts))
    return found


@leaves_files_open
@pytest.mark.parametrize("form", FORMATS)
def test_samples_are_those_of_the_webdataset_library(form, tmp_path):
    for shard in range(3):
        names = rich_samples(16, long_names=form != "ustar")
        content = [(f"{name}{shard}.{suffix}", data) for name, parts in names for suffix, data in parts.items()]
        write_tar(tmp_path / f"{shard:05d}.tar", content, form)
    samples = source(tmp_path, labels=True).open()
    check_against_library(samples, sorted(tmp_path.glob("*.tar")), with_arrays=True)
    assert samples.class_names == ("0", "1", "2", "3", "4")
    assert samples.left_out == [{}, {}, {}]


@leaves_files_open
def test_shards_that_the_library_writes_itself_are_read_as_it_reads_them(tmp_path):
    writer = webdataset.ShardWriter(f"{tmp_path}/%06d.tar", maxcount=5, verbose=0)
    rng = np.random.default_rng(1)
    for i in range(13):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        given = {"__key__": f"{i:09d}", "png": pixels, "txt": f"number {i}", "cls": i}
        writer.write(given | {"npy": rng.normal(size=3).astype("f4"), "text_emb.npy": rng.normal(size=(2, 3))})
    writer.close()
    paths = sorted(tmp_path.glob("*.tar"))
    assert len(paths) == 3
    samples = WebDatasetSource(webdataset_base_url=str(tmp_path / "{}.tar"), labels=True).open()
    check_against_library(samples, paths, with_arrays=True)


@leaves_files_open
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_shards_of_the_tar_command_are_read_as_the_library_reads_them(form, tmp_path):
    if not shutil.which("tar"):
        pytest.skip("no tar command")
    root = tmp_path / "files"
    for name, parts in rich_samples(9, long_names=form != "ustar"):
        for suffix, data in parts.items():
            path = root / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    path = tmp_path / "00000.tar"
    subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", root, "."], check=True)
    check_against_library(source(tmp_path, labels=True).open(), [path], with_arrays=True)


def test_captions_may_stand_in_json(tmp_path):
    content = [("a.jpg", picture(1, "JPEG")), ("a.txt", b"text"), ("a.json", b'{"caption": " of json\\n", "x": [1]}')]
    write_tar(tmp_path / "00000.tar", content)
    assert [s.caption for s in all_of(source(tmp_path, caption_key="caption").open())] == ["of json"]
    assert [s.caption for s in all_of(source(tmp_path).open())] == ["text"]
    off = source(tmp_path, captions="off").open()
    assert [s.caption for s in all_of(off)] == [None]
    assert not off.has_captions


def test_a_sample_without_caption_is_delivered_unless_captions_are_required(tmp_path):
    def change(shard, row, parts):
        if row == 1:
            del parts["txt"]

    write(tmp_path, [3], change)
    assert [s.caption for s in all_of(source(tmp_path).open())] == [key(0, 0), "", key(0, 2)]
    needed = source(tmp_path, captions="required").open()
    assert [s.caption for s in all_of(needed)] == [key(0, 0), key(0, 2)]
    assert needed.left_out == [{"no_caption": 1}]
    said = refusal(DataError, loader, needed, config(source(tmp_path)))
    assert "00000.tar: 1 no_caption" in said


@pytest.mark.parametrize("content", [b"{}", b'{"caption": null}', b'{"caption": ""}'])
def test_a_caption_that_json_leaves_empty_is_an_empty_caption(content, tmp_path):
    """As a sample without .txt has one: captions are optional."""
    write_tar(tmp_path / "00000.tar", [("0.png", picture(1)), ("0.json", content)])
    (sample,) = all_of(source(tmp_path, caption_key="caption").open())
    assert sample.caption == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.txt", b"\xff\xfe"),
        ("0.txt", b"x" * 1_048_577),
        ("0.json", b"[1, 2]"),
        ("0.json", b'{"caption": 5}'),
        ("0.json", b'{"caption": "x"'),
        ("0.json", b"[" * 100_000),
        ("0.json", b"1" * 5000),
        ("0.json", b'{"caption": "\xff"}'),
    ],
    ids=lambda value: str(value[:12]),
)
def test_a_caption_that_cannot_be_read_is_a_bad_sample_with_its_member_and_offset(name, content, tmp_path):
    write_tar(tmp_path / "00000.tar", [("0.png", picture(1)), (name, content)])
    samples = source(tmp_path, caption_key="caption" if name == "0.json" else None).open()
    began = time.process_time()
    said = refusal(BadSample, samples.read, 0)
    assert time.process_time() - began < 2
    assert f"{tmp_path}/00000.tar: {name} at byte {512 + 1024 * (len(picture(1)) // 512 + 1) // 2 + 512}" in said or (
        f"{tmp_path}/00000.tar: {name} at byte " in said
    )
    assert len(said) < 400


class Evil:
    """What a pickle of it would do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(tmp_path):
    import pickle

    touched = tmp_path / "touched"
    pickled = pickle.dumps(Evil(touched))
    objects = io.BytesIO()
    np.save(objects, np.array([Evil(touched)], object), allow_pickle=True)
    suffixes = ("pyd", "pkl", "pickle", "pth", "pt", "npz", "cbor", "mp", "ten")
    content = [("0.png", picture(0)), ("0.txt", b"x"), *((f"0.{suffix}", pickled) for suffix in suffixes)]
    write_tar(tmp_path / "00000.tar", content)
    assert len(all_of(source(tmp_path).open())) == 1
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    (arrays / "emb_0.npy").write_bytes(objects.getvalue())
    refusal(
        DataError, lambda: loader(source(tmp_path, img_embeddings_url=str(arrays)).open(), config(source(tmp_path)))
    )
    for suffix in ("npy", "img_emb.npy", "text_emb.npy"):
        write_tar(tmp_path / "00000.tar", [("0.png", picture(0)), (f"0.{suffix}", objects.getvalue())])
        refusal(DataError, lambda: all_of(source(tmp_path).open()))
    assert not touched.exists()


def test_one_huge_class_costs_no_memory(tmp_path):
    """A class is a number below 2**31; the names of all classes below it need not exist."""
    code = (
        "import resource; from eclosion.data.webdataset import WebDatasetSource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))\n"
        f"s = WebDatasetSource(webdataset_base_url={str(tmp_path / '00000.tar')!r}, labels=True)\n"
        "from eclosion.errors import UserError\n"
        "try:\n    s.open()\nexcept UserError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    write_tar(tmp_path / "00000.tar", [("0.png", picture(1)), ("0.cls", b"2147483647")])
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-300:]
    assert int(done.stdout.split()[-1]) < 1.5e6  # KiB


# ------------------------------------------------------------------------------------------ positions and their samples


SIZES = [5, 0, 7, 1, 6, 4, 3, 8]
NUM = sum(SIZES)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return write(folder, SIZES)


@lru_cache
def from_the_start(folder, order, seed):
    """What one process without threads delivers from position 0 on."""
    options = config(source(folder), **dict(order))
    batches = first_steps(loader(source(folder, labels=True).open(), options, seed=seed, batch_size=10), 36)
    found = delivered(batches)
    assert [position for position, *_ in found] == list(range(360))
    for _, caption, number, label, _ in found:
        shard, row = int(caption[:5]), int(caption[5:])
        assert label == shard
        assert number == sum(SIZES[:shard]) + row
    return found


ORDERS = st.one_of(
    st.builds(lambda window: (("shuffle", True), ("shuffle_window", window)), st.sampled_from([1, 2, 3, 16])),
    st.just((("shuffle", False),)),
    st.builds(lambda n: (("resample", True), ("epoch_samples", n)), st.sampled_from([1, 17, 34, 60])),
)


@settings(max_examples=30, deadline=None)
@given(
    order=ORDERS,
    seed=st.sampled_from([0, 5]),
    start=st.integers(0, 200),
    world_size=st.sampled_from([1, 2, 4]),
    num_threads=st.integers(0, 4),
    micro=st.sampled_from([1, 3, None]),
    cache_gb=st.sampled_from([0.0, 1.0]),
)
def test_from_any_position_the_sequence_is_the_tail_of_the_whole(
    shards, order, seed, start, world_size, num_threads, micro, cache_gb
):
    wanted = from_the_start(shards, order, seed)
    options = config(source(shards), num_threads=num_threads, cache_gb=cache_gb, **dict(order))
    num_steps, batch_size = 4, 6 * world_size
    ranks = []
    for rank in range(world_size):
        with closing(source(shards, labels=True).open()) as samples:
            made = loader(
                samples,
                options,
                seed=seed,
                batch_size=batch_size,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
            )
            with closing(made.steps(start)) as steps:
                ranks.append([delivered(step) for step in islice(steps, num_steps)])
    found = [sample for step in range(num_steps) for rank in ranks for sample in rank[step]]
    assert found == wanted[start : start + num_steps * batch_size]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
def test_a_shuffled_epoch_has_every_sample_once_and_its_own_order(shards, window):
    order = (("shuffle", True), ("shuffle_window", window))
    captions = [caption for _, caption, *_ in from_the_start(shards, order, 0)]
    epochs = [captions[i * NUM : (i + 1) * NUM] for i in range(10)]
    everything = sorted(key(shard, row) for shard, size in enumerate(SIZES) for row in range(size))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 10
    assert len({tuple(epoch) for epoch in epochs}) == 10
    for epoch in epochs:  # no more than a window of shards is in use at a time
        last = {shard: max(i for i, c in enumerate(epoch) if c.startswith(shard)) for shard in {c[:5] for c in epoch}}
        first = {shard: min(i for i, c in enumerate(epoch) if c.startswith(shard)) for shard in last}
        in_use = [sum(first[s] <= i <= last[s] for s in last) for i in range(NUM)]
        assert max(in_use) <= window


def test_samples_of_a_window_are_mixed_and_not_shards_alone(shards):
    captions = [c for _, c, *_ in from_the_start(shards, (("shuffle", True), ("shuffle_window", 8)), 0)[:NUM]]
    changes = sum(a[:5] != b[:5] for a, b in pairwise(captions))
    assert changes > 2 * len(SIZES)  # in the order of shards there are 6


def test_without_shuffle_the_order_is_that_of_the_files(shards):
    captions = [c for _, c, *_ in from_the_start(shards, (("shuffle", False),), 0)]
    in_files = [key(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    assert captions == (in_files * 11)[:360]


def test_resampling_reads_whole_shards_drawn_again_and_again(shards):
    found = from_the_start(shards, (("resample", True), ("epoch_samples", 60)), 0)
    drawn = Counter()
    for epoch in range(6):
        captions = [c for _, c, *_ in found[epoch * 60 : (epoch + 1) * 60]]
        starts = [i for i, c in enumerate(captions) if c.endswith("0000")] + [60]
        assert starts[0] == 0
        for begin, end in pairwise(starts):
            shard = int(captions[begin][:5])
            whole = [key(shard, row) for row in range(SIZES[shard])]
            assert captions[begin:end] == whole[: end - begin]
            assert end - begin == len(whole) or end == 60
            drawn[shard] += 1
    assert set(drawn) == {shard for shard, size in enumerate(SIZES) if size}
    assert len(set(drawn.values())) > 1
    other = from_the_start(shards, (("resample", True), ("epoch_samples", 60)), 5)
    assert [c for _, c, *_ in other] != [c for _, c, *_ in found]


def test_all_processes_have_the_same_number_of_steps_whatever_is_skipped(tmp_path):
    """Bad samples all lie in the part of one process; its batches are as many and as long."""

    def change(shard, row, parts):
        if shard == 1:
            parts["png"] = b"broken"

    write(tmp_path, [4, 4], change)
    options = config(source(tmp_path), max_bad_fraction=1.0)
    ranks = [first_steps(loader(source(tmp_path).open(), options, rank=rank, world_size=2), 5) for rank in range(2)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[4] * 5, [4] * 5]
    assert [sum(len(batch.skipped) for batch in rank) for rank in ranks] == [0, 20]


# --------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("name", ["img_emb_{:04d}.npy", "a_b_{}.npy", "x_{:09d}.npy"])
def test_every_sample_has_exactly_its_own_row(name, dtype, tmp_path):
    sizes = [4, 2, 5]
    write(tmp_path, sizes)
    arrays = write_arrays(tmp_path / "image", sizes, name=name, dtype=dtype)
    texts = write_arrays(tmp_path / "text", sizes, name=name, dtype=dtype, tokens=3)
    shards = source(tmp_path, img_embeddings_url=str(arrays), text_embeddings_url=str(texts))
    samples = shards.open()
    batches = first_steps(loader(samples, config(shards, shuffle=True, num_threads=2), batch_size=11), 3)
    found = delivered(batches)
    assert len(found) == 33
    for _, caption, _, _, got in found:
        own = embedding(int(caption[:5]), int(caption[5:]))
        assert got["image_embed"] == own
        assert got["text_encodings"] == [[v * (token + 1) for v in own] for token in range(3)]
    assert {batch["image_embed"].dtype for batch in batches} == {torch.float32}
    assert samples.array_shapes == {"image_embed": (2,), "text_encodings": (3, 2)}


def test_the_row_is_in_the_key_and_not_the_place_in_the_tar(tmp_path):
    """Samples may be missing in a tar, and stand in any order; its number is in the tar's name alone."""
    rows = [7, 2, 0, 9]
    content = [(f"other/9999{row:03d}.{suffix}", data) for row in rows for suffix, data in members(0, row).items()]
    write_tar(tmp_path / "laion-00104.tar", content)
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "e_104.npy", np.array([embedding(104, row) for row in range(10)]))
    np.save(tmp_path / "emb" / "e_9999.npy", np.full((10, 2), 5.0))
    for url in ("laion-00104.tar", "laion-{}.tar", "laion-{00104..00104}.tar"):
        shards = source(
            tmp_path,
            webdataset_base_url=str(tmp_path / url),
            start_shard=104,
            img_embeddings_url=str(tmp_path / "emb"),
            index_width=3,
        )
        assert [s.arrays["image_embed"].tolist() for s in all_of(shards.open())] == [embedding(104, r) for r in rows]


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "a dead link":
        path.unlink()
        path.symlink_to(path.with_name("nowhere"))
    elif how in CHANGED:
        np.save(path, CHANGED[how](np.load(path)))
    else:
        path.write_bytes(BYTES[how](data))


CHANGED = {
    "other dims": lambda a: np.ones((len(a), 3), "f4"),
    "one dimension": lambda a: a[:, 0].copy(),
    "three dimensions": lambda a: a[:, None, :].copy(),
    "whole numbers": lambda a: a.astype("i4"),
    "complex": lambda a: a.astype("c8"),
    "columns first": lambda a: np.asfortranarray(np.tile(a, (1, 1))),
    "no rows": lambda a: a[:0],
}
BYTES = {
    "truncated": lambda data: data[:-3],
    "too long": lambda data: data + b"\0",
    "cut in the header": lambda data: data[:50],
    "empty": lambda data: b"",
    "no magic": lambda data: b"XX" + data[2:],
    "garbage header": lambda data: data[:10] + bytes(random.Random(0).randbytes(118)) + data[128:],
    "a million rows": lambda data: (
        data.replace(b"(4, 2), }", b"(10**6,2)") if b"(4, 2)" in data else data.replace(b"(", b"(9")
    ),
    "compressed": lambda data: b"\x1f\x8b" + data,
}
DAMAGES = ["missing", "a folder", "a pipe", "a dead link", *CHANGED, *BYTES]


def own_only(found):
    """Every delivered sample has its own row."""
    for _, caption, _, _, got in found:
        assert got["image_embed"] == embedding(int(caption[:5]), int(caption[5:]))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("shard", [0, 2])
def test_an_array_that_cannot_be_used_costs_exactly_its_own_shard(shard, how, tmp_path):
    if shard == 0 and how in {"other dims", "no rows"}:
        pytest.skip("nobody knows which of two dims is right; and the first shard of a split must pair up")
    sizes = [4, 2, 4, 3]
    write(tmp_path, sizes)
    arrays = write_arrays(tmp_path / "image", sizes)
    damage(arrays / f"img_emb_{shard:04d}.npy", how)
    shards = source(tmp_path, img_embeddings_url=str(arrays))
    found, skipped, left_out = one_epoch(shards, num_threads=2)
    own_only(found)
    assert Counter(int(caption[:5]) for _, caption, *_ in found) == {s: n for s, n in enumerate(sizes) if s != shard}
    counts = Counter(skip.reason for skip in skipped) + sum((Counter(reasons) for reasons in left_out), Counter())
    if how == "no rows":  # as beyond the end of any other array
        assert counts in ({"no_embedding": 4}, {"embedding_shard": 4})
        return
    assert counts == {"embedding_shard": 4}
    said = refusal(DataError, lambda: first_steps(loader(shards.open(), config(shards), batch_size=13), 1))
    assert (f"{shard:05d}.tar" if how in {"missing", "a dead link"} else f"img_emb_{shard:04d}.npy") in said


def test_a_shard_whose_array_is_bad_is_skipped_within_the_budget_and_stops_without_one(tmp_path):
    sizes = [4, 4, 2]
    write(tmp_path, sizes)
    arrays = write_arrays(tmp_path / "image", sizes)
    damage(arrays / "img_emb_0001.npy", "truncated")
    shards = source(tmp_path, img_embeddings_url=str(arrays))
    for fraction, passes in ((0.0, False), (0.39, False), (0.4, True)):
        made = partial(loader, shards.open(), config(shards, max_bad_fraction=fraction), batch_size=6)
        if passes:
            own_only(delivered(first_steps(made(), 3)))
        else:
            said = refusal(DataError, lambda made=made: first_steps(made(), 3))
            assert "00001.tar" in said
            assert f"max_bad_fraction={fraction:g}" in said


def test_strays_in_a_folder_of_arrays_are_left_alone(tmp_path):
    sizes = [3, 3]
    write(tmp_path, sizes)
    arrays = write_arrays(tmp_path / "image", sizes)
    for name in ("README.md", "notes.npy", "img_emb_x.npy", "metadata_0.parquet", "img_emb_0.json", ".DS_Store"):
        (arrays / name).write_bytes(b"not an array")
    (arrays / "img_emb_0099.npy").write_bytes(b"of a shard that is not there")
    (arrays / "text_emb").mkdir()
    found, skipped, _ = one_epoch(source(tmp_path, img_embeddings_url=str(arrays)))
    own_only(found)
    assert (len(found), skipped) == (6, [])


def test_two_shards_with_one_number_do_not_share_an_array(tmp_path):
    """Their arrays would be told apart by nothing."""
    write(tmp_path / "a", [3])
    write(tmp_path / "b", [3])
    arrays = write_arrays(tmp_path / "image", [3])
    url = str(tmp_path / "{a,b}" / "{}.tar")
    assert len(source(tmp_path, webdataset_base_url=url).open()) == 6
    said = refusal(
        (ConfigError, DataError),
        lambda: source(tmp_path, webdataset_base_url=url, img_embeddings_url=str(arrays)).open(),
    )
    assert "00000.tar" in said or "shard 0" in said


def zero_rows(arrays, *where):
    for shard, row in where:
        path = arrays / f"img_emb_{shard:04d}.npy"
        values = np.load(path)
        values[row] = 0
        np.save(path, values)


def test_rows_of_zeros_or_out_of_range_are_skipped_and_never_too_many(tmp_path):
    sizes = [4, 3, 5]
    write(tmp_path, sizes)
    arrays = write_arrays(tmp_path / "image", [4, 2, 5])  # the second has a row too few
    zero_rows(arrays, (0, 1), (2, 0), (2, 4))
    shards = source(tmp_path, img_embeddings_url=str(arrays))
    samples = shards.open()
    made = loader(samples, config(shards, shuffle=True), batch_size=len(samples))
    ledger = Ledger(None, made.order.num_samples, shards=made.shards)
    batches = first_steps(made, 2)
    own_only(delivered(batches))
    for step, batch in enumerate(batches):
        here = range(step * len(samples), (step + 1) * len(samples))
        lost = [skip for skip in batch.skipped if skip.reason == "no_embedding"]
        assert batch.skipped == lost
        ledger.record(here, batch.skipped)
    left_out = sum((Counter(reasons) for reasons in samples.left_out), Counter())
    assert len(delivered(batches)) == 2 * (12 - 4)
    assert len(batches[0].skipped) + left_out["no_embedding"] == 4
    assert set(left_out) <= {"no_embedding"}


def test_a_row_that_is_no_number_is_skipped_as_bad(tmp_path):
    write(tmp_path, [3])
    arrays = write_arrays(tmp_path / "image", [3])
    values = np.load(arrays / "img_emb_0000.npy")
    values[1, 0] = np.nan
    np.save(arrays / "img_emb_0000.npy", values)
    shards = source(tmp_path, img_embeddings_url=str(arrays))
    found, (skip,), _ = one_epoch(shards)
    own_only(found)
    assert (len(found), skip.reason) == (2, "not_finite")
    assert "row 1" in refusal(DataError, lambda: first_steps(loader(shards.open(), config(shards)), 1))


@pytest.mark.parametrize("width", [1, 2])
def test_a_width_that_gives_two_samples_one_row_is_refused(width, tmp_path):
    """With too few digits, the eleventh sample would have the row of the first."""
    size = 12 if width == 1 else 101
    write(tmp_path, [size])
    arrays = write_arrays(tmp_path / "image", [size])
    wrong = source(tmp_path, img_embeddings_url=str(arrays), index_width=width)
    assert "index_width" in refusal((ConfigError, DataError), wrong.open)


def test_a_width_that_reaches_into_the_number_of_the_shard_is_refused(tmp_path):
    sizes = [3, 3]
    write(tmp_path, sizes)
    arrays = write_arrays(tmp_path / "image", sizes)
    options = {"start_shard": 1, "img_embeddings_url": str(arrays)}
    assert len(source(tmp_path, **options, index_width=4).open()) == 3
    said = refusal((ConfigError, DataError), source(tmp_path, **options, index_width=5).open)
    assert "index_width=5" in said


@pytest.mark.parametrize("suffix", ["npy", "img_emb.npy"])
def test_embeddings_in_the_tar_belong_to_their_sample(suffix, tmp_path):
    def change(shard, row, parts):
        parts[suffix] = npy(embedding(shard, row))
        if (shard, row) == (0, 2):
            parts[suffix] = npy([0.0, 0.0])
        if (shard, row) == (1, 1):
            del parts[suffix]

    write(tmp_path, [4, 3], change)
    shards = source(tmp_path)
    samples = shards.open()
    batches = first_steps(loader(samples, config(shards, shuffle=True), batch_size=len(samples)), 1)
    found = delivered(batches)
    own_only(found)
    assert len(found) == 5
    missing = sum((Counter(reasons) for reasons in samples.left_out), Counter())
    assert missing + Counter(skip.reason for skip in batches[0].skipped) == {"no_embedding": 2}


@pytest.mark.parametrize("how", BYTES)
@pytest.mark.parametrize("row", [0, 2])
def test_an_array_in_the_tar_that_is_damaged_costs_exactly_its_sample(row, how, tmp_path):
    def change(shard, r, parts):
        parts["img_emb.npy"] = npy(embedding(shard, r))
        if (shard, r) == (0, row):
            parts["img_emb.npy"] = BYTES[how](parts["img_emb.npy"])

    write(tmp_path, [3, 2], change)
    shards = source(tmp_path)
    found, (skip,), _ = one_epoch(shards)
    own_only(found)
    assert sorted(caption for _, caption, *_ in found) == sorted(
        {key(0, 0), key(0, 1), key(0, 2), key(1, 0), key(1, 1)} - {key(0, row)}
    )
    assert (skip.reason, f"{key(0, row)}.img_emb.npy at byte" in skip.name) == ("embedding", True)
    said = refusal(DataError, lambda: first_steps(loader(shards.open(), config(shards), batch_size=5), 1))
    assert "00000.tar" in said
    assert f"{key(0, row)}.img_emb.npy" in said


def test_an_array_in_the_tar_of_another_shape_is_skipped(tmp_path):
    def change(shard, row, parts):
        parts["npy"] = npy([*embedding(shard, row), 1.0]) if row == 1 else npy(embedding(shard, row))

    write(tmp_path, [3], change)
    found, (skip,), _ = one_epoch(source(tmp_path))
    own_only(found)
    assert (len(found), skip.reason) == (2, "embedding")


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_that_most_samples_have_no_embedding_is_told_at_the_start(where, tmp_path):
    """No budget limits how many are skipped for that: one stray array in a tar, or a short file, and little is left."""

    def change(shard, row, parts):
        if row == 3 and where == "inside":
            parts["npy"] = npy([1.0, 2.0])

    write(tmp_path, [10], change)
    arrays = {"img_embeddings_url": str(write_arrays(tmp_path / "image", [2]))} if where == "beside" else {}
    samples = source(tmp_path, **arrays).open()
    if len(samples) < 10:
        assert any("embedding" in note and "10" in note for note in samples.notes)


# -------------------------------------------------------------------------------------------------------------- ledger


def troubled(folder):
    """Shards with everything that may be wrong, and what must be delivered and skipped of each, by hand."""
    sizes = [6, 5, 4, 5, 6]

    def change(shard, row, parts):
        if shard == 0 and row in (1, 4):
            del parts["png"]
        if (shard, row) == (1, 2):
            parts["png"] = parts["png"][:-28]
        if (shard, row) == (1, 3):
            parts["png"] = b"no image"
        if (shard, row) == (3, 0):
            parts["txt"] = b"\xff"

    write(folder, sizes, change)
    arrays = write_arrays(folder / "image", [6, 5, 4, 4, 6])  # the fourth has a row too few
    zero_rows(arrays, (0, 5))
    damage(arrays / "img_emb_0002.npy", "truncated")
    path = folder / "00004.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmember(f"{key(4, 4)}.txt").offset_data + 2
    path.write_bytes(path.read_bytes()[:cut])
    truth = {
        0: (3, {"no_image": 2, "no_embedding": 1}),
        1: (3, {"truncated": 1, "not_an_image": 1}),
        2: (0, {"embedding_shard": 4}),
        3: (3, {"caption": 1, "no_embedding": 1}),
        4: (4, {"damaged_shard": 1}),
    }
    return source(folder, img_embeddings_url=str(arrays)), truth


def record(made, ledger, num_steps, batch_size):
    """Run, and keep an account of our own: delivered by shard, and skipped by shard and reason, of each epoch."""
    own = {}
    with closing(made.steps(0)) as steps:
        for number, step in enumerate(islice(steps, num_steps)):
            for batch in step:
                lost = {skip.position: skip for skip in batch.skipped}
                for row, position in enumerate(batch.positions):
                    epoch = own.setdefault(position // made.order.num_samples, (Counter(), {}))
                    if position in lost:
                        name = lost[position].name
                        shard = (
                            int(name.partition(".tar")[0][-5:])
                            if ".tar" in name
                            else int(name.partition(".npy")[0][-4:])
                        )
                        epoch[1].setdefault(shard, Counter())[lost[position].reason] += 1
                    else:
                        assert batch.weight[row] == 1
                        epoch[0][int(batch["caption"][row][:5])] += 1
            skipped = [skip for batch in step for skip in batch.skipped]
            ledger.record(range(number * batch_size, (number + 1) * batch_size), skipped)
    return own


@pytest.mark.parametrize("order", [{"shuffle": True, "shuffle_window": 2}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_sample_of_every_shard_is_in_the_ledger(order, batch_size, tmp_path):
    shards, truth = troubled(tmp_path / "shards")
    made = loader(shards.open(), config(shards, max_bad_fraction=1.0, **order), batch_size=batch_size)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, made.order.num_samples, max_bad_fraction=1.0, shards=made.shards)
    own = record(made, ledger, -(-3 * made.order.num_samples // batch_size), batch_size)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines[:3]] == [0, 1, 2]
    for line in lines[:3]:
        found = {int(Path(name).stem): (s["delivered"], s["skipped"]) for name, s in line["shards"].items()}
        assert found == truth
        assert line["delivered"] == sum(count for count, _ in truth.values())
        assert line["skipped"] == dict(sum((Counter(reasons) for _, reasons in truth.values()), Counter()))
        # 6 + 5 + 4 + 5 written; of the last shard four are whole, and what was cut off counts as one
        assert line["index_count"] == line["delivered"] + sum(line["skipped"].values()) == 6 + 5 + 4 + 5 + 4 + 1
        assert own[line["epoch"]][0] == Counter({shard: count for shard, (count, _) in truth.items() if count})


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_resampled_epoch_adds_up_by_shard_too(batch_size, tmp_path):
    shards, _ = troubled(tmp_path / "shards")
    options = config(shards, max_bad_fraction=1.0, resample=True, epoch_samples=50)
    made = loader(shards.open(), options, batch_size=batch_size)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, made.order.num_samples, max_bad_fraction=1.0, shards=made.shards)
    own = record(made, ledger, -(-3 * 50 // batch_size), batch_size)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:3]:
        delivered_here, skipped_here = own[line["epoch"]]
        found = {int(Path(name).stem): s for name, s in line["shards"].items()}
        assert {shard: s["delivered"] for shard, s in found.items() if s["delivered"]} == dict(delivered_here)
        assert {shard: Counter(s["skipped"]) for shard, s in found.items() if s["skipped"]} == skipped_here
        assert line["index_count"] == line["delivered"] + sum(line["skipped"].values()) == 50
    assert {tuple(sorted(line["shards"].items(), key=str).__repr__()) for line in lines[:3]}


def test_the_budget_is_for_all_that_is_bad_together(tmp_path):
    """Two of ten without an image, seen by the index, and one that is broken, seen when it is read."""

    def change(shard, row, parts):
        if row < 2:
            del parts["png"]
        if row == 5:
            parts["png"] = b"no image"

    write(tmp_path, [10], change)
    shards = source(tmp_path)
    for fraction, passes in ((0.3, True), (0.2, False), (0.1, False)):
        options = config(shards, max_bad_fraction=fraction)
        if passes:
            assert len(delivered(first_steps(loader(shards.open(), options), 1))) == 7
        else:
            refusal(DataError, lambda options=options: first_steps(loader(shards.open(), options), 1))


# -------------------------------------------------------------------------------------------------- several at a time


def uneven(shard, row, found):
    """Samples among which some lack something, some are damaged, and some are large."""
    if row % 5 == 1:
        del found["txt"]
    if row % 5 == 2:
        found["txt"] = b"\xff"
    if row == 3:
        found["png"] = random.Random(shard).randbytes(70_000)
    found["img_emb.npy"] = npy(embedding(shard, row)) if row != 6 else b"no array"
    found["seg.png"] = bytes(10_000 * (row % 3))


@pytest.mark.parametrize("wanted", [range(30), [17, 3, 25, 4, 4, 0, 29], [8]], ids=["all", "scattered", "one"])
def test_what_is_read_together_is_what_is_read_alone(wanted, tmp_path):
    write(tmp_path, [10, 12, 8], uneven)
    with closing(source(tmp_path, labels=True).open()) as samples:
        alone = {}
        for index in wanted:
            try:
                alone[index] = samples.read(index)
            except BadSample:
                continue
        large = {index for index, sample in alone.items() if len(sample.image) > 2**16}
        assert_equal_samples(samples.read_together(wanted), {i: s for i, s in alone.items() if i not in large})
    assert 0 < len(alone) <= len(set(wanted))


def test_neighbours_are_read_with_one_look_at_the_disk(tmp_path, monkeypatch):
    write(tmp_path, [20])
    looks, real = [], os.pread
    with closing(source(tmp_path).open()) as samples:
        samples.read(0)
        monkeypatch.setattr("os.pread", lambda *args: (looks.append(args[1:]), real(*args))[1])
        assert len(samples.read_together(range(3, 19))) == 16
        assert len(looks) == 1
        assert len(samples.read_together([0, 9, 19])) == 3
    assert sum(size for size, _ in looks) <= (tmp_path / "00000.tar").stat().st_size + looks[0][0]


@pytest.mark.parametrize("change", ["touched", "cut"])
def test_nothing_is_read_together_of_a_shard_that_changed(change, tmp_path):
    write(tmp_path, [4, 4])
    with closing(source(tmp_path).open()) as samples:
        assert not samples.read_together(range(8))  # nothing is opened for it
        samples.read(0)
        assert list(samples.read_together(range(8))) == [0, 1, 2, 3]
        samples.read(4)
        assert len(samples.read_together(range(8))) == 8
        path = tmp_path / "00000.tar"
        if change == "cut":
            os.truncate(path, 3000)
        os.utime(path, ns=(1, 1))
        assert list(samples.read_together(range(8))) == [4, 5, 6, 7]
        with pytest.raises(BadSample, match="has changed since it was indexed"):
            samples.read(0)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("order", [{"shuffle": True, "shuffle_window": 2}, {"shuffle": False}], ids=str)
def test_batches_do_not_depend_on_the_library_that_decodes_jpeg(order, num_threads, tmp_path, monkeypatch):
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)

    def photo(shard, row, found):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (40, 40 + 8 * (row % 3), 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", progressive=row % 4 == 0)
        del found["png"]
        found["jpg"] = file.getvalue() if row != 7 else file.getvalue()[:-300]

    shards = source(write(tmp_path, [10, 12, 8], photo))
    runs = []
    for _ in range(2):
        for decode in ("exact", "scaled"):
            options = config(
                shards,
                image_size=16,
                resize="cover",
                decode=decode,
                num_threads=num_threads,
                horizontal_flip=True,
                max_bad_fraction=1.0,
                **order,
            )
            with closing(shards.open()) as samples:
                runs.append(first_steps(loader(samples, options, batch_size=11), 4))
        monkeypatch.setattr("eclosion.data.jpeg.simplejpeg", None)
    same(runs[0], runs[2])
    same(runs[1], runs[3])


# ----------------------------------------------------------------------------------------- shards that change meanwhile


def other_pictures(path):
    """The same tar but for the pixels of its images."""
    size = path.stat().st_size
    content = [(f"{key(0, row)}.{s}", data) for row in range(4) for s, data in members(0, row, 50).items()]
    write_tar(path, content)
    assert path.stat().st_size == size


def other_layout(path):
    """A tar as long, with other samples in it."""
    size = path.stat().st_size
    write_tar(path, [(f"x{i}.txt", b"X" * 40) for i in range(6)] + [("x9.png", picture(9))])
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))


@pytest.mark.parametrize("was_read", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        other_layout,
        other_pictures,
        lambda path: path.write_bytes(path.read_bytes()[:700]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["rewritten", "other pictures", "cut", "emptied"],
)
def test_a_shard_that_changes_after_it_was_indexed_is_an_error_that_names_it(change, was_read, tmp_path):
    write(tmp_path, [4, 4])
    shards = source(tmp_path)
    samples = shards.open()
    if was_read:
        samples.read(0)
    change(tmp_path / "00000.tar")
    said = refusal(DataError, lambda: first_steps(loader(samples, config(shards), batch_size=4), 1))
    assert f"{tmp_path}/00000.tar" in said
    said = said.replace(str(tmp_path), "")
    assert "changed" in said or "shorter" in said
    assert samples.read(4).caption == key(1, 0)


def test_a_shard_that_is_replaced_or_removed_is_an_error_before_it_is_read_and_none_after(tmp_path):
    write(tmp_path, [4, 4])
    shards = source(tmp_path)
    samples = shards.open()
    assert samples.read(0).caption == key(0, 0)
    for number in (0, 1):
        (tmp_path / f"{number:05d}.tar").unlink()
    assert samples.read(3).caption == key(0, 3)  # the open file is still the one that was indexed
    said = refusal(DataError, samples.read, 4)
    assert "00001.tar" in said


def test_what_is_in_memory_needs_no_shard_again(tmp_path, monkeypatch):
    """Whatever else a later epoch does with the images: a mirror, say, is drawn anew."""
    monkeypatch.setattr("eclosion.data.webdataset.MAX_OPEN", 2)
    sizes = [3] * 6
    write(tmp_path, sizes)
    shards = source(tmp_path)
    options = config(shards, shuffle=True, horizontal_flip=True, cache_gb=1.0)
    with closing(shards.open()) as samples, closing(loader(samples, options, batch_size=18).steps(0)) as steps:
        first = delivered(next(steps))
        for path in tmp_path.iterdir():
            path.unlink()
        second = delivered(next(steps))
    assert len(first) == 18
    assert sorted(sample[1:3] for sample in second) == sorted(sample[1:3] for sample in first)


def test_an_index_of_another_shard_is_not_believed(tmp_path):
    write(tmp_path, [4])
    source(tmp_path).open()
    kept = tmp_path / "00000.tar.index"
    other = tmp_path / "other"
    content = [(f"y{i:02d}.{s}", data) for i in range(40) for s, data in reversed(members(1, i, 9).items())]
    write_tar(other / "00000.tar", content)
    shutil.copy(kept, other / "00000.tar.index")
    modified = (tmp_path / "00000.tar").stat().st_mtime_ns
    os.utime(other / "00000.tar", ns=(modified, modified))
    assert [s.caption for s in all_of(source(other).open())] == [key(1, row) for row in range(40)]


# ---------------------------------------------------------------------------------------------------------- far away


@dataclass
class Server:
    """A web server over a folder.

    Attributes:
        url: of the folder.
        asked: method and path of each request, in order.
    """

    url: str
    asked: list[tuple[str, str]] = field(default_factory=list)

    def gets(self):
        return [path.rpartition("/")[2] for method, path in self.asked if method == "GET"]


@pytest.fixture
def serve():
    """`serve(folder)` starts a web server."""
    running = []

    def start(folder):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args, **options):
                super().__init__(*args, directory=str(folder), **options)

            def log_message(self, *args):
                asked.append((self.command, self.path))

        asked = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        return Server(f"http://127.0.0.1:{server.server_port}", asked)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "own-cache"
    monkeypatch.setenv("ECLOSION_CACHE", str(folder))
    return folder


def same(ours, theirs):
    """Whether two runs gave the same batches, bit for bit."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert list(a.positions) == list(b.positions)
        assert a.fields.keys() == b.fields.keys()
        assert torch.equal(a.weight, b.weight)
        for name, value in a.fields.items():
            assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert [(s.position, s.reason) for s in a.skipped] == [(s.position, s.reason) for s in b.skipped]


def remote_set(folder):
    sizes = [5, 7, 4, 6, 3, 8]
    write(folder, sizes)
    arrays = write_arrays(folder / "emb", sizes, name="e_{:05d}.npy")
    zero_rows_of = arrays / "e_00001.npy"
    values = np.load(zero_rows_of)
    values[3] = 0
    np.save(zero_rows_of, values)
    return folder


def gib(num_bytes):
    return num_bytes / 2**30


@pytest.mark.parametrize("order", [{"shuffle": True, "shuffle_window": 2}, {"shuffle": False}], ids=str)
def test_shards_of_a_web_server_give_the_batches_of_the_local_files(order, tmp_path, serve, own_cache):
    folder = remote_set(tmp_path / "data")
    server = serve(folder)
    far = source(
        folder,
        webdataset_base_url=server.url + "/{}.tar",
        end_shard=5,
        img_embeddings_url=server.url + "/emb/e_{}.npy",
        labels=True,
    )
    near = source(folder, img_embeddings_url=str(folder / "emb"), labels=True)
    runs = []
    for shards in (near, far):
        with closing(shards.open()) as samples:
            runs.append(first_steps(loader(samples, config(shards, num_threads=2, **order), batch_size=11), 6))
    same(*runs)
    assert runs[0][0]["image_embed"].any()
    assert max(Counter(server.gets()).values()) == 1  # each file was fetched once
    assert not list(folder.glob("*.partial*"))


@pytest.mark.parametrize("num_shards", [1.2, 3])
@pytest.mark.parametrize("order", [{"shuffle": True, "shuffle_window": 3}, {"shuffle": False}], ids=str)
def test_a_cache_smaller_than_the_data_delivers_all_of_it(num_shards, order, tmp_path, serve, own_cache, monkeypatch):
    monkeypatch.setattr("eclosion.data.webdataset.MAX_OPEN", 2)
    folder = remote_set(tmp_path / "data")
    server = serve(folder)
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    far = source(
        folder,
        webdataset_base_url=server.url + "/{}.tar",
        end_shard=5,
        cache_limit_gb=gib(int(num_shards * largest)),
        img_embeddings_url=server.url + "/emb/e_{}.npy",
    )
    near = source(folder, img_embeddings_url=str(folder / "emb"))
    runs = []
    for shards in (near, far):
        with closing(shards.open()) as samples:
            runs.append(first_steps(loader(samples, config(shards, num_threads=2, **order), batch_size=11), 6))
    same(*runs)
    kept = [path for path in (own_cache / "files").iterdir() if not path.name.startswith(".")]
    assert sum(path.stat().st_size for path in kept) <= num_shards * largest


def test_a_cache_smaller_than_a_shard_says_what_to_raise(tmp_path, serve, own_cache):
    folder = remote_set(tmp_path / "data")
    url = serve(folder).url + "/{}.tar"
    said = refusal(ConfigError, source(folder, webdataset_base_url=url, end_shard=5, cache_limit_gb=1e-6).open)
    assert "data.source.cache_limit_gb" in said


def test_many_threads_index_with_a_cache_that_holds_few_shards(tmp_path, serve, own_cache, monkeypatch):
    """What one thread fetched may be removed for another before it was looked at."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    folder = write(tmp_path / "data", [2] * 7)
    server = serve(folder)
    limit = gib(int(1.2 * (folder / "00000.tar").stat().st_size))
    for _ in range(4):
        shutil.rmtree(own_cache, ignore_errors=True)
        with closing(
            source(folder, webdataset_base_url=server.url + "/{}.tar", end_shard=6, cache_limit_gb=limit).open()
        ) as samples:
            assert len(samples) == 14


def test_shards_are_fetched_ahead_in_the_order_in_which_they_are_needed(tmp_path, serve, own_cache):
    folder = write(tmp_path / "data", [3] * 7)
    server = serve(folder)
    far = source(folder, webdataset_base_url=server.url + "/{}.tar", end_shard=6)
    far.open().close()
    shutil.rmtree(own_cache / "files")  # the indices are kept
    server.asked.clear()
    with closing(far.open()) as samples:
        assert server.gets() == []  # to open needs no shard
        made = loader(samples, config(far, shuffle=True, shuffle_window=1), batch_size=3)
        with closing(made.steps(0)) as steps:
            next(steps)
            deadline = time.monotonic() + 10
            while len(server.gets()) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            early = server.gets()
            batches = [batch for step in islice(steps, 6) for batch in step]
    needed = [f"{caption[:5]}.tar" for _, caption, *_ in delivered(first_steps(made_again(far), 7))][::3]
    assert len(batches) == 6
    # two threads fetch: neighbours may change places
    assert len(early) >= 3
    assert all(abs(needed.index(name) - place) <= 1 for place, name in enumerate(early))
    asked = server.gets()[:7]
    assert sorted(asked) == sorted(set(needed))


def made_again(far):
    return loader(far.open(), config(far, shuffle=True, shuffle_window=1), batch_size=3)


def test_a_window_wider_than_the_data_asks_for_no_more_than_an_epoch_or_two_ahead(shards):
    """Or else each step would draw the orders of a thousand epochs."""
    samples = source(shards).open()
    asked, fetch_ahead = [], samples.fetch_ahead
    samples.fetch_ahead = lambda numbers: (asked.append(len(numbers)), fetch_ahead(numbers))
    first_steps(loader(samples, config(source(shards), shuffle=True, shuffle_window=1000)), 8)
    assert 0 < max(asked) <= 4 * len(SIZES)


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Answers the first requests for each file wrongly, each in another way."""

    protocol_version = "HTTP/1.1"
    ways = ("500", "503", "reset", "short", "good")

    def __init__(self, folder, seen, *args):
        self.seen = seen
        super().__init__(*args, directory=str(folder))

    def log_message(self, *args):
        pass

    def do_GET(self):
        count = self.seen[self.path]
        self.seen[self.path] += 1
        number = int(self.path[-5]) if self.path[-5].isdigit() else 0
        way = self.ways[(number + count) % len(self.ways)] if count < 2 else "good"
        if way in {"500", "503"}:
            self.send_error(int(way))
            return
        if way == "good":
            super().do_GET()
            return
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True
        if way == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_server_that_fails_now_and_then_gives_the_batches_of_the_local_files(tmp_path, own_cache):
    folder = remote_set(tmp_path / "data")
    seen = Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Faulty, folder, seen))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        far = source(
            folder,
            webdataset_base_url=url + "/{}.tar",
            end_shard=5,
            img_embeddings_url=url + "/emb/e_{}.npy",
        )
        near = source(folder, img_embeddings_url=str(folder / "emb"))
        runs = []
        for shards in (near, far):
            with closing(shards.open()) as samples:
                runs.append(first_steps(loader(samples, config(shards, num_threads=2), batch_size=11), 3))
        same(*runs)
        assert max(seen.values()) > 1
    finally:
        server.shutdown()
        server.server_close()


def test_commands_deliver_the_local_files_only_if_they_are_allowed(tmp_path, own_cache):
    folder = remote_set(tmp_path / "data")
    near = source(folder)
    far = source(folder, webdataset_base_url=f"pipe:cat {folder}/{{}}.tar", end_shard=5)
    assert "--allow-pipe" in refusal(ConfigError, far.open)
    runs = []
    with pipes_allowed():
        for shards in (near, far):
            with closing(shards.open()) as samples:
                runs.append(first_steps(loader(samples, config(shards, num_threads=2), batch_size=11), 3))
    same(*runs)


def test_commands_that_look_alike_in_messages_are_different_shards(tmp_path, own_cache):
    """What is secret in a command is not shown; that must not make two shards of equal length one."""
    folder = tmp_path / "data"
    write_tar(folder / "0", [("a.png", picture(1)), ("a.txt", b"of the first")])
    write_tar(folder / "1", [("b.txt", b"of the second, which is longer"), ("b.png", picture(2))])
    assert len({path.stat().st_size for path in folder.iterdir()}) == 1
    program = tmp_path / "give"
    program.write_text(f"#!/bin/sh\nexec cat {folder}/$1\n")
    program.chmod(0o755)
    shards = source(folder, webdataset_base_url=f"pipe:{program} {{}}", shard_width=1, end_shard=1)
    with pipes_allowed():
        for _ in range(2):  # the second time with what was kept
            with closing(shards.open()) as samples:
                made = loader(samples, config(shards), batch_size=2)
                found = delivered(first_steps(made, 1))
                ledger = Ledger(None, 2, shards=made.shards)
                ledger.record(range(4), [])
            assert [(caption, number) for _, caption, number, *_ in found] == [
                ("of the first", 1),
                ("of the second, which is longer", 2),
            ]


def test_a_command_that_gives_something_else_the_second_time_is_an_error_that_names_it(
    tmp_path, own_cache, monkeypatch
):
    """It is run again where the cache holds fewer shards than there are."""
    monkeypatch.setattr("eclosion.data.webdataset.MAX_OPEN", 1)
    folder = write(tmp_path / "data", [4, 4])
    program = tmp_path / "give"
    program.write_text(f"#!/bin/sh\ncd {tmp_path}/later 2>/dev/null || cd {folder}\nexec cat $(basename $1)\n")
    program.chmod(0o755)
    limit = gib(int(1.2 * (folder / "00000.tar").stat().st_size))
    url = f"pipe:{program} {folder}/{{}}.tar --token=abcdef"
    shards = source(folder, webdataset_base_url=url, end_shard=1, cache_limit_gb=limit)
    with pipes_allowed(), closing(shards.open()) as samples:
        write(tmp_path / "later", [3, 3])
        said = refusal(DataError, lambda: first_steps(loader(samples, config(shards)), 3))
    assert said.count(f"pipe:give {folder}/") == 1
    assert "has changed since the run began. The command must give the same bytes each time it is run." in said
    assert "abcdef" not in said


def test_urls_that_differ_in_their_query_are_different_shards(tmp_path, own_cache):
    """A server that is asked for `?shard=0` and `?shard=1`, and says nothing of versions."""
    tars = [
        write_tar(tmp_path / "0", [("a.png", picture(1)), ("a.txt", b"of the first")]).read_bytes(),
        write_tar(tmp_path / "1", [("b.txt", b"of the second, which is longer"), ("b.png", picture(2))]).read_bytes(),
    ]
    assert len({len(tar) for tar in tars}) == 1

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.wfile.write(self.answer())

        def answer(self):
            body = tars[int(self.path[-1])]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Sat, 01 Jan 2022 00:00:00 GMT")  # both were uploaded together
            self.end_headers()
            return body

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/get?shard={{}}"
        shards = source(tmp_path, webdataset_base_url=url, shard_width=1, end_shard=1)
        for _ in range(2):
            with closing(shards.open()) as samples:
                made = loader(samples, config(shards), batch_size=2)
                found = delivered(first_steps(made, 1))
                Ledger(None, 2, shards=made.shards).record(range(4), [])
            assert [(caption, number) for _, caption, number, *_ in found] == [
                ("of the first", 1),
                ("of the second, which is longer", 2),
            ]
    finally:
        server.shutdown()
        server.server_close()


def test_a_store_is_listed_and_gives_the_batches_of_the_local_files(tmp_path, own_cache, monkeypatch):
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # of a server that is gone
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    folder = remote_set(tmp_path / "data")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".tar", ".npy"}:
                client.upload_file(str(path), "bucket", f"data/{path.relative_to(folder)}")
        client.close()
        far = source(folder, webdataset_base_url="s3://bucket/data/{}.tar", img_embeddings_url="s3://bucket/data/emb")
        near = source(folder, img_embeddings_url=str(folder / "emb"))
        runs = []
        for shards in (near, far):  # without end_shard: both are listed
            with closing(shards.open()) as samples:
                runs.append(first_steps(loader(samples, config(shards, num_threads=2, shuffle=True), batch_size=11), 3))
        same(*runs)
    finally:
        server.stop()


# ------------------------------------------------------------------------------------------------------------ mutants


def noise(number):
    """A picture whose every pixel counts, as a PNG: it has checksums."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three shards with all that a sample may have, arrays beside them, and kept indices."""
    sizes = [4, 3, 4]

    def change(shard, row, parts):
        parts["png"] = noise(10 * shard + row)
        parts["text_emb.npy"] = npy(embedding(row, shard))

    folder = write(tmp_path_factory.mktemp("mutants") / "whole", sizes, change)
    write_arrays(folder / "emb", sizes)
    with closing(mutant_source(folder).open()) as samples:
        assert samples.notes == []
    assert len(list(folder.glob("*.index"))) == 3
    return folder


def mutant_source(folder):
    return source(folder, img_embeddings_url=str(folder / "emb"), labels=True)


def contents(folder):
    """What a run gets of a folder: key -> (file of the image, caption, class, arrays, pixels); and whether it is told
    that something is not there."""
    shards = mutant_source(folder)
    with closing(shards.open()) as samples:
        made = loader(samples, config(shards, max_bad_fraction=1.0), batch_size=len(samples))
        (batch,) = first_steps(made, 1)
        told = bool(batch.skipped or any(samples.left_out) or samples.notes)
        found = {}
        for row, position in enumerate(batch.positions):
            if batch.weight[row]:
                sample = samples.read(position)
                name = sample.name.partition(": ")[2].partition(".png at byte ")[0]
                values = {k: v.tolist() for k, v in sample.arrays.items()}
                assert batch["caption"][row] == sample.caption
                assert {k: batch[k][row].tolist() for k in values} == values
                assert name not in found
                found[name] = (
                    sample.image,
                    sample.caption,
                    sample.label,
                    values,
                    batch["image"][row].numpy().tobytes(),
                )
        assert len(found) + len(batch.skipped) == len(samples)
    return found, told


def mutated(data, rng):
    """Some bytes, damaged in one of the ways in which files are."""
    at = rng.randrange(len(data))
    block, num_blocks = at // 512 * 512, max(1, len(data) // 512)
    length = rng.choice([1, 2, 7, 100, 512, 1024])
    how = rng.choice(["bit", "bit", "bit", "bytes", "cut", "out", "in", "zeros", "swap", "again", "behind"])
    if how == "bit":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == "bytes":
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if how == "cut":
        return data[:at]
    if how == "out":
        return data[:block] + data[block + length :]
    if how == "in":
        return data[:at] + rng.randbytes(length) + data[at:]
    if how == "zeros":
        return data[:block] + bytes(512) + data[block + 512 :]
    if how == "swap":
        other = rng.randrange(num_blocks) * 512
        first, second = min(block, other), max(block, other)
        return b"".join(
            [data[:first], data[second : second + 512], data[first + 512 : second], data[first : first + 512]]
        ) + (data[second + 512 :] if first != second else b"")
    if how == "again":
        return data[: block + length] + data[block:]
    return data + rng.randbytes(length)


def read_by_the_library_of_python(path):
    """Samples by key, as `tarfile` reads them as far as it gets; and whether it got to the end."""
    found, group, whole = [], None, True
    try:
        with tarfile.open(path, errorlevel=2) as tar:
            for member in tar:
                if not member.isreg() or "." not in member.name:
                    continue
                name, _, suffix = member.name.partition(".")
                if name != group:
                    group = name
                    found.append((name, {}))
                content = tar.extractfile(member).read()
                whole = whole and len(content) == member.size
                found[-1][1].setdefault(suffix.lower(), content)
    except (tarfile.TarError, OSError, ValueError, EOFError, UnicodeError, OverflowError):
        whole = False
    return found, whole


def check_mutant(folder, wanted, path):
    """A mutant of one file reads as the whole did, or as what is now there, or says that something is missing."""
    began = time.process_time()  # a test that waits for ever is ended by its timeout
    try:
        found, told = contents(folder)
    except DataError as error:
        found, told, said = {}, True, str(error)
    else:
        said = str(folder)
    assert str(folder) in said
    assert "\n" not in said
    assert time.process_time() - began < 2
    if path.suffix == ".index":
        assert (found, told) == (wanted, False)
        return
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
        except Exception:  # noqa: BLE001  (whatever NumPy says of a damaged file)
            values = None
    changed, whole = read_by_the_library_of_python(path) if path.suffix == ".tar" else ([], True)
    for name, sample in found.items():
        if sample == wanted.get(name):
            continue
        if path.suffix == ".npy":  # numbers have no checksum: the row may be what is now there, and no other's
            row = int(name[-4:])
            assert values is not None
            assert sample[3]["image_embed"] == values[row].astype("f4").tolist()
            assert (sample[0], sample[1], sample[2], sample[4]) == tuple(wanted[name][i] for i in (0, 1, 2, 4))
        else:  # so have texts in a tar
            assert any(
                name == key
                and parts.get("png") == sample[0]
                and parts.get("txt", b"").decode().strip() == sample[1]
                and int(parts["cls"]) == sample[2]
                and np.load(io.BytesIO(parts["text_emb.npy"])).astype("f4").tolist() == sample[3]["text_embed"]
                for key, parts in changed
            ), name
            if wanted.get(name, [None])[0] == sample[0]:
                assert wanted[name][4] == sample[4]
    if not told and found.keys() != wanted.keys():  # then what is gone has left no trace for anybody
        assert path.suffix == ".tar"
        assert whole
        others = {name for name in wanted if not name.startswith(path.stem)}
        assert found.keys() - others == {key for key, parts in changed if "png" in parts}


def sweep(whole, folder, num_mutants, seed):
    wanted, told = contents(whole)
    assert (len(wanted), told) == (11, False)
    rng = random.Random(seed)
    shutil.copytree(whole, folder)
    images = [wanted[name][0] for name in sorted(wanted)]
    outcomes = Counter()
    for number in range(num_mutants):
        kind = ["tar", "tar", "npy", "image", "index"][number % 5]
        shard = rng.randrange(3)
        path = {
            "tar": folder / f"{shard:05d}.tar",
            "image": folder / f"{shard:05d}.tar",
            "npy": folder / "emb" / f"img_emb_{shard:04d}.npy",
            "index": folder / f"{shard:05d}.tar.index",
        }[kind]
        original = whole / path.relative_to(folder)
        data = original.read_bytes()
        if kind == "image":
            image = rng.choice([image for image in images if image in data])
            damaged = mutated(image, rng)[: -(-len(image) // 512) * 512].ljust(len(image), b"\0")
            at = data.index(image)
            damaged = data[:at] + damaged[: len(image)] + data[at + len(image) :]
        else:
            damaged = mutated(data, rng)
        path.write_bytes(damaged)
        try:
            check_mutant(folder, wanted, path)
        except Exception as error:
            error.add_note(f"mutant {number} of seed {seed}: {kind} of shard {shard}")
            raise
        outcomes[kind] += damaged != data
        path.unlink()
        shutil.copy2(original, path)
        if kind in {"tar", "image"}:  # the index of the mutant
            shutil.copy2(original.with_name(original.name + ".index"), path.with_name(path.name + ".index"))
    return outcomes


def test_200_mutants_each_read_equal_or_are_told(whole, tmp_path):
    outcomes = sweep(whole, tmp_path / "mutants", 200, seed=0)
    assert all(count > 30 for count in outcomes.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_mutants_each_read_equal_or_are_told(seed, whole, tmp_path):
    sweep(whole, tmp_path / "mutants", 1000, seed=seed)
