"""Scores in the loop: what they are, that they come back, that they change nothing, and what they decide."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eclosion import ConfigError, train
from eclosion.config.load import load
from eclosion.data.loader import Loader
from eclosion.errors import Interrupted
from eclosion.evaluation import plan
from eclosion.evaluation.made import images_of_run
from eclosion.evaluation.results import Result
from eclosion.registry import build
from eclosion.sampling import load_trained, make_images, to_uint8
from eclosion.sampling.examples import in_order
from eclosion.training import evaluating

KID = "evaluate/kid/efficientnet_lite0"
OTHERS = {"name": "butterflies", "size": 18, "resolution": 20, "seed": 5}
SAMPLER = {"name": "ddim", "num_inference_steps": 2}
EXTRACTOR = {"name": "efficientnet_lite0", "image_size": 32}
EVALUATE = {"every": "4 steps", "num_samples": 13, "sampler": SAMPLER, "extractor": EXTRACTOR, "batch_size": 4}
SCRIPT = Path(__file__).with_name("train_config.py")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """References are kept apart from those of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLOSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def with_evaluation(make_config, output, *, evaluate=(), **sections):
    return make_config(output, sample={"num_images": 0}, **sections) | {
        "evaluate": EVALUATE | dict(evaluate),
        "validate": {"source": OTHERS},
    }


