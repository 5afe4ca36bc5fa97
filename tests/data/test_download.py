"""Files from servers that fail in every way: the bytes are those of the file, or the error says what happened."""

import base64
import errno
import hashlib
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eclosion.data.download import download
from eclosion.data.places import NotFound, Patience, Place, Stopped
from eclosion.data.remote import stat
from eclosion.errors import DataError, EnvironmentProblem

DATA = random.Random(0).randbytes(400_000)
OTHER = random.Random(1).randbytes(400_000)
SECRET = "hunter2-s3cr3t"
QUICK = Patience(
    deadline_seconds=10.0,
    first_wait_seconds=0.01,
    max_wait_seconds=0.05,
    timeout_seconds=0.5,
    window_seconds=0.25,
    min_bytes_per_second=20_000,
)
SOON_OVER = replace(QUICK, deadline_seconds=0.3)


class _Handler(BaseHTTPRequestHandler):
    """Serves `server.data` with ETags and ranges, after what the first function in `server.faults` does."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server = self.server
        server.requests.append((self.command, self.path, dict(self.headers)))
        if with_body and server.faults:
            fault = server.faults.pop(0) if len(server.faults) > 1 or not server.for_ever else server.faults[0]
            if fault is not None:
                return fault(self)
        return self.serve(with_body=with_body)

    def serve(self, with_body=True, length=None, total=None, **headers):
        start, total = self.first_byte(), total or len(self.server.data)
        body = self.server.data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if length != "none":
            self.send_header("Content-Length", length or str(len(body)))
        for name, value in (self.server.headers | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def first_byte(self):
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in {self.server.headers.get(k) for k in ("ETag", "Last-Modified")}
        return int(match[1]) if match and same else 0

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 64  # with less, some wait a second to be let in

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/shards/00000.tar"
        self.data, self.headers = DATA, {"ETag": '"one"', "Last-Modified": formatdate(1, usegmt=True)}
        self.faults, self.for_ever, self.requests = [], False, []
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        pass

    def ranges(self):
        return [headers.get("Range") for method, _, headers in self.requests if method == "GET"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def status(code, **headers):
    def fault(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "5")
        handler.end_headers()
        handler.wfile.write(b"sorry")

    return fault


def cut(num_bytes, *, reset=False):
    """The head of the whole, and some bytes of the body."""

    def fault(handler):
        start = handler.first_byte()
        handler.server.data, whole = handler.server.data[: start + num_bytes], handler.server.data
        handler.serve(length=str(len(whole) - start), total=len(whole))
        handler.server.data = whole
        hang_up(handler, reset=reset)

    return fault


def cut_without_length(num_bytes):
    def fault(handler):
        handler.server.data, whole = handler.server.data[:num_bytes], handler.server.data
        handler.serve(length="none")
        handler.server.data = whole

    return fault


def hang_up(handler, *, reset):
    handler.wfile.flush()
    if reset:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()


def silence(handler):
    handler.server.over.wait(20)


def trickle(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(DATA)))
    handler.end_headers()
    drip(handler)


def trickle_head(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    drip(handler)


def drip(handler):
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"x")


def ignore_range(handler):
    del handler.headers["Range"]
    handler.serve()


def wrong_range(handler):
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 5-14/{len(DATA)}")
    handler.send_header("ETag", '"one"')
    handler.end_headers()
    handler.wfile.write(DATA[5:15])


def change(handler):
    handler.server.data, handler.server.headers = OTHER, {"ETag": '"two"'}
    handler.serve()


def garbage(handler):
    handler.wfile.write(os.urandom(1000) + b"\r\n\r\n")


def chunked(num_bytes):
    def fault(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (1000, DATA[:1000]))
        rest = DATA[1000:]
        handler.wfile.write(b"%x\r\n%s" % (len(rest), rest[:num_bytes]))
        if num_bytes >= len(rest):
            handler.wfile.write(b"\r\n0\r\n\r\n")

    return fault


def fetch(server, to, *, patience=QUICK, **place):
    given = {"size": len(DATA), "version": 'etag "one"'} | place
    return download(Place(server.url, **given), to, patience=patience)


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        pytest.param([], [None], id="none"),
        pytest.param([status(500)] * 3, [None] * 4, id="500"),
        pytest.param([status(503), status(502), status(504), status(408)], [None] * 5, id="others"),
        pytest.param([garbage, garbage], [None] * 3, id="garbage"),
        pytest.param([cut(0)], [None] * 2, id="no body"),
        pytest.param([cut(150_000)], [None, "bytes=150000-"], id="short body"),
        pytest.param([cut(150_000), cut(100_000)], [None, "bytes=150000-", "bytes=250000-"], id="short bodies"),
        pytest.param([silence], [None] * 2, id="silence"),
        pytest.param([trickle], [None] * 2, id="trickle"),
        pytest.param([trickle_head], [None] * 2, id="trickling head"),
        pytest.param([cut(150_000), ignore_range], [None, "bytes=150000-"], id="range ignored"),
        pytest.param([cut(150_000), wrong_range], [None, "bytes=150000-", None], id="wrong range"),
        pytest.param([cut(150_000), status(416)], [None, "bytes=150000-", None], id="416"),
        pytest.param([cut(150_000), status(500), cut(1)], [None, *["bytes=150000-"] * 2, "bytes=150001-"], id="mixed"),
        pytest.param([chunked(10), chunked(10**9)], [None, None], id="chunked"),
    ],
)
def test_a_server_that_fails_and_recovers_gives_the_file(server, tmp_path, faults, ranges):
    server.faults = list(faults)
    fetched = fetch(server, tmp_path / "0.tar")
    assert (tmp_path / "0.tar").read_bytes() == DATA
    assert (fetched.size, fetched.version) == (len(DATA), 'etag "one"')
    assert server.ranges() == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_a_connection_that_is_reset_goes_on_where_it_was(server, tmp_path):
    server.faults = [cut(150_000, reset=True), cut(100_000, reset=True)]
    fetch(server, tmp_path / "0.tar")
    assert (tmp_path / "0.tar").read_bytes() == DATA
    assert len(server.ranges()) == 3


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_order_of_faults_the_bytes_are_those_of_the_file(server, tmp_path, seed):
    rng = random.Random(seed)
    kinds = [
        lambda: status(rng.choice([500, 503, 429, 416])),
        lambda: cut(rng.randrange(120_000)),
        lambda: cut(rng.randrange(120_000), reset=True),
        lambda: chunked(rng.randrange(120_000)),
        lambda: ignore_range,
        lambda: wrong_range,
        lambda: garbage,
    ]
    server.faults = [rng.choice(kinds)() for _ in range(8)]
    for number in range(2):
        fetch(server, tmp_path / f"{number}.tar")
        assert (tmp_path / f"{number}.tar").read_bytes() == DATA


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (status(500), EnvironmentProblem, r"the server answers 500 Internal Server Error \(\d+ tries in 0 s\)"),
        (status(599), EnvironmentProblem, "the server answers 599 unknown status"),
        (cut(10), EnvironmentProblem, r"the file ends after \d+ of 400000 bytes"),
        (cut(10, reset=True), EnvironmentProblem, "closed the connection|ends after"),
        (silence, EnvironmentProblem, "came in|was silent"),
        (trickle, EnvironmentProblem, "bytes came in"),
        (trickle_head, EnvironmentProblem, "0 bytes came in"),
        (garbage, EnvironmentProblem, "the connection failed"),
        (chunked(10), EnvironmentProblem, "the connection failed"),
        (cut_without_length(10), DataError, "does not say how long"),
        (status(404), NotFound, "does not exist .404 Not Found"),
        (status(410), NotFound, "does not exist .410 Gone"),
        (status(403), DataError, "may not be read .403 Forbidden"),
        (status(401), DataError, "may not be read .401 Unauthorized"),
        (status(400), DataError, "does not give the file .400 Bad Request"),
        (status(302, Location="file:///etc/passwd"), DataError, "no http or https URL"),
        (status(302, Location="https:///x"), DataError, "no http or https URL"),
        (status(304), DataError, "does not give the file .304"),
        (lambda handler: handler.serve(Content_Encoding="gzip"), DataError, "sends the file compressed .gzip"),
        (change, DataError, "the file changed after this run had looked at it"),
    ],
)
def test_a_server_that_goes_on_failing_is_an_error_with_its_name_in_good_time(server, tmp_path, fault, kind, message):
    server.faults, server.for_ever = [fault], True
    server.url = server.url.replace("http://", f"http://user:{SECRET}@") + f"?token={SECRET}"
    start = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        fetch(server, tmp_path / "0.tar", patience=SOON_OVER)
    assert time.monotonic() - start < 4
    assert str(caught.value).startswith(f"http://127.0.0.1:{server.server_port}/shards/00000.tar: ")
    assert SECRET not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    if kind is not EnvironmentProblem:
        assert len(server.requests) == 1


def test_the_deadline_begins_anew_while_a_file_gets_further(server, tmp_path):
    server.faults = [cut(20_000) for _ in range(30)]
    patience = Patience(deadline_seconds=0.5, first_wait_seconds=0.05, max_wait_seconds=0.05, window_seconds=0.5)
    start = time.monotonic()
    fetch(server, tmp_path / "0.tar", patience=patience)
    assert time.monotonic() - start > 0.5
    assert (tmp_path / "0.tar").read_bytes() == DATA


@pytest.mark.parametrize("when", ["seconds", "date"])
def test_a_busy_server_is_given_the_time_that_it_asks_for(server, tmp_path, when):
    wait = "1" if when == "seconds" else formatdate(time.time() + 1.9, usegmt=True)  # in whole seconds
    server.faults = [status(429, Retry_After=wait)]
    start = time.monotonic()
    fetch(server, tmp_path / "0.tar", patience=Patience(deadline_seconds=5, first_wait_seconds=0.01))
    assert 0.9 < time.monotonic() - start < 3
    assert (tmp_path / "0.tar").read_bytes() == DATA


def test_a_server_that_asks_for_more_time_than_there_is_is_not_waited_for(server, tmp_path):
    server.faults = [status(429, Retry_After="3600")]
    start = time.monotonic()
    with pytest.raises(
        EnvironmentProblem, match=r"429 Too Many Requests .1 try in 0 s, and the server asks to wait 3600 s"
    ):
        fetch(server, tmp_path / "0.tar")
    assert time.monotonic() - start < 0.5


def test_a_file_that_changes_between_two_tries_is_never_a_mixture(server, tmp_path):
    server.faults = [cut(150_000), change]
    with pytest.raises(DataError, match="changed after this run had looked at it"):
        fetch(server, tmp_path / "0.tar")
    server.data, server.headers = DATA, {"ETag": '"one"'}
    server.faults = [cut(150_000), change]
    fetched = fetch(server, tmp_path / "0.tar", version="", size=None)  # nobody had looked
    assert (tmp_path / "0.tar").read_bytes() == OTHER
    assert fetched.version == 'etag "two"'


def test_the_rest_of_another_version_is_not_put_behind_the_first(server, tmp_path):
    def rest_of_another(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 150000-399999/{len(OTHER)}")
        handler.send_header("ETag", '"two"')
        handler.end_headers()
        handler.wfile.write(OTHER[150_000:])

    server.faults = [cut(150_000), rest_of_another]
    fetch(server, tmp_path / "0.tar", version="")
    assert (tmp_path / "0.tar").read_bytes() == DATA
    assert server.ranges() == [None, "bytes=150000-", None]


def test_without_a_version_a_file_is_fetched_anew_and_not_resumed(server, tmp_path):
    server.headers, server.faults = {}, [cut(150_000)]
    fetch(server, tmp_path / "0.tar", version="")
    assert server.ranges() == [None, None]
    server.headers, server.faults, server.requests = {"ETag": 'W/"one"'}, [cut(150_000)], []
    fetch(server, tmp_path / "0.tar")
    assert server.ranges() == [None, None]
    server.headers, server.faults, server.requests = {"Last-Modified": formatdate(1, usegmt=True)}, [cut(150_000)], []
    fetch(server, tmp_path / "0.tar", version="")
    assert server.ranges() == [None, "bytes=150000-"]


def md5(data):
    return hashlib.md5(data, usedforsecurity=False)


@pytest.mark.parametrize(
    "header",
    [
        {"Content-MD5": base64.b64encode(md5(DATA).digest()).decode()},
        {"x-goog-hash": f"crc32c=AAAAAA==, md5={base64.b64encode(md5(DATA).digest()).decode()}"},
        {"ETag": f'"{md5(DATA).hexdigest()}"', "x-amz-request-id": "1"},
    ],
)
def test_a_flipped_bit_is_seen_where_the_store_has_a_hash(server, tmp_path, header):
    server.headers |= header

    def flip(handler):
        handler.server.data = DATA[:9] + bytes([DATA[9] ^ 1]) + DATA[10:]
        handler.serve()
        handler.server.data = DATA

    server.faults = [flip, cut(150_000)]
    fetch(server, tmp_path / "0.tar", version="")
    assert (tmp_path / "0.tar").read_bytes() == DATA
    assert server.ranges() == [None, None, "bytes=150000-"]
    server.data = DATA[:-1] + b"!"
    if "ETag" in header:  # the same bytes twice: the store's tag is no hash of them
        fetch(server, tmp_path / "0.tar", version="")
        assert (tmp_path / "0.tar").read_bytes() == server.data
        server.requests = []
        fetch(server, tmp_path / "0.tar", version="")
        assert len(server.requests) == 1
    else:
        with pytest.raises(DataError, match=r"the content has md5 .*, and the store says"):
            fetch(server, tmp_path / "0.tar", version="")


def test_redirects_are_followed_for_ten_steps_and_passwords_stay_with_their_server(server, tmp_path):
    with _Server() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,))
        thread.start()
        server.faults = [status(302, Location="/a"), status(307, Location="b"), status(301, Location=other.url)]
        server.url = server.url.replace("http://", f"http://user:{SECRET}@")
        fetch(server, tmp_path / "0.tar")
        other.shutdown()
        thread.join()
    assert (tmp_path / "0.tar").read_bytes() == DATA
    login = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert [(path, headers.get("Authorization")) for _, path, headers in server.requests] == [
        ("/shards/00000.tar", login),
        ("/a", login),
        ("/b", login),
    ]
    assert [headers.get("Authorization") for _, _, headers in other.requests] == [None]
    server.faults, server.for_ever, server.requests = [status(302, Location="/again")], True, []
    with pytest.raises(DataError, match="redirects more than 10 times"):
        fetch(server, tmp_path / "0.tar")
    assert len(server.requests) == 11


def test_what_is_not_wanted_any_more_ends_at_once(server, tmp_path):
    server.faults = [silence]
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        download(Place(server.url, None, ""), tmp_path / "0.tar", stop=stop)
    assert time.monotonic() - start < 1
    assert list(tmp_path.iterdir()) == []


def test_a_wait_between_tries_ends_when_the_file_is_not_wanted_any_more(server, tmp_path):
    server.faults, server.for_ever = [status(503, Retry_After="60")], True
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        download(Place(server.url, None, ""), tmp_path / "0.tar", stop=stop)


def test_more_bytes_than_are_wanted_are_not_taken(server, tmp_path):
    with pytest.raises(DataError, match="has more than 399999 bytes"):
        download(Place(server.url, None, ""), tmp_path / "0.tar", max_bytes=399_999)
    download(Place(server.url, None, ""), tmp_path / "0.tar", max_bytes=400_000)
    assert (tmp_path / "0.tar").read_bytes() == DATA


def test_a_full_disk_is_named_before_the_first_byte_with_what_is_needed_and_what_is_free(server, tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 100, 1000

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(EnvironmentProblem, match=r"No space left on device.*needs 0.4 MB, and 0.1 MB are free there"):
        fetch(server, tmp_path / "0.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_it_is_written_to_is_named_and_nothing_stays(server, tmp_path, monkeypatch):
    def pwrite(fd, data, offset):
        if offset > 100_000:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(fd, data[:65_536], offset)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(EnvironmentProblem, match=r"cannot be written .Disk quota exceeded.*needs 0.4 MB") as caught:
        fetch(server, tmp_path / "0.tar")
    assert str(caught.value).startswith(f"{tmp_path}/0.tar.partial-")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EnvironmentProblem, match=r"cannot be written .No such file"):
        fetch(server, tmp_path / "nowhere" / "0.tar")


def test_a_limit_of_the_system_on_file_sizes_is_an_error_like_a_full_disk(server, tmp_path):
    code = f"""
