"""Real Trackio, with its data base in a folder of the test: what it keeps is read back."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("trackio")

from PIL import Image

from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import following
from eclosion.tracking.following import read_standing
from eclosion.tracking.tracker import Tracker

pytestmark = pytest.mark.usefixtures("unhurried")

# The library reads where its data base lies when it is imported, so it is asked in a process of its own.
READER = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage

(run,) = trackio.Api().runs("birds")
rows = SQLiteStorage.get_logs("birds", run.name, run_id=run.id)
print(json.dumps({"name": run.name, "config": run.config, "rows": rows}))
"""


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.05)


def stored():
    done = subprocess.run([sys.executable, "-c", READER], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start(folder, step=0):
    loggers = [build("loggers", {"name": "trackio", "project": "birds"}).open()]
    tracker = Tracker(RunDir(folder), loggers, {"seed": 3}, num_steps=9)
    tracker.start(step)
    tracker.say("training", environment={"device": "cpu"})
    return tracker


def test_a_run_and_its_sequel_are_one_run_in_trackio_without_gap_or_repeat(tmp_path, capfd):
    folder = tmp_path / "run"
    tracker = start(folder)
    for step in (2, 4, 6):
        tracker.log({"train/loss": 1 / step}, step=step, samples_seen=4 * step)
    picture = tracker.run.sample_grid(4)
    picture.parent.mkdir()
    Image.new("RGB", (4, 4)).save(picture)
    tracker.close()
    tracker = start(folder, step=4)
    for step in (6, 8):
        tracker.log({"train/loss": 1 / step}, step=step, samples_seen=4 * step)
    tracker.say("finished")
    tracker.close()
    assert capfd.readouterr().out == ""
    found = stored()
    standing = read_standing(tracker.run.follower("trackio"))
    assert found["name"] == f"run-{standing.run_id}"
    assert (found["config"]["seed"], found["config"]["environment"]) == (3, {"device": "cpu"})
    rows = found["rows"]
    assert [(row["step"], row["train/loss"], row["samples_seen"]) for row in rows] == [
        (step, 1 / step, 4 * step) for step in (2, 4, 6, 8)
    ]
    assert [row.get("samples", {}).get("caption") for row in rows] == [None, "step 4", None, None]
