"""The command line: each command, what it prints and what it ends with."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings

import numpy as np
import pytest
import yaml
from PIL import Image

import eclosion
from eclosion.errors import Interrupted, OutOfMemory


@pytest.fixture
def config(make_config, tmp_path):
    """A config file of a tiny run."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(tmp_path / "run")))
    return path


def test_help_names_every_command(command):
    out = command("--help").out
    for name in (
        "demo",
        "init",
        "check",
        "train",
        "sample",
        "export",
        "import",
        "data",
        "runs",
        "doctor",
        "list",
        "schema",
    ):
        assert f"\n  {name} " in out
    assert "report" in out


def test_the_version_is_the_packages(command):
    assert command("--version").out == f"{eclosion.__version__}\n"


def test_an_unknown_command_is_a_usage_error(command):
    outcome = command("trian")
    assert outcome.code == 2
    assert "No such command 'trian'" in outcome.err


def test_init_writes_a_config_that_check_takes_and_does_not_overwrite_one(command, tmp_path):
    path = tmp_path / "new" / "config.yaml"
    assert command("init", path, "--recipe", "butterflies").out == f"Wrote {path}. Next: eclosion check {path}\n"
    assert command("check", path).code == 0
    path.write_text("mine")
    again = command("init", path)
    assert (again.code, again.err) == (
        2,
        f"error: {path} exists already, and is left as it is. Give another name.\n",
    )
    assert path.read_text() == "mine"


def test_init_names_the_recipes(command, tmp_path):
    assert "butterflies  Butterflies drawn by eclosion itself" in command("init", "--recipe", "list").out
    wrong = command("init", tmp_path / "c.yaml", "--recipe", "buterflies")
    assert wrong.err == (
        "error: 'buterflies' is no recipe. Did you mean 'butterflies'? "
        "Options: butterflies, classes, clipart, decoder, flow, folder, huggingface.\n"
    )


def test_check_shows_values_with_origins_networks_and_counts(command, config):
    outcome = command("check", config, "train.batch_size=4")
    assert (outcome.code, outcome.err) == (0, "")
    lines = {" ".join(line.split()) for line in outcome.out.splitlines()}
    assert {
        "train.batch_size 4 override",
        "data.image_size 16 config",
        'train.parallel "ddp" default',
        "images 40",
        "steps 12, 10 in an epoch",
        "epochs 1.2",
        "images seen 48",
        "output no run is there; training starts from scratch",
        "No problem found.",
    } <= lines


def test_check_as_json_holds_the_same(command, config):
    found = json.loads(command("check", config, "--json").out)
    assert found["data"]["num_samples"] == 40
    assert found["plan"]["num_steps"] == 12
    assert found["problems"] == []
    assert {"path": "seed", "value": 0, "origin": "default"} in found["settings"]


def test_check_ends_with_the_code_of_the_first_problem_and_tells_all(command, config):
    outcome = command("check", config, "data.source={name: folder, root: none}", "train.freeze=[unt]")
    assert outcome.code == 3
    assert [line.split(":")[1] for line in outcome.err.splitlines()] == [" data.source.root", " train.freeze"]


def test_train_goes_from_config_to_run_folder_and_says_where(command, config, tmp_path):
    outcome = command("train", config, "train.duration=2 steps", "sample.num_images=0")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == f"Run folder: {tmp_path / 'run'}"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    # once more, longer
    refused = command("train", config, "train.duration=3 steps")
    assert refused.code == 2
    accepted = command("train", config, "train.duration=3 steps", "--accept-changes")
    assert accepted.code == 0
    assert "resuming at step 2 of 3" in accepted.out


def test_resume_never_leaves_a_run_that_is_there_alone(command, config, uninterrupted):
    outcome = command("train", config, f"output={uninterrupted}", "--resume", "never")
    assert outcome.code == 2
    assert outcome.err == (
        f"error: {uninterrupted} already holds a run at step-00000012. Go on with --resume auto, choose another output "
        "folder, or set overwrite=true.\n"
    )


