"""The checkpoints of a run: snapshots, background failures, the newest valid one, retention."""

import errno
import os
import threading

import pytest
import torch

from eclosion.checkpoint import disk, storage
from eclosion.checkpoint.store import CheckpointStore, _snapshot
from eclosion.errors import CheckpointError
from eclosion.rundir import RunDir


def weights(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"unet": {"w": torch.full((100,), float(step)), "n": torch.tensor(step)}}


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path)


def filled(run: RunDir, *steps: int, keep_last: int = 100) -> CheckpointStore:
    store = CheckpointStore(run, keep_last=keep_last)
    for step in steps:
        store.save(step, weights(step), {"step": step}, {}, wait=True)
    return store


def steps(store: CheckpointStore) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in store.folders()]


def damage(run: RunDir, step: int, name: str = "unet.safetensors") -> None:
    path = run.checkpoint(step) / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


@pytest.fixture
def gate(monkeypatch):
    """Holds every fsync until it is set, and says when the first is reached."""
    reached, opened, real = threading.Event(), threading.Event(), os.fsync

    def fsync(fd):
        reached.set()
        assert opened.wait(30)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    opened.reached = reached
    yield opened
    opened.set()


def test_what_is_saved_is_loaded(run):
    with filled(run, 5) as store:
        loaded = store.load(5)
        assert torch.equal(loaded.files["unet"]["w"], torch.full((100,), 5.0))
        assert loaded.files["unet"]["n"].shape == ()
        assert loaded.state == {"step": 5}
        assert store.load(run.checkpoint(5)).manifest == loaded.manifest


def test_a_run_without_checkpoints_has_no_latest(run):
    assert CheckpointStore(run).latest() is None
    run.checkpoints.mkdir()
    (run.checkpoints / "notes.txt").write_text("mine")
    (run.checkpoints / ".partial-3-0").mkdir()
    assert CheckpointStore(run).latest() is None


def test_save_returns_before_the_disk_is_done_and_writes_the_values_of_that_moment(run, gate):
    files, state = weights(1), {"step": 1, "names": ["a"]}
    with CheckpointStore(run) as store:
        gate.set()
        store.save(0, weights(0), {}, {}, wait=True)  # so that the snapshot's memory is used a second time
        gate.clear()
        gate.reached.clear()
        store.save(1, files, state, {})
        files["unet"]["w"].fill_(-1)
        files["unet"]["n"].fill_(-1)
        files["unet"].clear()
        state["names"].append("b")
        assert gate.reached.wait(30)
        assert store.busy
        store.check()  # nothing to report, and no waiting
        assert not run.checkpoint(1).exists()
        gate.set()
        store.close()
        assert not store.busy
    loaded = CheckpointStore(run).load(1)
    assert torch.equal(loaded.files["unet"]["w"], torch.ones(100))
    assert int(loaded.files["unet"]["n"]) == 1
    assert loaded.state == {"step": 1, "names": ["a"]}


def test_the_next_save_waits_for_the_one_before(run, gate):
    """Else its snapshot would overwrite the memory that is being written."""
    with CheckpointStore(run) as store:
        store.save(1, weights(1), {}, {})
        assert gate.reached.wait(30)
        threading.Timer(0.2, gate.set).start()
        store.save(2, weights(2), {}, {})
        assert run.checkpoint(1).is_dir()
        store.close()
    assert float(CheckpointStore(run).load(1).files["unet"]["w"][0]) == 1
    assert float(CheckpointStore(run).load(2).files["unet"]["w"][0]) == 2


def test_snapshots_share_their_memory_from_save_to_save_and_follow_new_shapes():
    first = _snapshot(weights(1), {})
    assert _snapshot(weights(2), first)["unet"]["w"].data_ptr() == first["unet"]["w"].data_ptr()
    other = _snapshot({"unet": {"w": torch.zeros(3)}, "vae": {"w": torch.ones(2)}}, first)
    assert other["unet"].keys() == {"w"}
    assert other["unet"]["w"].shape == (3,)
    assert torch.equal(other["vae"]["w"], torch.ones(2))
    assert _snapshot({"unet": {"w": torch.zeros(3).bfloat16()}}, other)["unet"]["w"].dtype == torch.bfloat16


