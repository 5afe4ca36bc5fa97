"""The decoder configs of DALLE2-pytorch: every key of it obeyed or named, every mistake told in its words."""

import copy
import dataclasses
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclosion.config import dalle2_schema
from eclosion.config.dalle2 import DIALECT
from eclosion.config.load import load, validate
from eclosion.config.schema import steps_in
from eclosion.errors import ConfigError
from eclosion.registry import dump

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("dalle2*.json"))

BASE = {
    "decoder": {
        "unets": [{"dim": 16, "image_embed_dim": 8}, {"dim": 16, "dim_mults": [1, 2]}],
        "image_sizes": [16, 32],
    },
    "data": {"webdataset_base_url": "shards/{}.tar", "img_embeddings_url": "embeddings"},
}


def changed(tree, changes):
    """A copy of a config with the values at some paths, such as "decoder.unets[1].dim", put in their places."""
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        keys = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]
        here = tree
        for key, following in itertools.pairwise(keys):
            if isinstance(here, dict):
                here = here.setdefault(key, [{}] if isinstance(following, int) else {})
            else:
                here = here[key]
        here[keys[-1]] = copy.deepcopy(value)
    return tree


def tree(changes=(), base=BASE):
    return DIALECT.translate(changed(base, dict(changes))).tree


def notes(changes=(), base=BASE):
    return DIALECT.translate(changed(base, dict(changes))).notes


def problems(changes=(), base=BASE):
    with pytest.raises(ConfigError) as error:
        DIALECT.translate(changed(base, dict(changes)))
    assert all("\n" not in problem for problem in error.value.problems)
    return error.value.problems


# --- every key -------------------------------------------------------------------------------------------------------

UNET = "decoder.unets[0]."
TEXT = {UNET + "cond_on_text_encodings": True, "data.text_embeddings_url": "text"}
NOISY = {"decoder.use_noise_for_lowres_cond": True}
WANDB = {"tracker.log[0].log_type": "wandb", "tracker.log[0].wandb_entity": "a", "tracker.log[0].wandb_project": "b"}
CLIP = {"data.img_embeddings_url": None, "decoder.clip": {}}
LOADED = {"tracker.load.load_from": "local", "tracker.load.file_path": "a.pth"}
FROM_HUB = {"tracker.load.load_from": "huggingface", "tracker.load.huggingface_repo": "a/b"}
TO_HUB_SAVE = {"save_to": "huggingface", "huggingface_repo": "a/b"}
TO_HUB = {"tracker.save[0].save_to": "huggingface", "tracker.save[0].huggingface_repo": "a/b"}
SAVE = {"tracker.save[0].save_latest_to": "a.pth"}
DDIM = {"decoder.sample_timesteps": 10}

