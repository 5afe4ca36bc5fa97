"""Weights come from any form that holds them, and what is strange about a file is told in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eclosion.checkpoint.weights import differences, read_weights, said_beside
from eclosion.errors import CheckpointError

ONE = {"conv.weight": torch.arange(4.0), "conv.bias": torch.zeros(2)}
NAME = "diffusion_pytorch_model.safetensors"


def network(folder, tensors=ONE, **options):
    folder.mkdir(parents=True)
    save_file(tensors, folder / NAME)
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def test_a_pipeline_gives_its_networks_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    other = {"conv.weight": torch.ones(4)}
    network(tmp_path / "unet_0")
    network(tmp_path / "unet_1", other)
    found = read_weights(tmp_path, ["unet_0", "unet_1"])
    torch.testing.assert_close(found, {"unet_0": ONE, "unet_1": other}, rtol=0, atol=0)


def test_the_one_network_of_a_pipeline_may_have_another_name(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    network(tmp_path / "transformer")
    torch.testing.assert_close(read_weights(tmp_path, ["unet"]), {"unet": ONE}, rtol=0, atol=0)


def test_a_file_of_several_networks_names_them_first(tmp_path):
    save_file({f"unet_{i}.{name}": tensor + i for name, tensor in ONE.items() for i in (0, 1)}, tmp_path / "a")
    found = read_weights(tmp_path / "a", ["unet_0", "unet_1"])
    assert found["unet_1"]["conv.bias"].tolist() == [1, 1]


def test_networks_that_are_missing_or_too_many_are_named(tmp_path):
    save_file({f"unet_{i}.a": torch.zeros(1) for i in (0, 2)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="a holds weights of unet_0, unet_2, and this run's networks are unet_0"):
        read_weights(tmp_path / "a", ["unet_0", "unet_1"])


def sharded(folder, weight_map):
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "one.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / "two.safetensors")
    (folder / f"{NAME}.index.json").write_text(json.dumps(weight_map))
    return folder


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "is no index of weights"),
        ([], "is no index of weights"),
        ({"weight_map": 3}, "is no index of weights"),
        ({"weight_map": {"a": "../one.safetensors"}}, "which is no file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no file beside it"),
        ({"weight_map": {"a": 3}}, "which is no file beside it"),
        ({"weight_map": {"a": "one.bin"}}, "which is no file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors cannot be read|No such file"),
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "holds a, which another file of"),
    ],
)
def test_an_index_leads_to_files_beside_it_or_nowhere(index, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        read_weights(sharded(tmp_path / "net", index), ["net"])


@pytest.mark.parametrize("raw", [b"", b"hello", bytes(8), b"\xff" * 100, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_told_in_one_line(raw, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no safetensors file, or a damaged one") as error:
        read_weights(tmp_path / "a.safetensors", ["net"])
    assert "\n" not in str(error.value)


def test_every_difference_is_named_once():
    wanted = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(2)}
    found = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(2, dtype=torch.bfloat16), "e\n": torch.zeros(1)}
    assert differences(wanted, found) == [
        "b is [3], wanted [2]",
        "c is bfloat16, wanted float32",
        "d is missing",
        "e\\n is not known",
    ]
    assert differences(wanted, dict(wanted)) == []


@pytest.mark.parametrize("raw", [b"", b"[1]", b"[" * 100_000, b"\xff"])
def test_what_stands_beside_weights_may_be_anything(raw, tmp_path):
    network(tmp_path / "net", heads=4, _class_name="A")
    assert said_beside(tmp_path / "net", "net") == {"heads": 4}
    (tmp_path / "net" / "config.json").write_bytes(raw)
    assert said_beside(tmp_path / "net", "net") == {}
