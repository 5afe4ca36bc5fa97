"""`evaluate`: of a run, a checkpoint, a pipeline, a folder or data, against any of these."""

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image
from torch import nn

from eclosion import evaluate, export, sample, shard, stats, train
from eclosion.config.load import load
from eclosion.data.folder import FolderSource
from eclosion.errors import ConfigError, DataError, EnvironmentProblem, UserError
from eclosion.evaluation import evaluating
from eclosion.evaluation.images import Seen
from eclosion.evaluation.opening import Asked, Opener
from eclosion.evaluation.pipelines import FollowedData, PipelineImages, images_of_pipeline
from eclosion.models.image_encoder import ImageEncoder, Preprocess
from eclosion.registry import ENCODERS, build, part
from eclosion.rng import integer_seed
from eclosion.sampling import save_png
from eclosion.sampling.examples import from_samples
from eclosion.sampling.pictures import to_uint8
from eclosion.tasks.unconditional import UnconditionalTask

DIM = 6
SOURCE = "butterflies,size=12,resolution=16"
OTHERS = "butterflies,size=12,resolution=16,seed=1"


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, 3, bias=False)
        weights = np.random.default_rng(0).normal(size=self.conv.weight.shape)
        self.conv.weight.data = torch.from_numpy(weights).float()

    def forward(self, pixels):
        return self.conv(pixels).amax((2, 3))


@part
class Fake:
    """An encoder that needs no file."""

    def build(self):
        preprocess = Preprocess(resize=(8, 8), crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
        return ImageEncoder(Tiny(), preprocess, dim=DIM, normalize=False)


@pytest.fixture(autouse=True)
def _fakes(tmp_path, monkeypatch):
    module = ModuleType("fake_encoders")
    module.Fake = Fake
    monkeypatch.setattr(Fake, "__module__", "fake_encoders")
    monkeypatch.setitem(sys.modules, "fake_encoders", module)
    monkeypatch.setitem(ENCODERS, "fake", "fake_encoders:Fake")
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A copy, since results are written into it."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


@pytest.fixture
def folder(uninterrupted, tmp_path):
    return sample(uninterrupted, num_images=10, num_inference_steps=2, out=tmp_path / "made")


def picture(path):
    with Image.open(path) as image:
        image.load()
        return image


FEW = {"num_images": 10, "num_inference_steps": 2, "extractor": "fake"}


def test_scores_of_a_run_are_kept_with_it(run):
    before = (run / "metrics.jsonl").read_text()
    found = evaluate(run, **FEW)
    results = json.loads((run / "results.json").read_text())["results"]
    assert [row["score"] for row in results] == ["kid"]
    row = results[0]
    assert row["made"]["step"] == 12
    assert row["made"]["sampler"]["num_inference_steps"] == 2
    assert row["against"]["split"] == "train"
    assert row["n_reference"] == 40
    assert row["value"] == found.results[0].value
    assert (run / "metrics.jsonl").read_text() == before  # the run scores itself with other options
    assert any(note.startswith("results.json alone has") for note in found.notes)
    assert any("no part to validate with" in note for note in found.notes)
    assert picture(run / "evaluations" / "step-00000012" / "grid.png").width > 16


def test_a_run_scores_as_it_scored_itself_with_the_options_of_its_config(make_config, tmp_path):
    section = {"every": 1, "metrics": ["fid"], "extractor": "fake", "num_samples": 6, "seed": 5, "batch_size": 4}
    sampler = {"name": "euler", "num_inference_steps": 2}
    config = make_config(tmp_path / "run", train={"duration": "1 steps"}, sample={"num_images": 0})
    run, told = train(config | {"evaluate": section | {"sampler": sampler}}), []
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    itself = {line["step"]: line["evaluate/fid/fake"] for line in logged if "evaluate/fid/fake" in line}
    row = evaluate(run, on_image=lambda *done: told.append(done)).results[0]
    assert row.value == itself[1]
    assert (row.score, row.extractor.name, row.n, row.seed, row.made["seed"]) == ("fid", "fake", 6, 5, 5)
    assert row.made["sampler"]["name"] == "euler"
    assert (4, 6) in told
    own = {"step": 1, "samples_seen": 8, "evaluate/fid/fake": row.value}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[len(logged) :]] == [own]
    others = [{"against": SOURCE}, {"num_images": 5}, {"seed": 6}, {"num_inference_steps": 3}, {"metrics": "kid"}]
    for options in others:
        evaluate(run, **options)
    assert (run / "metrics.jsonl").read_text().splitlines() == lines
    assert evaluate(run, metrics="kid", seed=0).results[0].made["seed"] == 0
    with pytest.raises(ConfigError, match="makes images of 16x16 pixels"):
        evaluate(run, image_size=32)


