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


def test_every_row_says_what_was_measured_and_on_what(tmp_path, monkeypatch):
    monkeypatch.delenv("ECLOSION_BENCH_DALLE2", raising=False)
    results, table = measured("S1", "S2", "S3", "S5", "S6", "S7", out=tmp_path / "results.json")
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
    # a row whose peer is not installed says how to get it, and does not keep the others from being measured
    assert list(results["not_measured"]) == ["S3"]
    assert "pip install dalle2-pytorch" in results["not_measured"]["S3"]
    assert "Not measured: S3 needs DALLE2-pytorch" in table
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
    assert [(row["row"], row["clock"]) for row in rows] == [("S4", "cpu")] * 6 + [("S4", "wall")] * 4
    for row in rows:
        assert row["verdict"] == "quick"
        assert row["work"]["both"]["samples"] > 0
        for side in ("ours", "peer"):
            assert set(row[side]) == {"cpu", "wall"}
            assert row[side]["cpu"]["median"] > 0
        assert row["result"] == pytest.approx(row["extra"][f"{row['clock']}_result"])
    decoded = rows[2:]
    same = "pixels are equal, bit for bit"  # or the row is refused
    assert [row["work"]["both"]["agreement"] == same for row in decoded] == [True] * 4 + [True, False] * 2
    for preprocess, row in zip(("PIL and NumPy", "torchvision's transforms"), decoded[5::2], strict=True):
        assert row["comparison"] == f"our defaults against theirs; theirs by {preprocess}"
        assert row["work"]["both"]["least_psnr_db"] > 40
    assert table.count("| S4 |") == len(rows)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("eclosion-bench-")]  # nothing is left


@pytest.mark.slow
@pytest.mark.skipif("ECLOSION_BENCH_DALLE2" not in os.environ, reason="needs an interpreter that has DALLE2-pytorch")
def test_training_from_the_peer_s_checkpoint_gives_rows_about_the_same_network(tmp_path):
    results, _ = measured("S3", out=tmp_path / "results.json")
    rows = results["rows"]
    assert [row["case"].split(",")[0] for row in rows] == ["decoder"] * 2 + ["upsampler"] * 2
    for row in rows:
        both = row["work"]["both"]
        assert max(both["largest_difference"].values()) <= 1e-4 < 0.01 < both["scale_of_outputs"]
        assert row["work"]["peer"]["threads"] == 1
        assert row["result"] == row["peer"]["cpu"]["median"] / row["ours"]["cpu"]["median"]
    assert "loss" in rows[0]["work"]["both"]["largest_difference"]
    assert [row["work"]["ours"]["dtype"] for row in rows[::2]] == ["fp32", "fp32"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("eclosion-bench-")]  # nothing is left


def stand_in(folder, script):
    """What can be started in the place of a Python interpreter, and runs a script of its own."""
    interpreter = folder / "python"
    interpreter.write_text(f"#!{sys.executable}\n{script}")
    interpreter.chmod(0o755)
    return str(interpreter)


def peer(interpreter, folder):
    from bench.dalle2 import Embedded, Peer
    from bench.decoder import SMOKE

    cascade = SMOKE[1].cascade
    return Peer(interpreter, cascade, Embedded(cascade.batch_size, 16), folder)


def test_a_peer_in_its_own_process_makes_as_many_steps_as_it_is_told(tmp_path):
    script = """
import json, sys
config = json.load(open(sys.argv[2]))
print(json.dumps({"unets": len(config["decoder"]["unets"]), "trained": sys.argv[4]}), flush=True)
for line in sys.stdin:
    print(json.dumps({"cpu": int(line), "wall": 2 * int(line)}), flush=True)
open(sys.argv[5] + "/ended", "w").close()
"""
    with peer(stand_in(tmp_path, script), tmp_path) as side:
        assert side.facts == {"unets": 2, "trained": "2"}  # the original counts from 1
        assert [side.steps(3), side.steps(1)] == [(3, 6), (1, 2)]
    assert (tmp_path / "peer" / "ended").exists()


def test_a_peer_that_fails_is_told_in_its_own_words(tmp_path):
    from bench.row import NotMeasured

    failing = stand_in(tmp_path, 'print("{}", flush=True); input(); raise ValueError("broken")')
    with pytest.raises(RuntimeError, match="ValueError: broken"), peer(failing, tmp_path) as side:
        side.steps(1)
    lacking = stand_in(tmp_path, "import dalle2_pytorch_that_is_not_there")
    with (
        pytest.raises(NotMeasured, match="No module named 'dalle2_pytorch_that_is_not_there'"),
        peer(lacking, make(tmp_path / "a")),
    ):
        pass
    with (
        pytest.raises(NotMeasured, match="ECLOSION_BENCH_DALLE2=/nowhere: No such file"),
        peer("/nowhere", make(tmp_path / "b")),
    ):
        pass


def make(folder):
    folder.mkdir()
    return folder


def test_one_turn_of_our_side_is_one_step_of_the_loop(tmp_path):
    """The loop asks more than once in a step whether it shall stop."""
    from functools import partial

    from bench.turns import Contender
    from bench.work import SMOKE, Pictures, our_config, our_steps

    config = our_config(tmp_path / "run", SMOKE, log_every=1)
    with Contender(partial(our_steps, config=config, pictures=Pictures(2, SMOKE.image_size))) as side:
        side.steps(3)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in logged) == 3


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
