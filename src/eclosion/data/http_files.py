"""Files of http and https servers, with the standard library alone.

Asked without compression, so that lengths, ranges and checksums mean the file. Redirects are followed to http and
https only, and a password given for one server is not told to another. Proxies are taken from the environment
(`https_proxy`, `no_proxy`).
"""

import base64
import binascii
import email.utils
import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from email.message import Message
from functools import cache
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from urllib.error import URLError
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, UnknownHandler

from eclosion.data.places import Checksum, NotFound, Patience, Place, Transient, one_line, shown
from eclosion.errors import ConfigError, DataError, EnvironmentProblem

__all__ = ["HttpStream", "look_up"]

CHUNK = 1 << 20  # bytes
MAX_REDIRECTS = 10
# Everything that may stand in a URL; other characters are escaped.
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
REDIRECTS = frozenset({301, 302, 303, 307, 308})
WORTH_ANOTHER_TRY = frozenset({408, 425, 429})
# A server that answers these to HEAD may still answer GET: it does not know HEAD, or the URL was signed for GET.
HEAD_REFUSED = frozenset({400, 401, 403, 405, 501})

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_RANGE = re.compile(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)


def look_up(url: str, patience: Patience) -> Place:
    """Size and version of a file, without its content.

    Raises:
        NotFound: if the server says that there is no such file.
        DataError: if it does not give the file.
        Transient: if it may, the next time.
    """
    with _request(url, patience, method="HEAD") as response:
        if response.status in HEAD_REFUSED:
            return _look_up_by_range(url, patience)
        _check_status(url, response)
        return Place(url, _length(response.headers), _version(response.headers))


def _look_up_by_range(url: str, patience: Patience) -> Place:
    with _request(url, patience, headers={"Range": "bytes=0-0"}) as response:
        if response.status == 416:  # an empty file has no first byte
            return Place(url, 0, _version(response.headers))
        _check_status(url, response)
        total = _content_range(response.headers)[1] if response.status == 206 else _length(response.headers)
        return Place(url, total, _version(response.headers))


class HttpStream:
    """A file from a server, from some byte on; a `Stream`.

    A server that does not know ranges, or has another version by now, sends the file from its first byte: then
    `start` is 0.

    Args:
        url: of the file.
        start: the first byte that is wanted.
        resume_with: the validator of the version whose rest is wanted, from an earlier stream.
        patience: how long the server may be silent.

    Raises:
        NotFound: if there is no such file.
        DataError: if the server does not give it, or not as it is.
        Transient: if it may, the next time.
    """

    def __init__(self, url: str, start: int, resume_with: str, patience: Patience) -> None:
        headers = {"Range": f"bytes={start}-", "If-Range": resume_with} if start else {}
        self._patience = patience
        self._response = _request(url, patience, headers=headers)
        try:
            self._read_head(url)
        except BaseException:
            self._response.close()
            raise

    def _read_head(self, url: str) -> None:
        response = self._response
        if response.status == 416:
            raise Transient("the server refuses the rest of the file (416)", start_over=True)
        _check_status(url, response)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in {"identity", ""}:
            raise DataError(
                f"{shown(url)}: the server sends the file compressed ({one_line(encoding)}), though it was asked not "
                "to. Switch compression off for these files there."
            )
        length = _length(response.headers)
        if response.status == 206:
            self.start, self.total = _content_range(response.headers)
        else:
            self.start, self.total = 0, length
        if self.total is None and not response.chunked:
            raise DataError(
                f"{shown(url)}: the server does not say how long the file is, so that a part could not be told from "
                "the whole. Use a server that sends Content-Length."
            )
        self.versions = _versions(response.headers)
        self.resume_with = _validator(response.headers)
        self.checksum = _checksum(response.headers) if response.status == 200 else None

    def read(self) -> bytes:
        """What has come, at least one byte; b"" at the end, which may be early.

        Raises:
            Transient: if the connection broke.
        """
        try:
            return self._response.read1(CHUNK)
        except (OSError, HTTPException) as error:
            raise _failure(error, self._patience) from None

    def finish(self) -> None:
        """Nothing: the length is all there is to compare."""

    def close(self) -> None:
        """Close the connection."""
        self._response.close()

    def kill(self) -> None:
        """Nothing: a silent connection ends by its timeout."""


def _request(
    url: str, patience: Patience, *, method: str = "GET", headers: Mapping[str, str] | None = None
) -> HTTPResponse:
    """The answer to a request, whatever its status, after redirects; its body is not read yet."""
    target, login = _target(url)
    for _ in range(MAX_REDIRECTS + 1):
        request = Request(target, method=method, headers=dict(headers or {}))
        request.add_header("Accept-Encoding", "identity")
        request.add_header("User-Agent", "eclosion")
        if login:
            request.add_unredirected_header("Authorization", login)
        response = _open(request, url, patience)
        location = response.headers.get("Location")
        if response.status not in REDIRECTS or not location:
            return response
        response.close()
        before = target
        target, other_login = _redirected(url, before, location)
        login = other_login or (login if _server(before) == _server(target) else "")
    raise DataError(f"{shown(url)}: the server redirects more than {MAX_REDIRECTS} times. Give the final URL.")


