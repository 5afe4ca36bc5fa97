"""The one redactor: text as it may be shown, logged, kept and sent, without what may be a secret.

A URL may hold a password, a token or a signature; a command may be given one; a library's error may repeat the header
or the key that it was given. `shown` is for a URL of ours, `quoted` for somebody else's words in a message, `cleaned`
for any text on its way out. Besides what looks like a secret, `cleaned` takes out the secrets that this process has:
see `known_secrets`.
"""

import netrc
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TextIO
from urllib.parse import quote, unquote, urlsplit

from eclosion.errors import printable

__all__ = [
    "CleanedStream",
    "bare",
    "cleaned",
    "holds_token",
    "known_secrets",
    "one_line",
    "quoted",
    "remember",
    "remember_url",
    "scheme_of",
    "shown",
]

# Characters of somebody else's text that a message takes over, and that are looked at for it.
MAX_QUOTED, MAX_LOOKED_AT = 200, 1 << 16
# Shorter texts are words that may stand anywhere.
MIN_SECRET = 8
# Shorter secrets may stand in a config by chance.
MIN_TOKEN = 20
GONE = "..."
# Protocols in whose URLs "@" is no password's end: abfs://container@account, github://org:repo@branch.
AT_IN_NAMES = frozenset({"abfs", "abfss", "adl", "git", "github", "hf", "wasb", "wasbs"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# In text, punctuation may follow.
_HOST = re.compile(r"([\w.~%-]*(:\d*)?|\[[0-9A-Fa-f:.]+\](:\d*)?)[),;:]*")
# The character before keeps the search linear in long words. A path made of a URL has lost a slash.
_URL_IN_TEXT = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*):(//?)([^\s'\"<>]*)")
_FILE_IN_COMMAND = re.compile(r"[\w./~+%@-]+\.(tar|tgz|npy|gz|bz2|xz|zst|lz4|zip|json|sh|py)")
_PROGRAM = re.compile(r"[\w./+-]+")
# In the path of a URL that holds another.
_USER_INSIDE = re.compile(r"(?<=:/)(/?)[^/]*@")
# Variables whose values are secrets; but for the path of one, or a short word, as of SORT_KEY.
_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CONNECTION_STRING)$", re.IGNORECASE)
_NO_SECRET = re.compile(r"[/~.].*|[a-z_-]{1,12}|[A-Z_-]{1,12}", re.DOTALL)
# What services call their tokens.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])((hf|api|api_org)_[A-Za-z0-9]{24,}|wandb_v\d_\w{16,}|gh[a-z]_\w{20,}|github_pat_\w{20,})"
)
# Where libraries show what they were given: a query without its URL, a header, a setting.
_QUERY = re.compile(r"(?<=[\w/.~%-])\?[\w.%~\[\]-]+=[^\s'\"<>]*")
_HEADER = re.compile(
    r"(authorization(\s*[:=]|['\"]\s*[:,])\s*b?['\"]?([a-z]+\s+)?|\bbearer\s+)[^\s'\",;)}\]]{8,}", re.IGNORECASE
)
_SETTING = re.compile(
    r"((?<![\w-])[\w-]*?(token|secret|passw(or)?d|api[_-]?key|access[_-]?key|account[_-]?key|signature)"
    r"(\s*=\s*['\"]?|['\"]:\s*b?['\"]))[^\s'\",;&)}\]]{4,}",
    re.IGNORECASE,
)

_remembered: set[str] = set()
_of_urls: set[str] = set()  # may be words that stand elsewhere too


# --- URLs and commands -----------------------------------------------------------------------------------------------


def scheme_of(url: str) -> str:
    """The protocol of a URL in lower case, "pipe" for a command, "" for a plain path."""
    if url.startswith("pipe:"):
        return "pipe"
    match = _SCHEME.match(url)
    return match[1].lower() if match else ""


def shown(url: str) -> str:
    """A URL for messages: without user, password, query and fragment; of a command, its program and what it reads."""
    scheme = scheme_of(url)
    if scheme == "pipe":
        return one_line(_shown_command(url), limit=500)
    return one_line(_bare(*_parts(url)) if scheme else bare(url), limit=4096)


def bare(text: str) -> str:
    """Text whose URLs have no user, password, query and fragment."""
    return _URL_IN_TEXT.sub(lambda match: _bare(match[1], match[2], match[3]), text)


def _parts(url: str) -> tuple[str, str, str]:
    scheme, slashes, rest = url.partition("://")
    return scheme, slashes[1:], rest


