"""Kills, full disks and power losses at every file operation of a save.

Each scenario starts from a run with checkpoints and makes one more save. Whatever happens at whichever operation, the
newest valid checkpoint is the one before or the one after, it loads whole, and the next save works.

Two ways to hurt: `os` functions replaced in this process (always run), and strace, which kills a real process or fails
a real system call (where strace is allowed to).
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from eclosion.checkpoint import storage
from eclosion.checkpoint.store import CheckpointStore
from eclosion.errors import CheckpointError
from eclosion.rundir import RunDir

ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]


def files(step: int, variant: float = 0) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.full((50,), step + variant)
    return {"unet": {"w": weight, "b": torch.tensor(step)}, "unet.ema": {"w": -weight}, "unet.optimizer": {"m": weight}}


@dataclass(frozen=True)
class Scenario:
    """What stands on disk, the save that is hurt, and which (step, variant) may be the newest afterwards."""

    before: tuple[int, ...]
    step: int
    variant: float
    newest: tuple[tuple[int, float] | None, ...]


SCENARIOS = {
    "first": Scenario((), 2, 0, (None, (2, 0))),
    "next, and the oldest is pruned": Scenario((2, 4), 6, 0, ((4, 0), (6, 0))),
    "same step with other content": Scenario((2, 4), 4, 0.5, ((4, 0), (4, 0.5))),
    "same step again": Scenario((2, 4), 4, 0, ((4, 0),)),
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Thousands of saves; whether fsync is called when it must be is tested, and under strace it is real."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def prepared(root: Path, scenario: Scenario) -> RunDir:
    """A run folder as the scenario wants it; copied from a first one that stays beside it."""
    template = root.parent / f"template {list(scenario.before)}"
    if not template.exists():
        template.mkdir()
        fill(RunDir(template), scenario)
    return RunDir(Path(shutil.copytree(template, root)))


def fill(run: RunDir, scenario: Scenario) -> None:
    with CheckpointStore(run) as store:
        for step in scenario.before:
            store.save(step, files(step), {"step": step, "variant": 0}, {}, wait=True)


def save(run: RunDir, scenario: Scenario) -> None:
    store = CheckpointStore(run)
    try:
        state = {"step": scenario.step, "variant": scenario.variant}
        store.save(scenario.step, files(scenario.step, scenario.variant), state, {}, wait=True)
    finally:
        store._writer.shutdown()


def assert_recovers(run: RunDir, scenario: Scenario) -> tuple[int, float] | None:
    """Start again as a run does; returns what it would resume from."""
    with CheckpointStore(run) as store:
        for folder in store.folders():
            storage.verify(folder)  # whatever is visible is whole, also the old ones
        store.clean_orphans()
        hidden = [path.name for path in run.checkpoints.glob(".*")] if run.checkpoints.exists() else []
        assert hidden == []
        latest = store.latest()
        assert store.warnings == []
        if latest is None:
            newest = None
        else:
            loaded = store.load(latest)
            newest = (loaded.state["step"], loaded.state["variant"])
            expected = files(*newest)
            assert loaded.files.keys() == expected.keys()
            for entry, tensors in expected.items():
                assert all(torch.equal(tensor, loaded.files[entry][name]) for name, tensor in tensors.items())
        assert newest in scenario.newest
        store.save(8, files(8), {"step": 8, "variant": 0}, {}, wait=True)
        assert store.latest() == run.checkpoint(8)
    return newest


def assert_old_ones_intact(run: RunDir, scenario: Scenario) -> None:
    """After an error, before any cleaning: what stood there still loads, except what the save was to delete."""
    store = CheckpointStore(run)
    if scenario.before:
        assert store.load(scenario.before[-1]).state["step"] == scenario.before[-1]
    store.close()


# --- in this process -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more: nothing after this may have an effect on disk."""


