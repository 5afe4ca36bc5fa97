"""Checkpoints in object stores: there is a whole one at every moment, and nothing else is touched."""

import os

import fsspec
import pytest
import torch
from pydantic import ValidationError

from eclosion.checkpoint import storage
from eclosion.config.templates import EXAMPLE
from eclosion.data.places import Patience
from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.registry import build
from eclosion.rundir import RunDir
from eclosion.tracking import fsspec as saver_module


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a server of this machine."""
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
        s3fs.S3FileSystem().mkdir("models")
        yield "s3://models"
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    for step in (1, 2):
        files = {"net": {"a": torch.full((1000,), float(step))}, "net.ema": {"a": torch.zeros(3)}, "net.optimizer": {}}
        state = {"step": step, "samples_seen": step}
        storage.write(run.checkpoint(step), files, state, {"config": {}})
    run.config.write_text("{}")
    return run


def saver(url, run, **options):
    return build("savers", {"name": "fsspec", "url": url, **options}).open(run)


def save(made, run, step=1, **which):
    made.save(run.checkpoint(step), **({"latest": True, "best": False} | which), values={**EXAMPLE, "step": step})


def fetched(url, into):
    into.mkdir(exist_ok=True)
    return build("loaders", {"name": "url", "url": url}).fetch(into)


def listed(url):
    store, path = fsspec.url_to_fs(url)
    store.invalidate_cache()
    return sorted(str(name).removeprefix(path.rstrip("/") + "/") for name in store.find(path))


@pytest.mark.parametrize("url", ["s3", "memory://models", "file"])
def test_what_is_saved_is_found_again_and_the_old_one_is_gone(url, request, run, tmp_path):
    url = {"s3": lambda: request.getfixturevalue("bucket"), "file": lambda: f"file://{tmp_path}/models"}.get(
        url, lambda: url
    )()
    made = saver(f"{url}/cats", run, latest="latest.pth", meta="about")
    for step in (1, 2):
        save(made, run, step)
        found = fetched(f"{url}/cats/latest.pth", tmp_path / "start")
        assert {path.name: path.read_bytes() for path in found.iterdir()} == {
            path.name: path.read_bytes() for path in run.checkpoint(step).iterdir()
        }
    made.save_meta([run.config])
    there = listed(f"{url}/cats")
    assert there[0] == "about/config.json"
    assert len({name.split("/")[1] for name in there if name.startswith("latest.pth/step-")}) == 1
    assert "latest.pth/current.json" in there


def test_files_about_the_run_do_not_replace_a_config_of_somebody(run):
    store, path = fsspec.url_to_fs("memory://somebody/about/config.json")
    store.pipe_file(path, b'{"_class_name": "UNet2DModel"}')
    with pytest.raises(ConfigError, match=r"holds a config\.json that no run wrote"):
        saver("memory://somebody", run, meta="about").save_meta([run.config])
    assert store.cat_file(path) == b'{"_class_name": "UNet2DModel"}'


def test_a_model_is_saved_as_such(run, tmp_path):
    save(saver("memory://m1", run, best="best-{step}", kind="model"), run, best=True)
    loaded = storage.read(fetched("memory://m1/best-1", tmp_path / "start"), verified=True)
    assert loaded.files.keys() == {"net"}
    assert loaded.files["net"]["a"].tolist() == [0, 0, 0]


def test_what_somebody_else_keeps_there_stays(run):
    store = fsspec.filesystem("memory")
    for name in ("step-00000001", "step-00000001-mine", "notes.txt", "step-00000001-0123abcd.txt"):
        store.pipe_file(f"/m2/latest/{name}/x", b"mine")
    made = saver("memory://m2", run, latest="latest")
    save(made, run, 1)
    save(made, run, 2)
    mine = [name for name in listed("memory://m2/latest") if name.endswith("/x")]
    assert len(mine) == 4


def test_an_upload_that_breaks_at_any_call_leaves_the_old_checkpoint_or_the_new_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(saver_module, "PATIENCE", Patience(deadline_seconds=0.0, first_wait_seconds=0.001))
    store = fsspec.filesystem("memory")
    made = saver("memory://m3", run, latest="latest")
    save(made, run, 1)
    names, count = ("put_file", "pipe_file", "rm", "info", "ls"), [0, 0]
    real = {name: getattr(store, name) for name in names}

    def failing(name):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == count[1]:
                raise OSError("the connection broke")
            return real[name](*args, **kwargs)

        return call

    for k in range(1, 60):
        count[:] = [0, k]
        told = ""
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(store, name, failing(name))
            try:
                save(made, run, 2)
            except EnvironmentProblem as error:
                told = str(error)
        if not told:
            break
        assert "memory://m3/latest" in told
        assert storage.verify(fetched("memory://m3/latest", tmp_path / "start")).step in (1, 2)
    assert k > 5
    assert storage.verify(fetched("memory://m3/latest", tmp_path / "start")).step == 2


def test_a_passing_fault_is_tried_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(saver_module, "PATIENCE", Patience(deadline_seconds=20.0, first_wait_seconds=0.01))
    store = fsspec.filesystem("memory")
    real, left = store.put_file, [3]

    def sometimes(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise TimeoutError("slow down")
        return real(*args, **kwargs)

    monkeypatch.setattr(store, "put_file", sometimes)
    save(saver("memory://m4", run, latest="latest"), run)
    assert storage.verify(fetched("memory://m4/latest", tmp_path / "start")).step == 1


def test_a_bucket_that_is_not_there_is_told_at_once(bucket, run):
    with pytest.raises(EnvironmentProblem, match=r"s3://nobody/.* cannot be written"):
        save(saver("s3://nobody/x", run, latest="latest"), run)


@pytest.mark.parametrize("url", ["models", "/models", "https://host/models", "pipe:tee"])
def test_a_place_that_cannot_be_written_to_is_refused_with_the_config(url, run):
    with pytest.raises(ValidationError, match="must be the URL of a store that can be written to"):
        saver(url, run, latest="a")


def test_an_unknown_protocol_is_refused_at_the_start(run):
    with pytest.raises(ConfigError, match="nothing:// is not a protocol that fsspec knows"):
        saver("nothing://a/b", run, latest="a")
