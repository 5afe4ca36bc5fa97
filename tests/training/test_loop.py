"""The loop as a whole: what it writes, when it stops, what it obeys."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eclosion import ConfigError, UserError, train
from eclosion.errors import CheckpointError, DataError, EnvironmentProblem, LockedError, OutOfMemory, TrainingDiverged


def events(run):
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


def numbers(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_all_that_the_run_was(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        *("checkpoints", "config.json", "events.jsonl", "ledger.jsonl", "lock"),
        *("metrics.jsonl", "report.html", "samples"),
    }
    assert sorted(p.name for p in (uninterrupted / "samples").iterdir()) == [
        "step-00000000.png",
        "step-00000006.png",
        "step-00000012.png",
    ]
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    wanted = {"step", "samples_seen", "train/loss", "train/lr", "train/grad_norm"}
    wanted |= {"perf/images_per_second", "perf/data_wait", "sys/memory_gb"}
    assert all(set(line) == wanted for line in numbers(uninterrupted))
    assert [line["step"] for line in numbers(uninterrupted)] == [2, 4, 6, 8, 10, 12]


def test_the_loss_falls(make_config, tmp_path):
    run = train(make_config(tmp_path / "run", train={"duration": "60 steps"}, sample={"num_images": 0}))
    losses = [line["train/loss"] for line in numbers(run)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_a_replay(make_config, tmp_path):
    config = make_config(
        tmp_path / "run",
        optimizer={"learning_rate": 1e30, "lr_warmup_steps": 0},
        checkpoint={"every": "1 steps"},
    )
    with pytest.raises(TrainingDiverged) as error:
        train(config)
    run = tmp_path / "run"
    bundle = next((run / "replay").glob("step-*/rank-0"))
    failed = int(bundle.parent.name.removeprefix("step-"))
    assert str(error.value).startswith(f"step {failed}: the loss of unet is not finite, with butterfly-")
    assert "The weights are as before this step" in str(error.value)
    # What was saved last is what the failed step began with.
    saved = load_file(run / "checkpoints" / f"step-{failed:08d}" / "unet.safetensors")
    kept = load_file(bundle / "unet.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    info = json.loads((bundle / "info.json").read_text())
    assert info["positions"] == list(range(failed * 8, failed * 8 + 8))
    assert load_file(bundle / "batch.safetensors")["image"].shape == (8, 3, 16, 16)
    assert set(load_file(bundle / "drawn.safetensors")) == {"t", "noise"}
    assert "Traceback" in (run / "error.log").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_nearly_the_same_and_resumes_exactly(precision, make_config, results, tmp_path):
    sections = {"train": {"mixed_precision": precision}}
    whole = train(make_config(tmp_path / "whole", **sections))
    exact = train(make_config(tmp_path / "exact"))
    for ours, full in zip(numbers(whole), numbers(exact), strict=True):
        assert ours["train/loss"] == pytest.approx(full["train/loss"], rel=0.02)
        assert ours["train/loss"] != full["train/loss"]  # the option is obeyed
    slots = load_file(whole / "checkpoints" / "step-00000012" / "unet.optimizer.safetensors")
    assert ("loss_scale" in slots) == (precision == "fp16")
    start = whole / "checkpoints" / "step-00000009"
    branch = train(make_config(tmp_path / "branch", **sections), resume=str(start))
    assert results(branch)["hashes"] == results(whole)["hashes"]


@pytest.mark.parametrize(
    "option", [{"gradient_checkpointing": True}, {"channels_last": True}, {"micro_batch_size": 2}], ids=str
)
def test_options_that_save_time_or_memory_keep_the_numbers(option, make_config, tmp_path):
    runs = []
    for name, train_options in {"plain": {}, "with": option}.items():
        config = make_config(tmp_path / name, train=train_options, sample={"num_images": 0})
        config["task"]["model"]["options"]["dropout"] = 0.0  # its mask follows the memory layout
        runs.append(train(config))
    for ours, plain in zip(*map(numbers, runs), strict=True):
        assert ours["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-4)


def test_no_average_is_kept_when_none_is_asked_for(make_config, tmp_path):
    run = train(make_config(tmp_path / "run", ema={"decays": []}))
    last = run / "checkpoints" / "step-00000012"
    assert {p.name for p in last.glob("*.safetensors")} == {"unet.safetensors", "unet.optimizer.safetensors"}
    assert (run / "samples" / "step-00000012.png").exists()


def test_a_preview_does_not_change_the_run(make_config, results, uninterrupted, tmp_path):
    quiet = train(make_config(tmp_path / "run", sample={"num_images": 0}, ema={"decays": [0.5, 0.3]}))
    assert results(quiet)["hashes"] == results(uninterrupted)["hashes"]


def test_durations_may_be_told_in_samples_and_epochs(make_config, tmp_path):
    by_epochs = train(make_config(tmp_path / "e", train={"duration": "2 epochs"}, sample={"num_images": 0}))
    by_samples = train(make_config(tmp_path / "s", train={"duration": "77 samples"}, sample={"num_images": 0}))
    assert numbers(by_epochs)[-1]["samples_seen"] == 80
    assert numbers(by_samples)[-1]["samples_seen"] == 80  # up to a whole batch
    ledger = [json.loads(line) for line in (by_epochs / "ledger.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["delivered"], line["skipped"]) for line in ledger] == [(0, 40, {}), (1, 40, {})]


def test_freezing_every_network_is_refused(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"train.freeze names every network \(unet\)"):
        train(make_config(tmp_path / "run", train={"freeze": ["unet"]}))


def test_freezing_an_unknown_network_is_refused_with_a_hint(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"'une' is no network of this task. Did you mean 'unet'\?"):
        train(make_config(tmp_path / "run", train={"freeze": ["une"]}))


def test_a_second_process_on_the_folder_is_refused(make_config, tmp_path):
    from eclosion.checkpoint.lock import RunLock
    from eclosion.rundir import RunDir

    with RunLock(RunDir(tmp_path / "run")), pytest.raises(LockedError):
        train(make_config(tmp_path / "run"))


def test_a_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint(make_config, tmp_path, monkeypatch):
    run = train(make_config(tmp_path / "run", train={"duration": "3 steps"}))
    from eclosion.checkpoint import disk

    monkeypatch.setattr(disk, "_free", lambda folder: 10_000.0)
    with pytest.raises(CheckpointError) as error:
        train(make_config(run, train={"duration": "9 steps"}), accept_changes=True)
    assert "free" in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]


def test_running_out_of_memory_says_which_knobs_to_turn(make_config, tmp_path, monkeypatch):
    from eclosion.tasks.unconditional import UnconditionalTask

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UnconditionalTask, "loss", fail)
    with pytest.raises(OutOfMemory, match=r"Set train.micro_batch_size lower") as error:
        train(make_config(tmp_path / "run"))
    assert error.value.exit_code == 5


def test_an_unwritable_folder_is_told_in_one_line(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem) as error:
        train(make_config(tmp_path / "file" / "run"))
    assert "\n" not in str(error.value)


def write_images(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 20), (i * 9 % 256, 80, 40)).save(folder / f"{i:03d}.png")


def test_a_broken_image_stops_the_run_and_is_named(make_config, tmp_path):
    write_images(tmp_path / "images", 16)
    (tmp_path / "images" / "005.png").write_bytes((tmp_path / "images" / "004.png").read_bytes()[:60])
    config = make_config(tmp_path / "run", data={"source": {"name": "folder", "root": str(tmp_path / "images")}})
    with pytest.raises(DataError, match=r"005.png"):
        train(config)


def test_a_broken_image_within_the_budget_is_skipped_and_accounted_for(make_config, tmp_path):
    write_images(tmp_path / "images", 16)
    (tmp_path / "images" / "005.png").write_bytes((tmp_path / "images" / "004.png").read_bytes()[:60])
    source = {"name": "folder", "root": str(tmp_path / "images")}
    run = train(make_config(tmp_path / "run", data={"source": source, "max_bad_fraction": 0.1}))
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 6
    for line in ledger:
        assert line["delivered"] == 15
        assert sum(line["skipped"].values()) == 1
        assert line["samples"][0]["name"].endswith("005.png")
    assert any("005.png" in event for event in events(run))


def test_a_torch_dataset_of_ones_own_is_trained_on(make_config, tmp_path):
    class Mine(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return {"image": Image.new("RGB", (20, 20), (i * 10, 0, 0))}

    run = train(make_config(tmp_path / "run"), dataset=Mine())
    assert numbers(run)[-1]["step"] == 12
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [line["index_count"] for line in ledger] == [20] * 4


def test_classes_are_learned_and_asked_for(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    config["task"] |= {"class_conditional": True, "class_dropout": 0.5}
    config["sample"] |= {"guidance_scale": 2.0}
    run = train(config)
    assert "class_embedding.weight" in load_file(run / "checkpoints" / "step-00000012" / "unet.safetensors")


def test_guidance_without_classes_is_refused(make_config, tmp_path):
    with pytest.raises(ConfigError, match="this network has no condition to follow"):
        train(make_config(tmp_path / "run", sample={"guidance_scale": 2.0}))


def test_rectified_flow_trains_and_samples(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    config["task"] |= {"noise_schedule": "rectified_flow", "prediction_type": "flow"}
    config["sample"]["sampler"] = {"name": "euler", "num_inference_steps": 3}
    run = train(config)
    assert (run / "samples" / "step-00000012.png").exists()


def test_flow_and_its_noise_go_together(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    config["task"]["prediction_type"] = "flow"
    with pytest.raises(ConfigError, match="'flow' needs rectified_flow"):
        train(config)


def test_guidance_without_a_hidden_class_is_refused_before_training(make_config, tmp_path):
    config = make_config(tmp_path / "run", sample={"guidance_scale": 2.0})
    config["task"] |= {"class_conditional": True, "class_dropout": 0.0}
    with pytest.raises(ConfigError, match="the network never learns to do without its class"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_more_sampler_steps_than_noise_levels_are_refused_before_training(make_config, tmp_path):
    config = make_config(tmp_path / "run", sample={"sampler": {"name": "ddim", "num_inference_steps": 2000}})
    with pytest.raises(ConfigError, match="only 1000 levels"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_export_that_cannot_be_is_refused_before_training(make_config, tmp_path):
    config = {**make_config(tmp_path / "run"), "export": "ddpm"}
    config["task"] |= {"class_conditional": True}
    with pytest.raises(UserError, match="no pipeline for a class-conditional network"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_log_without_a_delivered_image_has_no_loss_and_the_run_goes_on(make_config, tmp_path):
    write_images(tmp_path / "images", 4)
    (tmp_path / "images" / "002.png").write_bytes(b"")
    config = make_config(
        tmp_path / "run",
        data={"source": {"name": "folder", "root": str(tmp_path / "images")}, "max_bad_fraction": 0.25},
        train={"duration": "2 epochs", "batch_size": 1, "micro_batch_size": 1},
        track={"every": "1 steps"},
        checkpoint={"every": "1 steps"},
    )
    lines = numbers(train(config))
    assert sum("train/loss" not in line for line in lines) == 2
    assert len(lines) == 8


def test_a_parameter_without_a_gradient_does_not_spoil_the_resume(make_config, results, tmp_path, monkeypatch):
    from eclosion.models.diffusers import DiffusersModel

    real = DiffusersModel.build

    def with_a_spare(self, **kwargs):
        net = real(self, **kwargs)
        net.spare = torch.nn.Parameter(torch.ones(3))
        return net

    monkeypatch.setattr(DiffusersModel, "build", with_a_spare)
    run = train(make_config(tmp_path / "run", train={"duration": "3 steps"}))
    train(make_config(run, train={"duration": "6 steps"}), accept_changes=True)
    assert results(run)["checkpoint"] == "step-00000006"


def test_how_a_run_failed_stands_in_its_events(make_config, tmp_path):
    with pytest.raises(TrainingDiverged):
        train(make_config(tmp_path / "run", optimizer={"learning_rate": 1e30, "lr_warmup_steps": 0}))
    assert any("the loss of unet is not finite" in event for event in events(tmp_path / "run"))
