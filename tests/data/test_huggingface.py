"""Hugging Face data sets from disk: every way to store one, columns found or named, and clear refusals."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402 - after it is known to be there

from eclosion.data.huggingface import HuggingFaceSource  # noqa: E402
from eclosion.data.images import decode  # noqa: E402
from eclosion.errors import BadSample, ConfigError, DataError  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep what the library writes out of the home folder, and its progress bars out of the output."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (4, 6, 3), np.uint8)


def png(index):
    file = io.BytesIO()
    Image.fromarray(pixels(index)).save(file, "PNG")
    return file.getvalue()


def table(num=5, **columns):
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "text": datasets.Value("string"),
        "breed": datasets.Value("string"),
        "year": datasets.Value("int64"),
    }
    rows = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(num)],
        "label": [i % 2 for i in range(num)],
        "text": [f" text {i} " for i in range(num)],
        "breed": ["tabby", "boxer", "siam", "boxer", "tabby"][:num],
        "year": [2001, 1999, 2001, 2010, 1999][:num],
    } | columns
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def stored(how, tmp_path):
    """A path to the same five images, stored in one of the ways."""
    path = tmp_path / "data"
    if how == "save_to_disk":
        table().save_to_disk(path)
    elif how == "save_to_disk, several splits":
        datasets.DatasetDict({"train": table(), "test": table(3)}).save_to_disk(path)
    elif how == "parquet file":
        path = tmp_path / "data.parquet"
        table().to_parquet(path)
    elif how == "parquet folder":
        path.mkdir()
        table().to_parquet(path / "train.parquet")
    elif how == "parquet without types":
        path.mkdir()
        pq.write_table(pa.table({"image": [{"bytes": png(i), "path": None} for i in range(5)]}), path / "a.parquet")
    elif how == "image folder":
        path.mkdir()
        for i in range(5):
            (path / f"{i}.png").write_bytes(png(i))
    return str(path)


WAYS = [
    "save_to_disk",
    "save_to_disk, several splits",
    "parquet file",
    "parquet folder",
    "parquet without types",
    "image folder",
]


@pytest.mark.parametrize("how", WAYS)
def test_every_way_to_store_images_gives_the_same_images(how, tmp_path):
    source = HuggingFaceSource(path=stored(how, tmp_path))
    samples = source.open()
    assert len(samples) == 5
    for i in range(5):
        np.testing.assert_array_equal(np.asarray(decode(samples.read(i).image, "one")), pixels(i))
        assert samples.read(i).name == samples.name(i)
        assert f"data{'.parquet' if how == 'parquet file' else ''} train[{i}]" in samples.name(i)
    assert source.open().fingerprint == samples.fingerprint
    assert (samples.class_names, samples.has_captions) == ((), False)


def test_columns_give_captions_and_classes(tmp_path):
    path = stored("parquet file", tmp_path)
    samples = HuggingFaceSource(path=path, caption_column="text", label_column="label").open()
    assert samples.has_captions
    assert samples.class_names == ("cat", "dog")
    assert [(s.caption, s.label) for s in map(samples.read, range(3))] == [("text 0", 0), ("text 1", 1), ("text 2", 0)]


@pytest.mark.parametrize(
    ("column", "class_names", "labels"),
    [
        ("breed", ("boxer", "siam", "tabby"), [2, 0, 1, 0, 2]),
        ("year", ("1999", "2001", "2010"), [1, 0, 1, 2, 0]),
    ],
)
def test_texts_and_numbers_become_classes(tmp_path, column, class_names, labels):
    samples = HuggingFaceSource(path=stored("save_to_disk", tmp_path), label_column=column).open()
    assert samples.class_names == class_names
    assert [samples.read(i).label for i in range(5)] == labels


def test_a_split_is_chosen_by_name(tmp_path):
    path = stored("save_to_disk, several splits", tmp_path)
    assert len(HuggingFaceSource(path=path, split="test").open()) == 3
    parquet = stored("parquet file", tmp_path)
    assert len(HuggingFaceSource(path=parquet, split="train[:2]").open()) == 2


def test_a_column_of_bytes_can_be_named(tmp_path):
    path = tmp_path / "blobs.parquet"
    pq.write_table(pa.table({"a": [png(1), png(2)], "b": [png(3), png(4)]}), path)
    samples = HuggingFaceSource(path=str(path), image_column="b").open()
    np.testing.assert_array_equal(np.asarray(decode(samples.read(1).image, "one")), pixels(4))


def test_rows_are_read_from_many_threads_at_once(tmp_path):
    samples = HuggingFaceSource(path=stored("parquet file", tmp_path), caption_column="text").open()
    wrong, rounds = [], 40

    def read(thread):
        for k in range(rounds):
            index = (thread + k) % 5
            sample = samples.read(index)
            if (
                not np.array_equal(np.asarray(decode(sample.image, "one")), pixels(index))
                or sample.caption != f"text {index}"
            ):
                wrong.append((thread, index))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_the_fingerprint_sees_other_images_columns_and_lengths(tmp_path):
    found = set()
    for number, data in enumerate(
        [table(), table(4), table(5, image=[{"bytes": png(9), "path": f"{i}.png"} for i in range(5)])]
    ):
        data.to_parquet(tmp_path / f"{number}.parquet")
        found.add(HuggingFaceSource(path=str(tmp_path / f"{number}.parquet")).open().fingerprint)
    found.add(HuggingFaceSource(path=str(tmp_path / "0.parquet"), caption_column="text").open().fingerprint)
    (tmp_path / "moved.parquet").write_bytes((tmp_path / "0.parquet").read_bytes())
    found.add(HuggingFaceSource(path=str(tmp_path / "moved.parquet")).open().fingerprint)
    assert len(found) == 4


def test_what_a_row_lacks_makes_it_a_bad_sample(tmp_path):
    broken = [{"bytes": png(0)[:60], "path": "half.png"}, None, {"bytes": None, "path": "/nowhere/x.png"}]
    images = broken + [{"bytes": png(i), "path": None} for i in range(2)]
    data = table(5, image=images, text=["a", "b", "c", None, "e"], label=[0, 0, 0, 0, None])
    pq.write_table(data.data.table, tmp_path / "bad.parquet")  # to_parquet would look for the files
    path = str(tmp_path / "bad.parquet")
    samples = HuggingFaceSource(path=path, caption_column="text", label_column="label").open()
    for index, reason, message in [
        (0, "truncated", f"{path} train[0] 'half.png': the image ends early: the file is truncated ("),
        (1, "missing", f"{path} train[1]: has no image."),
        (2, "missing", f"{path} train[2] '/nowhere/x.png': the file does not exist (any more)."),
        (3, "caption", f"{path} train[3]: has no caption in column 'text'."),
        (4, "label", f"{path} train[4]: has no class in column 'label' (it holds None)."),
    ]:
        with pytest.raises(BadSample) as caught:
            decode(samples.read(index).image, samples.name(index))
        assert caught.value.reason == reason
        assert str(caught.value).startswith(message)


def refused(**options):
    with pytest.raises((DataError, ConfigError)) as caught:
        HuggingFaceSource(**options).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


HAS = "image (Image), label (ClassLabel), text (string), breed (string), year (int64)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_column": "img"},
            "data.source.image_column: PATH has no column 'img'. Did you mean 'image'? "
            "Options: breed, image, label, text, year.",
        ),
        (
            {"image_column": "text"},
            f"data.source.image_column: column 'text' of PATH holds no images. It has: {HAS}.",
        ),
        (
            {"caption_column": "txt"},
            "data.source.caption_column: PATH has no column 'txt'. Did you mean 'text'? "
            "Options: breed, image, label, text, year.",
        ),
        (
            {"caption_column": "year"},
            f"data.source.caption_column: column 'year' of PATH holds no text. It has: {HAS}.",
        ),
        (
            {"label_column": "image"},
            "data.source.label_column: column 'image' of PATH holds no classes (ClassLabel, whole numbers or text). "
            f"It has: {HAS}.",
        ),
        (
            {"split": "test"},
            "data.source.path: PATH (split 'test') cannot be loaded: ",
        ),
    ],
)
def test_columns_that_do_not_fit_are_named_with_those_that_are_there(tmp_path, options, message):
    path = stored("parquet folder", tmp_path)
    assert refused(path=path, **options).startswith(message.replace("PATH", path))


def test_two_columns_of_images_are_ambiguous_and_none_is_said(tmp_path):
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image(), "n": datasets.Value("int64")})
    row = {"bytes": png(0), "path": None}
    two = datasets.Dataset.from_dict({"a": [row], "b": [row], "n": [1]}, features=features)
    two.save_to_disk(tmp_path / "two")
    assert refused(path=str(tmp_path / "two")) == (
        f"data.source.image_column: {tmp_path}/two has 2 columns with images. "
        "Name one of its columns: a (Image), b (Image), n (int64)."
    )
    two.select_columns(["n"]).save_to_disk(tmp_path / "none")
    assert refused(path=str(tmp_path / "none")) == (
        f"data.source.image_column: {tmp_path}/none has no column of type Image. Name one of its columns: n (int64)."
    )


def test_a_split_that_was_not_saved_is_refused_with_those_that_were(tmp_path):
    path = stored("save_to_disk, several splits", tmp_path)
    assert refused(path=path, split="tests") == (
        f"data.source.split: {path} has no split 'tests'. Did you mean 'test'? Options: test, train."
    )


def test_an_empty_split_is_refused(tmp_path):
    path = stored("parquet file", tmp_path)
    assert refused(path=path, split="train[:0]").startswith(f"data.source.path: {path} (split 'train[:0]') cannot be ")
    saved = table().filter(lambda row: row["year"] > 3000)
    saved.save_to_disk(tmp_path / "empty")
    assert refused(path=str(tmp_path / "empty")) == f"data.source.path: split 'train' of {tmp_path}/empty is empty."


def test_options_that_would_have_no_effect_are_refused(tmp_path):
    path = stored("save_to_disk", tmp_path)
    assert refused(path=path, revision="main") == (
        f"data.source.revision: {path} is on disk and has no revisions. Leave it out."
    )
    assert refused(path=path, config_name="small") == (
        f"data.source.config_name: {path} has no configurations. Leave it out."
    )


def test_a_damaged_file_is_one_line(tmp_path):
    path = stored("parquet file", tmp_path)
    (tmp_path / "data.parquet").write_bytes((tmp_path / "data.parquet").read_bytes()[:200])
    assert refused(path=path).startswith(f"data.source.path: {path} (split 'train') cannot be loaded: ")
    table().save_to_disk(tmp_path / "disk")
    (tmp_path / "disk/state.json").write_text("{")
    assert "cannot be loaded: " in refused(path=str(tmp_path / "disk"))


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(path="./gone") == f"data.source.path: ./gone does not exist (working folder: {tmp_path})."


def test_a_name_on_the_hub_without_a_network_is_one_line():
    assert refused(path="nobody/nothing").startswith(
        "data.source.path: nobody/nothing (split 'train') cannot be loaded: Couldn't reach 'nobody/nothing' on the Hub"
    )
