"""Real wandb in offline mode: what it wrote is read back."""

import json
import subprocess
import sys
import textwrap
import time

import pytest

pytest.importorskip("wandb")

from eclosion import train
from eclosion.config.load import load
from eclosion.errors import ConfigError
from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import following
from eclosion.tracking.following import read_standing
from eclosion.tracking.tracker import Tracker
from eclosion.tracking.wandb_segments import last_step, records

pytestmark = pytest.mark.usefixtures("unhurried")

# Logs lines until it is killed, or up to a step, as a process that trains would.
WRITER = """
    import sys, time
    from pathlib import Path
    from eclosion.registry import build
    from eclosion.rundir import RunDir
    from eclosion.tracking import following
    from eclosion.tracking.tracker import Tracker

    folder, first, last, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
    following.PAUSE_SECONDS, following.CLOSE_SECONDS = 0.05, 120.0
    logger = build("loggers", {"name": "wandb", **options}).open()
    tracker = Tracker(RunDir(Path(folder)), [logger], {"seed": 3}, num_steps=last)
    tracker.start(first)
    tracker.say("training", environment={"device": "cpu"})
    for step in range(first + 1, last + 1):
        tracker.log({"train/loss": 1 / step}, step=step, samples_seen=4 * step)
        time.sleep(0.01)
    tracker.say("finished")
    tracker.close()
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.05)


def segments(folder):
    return sorted(folder.glob("tracking/wandb/offline-run-*/run-*.wandb"))


def history(path):
    """The rows of a segment: mappings from names to values."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items})
    return rows


def settings(path):
    """The config of a segment, with later changes of it."""
    found = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            found |= {update.key: json.loads(update.value_json) for update in updates}
    return found


def write(folder, first, last, **options):
    arguments = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(first), str(last), repr(options)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def write_here(folder, last, *others):
    """The same in this process."""
    loggers = [build("loggers", name).open() for name in ("wandb", *others)]
    tracker = Tracker(RunDir(folder), loggers, {"seed": 3}, num_steps=last)
    tracker.start(0)
    tracker.say("training", environment={"device": "cpu"})
    for step in range(1, last + 1):
        tracker.log({"train/loss": 1 / step}, step=step, samples_seen=4 * step)
    return tracker


def finish(tracker):
    tracker.say("finished")
    tracker.close()


def ended(process):
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def test_wandb_has_every_number_picture_and_fact_of_a_run(make_config, tmp_path):
    log = ["console", {"name": "wandb", "project": "birds", "entity": "me"}]
    config = make_config(tmp_path / "run", track={"log": log}, train={"duration": "6 steps"})
    folder = train(config)
    (segment,) = segments(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = history(segment)
    assert [(row["_step"], row["step"]) for row in rows] == [(0, 0), (2, 2), (4, 4), (6, 6)]
    for line, row in zip(lines, rows[1:], strict=True):
        assert line.items() <= row.items()
    for row in (rows[0], rows[-1]):
        assert row["samples.caption"] == f"step {row['step']}"
        picture = segment.parent / "files" / row["samples.path"]
        assert picture.read_bytes() == RunDir(folder).sample_grid(row["step"]).read_bytes()
    told = settings(segment)
    assert {key: told[key] for key in ("data", "task", "optimizer")} == {
        key: json.loads((folder / "config.json").read_text())[key] for key in ("data", "task", "optimizer")
    }
    assert told["environment"]["world_size"] == 1
    (run,) = [record.run for record in records(segment) if record.WhichOneof("record_type") == "run"]
    standing = read_standing(RunDir(folder).follower("wandb"))
    assert (run.run_id, run.display_name, run.project, run.entity) == (standing.run_id, "run", "birds", "me")


def test_a_killed_run_goes_on_under_its_id_without_gap_or_repeat(tmp_path):
    first = write(tmp_path, 0, 100_000)
    try:
        wait_for(lambda: last_step(tmp_path / "tracking", standing_id(tmp_path)) >= 20)
    finally:
        first.kill()
        first.communicate()
    resumed_at = len((tmp_path / "metrics.jsonl").read_text().splitlines()) - 15  # the newest checkpoint
    last = resumed_at + 30
    ended(write(tmp_path, resumed_at, last))
    before, after = segments(tmp_path)
    assert before.name == after.name
    rows = [*history(before), *history(after)]
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == list(range(1, last + 1))
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(1, last + 1)]
    lost = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lost == list(range(1, last + 1))


