"""Two real processes on one run."""

import json
import os
import shutil
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
    # More pictures than checkpoints: an average that was sampled must go on following.
    sections = {"sample": {"every": "2 steps"}, "checkpoint": {"every": "12 steps"}}
    one = train(without_dropout(make_config(tmp_path / "one", **sections)))
    config = without_dropout(make_config(tmp_path / "two", train={"parallel": parallel}, **sections))
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


SLOW_SAVE = """
import json, sys, time
from pathlib import Path
from eclosion.checkpoint import storage
real = storage.write
def slow(*args, **kwargs):
    time.sleep(3)
    return real(*args, **kwargs)
storage.write = slow
from eclosion import train
from eclosion.errors import UserError
try:
    train(json.loads(Path(sys.argv[1]).read_text()))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def ranks_of(config_path):
    """Process ids of the training processes."""
    found = subprocess.run(["pgrep", "-f", f"slow.py {config_path}"], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("first", ["leader", "other", "everyone"])
def test_signals_that_come_apart_or_twice_still_leave_a_checkpoint(first, make_config, tmp_path):
    """A launcher passes on a signal that its children got already; nodes get theirs at different times."""
    config = without_dropout(make_config(tmp_path / "run", train={"duration": "4000 steps"}))
    config["checkpoint"]["every"] = "4000 steps"
    path, script = tmp_path / "run.json", tmp_path / "slow.py"
    path.write_text(json.dumps(config))
    script.write_text(SLOW_SAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, str(script), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    ranks = [pid for pid in ranks_of(path) if pid != process.pid]
    leads = {pid: "RANK=0" in Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in ranks}
    order = sorted(ranks, key=lambda pid: leads[pid], reverse=first == "leader")
    if first == "everyone":
        for pid in [*ranks, process.pid]:
            os.kill(pid, signal.SIGTERM)
    else:
        os.kill(order[0], signal.SIGTERM)
        time.sleep(0.5)
        os.kill(order[-1], signal.SIGTERM)
    _, output = finish(process)
    assert "which is saved" in output, output
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_four_processes_go_on_with_the_same_bits(make_config, results, tmp_path):
    """With three or more, the order in which gradients are added shows in the bits."""
    sections = {"train": {"duration": "8 steps", "micro_batch_size": 2}, "checkpoint": {"every": "4 steps"}}
    code, output = finish(start(make_config(tmp_path / "whole", **sections), tmp_path, processes=4))
    assert code == 0, output
    code, output = finish(start(make_config(tmp_path / "part", **sections), tmp_path, processes=4))
    assert code == 0, output
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-00000008")
    code, output = finish(start(make_config(tmp_path / "part", **sections), tmp_path, processes=4))
    assert code == 0, output
    assert "resuming at step 4" in output
    assert results(tmp_path / "part") == results(tmp_path / "whole")


def test_a_refusal_of_the_leader_is_told_by_all(make_config, tmp_path):
    run = train(without_dropout(make_config(tmp_path / "run", train={"duration": "1 steps"})))
    config = without_dropout(make_config(run, train={"duration": "1 steps"}, data={"horizontal_flip": False}))
    code, output = finish(start(config, tmp_path))
    assert code != 0
    assert "would make it another run" in output
    assert "process 1 stops with process 0" in output
    assert "Connection closed" not in output
