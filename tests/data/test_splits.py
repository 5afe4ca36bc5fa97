"""Shares of the data: whole, apart, in proportion, and the same for everybody."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eclosion.data.splits import Splits, divide
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import ConfigError, DataError

NAMES = ("train", "val", "test")
# Shares on a grid of 5 %, as people write them; of 231 such triples DALLE2-pytorch refuses 11 for their rounding.
GRID = [(t / 20, v / 20, (20 - t - v) / 20) for t in range(21) for v in range(21 - t)]


def shares(train, val, test):
    return dict(zip(NAMES, (train, val, test), strict=True))


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write(folder: Path, sizes, *, labels=False) -> Path:
    """Shards of so many samples each; with labels, every shard has a class of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place in range(size):
                members = {"png": picture(), "txt": b"%d %d" % (number, place)}
                for suffix, content in (members | ({"cls": b"%d" % number} if labels else {})).items():
                    info = tarfile.TarInfo(f"{number:05d}{place:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def opened(folder, split="train", **options):
    url = f"{folder}/{{}}.tar"
    return WebDatasetSource(webdataset_base_url=url, shard_width=5, split=split, **options).open()


def captions(samples):
    return [samples.read(i).caption for i in range(len(samples))]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.sampled_from(GRID), st.integers(0, 2**32))
def test_every_thing_is_in_exactly_one_part_and_each_part_has_its_share(number, triple, seed):
    wanted = shares(*triple)
    parts = divide(number, wanted, seed=seed)
    if parts is None:
        # there is no way to round that leaves none of them empty
        assert any(0 < share * number < 1 for share in triple) or number == 0
        return
    assert sorted(i for part in parts.values() for i in part.tolist()) == list(range(number))
    for name, share in wanted.items():
        assert parts[name].tolist() == sorted(parts[name].tolist())
        assert abs(len(parts[name]) - share * number) < 1
        assert (len(parts[name]) == 0) == (share == 0)


def test_shares_that_add_up_are_accepted_whatever_their_rounding():
    assert len(GRID) == 231
    for triple in GRID:
        assert Splits(**shares(*triple)).shares() == shares(*triple)


def test_shares_that_people_write_are_accepted_in_any_order():
    for triple in [(0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.7, 0.1, 0.2), (0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3)]:
        assert divide(90, Splits(**shares(*triple)).shares(), seed=0) is not None
    assert Splits().shares() == shares(1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "total"),
    [
        (shares(0.7, 0.2, 0.2), "1.1"),
        (shares(0.5, 0.2, 0.1), "0.8"),
        (shares(0.0, 0.0, 0.0), "0"),
        ({"train": 0.9, "val": 0.2}, "1.1"),
        ({"val": 0.25}, "1.25"),  # train is 1 where it is not given
    ],
)
def test_shares_that_do_not_add_up_are_refused_with_their_sum(given, total):
    with pytest.raises(ConfigError) as caught:
        Splits(**given).shares()
    assert "\n" not in str(caught.value)
    assert "data.source.splits" in str(caught.value)
    assert total in str(caught.value)


def test_a_share_below_zero_is_refused_even_if_the_sum_is_one():
    with pytest.raises(ValueError, match="val"):
        Splits(train=1.5, val=-0.5)


def test_membership_is_a_function_of_the_number_and_the_seed_and_never_changes_between_versions():
    """Validation data of a run that is resumed, or judged by another program, must not have been trained on."""
    found = divide(20, shares(0.5, 0.3, 0.2), seed=3)
    assert {name: part.tolist() for name, part in found.items()} == {
        "train": [1, 3, 7, 8, 9, 11, 12, 15, 16, 17],
        "val": [4, 5, 6, 13, 14, 19],
        "test": [0, 2, 10, 18],
    }
    assert divide(20, shares(0.5, 0.3, 0.2), seed=4)["val"].tolist() != found["val"].tolist()


