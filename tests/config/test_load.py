"""From a file, a mapping or an object to a checked config."""

import json
import re

import pytest

from eclosion.config.load import attributes, leaves, load, read_file
from eclosion.config.schema import RunConfig, steps_in
from eclosion.errors import ConfigError
from eclosion.registry import dump

TREE = {"output": "run", "data": {"source": {"name": "butterflies", "size": 8}, "image_size": 32}}
YAML = "output: run\ndata:\n  source: {name: butterflies, size: 8}\n  image_size: 32\n"
TOML = 'output = "run"\n[data]\nimage_size = 32\n[data.source]\nname = "butterflies"\nsize = 8\n'


def test_yaml_json_and_toml_give_the_same_config(tmp_path):
    texts = {"c.yaml": YAML, "c.yml": YAML, "c.json": json.dumps(TREE), "c.toml": TOML}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert all(load(tmp_path / name).run == load(TREE).run for name in texts)


def test_a_config_that_is_dumped_and_loaded_again_is_the_same():
    run = load(TREE, ["sample.sampler=ddim", "sample.sampler.eta=0.5", "task.noise_schedule=linear"]).run
    again = load(json.loads(json.dumps(dump(run)))).run
    assert again == run
    assert load(run).run == run


def test_a_heading_with_nothing_below_it_keeps_its_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text(YAML + "train:\noptimizer:\n  # learning_rate: 1e-4\n")
    assert load(tmp_path / "c.yaml").run == load(TREE).run


def test_the_schema_that_an_editor_wants_named_in_a_json_file_is_no_setting(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"$schema": "schema.json", **TREE}))
    assert load(tmp_path / "c.json").run == load(TREE).run


def test_every_value_knows_where_it_came_from():
    tree = {**TREE, "sample": {"sampler": "ddim"}, "train": {"batch_size": 4}}
    overrides = ["train.duration=7", "sample.sampler.eta=1", "task.noise_schedule=linear"]
    origins = load(tree, overrides).origins
    assert origins == dict.fromkeys(dict(leaves(dump(load(tree, overrides).run))), "default") | {
        "output": "config",
        "data.source.name": "config",
        "data.source.size": "config",
        "data.image_size": "config",
        "sample.sampler.name": "config",
        "sample.sampler.eta": "override",
        "train.batch_size": "config",
        "train.duration": "override",
        "task.noise_schedule.name": "override",
    }


def test_each_value_in_a_list_of_mappings_has_a_path_and_knows_where_it_came_from():
    preprocessing = {"CenterCrop": {"size": 32}, "ToTensor": True}
    loaded = load({**TREE, "data": {**TREE["data"], "preprocessing": preprocessing}}, ["track.log=[console]"])
    found = dict(leaves(dump(loaded.run)))
    assert found["data.preprocessing[0].CenterCrop.size"] == 32
    assert found["data.preprocessing[1].ToTensor"] == {}
    assert found["track.log[0].name"] == "console"
    assert loaded.origins["data.preprocessing[0].CenterCrop.size"] == "config"
    assert loaded.origins["track.log[0].name"] == "override"


def test_an_objects_settings_are_its_attributes_annotated_or_not_and_no_methods():
    class Above:
        seed = 1
        image_size = 64

    class Config(Above):
        image_size: int = 32
        _hidden = 3

        def method(self):
            raise AssertionError

        @classmethod
        def make(cls):
            raise AssertionError

        @property
        def computed(self):
            raise AssertionError

    config = Config()
    config.added = "later"
    assert attributes(config) == {"seed": 1, "image_size": 32, "added": "later"}


def test_durations_count_steps_samples_or_epochs():
    assert steps_in("10 steps", batch_size=4, epoch_samples=100) == 10
    assert steps_in("10 samples", batch_size=4, epoch_samples=100) == 3  # the last batch is made whole
    assert steps_in("3 epochs", batch_size=8, epoch_samples=20) == 8
    assert load(TREE, ["train.duration=1_000 steps"]).run.train.duration == "1000 steps"
    assert load(TREE, ["train.duration=25"]).run.train.duration == "25 steps"


def test_what_is_to_happen_every_so_often_may_name_several_durations_and_the_shortest_counts():
    every = load(TREE, ["checkpoint.every=1_000 samples or 2 epochs"]).run.checkpoint.every
    assert every == "1000 samples or 2 epochs"
    assert steps_in(every, batch_size=10, epoch_samples=40) == 8
    assert steps_in(every, batch_size=10, epoch_samples=4000) == 100


