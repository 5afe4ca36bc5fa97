"""Checkpoints that go to the Hugging Face hub while a run trains, and runs that start from what is there."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from eclosion import ConfigError, train
from eclosion.checkpoint.storage import read_manifest, verify
from eclosion.errors import DataError, EnvironmentProblem
from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.sampling import load_trained
from eclosion.tracking import hub as hub_module
from eclosion.tracking import huggingface
from eclosion.tracking.hub import Patience
from eclosion.tracking.loading import fetched_facts

VALUES = {"epoch": 1, "sample": 3, "step": 12, "samples_seen": 96, "best_validation_loss": 0.5}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(hub_module, "DEFAULT", Patience(tries=2, wait_seconds=0.01, answer_seconds=60))
    monkeypatch.setattr(huggingface, "AT_START", Patience(tries=1, answer_seconds=20))


@pytest.fixture
def newest(uninterrupted):
    """The newest checkpoint of a run of 12 steps."""
    return max((uninterrupted / "checkpoints").glob("step-*"))


def saver(run, **options):
    return build("savers", {"name": "huggingface", "repo": "ada/model", **options}).open(RunDir(run))


def files_of(hub, name="ada/model"):
    return {path: short(path, file.data) for path, file in hub.repos[name].files.items() if path != ".gitattributes"}


def short(name, data):
    """Weights by their hash, as a failing comparison of megabytes takes minutes to show."""
    return hashlib.sha256(data).hexdigest() if str(name).endswith(".safetensors") else data


def contents(folder, under):
    return {f"{under}/{path.name}": short(path, path.read_bytes()) for path in folder.iterdir()}


# --- saving ---


def test_a_save_is_one_commit_with_the_whole_checkpoint_at_both_its_places(hub, tmp_path, newest):
    saver(tmp_path, latest="latest.pth", best="best_{epoch}_{samples_seen}").save(
        newest, latest=True, best=True, values=VALUES
    )
    there = files_of(hub)
    card = there.pop("README.md").decode()
    assert there == contents(newest, "latest.pth") | contents(newest, "best_1_96")
    assert hub.repos["ada/model"].messages == ["step 12: latest.pth, best_1_96"]
    assert hub.repos["ada/model"].private
    assert "start: {name: huggingface, repo: ada/model, path: latest.pth}" in card
    assert "| optimizer steps | 12 |" in card


def test_the_newest_replaces_the_one_before_and_numbered_ones_stay(hub, tmp_path, uninterrupted):
    older, newer = sorted((uninterrupted / "checkpoints").glob("step-*"))[-2:]
    hub.add("ada/model", {"latest/another_network.safetensors": b"of a checkpoint with more networks"})
    kept = saver(tmp_path, latest="latest", best="best-{step}")
    kept.save(older, latest=True, best=True, values=VALUES | {"step": 9})
    kept.save(newer, latest=True, best=True, values=VALUES)
    there = files_of(hub)
    there.pop("README.md")
    assert there == contents(newer, "latest") | contents(older, "best-9") | contents(newer, "best-12")
    assert len(hub.repos["ada/model"].messages) == 2


def test_a_model_is_the_averages_alone(hub, tmp_path, newest):
    saver(tmp_path, latest="model", kind="model").save(newest, latest=True, best=False, values=VALUES)
    there = files_of(hub)
    assert set(there) == {"README.md", "model/manifest.json", "model/state.json", "model/unet.safetensors"}
    assert there["model/unet.safetensors"] == contents(newest, "a")["a/unet.ema.safetensors"]
    assert not list((tmp_path / "tracking").rglob("*.safetensors"))  # nothing is left on the way


def test_files_about_the_run_go_to_meta(hub, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0}')
    saver(tmp_path, meta="about").save_meta([tmp_path / "config.json"])
    assert files_of(hub) == {"about/config.json": b'{"seed": 0}'}
    saver(tmp_path, latest="latest").save_meta([tmp_path / "config.json"])
    assert set(files_of(hub)) == {"about/config.json"}


def test_a_damaged_or_missing_file_is_not_sent(hub, tmp_path, newest):
    broken = shutil.copytree(newest, tmp_path / newest.name)
    (broken / "unet.safetensors").unlink()
    with pytest.raises((EnvironmentProblem, ConfigError), match=r"unet.safetensors"):
        saver(tmp_path, latest="latest").save(broken, latest=True, best=False, values=VALUES)
    assert hub.repos["ada/model"].messages == []


def test_what_is_refused_is_told_when_the_run_begins(hub, tmp_path, monkeypatch):
    hub.add("ada/model", private=False)
    with pytest.raises(ConfigError, match="is public, and a private one is wanted"):
        saver(tmp_path, latest="latest")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no token"):
        saver(tmp_path, latest="latest")


def test_a_hub_that_is_away_when_the_run_begins_is_asked_again(hub, tmp_path, newest):
    hub.fail("GET /api/models", None)
    with pytest.warns(UserWarning, match="cannot be reached.*; asked again at each save"):
        kept = saver(tmp_path, latest="latest")
    kept.save(newest, latest=True, best=False, values=VALUES)
    assert len(hub.repos["ada/model"].messages) == 1


def test_a_run_saves_as_it_goes_and_the_hub_ends_with_its_newest_checkpoint(hub, make_config, tmp_path):
    save = [{"name": "huggingface", "repo": "model", "latest": "latest", "meta": "about"}]
    config = make_config(tmp_path / "run", track={"save": save}, train={"duration": "6 steps"})
    run = train(config)
    there = files_of(hub)
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000006"
    assert {path: data for path, data in there.items() if path.startswith("latest/")} == contents(newest, "latest")
    assert json.loads(there["about/config.json"])["train"]["duration"] == "6 steps"


def test_a_hub_that_stops_taking_saves_does_not_stop_the_run_but_its_end_says_so(hub, make_config, tmp_path):
    save = [{"name": "huggingface", "repo": "ada/model", "latest": "latest"}]
    config = make_config(tmp_path / "run", track={"save": save}, train={"duration": "6 steps"})
    hub.fail("POST .*/commit/", 503, times=999)
    with pytest.raises(EnvironmentProblem, match=r"saving step 6 to huggingface failed: .*cannot be reached") as error:
        train(config)
    assert error.value.exit_code == 4
    run = tmp_path / "run"
    assert load_trained(run).step == 6
    verify(run / "checkpoints" / "step-00000006")
    assert "saving step" in (run / "events.jsonl").read_text()
    hub.faults.clear()
    train(config)  # started again, it sends what is missing
    assert files_of(hub)["latest/manifest.json"] == (run / "checkpoints/step-00000006/manifest.json").read_bytes()


# --- starting from ---


def loader(**options):
    return build("loaders", {"name": "huggingface", "repo": "ada/model", **options})


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "run" / "start"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def shared(hub, newest):
    """A repository with a checkpoint in "latest", and other things that are not taken from it."""
    others = {"latest/run.py": b"import os", "latest/pickle.pth": b"x", "notes.txt": b"hello", "old.pth": b"foreign"}
    checkpoint = {f"latest/{path.name}": path.read_bytes() for path in newest.iterdir()}
    return hub.add("ada/model", checkpoint | others)


def test_a_folder_is_brought_here_byte_for_byte_and_its_commit_is_kept(hub, shared, into, newest):
    found = loader(path="latest").fetch(into)
    assert contents(found, "a") == contents(newest, "a")
    assert verify(found).step == 12
    assert not list(into.glob(".*"))  # nothing is left on the way
    facts = fetched_facts(into)
    assert (facts["revision"], facts["path"], facts["url"]) == (shared.head, "latest", f"{hub.url}/ada/model")


def test_a_revision_pins_what_is_taken(hub, shared, into, newest):
    pinned = shared.head
    shared.commit("later", {path: file for path, file in shared.files.items() if "manifest" not in path})
    assert read_manifest(loader(path="latest", revision=pinned).fetch(into)).step == 12
    assert fetched_facts(into)["revision"] == pinned
    hub.requests.clear()
    loader(path="latest", revision=pinned).fetch(into)
    assert hub.requests == []  # what is here already, and cannot have changed


def test_one_file_can_be_named(hub, shared, into):
    found = loader(path="old.pth").fetch(into)
    assert found.name == "old.pth"
    assert found.read_bytes() == b"foreign"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "it holds no checkpoint, model or pipeline. Give path, such as latest"),
        ("lates", "lates holds no checkpoint, model or pipeline. Give path, such as latest"),
        ("notes.txt", "notes.txt is no file of weights"),
    ],
)
def test_what_cannot_be_started_from_is_told_with_what_can(path, message, hub, shared, into):
    with pytest.raises(ConfigError, match=message):
        loader(path=path).fetch(into)
    assert not [path for path in into.iterdir() if path.is_dir()]


def test_a_path_that_leads_out_of_the_repository_is_refused():
    with pytest.raises(ValueError, match="leads elsewhere"):
        loader(path="../x")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repo": "ada/other"}, "is not there, or not for you"), ({"revision": "v9"}, "v9|not there")],
)
def test_a_repository_or_revision_that_is_not_there_is_told(options, message, hub, shared, into):
    with pytest.raises(ConfigError, match=message):
        loader(**options).fetch(into)


def test_a_public_repository_needs_no_token_and_a_private_one_does(hub, shared, into, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="is not there, or not for you"):
        loader(path="latest").fetch(into)
    shared.private = False
    assert read_manifest(loader(path="latest").fetch(into)).step == 12
    assert set(hub.tokens) == {None}


def test_a_file_whose_body_broke_off_goes_on_from_there(hub, shared, into, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    hub.fail("GET /content/", half=True)
    verify(loader(path="latest").fetch(into))
    assert [given for given in hub.ranges if given and not given.startswith("bytes=0-")]


def test_a_download_that_broke_off_goes_on_and_is_not_begun_anew(hub, shared, into, monkeypatch):
    no_waiting = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.file_download.time", no_waiting)
    hub.fail("GET /content/", None, times=99)
    with pytest.raises(EnvironmentProblem):
        loader(path="latest").fetch(into)
    assert not [path for path in into.iterdir() if not path.name.startswith(".")]  # nothing looks whole
    hub.faults.clear()
    there = [path.name for path in into.rglob("latest/*") if path.is_file()]
    assert there
    hub.requests.clear()
    found = loader(path="latest").fetch(into)
    verify(found)
    assert not [path for _, path in hub.requests if any(path.endswith(f"/{name}") for name in there)]


def test_content_that_is_not_what_the_hub_says_is_refused(hub, shared, into):
    data = bytearray(shared.files["latest/unet.safetensors"].data)
    sha256 = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    hub.blobs[sha256] = bytes(data)
    with pytest.raises(EnvironmentProblem, match=r"latest/unet.safetensors of commit \w{8} did not arrive as"):
        loader(path="latest").fetch(into)
    assert not [path for path in into.iterdir() if not path.name.startswith(".")]


def test_names_that_lead_out_of_the_folder_are_refused(hub, shared, into, newest):
    shared.commit("evil", {**shared.files, "latest/../../../evil.json": shared.files["notes.txt"]})
    with pytest.raises(ConfigError, match="is no path that is taken from a repository"):
        loader(path="latest").fetch(into)
    assert not list(into.parent.parent.glob("evil*"))


def test_a_run_goes_on_from_a_checkpoint_on_the_hub_and_its_checkpoints_say_so(
    hub, shared, make_config, results, uninterrupted, tmp_path
):
    start = {"name": "huggingface", "repo": "ada/model", "path": "latest"}
    config = make_config(tmp_path / "second", train={"duration": "15 steps"})
    run = train({**config, "start": start}, accept_changes=True)
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000015"
    assert read_manifest(newest).meta["start"]["revision"] == shared.head
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) > 12


def test_what_is_not_there_ends_before_the_first_step(hub, make_config, tmp_path):
    config = make_config(tmp_path / "run")
    with pytest.raises((ConfigError, DataError), match="ada/none"):
        train({**config, "start": {"name": "huggingface", "repo": "ada/none"}})
    assert not list(Path(tmp_path / "run").glob("checkpoints/step-*"))


def test_a_path_that_is_not_taken_from_a_repository_is_not_saved_to(hub):
    with pytest.raises(ValidationError, match="begins with a point"):
        build("savers", {"name": "huggingface", "repo": "a/b", "latest": "models/.latest"})
