"""`check` against what training does."""

import shutil

import pytest
import torch
from diffusers import UNet2DModel

from eclosion import check, train
from eclosion.checkpoint.lock import RunLock
from eclosion.rundir import RunDir


def messages(found):
    return [str(problem) for problem in found.problems]


def test_a_good_config_has_no_problem_and_every_key_has_a_value(make_config, tmp_path):
    found = check(make_config(tmp_path / "run"))
    assert messages(found) == []
    assert {setting.origin for setting in found.settings} == {"config", "default"}
    assert len(found.settings) > 60
    assert not (tmp_path / "run").exists()  # it looks, and touches nothing


def test_parameters_are_those_of_the_network_that_diffusers_builds(make_config, tmp_path):
    (net,) = check(make_config(tmp_path / "run")).networks
    options = make_config(tmp_path)["task"]["model"]["options"]
    theirs = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, **options)
    assert net.parameters == theirs.num_parameters()
    assert sum(net.blocks.values()) == net.parameters
    assert net.blocks["mid_block"] == sum(p.numel() for p in theirs.mid_block.parameters())
    assert net.trained


def test_the_size_of_a_checkpoint_is_the_size_on_disk(make_config, uninterrupted, tmp_path):
    found = check(make_config(tmp_path / "run"))
    folder = RunDir(uninterrupted).checkpoint(12)
    on_disk = sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")
    # Headers with the names of all tensors weigh in with a network as tiny as this one.
    assert found.checkpoint_bytes == pytest.approx(on_disk, rel=0.15)
    assert found.checkpoint_bytes < on_disk


def test_steps_and_epochs_are_those_that_training_makes(make_config, tmp_path):
    config = make_config(tmp_path / "run", train={"duration": "2 epochs"}, sample={"num_images": 0})
    plan = check(config).plan
    assert (plan.num_steps, plan.num_samples, plan.epochs, plan.steps_per_epoch) == (10, 80, 2.0, 5.0)
    assert RunDir(train(config)).checkpoint(plan.num_steps).is_dir()


def test_a_frozen_network_needs_no_moments_in_a_checkpoint(make_config, tmp_path):
    whole = check(make_config(tmp_path / "run"))
    frozen = check(make_config(tmp_path / "run", train={"freeze": ["unet"]}))
    assert messages(frozen) == ["train.freeze names every network (unet), so nothing would be trained."]
    assert not frozen.networks[0].trained
    assert whole.checkpoint_bytes - frozen.checkpoint_bytes == 2 * 4 * whole.networks[0].parameters


def test_problems_of_all_kinds_are_found_at_once(make_config, tmp_path):
    config = make_config(
        tmp_path / "run",
        data={"source": {"name": "folder", "root": str(tmp_path / "none")}},
        train={"micro_batch_size": 3, "freeze": ["unt"], "device": "mps"},
    )
    found = messages(check(config))
    assert [message.partition(":")[0] for message in found] == [
        "data.source.root",
        "train.micro_batch_size",
        "train.freeze",
        "train.device is 'mps', and torch finds no such device here. Use train.device=auto or cpu.",
    ]


def test_the_data_of_a_config_that_is_wrong_elsewhere_is_looked_at_too(make_config, tmp_path):
    config = make_config(tmp_path / "run", train={"batchsize": 3})
    config["data"]["source"] = {"name": "folder", "root": str(tmp_path / "none")}
    found = check(config)
    assert [problem.exit_code for problem in found.problems] == [2, 3]
    assert messages(found)[0].startswith("train.batchsize is not an option. Did you mean 'batch_size'?")
    config["data"]["source"] = "butterflies"
    assert check(config).data.num_samples == 2000


