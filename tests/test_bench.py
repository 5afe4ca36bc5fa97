"""The benchmarks run, and say what they measured. How fast anything is, no test asserts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def bench_is_importable():
    """The folder of the benchmarks is no part of the package."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def measured(*rows, out):
    """What a smoke test of some rows writes, and what it prints."""
    command = [sys.executable, "-m", "bench", *rows, "--quick", "--out", str(out)]
    environment = os.environ | {"TMPDIR": str(out.parent)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_every_row_says_what_was_measured_and_on_what(tmp_path):
    results, table = measured("S1", "S2", "S5", "S6", "S7", out=tmp_path / "results.json")
    assert results["machine"]["torch_threads"] == 1
    assert results["machine"]["OMP_NUM_THREADS"] == "1"
    assert {"cpu", "cores", "packages", "load_average"} <= set(results["machine"])
    rows = results["rows"]
    assert [row["row"] for row in rows] == ["S1"] * 2 + ["S2"] * 2 + ["S5"] * 4 + ["S6"] + ["S7"] * 4
    for row in rows:
        assert row["verdict"] == "quick"  # a smoke test never passes anything
        assert row["load"]["contended"] in (True, False)
        assert set(row["work"]) == {"both", "ours", "peer"}
        assert row["work"]["both"]["parameters"] > 0
        for side in ("ours", "peer"):
            spread = row[side][row["clock"]]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
            assert spread["median"] in spread["values"] or len(spread["values"]) % 2 == 0
    # two rows for each claim about speed: in the peer's dtype, and in the defaults of both
    same, defaults = (row for row in rows if row["row"] == "S2")
    assert same["work"]["ours"]["dtype"] == same["work"]["peer"]["dtype"] == "fp32"
    assert defaults["comparison"] == "our defaults against theirs"
    assert len([line for line in table.splitlines() if line.startswith("| S")]) == len(rows)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("eclosion-bench-")]  # nothing is left


@pytest.mark.slow
def test_starting_both_sides_as_processes_gives_a_row(tmp_path):
    results, _ = measured("S11", out=tmp_path / "results.json")
    assert [row["row"] for row in results["rows"]] == ["S11"]


@pytest.mark.slow
def test_reading_shards_on_both_sides_gives_rows_about_the_same_work(tmp_path):
    results, table = measured("S4", out=tmp_path / "results.json")
    rows = results["rows"]
    assert [(row["row"], row["clock"]) for row in rows] == [("S4", "cpu")] * 4 + [("S4", "wall")] * 2
    for row in rows:
        assert row["verdict"] == "quick"
        assert row["work"]["both"]["samples"] > 0
        for side in ("ours", "peer"):
            assert set(row[side]) == {"cpu", "wall"}
            assert row[side]["cpu"]["median"] > 0
        assert row["result"] == pytest.approx(row["extra"][f"{row['clock']}_result"])
    decoded = rows[2:]
    same = "pixels are equal, bit for bit"  # or the row is refused
    assert [row["work"]["both"]["agreement"] == same for row in decoded] == [True, True, True, False]
    assert decoded[-1]["comparison"] == "our defaults against theirs"
    assert decoded[-1]["work"]["both"]["least_psnr_db"] > 40
    assert table.count("| S4 |") == len(rows)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("eclosion-bench-")]  # nothing is left


def test_a_name_that_is_no_row_is_refused():
    done = subprocess.run([sys.executable, "-m", "bench", "S99"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "S99: no such row. Rows: S1, S2, " in done.stderr


def make_row(**changes):
    from bench.row import Goal, Row, Spread

    spread = {"wall": Spread((1.0, 2.0, 4.0))}
    texts = dict.fromkeys(["case", "comparison", "measured", "result_is"], "")
    row = {"row": "S6", "clock": "wall", "work": {}, "ours": spread, "peer": spread, "load": {"contended": False}}
    return Row(**(texts | row | {"result": 0.1, "goal": Goal(0.12, 0.06)} | changes))


def test_a_verdict_follows_from_result_goal_and_load():
    from bench.row import Goal

    assert make_row().verdict == "passed"
    assert make_row(result=0.05).verdict == "stretch"
    assert make_row(result=0.13).verdict == "missed"
    assert make_row(goal=Goal(1.4, 1.6, lower_is_better=False), result=1.5).verdict == "passed"
    assert make_row(goal=Goal(1.4, 1.6, lower_is_better=False), result=1.3).verdict == "missed"
    assert make_row(goal=None).verdict == "no goal"
    assert make_row(quick=True).verdict == "quick"
    assert make_row(result=0.0, load={"contended": True}).verdict == "contended"  # never passed


def test_sides_take_turns_and_each_is_timed_alone():
    from bench.turns import Contender, alternate

    order = []

    def works(name, seconds):
        def work(gate):
            while True:
                gate()
                order.append(name)
                end = time.thread_time() + seconds
                while time.thread_time() < end:
                    pass

        return work

    with Contender(works("a", 0.004)) as a, Contender(works("b", 0.001)) as b:
        timed = alternate({"a": a, "b": b}, rounds=3, warmups=1, steps=2)
    assert order == list("aabb" + "bbaa" + "aabb" + "bbaa")
    assert [len(timed[name]["cpu"].values) for name in "ab"] == [3, 3]
    assert min(timed["a"]["cpu"].values) >= 0.004  # it spins until its own clock says so
    assert min(timed["b"]["cpu"].values) >= 0.001


def test_an_error_in_the_work_of_a_side_reaches_whoever_measures():
    from bench.turns import Contender

    def work(gate):
        gate()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), Contender(work) as side:
        side.step()
