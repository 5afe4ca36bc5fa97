"""Nothing secret comes out of a run, wherever it went in.

A distinct word is planted in every way in: URLs, the environment, files with tokens, proxies, overrides, the words of
other libraries. Then commands run, each in a process of its own, and all that they wrote, printed and sent is searched.
"""

import base64
import gzip
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import yaml

pytest.importorskip("huggingface_hub")
pytest.importorskip("wandb")
pytest.importorskip("tensorboard")
pytest.importorskip("trackio")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eclosion.config.load import load
from eclosion.data.places import Patience
from eclosion.errors import ConfigError
from eclosion.redaction import cleaned, quoted, shown
from eclosion.registry import dump
from eclosion.tracking import fsspec

# What goes in. Each stands somewhere of its own, and each may be in nothing that comes out.
CANARIES = {
    "user of a data URL": "canary-data-user",
    "password of a data URL": "canary-data/pa:ss'word",
    "query of a data URL": "canary-data-query",
    "user of a start URL": "canary-start-user",
    "password of a start URL": "canary-start-password",
    "query of a start URL": "canary-start-query",
    "fragment of a start URL": "canary-start-fragment",
    "HUGGING_FACE_HUB_TOKEN": "canary-old-hub-token",
    "WANDB_API_KEY": "ca4a51" * 7,
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret",
    "AWS_SESSION_TOKEN": "canary-aws-session",
    "a variable of somebody": "canary-somebody-key",
    "the password of a proxy": "canary-proxy-password",
    "a password in ~/.netrc": "canary-netrc-password",
    "an override": "canary-override-password",
    "a token in place of a path": "hf_canaryInPlaceOfAPath0123",
    "a token in place of a name": "hf_canaryInPlaceOfAName0123",
}
SHARD_BASE, START_BASE = "data", "start"


def url(server, where, path):
    """A URL with a user, a password, a query and a fragment."""
    user, password = (quote(CANARIES[f"{part} of a {where} URL"], safe="") for part in ("user", "password"))
    query = CANARIES[f"query of a {where} URL"]
    return f"http://{user}:{password}@127.0.0.1:{server.server_port}/{path}?token={query}"


# --- what is searched ------------------------------------------------------------------------------------------------


def forms(secret):
    """The ways in which a secret may be written down."""
    raw = secret.encode()
    return {raw, base64.b64encode(raw), quote(secret, safe="").encode(), repr(secret)[1:-1].encode()}


def found_in(data, secrets):
    """The names of the secrets that stand in some bytes, or in what they are a compressed form of."""
    layers = [data]
    if data[:2] == b"\x1f\x8b":
        layers.append(gzip.decompress(data))
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            layers += [archive.read(name) for name in archive.namelist()]
    for start in [match.start() for match in re.finditer(rb"x[\x01\x5e\x9c\xda]", data)][:200]:
        try:
            layers.append(zlib.decompressobj().decompress(data[start:], 1 << 22))
        except zlib.error:
            continue
    return {
        name for name, secret in secrets.items() if any(form in layer for form in forms(secret) for layer in layers)
    }


def rows_of(path):
    """What a data base holds, however its pages lie."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
        return "\n".join(base.iterdump()).encode()


def hits(folder, secrets):
    """The secrets below a folder, in the names and in the contents of files: "path: name"."""
    told = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        told |= {f"{name}: {what}, in its name" for what in found_in(os.fsencode(name), secrets)}
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if data.startswith(b"SQLite format 3\0"):
                data += rows_of(path)
            told |= {f"{name}: {what}" for what in found_in(data, secrets)}
    return sorted(told)


# --- who is told -----------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Gives files to whoever has the password and the token of their folder, and notes what it is asked."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        data = self.answer()
        if data is not None:
            self.wfile.write(data)

    def answer(self):
        path, _, query = self.path.partition("?")
        self.server.asked.append((path, self.headers.get("Authorization", ""), query))
        data = self.server.files.get(path)
        if data is None:
            self.send_response(404)
        else:
            self.send_response(200)
            self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        return data

    def log_message(self, *args):
        pass


def shard(count):
    """A tar file with images."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (20 * i, 90, 200)).save(picture, "PNG")
            member = tarfile.TarInfo(f"{i:04}.png")
            member.size = picture.tell()
            tar.addfile(member, io.BytesIO(picture.getvalue()))
    return packed.getvalue()