# Keys that change the run, as in the tables of DALLE2-pytorch: a value for each that is not its default, and what
# else has to be so that the key has a use.
# What torchmetrics' constructors take and nothing here needs, and values that are not its defaults.
TORCHMETRICS = {
    "normalize": True,
    "compute_on_cpu": True,
    "dist_sync_on_step": True,
    "sync_on_compute": False,
    "compute_with_cache": False,
}
OBEYED = {
    "seed": (3, {}),
    # decoder.unets[*]: what its config class declares
    UNET + "dim": (24, {}),
    UNET + "dim_mults": ([1, 2], {}),
    UNET + "image_embed_dim": (12, {}),
    UNET + "text_embed_dim": (12, TEXT),
    UNET + "cond_on_text_encodings": (True, {}),
    UNET + "cond_dim": (32, {}),
    UNET + "self_attn": ([False, True, True, True], {}),
    UNET + "attn_dim_head": (16, {}),
    UNET + "attn_heads": (4, {}),
    UNET + "init_cross_embed": (False, {}),
    # and what else its constructor took
    UNET + "num_image_tokens": (2, {}),
    UNET + "num_time_tokens": (3, {}),
    UNET + "attend_at_middle": (False, {}),
    UNET + "sparse_attn": (True, {}),
    UNET + "cosine_sim_cross_attn": (True, {}),
    UNET + "cosine_sim_self_attn": (True, {}),
    UNET + "max_text_len": (77, {}),
    UNET + "add_image_embeds_to_time": (False, {}),
    UNET + "self_cond": (True, {}),
    UNET + "init_cross_embed_kernel_sizes": ([3, 5], {}),
    UNET + "init_conv_kernel_size": (5, {UNET + "init_cross_embed": False}),
    UNET + "final_conv_kernel_size": (3, {}),
    UNET + "resnet_groups": (4, {}),
    UNET + "resnet_weight_standardization": (True, {}),
    UNET + "num_resnet_blocks": ([1, 1, 2, 2], {}),
    UNET + "cross_embed_downsample": (True, {}),
    UNET + "cross_embed_downsample_kernel_sizes": ([2, 6], {UNET + "cross_embed_downsample": True}),
    UNET + "memory_efficient": (True, {}),
    UNET + "scale_skip_connection": (True, {}),
    UNET + "pixel_shuffle_upsample": (False, {}),
    UNET + "combine_upsample_fmaps": (True, {}),
    UNET + "checkpoint_during_training": (True, {}),
    # decoder
    "decoder.image_sizes": ([16, 48], {}),
    "decoder.timesteps": (500, {}),
    "decoder.sample_timesteps": ([None, 50], {}),
    "decoder.loss_type": ("huber", {}),
    "decoder.beta_schedule": (["cosine", "sigmoid"], {}),
    "decoder.learned_variance": ([False, True], {}),
    "decoder.clip": ({"model": "ViT-B/32"}, {"data.img_embeddings_url": None}),
    "decoder.clip.make": ("open_clip", CLIP),
    "decoder.clip.model": ("ViT-B/16", CLIP),
    "decoder.image_cond_drop_prob": (0.2, {}),
    "decoder.text_cond_drop_prob": (0.2, TEXT),
    "decoder.predict_x_start": ([True, False], {}),
    "decoder.predict_v": (True, {}),
    "decoder.random_crop_sizes": ([None, 16], {}),
    "decoder.use_noise_for_lowres_cond": ([True], {}),
    "decoder.use_blur_for_lowres_cond": ([False, False], NOISY),
    "decoder.lowres_downsample_first": (False, {}),
    "decoder.blur_prob": (0.25, {}),
    "decoder.blur_sigma": ([0.4, 0.8], {}),
    "decoder.blur_kernel_size": ([3, 5], {}),
    "decoder.lowres_noise_sample_level": (0.1, NOISY),
    "decoder.clip_denoised": (False, {}),
    "decoder.clip_x_start": (False, {}),
    "decoder.learned_variance_constrain_frac": (True, {}),
    "decoder.vb_loss_weight": (0.01, {}),
    "decoder.unconditional": (True, {}),
    "decoder.use_dynamic_thres": (True, {}),
    "decoder.dynamic_thres_percentile": (0.9, {"decoder.use_dynamic_thres": True}),
    "decoder.p2_loss_weight_gamma": ([0.0, 0.5], {}),
    "decoder.p2_loss_weight_k": (2, {"decoder.p2_loss_weight_gamma": 1}),
    "decoder.ddim_sampling_eta": (0.5, DDIM),
    # data
    "data.webdataset_base_url": ("others/{}.tar", {}),
    "data.img_embeddings_url": ("others", {}),
    "data.text_embeddings_url": ("others", TEXT),
    "data.num_workers": (0, {}),
    "data.batch_size": (8, {}),
    "data.start_shard": (1, {}),
    "data.end_shard": (9, {}),
    "data.shard_width": (5, {}),
    "data.index_width": (3, {}),
    "data.splits": ({"train": 0.7, "val": 0.2, "test": 0.1}, {}),
    "data.splits.train": (0.7500001, {}),
    "data.splits.val": (0.1500001, {}),
    "data.splits.test": (0.1000001, {}),
    "data.shuffle_train": (False, {}),
    "data.resample_train": (True, {"data.shuffle_train": False, "train.epoch_samples": 100}),
    "data.preprocessing": ({"RandomResizedCrop": {"size": [64, 64]}, "ToTensor": True}, {}),
    # train
    "train.epochs": (3, {}),
    "train.lr": ([1e-3, 1e-4], {}),
    "train.wd": ([0, 0.1], {}),
    "train.warmup_steps": ([None, 100], {}),
    "train.max_grad_norm": ([0.5, 2], {}),
    "train.save_every_n_samples": (1000, {}),
    "train.n_sample_images": (0, {}),
    "train.cond_scale": ([2.0, 1.0], {}),
    "train.device": ("cuda:0", {}),
    "train.epoch_samples": (1000, {}),
    "train.validation_samples": (100, {}),
    "evaluate.n_evaluation_samples": (100, {"evaluate.FID": {}}),
    "evaluate.FID": ({}, {}),
    "evaluate.FID.feature": (64, {"evaluate.FID": {}}),
    "evaluate.FID.feature_extractor_weights_path": ("inception.pth", {"evaluate.FID": {}}),
    "evaluate.FID.antialias": (False, {"evaluate.FID": {}}),
    "evaluate.IS": ({}, {}),
    "evaluate.IS.feature": (64, {"evaluate.IS": {}}),
    "evaluate.IS.splits": (4, {"evaluate.IS": {}}),
    "evaluate.KID": ({}, {}),
    "evaluate.KID.feature": ("logits_unbiased", {"evaluate.KID": {}}),
    "evaluate.KID.subsets": (7, {"evaluate.KID": {}}),
    "evaluate.KID.subset_size": (10, {"evaluate.KID": {}}),
    "evaluate.KID.degree": (2, {"evaluate.KID": {}}),
    "evaluate.KID.gamma": (0.5, {"evaluate.KID": {}}),
    "evaluate.KID.coef": (2.0, {"evaluate.KID": {}}),
    "evaluate.KID.feature_extractor_weights_path": ("inception.pth", {"evaluate.KID": {}}),
    "evaluate.LPIPS": ({}, {}),
    "evaluate.LPIPS.net_type": ("vgg", {"evaluate.LPIPS": {}}),
    "evaluate.LPIPS.reduction": ("sum", {"evaluate.LPIPS": {}}),
    "train.use_ema": (False, {}),
    "train.ema_beta": (0.9, {}),
    "train.amp": (True, {}),
    "train.unet_training_mask": ([True, False], {}),
    # tracker
    "tracker.data_path": ("here", {}),
    "tracker.overwrite_data_path": (True, {}),
    "tracker.log[0].log_type": ("tensorboard", {}),
    "tracker.log[0].resume": (True, {**WANDB, "tracker.log[0].wandb_run_id": "x"}),
    "tracker.log[0].auto_resume": (True, WANDB),
    "tracker.log[0].verbose": (True, WANDB),
    "tracker.log[0].wandb_entity": ("x", WANDB),
    "tracker.log[0].wandb_project": ("x", WANDB),
    "tracker.log[0].wandb_run_name": ("x", WANDB),
    "tracker.log[0].wandb_run_id": (
        "y",
        {**WANDB, "tracker.log[0].resume": True, "tracker.log[0].wandb_run_id": "x"},
    ),
    "tracker.load.load_from": ("local", {"tracker.load.file_path": "a.pth"}),
    "tracker.load.only_auto_resume": (True, LOADED),
    "tracker.load.file_path": ("b.pth", LOADED),
    "tracker.load.url": (
        "https://a/c.pth",
        {"tracker.load.load_from": "url", "tracker.load.url": "https://a/b.pth"},
    ),
    "tracker.load.wandb_file_path": (
        "b.pth",
        {
            "tracker.load.load_from": "wandb",
            "tracker.load.wandb_file_path": "a.pth",
            "tracker.load.wandb_run_path": "a/b/c",
        },
    ),
    "tracker.load.wandb_run_path": (
        "a/b/c",
        {"tracker.load.load_from": "wandb", "tracker.load.wandb_file_path": "a.pth"},
    ),
    "tracker.load.huggingface_repo": ("c/d", FROM_HUB),
    "tracker.load.huggingface_file_path": ("latest.pth", FROM_HUB),
    "tracker.load.token_path": ("token", FROM_HUB),
    "tracker.save": ({"save_to": "local", "save_latest_to": "a.pth"}, {}),
    "tracker.save[0].save_to": ("wandb", {**SAVE, **WANDB}),
    "tracker.save[0].save_latest_to": ("b.pth", SAVE),
    "tracker.save[0].save_best_to": ("best.pth", SAVE),
    "tracker.save[0].save_meta_to": ("meta", SAVE),
    "tracker.save[0].save_type": ("model", SAVE),
    "tracker.save[0].huggingface_repo": ("c/d", {**SAVE, **TO_HUB}),
    "tracker.save[0].token_path": ("token", {**SAVE, **TO_HUB}),
    "tracker.save[0].wandb_run_path": ("a/b/c", {**SAVE, "tracker.save[0].save_to": "wandb", **WANDB}),
}
# Keys that change nothing of the run, and are named: a value, and what else has to be.
NAMED = {
    UNET + "out_dim": (6, {}),
    UNET + "channels": (1, {}),
    UNET + "channels_out": (6, {}),
    UNET + "lowres_cond": (True, {}),
    UNET + "lowres_noise_cond": (True, {}),
    UNET + "cond_on_image_embeds": (False, {}),
    "decoder.image_size": (7, {}),
    "decoder.predict_x_start_for_latent_diffusion": (True, {}),
    "decoder.clip_adapter_overrides": ({"a": 1}, {}),
    "decoder.auto_normalize_img": (False, {}),
    "decoder.clip.base_model_kwargs": ({"a": 1}, CLIP),
    "train.find_unused_parameters": (False, {}),
    "train.static_graph": (False, {}),
    "train.save_immediately": (True, {}),
    "train.save_all": (True, {}),  # the three stand in older example files
    "train.save_latest": (True, {}),
    "train.save_best": (True, {}),
    "evaluate.FID.input_img_size": ([3, 64, 64], {"evaluate.FID": {}}),
    **{f"evaluate.{metric}.reset_real_features": (False, {f"evaluate.{metric}": {}}) for metric in ("FID", "KID")},
    **{
        f"evaluate.{metric}.{key}": (value, {f"evaluate.{metric}": {}})
        for metric in ("FID", "IS", "KID", "LPIPS")
        for key, value in TORCHMETRICS.items()
    },
    "tracker.save[0].save_all": (True, SAVE),
    "tracker.save[0].save_latest": (True, SAVE),
    "tracker.save[0].save_best": (True, SAVE),
}
# What torchmetrics' constructors take that a JSON file cannot hold: null alone.
NULLS = {
    f"evaluate.{metric}.{key}"
    for metric in ("FID", "IS", "KID", "LPIPS")
    for key in ("process_group", "dist_sync_fn", "distributed_available_fn")
}
# Keys that decide whether a config is refused.
DECISIVE = {
    UNET + "init_dim": (8, {}),
    "decoder.channels": (1, {}),
    "decoder.vae": ({}, {}),
}
GROUPS = {"decoder", "decoder.unets", "data", "train", "evaluate", "tracker", "tracker.log", "tracker.load"}


def outcome(config):
    try:
        translation = DIALECT.translate(config)
    except ConfigError as error:
        return None, error.problems
    return translation.tree, translation.notes


def around(key, context):
    """A config in which the key has a use, with and without it."""
    return changed(BASE, context), changed(BASE, {**context, key: (OBEYED | NAMED | DECISIVE)[key][0]})


@pytest.mark.parametrize("key", OBEYED)
def test_each_key_changes_the_run(key):
    without, with_it = around(key, OBEYED[key][1])
    before, after = outcome(without), outcome(with_it)
    assert before[0] is not None, before[1]
    assert after[0] is not None, after[1]
    assert before[0] != after[0]
    run = validate(after[0])
    assert validate(json.loads(json.dumps(dump(run)))) == run


@pytest.mark.parametrize("key", NAMED)
def test_each_key_that_changes_nothing_is_named(key):
    without, with_it = around(key, NAMED[key][1])
    (before, _), (after, said) = outcome(without), outcome(with_it)
    assert after is not None, said
    assert before == after
    assert [note for note in said if re.search(re.escape(key) + r"\b", note)], said


