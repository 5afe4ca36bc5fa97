"""Runs on shards: one process, two, killed and resumed; and what a wrong config or wrong shards end with."""

import gzip
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from eclosion import train
from eclosion.data.loader import Loader
from eclosion.data.pipes import pipes_allowed
from eclosion.errors import ConfigError, UserError

SCRIPT = Path(__file__).with_name("train_config.py")
KILLER = Path(__file__).with_name("killer.py")
SIZES = [5, 7, 4, 6, 3, 8]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


def picture(number, size=8):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def key(shard, row):
    return f"{shard:05d}{row:04d}"


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write(folder, sizes, change=None):
    """Shards of so many samples, each a picture with its key as caption."""
    for shard, size in enumerate(sizes):
        content = []
        for row in range(size):
            parts = {"png": picture(100 * shard + row), "txt": key(shard, row).encode()}
            if change:
                change(shard, row, parts)
            content += [(f"{key(shard, row)}.{suffix}", data) for suffix, data in parts.items()]
        write_tar(folder / f"{shard:05d}.tar", content)
    return folder


def write_arrays(folder, sizes):
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        rows = [[shard + 1.0, row + 1.0] for row in range(size)]
        np.save(folder / f"img_emb_{shard:05d}.npy", np.array(rows, "f4").reshape(size, 2))
    return folder


def on_shards(make_config, output, folder, *, source=None, data=None, **sections):
    """A tiny run on the shards in a folder."""
    given = {"name": "webdataset", "webdataset_base_url": str(folder / "{}.tar"), "shard_width": 5} | (source or {})
    config = make_config(output, **sections)
    config["data"] = {"source": given, "image_size": 8, "horizontal_flip": True} | (data or {})
    config["sample"]["num_images"] = 0
    return config


def without_dropout(config):
    config["task"]["model"]["options"]["dropout"] = 0.0  # dropout is keyed by process
    return config


@pytest.fixture
def embedded(tmp_path):
    """Shards with arrays beside them; one sample has a broken image, and one no embedding."""

    def change(shard, row, parts):
        if (shard, row) == (3, 2):
            parts["png"] = b"broken"

    folder = write(tmp_path / "shards", SIZES, change)
    arrays = write_arrays(folder / "emb", SIZES)
    rows = np.load(arrays / "img_emb_00001.npy")
    rows[4] = 0
    np.save(arrays / "img_emb_00001.npy", rows)
    return folder


def options(folder, **more):
    return {
        "source": {"img_embeddings_url": str(folder / "emb")},
        "data": {"max_bad_fraction": 0.1, "shuffle_window": 2, **more},
    }


# --------------------------------------------------------------------------------------------------- processes

# Writes down what each step was made of.
WATCH = """
import atexit, json, os, sys
from eclosion.data.loader import Loader
seen, steps = [], Loader.steps
def watched(self, start):
    inner = steps(self, start)
    try:
        for step in inner:
            seen.append([[p, c, e, w] for b in step for p, c, e, w in zip(
                b.positions, b["caption"], b["image_embed"].tolist(), b.weight.tolist(), strict=True)])
            yield step
    finally:
        inner.close()
Loader.steps = watched
name = f"{sys.argv[1]}.{os.environ['RANK']}"
atexit.register(lambda: open(name, "w").write(json.dumps(seen)))
"""


