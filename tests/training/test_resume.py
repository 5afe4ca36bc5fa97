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
from eclosion.rundir import RunDir
from eclosion.training.origin import REMOVED, clear


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
    mine = ["mine.txt", "samples/mine.png", "checkpoints/mine/weights.pt", "evaluations/mine.txt"]
    theirs = ["results.json", "evaluations/step-00000012/a.png", "start/a", "checkpoints/.partial-7-a/a"]
    for name in [*mine, *theirs]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    train({**make_config(run), "overwrite": True})
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[0] == "replaced the run at step-00000012"
    assert events[1].startswith("training from scratch")
    assert [(run / name).read_text() for name in mine] == mine
    assert not any((run / name).exists() for name in theirs)
    (run / "checkpoints" / "mine" / "weights.pt").unlink()
    assert results(run) == results(uninterrupted)


def test_what_stood_in_the_checkpoints_of_a_run_survives_a_kill_while_they_are_removed(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "checkpoints" / "mine.pt").write_text("mine")
    (run / "checkpoints").rename(run / REMOVED)  # and killed
    clear(RunDir(run))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "lock"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["mine.pt"]


def test_a_folder_whose_config_no_run_wrote_is_refused_and_left_as_it_is(make_config, tmp_path):
    run = tmp_path / "run"
    files = {"config.json": '{"_class_name": "UNet2DModel"}', "checkpoints/mine.pt": "mine", "samples/a.png": "mine"}
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: no run wrote that"):
        train(make_config(run))
    assert {name: (run / name).read_text() for name in files} == files


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


@pytest.mark.parametrize(
    "section",
    [{"train": {"batch_size": 9}}, {"sample": {"guidance_scale": 2.0}}, {"train": {"freeze": ["unet"]}}],
    ids=str,
)
def test_overwrite_removes_nothing_before_the_new_run_is_known_to_be_possible(
    section, make_config, uninterrupted, results, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    with pytest.raises(ConfigError):
        train({**make_config(run, **section), "overwrite": True})
    assert results(run) == results(uninterrupted)


def test_overwrite_goes_on_with_an_unfinished_run(make_config, uninterrupted, results, tmp_path):
    config = {**make_config(tmp_path / "run"), "overwrite": True}
    watcher = stop_when(tmp_path / "run" / "checkpoints" / "step-00000003", signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(config)
    watcher.join()
    longer = {**config, "train": {**config["train"], "duration": "20 steps"}}
    with pytest.raises(ConfigError, match="pass --accept-changes"):
        train(longer)
    train(config)
    assert results(tmp_path / "run") == results(uninterrupted)


def test_a_changed_batch_size_keeps_the_number_of_samples(make_config, results, tmp_path):
    run = train(make_config(tmp_path / "run", train={"duration": "2 epochs"}, checkpoint={"every": "5 steps"}))
    shutil.rmtree(run / "checkpoints" / "step-00000010")  # as if killed half-way, at 40 of 80 samples
    smaller = make_config(run, train={"duration": "2 epochs", "batch_size": 4}, checkpoint={"every": "5 steps"})
    train(smaller, accept_changes=True)
    last = results(run)["numbers"][-1]
    assert (last["step"], last["samples_seen"]) == (15, 80)


@pytest.mark.parametrize(("before", "after"), [("no", "fp16"), ("fp16", "no")])
def test_the_loss_scale_belongs_to_its_precision(before, after, make_config, tmp_path):
    from safetensors.torch import load_file

    def config(precision, steps):
        return make_config(tmp_path / "run", train={"mixed_precision": precision, "duration": steps})

    run = train(config(before, "3 steps"))
    train(config(after, "6 steps"), accept_changes=True)
    slots = load_file(run / "checkpoints" / "step-00000006" / "unet.optimizer.safetensors")
    assert float(slots.get("loss_scale", 1)) == (65536 if after == "fp16" else 1)


def test_pictures_of_a_run_that_never_saved_are_not_mixed_with_the_next(make_config, results, tmp_path):
    run = train(make_config(tmp_path / "run", train={"duration": "1 steps"}))
    old = results(run)["pictures"]["step-00000000.png"]
    shutil.rmtree(run / "checkpoints")
    train({**make_config(run, train={"duration": "1 steps"}), "seed": 5})
    assert results(run)["pictures"]["step-00000000.png"] != old


def test_a_typo_in_resume_is_refused_with_a_hint(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"resume is 'atuo', which is no checkpoint. Did you mean 'auto'\?"):
        train(make_config(tmp_path / "run"), resume="atuo")


def test_a_free_change_that_moves_the_last_bits_is_said(make_config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    train(make_config(run, train={"micro_batch_size": 8}))
    assert "the last bits may differ: train.micro_batch_size was 4, is 8" in (run / "events.jsonl").read_text()


def interrupted_inside(monkeypatch, module, name):
    """Send SIGTERM when a function is called for the last time that matters, before it does its work."""
    real = getattr(module, name)

    def send(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, send)


def test_a_signal_during_the_last_picture_stops_and_the_picture_is_made_later(
    make_config, uninterrupted, results, tmp_path, monkeypatch
):
    from eclosion.training import loop

    run = tmp_path / "run"
    calls = []
    real = loop.make_images

    def at_the_end(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # steps 0, 6 and 12
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_images", at_the_end)
        with pytest.raises(Interrupted, match="stopped at step 12, which is saved"):
            train(make_config(run))
    assert not (run / "samples" / "step-00000012.png").exists()
    train(make_config(run))
    assert results(run) == results(uninterrupted)


def test_a_signal_during_the_export_stops_and_the_export_is_made_later(make_config, tmp_path, monkeypatch):
    from eclosion import exporting

    config = {**make_config(tmp_path / "run", train={"duration": "2 steps"}), "export": "ddpm"}
    with monkeypatch.context() as patch:
        interrupted_inside(patch, exporting, "_compare")
        with pytest.raises(Interrupted) as stopped:
            train(config)
    assert stopped.value.exit_code == 143
    run = tmp_path / "run"
    assert not (run / "model_index.json").exists()
    train(config)
    assert (run / "model_index.json").exists()
    assert not list(run.glob(".export-*"))


def test_a_signal_during_start_up_leaves_nothing_half_done(make_config, uninterrupted, results, tmp_path, monkeypatch):
    from eclosion.training import start

    with monkeypatch.context() as patch:
        interrupted_inside(patch, start, "check_wishes")
        with pytest.raises(Interrupted, match="nothing was lost"):
            train(make_config(tmp_path / "run"))
    train(make_config(tmp_path / "run"))
    assert results(tmp_path / "run") == results(uninterrupted)


def test_training_leaves_the_callers_random_stream_alone(make_config, tmp_path):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(make_config(tmp_path / "run", train={"duration": "1 steps"}))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_checkpoint_that_was_loaded_is_not_kept_open(make_config, uninterrupted, tmp_path, monkeypatch):
    """Else the space of checkpoints that were removed is not given back while the run goes on."""
    from eclosion.training import loop

    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    mapped = []
    draw = loop.draw

    def looking(*args):
        mapped.append(str(tmp_path / "run" / "checkpoints") in Path("/proc/self/maps").read_text())
        return draw(*args)

    monkeypatch.setattr(loop, "draw", looking)
    train(make_config(tmp_path / "run"))
    assert mapped
    assert not any(mapped)