@pytest.mark.parametrize("key", DECISIVE)
def test_each_other_key_decides_whether_the_config_is_refused(key):
    without, with_it = around(key, DECISIVE[key][1])
    assert outcome(without)[0] is not None
    assert outcome(with_it)[0] is None


def keys_of(cls, prefix=""):
    """Every key of a section, with those of the sections in it."""
    for field in dataclasses.fields(cls):
        yield f"{prefix}{field.name}"
        for name, inside in vars(dalle2_schema).items():
            ours = dataclasses.is_dataclass(inside) and inside.__module__ == dalle2_schema.__name__
            if ours and re.search(rf"\b{name}\b", str(field.type)):
                many = "[0]" if str(field.type).startswith(("list", "typing.Annotated[list")) else ""
                yield from keys_of(inside, f"{prefix}{field.name}{many}.")


def test_no_key_is_forgotten_here_and_none_is_read_that_stands_nowhere():
    listed = {*OBEYED, *NAMED, *DECISIVE, *GROUPS, *NULLS}
    assert set(keys_of(dalle2_schema.DecoderFile)) == listed


@pytest.mark.parametrize("key", sorted({*OBEYED, *NAMED, *DECISIVE, *GROUPS, *NULLS}))
def test_a_value_of_another_type_is_told_with_its_path(key):
    right, _ = (OBEYED | NAMED | DECISIVE).get(key, ({}, {}))
    wrong = 5 if isinstance(right, dict) else {"other": 5}
    context = {"tracker.save": [{"save_latest_to": "a.pth"}], "decoder.clip": {}}
    assert any(problem.startswith((f"{key} is ", f"{key}: ")) for problem in problems(context | {key: wrong}))


def test_keys_that_are_given_with_null_are_as_if_they_were_not_given():
    nullable = ["decoder.clip", "data.text_embeddings_url", "train.epoch_samples", "train.unet_training_mask"]
    sections = ["evaluate", "tracker"]
    assert outcome(changed(BASE, dict.fromkeys([*nullable, *sections]))) == outcome(BASE)
    metrics = {f"evaluate.{metric}": {} for metric in ("FID", "IS", "KID", "LPIPS")}
    nulls = dict.fromkeys([*sorted(NULLS), "evaluate.KID.gamma"])
    assert outcome(changed(BASE, metrics | nulls)) == outcome(changed(BASE, metrics))


# --- what they become ------------------------------------------------------------------------------------------------


def test_what_is_not_said_is_as_in_the_readme():
    run = load(BASE).run
    first, second = run.task.unets
    assert (first.model.channel_mults, second.model.channel_mults) == ([1, 2, 4, 8], [1, 2])
    assert [type(unet.noise_schedule).__name__ for unet in run.task.unets] == ["Cosine", "Cosine"]
    assert first.noise_schedule.num_train_timesteps == 1000
    assert first.learned_variance.weight == 0.001
    assert second.learned_variance is None
    assert (first.lowres, second.lowres.blur_probability, second.lowres.noise) == (None, 0.5, False)
    assert (run.task.image_dropout, run.task.text_dropout, run.task.clip_sample) == (0.1, 0.5, True)
    assert (run.train.duration, run.train.batch_size, run.train.mixed_precision) == ("20 epochs", 64, "no")
    assert (run.train.max_grad_norm, run.train.device, run.train.freeze) == (0.5, "auto", [])
    assert (run.optimizer.learning_rate, run.optimizer.weight_decay, run.optimizer.betas) == (1e-4, 0.01, (0.9, 0.99))
    assert (run.optimizer.decay, run.optimizer.lr_schedule, run.optimizer.networks) == ("matrices", "constant", {})
    assert run.ema.decays == [0.99]
    assert (run.sample.num_images, run.sample.guidance_scale) == (6, 1.0)
    assert run.sample.every == run.checkpoint.every == "100000 samples or 1 epochs"
    assert (run.validate.every, run.validate.num_samples) == ("1 epochs", None)
    splits = run.data.source.splits
    assert (splits.train, splits.val, splits.test) == (0.75, 0.15, 0.1)
    assert run.output == "./.tracker-data"
    assert type(run.sample.sampler).__name__ == "DDPM"


def test_where_readme_and_code_differ_it_is_said_once():
    assert notes()[0] == (
        "Defaults are those of the README, in brackets those of the original's code: decoder.beta_schedule is cosine "
        "for "
        "every U-Net (linear for the last), train.ema_beta is 0.99 (0.999), tracker.data_path is ./.tracker-data "
        "(.tracker_data)."
    )
    said = {"decoder.beta_schedule": "cosine", "train.ema_beta": 0.9, "tracker.data_path": "x"}
    assert not [note for note in notes(said) if "README" in note]


@pytest.mark.parametrize(
    ("given_", "names"),
    [
        ("linear", ["linear", "linear"]),
        (["jsd", "sigmoid"], ["jsd", "sigmoid"]),
        (None, ["cosine", "linear"]),
    ],
)
def test_a_schedule_is_a_name_or_a_list_and_null_is_the_rule_of_the_original(given_, names):
    unets = tree({"decoder.beta_schedule": given_})["task"]["unets"]
    assert [unet["noise_schedule"]["name"] for unet in unets] == names


def test_null_is_cosine_for_a_single_unet():
    single = {"decoder.unets": [{"dim": 16}], "decoder.image_sizes": [16], "decoder.beta_schedule": None}
    assert tree(single)["task"]["unets"][0]["noise_schedule"] == {"name": "cosine", "num_train_timesteps": 1000}


@pytest.mark.parametrize("name", ["linear", "quadratic", "sigmoid"])
def test_schedules_of_betas_are_stretched_to_the_number_of_levels(name):
    """Against the original: betas run from 1e-4 to 0.02, times 1000 / T."""
    schedule = tree({"decoder.beta_schedule": name, "decoder.timesteps": 250})["task"]["unets"][0]["noise_schedule"]
    assert schedule == {"name": name, "num_train_timesteps": 250, "beta_start": 4e-4, "beta_end": 0.08}


def test_fewer_sampling_steps_are_ddim_and_as_many_or_null_are_ddpm():
    changes = {"decoder.sample_timesteps": [None, 64], "decoder.ddim_sampling_eta": 0.5}
    unets = tree(changes)["task"]["unets"]
    assert [u["sampler"] for u in unets] == [{"name": "ddpm"}, {"name": "ddim", "num_inference_steps": 64, "eta": 0.5}]
    same = tree({"decoder.sample_timesteps": 64})
    assert same["sample"]["sampler"] == {
        "name": "ddim",
        "num_inference_steps": 64,
        "eta": 0.0,
    }  # overrides reach it there
    assert [unet["sampler"] for unet in same["task"]["unets"]] == [None, None]
    assert tree({"decoder.sample_timesteps": [1000, None]})["sample"]["sampler"] == {"name": "ddpm"}


@pytest.mark.parametrize(
    ("given_", "learned"),
    [(True, [True, False]), (False, [False, False]), ([True], [True, False]), ([True, True], [True, True])],
)
def test_a_learned_variance_goes_on_with_false(given_, learned):
    unets = tree({"decoder.learned_variance": given_})["task"]["unets"]
    assert [unet["learned_variance"] is not None for unet in unets] == learned
    assert any("true is for the first U-Net alone" in note for note in notes({"decoder.learned_variance": given_})) == (
        given_ is True
    )


@pytest.mark.parametrize("given_", [True, [True], [False, True]])
def test_an_answer_for_upsamplers_may_leave_out_the_first_unet(given_):
    unets = tree({"decoder.use_noise_for_lowres_cond": given_, "decoder.use_blur_for_lowres_cond": False})["task"][
        "unets"
    ]
    assert unets[0]["lowres"] is None
    assert (unets[1]["lowres"]["noise"], unets[1]["lowres"]["blur_probability"]) == (True, 0.0)


def test_a_range_of_the_blur_is_a_range():
    changes = {"decoder.blur_sigma": [0.4, 0.8], "decoder.blur_kernel_size": (3, 7)}
    run = load(changed(BASE, changes)).run
    assert (run.task.unets[1].lowres.blur_sigma, run.task.unets[1].lowres.blur_kernel_size) == ((0.4, 0.8), (3, 7))


