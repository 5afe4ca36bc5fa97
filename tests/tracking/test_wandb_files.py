"""Checkpoints among the files of a run at wandb: the real client, against a server of this machine or offline."""

import json
import threading

import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("wandb")

from eclosion.checkpoint import storage
from eclosion.config.templates import EXAMPLE
from eclosion.errors import ConfigError, DataError, EnvironmentProblem
from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import wandb_files
from eclosion.tracking.loading import fetched_facts
from eclosion.tracking.wandb_segments import records


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    for step in (1, 2):
        files = {"net": {"a": torch.full((1000,), float(step))}, "net.ema": {"a": torch.zeros(3)}, "net.optimizer": {}}
        storage.write(run.checkpoint(step), files, {"step": step, "samples_seen": step}, {"config": {}})
    run.config.write_text('{"track": {"log": [{"name": "console"}]}}')
    return run


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "new" / "start"
    folder.mkdir(parents=True)
    return folder


def logged(run, mode):
    """What the logger leaves of the run at wandb that it writes to."""
    run.tracking.mkdir(exist_ok=True)
    run.config.write_text(json.dumps({"track": {"log": [{"name": "wandb", "mode": mode}]}}))
    standing = {"run_id": "one", "place": {"entity": "me", "project": "cats"}, "mode": mode or "online"}
    run.follower("wandb").write_text(json.dumps(standing))


def saver(run, **options):
    return build("savers", {"name": "wandb", **options}).open(run)


def save(made, run, step=1, **which):
    made.save(run.checkpoint(step), **({"latest": True, "best": False} | which), values={**EXAMPLE, "step": step})


def loader(**options):
    return build("loaders", {"name": "wandb", "run_path": "me/cats/one", **options})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- there -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_found_again_and_the_old_one_is_gone(wandb_server, run, into):
    made = saver(run, run_path="me/cats/one", latest="out/latest.pth", meta="about")
    for step in (1, 2):
        save(made, run, step)
        found = loader(path="out/latest.pth").fetch(into)
        assert content(found) == content(run.checkpoint(step))
    made.save_meta([run.config])
    names = sorted(name.removeprefix("me/cats/one/") for name in wandb_server.files)
    assert names[:2] == ["about/config.json", "out/latest.pth/current.json"]
    assert len({name.split("/")[2] for name in names[2:]}) == 1
    assert wandb_server.files["me/cats/one/about/config.json"] == run.config.read_bytes()
    assert fetched_facts(into)["url"].startswith("wandb:me/cats/one/out/latest.pth/step-00000002-")
    assert [path.name for path in run.root.iterdir() if "wandb" in path.name] == []


def test_the_run_that_is_logged_to_is_saved_to_and_started_from(wandb_server, run):
    logged(run, None)
    save(saver(run, latest="latest", kind="model"), run)
    assert any(name.startswith("me/cats/one/latest/step-00000001-") for name in wandb_server.files)
    run.start.mkdir()
    found = build("loaders", {"name": "wandb", "path": "latest"}).fetch(run.start)
    assert storage.read(found, verified=True).files.keys() == {"net"}


def test_nothing_is_saved_to_a_project_that_everybody_sees_unless_that_is_wanted(wandb_server, run):
    wandb_server.public = True
    with pytest.raises(ConfigError, match="everybody can see the project me/cats, and nothing was sent"):
        save(saver(run, run_path="me/cats/one", latest="latest"), run)
    assert not wandb_server.uploads
    save(saver(run, run_path="me/cats/one", latest="latest", public=True), run)
    assert wandb_server.uploads


def test_a_saver_waits_until_the_run_at_wandb_has_begun(wandb_server, run, monkeypatch):
    monkeypatch.setattr(wandb_files, "LOGGER_SECONDS", 0.2)
    logged(run, "online")
    standing = json.loads(run.follower("wandb").read_text())
    run.follower("wandb").write_text(json.dumps({**standing, "mode": ""}))
    with pytest.raises(EnvironmentProblem, match="me/cats/one at wandb has not begun"):
        save(saver(run, latest="latest"), run)
    monkeypatch.setattr(wandb_files, "LOGGER_SECONDS", 20.0)
    later = threading.Timer(0.5, lambda: run.follower("wandb").write_text(json.dumps(standing)))
    later.start()
    save(saver(run, latest="latest"), run)
    later.join()
    assert wandb_server.uploads