OPERATIONS = ["open", "write", "readv", "read", "lseek", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"]
OPERATIONS += ["stat", "lstat", "fstat", "listdir", "scandir", "statvfs"]


class Faults:
    """Counts the file operations of the saving thread, and hurts the k-th.

    Attributes:
        names: the operations, in order.
        fired: whether the k-th was reached.
    """

    def __init__(self, monkeypatch, k: int | None, hurt: Callable[[str, tuple[object, ...]], None] | None) -> None:
        self.names: list[str] = []
        self.k, self.hurt, self.fired, self.dead = k, hurt, False, False
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, real):
        def operation(*args, **kwargs):
            if not threading.current_thread().name.startswith("checkpoint"):
                return real(*args, **kwargs)
            if self.dead:
                if name == "close":
                    real(*args, **kwargs)  # the test process must not run out of descriptors
                raise Killed
            self.names.append(name)
            if len(self.names) == self.k:
                self.fired = True
                self.hurt(name, args)
            return real(*args, **kwargs)

        return operation

    def kill(self, name, args):
        if name == "write" and len(args[1]) > 1:
            os.pwrite(args[0], args[1][: len(args[1]) // 2], os.lseek(args[0], 0, os.SEEK_CUR))  # torn
        self.dead = True
        raise Killed


def fails_with(code: int) -> Callable[[str, tuple[object, ...]], None]:
    def hurt(name, args):
        if name == "close":
            os.fstat(args[0])  # still open: a failing close leaves it to us, as a failing disk may
        raise OSError(code, os.strerror(code))

    return hurt


def count_operations(root: Path, scenario: Scenario) -> list[str]:
    run = prepared(root, scenario)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, None, None)
        save(run, scenario)
    assert assert_recovers(run, scenario) in scenario.newest
    return faults.names


SAMPLE = [pytest.param(5, id="sampled"), pytest.param(1, id="all", marks=pytest.mark.slow)]
CHANGES = {"mkdir", "rename", "write", "unlink", "rmdir"}


@pytest.mark.parametrize("every", SAMPLE)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_a_kill_at_any_file_operation_leaves_the_checkpoint_before_or_the_one_after(tmp_path, scenario, every):
    """The sample has all operations that change the disk; a kill at another leaves what the next of these finds."""
    names = count_operations(tmp_path / "count", scenario)
    outcomes = []
    for k in [k for k, name in enumerate(names, 1) if name in CHANGES or k % every == 0]:
        run = prepared(tmp_path / str(k), scenario)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, None)
            faults.hurt = faults.kill
            with pytest.raises(Killed):
                save(run, scenario)
        assert faults.fired
        outcomes.append(assert_recovers(run, scenario))
        shutil.rmtree(run.root)
    assert set(outcomes) == set(scenario.newest)  # the kills came before and after the moment that counts
    changes = sum(a != b for a, b in pairwise(outcomes))
    assert changes == len(scenario.newest) - 1  # and there is one such moment


@pytest.mark.parametrize(
    ("codes", "every"), [(ERRORS, 5), *(pytest.param([code], 1, marks=pytest.mark.slow) for code in ERRORS)], ids=str
)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_an_error_at_any_file_operation_leaves_the_old_checkpoints_and_one_line(tmp_path, scenario, codes, every):
    """By default the operations that change the disk and a sample of others, each with one of the errors in turn."""
    names = count_operations(tmp_path / "count", scenario)
    failed = 0
    ks = [k for k, name in enumerate(names, 1) if name in CHANGES or k % every == 0]
    for k in ks:
        run = prepared(tmp_path / str(k), scenario)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, fails_with(codes[k % len(codes)]))
            try:
                save(run, scenario)
            except CheckpointError as error:
                failed += 1
                assert_one_line(str(error), run)
        assert faults.fired
        assert_old_ones_intact(run, scenario)
        assert [path.name for path in run.checkpoints.glob(f".partial-{scenario.step:08d}-*")] == []
        assert_recovers(run, scenario)
        shutil.rmtree(run.root)
    assert failed > len(ks) / 4


def assert_one_line(message: str, run: RunDir) -> None:
    assert "\n" not in message
    assert str(run.checkpoints) in message
    if "cannot be saved" in message:
        assert re.search(r"It needs \d+\.\d MB, and (\d+\.\d|an unknown number of) MB are free there", message)


