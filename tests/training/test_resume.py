"""A run that stops and goes on is the run that never stopped."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from eclosion import ConfigError, train
from eclosion.errors import Interrupted


def wait_for(path, seconds=60):
    """Wait in a thread until a file is there, then return."""
    for _ in range(int(seconds * 200)):
        if path.exists():
            return
        threading.Event().wait(0.005)
    raise TimeoutError(path)


def stop_when(path, number):
    """Send this process a signal as soon as a file appears."""

    def watch():
        wait_for(path)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_saves_and_the_resumed_run_is_bitwise_the_whole_one(
    number, code, make_config, uninterrupted, results, tmp_path
):
    config = make_config(tmp_path / "run", checkpoint={"every": "3 steps"})
    watcher = stop_when(tmp_path / "run" / "checkpoints" / "step-00000003", number)
    with pytest.raises(Interrupted, match="which is saved") as stopped:
        train(config)
    watcher.join()
    assert stopped.value.exit_code == code
    assert train(config) == tmp_path / "run"
    assert results(tmp_path / "run") == results(uninterrupted)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_going_on_from_any_checkpoint_gives_the_same_bits(step, make_config, uninterrupted, results, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    # What a crash after this step would have left: later numbers are there, later checkpoints are not.
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    whole = train(make_config(tmp_path / "whole", checkpoint={"every": "3 steps", "keep_every": 3}))
    shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    train(make_config(tmp_path / "run"))
    assert results(tmp_path / "run") == results(uninterrupted)


def test_a_finished_run_is_left_as_it_is(make_config, uninterrupted, results, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    train(make_config(run))
    assert results(run) == results(uninterrupted)
    assert "already finished at step 12 of 12" in (run / "events.jsonl").read_text()


def test_changed_identity_is_refused_and_both_values_are_shown(make_config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    with pytest.raises(ConfigError) as error:
        train(make_config(run, data={"horizontal_flip": False, "image_size": 12}))
    last = run / "checkpoints" / "step-00000012"
    assert error.value.problems == [
        f"data.horizontal_flip: True -> False would make it another run than the one in {last}.",
        f"data.image_size: 16 -> 12 would make it another run than the one in {last}.",
        "Put the values back, or choose another output folder.",
    ]


def test_a_changed_schedule_needs_a_word_and_is_recorded(make_config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    longer = make_config(run, train={"duration": "14 steps"})
    with pytest.raises(ConfigError, match=r"train.duration: '12 steps' -> '14 steps' changes how the run"):
        train(longer)
    train(longer, accept_changes=True)
    assert "accepted change train.duration: '12 steps' -> '14 steps'" in (run / "events.jsonl").read_text()
    assert (run / "checkpoints" / "step-00000014").is_dir()


def test_a_free_key_may_change(make_config, uninterrupted, results, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    train(make_config(run, data={"num_threads": 0}))
    assert results(run) == results(uninterrupted)


def test_changed_data_is_refused(make_config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    manifest = run / "checkpoints"
    assert manifest.is_dir()
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for i in range(8):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(folder / f"{i}.png")
    config = make_config(tmp_path / "other", data={"source": {"name": "folder", "root": str(folder)}})
    train(config)
    Image.new("RGB", (20, 20)).save(folder / "9.png")
    with pytest.raises(ConfigError, match=r"The data is not what .* was trained on"):
        train(config)


def test_never_refuses_a_folder_that_holds_a_run(make_config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    with pytest.raises(ConfigError, match="already holds a run at step-00000012"):
        train(make_config(run), resume="never")


def test_overwrite_replaces_a_finished_run_and_nothing_else(make_config, uninterrupted, results, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "mine.txt").write_text("keep me")
    train({**make_config(run), "overwrite": True})
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[0].startswith("training from scratch")
    assert (run / "mine.txt").read_text() == "keep me"
    assert results(run) == results(uninterrupted)


def test_another_runs_checkpoint_can_be_the_start(make_config, uninterrupted, results, tmp_path):
    start = uninterrupted / "checkpoints" / "step-00000009"
    train(make_config(tmp_path / "branch"), resume=str(start))
    assert results(tmp_path / "branch")["hashes"] == results(uninterrupted)["hashes"]
    train(make_config(tmp_path / "branch"), resume=str(start))  # the same command again goes on
    with pytest.raises(ConfigError, match="already holds a run at step-00000012"):
        train(make_config(tmp_path / "branch"), resume=str(uninterrupted / "checkpoints" / "step-00000012"))


def test_a_damaged_last_checkpoint_is_passed_over_in_one_line(make_config, uninterrupted, results, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    victim = run / "checkpoints" / "step-00000012" / "unet.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    train(make_config(run))
    events = (run / "events.jsonl").read_text()
    assert "unet.safetensors is damaged" in events
    assert "Resuming from step-00000009 instead." in events
    assert results(run)["hashes"] == results(uninterrupted)["hashes"]


def test_the_same_seed_on_two_machines_gives_the_same_weights_to_start_from(make_config, tmp_path):
    a = train(make_config(tmp_path / "a", train={"duration": "1 steps"}))
    b = train(make_config(tmp_path / "b", train={"duration": "1 steps"}))
    weights = [Path(run) / "checkpoints" / "step-00000001" / "unet.safetensors" for run in (a, b)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
