"""`eclosion doctor`."""

import json
import shutil

import pytest

from eclosion import diagnosis, doctor
from eclosion.errors import EnvironmentProblem
from eclosion.rundir import RunDir


def test_a_machine_that_can_train_is_healthy_and_the_trial_says_so():
    found = doctor()
    assert found.healthy, found
    names = {finding.name for finding in found.findings}
    assert {"torch", "device", "bfloat16", "threads", "memory", "disk", "extra datasets", "self-test"} <= names
    trial = found.findings[-1]
    assert trial.text.startswith("train, save and resume give the same bits (")


def test_the_trial_sees_a_resume_that_is_not_exact(monkeypatch):
    """The control: a second half that begins with another network."""
    real = diagnosis.train

    def spoilt(config, **options):
        run = real(config, **options)
        if config["train"]["duration"] == 2:
            manifest = json.loads((RunDir(run).checkpoint(2) / "manifest.json").read_text())
            assert manifest["step"] == 2
            shutil.rmtree(RunDir(run).checkpoints)
            real(config | {"optimizer": {"learning_rate": 5e-3}}, resume="never")
        return run

    monkeypatch.setattr(diagnosis, "train", spoilt)
    trial = doctor().findings[-1]
    assert not trial.ok
    assert trial.text.startswith("a resumed run differs from one without a break in unet.ema.safetensors, ")


def test_a_trial_that_fails_is_a_finding_and_exit_code_4(monkeypatch, command):
    def fails(*_, **__):
        raise EnvironmentProblem("/tmp/x: No space left on device. Checkpoints are intact.")

    monkeypatch.setattr(diagnosis, "train", fails)
    outcome = command("doctor")
    assert outcome.code == 4
    assert "FAILED  self-test" in outcome.out
    assert "No space left on device" in outcome.out


@pytest.mark.parametrize("missing", ["datasets", "tensorboard"])
def test_an_extra_that_is_missing_comes_with_its_pip_line(missing, monkeypatch, command):
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None if name == missing else object())
    outcome = command("doctor", "--no-self-test")
    assert outcome.code == 0  # an extra is no fault
    lines = [line for line in outcome.out.splitlines() if "extra" in line]
    assert [f'not installed; pip install "eclosion[{missing}]"' in line for line in lines].count(True) == 1
    assert "self-test" not in outcome.out


def test_a_full_disk_is_a_fault(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: usage)
    found = doctor(self_test=False)
    assert [finding.name for finding in found.findings if not finding.ok] == ["disk"]