# --- power loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_everything_is_durable_before_it_is_visible(tmp_path, scenario):
    """The order of operations that power loss asks for, checked on the log of a real save.

    When a folder gets its name: each file in it was fsynced after its last write, then the folder was. After that its
    parent is fsynced before save returns, and before an old checkpoint loses a byte.
    """
    run = prepared(tmp_path / "run", scenario)
    log: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "unlink", "mkdir")}

        def opened(path, flags, *args, **kwargs):
            fd = real["open"](path, flags, *args, **kwargs)
            paths[fd] = str(Path(f"/proc/self/fd/{fd}").readlink())
            return fd

        def on_fd(name):
            def operation(fd, *args):
                log.append((name, paths[fd]))
                return real[name](fd, *args)

            return operation

        def on_path(name):
            def operation(path, *args, dir_fd=None, **kwargs):
                where = Path(paths[dir_fd]) / path if dir_fd is not None else Path(path)
                log.append((name, str(where) if name != "rename" else f"{where} -> {args[0]}"))
                return real[name](path, *args, **({"dir_fd": dir_fd} if dir_fd is not None else {}), **kwargs)

            return operation

        patch.setattr(os, "open", opened)
        for name in ("write", "fsync"):
            patch.setattr(os, name, on_fd(name))
        for name in ("rename", "unlink", "mkdir"):
            patch.setattr(os, name, on_path(name))
        save(run, scenario)
    final, parent = str(run.checkpoint(scenario.step)), str(run.checkpoints)
    published = [i for i, (name, what) in enumerate(log) if name == "rename" and what.endswith(f" -> {final}")]
    if scenario.newest == ((4, 0),):
        assert published == []
        return
    (at,) = published
    partial = log[at][1].split(" -> ")[0]
    written = {what for name, what in log[:at] if name == "write"}
    assert {Path(path).name for path in written} == {path.name for path in run.checkpoint(scenario.step).iterdir()}
    last_fsync = {path: max(i for i, entry in enumerate(log[:at]) if entry == ("fsync", path)) for path in written}
    for path in written:
        assert last_fsync[path] > max(i for i, entry in enumerate(log[:at]) if entry == ("write", path))
    manifest = log.index(("write", f"{partial}/manifest.json"))
    assert all(last_fsync[path] < manifest for path in written if not path.endswith("manifest.json"))
    assert ("fsync", partial) in log[max(last_fsync.values()) : at]
    durable = log.index(("fsync", parent), at)
    for i, (name, what) in enumerate(log):
        if name == "unlink":
            assert i > durable
            assert ".partial-" in what or ".replaced-" in what  # invisible before it loses a file
    if not scenario.before:
        assert log.index(("mkdir", parent)) < log.index(("fsync", str(run.root)))


# --- strace ----------------------------------------------------------------------------------------------------------

SERVER = """
import ctypes, json, os, select, socket, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import importlib.util
spec = importlib.util.spec_from_file_location("save_faults", sys.argv[1])
faults = importlib.util.module_from_spec(spec); sys.modules["save_faults"] = faults; spec.loader.exec_module(faults)
import tempfile
with tempfile.TemporaryDirectory() as warm:    # everything imported and every lazy path taken once
    scenario = faults.SCENARIOS["same step with other content"]
    faults.save(faults.prepared(Path(warm) / "run", scenario), scenario)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    run, scenario = faults.RunDir(Path(order["run"])), faults.SCENARIOS[order["scenario"]]
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: any process may trace
        poll = select.poll(); poll.register(theirs, select.POLLIN); poll.poll()
        try:
            faults.save(run, scenario); answer = "saved"
        except faults.CheckpointError as error:
            answer = str(error)
        except BaseException as error:
            answer = "BUG " + repr(error)
        theirs.send(answer.encode())
        os._exit(0)
    theirs.close()
    print(pid, flush=True)
    sys.stdin.readline()
    ours.send(b"go")
    _, status = os.waitpid(pid, 0)
    try:
        answer = ours.recv(10000).decode()
    except ConnectionResetError:    # killed before it read "go"
        answer = ""
    print(json.dumps([status, answer]), flush=True)
    ours.close()
"""
SYSCALLS = (
    "openat,open,creat,write,pwrite64,writev,read,readv,pread64,lseek,fsync,fdatasync,close,mkdir,mkdirat,rename,renameat,renameat2,"
    "unlink,unlinkat,rmdir,stat,lstat,fstat,newfstatat,statx,getdents64,statfs,fstatfs"
)


