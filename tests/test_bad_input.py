"""Everything that people get wrong: one clear line, the right exit code, and nothing lost."""

import errno
import json
import os
import shutil
import socket

import pytest
import yaml
from PIL import Image

from eclosion.checkpoint.lock import RunLock
from eclosion.rundir import RunDir


@pytest.fixture
def images(tmp_path):
    """Eight good pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        Image.effect_noise((24, 24), 50).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(make_config, images, tmp_path):
    """A run of four steps, each saved."""
    sections = {
        "data": {"source": {"name": "folder", "root": str(images)}},
        "train": {"duration": "4 steps", "batch_size": 4, "micro_batch_size": 2},
        "sample": {"num_images": 0},
        "checkpoint": {"every": "1 steps", "keep_last": 3},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(tmp_path / "run", **sections)))
    return path


@pytest.fixture
def trained(command, config, tmp_path):
    """The run of that config, finished."""
    assert command("train", config).code == 0
    return RunDir(tmp_path / "run")


def content(folder):
    """Every file of a folder with its bytes, but for what tells of the failure itself."""
    told = {"error.log", "lock"}
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in told}


def flip_a_bit(path):
    """Damage a file as a failing disk does, near its end."""
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def test_a_key_with_a_typo(command, config, tmp_path):
    outcome = command("train", config, "train.batchsize=3")
    assert outcome.code == 2
    assert outcome.err == (
        "error: train.batchsize is not an option. Did you mean 'batch_size'? Options: batch_size, channels_last, "
        "compile, deterministic, device, duration, freeze, gradient_checkpointing, max_grad_norm, micro_batch_size, "
        "mixed_precision, parallel.\n"
    )
    assert not (tmp_path / "run").exists()


def test_wrong_types_all_at_once(command, config):
    outcome = command("train", config, "train.batch_size=many", "optimizer.learning_rate=-1", "data.crop=3")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "error: data.crop is 3, and must be one of: center, random.",
        "error: train.batch_size is 'many', and must be int >= 1.",
        "error: optimizer.learning_rate is -1, and must be float > 0.",
    ]


def test_a_folder_that_is_missing(command, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command("train", config, "data.source.root=none")
    assert outcome.code == 3
    assert outcome.err == f"error: data.source.root: the folder none does not exist (working folder: {tmp_path}).\n"


def test_a_folder_without_images(command, config, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    outcome = command("train", config, f"data.source.root={tmp_path / 'notes'}")
    assert outcome.code == 3
    assert outcome.err == (
        f"error: data.source.root: no images in {tmp_path / 'notes'} (.bmp .gif .jpeg .jpg .png .webp, in any case); "
        "it holds 1 .txt files.\n"
    )


def test_a_broken_image_among_good_ones_stops_the_run(command, config, images):
    broken = images / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    wanted = (
        f"error: {broken}: the image ends early: the file is truncated (image file is truncated). 1 of 8 samples of "
        "epoch 0 cannot be used (truncated), and data.max_bad_fraction=0 allows 0. Repair or remove the sample, or "
        "raise data.max_bad_fraction.\n"
    )
    for verb in ("train", "check"):
        outcome = command(verb, config, "train.batch_size=8")
        assert (outcome.code, outcome.err) == (3, wanted)


def test_a_broken_image_within_the_budget_is_skipped_and_accounted_for(command, config, images, tmp_path):
    broken = images / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    outcome = command("train", config, "data.max_bad_fraction=0.2")
    assert (outcome.code, outcome.err) == (0, "")
    words = f"skipped {broken}: the image ends early: the file is truncated (image file is truncated)."
    assert outcome.out.count(words) == 2  # once in each of two epochs
    ledger = [json.loads(line) for line in RunDir(tmp_path / "run").ledger.read_text().splitlines()]
    assert [(line["delivered"], line["skipped"]) for line in ledger] == [(7, {"truncated": 1})] * 2
    checked = command("check", config, "data.max_bad_fraction=0.2", "train.batch_size=8", f"output={tmp_path / 'new'}")
    assert checked.code == 0
    assert f"note: {broken}: the image ends early" in checked.out


def test_an_image_smaller_than_the_crop(command, config, images):
    Image.new("RGB", (24, 12)).save(images / "5.png")
    outcome = command("train", config, "train.batch_size=8")
    assert outcome.code == 3
    assert outcome.err == (
        f"error: {images / '5.png'}: is 24x12 pixels (width x height), smaller than the crop of 16x16. Set data.resize "
        'to "cover", or data.image_size to less. 1 of 8 samples of epoch 0 cannot be used (too_small), and '
        "data.max_bad_fraction=0 allows 0. Repair or remove the sample, or raise data.max_bad_fraction.\n"
    )


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (
            ["train.micro_batch_size=3"],
            1,
            "train.micro_batch_size: 3 does not divide the images of a step (a step has 4). Use one of 1, 2, 4.",
        ),
        (
            ["train.batch_size=7", "train.micro_batch_size=null"],
            2,
            "train.batch_size: 7 images cannot be shared evenly by 2 processes. Use a multiple of 2, such as 6 or 8.",
        ),
        (
            ["train.batch_size=12", "train.micro_batch_size=4"],
            2,
            "train.micro_batch_size: 4 does not divide the images of a step (each of 2 processes has 6 of the 12). "
            "Use one of 1, 2, 3, 6.",
        ),
    ],
)
def test_a_batch_that_cannot_be_divided(overrides, processes, message, command, config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    outcome = command("check", config, *overrides)
    assert (outcome.code, outcome.err) == (2, f"error: {message}\n")
    if processes == 1:
        outcome = command("train", config, *overrides)
        assert (outcome.code, outcome.err) == (2, f"error: {message}\n")


def test_a_checkpoint_of_another_config(command, config, trained):
    before = content(trained.root)
    outcome = command("train", config, "seed=5", "data.image_size=8")
    assert outcome.code == 2
    newest = trained.checkpoint(4)
    assert outcome.err.splitlines() == [
        f"error: data.image_size: 16 -> 8 would make it another run than the one in {newest}.",
        f"error: seed: 0 -> 5 would make it another run than the one in {newest}.",
        "error: Put the values back, or choose another output folder.",
    ]
    assert content(trained.root) == before


def test_a_schedule_that_changed_needs_the_users_word(command, config, trained):
    before = content(trained.root)
    outcome = command("train", config, "train.duration=6 steps")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        f"error: train.duration: '4 steps' -> '6 steps' changes how the run in {trained.checkpoint(4)} goes on.",
        "error: Put the values back, or pass --accept-changes.",
    ]
    assert content(trained.root) == before


def test_data_that_changed_under_a_run(command, config, trained, images):
    before = content(trained.root)
    (images / "7.png").unlink()
    outcome = command("train", config)
    assert outcome.code == 2
    assert outcome.err.startswith(
        f"error: The data is not what {trained.checkpoint(4)} was trained on: its fingerprint "
    )
    assert content(trained.root) == before


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(command, config, trained):
    good = content(trained.checkpoint(4))
    damaged = trained.checkpoint(4) / "unet.safetensors"
    flip_a_bit(damaged)
    outcome = command("train", config)
    assert (outcome.code, outcome.err) == (0, "")
    assert (
        f"{damaged} is damaged: its sha256 is not the one in manifest.json. Resuming from step-00000003 instead."
        in outcome.out.splitlines()
    )
    again = content(trained.checkpoint(4))
    tensors = [path for path in good if path.suffix == ".safetensors"]
    assert tensors
    assert all(again[path] == good[path] for path in tensors)


def test_damage_everywhere_never_starts_from_scratch_in_silence(command, config, trained):
    for path in trained.checkpoints.glob("*/unet.safetensors"):
        flip_a_bit(path)
    before = content(trained.root)
    outcome = command("train", config)
    assert outcome.code == 4
    assert outcome.err == (
        f"error: {trained.checkpoints}: none of its 3 checkpoints is valid: "
        f"{trained.checkpoint(4) / 'unet.safetensors'} is damaged: its sha256 is not the one in manifest.json. "
        "Copy a valid one there, or start anew with --resume never.\n"
    )
    assert content(trained.root) == before


def test_a_full_disk(command, config, tmp_path, monkeypatch):
    """The third save fails; what was saved before is whole, and with room again the run goes on from it."""
    run = RunDir(tmp_path / "run")
    real_mkdir, real_write, saves = os.mkdir, os.write, []

    def mkdir(path, *args, **kwargs):
        if ".partial-" in str(path):
            saves.append(path)
        return real_mkdir(path, *args, **kwargs)

    def write(fd, buffer):
        if len(saves) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, buffer)

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", mkdir)
        patched.setattr(os, "write", write)
        outcome = command("train", config)
    assert outcome.code == 4
    free = outcome.err.partition(", and ")[2].partition(" MB")[0]
    assert outcome.err == (
        f"error: {run.checkpoint(3)} cannot be saved: No space left on device. It needs 1.5 MB, and {free} MB are free "
        "there. Older checkpoints are intact; make room or mend the disk, and start again.\n"
    )
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    again = command("train", config)
    assert again.code == 0
    assert f"resuming at step 2 of 4, from {run.checkpoint(2)}" in again.out


def test_a_disk_without_room_for_one_checkpoint(command, config, tmp_path, monkeypatch):
    """Found before a byte is written."""
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*full[:4], 10, *full[5:])))
    outcome = command("train", config)
    assert outcome.code == 4
    assert "cannot be saved: No space left on device. It needs 1.5 MB, and 0.0 MB are free there." in outcome.err
    assert list(RunDir(tmp_path / "run").checkpoints.iterdir()) == []


def test_a_second_process_on_the_run(command, config, trained):
    before = content(trained.root)
    with RunLock(trained):
        since = json.loads(trained.lock.read_text())["started"]
        outcome = command("train", config)
    assert outcome.code == 4
    assert outcome.err == (
        f"error: {trained.root} is in use by process {os.getpid()} on {socket.gethostname()}, since {since}. "
        "Wait until that ends, or give another output folder.\n"
    )
    assert content(trained.root) == before


def test_an_output_folder_that_cannot_be_written_to(command, config, tmp_path):
    (tmp_path / "file").touch()
    outcome = command("train", config, f"output={tmp_path / 'file'}")
    assert outcome.code == 4
    assert outcome.err.startswith(f"error: {tmp_path / 'file' / 'lock'} cannot be locked: ")


def test_a_device_that_is_not_there(command, config):
    outcome = command("train", config, "train.device=mps")
    assert (outcome.code, outcome.err) == (
        2,
        "error: train.device is 'mps', and torch finds no such device here. Use train.device=auto or cpu.\n",
    )


def test_a_run_folder_that_was_moved_goes_on(command, config, trained, tmp_path):
    shutil.move(trained.root, tmp_path / "moved")
    outcome = command("train", config, f"output={tmp_path / 'moved'}")
    assert outcome.code == 0
    assert "already finished at step 4 of 4" in outcome.out