@pytest.mark.parametrize("override", ["train.duration=10 steps or 1 epoch", "checkpoint.every=10 steps or"])
def test_a_length_is_one_duration_and_each_of_several_must_be_one(override):
    with pytest.raises(ConfigError, match="must be like '1000 steps'"):
        load(TREE, [override])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.ini", b"", "'.ini' is no kind of config. Use .yaml, .json or .toml."),
        ("c", b"", "'no suffix' is no kind of config. Use .yaml, .json or .toml."),
        ("c.yaml", b"- 1\n", "holds list, and must hold a mapping of settings."),
        ("c.yaml", b"", "holds NoneType, and must hold a mapping of settings."),
        ("c.yaml", b"a: [1\nb: 2\n", "line 2, column 2: expected ',' or ']', but got ':'."),
        ("c.yaml", b"a: 1\na: 2\n", "line 2, column 1: the key 'a' stands here twice."),
        ("c.yaml", b"a: &x [1]\nb: *x\n", "line 2, column 4: aliases such as *x are not read."),
        (
            "c.yaml",
            b"a: !!python/object/apply:os.getcwd []\n",
            "line 1, column 4: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.getcwd'.",
        ),
        ("c.yaml", b"a: \xff\n", "'utf-8' codec can't decode byte 0xff in position 3: invalid start byte"),
        ("c.json", b'{"a": }', "Expecting value: line 1 column 7 (char 6)"),
        ("c.toml", b"a = \n", "Invalid value (at line 1, column 5)"),
        (
            "c.json",
            b"[" * 100_000,
            "is nested deeper than any config is.",
        ),
        ("c.yaml", b"[" * 100_000, "is nested deeper than any config is."),
        ("c.yaml", b"#" * (2**20 + 1), "is larger than 1 MiB, which no config is."),
    ],
)
def test_a_file_that_is_no_config_is_told_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_file(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: {message}"


def test_a_file_that_is_missing_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "c.yaml")
    assert str(error.value) == (
        f"{tmp_path / 'c.yaml'}: cannot be read (No such file or directory). `eclosion init` writes a config."
    )


def test_numbers_with_an_exponent_need_no_dot(tmp_path):
    (tmp_path / "c.yaml").write_text(YAML + "optimizer: {learning_rate: 1e-3, epsilon: 1E-7}\n")
    run = load(tmp_path / "c.yaml", ["task.model.options={norm_eps: 2e-6}"]).run
    assert (run.optimizer.learning_rate, run.optimizer.epsilon) == (1e-3, 1e-7)
    assert run.task.model.options == {"norm_eps": 2e-6}


def test_no_is_a_word_and_true_is_no_word(tmp_path):
    """In YAML 1.1, as many libraries read it, `no` is false."""
    (tmp_path / "c.yaml").write_text(YAML + "train: {mixed_precision: no}\nexport: no\noverwrite: true\n")
    run = load(tmp_path / "c.yaml", ["train.compile=false"]).run
    assert (run.train.mixed_precision, run.export, run.overwrite, run.train.compile) == ("no", "no", True, False)
    with pytest.raises(ConfigError, match="overwrite is 'yes', and must be true or false"):
        load(tmp_path / "c.yaml", ["overwrite=yes"])


def test_a_run_config_made_in_python_is_taken_as_it_is():
    run = load(TREE).run
    assert isinstance(run, RunConfig)
    assert load(run, ["seed=3"]).run.seed == 3


def test_unknown_keys_are_left_out_with_a_note_if_that_is_wished():
    wrong = {**TREE, "trian": {"batch_size": 4}, "train": {"batchsize": 3, "batch_size": 4}}
    loaded = load(wrong, ["sample.sampler={name: ddim, etta: 1}"], lenient=True)
    assert loaded.run == load(TREE, ["train.batch_size=4", "sample.sampler=ddim"]).run
    assert [note.partition("?")[0] for note in loaded.notes] == [
        "train.batchsize is not an option. Did you mean 'batch_size'",
        "sample.sampler.etta is not an option of 'ddim'. Did you mean 'eta'",
        "trian is not an option. Did you mean 'train'",
    ]
    assert all(note.endswith(" It is left out.") for note in loaded.notes)
    with pytest.raises(ConfigError, match=r"data\.image_size is 'big'"):
        load({**TREE, "data": {**TREE["data"], "image_size": "big"}}, lenient=True)


def test_a_config_that_is_nested_too_deep_for_a_check_is_refused():
    deep = {}
    for _ in range(800):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match=r"^config: is nested deeper than any config is\.$"):
        load({"output": "x", "data": {"source": "butterflies", "preprocessing": {"ToTensor": deep}}})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"track": {"log": ["tensorboard", "tensorboard"]}}, "log names tensorboard twice"),
        (
            {"track": {"save": [{"name": "local", "latest": "a"}, {"name": "local", "best": "./a"}]}},
            "the path 'a' twice",
        ),
        ({"track": {"save": [{"name": "local", "best": "a"}]}}, "which nothing decides: set validate.every"),
        (
            {"track": {"save": [{"name": "local", "best": "a"}]}, "checkpoint": {"best": "kid"}},
            "which nothing decides: set evaluate.every",
        ),
        (
            {"track": {"save": [{"name": "local", "best": "a"}]}, "checkpoint": {"keep_best": False}},
            "checkpoint.keep_best is false",
        ),
        ({"track": {"save": [{"name": "local", "latest": "{best_validation_loss:.3f}"}]}}, "only with validate.every"),
    ],
)
def test_savers_and_loggers_that_do_not_go_together_are_refused(sections, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load({"output": "runs/a", "data": {"source": "butterflies"}, **sections})