def start(config, folder, patches=""):
    path = folder / f"{Path(config['output']).name}.json"
    path.write_text(json.dumps(config))
    script = folder / "script.py"
    script.write_text(patches + SCRIPT.read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout


def facts_of(run):
    last = max((run / "checkpoints").glob("step-*"))
    return json.loads((last / "manifest.json").read_text())["meta"]["facts"]


def test_two_processes_read_the_samples_of_one_in_their_order(make_config, results, embedded, tmp_path, monkeypatch):
    given = options(embedded)
    given["source"]["splits"] = {"train": 0.7, "val": 0.2, "test": 0.1}
    seen, steps = [], Loader.steps

    def watched(self, first):
        with closing(steps(self, first)) as inner:
            for step in inner:
                for batch in step:
                    each = zip(
                        batch.positions,
                        batch["caption"],
                        batch["image_embed"].tolist(),
                        batch.weight.tolist(),
                        strict=True,
                    )
                    seen.extend([p, c, e, w] for p, c, e, w in each)
                yield step

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "steps", watched)
        one = train(without_dropout(on_shards(make_config, tmp_path / "one", embedded, **given)))
    code, output = start(without_dropout(on_shards(make_config, tmp_path / "two", embedded, **given)), tmp_path, WATCH)
    assert code == 0, output
    ranks = [json.loads((tmp_path / f"two.json.{rank}").read_text()) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [12, 12]
    two = [sample for step in zip(*ranks, strict=True) for part in step for sample in part]
    assert two == seen
    assert [position for position, *_ in seen] == list(range(96))
    for _, caption, row, weight in seen:
        if weight:
            assert row == [int(caption[:5]) + 1.0, int(caption[5:]) + 1.0]
    ours, theirs = results(one), results(tmp_path / "two")
    assert ours["ledger"] == theirs["ledger"]
    assert len(ours["ledger"].splitlines()) >= 2
    for a, b in zip(ours["numbers"], theirs["numbers"], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)  # gradients are added in another order
    splits = facts_of(one)["splits"]
    assert splits == facts_of(tmp_path / "two")["splits"]
    assert {name: len(shards) for name, shards in splits.items()} == {"train": 4, "val": 1, "test": 1}
    assert sorted(Path(shard).name for shards in splits.values() for shard in shards) == [
        f"{n:05d}.tar" for n in range(6)
    ]
    assert {caption[:5] for _, caption, _, weight in seen if weight} == {Path(s).stem for s in splits["train"]}


def test_a_killed_run_on_shards_ends_with_the_same_bits(make_config, results, embedded, tmp_path):
    sections = {"checkpoint": {"every": "1 steps"}, "train": {"duration": "14 steps"}}
    whole = train(on_shards(make_config, tmp_path / "whole", embedded, **options(embedded), **sections))
    config = on_shards(make_config, tmp_path / "killed", embedded, **options(embedded), **sections)
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, str(KILLER), str(tmp_path / "config.json"), "1", "0"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 1
    assert results(tmp_path / "killed") == results(whole)
    assert results(whole)["ledger"]


def test_a_run_goes_on_with_another_number_of_threads_and_room_for_shards(make_config, results, embedded, tmp_path):
    """Where shards are kept, and by how many threads they are read, is no part of what a run is."""
    given = options(embedded)
    whole = train(on_shards(make_config, tmp_path / "whole", embedded, **given))
    train(on_shards(make_config, tmp_path / "part", embedded, **given))
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-00000012")
    given = options(embedded, num_threads=4, cache_gb=0.0)
    given["source"]["cache_limit_gb"] = 3.0
    train(on_shards(make_config, tmp_path / "part", embedded, **given))
    ours, theirs = results(tmp_path / "part"), results(whole)
    assert (ours["hashes"], ours["ledger"]) == (theirs["hashes"], theirs["ledger"])


def test_other_shards_are_not_gone_on_with(make_config, embedded, tmp_path):
    config = on_shards(make_config, tmp_path / "run", embedded, **options(embedded))
    train(config, ["train.duration=1 steps"])
    write_tar(embedded / "00002.tar", [(f"{key(2, row)}.png", picture(row)) for row in range(4)])
    with pytest.raises(ConfigError, match="The data is not what"):
        train(config, ["train.duration=1 steps"])


@pytest.mark.parametrize("order", [{"shuffle": True}, {"shuffle": False}], ids=str)
def test_the_ledger_of_a_run_agrees_with_a_count_by_hand(order, make_config, tmp_path):
    def change(shard, row, parts):
        if shard == 0 and row == 1:
            del parts["png"]
        if shard == 1 and row in (0, 3):
            parts["png"] = b"broken"

    folder = write(tmp_path / "shards", [4, 5, 3], change)
    write_arrays(folder / "emb", [4, 5, 2])  # the last has a row too few
    given = options(folder, max_bad_fraction=0.5, **order)
    run = train(on_shards(make_config, tmp_path / "run", folder, **given, train={"duration": "3 epochs"}))
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2][: len(lines)]
    assert len(lines) >= 2
    for line in lines:
        assert {Path(name).stem: s for name, s in line["shards"].items()} == {
            "00000": {"delivered": 3, "skipped": {"no_image": 1}},
            "00001": {"delivered": 3, "skipped": {"not_an_image": 2}},
            "00002": {"delivered": 2, "skipped": {"no_embedding": 1}},
        }
        assert line["index_count"] == 12 == line["delivered"] + sum(line["skipped"].values())