def test_a_run_that_knows_classes_makes_them_as_often_as_its_data_has_them(make_config, tmp_path, monkeypatch):
    section = {"every": 1, "metrics": ["fid"], "extractor": "fake", "num_samples": 12, "batch_size": 4}
    section["sampler"] = {"name": "euler", "num_inference_steps": 2}
    config = make_config(tmp_path / "run", train={"duration": "1 steps"}, sample={"num_images": 0})
    config["task"] |= {"class_conditional": True}
    root = tmp_path / "data"
    for i in range(16):
        save_png(Image.new("RGB", (20, 20), (16 * i, 0, 0)), root / ("few" if i < 3 else "many") / f"{i}.png")
    config["data"]["source"] = {"name": "folder", "root": str(root), "class_names_from_folders": True}
    asked = []
    conditions = UnconditionalTask.conditions

    def watched(task, indices, examples=None):
        asked.extend(examples["label"].tolist() if examples is not None else [])
        return conditions(task, indices, examples)

    monkeypatch.setattr(UnconditionalTask, "conditions", watched)
    run = train(config | {"evaluate": section})
    in_loop, asked[:] = list(asked), []
    itself = json.loads((run / "results.json").read_text())["results"][-1]
    again = evaluate(run).results[0]
    assert in_loop == asked
    assert 9 <= sum(in_loop) < 12
    assert (again.value, again.made["fingerprint"]) == (itself["value"], itself["made"]["fingerprint"])
    assert again.made["classes"] == f"the train data of {run}"
    shutil.move(root, tmp_path / "elsewhere")
    asked.clear()
    found = evaluate(run, against=SOURCE)
    assert (asked, found.results[0].made.get("classes")) == ([], None)
    assert any("classes come in equal shares, as the run's data is not there" in note for note in found.notes)


def test_a_second_evaluation_replaces_the_same_score_and_leaves_others(run):
    once = evaluate(run, **FEW)
    again = evaluate(run, **FEW)
    assert again.results[0].value == once.results[0].value
    evaluate(run, **FEW | {"num_inference_steps": 3})
    evaluate(run, **FEW, metrics="kid,degree=2,fid", checkpoint=9)
    rows = json.loads((run / "results.json").read_text())["results"]
    told = [(row["score"], row["made"]["step"], row["made"]["sampler"]["num_inference_steps"]) for row in rows]
    assert told == [("kid", 12, 2), ("kid", 12, 3), ("kid", 9, 2), ("fid", 9, 2)]


def test_images_of_a_run_score_as_their_files_do(run, folder):
    made = evaluate(run, against=SOURCE, **FEW).results[0]
    # the files were made with another number at once, which may change a last bit of a few
    files = evaluate(folder, against=SOURCE, extractor="fake").results[0]
    assert files.value == pytest.approx(made.value, rel=1e-3)
    assert files.n == made.n == 10
    assert made.n_reference == 12
    one = evaluate(run / "checkpoints" / "step-00000012", against=SOURCE, **FEW).results[0]
    assert one.value == made.value


