"""Two processes on one run that validate together, and that leave together while a server keeps them waiting."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from eclosion import shard, train
from eclosion.registry import build

SCRIPT = Path(__file__).with_name("train_config.py")
UNET = {
    "name": "unclip_unet",
    "base_channels": 8,
    "channel_mults": [1, 2],
    "norm_num_groups": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


def start(config, folder):
    path = folder / f"{Path(config['output']).name}.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(SCRIPT), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def written(folder, *, size, samples_per_shard):
    """Butterflies in shards, with embeddings beside them; and the source that reads them."""
    rows = np.random.default_rng(0).standard_normal((size, 4)).astype("f4")
    np.save(folder / "rows.npy", rows)
    butterflies = build("sources", {"name": "butterflies", "size": size, "resolution": 16})
    shard(butterflies, folder / "tars", samples_per_shard=samples_per_shard, image_embeddings=folder / "rows.npy")
    return {
        "name": "webdataset",
        "webdataset_base_url": str(folder / "tars" / "{}.tar"),
        "img_embeddings_url": str(folder / "tars" / "img_emb"),
        "shard_width": 5,
    }


def test_two_processes_train_two_networks_and_validate_as_one_process_does(tmp_path):
    """19 images to validate with, which neither two processes nor batches of four share evenly."""
    source = written(tmp_path, size=38, samples_per_shard=19) | {"splits": {"train": 0.5, "val": 0.5}}
    config = {
        "output": str(tmp_path / "one"),
        "data": {"source": source, "image_size": 16, "horizontal_flip": True},
        "task": {"name": "unclip_decoder", "unets": [{"model": UNET, "image_size": 8}, {"model": UNET}]},
        "train": {"duration": "3 steps", "batch_size": 8, "micro_batch_size": 4, "mixed_precision": "no"},
        "sample": {"num_images": 2, "sampler": {"name": "ddim", "num_inference_steps": 1}},
        "validate": {"every": 3},
    }
    one = train(config)
    process = start(config | {"output": str(tmp_path / "two")}, tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    found = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, tmp_path / "two")
    ]
    for name in ("validation/loss/unet_0", "validation/loss/unet_1"):
        ours, theirs = ({line["step"]: line[name] for line in lines if name in line} for lines in found)
        assert ours.keys() == theirs.keys() == {0, 3}
        assert theirs[0] == pytest.approx(ours[0], rel=1e-6)
        assert theirs[3] == pytest.approx(ours[3], rel=1e-3)  # the weights, too, were added up in another order
    states = [json.loads((run / "checkpoints/step-00000003/state.json").read_text()) for run in (one, tmp_path / "two")]
    assert [state["validation"]["best"]["step"] for state in states] == [3, 3]


def ranks_of(config_path):
    """Process ids of the training processes, which outlive a launcher that is killed."""
    found = subprocess.run(["pgrep", "-f", str(config_path)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


class Stalling(http.server.SimpleHTTPRequestHandler):
    """Begins to send a file, and says no more, from some shard on."""

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


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_leave_with_a_checkpoint_while_a_server_keeps_them_waiting(parallel, make_config, tmp_path):
    """The launcher sends its signal to all of them, as it does when a machine is taken away."""
    written(tmp_path, size=32, samples_per_shard=4)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Stalling, directory=str(tmp_path / "tars")))
    server.first, server.asked, server.over = 8, threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{}}.tar"
    config = make_config(tmp_path / "run", train={"parallel": parallel}, sample={"num_images": 0})
    source = {"name": "webdataset", "webdataset_base_url": url, "end_shard": 7, "shard_width": 5}
    config["data"] = {"source": source, "image_size": 16, "shuffle": False}
    train(config | {"output": str(tmp_path / "indexed")}, ["train.duration=1 steps"])
    shutil.rmtree(tmp_path / "cache" / "files")
    server.first = 4  # enough for two steps
    process = start(config, tmp_path)
    try:
        assert server.asked.wait(120)
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=25)  # the launcher kills after 30
        assert "stopped at step 2, which is saved" in output, output
        assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()
        assert "lost another one" not in output
    finally:
        for pid in [process.pid, *ranks_of(tmp_path / "run.json")]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        server.over.set()
        server.shutdown()
        server.server_close()
