"""Copies on this machine go where the config says, and nowhere else."""

import json

import pytest
import torch
from pydantic import ValidationError

from eclosion.checkpoint import storage
from eclosion.config.templates import EXAMPLE
from eclosion.errors import CheckpointError, ConfigError, DataError
from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking.loading import fetched_facts


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    files = {"net": {"a": torch.ones(3)}, "net.ema": {"a": torch.zeros(3)}, "net.optimizer": {}}
    storage.write(run.checkpoint(5000), files, {"step": 5000, "samples_seen": 80000}, {"config": {}})
    return run


def local(**options):
    return build("savers", {"name": "local", **options})


def save(part, run, *, latest=True, best=False):
    part.open(run).save(run.checkpoint(5000), latest=latest, best=best, values=EXAMPLE)


def test_paths_are_relative_to_the_current_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(local(latest="out/latest.pth", best="best_{epoch}_{samples_seen}.pth"), run, best=True)
    assert storage.verify(tmp_path / "out" / "latest.pth").step == 5000
    assert storage.verify(tmp_path / "best_3_80000.pth").step == 5000


def test_or_to_the_root_that_is_named(run, tmp_path):
    save(local(root=str(tmp_path / "models"), latest="{step:08d}", kind="model"), run)
    loaded = storage.read(tmp_path / "models" / "00005000", verified=True)
    assert loaded.files.keys() == {"net"}
    assert loaded.files["net"]["a"].tolist() == [0, 0, 0]


def test_only_what_was_asked_for_is_saved(run, tmp_path):
    part = local(root=str(tmp_path / "models"), best="best")
    save(part, run, latest=True, best=False)
    assert not (tmp_path / "models").exists()


def test_files_about_the_run_go_to_meta(run, tmp_path):
    saver = local(root=str(tmp_path / "models"), meta="about").open(run)
    for seed in (1, 2):
        run.config.write_text(json.dumps({"output": "", "data": {}, "task": {}, "train": {}, "seed": seed}))
        saver.save_meta([run.config])
    assert [path.name for path in (tmp_path / "models" / "about").iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "models" / "about" / "config.json").read_text())["seed"] == 2
    local(root=str(tmp_path / "none"), latest="a").open(run).save_meta([run.config])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["config.json", "ledger.jsonl"])
def test_files_about_the_run_do_not_replace_those_of_somebody(name, run, tmp_path):
    (tmp_path / "about").mkdir()
    (tmp_path / "about" / name).write_text("mine")
    (run.root / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds a {name} that no run wrote"):
        local(root=str(tmp_path), meta="about").open(run).save_meta([run.root / name])
    assert (tmp_path / "about" / name).read_text() == "mine"


def test_files_about_the_run_do_not_replace_those_of_another_run(run, tmp_path):
    other = RunDir(tmp_path / "other")
    other.checkpoints.mkdir(parents=True)
    other.config.write_text(json.dumps({"output": "", "data": {}, "task": {}, "train": {}}))
    with pytest.raises(ConfigError, match="is the folder of a run"):
        local(root=str(tmp_path), meta="other").open(run)


def test_a_link_for_files_about_the_run_is_followed_and_may_not_lead_out(run, tmp_path):
    (tmp_path / "models").mkdir()
    for name, said in (("out", "outside"), ("models/in", None)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / "models" / "about").symlink_to(tmp_path / name)
        part = local(root=str(tmp_path / "models"), meta="about")
        if said:
            with pytest.raises(ConfigError, match=said):
                part.open(run)
        else:
            part.open(run).save_meta([run.checkpoint(5000) / "manifest.json"])
            assert (tmp_path / name / "manifest.json").is_file()
        (tmp_path / "models" / "about").unlink()


@pytest.mark.parametrize("written", ["./a", "a/", "./b/../a"])
def test_a_path_is_taken_in_its_shortest_form(written):
    if ".." in written:
        with pytest.raises(ValidationError, match="leads elsewhere"):
            local(latest=written)
    else:
        assert local(latest=written).latest == "a"


@pytest.mark.parametrize(
    "path", ["../a", "a/../../b", "/etc/a", "~/a", "", " a", "a\nb", "C:/a", "..\\a", "{step}/../..", "x" * 600]
)
def test_a_path_that_leads_elsewhere_is_refused_with_the_config(path):
    with pytest.raises(ValidationError, match=r"leads elsewhere|is not the path of a file"):
        local(latest=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "saves nothing. Give it at least one of latest, best and meta"),
        ({"latest": "a", "best": "a"}, "'a' is the path of two things"),
        ({"latest": "{best_validation_loss:d}"}, "Unknown format code 'd'"),
        ({"latest": "{nothing}"}, "is not known in a path"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_config(options, said):
    with pytest.raises(ValidationError, match=said):
        local(**options)


def test_a_link_does_not_lead_out_of_the_root(run, tmp_path):
    root, outside = tmp_path / "models", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with pytest.raises(ConfigError, match=f"leads to {outside}/latest, outside {root}"):
        local(root=str(root), latest="link/latest").open(run)
    with pytest.raises(ConfigError, match="outside"):
        save(local(root=str(root), latest="link/{step}"), run)
    assert list(outside.iterdir()) == []


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(run, tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    (root / "latest").symlink_to(run.checkpoint(5000))
    with pytest.raises(CheckpointError, match="something else than a checkpoint"):
        save(local(root=str(root), latest="latest"), run)
    assert (root / "latest").is_symlink()


@pytest.mark.parametrize(
    "path",
    ["runs/a", "runs", "runs/a/checkpoints/step-00000001", "runs/a/checkpoints", "runs/a/samples/x", "runs/a/lock"],
)
def test_the_runs_own_files_are_not_written_over(path, run, tmp_path):
    with pytest.raises(ConfigError, match="where the run keeps its own"):
        local(root=str(tmp_path), latest=path).open(run)


def test_beside_them_a_copy_may_stand_in_the_run_folder(run, tmp_path):
    save(local(root=str(run.root), latest="latest.pth"), run)
    assert storage.verify(run.root / "latest.pth").step == 5000


def test_a_run_starts_from_a_path_that_is_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = build("loaders", {"name": "local", "path": "runs/a"})
    into = tmp_path / "new" / "start"
    assert part.fetch(into) == run.root
    assert fetched_facts(into) == {"loader": "local", "path": str(run.root)}
    with pytest.raises(DataError, match=f"start.path: runs/b does not exist .current directory: {tmp_path}."):
        build("loaders", {"name": "local", "path": "runs/b"}).fetch(into)
