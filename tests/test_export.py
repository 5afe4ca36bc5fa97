"""From a run to a diffusers pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline

from eclosion import ConfigError, UserError, export, train
from eclosion.errors import EnvironmentProblem
from eclosion.registry import build
from eclosion.rng import generator, randn
from eclosion.sampling import load_trained


@pytest.mark.parametrize(("kind", "cls"), [("ddpm", DDPMPipeline), ("ddim", DDIMPipeline)])
def test_the_pipeline_loads_and_samples(kind, cls, uninterrupted, tmp_path):
    folder = export(uninterrupted, tmp_path / "out", pipeline=kind)
    assert {"README.md", "model_index.json", "scheduler", "unet"} == {p.name for p in folder.iterdir()}
    pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 16, 16, 3)
    assert np.isfinite(image).all()


def test_diffusers_removes_noise_as_we_do(uninterrupted, tmp_path):
    """DDIM without fresh noise is deterministic: from the same noise both must arrive at the same image."""
    pipeline = DDIMPipeline.from_pretrained(export(uninterrupted, tmp_path / "out", pipeline="ddim"))
    trained = load_trained(uninterrupted)
    rngs = [generator(0, "sample", 0)]
    ours = trained.task.sample(
        trained.task.conditions([0]), rngs, sampler=build("samplers", {"name": "ddim", "num_inference_steps": 10})
    )
    x = randn([generator(0, "sample", 0)], (3, 16, 16))
    pipeline.scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    # theirs computes its coefficients in float32
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "quadratic", "jsd"])
def test_the_scheduler_has_the_noise_levels_of_the_run(name, uninterrupted):
    from dataclasses import replace

    trained = load_trained(uninterrupted)
    part = build("noise_schedules", name)
    schedule = part.build()
    options = replace(trained.task.options, noise_schedule=part)
    pipeline = replace(trained.task, schedule=schedule, options=options).pipeline()
    ours = schedule.alphas_cumprod.float()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, ours, rtol=1e-3, atol=1e-6)
    named = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    if name in named:
        assert pipeline.scheduler.config.beta_schedule == named[name]
        assert pipeline.scheduler.config.trained_betas is None


def test_the_card_tells_what_it_was_made_from(uninterrupted, tmp_path):
    card = (export(uninterrupted, tmp_path / "out") / "README.md").read_text()
    manifest = json.loads(next((uninterrupted / "checkpoints").glob("*12/manifest.json")).read_text())
    assert manifest["meta"]["fingerprint"] in card
    assert "| optimizer steps | 12 |" in card
    assert '"preset": null' in card
    assert str(torch.__version__).split("+")[0] in card


def test_a_folder_that_holds_something_is_not_written_to(uninterrupted, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        export(uninterrupted, tmp_path)


def test_an_unknown_pipeline_is_refused(uninterrupted, tmp_path):
    with pytest.raises(ConfigError, match="Use ddpm or ddim"):
        export(uninterrupted, tmp_path / "out", pipeline="pndm")
    assert not (tmp_path / "out").exists()


def test_classes_have_no_pipeline_and_that_is_said(make_config, tmp_path):
    config = make_config(tmp_path / "run", train={"duration": "1 steps"}, sample={"num_images": 0})
    config["task"]["class_conditional"] = True
    with pytest.raises(UserError, match="no pipeline for a class-conditional network"):
        export(train(config), tmp_path / "out")


def test_a_pipeline_that_does_not_load_as_written_is_not_delivered(uninterrupted, tmp_path, monkeypatch):
    """The negative control of the comparison: the file on disk is spoilt before it is read back."""
    from diffusers import UNet2DModel

    honest = UNet2DModel.from_pretrained

    def spoilt(*args, **kwargs):
        net = honest(*args, **kwargs)
        net.conv_in.bias.data[0] += 1e-3
        return net

    monkeypatch.setattr(UNet2DModel, "from_pretrained", spoilt)
    with pytest.raises(EnvironmentProblem, match="does not load as the network"):
        export(uninterrupted, tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_a_run_may_end_with_its_pipeline_in_its_folder(make_config, tmp_path):
    run = train({**make_config(tmp_path / "run", train={"duration": "2 steps"}), "export": "ddpm"})
    assert DDPMPipeline.from_pretrained(run).unet.config.sample_size == 16
    assert (run / "samples" / "step-00000002.png").exists()
