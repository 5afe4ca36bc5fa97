"""A service in a process of its own: its death is mended, the death of the run is its end, and it prints nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb")

from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import beside, following
from eclosion.tracking.feed import Facts
from eclosion.tracking.following import Standing
from eclosion.tracking.tracker import Tracker
from eclosion.tracking.wandb_segments import records

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(following, "FIRST_DELAY", 0.05)


def wait_for(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def steps(folder):
    """Of each segment that wandb has written, in order."""
    paths = sorted(folder.glob("tracking/wandb/offline-run-*/run-*.wandb"))
    return [[r.history.step.num for r in records(p) if r.WhichOneof("record_type") == "history"] for p in paths]


def start(folder):
    tracker = Tracker(RunDir(folder), [build("loggers", "wandb").open()], {"seed": 0}, num_steps=9)
    tracker.start(0)
    tracker.say("training", environment={"device": "cpu"})
    return tracker


def log(tracker, *steps):
    for step in steps:
        tracker.log({"train/loss": 1 / step}, step=step, samples_seen=4 * step)


def test_a_process_that_dies_is_replaced_and_nothing_is_lost_or_told_twice(tmp_path):
    tracker = start(tmp_path)
    log(tracker, 1, 2, 3)
    wait_for(lambda: [step for segment in steps(tmp_path) for step in segment] == [1, 2])
    first = tracker.loggers[0].service._process.pid
    os.killpg(first, signal.SIGKILL)
    log(tracker, 4, 5)
    tracker.loggers[0]._wake.set()
    wait_for(lambda: (process := tracker.loggers[0].service._process) and process.pid != first)
    wait_for(lambda: not tracker.loggers[0]._failing)
    log(tracker, 6)
    tracker.say("finished")
    tracker.close()
    assert steps(tmp_path) == [[1, 2], [3, 4, 5, 6]]


def test_signals_that_a_scheduler_sends_to_every_process_leave_the_service_at_work(tmp_path):
    tracker = start(tmp_path)
    log(tracker, 1, 2)
    wait_for(lambda: steps(tmp_path) == [[1]])
    pid = tracker.loggers[0].service._process.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    log(tracker, 3)
    tracker.say("finished")
    tracker.close()
    assert steps(tmp_path) == [[1, 2, 3]]


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found if alive(int(child))]


def alive(pid):
    """Whether a process is there and not just waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_no_process_outlives_a_run_that_is_killed(tmp_path):
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_beside import *
        following.PAUSE_SECONDS = 0.05
        tracker = start(Path({str(tmp_path)!r}))
        log(tracker, 1, 2, 3)
        time.sleep(600)
    """
    run = subprocess.Popen([sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())])
    try:
        wait_for(lambda: [step for segment in steps(tmp_path) for step in segment] == [1, 2])
        (child,) = children(run.pid)
        grandchildren = children(child)
    finally:
        run.kill()
        run.wait()
    assert grandchildren  # of wandb itself
    wait_for(lambda: not any(map(alive, [child, *grandchildren])))


def test_a_process_that_says_nothing_is_ended_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "OPEN_SECONDS", 0.2)
    monkeypatch.setattr(sys, "executable", "/bin/false" if Path("/bin/false").exists() else "/usr/bin/false")
    service = build("loggers", "wandb").open().service
    with pytest.raises(OSError, match=r"its process has ended|Broken pipe"):
        service.open(RunDir(tmp_path), Standing("a", {}), Facts("a", {}))
    assert service._process is None
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    with pytest.raises(TimeoutError, match=r"no answer within 0 s"):
        service.open(RunDir(tmp_path), Standing("a", {}), Facts("a", {}))
    assert service._process is None


def test_what_a_library_prints_is_no_answer(tmp_path, monkeypatch, capfd):
    """Trackio prints at every start; and files of the working folder are not imported in place of libraries."""
    pytest.importorskip("trackio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "trackio.py").write_text("raise SystemExit('the wrong file')")
    tracker = Tracker(RunDir(tmp_path / "run"), [build("loggers", "trackio").open()], {"seed": 0}, num_steps=9)
    tracker.start(0)
    tracker.say("training", environment={"device": "cpu"})
    log(tracker, 1)
    tracker.say("finished")
    tracker.close()
    assert capfd.readouterr() == ("", "")
    assert json.loads(tracker.run.follower("trackio").read_text())["step"] == 1
