"""The loss on images that are not trained on: what it is, that it comes back, and what it decides."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from eclosion import ConfigError, DataError, sample, train
from eclosion.data.loader import Loader
from eclosion.data.source import part_of_data
from eclosion.data.webdataset import WebDatasetSource
from eclosion.errors import CheckpointError, Interrupted
from eclosion.metrics.metric import Influence
from eclosion.registry import build
from eclosion.rng import generator
from eclosion.sampling import load_trained
from eclosion.sampling.examples import in_order
from eclosion.training import validation
from eclosion.training.scores import CERTAIN, Score, Scores, is_better, paired_difference
from eclosion.training.validation import BANDS, Losses

OTHERS = {"name": "butterflies", "size": 30, "resolution": 20, "seed": 5}
VALIDATE = {"validate": {"every": "2 steps", "num_samples": 21, "source": OTHERS}, "sample": {"num_images": 0}}


def with_validation(make_config, output, **sections):
    config = make_config(output, **{key: value for key, value in {**VALIDATE, **sections}.items() if key != "validate"})
    return config | {"validate": VALIDATE["validate"] | sections.get("validate", {})}


def numbers(run, name="validation/loss"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def kept_in(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def scores_of(run, step):
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["validation"]


@pytest.fixture(scope="module")
def whole(uninterrupted, tmp_path_factory):
    """The tiny run that nothing disturbed, with validation."""
    config = json.loads((uninterrupted / "config.json").read_text())
    config["sample"] |= VALIDATE["sample"]
    config["checkpoint"]["keep_every"] = 6
    return train(config | {"output": str(tmp_path_factory.mktemp("runs") / "whole"), "validate": VALIDATE["validate"]})


def by_hand(run, source, count, *, without=()):
    """The mean loss of the averaged network, one image after the other in the order of the source."""
    trained = load_trained(run, device="cpu")
    samples = build("sources", source).open()
    loader = Loader(samples, in_order(trained.run.data), seed=trained.run.seed, batch_size=1)
    losses = []
    for i in range(count):
        if i not in without:
            batch = loader.batch_at([i])
            drawn = trained.task.draw("unet", batch, [generator(trained.run.seed, "validation", i)])
            with torch.no_grad():
                losses.append(float(trained.task.loss("unet", batch, drawn)))
    return float(np.mean(losses))


def test_it_is_the_mean_over_the_first_images_as_a_loop_by_hand_finds_it(whole):
    found = numbers(whole)
    assert list(found) == [0, 2, 4, 6, 8, 10, 12]
    assert found[12] == pytest.approx(by_hand(whole, OTHERS, 21), rel=1e-5)
    assert len(set(found.values())) == 7


def test_bands_of_timesteps_and_standard_errors_are_those_that_a_loop_by_hand_finds(whole):
    trained = load_trained(whole, device="cpu")
    loader = Loader(build("sources", OTHERS).open(), in_order(trained.run.data), seed=trained.run.seed, batch_size=1)
    losses, bands = [], []
    for i in range(21):
        batch = loader.batch_at([i])
        drawn = trained.task.draw("unet", batch, [generator(trained.run.seed, "validation", i)])
        with torch.no_grad():
            losses.append(float(trained.task.loss("unet", batch, drawn)))
        bands.append(int(drawn.t) // (1000 // BANDS))
    assert numbers(whole, "validation/loss_error")[12] == pytest.approx(stats.sem(losses), rel=1e-5)
    assert len(set(bands)) > 4
    for band in range(BANDS):
        inside = [loss for loss, own in zip(losses, bands, strict=True) if own == band]
        mean, error = (numbers(whole, f"validation/{kind}/band_{band}") for kind in ("loss", "loss_error"))
        assert ([mean[12]] if mean else []) == pytest.approx([np.mean(inside)] if inside else [], rel=1e-5)
        assert ([error[12]] if error else []) == pytest.approx([stats.sem(inside)] if len(inside) > 1 else [], rel=1e-4)


def test_images_are_taken_in_the_order_of_the_source_without_random_crops_or_mirrors(make_config, tmp_path):
    config = with_validation(make_config, tmp_path / "run", train={"duration": "1 steps"})
    plain = json.loads(json.dumps(config)) | {"output": str(tmp_path / "plain")}
    plain["data"] |= {"crop": "center", "horizontal_flip": False, "shuffle": False}
    assert numbers(train(config))[0] == numbers(train(plain))[0]


@pytest.mark.parametrize("train_options", [{"batch_size": 4, "micro_batch_size": 2}, {"batch_size": 30}], ids=str)
def test_it_does_not_depend_on_how_batches_are_cut(train_options, make_config, whole, tmp_path):
    """21 images in batches of 2, of 4 and of 30; before the first step the weights are the same."""
    options = {"duration": "1 steps", "micro_batch_size": None} | train_options
    run = train(with_validation(make_config, tmp_path / "run", train=options))
    assert numbers(run)[0] == pytest.approx(numbers(whole)[0], rel=1e-6)


def test_it_changes_nothing_of_the_run(whole, uninterrupted, results):
    hashes = results(whole)["hashes"]
    del hashes["validation.safetensors"]
    assert hashes == results(uninterrupted)["hashes"]


def test_a_resumed_run_finds_the_same_numbers_and_the_same_best(make_config, whole, results, tmp_path):
    run = tmp_path / "part"
    shutil.copytree(whole, run)
    assert kept_in(run) == [6, 10, 12]
    for step in (10, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    train(with_validation(make_config, run))
    assert results(run)["numbers"] == results(whole)["numbers"]
    assert scores_of(run, 12) == scores_of(whole, 12)


def test_a_signal_in_a_validation_leaves_a_checkpoint_and_the_validation_is_made_when_the_run_goes_on(
    make_config, whole, results, tmp_path, monkeypatch
):
    config = with_validation(make_config, tmp_path / "run")
    measured, calls = validation._losses, 0

    def interrupted(c, *args):
        nonlocal calls
        calls += 1
        if calls == 3:  # at steps 0, 2 and 4
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(c, *args)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "_losses", interrupted)
        with pytest.raises(Interrupted, match="stopped at step 4, which is saved"):
            train(config)
    assert list(numbers(tmp_path / "run")) == [0, 2]
    run = train(config)
    assert results(run)["numbers"] == results(whole)["numbers"]
    assert results(run)["hashes"] == results(whole)["hashes"]


def scripted(monkeypatch, losses):
    """Validation finds what is written here, by step, for each image."""
    measured = validation._losses

    def told(c, *args):
        found, skipped = measured(c, *args)
        values = torch.full((21,), losses.get(c.state.step, 9.0), dtype=torch.float64).nan_to_num(nan=math.inf)
        return {name: Losses(values, own.bands) for name, own in found.items()}, skipped

    monkeypatch.setattr(validation, "_losses", told)


def test_the_best_checkpoint_outlives_newer_ones_and_is_known_when_the_run_goes_on(make_config, tmp_path, monkeypatch):
    scripted(monkeypatch, {0: 0.01, 2: 0.5, 4: 0.2, 6: float("nan"), 8: 0.3, 10: 0.25, 12: 0.4, 14: 0.2, 16: 0.1})
    config = with_validation(make_config, tmp_path / "run", checkpoint={"every": "3 steps"})
    run = train(config)
    assert kept_in(run) == [4, 9, 12]  # 4 is no multiple of 3: it was written because it is the best
    assert scores_of(run, 12)["best"] == {"step": 4, "value": pytest.approx(0.2), "error": None}
    assert numbers(run)[6] is None
    sampled = sample(run, checkpoint="best", num_images=1, num_inference_steps=1)
    assert sampled.name == "step-00000004-seed-0"
    train(config, ["train.duration=15 steps"], accept_changes=True)
    assert kept_in(run) == [4, 12, 15]  # as good is not better
    train(config, ["train.duration=18 steps"], accept_changes=True)
    assert kept_in(run) == [16, 18]
    assert load_trained(run, checkpoint="best").step == 16
    assert load_trained(run).step == 18
    assert load_trained(run, checkpoint=16).step == 16


def test_the_best_checkpoint_is_not_kept_if_that_is_not_wanted(make_config, tmp_path, monkeypatch):
    scripted(monkeypatch, {4: 0.2})
    config = with_validation(make_config, tmp_path / "run", checkpoint={"every": "3 steps", "keep_best": False})
    run = train(config)
    assert kept_in(run) == [9, 12]
    with pytest.raises(
        CheckpointError, match=r"step-00000004: the best checkpoint is not kept. Set checkpoint.keep_best=true"
    ):
        load_trained(run, checkpoint="best")


def test_a_checkpoint_that_cannot_be_chosen_is_told(uninterrupted, whole):
    with pytest.raises(CheckpointError, match=r"nothing says which checkpoint is the best. Set validate.every"):
        load_trained(uninterrupted, checkpoint="best")
    with pytest.raises(
        ConfigError, match=r"'bets', and must be latest, best or the number of a step. Did you mean 'best'"
    ):
        load_trained(whole, checkpoint="bets")
    with pytest.raises(
        CheckpointError, match=r"step-00000007 is no checkpoint. Checkpoints of this run: step-00000012"
    ):
        load_trained(whole, checkpoint="7")


def test_losses_on_other_data_are_not_compared(make_config, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = with_validation(make_config, run, validate={"num_samples": 5})
    train(config, ["train.duration=14 steps"], accept_changes=True)
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert any(event.startswith("validation is on 5 images of ") for event in events)
    assert scores_of(run, 14)["best"]["step"] in (12, 14)  # of the five images
    assert scores_of(run, 14)["measured_on"].startswith("5 images of ")


def pictures(folder, count):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def test_images_that_cannot_be_read_are_left_out_and_counted(make_config, tmp_path):
    folder = pictures(tmp_path / "pictures", 7)
    (folder / "03.png").write_bytes(b"broken")
    source = {"name": "folder", "root": str(folder)}
    config = with_validation(make_config, tmp_path / "run", validate={"source": source, "num_samples": None})
    with pytest.raises(DataError, match=r"03.png"):
        train(config)
    run = train(config, ["data.max_bad_fraction=0.2", "train.duration=2 steps", "output=" + str(tmp_path / "other")])
    assert numbers(run, "validation/skipped") == {0: 1.0, 2: 1.0}
    assert numbers(run)[2] == pytest.approx(by_hand(run, source, 7, without=[3]), rel=1e-5)


def test_what_cannot_be_validated_with_is_refused_before_the_first_step(make_config, tmp_path):
    config = make_config(tmp_path / "run") | {"validate": {"every": 5}}
    with pytest.raises(ConfigError, match=r"validate.every is set, and there is nothing to validate with"):
        train(config)
    config["validate"]["source"] = OTHERS | {"label": "shape"}
    with pytest.raises(
        DataError, match=r"validate: its 5 classes \(.*\) are not the 8 of the training data \(red, orange"
    ):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_validation_is_part_of_the_report_and_of_the_terminal(whole, make_config, tmp_path, capfd):
    report = (whole / "report.html").read_text()
    best = min((value, step) for step, value in numbers(whole).items() if step)
    assert "Validation loss" in report
    assert f"at step {best[1]}" in report.partition("best validation loss")[2][:80]
    train(with_validation(make_config, tmp_path / "run", train={"duration": "2 steps"}))
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "validation/loss" in line] == ["0/2", "2/2"]


def test_a_source_says_where_its_validation_part_is():
    splits = {"train": 0.8, "val": 0.2, "test": 0.0}
    shards = WebDatasetSource(webdataset_base_url="a/{}.tar", splits=splits)
    assert part_of_data(shards, "val").split == "val"
    assert part_of_data(shards, "train") == shards
    assert part_of_data(shards, "test") is None
    named = build("sources", {"name": "huggingface", "path": "x", "validation_split": "validation"})
    assert (part_of_data(named, "val").split, part_of_data(named, "train").split) == ("validation", "train")
    assert part_of_data(build("sources", {"name": "huggingface", "path": "x"}), "val") is None
    butterflies = build("sources", "butterflies")
    assert (part_of_data(butterflies, "val"), part_of_data(butterflies, "train")) == (None, butterflies)


def losses_of(**means):
    """Losses of three images, the same for each."""
    return {name: torch.full((3,), mean, dtype=torch.float64) for name, mean in means.items()}


def test_each_network_has_a_best_of_its_own_and_their_sum_decides():
    scores = Scores()
    assert not scores.record(0, losses_of(a=0.125, b=0.125))  # untrained
    assert scores.record(1, losses_of(a=3.0, b=1.0))
    assert not scores.record(2, losses_of(a=math.inf, b=0.75))
    assert not scores.record(3, losses_of(a=2.0, b=2.0))  # as good is not better
    assert scores.record(4, losses_of(a=2.5, b=1.25))
    assert not scores.record(5, losses_of(a=math.inf, b=0.0))
    assert scores.best == Score(4, 3.75)
    assert scores.networks == {"a": Score(3, 2.0), "b": Score(5, 0.0)}
    kept = Scores.from_dict(json.loads(json.dumps(scores.as_dict())), scores.tensors())
    assert kept == scores
    assert {name: values.tolist() for name, values in kept.losses.items()} == {
        "": [3.75] * 3,
        "a": [2.0] * 3,
        "b": [0.0] * 3,
    }
    assert Scores.from_dict({}, {}) == Scores()


def test_the_paired_difference_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(3)
    best = rng.gamma(0.5, 1.0, 300)
    now = best - rng.normal(0.01, 0.1, 300)
    mean, error = paired_difference(torch.from_numpy(now), torch.from_numpy(best))
    theirs = stats.ttest_rel(now, best)
    assert mean == pytest.approx(np.mean(now - best))
    assert mean / error == pytest.approx(theirs.statistic, rel=1e-9)


def test_the_best_does_not_flip_on_noise_and_a_small_gain_is_found_where_images_differ_much():
    """Losses of single images differ a hundred times as much as two checkpoints do; a gain of a fiftieth is found."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.gamma(0.5, 1.0, 500))

    def flips(gain):
        scores = Scores()
        first, second = (images * (1 - gain * k) + torch.from_numpy(rng.normal(0, 0.01, 500)) for k in (0, 1))
        assert scores.record(1, {"unet": first})
        return scores.record(2, {"unet": second})

    alike = sum(flips(0.0) for _ in range(600))
    assert 600 * 0.005 < alike < 600 * 0.05  # once in forty-four; the lower mean would flip every other time
    assert all(flips(0.02) for _ in range(50))


