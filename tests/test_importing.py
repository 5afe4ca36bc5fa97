"""Checkpoints of DALLE2-pytorch become runs that give the same numbers and go on."""

import copy
import importlib.util
import io
import json
import lzma
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

import eclosion
from eclosion.checkpoint import disk, storage
from eclosion.config.load import validate
from eclosion.errors import CheckpointError, ConfigError
from eclosion.importing import Imported, import_checkpoint, original
from eclosion.models.unclip_import import original_parameters
from eclosion.rundir import RunDir
from eclosion.sampling import load_trained
from eclosion.tasks.task import DataFacts
from eclosion.training.distributed import World
from eclosion.training.state import Stage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # it takes its numbers from the script beside it
_spec = importlib.util.spec_from_file_location("make_import_golden", ROOT / "scripts/make_import_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
sys.path.remove(str(ROOT / "scripts"))

EXPECTED = load_file(golden.GOLDEN / golden.EXPECTED)
CPU = torch.device("cpu")
TOLERANCE = {"rtol": 0, "atol": 1e-5}
NETWORKS = ("unet_0", "unet_1")


@cache
def content(name: str = golden.CHECKPOINT) -> dict:
    """What a golden file holds, as torch alone reads it; nobody may change it."""
    raw = lzma.decompress((golden.GOLDEN / name).read_bytes())
    return torch.load(io.BytesIO(raw), weights_only=name == golden.CHECKPOINT)


def unpacked(folder: Path, name: str = golden.CHECKPOINT) -> Path:
    path = folder / name.removesuffix(".xz")
    path.write_bytes(lzma.decompress((golden.GOLDEN / name).read_bytes()))
    return path


HELD: dict[Path, dict] = {}  # what files hold that are not written, as reading is what an import takes longest for


@pytest.fixture(autouse=True)
def held_files(monkeypatch):
    real = original.read_torch_file
    monkeypatch.setattr(
        original, "read_torch_file", lambda path, *, inert: HELD[path] if path in HELD else real(path, inert=inert)
    )
    yield
    HELD.clear()


def copied(value: object) -> object:
    """The same mappings and lists anew, with the same tensors."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def changed(path: Path, change: Callable[[dict], object]) -> Path:
    """The golden file after a change to what it holds."""
    HELD[path] = copied(content())
    change(HELD[path])
    return path


def masked(path: Path, keep: int) -> Path:
    """The file of a training in which all networks but one were masked out: of those, counters are left."""

    def mask(held: dict) -> None:
        gone = [str(i) for i in range(2) if i != keep]
        for i in gone:
            held[f"optim{i}"] = held[f"sched{i}"] = None
        held["model"] = {k: v for k, v in held["model"].items() if not k.startswith(tuple(f"unets.{i}." for i in gone))}
        models = tuple(f"{i}.{kind}_model." for i in gone for kind in ("online", "ema"))
        held["ema"] = {k: v for k, v in held["ema"].items() if not k.startswith(models)}
        held["steps"] = torch.tensor([held["steps"][i] if i == keep else 0 for i in range(2)])
        held["config"]["train"]["unet_training_mask"] = [i == keep for i in range(2)]

    return changed(path, mask)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Imported:
    """The golden checkpoint, imported; nobody may change it."""
    folder = tmp_path_factory.mktemp("import")
    return import_checkpoint(unpacked(folder), folder / "run")


def loaded(folder: Path) -> storage.Loaded:
    (checkpoint,) = RunDir(folder).checkpoints.iterdir()
    return storage.read(checkpoint, verified=True)


def stage_of(folder: Path, name: str) -> Stage:
    """A network as the loop of a resumed run has it."""
    held = loaded(folder)
    run = validate(held.manifest.meta["config"])
    arrays = {key: tuple(shape) for key, shape in held.manifest.meta["facts"]["arrays"].items()}
    task = run.task.build(DataFacts(size=run.data.size, arrays=arrays))
    stage = Stage(name, task.nets[name], run, world=World(), device=CPU, fp16=False)
    stage.load(held.files)
    return stage


def output_of(net: torch.nn.Module, index: int) -> torch.Tensor:
    keep = torch.ones(3, dtype=torch.bool)  # told, so that what stands for none has a gradient, of zeros
    return net(**golden.inputs(index), **({"image_keep_mask": keep, "text_keep_mask": keep} if index == 0 else {}))


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_weights_and_averages_give_the_originals_outputs(index, made):
    stage = stage_of(made.folder, NETWORKS[index])
    with torch.no_grad():
        torch.testing.assert_close(output_of(stage.module, index), EXPECTED[f"{index}.online"], **TOLERANCE)
        torch.testing.assert_close(output_of(stage.emas[0].net, index), EXPECTED[f"{index}.average"], **TOLERANCE)
    assert (EXPECTED[f"{index}.online"] - EXPECTED[f"{index}.average"]).abs().max() > 1e-3  # the two differ at all


@pytest.mark.parametrize("index", [0, 1])
def test_one_step_further_the_weights_are_those_of_the_original(index, made):
    """Moments, their count, decay, clipping, learning rate: a step of 1e-3 is taken, and 1e-6 of it may differ."""
    stage = stage_of(made.folder, NETWORKS[index])
    before = {name: p.detach().clone() for name, p in stage.module.named_parameters()}
    stage.accumulate(output_of(stage.module, index).square().flatten(1).mean(dim=1), torch.ones(3))
    # The golden step does not go through the batch size of the run, which accumulate divides by: 3 as well.
    stage.update(made.step, num_steps=100)
    after = dict(stage.module.named_parameters())
    compared = 0
    for p in original_parameters(arguments()[index]):
        if p.ours is not None:
            theirs = EXPECTED[f"{index}.parameter.{p.name}"]
            torch.testing.assert_close(after[p.ours].detach().flatten()[: golden.KEPT], theirs, rtol=1e-6, atol=1e-6)
            compared += 1
    assert compared > 90
    assert max(float((after[name].detach() - old).abs().max()) for name, old in before.items()) > 1e-4
    with torch.no_grad():
        torch.testing.assert_close(output_of(stage.module, index), EXPECTED[f"{index}.after"], rtol=0, atol=1e-4)


def arguments() -> list[dict]:
    """Arguments of the original's constructors, by hand: the settings, and what its decoder makes of them."""
    first, second = golden.SETTINGS["decoder"]["unets"]
    return [
        {**first, "cond_on_image_embeds": True, "channels_out": 6},
        {**second, "lowres_cond": True, "lowres_noise_cond": True},
    ]


def test_moments_without_weight_decay_are_in_one_group_in_the_order_of_registration(made, tmp_path):
    """Adam instead of AdamW: the same moments under other numbers must become the same slots."""

    def regroup(held: dict) -> None:
        for i, unet in enumerate(arguments()):
            state, groups = held[f"optim{i}"]["state"], held[f"optim{i}"]["param_groups"]
            shapes = [p.shape for p in original_parameters(unet)]
            order = sorted(range(len(shapes)), key=lambda k: len(shapes[k]) < 2)  # registration numbers, group by group
            held[f"optim{i}"] = {
                "state": {order[key]: entry for key, entry in state.items()},
                "param_groups": [{**groups[0], "params": list(range(len(shapes)))}],
            }

    again = import_checkpoint(changed(tmp_path / "a.pth", regroup), tmp_path / "run")
    for name in NETWORKS:
        ours, wanted = (loaded(x.folder).files[f"{name}.optimizer"] for x in (again, made))
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_a_parameter_that_never_had_a_gradient_begins_anew(made):
    slots = loaded(made.folder).files["unet_0.optimizer"]
    theirs = content()["optim0"]
    fresh = [key for key in slots if key.endswith(".step") and slots[key] == 0]
    assert len(theirs["state"]) < sum(len(group["params"]) for group in theirs["param_groups"])
    assert len(fresh) == len(slots) // 3 - sum(1 for key in slots if key.endswith(".step") and slots[key] == 3)


def test_counters_come_along(made):
    state = loaded(made.folder).state
    assert (made.step, made.samples_seen) == (state["step"], state["samples_seen"]) == (3, 27)
    assert made.networks == {"unet_0": 3, "unet_1": 3}
    assert RunDir(made.folder).checkpoint(3).is_dir()


def test_the_config_is_that_of_the_original_and_compat_is_set(made):
    config = json.loads(RunDir(made.folder).config.read_text())
    assert config == loaded(made.folder).manifest.meta["config"]
    assert [unet["model"]["compat"] for unet in config["task"]["unets"]] == [True, True]
    assert (config["task"]["resize"], config["task"]["unets"][1]["lowres"]["resize"]) == ("nearest", "nearest")
    assert [unet["noise_schedule"]["name"] for unet in config["task"]["unets"]] == ["cosine", "linear"]
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert config["optimizer"]["weight_decay"] == 0.02
    assert config["ema"]["decays"] == [0.9]
    assert config["train"]["freeze"] == []
    assert config["output"] == str(made.folder)


def test_without_compat_the_networks_are_ours_and_that_is_said(tmp_path):
    made = import_checkpoint(changed(tmp_path / "a.pth", dict), tmp_path / "run", compat=False)
    task = load_trained(made.folder, device="cpu").run.task
    assert not task.unets[0].model.compat
    assert task.resize == "area"
    assert "other numbers" in made.notes[0]
    with torch.no_grad():
        ours = output_of(stage_of(made.folder, "unet_0").module, 0)
    assert (ours - EXPECTED["0.online"]).abs().max() > 1e-4


def test_without_compat_an_embedding_that_is_not_projected_is_refused(tmp_path):
    tree = settings()
    tree["decoder"]["unets"][0]["image_embed_dim"] = 4
    path = changed(tmp_path / "a.pth", lambda held: held.pop("config"))
    with pytest.raises(ConfigError, match=r"unet_0: the original has no image_embedding.to_tokens.* --no-compat"):
        import_checkpoint(path, tmp_path / "run", config=tree, compat=False)


# --- the kinds of files ----------------------------------------------------------------------------------------------


def test_a_model_file_gives_its_averages_and_a_fresh_optimizer(tmp_path):
    made = import_checkpoint(unpacked(tmp_path, golden.MODEL), tmp_path / "run")
    held = loaded(made.folder)
    assert made.step == 0
    for index, name in enumerate(NETWORKS):
        stage = stage_of(made.folder, name)
        with torch.no_grad():
            torch.testing.assert_close(output_of(stage.module, index), EXPECTED[f"{index}.average"], **TOLERANCE)
            torch.testing.assert_close(output_of(stage.emas[0].net, index), EXPECTED[f"{index}.average"], **TOLERANCE)
        assert all(not slot.any() for slot in held.files[f"{name}.optimizer"].values())
    assert held.manifest.meta["imported"][0]["version"] == content()["version"]
    assert any("model.pth: holds averages" in note for note in made.notes)


# A version as packaging pickled it before its release 26, and as the installed one does.
OLD_VERSION = (
    b"cpackaging.version\nVersion\nq\x00)\x81q\x01}q\x02(X\x08\x00\x00\x00_versionq\x03cpackaging.version\n_Version\n"
    b"q\x04(K\x00K\x01K\x0fK\x06\x87q\x05NNNNtq\x06\x81q\x07X\x04\x00\x00\x00_keyq\x08(K\x00K\x01K\x0fK\x06\x87q\t"
    b"cpackaging._structures\nInfinityType\nq\n)\x81q\x0bcpackaging._structures\nNegativeInfinityType\nq\x0c)\x81q\r"
    b"h\x0bh\rtq\x0eub"
)
VERSIONS = {"old": OLD_VERSION, "new": pickle.dumps(Version("1.15.6"), 2)[2:-1]}


@pytest.mark.parametrize("form", VERSIONS)
def test_versions_of_all_forms_are_read(form, tmp_path):
    """Releases of packaging pickle a version in different ways; none of their classes is needed."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}X\x07\0\0\0version" + VERSIONS[form] + b"s.")
        file.writestr("a/version", b"3\n")
        file.writestr("a/byteorder", b"little")
    found = original.read_torch_file(tmp_path / "a.pth", inert=original.INERT)["version"]
    assert not isinstance(found, Version)
    assert original._version(found) == "1.15.6"


def test_a_bare_state_dict_of_the_decoder_is_read_with_a_config(made, tmp_path):
    """What those saved who wrote their own loop; with the encoder that older versions left inside."""
    weights = {**content()["model"], "clip.clip.logit_scale": torch.tensor(1.0)}
    HELD[tmp_path / "a.pth"] = weights
    with pytest.raises(ConfigError, match="holds no config"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run")
    bare = import_checkpoint(tmp_path / "a.pth", tmp_path / "run", config=golden.GOLDEN / golden.CONFIG)
    ours, wanted = (loaded(x.folder).files["unet_1"] for x in (bare, made))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert any("no average in the file" in note for note in bare.notes)


def test_counters_of_older_averages_and_of_gpus_are_read(made, tmp_path):
    """Older files have tensors of one number for what are scalars now, and counts where tensors are."""

    def older(held: dict) -> None:
        for i in range(2):
            held["ema"][f"{i}.initted"] = torch.tensor([1.0])
            held["ema"][f"{i}.step"] = torch.tensor([3])
            for entry in held[f"optim{i}"]["state"].values():
                entry["step"] = int(entry["step"])

    again = import_checkpoint(changed(tmp_path / "a.pth", older), tmp_path / "run")
    assert again.step == 3
    for entry, tensors in loaded(made.folder).files.items():
        ours = loaded(again.folder).files[entry]
        assert all(torch.equal(ours[key], tensors[key]) for key in tensors)


def test_an_average_that_had_not_begun_is_left_out(tmp_path):
    path = changed(tmp_path / "a.pth", lambda held: held["ema"].update({"1.initted": torch.tensor(False)}))
    made = import_checkpoint(path, tmp_path / "run")
    files = loaded(made.folder).files
    assert all(torch.equal(files["unet_1"][key], files["unet_1.ema"][key]) for key in files["unet_1"])
    assert any("unet_1: no average" in note for note in made.notes)


# --- several files ---------------------------------------------------------------------------------------------------


def test_a_cascade_that_was_trained_in_parts_is_put_together(made, tmp_path):
    parts = [masked(tmp_path / f"{i}.pth", keep=i) for i in (1, 0)]
    together = import_checkpoint(parts, tmp_path / "run")
    ours, wanted = loaded(together.folder), loaded(made.folder)
    assert ours.files.keys() == wanted.files.keys()
    for entry, tensors in wanted.files.items():
        assert all(torch.equal(ours.files[entry][key], tensors[key]) for key in tensors)
    assert ours.state == wanted.state
    assert ours.manifest.meta["config"]["train"]["freeze"] == []


def test_a_network_that_no_file_holds_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"^unet_0 of 2 is in none of the files \(.*1.pth\)") as caught:
        import_checkpoint(masked(tmp_path / "1.pth", keep=1), tmp_path / "run")
    assert "unet_1" not in str(caught.value)


def test_a_network_that_two_files_hold_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"^unet_1 is in .*whole.pth and .*1.pth\.") as caught:
        import_checkpoint([changed(tmp_path / "whole.pth", dict), masked(tmp_path / "1.pth", keep=1)], tmp_path / "run")
    assert "unet_0" not in str(caught.value)


def test_different_counts_of_steps_are_said(tmp_path):
    def later(held: dict) -> None:
        held["steps"] = torch.tensor([3, 70])

    made = import_checkpoint(changed(tmp_path / "a.pth", later), tmp_path / "run")
    assert made.step == 70
    assert any("unet_0 has 3" in note for note in made.notes)


def test_parts_of_different_cascades_are_refused(tmp_path):
    def other(held: dict) -> None:
        held["config"]["decoder"]["unets"][1]["attn_heads"] = 2

    first, second = masked(tmp_path / "0.pth", keep=0), masked(tmp_path / "1.pth", keep=1)
    other(HELD[second])
    with pytest.raises(
        ConfigError, match=r"1.pth: unet_1 was trained with num_attention_heads 2, and the config says 1"
    ):
        import_checkpoint([first, second], tmp_path / "run")


# --- the config ------------------------------------------------------------------------------------------------------


def settings(**decoder: object) -> dict:
    tree = copy.deepcopy(golden.SETTINGS)
    tree["decoder"] |= decoder
    return tree


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        ({"timesteps": 50}, "100 noise levels, and decoder.timesteps of the config is 50"),
        ({"beta_schedule": ["cosine", "cosine"]}, "unet_1 was trained with other noise levels than those of 'cosine'"),
        ({"use_noise_for_lowres_cond": False}, "unet_1 was trained with lowres_noise_cond True"),
        ({"learned_variance": False}, "unet_0 was trained with out_channels 6"),
        ({"unets": golden.SETTINGS["decoder"]["unets"][:1], "image_sizes": [8]}, "cascade of 2 networks"),
    ],
)
def test_a_config_of_another_cascade_is_refused(decoder, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        import_checkpoint(changed(tmp_path / "a.pth", dict), tmp_path / "run", config=settings(**decoder))
    assert not (tmp_path / "run").exists()


def test_a_wrong_config_is_found_by_the_weights_alone(tmp_path):
    """A file that does not say its config: what is missing, has no place or has another shape is named and counted."""
    HELD[tmp_path / "a.pth"] = content()["model"]
    wider = settings()
    wider["decoder"]["unets"][1] |= {"cond_dim": 6, "sparse_attn": True}
    with pytest.raises(
        CheckpointError, match=r"a.pth: unet_1: .*\d+ missing \(downs.0.3.*of another shape \("
    ) as caught:
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run", config=wider)
    assert "instead of" in str(caught.value)


def test_a_file_of_settings_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "prior.json").write_text('{"prior": {}}')
    with pytest.raises(ConfigError, match=r"prior.json: has no decoder.unets"):
        import_checkpoint(changed(tmp_path / "a.pth", dict), tmp_path / "run", config=tmp_path / "prior.json")


def test_a_config_may_name_the_checkpoint_that_it_went_on_from(tmp_path):
    """Loading is what the import does in its place; and defaults are those of the original's code."""
    tree = settings()
    tree["tracker"]["load"] = {"load_from": "local", "file_path": "checkpoint.pth"}
    del tree["train"]["ema_beta"]
    made = import_checkpoint(changed(tmp_path / "a.pth", dict), tmp_path / "run", config=tree)
    assert json.loads(RunDir(made.folder).config.read_text())["ema"]["decays"] == [0.999]


def test_overrides_are_obeyed(tmp_path):
    made = import_checkpoint(
        changed(tmp_path / "a.pth", dict), tmp_path / "run", overrides=["train.batch_size=7", "ema.decays=[0.5,0.9]"]
    )
    assert load_trained(made.folder, device="cpu").run.train.batch_size == 7
    held = loaded(made.folder).files
    assert {"unet_0.ema", "unet_0.ema-0.9"} <= held.keys()
    stage_of(made.folder, "unet_1")


def test_an_optimizer_that_was_set_otherwise_than_the_config_says_is_told(tmp_path):
    def faster(held: dict) -> None:
        for group in held["optim1"]["param_groups"]:
            group["lr"] = group["initial_lr"] = 5e-3

    made = import_checkpoint(changed(tmp_path / "a.pth", faster), tmp_path / "run")
    assert [note for note in made.notes if "learning_rate" in note and "0.005" in note and note.startswith("unet_1")]


def test_a_checkpoint_whose_clip_was_taken_out_of_the_config_is_imported_to_sample_from(tmp_path):
    def without(held: dict) -> None:
        held["config"]["data"]["img_embeddings_url"] = None

    made = import_checkpoint(changed(tmp_path / "a.pth", without), tmp_path / "run")
    assert any("where image embeddings come from" in note for note in made.notes)
    trained = load_trained(made.folder, device="cpu")
    assert trained.run.data.source.img_embeddings_url is None


# --- what is wrong with a file ---------------------------------------------------------------------------------------


def drop(prefix: str, key: str) -> Callable[[dict], object]:
    return lambda held: held[prefix].pop(key)


def put(key: str, value: object) -> Callable[[dict], object]:
    return lambda held: held.update({key: value})


def state_of(held: dict, key: int = 0) -> dict:
    return held["optim0"]["state"][key]


BROKEN = {
    "weight missing": (drop("model", "unets.0.to_out.weight"), r"unet_0: .*1 missing \(to_out.weight\)"),
    "weight too much": (
        lambda held: held["model"].update({"unets.1.more.weight": torch.ones(1)}),
        r"unet_1: .*1 without a place \(more.weight\)",
    ),
    "weight of another shape": (
        lambda held: held["model"].update({"unets.0.to_out.bias": torch.ones(5)}),
        r"unet_0: .*to_out.bias is \[5\] instead of \[6\]",
    ),
    "average missing": (drop("ema", "1.ema_model.to_out.bias"), "unet_1, its average: .*1 missing"),
    "weight not finite": (
        lambda held: held["model"].update({"unets.1.to_out.bias": torch.full((3,), torch.nan)}),
        r"unet_1: 1 tensors of its weights are not finite \(the first is conv_out.bias\)",
    ),
    "moment not finite": (
        lambda held: state_of(held).update(exp_avg=torch.full((1, 2, 4), torch.inf)),
        "unet_0: 1 tensors of its optimizer are not finite",
    ),
    "count below zero": (lambda held: state_of(held).update(step=torch.tensor(-1.0)), "has no step"),
    "moment missing": (
        lambda held: state_of(held).pop("exp_avg_sq"),
        r"optim0.state.0 \(null_image_embed\) has no exp_avg_sq",
    ),
    "moment of another shape": (
        lambda held: state_of(held).update(exp_avg=torch.ones(2)),
        r"optim0.state.0 \(null_image_embed\): exp_avg is \[2\], and must be \[1, 2, 4\]",
    ),
    "moment of another kind": (lambda held: state_of(held).update(exp_avg="x"), "has no exp_avg"),
    "count of a moment": (lambda held: state_of(held).update(step="x"), "has no step"),
    "group too short": (
        lambda held: held["optim0"]["param_groups"][1]["params"].pop(),
        r"optim0: has groups of \[\d+, \d+\] parameters",
    ),
    "groups gone": (lambda held: held["optim1"].pop("param_groups"), "optim1.param_groups is not what"),
    "state gone": (lambda held: held["optim1"].pop("state"), "optim1.state is a NoneType"),
    "optimizer of another kind": (put("optim0", [1]), "optim0 is a list, and must be the state dict"),
    "steps": (put("steps", "many"), "steps is 'many'"),
    "samples_seen": (put("samples_seen", float("nan")), "samples_seen is nan"),
    "negative": (put("samples_seen", -5), "samples_seen is -5"),
    "config": (put("config", "x"), "config is 'x', and must be a mapping"),
    "config with a tensor": (
        lambda held: held["config"]["decoder"].update(timesteps=torch.ones(2)),
        "config holds more than settings",
    ),
    "config without unets": (put("config", {"decoder": {}}), "has no decoder.unets"),
    "model": (put("model", 3), "model is 3, and must be a mapping"),
    "model gone": (lambda held: held.pop("model"), "model is missing"),
    "no tensor": (lambda held: held["model"].update({"unets.0.to_out.bias": 3}), "unets.0.to_out.bias is 3"),
    "network number": (lambda held: held["model"].update({"unets.99.to_out.bias": torch.ones(1)}), "names no network"),
    "autoencoder": (lambda held: held["model"].update({"vaes.0.x": torch.ones(1)}), "holds an autoencoder"),
    "other keys": (lambda held: held["model"].update({"what": torch.ones(1)}), "model holds what"),
    "prior": (put("model", {"net.to_out.weight": torch.ones(1)}), "holds no weights of a U-Net"),
    "initted": (lambda held: held["ema"].update({"0.initted": "yes"}), "ema.0.initted is 'yes'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_told_in_one_line(name, tmp_path):
    change, said = BROKEN[name]
    path = changed(tmp_path / "a.pth", change)
    with pytest.raises((CheckpointError, ConfigError), match=said) as caught:
        import_checkpoint(path, tmp_path / "run")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    path = changed(tmp_path / "a.pth", dict)
    import_checkpoint(path, tmp_path / "run")  # empty is new
    with pytest.raises(ConfigError, match="is not empty"):
        import_checkpoint(path, tmp_path / "run")
    with pytest.raises(ConfigError, match="no checkpoint is given"):
        import_checkpoint([], tmp_path / "other")


@pytest.mark.parametrize("failing", ["fsync_folder", "write_file"])
def test_a_disk_that_fails_at_any_write_leaves_no_folder(failing, tmp_path, monkeypatch):
    """Each write in turn; the folder is there when all succeed, and no trace of it before."""
    path, real = changed(tmp_path / "a.pth", dict), getattr(disk, failing)
    for allowed in range(30):
        budget = iter(range(allowed))

        def fail(*args: object, budget: Iterator[int] = budget) -> object:
            if next(budget, None) is None:
                raise OSError(5, "Input/output error")
            return real(*args)

        monkeypatch.setattr(disk, failing, fail)
        try:
            import_checkpoint(path, tmp_path / "run")
        except CheckpointError:
            whole = (tmp_path / "run").exists()
        else:
            whole = True
        assert [entry.name for entry in tmp_path.iterdir()] == ["run"] * whole
        if whole:
            storage.verify(RunDir(tmp_path / "run").checkpoint(3))
            return
    pytest.fail("never got through")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_tells_notes_and_the_folder(command, tmp_path):
    parts = [masked(tmp_path / f"{i}.pth", keep=i) for i in (0, 1)]
    told = command("import", *parts, tmp_path / "run", "--set", "train.batch_size=5", "--no-compat")
    assert (told.code, told.out) == (0, f"2 networks at step 3: {tmp_path / 'run'}\n")
    assert told.err.startswith("note: the networks give other numbers than the original")
    assert load_trained(tmp_path / "run", device="cpu").run.train.batch_size == 5


def test_the_command_ends_with_the_code_of_what_was_wrong(command, tmp_path):
    (tmp_path / "a.pth").write_text("hello")
    assert command("import", tmp_path / "a.pth", tmp_path / "run").code == CheckpointError.exit_code
    nothing = command("import", tmp_path / "run")
    assert (nothing.code, nothing.out) == (ConfigError.exit_code, "")
    assert nothing.err.startswith("error: no checkpoint is given.")


# --- what a run does with it -----------------------------------------------------------------------------------------


def test_an_imported_run_samples_trains_on_and_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLOSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    from eclosion.data.butterflies import ButterfliesSource

    numbers = np.random.default_rng(0)
    arrays = {"image": numbers.normal(size=(8, 6)), "text": numbers.normal(size=(8, 2, 5))}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array.astype("float32"))
    eclosion.shard(
        ButterfliesSource(size=8, resolution=16),
        tmp_path / "data",
        samples_per_shard=4,
        image_embeddings=tmp_path / "image.npy",
        text_embeddings=tmp_path / "text.npy",
    )
    overrides = {
        "data.source.webdataset_base_url": tmp_path / "data/{}.tar",
        "data.source.shard_width": 5,
        "data.source.img_embeddings_url": tmp_path / "data/img_emb",
        "data.source.text_embeddings_url": tmp_path / "data/text_emb",
        "train.duration": "8 steps",
        "sample.num_images": 0,
    }
    run = import_checkpoint(
        unpacked(tmp_path), tmp_path / "run", overrides=[f"{key}={value}" for key, value in overrides.items()]
    )
    eclosion.train(RunDir(run.folder).config)
    assert list(Path().iterdir()) == []  # where its config saved to is not where it is now
    state = loaded_newest(run.folder)
    assert state["step"] == 8
    assert state["samples_seen"] == 24 + 5 * 3  # 27 images were seen, of which 24 make whole epochs
    ledger = [json.loads(line) for line in RunDir(run.folder).ledger.read_text().splitlines()]
    assert [(line["epoch"], line["delivered"], line["skipped"]) for line in ledger] == [(3, 8, {})]
    exported = eclosion.export(run.folder, tmp_path / "pipeline")
    assert (exported / "model_index.json").is_file()


def loaded_newest(folder: Path) -> dict:
    newest = max(RunDir(folder).checkpoints.iterdir())
    return storage.read(newest, verified=True).state


# --- against the original itself, where it is installed --------------------------------------------------------------

installed = pytest.mark.skipif(
    importlib.util.find_spec("dalle2_pytorch") is None, reason="needs dalle2-pytorch==1.15.6"
)


@installed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["checkpoint", "model", "parts"])
def test_files_that_the_original_writes_now_give_its_numbers(kind, tmp_path):
    paths, unets = [], {}
    for index, mask in enumerate([(True, False), (False, True)] if kind == "parts" else [(True, True)]):
        config, trainer = golden.trained(mask)
        paths.append(tmp_path / f"{index}.pth")
        (golden.save_model if kind == "model" else golden.save)(trainer, config, paths[-1])
        trainer.eval()
        sources = [ema.ema_model for ema in trainer.ema_unets] if kind == "model" else trainer.decoder.unets
        unets |= {i: unet for i, unet in enumerate(sources) if mask[i]}
    made = import_checkpoint(paths, tmp_path / "run")
    for index, unet in sorted(unets.items()):
        with torch.no_grad():
            ours = output_of(stage_of(made.folder, NETWORKS[index]).module, index)
            torch.testing.assert_close(ours, golden.output_of(unet, index), **TOLERANCE)
