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
from eclosion.errors import ConfigError
from eclosion.training.distributed import world
from eclosion.training.state import Stage

SCRIPT = Path(__file__).with_name("train_config.py")


def start(config, folder, *, processes=2, script=SCRIPT):
    path = folder / f"{Path(config['output']).name}.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, str(script), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
import time
from eclosion.checkpoint import storage
real = storage.write
def slow(*args, **kwargs):
    time.sleep(3)
    return real(*args, **kwargs)
storage.write = slow
"""

# The end of a run, such as an upload, takes longer than a process that does not come is waited for.
SLOW_END = """
import time
from datetime import timedelta
from eclosion.training import distributed
from eclosion.training.context import Context
distributed.TIMEOUT, conclude = timedelta(seconds=8), Context._conclude
def slow(context):
    time.sleep(12)
    conclude(context)
Context._conclude = slow
"""

# Writes down the loss of each image, and how often gradients were exchanged.
WATCHED = """
import json, os, sys, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from eclosion.training import distributed
from eclosion.training.state import Stage
exchanges, losses = 0, []
def hook(group, bucket):
    global exchanges
    exchanges += bucket.is_last()
    return allreduce_hook(group, bucket)
prepare, accumulate = distributed.World.prepare, Stage.accumulate
def watched_prepare(self, net, how):
    net = prepare(self, net, how)
    net.register_comm_hook(None, hook)
    return net
def watched_accumulate(self, each, weight):
    losses.append(each.tolist())
    return accumulate(self, each, weight)
distributed.World.prepare, Stage.accumulate = watched_prepare, watched_accumulate
import atexit
name = f"{sys.argv[1]}.{os.environ['RANK']}"
atexit.register(lambda: open(name, "w").write(json.dumps({"exchanges": exchanges, "losses": losses})))
"""

# A signal comes to the second process while the picture of step 2 is drawn.
SIGNAL_IN_A_PICTURE = """
import os, signal
from eclosion.training import loop
make_images, calls = loop.make_images, 0
def interrupted(*args, on_step, **kwargs):
    global calls
    calls += 1
    drawn = 0
    def told(*step):
        nonlocal drawn
        drawn += 1
        if calls == 2 and drawn == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        on_step(*step)
    return make_images(*args, on_step=told, **kwargs)
loop.make_images = interrupted
"""


def script_of(folder, patches):
    """A script that trains with something of eclosion replaced."""
    path = folder / "patched.py"
    path.write_text(patches + SCRIPT.read_text())
    return path


def ranks_of(config_path):
    """Process ids of the training processes."""
    found = subprocess.run(["pgrep", "-f", f"patched.py {config_path}"], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize(
    "first",
    [pytest.param("leader", marks=pytest.mark.slow), pytest.param("other", marks=pytest.mark.slow), "everyone"],
)
def test_signals_that_come_apart_or_twice_still_leave_a_checkpoint(first, make_config, tmp_path):
    """A launcher passes on a signal that its children got already; nodes get theirs at different times."""
    config = without_dropout(make_config(tmp_path / "run", train={"duration": "4000 steps"}))
    config["checkpoint"]["every"] = "4000 steps"
    path = tmp_path / "run.json"
    process = start(config, tmp_path, script=script_of(tmp_path, SLOW_SAVE))
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


@pytest.mark.parametrize("micro_batch_size", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_images_have_the_same_losses_in_two_processes_and_gradients_travel_once_a_step(
    micro_batch_size, make_config, tmp_path
):
    """Loss of each image against one process alone, while the weights have moved only a little apart."""
    sections = {"train": {"duration": "3 steps", "micro_batch_size": micro_batch_size}, "sample": {"num_images": 0}}
    config = without_dropout(make_config(tmp_path / "two", **sections))
    code, output = finish(start(config, tmp_path, script=script_of(tmp_path, WATCHED)))
    assert code == 0, output
    ranks = [json.loads((tmp_path / f"two.json.{rank}").read_text()) for rank in range(2)]
    assert [rank["exchanges"] for rank in ranks] == [4, 4]  # a pass to warm up, and one for each step
    two, per_step = [], 4 // micro_batch_size
    for step in range(3):
        cut = slice(1 + step * per_step, 1 + (step + 1) * per_step)
        two += [loss for rank in ranks for micro in rank["losses"][cut] for loss in micro]

    one = []
    accumulate = Stage.accumulate

    def watched(self, losses, weight):
        one.extend(losses.tolist())
        return accumulate(self, losses, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "accumulate", watched)
        train(without_dropout(make_config(tmp_path / "one", **sections)))
    assert len(one) == len(two) == 24
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_signal_inside_a_picture_leaves_a_checkpoint_to_go_on_from(parallel, make_config, results, tmp_path):
    """With split weights every call of a network is a meeting: all processes must leave at the same one."""
    sections = {
        "train": {"duration": "6 steps", "parallel": parallel},
        "sample": {"every": "2 steps", "num_images": 2, "sampler": {"name": "ddim", "num_inference_steps": 8}},
        "checkpoint": {"every": "100 steps"},
    }
    config = make_config(tmp_path / "run", **sections)
    code, output = finish(start(config, tmp_path, script=script_of(tmp_path, SIGNAL_IN_A_PICTURE)))
    assert code != 0
    assert "stopped at step 2, which is saved" in output, output
    assert not (tmp_path / "run" / "samples" / "step-00000002.png").exists()
    code, output = finish(start(config, tmp_path))
    assert code == 0, output
    assert "resuming at step 2" in output
    code, output = finish(start(make_config(tmp_path / "whole", **sections), tmp_path))
    assert code == 0, output
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_an_environment_that_names_half_a_world_is_refused(name, monkeypatch):
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", name: "two"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=f"{name} is 'two', which is no number"), world("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="RANK is None"), world("cpu"):
        pass


def test_processes_wait_for_the_end_of_a_run_however_long_it_takes(make_config, tmp_path):
    config = make_config(tmp_path / "run", train={"duration": "1 steps"}, sample={"num_images": 0})
    code, output = finish(start(config, tmp_path, script=script_of(tmp_path, SLOW_END)))
    assert code == 0, output
    assert "finished" in output
