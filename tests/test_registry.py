"""Every name in the registry stands for a part that works as one."""

import dataclasses
import inspect

import pytest
from pydantic import ValidationError

from eclosion import registry
from eclosion.config.load import load
from eclosion.errors import ConfigError, MissingExtraError
from eclosion.registry import TABLES, build, describe, dump, resolve

PARTS = [(table, name) for table, names in TABLES.items() if table != "dialects" for name in names]
# What a part cannot do without.
REQUIRED = {
    ("encoders", "transformers_vision"): {"model": "models/dinov2"},
    ("loaders", "huggingface"): {"repo": "ada/model"},
    ("loaders", "local"): {"path": "models/a"},
    ("loaders", "url"): {"url": "https://example.org/a.safetensors"},
    ("loaders", "wandb"): {"path": "latest"},
    ("savers", "fsspec"): {"url": "s3://bucket/models", "latest": "latest"},
    ("savers", "huggingface"): {"repo": "ada/model", "latest": "latest"},
    ("savers", "local"): {"latest": "latest"},
    ("savers", "wandb"): {"latest": "latest"},
    ("sources", "folder"): {"root": "images"},
    ("sources", "huggingface"): {"path": "images"},
    ("sources", "webdataset"): {"webdataset_base_url": "shards/{}.tar"},
    ("tasks", "unclip_decoder"): {"unets": [{"image_size": 16}, {"sampler": "ddim"}]},
}
each_part = pytest.mark.parametrize(("table", "name"), PARTS)


@each_part
def test_every_name_resolves_to_a_documented_part(table, name):
    cls = resolve(table, name)
    assert dataclasses.is_dataclass(cls)
    assert len(inspect.getdoc(cls) or "") > 30
    for option in describe(cls):
        assert len(option.text) > 10, f"{table} {name}: {option.name} has no comment above it"
        assert option.text[0].isupper(), option
        assert option.text.endswith("."), option
        assert option.type, option
        assert option.default, option


@each_part
def test_every_part_goes_round_trip(table, name):
    part = build(table, {"name": name, **REQUIRED.get((table, name), {})})
    plain = dump(part)
    assert plain["name"] == name
    assert build(table, plain) == part


@each_part
def test_every_part_refuses_an_unknown_option(table, name):
    with pytest.raises(ValidationError, match="nonsense"):
        build(table, {"name": name, **REQUIRED.get((table, name), {}), "nonsense": 1})


@each_part
def test_no_part_can_be_changed_after_it_was_checked(table, name):
    part = build(table, {"name": name, **REQUIRED.get((table, name), {})})
    for field in dataclasses.fields(part):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field.name, None)


@pytest.mark.parametrize("name", TABLES["dialects"])
def test_every_dialect_recognises_and_translates(name):
    dialect = resolve("dialects", name)
    assert callable(dialect.recognises)
    assert callable(dialect.translate)


def test_a_native_config_is_no_dialect():
    native = dump(load({"output": "runs/a", "data": {"source": "butterflies"}}).run)
    for name in TABLES["dialects"]:
        assert not resolve("dialects", name).recognises(native)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        resolve("samplers", "dppm")
    assert str(error.value) == (
        "'dppm' is not one of the samplers. Did you mean 'ddpm'? Options: ddim, ddpm, dpm_solver, euler, heun."
    )


def test_a_missing_library_is_told_with_its_remedy(monkeypatch):
    import builtins

    real = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name == "tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *args, **kwargs)

    import sys

    monkeypatch.delitem(sys.modules, "eclosion.tracking.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(MissingExtraError) as error:
        resolve("loggers", "tensorboard")
    assert str(error.value) == (
        "logger 'tensorboard' needs an optional library. Install it with: pip install \"eclosion[tensorboard]\""
    )


def test_a_part_from_another_package_is_found_by_its_entry_point(monkeypatch):
    monkeypatch.setattr(registry, "_outside", lambda: {"samplers.mine": "eclosion.diffusion.samplers:DDIM"})
    assert type(build("samplers", {"name": "mine", "eta": 0.5})).__name__ == "DDIM"


def test_an_outside_part_cannot_take_the_place_of_our_own(monkeypatch):
    monkeypatch.setattr(registry, "_outside", lambda: {"samplers.ddpm": "eclosion.diffusion.samplers:DDIM"})
    assert type(build("samplers", "ddpm")).__name__ == "DDPM"