@pytest.mark.slow
def test_training_that_is_killed_goes_on_in_its_own_wandb_run(make_config, tmp_path):
    """As the test above, with all that surrounds it; killed twice."""
    often = {"checkpoint": {"every": "20 steps"}, "sample": {"every": "50 steps"}}
    track = {"every": "1 steps", "log": ["console", "wandb"]}
    config = make_config(tmp_path / "run", train={"duration": "400 steps"}, track=track, **often)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "eclosion", "train", str(path)]
    run, ids = RunDir(tmp_path / "run"), set()
    for step in (40, 160):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
            try:
                wait_for(lambda step=step: last_step(run.tracking, standing_id(run.root)) >= step)
            finally:
                training.kill()
        ids.add(standing_id(run.root))
    subprocess.run(command, check=True, capture_output=True)
    ids.add(standing_id(run.root))
    assert len(ids) == 1
    assert len(segments(run.root)) == 3
    rows = sorted((row for path in segments(run.root) for row in history(path)), key=lambda row: row["_step"])
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == list(range(401))
    assert [row["train/loss"] for row in rows[1:]] == [line["train/loss"] for line in lines]
    assert [row["step"] for row in rows if "samples.path" in row] == list(range(0, 401, 50))


def wait_for(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def standing_id(folder):
    found = read_standing(RunDir(folder).follower("wandb"))
    return found.run_id if found else "none"


def test_a_run_ends_well_when_wandb_cannot_be_reached_and_is_sent_later(command, monkeypatch, tmp_path, capsys):
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    tracker = write_here(tmp_path, 8, "console")
    wait_for(lambda: tracker.loggers[0]._failing)
    finish(tracker)
    out = capsys.readouterr().out
    assert "wandb: Failed to get resume status" in out
    assert f"wandb: the run waits in the run folder: `eclosion sync {tmp_path}` sends it\n" in out
    assert nowhere["WANDB_API_KEY"] not in out
    run_id = standing_id(tmp_path)
    RunDir(tmp_path).config.write_text(json.dumps({"seed": 3, "track": {"log": [{"name": "wandb"}]}}))
    monkeypatch.setattr("eclosion.tracking.syncing.DELAYS", ())
    failed = command("sync", tmp_path)
    assert failed.code == 4
    assert failed.err.startswith(f"error: wandb could not be told of {tmp_path}: ")
    assert failed.err.endswith("Nothing is lost; run the command again later.\n")
    done = command("sync", tmp_path, "--log", "wandb,mode=offline")
    assert (done.code, done.out) == (0, f"wandb knows {tmp_path} up to step 8\n")
    rows = [row for path in segments(tmp_path) for row in history(path)]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert segments(tmp_path)[0].name == f"run-{run_id}.wandb"


def test_a_missing_key_is_told_and_stops_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = write_here(tmp_path / "run", 4, "console")
    wait_for(lambda: tracker.loggers[0]._failing)
    finish(tracker)
    out = capsys.readouterr().out
    assert "wandb: No API key configured" in out
    assert f"wandb: the run waits in the run folder: `eclosion sync {tmp_path / 'run'}` sends it\n" in out


def test_a_run_is_gone_on_with_by_id_only_when_the_id_is_there():
    config = {"output": "runs/a", "data": {"source": "butterflies"}}
    with pytest.raises(ConfigError, match="resume is true, and run_id is missing"):
        load({**config, "track": {"log": [{"name": "wandb", "resume": True}]}})
    with pytest.raises(ConfigError, match=r"run_id"):
        load({**config, "track": {"log": [{"name": "wandb", "run_id": "../x"}]}})


def test_segments_are_read_up_to_where_a_kill_has_cut_them(tmp_path):
    finish(write_here(tmp_path, 300))  # more than one block of the file
    (segment,) = segments(tmp_path)
    data = segment.read_bytes()
    assert len(data) > 2 * 32768
    run_id = standing_id(tmp_path)
    assert [row["step"] for row in history(segment)] == list(range(1, 301))
    assert last_step(tmp_path / "tracking", run_id) == 300
    known = []
    for size in (0, 3, 7, 9, 40_000, len(data) - 300):
        segment.write_bytes(data[:size])
        known.append(last_step(tmp_path / "tracking", run_id))
    assert known[:4] == [-1] * 4
    assert -1 < known[4] < known[5] <= 300
