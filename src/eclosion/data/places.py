"""Files by URL: where they are, what they are called in messages, and how patiently they are asked for.

A URL may hold a password, a token or a signature. `shown` takes them out; whatever is printed, logged or
written to disk goes through it, or through `one_line` if it is somebody else's text.
"""

import hashlib
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from eclosion.errors import ConfigError, DataError, EnvironmentProblem
from eclosion.redaction import one_line, quoted, scheme_of, shown

__all__ = [
    "Checksum",
    "IsFolder",
    "NotFound",
    "Patience",
    "Persistence",
    "Place",
    "Stopped",
    "Stream",
    "Transient",
    "local_path",
    "one_line",
    "quoted",
    "scheme_of",
    "shown",
    "within",
]

T = TypeVar("T")

# Query parameters that say who asks and until when, and not for what.
SIGNATURES = re.compile(
    r"x-(amz|goog|oss|cos)-.*|awsaccesskeyid|googleaccessid|key-pair-id|policy|signature|expires"
    r"|sig|s[eiprtv]|spr|sk(oid|tid|t|e|s|v)|(access_?)?token",
    re.IGNORECASE,
)


class NotFound(DataError):
    """There is no such file or folder."""


class IsFolder(DataError):
    """What stands there is a folder, and a file is wanted."""


class Transient(Exception):
    """Something went wrong that may go right the next time. Its text continues "<file>: ...".

    Attributes:
        retry_after_seconds: how long the server asks to wait, if it does.
        start_over: whether the next try must begin with the first byte.
    """

    def __init__(self, what: str, *, retry_after_seconds: float = 0.0, start_over: bool = False) -> None:
        self.retry_after_seconds, self.start_over = retry_after_seconds, start_over
        super().__init__(what)


class Stopped(Exception):
    """Whoever wanted the file does not want it any more."""


def local_path(url: str) -> Path | None:
    """The path of a local file: a plain path, or a `file://` URL; None if the URL leads elsewhere.

    Raises:
        ConfigError: if a `file://` URL names another machine.
    """
    scheme = scheme_of(url)
    if scheme == "":
        return Path(url).expanduser()
    if scheme != "file":
        return None
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise ConfigError(f"{shown(url)}: a file:// URL names a file of this machine, as in file:///data/00000.tar.")
    return Path(unquote(parts.path))


@dataclass(frozen=True, repr=False)
class Place:
    """One file that exists.

    Attributes:
        url: as given, for opening; it may hold secrets, so that messages use `shown`.
        size: bytes; None if unknown, as for a command.
        version: changes when the content does: the time of a local file in nanoseconds, the ETag or
            Last-Modified of a remote one; "" if unknown.
    """

    url: str
    size: int | None
    version: str

    @cached_property
    def shown(self) -> str:
        """The URL without secrets."""
        return shown(self.url)

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits: the same for the same URL, size and version, whoever signed the URL and when."""
        parts = (_unsigned(self.url), str(self.size), self.version)
        text = "".join(f"{len(part)} {part}" for part in parts)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"Place({self.shown!r}, size={self.size}, version={self.version!r})"


def _unsigned(url: str) -> str:
    if scheme_of(url) not in {"http", "https"}:
        return url
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("#")[0].partition("?")
    host, slash, path = rest.partition("/")
    kept = [pair for pair in query.split("&") if not SIGNATURES.fullmatch(pair.partition("=")[0])]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}?{'&'.join(kept)}"


@dataclass(frozen=True)
class Checksum:
    """What the content of a file must hash to.

    Attributes:
        algorithm: a name that hashlib knows.
        hexdigest: in lower case.
        certain: whether the store says that this is a hash of the content. An ETag usually is one where files were
            written in one piece, and never where the store encrypts with a key of its own.
    """

    algorithm: Literal["md5", "sha256"]
    hexdigest: str
    certain: bool


class Stream(Protocol):
    """The bytes of a file on their way. Made, read and closed in one thread; only `kill` is called from another.

    Attributes:
        start: where in the file its first byte belongs.
        total: bytes of the whole file, if known.
        versions: all that the store says about the version; of each kind, such as "etag ...", one.
        resume_with: what to say to get the rest of this very version; "" if the rest cannot be had alone.
        checksum: of the whole file, if the store has one.
    """

    start: int
    total: int | None
    versions: tuple[str, ...]
    resume_with: str
    checksum: Checksum | None

    def read(self) -> bytes:
        """The next bytes, as they come; b"" at the end.

        Raises:
            Transient: if there is an end that should not be.
        """
        ...

    def finish(self) -> None:
        """Called after the last byte.

        Raises:
            DataError: if the file is not good after all.
        """
        ...

    def close(self) -> None:
        """Give everything back."""
        ...

    def kill(self) -> None:
        """End a read that another thread waits in, where that is possible."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long a file may take.

    Attributes:
        deadline_seconds: for how long failing tries are repeated; counted anew whenever a try got a good deal further.
        first_wait_seconds: before the second try; each further wait is about twice as long.
        max_wait_seconds: the longest wait of our own; a server may ask for more, within the deadline.
        timeout_seconds: how long a connection may be silent.
        window_seconds, min_bytes_per_second: a file that comes slower than this over such a window has failed.
    """

    deadline_seconds: float = 600.0
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 30.0
    timeout_seconds: float = 30.0
    window_seconds: float = 30.0
    min_bytes_per_second: float = 1024.0

    @property
    def min_bytes(self) -> float:
        """What must have come after a window."""
        return self.min_bytes_per_second * self.window_seconds


@dataclass
class Persistence:
    """Waits between tries, and gives up when the time is over.

    Attributes:
        name: of the file, for messages.
        patience: how long.
        stop: set when nobody wants the file any more.
    """

    name: str
    patience: Patience
    stop: threading.Event = field(default_factory=threading.Event)
    _failures: int = 0
    _since: float = field(default_factory=time.monotonic)
    # of its own, so that a training that draws from the global one is not disturbed
    _jitter: random.Random = field(default_factory=random.Random)

    def progressed(self) -> None:
        """Count the time anew."""
        self._failures, self._since = 0, time.monotonic()

    def wait(self, failure: Transient) -> None:
        """Wait before another try.

        Raises:
            EnvironmentProblem: if the time is over, or the server asks to wait for longer than is left.
            Stopped: if nobody wants the file any more.
        """
        self._failures += 1
        spent = time.monotonic() - self._since
        left = self.patience.deadline_seconds - spent
        asked = failure.retry_after_seconds
        if asked > left or left <= 0:
            tries = f"{self._failures} {'try' if self._failures == 1 else 'tries'} in {spent:.0f} s"
            asks = f", and the server asks to wait {asked:.0f} s more" if asked > left > 0 else ""
            raise EnvironmentProblem(
                f"{self.name}: {failure} ({tries}{asks}). Look at the network and the server, and start again."
            )
        ours = min(
            self.patience.max_wait_seconds, self.patience.first_wait_seconds * 2.0 ** min(self._failures - 1, 60)
        )
        wait = max(asked, ours * self._jitter.uniform(0.5, 1.0))
        if self.stop.wait(min(wait, left)):
            raise Stopped


def within(seconds: float, action: Callable[[], T]) -> T:
    """What an action returns, if it does in time; else its thread is left behind.

    Raises:
        Transient: if it takes longer.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((action(), None))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            answers.put((None, error))

    threading.Thread(target=run, name="eclosion-ask", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise Transient(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # an answer is there when no error is