def test_gains_too_small_to_see_from_one_validation_to_the_next_add_up():
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.gamma(0.5, 1.0, 400))
    slow = [images * (1 - 0.001 * k) + torch.from_numpy(rng.normal(0, 0.05, 400)) for k in range(1, 101)]
    scores = Scores()
    chosen = [k for k, losses in enumerate(slow, 1) if scores.record(k, {"unet": losses})]
    assert 2 < len(chosen) < 25
    assert chosen[-1] > 80


def test_images_that_could_not_be_read_take_no_part_in_a_comparison():
    best = torch.tensor([1.0, 2.0, math.nan, 4.0], dtype=torch.float64)
    now = torch.tensor([0.9, math.nan, 0.0, 3.9], dtype=torch.float64)
    assert paired_difference(now, best)[0] == pytest.approx(-0.1)
    assert is_better(now, best)
    assert not is_better(best, now)


def test_a_score_decides_when_it_is_better_by_more_than_its_errors():
    scores = Scores(decided_by="kid")
    assert not scores.decide(Score(1, math.nan), lower=True)
    assert scores.decide(Score(2, 0.5, 0.03), lower=True)
    assert not scores.decide(Score(3, 0.5 - CERTAIN * 0.05, 0.04), lower=True)
    assert scores.decide(Score(4, 0.39, 0.04), lower=True)
    assert not scores.record(5, losses_of(a=1.0))  # validation has no say in it
    assert scores.best == Score(4, 0.39, 0.04)
    assert scores.decide(Score(5, 0.38), lower=False) is False
    assert scores.decide(Score(6, 0.5), lower=False)