import resource, sys
from pathlib import Path
from eclosion.data.download import download
from eclosion.data.places import Place
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    download(Place({server.url!r}, 400_000, ""), Path({str(tmp_path)!r}) / "0.tar")
except Exception as error:
    print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("EnvironmentProblem")
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_a_local_file_is_copied_and_its_change_is_seen(tmp_path):
    source = tmp_path / "a b.tar"
    source.write_bytes(DATA)
    place = stat(source.as_uri())
    assert download(place, tmp_path / "copy") == place
    assert (tmp_path / "copy").read_bytes() == DATA
    source.write_bytes(OTHER)
    os.utime(source, ns=(1, 1))
    with pytest.raises(DataError, match="changed after this run had looked at it"):
        download(place, tmp_path / "copy2")
    source.unlink()
    with pytest.raises(NotFound):
        download(place, tmp_path / "copy2")


# --- gone on with by the next process --------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def broken_off(server, tmp_path, num_bytes=250_000):
    """What a download leaves whose server goes away."""
    server.faults, server.for_ever = [cut(num_bytes), status(503)], True
    with pytest.raises(EnvironmentProblem):
        download(stat(server.url), tmp_path / "0.tar", patience=SOON_OVER, resume=True)
    assert names(tmp_path) == ["0.tar.partial", "0.tar.partial.json"]
    server.faults, server.for_ever = [], False
    server.requests.clear()