def test_sample_makes_images_that_depend_on_the_seed_and_not_on_the_batch(command, uninterrupted, tmp_path):
    arguments = ("sample", uninterrupted, "-n", 3, "--seed", 7, "--sampler", "ddim", "--steps", 2, "--device", "cpu")
    one = command(*arguments, "--out", tmp_path / "one")
    assert (one.code, one.err) == (0, "")
    assert one.out == f"3 images and grid.png: {tmp_path / 'one'}\n"
    command(*arguments, "--out", tmp_path / "other", "--batch-size", 2)
    for name in ("000000.png", "000001.png", "000002.png"):
        with Image.open(tmp_path / "one" / name) as ours, Image.open(tmp_path / "other" / name) as theirs:
            assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1


def test_sample_tells_what_is_wrong(command, uninterrupted, tmp_path):
    assert command("sample", tmp_path).err == (
        f"error: {tmp_path}: holds no checkpoint. Give the folder of a run that has trained.\n"
    )
    wrong = command("sample", uninterrupted, "--sampler", "dppm")
    assert wrong.code == 2
    assert "Did you mean 'ddpm'?" in wrong.err


def test_export_writes_a_pipeline(command, uninterrupted, tmp_path):
    outcome = command("export", uninterrupted, tmp_path / "pipe", "--pipeline", "ddim")
    assert (outcome.code, outcome.out) == (0, f"Pipeline: {tmp_path / 'pipe'}\n")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"


def test_data_show_draws_a_sheet(command, config, tmp_path):
    outcome = command("data", "show", config, "--out", tmp_path / "sheet.png", "-n", 3)
    assert (outcome.code, outcome.out) == (0, f"Wrote {tmp_path / 'sheet.png'}\n")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 160


def test_runs_lists_what_there_is(command, uninterrupted, tmp_path):
    (line,) = command("runs", uninterrupted.parent).out.splitlines()[1:]
    assert line.split()[:4] == [str(uninterrupted), "finished", "12", "12"]
    assert command("runs", tmp_path).out == f"No runs below {tmp_path}.\n"
    (found,) = json.loads(command("runs", uninterrupted.parent, "--json").out)
    assert (found["state"], found["step"]) == ("finished", 12)


def test_list_shows_parts_with_their_options(command):
    out = command("list", "samplers").out
    assert "ddim" in out
    assert "num_inference_steps  int >= 1" in out
    assert "one of: trailing, linspace, leading" in out
    assert command("list", "sampler").err == (
        "error: 'sampler' is no table of parts. Did you mean 'samplers'? Options: dialects, encoders, loaders, "
        "loggers, metrics, models, noise_schedules, samplers, savers, sources, tasks.\n"
    )


def test_schema_is_printed_or_written(command, tmp_path):
    printed = command("schema").out
    assert command("schema", tmp_path / "s.json").code == 0
    assert (tmp_path / "s.json").read_text() == printed
    assert json.loads(printed)["title"] == "eclosion config"


