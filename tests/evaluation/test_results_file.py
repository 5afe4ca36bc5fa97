"""The file of results: complete rows, the same score once, never half of it."""

import json
import threading
from dataclasses import replace

import pytest

from eclosion.cli.terminal import print_evaluation
from eclosion.errors import EnvironmentProblem
from eclosion.evaluation.evaluating import Evaluation
from eclosion.evaluation.results import Extractor, Floor, Result, append_results, check_results, read_results

ROW = Result(
    score="kid",
    metric={"name": "kid", "degree": 3},
    value=0.25,
    error=0.5,
    interval=(-0.75, 1.25),
    better="lower",
    n=10,
    n_reference=20,
    seed=0,
    floor=None,
    extractor=Extractor("tiny", {}, "abc", "abcdef", "none"),
    made={"what": "run", "name": "runs/a", "step": 10, "sampler": {"name": "ddim"}, "fingerprint": "x"},
    against={"what": "data", "name": "the val data", "split": "val", "fingerprint": "y"},
)


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "results.json"
    append_results(path, [ROW])
    assert read_results(path) == [json.loads(json.dumps(ROW.as_dict()))]
    assert read_results(tmp_path / "none.json") == []


def test_the_table_gives_each_floor_with_its_error(capsys):
    floor = Floor(value=0.5, error=0.125, interval=(0.25, 0.75), n=5, n_reference=15)
    rows = [replace(ROW, floor=floor), replace(ROW, score="kid_std", floor=replace(floor, error=None))]
    print_evaluation(Evaluation(rows, [], "runs/a", "the val data", 10, None, []))
    table = capsys.readouterr().out
    assert "0.5 ± 0.12 (5 and 15)" in table
    assert "0.5 (5 and 15)" in table


def test_a_number_that_is_none_is_null(tmp_path):
    append_results(tmp_path / "results.json", [replace(ROW, value=float("nan"), interval=(0.0, float("inf")))])
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["results"][0]["interval"] == [0.0, None]


def test_the_same_score_of_newer_weights_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "results.json"
    newer = replace(ROW, value=0.125, made={**ROW.made, "fingerprint": "z"})
    append_results(path, [ROW])
    append_results(path, [newer])
    assert [row["value"] for row in read_results(path)] == [0.125]


@pytest.mark.parametrize(
    "other",
    [
        {"score": "fid"},
        {"metric": {"name": "kid", "degree": 2}},
        {"n": 11},
        {"seed": 1},
        {"extractor": Extractor("tiny", {}, "other", "other", "none")},
        {"made": {**ROW.made, "step": 11}},
        {"made": {**ROW.made, "sampler": {"name": "euler"}}},
        {"against": {**ROW.against, "split": "test"}},
        {"against": {**ROW.against, "fingerprint": "other"}},
        {"against": {**ROW.against, "file": "real.safetensors"}},
        {"n_reference": 21},
        {"train": {"what": "data", "name": "the train data", "fingerprint": "t"}},
    ],
)
def test_another_score_stands_beside_the_old(tmp_path, other):
    path = tmp_path / "results.json"
    append_results(path, [ROW])
    append_results(path, [replace(ROW, **other)])
    assert len(read_results(path)) == 2


def test_rows_that_are_written_at_once_are_all_there(tmp_path):
    path = tmp_path / "results.json"
    threads = [threading.Thread(target=append_results, args=(path, [replace(ROW, seed=seed)])) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["seed"] for row in read_results(path)) == list(range(12))


@pytest.mark.parametrize("text", ["", "[]", '{"results": 3}', '{"results": [3]}', "{"])
def test_a_file_of_something_else_is_left_alone_and_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(EnvironmentProblem, match=r"results\.json is no file of results") as error:
        append_results(path, [ROW])
    assert "\n" not in str(error.value)
    with pytest.raises(EnvironmentProblem, match=r"results\.json is no file of results"):
        check_results(path)
    assert path.read_text() == text


def test_a_score_is_called_by_its_name_and_its_extractor():
    assert ROW.key == "evaluate/kid/tiny"
    assert replace(ROW, extractor=None).key == "evaluate/kid"
