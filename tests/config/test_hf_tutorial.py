"""The config object of the Hugging Face tutorial, as people have it in their notebooks."""

from dataclasses import dataclass

import pytest
from PIL import Image

from eclosion.config.load import load
from eclosion.errors import ConfigError


@dataclass
class TrainConfig:
    # As in the wild: without annotations the decorator makes no fields.
    image_size = 128
    train_batch_size = 16
    eval_batch_size = 16
    num_epochs = 50
    gradient_accumulation_steps = 1
    learning_rate = 1e-4
    lr_warmup_steps = 500
    save_image_epochs = 10
    save_model_epochs = 30
    mixed_precision = "fp16"
    output_dir = "ddpm-butterflies-128"
    push_to_hub = True
    hub_model_id = "<your-username>/<my-awesome-model>"
    hub_private_repo = None
    overwrite_output_dir = True
    seed = 0


def config(**changes):
    made = TrainConfig()
    made.dataset_name = "huggan/smithsonian_butterflies_subset"
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_the_tutorials_object_becomes_the_tutorials_run():
    loaded = load(config())
    run = loaded.run
    assert run.output == "ddpm-butterflies-128"
    assert run.export == "ddpm"
    assert (run.data.source.path, run.data.image_size) == ("huggan/smithsonian_butterflies_subset", 128)
    assert (run.data.resize, run.data.interpolation, run.data.horizontal_flip) == ("stretch", "bilinear", True)
    assert (run.train.duration, run.train.batch_size, run.train.mixed_precision) == ("50 epochs", 16, "fp16")
    assert run.train.max_grad_norm == 1.0
    assert (run.optimizer.learning_rate, run.optimizer.lr_schedule) == (1e-4, "cosine")
    assert run.optimizer.lr_warmup_steps == 500
    assert run.ema.decays == []
    assert (run.sample.every, run.sample.num_images, run.checkpoint.every) == ("10 epochs", 16, "30 epochs")
    assert run.task.model.preset == "tutorial"
    assert run.task.prediction_type == "epsilon"
    assert type(run.task.noise_schedule).__name__ == "Linear"
    assert loaded.origins["train.batch_size"] == "hf_tutorial"
    assert loaded.origins["data.crop"] == "default"


def test_the_name_that_the_tutorial_leaves_to_be_filled_in_is_not_pushed_to():
    loaded = load(config())
    assert loaded.run.hub is None
    (note,) = loaded.notes
    assert note.startswith("push_to_hub: nothing is pushed, as hub_model_id is '<your-username>/<my-awesome-model>'")
    assert load(config(push_to_hub=False)).notes == ()


@pytest.mark.parametrize(("wished", "private"), [(None, True), (True, True), (False, False)])
def test_pushing_to_the_hub_is_private_unless_it_is_said_to_be_public(wished, private):
    loaded = load(config(hub_model_id="ada/butterflies", hub_private_repo=wished))
    assert (loaded.run.hub.repo, loaded.run.hub.private) == ("ada/butterflies", private)
    assert loaded.notes == ()


def test_without_a_name_the_repository_is_called_as_the_folder_is():
    assert load(config(hub_model_id=None, output_dir="runs/ddpm-butterflies")).run.hub.repo == "ddpm-butterflies"


def test_nothing_is_pushed_unless_it_is_asked_for():
    assert load({"image_size": 32, "num_epochs": 1, "dataset_name": "a/b"}).run.hub is None
    assert load(config(push_to_hub=False, hub_model_id="ada/butterflies")).run.hub is None


@pytest.mark.parametrize(("key", "value"), [("hub_model_id", "a/b/c"), ("output_dir", "runs/my model")])
def test_what_cannot_name_a_repository_is_told_in_the_tutorials_words(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: .* is not the name of a repository"):
        load(config(**{"hub_model_id": None, key: value}))


def test_accumulation_makes_a_step_of_several_forward_passes():
    run = load(config(train_batch_size=4, gradient_accumulation_steps=3)).run
    assert (run.train.batch_size, run.train.micro_batch_size) == (12, 4)


def test_a_mapping_with_the_same_names_is_the_same_run_and_native_overrides_apply():
    names = [name for name in dir(TrainConfig) if not name.startswith("_")]
    mapping = {name: getattr(TrainConfig, name) for name in names} | {"dataset_name": "a/b"}
    run = load(mapping, ["task.model.preset=tiny"]).run
    assert run.data.source.path == "a/b"
    assert run.task.model.preset == "tiny"


def test_mixed_precision_none_is_no():
    assert load(config(mixed_precision=None)).run.train.mixed_precision == "no"


def test_a_folder_of_images_is_read_as_one_and_a_packed_data_set_is_not(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert load(config(dataset_name=tmp_path)).run.data.source.root == tmp_path
    (tmp_path / "train.parquet").touch()
    assert load(config(dataset_name=str(tmp_path))).run.data.source.path == str(tmp_path)


def test_wrong_settings_are_told_all_at_once_in_the_tutorials_words():
    wrong = config(
        image_size="big",
        train_batch_size=0,
        num_epochs="x",
        learning_rate="hot",
        mixed_precision="fp8",
        save_image_epochs=0,
        seed=True,
        num_epoch=3,
    )
    with pytest.raises(ConfigError) as error:
        load(wrong)
    assert sorted(error.value.problems) == [
        "image_size is 'big', and must be int >= 1.",
        "learning_rate is 'hot', and must be float > 0.",
        "mixed_precision is 'fp8', and must be one of: no, fp16, bf16 or none.",
        "num_epoch is not an option. Did you mean 'num_epochs'? Options: dataset_name, eval_batch_size, "
        "gradient_accumulation_steps, hub_model_id, hub_private_repo, image_size, learning_rate, lr_warmup_steps, "
        "mixed_precision, num_epochs, output_dir, overwrite_output_dir, push_to_hub, save_image_epochs, "
        "save_model_epochs, seed, train_batch_size.",
        "num_epochs is 'x', and must be int >= 1.",
        "save_image_epochs is 0, and must be int >= 1.",
        "train_batch_size is 0, and must be int >= 1.",
    ]


def test_a_native_config_is_not_taken_for_the_tutorials():
    with pytest.raises(ConfigError) as error:
        load({"output": "x", "data": {"source": "butterflies"}, "image_size": 32, "num_epochs": 2})
    assert [problem.partition(" ")[0] for problem in error.value.problems] == ["image_size", "num_epochs"]


def test_an_unknown_setting_is_left_out_with_a_note_if_that_is_wished():
    loaded = load(config(num_epoch=3, push_to_hub=False), lenient=True)
    assert loaded.run == load(config()).run
    (note,) = loaded.notes
    assert note.startswith("num_epoch is not an option. Did you mean 'num_epochs'?")
    assert note.endswith(" It is left out.")
