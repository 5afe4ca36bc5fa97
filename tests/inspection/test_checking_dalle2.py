"""What is found beside the data and the machine is told in words that work in a DALLE2-pytorch file, too."""

import numpy as np
import pytest

from eclosion import check, shard, train
from eclosion.errors import DataError
from eclosion.registry import build


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """One shard of butterflies, with embeddings of five numbers."""
    folder = tmp_path_factory.mktemp("shards")
    np.save(folder / "embeddings.npy", np.ones((8, 5), np.float32))
    source = build("sources", {"name": "butterflies", "size": 8, "resolution": 32})
    return shard(source, folder / "out", samples_per_shard=8, image_embeddings=folder / "embeddings.npy").folder


def settings(shards, tmp_path, **changes):
    """A config in which nothing is wrong but what the changes, of sections or of the U-Net, make so."""
    unet = {"dim": 8, "image_embed_dim": 5, "dim_mults": [1], "resnet_groups": 4, **changes.pop("unet", {})}
    config = {
        "decoder": {"unets": [unet], "image_sizes": [16], "timesteps": 50},
        "data": {
            "webdataset_base_url": f"{shards}/{{}}.tar",
            "img_embeddings_url": f"{shards}/img_emb",
            "shard_width": 5,
            "batch_size": 4,
            "num_workers": 0,
            "splits": {"train": 1.0, "val": 0.0, "test": 0.0},
        },
        "train": {"device": "cpu"},
        "tracker": {"data_path": str(tmp_path / "run")},
    }
    return {name: {**options, **changes.get(name, {})} for name, options in config.items()}


def problems(config, *overrides):
    return [str(problem) for problem in check(config, overrides).problems]


WRONG = {
    "shard_width": (
        {"data": {"shard_width": 6}},
        "But there is 00000.tar: set data.source.shard_width=5. In the file, data.source.webdataset_base_url is "
        "data.webdataset_base_url; data.source.shard_width is data.shard_width.",
    ),
    "length": (
        {"unet": {"image_embed_dim": 6}},
        "In the file, task.image_embed_dim is decoder.unets[0].image_embed_dim.",
    ),
    "no embeddings": (
        {"data": {"img_embeddings_url": None}},
        "In the file, data.source.img_embeddings_url is data.img_embeddings_url; task.encoder is decoder.clip; "
        "task.unconditional is decoder.unconditional.",
    ),
    "no text": (
        {"unet": {"cond_on_text_encodings": True, "text_embed_dim": 3}},
        "In the file, data.source.text_embeddings_url is data.text_embeddings_url; task.encoder is decoder.clip; "
        "model.text_conditioned is cond_on_text_encodings of a U-Net.",
    ),
    "device": ({"train": {"device": "mps"}}, 'In the file, train.device is "mps", and auto is null.'),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_problem_ends_with_what_the_file_calls_the_options_that_it_names(case, shards, tmp_path):
    changes, ending = WRONG[case]
    (problem,) = problems(settings(shards, tmp_path, **changes))
    assert problem.endswith(ending)
    assert "\n" not in problem


@pytest.mark.filterwarnings("ignore::UserWarning")  # notes of the translation
def test_so_does_an_error_of_a_run(shards, tmp_path):
    changes, ending = WRONG["shard_width"]
    with pytest.raises(DataError) as error:
        train(settings(shards, tmp_path, **changes))
    assert str(error.value).endswith(ending)


def test_overrides_that_are_wrong_are_told_in_both_words(shards, tmp_path):
    (problem,) = problems(settings(shards, tmp_path), "task.image_dropout=2")
    assert problem.endswith("In the file, task.image_dropout is decoder.image_cond_drop_prob.")


def test_a_problem_that_is_met_twice_is_told_once(shards, tmp_path):
    wrong = {"preprocessing": {"RandomFlip": True}, "splits": {"train": 0.5, "val": 0.5, "test": 0.0}}
    (problem,) = problems(settings(shards, tmp_path, data=wrong))
    assert problem.startswith("data.preprocessing.RandomFlip is not a transform")