def _open(request: Request, url: str, patience: Patience) -> HTTPResponse:
    opener = OpenerDirector()  # without the handlers that follow redirects and raise for a status
    secure = HTTPSHandler(context=_tls()) if request.type == "https" else HTTPHandler()
    for handler in (ProxyHandler(), UnknownHandler(), secure):
        opener.add_handler(handler)
    try:
        response = opener.open(request, timeout=patience.timeout_seconds)
    except (ssl.CertificateError, ssl.SSLCertVerificationError) as error:
        raise _untrusted(url, error) from None
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _untrusted(url, reason) from None
        if isinstance(reason, socket.gaierror) and reason.errno in {socket.EAI_NONAME, socket.EAI_NODATA}:
            raise EnvironmentProblem(
                f"{shown(url)}: the server's name is not known. Check its spelling and the network."
            ) from None
        raise _failure(reason, patience) from None
    except (ValueError, UnicodeError):  # from the depths of urllib: their texts hold the URL
        raise ConfigError(f"{shown(url)}: is not a URL that can be asked for. Check it.") from None
    assert isinstance(response, HTTPResponse)
    return response


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads all certificates of the machine: once is enough


def _target(url: str) -> tuple[str, str]:
    """The URL to ask for, without user and password, and the header that has them instead."""
    try:
        parts = urlsplit(url)
        user, password, host, _ = parts.username, parts.password, parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise ConfigError(f"{shown(url)}: is not a URL with the name of a server. Write https://server/path.")
    login = ""
    if user is not None:
        pair = f"{unquote(user)}:{unquote(password or '')}".encode()
        login = f"Basic {base64.b64encode(pair).decode()}"
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")
    return quote(bare.geturl(), safe=URL_CHARACTERS), login


def _redirected(url: str, before: str, location: str) -> tuple[str, str]:
    try:
        to = urljoin(before, location)
        schemes = urlsplit(before).scheme, urlsplit(to).scheme
        if schemes[1] in {"http", "https"} and schemes != ("https", "http"):
            return _target(to)
    except (ValueError, ConfigError):
        pass
    raise DataError(
        f"{shown(url)}: the server redirects to something that is no http or https URL, or from https to http. "
        "Give another URL."
    )


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _failure(error: object, patience: Patience) -> Transient:
    """What went wrong, in our words: those of the library may hold the URL."""
    if isinstance(error, TimeoutError):
        return Transient(f"the server was silent for {patience.timeout_seconds:g} s")
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return Transient("the server closed the connection")
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return Transient(f"the connection failed ({error.strerror.lower()})")
    return Transient(f"the connection failed ({type(error).__name__})")


def _untrusted(url: str, error: ssl.SSLError) -> EnvironmentProblem:
    why = getattr(error, "verify_message", "") or "verification failed"
    return EnvironmentProblem(f"{shown(url)}: the server's certificate is not trusted ({why}).")


def _check_status(url: str, response: HTTPResponse) -> None:
    """Raise what a status means, unless it is 200 or 206."""
    status = response.status
    if status in {200, 206}:
        return
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
    said = f"{status} {phrase}"
    response.close()
    if status in WORTH_ANOTHER_TRY or status >= 500:
        raise Transient(f"the server answers {said}", retry_after_seconds=_retry_after(response.headers))
    if status in {404, 410}:
        raise NotFound(f"{shown(url)}: does not exist ({said}).")
    if status in {401, 403, 407}:
        raise DataError(
            f"{shown(url)}: may not be read ({said}). Check the URL's password, token or signature, which may be over."
        )
    raise DataError(f"{shown(url)}: the server does not give the file ({said}).")


def _retry_after(headers: Message) -> float:
    """Seconds that the server asks to wait: a number, or the time of day when it is over."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _length(headers: Message) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def _content_range(headers: Message) -> tuple[int, int | None]:
    """The first byte of a partial answer, and the size of the whole."""
    match = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if match is None:
        raise Transient("the server sends a part and does not say which")
    return int(match[1]), None if match[3] == "*" else int(match[3])


def _versions(headers: Message) -> tuple[str, ...]:
    # W/ says that the bytes may differ in what does not matter, and in front of files everything matters:
    # servers add it for reasons of their own, and not the same for HEAD and GET
    etag = headers.get("ETag", "").strip().removeprefix("W/")
    modified = headers.get("Last-Modified", "").strip()
    return tuple(f"{kind} {value}" for kind, value in (("etag", etag), ("modified", modified)) if value)


def _version(headers: Message) -> str:
    return next(iter(_versions(headers)), "")


def _validator(headers: Message) -> str:
    """What makes sure that a rest belongs to the same version: RFC 9110, section 13.1.5."""
    etag = headers.get("ETag", "").strip()
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "").strip()


def _checksum(headers: Message) -> Checksum | None:
    """The hash of the whole file, from Content-MD5, from Google's x-goog-hash, or from the ETag of an S3 server."""
    google = ",".join(headers.get_all("x-goog-hash", []))
    stated = headers.get("Content-MD5") or next(
        (item.strip()[4:] for item in google.split(",") if item.strip().startswith("md5=")), None
    )
    if stated:
        with suppress(binascii.Error, ValueError):
            if len(digest := base64.b64decode(stated.strip(), validate=True)) == 16:
                return Checksum("md5", digest.hex(), certain=True)
    is_s3 = "x-amz-request-id" in headers or "amazons3" in headers.get("Server", "").lower()
    etag = _MD5.fullmatch(headers.get("ETag", "").strip())
    return Checksum("md5", etag[1], certain=False) if is_s3 and etag else None
