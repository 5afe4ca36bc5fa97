"""What a run starts from by URL is fetched whole, once, and is what it must be."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from pydantic import ValidationError

from eclosion.checkpoint import storage
from eclosion.checkpoint.copying import write_model
from eclosion.data import http_files
from eclosion.errors import CheckpointError, DataError, EnvironmentProblem
from eclosion.registry import build, dump
from eclosion.tracking.loading import fetched_facts
from eclosion.tracking.pointers import pointed_to, pointer_to

DATA = bytes(range(256)) * 2000


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ETags and ranges; `server.cut` answers end early by that many bytes."""

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        body = self._answer()
        if body is not None:
            self.server.asked.append((self.path, self.headers.get("Range")))
            cut = self.server.cuts.pop(0) if self.server.cuts else len(body)
            self.wfile.write(body[:cut])

    def _answer(self):
        data = self.server.files.get(self.path.partition("?")[0])
        if data is None:
            self.send_error(404)
            return None
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        return data[start:]

    def log_message(self, *args):
        pass


@contextmanager
def serving(**files):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {f"/{name}": data for name, data in files.items()}
    server.asked, server.cuts = [], []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server():
    with serving(**{"net.safetensors": DATA}) as made:
        yield made


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "run" / "start"
    folder.mkdir(parents=True)
    return folder


def loader(server, path="net.safetensors", **options):
    return build("loaders", {"name": "url", "url": f"{server.url}/{path}", **options})


def names(into):
    return sorted(path.name for path in into.rglob("*") if path.is_file())


def test_a_file_comes_whole_under_its_own_name_and_is_told(server, into):
    path = loader(server).fetch(into)
    assert path.read_bytes() == DATA
    assert names(into) == ["fetched.json", "net.safetensors"]
    sha256 = hashlib.sha256(DATA).hexdigest()
    url = f"{server.url}/net.safetensors"
    assert fetched_facts(into) == {"loader": "url", "url": url, "size": len(DATA), "sha256": sha256}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, into):
    server.cuts = [200_000]
    assert loader(server).fetch(into).read_bytes() == DATA
    assert [asked for _, asked in server.asked] == [None, "bytes=200000-"]


def test_the_same_version_is_not_fetched_again_and_another_one_is(server, into):
    part = loader(server)
    part.fetch(into)
    part.fetch(into)
    assert len(server.asked) == 1
    server.files["/net.safetensors"] = DATA[::-1]
    assert part.fetch(into).read_bytes() == DATA[::-1]


def test_a_file_that_is_too_large_is_refused_before_its_first_byte(server, into):
    with pytest.raises(DataError, match=r"has 0\.000512 GB, and start\.max_gb is 0\.0001\. Nothing was fetched"):
        loader(server, max_gb=1e-4).fetch(into)
    assert server.asked == []
    assert names(into) == []


def test_another_content_than_was_promised_is_refused(server, into):
    right = hashlib.sha256(DATA).hexdigest()
    assert loader(server, sha256=right).fetch(into).read_bytes() == DATA
    server.files["/net.safetensors"] = DATA[:-1] + b"x"
    with pytest.raises(DataError, match=f"the content has sha256 .* and start.sha256 is {right}. It is not used"):
        loader(server, sha256=right).fetch(into)
    assert not [path for path in into.rglob("*.safetensors") if path.read_bytes() != DATA]


def test_a_file_that_is_not_there_is_told_without_what_may_be_secret(server, into):
    with pytest.raises(DataError, match=r"/gone\.pth: does not exist") as error:
        loader(server, "gone.pth?token=hunter2").fetch(into)
    assert "hunter2" not in str(error.value)


def test_a_config_keeps_no_secret_of_a_url(server):
    assert "hunter2" not in str(dump(loader(server, "a.pth?token=hunter2")))


def test_a_name_of_a_stranger_is_no_path(server, into):
    server.files["/..%2f..%2fevil"] = DATA
    path = loader(server, "..%2f..%2fevil").fetch(into)
    assert path.parent.parent == into
    assert path.name == "download"


