"""A file of statistics: what was written comes back, and nothing else is taken for it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eclosion.errors import ConfigError, DataError, EnvironmentProblem
from eclosion.evaluation.sealed import Unsealed, read_sealed, text_tensor, write_sealed
from eclosion.evaluation.statistics import load_statistics, read_statistics, save_statistics
from eclosion.metrics.metric import Moments, Reference
from eclosion.models.encoders import ClipEncoder, InceptionEncoder
from eclosion.models.image_encoder import ImageEncoder, Preprocess

DIM, COUNT, KEPT = 3, 8, 4
ROWS = torch.from_numpy(np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32))
REFERENCE = Reference(Moments.of(ROWS), ROWS[:KEPT], ("a", "ü\udce4.png", "c\n", ""))


class Noise:
    name, fingerprint, facts = "noise", "0123", {"what": "data", "size": [8, 8], "root": Path("some/where")}

    def __len__(self):
        return COUNT


def encoder(seed=0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM))
    with torch.no_grad():
        net[1].weight.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=(DIM, 12))))
        net[1].bias.zero_()
    preprocess = Preprocess(resize=(2, 2), crop=None, mean=(0.0,) * 3, std=(1.0,) * 3)
    return ImageEncoder(net, preprocess, dim=DIM, normalize=False)


def saved(path, part=None, made=REFERENCE):
    save_statistics(path, made, images=Noise(), part=part, encoder=encoder())
    return path


def message(kind, call, *args):
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resealed(path, change):
    """A file whose seal is right, and whose content was changed."""
    text, tensors = read_sealed(path)
    facts = json.loads(text)
    change(facts, tensors)
    write_sealed(path, json.dumps(facts), tensors)


def test_what_was_written_comes_back(tmp_path):
    path = saved(tmp_path / "new" / "stats.safetensors", InceptionEncoder(weights=Path("/secret/place/w.pth")))
    found, facts = read_statistics(path)
    assert found.moments.count == COUNT
    assert torch.equal(found.moments.total, REFERENCE.moments.total)
    assert torch.equal(found.moments.outer, REFERENCE.moments.outer)
    assert torch.equal(found.features, REFERENCE.features)
    assert found.names == REFERENCE.names
    assert (facts.name, facts.images, facts.num_images, facts.num_kept, facts.dim) == ("noise", "0123", 8, 4, 3)
    assert facts.told == {"what": "data", "size": [8, 8], "root": "some/where"}
    assert (facts.extractor["name"], facts.extractor["features"]) == ("inception", 2048)
    assert "cache_gb" not in facts.extractor  # which decides nothing
    assert (facts.fingerprint, facts.weights) == (encoder().fingerprint, encoder().weights)
    assert facts.resize == "bicubic antialiased"
    assert facts.made_with["device"] == "cpu"
    assert [each.name for each in path.parent.iterdir()] == ["stats.safetensors"]


def test_a_file_to_be_shared_names_no_folder_of_this_machine(tmp_path):
    for part in (InceptionEncoder(weights=Path("/secret/place/w.pth")), ClipEncoder(model="~/secret/place/clip")):
        assert b"secret" not in saved(tmp_path / "stats.safetensors", part).read_bytes()
    assert read_statistics(tmp_path / "stats.safetensors")[1].extractor["model"] == "clip"


def test_equal_statistics_give_equal_bytes(tmp_path):
    assert len({saved(tmp_path / name).read_bytes() for name in "abcdefgh"}) == 1


def test_features_of_another_extractor_are_refused_with_both_named(tmp_path):
    path = saved(tmp_path / "stats.safetensors", ClipEncoder(model="ViT-B/32"))
    assert load_statistics(path, encoder(), "against").names == REFERENCE.names
    said = message(ConfigError, load_statistics, path, encoder(seed=1), "against")
    assert said.startswith(f"against: {path} holds features of clip,")
    assert "model=ViT-B/32" in said
    assert encoder().fingerprint[:12] in said
    assert encoder(seed=1).fingerprint[:12] in said
    assert "Scores of different extractors do not compare" in said


def test_a_bit_that_flips_anywhere_is_noticed(tmp_path):
    path = saved(tmp_path / "stats.safetensors")
    data = path.read_bytes()
    for place in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert str(path) in message(DataError, read_statistics, path)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_file_that_ends_early_is_noticed(length, tmp_path):
    path = saved(tmp_path / "stats.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    said = message(DataError, read_statistics, path)
    assert said.startswith(f"against: {path} cannot be used: ")
    assert said.endswith("Wanted is a file that `eclosion stats` wrote; make it again, or copy it again.")


def test_what_is_not_there_or_is_something_else_is_said(tmp_path):
    path = tmp_path / "stats.safetensors"
    assert message(DataError, read_statistics, path, "train") == (
        f"train: there is no file {path}. Make it with: eclosion stats SOURCE stats.safetensors"
    )
    save_file({"weight": torch.zeros(2)}, path)
    assert "it is not of eclosion's making" in message(DataError, read_statistics, path)
    assert "cannot be used" in message(DataError, read_statistics, tmp_path)
    write_sealed(path, json.dumps({"what": "progress"}), {"total": torch.zeros(2)})
    assert "it holds something else" in message(DataError, read_statistics, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f, t: f.update(format=2), "its format is 2, and this version of eclosion reads 1"),
        (lambda f, t: f.update(num_images=-1), "makes no sense"),
        (lambda f, t: f.update(num_images=2), "makes no sense"),
        (lambda f, t: f.update(dim=True), "makes no sense"),
        (lambda f, t: f.update(name=["noise"]), "makes no sense"),
        (lambda f, t: f.update(more=1), "unexpected keyword argument 'more'"),
        (lambda f, t: f.update(dim=4), r"total is torch.float64 [3], and must be torch.float64 [4]"),
        (lambda f, t: t.update(features=t["features"].double()), "features is torch.float64 [4, 3], and must be"),
        (lambda f, t: t.update(features=t["features"][:2]), "features is torch.float32 [2, 3], and must be"),
        (lambda f, t: t["outer"].__setitem__((1, 1), float("nan")), "outer holds values that are not finite"),
        (lambda f, t: t.update(names=text_tensor('["a"]')), "it has no names of its 4 images"),
        (lambda f, t: t.update(names=text_tensor("[1, 2, 3, 4]")), "it has no names of its 4 images"),
        (lambda f, t: t.update(names=text_tensor("[" * 100_000)), "cannot be used"),
        (lambda f, t: t.pop("outer"), "outer"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change, said, tmp_path):
    path = saved(tmp_path / "stats.safetensors")
    resealed(path, change)
    assert said in message(DataError, read_statistics, path)


def test_what_was_there_stays_when_a_file_cannot_be_written(tmp_path, monkeypatch):
    path = saved(tmp_path / "stats.safetensors")
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    said = message(EnvironmentProblem, saved, path, None, Reference(Moments.of(ROWS[:5]), ROWS[:5]))
    assert said.startswith(f"{path} cannot be written (No space left on device).")
    assert [each.name for each in tmp_path.iterdir()] == ["stats.safetensors"]
    assert path.read_bytes() == before


def test_statistics_without_names_or_with_one_row_are_statistics(tmp_path):
    path = saved(tmp_path / "stats.safetensors", made=Reference(Moments.of(ROWS), ROWS[:1]))
    assert read_statistics(path)[0].names == ()


def test_no_such_file_is_not_one_that_is_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(Unsealed):
        read_sealed(tmp_path / "text")
