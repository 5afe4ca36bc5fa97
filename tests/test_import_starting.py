"""A run whose config starts from a checkpoint of DALLE2-pytorch goes on as if it had been imported."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from eclosion import shard, train
from eclosion.checkpoint import storage
from eclosion.data.butterflies import ButterfliesSource
from eclosion.errors import ConfigError
from eclosion.importing import import_checkpoint
from eclosion.rundir import RunDir

GOLDEN = Path(__file__).with_name("golden_import")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The file, the run that an import makes of it, and data to go on with."""
    folder = tmp_path_factory.mktemp("import")
    for name in ("checkpoint.pth", "model.pth"):
        (folder / name).write_bytes(lzma.decompress((GOLDEN / f"{name}.xz").read_bytes()))
    numbers = np.random.default_rng(0)
    for name, shape in {"image": (8, 6), "text": (8, 2, 5)}.items():
        np.save(folder / f"{name}.npy", numbers.normal(size=shape).astype("float32"))
    shard(
        ButterfliesSource(size=8, resolution=16),
        folder / "data",
        samples_per_shard=4,
        image_embeddings=folder / "image.npy",
        text_embeddings=folder / "text.npy",
    )
    overrides = {
        "data.source.webdataset_base_url": folder / "data/{}.tar",
        "data.source.shard_width": 5,
        "data.source.img_embeddings_url": folder / "data/img_emb",
        "data.source.text_embeddings_url": folder / "data/text_emb",
        "train.duration": "5 steps",
        "sample.num_images": 0,
    }
    import_checkpoint(
        folder / "checkpoint.pth", folder / "run", overrides=[f"{key}={value}" for key, value in overrides.items()]
    )
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


def starting(imported, output, name="checkpoint.pth"):
    config = json.loads(RunDir(imported / "run").config.read_text())
    return {**config, "output": str(output), "start": {"name": "local", "path": str(imported / name)}}


def newest(run):
    return storage.read(max(RunDir(run).checkpoints.iterdir()), verified=True)


def test_it_goes_on_with_the_same_bits_as_the_imported_run(imported, tmp_path):
    train(starting(imported, tmp_path / "started"))
    train({**json.loads(RunDir(imported / "run").config.read_text()), "output": str(imported / "run")})
    ours, theirs = newest(tmp_path / "started"), newest(imported / "run")
    assert ours.state["step"] == theirs.state["step"] == 5
    assert ours.files.keys() == theirs.files.keys()
    for entry, tensors in theirs.files.items():
        torch.testing.assert_close(ours.files[entry], tensors, rtol=0, atol=0)
    assert ours.manifest.meta["started_from"] == str(imported / "checkpoint.pth")


def test_a_network_of_another_shape_is_refused_by_name(imported, tmp_path):
    config = starting(imported, tmp_path / "started")
    config["task"]["unets"][0]["model"]["norm_num_groups"] = 1
    with pytest.raises(ConfigError, match="unet_0: norm_num_groups is 1 in the run, and must be"):
        train(config)
    assert not RunDir(tmp_path / "started").checkpoints.exists()