def test_v_goes_before_x_start():
    unets = tree({"decoder.predict_v": [True, False], "decoder.predict_x_start": True})["task"]["unets"]
    assert [unet["prediction_type"] for unet in unets] == ["v_prediction", "sample"]


def test_p2_is_off_where_gamma_is_0():
    unets = tree({"decoder.p2_loss_weight_gamma": [0, 0.5], "decoder.loss_type": "l1"})["task"]["unets"]
    assert [unet["loss"] for unet in unets] == [
        {"kind": "l1"},
        {"kind": "l1", "weighting": "p2", "p2_gamma": 0.5, "p2_k": 1.0},
    ]


def test_what_differs_between_unets_is_told_of_single_networks():
    changes = {
        "train.lr": [1e-3, 1e-4],
        "train.wd": 0,
        "train.warmup_steps": [None, 7],
        "train.max_grad_norm": [0.5, 0.5],
        "train.unet_training_mask": [False, True],
        "train.cond_scale": 2,
    }
    found = tree(changes)
    assert found["optimizer"]["networks"] == {"unet_1": {"learning_rate": 1e-4, "lr_warmup_steps": 7}}
    assert (found["optimizer"]["learning_rate"], found["optimizer"]["weight_decay"]) == (1e-3, 0.0)
    assert (found["train"]["max_grad_norm"], found["train"]["freeze"]) == (0.5, ["unet_0"])
    assert found["sample"]["guidance_scale"] == 2
    assert tree({"train.max_grad_norm": None})["train"]["max_grad_norm"] is None


def test_all_that_is_random_follows_from_the_seed():
    found = tree({"seed": 3})
    assert (found["seed"], found["sample"]["seed"], found["data"]["source"]["split_seed"]) == (3, 3, 3)


def test_guidance_is_1_for_a_unet_that_follows_nothing_and_that_is_said():
    changes = {"train.cond_scale": [2, 3]}
    assert tree(changes)["sample"]["guidance_scale"] == [2, 1]
    assert "train.cond_scale[1] is accepted, and has no effect: decoder.unets[1] follows nothing." in notes(changes)


def test_the_batch_size_is_that_of_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert tree({"data.batch_size": 8})["train"]["batch_size"] == 32
    assert "data.batch_size counts the images of one process: 8 on each of 4 makes train.batch_size=32." in notes(
        {"data.batch_size": 8}
    )


def test_epochs_of_so_many_samples_are_a_length_in_samples():
    changes = {"train.epochs": 3, "train.epoch_samples": 500, "train.save_every_n_samples": 800}
    found = tree(changes)
    assert found["train"]["duration"] == "1500 samples"
    assert found["validate"]["every"] == found["checkpoint"]["every"] == "500 samples"  # at the end of each, there too
    assert found["data"]["epoch_samples"] is None
    assert any(note.startswith("train.epochs x train.epoch_samples is the length") for note in notes(changes))
    resampled = tree({**changes, "data.resample_train": True, "data.shuffle_train": False})["data"]
    assert (resampled["resample"], resampled["shuffle"], resampled["epoch_samples"]) == (True, False, 500)


@pytest.mark.parametrize(("saves", "epoch", "steps"), [(100_000, 48, 3), (32, 48, 2)])
def test_a_run_saves_and_samples_at_least_once_an_epoch_whose_length_only_the_data_says(saves, epoch, steps):
    run = validate(tree({"train.save_every_n_samples": saves}))
    for every in (run.checkpoint.every, run.sample.every):
        assert steps_in(every, batch_size=16, epoch_samples=epoch) == steps


@pytest.mark.parametrize(("epoch", "told"), [(None, True), (2000, True), (500, False)])
def test_that_samples_between_checkpoints_are_those_of_the_run_is_said_where_it_differs(epoch, told):
    changes = {"train.save_every_n_samples": 1000, "train.epoch_samples": epoch}
    assert any(note.startswith("train.save_every_n_samples 1000 counts") for note in notes(changes)) is told


@pytest.mark.parametrize(("device", "native"), [("cuda:0", "cuda"), ("cuda", "cuda"), ("cpu", "cpu"), ("mps", "mps")])
def test_the_device_is_obeyed(device, native):
    assert tree({"train.device": device})["train"]["device"] == native


def test_another_gpu_is_chosen_by_the_environment_and_that_is_said():
    assert tree({"train.device": "cuda:2"})["train"]["device"] == "cuda"
    assert any("CUDA_VISIBLE_DEVICES=2" in note for note in notes({"train.device": "cuda:2"}))


def test_without_validation_there_is_none():
    changes = {"data.splits": {"train": 0.9, "val": 0, "test": 0.1}}
    assert tree(changes)["validate"]["every"] is None
    assert "data.splits.val is 0, so there is no validation, and no best checkpoint." in notes(changes)


def test_nothing_is_told_to_an_unconditional_cascade():
    text = {UNET + "cond_on_text_encodings": True, "data.text_embeddings_url": "text"}
    changes = {"decoder.unconditional": True, "train.cond_scale": 3, **text}
    found = tree(changes)
    source = found["data"]["source"]
    assert (source["img_embeddings_url"], source["text_embeddings_url"]) == (None, None)
    assert found["sample"]["guidance_scale"] == 1
    assert "text_conditioned" not in found["task"]["unets"][0]["model"]
    assert validate(found).task.unconditional
    reason = next(
        note
        for note in notes(changes)
        if note.endswith("has no effect: decoder.unconditional is true.")
        or (note.endswith("have no effect: decoder.unconditional is true."))
    )
    for key in ("data.img_embeddings_url", "train.cond_scale", "decoder.unets[0].image_embed_dim"):
        assert key in reason


def test_one_place_to_save_to_may_stand_without_a_list():
    one = {"save_to": "local", "save_best_to": "best.pth"}
    assert tree({"tracker.save": one}) == tree({"tracker.save": [one]})
    assert tree({"tracker.save": one})["checkpoint"]["keep_best"]
    assert not tree()["checkpoint"]["keep_best"]


def test_one_logger_may_stand_without_a_list_and_several_are_named_in_one():
    wandb = {"log_type": "wandb", "wandb_entity": "a", "wandb_project": "b", "resume": True, "wandb_run_id": "c"}
    assert tree({"tracker.log": wandb}) == tree({"tracker.log": [wandb]})
    told = {"name": "wandb", "entity": "a", "project": "b", "run_name": None, "run_id": "c"}
    told |= {"resume": True, "auto_resume": False}
    silent, loud = {"name": "console", "numbers": False}, {"name": "console", "numbers": True}
    assert tree({"tracker.log": wandb})["track"]["log"] == [silent, told]
    assert tree({"tracker.log": {**wandb, "verbose": True}})["track"]["log"] == [loud, told]
    several = [wandb, {"log_type": "tensorboard"}, {"log_type": "console"}]
    assert tree({"tracker.log": several})["track"]["log"] == [loud, {"name": "tensorboard"}, told]


def test_paths_to_save_to_are_those_that_are_given():
    local = {"save_to": "local", "save_latest_to": True, "save_best_to": True, "save_meta_to": "about"}
    paths = {"latest": "latest.pth", "best": "best.pth", "meta": "about"}
    assert tree({"tracker.save": local})["track"]["save"] == [{"name": "local", **paths, "kind": "checkpoint"}]
    split = {**local, "save_best_to": "/models/{epoch}.pth", "save_type": "model"}
    assert tree({"tracker.save": split})["track"]["save"] == [
        {"name": "local", "latest": "latest.pth", "meta": "about", "kind": "model"},
        {"name": "local", "root": "/models", "best": "{epoch}.pth", "kind": "model"},
    ]


def test_without_validation_no_checkpoint_is_the_best():
    changes = {"data.splits": {"train": 1.0, "val": 0.0, "test": 0.0}, "tracker.save": {"save_best_to": "a"}}
    assert tree(changes)["track"]["save"] == []
    assert any("no best checkpoint" in note for note in notes(changes))
    assert validate(tree(changes))


