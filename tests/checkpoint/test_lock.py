"""One writer per run folder."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from eclosion.checkpoint.lock import RunLock
from eclosion.errors import CheckpointError, LockedError
from eclosion.rundir import RunDir

HOLD = """
import sys, time
from pathlib import Path
from eclosion.checkpoint.lock import RunLock
from eclosion.rundir import RunDir
lock = RunLock(RunDir(Path(sys.argv[1])))
lock.acquire()
{then}
print("held", flush=True)
time.sleep(60)
"""


def holder(root, then=""):
    """Another process that holds the lock, and has said so."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_at_once_with_the_host_and_the_process_that_holds_it(tmp_path):
    process = holder(tmp_path / "run")
    try:
        start = time.monotonic()
        with pytest.raises(LockedError) as caught:
            RunLock(RunDir(tmp_path / "run")).acquire()
        assert time.monotonic() - start < 0.5
        assert str(caught.value).startswith(
            f"{tmp_path / 'run'} is in use by process {process.pid} on {socket.gethostname()}, since 2"
        )
        assert "\n" not in str(caught.value)
    finally:
        end(process)


def test_the_lock_of_a_killed_owner_never_blocks(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with RunLock(RunDir(tmp_path)):
        assert f'"pid": {os.getpid()}' in RunDir(tmp_path).lock.read_text()


@pytest.mark.parametrize(
    "then",
    [
        "import subprocess; child = subprocess.Popen(['sleep', '60'], close_fds=False)",
        "import os; pid = os.fork()\nif pid == 0: time.sleep(60); os._exit(0)\nchild = type('C', (), {'pid': pid})",
    ],
    ids=["started", "forked"],
)
def test_a_child_that_outlives_a_killed_owner_does_not_keep_the_lock(tmp_path, then):
    process = holder(tmp_path, then + "\nprint(child.pid, file=open(sys.argv[1] + '/child', 'w'))")
    child = int((tmp_path / "child").read_text())
    try:
        time.sleep(0.1)  # the forked child has run what follows the fork
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with RunLock(RunDir(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_the_same_process_cannot_take_it_twice(tmp_path):
    run = RunDir(tmp_path)
    lock = RunLock(run)
    with lock, pytest.raises(LockedError):
        RunLock(run).acquire()
    with lock, pytest.raises(LockedError):
        lock.acquire()
    with lock:
        pass


def test_of_many_threads_one_gets_it(tmp_path):
    barrier, got, refused = threading.Barrier(8), [], []

    def attempt():
        lock = RunLock(RunDir(tmp_path))
        barrier.wait()
        try:
            lock.acquire()
            got.append(lock)
        except LockedError:
            refused.append(lock)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_a_refused_attempt_leaves_the_owner_s_lock_alone(tmp_path):
    with RunLock(RunDir(tmp_path)):
        with pytest.raises(LockedError):
            RunLock(RunDir(tmp_path)).acquire()
        other = subprocess.run(
            [sys.executable, "-c", HOLD.format(then=""), str(tmp_path)], capture_output=True, text=True, timeout=60
        )
    assert f"is in use by process {os.getpid()} on" in other.stderr
    assert other.stdout == ""


def test_released_it_is_free_and_releasing_twice_is_harmless(tmp_path):
    lock = RunLock(RunDir(tmp_path))
    with lock:
        pass
    lock.release()
    with RunLock(RunDir(tmp_path)):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "\\u001b[2J\\n", "started": ""}'])
def test_what_a_stranger_wrote_into_the_lock_file_stays_one_line(tmp_path, text):
    run = RunDir(tmp_path)
    with RunLock(run):
        run.lock.write_text(text)
        with pytest.raises(LockedError) as caught:
            RunLock(run).acquire()
    assert str(caught.value).isprintable()


def test_a_folder_that_cannot_be_locked_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="lock cannot be locked: Not a directory") as caught:
        RunLock(RunDir(tmp_path / "file" / "run")).acquire()
    assert "\n" not in str(caught.value)