@pytest.mark.gpu
def test_a_snapshot_of_a_device_is_whole_when_save_returns(run):
    """The copies run beside the host; changing the tensors at once must not reach the file."""
    tensors = {str(i): torch.full((1 << 20,), float(i), device="cuda") for i in range(64)}
    with CheckpointStore(run) as store:
        for step in (1, 2):
            for i in range(64):
                tensors[str(i)].fill_(i * step)
            store.save(step, {"net": tensors}, {}, {})
            for tensor in tensors.values():
                tensor.fill_(-1)
        store.close()
        for step in (1, 2):
            loaded = store.load(step).files["net"]
            assert all(torch.equal(loaded[str(i)], torch.full((1 << 20,), float(i * step))) for i in range(64))
        assert _snapshot({"net": tensors}, {})["net"]["0"].is_pinned()


@pytest.mark.parametrize("how", ["check", "save", "close", "with"])
def test_a_failure_in_the_background_surfaces_once_at_the_next_call(run, monkeypatch, how):
    store = filled(run, 1)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        store.save(2, weights(2), {}, {})
        while store.busy:
            pass
    calls = {
        "check": store.check,
        "close": store.close,
        "save": lambda: store.save(3, weights(3), {}, {}),
        "with": lambda: store.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointError, match="step-00000002 cannot be saved: No space left on device"):
        calls[how]()
    store.check()
    assert steps(store) == [1]
    store.close()