def test_what_a_failure_left_is_gone_on_with_when_asked(server, tmp_path):
    broken_off(server, tmp_path)
    assert SECRET not in (tmp_path / "0.tar.partial.json").read_text()
    download(stat(server.url), tmp_path / "0.tar", resume=True)
    assert server.ranges() == ["bytes=250000-"]
    assert (tmp_path / "0.tar").read_bytes() == DATA
    assert names(tmp_path) == ["0.tar"]


def test_what_is_left_of_another_version_is_not_gone_on_with(server, tmp_path):
    broken_off(server, tmp_path)
    server.data, server.headers = OTHER, {"ETag": '"two"'}
    download(stat(server.url), tmp_path / "0.tar", resume=True)
    assert server.ranges() == [None]
    assert (tmp_path / "0.tar").read_bytes() == OTHER


def test_a_checksum_covers_what_another_process_fetched(server, tmp_path):
    server.headers = {"ETag": f'"{hashlib.md5(DATA).hexdigest()}"', "x-amz-request-id": "1"}
    broken_off(server, tmp_path)
    raw = bytearray((tmp_path / "0.tar.partial").read_bytes())
    raw[1000] ^= 1
    (tmp_path / "0.tar.partial").write_bytes(raw)
    download(stat(server.url), tmp_path / "0.tar", patience=QUICK, resume=True)
    assert (tmp_path / "0.tar").read_bytes() == DATA