def _bare(scheme: str, slashes: str, rest: str) -> str:
    if len(slashes) == 1 and not (len(scheme) > 1 and re.match(r"[^/]*@|[^?#]*[?#]", rest)):
        return f"{scheme}:{slashes}{rest}"  # a path
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    if scheme.lower() not in AT_IN_NAMES:
        host = host.rpartition("@")[2]
        if not _HOST.fullmatch(host):  # such as half of a password that has a slash in it
            return f"{scheme}:{slashes}{GONE}"
    return f"{scheme}:{slashes}{host}{slash}" + _USER_INSIDE.sub(r"\1", path)


def _shown_command(url: str) -> str:
    """The program and the files and URLs that it is given; whatever else it is given may be a token."""
    words = re.split(r"[\s'\"|<>;&()]+", url.removeprefix("pipe:").strip())
    kept = [words[0].rpartition("/")[2] if _PROGRAM.fullmatch(words[0]) else GONE]
    for word in words[1:]:
        if scheme_of(word) not in {"", "pipe"}:
            kept.append(_bare(*_parts(word)))
        elif _FILE_IN_COMMAND.fullmatch(word):
            kept.append(word)
        elif kept[-1] != GONE:
            kept.append(GONE)
    return "pipe:" + " ".join(kept)


# --- any text --------------------------------------------------------------------------------------------------------


def one_line(text: str, *, limit: int = MAX_QUOTED) -> str:
    """Text as one line of printable characters, cut after `limit` of them."""
    return printable(text[:limit]) + ("..." if len(text) > limit else "")


def quoted(text: str) -> str:
    """What a library or a program says, on one line, without secrets, and not for long."""
    return one_line(" ".join(cleaned(text[:MAX_LOOKED_AT]).split())).rstrip(".")


def cleaned(text: str) -> str:
    """Text without the secrets that this process has, and without what looks like one; else as it is."""
    for secret in sorted(known_secrets(), key=len, reverse=True):  # one may hold another
        if secret in text:
            text = text.replace(secret, GONE)
    text = _QUERY.sub("", bare(text))
    text = _HEADER.sub(rf"\1{GONE}", text)
    text = _SETTING.sub(rf"\1{GONE}", text)
    return _TOKEN.sub(GONE, text)


def holds_token(text: str) -> bool:
    """Whether a token stands in a text outside the secret parts of URLs: one by its looks, or one that we have."""
    seen = shown(text)
    known = known_secrets() - _of_urls
    return bool(_TOKEN.search(seen)) or any(secret in seen for secret in known if len(secret) >= MIN_TOKEN)


class CleanedStream:
    """A stream that takes text and passes it on `cleaned`; else the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass text on."""
        self._stream.write(cleaned(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Pass lines on."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# --- the secrets of this process -------------------------------------------------------------------------------------


def known_secrets() -> set[str]:
    """The secrets that this process has, as they may come back in the words of others.

    The values of variables of the environment that are called tokens, keys, secrets or passwords; passwords in URLs of
    the environment, such as a proxy's; those of ~/.netrc; and whatever was told to `remember`.
    """
    found = _remembered | _of_urls | _in_netrc()
    for name, value in os.environ.items():
        if "://" in value:
            found.update(_in_url(value))
        if _SECRET_VARIABLE.search(name) and not _NO_SECRET.fullmatch(value):
            found.add(value.strip())
    found = {secret for secret in found if len(secret) >= MIN_SECRET}
    return found | {form for secret in found for form in (quote(secret, safe=""), repr(secret)[1:-1])}


def remember(secret: str) -> None:
    """Take out a secret wherever it comes back: the content of a file with a token."""
    _remembered.add(secret)


def remember_url(text: str) -> None:
    """Take out what is secret in a URL wherever it comes back, whatever stands around it then."""
    if "://" in text:
        _of_urls.update(_in_url(text))


def _in_url(url: str) -> Iterator[str]:
    """User, password, and those values of the query that are long and more than words."""
    try:
        parts = urlsplit(url.strip())
        names = [parts.password or parts.username or ""]
    except ValueError:
        return
    if parts.scheme.lower() in AT_IN_NAMES:
        names = []
    values = [pair.partition("=")[2] for pair in parts.query.split("&")] + [parts.fragment]
    for secret in (*names, *(value for value in values if not re.fullmatch(r"[A-Za-z_./{}-]*|.{,15}", value))):
        yield from {secret, unquote(secret)}


@cache
def _in_netrc() -> frozenset[str]:
    try:
        hosts: Mapping[str, tuple[str, str | None, str | None]] = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError, UnicodeError):
        return frozenset()
    return frozenset(password for _, _, password in hosts.values() if password)