@pytest.mark.parametrize("url", ["models/a.pth", "pipe:cat a", "/models/a.pth"])
def test_what_is_no_url_is_refused_with_the_config(url):
    with pytest.raises(ValidationError, match="must be a URL such as"):
        build("loaders", {"name": "url", "url": url})


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    files = {"net": {"a": torch.arange(1000.0)}, "net.ema": {"a": torch.ones(1000)}, "net.optimizer": {}}
    checkpoint = tmp_path / "step-00000007"
    storage.write(checkpoint, files, {"step": 7, "samples_seen": 56}, {"config": {}})
    write_model(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def served(folder, under):
    return {f"{under}/{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pointed", [False, True])
def test_a_model_is_fetched_as_the_folder_that_it_is(pointed, model, into):
    files = served(model, "latest.pth/step-00000007-0123abcd" if pointed else "latest.pth")
    if pointed:
        files["latest.pth/current.json"] = pointer_to("step-00000007-0123abcd", 7)
    with serving(**files) as server:
        found = loader(server, "latest.pth/").fetch(into)
        assert storage.verify(found).step == 7
        assert found.parent == into
        asked = len(server.asked)
        loader(server, "latest.pth/").fetch(into)
        assert not [path for path, _ in server.asked[asked:] if path.endswith(".safetensors")]


def test_a_folder_that_was_begun_is_gone_on_with(model, into):
    with serving(**served(model, "latest")) as server:
        whole = server.files.pop("/latest/state.json")
        with pytest.raises(DataError, match=r"state\.json: does not exist"):
            loader(server, "latest/").fetch(into)
        assert not [path for path in into.rglob("manifest.json") if (path.parent / "net.safetensors").exists()]
        server.files["/latest/state.json"] = whole
        assert storage.verify(loader(server, "latest/").fetch(into)).step == 7
        assert len([path for path, _ in server.asked if path.endswith("net.safetensors")]) == 1


def test_a_flipped_bit_on_the_way_is_refused(model, into):
    with serving(**served(model, "latest")) as server:
        raw = bytearray(server.files["/latest/net.safetensors"])
        raw[-1] ^= 1
        server.files["/latest/net.safetensors"] = bytes(raw)
        with pytest.raises(CheckpointError, match="its sha256 is not the one in manifest"):
            loader(server, "latest/").fetch(into)
        server.files |= {f"/{name}": data for name, data in served(model, "latest").items()}
        assert storage.verify(loader(server, "latest/").fetch(into)).step == 7


def test_a_folder_is_counted_before_it_is_fetched(model, into):
    with serving(**served(model, "latest")) as server:
        with pytest.raises(DataError, match="Nothing was fetched"):
            loader(server, "latest/", max_gb=1e-6).fetch(into)
        assert [path for path, _ in server.asked] == ["/latest/manifest.json"]


def test_a_checksum_of_a_folder_is_that_of_its_manifest(model, into):
    right = hashlib.sha256((model / "manifest.json").read_bytes()).hexdigest()
    with serving(**served(model, "latest")) as server:
        assert storage.verify(loader(server, "latest/", sha256=right).fetch(into)).step == 7
        with pytest.raises(DataError, match=r"start\.sha256 is 0000"):
            loader(server, "latest/", sha256="0" * 64).fetch(into)


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"checkpoint": "../../etc"}', b'{"checkpoint": 1}', b"[" * 100_000])
def test_a_pointer_leads_to_a_checkpoint_beside_it_or_nowhere(raw):
    with pytest.raises(DataError, match=r"current\.json names no checkpoint"):
        pointed_to(raw, "s3://bucket/latest/")


def test_a_disk_that_cannot_be_written_is_told_in_one_line(server, tmp_path):
    (tmp_path / "start").write_text("a file")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        loader(server).fetch(tmp_path / "start")


def test_what_anybody_may_change_on_its_way_is_taken_only_with_its_sha256():
    url = "http://example.org/net.safetensors"
    with pytest.raises(ValidationError, match="Take https://, or give sha256"):
        build("loaders", {"name": "url", "url": url})
    assert build("loaders", {"name": "url", "url": url, "sha256": "0" * 64}).url == url


def test_a_server_that_redirects_from_https_to_http_is_left():
    with pytest.raises(DataError, match="or from https to http"):
        http_files._redirected("https://a/b", "https://a/b", "http://a/b")
    assert http_files._redirected("https://a/b", "https://a/b", "https://c/d")[0] == "https://c/d"