def numbers(run, name=KID):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def kept_in(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def scores_of(run, step):
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["validation"]


def told(run):
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(uninterrupted, tmp_path_factory, own_cache):
    """The tiny run that nothing disturbed, with evaluation."""
    config = json.loads((uninterrupted / "config.json").read_text())
    config["sample"]["num_images"] = 0
    config["checkpoint"]["keep_every"] = 6
    output = str(tmp_path_factory.mktemp("runs") / "whole")
    return train(config | {"output": output, "evaluate": EVALUATE, "validate": {"source": OTHERS}})


def test_the_score_is_that_of_images_made_by_hand_from_the_checkpoint_against_the_validation_images(whole):
    trained = load_trained(whole, device="cpu")
    made = make_images(trained.task, range(13), seed=0, sampler=build("samplers", SAMPLER), batch_size=4)
    real = Loader(build("sources", OTHERS).open(), in_order(trained.run.data), seed=0, batch_size=18)
    images = [torch.from_numpy(made).permute(0, 3, 1, 2), real.batch_at(range(18))["image"]]
    images[1] = torch.from_numpy(to_uint8(images[1])).permute(0, 3, 1, 2)
    encoder = build("encoders", EXTRACTOR).build()
    x, y = (encoder(pixels.float() / 127.5 - 1).double() for pixels in images)
    within, beyond, across = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    for square in (within, beyond):
        square.fill_diagonal_(0)
    value = within.sum() / (13 * 12) + beyond.sum() / (18 * 17) - 2 * across.mean()
    assert list(numbers(whole)) == [4, 8, 12]
    assert numbers(whole)[12] == pytest.approx(float(value), rel=1e-5)
    assert len(set(numbers(whole).values())) == 3


def test_the_results_say_what_each_score_is_a_score_of(whole):
    rows = json.loads((whole / "results.json").read_text())["results"]
    assert [row["value"] for row in rows] == list(numbers(whole).values())
    row = rows[-1]
    assert (row["n"], row["n_reference"], row["seed"]) == (13, 18, 0)
    assert (row["made"]["step"], row["made"]["samples_seen"], row["against"]["split"]) == (12, 96, "val")
    assert row["made"]["sampler"]["num_inference_steps"] == 2
    assert row["interval"][0] < row["value"] < row["interval"][1]
    assert row["floor"]["value"] < row["value"]
    trained = load_trained(whole, device="cpu")
    again = images_of_run(trained, count=13, seed=0, sampler=[build("samplers", SAMPLER)], guidance_scale=1.0)
    assert row["made"]["name"] == again.name
    assert row["made"]["fingerprint"] == again.fingerprint  # as `eclosion evaluate` finds it
    assert (whole / "evaluations" / "step-00000012" / "grid.png").exists()
    assert not [path for path in (whole / "evaluations").rglob(".kept/*") if path.is_file()]


def test_it_changes_nothing_of_the_run(whole, uninterrupted, results):
    assert results(whole)["hashes"] == results(uninterrupted)["hashes"]


def test_a_resumed_run_finds_the_same_numbers(make_config, whole, results, tmp_path):
    run = tmp_path / "part"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    latest = kept_in(run)[-1]
    assert latest < 12
    config = with_evaluation(make_config, run)
    train(config)
    assert results(run)["numbers"] == results(whole)["numbers"]
    assert results(run)["hashes"] == results(whole)["hashes"]
    before = (run / "metrics.jsonl").read_text()
    train(config)  # finished, and evaluated
    assert (run / "metrics.jsonl").read_text() == before


def test_a_signal_in_the_middle_is_obeyed_and_the_evaluation_goes_on_where_it_was(
    make_config, whole, results, tmp_path, monkeypatch
):
    config = with_evaluation(make_config, tmp_path / "run")
    read, calls = evaluating.TaskImages.read, []

    def interrupted(self, indices):
        calls.append(list(indices))
        if len(calls) == 6:  # batches of 4, 4, 4 and 1 at step 4; the second at step 8
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, indices)

    monkeypatch.setattr(evaluating.TaskImages, "read", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 8, which is saved"):
        train(config)
    assert list(numbers(tmp_path / "run")) == [4]
    stopped = len(calls)
    run = train(config)
    assert calls[stopped] == calls[5]  # the first batch of this evaluation was finished, and is kept
    assert results(run)["numbers"] == results(whole)["numbers"]
    assert results(run)["hashes"] == results(whole)["hashes"]
    assert [row["value"] for row in rows_of(run)] == [row["value"] for row in rows_of(whole)]


def rows_of(run):
    return json.loads((run / "results.json").read_text())["results"]


def test_a_score_that_was_logged_and_not_saved_before_a_kill_is_logged_once(make_config, whole, results, tmp_path):
    """The checkpoint of step 12 as it was before its evaluation: what a kill between the two leaves."""
    config = with_evaluation(make_config, tmp_path / "run")
    plain = json.loads(json.dumps(config)) | {"evaluate": EVALUATE | {"every": None}}
    run = train(plain)
    shutil.copy(whole / "metrics.jsonl", run / "metrics.jsonl")
    train(config)
    assert results(run)["numbers"] == results(whole)["numbers"]


def start(config, folder, *, processes):
    path = folder / f"{Path(config['output']).name}.json"
    path.write_text(json.dumps(config))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([*command, str(SCRIPT), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_killed_in_the_middle_of_evaluations_it_ends_with_the_same_numbers_and_bits(
    make_config, whole, results, tmp_path
):
    config = with_evaluation(make_config, tmp_path / "run", checkpoint={"every": "4 steps"})
    evaluations = tmp_path / "run" / "evaluations"
    for step in (4, 8, 12):
        process = start(config, tmp_path, processes=1)
        deadline = time.monotonic() + 120
        while not [path for path in (evaluations / f"step-{step:08d}").rglob("*") if path.is_file()]:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert step not in numbers(tmp_path / "run")
    run = train(config)
    assert results(run)["numbers"] == results(whole)["numbers"]
    assert results(run)["hashes"] == results(whole)["hashes"]
    assert [row["value"] for row in rows_of(run)] == [row["value"] for row in rows_of(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_find_the_numbers_of_one(parallel, make_config, tmp_path):
    """Of the same weights: those of a run that is finished, and is then evaluated and validated."""
    config = with_evaluation(make_config, tmp_path / "one", evaluate={"every": None})
    train(config)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    config |= {"evaluate": EVALUATE, "validate": {"source": OTHERS, "every": "4 steps"}}
    config["train"]["parallel"] = parallel
    train(config)
    process = start(config | {"output": str(tmp_path / "two")}, tmp_path, processes=2)
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    for name in (KID, "validation/loss", "validation/loss_error", "validation/loss/band_3"):
        assert numbers(tmp_path / "one", name) == numbers(tmp_path / "two", name) != {}


@pytest.mark.slow
def test_the_command_shares_its_work_among_the_processes_of_torchrun_and_tells_the_numbers_of_one(whole, tmp_path):
    asked = ["--metrics", "kid,fid", "--num-images", "7", "--steps", "2", "--sampler", "ddim"]
    asked += ["--batch-size", "2", "--json", "--extractor", "efficientnet_lite0,image_size=32", "--device", "cpu"]
    found = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        shutil.copytree(whole, run)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "eclosion", "evaluate", str(run), *asked]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 0, ended.stderr
        told = json.loads(ended.stdout)  # once
        found[processes] = [(row["score"], row["value"], row["interval"]) for row in told["results"]]
        assert len(rows_of(run)) == len(rows_of(whole)) + 2
        assert not list((run / "evaluations").rglob("*.safetensors"))
    assert found[1] == found[2]
    assert [score for score, *_ in found[1]] == ["kid", "fid"]


def scripted(monkeypatch, values, *, seen_by="fingerprint"):
    """An evaluation finds what is written here, by step, with an error of 0.1."""
    key = {"name": "kid", "value": 0.0}

    def found(c, task, part, weights, stop):
        value = values.get(c.state.step, 9.0)
        extractor = evaluating_extractor(seen_by)
        row = Result(
            "kid", key, value, 0.1, None, "lower", 13, 18, 0, None, extractor, {"step": c.state.step}, None, ()
        )
        return evaluating.Measured([row], [], None, np.zeros((1, 16, 16, 3), np.uint8))

    monkeypatch.setattr(evaluating, "_measured", found)


def evaluating_extractor(fingerprint):
    from eclosion.evaluation.results import Extractor

    return Extractor("efficientnet_lite0", {}, "weights", fingerprint, "bicubic")


@pytest.mark.parametrize("best", ["kid", "kid/efficientnet_lite0"])
def test_a_score_decides_which_checkpoint_is_the_best(best, make_config, tmp_path, monkeypatch):
    scripted(monkeypatch, {2: 0.9, 4: 0.2, 6: float("nan"), 8: 0.1, 10: 0.3})  # 0.1 is within the errors of 0.2
    config = with_evaluation(
        make_config, tmp_path / "run", evaluate={"every": "2 steps"}, checkpoint={"every": "3 steps", "best": best}
    )
    config["validate"]["every"] = "3 steps"
    run = train(config)
    assert kept_in(run) == [4, 9, 12]
    assert scores_of(run, 12)["best"] == {"step": 4, "value": 0.2, "error": 0.1}
    assert load_trained(run, checkpoint="best").step == 4
    assert scores_of(run, 12)["networks"]["unet"]["step"] > 0  # validation goes on beside it
    train(config, ["checkpoint.best=validation", "train.duration=13 steps"], accept_changes=True)
    assert scores_of(run, 13)["best"]["step"] == 13


def test_a_score_of_another_extractor_begins_the_search_for_the_best_anew_and_that_is_said(
    make_config, tmp_path, monkeypatch
):
    scripted(monkeypatch, {2: 0.1, 4: 0.3})
    config = with_evaluation(
        make_config, tmp_path / "run", evaluate={"every": "2 steps"}, checkpoint={"every": "2 steps", "best": "kid"}
    )
    run = train(config, ["train.duration=4 steps"])
    assert scores_of(run, 4)["best"]["step"] == 2
    anew = "is measured in another way than at step 2, the best one so far"
    assert not any(anew in event for event in told(run))
    scripted(monkeypatch, {6: 0.7, 8: 0.8}, seen_by="another")
    train(config, ["train.duration=8 steps"], accept_changes=True)
    assert scores_of(run, 8)["best"]["step"] == 6
    assert sum(anew in event for event in told(run)) == 1


def test_another_part_is_compared_with_after_the_last_step(make_config, tmp_path):
    config = with_evaluation(make_config, tmp_path / "run", evaluate={"final_split": "train", "every": "6 steps"})
    run = train(config)
    assert list(numbers(run)) == [6, 12]
    assert list(numbers(run, f"{KID}/train")) == [12]
    assert [row["against"]["split"] for row in rows_of(run)] == ["val", "val", "train"]


def test_without_validation_images_those_of_training_are_compared_with_and_that_is_said(make_config, tmp_path):
    config = with_evaluation(make_config, tmp_path / "run", train={"duration": "1 steps"})
    del config["validate"]
    run = train(config)
    assert rows_of(run)[0]["against"]["split"] == "train"
    assert rows_of(run)[0]["n_reference"] == 40
    assert any("compared with those of training" in event for event in told(run))


def test_what_has_no_score_for_the_validation_images_is_left_out_with_a_note(make_config, tmp_path):
    """They are the first images of training, which nothing knows before they are looked at."""
    config = with_evaluation(make_config, tmp_path / "run", evaluate={"metrics": ["memorisation", "kid"]})
    config["train"]["duration"] = "1 steps"
    config["validate"]["source"] = {"name": "butterflies", "size": 18, "resolution": 20}
    run = train(config)
    assert [row["score"] for row in rows_of(run)] == ["kid"]
    note = "memorisation: 18 of 18 held-out images are themselves among those trained on"
    assert any(note in event for event in told(run))


def test_fewer_images_than_asked_for_are_made_where_there_is_no_more_to_make_them_from_and_that_is_said(make_config):
    """Of a task that follows something; one that follows nothing makes as many as are asked for."""
    run = load(with_evaluation(make_config, "run", evaluate={"num_samples": 500})).run
    part = plan.Part("val", build("sources", OTHERS).open())
    tasks = [SimpleNamespace(wants=wants, conditions=lambda indices: {}) for wants in ((), ("image_embed",))]
    found = [plan.check_needs(run, part, task) for task in tasks]
    told = "evaluate.num_samples is 500, and the val data has 18 samples to make images from: 18 are made."
    assert [told in notes for notes in found] == [False, True]


REFUSED = [
    ({"evaluate": {"metrics": []}}, r"evaluate.every is set, and evaluate.metrics is empty"),
    ({"evaluate": {"split": "test"}}, r"evaluate.split is 'test', and the data has no such part"),
    ({"evaluate": {"final_split": "test"}}, r"evaluate.final_split is 'test', and the data has no such part"),
    ({"evaluate": {"metrics": ["lpips"]}}, r"lpips looks at the originals that images are made from, and there are"),
    ({"evaluate": {"metrics": [{"name": "kid", "subsets": 2}]}}, r"subset_size is 1000, and there are 13 made images"),
    (
        {"evaluate": {"metrics": ["memorisation"], "split": "train"}},
        r"memorisation compares with images that were not trained on, and there are none",
    ),
    (
        {"evaluate": {"metrics": ["memorisation"]}, "data": {"source": OTHERS}},
        r"memorisation compares with images that were not trained on, and there are none",
    ),
    ({"evaluate": {"guidance_scale": [1, 2]}}, r"evaluate: guidance_scale has 2 numbers"),
    ({"checkpoint": {"best": "fid"}}, r"checkpoint.best is 'fid', .* a score of evaluate.metrics. .*kid, kid/eff"),
    ({"checkpoint": {"best": "kid"}, "evaluate": {"every": None}}, r"'kid', and evaluate.every is none"),
    ({"checkpoint": {"best": "kid/inception"}}, r"'kid/inception', .* Options: kid, kid/efficientnet_lite0, val"),
    ({"checkpoint": {"best": "kid/efficientnet"}}, r"Did you mean 'kid/efficientnet_lite0'"),
    (
        {"checkpoint": {"best": "kid_std"}, "evaluate": {"metrics": [{"name": "kid", "subsets": 2, "subset_size": 5}]}},
        r"'kid_std', which says how far a score spreads, not how good it is. Use kid\.",
    ),
    (
        {"checkpoint": {"best": "memorised"}, "evaluate": {"metrics": ["kid", "memorisation"]}},
        r"'memorised', which says whether images are copies, not how good they are: noise has the lowest memorised\.",
    ),
    (
        {"checkpoint": {"best": "nearer_than_held_out/efficientnet_lite0"}},
        r"'nearer_than_held_out/efficientnet_lite0', which says whether images are copies, .* Use validation or",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(changes, message, make_config, tmp_path):
    config = with_evaluation(make_config, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
