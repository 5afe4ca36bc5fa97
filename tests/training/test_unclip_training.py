"""A cascade from 16 to 32 pixels on shards with embeddings: killed and resumed, exported, trained by two processes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eclosion
from eclosion import ConfigError, UnclipDecoderPipeline, export, sample, shard, train
from eclosion.data.loader import Loader
from eclosion.diffusion.lowres import resize
from eclosion.exporting import _networks
from eclosion.registry import build
from eclosion.rng import generator
from eclosion.sampling import load_trained, pairs, to_uint8
from eclosion.sampling.examples import in_order

MODEL = {
    "base_channels": 4,
    "channel_mults": [1, 2],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 4,
    "num_text_tokens": 3,
    "conv_in_kernel_sizes": [3],
}


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLOSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of butterflies, each with its mean colours for an embedding, and a text of two tokens."""
    folder = tmp_path_factory.mktemp("shards")
    source = build("sources", {"name": "butterflies", "size": 24, "resolution": 32})
    samples = source.open()
    means = [np.asarray(samples.read(i).image, "f4").mean((0, 1)) / 255 for i in range(len(samples))]
    np.save(folder / "image.npy", np.array(means, "f4"))
    np.save(folder / "text.npy", np.random.default_rng(0).normal(size=(24, 2, 5)).astype("f4"))
    given = {"image_embeddings": folder / "image.npy", "text_embeddings": folder / "text.npy"}
    return shard(source, folder / "out", samples_per_shard=8, **given).folder


def cascade(output, shards, **sections):
    """A run that uses everything random: crops, blur, noise, hidden conditions, estimates, several averages."""
    schedule = {"name": "cosine", "num_train_timesteps": 20}
    config = {
        "output": str(output),
        "data": {
            "source": {
                "name": "webdataset",
                "webdataset_base_url": str(shards / "{}.tar"),
                "shard_width": 5,
                "img_embeddings_url": str(shards / "img_emb"),
                "text_embeddings_url": str(shards / "text_emb"),
            },
            "image_size": 32,
            "horizontal_flip": True,
        },
        "task": {
            "name": "unclip_decoder",
            "unets": [
                {
                    "model": {**MODEL, "text_conditioned": True, "self_cond": True},
                    "image_size": 16,
                    "learned_variance": {},
                    "noise_schedule": schedule,
                },
                {
                    "model": {**MODEL, "memory_efficient": True},
                    "prediction_type": "v_prediction",
                    "lowres": {"noise": True},
                    "crop_size": 16,
                    "noise_schedule": schedule,
                },
            ],
        },
        "train": {"duration": "6 steps", "batch_size": 4, "micro_batch_size": 2, "mixed_precision": "no"},
        "optimizer": {"learning_rate": 1e-3},
        "ema": {"decays": [0.5]},
        "sample": {
            "every": "6 steps",
            "num_images": 2,
            "sampler": {"name": "ddim", "num_inference_steps": 2},
            "guidance_scale": 2.0,
        },
        "checkpoint": {"every": "2 steps"},
        "track": {"every": "1 steps"},
    }
    for name, options in sections.items():
        config[name] = {**config.get(name, {}), **options} if isinstance(options, dict) else options
    return config


def weights(run, name):
    return load_file(max((run / "checkpoints").glob("step-*")) / f"{name}.safetensors")


# Loads the libraries once, and then is each process of each job: one that is killed after so many steps, or several.
FORKS = """
import json, os, signal, socket, sys, time
import eclosion.tasks.unclip_pipeline  # loads what takes longest
from eclosion.training.run import train
from eclosion.training.state import TrainState

def fork(config, kill_after=None, **environment):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ.update(environment)
            if kill_after:
                advance = TrainState.advance
                def advanced(self):
                    advance(self)
                    if self.step == kill_after:
                        while not os.path.isdir(config["output"] + "/checkpoints/step-00000002"):
                            time.sleep(0.01)  # it is written in the background
                        os.kill(os.getpid(), signal.SIGKILL)
                TrainState.advance = advanced
            train(config)
            code = 0
        finally:
            os._exit(code)
    return child

for job in json.loads(sys.argv[1]):
    size = job.pop("processes", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
    children = [fork(**job, **(address | rank if size > 1 else {})) for rank in ranks]
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run that nothing disturbed."""
    return train(cascade(tmp_path_factory.mktemp("runs") / "whole", shards))


