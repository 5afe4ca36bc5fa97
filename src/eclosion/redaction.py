"""URLs and commands as they may be shown, logged and kept: without what may be a secret.

A URL may hold a password, a token or a signature; a command may be given one.
"""

import re

from eclosion.errors import printable

__all__ = ["one_line", "quoted", "scheme_of", "shown"]

# Characters of somebody else's text that a message takes over.
MAX_QUOTED = 200
# Protocols in whose URLs "@" is no password's end: abfs://container@account, github://org:repo@branch.
AT_IN_NAMES = frozenset({"abfs", "abfss", "adl", "git", "github", "hf", "wasb", "wasbs"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = re.compile(r"[\w.~%-]*(:\d*)?|\[[0-9A-Fa-f:.]+\](:\d*)?")
# The character before keeps the search linear in long words.
_URL_IN_TEXT = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")
_FILE_IN_COMMAND = re.compile(r"[\w./~+%@-]+\.(tar|tgz|npy|gz|bz2|xz|zst|lz4|zip|json|sh|py)")
_PROGRAM = re.compile(r"[\w./+-]+")


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
    return one_line(_bare(url) if scheme else url, limit=4096)


def one_line(text: str, *, limit: int = MAX_QUOTED) -> str:
    """Text as one line of printable characters, cut after `limit` of them."""
    return printable(text[:limit]) + ("..." if len(text) > limit else "")


def quoted(text: str) -> str:
    """What a library or a program says, on one line, without passwords and queries in URLs, and not for long."""
    words = " ".join(text[: 8 * MAX_QUOTED].split())
    return one_line(_URL_IN_TEXT.sub(lambda match: _bare(match[0]), words)).rstrip(".")


def _bare(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    if scheme.lower() not in AT_IN_NAMES:
        host = host.rpartition("@")[2]
        if not _HOST.fullmatch(host):  # such as half of a password that has a slash in it
            return f"{scheme}://..."
    return f"{scheme}://{host}{slash}{path}"


def _shown_command(url: str) -> str:
    """The program and the files and URLs that it is given; whatever else it is given may be a token."""
    words = re.split(r"[\s'\"|<>;&()]+", url.removeprefix("pipe:").strip())
    kept = [words[0].rpartition("/")[2] if _PROGRAM.fullmatch(words[0]) else "..."]
    for word in words[1:]:
        if scheme_of(word) not in {"", "pipe"}:
            kept.append(_bare(word))
        elif _FILE_IN_COMMAND.fullmatch(word):
            kept.append(word)
        elif kept[-1] != "...":
            kept.append("...")
    return "pipe:" + " ".join(kept)