def test_scores_of_the_same_noise_are_compared_image_by_image():
    """Two scores whose errors are as large as they are, and which differ by a tenth of that, on every image alike."""
    rng = np.random.default_rng(5)
    common, reference = (torch.from_numpy(rng.normal(0, 1, count)) for count in (200, 90))

    def influence(count=200):
        return Influence(common[:count] + torch.from_numpy(rng.normal(0, 0.02, count)), reference)

    error = float(common.std()) / math.sqrt(200)
    scores = Scores(decided_by="kid")
    assert scores.decide(Score(1, 1.0, error), lower=True, influence=influence())
    assert not scores.decide(Score(2, 0.999, error), lower=True, influence=influence())
    assert scores.decide(Score(3, 1.0 - error / 10, error), lower=True, influence=influence())
    kept = Scores.from_dict(json.loads(json.dumps(scores.as_dict())), scores.tensors())
    assert kept.best == scores.best
    for other in (scores, kept):
        assert other.decide(Score(4, 1.0 - error / 5, error), lower=True, influence=influence())
    assert not scores.decide(Score(5, 1.0 - error, error), lower=True)  # nothing to pair it with
    assert not scores.decide(Score(5, 1.0 - error, error), lower=True, influence=influence(199))
    scores.forget_best("fid")
    assert scores.tensors() == {}


def test_what_an_older_version_kept_is_compared_by_its_mean():
    kept = {"step": 3, "best": {"step": 3, "loss": 0.5}, "networks": {"a": {"step": 3, "loss": 0.5}}}
    scores = Scores.from_dict(kept, {})
    assert scores.best == Score(3, 0.5)
    assert not scores.record(4, losses_of(a=0.5))
    assert scores.record(5, losses_of(a=0.25))
    assert scores.losses.keys() == {"", "a"}
