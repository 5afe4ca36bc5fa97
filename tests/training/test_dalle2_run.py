"""The examples that are written as for DALLE2-pytorch train on shards, as they stand but for length and paths."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from eclosion import check, train
from eclosion.config.load import read_file
from eclosion.data.source import part_of_data
from eclosion.rng import generator
from eclosion.rundir import RunDir
from eclosion.sampling import load_trained, make_images, to_uint8
from eclosion.sampling.examples import from_samples, prepared

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("dalle2*.json"))


# Where each example says how images are made: for all networks, or for each.
SAMPLERS = {
    "dalle2_decoder": ["task.unets[0].sampler", "task.unets[1].sampler"],
    "dalle2_minimal": ["sample.sampler"],
}


def example(path, shards):
    """An example with its paths to the shards replaced."""
    config = read_file(path)
    assert config["data"]["webdataset_base_url"] == "shards/clipart/{}.tar"
    config["data"] |= {"webdataset_base_url": f"{shards}/{{}}.tar", "img_embeddings_url": f"{shards}/img_emb"}
    return config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_trains(path, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the example saves to
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


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A file of weights of the original's Inception network; they are random."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = theirs.FeatureExtractorInceptionV3("theirs", ["64", "logits_unbiased"])
    drawn = torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        if tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=drawn)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.slow
def test_metrics_of_the_original_are_what_torchmetrics_finds_on_the_same_images(
    shards, inception, tmp_path, monkeypatch
):
    """At the end of each epoch; images made anew from the checkpoint, and the images of the val part."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    config = example(EXAMPLES[1], shards)
    path = {"feature": 64, "feature_extractor_weights_path": str(inception)}
    config["evaluate"] = {"n_evaluation_samples": 40, "FID": path, "KID": path | {"subset_size": 40, "subsets": 2}}
    config["train"]["epoch_samples"] = 32
    config["train"]["epochs"] = 2
    sections = {"data.num_threads": 0, "sample.num_images": 0, "validate.num_samples": 4}
    overrides = [f"{key}={value}" for key, value in sections.items()]
    overrides += [f"output={tmp_path / 'run'}", "sample.sampler.num_inference_steps=2"]
    overrides += ["evaluate.sampler.num_inference_steps=2", "evaluate.batch_size=8"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = RunDir(train(config, overrides))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    scored = {line["step"]: line for line in lines if "evaluate/fid/inception" in line}
    assert list(scored) == [2, 4]  # each epoch has two batches
    assert scored[4]["evaluate/kid_std/inception"] >= 0

    trained = load_trained(run.root, device="cpu")
    val = part_of_data(trained.run.data.source, "val").open()
    batch = from_samples(val, trained.run.data, None, seed=0)
    order = generator(0, "examples", val.fingerprint).permutation(len(val))
    made = make_images(
        trained.task,
        range(40),
        seed=trained.run.evaluate.seed,
        sampler=trained.run.evaluate.sampler,
        examples=prepared(trained.task, batch, trained.device).rows([order[i % len(val)] for i in range(40)]),
        batch_size=8,
    )
    theirs = fid.FrechetInceptionDistance(**path)
    theirs.update(torch.from_numpy(to_uint8(batch["image"])).permute(0, 3, 1, 2), real=True)
    theirs.update(torch.from_numpy(made).permute(0, 3, 1, 2), real=False)
    # 40 images in 64 dimensions: their root of a singular product has an error of its own
    assert scored[4]["evaluate/fid/inception"] == pytest.approx(float(theirs.compute()), rel=1e-3)
