"""Where and in which precision a run computes."""

import pytest
import torch

from eclosion.device import autocast, environment, memory_gb, pick_device, pick_precision
from eclosion.errors import ConfigError

CPU = torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train.device is 'cuda', and torch finds no such device here"):
        pick_device("cuda")


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", local_rank=1) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize(("hardware", "wanted"), [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_where_the_hardware_has_it(hardware, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_precision("auto", CPU) == wanted
    assert pick_precision("fp16", CPU) == "fp16"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_networks_compute_in_the_precision(precision, dtype):
    layer = torch.nn.Linear(2, 2)
    with autocast(CPU, precision):
        assert layer(torch.ones(1, 2)).dtype == dtype


def test_the_environment_names_what_decides_the_bits():
    found = environment(CPU)
    assert set(found) == {"device", "cuda", "cudnn", "num_threads", "python", "packages"}
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["num_threads"] == torch.get_num_threads()


def test_memory_is_what_the_process_holds():
    before = memory_gb(CPU)
    block = torch.ones(64 * 2**20)  # 256 MiB
    assert memory_gb(CPU) - before == pytest.approx(0.25, abs=0.05)
    del block