# --- what runs -------------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """Commands that ran, and all that came of them.

    Attributes:
        place: the folder that they had to write to.
        server, hub: who they asked.
        argvs: the command lines of all their children.
        said: exit code, standard output and standard error of each.
    """

    place: Path
    server: ThreadingHTTPServer
    hub: object
    environment: dict[str, str]
    argvs: set[bytes] = field(default_factory=set)
    said: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def run(self, name, *arguments, main="eclosion", **environment):
        """Run a command, with a thread that looks at what it starts."""
        argv = [sys.executable, "-m", "eclosion"] if main == "eclosion" else [sys.executable, "-c", main]
        variables = {k: v for k, v in {**self.environment, **environment}.items() if v is not None}
        process = subprocess.Popen(
            [*argv, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=self.place / "cwd",
        )
        watcher = threading.Thread(target=self.watch, args=(process,), daemon=True)
        watcher.start()
        out, err = process.communicate(timeout=300)
        watcher.join()
        self.said[name] = process.returncode, out, err

    def watch(self, process):
        mine = set()
        while process.poll() is None:
            for child in children_of({process.pid, *mine}):
                mine.add(child)
                try:
                    self.argvs.add(Path(f"/proc/{child}/cmdline").read_bytes())
                except OSError:
                    continue
            time.sleep(0.02)


def children_of(parents):
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent in parents:
                found.add(int(entry.name))
    return found


# Trains, and has libraries of its own that show what they were given: in an error, a thread, a warning and a log.
BUG = """
import logging, os, sys, threading, warnings

from eclosion.cli import main
from eclosion.tracking.tracker import Tracker

HIDDEN = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SOMEBODY_KEY", "PLANTED")
words = " ".join(os.environ[name] for name in HIDDEN)

def fails(self, numbers, *, step, samples_seen):
    thread = threading.Thread(target=lambda: 1 / 0 if not words else int(words))
    thread.start()
    thread.join()
    logging.getLogger("somelib").warning("retrying /x?token=%s", words.split()[0])
    warnings.warn("the key " + words)
    try:
        raise ValueError(f"HTTPSConnectionPool: Max retries exceeded with url: /x?sig={words.split()[1]}")
    except ValueError as error:
        raise RuntimeError(f"401 for headers {{'Authorization': 'Bearer abcdefgh12345'}} and {words}") from error

