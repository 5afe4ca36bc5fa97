"""Errors that a user can mend, and the exit code each one ends a command with.

    UserError                       1
    |-- ConfigError                 2   a setting is wrong
    |-- DataError                   3   an image, a folder or a data set is wrong
    |   `-- BadSample               3   one sample cannot be read; may be skipped within a budget
    |-- EnvironmentProblem          4   the machine, the disk or an installation is wrong
    |   |-- MissingExtraError       4   an optional library is not installed
    |   `-- CheckpointError         4   a checkpoint cannot be written or read
    |       `-- LockedError         4   another process writes to this run folder
    |-- OutOfMemory                 5   the device has too little memory for this run
    |-- TrainingDiverged            1   a loss or a gradient is not finite
    `-- Interrupted            128 + n  stopped by signal n, after a checkpoint

Each message is one line: where, what was given, what is wanted, what to do next.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = [
    "BadSample",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EnvironmentProblem",
    "Interrupted",
    "LockedError",
    "MissingExtraError",
    "OutOfMemory",
    "TrainingDiverged",
    "UserError",
    "did_you_mean",
    "printable",
]


class UserError(Exception):
    """Something that whoever started the command can mend; printed without a traceback."""

    exit_code: int = 1


class ConfigError(UserError):
    """One or more settings are wrong.

    Attributes:
        problems: one message per wrong setting, each naming its path.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """The data cannot be found or used."""

    exit_code = 3


class BadSample(DataError):
    """One sample cannot be read.

    Attributes:
        name: the file or member that holds it.
        reason: a short word for the ledger, such as "truncated" or "too_small".
    """

    def __init__(self, name: str, reason: str, detail: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {detail}")


class EnvironmentProblem(UserError):
    """The machine, its disk or an installation does not allow this run."""

    exit_code = 4


class MissingExtraError(EnvironmentProblem):
    """An optional library is needed and not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an optional library. Install it with: pip install "eclosion[{extra}]"')


class CheckpointError(EnvironmentProblem):
    """A checkpoint cannot be written, or what stands on disk is not valid."""


class LockedError(CheckpointError):
    """Another live process writes to this run folder."""


class OutOfMemory(UserError):
    """The device has too little memory for this run."""

    exit_code = 5


class TrainingDiverged(UserError):
    """A loss or a gradient is not finite; weights and averages were left untouched."""


class Interrupted(UserError):
    """A signal asked the run to stop; what was trained is in a checkpoint.

    Attributes:
        signal_number: the signal, such as 2 for Ctrl-C and 15 for SIGTERM.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        self.signal_number = signal_number
        self.exit_code = 130 if signal_number == 2 else 143
        super().__init__(message)


def printable(text: str) -> str:
    """Text that came from anywhere as one line of printable characters, whatever bytes it is made of."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def did_you_mean(word: str, options: Iterable[str], *, limit: int = 24) -> str:
    """A hint that ends an error message: the nearest option, and all options if they are few."""
    names = sorted(options)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return hint + (f" Options: {', '.join(names)}." if len(names) <= limit else "")
