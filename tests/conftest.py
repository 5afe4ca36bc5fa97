"""Shared set-up of the tests: one thread per worker, so that results do not depend on how many run beside."""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "true"

import pytest

Config = dict[str, Any]


def tiny_config(output: Path, **sections: Config) -> Config:
    """A run of two dozen steps that uses everything random: crops, flips, dropout, accumulation, several averages."""
    config: Config = {
        "output": str(output),
        "data": {
            "source": {"name": "butterflies", "size": 40, "resolution": 20},
            "image_size": 16,
            "resize": "none",
            "crop": "random",
            "horizontal_flip": True,
        },
        "task": {
            "model": {
                "preset": None,
                "options": {
                    "block_out_channels": [16, 16],
                    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                    "attention_head_dim": 4,
                    "dropout": 0.1,
                },
            }
        },
        "train": {"duration": "12 steps", "batch_size": 8, "micro_batch_size": 4, "mixed_precision": "no"},
        "optimizer": {"lr_schedule": "cosine", "lr_warmup_steps": 3, "learning_rate": 1e-3},
        "ema": {"decays": [0.5, 0.3]},
        "sample": {"every": "6 steps", "num_images": 2, "sampler": {"name": "ddim", "num_inference_steps": 2}},
        "checkpoint": {"every": "3 steps"},
        "track": {"every": "2 steps"},
    }
    for name, options in sections.items():
        config[name] = {**config[name], **options} if isinstance(options, dict) else options
    return config


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    return tiny_config


def results_of(run: Path) -> dict[str, Any]:
    """Everything that two equal runs share: hashes of the last checkpoint, logged numbers, ledger, pictures."""
    last = max((run / "checkpoints").glob("step-*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ledger = run / "ledger.jsonl"
    return {
        "checkpoint": last.name,
        "hashes": {path.name: _sha256(path) for path in sorted(last.glob("*.safetensors"))},
        "numbers": [{k: v for k, v in line.items() if not k.startswith(("perf/", "sys/"))} for line in lines],
        "ledger": ledger.read_text() if ledger.exists() else "",
        "pictures": {path.name: _sha256(path) for path in sorted((run / "samples").glob("step-*.png"))},
    }


@pytest.fixture
def results() -> Callable[[Path], dict[str, Any]]:
    return results_of


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that nothing disturbed."""
    from eclosion import train

    return train(tiny_config(tmp_path_factory.mktemp("runs") / "whole"))


@dataclass(frozen=True)
class Outcome:
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`command("train", "config.yaml")` runs `eclosion train config.yaml` in this process."""
    from eclosion.cli import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["eclosion", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP as transformers saves it: random weights, a vocabulary of letters, captions of 12 tokens.

    Letters are told apart at the end of a word; "cat" is one token, and number 0 is a "!" inside a word.
    """
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz.,?"
    merges = [("c", "a"), ("ca", "t</w>")]
    tokens = ["!", *letters, *(f"{letter}</w>" for letter in f"!{letters}"), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    common = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = common | {"hidden_size": 16, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = common | {"hidden_size": 32, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = library.CLIPModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # not so small that all captions are alike
    library.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    library.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    library.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hub_server() -> Any:
    """The module `hub_server.py`: a Hugging Face hub on this machine."""
    return _beside("hub_server")


@pytest.fixture
def hub(hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hugging Face hub on this machine, which the real client is pointed to, and a token for it."""
    constants = pytest.importorskip("huggingface_hub").constants
    utils = pytest.importorskip("huggingface_hub.utils")
    home = tmp_path / "hf_home"
    with hub_server.serving() as server:
        # The client has read its environment when it was imported; another process reads it anew.
        values = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": server.url}
        values |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
        values |= {"HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(importlib.import_module("huggingface_hub.hf_api").api, "endpoint", server.url)
        variables = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": server.url, "HF_HOME": str(home)}
        for name, text in {**variables, "HF_TOKEN": hub_server.TOKEN, "NO_PROXY": "127.0.0.1,localhost"}.items():
            monkeypatch.setenv(name, text)
        utils.close_session()
        yield server
        utils.close_session()


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services have long at the end of a run, as other processes may be at work."""
    beside = pytest.importorskip("eclosion.tracking.beside")
    monkeypatch.setattr(beside, "CLOSE_SECONDS", 110.0)
    monkeypatch.setattr(sys.modules["eclosion.tracking.following"], "CLOSE_SECONDS", 120.0)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "100")


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Files of runs at a wandb on this machine (`wandb_server.py`), which the real client is pointed to."""
    module = _beside("wandb_server")
    with module.serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", server.key)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server


def _beside(name: str) -> Any:
    """A file beside this one, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its dataclasses look
    spec.loader.exec_module(module)
    return module