class Tracee:
    """A server process that forks a fresh saver for each fault, and strace on the saver."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        return self.process.stdout.readline().strip()

    def _say(self, text: str) -> None:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def save(self, run: RunDir, scenario: str, log: Path, inject: str | None) -> tuple[int, str, str]:
        """Returns the saver's wait status, its answer, and strace's log."""
        self._say(json.dumps({"run": str(run.root), "scenario": scenario}))
        pid = self._line()
        options = ["-e", f"inject={inject}"] if inject else []
        strace = subprocess.Popen(
            ["strace", "-f", "-o", str(log), "-e", f"trace={SYSCALLS}", *options, "-p", pid],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        attached = strace.stderr.readline()
        self._say("go")
        status, answer = json.loads(self._line())
        strace.communicate(timeout=60)
        assert "attached" in attached, attached
        return status, answer, log.read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def strace_works() -> bool:
    """Whether strace is there and this process may trace another."""
    if not shutil.which("strace"):
        return False
    sleeper = subprocess.Popen(["sleep", "30"])
    command = ["timeout", "1", "strace", "-o", os.devnull, "-p", str(sleeper.pid)]
    try:
        return b"attached" in subprocess.run(command, capture_output=True, check=False).stderr
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.fixture(scope="module")
def tracee():
    if not strace_works():
        pytest.skip("strace is missing or may not trace; the faults inside this process have run")
    tracee = Tracee()
    yield tracee
    tracee.close()


def syscalls_of_save(tracee: Tracee, tmp_path: Path, name: str) -> list[str]:
    """The system calls of the thread that saves, in order."""
    run = prepared(tmp_path / "count", SCENARIOS[name])
    status, answer, log = tracee.save(run, name, tmp_path / "log", None)
    assert (status, answer) == (0, "saved")
    by_thread: dict[str, list[str]] = {}
    for line in log.splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            by_thread.setdefault(match[1], []).append(match[2])
    calls = max(by_thread.values(), key=len)
    assert calls.count("fsync") >= 6
    return calls


def points(calls: list[str], every: int) -> list[tuple[str, int]]:
    """Which calls to hurt, as (name, how many-th of this name): each `every`-th, and all that change names."""
    changes = {"rename", "mkdir", "unlinkat", "rmdir", "unlink"}
    numbered = [(call, calls[: i + 1].count(call)) for i, call in enumerate(calls)]  # strace counts each name by itself
    return [point for i, point in enumerate(numbered, 1) if i % every == 0 or point[0] in changes]


ALL = pytest.mark.slow
NEXT, REPLACE, FIRST = "next, and the oldest is pruned", "same step with other content", "first"
KILLS = [(NEXT, 11), *(pytest.param(name, 1, marks=ALL) for name in (NEXT, REPLACE, FIRST))]
FAILS = [
    (NEXT, "ENOSPC", 11),
    *(pytest.param(n, e, 1, marks=ALL) for n in (NEXT, REPLACE) for e in ("ENOSPC", "EIO", "EROFS")),
]


@pytest.mark.parametrize(("name", "every"), KILLS)
def test_sigkill_at_the_system_calls_of_a_save(tracee, tmp_path, name, every):
    calls = syscalls_of_save(tracee, tmp_path, name)
    outcomes = []
    for call, k in points(calls, every):
        run = prepared(tmp_path / f"{call} {k}", SCENARIOS[name])
        status, answer, _ = tracee.save(run, name, tmp_path / "log", f"{call}:signal=SIGKILL:when={k}")
        assert os.WIFSIGNALED(status), answer
        assert os.WTERMSIG(status) == signal.SIGKILL
        outcomes.append(assert_recovers(run, SCENARIOS[name]))
        shutil.rmtree(run.root)
    assert set(outcomes) == set(SCENARIOS[name].newest)


@pytest.mark.parametrize(("name", "error", "every"), FAILS)
def test_errors_at_the_system_calls_of_a_save(tracee, tmp_path, name, error, every):
    calls = syscalls_of_save(tracee, tmp_path, name)
    failed = 0
    for call, k in points(calls, every):
        run = prepared(tmp_path / f"{call} {k}", SCENARIOS[name])
        status, answer, log = tracee.save(run, name, tmp_path / "log", f"{call}:error={error}:when={k}")
        assert status == 0
        assert "(INJECTED)" in log
        if answer != "saved":
            failed += 1
            assert_one_line(answer, run)
        assert_old_ones_intact(run, SCENARIOS[name])
        if call != "close":
            partials = list(run.checkpoints.glob(f".partial-{SCENARIOS[name].step:08d}-*"))
            assert partials == []
        assert_recovers(run, SCENARIOS[name])
        shutil.rmtree(run.root)
    assert failed > 0
