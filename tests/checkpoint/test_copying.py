"""Copies of checkpoints are whole or not there, and replace nothing but checkpoints."""

import os
import shutil
import threading

import pytest
import torch

from eclosion.checkpoint import copying, disk, storage
from eclosion.checkpoint.copying import averages, copy_checkpoint, recover, write_model
from eclosion.errors import CheckpointError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
AVERAGE = {name: tensor + 0.5 for name, tensor in WEIGHTS.items()}


@pytest.fixture
def checkpoint(tmp_path):
    files = {"net": WEIGHTS, "net.ema": AVERAGE, "net.optimizer": {"a.exp_avg": torch.zeros(2, 3)}}
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    state = {"step": 7, "samples_seen": 56, "ledger": {"of": "this run"}, "untrained": []}
    storage.write(folder, files, state, {"config": {"output": "run"}})
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_copy_has_the_same_bytes_under_any_name(checkpoint, tmp_path):
    copy_checkpoint(checkpoint, tmp_path / "out" / "latest.pth")
    assert content(tmp_path / "out" / "latest.pth") == content(checkpoint)
    assert storage.verify(tmp_path / "out" / "latest.pth").step == 7
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["latest.pth"]


def test_a_newer_copy_takes_the_place_of_an_older_one(checkpoint, tmp_path):
    write_model(checkpoint, tmp_path / "latest")
    copy_checkpoint(checkpoint, tmp_path / "latest")
    assert content(tmp_path / "latest") == content(checkpoint)


def test_a_model_holds_the_averages_and_nothing_that_training_goes_on_with(checkpoint, tmp_path):
    write_model(checkpoint, tmp_path / "model.pth")
    loaded = storage.read(tmp_path / "model.pth", verified=True)
    assert loaded.files.keys() == {"net"}
    torch.testing.assert_close(loaded.files["net"], AVERAGE, rtol=0, atol=0)
    assert loaded.state == {"step": 7, "samples_seen": 56, "untrained": []}
    assert loaded.manifest.meta == {"config": {"output": "run"}, "kind": "model"}
    torch.testing.assert_close(averages(loaded)["net"], AVERAGE, rtol=0, atol=0)


def test_a_copy_of_a_model_is_that_model(checkpoint, tmp_path):
    write_model(checkpoint, tmp_path / "model")
    copy_checkpoint(tmp_path / "model", tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "model")


def test_a_damaged_checkpoint_is_not_copied_and_the_copy_of_before_stays(checkpoint, tmp_path):
    copy_checkpoint(checkpoint, tmp_path / "latest")
    before = content(tmp_path / "latest")
    raw = bytearray((checkpoint / "net.safetensors").read_bytes())
    raw[-1] ^= 1
    (checkpoint / "net.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged"):
        copy_checkpoint(checkpoint, tmp_path / "latest")
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged"):
        write_model(checkpoint, tmp_path / "latest")
    assert content(tmp_path / "latest") == before


def _file(path):
    path.write_text("a letter")


def _folder(path):
    path.mkdir()
    (path / "letter.txt").write_text("mine")


def _link(path):
    path.symlink_to(path.parent)


def _false_manifest(path):
    path.mkdir()
    (path / "manifest.json").write_text("{}")


@pytest.mark.parametrize("make", [_file, _folder, _link, _false_manifest])
@pytest.mark.parametrize("write", [copy_checkpoint, write_model])
def test_what_is_no_checkpoint_is_never_replaced(make, write, checkpoint, tmp_path):
    target = tmp_path / "out" / "latest"
    target.parent.mkdir()
    make(target)
    with pytest.raises(CheckpointError, match="is something else than a checkpoint of ours"):
        write(checkpoint, target)
    assert os.path.lexists(target)
    assert [path.name for path in target.parent.iterdir()] == ["latest"]


def test_a_checkpoint_that_holds_a_file_of_somebody_else_is_never_replaced(checkpoint, tmp_path):
    copy_checkpoint(checkpoint, tmp_path / "latest")
    (tmp_path / "latest" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which is no part of a checkpoint"):
        copy_checkpoint(checkpoint, tmp_path / "latest")
    assert (tmp_path / "latest" / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_copy_of_before(checkpoint, tmp_path, monkeypatch):
    copy_checkpoint(checkpoint, tmp_path / "latest")
    monkeypatch.setattr(disk, "_free", lambda folder: 10)
    with pytest.raises(CheckpointError, match=r"latest cannot be saved: No space left on device"):
        copy_checkpoint(checkpoint, tmp_path / "latest")
    assert content(tmp_path / "latest") == content(checkpoint)


@pytest.mark.parametrize("write", [copy_checkpoint, write_model])
def test_an_error_at_any_operation_leaves_the_old_copy_or_the_new_one(write, checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "out" / "latest"
    copy_checkpoint(checkpoint, target)
    old = content(target)
    write(checkpoint, tmp_path / "wanted")
    new = content(tmp_path / "wanted")
    real, count = {name: getattr(os, name) for name in ("fsync", "rename", "mkdir", "open")}, [0, 0]

    def failing(name):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == count[1]:
                raise OSError(5, "Input/output error")
            return real[name](*args, **kwargs)

        return call

    for k in range(1, 60):
        count[:] = [0, k]
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                write(checkpoint, target)
            except CheckpointError:
                failed = True
            else:
                failed = False
        recover(target)
        assert content(target) in (old, new), k
        if count[0] < k and not failed:
            break
    else:
        raise AssertionError("more operations than were looked at")
    assert [path.name for path in target.parent.iterdir()] == ["latest"]


def test_what_a_killed_copy_set_aside_is_put_back(checkpoint, tmp_path):
    copy_checkpoint(checkpoint, tmp_path / "out" / "latest")
    (tmp_path / "out" / "latest").rename(tmp_path / "out" / f".replaced-latest-{'0' * 32}")
    shutil.copytree(checkpoint, tmp_path / "out" / f".partial-latest-{'1' * 32}")
    shutil.copytree(checkpoint, tmp_path / "out" / f".partial-other-{'1' * 32}")
    recover(tmp_path / "out" / "latest")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f".partial-other-{'1' * 32}", "latest"]
    assert content(tmp_path / "out" / "latest") == content(checkpoint)


def test_there_is_a_whole_copy_at_every_moment(checkpoint, tmp_path):
    """Where the system lets two folders take each other's place."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if not copying._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two folders")
    final, missing, done = tmp_path / "latest", [], threading.Event()
    copy_checkpoint(checkpoint, final)

    def watch():
        while not done.is_set():
            if not (final / "manifest.json").exists():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(30):
        copy_checkpoint(checkpoint, final)
    done.set()
    watcher.join()
    assert missing == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest", "run"]


def test_a_copy_waits_for_another_into_the_same_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "WAIT_SECONDS", 0.2)
    with (
        copying._alone(tmp_path, tmp_path / "latest"),
        pytest.raises(CheckpointError, match="another process has been"),
    ):
        copy_checkpoint(checkpoint, tmp_path / "latest")
    copy_checkpoint(checkpoint, tmp_path / "latest")
    assert storage.verify(tmp_path / "latest")