@pytest.fixture(scope="module")
def aside(shards, tmp_path_factory):
    """The folder of two more: `killed` after its third step, and `two`, finished by two processes."""
    folder = tmp_path_factory.mktemp("aside")
    jobs = [
        {"config": cascade(folder / "killed", shards, export="unclip"), "kill_after": 3},
        {"config": cascade(folder / "two", shards), "processes": 2},
    ]
    command = [sys.executable, "-c", FORKS, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[-9]", "[0, 0]"], done.stderr
    return folder


def test_a_killed_cascade_ends_with_the_same_bits_and_its_pipeline_makes_its_images(whole, aside, shards, results):
    found = results(whole)
    assert {"unet_0.safetensors", "unet_1.ema.safetensors", "unet_1.optimizer.safetensors"} <= found["hashes"].keys()
    assert {"train/loss/unet_0", "train/loss/unet_1"} <= found["numbers"][-1].keys()
    assert len(found["pictures"]) == 2
    killed = aside / "killed"
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"step-00000002"}
    train(cascade(killed, shards, export="unclip"))
    assert results(killed) == found

    pipeline = UnclipDecoderPipeline.from_pretrained(killed, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    trained = load_trained(whole)
    batch = Loader(trained.run.data.source.open(), trained.run.data, seed=0, batch_size=2).batch_at(range(2))
    made = pipeline(batch["image_embed"], text_encodings=batch["text_encodings"], seeds=3, output_type="pt").images
    ours = trained.task.sample(
        trained.task.conditions(range(2), batch),
        [generator(3, "sample", i) for i in range(2)],
        sampler=trained.run.sample.sampler,
        guidance_scale=trained.run.sample.guidance_scale,
    )
    assert ours.shape == (2, 3, 32, 32)
    assert torch.equal(made, ours)


def test_a_frozen_network_stays_as_it_is_and_in_the_checkpoint(shards, tmp_path):
    run = train(cascade(tmp_path / "run", shards, train={"freeze": ["unet_0"], "duration": "3 steps"}))
    before, after = (load_file(run / "checkpoints" / f"step-0000000{n}" / "unet_0.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not weights(run, "unet_0")["conv_out.weight"].any()  # as it began
    assert weights(run, "unet_1")["conv_out.weight"].any()
    numbers = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("train/loss" in line for line in numbers)


def test_a_preview_is_made_without_networks_that_nothing_was_trained_or_loaded_into(shards, tmp_path, whole):
    def short(name, *frozen, **options):
        return train(cascade(tmp_path / name, shards, train={"freeze": frozen, "duration": "1 steps"}), **options)

    upper, lower = short("upper", "unet_0"), short("lower", "unet_1")
    told = "unet_0: frozen, and never trained; previews are made with unet_1 alone"
    assert told in (upper / "events.jsonl").read_text()
    assert "previews are made with unet_0 alone" in (lower / "events.jsonl").read_text()
    assert json.loads((upper / "checkpoints" / "step-00000001" / "state.json").read_text())["untrained"] == ["unet_0"]
    trained = load_trained(upper, device="cpu")
    data = trained.run.data
    batch = Loader(data.source.open(), in_order(data), seed=0, batch_size=2).batch_at(range(2))
    small = resize(batch["image"], (16, 16))
    made = trained.task.sample(
        trained.task.conditions(range(2)),
        [generator(0, "sample", i) for i in range(2)],
        sampler=trained.run.sample.sampler,
        guidance_scale=trained.run.sample.guidance_scale,
        first=1,
        image=small,
    )
    with Image.open(upper / "samples" / "step-00000001.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(pairs(to_uint8(small), to_uint8(made))))
    last = max((whole / "checkpoints").glob("step-*"))  # what was trained elsewhere is used, though it is frozen
    loaded = short("loaded", "unet_0", resume=str(last), accept_changes=True)
    assert "never trained" not in (loaded / "events.jsonl").read_text()


def made(folder):
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_what_was_never_trained_makes_neither_images_nor_a_pipeline(shards, tmp_path):
    def short(*frozen, **options):
        train_on = {"freeze": frozen, "duration": "1 steps"}
        folder = tmp_path / "-".join([*frozen, *options])
        return train(cascade(folder, shards, train=train_on, sample={"num_images": 0}, **options))

    upper, lower = short("unet_0"), short("unet_1")
    note = "unet_0: frozen, and never trained; images are made with unet_1 alone"
    with pytest.warns(UserWarning, match=note):
        found = sample(upper, from_data="train", num_images=2, out=tmp_path / "found")
    asked = sample(upper, from_data="train", num_images=2, first="unet_1", out=tmp_path / "asked")
    assert made(found) == made(asked)
    with pytest.warns(UserWarning, match="unet_1: frozen, and never trained; images are made with unet_0 alone"):
        assert sample(lower, num_images=1, out=tmp_path / "small").is_dir()
    with Image.open(tmp_path / "small" / "000000.png") as small:
        assert small.size == (16, 16)
    for run, options in ((upper, {"first": 0}), (upper, {"last": 0}), (lower, {"first": 1}), (lower, {"last": 1})):
        name = "unet_0" if run == upper else "unet_1"
        with pytest.raises(ConfigError, match=f"{name}: frozen, and never trained, so that it makes noise. Leave fir"):
            sample(run, from_data="train", num_images=1, **options)
    with pytest.raises(ConfigError, match=r"unet_0: frozen, and never trained, so that a pipeline .* Train it, or"):
        export(upper, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"unet_1: frozen, and never trained, so that a pipeline .* Set export=no"):
        short("unet_1", export="unclip")
    assert not list((tmp_path / "unet_1-export").glob("checkpoints/*"))  # nothing was trained


def test_all_networks_of_an_export_are_compared(shards, tmp_path, monkeypatch):
    """The negative control: the second network on disk is not the one that was written."""
    from eclosion.errors import EnvironmentProblem
    from eclosion.models.unclip_unet import UnclipUNet

    run = train(cascade(tmp_path / "run", shards, train={"duration": "1 steps"}, sample={"num_images": 0}))
    folder = export(run, tmp_path / "out")
    assert {"README.md", "model_index.json", "unet_0", "unet_1"} == {p.name for p in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "pipeline(image_embeds=image_embeds, text_encodings=text_encodings).images" in card
    assert list(_networks(UnclipDecoderPipeline.from_pretrained(folder, low_cpu_mem_usage=False))) == [
        "unet_0",
        "unet_1",
    ]
    fresh = "import sys, eclosion; print(eclosion.UnclipDecoderPipeline.from_pretrained(sys.argv[1]).unet_1.dtype)"
    loaded = subprocess.run([sys.executable, "-c", fresh, folder], capture_output=True, text=True, check=True)
    assert loaded.stdout == "torch.float32\n"
    honest = UnclipUNet.from_pretrained

    def spoilt(*args, **kwargs):
        net = honest(*args, **kwargs)
        if net.config.lowres_cond:
            net.conv_out.bias.data[0] += 1e-3
        return net

    monkeypatch.setattr(UnclipUNet, "from_pretrained", spoilt)
    with pytest.raises(EnvironmentProblem, match=r"does not load as the network that was written \(unet_1\)"):
        export(run, tmp_path / "again")
    assert not (tmp_path / "again" / "model_index.json").exists()
    with pytest.raises(ConfigError, match="'ddim' is no pipeline for a cascade"):
        export(run, tmp_path / "ddim", pipeline="ddim")


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_pipeline_that_a_cascade_cannot_be_is_refused_before_training(kind, shards, tmp_path):
    with pytest.raises(ConfigError, match="Use unclip"):
        train(cascade(tmp_path / "run", shards, export=kind))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_processes_train_two_networks_as_one_does(whole, aside, results):
    """With the settings that a run has by itself; DDP finds no parameter unused, and none used twice."""
    ours, theirs = results(whole)["numbers"], results(aside / "two")["numbers"]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("unet_0", "unet_1"):  # gradients are added in another order
            assert a[f"train/loss/{name}"] == pytest.approx(b[f"train/loss/{name}"], rel=1e-4)
    for name in ("unet_0.ema", "unet_1.ema"):
        mine, other = weights(whole, name), weights(aside / "two", name)
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], rtol=1e-2, atol=1e-3)


def test_a_cascade_is_scored_on_what_it_makes_of_the_samples_of_a_part(shards, tmp_path):
    """Each image beside its original; and nothing of the run is another for it."""
    small = {"name": "efficientnet_lite0", "image_size": 32}
    metrics = ["kid", {"name": "clip_score", "against": "original", "extractor": small}]
    evaluate = {"every": "3 steps", "metrics": metrics, "extractor": small, "sampler": {"name": "ddim"}}
    evaluate |= {"split": "train", "num_samples": 500, "batch_size": 5}
    evaluate["sampler"]["num_inference_steps"] = 2
    plain = train(cascade(tmp_path / "plain", shards))
    run = train(cascade(tmp_path / "run", shards, evaluate=evaluate))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line for line in lines if "evaluate/kid/efficientnet_lite0" in line}
    assert list(scored) == [3, 6]
    assert "evaluate/clip_score/efficientnet_lite0" in scored[6]
    rows = json.loads((run / "results.json").read_text())["results"]
    assert {row["n"] for row in rows} == {
        len(build("sources", load_trained(run).meta["config"]["data"]["source"]).open())
    }
    with Image.open(run / "evaluations" / "step-00000006" / "grid.png") as grid:
        assert grid.info["legend"]  # originals stand above what was made of them
    for name in ("unet_0", "unet_1.ema", "unet_1.optimizer"):
        assert {key: value.tolist() for key, value in weights(run, name).items()} == {
            key: value.tolist() for key, value in weights(plain, name).items()
        }


@pytest.mark.parametrize(("frozen", "side", "networks"), [("unet_1", 16, ["unet_0"]), ("unet_0", 32, ["unet_1"])])
def test_networks_that_were_never_trained_make_no_images_that_are_scored(frozen, side, networks, shards, tmp_path):
    small = {"name": "efficientnet_lite0", "image_size": 32}
    metrics = ["kid", {"name": "clip_score", "against": "original", "extractor": small}]
    evaluate = {"every": "2 steps", "metrics": metrics, "extractor": small, "split": "train", "num_samples": 4}
    evaluate["sampler"] = {"name": "ddim", "num_inference_steps": 2}
    options = {"freeze": [frozen], "duration": "2 steps"}
    run = train(cascade(tmp_path / "run", shards, evaluate=evaluate, train=options, sample={"num_images": 0}))
    rows = json.loads((run / "results.json").read_text())["results"]
    assert len(rows) == 3
    for row in rows:
        assert row["made"]["size"] == [side, side]
        assert row["made"]["networks"] == networks
        assert row["against"] is None or row["against"]["size"] == [side, side]
    again = eclosion.evaluate(run, device="cpu")
    assert [row.value for row in again.results] == [row["value"] for row in rows]
    assert f"{frozen}: frozen, and never trained; {networks[0]} is scored alone" in again.notes
