"""A service in a process of its own.

The libraries of services start threads and processes, write to the terminal, wait at the end of the process, and some
cannot begin a run again that they have failed to begin. None of that touches a run whose service works beside it: a
process that fails or hangs is ended, and the next attempt has a new one.

The two talk in lines of JSON: a call, then its answer. When the process of the run dies, the one beside it sees the end
of its input and ends as well.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eclosion.config.explain import checked
from eclosion.registry import dump, resolve
from eclosion.rundir import RunDir
from eclosion.tracking.feed import Facts, Picture, Row
from eclosion.tracking.following import Opened, Service, Standing

__all__ = ["Beside"]

# Seconds within which a service answers: to being opened, for which it has a limit of its own; to anything else; and at
# the end.
OPEN_SECONDS, CALL_SECONDS, CLOSE_SECONDS = 60.0, 30.0, 14.0


class Beside:
    """A service that works in another process.

    Args:
        part: the logger whose service it is.
        place, run_id: of the service.
    """

    def __init__(self, part: Any, *, place: Mapping[str, Any], run_id: str | None = None) -> None:
        told = dump(part)
        self.name: str = told["name"]
        self.place, self.run_id = place, run_id
        self._options = {key: value for key, value in told.items() if key != "name"}
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def open(self, run: RunDir, standing: Standing, facts: Facts) -> Opened:
        """Start a process, and open the service in it."""
        self._end()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "eclosion.tracking.beside"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the run, which then ends this in order
        )
        self._read = b""
        self._call("service", {"name": self.name, "options": self._options}, seconds=OPEN_SECONDS)
        told = {"run": str(run.root), "standing": asdict(standing), "facts": asdict(facts)}
        return Opened(**self._call("open", told, seconds=OPEN_SECONDS))

    def describe(self, facts: Facts) -> None:
        """Pass facts on."""
        self._call("describe", {"facts": asdict(facts)})

    def send(self, row: Row, service_step: int) -> None:
        """Pass a row on."""
        pictures = [{**asdict(picture), "path": str(picture.path.resolve())} for picture in row.pictures]
        told = {"step": row.step, "samples_seen": row.samples_seen, "numbers": dict(row.numbers), "pictures": pictures}
        self._call("send", {"row": told, "service_step": service_step})

    def close(self, *, done: bool) -> None:
        """Close the service, and end the process."""
        self._call("close", {"done": done}, seconds=CLOSE_SECONDS)
        self._end()

    def leave(self) -> None:
        """End the process, whatever it does; a call that waits for it fails."""
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # with what its library has started

    def _end(self) -> None:
        """End the process, and forget it."""
        self.leave()
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # what it was to be told, and did not read
                    pipe.close()

    def _call(self, name: str, arguments: Mapping[str, Any], *, seconds: float = CALL_SECONDS) -> Any:
        """Ask for something and wait for the answer. A process that fails is ended.

        Raises:
            RuntimeError: with what the service says has failed.
            OSError: if the process has ended, or does not answer in time.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise BrokenPipeError("its process has ended")
        try:
            process.stdin.write(json.dumps({"call": name, **arguments}).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(self._line(process, time.monotonic() + seconds, seconds))
            if "error" in answer:
                raise RuntimeError(answer["error"])
        except BaseException:
            self._end()
            raise
        return answer["result"]

    def _line(self, process: "subprocess.Popen[bytes]", deadline: float, seconds: float) -> bytes:
        assert process.stdout is not None
        while b"\n" not in self._read:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                raise BrokenPipeError("its process has ended")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line


# --- the process beside ----------------------------------------------------------------------------------------------


def main() -> None:
    """Answer calls until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # schedulers send them to every process; the run's end is this one's end
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what libraries print is no answer
    service: Service | None = None
    for line in sys.stdin.buffer:
        call = json.loads(line)
        answer: dict[str, Any]
        try:
            if call["call"] == "service":
                service = checked(resolve("loggers", call["name"]), call["options"]).service()
            answer = {"result": None if call["call"] == "service" else _answer(service, call)}
        except BaseException as error:  # noqa: BLE001  (told to the process that asked; libraries even call exit)
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer).encode() + b"\n")
    os._exit(0)  # what has not arrived is sent by the next process, and nothing is to be sent twice


def _answer(service: Service | None, call: Mapping[str, Any]) -> Any:
    assert service is not None, call
    if call["call"] == "open":
        run = RunDir(Path(call["run"]))
        return asdict(service.open(run, Standing(**call["standing"]), Facts(**call["facts"])))
    if call["call"] == "describe":
        service.describe(Facts(**call["facts"]))
    elif call["call"] == "send":
        row = dict(call["row"])
        pictures = [Picture(p["name"], Path(p["path"]), p["caption"]) for p in row.pop("pictures")]
        service.send(Row(**row, pictures=pictures), call["service_step"])
    else:
        service.close(done=call["done"])
    return None


if __name__ == "__main__":
    main()