def test_a_run_that_is_stopped_goes_on_where_it_was(run, tmp_path):
    whole = evaluate(run, out=tmp_path / "whole", batch_size=2, **FEW).results[0]
    calls = []

    def stop(step, steps):
        calls.append(step)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, batch_size=2, on_step=stop, **FEW)
    calls.clear()
    told = []
    again = evaluate(
        run, batch_size=2, on_step=lambda *_: calls.append(0), on_image=lambda *done: told.append(done), **FEW
    )
    assert again.results[0].value == whole.value
    assert (6, 10) in told
    assert (4, 10) not in told
    assert not list((run / "evaluations").rglob("*.safetensors"))
    grids = [picture(path / "grid.png").tobytes() for path in (tmp_path / "whole", again.folder)]
    assert grids[0] == grids[1]


def test_where_results_cannot_go_is_told_before_an_image_is_made(run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text("[]")
    wrong = {
        "file": r"out: \S+/file cannot be made a folder \(File exists\)",
        "file/in": r"out: \S+/file/in cannot be made a folder \(Not a directory\)",
        "foreign": r"results\.json is no file of results",
    }
    for out, message in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            evaluate(run, against=SOURCE, out=tmp_path / out, on_step=no_data, on_phase=no_data, **FEW)
        assert "\n" not in str(error.value)


def test_batches_are_kept_until_the_scores_are_written(folder, tmp_path, monkeypatch):
    def full(path, rows):
        raise EnvironmentProblem("no space")

    options = {"against": SOURCE, "extractor": "fake", "out": tmp_path / "o", "batch_size": 4}
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "append_results", full)
        with pytest.raises(EnvironmentProblem, match="no space"):
            evaluate(folder, **options)
    told = []
    evaluate(folder, on_image=lambda *done: told.append(done), **options)
    assert told[0] == (10, 10)
    assert not (tmp_path / "o" / ".kept").exists()


def test_the_command_tells_scores_and_writes_them_where_it_is_told(command, folder, tmp_path):
    ended = command(
        "evaluate", folder, "--against", SOURCE, "--metrics", "kid,fid", "--extractor", "fake", "--out", tmp_path / "o"
    )
    assert ended.code == 0
    assert f"10 images: {folder}, against {SOURCE}" in ended.out
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line}
    assert "lower" in lines["kid"]
    assert "fake" in lines["fid"]
    assert sorted(path.name for path in (tmp_path / "o").glob("[!.]*")) == ["grid.png", "results.json"]
    ended = command("evaluate", folder, "--against", SOURCE, "--extractor", "fake", "--json")
    kept = json.loads((tmp_path / "o" / "results.json").read_text())["results"]
    assert json.loads(ended.out)["results"][0]["value"] == kept[0]["value"]


