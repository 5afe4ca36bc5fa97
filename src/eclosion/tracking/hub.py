"""A repository on the Hugging Face hub, as a careful user treats it.

What is sent is named file by file and goes in one commit, which is looked at afterwards. Before each commit the hub is
asked who may see the repository; where that is not what was wished, nothing is sent. What fails and may go right the
next time is tried again; what comes of it is one line without anything secret in it.
"""

import hashlib
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from eclosion.data.places import Transient, within
from eclosion.errors import ConfigError, EnvironmentProblem, UserError
from eclosion.redaction import quoted, remember
from eclosion.tracking.hub_files import Entry, may_be_sent

__all__ = [
    "Patience",
    "Pushed",
    "Repository",
    "Unreachable",
    "find_token",
    "read_token_file",
]

T = TypeVar("T")

# Where a token is looked for in the environment; the second is an old name of the first.
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
MAX_TOKEN = 4096  # bytes
CHUNK = 1 << 20  # bytes
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Answers after which the same question may be answered otherwise; 412: somebody else has just committed.
WORTH_ANOTHER_TRY = frozenset({408, 412, 425, 429})
# What the client stumbles over when an answer is not one of the hub.
STUMBLES = (ValueError, LookupError, TypeError)
# What it raises: httpx's or requests' errors, whichever its version is made with, and its own.
FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError, Transient, *STUMBLES)
# No hidden files, no way up, nothing that a disk or a terminal takes for something else.
_PATH = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*(/[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*)*")


class Unreachable(EnvironmentProblem):
    """The hub does not answer, or not as it should, after several tries."""


@dataclass(frozen=True)
class Patience:
    """How long the hub may take.

    Attributes:
        tries: how often something that fails is tried.
        wait_seconds: before the second try; it doubles before each further one.
        answer_seconds: for an answer without a file.
        bytes_per_second: how slow files may go, on top of that.
    """

    tries: int = 5
    wait_seconds: float = 2.0
    answer_seconds: float = 60.0
    bytes_per_second: float = 100e3


DEFAULT = Patience()


@dataclass(frozen=True)
class Pushed:
    """A commit: the repository's full name, the commit's id, and the address of the repository."""

    repo: str
    commit: str
    url: str


# --- the token -----------------------------------------------------------------------------------------------------


def find_token(token_path: Path | None = None) -> str | None:
    """The token of this user: of the environment, else of a file that nobody else may read; None if there is none.

    Args:
        token_path: the file; none takes the one that `hf auth login` writes.

    Raises:
        ConfigError: if the file holds no token, or others may read it, or it is named and missing.
    """
    for variable in VARIABLES:
        if token := os.environ.get(variable, "").strip():
            return _checked_token(token, f"the environment variable {variable}")
    if token_path is not None:
        return read_token_file(token_path.expanduser())
    login = Path(constants.HF_TOKEN_PATH)
    return read_token_file(login) if login.is_file() else None


def read_token_file(path: Path) -> str:
    """The token in a file.

    Raises:
        ConfigError: if it cannot be read, is more than a token, or anybody but its owner may read or change it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe must not keep it waiting
    except OSError as error:
        raise ConfigError(f"{path}: the token cannot be read ({error.strerror}).") from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: is no file, and one that holds a token is wanted.")
        if status.st_mode & 0o077:
            raise ConfigError(
                f"{path}: others than its owner may read this token (mode {stat.S_IMODE(status.st_mode):04o}). "
                f"Run: chmod 600 {path}"
            )
        text = file.read(MAX_TOKEN + 1)
    return _checked_token(text.decode("ascii", "replace").strip(), str(path))


def _checked_token(token: str, where: str) -> str:
    if not token or len(token) > MAX_TOKEN or not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{where}: does not hold a token, which is one word of plain letters, digits and signs.")
    remember(token)
    return token


# --- the repository ------------------------------------------------------------------------------------------------


class Repository:
    """One repository of models.

    Args:
        name: "my-model" or "owner/my-model".
        private: whether it is to be seen by its owner alone. Only asked when something is sent.
        token_path: where the token is, if not in the environment.
        patience: how long the hub may take.

    Raises:
        ConfigError: if the token is not one, or would be sent to another machine unencrypted.
    """

    def __init__(
        self, name: str, *, private: bool = True, token_path: Path | None = None, patience: Patience | None = None
    ) -> None:
        self.name, self.private, self.patience = name, private, patience or DEFAULT
        self._token = find_token(token_path)
        self._api = HfApi(token=self._token or False, library_name="eclosion")
        self._stranger = HfApi(token=False, library_name="eclosion")
        _check_endpoint(self._api.endpoint)

    @property
    def url(self) -> str:
        """Where people find it."""
        return quoted(f"{self._api.endpoint}/{self.name}")

    def need_token(self) -> None:
        """Raise ConfigError if there is no token, without which nothing can be sent."""
        if self._token is None:
            raise ConfigError(
                f"{self.name}: there is no token for the Hugging Face hub. Set HF_TOKEN, run `hf auth login`, or give "
                "a file that only you can read: token_path, or --token-file."
            )

    def prepare(self) -> None:
        """Make it, if it is not there, and see that it is as private as was wished.

        Raises:
            ConfigError: if the hub does not let this user write there, or others see what they should not.
            Unreachable: if the hub does not answer.
        """
        self.need_token()
        self._tried(self._head)

    def push(
        self,
        files: Mapping[str, Path | bytes],
        *,
        message: str,
        replacing: Sequence[str] = (),
        keeping: str = "",
        beside: str = "",
    ) -> Pushed:
        """Put files there in one commit; a file that is there already, as it is, is not sent again.

        Args:
            files: by their paths in the repository.
            message: of the commit, one line.
            replacing: folders in it that hold no other weights and settings afterwards; "" is the repository itself.
            keeping: README.md is kept if it is there and does not hold this text; "" writes it always.
            beside: a file that must not be there, as what is put there would not go with it.

        Raises:
            ConfigError, Unreachable: as `prepare`.
            UserError: if the hub refuses the commit, or holds something else afterwards.
        """
        self.need_token()
        size = self._look_into(files)
        oid = self._tried(lambda: self._commit(files, message, replacing, keeping, beside), size=size)
        return Pushed(self.name, oid, self.url)

    def _commit(
        self, files: Mapping[str, Path | bytes], message: str, replacing: Sequence[str], keeping: str, beside: str
    ) -> str:
        head = self._head()
        there = {entry.path: entry for entry in self._listed(head)}
        if beside in there:
            raise ConfigError(
                f"{self.url}: holds {beside}, so that a pipeline and a checkpoint would be mixed. Nothing was sent. "
                "Choose another repository."
            )
        wanted = {path: given for path, given in files.items() if not self._keeps(path, there, head, keeping)}
        gone = [path for path in there if path not in files and _lies_in(path, replacing) and may_be_sent(path)]
        adds = [CommitOperationAdd(path, given) for path, given in sorted(wanted.items())]
        removes = [CommitOperationDelete(path) for path in gone]
        made = self._api.create_commit(self.name, [*adds, *removes], commit_message=message, parent_commit=head)
        self._look_at(str(made.oid), wanted, gone)
        return str(made.oid)

    def _keeps(self, path: str, there: Mapping[str, Entry], head: str, mark: str) -> bool:
        """Whether a README.md stays, as somebody wrote it."""
        if path != "README.md" or path not in there or not mark:
            return False
        with _scratch() as folder:
            found = hf_hub_download(self.name, path, revision=head, local_dir=folder, token=self._token)
            return mark not in Path(found).read_text(encoding="utf-8", errors="replace")

    def _look_at(self, commit: str, files: Mapping[str, Path | bytes], gone: Sequence[str]) -> None:
        """The commit must hold what was sent, byte for byte."""
        there = {entry.path: entry for entry in self._listed(commit)}
        wrong = [path for path, given in files.items() if not _is_same(there.get(path), given)]
        wrong += [path for path in gone if path in there]
        if wrong:
            raise EnvironmentProblem(
                f"{self.url}: commit {commit[:8]} does not hold {wrong[0]} as it was sent, and perhaps more. The local "
                "copy is whole; push it again, or use an older commit."
            )

    def _head(self) -> str:
        """The newest commit of the repository, which is there and as private as was wished."""
        if "/" not in self.name:
            self.name = f"{self._api.whoami()['name']}/{self.name}"
        try:
            info = self._api.model_info(self.name)
        except RepositoryNotFoundError:
            self._api.create_repo(self.name, private=self.private, exist_ok=True)
            info = self._api.model_info(self.name)
        self._refuse_visibility(bool(info.private))
        return str(info.sha)

    def _refuse_visibility(self, private: bool) -> None:
        if self.private and not private:
            raise ConfigError(
                f"{self.url}: is public, and a private one is wanted. Nothing was sent. Make it private in its "
                "settings, choose another, or ask for a public one: private=false, or --public."
            )
        if not self.private and private:
            raise ConfigError(
                f"{self.url}: is private, and a public one is wanted. Nothing was sent. Make it public in its "
                "settings, choose another, or set private=true."
            )
        if self.private and self._is_seen_by_strangers():
            raise ConfigError(
                f"{self.url}: is called private by the hub, and is shown to whoever asks. Nothing was sent. Choose "
                "another, or ask for a public one: private=false, or --public."
            )

    def _is_seen_by_strangers(self) -> bool:
        try:
            self._stranger.model_info(self.name)
        except HfHubHTTPError as error:
            if _status(error) in (401, 403, 404):
                return False
            raise
        return True

    def _look_into(self, files: Mapping[str, Path | bytes]) -> int:
        """The bytes of all files together. A token must not go along, wherever it got into."""
        secret, size = (self._token or "").encode(), 0
        for path, given in files.items():
            try:
                size += len(given) if isinstance(given, bytes) else given.stat().st_size
                text = b"" if path.endswith(".safetensors") else _content(given)
            except OSError as error:
                raise EnvironmentProblem(f"{given!s}: cannot be read ({error.strerror}). Nothing was sent.") from None
            if secret in text:
                raise EnvironmentProblem(f"{path}: holds your token for the hub. Nothing was sent. Take it out.")
        return size

    # --- reading ---

    def resolve(self, revision: str | None) -> str:
        """The commit that a branch, a tag or a commit stands for; none is the newest."""
        return self._tried(lambda: str(self._api.model_info(self.name, revision=revision).sha))

    def files(self, commit: str) -> list[Entry]:
        """All files of a commit."""
        return self._tried(lambda: self._listed(commit))

    def download(self, entries: Sequence[Entry], commit: str, into: Path) -> None:
        """Bring files to a folder, under the paths that they have there; an interrupted download goes on.

        Raises:
            EnvironmentProblem: if a file arrives as something else than the hub says it is.
        """
        for entry in sorted(entries, key=lambda entry: entry.size):  # what is wrong with the small ones shows early
            if not _PATH.fullmatch(entry.path):
                raise ConfigError(f"{self.url}: {entry.path[:100]!r} is no path that is taken from a repository.")
            path = into / entry.path
            if not _is_same(entry, path):
                path.unlink(missing_ok=True)
                self._tried(lambda name=entry.path: self._fetch(name, commit, into), size=entry.size)  # type: ignore[misc]
            if not _is_same(entry, path):
                raise EnvironmentProblem(
                    f"{self.url}: {entry.path} of commit {commit[:8]} did not arrive as the hub says it is. "
                    "Start again; if it stays so, take another commit."
                )

    def _fetch(self, name: str, commit: str, into: Path) -> None:
        hf_hub_download(self.name, name, revision=commit, local_dir=into, token=self._token or False)

    def _listed(self, commit: str) -> list[Entry]:
        found = self._api.list_repo_tree(self.name, recursive=True, revision=commit)
        files: list[Any] = [entry for entry in found if hasattr(entry, "blob_id")]  # the others are folders
        return [Entry(f.path, f.lfs.size if f.lfs else f.size, f.lfs and f.lfs.sha256, f.blob_id) for f in files]

    # --- how it is asked ---

    def _tried(self, question: Callable[[], T], *, size: int = 0) -> T:
        """What the hub answers, asked again while it fails in ways that pass."""
        patience = self.patience
        limit = patience.answer_seconds + size / patience.bytes_per_second
        for left in reversed(range(patience.tries)):
            try:
                with _QUIET:
                    return within(limit, question)  # the client itself would wait for ever
            except UserError:
                raise
            except FAILURES as error:
                if not left or not _may_pass(error):
                    raise self._told(error) from None  # what it holds may be a signed address
            time.sleep(patience.wait_seconds * 2 ** (patience.tries - 1 - left))
        raise AssertionError

    def _told(self, error: Exception) -> UserError:
        """One line for what the hub, or the way to it, does not allow."""
        root, status = _root(error), _status(error)
        said = quoted(_words(root))
        if isinstance(root, OfflineModeIsEnabled):
            return ConfigError(f"{self.url}: HF_HUB_OFFLINE is set, so that the hub is not asked. Unset it.")
        if status == 401 and self._token is not None:
            return ConfigError(
                f"{self.url}: the hub does not take your token ({said}). Make a new one, with write access."
            )
        if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            return ConfigError(f"{self.url}: is not there, or not for you ({said}). Check its name and your token.")
        if status in (402, 403):
            return ConfigError(f"{self.url}: your token may not do that ({said}). Give it write access, or change hub.")
        if isinstance(root, OSError) and root.filename and not isinstance(root, HfHubHTTPError):
            return EnvironmentProblem(f"{root.filename}: {root.strerror}.")
        if status is not None and status < 500 and status not in WORTH_ANOTHER_TRY:
            return EnvironmentProblem(f"{self.url}: the hub refuses this: {said}.")
        if isinstance(root, STUMBLES):
            return EnvironmentProblem(f"{self.url}: does not answer as the hub does ({said}). Check HF_ENDPOINT.")
        tries = "one try" if self.patience.tries == 1 else f"{self.patience.tries} tries"
        return Unreachable(f"{self.url}: cannot be reached, after {tries}: {said}.")


def _check_endpoint(endpoint: str) -> None:
    """A token and private files go over https, or to this very machine."""
    parts = urlsplit(endpoint)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ConfigError(f"HF_ENDPOINT is {quoted(endpoint)}, and must be an https:// address.")


def _lies_in(path: str, folders: Sequence[str]) -> bool:
    """Whether a file is in one of the folders of a repository; what the hub itself put there is in none."""
    if path in (".gitattributes", "README.md"):
        return False
    return any(folder == "" or PurePosixPath(path).is_relative_to(folder) for folder in folders)


def _is_same(entry: Entry | None, given: Path | bytes) -> bool:
    """Whether a file is what a commit lists."""
    if entry is None:
        return False
    if isinstance(given, Path):
        if not given.is_file() or given.stat().st_size != entry.size:
            return False
    elif len(given) != entry.size:
        return False
    if entry.sha256 is not None:
        return _digest(given, hashlib.sha256()) == entry.sha256
    return _digest(given, hashlib.sha1(b"blob %d\0" % entry.size)) == entry.blob


def _content(given: Path | bytes) -> bytes:
    return given if isinstance(given, bytes) else given.read_bytes()


def _digest(given: Path | bytes, digest: Any) -> str:
    if isinstance(given, bytes):
        digest.update(given)
    else:
        with given.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return str(digest.hexdigest())


def _root(error: BaseException) -> BaseException:
    """The error that an upload in another thread ended with, which the client wraps."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response = getattr(_root(error), "response", None)
    return None if response is None else int(response.status_code)


def _may_pass(error: BaseException) -> bool:
    """Whether the same may go right the next time."""
    status, root = _status(error), _root(error)
    if status is not None:
        return status >= 500 or status in WORTH_ANOTHER_TRY
    if isinstance(root, (OfflineModeIsEnabled, *STUMBLES)):
        return False
    return not (isinstance(root, OSError) and root.filename)  # of a file on this machine


def _words(error: BaseException) -> str:
    """What the hub said, if it said something, without the client's advice around it."""
    said = getattr(error, "server_message", None)
    status = _status(error)
    if said and status:
        return f"{status}, {said}"
    return str(error) or type(error).__name__


class _Quiet:
    """While any thread is inside: no progress bars of the client, and no warnings, which show signed addresses."""

    def __init__(self) -> None:
        self._lock, self._inside, self._level, self._shown = threading.Lock(), 0, logging.NOTSET, False
        self._log = logging.getLogger("huggingface_hub")

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._level, self._shown = self._log.level, not are_progress_bars_disabled()
                self._log.setLevel(logging.ERROR)
                disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._log.setLevel(self._level)
                if self._shown:
                    enable_progress_bars()


_QUIET = _Quiet()


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="eclosion-hub-") as name:
        yield Path(name)
