"""Numbers in metrics.jsonl, and what loggers make of them."""

import json

import pytest
from PIL import Image

from eclosion.registry import LOGGERS, build
from eclosion.rundir import RunDir
from eclosion.tracking.tracker import Tracker, append_line, keep_lines


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_tracker(run, *names):
    return Tracker(run, [build("loggers", name).open() for name in names], {"seed": 0}, num_steps=10)


def test_numbers_of_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        make_tracker(run).log({"train/loss": step / 10}, step=step, samples_seen=step * 4)
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "samp')  # torn by a kill
    tracker = make_tracker(run)
    tracker.start(2)
    tracker.log({"train/loss": 0.33}, step=3, samples_seen=12)
    assert [(line["step"], line["train/loss"]) for line in lines(run.metrics)] == [(1, 0.1), (2, 0.2), (3, 0.33)]


def test_a_torn_event_does_not_swallow_the_next(tmp_path):
    run = RunDir(tmp_path)
    make_tracker(run).say("one")
    with run.events.open("a") as file:
        file.write('{"event": "tw')
    tracker = make_tracker(run)
    tracker.start(0)
    tracker.say("three", step=3)
    assert [line["event"] for line in lines(run.events)] == ["one", "three"]
    assert lines(run.events)[1]["step"] == 3


def test_lines_are_kept_as_they_are(tmp_path):
    path = tmp_path / "lines.jsonl"
    for i in range(3):
        append_line(path, {"i": i, "x": 0.1 + i})
    before = path.read_bytes()
    keep_lines(path, lambda line: True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", LOGGERS)
def test_every_logger_takes_a_whole_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = RunDir(tmp_path)
    tracker = make_tracker(run, name)
    tracker.start(0)
    tracker.say("training [red]from scratch[/red]")
    tracker.log({"train/loss": 0.5, "perf/images_per_second": 3.0}, step=10, samples_seen=40)
    picture = tmp_path / "grid.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    tracker.log_image(picture, step=10)
    tracker.close()
    assert lines(run.metrics)[0]["train/loss"] == 0.5


def test_the_console_writes_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    tracker = make_tracker(RunDir(tmp_path), "console")
    tracker.start(0)
    tracker.say("resuming [red]x[/red]")
    tracker.log({"train/loss": 0.5, "perf/images_per_second": 3.0}, step=10, samples_seen=40)
    tracker.close()
    out = capsys.readouterr().out
    assert out == "resuming [red]x[/red]\nstep 10/10  loss 0.5000  3.0 images/s  0:00 left\n"
    assert "\r" not in out
    assert "\x1b" not in out


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path)
    tracker = make_tracker(run, "tensorboard")
    tracker.start(0)
    for step in (2, 4):
        tracker.log({"train/loss": step / 10}, step=step, samples_seen=step * 4)
    picture = tmp_path / "grid.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    tracker.log_image(picture, step=4)
    tracker.close()
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("train/loss")] == [(2, 0.2), (4, 0.4)]
    assert [e.step for e in found.Images("samples")] == [4]