def test_a_resampled_run_has_a_ledger_that_adds_up(make_config, tmp_path):
    def change(shard, row, parts):
        if shard == 1 and row == 2:
            parts["png"] = b"broken"

    folder = write(tmp_path / "shards", [4, 5, 3], change)
    data = {"resample": True, "shuffle": False, "epoch_samples": 20, "max_bad_fraction": 1.0}
    run = train(on_shards(make_config, tmp_path / "run", folder, data=data, train={"duration": "60 samples"}))
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["index_count"] == 20 == line["delivered"] + sum(line["skipped"].values())
        assert sum(s["delivered"] + sum(s["skipped"].values()) for s in line["shards"].values()) == 20
    assert len({json.dumps(line["shards"]) for line in lines}) > 1


def test_no_secret_of_a_url_is_written_into_a_run(make_config, serve, embedded, tmp_path):
    """Neither into its config, nor into its checkpoints, report, log or cache."""
    url = serve(embedded).replace("://", "://somebody:PASSW0RD@") + "/{}.tar?token=T0KEN"
    config = on_shards(make_config, tmp_path / "run", embedded, source={"webdataset_base_url": url, "end_shard": 2})
    train(config, ["train.duration=2 steps"])
    leaks = [
        str(path.relative_to(tmp_path))
        for folder in ("run", "cache")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in (b"PASSW0RD", b"T0KEN"))
    ]
    assert leaks == []


# --------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def serve():
    """`serve(folder)` starts a web server and gives its URL."""
    running = []

    def begin(folder):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args, **given):
                super().__init__(*args, directory=str(folder), **given)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


def compress(folder):
    path = folder / "00001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))


def cut(folder):
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:1800])


def forget(folder):
    (folder / "00001.tar").unlink()


def pipe(folder):
    forget(folder)
    os.mkfifo(folder / "00001.tar")


def device(folder):
    forget(folder)
    (folder / "00001.tar").symlink_to("/dev/zero")


def subfolder(folder):
    forget(folder)
    (folder / "00001.tar").mkdir()


def no_caption(folder):
    write_tar(folder / "00001.tar", [(f"{key(1, 0)}.png", picture(1))])


def empty(folder):
    (folder / "00001.tar").write_bytes(b"")


def arrays(folder):
    write_arrays(folder / "emb", [3, 3, 3])


def wrong_arrays(folder):
    write_arrays(folder / "emb", [3, 3, 3])
    for path in (folder / "emb").iterdir():
        np.save(path, np.ones((3, 2, 2), "f4"))


def nothing(folder):
    pass


