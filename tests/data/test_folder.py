"""A folder of images: what counts, in which order, with which captions and classes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from eclosion.data.folder import FolderSource
from eclosion.data.images import decode
from eclosion.errors import BadSample, ConfigError, DataError


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}:
            Image.new("RGB", (3, 2), (len(name), 0, 0)).save(path, path.suffix[1:].upper().replace("JPG", "JPEG"))
        else:
            path.write_text(f" {name} \n")
    return root


def message(source: FolderSource) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        source.open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def metadata(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_images_are_found_in_sub_folders_by_suffix_in_any_case_in_the_order_of_their_paths(tmp_path):
    names = ["b.PNG", "a/z.jpg", "a/B.JPEG", "a/deep/er/x.webp", "Z.gif", "c.bmp", "ä.png", "a.png"]
    fill(tmp_path, *names, "a/notes.txt", "README", "a/photo.tif", ".hidden.png", ".git/x.png", "a/.cache/y.png")
    samples = FolderSource(root=tmp_path).open()
    assert samples.names == sorted(names)
    assert len(samples) == 8
    assert samples.ignored == {".txt": 1, "no suffix": 1, ".tif": 1}
    assert (samples.class_names, samples.has_captions) == ((), False)
    for index, name in enumerate(samples.names):
        sample = samples.read(index)
        assert sample.name == samples.name(index) == f"{tmp_path}/{name}"
        assert decode(sample.image, sample.name).size == (3, 2)
        assert (sample.caption, sample.label) == (None, None)


def test_captions_come_from_files_beside_the_images(tmp_path):
    fill(tmp_path, "a/x.png", "a/x.txt", "y.v2.jpg", "y.v2.txt")
    (tmp_path / "y.v2.txt").write_bytes("\ufeffein Fuß\n".encode())
    samples = FolderSource(root=tmp_path, caption_suffix=".txt").open()
    assert samples.has_captions
    assert [samples.read(i).caption for i in range(2)] == ["a/x.txt", "ein Fuß"]


def test_captions_come_from_metadata_in_any_folder(tmp_path):
    fill(tmp_path, "x.png", "sub/y.png", "sub/deep/z.png")
    metadata(tmp_path / "metadata.jsonl", {"file_name": "x.png", "text": " an x "})
    metadata(
        tmp_path / "sub/metadata.jsonl",
        {"file_name": "y.png", "text": "a y", "more": [1]},
        {"file_name": "deep/z.png", "text": "a z"},
    )
    samples = FolderSource(root=tmp_path, caption_column="text").open()
    assert [(Path(samples.names[i]).name, samples.read(i).caption) for i in range(3)] == [
        ("z.png", "a z"),
        ("y.png", "a y"),
        ("x.png", "an x"),
    ]


def test_classes_are_the_names_of_the_first_folders(tmp_path):
    fill(tmp_path, "dog/1.png", "cat/young/2.png", "cat/3.png")
    samples = FolderSource(root=tmp_path, class_names_from_folders=True).open()
    assert samples.class_names == ("cat", "dog")
    assert [samples.read(i).label for i in range(3)] == [0, 0, 1]


def test_a_loop_of_links_ends_and_links_are_followed_once(tmp_path):
    fill(tmp_path / "data", "real/1.png")
    fill(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data/real/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/again").symlink_to(tmp_path / "data/real")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/self").symlink_to("self")
    (tmp_path / "data/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "data/file.png").symlink_to(tmp_path / "elsewhere/2.png")
    samples = FolderSource(root=tmp_path / "data").open()
    assert samples.names == ["dangling.png", "file.png", "linked/2.png", "real/1.png"]
    with pytest.raises(BadSample, match=r"dangling.png: the file does not exist \(any more\)\."):
        samples.read(0)


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_times_or_places(tmp_path):
    one = fill(tmp_path / "one", "a/x.png", "y.png", "y.txt")
    fingerprint = FolderSource(root=one).open().fingerprint
    assert FolderSource(root=one).open().fingerprint == fingerprint
    shutil.copytree(one, tmp_path / "two")
    os.utime(tmp_path / "two/y.png", (1, 1))
    (tmp_path / "two/y.txt").write_text("not read")
    assert FolderSource(root=tmp_path / "two").open().fingerprint == fingerprint
    (tmp_path / "two/y.png").rename(tmp_path / "two/z.png")
    renamed = FolderSource(root=tmp_path / "two").open().fingerprint
    (tmp_path / "two/z.png").write_bytes((tmp_path / "two/z.png").read_bytes() + b"\0")
    longer = FolderSource(root=tmp_path / "two").open().fingerprint
    assert len({fingerprint, renamed, longer}) == 3


def test_the_fingerprint_covers_captions_and_classes(tmp_path):
    fill(tmp_path, "a/x.png", "a/x.txt")
    found = {FolderSource(root=tmp_path).open().fingerprint}
    found.add(FolderSource(root=tmp_path, class_names_from_folders=True).open().fingerprint)
    for caption in ("one", "three"):
        (tmp_path / "a/x.txt").write_text(caption)
        found.add(FolderSource(root=tmp_path, caption_suffix=".txt").open().fingerprint)
        metadata(tmp_path / "metadata.jsonl", {"file_name": "a/x.png", "text": caption * 2})
        found.add(FolderSource(root=tmp_path, caption_column="text").open().fingerprint)
    assert len(found) == 6


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, "pictures/x.png")
    assert len(FolderSource(root="~/pictures").open()) == 1


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(FolderSource(root="pictures")) == (
        f"data.source.root: the folder pictures does not exist (working folder: {tmp_path})."
    )


def test_a_file_is_no_folder(tmp_path):
    fill(tmp_path, "x.png")
    assert message(FolderSource(root=tmp_path / "x.png")) == (
        f"data.source.root: {tmp_path}/x.png is a file. Give the folder that holds the images."
    )


def test_no_images_says_what_counts_and_what_was_found(tmp_path):
    suffixes = ".bmp .gif .jpeg .jpg .png .webp, in any case"
    assert (
        message(FolderSource(root=tmp_path)) == f"data.source.root: no images in {tmp_path} ({suffixes}); it is empty."
    )
    fill(tmp_path, "a/1.tif", "2.TIF", "b.txt")
    assert message(FolderSource(root=tmp_path)) == (
        f"data.source.root: no images in {tmp_path} ({suffixes}); it holds 2 .tif, 1 .txt files."
    )


def test_a_missing_caption_file_is_named(tmp_path):
    fill(tmp_path, "a/x.png", "y.png", "z.png", "z.txt")
    assert message(FolderSource(root=tmp_path, caption_suffix=".txt")) == (
        f"{tmp_path}/a/x.png has no caption file beside it (as 1 more of 3 images): x.txt is missing. "
        "Write it, or leave out data.source.caption_suffix."
    )


def test_two_places_for_captions_are_refused(tmp_path):
    assert message(FolderSource(root=tmp_path, caption_suffix=".txt", caption_column="text")) == (
        "data.source: caption_suffix and caption_column both say where captions are. Keep one of them."
    )


def test_an_image_outside_of_the_class_folders_is_named(tmp_path):
    fill(tmp_path, "cat/x.png", "y.png")
    assert message(FolderSource(root=tmp_path, class_names_from_folders=True)) == (
        f"{tmp_path}/y.png is in no sub-folder, and data.source.class_names_from_folders takes the class from it. "
        "Move each image to the folder of its class."
    )


ROW = '{"file_name": "x.png", "text": "a"}\n'
MISFITS = [
    (
        None,
        "data.source.caption_column: no metadata.jsonl in ROOT. Write one line per image, such as "
        '{"file_name": "x.png", "text": "..."}.',
    ),
    (ROW + "{", "ROOT/metadata.jsonl, line 2: is not JSON (Expecting property name enclosed in double quotes: "),
    ("[" * 100_000, "ROOT/metadata.jsonl, line 1: is not JSON ("),
    (
        "[1]\n",
        'ROOT/metadata.jsonl, line 1: has no "file_name". Each line is an object with the name of its image.',
    ),
    (
        ROW.replace("text", "caption"),
        'ROOT/metadata.jsonl, line 1: has no text "text" (data.source.caption_column). It has: caption, file_name.',
    ),
    ("\n", "ROOT/x.png has no line in metadata.jsonl. Add it, or remove the image."),
    (
        ROW + ROW.replace("x.png", "../w.png"),
        "ROOT/../w.png is in metadata.jsonl and not in the folder. Remove the line, or add the image.",
    ),
]


@pytest.mark.parametrize(("lines", "wanted"), MISFITS)
def test_metadata_that_does_not_fit_is_named_with_its_line(tmp_path, lines, wanted):
    fill(tmp_path, "x.png")
    if lines is not None:
        (tmp_path / "metadata.jsonl").write_text(lines)
    assert message(FolderSource(root=tmp_path, caption_column="text")).startswith(wanted.replace("ROOT", str(tmp_path)))


def test_a_broken_caption_is_a_bad_sample(tmp_path):
    fill(tmp_path, "x.png", "x.txt")
    samples = FolderSource(root=tmp_path, caption_suffix=".txt").open()
    for content, wanted in [
        (b"ab\xff", "the caption is not UTF-8 (byte 2). Save it as UTF-8."),
        (b"a" * 70_000, "the caption is longer than 65536 bytes. Shorten it."),
    ]:
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(BadSample) as caught:
            samples.read(0)
        assert (str(caught.value), caught.value.reason) == (f"{tmp_path}/x.txt: {wanted}", "caption")
    (tmp_path / "x.txt").unlink()
    with pytest.raises(BadSample, match=r"x.txt: the caption cannot be read \(No such file or directory\)\."):
        samples.read(0)


def test_an_image_that_vanished_is_a_bad_sample(tmp_path):
    fill(tmp_path, "x.png", "y.png")
    samples = FolderSource(root=tmp_path).open()
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadSample) as caught:
        samples.read(0)
    assert (str(caught.value), caught.value.reason) == (
        f"{tmp_path}/x.png: the file does not exist (any more).",
        "missing",
    )
    assert len(samples) == 2


def test_names_of_any_bytes_stay_on_one_line(tmp_path):
    odd = os.fsencode(tmp_path) + b"/a\nb\xff\x1b[31m.png"
    Path(os.fsdecode(odd)).write_bytes(b"no image")
    samples = FolderSource(root=tmp_path).open()
    assert samples.name(0) == f"{tmp_path}/a\\nb\\udcff\\x1b[31m.png"
    assert samples.fingerprint
    with pytest.raises(BadSample) as caught:
        decode(samples.read(0).image, samples.name(0))
    assert str(caught.value).isprintable()
