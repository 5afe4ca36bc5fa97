"""`train.batch_size=32` from the command line."""

import pytest

from eclosion.config.overrides import apply_overrides
from eclosion.errors import ConfigError


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


def test_a_path_leads_through_a_list_that_is_there():
    tree = {"unets": [{"sampler": None}, {"sampler": "ddim", "sizes": [[1, 2], [3, 4]]}]}
    texts = ["unets[1].sampler.eta=1", "unets[0].sampler.name=ddpm", "unets[1].sizes[1][0]=5"]
    assert apply_overrides(tree, texts) == {
        "unets": [{"sampler": {"name": "ddpm"}}, {"sampler": {"name": "ddim", "eta": 1}, "sizes": [[1, 2], [5, 4]]}]
    }
    assert tree["unets"][1]["sizes"] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unets[2].size=1", "unets[2].size=1: unets is a list of 2, and has no [2]."),
        ("unets[0][1]=1", "unets[0][1]=1: unets[0] is {'size': 8}, and has no [1]."),
        ("unet[0].size=1", "unet[0].size=1: unet is None, and has no [0]."),
        ("unets[x]=1", "'unets[x]=1' is not an override. Write path.to.key=value, such as train.batch_size=32."),
        ("[0]=1", "'[0]=1' is not an override. Write path.to.key=value, such as train.batch_size=32."),
    ],
)
def test_a_place_that_a_list_does_not_have_is_told(text, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides({"unets": [{"size": 8}, {"size": 16}]}, [text])
    assert str(error.value) == message