RESAMPLED = {"resample": True, "shuffle": False, "epoch_samples": 10}
# What is done to the shards; options of the source; options of data; exit code; what the line holds.
CASES = {
    "missing folder": (nothing, {"webdataset_base_url": "{folder}/no/{{}}.tar"}, {}, 3, ["/no/00000.tar"]),
    "no number": (nothing, {"webdataset_base_url": "{folder}"}, {}, 2, ["is a folder", "/{{}}.tar"]),
    "no such file": (nothing, {"webdataset_base_url": "{folder}/shard.tar"}, {}, 3, ["shard.tar does not exist"]),
    "two numbers": (nothing, {"webdataset_base_url": "{folder}/{{}}/{{}}.tar"}, {}, 2, ["{{}} 2 times"]),
    "format": (nothing, {"webdataset_base_url": "{folder}/{{:05d}}.tar"}, {}, 2, ["shard_width"]),
    "wrong width": (nothing, {"shard_width": 6}, {}, 3, ["data.source.shard_width=5"]),
    "start above end": (nothing, {"start_shard": 2, "end_shard": 1}, {}, 2, ["data.source.end_shard", "start_shard=2"]),
    "start above all": (nothing, {"start_shard": 7}, {}, 3, ["00007.tar"]),
    "missing shard": (forget, {"end_shard": 2}, {}, 3, ["00001.tar", "skip_missing_shards"]),
    "range too long": (nothing, {"end_shard": 4}, {}, 3, ["2 of 5", "00003.tar"]),
    "gzip": (compress, {}, {}, 3, ["00001.tar", "gzip"]),
    "truncated": (cut, {}, {}, 3, ["00001.tar", "cut off"]),
    "empty": (empty, {}, {}, 3, ["00001.tar"]),
    "named pipe": (pipe, {}, {}, 3, ["00001.tar", "regular file"]),
    "device": (device, {}, {}, 3, ["00001.tar", "regular file"]),
    "folder": (subfolder, {}, {}, 3, ["00001.tar", "folder"]),
    "resample and shuffle": (nothing, {}, RESAMPLED | {"shuffle": True}, 2, ["data.resample and data.shuffle"]),
    "resample alone": (nothing, {}, {"resample": True, "shuffle": False}, 2, ["data.epoch_samples"]),
    "epoch_samples alone": (nothing, {}, {"epoch_samples": 10}, 2, ["data.epoch_samples", "data.resample"]),
    "resample without data": (
        nothing,
        {"webdataset_base_url": "{folder}/no/{{}}.tar"},
        RESAMPLED,
        3,
        ["/no/00000.tar"],
    ),
    "unknown option": (nothing, {"shard_widht": 5}, {}, 2, ["data.source.shard_widht", "Did you mean 'shard_width'?"]),
    "unknown split": (nothing, {"splits": {"trian": 1.0}}, {}, 2, ["trian", "Did you mean 'train'?"]),
    "sum of splits": (nothing, {"splits": {"train": 0.9, "val": 0.2}}, {}, 2, ["data.source.splits", "1.1"]),
    "empty split": (nothing, {"split": "val"}, {}, (2, 3), ["val"]),
    "negative shard": (nothing, {"start_shard": -1}, {}, 2, ["data.source.start_shard"]),
    "zero width": (nothing, {"shard_width": 0}, {}, 2, ["data.source.shard_width"]),
    "commands": (nothing, {"webdataset_base_url": "pipe:cat {folder}/00000.tar"}, {}, 2, ["--allow-pipe"]),
    "unknown protocol": (
        nothing,
        {"webdataset_base_url": "gopher://x/{{}}.tar", "end_shard": 1},
        {},
        (2, 4),
        ["gopher"],
    ),
    "missing captions": (no_caption, {"captions": "required"}, {}, 3, ["00001.tar: 1 no_caption"]),
    "missing labels": (nothing, {"labels": True}, {}, 3, ["no_label"]),
    "wrong rows": (
        arrays,
        {"img_embeddings_url": "{folder}/emb", "index_width": 5, "start_shard": 1},
        {},
        3,
        ["index_width=5"],
    ),
    "no arrays": (nothing, {"img_embeddings_url": "{folder}"}, {}, 3, ["data.source.img_embeddings_url"]),
    "no folder of arrays": (nothing, {"img_embeddings_url": "{folder}/none"}, {}, 3, ["/none"]),
    "text as images": (wrong_arrays, {"img_embeddings_url": "{folder}/emb"}, {}, 3, ["img_emb_0000"]),
    "images as text": (arrays, {"text_embeddings_url": "{folder}/emb"}, {}, 3, ["img_emb_0000"]),
    "tiny cache": (nothing, {"cache_limit_gb": 0}, {}, 2, ["data.source.cache_limit_gb"]),
}


def one_line(outcome):
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_that_says_where_and_what_to_do(name, make_config, command, tmp_path):
    prepare, source, data, code, said = CASES[name]
    folder = write(tmp_path / "shards", [3, 3, 3])
    prepare(folder)
    given = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in source.items()}
    config = on_shards(make_config, tmp_path / "run", folder, source=given, data=data)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    outcome = command("check", path)
    line = one_line(outcome)
    assert outcome.code in (code if isinstance(code, tuple) else (code,)), line
    for part in said:
        assert part.format() in line
    with pytest.raises(UserError) as caught:
        train(config)
    assert caught.value.exit_code == outcome.code
    assert f"error: {caught.value}" == line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_shard_may_be_left_out_and_is_told(make_config, command, tmp_path):
    folder = write(tmp_path / "shards", [3, 3, 3])
    forget(folder)
    source = {"end_shard": 2, "skip_missing_shards": True}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(on_shards(make_config, tmp_path / "run", folder, source=source)))
    outcome = command("check", path)
    assert (outcome.code, outcome.err) == (0, "")
    said = " ".join(outcome.out.split())
    assert "00001.tar do not exist, and are left out" in said.replace(f"{tmp_path}/", "") or "00001.tar" in said
    assert "images 6" in said


def test_a_missing_page_is_told_with_its_number(make_config, command, serve, tmp_path):
    url = serve(tmp_path)
    path = tmp_path / "config.yaml"
    source = {"webdataset_base_url": f"{url}/shard.tar"}
    path.write_text(yaml.safe_dump(on_shards(make_config, tmp_path / "run", tmp_path, source=source)))
    outcome = command("check", path)
    assert outcome.code == 3
    assert "404" in one_line(outcome)


