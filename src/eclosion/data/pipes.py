"""Files that a command writes to its standard output: `pipe:command`.

Whoever writes such a URL decides what runs on this machine. So it runs only inside `pipes_allowed`, which the
command line enters for `--allow-pipe` and nothing else does.
"""

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from eclosion.data.places import Checksum, quoted, shown
from eclosion.errors import ConfigError, DataError, EnvironmentProblem

__all__ = ["CommandStream", "argv_of", "check_pipe", "pipes_allowed"]

CHUNK = 1 << 20  # bytes
# The end of what a command writes to its standard error, of which the last line goes into a message.
KEPT_OF_STDERR = 4096
# Outside quotes, each of these means something to a shell and nothing to the program.
SHELL_SYNTAX = frozenset("|&;<>()$`*?[]{}#~\n")

# What may be a token in a command.
_WORD = re.compile(r"[^\s'\"|<>;&()=:,]{6,}")

_lock = threading.Lock()
_allowed = 0


@contextmanager
def pipes_allowed() -> Iterator[None]:
    """Inside this, `pipe:` URLs may run; in all threads of this process, as fetching ahead has its own."""
    global _allowed
    with _lock:
        _allowed += 1
    try:
        yield
    finally:
        with _lock:
            _allowed -= 1


def check_pipe(url: str) -> None:
    """Refuse to run a command, unless it was allowed.

    Raises:
        ConfigError: if it was not, or if it cannot be run at all.
    """
    if not _allowed:
        raise ConfigError(
            f"{shown(url)}: a pipe: URL runs a command on this machine, and that is not allowed. "
            "If you trust this config, add --allow-pipe to the command line."
        )
    argv_of(url)


def argv_of(url: str) -> list[str]:
    """What is run for a `pipe:` URL.

    A plain command, words and quotes only, is run as it is and no shell sees it. A command that holds shell syntax
    outside quotes, such as `|`, `>`, `$`, `*`, `~` or a setting before the program (`A=b program`), is run by
    `/bin/sh -c`.

    Raises:
        ConfigError: if there is no command, or a quote is not closed.
    """
    command = url.removeprefix("pipe:").strip()
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: the command cannot be read ({error}).") from None
    if not words or "\0" in command:
        raise ConfigError(f"{shown(url)}: there is no command after pipe:. Write one, such as pipe:cat 00000.tar.")
    if _needs_shell(command) or "=" in words[0]:
        return ["/bin/sh", "-c", command]
    return words


def _needs_shell(command: str) -> bool:
    quote, escaped = "", False
    for letter in command:
        if escaped:
            escaped = False
        elif letter == "\\" and quote != "'":
            escaped = True
        elif quote:
            if letter == quote:
                quote = ""
            elif quote == '"' and letter in "$`":
                return True
        elif letter in "'\"":
            quote = letter
        elif letter in SHELL_SYNTAX:
            return True
    return False


class CommandStream:
    """What a command writes to its standard output; a `Stream`.

    It is a session of its own, so that a shell is ended with all that it has started. It reads nothing from the
    terminal. It is never run a second time for one file: it may not be harmless to do so, and it knows best what to
    try again.

    Raises:
        ConfigError: if commands are not allowed, or this one cannot be read.
        EnvironmentProblem: if the program cannot be started.
    """

    start = 0
    total: int | None = None
    versions: tuple[str, ...] = ()
    resume_with = ""
    checksum: Checksum | None = None

    def __init__(self, url: str) -> None:
        check_pipe(url)
        self._name, self._command, argv = shown(url), url.removeprefix("pipe:"), argv_of(url)
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it cannot be run"
            program = quoted(argv[0].rpartition("/")[2])
            raise EnvironmentProblem(
                f"{self._name}: the program {program!r} cannot be started ({why}). Install it, or correct the command."
            ) from None
        self._lock = threading.Lock()
        self._errors = bytearray()
        self._listener = threading.Thread(target=self._listen, name="eclosion-stderr", daemon=True)
        self._listener.start()

    def read(self) -> bytes:
        """The next bytes; b"" once the command has closed its output."""
        assert self._process.stdout is not None
        return os.read(self._process.stdout.fileno(), CHUNK)

    def finish(self) -> None:
        """Wait for the command's exit code.

        Raises:
            DataError: if it is not 0.
        """
        while (code := self._exit_code()) is None:
            time.sleep(0.005)
        if code != 0:
            self._listener.join(1.0)
            how = f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            raise DataError(f"{self._name}: the command {how}{self._last_words()}.")

    def close(self) -> None:
        """End the command if it still runs, and forget it."""
        self.kill()
        self._process.wait()
        self._listener.join(1.0)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def kill(self) -> None:
        """End the command and all that it has started, at once."""
        with self._lock:  # a process that nobody has asked for its exit code keeps its number: no other is hit
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _exit_code(self) -> int | None:
        with self._lock:
            return self._process.poll()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with suppress(OSError, ValueError):  # closed, as what the command left behind still holds the other end
            while said := os.read(self._process.stderr.fileno(), KEPT_OF_STDERR):
                self._errors = (self._errors + said)[-KEPT_OF_STDERR:]

    def _last_words(self) -> str:
        """The last line that it wrote to standard error, without what else stands in the command."""
        lines = bytes(self._errors).decode(errors="replace").strip().splitlines()
        if not lines:
            return " and said nothing"
        last = quoted(lines[-1])
        for word in _WORD.findall(self._command):
            if word not in self._name:  # which leaves out what may be a token
                last = last.replace(word, "...")
        return f": {last}"
