"""The JSON Schema for editors agrees with what `load` accepts: another library judges."""

import jsonschema
import pytest

from eclosion.config.json_schema import json_schema
from eclosion.config.load import load
from eclosion.config.yaml_text import parse_yaml
from eclosion.errors import ConfigError
from eclosion.inspection.recipes import recipes
from eclosion.registry import TABLES, dump, names

GOOD = {"output": "run", "data": {"source": "butterflies"}}


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("recipe", recipes())
def test_it_takes_every_recipe_and_every_full_config(recipe, validator):
    tree = parse_yaml(recipes()[recipe])
    validator.validate(tree)
    validator.validate(dump(load(tree).run))


@pytest.mark.parametrize(
    "changes",
    [
        {"trian": {}},
        {"train": {"batchsize": 3}},
        {"train": {"batch_size": 0}},
        {"train": {"batch_size": "many"}},
        {"train": {"duration": "5 minutes"}},
        {"train": {"mixed_precision": "fp8"}},
        {"data": {}},
        {"data": {"source": "buterflies"}},
        {"data": {"source": {"size": 3}}},
        {"data": {"source": {"name": "butterflies", "root": "x"}}},
        {"sample": {"sampler": {"name": "ddim", "eta": 2}}},
        {"sample": {"sampler": {"eta": 0.5}}},
        {"task": {"model": {"preset": "huge"}}},
        {"task": {"loss": {"kind": "l3"}}},
        {"track": {"log": ["consol"]}},
        {"ema": {"decays": [1.5]}},
    ],
)
def test_it_refuses_what_load_refuses(changes, validator):
    tree = GOOD | changes
    with pytest.raises(ConfigError):
        load(tree)
    assert not validator.is_valid(tree)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"duration": 10}},
        {"train": {"duration": "10 epochs"}},
        {"data": {"source": "butterflies", "image_size": [16, 32]}},
        {"sample": {"sampler": "ddim"}},
        {"sample": {"sampler": {"name": "ddpm", "num_inference_steps": None}}},
        {"sample": {"sampler": {"num_inference_steps": 5}}},
        {"task": {"prediction_type": "epsilon"}},
        {"task": {"name": "unconditional", "noise_schedule": {"name": "linear", "beta_end": 0.01}}},
        {"track": {"log": ["console", {"name": "tensorboard"}]}},
    ],
)
def test_it_takes_what_load_takes(changes, validator):
    load(GOOD | changes)
    validator.validate(GOOD | changes)


def test_every_part_and_every_option_is_in_it_with_its_comment(validator):
    definitions = validator.schema["$defs"]
    for table in TABLES:
        if table != "dialects":
            assert {f"{table}.{name}" for name in names(table)} <= set(definitions)
    options = [
        option
        for key, schema in definitions.items()
        for name, option in schema.get("properties", {}).items()
        if name != "name"
    ]
    assert all(option["description"] for option in options)