def test_without_a_path_a_run_at_wandb_is_the_one_that_numbers_go_to():
    load = {"tracker.load.load_from": "wandb", "tracker.load.wandb_file_path": "latest.pth"}
    assert tree({**load, **WANDB})["start"]["run_path"] is None  # the run folder knows it
    one = {**WANDB, "tracker.log[0].wandb_run_id": "c"}
    assert tree({**load, **one, "tracker.log[0].resume": True})["start"]["run_path"] == "a/b/c"
    assert tree({**load, **one})["start"]["run_path"] is None
    assert "tracker.log[0].wandb_run_id is accepted, and has no effect: resume is false." in notes(one)
    assert tree({**load, "tracker.load.wandb_run_path": "d/e/f"})["start"]["run_path"] == "d/e/f"


@pytest.mark.parametrize(("resume", "auto_resume", "told"), [(False, True, set()), (True, False, {"resume", "auto_"})])
def test_that_a_run_goes_on_is_said_where_the_config_says_otherwise(resume, auto_resume, told):
    said = notes({"tracker.log": {"log_type": "console", "resume": resume, "auto_resume": auto_resume}})
    found = [note for note in said if "a run that is not finished always goes on" in note]
    assert all(f"tracker.log[0].{key}" in found[0] for key in told)
    assert bool(found) == bool(told)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "data"),
    [
        ({"ToTensor": True}, {"image_size": 32, "horizontal_flip": False}),
        ({}, {"image_size": 32, "horizontal_flip": False}),
        ({"RandomHorizontalFlip": True, "ToTensor": True}, {"image_size": 32, "horizontal_flip": True}),
        ({"RandomHorizontalFlip": False, "ToTensor": True}, {"image_size": 32, "horizontal_flip": False}),
        (
            {"RandomResizedCrop": {"size": [128, 128], "scale": [0.75, 1.0]}, "ToTensor": True},
            {
                "image_size": 128,
                "preprocessing": [{"RandomResizedCrop": {"size": [128, 128], "scale": [0.75, 1.0]}}, {"ToTensor": {}}],
            },
        ),
        (
            {"RandomResizedCrop": {"size": [40, 64]}, "ToTensor": True},
            {"image_size": [40, 64], "preprocessing": [{"RandomResizedCrop": {"size": [40, 64]}}, {"ToTensor": {}}]},
        ),
        (
            {"Resize": {"size": 64}, "ToTensor": True},
            {
                "image_size": 64,
                "preprocessing": [{"Resize": {"size": 64}}, {"ToTensor": {}}, {"CenterCrop": {"size": 64}}],
            },
        ),
        (
            {"CenterCrop": {"size": 80}, "Resize": {"size": [64]}},
            {"image_size": 64, "preprocessing": [{"CenterCrop": {"size": 80}}, {"Resize": {"size": [64]}}]},
        ),
        (
            {"RandomHorizontalFlip": {"p": 0.3}, "ToTensor": True},
            {
                "image_size": 32,
                "preprocessing": [
                    {"Resize": {"size": 32}},
                    {"CenterCrop": {"size": 32}},
                    {"RandomHorizontalFlip": {"p": 0.3}},
                    {"ToTensor": {}},
                ],
            },
        ),
        (
            {"Pad": {"padding": 4}},
            {
                "image_size": 32,
                "preprocessing": [
                    {"Resize": {"size": 32}},
                    {"CenterCrop": {"size": 32}},
                    {"Pad": {"padding": 4}},
                    {"CenterCrop": {"size": 32}},
                ],
            },
        ),
    ],
)
def test_images_arrive_at_one_size(steps, data):
    changes = {"data.preprocessing": steps}
    found = tree(changes)["data"]
    assert {key: found.get(key) for key in data} == data
    assert validate(tree(changes))
    one_size = any(
        "size" in step and isinstance(step["size"], list) for step in steps.values() if step not in (True, False)
    )
    assert any("images of different sizes" in note for note in notes(changes)) == (not one_size)


def test_images_that_are_not_square_are_stretched_and_that_is_said():
    wide = notes({"data.preprocessing": {"RandomResizedCrop": {"size": [32, 48]}}})
    assert any(note.startswith("data.preprocessing makes images of 48x32 pixels, and U-Nets") for note in wide)
    square = notes({"data.preprocessing": {"RandomResizedCrop": {"size": [48, 48]}}})
    assert not any("U-Nets make square ones" in note for note in square)


@pytest.mark.parametrize(("kind", "context"), [("image", {}), ("text", TEXT)])
def test_what_is_always_hidden_is_said(kind, context):
    key = f"decoder.{kind}_cond_drop_prob"
    for changes, told in ({key: 0.9}, False), ({key: 1.0}, True), ({key: 1.0, "decoder.unconditional": True}, False):
        said = [note for note in notes({**context, **changes}) if note.startswith(f"{key} is 1: in training no U-Net")]
        assert bool(said) is told


def test_clip_sees_images_of_its_own_size_where_nothing_says_another():
    assert tree(CLIP)["data"]["image_size"] == 224
    for name, side in {
        "ViT-L/14@336px": 336,
        "ViT-L-14-336-quickgelu": 336,
        "ViT-H-14-378-quickgelu": 378,
        "convnext_large_d_320": 320,
        "RN50x4": 288,
        "RN50x4-quickgelu": 288,
        "ViT-B-32-quickgelu": 224,
    }.items():
        assert tree({**CLIP, "decoder.clip.model": name})["data"]["image_size"] == side, name