def test_report_writes_the_page_of_a_run_and_of_nothing_else(command, uninterrupted, tmp_path):
    assert command("report", uninterrupted).out == f"Wrote {uninterrupted / 'report.html'}\n"
    wrong = command("report", tmp_path)
    assert (wrong.code, wrong.err) == (
        2,
        f"error: {tmp_path} is no run folder: it has no config.json. `eclosion runs` lists runs.\n",
    )


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_traceback_is_shown_with_debug_alone(where, command, tmp_path):
    plain = command("check", tmp_path / "none.yaml")
    assert "Traceback" not in plain.err
    words = ["train", tmp_path / "none.yaml"]
    outcome = command(*(["--debug", *words] if where == "before" else [*words, "--debug"]))
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback")
    assert outcome.err.endswith("`eclosion init` writes a config.\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OutOfMemory("too little"), 5, "error: too little\n"),
        (Interrupted(15, "stopped"), 143, "stopped\n"),
        (Interrupted(2, "stopped"), 130, "stopped\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "error: ZeroDivisionError: division by zero\nThis is a bug in eclosion. The traceback is in the run's "
            "error.log if there is a run, and shown with --debug.\n",
        ),
    ],
)
def test_each_kind_of_end_has_its_code(error, code, message, command, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("eclosion.training.run.train", fails)
    outcome = command("train", tmp_path / "c.yaml")
    assert (outcome.code, outcome.err) == (code, message)


def test_a_stopped_evaluation_says_that_it_goes_on_where_it_was(command, monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("eclosion.evaluation.evaluating.evaluate", stopped)
    outcome = command("evaluate", tmp_path)
    assert (outcome.code, outcome.err) == (130, "stopped. The same command goes on where it was.\n")


def test_a_remark_about_a_config_is_a_note(command, monkeypatch, tmp_path):
    def remarks(*_, **__):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("nothing is uploaded", stacklevel=2)
        return "run"

    monkeypatch.setattr("eclosion.training.run.train", remarks)
    outcome = command("train", tmp_path / "c.yaml")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Run folder: run\n", "note: nothing is uploaded\n")


def test_ctrl_c_saves_and_the_next_start_goes_on(config, tmp_path):
    """In a process of its own, as a person does it."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "eclosion", "train", str(config), "train.duration=5000 steps"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    saved = max(path.name for path in (tmp_path / "run").glob("checkpoints/step-*"))
    assert err == (
        f"{tmp_path / 'run'}: stopped at step {int(saved.removeprefix('step-'))}, which is saved. "
        "Start it again to go on.\n"
    )


# ---------------------------------------------------------------------------------------------------- index and shard


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Five pictures in a folder, with captions."""
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (40 * number, 0, 99)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


def table_of(outcome):
    return {" ".join(line.split()) for line in outcome.out.splitlines()}


def test_shard_writes_what_index_and_check_read(command, images, config, tmp_path):
    out = tmp_path / "shards"
    written = command("shard", images, out, "caption_suffix=.txt", "--samples-per-shard", 2)
    assert (written.code, written.err) == (0, "")
    assert written.out == f"5 samples in 3 shards: {out}\n"
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]

    indexed = command("index", f"{out}/{{}}.tar", "shard_width=5")
    assert (indexed.code, indexed.err) == (0, "")
    assert {
        "samples 5 in 3 shards",
        "in a shard 1 to 2",
        "members 5 png, 5 txt, 5 json",
        "left alone none",
        "No problem found.",
    } <= table_of(indexed)

    source = f"data.source={{name: webdataset, webdataset_base_url: '{out}/{{}}.tar', shard_width: 5}}"
    checked = command("check", config, source, "data.resize=cover")
    assert (checked.code, checked.err) == (0, "")
    assert "images 5" in table_of(checked)
    assert command("data", "show", config, source, "data.resize=cover", "--out", tmp_path / "s.png").code == 0

    again = command("shard", f"{out}/{{}}.tar", tmp_path / "again", "shard_width=5")
    assert again.code != 0  # a path is a folder of images; shards are read by a config
    assert again.err.startswith("error: ")


def test_index_as_json_is_json_and_nothing_else(command, images, tmp_path):
    out = tmp_path / "shards"
    command("shard", images, out, "--samples-per-shard", 3)
    found = json.loads(command("index", f"{out}/{{}}.tar", "shard_width=5", "--json").out)
    assert found["num_samples"] == 5
    assert [shard["num_samples"] for shard in found["shards"]] == [3, 2]
    assert [shard["name"] for shard in found["shards"]] == [f"{out}/{number:05d}.tar" for number in range(2)]


def test_index_names_problems_and_ends_with_the_code_of_wrong_data(command, images, tmp_path):
    out = tmp_path / "shards"
    command("shard", images, out, "--samples-per-shard", 2)
    (out / "00001.tar").write_bytes((out / "00001.tar").read_bytes()[:700])
    outcome = command("index", f"{out}/{{}}.tar", "shard_width=5")
    assert outcome.code == 3
    assert outcome.out.count("problem: ") == 1
    assert f"problem: {out}/00001.tar, byte " in " ".join(outcome.out.split())
    assert "samples 3 in 3 shards" in table_of(outcome)
    as_json = command("index", f"{out}/{{}}.tar", "shard_width=5", "--json")
    assert as_json.code == 3
    assert [bool(shard["problem"]) for shard in json.loads(as_json.out)["shards"]] == [False, True, False]


def test_index_tells_what_is_wrong_in_one_line(command, images, tmp_path):
    cases = {
        f"{tmp_path}/none/{{}}.tar": 3,
        str(images): 2,
        "butterflies": 2,
        str(tmp_path / "none.yaml"): 2,
    }
    for given, code in cases.items():
        outcome = command("index", given)
        assert (outcome.code, outcome.out) == (code, ""), given
        (line,) = outcome.err.splitlines()
        assert line.startswith("error: ")
    assert command("index").code == 2


def test_index_runs_commands_with_the_flag_alone(command, images, tmp_path):
    out = tmp_path / "shards"
    command("shard", images, out, "--samples-per-shard", 5)
    touched = tmp_path / "touched"
    url = f"pipe:touch {touched}; cat {out}/{{}}.tar"
    words = ("index", url, "shard_width=5", "end_shard=0")
    refused = command(*words)
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert "--allow-pipe" in line
    assert not touched.exists()
    allowed = command(*words, "--allow-pipe")
    assert (allowed.code, allowed.err) == (0, "")
    assert touched.exists()
    assert "samples 5 in 1 shards" in table_of(allowed)
    assert command(*words).code == 2  # not from then on


def test_shard_takes_a_config_a_folder_or_a_name(command, images, config, tmp_path):
    assert command("shard", config, tmp_path / "a", "data.source.size=3").out.startswith("3 samples in 1 shards")
    assert command("shard", "butterflies", tmp_path / "b", "size=4", "resolution=16").out.startswith("4 samples in 1 ")
    assert command("shard", images, tmp_path / "c").out.startswith("5 samples in 1 ")
    source = "data.source={name: webdataset, webdataset_base_url: '" + f"{tmp_path}/a/{{}}.tar" + "', shard_width: 5}"
    assert command("shard", config, tmp_path / "d", source).out.startswith("3 samples in 1 ")


def test_shard_stops_at_a_bad_sample_or_leaves_it_out_and_says_so(command, images, tmp_path):
    (images / "2.png").write_bytes(b"broken")
    out = tmp_path / "shards"
    stopped = command("shard", images, out)
    assert stopped.code == 3
    (line,) = stopped.err.splitlines()
    assert f"{images}/2.png" in line
    assert not list(out.glob("*.tar"))
    outcome = command("shard", images, tmp_path / "other", "--skip-bad")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[1:] == ["left out: 1 not_an_image"]


def test_shard_puts_embeddings_beside_the_shards(command, images, tmp_path):
    rows = np.arange(1, 11, dtype="f4").reshape(5, 2)
    np.save(tmp_path / "rows.npy", rows)
    out = tmp_path / "shards"
    words = ("--samples-per-shard", 2, "--image-embeddings", tmp_path / "rows.npy")
    assert command("shard", images, out, *words).code == 0
    found = [np.load(path) for path in sorted((out / "img_emb").iterdir())]
    assert np.array_equal(np.concatenate(found), rows)
    np.save(tmp_path / "rows.npy", rows[:4])
    outcome = command("shard", images, tmp_path / "other", *words)
    assert outcome.code == 3
    (line,) = outcome.err.splitlines()
    assert "4 rows" in line
    assert "5 samples" in line


def test_shard_refuses_a_folder_that_holds_something_else_and_goes_on_with_its_own(command, images, tmp_path):
    outcome = command("shard", images, images)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert not list(images.glob("*.tar"))
    out = tmp_path / "shards"
    command("shard", images, out, "--samples-per-shard", 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "00001.tar").unlink()
    assert command("shard", images, out, "--samples-per-shard", 2).code == 0
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert after.keys() == before.keys()
    assert {path.name for path in before if path.is_file() and before[path] != after[path]} <= {
        "00001.tar",
        "shards.json",
    }
    assert command("shard", images, out, "--samples-per-shard", 3).code == 2


def test_shards_that_lost_samples_are_not_copied_in_silence(command, images, config, tmp_path):
    """What the index of a shard shows to be lost is as lost as an image that is broken."""
    out = tmp_path / "shards"
    command("shard", images, out, "--samples-per-shard", 5)
    path = out / "00000.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmember("000000003.json").offset])
    source = "data.source={name: webdataset, webdataset_base_url: '" + f"{out}/{{}}.tar" + "', shard_width: 5}"
    stopped = command("shard", config, tmp_path / "copy", source)
    assert stopped.code == 3
    assert str(path) in stopped.err
    outcome = command("shard", config, tmp_path / "other", source, "--skip-bad")
    assert outcome.code == 0
    assert "damaged_shard" in outcome.out