def test_a_web_server_needs_the_number_of_the_last_shard(make_config, command, serve, tmp_path):
    folder = write(tmp_path / "shards", [3, 3])
    path = tmp_path / "config.yaml"
    source = {"webdataset_base_url": serve(folder) + "/{}.tar"}
    path.write_text(yaml.safe_dump(on_shards(make_config, tmp_path / "run", folder, source=source)))
    outcome = command("check", path)
    assert outcome.code == 2
    assert "data.source.end_shard" in one_line(outcome)
    outcome = command("check", path, "data.source.end_shard=3")
    assert outcome.code == 3
    assert "2 of 4 shards do not exist" in one_line(outcome)
    assert command("check", path, "data.source.end_shard=1").code == 0


def test_commands_run_with_the_flag_and_in_a_block_alone(make_config, command, results, tmp_path):
    folder = write(tmp_path / "shards", [6, 6])
    source = {"webdataset_base_url": f"pipe:cat {folder}/{{}}.tar", "end_shard": 1}
    config = on_shards(make_config, tmp_path / "piped", folder, source=source)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for name in ("check", "train"):
        outcome = command(name, path)
        assert outcome.code == 2
        assert "--allow-pipe" in one_line(outcome)
        outcome = command(name, path, "--allow-pipe")
        assert (outcome.code, outcome.err) == (0, "")
    assert not (tmp_path / "piped.json").exists()
    local = train(on_shards(make_config, tmp_path / "local", folder))
    assert results(local)["hashes"] == results(tmp_path / "piped")["hashes"]
    with pytest.raises(ConfigError, match="--allow-pipe"):
        train(config)
    with pipes_allowed():
        train(config)


def test_a_command_that_fails_is_one_line(make_config, tmp_path):
    source = {"webdataset_base_url": f"pipe:cat {tmp_path}/none.tar"}
    config = on_shards(make_config, tmp_path / "run", tmp_path, source=source)
    with pipes_allowed(), pytest.raises(UserError, match="exit code 1") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1024]),
        lambda path: path.unlink(),
        lambda path: write_tar(path, [(f"x{i}.txt", b"other") for i in range(40)]),
    ],
    ids=["cut", "removed", "rewritten"],
)
def test_a_shard_that_changes_during_a_run_stops_it_with_one_line(change, make_config, tmp_path, monkeypatch):
    folder = write(tmp_path / "shards", [8, 8, 8])
    steps = Loader.steps

    def meddled(self, first):
        with closing(steps(self, first)) as inner:
            for number, step in enumerate(inner):
                if number == 0:
                    change(folder / "00002.tar")
                yield step

    config = on_shards(make_config, tmp_path / "run", folder, data={"shuffle": False, "num_threads": 0, "cache_gb": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "steps", meddled)
        with pytest.raises(UserError) as caught:
            train(config)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert "00002.tar" in str(caught.value)


class Stalling(http.server.SimpleHTTPRequestHandler):
    """Begins to send a shard, and says no more, from some shard on."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if int(self.path[-9:-4]) < self.server.first:
            super().do_GET()
            return
        self.send_head().close()
        self.wfile.write(bytes(600))
        self.wfile.flush()
        self.server.asked.set()
        self.server.over.wait()


@pytest.mark.parametrize("when", ["at the start", "in a step"])
def test_a_signal_while_a_server_is_waited_for_ends_the_run_soon(when, make_config, tmp_path):
    """A server that has stopped to send is asked again for minutes, but not by somebody who was told to stop."""
    folder = write(tmp_path / "shards", [4] * 8)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Stalling, directory=str(folder)))
    server.first, server.asked, server.over = 8, threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    source = {"webdataset_base_url": f"http://127.0.0.1:{server.server_port}/{{}}.tar", "end_shard": 7}
    config = on_shards(make_config, tmp_path / "run", folder, source=source, data={"shuffle": False})
    if when == "in a step":
        train(config | {"output": str(tmp_path / "indexed")}, ["train.duration=1 steps"])
        shutil.rmtree(tmp_path / "cache" / "files")
    server.first = 4 if when == "in a step" else 0
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.asked.wait(120)
        if when == "in a step":  # the two that can be made are done
            metrics = tmp_path / "run" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=25)
        assert process.returncode == 143, output
        assert "Start it again" in output.splitlines()[-1]
        assert (when == "at the start") != (tmp_path / "run" / "checkpoints" / "step-00000002").exists()
    finally:
        process.kill()
        process.communicate()
        server.over.set()
        server.shutdown()
        server.server_close()
