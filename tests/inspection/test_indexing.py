"""What `index` says of shards, against the standard library's count; and that nobody looks again."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import ConfigError, DataError
from eclosion.inspection.indexing import index

IMAGES = ("bmp", "gif", "jpeg", "jpg", "png", "webp")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ECLOSION_CACHE", str(folder))
    return folder


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write(path: Path, names) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = picture() if name.endswith(IMAGES) else b"1"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shards(folder, num=3, size=4):
    for number in range(num):
        rows = range(size + number)
        write(
            folder / f"{number:05d}.tar", [f"{number:05d}{row:04d}.{s}" for row in rows for s in ("jpg", "txt", "cls")]
        )
    return folder


def url(folder):
    return f"{folder}/{{}}.tar"


def test_samples_and_members_are_counted_by_suffix(tmp_path):
    names = [
        "a.jpg",
        "a.txt",
        "a.JSON",
        "b.PNG",
        "b.txt",
        "b.seg.png",
        "b.pyd",
        "c/d.webp",
        "c/d.cls",
        "c/d.npy",
        "e.png",
    ]
    write(tmp_path / "00000.tar", names)
    write(tmp_path / "00001.tar", ["f.jpg", "f.img_emb.npy", "f.text_emb.npy", "f.json", "README", "g.jpg", "g.md"])
    found = index(url(tmp_path), ["shard_width=5"])
    assert found.num_samples == 6
    with_suffix = {"jpg": 3, "png": 2, "webp": 1, "txt": 2, "json": 2, "cls": 1, "npy": 1}
    assert dict(found.members) == with_suffix | {"img_emb.npy": 1, "text_emb.npy": 1}
    assert dict(found.ignored) == {"seg.png": 1, "pyd": 1, "md": 1, "no suffix": 1}
    read, left = sum(found.members.values()), sum(found.ignored.values())
    total = 0
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            total += len(tar.getmembers())
    assert read + left == total
    assert found.problems == []


def test_each_shard_is_reported_with_its_size_and_its_samples(tmp_path):
    folder = shards(tmp_path / "shards")
    found = index(url(folder), ["shard_width=5"])
    assert [(Path(s.name).name, s.num_samples, s.problem) for s in found.shards] == [
        ("00000.tar", 4, None),
        ("00001.tar", 5, None),
        ("00002.tar", 6, None),
    ]
    assert [s.num_bytes for s in found.shards] == [(folder / f"{n:05d}.tar").stat().st_size for n in range(3)]
    assert found.missing == []
    assert found.without_image == 0


def test_every_damaged_shard_is_named_with_the_place_and_the_others_are_counted(tmp_path):
    folder = shards(tmp_path / "shards", num=5)
    paths = sorted(folder.glob("*.tar"))
    paths[0].write_bytes(gzip.compress(paths[0].read_bytes()))
    with tarfile.open(paths[2]) as tar:
        cut = tar.getmember("000020003.txt").offset_data
    paths[2].write_bytes(paths[2].read_bytes()[:cut])
    paths[3].write_bytes(b"")
    found = index(url(folder), ["shard_width=5"])
    assert [(bool(s.problem), s.num_samples) for s in found.shards] == [
        (True, 0),
        (False, 5),
        (True, 3),
        (True, 0),
        (False, 8),
    ]
    assert len(found.problems) == 3
    for problem, path, said in zip(
        found.problems, (paths[0], paths[2], paths[3]), ("gzip", f"{cut - 512}", ""), strict=True
    ):
        assert "\n" not in problem
        assert str(path) in problem
        assert said in problem


def test_samples_without_an_image_are_a_problem(tmp_path):
    write(tmp_path / "00000.tar", ["a.jpg", "a.txt", "b.txt", "c.json"])
    found = index(url(tmp_path), ["shard_width=5"])
    assert (found.num_samples, found.without_image) == (3, 2)
    (problem,) = found.problems
    assert "2 of 3 samples have no image" in problem


def test_many_shards_are_indexed_by_processes_with_the_same_result(tmp_path):
    """Twelve at once, and the same twelve one at a time."""
    folder = shards(tmp_path / "shards", num=12)
    told = []
    found = index(url(folder), ["shard_width=5"], on_shard=lambda done, total: told.append((done, total)))
    assert told == [(done, 12) for done in range(1, 13)]
    assert [s.num_samples for s in found.shards] == [4 + n for n in range(12)]
    for path in folder.glob("*.index"):
        path.unlink()
    single = [index(str(path)) for path in sorted(folder.glob("*.tar"))]
    assert [s for one in single for s in one.shards] == list(found.shards)
    assert sum((Counter(one.members) for one in single), Counter()) == found.members


def test_what_was_indexed_is_not_looked_at_again_until_it_changes(tmp_path, monkeypatch):
    folder = shards(tmp_path / "shards")
    index(url(folder), ["shard_width=5"])
    kept = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.index")}
    assert len(kept) == 3

    def times():
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.index")}

    assert len(WebDatasetSource(webdataset_base_url=url(folder), shard_width=5).open()) == 15
    index(url(folder), ["shard_width=5"])
    assert times() == kept
    write(folder / "00001.tar", ["x.jpg"])
    assert index(url(folder), ["shard_width=5"]).num_samples == 11
    assert {name for name, when in times().items() if when != kept[name]} == {"00001.tar.index"}


def test_a_config_and_its_overrides_say_which_shards(tmp_path, make_config):
    folder = shards(tmp_path / "shards")
    config = make_config(tmp_path / "run")
    config["data"]["source"] = {"name": "webdataset", "webdataset_base_url": url(folder), "shard_width": 5}
    for path, text in (
        (tmp_path / "c.yaml", yaml.safe_dump(config)),
        (tmp_path / "c.json", json.dumps(config)),
    ):
        path.write_text(text)
        assert index(path).num_samples == 15
        assert index(str(path), ["data.source.start_shard=1", "data.source.end_shard=1"]).num_samples == 5
    assert index(url(folder), ["shard_width=5", "start_shard=2"]).num_samples == 6
    assert index(url(folder), ["data.source.shard_width=5"]).num_samples == 15  # as messages say it


@pytest.mark.parametrize(
    ("given", "overrides", "kind", "said"),
    [
        ("{folder}/{{}}.tar", [], DataError, "data.source.shard_width=5"),
        ("{folder}", [], ConfigError, "{{}}.tar"),
        ("{folder}/{{}}.tar", ["shard_widht=5"], ConfigError, "Did you mean 'shard_width'?"),
        ("{folder}/{{}}.tar", ["shard_width=5", "end_shard=4"], DataError, "00003.tar"),
        ("butterflies", [], ConfigError, "Only shards"),
        ("{folder}/none.yaml", [], ConfigError, "none.yaml"),
        ("pipe:cat {folder}/00000.tar", [], ConfigError, "--allow-pipe"),
        ("pipe:cat {folder}/00000.tar", ["allow_pipe=true"], ConfigError, "allow_pipe"),
    ],
)
def test_what_cannot_be_indexed_is_one_line(given, overrides, kind, said, tmp_path):
    folder = shards(tmp_path / "shards")
    with pytest.raises(kind) as caught:
        index(given.format(folder=folder), overrides)
    assert "\n" not in str(caught.value)
    assert said.format() in str(caught.value)


def test_missing_shards_are_listed_where_they_may_be_missing(tmp_path):
    folder = shards(tmp_path / "shards")
    (folder / "00001.tar").unlink()
    found = index(url(folder), ["shard_width=5", "end_shard=3", "skip_missing_shards=true"])
    assert [Path(name).name for name in found.missing] == ["00001.tar", "00003.tar"]
    assert found.num_samples == 10


def test_names_from_a_shard_cannot_write_to_the_terminal(tmp_path):
    write(tmp_path / "00000.tar", ["a.jpg", "a.\x1b[31mred", "b.jpg", "b.\nline"])
    found = index(url(tmp_path), ["shard_width=5"])
    assert all(name.isprintable() for name in found.ignored)
    assert sum(found.ignored.values()) == 2


def test_a_million_samples_need_no_million_lines(tmp_path):
    """What is reported of a hostile shard is bounded."""
    write(tmp_path / "00000.tar", ["a.jpg", *[f"a.suffix{i}" for i in range(500)]])
    found = index(url(tmp_path), ["shard_width=5"])
    assert len(found.ignored) <= 101
    assert sum(found.ignored.values()) == 500
