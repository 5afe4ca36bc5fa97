"""Files of weights: found where they are, fetched where they are not, and nothing wrong taken for right."""

import contextlib
import hashlib
import os
import pickle
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.models import weight_files
from eclosion.models.weight_files import Published

NAME = "net-0123abcd.pth"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Where torch keeps downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server():
    """Serves what `answer` is set to: a status and a body; counts what it was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            made.asked.append(self.path)
            status, body, length = made.answer
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.answer = [], (200, b"", None)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def published(server=None, body=b"right"):
    port = server.server_port if server else 9  # nobody listens
    return Published(f"http://127.0.0.1:{port}/files/{NAME}", hashlib.sha256(body).hexdigest())


def find(*args, **kwargs):
    return weight_files.find("encoder x", *args, cure="Meanwhile use y.", **kwargs)


@contextlib.contextmanager
def refused(kind=EnvironmentProblem):
    """The one line of an error, in a list."""
    said = []
    with pytest.raises(kind) as caught:
        yield said
    said.append(str(caught.value))
    assert "\n" not in said[0]


# where a file is


def test_a_file_is_fetched_once_and_kept_where_torch_keeps_downloads(server, hub):
    server.answer = (200, b"right", None)
    file = find(published(server), None)
    assert (file.path, file.path.read_bytes(), file.standard) == (hub / NAME, b"right", True)
    assert file.sha256 == published().sha256
    assert find(published(server), None) == file
    assert server.asked == [f"/files/{NAME}"]
    assert [path.name for path in hub.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"wrong", None), "the 5 bytes that came are not those of the file, by their sha256"),
        ((200, b"rig", 5), "the 3 bytes that came are not those of the file, by their sha256"),
        ((404, b"", None), "HTTP Error 404: Not Found"),
    ],
    ids=["wrong", "short", "missing"],
)
def test_what_does_not_arrive_whole_is_not_kept(server, hub, answer, reason):
    server.answer = answer
    with refused() as said:
        find(published(server), None)
    assert f"({reason})" in said[0]
    assert list(hub.iterdir()) == []


def test_without_a_network_it_says_where_to_put_the_file_and_what_to_use_meanwhile(hub):
    with refused() as said:
        find(published(), None)
    assert said[0].startswith(
        f"encoder x: {NAME} is not in {hub} and cannot be fetched from http://127.0.0.1:9/files/{NAME} ("
    )
    assert said[0].endswith("Put the file there, or give its path as weights. Meanwhile use y.")


def test_a_damaged_download_is_told_and_never_used(hub):
    hub.mkdir(parents=True)
    (hub / NAME).write_bytes(b"rubbish")
    with refused() as said:
        find(published(), None)
    assert f"{hub / NAME} is damaged or another file: its sha256 begins with " in said[0]
    assert said[0].endswith(f"and should with {published().sha256[:16]}. Delete it, and it is fetched again.")


def test_a_file_that_is_given_may_be_any_but_one_of_another_hash_than_was_asked_for(tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"mine")
    assert find(published(), path) == weight_files.WeightsFile(path, hashlib.sha256(b"mine").hexdigest(), False)
    assert find(published(body=b"mine"), path).standard
    assert find(Published("http://x/y.pth", published(body=b"mine").sha256[:8]), path).standard
    assert find(published(), path, sha256=hashlib.sha256(b"mine").hexdigest()[:12]).path == path
    with refused() as said:
        find(published(), path, sha256="0" * 12)
    assert said[0].endswith("and should with 000000000000. Give the right file, or leave out sha256.")
    with refused() as said:
        find(published(), tmp_path / "none.pth")
    assert said[0] == (f"encoder x: there is no file {tmp_path}/none.pth. Give the path of {NAME}. Meanwhile use y.")


def test_a_file_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pth").write_bytes(b"mine")
    assert find(published(), Path("~/mine.pth")).path == tmp_path / "mine.pth"


# what is in it

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def fill(path):
    own = {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()}
    weight_files.fill("encoder x", own, path, wanted="the file of x")
    return own


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_weights_are_read_from_each_kind_of_file_and_what_is_not_asked_for_is_left(tmp_path, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    held = WEIGHTS | {"more": torch.zeros(3), "a.bias": torch.ones(2, dtype=torch.float64)}
    if kind == "safetensors":
        save_file(held, path)
    else:
        torch.save(held, path, _use_new_zipfile_serialization=kind == "zip")
    for name, tensor in fill(path).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, WEIGHTS[name])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"a.bias": None}, "has no a.bias"),
        ({"a.weight": torch.zeros(3, 3)}, "has a.weight of shape [3, 3], and not [2, 3]"),
        ({"a.bias": torch.tensor([1.0, float("nan")])}, "has numbers in a.bias that are not finite"),
        ({"a.bias": torch.ones(2, dtype=torch.int64)}, "has a.bias of torch.int64, and not of floating point numbers"),
        ({"a.bias": torch.ones(2).to_sparse()}, "has a.bias of torch.float32, and not of floating point numbers"),
    ],
    ids=["missing", "shape", "nan", "integers", "sparse"],
)
def test_weights_of_another_network_are_refused(tmp_path, change, problem):
    held = {name: tensor for name, tensor in (WEIGHTS | change).items() if tensor is not None}
    torch.save(held, tmp_path / "w.pth")
    with refused(ConfigError) as said:
        fill(tmp_path / "w.pth")
    assert said[0] == (
        f"encoder x: {tmp_path}/w.pth {problem}: it is damaged, or of another network. Give the file of x."
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_a_file_that_holds_something_else_is_refused_and_runs_no_code(tmp_path, monkeypatch):
    folder = tmp_path / "made by a pickle"
    monkeypatch.setenv("EVIL_FOLDER", str(folder))
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-200])
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as packed:
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"state_dict": WEIGHTS}, tmp_path / "nested.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that this is old
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    kinds = ("pickle", "evil", "cut", "bomb", "list", "nested", "junk", "empty", "script")
    for name in (*(f"{kind}.pth" for kind in kinds), "junk.safetensors"):
        with refused() as said:
            fill(tmp_path / name)
        assert said[0].startswith(f"encoder x: {tmp_path}/{name} cannot be read as weights (")
    assert not folder.exists()
