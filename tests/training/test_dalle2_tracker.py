"""The tracker of a DALLE2-pytorch config at work: what it writes is read back from where it went."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

pytest.importorskip("wandb")

from eclosion import ConfigError, check, train
from eclosion.checkpoint import storage
from eclosion.checkpoint.copying import is_model
from eclosion.config.load import read_file
from eclosion.errors import DataError
from eclosion.rundir import RunDir
from eclosion.sampling import load_trained
from eclosion.tracking.following import read_standing
from eclosion.tracking.wandb_segments import records

pytestmark = [
    pytest.mark.usefixtures("unhurried"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the notes of a translated config
]

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("dalle2*.json"))
# A run that is so slow that it is killed long before its end.
SLOW = """
import time
from eclosion.cli import main
from eclosion.tracking import following, tracker
following.PAUSE_SECONDS, log = 0.05, tracker.Tracker.log
tracker.Tracker.log = lambda *args, **kwargs: (time.sleep(1), log(*args, **kwargs))
main()
"""
WANDB = {"log_type": "wandb", "wandb_entity": "me", "wandb_project": "birds"}


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    """Paths are relative to an empty folder, and wandb writes to the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")


def settings(shards, *, epoch_samples=8, **tracker):
    """A config in which nothing but the tracker matters: two saves in its one epoch."""
    return {
        "decoder": {
            "unets": [{"dim": 8, "image_embed_dim": 1280, "dim_mults": [1], "resnet_groups": 4}],
            "image_sizes": [16],
            "timesteps": 50,
            "sample_timesteps": 2,
        },
        "data": {
            "webdataset_base_url": f"{shards}/{{}}.tar",
            "img_embeddings_url": f"{shards}/img_emb",
            "batch_size": 4,
            "shard_width": 5,
            "num_workers": 0,
            "splits": {"train": 0.5, "val": 0.5, "test": 0.0},
        },
        "train": {
            "epochs": 1,
            "epoch_samples": epoch_samples,
            "save_every_n_samples": 4,
            "validation_samples": 4,
            "n_sample_images": 1,
            "device": "cpu",
        },
        "evaluate": {},
        "tracker": {"data_path": "run", **tracker},
    }


def step_of(folder):
    return storage.verify(Path(folder)).step


def wandb_run():
    """What wandb wrote: the run, and its rows by step."""
    found, rows = None, {}
    for path in sorted(Path("run").glob("tracking/wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                found = record.run
            if record.WhichOneof("record_type") == "history":
                row = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                assert row["step"] not in rows
                rows[row["step"]] = row
    return found, rows


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_logs_to_wandb_and_saves_everywhere(path, shards, hub):
    config = read_file(path)
    config["data"] |= {"webdataset_base_url": f"{shards}/{{}}.tar", "img_embeddings_url": f"{shards}/img_emb"}
    given = config["tracker"].pop("save")
    config["tracker"] |= {
        "data_path": "run",
        "log": {**WANDB, "wandb_run_name": "the example", "auto_resume": True},
        "save": [
            *(given if isinstance(given, list) else [given]),
            {"save_to": "huggingface", "huggingface_repo": "model", "save_latest_to": True, "save_type": "model"},
            {"save_to": "wandb", "save_latest_to": "newest", "save_meta_to": "about"},
        ],
    }
    Path("config.json").write_text(json.dumps(config))
    overrides = ["train.duration=2 steps", "train.batch_size=2", "data.num_threads=0", "sample.num_images=0"]
    overrides += ["validate.num_samples=2", "checkpoint.every=1 steps", "track.every=1 steps"]
    assert check("config.json", overrides).problems == []
    run = RunDir(train("config.json", overrides))
    latest = Path("models", path.stem.replace("_", "-"), "latest.pth")
    assert storage.verify(latest).files == storage.verify(run.checkpoint(2)).files
    there = hub.repos["ada/model"]
    assert there.private
    assert {"latest.pth/manifest.json", "README.md"} <= there.files.keys()
    assert json.loads(there.files["latest.pth/manifest.json"].data)["step"] == 2
    found, rows = wandb_run()
    assert (found.entity, found.project, found.display_name) == ("me", "birds", "the example")
    assert found.run_id == read_standing(run.follower("wandb")).run_id
    assert [rows[step]["_step"] for step in (1, 2)] == [1, 2]
    kept = {json.loads(file.read_text())["step"] for file in run.tracking.glob("wandb-files/**/newest/current.json")}
    assert kept == {2}
    assert list(run.tracking.glob("wandb-files/**/about/config.json"))


# --- log -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ({"log_type": "console"}, True),
        (WANDB, False),
        ({**WANDB, "verbose": True}, True),
        ([WANDB, {"log_type": "console"}], True),
    ],
)
def test_numbers_are_shown_where_the_console_is_named_or_a_logger_is_verbose(log, shown, shards, capsys):
    train(settings(shards, log=log))
    out = capsys.readouterr().out
    assert ("step 2/2  loss" in out) == shown
    assert "finished" in out
    assert ("wandb" in str(log)) == bool(wandb_run()[1])