def test_a_folder_of_another_size_is_brought_to_that_of_the_images(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(other / f"{i}.png")
    found = evaluate(run, against=other, **FEW)
    assert f"images of {other} are brought to 16x16 pixels, as those that are scored are." in found.notes
    assert found.results[0].against["size"] == [16, 16]
    Image.new("RGB", (9, 9)).save(other / "6.png")
    with pytest.raises(DataError, match=r"6\.png: is 9x9 pixels"):
        evaluate(other, against=SOURCE, extractor="fake")
    assert evaluate(other, against=SOURCE, extractor="fake", image_size=16).results[0].n == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "nowhere"}, r"what: there is no nowhere"),
        ({"what": "butterfles"}, r"Did you mean 'butterflies'"),
        ({"what": 3}, r"what is a int, and must be a run folder"),
        ({"what": build("sources", "butterflies").open()}, r"what is a Butterflies, and must be a run folder"),
        ({"what": SOURCE, "against": OTHERS, "num_images": 1}, r"kid"),
        ({"what": SOURCE, "num_images": 13, "against": SOURCE}, r"holds 12 images, and 13 are asked for"),
        ({"what": SOURCE}, r"kid needs images to compare with"),
        ({"what": SOURCE, "against": "nowhere"}, r"against: there is no nowhere"),
        ({"what": SOURCE, "against": SOURCE, "num_images": 0}, r"num_images \(--n\) is 0, and must be at least 1"),
        ({"what": SOURCE, "against": OTHERS, "image_size": 0}, r"image_size is 0, and must be at least 1"),
        ({"what": SOURCE, "against": OTHERS, "image_size": (8, 0)}, r"image_size is \(8, 0\), and must be at least 1"),
        ({"what": SOURCE, "against": OTHERS, "seed": -1}, r"seed is -1, and must be at least 0"),
        ({"what": SOURCE, "against": OTHERS, "num_inference_steps": [2, -3]}, r"num_inference_steps \(--steps\) is"),
        ({"what": SOURCE, "against": OTHERS, "split": "val"}, r"split is 'val', and the data has no such part"),
        ({"what": SOURCE, "against": SOURCE, "metrics": "degree=2"}, r"begins with the option degree=2"),
        ({"what": SOURCE, "against": SOURCE, "extractor": "fake,fake"}, r"must be one encoder"),
        ({"what": SOURCE, "against": SOURCE, "split": "test"}, r"split is 'test', and the data has no such part"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(**{"extractor": "fake"} | options)
    assert "\n" not in str(error.value)


def test_a_run_without_held_out_images_cannot_say_what_it_memorised(run, folder):
    with pytest.raises(ConfigError, match="compares with images that were not trained on"):
        evaluate(run, metrics="memorisation", **FEW)
    found = evaluate(run, metrics="memorisation", against=SOURCE, **FEW)
    assert (run / "evaluations" / "step-00000012" / "memorised.png").exists()
    assert {row.score for row in found.results} >= {"memorised"}


# --- the two sides ----------------------------------------------------------------------------------------------------


def test_what_is_made_to_compare_with_starts_from_other_noise(run):
    """Sets that share their noise are nearer than any two draws: a wrong number, with an interval that excludes 0."""
    with ExitStack() as stack:
        opener = Opener(stack, Asked(num_images=3, num_inference_steps=2, device="cpu"))
        made = opener.scored(run, None)
        others = opener.against(run, made)
        assert not torch.equal(made.images.read([1]).pixels, others.read([1]).pixels)
        again = Opener(stack, Asked(num_images=3, num_inference_steps=2, device="cpu")).against(run, made)
        assert torch.equal(again.read([1]).pixels, others.read([1]).pixels)
    row = evaluate(run, against=run, **FEW).results[0]
    assert row.made["seed"] == 0
    assert row.against["seed"] == integer_seed(0, "evaluate", "against") % 2**32


def test_how_images_are_made_goes_to_both_sides_and_the_checkpoint_to_what_is_scored(run):
    row = evaluate(run, against=run, checkpoint=9, sampler="euler", **FEW).results[0]
    assert (row.made["step"], row.against["step"]) == (9, 12)
    assert row.made["sampler"] == row.against["sampler"]
    assert row.against["sampler"]["num_inference_steps"] == 2
    assert row.n == row.n_reference == 10


def test_images_are_not_compared_with_themselves(folder, tmp_path):
    file = stats(FolderSource(root=folder), tmp_path / "s.safetensors", extractor="fake")
    for what, against in [(folder, folder), (SOURCE, SOURCE), (folder, file)]:
        with pytest.raises(ConfigError, match="is compared with itself, which says nothing of it"):
            evaluate(what, against=against, extractor="fake")
    with pytest.raises(ConfigError, match="is compared with itself"):
        evaluate(folder, against=folder, num_images=5, extractor="fake")


UNUSED = {
    "sampler": "ddpm",
    "num_inference_steps": 7,
    "guidance_scale": 3.0,
    "checkpoint": "best",
    "split": "test",
    "conditions": SOURCE,
    "train": OTHERS,
}


def test_options_that_nothing_uses_are_all_named(folder, command, tmp_path):
    real = shutil.copytree(folder, tmp_path / "real")
    with pytest.raises(ConfigError) as error:
        evaluate(folder, against=real, extractor="fake", **UNUSED)
    assert len(error.value.problems) == len(UNUSED)
    for name, problem in zip(UNUSED, error.value.problems, strict=True):
        assert problem.startswith((f"{name} is ", f"{name} (--steps) is 7"))
        assert "what is a folder of images, against is a folder of images, scored by kid. Leave it out." in problem
    told = command("evaluate", folder, "--against", real, "--extractor", "fake", "--steps", "7", "--checkpoint", "best")
    assert told.code == 2
    assert [line.split(" is ")[0] for line in told.err.splitlines()] == [
        "error: num_inference_steps (--steps)",
        "error: checkpoint",
    ]
    with pytest.raises(ConfigError, match="sampler is 'ddpm', and nothing uses it: what is data"):
        evaluate(SOURCE, against=OTHERS, sampler="ddpm", extractor="fake")


def test_an_option_may_be_of_the_other_side_alone(folder, run):
    options = {"sampler": "euler", "num_inference_steps": 2, "num_images": 6}
    row = evaluate(folder, against=run, extractor="fake", **options).results[0]
    assert row.against["sampler"]["name"] == "euler"
    assert row.n_reference == 6
    with pytest.raises(ConfigError, match=r"checkpoint is 9, and nothing uses it.*name its folder as against"):
        evaluate(folder, against=run, checkpoint=9, extractor="fake", **options)


def test_what_no_metric_compares_with_is_not_ignored(decoder, tmp_path):
    run = shutil.copytree(decoder, tmp_path / "run")
    with pytest.raises(ConfigError, match="against is 'nothere', and nothing uses it: what is a run, scored by cosine"):
        evaluate(run, against="nothere", metrics="cosine", extractor="fake")


def test_a_choice_among_data_follows_from_the_seed():
    chosen = [
        evaluate(SOURCE, against=OTHERS, num_images=6, seed=seed, extractor="fake").results[0].made["fingerprint"]
        for seed in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


# --- pipelines -------------------------------------------------------------------------------------------------------


def no_data():
    raise AssertionError


ASKED = {"count": 4, "seed": 3, "sampler": None, "guidance_scale": None, "device": "cpu", "followed": no_data}


def test_images_of_a_pipeline_are_those_that_it_makes(uninterrupted, tmp_path):
    folder = export(uninterrupted, tmp_path / "pipeline", pipeline="ddim")
    images = images_of_pipeline(folder, num_inference_steps=2, **ASKED)
    pipeline = DDIMPipeline.from_pretrained(folder)
    noise = [torch.Generator().manual_seed(integer_seed(3, "sample", i)) for i in (2, 0)]
    wanted = pipeline(batch_size=2, generator=noise, num_inference_steps=2, output_type="np").images
    assert np.array_equal(images.read([2, 0]).pixels.permute(0, 2, 3, 1), np.rint(wanted * 255).astype(np.uint8))
    assert images.size == (16, 16)
    assert images.facts["sampler"]["num_inference_steps"] == 2
    found = evaluate(folder, against=SOURCE, **FEW)
    assert found.results[0].made["what"] == "pipeline"
    assert found.folder is None
    other = images_of_pipeline(folder, num_inference_steps=3, **ASKED)
    assert other.fingerprint != images.fingerprint


def test_a_pipeline_that_makes_no_numbers_is_named(uninterrupted, tmp_path):
    folder = export(uninterrupted, tmp_path / "pipeline", pipeline="ddim")
    images = images_of_pipeline(folder, num_inference_steps=2, **ASKED)
    next(images._pipeline.unet.parameters()).data.fill_(torch.nan)
    with pytest.raises(DataError, match=r"image 1 of .*pipeline is not finite"):
        images.read([1])


class Drawing:
    """A pipeline that draws the length of each caption as a level of grey, with noise from the generators."""

    scheduler = SimpleNamespace(config={"steps": 1})
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=16))
    dtype = torch.float16
    components: ClassVar[dict[str, object]] = {}

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, prompt, generator=None, num_inference_steps=7, guidance_scale=7.5, output_type="pil"):
        levels = np.array([len(caption) for caption in prompt], np.float32)[:, None, None, None] / 255
        noise = np.stack([torch.rand((16, 16, 3), generator=one).numpy() for one in generator])
        return SimpleNamespace(images=levels + noise / 2)


