"""The list of runs, also of broken ones."""

import json
import os

import pytest

from eclosion import list_runs
from eclosion.checkpoint.lock import RunLock, holder
from eclosion.rundir import RunDir


def make_run(folder, *, events=(), metrics=(), steps=()):
    run = RunDir(folder)
    folder.mkdir(parents=True)
    run.config.write_text("{}")
    run.events.write_text("".join(json.dumps(line) + "\n" for line in events))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
    return run


STARTED = {"event": "training from scratch, 10 steps", "num_steps": 10}


def test_a_run_that_was_trained_is_listed_with_its_numbers(uninterrupted):
    (found,) = list_runs(uninterrupted.parent)
    last = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])
    assert (found.folder, found.state, found.step, found.num_steps) == (uninterrupted, "finished", 12, 12)
    assert found.loss == last["train/loss"]
    assert list_runs(uninterrupted) == [found]


def test_a_run_is_running_while_its_lock_is_held_and_looking_does_not_take_it(tmp_path):
    run = make_run(tmp_path / "a", events=[STARTED], metrics=[{"step": 4, "train/loss": 0.5}])
    with RunLock(run):
        assert list_runs(tmp_path)[0].state == "running"
        assert f"process {os.getpid()}" in holder(run)
    assert list_runs(tmp_path)[0].state == "stopped"
    assert holder(run) is None
    with RunLock(run):
        pass


def test_a_run_says_how_it_ended(tmp_path):
    ended = {"event": "ended at step 4: ...", "step": 4}
    make_run(tmp_path / "a", events=[STARTED, {**ended, "kind": "DataError"}], steps=[2, 4])
    make_run(tmp_path / "b", events=[STARTED, {**ended, "kind": "Interrupted"}], steps=[2, 4])
    make_run(tmp_path / "c", events=[STARTED, {**ended, "kind": "DataError"}, STARTED], steps=[2, 4])  # went on, killed
    states = {run.folder.name: (run.state, run.step) for run in list_runs(tmp_path)}
    assert states == {"a": ("failed", 4), "b": ("stopped", 4), "c": ("stopped", 4)}


def test_the_run_that_wrote_last_comes_first(tmp_path):
    for i, name in enumerate("abc"):
        run = make_run(tmp_path / "deep" / name, events=[STARTED])
        for path in (run.config, run.events, run.metrics):
            os.utime(path, (1000 + i, 1000 + i))
    assert [run.folder.name for run in list_runs(tmp_path)] == ["c", "b", "a"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\n", b'{"step": 3', b'{"step": "x", "train/loss": []}\n', b"[]\n3\n"]
)
def test_a_broken_run_is_listed_all_the_same(content, tmp_path):
    run = make_run(tmp_path / "a")
    for path in (run.config, run.events, run.metrics):
        path.write_bytes(content)
    run.checkpoints.mkdir()
    (run.checkpoints / "step-notanumber").mkdir()
    (found,) = list_runs(tmp_path)
    assert (found.state, found.step, found.num_steps, found.loss) == ("stopped", None, None, None)


def test_a_line_that_a_kill_tore_does_not_hide_those_before_it(tmp_path):
    run = make_run(tmp_path / "a", events=[STARTED], metrics=[{"step": 2, "train/loss": 0.25}])
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "train/lo')
    (found,) = list_runs(tmp_path)
    assert (found.step, found.loss) == (2, 0.25)


def test_other_folders_are_no_runs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    make_run(tmp_path / ".hidden" / "b", events=[STARTED])
    assert list_runs(tmp_path) == []
    assert list_runs(tmp_path / "none") == []