def test_a_run_at_wandb_has_the_id_that_is_given(shards):
    train(settings(shards, log={**WANDB, "wandb_run_id": "mine", "resume": True}))
    assert wandb_run()[0].run_id == "mine"
    assert json.loads(Path("run/config.json").read_text())["track"]["log"][1]["resume"]


@pytest.mark.parametrize("auto_resume", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_in_its_own_run_at_wandb_if_that_is_wanted(auto_resume, shards, tmp_path):
    log = {**WANDB, "auto_resume": auto_resume}
    config = settings(shards, epoch_samples=240, log=log, save={"save_latest_to": True})
    Path("config.json").write_text(json.dumps(config))
    arguments = ["train", "config.json", "track.every=1 steps", "sample.num_images=0", "checkpoint.every=5 steps"]
    arguments += ["validate.every=null"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as training:
        until = time.monotonic() + 300
        standing = Path("run/tracking/wandb.json")
        while not (standing.exists() and json.loads(standing.read_text())["step"] >= 7):
            assert time.monotonic() < until
            assert training.poll() is None
            time.sleep(0.02)
        os.kill(training.pid, signal.SIGKILL)
    before = read_standing(standing)
    assert not RunDir(tmp_path / "run").checkpoint(60).exists()
    subprocess.run([sys.executable, "-m", "eclosion", *arguments], check=True, capture_output=True)
    after = read_standing(standing)
    assert (before.run_id == after.run_id) == auto_resume
    assert step_of("latest.pth") == 60
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    if auto_resume:
        _, rows = wandb_run()
        assert [step for step in sorted(rows) if step] == list(range(1, 61))
        assert [rows[line["step"]]["train/loss"] for line in lines] == [line["train/loss"] for line in lines]


# --- save ------------------------------------------------------------------------------------------------------------


def test_paths_of_local_savers_are_filled_in_and_relative_to_where_one_is(shards, tmp_path):
    outside = tmp_path / "outside"
    save = [
        {"save_to": "local", "save_latest_to": "all/{epoch}-{samples_seen}.pth", "save_meta_to": "about"},
        {"save_to": "local", "save_latest_to": str(outside / "model.pth"), "save_type": "model"},
        {"save_best_to": True},
    ]
    run = RunDir(train(settings(shards, save=save)))
    assert sorted(path.name for path in Path("all").iterdir()) == ["0-4.pth", "0-8.pth"]
    assert [step_of(path) for path in sorted(Path("all").iterdir())] == [1, 2]
    assert Path("about/config.json").read_bytes() == run.config.read_bytes()
    assert is_model(storage.verify(outside / "model.pth").meta)
    assert step_of("best.pth") == load_trained(run.root, device="cpu", checkpoint="best").step
    sampled = load_trained(outside / "model.pth", device="cpu").task.nets["unet_0"].state_dict()
    wanted = load_trained(run.root, device="cpu").task.nets["unet_0"].state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(sampled[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["../latest.pth", "~/latest.pth", "run", "run/checkpoints/latest.pth"])
def test_a_path_that_leads_elsewhere_or_into_the_run_is_refused(path, shards):
    with pytest.raises(ConfigError):
        train(settings(shards, save={"save_latest_to": path}))
    assert not Path("run/metrics.jsonl").exists()


def test_what_is_not_ours_stays_when_a_run_is_overwritten(shards):
    save = {"save_latest_to": "run/mine/latest.pth"}
    train(settings(shards, save=save))
    Path("run/notes.txt").write_text("of somebody")
    other = settings(shards, save=save)
    other["seed"] = 5
    with pytest.raises(ConfigError, match="would make it another run"):
        train(other)
    other["tracker"]["overwrite_data_path"] = True
    train(other)
    assert json.loads(Path("run/config.json").read_text())["seed"] == 5
    assert Path("run/notes.txt").read_text() == "of somebody"
    assert step_of("run/mine/latest.pth") == 2


# --- load ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(shards, hub):
    """A run of two steps that has saved here and to the hub."""
    repo = {"save_to": "huggingface", "huggingface_repo": "ada/model", "save_latest_to": "a/latest.pth"}
    run = train(settings(shards, save=[{"save_latest_to": "latest.pth"}, repo]))
    Path(run).rename("before")
    return Path("before")


@pytest.fixture
def web():
    """This folder by http."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=Path.cwd())) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("place", ["local", "url", "huggingface"])
def test_a_run_goes_on_from_what_it_loads(place, shards, saved, web):
    load = {
        "local": {"file_path": "latest.pth"},
        "url": {"url": f"{web}/latest.pth/"},
        "huggingface": {"huggingface_repo": "ada/model", "huggingface_file_path": "a/latest.pth"},
    }[place]
    config = settings(shards, epoch_samples=12, load={"load_from": place, **load})
    run = RunDir(train(config, accept_changes=True))  # it is longer
    assert {json.loads(line)["step"] for line in run.metrics.read_text().splitlines()} == {3}
    told = storage.read_manifest(run.checkpoint(3)).meta["start"]
    assert told["loader"] == place
    # What it has itself comes before what it is told to load.
    config["tracker"]["load"] |= {
        key: value.replace("ada", "nobody").replace("latest", "nothing") for key, value in load.items()
    }
    config["train"]["epoch_samples"] = 16
    assert RunDir(train(config, accept_changes=True)).checkpoint(4).is_dir()


def test_files_of_a_run_at_wandb_are_saved_to_and_loaded_from(shards, wandb_server):
    save = {"save_to": "wandb", "wandb_run_path": "me/cats/one", "save_latest_to": "a/{step}.pth"}
    save |= {"save_meta_to": "about"}
    first = train(settings(shards, save=save))
    names = {name.removeprefix("me/cats/one/").partition("/step-")[0] for name in wandb_server.files}
    assert {"a/1.pth", "a/2.pth", "about/config.json"} <= names
    Path(first).rename("before")
    load = {"load_from": "wandb", "wandb_run_path": "me/cats/one", "wandb_file_path": "a/1.pth"}
    run = RunDir(train(settings(shards, load=load)))
    assert storage.read_manifest(run.checkpoint(2)).meta["start"]["url"].startswith("wandb:me/cats/one/a/1.pth/step-")
    before, after = (storage.verify(RunDir(folder).checkpoint(2)).files for folder in (Path("before"), run.root))
    assert {name: file.sha256 for name, file in before.items()} == {name: file.sha256 for name, file in after.items()}


def test_a_token_may_stand_in_a_file_that_nobody_else_can_read(shards, hub, monkeypatch):
    token = Path("token")
    token.write_text(os.environ["HF_TOKEN"])
    monkeypatch.delenv("HF_TOKEN")
    hugging = {"huggingface_repo": "ada/model", "token_path": "token"}
    config = settings(shards, save={"save_to": "huggingface", **hugging, "save_latest_to": "latest"})
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="token"):
        train(config)
    token.chmod(0o600)
    Path(train(config)).rename("before")
    assert "latest/manifest.json" in hub.repos["ada/model"].files
    load = {"load_from": "huggingface", "huggingface_file_path": "latest", **hugging}
    run = RunDir(train(settings(shards, load=load)))
    assert storage.read_manifest(run.checkpoint(2)).meta["start"]["loader"] == "huggingface"


def test_only_auto_resume_loads_where_a_run_was_before_and_not_into_a_new_one(shards, saved):
    load = {"load_from": "local", "file_path": "latest.pth", "only_auto_resume": True}
    config = settings(shards, epoch_samples=12, load=load)
    new = RunDir(train(config))
    assert not any(storage.read_manifest(path).meta["start"] for path in new.checkpoints.iterdir())
    for path in new.checkpoints.iterdir():
        path.rename(path.parents[1] / f"aside-{path.name}")
    again = RunDir(train(config, accept_changes=True))
    assert storage.read_manifest(again.checkpoint(3)).meta["start"]["path"].endswith("latest.pth")


def test_a_file_to_load_that_is_not_there_is_told_before_anything_is_made(shards):
    config = settings(shards, load={"load_from": "local", "file_path": "latest.pth"})
    with pytest.raises(DataError, match=r"start\.path: latest\.pth does not exist"):
        train(config)
    assert not Path("run/checkpoints").exists()