def test_every_shard_is_as_likely_in_each_part():
    """A shard is in a part of a quarter a quarter of the time: 400 seeds, within five standard deviations."""
    hits = [0] * 8
    for seed in range(400):
        for shard in divide(8, shares(0.5, 0.25, 0.25), seed=seed)["val"]:
            hits[shard] += 1
    assert sum(hits) == 800
    assert all(abs(hit - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for hit in hits)


# ------------------------------------------------------------------------------------------------ of real shards


def test_whole_shards_are_divided_and_every_sample_is_in_one_split(tmp_path):
    sizes = [3, 1, 4, 2, 5, 2, 3, 4, 1, 2]
    folder = write(tmp_path, sizes)
    given = Splits(train=0.7, val=0.2, test=0.1)
    parts = {name: opened(folder, name, splits=given) for name in NAMES}
    assert {name: len(parts[name].shard_names) for name in NAMES} == {"train": 7, "val": 2, "test": 1}
    found = {name: captions(part) for name, part in parts.items()}
    assert sorted(caption for part in found.values() for caption in part) == sorted(
        f"{n} {p}" for n, size in enumerate(sizes) for p in range(size)
    )
    for name, part in parts.items():
        shards = {caption.split()[0] for caption in found[name]}
        assert shards == {str(int(Path(shard).stem)) for shard in part.shard_names}
        assert sum(sizes[int(shard)] for shard in shards) == len(part)  # none of them in pieces
        assert part.splits == parts["train"].splits
        assert part.splits[name] == part.shard_names
        assert part.notes == []
    assert len({part.fingerprint for part in parts.values()}) == 3


def test_another_seed_divides_otherwise_and_the_size_of_shards_does_not_matter(tmp_path):
    folder = write(tmp_path / "a", [2] * 7)
    given = Splits(train=0.5, val=0.25, test=0.25)
    names = {seed: [Path(n).name for n in opened(folder, splits=given, split_seed=seed).shard_names] for seed in (0, 1)}
    assert names[0] != names[1]
    longer = write(tmp_path / "b", [5, 1, 3, 1, 4, 2, 2])
    assert [Path(n).name for n in opened(longer, splits=given).shard_names] == names[0]


@pytest.mark.parametrize("sizes", [[20], [7, 0, 13], [9, 11]])
def test_with_too_few_shards_samples_are_divided_and_the_user_is_told(sizes, tmp_path):
    folder = write(tmp_path, sizes)
    given = Splits(train=0.7, val=0.2, test=0.1)
    parts = {name: opened(folder, name, splits=given) for name in NAMES}
    assert {name: len(part) for name, part in parts.items()} == {"train": 14, "val": 4, "test": 2}
    found = [caption for part in parts.values() for caption in captions(part)]
    assert sorted(found) == sorted(f"{n} {p}" for n, size in enumerate(sizes) for p in range(size))
    for part in parts.values():
        (note,) = part.notes
        assert "samples are divided" in note
        assert f"{len(sizes)} shard" in note


def test_a_share_of_zero_needs_no_shard(tmp_path):
    folder = write(tmp_path, [3])
    assert captions(opened(folder, splits=Splits(train=0.0, val=0.0, test=1.0), split="test")) == ["0 0", "0 1", "0 2"]
    samples = opened(folder)
    assert len(samples) == 3
    assert samples.notes == []
    assert samples.splits["val"] == samples.splits["test"] == []


def test_a_split_whose_share_is_zero_cannot_be_read(tmp_path):
    """It has no samples; that is one line, and not a crash."""
    with pytest.raises((ConfigError, DataError)) as caught:
        opened(write(tmp_path, [3, 2]), "val")
    assert "\n" not in str(caught.value)
    assert "val" in str(caught.value)


def test_a_split_that_got_only_empty_shards_is_one_line(tmp_path):
    folder = write(tmp_path, [3, 0])
    messages = []
    for split in ("train", "val"):
        try:
            opened(folder, split, splits=Splits(train=0.5, val=0.5))
        except DataError as error:
            messages.append(str(error))
    (message,) = messages
    assert "\n" not in message
    assert "00001.tar" in message


def test_too_few_samples_are_a_named_error(tmp_path):
    with pytest.raises(DataError, match=r"samples.*too few") as caught:
        opened(write(tmp_path, [1, 1]), splits=Splits(train=0.8, val=0.1, test=0.1))
    assert "data.source.splits" in str(caught.value)


def test_all_splits_know_the_classes_of_all_shards(tmp_path):
    """A network for the classes of the training data must fit the validation data."""
    folder = write(tmp_path, [2] * 6, labels=True)
    given = Splits(train=0.5, val=0.25, test=0.25)
    for name in NAMES:
        samples = opened(folder, name, splits=given, labels=True)
        assert samples.class_names == ("0", "1", "2", "3", "4", "5")
        assert all(str(s.label) == s.caption.split()[0] for s in map(samples.read, range(len(samples))))


def test_damage_is_seen_in_whatever_way_the_data_is_divided(tmp_path):
    """With few shards samples are divided; a shard without any readable one must not vanish from all splits."""
    folder = write(tmp_path, [6, 6])
    (folder / "00001.tar").write_bytes(b"\x1f\x8b" + bytes(3000))
    told = []
    for name in NAMES:
        samples = opened(folder, name, splits=Splits(train=0.5, val=0.25, test=0.25))
        told.append((samples.notes, sum(count for reasons in samples.left_out for count in reasons.values())))
    assert any("00001.tar" in note for notes, _ in told for note in notes)
    assert sum(count for _, count in told) > 0
