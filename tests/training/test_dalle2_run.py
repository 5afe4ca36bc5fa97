"""The examples that are written as for DALLE2-pytorch train on shards, as they stand but for length and paths."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from eclosion import check, train
from eclosion.config.load import read_file
from eclosion.data.clipart import ClipartSource
from eclosion.rundir import RunDir
from eclosion.sharding import shard

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("dalle2*.json"))


# Where each example says how images are made: for all networks, or for each.
SAMPLERS = {
    "dalle2_decoder": ["task.unets[0].sampler", "task.unets[1].sampler"],
    "dalle2_minimal": ["sample.sampler"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Clip art in shards, with embeddings of as many numbers as the examples say."""
    folder = tmp_path_factory.mktemp("shards")
    samples = ClipartSource().open()
    embeddings = np.random.default_rng(0).standard_normal((len(samples), 1280), np.float32)
    np.save(folder / "embeddings.npy", embeddings)
    shard(samples, folder / "clipart", samples_per_shard=64, image_embeddings=folder / "embeddings.npy")
    return folder / "clipart"


def example(path, shards):
    """An example with its paths to the shards replaced."""
    config = read_file(path)
    assert config["data"]["webdataset_base_url"] == "shards/clipart/{}.tar"
    config["data"] |= {"webdataset_base_url": f"{shards}/{{}}.tar", "img_embeddings_url": f"{shards}/img_emb"}
    return config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_trains(path, shards, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(example(path, shards)))
    overrides = [
        f"output={tmp_path / 'run'}",
        "train.duration=3 steps",
        "train.batch_size=4",
        "data.num_threads=0",
        "sample.num_images=2",
        *(f"{sampler}.num_inference_steps=2" for sampler in SAMPLERS[path.stem]),
        "validate.num_samples=4",
        "checkpoint.every=2 steps",
    ]
    found = check(config, overrides)
    assert found.problems == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = RunDir(train(config, overrides))
    assert [str(warning.message) for warning in caught] == found.notes
    assert run.checkpoint(3).is_dir()
    assert run.sample_grid(3).is_file()
    logged = set().union(*(json.loads(line) for line in run.metrics.read_text().splitlines()))
    names = [f"/{network.name}" for network in found.networks] if len(found.networks) > 1 else [""]
    assert {f"{kind}{name}" for kind in ("train/loss", "validation/loss") for name in names} <= logged


def test_a_misspelt_key_stops_the_command_unless_it_may_be_left_out(shards, tmp_path, command):
    config = example(EXAMPLES[1], shards)
    config["decoder"]["unets"][0]["dimm_mults"] = [1, 2]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    refused = command("check", path, f"output={tmp_path / 'run'}")
    assert refused.code == 2
    told = "decoder.unets[0].dimm_mults is not an option. Did you mean 'dim_mults'?"
    assert f"error: {told}" in refused.err
    done = command("check", path, f"output={tmp_path / 'run'}", "--lenient", "--json")
    assert done.code == 0
    assert f"{told} It is left out." in json.loads(done.out)["notes"]
