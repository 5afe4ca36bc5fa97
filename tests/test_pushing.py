"""Trained runs on the Hugging Face hub: what is there afterwards is what was trained, and nothing else."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from huggingface_hub import snapshot_download

import eclosion
from eclosion import ConfigError, UnclipDecoderPipeline, UserError, train
from eclosion.errors import EnvironmentProblem
from eclosion.registry import build
from eclosion.sampling import load_trained
from eclosion.tasks.task import DataFacts
from eclosion.tracking import hub as hub_module
from eclosion.tracking.hub import Patience

PIPELINE = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
PIPELINE |= {"unet/diffusion_pytorch_model.safetensors"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(hub_module, "DEFAULT", Patience(tries=2, wait_seconds=0.01, answer_seconds=60))


@pytest.fixture
def short(make_config, tmp_path):
    """A config of two steps, for tests of what follows them."""

    def made(**changes):
        sections = {"train": {"duration": "2 steps"}, "sample": {"num_images": 0}, "ema": {"decays": [0.5]}}
        return {**make_config(tmp_path / "run", **sections), **changes}

    return made


def files_of(hub, name="ada/model"):
    return {path: digest(path, file.data) for path, file in hub.repos[name].files.items() if path != ".gitattributes"}


def digest(name, data):
    """Weights by their hash, as a failing comparison of megabytes takes minutes to show."""
    return hashlib.sha256(data).hexdigest() if str(name).endswith(".safetensors") else data


def test_diffusers_loads_a_pushed_pipeline_by_name_with_the_weights_of_the_run(uninterrupted, hub):
    pushed = eclosion.push(uninterrupted, "ada/model")
    assert set(files_of(hub)) == PIPELINE
    assert hub.repos["ada/model"].private
    assert hub.repos["ada/model"].messages == ["step 12 of whole"]
    assert pushed.commit == hub.repos["ada/model"].head
    found = DDPMPipeline.from_pretrained("ada/model", token=os.environ["HF_TOKEN"])
    ours = load_trained(uninterrupted, device="cpu").task.nets["unet"].state_dict()
    theirs = found.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_page_says_how_it_is_loaded_and_what_it_was_made_from(uninterrupted, hub):
    eclosion.push(uninterrupted, "model")
    page = files_of(hub)["README.md"].decode()
    assert page.startswith("---\nlibrary_name: diffusers\n")
    assert 'DDPMPipeline.from_pretrained("ada/model")' in page
    assert "| optimizer steps | 12 |" in page
    assert "path/to/this" not in page
    assert page.count("Written by eclosion") == 1


def test_the_folder_of_a_pipeline_is_pushed_without_what_else_stands_in_it(uninterrupted, hub, tmp_path):
    folder = eclosion.export(uninterrupted, tmp_path / "pipe", pipeline="ddim")
    (folder / "notes.txt").write_text("mine")
    (folder / ".env").write_text("HF_TOKEN=x")
    (folder / "unet" / "run_me.py").write_text("import os")
    (folder / "unet" / "pytorch_model.bin").write_text("pickle")
    (folder / "secrets").mkdir()
    (folder / "secrets" / "config.json").write_text("{}")
    (folder / "unet" / "linked.safetensors").symlink_to(folder / "notes.txt")
    eclosion.push(folder, "ada/model")
    assert set(files_of(hub)) == PIPELINE
    DDIMPipeline.from_pretrained("ada/model", token=os.environ["HF_TOKEN"])


def test_a_pushed_checkpoint_is_a_checkpoint_again(uninterrupted, hub, tmp_path):
    eclosion.push(uninterrupted, "ada/model", kind="checkpoint")
    newest = max((uninterrupted / "checkpoints").glob("step-*"))
    ours = {path.name: digest(path, path.read_bytes()) for path in newest.iterdir()}
    assert {path: data for path, data in files_of(hub).items() if path != "README.md"} == ours
    back = snapshot_download("ada/model", local_dir=tmp_path / "back", token=os.environ["HF_TOKEN"])
    assert load_trained(back).step == 12
    assert "start: {name: huggingface, repo: ada/model}" in files_of(hub)["README.md"].decode()


def test_a_pushed_model_is_the_averages_alone_and_samples_the_same(uninterrupted, hub, tmp_path):
    eclosion.push(uninterrupted, "ada/model", kind="model")
    assert set(files_of(hub)) == {"README.md", "manifest.json", "state.json", "unet.safetensors"}
    back = snapshot_download("ada/model", local_dir=tmp_path / "back", token=os.environ["HF_TOKEN"])
    ours, theirs = load_trained(uninterrupted, device="cpu"), load_trained(back, device="cpu")
    for name, weight in ours.task.nets["unet"].state_dict().items():
        assert torch.equal(weight, theirs.task.nets["unet"].state_dict()[name])


def test_a_cascade_is_loaded_by_name_as_well(hub, tmp_path):
    net = {"name": "unclip_unet", "base_channels": 8, "channel_mults": [1, 2], "norm_num_groups": 4}
    net |= {"layers_per_block": 1, "num_attention_heads": 2, "attention_head_dim": 4}
    task = build("tasks", {"name": "unclip_decoder", "unets": [{"model": net, "image_size": 8}, {"model": net}]})
    made = task.build(DataFacts(size=(16, 16), class_names=(), arrays={"image_embed": (6,)}, has_captions=False))
    made.pipeline().save_pretrained(tmp_path / "pipe")
    eclosion.push(tmp_path / "pipe", "ada/model")
    weights = [f"unet_{i}/diffusion_pytorch_model.safetensors" for i in (0, 1)]
    assert set(files_of(hub)) == {"model_index.json", "unet_0/config.json", "unet_1/config.json", *weights}
    token = os.environ["HF_TOKEN"]
    found = UnclipDecoderPipeline.from_pretrained("ada/model", token=token, low_cpu_mem_usage=False)
    for name, network in made.nets.items():
        theirs = found.components[name].state_dict()
        assert all(torch.equal(weight, theirs[key]) for key, weight in network.state_dict().items())


def test_a_run_that_is_none_and_a_name_that_is_none_are_told_before_the_hub_is_asked(uninterrupted, hub, tmp_path):
    with pytest.raises(eclosion.UserError, match="holds no checkpoint"):
        eclosion.push(tmp_path, "ada/model")
    with pytest.raises(ConfigError, match="not the name of a repository"):
        eclosion.push(uninterrupted, "a/b/c")
    assert hub.requests == []


def test_a_run_may_end_with_its_pipeline_on_the_hub(short, hub):
    run = train(short(hub={"repo": "ada/model"}))
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "finished"  # what follows the run knows by it that there is no more
    assert set(files_of(hub)) == PIPELINE
    assert not (run / "model_index.json").exists()
    said = (run / "events.jsonl").read_text()
    assert f"pipeline pushed to {hub.url}/ada/model" in said
    assert json.loads((run / "config.json").read_text())["hub"] == {
        "repo": "ada/model",
        "private": True,
        "token_path": None,
    }


def test_the_tutorials_object_ends_in_a_private_repository_of_that_name(short, hub, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    tutorial = {"image_size": 16, "train_batch_size": 2, "eval_batch_size": 1, "num_epochs": 1, "push_to_hub": True}
    tutorial |= {"hub_model_id": "ada/model", "hub_private_repo": None, "dataset_name": str(tmp_path / "images")}
    network = {"block_out_channels": [16, 16], "down_block_types": ["DownBlock2D", "DownBlock2D"], "norm_num_groups": 4}
    network |= {"up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1}
    small = ["task.model.preset=null", f"task.model.options={json.dumps(network)}", "sample.num_images=0"]
    run = train({**tutorial, "output_dir": str(tmp_path / "tutorial")}, small)
    assert set(files_of(hub)) == PIPELINE
    assert hub.repos["ada/model"].private
    for path in PIPELINE - {"README.md"}:
        assert files_of(hub)[path] == digest(path, (run / path).read_bytes())


def test_a_hub_that_refuses_is_told_of_before_the_first_step(short, hub, tmp_path):
    hub.add("ada/model", private=False)
    with pytest.raises(ConfigError, match="is public, and a private one is wanted"):
        train(short(hub={"repo": "ada/model"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_task_without_a_pipeline_is_told_of_before_the_first_step(short, hub, tmp_path):
    config = short(hub={"repo": "ada/model"})
    config["task"]["class_conditional"] = True
    with pytest.raises(UserError, match="no pipeline for a class-conditional network"):
        train(config)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_run_without_a_token_is_told_of_before_the_first_step(short, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no token"):
        train(short(hub={"repo": "ada/model"}))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_hub_that_is_away_stops_no_training_and_the_end_says_that_nothing_was_pushed(short, hub, tmp_path):
    hub.fail("GET /api/models", None, times=99)
    with pytest.raises(EnvironmentProblem, match="cannot be reached") as error:
        train(short(hub={"repo": "ada/model"}, export="ddpm"))
    assert error.value.exit_code == 4
    run = tmp_path / "run"
    assert load_trained(run).step == 2  # the local copies are whole
    assert DDPMPipeline.from_pretrained(run)
    assert "asked again when training is done" in (run / "events.jsonl").read_text()
    hub.faults.clear()
    train(short(hub={"repo": "ada/model"}, export="ddpm"))  # started again, it goes on with what is missing
    assert set(files_of(hub)) == PIPELINE
    before = hub.repos["ada/model"].messages
    train(short(hub={"repo": "ada/model"}, export="ddpm"))
    assert hub.repos["ada/model"].messages == before


@pytest.mark.slow
def test_the_command_pushes_in_a_process_of_its_own_and_shows_no_token(uninterrupted, hub, tmp_path):
    """With HF_ENDPOINT as the only word about where the hub is."""
    run = shutil.copytree(uninterrupted, tmp_path / "copy")
    arguments = [sys.executable, "-m", "eclosion", "push", str(run), "model"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HOME": "none"})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"Private: {hub.url}/ada/model, commit [0-9a-f]{{40}}\n", done.stdout)
    assert set(files_of(hub)) == PIPELINE
    assert "canary" not in done.stdout + done.stderr
    assert not any(b"canary" in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_the_command_line_tells_of_a_refusal_in_one_line(command, uninterrupted, hub):
    hub.makes_public = True
    outcome = command("push", uninterrupted, "ada/model")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "is public, and a private one is wanted. Nothing was sent." in outcome.err


@pytest.mark.parametrize(("first", "second"), [("pipeline", "checkpoint"), ("model", "pipeline")])
def test_a_repository_does_not_get_a_pipeline_and_a_checkpoint(first, second, uninterrupted, hub):
    eclosion.push(uninterrupted, "ada/model", kind=first)
    there = files_of(hub)
    with pytest.raises(eclosion.ConfigError, match="a pipeline and a checkpoint would be mixed"):
        eclosion.push(uninterrupted, "ada/model", kind=second)
    assert files_of(hub) == there