def test_a_pipeline_that_follows_captions_gets_those_of_the_data(tmp_path):
    data = load({"output": "x", "data": {"source": {"name": "butterflies", "size": 3}, "image_size": 16}}).run.data
    samples = data.source.open()
    with_captions = {"followed": lambda: FollowedData(samples, data, 0, "butterflies")}
    images = PipelineImages(tmp_path, Drawing(), count=5, seed=0, options={}, **with_captions)
    seen = images.read([1, 4])
    assert seen.captions == [samples.read(1).caption] * 2
    assert images.facts["sampler"]["num_inference_steps"] == 7
    assert torch.equal(images.read([4]).pixels[0], seen.pixels[1])
    assert not torch.equal(seen.pixels[0], seen.pixels[1])
    with pytest.raises(ConfigError, match="Drawing takes no eta"):
        PipelineImages(tmp_path, Drawing(), count=5, seed=0, options={"eta": 2}, **with_captions)


def test_a_row_says_what_a_pipeline_does_of_its_own_accord(tmp_path):
    data = load({"output": "x", "data": {"source": {"name": "butterflies", "size": 3}, "image_size": 8}}).run.data
    samples = data.source.open()
    with_captions = {"followed": lambda: FollowedData(samples, data, 0, "butterflies")}
    images, others = (
        PipelineImages(tmp_path, Drawing(), count=5, seed=0, options=options, **with_captions)
        for options in ({}, {"guidance_scale": 2.0})
    )
    assert (images.facts["guidance_scale"], others.facts["guidance_scale"]) == (7.5, 2.0)
    assert images.facts["precision"] == "fp16"
    assert images.facts["conditions"] == "butterflies"
    assert images.brings == {"captions", "originals"}
    # the pictures that belong to the captions, in the size of what is made
    seen, wanted = images.read([1]), from_samples(samples, replace(data, image_size=16), None, seed=0)
    place = wanted["caption"].index(seen.captions[0])
    assert np.array_equal(seen.originals.permute(0, 2, 3, 1), to_uint8(wanted["image"][[place]]))


