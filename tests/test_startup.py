"""What a command costs before it does anything: no torch, and less than half a second."""

import os
import subprocess
import sys

import pytest

# Child processes' CPU time does not depend on who else is at work on the machine, as wall time does.
REPORT = "import os, sys; print('HEAVY', sorted(HEAVY & set(sys.modules)), sum(os.times()[:2]))"
HEAVY = {"torch", "diffusers", "datasets", "PIL", "numpy"}


def heavy_modules_and_seconds(statement, cwd):
    """The heavy modules that a statement loads in a new process, and the CPU seconds it takes."""
    code = f"HEAVY = {HEAVY!r}\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n{REPORT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("HEAVY"))
    names, _, seconds = line.removeprefix("HEAVY ").rpartition(" ")
    return names, float(seconds)


def command(*arguments):
    return f"import sys; sys.argv = {['eclosion', *arguments]!r}; from eclosion.cli import main; main()"


@pytest.mark.parametrize(
    "statement",
    [
        "import eclosion; dir(eclosion)",
        command("--help"),
        command("check", "--help"),
        command("--version"),
        command("init", "config.yaml"),
        command("runs", "."),
    ],
    ids=["import", "help", "check-help", "version", "init", "runs"],
)
def test_it_loads_nothing_heavy_and_takes_less_than_half_a_second(statement, tmp_path):
    names, seconds = heavy_modules_and_seconds(statement, tmp_path)
    assert names == "[]"
    best = min([seconds, *(heavy_modules_and_seconds(statement, tmp_path)[1] for _ in range(2 * (seconds > 0.5)))])
    assert best < 0.5


def test_the_test_sees_what_is_heavy(tmp_path):
    """The control."""
    assert heavy_modules_and_seconds("import numpy", tmp_path)[0] == "['numpy']"


def test_python_m_eclosion_is_the_command_and_hands_on_its_exit_code(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "eclosion", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "error"},
        )

    help_ = run("--help")
    assert (help_.returncode, help_.stderr) == (0, "")
    assert "Commands:" in help_.stdout
    refused = run("init", "config.txt")
    assert refused.returncode == 2
    assert refused.stderr == "error: config.txt: a recipe is YAML. Give a name that ends in .yaml.\n"
