"""What is where: files and folders of this machine, of web servers, and of stores."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eclosion.data.download import download
from eclosion.data.places import IsFolder, NotFound, Patience, Place
from eclosion.data.remote import listing, stat, stat_all
from eclosion.data.shard_urls import expand
from eclosion.errors import ConfigError, DataError, EnvironmentProblem, MissingExtraError

SECRET = "hunter2-s3cr3t"
QUICK = Patience(deadline_seconds=0.3, first_wait_seconds=0.01, max_wait_seconds=0.05, timeout_seconds=0.3)


def test_a_local_file_is_its_size_and_time(tmp_path, monkeypatch):
    file = tmp_path / "a b.tar"
    file.write_bytes(b"12345")
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    for url in (str(file), file.as_uri()):
        assert stat(url) == Place(url, 5, "1234567890123456789")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stat("~/a b.tar").size == 5


def test_what_is_not_a_local_file_is_an_error_that_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    for url, kind, message in [
        (str(tmp_path), IsFolder, "is a folder"),
        ("fifo", DataError, "no regular file"),
        ("x.tar", NotFound, f"x.tar: does not exist .working folder: {tmp_path}"),
        ("fifo/x.tar", NotFound, "does not exist"),
        ("a\0b", ConfigError, "is not a path"),
    ]:
        with pytest.raises(kind, match=message):
            stat(url)


def test_a_local_folder_is_listed(tmp_path):
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert listing(str(tmp_path)) == listing(tmp_path.as_uri()) == ["a", "b"]
    with pytest.raises(NotFound, match="the folder does not exist"):
        listing(str(tmp_path / "c"))
    with pytest.raises(DataError, match="is a file, and a folder is wanted"):
        listing(str(tmp_path / "b"))


def test_web_servers_and_commands_list_nothing():
    assert listing("https://host.invalid/shards") is None
    assert listing("pipe:ls") is None


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.server.asked.append((self.command, self.headers.get("Range")))
        status, headers = self.server.answer(self)
        if status == "hang":
            self.server.over.wait(20)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 64  # with less, some wait a second to be let in


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.asked, server.over = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/0.tar"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({"ETag": '"a"', "Last-Modified": "Thu, 01 Jan 1970 00:00:01 GMT"}, 'etag "a"'),
        ({"ETag": 'W/"a"'}, 'etag "a"'),
        ({"Last-Modified": "Thu, 01 Jan 1970 00:00:01 GMT"}, "modified Thu, 01 Jan 1970 00:00:01 GMT"),
        ({}, ""),
    ],
)
def test_a_web_server_is_asked_for_the_head_alone(server, headers, version):
    server.answer = lambda handler: (200, {"Content-Length": "123"} | headers)
    assert stat(server.url) == Place(server.url, 123, version)
    assert server.asked == [("HEAD", None)]


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
def test_a_server_that_answers_no_head_is_asked_for_one_byte(server, status):
    """URLs signed for GET are refused for HEAD."""

    def answer(handler):
        if handler.command == "HEAD":
            return status, {}
        return 206, {"Content-Range": "bytes 0-0/123", "Content-Length": "1", "ETag": '"a"'}

    server.answer = answer
    assert stat(server.url) == Place(server.url, 123, 'etag "a"')
    assert server.asked == [("HEAD", None), ("GET", "bytes=0-0")]
    server.answer = lambda handler: (status, {}) if handler.command == "HEAD" else (416, {})
    assert stat(server.url).size == 0
    server.answer = lambda handler: (403, {})
    with pytest.raises(DataError, match=r"may not be read .403 Forbidden"):
        stat(server.url)


def test_a_missing_file_is_told_at_once_and_a_failing_server_is_asked_again(server):
    server.answer = lambda handler: (404, {})
    with pytest.raises(NotFound, match=r"does not exist .404 Not Found"):
        stat(server.url)
    assert len(server.asked) == 1
    answers = iter([500, 503, 200])
    server.answer = lambda handler: (next(answers), {"Content-Length": "7"})
    assert stat(server.url, patience=Patience(first_wait_seconds=0.01)).size == 7
    server.answer = lambda handler: (500, {})
    with pytest.raises(EnvironmentProblem, match="500 Internal Server Error"):
        stat(server.url, patience=QUICK)
    server.answer = lambda handler: ("hang", {})
    with pytest.raises(EnvironmentProblem, match=r"silent for 0.3 s|no answer in 0.3 s"):
        stat(server.url, patience=QUICK)


def test_a_server_that_is_not_there_is_an_error_without_secrets(server):
    server.server_close()
    url = f"http://user:{SECRET}@127.0.0.1:{server.server_port}/0.tar?token={SECRET}"
    with pytest.raises(EnvironmentProblem, match="connection refused") as caught:
        stat(url, patience=QUICK)
    assert SECRET not in "".join([str(caught.value), repr(caught.value)])


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://h:port/x", "http://[1::/x", "https://:443/x"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="is not a URL"):
        stat(url)


def test_many_files_are_asked_for_at_the_same_time(server, tmp_path):
    together, most = threading.Semaphore(0), []

    def answer(handler):
        together.release()
        time.sleep(0.05)
        most.append(together._value)
        together.acquire()
        return (404 if handler.path.endswith("7") else 200), {"Content-Length": "3"}

    server.answer = answer
    urls = [f"{server.url}?{number}" for number in range(32)]
    places = stat_all(urls)
    assert [place and place.url for place in places] == [None if url.endswith("7") else url for url in urls]
    assert max(most) > 4
    assert stat_all([str(tmp_path / "x")]) == [None]


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    import fsspec.core

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match=r's3:// needs an optional library.*pip install "eclosion.remote."'):
        stat("s3://bucket/0.tar")
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError, match="gs:// needs an optional library"):
        listing("gs://bucket")


class Throttled(Exception):
    pass


class NoCredentialsError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError("x"), NotFound, "does not exist"),
        (PermissionError(f"denied for https://h/?sig={SECRET}"), DataError, "may not be read .denied for https://h/"),
        (NoCredentialsError("Unable to locate"), DataError, "NoCredentialsError: Unable to locate"),
        (Throttled("Throttled"), EnvironmentProblem, r"the store failed .Throttled: Throttled. .\d+ tries"),
        (OSError(5, "I/O"), EnvironmentProblem, "the store failed .OSError"),
        (KeyError("x"), EnvironmentProblem, "the library for memory:// failed .KeyError"),
    ],
)
def test_the_errors_of_store_libraries_become_ours(monkeypatch, error, kind, message):
    import fsspec

    def fail(self, path, **more):
        raise error

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", fail)
    with pytest.raises(kind, match=message) as caught:
        stat("memory://0.tar", patience=QUICK)
    assert SECRET not in str(caught.value)


def test_a_store_that_hangs_is_not_waited_for(monkeypatch):
    import fsspec

    over = threading.Event()
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", lambda self, path, **more: over.wait(20))
    with pytest.raises(EnvironmentProblem, match=r"no answer in 0.3 s"):
        stat("memory://0.tar", patience=QUICK)
    over.set()


def test_a_store_that_fails_now_and_then_gives_the_file_in_blocks(monkeypatch, tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    data = os.urandom(30_000_000)
    store.pipe_file("/blocks/0.tar", data)
    real, asked = type(store).cat_file, []

    def cat_file(self, path, start=None, end=None, **more):
        asked.append(start)
        if len(asked) in {2, 4}:
            raise OSError(5, "I/O")
        if len(asked) == 6:
            return b"short"
        return real(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(store), "cat_file", cat_file)
    place = stat("memory://blocks/0.tar")
    patience = Patience(first_wait_seconds=0.01)
    assert download(place, tmp_path / "0.tar", patience=patience) == place
    assert (tmp_path / "0.tar").read_bytes() == data
    block = 8 << 20
    assert asked == [n * block for n in (0, 1, 1, 2, 2, 3, 3)]


def test_no_more_is_taken_from_a_store_than_the_file_has(tmp_path):
    import fsspec
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    taken = []

    class File(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            taken.append(end - start)
            return bytes(end - start)

    class Store(AbstractFileSystem):
        protocol = "counted"

        def info(self, path, **more):
            return {"name": path, "size": 20_000_000, "type": "file"}

        def _open(self, path, mode="rb", block_size=None, **more):
            return File(self, path, mode, block_size or 5 << 20, **more)

    fsspec.register_implementation("counted", Store, clobber=True)
    download(stat("counted://0.tar"), tmp_path / "0.tar")
    assert (tmp_path / "0.tar").read_bytes() == bytes(20_000_000)
    assert sum(taken) == 20_000_000


def test_a_file_of_a_store_that_is_written_to_meanwhile_is_refused(tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/changing/0.tar", b"one")
    place = stat("memory://changing/0.tar")
    store.pipe_file("/changing/0.tar", b"two")
    with pytest.raises(DataError, match="the file changed after this run had looked at it"):
        download(place, tmp_path / "0.tar")


@pytest.fixture(scope="module")
def s3():
    """A bucket on a server of this machine, with 12 shards."""
    from moto.server import ThreadedMotoServer

    given = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "*",
    }
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # of a server that is gone
        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        for number in range(12):
            store.pipe_file(f"bucket/shards/{number:05d}.tar", bytes([number]) * (9_000_000 if number == 3 else 1000))
        yield store, given["AWS_ENDPOINT_URL"]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()


def test_s3_is_listed_looked_up_and_fetched(s3, tmp_path):
    store, _ = s3
    assert listing("s3://bucket/shards") == [f"{number:05d}.tar" for number in range(12)]
    found, missing = expand("s3://bucket/shards/{}.tar", end_shard=9_999_999, shard_width=5)
    assert [shard.number for shard in found] == list(range(12))
    assert missing == []
    place = stat("s3://bucket/shards/00003.tar")
    assert place == Place(
        "s3://bucket/shards/00003.tar", 9_000_000, f"etag {store.info('bucket/shards/00003.tar')['ETag']}"
    )
    assert download(place, tmp_path / "3.tar") == place
    assert (tmp_path / "3.tar").read_bytes() == b"\3" * 9_000_000
    for url, kind in [("s3://bucket/shards/99.tar", NotFound), ("s3://bucket/shards", IsFolder)]:
        with pytest.raises(kind):
            stat(url)
    with pytest.raises(NotFound):
        listing("s3://no-such-bucket/shards")
    with pytest.raises(DataError, match=r"2 of 14 shards do not exist: s3://bucket/shards/00012.tar"):
        expand("s3://bucket/shards/{}.tar", end_shard=13, shard_width=5)


def test_what_is_new_in_s3_is_seen_and_what_changed_is_refused(s3, tmp_path):
    store = type(s3[0])(skip_instance_cache=True)  # as another program: ours does not hear of what it writes
    store.pipe_file("bucket/moving/1.tar", b"one")
    assert listing("s3://bucket/moving") == ["1.tar"]
    place = stat("s3://bucket/moving/1.tar")
    store.pipe_file("bucket/moving/1.tar", b"two")
    store.pipe_file("bucket/moving/2.tar", b"two")
    assert stat("s3://bucket/moving/1.tar").version != place.version
    assert listing("s3://bucket/moving") == ["1.tar", "2.tar"]
    with pytest.raises(DataError, match="changed after this run had looked at it"):
        download(place, tmp_path / "1.tar")


def test_s3_is_read_over_http_too_and_its_tag_is_checked(s3, tmp_path, monkeypatch):
    store, endpoint = s3
    store.pipe_file("bucket/open/1.tar", b"one" * 100_000, ACL="public-read")
    place = stat(f"{endpoint}/bucket/open/1.tar")
    assert place.size == 300_000
    assert download(place, tmp_path / "1.tar") == place
    signed = store.sign("bucket/open/1.tar")
    assert signed.startswith("http")
    assert stat(signed).size == 300_000
    assert "?" not in stat(signed).shown
