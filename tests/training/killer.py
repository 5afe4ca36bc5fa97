"""Run a config in child processes that are killed at random moments, until it is done.

    python killer.py CONFIG.json NUM_KILLS SEED

The libraries are loaded once and each attempt is a fork, so that an attempt costs little. Every third
kill waits for a save to be under way. Prints what happened as one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import eclosion.exporting  # noqa: F401
from eclosion.training.run import train


def steps_done(run: Path) -> int:
    folders = (run / "checkpoints").glob("step-*")
    return max((int(f.name.removeprefix("step-")) for f in folders), default=-1)


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".partial-*"))


def attempt(config: dict, rng: random.Random, kill: str | None) -> tuple[bool, bool]:
    """Start the run; kill it as told. Returns (it was killed, a save was cut short)."""
    run = Path(config["output"])
    before = steps_done(run)
    child = os.fork()
    if child == 0:
        out = os.open(run.parent / "out.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            train(config)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    wanted = before + rng.randint(0, 2)
    delay = rng.random() * 0.06
    while kill:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return False, status != 0
        if (is_saving(run) and steps_done(run) > before) if kill == "save" else steps_done(run) > wanted:
            if kill != "save":
                time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True, is_saving(run)
        time.sleep(0.0005)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit((run.parent / "out.log").read_text())
    return False, False


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    num_kills, rng = int(sys.argv[2]), random.Random(int(sys.argv[3]))
    kills = inside = 0
    while kills < num_kills:
        killed, in_save = attempt(config, rng, "save" if kills % 3 == 2 else "any time")
        if not killed:
            break
        kills += 1
        inside += in_save
    attempt(config, rng, None)
    print(json.dumps({"kills": kills, "inside_a_save": inside}))


main()
