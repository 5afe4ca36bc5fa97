"""`train.batch_size=32` from the command line."""

from eclosion.config.overrides import apply_overrides


def test_an_override_replaces_one_value_and_leaves_the_tree_it_came_from():
    tree = {"train": {"batch_size": 4, "duration": "1 epoch"}}
    assert apply_overrides(tree, ["train.batch_size=32"]) == {"train": {"batch_size": 32, "duration": "1 epoch"}}
    assert tree == {"train": {"batch_size": 4, "duration": "1 epoch"}}


def test_values_are_read_as_yaml():
    texts = ["a=1", "b=1e-3", "c=true", "d=null", "e=[1, x]", "f={g: 2}", "h=10 steps", "i=a=b", "j=", "k='3'"]
    assert apply_overrides({}, texts) == {
        **{"a": 1, "b": 1e-3, "c": True, "d": None, "e": [1, "x"], "f": {"g": 2}, "h": "10 steps"},
        **{"i": "a=b", "j": None, "k": "3"},
    }


def test_an_option_of_a_part_that_stands_as_a_bare_name_keeps_the_name():
    tree = {"sample": {"sampler": "ddim"}}
    wanted = {"sample": {"sampler": {"name": "ddim", "eta": 1}}}
    assert apply_overrides(tree, ["sample.sampler.eta=1"]) == wanted
    assert apply_overrides({}, ["sample.sampler=ddim", "sample.sampler.eta=1"]) == wanted


def test_later_overrides_win():
    assert apply_overrides({}, ["seed=1", "seed=2"]) == {"seed": 2}