def test_a_folder_that_only_says_it_is_a_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(UserError, match="the pipeline cannot be loaded") as error:
        evaluate(tmp_path, against=SOURCE, **FEW)
    assert "\n" not in str(error.value)


# --- images that follow something ------------------------------------------------------------------------------------

UNET = {
    "name": "unclip_unet",
    "base_channels": 8,
    "channel_mults": [1, 2],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "prediction_type": "sample",
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder of 16 pixels, trained for a step on butterflies with embeddings of six numbers."""
    folder = tmp_path_factory.mktemp("decoder")
    np.save(folder / "rows.npy", np.random.default_rng(0).standard_normal((12, DIM)).astype("f4"))
    butterflies = build("sources", {"name": "butterflies", "size": 12, "resolution": 16})
    shard(butterflies, folder / "tars", samples_per_shard=4, image_embeddings=folder / "rows.npy")
    source = {
        "name": "webdataset",
        "webdataset_base_url": str(folder / "tars" / "{}.tar"),
        "img_embeddings_url": str(folder / "tars" / "img_emb"),
        "shard_width": 5,
        "splits": {"train": 0.34, "val": 0.66},
    }
    model = {key: value for key, value in UNET.items() if key != "prediction_type"}
    config = {
        "output": str(folder / "run"),
        "data": {"source": source, "image_size": 16},
        "task": {"name": "unclip_decoder", "unets": [{"model": model, "prediction_type": "sample"}]},
        "train": {"duration": "1 steps", "batch_size": 2, "mixed_precision": "no"},
        "sample": {"num_images": 0, "sampler": {"name": "ddim", "num_inference_steps": 2}},
        "evaluate": {"sampler": {"name": "ddim", "num_inference_steps": 2}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLOSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train(config)


def test_images_that_follow_embeddings_are_compared_with_them_and_with_their_originals(decoder, tmp_path):
    run = shutil.copytree(decoder, tmp_path / "run")
    found = evaluate(run, metrics="cosine,kid", extractor="fake")
    cosine = next(row for row in found.results if row.score == "cosine")
    kid = next(row for row in found.results if row.score == "kid")
    # as many as there are examples in the split
    assert found.n == cosine.n == kid.n_reference
    assert kid.against["split"] == "val"
    grid = picture(run / "evaluations" / "step-00000001" / "grid.png")
    assert "originals above" in grid.info["legend"]
    many = evaluate(run, metrics="cosine", extractor="fake", num_images=found.n + 1)
    assert any("some follow the same" in note for note in many.notes)


def test_a_decoder_and_its_pipeline_make_the_same_images(decoder, tmp_path):
    folder = export(decoder, tmp_path / "pipeline")
    with ExitStack() as stack:
        opener = Opener(stack, Asked(num_images=4, num_inference_steps=2, device="cpu", guidance_scale=1.0))
        run, pipeline = (opener.scored(what, decoder).images.read([0, 3]) for what in (decoder, folder))
    assert torch.equal(run.pixels, pipeline.pixels)
    assert torch.equal(run.originals, pipeline.originals)
    assert torch.equal(run.conditions, pipeline.conditions)
    with pytest.raises(ConfigError, match=r"the pipeline follows embeddings or captions\. Give conditions"):
        evaluate(folder, **FEW)


def test_a_pipeline_that_follows_data_can_be_compared_with_a_folder_and_with_statistics(decoder, folder, tmp_path):
    pipeline = export(decoder, tmp_path / "pipeline")
    file = stats(FolderSource(root=folder), tmp_path / "s.safetensors", extractor="fake")
    options = FEW | {"num_images": 4, "metrics": "fid", "conditions": decoder}
    rows = [evaluate(pipeline, against=against, **options).results[0] for against in (folder, file)]
    assert rows[0].value == pytest.approx(rows[1].value, rel=1e-6)
    assert rows[0].made["conditions"].startswith("the val data of ")
    for wrong, message in {folder: "a folder of images", file: "a file of statistics"}.items():
        with pytest.raises(ConfigError, match=f"conditions is {message}, and must be a run, a config or a source"):
            evaluate(pipeline, against=folder, **options | {"conditions": wrong})


def test_a_pipeline_that_others_are_compared_with_follows_what_they_follow(decoder, folder, command, tmp_path):
    run, pipeline = shutil.copytree(decoder, tmp_path / "run"), export(decoder, tmp_path / "pipeline")
    row = evaluate(run, against=pipeline, **FEW | {"num_images": 4}).results[0]
    assert row.against["what"] == "pipeline"
    assert row.against["conditions"].startswith("the val data of ")
    with pytest.raises(ConfigError, match=r"the pipeline follows embeddings or captions\. Give conditions"):
        evaluate(folder, against=pipeline, **FEW)
    options = ["--n", 10, "--steps", 2, "--extractor", "fake", "--conditions", decoder, "--json"]
    row = json.loads(command("evaluate", folder, "--against", pipeline, *options).out)["results"][0]
    assert row["n_reference"] == 10
    assert row["against"]["conditions"].startswith("the val data of ")


def test_a_run_can_make_its_images_from_other_data_and_its_row_says_so(decoder, tmp_path):
    run, other = (shutil.copytree(decoder, tmp_path / name) for name in ("run", "other"))
    before = (run / "metrics.jsonl").read_text()
    found = evaluate(run, metrics="kid", extractor="fake", conditions=other, split="train")
    assert found.results[0].made["conditions"].startswith("the train data of ")
    assert (run / "metrics.jsonl").read_text() == before


class Constant:
    """Images of the caller's own."""

    name, fingerprint, facts, brings = "constant", "constant", {}, frozenset()

    def __len__(self):
        return 5

    def read(self, indices):
        return Seen(torch.full((len(indices), 3, 16, 16), 7, dtype=torch.uint8), [f"constant {i}" for i in indices])


def test_images_of_the_callers_own_can_be_scored():
    found = evaluate(Constant(), against=SOURCE, extractor="fake")
    assert found.n == 5
    assert found.results[0].value > 0
