"""What a wrong config is told: behaviour that people read."""

import copy

import pytest

from eclosion.config.load import load
from eclosion.errors import ConfigError

GOOD = {"output": "run", "data": {"source": "butterflies"}}


def problems(changes, overrides=()):
    """The problems of a good config with some keys changed."""
    tree = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *above, last = path.split(".")
        section = tree
        for key in above:
            section = section.setdefault(key, {})
        section[last] = value
    with pytest.raises(ConfigError) as error:
        load(tree, overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return error.value.problems


def test_all_problems_are_told_at_once_each_with_its_path():
    wrong = {
        "trian": {"batch_size": 3},
        "data.image_size": [1, 2, 3],
        "data.horizontal_flip": "maybe",
        "data.source": {"name": "folder", "roott": "images"},
        "train.duration": "5 minutes",
        "train.batch_size": "many",
        "train.mixed_precision": "fp8",
        "optimizer.learning_rate": -1,
        "ema.decays": [0.5, 1.5],
        "sample.sampler": {"name": "ddim", "eta": 3},
        "track.log": ["console", "tensorbord"],
    }
    assert sorted(problems(wrong)) == sorted(
        [
            "trian is not an option. Did you mean 'train'? Options: checkpoint, data, ema, evaluate, export, hub, "
            "optimizer, output, overwrite, sample, seed, start, task, track, train, validate.",
            "data.image_size is [1, 2, 3], and must be int >= 1 or [int >= 1, int >= 1].",
            "data.horizontal_flip is 'maybe', and must be true or false.",
            "data.source.roott is not an option of 'folder'. Did you mean 'root'? Options: caption_column, "
            "caption_suffix, class_names_from_folders, root.",
            "data.source.root is required.",
            "train.duration: must be like '1000 steps', '100000 samples' or '50 epochs', not '5 minutes'.",
            "train.batch_size is 'many', and must be int >= 1.",
            "train.mixed_precision is 'fp8', and must be one of: auto, no, fp16, bf16.",
            "optimizer.learning_rate is -1, and must be float > 0.",
            "ema.decays[1] is 1.5, and must be float >= 0 and < 1.",
            "sample.sampler.eta is 3, and must be float >= 0 and <= 1.",
            "track.log[1]: 'tensorbord' is not one of the loggers. Did you mean 'tensorboard'? "
            "Options: console, tensorboard, trackio, wandb.",
        ]
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("output", "", "output is '', and must be text of length >= 1."),
        ("data.source", [1], "data.source: must be the name of a source, or a mapping with its name and options."),
        ("data.source", {"root": "x"}, "data.source: has no 'name'. Known sources: butterflies, clipart, "),
        ("data.source", {"name": "buterflies"}, "data.source: 'buterflies' is not one of the sources. Did you mean "),
        ("data.image_size", "64", "data.image_size is '64', and must be int >= 1 or [int >= 1, int >= 1]."),
        (
            "data.image_size",
            {"height": 3},
            "data.image_size is a mapping, and must be int >= 1 or [int >= 1, int >= 1]",
        ),
        ("train", 5, "train is 5, and must be a mapping of options."),
        ("train", [1], "train is [1], and must be a mapping of options."),
        ("train.batch_size", True, "train.batch_size is true, and must be int >= 1."),
        ("train.batch_size", 3.5, "train.batch_size is 3.5, and must be int >= 1."),
        ("train.batch_size", None, "train.batch_size is none, and must be int >= 1."),
        ("train.batch_size", 0, "train.batch_size is 0, and must be int >= 1."),
        ("train.compile", 1, "train.compile is 1, and must be true or false."),
        ("train.duration", "0 steps", "train.duration: must be like '1000 steps', "),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate is nan, and must be float > 0."),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate is inf, and must be float > 0."),
        ("optimizer.learning_rate", "1e-3", "optimizer.learning_rate is '1e-3', and must be float > 0."),
        ("optimizer.betas", [0.9], "optimizer.betas"),
        ("track.log", "console", "track.log is 'console', and must be list of loggers."),
        (
            "track.log",
            [{"name": "tensorboard", "x": 1}],
            "track.log[0].x is not an option of 'tensorboard', which has none.",
        ),
        ("task.model", {"preset": "huge"}, "task.model.preset is 'huge', and must be one of: tiny, small, tutorial"),
        ("task.loss", {"kid": "l1"}, "task.loss.kid is not an option. Did you mean 'kind'? Options: huber_delta, kind"),
        (
            "sample.sampler",
            {"num_steps": 3},
            "sample.sampler.num_steps is not an option of 'dpm_solver'. Did you mean ",
        ),
        ("sample.sampler", {"name": 3}, "sample.sampler: has no 'name'. Known samplers: ddim, ddpm, dpm_solver, euler"),
    ],
)
def test_a_wrong_value_is_told_with_its_path_and_what_is_wanted(path, value, message):
    (problem,) = problems({path: value})
    assert problem.startswith(message)
    assert "\n" not in problem


def test_what_is_missing_is_told():
    with pytest.raises(ConfigError) as error:
        load({})
    assert error.value.problems == ["output is required.", "data is required."]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size", "'train.batch_size' is not an override. Write path.to.key=value, such as "),
        ("=1", "'=1' is not an override. Write path.to.key=value, such as train.batch_size=32."),
        ("train..x=1", "'train..x=1' is not an override."),
        ("train.freeze=[1", "train.freeze: '[1' cannot be read: line 1, column 3: expected ',' or ']'"),
        ("train.batchsize=4", "train.batchsize is not an option. Did you mean 'batch_size'? Options: "),
        ("train.freeze.0=x", "train.freeze is a mapping, and must be list of text."),
        ("output.x=1", "output is a mapping, and must be text of length >= 1."),
    ],
)
def test_a_wrong_override_is_told(override, message):
    (problem,) = problems({}, [override])
    assert problem.startswith(message)


def test_an_override_does_not_reach_into_a_list():
    assert problems({"track.log": ["console"]}, ["track.log.0=tensorboard"]) == [
        "track.log.0=tensorboard: track.log is ['console'], which has no options. Change it whole."
    ]