def test_after_a_failed_save_the_next_one_works(run, monkeypatch):
    store = filled(run, 1)
    with monkeypatch.context() as broken:
        broken.setattr(disk, "fsync_folder", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        with pytest.raises(CheckpointError):
            store.save(2, weights(2), {}, {}, wait=True)
    store.save(3, weights(3), {}, {}, wait=True)
    assert store.latest() == run.checkpoint(3)
    store.close()


def test_an_error_that_ended_the_run_is_not_hidden_by_a_failed_save(run, monkeypatch):
    monkeypatch.setattr(storage, "write", lambda *_: (_ for _ in ()).throw(CheckpointError("the disk is full")))

    def train():
        with CheckpointStore(run) as store:
            store.save(1, weights(1), {}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert caught.value.__notes__ == ["the disk is full"]


def test_a_state_that_is_not_json_is_refused_by_save_itself(run):
    with CheckpointStore(run) as store, pytest.raises(TypeError):
        store.save(1, weights(1), {"x": {1, 2}}, {})


def test_a_damaged_newest_checkpoint_is_passed_over_in_one_line(run):
    store = filled(run, 8, 9, 10)
    damage(run, 10)
    (run.checkpoint(9) / "state.json").unlink()
    assert store.latest() == run.checkpoint(8)
    assert store.warnings == [
        f"{run.checkpoint(10)}/unet.safetensors is damaged: its sha256 is not the one in manifest.json. "
        "Resuming from step-00000008 instead.",
        f"{run.checkpoint(9)}/state.json is missing, and its checkpoint is damaged. "
        "Resuming from step-00000008 instead.",
    ]
    store.close()


def test_when_no_checkpoint_is_valid_nothing_starts_from_scratch(run):
    store = filled(run, 1, 2)
    damage(run, 1)
    damage(run, 2, "manifest.json")
    with pytest.raises(
        CheckpointError, match=r"none of its 2 checkpoints is valid: .*step-00000002/manifest\.json"
    ) as caught:
        store.latest()
    assert "\n" not in str(caught.value)
    store.close()


def test_load_verifies_every_byte(run):
    store = filled(run, 1, 2)
    damage(run, 2)
    with pytest.raises(CheckpointError, match="sha256"):
        store.load(2)
    store.close()


def test_load_after_latest_hashes_once_and_a_later_load_again(run, monkeypatch):
    store = filled(run, 1)
    hashed, real = [], storage._file_sha256
    monkeypatch.setattr(storage, "_file_sha256", lambda path: hashed.append(path) or real(path))
    store.load(store.latest())
    assert len(hashed) == 2  # unet and state.json
    store.load(1)
    assert len(hashed) == 4
    store.close()


def test_a_step_that_is_not_there_is_told_with_those_that_are(run):
    store = filled(run, 1, 2)
    with pytest.raises(CheckpointError, match=r"step-00000007 is no checkpoint\. .*: step-00000002, step-00000001\."):
        store.load(7)
    store.close()


def test_the_newest_are_kept_and_multiples_stay_for_good(run):
    with CheckpointStore(run, keep_last=3, keep_every=4) as store:
        for step in range(1, 13):
            store.save(step, weights(step), {}, {})
        store.close()
        assert steps(store) == [12, 11, 10, 8, 4]


@pytest.mark.parametrize("keep_last", [0, 1, 2])
def test_never_fewer_than_two_are_kept(run, keep_last):
    with filled(run, 1, 2, 3, 4, keep_last=keep_last) as store:
        assert steps(store) == [4, 3]


def test_damaged_checkpoints_do_not_count_as_kept(run):
    """A new process: it has to look at the bytes, since it did not write them."""
    filled(run, 1, 2, 3, 4).close()
    damage(run, 4)
    damage(run, 3)
    with CheckpointStore(run, keep_last=2) as store:
        store.save(5, weights(5), {}, {}, wait=True)
        assert steps(store) == [5, 4, 3, 2]
        assert len(store.warnings) == 2
        store.save(6, weights(6), {}, {}, wait=True)
        assert steps(store) == [6, 5]  # two valid ones again, so the damaged go with the old
        assert len(store.warnings) == 2


def test_nothing_is_deleted_when_the_new_checkpoint_cannot_be_read_back(run, monkeypatch):
    store = filled(run, 1, 2, keep_last=2)
    monkeypatch.setattr(os, "readv", lambda *_: 0)
    with pytest.raises(CheckpointError):
        store.save(3, weights(3), {}, {}, wait=True)
    assert steps(store) == [2, 1]
    store.close()


def test_a_checkpoint_that_cannot_be_deleted_is_told(run, monkeypatch):
    store = filled(run, 1, 2, 3)
    store.keep_last = 2

    def refuse(*_, **__):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(disk, "remove", refuse)
    with pytest.raises(CheckpointError, match="step-00000002 cannot be removed: Permission denied"):
        store.save(4, weights(4), {}, {}, wait=True)
    assert store.latest() == run.checkpoint(4)
    store.close()


def test_orphans_of_killed_saves_are_removed_and_nothing_else(run):
    store = filled(run, 1)
    uuid = "0" * 32
    (run.checkpoints / f".partial-00000002-{uuid}").mkdir()
    (run.checkpoints / f".partial-00000002-{uuid}" / "unet.safetensors").write_text("half")
    (run.checkpoints / f".replaced-00000001-{uuid}").mkdir()
    (run.checkpoints / "best").mkdir()
    (run.checkpoints / ".partial-notes").write_text("mine")
    store.clean_orphans()
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-00000001", "best", ".partial-notes"}
    store.close()


def test_a_checkpoint_that_a_killed_replacement_set_aside_is_put_back(run):
    store = filled(run, 1)
    run.checkpoint(1).rename(run.checkpoints / f".replaced-00000001-{'0' * 32}")
    store.clean_orphans()
    assert store.latest() == run.checkpoint(1)
    store.close()


def test_the_one_to_keep_outlives_newer_ones_until_another_takes_its_place_on_disk(run, gate):
    gate.set()
    with CheckpointStore(run, keep_last=2) as store:
        for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
            store.save(step, weights(step), {}, {}, keep=best, wait=True)
        assert steps(store) == [5, 4, 2]
        gate.clear()
        gate.reached.clear()
        store.save(6, weights(6), {}, {}, keep=6)
        assert gate.reached.wait(30)
        assert steps(store) == [5, 4, 2]  # the new best is not on disk, so the old one still is
        gate.set()
        store.close()
        assert steps(store) == [6, 5]
