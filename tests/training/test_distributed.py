"""Two real processes on one run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eclosion import train

SCRIPT = Path(__file__).with_name("train_config.py")


def start(config, folder, *, processes=2):
    path = folder / f"{Path(config['output']).name}.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, str(SCRIPT), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def without_dropout(config):
    config["task"]["model"]["options"]["dropout"] = 0.0  # dropout is keyed by process
    return config


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_run_of_one(parallel, make_config, results, tmp_path):
    one = train(without_dropout(make_config(tmp_path / "one")))
    config = without_dropout(make_config(tmp_path / "two", train={"parallel": parallel}))
    code, output = finish(start(config, tmp_path))
    assert code == 0, output
    ours, theirs = results(one), results(tmp_path / "two")
    assert ours["ledger"] == theirs["ledger"]
    assert [n["step"] for n in ours["numbers"]] == [n["step"] for n in theirs["numbers"]]
    for a, b in zip(ours["numbers"], theirs["numbers"], strict=True):
        # gradients are added in another order
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    last = [
        load_file(run / "checkpoints" / "step-00000012" / "unet.ema.safetensors") for run in (one, tmp_path / "two")
    ]
    assert last[0].keys() == last[1].keys()
    for name in last[0]:
        torch.testing.assert_close(last[0][name], last[1][name], rtol=1e-2, atol=1e-4)


def test_two_processes_killed_and_started_again_end_with_the_same_bits(make_config, results, tmp_path):
    sections = {"train": {"duration": "30 steps"}, "checkpoint": {"every": "2 steps"}}
    code, output = finish(start(make_config(tmp_path / "whole", **sections), tmp_path))
    assert code == 0, output
    config = make_config(tmp_path / "killed", **sections)
    process = start(config, tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*4")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "killed.json")], check=True)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000030").exists()
    code, output = finish(start(config, tmp_path))
    assert code == 0, output
    assert "resuming at step" in output
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_signal_to_all_processes_saves_once_and_the_run_goes_on_at_another_world_size(make_config, results, tmp_path):
    config = without_dropout(make_config(tmp_path / "run", train={"duration": "40 steps"}))
    process = start(config, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step-00000003").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0
    assert "which is saved" in output
    train(config)
    numbers = results(tmp_path / "run")["numbers"]
    assert [n["step"] for n in numbers] == list(range(2, 41, 2))
    whole = train(without_dropout(make_config(tmp_path / "whole", train={"duration": "40 steps"})))
    for a, b in zip(numbers, results(whole)["numbers"], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)


def test_a_batch_that_cannot_be_divided_is_refused(make_config, tmp_path):
    config = make_config(tmp_path / "run", train={"batch_size": 9, "micro_batch_size": None})
    code, output = finish(start(config, tmp_path))
    assert code != 0
    assert "train.batch_size" in output
    assert "9" in output
