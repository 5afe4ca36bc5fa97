"""The list of parts."""

import pytest

from eclosion import ConfigError, list_parts
from eclosion.errors import MissingExtraError
from eclosion.registry import TABLES, names


def test_every_part_of_every_table_is_listed_with_what_it_is():
    listed = {(part.table, part.name) for part in list_parts()}
    assert listed == {(table, name) for table in TABLES for name in names(table)}
    assert all(part.summary for part in list_parts())


def test_options_come_with_type_default_and_comment():
    ddim = next(part for part in list_parts("samplers") if part.name == "ddim")
    assert [(o.name, o.type, o.default) for o in ddim.options] == [
        ("num_inference_steps", "int >= 1", "50"),
        ("eta", "float >= 0 and <= 1", "0.0"),
        ("timestep_spacing", "one of: trailing, linspace, leading", "trailing"),
    ]
    assert ddim.options[1].text.startswith("Fresh noise per step: 0 is deterministic")


def test_no_type_shows_python_machinery():
    types = [option.type for part in list_parts() for option in part.options]
    assert not [t for t in types if any(word in t for word in ("Annotated", "FieldInfo", "Optional", "Literal"))]
    assert {"path", "text or none", "true or false", "mapping", "noise schedule"} <= set(types)


def test_a_part_whose_library_is_missing_says_how_to_install_it(monkeypatch):
    def missing(table, name):
        raise MissingExtraError("logger 'tensorboard'", "tensorboard")

    monkeypatch.setattr("eclosion.inspection.parts.resolve", missing)
    part = list_parts("loggers")[0]
    assert 'pip install "eclosion[tensorboard]"' in part.summary
    assert part.options == []


def test_an_unknown_table_is_told():
    with pytest.raises(ConfigError, match=r"'sampler' is no table of parts. Did you mean 'samplers'"):
        list_parts("sampler")
