"""What a shard holds, by sample: as webdataset groups it, kept, and built again when it must be."""

import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from webdataset import TarWriter, ignore_and_continue
from webdataset.tariterators import group_by_keys, tar_file_expander

from eclosion.data import shard_index
from eclosion.data.shard_index import KINDS, Request, ShardIndex, index_of, indices, kept_index
from eclosion.errors import DataError, EnvironmentProblem

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp"}
Members = list[tuple[str, bytes]]
SMALL: Members = [
    (f"{key:04}.{suffix}", f"{suffix} of {key}".encode()) for key in range(5) for suffix in ("jpg", "json", "txt")
]


def write(path: Path, members: Members, *, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def index(path: Path, **options: object) -> ShardIndex:
    defaults = {"url": str(path), "version": str(path.stat().st_mtime_ns), "cache": path.parent / "cache"}
    return index_of(path, **(defaults | options))


def samples(path: Path, found: ShardIndex) -> list[tuple[str, dict[str, bytes]]]:
    data = path.read_bytes()
    return [
        (
            found.key(i),
            {
                kind: data[found.offsets[i, k] : found.offsets[i, k] + found.sizes[i, k]]
                for k, kind in enumerate(KINDS)
                if found.offsets[i, k] >= 0
            },
        )
        for i in range(len(found))
    ]


def webdataset_samples(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The library's samples, of each the members that we know, the first image for all; none without any."""
    found = []
    with path.open("rb") as file:
        members = list(tar_file_expander([{"url": str(path), "stream": file}]))
    for sample in group_by_keys(members, handler=ignore_and_continue):
        key, known = sample["__key__"], dict[str, bytes]()
        for suffix, content in sample.items():
            kind = "image" if suffix in IMAGES else suffix
            if kind in KINDS:
                known.setdefault(kind, content)
        if known:
            found.append((key, known))
    return found


@pytest.fixture
def walks(monkeypatch) -> list[str]:
    """The shards that are walked, as it happens."""
    seen: list[str] = []
    entries = shard_index.entries

    def counted(file: io.BufferedIOBase, name: str) -> Iterator[object]:
        seen.append(name)
        return entries(file, name)

    monkeypatch.setattr(shard_index, "entries", counted)
    return seen


# ------------------------------------------------------------------------------------------ the same as webdataset


@pytest.mark.parametrize("format", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
def test_shards_written_by_webdataset_hold_the_samples_that_webdataset_reads(format, tmp_path):
    path = tmp_path / "00000.tar"
    rng = np.random.default_rng(0)
    written = [
        {
            "__key__": f"some/folder.v1/{'k' * (0 if format == 'USTAR_FORMAT' else 110)}{i:09}",
            ["jpg", "jpeg", "png", "webp"][i % 4]: rng.bytes(rng.integers(2000)),
            "txt": f"caption {i}, é",
            "json": b'{"a": 1}',
            "cls": i,
            "npy": rng.normal(size=3),
            "img_emb.npy": rng.normal(size=5).astype(np.float16),
            "text_emb.npy": rng.normal(size=(2, 5)),
            "seg.png": rng.bytes(10),
        }
        for i in range(30)
    ]
    with path.open("wb") as file, TarWriter(file) as writer:
        if format != "USTAR_FORMAT":
            writer.tarstream.format = getattr(tarfile, format)
        for sample in written:
            images = {k: v for k, v in sample.items() if k in IMAGES}
            others = TarWriter(io.BytesIO()).encoder({k: v for k, v in sample.items() if k not in IMAGES})
            writer.encoder = lambda ready: ready
            writer.write(images | others)
    found = index(path)
    assert found.problem is None
    assert samples(path, found) == webdataset_samples(path)
    assert [found.key(i) for i in range(30)] == [sample["__key__"] for sample in written]
    assert found.labels.tolist() == list(range(30))
    assert found.counts() == dict.fromkeys(KINDS, 30)
    assert found.ignored == {"seg.png": 30}
    assert found.member(5, "image") == written[5]["__key__"] + ".jpeg"


def test_a_shard_written_by_the_tar_command_holds_the_samples_that_webdataset_reads(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("no tar command")
    root = tmp_path / "files"
    for name in ["0000.JPG", "0000.txt", "b/0001.jpg", "b/0001.txt", "b/" + "n" * 240 + ".png", "b/é.gif", "README"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "c.jpg").symlink_to("0000.JPG")
    for format in ("gnu", "pax"):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", f"--format={format}", "--sort=name", "-cf", path, "-C", root, "."], check=True)
        found = index(path)
        assert samples(path, found) == webdataset_samples(path)
        assert found.counts() == {"image": 4, "txt": 2}
        assert found.ignored == {"directory": 2, "no suffix": 1, "symbolic link": 1}


def test_members_are_grouped_as_webdataset_groups_them(tmp_path):
    names = ["a.JPG", "a.Txt", "b.txt", "a.json", "x/c.d.jpg", "x/c.jpg", "x/c.png", "x/c.png", "x/c.txt", "x/c.txt"]
    names += ["__meta__", "x/c.json", "__all__/z.jpg", "x/c.cls", "noname", "x/c.npy", ".hidden.jpg", "x/c.pyd"]
    names += ["v1.5/e.jpg", "v1.5/f.readme", "v1.5/e.txt", "./g.jpg", "g.txt", "readme.md", "i.pkl", "i.jpg.txt"]
    path = write(tmp_path / "0.tar", [(name, f"{name} {i}".encode()) for i, name in enumerate(names)])
    found = index(path)
    assert samples(path, found) == webdataset_samples(path)
    keys = ["a", "b", "a", "x/c", "v1.5/e", "v1.5/e", "./g", "g"]
    assert [found.key(i) for i in range(len(found))] == keys
    assert [found.member(0, kind) for kind in ("image", "txt", "json")] == ["a.JPG", "a.Txt", "a.json"]
    assert dict(sorted(found.ignored.items())) == {
        "cls (no number)": 1,
        "d.jpg": 1,
        "jpg.txt": 1,
        "md": 1,
        "metadata": 1,  # "__meta__" has no dot to begin with
        "no suffix": 3,
        "pkl": 1,
        "png (second image)": 2,
        "pyd": 1,
        "readme": 1,
        "txt (repeated)": 1,
    }
    assert index(path).ignored == found.ignored  # the kept one


KEYS = st.sampled_from(["a", "b", "d/a", "d.x/a", "é", "__m__", "__m__/a", "a__", "", "0001", "d/0001"])
SUFFIXES = st.sampled_from(
    ["jpg", "PNG", "jpeg", "txt", "TXT", "json", "cls", "npy", "Img_Emb.npy", "seg.png", "pth", ""]
)


@settings(max_examples=100, deadline=2000)
@given(st.lists(st.tuples(KEYS, SUFFIXES), max_size=12))
def test_any_sequence_of_members_is_grouped_as_webdataset_groups_it(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("shards")
    members = [(f"{key}.{suffix}", f"{i}".encode()) for i, (key, suffix) in enumerate(names)]
    path = write(folder / "0.tar", members)
    found = index(path)
    assert samples(path, found) == webdataset_samples(path)
    assert int((found.offsets >= 0).sum()) + sum(found.ignored.values()) - found.ignored.get(
        "cls (no number)", 0
    ) == len(members)
    shutil.rmtree(folder)


def test_a_hidden_file_in_a_folder_does_not_tear_a_sample_apart(tmp_path):
    """It does in webdataset: what macOS leaves beside each file makes two samples of every one."""
    names = ["d/._1.jpg", "d/1.jpg", "d/._1.txt", "d/1.txt"]
    path = write(tmp_path / "0.tar", [(name, name.encode()) for name in names])
    assert samples(path, index(path)) == [("d/1", {"image": b"d/1.jpg", "txt": b"d/1.txt"})]
    assert len(webdataset_samples(path)) == 2


def test_labels_are_small_whole_numbers_and_others_are_counted(tmp_path):
    texts = [b"7", b" 12\n", b"0", b"2147483647", b"2147483648", b"-1", b"1_0", b"\xb2", b"", b"1.5", b"0" * 20 + b"1"]
    path = write(tmp_path / "0.tar", [(f"{i}.cls", text) for i, text in enumerate(texts)] + [("z.jpg", b"")])
    found = index(path)
    assert found.labels.tolist() == [7, 12, 0, 2**31 - 1, *[-1] * 8]
    assert found.ignored == {"cls (no number)": 7}
    assert len(found) == 12
    assert (found.offsets[:11, KINDS.index("cls")] > 0).all()


@given(st.lists(st.text("0123456789a/é٣", min_size=1, max_size=24), unique=True, max_size=8), st.integers(1, 18))
@settings(max_examples=50, deadline=2000)
def test_the_last_digits_of_a_key_are_the_number_that_python_reads(tmp_path_factory, keys, width):
    folder = tmp_path_factory.mktemp("shards")
    keys = [key for key in keys if not key.endswith("/")]
    found = index(write(folder / "0.tar", [(f"{key}.jpg", b"") for key in keys], format=tarfile.PAX_FORMAT))
    wanted = [int(key[-width:]) if key[-width:].isascii() and key[-width:].isdigit() else -1 for key in keys]
    assert found.last_digits(width).tolist() == wanted
    shutil.rmtree(folder)


def test_more_digits_than_a_number_holds_are_refused(tmp_path):
    found = index(write(tmp_path / "0.tar", SMALL))
    with pytest.raises(ValueError, match="width is 19"):
        found.last_digits(19)


def test_names_of_any_bytes_are_kept_and_shown_on_one_line(tmp_path):
    path = write(tmp_path / "0.tar", [("a\n\udcff\x1b[31m.jpg", b"x"), ("b.jpg", b"y")], format=tarfile.GNU_FORMAT)
    for found in (index(path), index(path)):
        assert found.key(0) == "a\n\udcff\x1b[31m"
        assert found.member(0, "image") == r"a\n\udcff\x1b[31m.jpg"
        assert found.member(0, "txt") == r"a\n\udcff\x1b[31m.txt"


def test_a_million_suffixes_are_not_told_apart(tmp_path):
    members = [(f"0.suffix{i}" + "x" * 80, b"") for i in range(300)]
    found = index(write(tmp_path / "0.tar", members))
    assert len(found.ignored) == 101
    assert found.ignored["other"] == 200
    assert max(map(len, found.ignored)) < 50


def test_equal_layout_has_an_equal_digest_wherever_it_lies(tmp_path):
    first = index(write(tmp_path / "0.tar", SMALL))
    again = index(write(tmp_path / "1.tar", [(name, content.upper()) for name, content in SMALL]))
    others = [SMALL[:-1], SMALL[::-1], [("x" + name, content) for name, content in SMALL], [*SMALL, ("9.cls", b"1")]]
    others += [[*SMALL, ("9.cls", b"2")], [(name.upper(), content) for name, content in SMALL]]
    digests = [index(write(tmp_path / f"{i + 2}.tar", other)).digest for i, other in enumerate(others)]
    assert first.digest == again.digest == index(tmp_path / "0.tar").digest
    assert len({first.digest, *digests}) == 1 + len(others)


# ------------------------------------------------------------------------------------------ damaged shards


def built(data: bytes) -> ShardIndex:
    """As `index_of` builds it, without a file: this is about the walk and not about disks."""
    return shard_index._build(io.BytesIO(data), "00000.tar")


def blocks(num_bytes: int) -> int:
    return -(-num_bytes // 512) * 512


def test_of_a_shard_cut_at_any_byte_whole_samples_are_listed_and_the_rest_is_told(tmp_path):
    data = write(tmp_path / "00000.tar", SMALL).read_bytes()
    whole = built(data)
    ends = [blocks(end) for end in (whole.offsets + whole.sizes).max(1).tolist()]
    for length in [*range(0, ends[-1] + 513, 7), ends[-1] + 511, ends[-1] + 512, len(data) - 1]:
        found = built(data[:length])
        kept = len(found)
        assert [found.key(i) for i in range(kept)] == [whole.key(i) for i in range(kept)]
        assert (found.offsets == whole.offsets[:kept]).all()
        assert (found.sizes == whole.sizes[:kept]).all()
        if length >= ends[-1] + 512:
            assert (found.problem, kept) == (None, 5)
            continue
        assert found.problem.startswith("00000.tar, byte ")
        assert found.problem.endswith(f" {kept} samples before it are listed.") or not kept
        # a sample is listed as soon as the header of the next one is there
        assert kept == sum(end + 512 <= length for end in ends[:-1])


def test_no_flipped_bit_loses_a_sample_or_a_member_in_silence(tmp_path):
    data = bytearray(write(tmp_path / "00000.tar", [*SMALL[:6], ("0009.cls", b"5")]).read_bytes())
    whole = built(data)
    problems = 0
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        found = built(data)
        data[at] ^= 1 << at % 8
        kept = len(found)
        assert found.problem or kept == 3
        assert [found.key(i) for i in range(kept)] == [whole.key(i) for i in range(kept)]
        assert (found.offsets == whole.offsets[:kept]).all()
        assert (found.sizes == whole.sizes[:kept]).all()
        problems += found.problem is not None
    assert problems > 0.6 * len(data)  # the rest are contents


@pytest.mark.parametrize(
    ("tail", "num_listed"),
    [
        ([("0005.jpg", 3)], 5),  # another sample is cut off: those before are whole
        ([("0004.npy", 3)], 4),  # a member of the last sample is cut off
        ([("folder", 3)], 4),  # whatever it is, members of the last sample may have followed
    ],
)
def test_the_sample_in_which_the_walk_ended_is_left_out(tmp_path, tail, num_listed):
    path = tmp_path / "00000.tar"
    write(path, SMALL + [(name, b"x" * size) for name, size in tail])
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-1].offset_data
    os.truncate(path, offset + 1)
    for found in (index(path), index(path)):
        assert len(found) == num_listed
        assert found.offsets.shape == found.sizes.shape == (num_listed, len(KINDS))
        assert found.problem == (
            f"{path}, byte {offset - 512}: member {tail[0][0]} ends 2 bytes early: the shard is cut off. "
            f"Fetch or write the shard again. {num_listed} samples before it are listed."
        )


def test_what_is_no_tar_has_no_samples_and_says_why(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    assert len(index(path)) == 0
    assert index(path).problem == (f"{path}, byte 0: the shard is gzip-compressed: decompress it (gunzip).")
    assert index(path).last_digits(4).tolist() == []


def test_an_empty_tar_is_no_problem_and_its_index_is_kept(tmp_path, walks):
    path = write(tmp_path / "0.tar", [])
    for _ in range(2):
        found = index(path)
        assert (len(found), found.problem, found.counts()) == (0, None, {})
    assert (
        list(indices([Request(path, str(path), "1")] * 9, cache=tmp_path / "cache", num_workers=2))[8].problem is None
    )
    assert len(walks) == 1


def test_a_missing_shard_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"0.tar: the shard does not exist\."):
        index_of(tmp_path / "0.tar", url="s3://b/0.tar", version="", cache=tmp_path)
    with pytest.raises(DataError, match=r"s3://b/0.tar: is no file\. A shard is a tar file\."):
        index_of(tmp_path, url="s3://b/0.tar", version="", cache=tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EnvironmentProblem, match="cannot be read"):
        index_of(tmp_path / "loop", url="loop", version="", cache=tmp_path)


# ------------------------------------------------------------------------------------------ kept


def same(one: ShardIndex, other: ShardIndex) -> bool:
    """All that an index says, array by array."""
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        and type(getattr(one, field.name)) is type(getattr(other, field.name))
        for field in dataclasses.fields(ShardIndex)
    )


def test_a_kept_index_is_used_until_size_or_version_change(tmp_path, walks):
    path = write(tmp_path / "00000.tar", SMALL)
    first = index(path)
    assert (tmp_path / "00000.tar.index").is_file()
    assert same(index(path), first)
    assert len(walks) == 1
    assert same(index(path, refresh=True), first)
    assert len(walks) == 2
    os.utime(path, (1, 1))
    assert same(index(path), first)
    assert same(index(path), first)
    assert len(walks) == 3
    write(path, SMALL[:-3] + [(name, content * 300) for name, content in SMALL[-3:]])
    os.utime(path, (1, 1))
    assert not same(index(path), first)
    assert len(walks) == 4


def test_a_folder_of_shards_can_be_moved_and_called_by_any_path(tmp_path, walks, monkeypatch):
    (tmp_path / "a").mkdir()
    index(write(tmp_path / "a/00000.tar", SMALL))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for url in ("b/00000.tar", f"file://{tmp_path}/b/00000.tar", str(tmp_path / "b/00000.tar")):
        assert index(Path("b/00000.tar"), url=url).url == url
    assert len(walks) == 1
    (tmp_path / "b/00000.tar.index").rename(tmp_path / "b/00001.tar.index")  # of another shard, as it were
    shutil.copy2(tmp_path / "b/00000.tar", tmp_path / "b/00001.tar")
    index(tmp_path / "b/00001.tar")
    assert len(walks) == 2


def test_remote_shards_have_their_index_in_the_cache_and_need_not_be_there_for_it(tmp_path, walks):
    path, cache, url = write(tmp_path / "3f2a", SMALL), tmp_path / "cache", "https://host/00000.tar"
    size = path.stat().st_size
    assert kept_index(url=url, size=size, version="etag", cache=cache) is None
    first = index(path, url=url, version="etag")
    assert not list(tmp_path.glob("*.index"))
    path.unlink()
    assert same(kept_index(url=url, size=size, version="etag", cache=cache), first)
    for other in ({"url": url + "x"}, {"size": size + 1}, {"version": "other"}):
        assert kept_index(**({"url": url, "size": size, "version": "etag", "cache": cache} | other)) is None
    assert walks == [url]


def test_an_index_goes_to_the_cache_where_the_shards_folder_cannot_be_written(tmp_path, walks):
    path = write(tmp_path / "00000.tar", SMALL)
    (tmp_path / "00000.tar.index").mkdir()  # stops root, too
    first = index(path)
    assert len(list((tmp_path / "cache/indices").iterdir())) == 1
    assert same(index(path), first)
    assert len(walks) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["00000.tar", "00000.tar.index", "cache"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_index_goes_to_the_cache_where_the_shards_folder_is_read_only(tmp_path, walks):
    (tmp_path / "shards").mkdir()
    path = write(tmp_path / "shards/00000.tar", SMALL)
    (tmp_path / "shards").chmod(0o555)
    first = index(path, cache=tmp_path / "cache")
    assert same(index(path, cache=tmp_path / "cache"), first)
    (tmp_path / "shards").chmod(0o755)
    assert len(walks) == 1


def test_without_any_place_to_keep_it_an_index_is_built_each_time(tmp_path, walks):
    path = write(tmp_path / "00000.tar", SMALL)
    (tmp_path / "00000.tar.index").mkdir()
    (tmp_path / "cache").write_text("a file")
    assert same(index(path), index(path))
    assert len(walks) == 2


def test_a_full_disk_leaves_the_index_that_was_there_and_no_litter(tmp_path, walks, monkeypatch):
    path = write(tmp_path / "00000.tar", SMALL)
    first, before = index(path), (tmp_path / "00000.tar.index").read_bytes()

    def full(place: Path, data: bytes) -> int:
        with place.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(index(path, refresh=True), first)
    assert (tmp_path / "00000.tar.index").read_bytes() == before
    assert [entry.name for entry in sorted(tmp_path.rglob("*")) if entry.is_file()] == ["00000.tar", "00000.tar.index"]
    assert same(index(path), first)
    assert len(walks) == 2


def test_a_shard_that_changes_during_the_walk_is_not_kept(tmp_path, walks, monkeypatch):
    path = write(tmp_path / "00000.tar", SMALL)
    entries = shard_index.entries

    def changing(file: io.BufferedIOBase, name: str) -> Iterator[object]:
        yield from entries(file, name)
        os.utime(path, (len(walks), len(walks)))

    monkeypatch.setattr(shard_index, "entries", changing)
    assert len(index(path)) == 5
    assert not (tmp_path / "00000.tar.index").exists()


def test_a_kept_index_with_any_bit_flipped_or_cut_anywhere_is_not_used(tmp_path, walks):
    members = [*SMALL[:6], ("0009.cls", b"5"), ("0010.pth", b"")]
    path, cache = write(tmp_path / "0.tar", members), tmp_path / "cache"
    of = {"url": "http://h/0.tar", "version": "1", "cache": cache}
    first, size = index_of(path, **of), path.stat().st_size
    (place,) = (cache / "indices").iterdir()
    good = place.read_bytes()
    unnoticed = 0
    with place.open("r+b", buffering=0) as file:
        for at in range(len(good)):
            file.seek(at)
            file.write(bytes([good[at] ^ 1 << at % 8]))
            found = kept_index(size=size, **of)
            assert found is None or same(found, first)
            unnoticed += found is not None
            file.seek(at)
            file.write(good[at : at + 1])
        assert unnoticed < 20  # such as a space of the JSON header
        assert same(kept_index(size=size, **of), first)
        for length in range(len(good) - 1, -1, -5):
            file.truncate(length)
            assert kept_index(size=size, **of) is None
    assert len(walks) == 1
    assert same(index_of(path, **of), first)
    assert len(walks) == 2
    assert place.read_bytes() == good


def forge(path: Path, found: ShardIndex, **changes: object) -> None:
    """Keep an index that someone wrote on purpose: all its checksums are right."""
    forged = dataclasses.replace(found, **changes)
    shard = shard_index._Shard(path.name, path.stat().st_size, str(path.stat().st_mtime_ns))
    data = shard_index._to_bytes(forged, shard)
    path.with_name(path.name + ".index").write_bytes(data)


def test_a_forged_index_that_points_out_of_the_shard_is_built_again(tmp_path, walks, monkeypatch):
    path = write(tmp_path / "0.tar", SMALL)
    first, size = index(path), path.stat().st_size
    digest_of = shard_index._digest

    def honest(found: ShardIndex, **changes: object) -> str:
        """The digest that the forged index must state."""
        forged = dataclasses.replace(found, **changes)
        about = {"kinds": [KINDS[c] for c in forged.columns], "suffixes": list(forged.suffixes)}
        arrays = {
            name: np.ascontiguousarray(getattr(forged, name)[:, forged.columns] if n == 2 else getattr(forged, name))
            for name, (_, n) in shard_index.ARRAYS.items()
        }
        return digest_of(about, arrays)

    def changed(name: str, value: int, at: tuple[int, ...] = (0, 0)) -> dict[str, object]:
        array = getattr(first, name).copy()
        array[at[: array.ndim]] = value
        return {name: array}

    forgeries = [
        changed("offsets", size),
        changed("offsets", 2**63 - 1),
        changed("offsets", 0),
        changed("sizes", size),
        changed("sizes", 2**63 - 1),
        changed("sizes", -1),
        changed("offsets", -1),
        changed("spellings", 3),
        changed("spellings", -1),
        changed("key_ends", 100),
        changed("key_ends", 0),
        changed("key_ends", -1),
        changed("key_ends", 21, (4,)),
        changed("labels", -2),
        {"labels": first.labels[:-1]},
        {"labels": first.labels.astype(np.int32)},
        {"key_bytes": np.zeros((20, 1), np.uint8)},
        {"offsets": first.offsets[:-1]},
        {"sizes": first.sizes[:-1]},
    ]
    for forgery in forgeries:
        forge(path, first, **forgery, digest=honest(first, **forgery))
        walks.clear()
        assert same(index(path), first), forgery
        assert walks, forgery
    fine = changed("sizes", 1)  # what is within the shard is believed
    forge(path, first, **fine, digest=honest(first, **fine))
    walks.clear()
    assert index(path).sizes[0, 0] == 1
    assert not walks


def test_other_files_in_the_place_of_an_index_are_replaced(tmp_path, walks):
    path = write(tmp_path / "0.tar", SMALL)
    first, place = index(path), tmp_path / "0.tar.index"
    huge = {"index": "[" * 100_000, "hash": "x"}
    for metadata in (None, {}, {"index": "1"}, huge, {"index": "{}", "hash": shard_index._hash("{}")}):
        save_file({"offsets": np.zeros(3)}, place, metadata=metadata)
        assert same(index(path), first)
        assert same(index(path), first)
    place.write_bytes(bytes(3 * 2**20))
    assert same(index(path), first)
    assert len(walks) == 7


def test_an_index_says_nothing_of_credentials_or_machines(tmp_path):
    path = write(tmp_path / "00000.tar", SMALL)
    index(path)
    assert str(tmp_path).encode() not in (tmp_path / "00000.tar.index").read_bytes()


WORK = """
import sys
from pathlib import Path
from eclosion.data.shard_index import index_of
path, cache = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(60):
    version = str(path.stat().st_mtime_ns)
    found = index_of(path, url=str(path), version=version, cache=cache, refresh=_ % 2 == 0)
    assert len(found) == 5 and found.problem is None
    print(found.digest)
assert "torch" not in sys.modules
"""


def test_two_processes_may_build_the_same_index_at_once_and_need_no_torch(tmp_path):
    path = write(tmp_path / "00000.tar", SMALL)
    command = [sys.executable, "-c", WORK, str(path), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [len(lines) for lines in printed] == [60, 60]
    assert {digest for lines in printed for digest in lines} == {index(path).digest}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["00000.tar", "00000.tar.index"]


# ------------------------------------------------------------------------------------------ many


def requests(folder: Path, count: int) -> list[Request]:
    paths = [write(folder / f"{i:05}.tar", SMALL[: 3 * (i % 5 + 1)]) for i in range(count)]
    return [Request(path, str(path), str(path.stat().st_mtime_ns)) for path in paths]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_many_shards_come_in_their_order_and_are_walked_once(tmp_path, walks, num_workers):
    wanted = requests(tmp_path, 20)
    for _ in range(2):
        found = list(indices(wanted, cache=tmp_path / "cache", num_workers=num_workers))
        assert [one.url for one in found] == [request.url for request in wanted]
        assert [len(one) for one in found] == [i % 5 + 1 for i in range(20)]
    # with several workers, processes of their own walk
    assert sorted(walks) == ([request.url for request in wanted] if num_workers == 1 else [])
    kept = [Path(f"{request.url}.index").stat().st_mtime_ns for request in wanted]
    assert len(list(indices(wanted, cache=tmp_path / "cache", num_workers=num_workers, refresh=True))) == 20
    assert all(Path(f"{r.url}.index").stat().st_mtime_ns > before for r, before in zip(wanted, kept, strict=True))


def test_where_no_process_can_help_the_threads_walk(tmp_path, walks, monkeypatch):
    wanted = requests(tmp_path, 9)
    for command in (("/nonexistent",), (sys.executable, "-c", "raise SystemExit(1)")):
        monkeypatch.setattr(shard_index._Builders, "COMMAND", command)
        found = list(indices(wanted, cache=tmp_path / "cache", num_workers=2, refresh=True))
        assert [len(one) for one in found] == [i % 5 + 1 for i in range(9)]
    assert len(walks) == 18


def test_shards_are_fetched_in_threads_and_a_missing_one_is_named(tmp_path):
    ready = requests(tmp_path, 10)
    threads = set()

    def fetch(request: Request) -> Path:
        threads.add(threading.current_thread().name)
        return request.path

    lazy = [dataclasses.replace(r, path=lambda r=r: fetch(r), url=f"http://h/{i}") for i, r in enumerate(ready)]
    assert [len(one) for one in indices(lazy, cache=tmp_path / "cache", num_workers=2)] == [
        i % 5 + 1 for i in range(10)
    ]
    assert threading.main_thread().name not in threads
    Path(ready[3].url).unlink()
    some = indices(lazy, cache=tmp_path / "cache", num_workers=2)
    assert [len(next(some)) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError, match=r"http://h/3: the shard does not exist\."):
        next(some)


def test_a_remote_shard_whose_index_is_kept_is_not_fetched(tmp_path):
    fetched = []
    (ready,) = requests(tmp_path, 1)

    def fetch() -> Path:
        fetched.append(1)
        return ready.path

    remote = Request(fetch, "http://h/0.tar", "etag", ready.path.stat().st_size)
    for wanted in (remote, remote, dataclasses.replace(remote, size=None), dataclasses.replace(remote, version="")):
        (found,) = indices([wanted], cache=tmp_path / "cache", num_workers=2)
        assert len(found) == 1
    assert len(fetched) == 3
    list(indices([remote], cache=tmp_path / "cache", num_workers=2, refresh=True))
    assert len(fetched) == 4


def test_whoever_stops_early_leaves_no_process_behind(tmp_path):
    before = set(threading.enumerate())
    many = indices(requests(tmp_path, 12), cache=tmp_path / "cache", num_workers=2)
    next(many)
    builders = many.gi_frame.f_locals["builders"]
    many.close()
    assert builders._started
    assert all(process.poll() is not None for process in builders._started)
    until = time.monotonic() + 60
    while set(threading.enumerate()) - before:  # those that had begun something end with it
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_index_can_be_used_by_several_threads(tmp_path):
    found = index(write(tmp_path / "0.tar", SMALL))
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda i: (found.key(i % 5), found.last_digits(4)[i % 5]), range(200)))
    assert keys == [(f"{i % 5:04}", i % 5) for i in range(200)]