@pytest.mark.parametrize(
    ("content", "side"),
    [('{"vision_config": {"image_size": 48}}', 48), ('{"vision_config": {}}', 224), ("[]", 224), ("{", 224)],
)
def test_the_folder_of_a_clip_says_the_size_of_its_images(content, side, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert tree({**CLIP, "decoder.clip.model": str(tmp_path)})["data"]["image_size"] == side
    small = {**CLIP, "data.preprocessing": {"CenterCrop": {"size": 64}}}
    assert tree(small)["data"]["image_size"] == 64
    assert any("which are enlarged to 224 for decoder.clip" in note for note in notes(small))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_keys_are_told_all_at_once_with_their_paths():
    found = problems(
        {
            "decoder.unets[1].dimm_mults": [1, 2],
            "decoder.learned_varianc": True,
            "data.splits.trian": 0.5,
            "data.embeddings_url": "x",
            "train.learning_rate": 1e-3,
            "evaluate.FID": {"featur": 64},
            "tracker.log[0].wandb_resume": True,
            "tracker.save": {"save_latest_to": "x", "save_lates_to": "x"},
            "sead": 3,
        }
    )
    assert [re.split(r"[?]| Options", problem)[0] for problem in found] == [
        "decoder.unets[1].dimm_mults is not an option. Did you mean 'dim_mults'",
        "decoder.learned_varianc is not an option. Did you mean 'learned_variance'",
        "data.splits.trian is not an option. Did you mean 'train'",
        "data.embeddings_url is not an option. Did you mean 'img_embeddings_url'",
        "train.learning_rate is not an option.",
        "evaluate.FID.featur is not an option. Did you mean 'feature'",
        "tracker.log[0].wandb_resume is not an option. Did you mean 'wandb_run_name'",
        "tracker.save[0].save_lates_to is not an option. Did you mean 'save_latest_to'",
        "sead is not an option. Did you mean 'seed'",
    ]


def test_unknown_keys_are_left_out_with_a_note_if_that_is_wished():
    config = changed(BASE, {"decoder.unets[1].dimm_mults": [1, 2], "train.learning_rate": 1})
    lenient = DIALECT.translate(config, lenient=True)
    assert lenient.tree == tree()
    assert lenient.notes[0].startswith("decoder.unets[1].dimm_mults is not an option. Did you mean 'dim_mults'?")
    assert lenient.notes[0].endswith(" It is left out.")
    assert load(config, lenient=True).notes == lenient.notes


def test_unknown_keys_and_other_problems_are_told_together():
    found = problems({"decoder.unets[1].dimm_mults": [1, 2], "train.lr": "hot", "decoder.loss_type": "l3"})
    assert [problem.partition(" ")[0] for problem in found] == [
        "decoder.unets[1].dimm_mults",
        "decoder.loss_type",
        "train.lr",
    ]
    found = problems({"decoder.unets[1].dimm_mults": [1, 2], "train.lr": 1})
    assert [problem.partition(" ")[0] for problem in found] == ["decoder.unets[1].dimm_mults", "train.lr"]


REFUSED = [
    ({"decoder.unets": []}, "decoder.unets is [], and must be list of mappings of options of length >= 1."),
    ({"decoder.unets": [{}], "decoder.image_sizes": [8]}, "decoder.unets[0].dim is required."),
    (
        {"decoder.unets": [{"dim": 16, "dim_mults": [1]}] * 9, "decoder.image_sizes": list(range(16, 25))},
        "decoder.unets has 9 U-Nets, and 8 are the most.",
    ),
    ({"decoder.timesteps": 0}, "decoder.timesteps is 0, and must be int >= 1."),
    ({"decoder.timesteps": 10.5}, "decoder.timesteps is 10.5, and must be int >= 1."),
    (
        {"decoder.image_sizes": [16]},
        "decoder.image_sizes has 1 entry, and there are 2 U-Nets. Give one for each.",
    ),
    (
        {"decoder.image_sizes": None, "decoder.image_size": 64},
        "decoder.image_sizes is required: one size for each of 2 U-Nets, from low to high resolution.",
    ),
    (
        {"decoder.image_sizes": None, "decoder.unets": [{"dim": 16}]},
        "decoder.image_sizes is required: a list of the size of each U-Net's images, such as [64].",
    ),
    (
        {"decoder.image_sizes": [32, 16]},
        "decoder.image_sizes is [32, 16], and must rise from U-Net to U-Net. Order sizes and unets from low to high "
        "resolution.",
    ),
    (
        {"decoder.image_sizes": [16, 16]},
        "decoder.image_sizes is [16, 16], and must rise from U-Net to U-Net. Order sizes and unets from low to high "
        "resolution.",
    ),
    (
        {"decoder.image_sizes": [12, 32]},
        "decoder.image_sizes[0] is 12, and must be a multiple of 8: decoder.unets[0] halves the resolution 3 times. "
        "Change it, or dim_mults.",
    ),
    (
        {"decoder.random_crop_sizes": [None, 7]},
        "decoder.random_crop_sizes[1] is 7, and must be a multiple of 2: decoder.unets[1] halves the resolution 1 "
        "times. "
        "Change it, or dim_mults.",
    ),
    (
        {"decoder.random_crop_sizes": [16, 16]},
        "decoder.random_crop_sizes[0] is 16, and must be null: the first U-Net must learn whole images.",
    ),
    (
        {"decoder.random_crop_sizes": [None, 64]},
        "decoder.random_crop_sizes[1] is 64, and the images of that U-Net are 32.",
    ),
    (
        {"decoder.beta_schedule": ["cosine"]},
        "decoder.beta_schedule has 1 entry, and there are 2 U-Nets. Give one for each.",
    ),
    (
        {"decoder.beta_schedule": "cosin"},
        "decoder.beta_schedule is 'cosin', and must be one of: cosine, linear, quadratic, jsd, sigmoid or list of one "
        "of: "
        "cosine, linear, quadratic, jsd, sigmoid or none.",
    ),
    (
        {"decoder.timesteps": 10, "decoder.beta_schedule": ["cosine", "linear"]},
        "decoder.timesteps is 10, and linear needs at least 20: with fewer, the last levels would add more noise than "
        "there is image. Raise it, or set beta_schedule to cosine.",
    ),
    (
        {"decoder.sample_timesteps": [10, 2000]},
        "decoder.sample_timesteps[1] is 2000, and there are 1000 timesteps. Use at most as many.",
    ),
    (
        {"decoder.learned_variance": [True, True, True]},
        "decoder.learned_variance has 3 entries, and there are 2 U-Nets. Give at most one for each.",
    ),
    (
        {"decoder.use_noise_for_lowres_cond": [True, True, True]},
        "decoder.use_noise_for_lowres_cond has 3 entries, and there are 2 U-Nets. Give one for each, with or without "
        "the "
        "first.",
    ),
    (
        {"decoder.use_noise_for_lowres_cond": [True, True]},
        "decoder.use_noise_for_lowres_cond[0] is true, and must be false: the first U-Net sees no smaller image.",
    ),
    (
        {"decoder.use_blur_for_lowres_cond": False},
        "decoder.use_blur_for_lowres_cond and use_noise_for_lowres_cond are both false for decoder.unets[1]. It needs "
        "one "
        "of them: the images that it enlarges in sampling are not perfect.",
    ),
    (
        {"decoder.blur_sigma": [0.8, 0.4]},
        "decoder.blur_sigma is [0.8, 0.4], and must be a range that begins with the smaller number.",
    ),
    (
        {"decoder.blur_kernel_size": 4},
        "decoder.blur_kernel_size is 4, and must be odd, so that the kernel has a middle.",
    ),
    (
        {"decoder.blur_kernel_size": 33},
        "decoder.blur_kernel_size is 33, and the images that are blurred for decoder.unets[1] are 16 pixels wide. Use "
        "at "
        "most 31.",
    ),
    ({"decoder.channels": 1}, "decoder.channels is 1, and images have 3: they are read as RGB."),
    (
        {"data.img_embeddings_url": None, "decoder.clip": {"make": "coca"}},
        "decoder.clip.make is 'coca', which stands for a network without weights. Use openai or open_clip, or "
        "data.img_embeddings_url.",
    ),
    (
        {"decoder.clip": {}},
        "decoder.clip and data.img_embeddings_url are both given, and both bring image embeddings. Remove one.",
    ),
    (
        {"decoder.clip": {}, **TEXT},
        "decoder.clip is given, and data.img_embeddings_url and data.text_embeddings_url bring all embeddings. Remove "
        "decoder.clip.",
    ),
    (
        {"data.text_embeddings_url": "text"},
        "data.text_embeddings_url is given, and no U-Net is told text. Set cond_on_text_encodings in "
        "decoder.unets[0], or "
        "remove it.",
    ),
    (
        {"data.splits": {"train": 0.8}},
        "data.splits: train 0.8, val 0.15, test 0.1 sum to 1.05. They must sum to 1.",
    ),
    (
        {"data.splits": {"train": 0, "val": 0.5, "test": 0.5}},
        "data.splits.train is 0, so that there is nothing to train on.",
    ),
    (
        {"data.start_shard": 5, "data.end_shard": 4},
        "data.end_shard is 4, and data.start_shard is 5: no shard is left.",
    ),
    (
        {"data.resample_train": True, "train.epoch_samples": 10},
        "data.resample_train draws shards at random, and data.shuffle_train visits each once. Set shuffle_train or "
        "resample_train to false.",
    ),
    (
        {"data.resample_train": True, "data.shuffle_train": False},
        "data.resample_train has no end of its own. Set train.epoch_samples, the samples in an epoch.",
    ),
    (
        {"data.preprocessing": {"CenterCrop": {"size": 16}}},
        "data.preprocessing makes images of 16x16 pixels, and the last U-Net makes 32x32: there is nothing larger to "
        "learn "
        "from. Change the size there, or decoder.image_sizes.",
    ),
    (
        {"data.preprocessing": {"ToTensor": 1}},
        "data.preprocessing: ToTensor is 1, and must be true, false or a mapping of its options.",
    ),
    (
        {"train.lr": [1e-4, 0.1]},
        "train.lr[1] is 0.1, and must be at most 0.01, as in the original. The default is 1e-4.",
    ),
    ({"train.lr": [1e-4]}, "train.lr has 1 entry, and there are 2 U-Nets. Give one for each."),
    (
        {"train.unet_training_mask": [False, False]},
        "train.unet_training_mask is false for every U-Net, so that nothing would be trained.",
    ),
    (
        {"train.unet_training_mask": [True]},
        "train.unet_training_mask has 1 entry, and there are 2 U-Nets. Give one for each.",
    ),
    (
        {"train.cond_scale": 2, "decoder.image_cond_drop_prob": 0},
        "train.cond_scale is 2 for decoder.unets[0], and decoder.image_cond_drop_prob is 0, so that it never learns "
        "to do "
        "without. Set that to 0.1, or cond_scale to 1.",
    ),
    ({"train.device": "tpu"}, "train.device is 'tpu', and must be cpu, mps, cuda or cuda:0."),
    ({"train.ema_beta": 1}, "train.ema_beta is 1, and must be float >= 0 and < 1."),
    (
        {"evaluate.n_evaluation_samples": 100, "evaluate.KID": {}},
        "evaluate.KID.subset_size is 1000, and evaluate.n_evaluation_samples is 100: a subset cannot have more images "
        "than "
        "there are.",
    ),
    (
        {"evaluate.n_evaluation_samples": 10, "evaluate.IS": {}},
        "evaluate.IS.splits is 10, and evaluate.n_evaluation_samples is 10: each split needs at least two images.",
    ),
    (
        {"evaluate.n_evaluation_samples": 1, "evaluate.FID": {}},
        "evaluate.n_evaluation_samples is 1, and a metric needs at least two images.",
    ),
    (
        {"evaluate.LPIPS": {}, "decoder.unconditional": True},
        "evaluate.LPIPS compares images with those that they are made from, and decoder.unconditional is true",
    ),
    (
        {"evaluate.LPIPS": {"reduction": "none"}},
        "evaluate.LPIPS.reduction is 'none', which gives a number for each image, and a score is one number. Use mean",
    ),
    (
        {"evaluate.LPIPS": {"reduction": None}},
        "evaluate.LPIPS.reduction is null, which gives a number for each image, and a score is one number. Use mean",
    ),
    (
        {"evaluate.LPIPS": {"net_type": "vg"}},
        "evaluate.LPIPS.net_type is 'vg', and must be one of: alex, vgg, squeeze.",
    ),
    (
        {"tracker.log[0].log_type": "wandb", "tracker.log[0].wandb_project": "x"},
        "tracker.log[0].wandb_entity is required: log_type is 'wandb'.",
    ),
    (
        {"tracker.log[0].log_type": "consol"},
        "tracker.log[0].log_type is 'consol', and must be a logger. Did you mean 'console'? Options: console, "
        "tensorboard, trackio, wandb.",
    ),
    ({**WANDB, "tracker.log[0].resume": True}, "tracker.log[0].wandb_run_id is required: resume is true."),
    ({"tracker.load.load_from": "local"}, "tracker.load.file_path is required: load_from is 'local'."),
    (
        {"tracker.load.load_from": "huggingface", "tracker.load.file_path": "a.pth"},
        "tracker.load.huggingface_repo is required: load_from is 'huggingface'.",
    ),
    (
        {"tracker.log": [{"log_type": "console"}, {"log_type": "console"}]},
        "tracker.log names console 2 times. Name each logger once.",
    ),
    (
        {"tracker.save": {"save_to": "wandb", "save_latest_to": "a"}},
        "tracker.save[0].wandb_run_path is required: save_to is 'wandb', and tracker.log names no wandb.",
    ),
    (
        {"tracker.save": {"save_latest_to": "a/{next_task}.pth"}},
        "tracker.save[0].save_latest_to: {next_task} is not known in a path. Options: ",
    ),
    (
        {"tracker.save": {"save_best_to": "../best.pth"}},
        "tracker.save[0].save_best_to: '../best.pth' leads elsewhere: give a path without '..'",
    ),
    (
        {"tracker.save": {"save_meta_to": "/a/../b"}},
        "tracker.save[0].save_meta_to: 'a/../b' leads elsewhere: give a path without '..'",
    ),
    (
        {"tracker.save": {**TO_HUB_SAVE, "save_latest_to": "/a"}},
        "tracker.save[0].save_latest_to: '/a' leads elsewhere: give a path without '..' that is relative",
    ),
    (
        {"tracker.save": [{"save_to": "local"}]},
        "tracker.save[0] saves nothing. Give save_latest_to, save_best_to or save_meta_to, or remove it.",
    ),
    (
        {"tracker.save": [{"save_to": "local", "save_latest_to": False, "save_best_to": False}]},
        "tracker.save[0] saves nothing. Give save_latest_to, save_best_to or save_meta_to, or remove it.",
    ),
    (
        {"tracker.save": {"save_to": "huggingface", "save_best_to": "a"}},
        "tracker.save[0].huggingface_repo is required: save_to is 'huggingface'.",
    ),
    (
        {UNET + "init_dim": 32},
        "decoder.unets[0].init_dim is 32, and can only be dim, 16. Leave it out.",
    ),
    (
        {UNET + "dim_mults": [2, 4]},
        "decoder.unets[0]: dim_mults starts with 2, and must start with 1 unless memory_efficient is true: nothing "
        "stands "
        "between the first convolution and the first stage.",
    ),
    (
        {UNET + "resnet_groups": 3},
        "decoder.unets[0]: resnet_groups 3 does not divide the 16 channels of a stage. Change it, dim or dim_mults.",
    ),
    (
        {UNET + "self_attn": [True, True]},
        "decoder.unets[0]: self_attn has 2 entries, and dim_mults has 4 stages. Give one for each, or one for all.",
    ),
    (
        {UNET + "init_conv_kernel_size": 4, UNET + "init_cross_embed": False},
        "decoder.unets[0]: init_conv_kernel_size is [4], and must be odd: an even kernel shifts the image.",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_cannot_be_is_told_before_anything_is_built(changes, message):
    assert any(problem.startswith(message) for problem in problems(changes))


def test_a_list_that_is_too_short_is_one_wrong_value():
    said = ["decoder.blur_sigma is [0.4], and must be float > 0 or [float > 0, float > 0]."]
    assert problems({"decoder.blur_sigma": [0.4]}) == said


def test_problems_of_all_sections_are_told_at_once():
    changes = {
        "decoder.image_sizes": [32, 16],
        "decoder.blur_kernel_size": 4,
        "decoder.unets[1].resnet_groups": 3,
        "data.splits.val": 0.5,
        "train.lr": 1,
        "evaluate.KID": {"subset_size": 2000},
        "tracker.save": {},
    }
    assert [problem.partition(" ")[0].rstrip(":") for problem in problems(changes)] == [
        "decoder.unets[1]",
        "decoder.image_sizes",
        "decoder.blur_kernel_size",
        "data.splits",
        "train.lr",
        "evaluate.KID.subset_size",
        "tracker.save[0]",
    ]


@pytest.mark.parametrize("splits", [{"train": 0.7, "val": 0.2, "test": 0.1}, {"train": 0.6, "val": 0.3, "test": 0.1}])
def test_shares_that_sum_to_1_but_for_rounding_are_accepted(splits):
    assert sum(splits.values()) != 1.0  # in floating point, which the original compares
    assert validate(tree({"data.splits": splits})).data.source.splits.shares()


# --- values of other types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("data.batch_size", "4", 4),
        ("data.batch_size", 4.0, 4),
        ("decoder.image_cond_drop_prob", 1, 1.0),
        ("train.lr", "1e-4", 1e-4),
        ("train.use_ema", "false", False),
        ("train.use_ema", 0, False),
        (UNET + "self_attn", [0, 1, 1, 1], [False, True, True, True]),
        ("decoder.image_sizes", (16, 48), [16, 48]),
        ("decoder.sample_timesteps", ["64", None], [64, None]),
    ],
)
def test_values_are_read_as_generously_as_in_the_original(key, written, meant):
    assert tree({key: written}) == tree({key: meant})


# --- examples, and anything at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_native_tree_of_each_example_is_read_again_as_it_is(path):
    loaded = load(path)
    assert loaded.origins["task.name"] == "dalle2"
    assert load(json.loads(json.dumps(dump(loaded.run)))).run == loaded.run


def test_translating_loads_no_torch():
    code = (
        "import json, sys; from eclosion.config.dalle2 import translate\n"
        f"translate(json.load(open({str(EXAMPLES[0])!r})))\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_there_are_examples():
    assert [path.name for path in EXAMPLES] == ["dalle2_decoder.json", "dalle2_minimal.json"]


def test_overrides_are_in_native_words():
    loaded = load(BASE, ["train.batch_size=2", "task.unets[1].loss.kind=l1"])
    assert (loaded.run.train.batch_size, [unet.loss.kind for unet in loaded.run.task.unets]) == (2, ["l2", "l1"])
    origins = [loaded.origins[f"task.unets[{i}].loss.{key}"] for i, key in ((0, "kind"), (1, "kind"), (1, "p2_k"))]
    assert origins == ["dalle2", "override", "default"]


def test_a_config_in_both_words_is_told_so_in_one_line():
    with pytest.raises(ConfigError) as error:
        load({**BASE, "task": {"name": "unclip_decoder", "resize": "nearest"}})
    (problem,) = error.value.problems
    assert problem.startswith("task stands beside decoder: ")


def test_a_prior_is_said_to_be_not_there_yet():
    with pytest.raises(ConfigError) as error:
        load({"prior": {"image_embed_dim": 768}, "data": {}, "train": {}, "tracker": {}})
    assert error.value.problems == [
        "prior: of DALLE2-pytorch, configs of decoders are read, and those of priors not yet."
    ]


def test_a_secret_in_a_url_is_not_said():
    url = "https://me:secret@a/b.pth?token=secret"
    changes = {"tracker.load.load_from": "url", "tracker.load.url": url, "data.img_embeddings_url": url}
    assert not any("secret" in note for note in notes(changes))
    assert not any("secret" in problem for problem in problems({**changes, "tracker.load.only_auto_resume": "often"}))


VALUES = {key: value for key, (value, _) in (OBEYED | NAMED | DECISIVE).items()}
NUMBERS = (0, 1, -1, 3, 64, 10**30, 0.5, -0.5, 1e300, float("nan"))
LISTS = ([], [None], [1, 2], [[1]], [{}], [True, False, True], (1, 2), [{"size": 3}])
OTHERS = (None, True, False, "", "x", "4", "cosine", b"x", {}, {"a": 1}, {"size": [0]}, {1: 2})
JUNK = st.sampled_from((*NUMBERS, *LISTS, *OTHERS))


@settings(max_examples=150, deadline=None)
@given(
    right=st.lists(st.sampled_from(sorted(VALUES)), max_size=12),
    wrong=st.dictionaries(st.sampled_from(sorted({*VALUES, *GROUPS, "x", "train.x", UNET + "x"})), JUNK, max_size=3),
)
def test_any_set_of_keys_is_a_run_or_a_list_of_problems(right, wrong):
    """What the dialect lets pass, the native config does, too: a user is told of problems in the words of the file."""
    config = copy.deepcopy(BASE)
    for key, value in {**{key: VALUES[key] for key in right}, **wrong}.items():
        try:
            config = changed(config, {key: value})
        except (AttributeError, IndexError, KeyError, TypeError):
            continue  # below a value that is no section any more
    for lenient in (False, True):
        try:
            translation = DIALECT.translate(config, lenient=lenient)
        except ConfigError as error:
            found = error.problems
        else:
            found = ["none"]
            assert validate(translation.tree)
        assert found
        assert all(problem and "\n" not in problem for problem in found)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_told_what_the_constructors_of_torchmetrics_have_for_defaults():
    """{} is on with the defaults of the installed torchmetrics, which this asks."""
    image = pytest.importorskip("torchmetrics.image")
    ours = {"FID": "fid", "IS": "inception_score", "KID": "kid", "LPIPS": "lpips"}
    theirs = {
        "FID": image.fid.FrechetInceptionDistance,
        "IS": image.inception.InceptionScore,
        "KID": image.kid.KernelInceptionDistance,
        "LPIPS": image.lpip.LearnedPerceptualImagePatchSimilarity,
    }
    sections = {"FID": "Fid", "IS": "InceptionScore", "KID": "Kid", "LPIPS": "Lpips"}
    for name, constructor in theirs.items():
        section = getattr(dalle2_schema, sections[name])
        defaults = {field.name: field.default for field in dataclasses.fields(section)}
        wanted = {key: p.default for key, p in inspect.signature(constructor).parameters.items() if key != "kwargs"}
        assert {key: defaults.get(key, "missing") for key in wanted} == wanted
        made = tree({f"evaluate.{name}": {}})["evaluate"]
        assert [metric["name"] for metric in made["metrics"]] == [ours[name]]
    every = {f"evaluate.{name}": {} for name in theirs}
    fid, score, kid, lpips = tree(every)["evaluate"]["metrics"]
    inception = {"name": "inception", "features": 2048, "weights": None, "resize": "antialiased"}
    assert fid == {"name": "fid", "extractor": inception}
    assert score["extractor"] == {**inception, "features": "logits_unbiased"}
    assert (score["splits"], score["wants_logits"]) == (10, False)
    assert (kid["subsets"], kid["subset_size"], kid["degree"], kid["gamma"], kid["coef"]) == (100, 1000, 3, None, 1.0)
    assert lpips == {"name": "lpips", "net_type": "alex", "reduction": "mean"}


def test_nothing_is_evaluated_without_a_metric_and_with_one_it_is_at_the_end_of_each_epoch():
    assert tree()["evaluate"] == tree({"evaluate.FID": None})["evaluate"] == {}
    assert load(changed(BASE, {"evaluate.n_evaluation_samples": 50})).run.evaluate.every is None
    run = load(changed(BASE, {"evaluate.KID": {}, "evaluate.n_evaluation_samples": 2000, "seed": 3})).run
    assert (run.evaluate.every, run.evaluate.split, run.evaluate.num_samples) == ("1 epochs", "val", 2000)
    assert run.evaluate.every == run.validate.every
    assert (run.evaluate.seed, run.evaluate.final_split, run.evaluate.guidance_scale) == (3, None, None)
    assert run.evaluate.sampler == run.sample.sampler
    counted = load(changed(BASE, {"evaluate.KID": {}, "train.epoch_samples": 5000})).run
    assert counted.evaluate.every == counted.validate.every == "5000 samples"


def test_what_metrics_do_otherwise_than_in_the_original_is_told():
    found = notes({f"evaluate.{name}": {} for name in ("FID", "IS", "KID", "LPIPS")})
    assert any(
        note.startswith("evaluate.FID and evaluate.KID compare with all images of the val part") for note in found
    )
    assert "evaluate.IS is of the images that are made; in the original it was of the real ones." in found
    assert not [note for note in notes() if "evaluate" in note]
    alone = notes({"evaluate.IS": {"feature": 64}, "data.splits": {"train": 1, "val": 0, "test": 0}})
    assert any(note.startswith("evaluate.IS.feature 64 takes features for what a classifier says") for note in alone)


@pytest.mark.parametrize("metric", ["FID", "KID", "LPIPS"])
def test_without_a_val_part_metrics_look_at_the_train_part_and_that_is_told_once(metric):
    changes = {f"evaluate.{metric}": {}, "data.splits": {"train": 1, "val": 0, "test": 0}}
    assert tree(changes)["evaluate"]["split"] == "train"  # so that the run has nothing to say of it either
    assert len([note for note in notes(changes) if "train part" in note]) == 1
    assert not [note for note in notes(changes) if "val part" in note]


def test_where_weights_are_looked_for_is_told_with_the_names_of_their_files():
    inception = pytest.importorskip("eclosion.models.inception")
    lpips = pytest.importorskip("eclosion.models.lpips")
    path = {"feature_extractor_weights_path": "inception.pth"}
    (both,) = [note for note in notes({"evaluate.FID": {}, "evaluate.IS": {}}) if "hub cache" in note]
    assert inception.WEIGHTS.name in both
    assert "give the path of Inception's as evaluate.FID.feature_extractor_weights_path" in both
    for net_type, backbone in lpips.BACKBONES.items():
        changes = {"evaluate.FID": path, "evaluate.LPIPS": {"net_type": net_type}}
        (note,) = [note for note in notes(changes) if "hub cache" in note]
        assert note.startswith("evaluate.LPIPS is computed with weights from torch's hub cache")
        assert note.endswith(f"{backbone.weights.name}. Without a network put them there, or set the metric to null.")
    assert not [note for note in notes({"evaluate.KID": path}) if "hub cache" in note]


def test_clip_that_encodes_text_beside_given_image_embeddings_is_not_said_to_have_no_effect():
    said = [note for note in notes({"decoder.clip": {}, UNET + "cond_on_text_encodings": True}) if "clip" in note]
    assert len(said) == 1
    assert said[0].endswith("where they hold none, decoder.clip makes them of the captions (.txt).")