Tracker.log = fails
sys.argv = ["eclosion", *sys.argv[1:]]
main()
"""


def settings(make_config, story, name, track=None, **sections):
    """A config file with secrets in all places that take them."""
    data = {
        "source": {
            "name": "webdataset",
            "webdataset_base_url": url(story.server, "data", "shards/{}.tar"),
            "end_shard": 1,
        }
    }
    start = {
        "name": "url",
        "url": f"{url(story.server, 'start', 'weights.safetensors')}#{CANARIES['fragment of a start URL']}",
    }
    given = {
        "data": data,
        "train": {"duration": "4 steps"},
        "sample": {"every": "4 steps", "num_images": 1},
        "checkpoint": {"every": "2 steps"},
        "track": track or {},
    }
    config = make_config(story.place / "cwd" / name, **given) | {"start": start, **sections}
    path = story.place.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory, uninterrupted, hub_server):
    """All that happens; the tests look at what came of it."""
    root = tmp_path_factory.mktemp("secrets")
    place = root / "place"
    for name in ("cwd", "home", "tmp", "cache", "copies"):
        (place / name).mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    weights = max((uninterrupted / "checkpoints").glob("step-*")) / "unet.safetensors"
    server.files = {f"/shards/{i:06}.tar": shard(8) for i in range(2)}
    server.files["/weights.safetensors"] = weights.read_bytes()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    netrc, token = root / "netrc", root / "token"
    netrc.write_text(f"machine example.org login ada password {CANARIES['a password in ~/.netrc']}\n")
    token.write_text(hub_server.TOKEN)
    for path in (netrc, token):
        path.chmod(0o600)
    try:
        with hub_server.serving() as hub:
            environment = {
                **{k: v for k, v in os.environ.items() if not k.upper().endswith(("_PROXY", "TOKEN", "KEY"))},
                "HOME": str(place / "home"),
                "TMPDIR": str(place / "tmp"),
                "ECLOSION_CACHE": str(place / "cache" / "eclosion"),
                "HF_HOME": str(place / "cache" / "hf"),
                "XDG_CACHE_HOME": str(place / "cache"),
                "TRACKIO_DIR": str(place / "cache" / "trackio"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": hub_server.TOKEN,
                "NETRC": str(netrc),
                "WANDB_MODE": "offline",
                "HTTPS_PROXY": f"http://ada:{CANARIES['the password of a proxy']}@127.0.0.1:9",
                "NO_PROXY": "127.0.0.1,localhost",
                "SOMEBODY_KEY": CANARIES["a variable of somebody"],
                **{name: CANARIES[name] for name in CANARIES if name.isupper()},
            }
            yield Story(place, server, hub, environment)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def secrets(hub_server):
    """What is looked for, by name."""
    return {**CANARIES, "HF_TOKEN": hub_server.TOKEN, "a signature of the hub": hub_server.SIGNATURE}


@pytest.fixture(scope="module")
def trained(story, make_config, hub_server):
    """A run with every logger and saver that starts from a URL, and is pushed when it is done."""
    track = {
        "log": ["console", "tensorboard", "trackio", {"name": "wandb", "project": "birds"}],
        "save": [
            {"name": "local", "root": str(story.place / "copies"), "latest": "latest", "meta": "about"},
            {"name": "huggingface", "repo": "ada/copies", "latest": "latest", "meta": "about"},
            {"name": "wandb", "meta": "about"},
        ],
    }
    path = settings(make_config, story, "run", track=track, export="ddpm", hub={"repo": "ada/pipeline"})
    story.run("train", "train", path)
    return story


def nothing_told(story, name, code, secrets):
    """What a command ended with, in which there is nothing secret."""
    ended, out, err = story.said[name]
    assert ended == code, err
    assert not found_in((out + err).encode(), secrets)
    return out + err


def test_a_run_leaves_nothing_secret_anywhere(trained, secrets):
    """In its folder, copies, caches, the files of wandb, TensorBoard and Trackio, and in what it says."""
    nothing_told(trained, "train", 0, secrets)
    assert hits(trained.place, secrets) == []
    names = {path.suffix for path in trained.place.rglob("*")}
    assert {".wandb", ".db", ".html", ".jsonl", ".index", ".log"} <= names
    assert list(trained.place.rglob("events.out.tfevents*"))
    assert list((trained.place / "copies" / "latest").glob("manifest.json"))


def test_the_hub_is_sent_nothing_secret_but_the_token_where_it_belongs(trained, secrets, hub_server):
    sent = [
        (path, stored.data)
        for repo in trained.hub.repos.values()
        for _, message, files in repo.commits
        for path, stored in [*files.items(), ("message", hub_server.Stored(message.encode(), lfs=False))]
    ]
    assert {"README.md", "about/config.json", "latest/manifest.json", "model_index.json"} <= {path for path, _ in sent}
    assert [path for path, data in sent if found_in(data, secrets)] == []
    assert not any(found_in(path.encode(), secrets) for _, path in trained.hub.requests)
    assert hub_server.TOKEN in trained.hub.tokens


def test_servers_were_told_what_they_are_asked_with(trained):
    """So that what is looked for did go through the program."""
    for where, path in (("data", "/shards/000000.tar"), ("start", "/weights.safetensors")):
        user, password, query = (CANARIES[f"{part} of a {where} URL"] for part in ("user", "password", "query"))
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        assert (path, f"Basic {login}", f"token={query}") in trained.server.asked


def test_no_process_that_a_run_starts_has_a_secret_on_its_command_line(trained, secrets):
    argvs = b"\n".join(trained.argvs)
    assert b"eclosion.tracking.beside" in argvs
    assert b"eclosion.tracking.wandb_process" in argvs
    assert b"wandb-core" in argvs
    assert not found_in(argvs, secrets)


def test_an_unexpected_error_is_told_and_kept_without_secrets(story, make_config, secrets):
    """Whatever a library says of keys, headers and URLs, in an error, a thread, a warning or a log."""
    path = settings(make_config, story, "bug")
    story.run("bug", "--debug", "train", path, main=BUG, PLANTED=CANARIES["password of a data URL"])
    said = nothing_told(story, "bug", 1, secrets)
    assert hits(story.place / "cwd" / "bug", secrets) == []
    for text in (
        "Exception in thread",
        "retrying /x",
        "the key ...",
        "RuntimeError: 401",
        "This is a bug",
        "Traceback",
    ):
        assert text in said
    kept = (story.place / "cwd" / "bug" / "error.log").read_text()
    assert "RuntimeError: 401 for headers {'Authorization': 'Bearer ...'} and ..." in kept
    assert "RuntimeError" in (story.place / "cwd" / "bug" / "events.jsonl").read_text()


@pytest.fixture
def said(command, story, monkeypatch, secrets):
    """`said(code, "check", ...)` runs a command in this process; what it says, in which there is nothing secret."""
    for name, value in story.environment.items():
        if value in CANARIES.values():
            monkeypatch.setenv(name, value)

    def run(code, *arguments):
        outcome = command(*arguments)
        assert outcome.code == code, outcome.err
        assert not found_in((outcome.out + outcome.err).encode(), secrets)
        return outcome.out + outcome.err

    return run


def test_a_file_that_is_not_there_is_told_without_what_its_url_holds(story, make_config, said, secrets):
    path = settings(make_config, story, "missing")
    address = f"http://ada:{CANARIES['an override']}@127.0.0.1:{story.server.server_port}/gone.safetensors?token=abc"
    text = said(3, "--debug", "train", path, f"start.url={address}")
    assert f"127.0.0.1:{story.server.server_port}/gone.safetensors: does not exist" in text
    assert "Traceback" in text
    assert (story.place / "cwd" / "missing" / "error.log").is_file()
    assert hits(story.place / "cwd" / "missing", secrets) == []


def test_what_is_wrong_with_a_config_is_told_without_the_secrets_in_it(story, make_config, said):
    """Also those that stand where no secret belongs."""
    address = f"https://ada:{CANARIES['an override']}@example.org/?key={CANARIES['query of a data URL']}"
    token = CANARIES["a token in place of a name"]
    path = settings(make_config, story, "wrong")
    assert "holds a token or a key" in said(2, "check", path, f"output={token}")
    assert "holds a token or a key" in said(2, "check", path, f"track.log=[{{name: wandb, entity: {token}}}]")
    key = CANARIES["WANDB_API_KEY"]
    assert "holds a token or a key" in said(2, "check", path, f"track.log=[{{name: wandb, run_id: '{key}'}}]")
    assert "is a token, and must be the name of a repository" in said(2, "check", path, f"hub.repo={token}")
    assert "is a token, and must be the path" in said(
        2, "check", path, "hub.repo=a", f"hub.token_path={CANARIES['a token in place of a path']}"
    )
    assert "train.batch_size is 'https://example.org/'" in said(2, "check", path, f"train.batch_size={address}")
    assert "optimizer.betas" in said(2, "check", path, f"optimizer.betas=[{address}]")
    assert "https://example.org/" in said(2, "check", "--json", path, f"train.batch_size={address}")
    assert "https://example is not an option" in said(2, "check", path, address)
    assert "is not an override" in said(2, "check", path, token)
    said(2, "train", path, f"--{token}")
    said(2, "train", address)
    assert "is a token" in said(2, "push", story.place, token)


def test_a_check_shows_the_config_without_its_secrets(story, make_config, said):
    path = settings(make_config, story, "good")
    port = story.server.server_port
    for wanted in ([], ["--json"]):
        assert f"http://127.0.0.1:{port}/weights.safetensors" in said(0, "check", *wanted, path)
    piped = f"data.source.webdataset_base_url=pipe:fetch --key={CANARIES['an override']} 0.tar"
    assert "pipe:fetch ... 0.tar" in said(2, "check", path, piped)
    chained = f"data.source.webdataset_base_url=simplecache::{url(story.server, 'data', 'shards/{}.tar')}"
    assert f"simplecache::http://127.0.0.1:{port}" in said(3, "check", path, chained)
    folder = f"data.source={{name: folder, root: '{url(story.server, 'data', 'images')}'}}"
    assert f"http:/127.0.0.1:{port}/images does not exist" in said(3, "check", path, folder)


def test_from_python_a_config_is_kept_and_refused_without_its_secrets(story, make_config, secrets):
    path, port = settings(make_config, story, "python"), story.server.server_port
    changed = [f"data.source.webdataset_base_url=simplecache::{url(story.server, 'data', 'shards/{}.tar')}"]
    run = load(path, changed).run
    assert found_in(run.start.url.encode(), secrets)
    assert found_in(load(run).run.start.url.encode(), secrets)
    kept = json.dumps(dump(run))
    assert not found_in(kept.encode(), secrets)
    assert f"http://127.0.0.1:{port}/weights.safetensors" in kept
    with pytest.raises(ConfigError, match=r"train\.batch_size is 'http://127\.0\.0\.1") as error:
        load(path, [f"train.batch_size={url(story.server, 'start', 'x')}"])
    assert not found_in(str(error.value).encode(), secrets)


def test_a_run_is_sent_later_without_secrets(trained, said, secrets, tmp_path):
    run = shutil.copytree(trained.place / "cwd" / "run", tmp_path / "run")
    told = said(0, "sync", run, "--log", "wandb,mode=offline,project=later,tensorboard")
    assert "wandb knows" in told
    assert hits(tmp_path, secrets) == []


def test_a_token_in_a_file_goes_to_the_hub_alone(trained, said, secrets, hub, hub_server, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name)
    token = tmp_path / "token"
    token.write_text(hub_server.TOKEN)
    token.chmod(0o600)
    run = shutil.copytree(trained.place / "cwd" / "run", tmp_path / "run")
    said(0, "push", run, "ada/model", "--kind", "model", "--token-file", token)
    assert hub_server.TOKEN in hub.tokens
    assert {token.name} == {hit.partition(":")[0] for hit in hits(tmp_path, secrets)}
    assert [path for path, file in hub.repos["ada/model"].files.items() if found_in(file.data, secrets)] == []


def test_what_a_server_repeats_of_a_token_is_not_told(trained, said, hub, hub_server):
    hub.says = f"no write access for Bearer {hub_server.TOKEN}, see {hub.url}/x?X-Amz-Signature={hub_server.SIGNATURE}"
    hub.fail("POST .*/commit/", 403)
    assert "no write access" in said(2, "push", trained.place / "cwd" / "run", "ada/model", "--kind", "model")


def test_other_commands_leave_and_say_nothing_secret(trained, said, secrets, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained.place / "cwd" / "run", tmp_path / "run")
    data = url(trained.server, "data", "shards/00000{0..1}.tar")
    said(0, "evaluate", run, "--against", data, "-n", "8", "--metrics", "kid,subsets=2,subset_size=4")
    said(0, "stats", data, tmp_path / "stats.safetensors", "--image-size", "16")
    said(0, "embed", data, tmp_path / "embedded", "--encoder", "efficientnet_lite0")
    said(0, "index", data)
    said(0, "sample", run, "-n", "1")
    said(0, "report", run)
    said(0, "runs", tmp_path)
    said(0, "doctor", "--no-self-test")
    said(0, "list")
    said(0, "schema")
    assert hits(tmp_path, secrets) == []


def test_what_replays_a_step_that_was_not_finite_holds_nothing_secret(story, make_config, said, secrets):
    said(1, "train", settings(make_config, story, "diverged"), "optimizer.learning_rate=1e30", "train.duration=9 steps")
    assert list((story.place / "cwd" / "diverged" / "replay").rglob("*.json"))
    assert hits(story.place / "cwd" / "diverged", secrets) == []


def test_a_word_of_a_url_may_stand_elsewhere_in_a_config(tmp_path, make_config):
    config = make_config(tmp_path / "birds-of-the-year-2026")
    config["start"] = {"name": "url", "url": "https://example.org/a.safetensors?set=birds-of-the-year-2026"}
    for _ in range(2):  # the second time it is known
        assert load(config).run.output == str(tmp_path / "birds-of-the-year-2026")


def test_a_command_with_a_token_is_kept_and_told_without_it(story, make_config, said, secrets, monkeypatch):
    monkeypatch.chdir(story.place / "cwd")
    for i in range(2):
        (story.place / "tmp" / f"{i}.tar").write_bytes(shard(8))
    path = settings(make_config, story, "piped")
    base = f"pipe:TOKEN={CANARIES['an override']} cat {story.place / 'tmp'}/{{0..1}}.tar"
    told = said(0, "train", "--allow-pipe", path, f"data.source.webdataset_base_url={base}")
    assert "finished" in told
    gone = f"pipe:TOKEN={CANARIES['an override']} sh -c 'echo refused $TOKEN >&2; exit 3' {{0..1}}.tar"
    told = said(3, "--debug", "train", "--allow-pipe", path, f"data.source.webdataset_base_url={gone}", "output=broken")
    assert "failed with exit code 3" in told
    assert hits(story.place / "cwd", secrets) == []


def test_what_the_library_of_a_store_repeats_is_told_without_its_secrets(
    story, make_config, said, secrets, monkeypatch
):
    """It takes user and password for the name of a bucket, and says that there is none of that name."""
    pytest.importorskip("s3fs")
    monkeypatch.setattr(fsspec, "PATIENCE", Patience(deadline_seconds=0.1))
    save = [{"name": "fsspec", "url": f"s3://ada:{CANARIES['an override']}@bucket/a", "latest": "latest"}]
    told = said(4, "--debug", "train", settings(make_config, story, "stored", track={"save": save}))
    assert "saving step 4 to fsspec failed: s3://bucket/a/latest" in told
    assert 'Invalid bucket name "ada:...@bucket"' in told
    assert hits(story.place / "cwd" / "stored", secrets) == []


# --- the redactor ----------------------------------------------------------------------------------------------------

S = "s3cr3t/Word.12"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"HEAD https://me:{quote(S, safe='')}@h:8/x.tar?a={S}#b: no", "HEAD https://h:8/x.tar no"),
        (
            f"Max retries exceeded with url: /a/b.tar?sig={S}&x=1 (gone)",
            "Max retries exceeded with url: /a/b.tar (gone)",
        ),
        ("https:/me:s3cr3t@h/x does not exist", "https:/h/x does not exist"),
        ("simplecache::https://me:s3cr3t@h/x", "simplecache::https://h/x"),
        ("https://proxy/https://me:s3cr3t@h/x", "https://proxy/https://h/x"),
        (f"{{'Authorization': 'Bearer {S}'}}", "{'Authorization': 'Bearer ...'}"),
        (f"('authorization', b'Basic {S}')", "('authorization', b'Basic ...')"),
        (f"curl --token={S} --api-key={S} x", "curl --token=... --api-key=... x"),
        (f"AccountName=ada;AccountKey={S};x=y", "AccountName=ada;AccountKey=...;x=y"),
        (f'{{"hf_token": "{S}", "step": 3}}', '{"hf_token": "...", "step": 3}'),
        ("the key hf_abcdefghijklmnopqrstuvwxyz0123 is old", "the key ... is old"),
        ("wandb_v1_abcdefghijklmnopqrst", "..."),
    ],
)
def test_what_looks_like_a_secret_is_taken_out_of_any_text(text, left):
    assert cleaned(text) == left
    assert quoted(text) == left.rstrip(".")


@pytest.mark.parametrize(
    "text",
    [
        "runs/a/step-00000010/unet_0.safetensors is damaged: its sha256 is not the one in manifest.json.",
        "data.source.resoluton is not an option of 'demo'. Did you mean 'resolution'? Options: resolution, size.",
        "track.save[0].token_path: is a token, and must be the path of a file with it.",
        "task.unets[0].model.num_text_tokens=77 x=1 max_tokens = 12345",
        "C:/data/me@home/x.tar and D:/x, /data/a@b/c, s3://bucket/a/b",
        "a page that says\n  what it is,\r\n\tand the bearer token; basic functions: 3",
        "pipe:cat /data/00000.tar | gzip -d",
        "from https://, s3:// (or s3://bucket), or https://h:80: no",
        "step 4/4  loss 0.5210  87.1 images/s  0:00 left",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert cleaned(text) == text


def test_secrets_of_the_environment_are_taken_out_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_API_KEY", S)
    monkeypatch.setenv("https_proxy", "http://me:pass%2Fword@proxy:3128")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("TLS_KEY", "/etc/keys/server.pem")
    monkeypatch.setenv("SORT_KEY", "created_at")
    assert cleaned(f"<{S}> <{quote(S, safe='')}> <pass/word> <pass%2Fword>") == "<...> <...> <...> <...>"
    assert cleaned("abc /etc/keys/server.pem created_at") == "abc /etc/keys/server.pem created_at"


def test_a_secret_that_was_cut_is_not_left_in_half():
    """What is cut for a message is cut after the secrets are gone."""
    for at in range(150, 220):
        assert "s3" not in quoted("x" * at + f" https://me:{quote(S, safe='')}@h/x?sig={S}")


@pytest.mark.parametrize("word", ["a", "a:/", "a://", "?a", "?a=", "token", "token=", "bearer ", "a@", "hf_", "%", "-"])
def test_long_text_takes_no_longer_than_it_is_long(word):
    def seconds(count):
        text, start = word * count, time.perf_counter()
        cleaned(text)
        return time.perf_counter() - start

    assert seconds(20_000) < 2


@given(st.text())
def test_any_text_is_taken(words):
    for clean in (cleaned, quoted, shown):
        assert isinstance(clean(words), str)


# --- the search itself -----------------------------------------------------------------------------------------------


def test_the_search_finds_what_is_planted(tmp_path):
    secret = {"it": "canary/in a place"}
    word = secret["it"].encode()
    picture = PngInfo()
    picture.add_text("about", secret["it"], zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=picture)
    (tmp_path / "b.bin").write_bytes(b"\0" + word + b"\0")
    (tmp_path / "c.gz").write_bytes(gzip.compress(word))
    np.savez_compressed(tmp_path / "d.npz", np.frombuffer(word, np.uint8))
    (tmp_path / "e.txt").write_bytes(b"Basic " + base64.b64encode(word))
    (tmp_path / "f.txt").write_text(quote(secret["it"], safe=""))
    (tmp_path / quote(secret["it"], safe="")).mkdir()
    with sqlite3.connect(tmp_path / "g.db") as base:
        base.execute("create table t (x)")
        base.execute("insert into t values (?)", (secret["it"],))
    (tmp_path / "h.txt").write_text("nothing")
    told = hits(tmp_path, secret)
    assert {line[:1] for line in told} == set("abcdefg%c") - {"%"} | {"c"}
    assert len(told) == 8
