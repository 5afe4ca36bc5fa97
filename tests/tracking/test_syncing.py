"""`eclosion sync`: a run is told to loggers afterwards."""

import json

import pytest
from PIL import Image

from eclosion.checkpoint.lock import RunLock
from eclosion.rundir import RunDir
from eclosion.tracking.tracker import append_line


@pytest.fixture
def run(tmp_path):
    """A run folder with three steps and a picture, whose config names no logger that follows."""
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6):
        append_line(run.metrics, {"step": step, "samples_seen": 4 * step, "train/loss": 1 / step})
    run.sample_grid(4).parent.mkdir()
    Image.new("RGB", (4, 4)).save(run.sample_grid(4))
    run.config.write_text(json.dumps({"track": {"log": [{"name": "console"}]}}))
    return run


def test_a_run_is_replayed_into_a_logger_that_it_never_had(run, command):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = command("sync", run.root, "--log", "tensorboard")
    assert (done.code, done.out) == (0, f"tensorboard knows {run.root} up to step 6\n")
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("train/loss")] == [(2, 0.5), (4, 0.25), (6, 1 / 6)]
    assert [e.step for e in found.Images("samples")] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no logger that is told of it from its folder. Name one, such as --log wandb."),
        (["--log", "wandbb"], "'wandbb' is not one of the loggers. Did you mean 'wandb'?"),
        (["--log", "wandb,projekt=x"], "projekt is not an option. Did you mean 'project'?"),
        (["--log", "project=x"], "--log is 'project=x', and must begin with the name of a logger"),
    ],
)
def test_a_wrong_logger_is_refused(arguments, message, run, command):
    done = command("sync", run.root, *arguments)
    assert done.code == 2
    assert message in done.err
    assert not run.tracking.exists()


def test_a_run_that_is_under_way_is_left_alone(run, command):
    with RunLock(run):
        done = command("sync", run.root, "--log", "tensorboard")
    assert done.code == 4
    assert "is in use by process" in done.err


def test_what_is_no_run_is_refused(tmp_path, command):
    done = command("sync", tmp_path)
    assert (done.code, done.err) == (
        2,
        f"error: {tmp_path} is no run folder: it has no config.json. `eclosion runs` lists runs.\n",
    )