def test_a_file_that_another_program_saved_is_fetched_as_it_is(wandb_server, into):
    wandb_server.files["me/cats/one/latest.pth"] = b"a zip file of torch"
    assert loader(path="latest.pth").fetch(into).read_bytes() == b"a zip file of torch"
    assert fetched_facts(into) == {"loader": "wandb", "url": "wandb:me/cats/one/latest.pth", "size": 19}


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["net.safetensors", "manifest.json", "current.json"])
def test_the_pointer_is_written_last_so_that_an_upload_that_breaks_leaves_the_old_checkpoint(
    refused, wandb_server, run, into
):
    made = saver(run, run_path="me/cats/one", latest="latest")
    save(made, run, 1)
    assert wandb_server.uploads[-1].endswith("latest/current.json")
    wandb_server.refused = refused
    with pytest.raises(EnvironmentProblem, match="me/cats/one at wandb: "):
        save(made, run, 2)
    assert content(loader(path="latest").fetch(into)) == content(run.checkpoint(1))


def test_what_is_not_there_is_told(wandb_server, into):
    with pytest.raises(DataError, match=r"start\.path: me/cats/one has no file nothing\.pth"):
        loader(path="nothing.pth").fetch(into)
    with pytest.raises(EnvironmentProblem, match="me/cats/two at wandb: Could not find run"):
        loader(run_path="me/cats/two", path="latest").fetch(into)


@pytest.mark.slow
def test_a_file_that_is_too_large_or_cut_is_refused(wandb_server, into):
    wandb_server.files["me/cats/one/latest.pth"] = bytes(5000)
    with pytest.raises(DataError, match=r"has 5000 bytes, and at most 1000 are fetched"):
        loader(path="latest.pth", max_gb=1e-6).fetch(into)
    wandb_server.short = 100
    with pytest.raises(EnvironmentProblem, match=r"wandb"):
        loader(path="latest.pth").fetch(into)
    assert not (into / "wandb" / "latest.pth").exists()


def test_a_key_that_is_missing_is_told_and_not_asked_for(wandb_server, run, into, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(EnvironmentProblem, match=r"wandb has no key for 127\.0\.0\.1\. Set WANDB_API_KEY"):
        loader(path="latest").fetch(into)


@pytest.mark.slow
def test_an_error_says_nothing_of_the_key(wandb_server, run):
    wandb_server.refused = "safetensors"
    with pytest.raises(EnvironmentProblem) as error:
        save(saver(run, run_path="me/cats/one", latest="latest"), run)
    assert wandb_server.key not in str(error.value)


# --- which run -------------------------------------------------------------------------------------------------------


def test_a_saver_waits_for_the_logger_and_tells_when_there_is_none(run, monkeypatch):
    monkeypatch.setattr(wandb_files, "LOGGER_SECONDS", 0.05)
    for log in ([{"name": "console"}], [{"name": "wandb"}]):
        run.config.write_text(json.dumps({"track": {"log": log}}))
        with pytest.raises(ConfigError, match=r"Add wandb to track\.log, or give run_path"):
            save(saver(run, latest="latest"), run)


def test_a_run_that_never_wrote_to_wandb_cannot_be_started_from_there(into):
    with pytest.raises(ConfigError, match=r"start\.run_path: this run has not written to wandb yet"):
        build("loaders", {"name": "wandb", "path": "latest"}).fetch(into)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../b"])
def test_a_path_that_leads_elsewhere_is_refused_with_the_config(path):
    with pytest.raises(ValidationError, match="leads elsewhere"):
        loader(path=path)


# --- offline ---------------------------------------------------------------------------------------------------------


def test_offline_the_newest_files_are_kept_for_wandb_sync(run, monkeypatch):
    """Read back from what wandb itself wrote."""
    logged(run, "offline")
    made = saver(run, latest="latest", meta="about")
    for step in (1, 2):
        save(made, run, step)
    made.save_meta([run.config])
    segments = sorted((run.tracking / "wandb-files").glob("*/*/wandb/offline-run-*"))
    assert len(segments) == 2
    listed = {}
    for segment in segments:
        for record in records(next(segment.glob("*.wandb"))):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.entity, record.run.project, record.run.run_id) == ("me", "cats", "one")
            for file in record.files.files:
                listed[file.path] = segment / "files" / file.path
    assert listed["about/config.json"].read_bytes() == run.config.read_bytes()
    pointer = json.loads(listed["latest/current.json"].read_text())
    assert pointer["step"] == 2
    kept = {
        name.rpartition("/")[2]: path.read_bytes() for name, path in listed.items() if pointer["checkpoint"] in name
    }
    assert kept == content(run.checkpoint(2))
    assert not any(path.is_symlink() for path in listed.values())