@pytest.mark.parametrize("journal", [None, b"", b"[]", b'{"position": 10}', b"[" * 50_000])
def test_without_a_word_of_what_is_durable_nothing_is_believed(journal, server, tmp_path):
    broken_off(server, tmp_path)
    path = tmp_path / "0.tar.partial.json"
    path.unlink() if journal is None else path.write_bytes(journal)
    (tmp_path / "0.tar.partial").write_bytes(bytes(500_000))
    download(stat(server.url), tmp_path / "0.tar", resume=True)
    assert server.ranges() == [None]
    assert (tmp_path / "0.tar").read_bytes() == DATA


def test_a_file_that_had_come_whole_before_a_kill_needs_only_its_last_byte(server, tmp_path):
    broken_off(server, tmp_path, num_bytes=399_999)
    (tmp_path / "0.tar.partial").write_bytes(DATA)
    left = tmp_path / "0.tar.partial.json"
    left.write_text(left.read_text().replace("399999", "400000"))
    download(stat(server.url), tmp_path / "0.tar", resume=True)
    assert server.ranges() == ["bytes=399999-"]
    assert (tmp_path / "0.tar").read_bytes() == DATA


def stall(num_bytes):
    def fault(handler):
        handler.serve(with_body=False)
        handler.wfile.write(DATA[:num_bytes])
        handler.wfile.flush()
        silence(handler)

    return fault


def test_a_killed_download_loses_at_most_what_came_since_the_last_word(server, tmp_path):
    server.faults = [stall(300_000)]
    code = f"""
from pathlib import Path
from eclosion.data import download as module
from eclosion.data.remote import stat
module.KEPT_EVERY = 50_000
module.download(stat({server.url!r}), Path({str(tmp_path)!r}) / "0.tar", resume=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(3000):
        part = tmp_path / "0.tar.partial"
        if part.exists() and part.stat().st_size >= 300_000:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    server.requests.clear()
    download(stat(server.url), tmp_path / "0.tar", resume=True)
    [asked] = server.ranges()
    assert 50_000 <= int(asked.removeprefix("bytes=").removesuffix("-")) <= 300_000
    assert (tmp_path / "0.tar").read_bytes() == DATA
