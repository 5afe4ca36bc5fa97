"""What may change when a run is resumed."""

import pytest

from eclosion.config.changes import compare, kind_of, refuse
from eclosion.config.load import leaves, load
from eclosion.errors import ConfigError
from eclosion.registry import dump

BEFORE = dump(load({"output": "run", "data": {"source": "butterflies"}}).run)


def compared(before, now, *, accept, where):
    changes = compare(before, now)
    refuse(changes, accept=accept, where=where)
    return [change for change in changes if change.kind == "schedule"]


def after(*overrides):
    return dump(load(BEFORE, overrides).run)


def test_every_key_of_a_config_is_in_one_class_and_what_shapes_the_images_is_identity():
    kinds = {path: kind_of(path) for path, _ in leaves(BEFORE)}
    assert {path for path, kind in kinds.items() if kind == "schedule"} == {
        "train.duration",
        "train.batch_size",
        "train.max_grad_norm",
        "train.mixed_precision",
        "train.freeze",
        "optimizer.learning_rate",
        "optimizer.betas",
        "optimizer.epsilon",
        "optimizer.weight_decay",
        "optimizer.decay",
        "optimizer.networks",
        "optimizer.lr_schedule",
        "optimizer.lr_warmup_steps",
        "ema.warmup",
        "data.max_bad_fraction",
    }
    assert {kinds[p] for p in ("seed", "data.image_size", "task.model.preset", "data.source.size")} == {"identity"}
    assert {kinds[p] for p in ("output", "data.num_threads", "sample.every", "track.log[0].name")} == {"free"}


def test_how_a_network_of_a_cascade_is_sampled_is_free_and_what_it_is_is_not():
    assert {kind_of(f"task.unets[{i}].sampler{rest}") for i in (0, 12) for rest in ("", ".name", ".eta")} == {"free"}
    others = ("image_size", "model.base_channels", "samplers")
    assert {kind_of(f"task.unets[1].{key}") for key in others} == {"identity"}


def test_free_keys_may_change_without_a_word():
    assert compared(BEFORE, after("train.micro_batch_size=4", "sample.num_images=1"), accept=False, where="x") == []


def test_a_changed_identity_key_is_refused_with_both_values_whatever_is_accepted():
    with pytest.raises(ConfigError) as error:
        compared(BEFORE, after("seed=1", "data.image_size=32"), accept=True, where="runs/a/step-00000010")
    assert error.value.problems == [
        "data.image_size: 64 -> 32 would make it another run than the one in runs/a/step-00000010.",
        "seed: 0 -> 1 would make it another run than the one in runs/a/step-00000010.",
        "Put the values back, or choose another output folder.",
    ]


def test_a_changed_schedule_key_needs_the_users_word_and_is_recorded():
    now = after("train.duration=5 steps")
    with pytest.raises(ConfigError) as error:
        compared(BEFORE, now, accept=False, where="x")
    assert error.value.problems == [
        "train.duration: '100 epochs' -> '5 steps' changes how the run in x goes on.",
        "Put the values back, or pass --accept-changes.",
    ]
    (change,) = compared(BEFORE, now, accept=True, where="x")
    assert (change.path, change.before, change.after) == ("train.duration", "100 epochs", "5 steps")


def test_a_key_that_nobody_classified_is_an_identity_key():
    assert kind_of("data.new_option") == "identity"
    assert kind_of("training.duration") == "identity"


def test_a_free_key_that_changes_the_last_bits_is_known_as_one():
    changes = compare(BEFORE, after("train.micro_batch_size=4", "data.num_threads=1"))
    assert [(change.path, change.rounds) for change in changes] == [
        ("data.num_threads", False),
        ("train.micro_batch_size", True),
    ]


def test_a_key_that_an_older_version_did_not_have_is_no_change_unless_it_is_used():
    older = {**BEFORE, "optimizer": {k: v for k, v in BEFORE["optimizer"].items() if k not in ("decay", "networks")}}
    del older["validate"]
    assert compare(older, BEFORE) == []
    (change,) = compare(older, after("optimizer.decay=matrices"))
    assert (change.path, change.before, change.after) == ("optimizer.decay", "all", "matrices")


def test_a_config_that_is_none_any_more_is_compared_as_it_is():
    older = {**BEFORE, "gone": 1}
    assert [str(change) for change in compare(older, BEFORE)] == ["gone: 1 -> None"]
