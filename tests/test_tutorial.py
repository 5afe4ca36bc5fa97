"""The code of the Hugging Face tutorial, handed to `eclosion.train`, ends as the tutorial does."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

import eclosion


@dataclass
class TrainConfig:
    image_size = 128  # the generated image resolution
    train_batch_size = 16
    eval_batch_size = 16
    num_epochs = 50
    gradient_accumulation_steps = 1
    learning_rate = 1e-4
    save_image_epochs = 10
    save_model_epochs = 30
    mixed_precision = "fp16"  # `no` for float32, `fp16` for automatic mixed precision
    output_dir = "ddpm-butterflies-128"
    push_to_hub = True
    hub_model_id = "<your-username>/<my-awesome-model>"
    hub_private_repo = None
    overwrite_output_dir = True
    seed = 0


# Its own network in small, so that the default tests stay fast.
SMALL = [
    "task.model.preset=null",
    "task.model.options={block_out_channels: [16, 16], down_block_types: [DownBlock2D, AttnDownBlock2D], "
    "up_block_types: [AttnUpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 4}",
]


def tutorial_config(tmp_path, **changes):
    (tmp_path / "butterflies").mkdir()
    for i in range(6):
        Image.effect_noise((40, 30 + i), 60).convert("RGB").save(tmp_path / "butterflies" / f"{i}.jpg")
    config = TrainConfig()
    config.dataset_name = str(tmp_path / "butterflies")
    config.output_dir = str(tmp_path / "ddpm-butterflies")
    config.num_epochs = 2
    config.save_image_epochs = 1
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def check_what_stands_in(folder, *, image_size, grids):
    assert {"model_index.json", "unet", "scheduler", "README.md"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in sorted((folder / "samples").glob("step-*.png"))] == grids
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, image_size, image_size, 3)
    assert np.isfinite(images).all()
    return pipeline


def test_the_tutorials_object_trains_and_leaves_a_pipeline_and_grids_in_output_dir(tmp_path):
    config = tutorial_config(tmp_path, image_size=16, train_batch_size=2, eval_batch_size=4)
    with pytest.warns(UserWarning, match="push_to_hub: nothing is pushed, as hub_model_id is"):
        folder = eclosion.train(config, SMALL)
    assert str(folder) == config.output_dir
    grids = ["step-00000000.png", "step-00000003.png", "step-00000006.png"]
    pipeline = check_what_stands_in(folder, image_size=16, grids=grids)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_a_finished_run_is_replaced_as_overwrite_output_dir_says(tmp_path):
    config = tutorial_config(tmp_path, image_size=16, train_batch_size=3, eval_batch_size=1, push_to_hub=False)
    first = (eclosion.train(config, SMALL) / "events.jsonl").read_text()
    again = (eclosion.train(config, SMALL) / "events.jsonl").read_text()
    assert [text.count("training from scratch") for text in (first, again)] == [1, 1]
    config.overwrite_output_dir = False
    kept = (eclosion.train(config, SMALL) / "events.jsonl").read_text()
    assert "already finished" in kept


def test_without_a_data_set_it_says_which_setting_is_missing(tmp_path):
    config = tutorial_config(tmp_path, dataset_name=None, push_to_hub=False)
    with pytest.raises(eclosion.ConfigError, match=r"eclosion.train\(config, dataset=...\)"):
        eclosion.train(config, SMALL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorials_own_network_trains_at_32_pixels(tmp_path):
    # float32: float16 is emulated on a CPU, at more than six times the cost
    config = tutorial_config(tmp_path, image_size=32, train_batch_size=2, eval_batch_size=1, push_to_hub=False)
    config.mixed_precision = "no"
    folder = eclosion.train(config)
    pipeline = check_what_stands_in(
        folder, image_size=32, grids=["step-00000000.png", "step-00000003.png", "step-00000006.png"]
    )
    assert pipeline.unet.num_parameters() == 113_673_219