def test_a_batch_that_the_processes_cannot_share_is_found(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert messages(check(make_config(tmp_path / "run"))) == [
        "train.batch_size: 8 images cannot be shared evenly by 3 processes. Use a multiple of 3, such as 6 or 9."
    ]


def test_a_disk_that_is_too_small_is_found(make_config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("eclosion.inspection.checking.shutil.disk_usage", lambda _: usage)
    found = check(make_config(tmp_path / "run"))
    needed = 3 * found.checkpoint_bytes / 1e6
    assert messages(found) == [
        f"{tmp_path / 'run'}: 3 checkpoints need {needed:.1f} MB, and 0.0 MB are free. "
        "Make room, or choose another output folder."
    ]
    assert found.problems[0].exit_code == 4


def test_it_says_what_train_would_do_with_what_is_in_the_folder(make_config, uninterrupted):
    config = make_config(uninterrupted)
    assert check(config).standing == "the run there is finished, at step 12"
    assert check({**config, "overwrite": True}).standing.startswith("the finished run there is replaced")
    longer, last = check(config, ["train.duration=20 steps"]), RunDir(uninterrupted).checkpoint(12)
    assert messages(longer)[0].splitlines() == [
        f"train.duration: '12 steps' -> '20 steps' changes how the run in {last} goes on.",
        "Put the values back, or pass --accept-changes.",
    ]
    with RunLock(RunDir(uninterrupted)):
        assert "is in use by process" in messages(check(config))[0]


def test_class_names_reach_the_network(make_config, tmp_path):
    plain = check(make_config(tmp_path / "run"))
    told = check(make_config(tmp_path / "run"), ["task.class_conditional=true"])
    assert len(told.data.class_names) == 8
    width = torch.nn.Embedding(9, 64).weight.numel()  # eight classes and the hidden one
    assert told.networks[0].parameters - plain.networks[0].parameters == width


def test_validation_is_counted_and_what_is_not_used_of_it_is_told(make_config, tmp_path):
    source = {"name": "butterflies", "size": 30, "resolution": 20, "seed": 5}
    config = make_config(tmp_path / "run") | {"validate": {"every": 5, "source": source, "num_samples": 12}}
    assert check(config).validation.num_samples == 12
    more = check(config, ["validate.num_samples=40"])
    assert more.validation.num_samples == 30
    assert "validate.num_samples is 40, and there are 30; all are used." in more.notes
    off = check(config, ["validate.every=null"])
    assert off.validation is None
    assert "there is validation data, and it is not used: validate.every is none." in off.notes
    assert not (tmp_path / "run").exists()


def test_what_an_evaluation_compares_is_counted_and_what_keeps_it_from_working_is_found(make_config, tmp_path):
    others = {"name": "butterflies", "size": 30, "resolution": 20}
    evaluate = {"every": "2 steps", "num_samples": 500, "final_split": "train"}
    config = make_config(tmp_path / "run") | {"validate": {"source": others}, "evaluate": evaluate}
    found = check(config)
    assert found.problems == []
    assert found.evaluation == [
        "500 images against the 30 of val",
        "500 images against the 40 of train, after the last step",
    ]
    assert any(note.startswith("kid: 30 images tell only large differences apart") for note in found.notes)
    assert not any("is not used" in note for note in found.notes)
    without = check(config, ["evaluate.every=null"])
    assert without.evaluation == []
    (tmp_path / "other.pth").write_bytes(b"something else")
    path = f"evaluate.extractor={{name: inception, weights: {tmp_path / 'other.pth'}}}"
    wrong = check(config, [path, "checkpoint.best=fid", "validate.source=null"])
    assert [message.partition(",")[0] for message in messages(wrong)] == ["checkpoint.best is 'fid'"]
    unreadable = check(config, [path])
    assert any("other.pth" in message for message in messages(unreadable))


def test_problems_of_validation_of_single_networks_and_of_guidance_are_found_at_once(make_config, tmp_path):
    config = make_config(tmp_path / "run", optimizer={"networks": {"unit": {"learning_rate": 1}}})
    config["validate"] = {"every": 5}
    config["sample"]["guidance_scale"] = [1, 2]
    assert [message[:60] for message in messages(check(config))] == [
        "optimizer.networks: 'unit' is no network of this task. Did y",
        "validate.every is set, and there is nothing to validate with",
    ]
    assert (
        "sample: guidance_scale has 2 numbers (1, 2), and the networks of this task are unet."
        in messages(check(config))[0]
    )


def test_networks_have_the_learning_rates_that_they_train_with(make_config, tmp_path):
    config = make_config(tmp_path / "run", optimizer={"networks": {"unet": {"learning_rate": 0.5}}})
    assert check(config).networks[0].learning_rate == 0.5
    assert check(make_config(tmp_path / "run")).networks[0].learning_rate == 1e-3


def test_data_that_cannot_be_opened_is_not_also_told_to_lack_embeddings(make_config, tmp_path):
    config = make_config(tmp_path / "run")
    config["data"]["source"] = {"name": "webdataset", "webdataset_base_url": str(tmp_path / "none" / "{}.tar")}
    config["task"] = {"name": "unclip_decoder", "unets": [{"model": {"name": "unclip_unet"}}]}
    assert [problem.exit_code for problem in check(config).problems] == [3]
