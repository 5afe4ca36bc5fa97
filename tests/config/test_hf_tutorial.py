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


def test_pushing_to_the_hub_is_accepted_and_said_to_do_nothing():
    assert load(config()).notes == (
        "push_to_hub is accepted and has no effect yet: nothing is uploaded. Use huggingface_hub on output_dir.",
    )
    assert load(config(push_to_hub=False)).notes == ()


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
