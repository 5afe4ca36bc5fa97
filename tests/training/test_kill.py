"""A run that is killed again and again ends with the bits of the run that never was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eclosion import train

KILLER = Path(__file__).with_name("killer.py")


def killed(config, num_kills, seed, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, str(KILLER), str(path), str(num_kills), str(seed)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compare(make_config, results, tmp_path, *, steps, num_kills, min_inside, seed):
    sections = {
        "train": {"duration": f"{steps} steps"},
        "checkpoint": {"every": "1 steps"},
        "sample": {"every": "10 steps"},
    }
    whole = train(make_config(tmp_path / "whole", **sections))
    counts = killed(make_config(tmp_path / "killed", **sections), num_kills, seed, tmp_path)
    assert counts["kills"] == num_kills
    assert counts["inside_a_save"] >= min_inside
    assert results(tmp_path / "killed") == results(whole)


def test_eight_kills_change_no_bit(make_config, results, tmp_path):
    compare(make_config, results, tmp_path, steps=30, num_kills=8, min_inside=1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_kills_change_no_bit(make_config, results, tmp_path):
    compare(make_config, results, tmp_path, steps=320, num_kills=100, min_inside=20, seed=1)
