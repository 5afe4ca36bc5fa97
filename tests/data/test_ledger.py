"""The ledger: every sample of every epoch is in it once, whatever was killed when."""

import json
import random
from collections import Counter

import pytest

from eclosion.data.batch import Skip
from eclosion.data.ledger import Ledger, Shards, left_out_of_budget, over_budget
from eclosion.data.order import Order
from eclosion.errors import DataError, EnvironmentProblem
from eclosion.rundir import RunDir

N = 10


def skip(position, reason="truncated", num_samples=N):
    return Skip(position, f"{position % num_samples}.png", reason, "ends early.")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(ledger, start, stop, step=4, bad=()):
    for begin in range(start, stop, step):
        here = range(begin, begin + step)
        ledger.record(here, [skip(p) for p in here if p in bad])


def test_a_finished_epoch_is_one_line_with_all_of_its_samples(tmp_path):
    path = RunDir(tmp_path).ledger
    ledger = Ledger(path, num_samples=N, max_bad_fraction=0.5)
    ledger.record(range(6), [skip(2), skip(5, "too_small")])
    assert not path.exists()
    ledger.record(range(6, 12), [skip(7), skip(11)])
    assert lines(path) == [
        {
            "epoch": 0,
            "index_count": 10,
            "delivered": 7,
            "skipped": {"too_small": 1, "truncated": 2},
            "samples": [
                {"position": 2, "name": "2.png", "reason": "truncated"},
                {"position": 5, "name": "5.png", "reason": "too_small"},
                {"position": 7, "name": "7.png", "reason": "truncated"},
            ],
        }
    ]
    assert ledger.state() == {
        "position": 12,
        "epoch": 1,
        "index_count": 10,
        "delivered": 1,
        "skipped": {"truncated": 1},
        "samples": [{"position": 11, "name": "1.png", "reason": "truncated"}],
    }


@pytest.mark.parametrize("step", [1, 3, 10, 25, 64])
def test_whatever_the_batch_each_epoch_adds_up(tmp_path, step):
    path = RunDir(tmp_path).ledger
    bad = {p for p in range(200) if random.Random(p).random() < 0.2}
    ledger = Ledger(path, num_samples=N, max_bad_fraction=1)
    run(ledger, 0, 200, step, bad)
    for epoch, line in enumerate(lines(path)):
        here = [p for p in bad if p // N == epoch]
        assert (line["epoch"], line["index_count"]) == (epoch, N)
        assert line["skipped"] == dict(Counter("truncated" for _ in here))
        assert line["delivered"] == N - len(here)
        assert [s["position"] for s in line["samples"]] == sorted(here)
    assert len(lines(path)) == ledger.position // N


def test_a_run_killed_anywhere_and_resumed_from_any_checkpoint_ends_with_the_same_file(tmp_path):
    rng = random.Random(0)
    bad = {p for p in range(400) if rng.random() < 0.1}
    whole = tmp_path / "whole.jsonl"
    run(Ledger(whole, num_samples=N, max_bad_fraction=1), 0, 400, 4, bad)
    path = tmp_path / "ledger.jsonl"
    checkpoint, position, kills = None, 0, 0
    while position < 400:
        ledger = Ledger.restore(checkpoint, path, num_samples=N, max_bad_fraction=1)
        position = ledger.position
        killed_at, kills = position + 4 * rng.randrange(1, 12), kills + 1
        while position < min(killed_at, 400):
            run(ledger, position, position + 4, 4, bad)
            position += 4
            if rng.random() < 0.15:
                checkpoint = json.loads(json.dumps(ledger.state()))
        if position < 400 and rng.random() < 0.3:  # killed inside of an append
            with path.open("a") as file:
                file.write('{"epoch": 17, "index_co')
    assert kills > 10
    assert path.read_bytes() == whole.read_bytes()


def test_starting_over_forgets_what_an_earlier_start_wrote(tmp_path):
    path = tmp_path / "ledger.jsonl"
    run(Ledger(path, num_samples=N), 0, 40)
    assert len(lines(path)) == 4
    Ledger.restore(None, path, num_samples=N)
    assert path.read_text() == ""


def test_finished_epochs_survive_a_resume_untouched(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, num_samples=N)
    run(ledger, 0, 24)
    before, state = path.stat(), ledger.state()
    restored = Ledger.restore(state, path, num_samples=N)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert restored.state() == state
    assert not list(tmp_path.glob("*.partial"))


def test_a_line_that_lost_its_end_is_mended(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, num_samples=N)
    run(ledger, 0, 24)
    whole, state = path.read_text(), ledger.state()
    path.write_text(whole[:-1])
    restored = Ledger.restore(state, path, num_samples=N)
    assert path.read_text() == whole
    run(restored, 24, 32)
    assert [line["epoch"] for line in lines(path)] == [0, 1, 2]


def test_processes_without_a_file_keep_the_same_account(tmp_path):
    with_file = Ledger.restore(None, tmp_path / "ledger.jsonl", num_samples=N, max_bad_fraction=1)
    without = Ledger.restore(None, None, num_samples=N, max_bad_fraction=1)
    for ledger in (with_file, without):
        run(ledger, 0, 24, 8, {3, 4, 21})
    assert with_file.state() == without.state()


def test_the_budget_counts_all_processes_and_survives_a_resume():
    ledger = Ledger(None, num_samples=N, max_bad_fraction=0.2)
    ledger.record(range(4), [skip(1), skip(3)])
    resumed = Ledger.restore(json.loads(json.dumps(ledger.state())), None, num_samples=N, max_bad_fraction=0.2)
    with pytest.raises(DataError) as caught:
        resumed.record(range(4, 8), [skip(6)])
    assert str(caught.value) == (
        "6.png: ends early. 3 of 10 samples of epoch 0 cannot be used (truncated), and data.max_bad_fraction=0.2 "
        "allows 2. Repair or remove the sample, or raise data.max_bad_fraction."
    )


@pytest.mark.parametrize(("fraction", "allowed"), [(0, 0), (0.29, 29), (0.295, 29), (1, 100)])
def test_the_budget_is_a_share_of_the_epoch_whatever_its_rounding(fraction, allowed):
    last = skip(5, num_samples=100)
    assert over_budget(last, allowed, 100, fraction) is None
    assert over_budget(last, allowed + 1, 100, fraction) is not None


def test_each_epoch_has_the_whole_budget():
    ledger = Ledger(None, num_samples=N, max_bad_fraction=0.1)
    run(ledger, 0, 50, 5, {3, 13, 23, 33, 43})
    with pytest.raises(DataError, match="2 of 10 samples of epoch 5"):
        run(ledger, 50, 60, 5, {50, 59})


def test_many_skipped_samples_are_counted_and_some_are_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, num_samples=1000, max_bad_fraction=1)
    ledger.record(range(1000), [skip(p, num_samples=1000) for p in range(0, 1000, 2)])
    (line,) = lines(path)
    assert line["skipped"] == {"truncated": 500}
    assert [s["position"] for s in line["samples"]] == list(range(0, 200, 2))


def test_a_gap_an_overlap_or_a_stranger_is_noticed():
    ledger = Ledger(None, num_samples=N, max_bad_fraction=1)
    ledger.record(range(4), [])
    for positions, skipped in [
        (range(5, 9), []),
        (range(0, 4), []),
        (range(4, 8), [skip(9)]),
        (range(4, 8), [skip(5), skip(5)]),
    ]:
        with pytest.raises(AssertionError):
            ledger.record(positions, skipped)
    ledger.delivered += 1  # a sample that was counted twice
    with pytest.raises(AssertionError):
        ledger.record(range(4, 12), [])


def test_another_number_of_samples_is_refused():
    state = Ledger(None, num_samples=N).state()
    with pytest.raises(DataError) as caught:
        Ledger.restore(state, None, num_samples=12)
    assert str(caught.value) == (
        "The checkpoint counts 10 samples in an epoch, and data.source now has 12. "
        "Resume with the data that the run began with."
    )


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    ledger = Ledger(tmp_path / "gone" / "ledger.jsonl", num_samples=N)
    with pytest.raises(EnvironmentProblem) as caught:
        run(ledger, 0, 12)
    assert str(caught.value) == f"{tmp_path}/gone/ledger.jsonl: cannot be written (No such file or directory)."


def test_samples_without_an_embedding_are_counted_and_never_too_many(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", num_samples=N, max_bad_fraction=0)
    ledger.record(range(10), [skip(p, "no_embedding") for p in range(9)])
    assert lines(tmp_path / "ledger.jsonl")[0]["skipped"] == {"no_embedding": 9}
    with pytest.raises(DataError, match=r"9.png: ends early\. 1 of 10 samples of epoch 1"):
        ledger.record(range(10, 20), [skip(p, "no_embedding") for p in range(10, 19)] + [skip(19)])


SIZES = [3, 0, 4, 2]
LEFT_OUT = [{"no_image": 1}, {"damaged_shard": 1}, {}, {"no_embedding": 2}]


def shards_of(order):
    return Shards([f"{i}.tar" for i in range(4)], LEFT_OUT, order.shard_at, order.shard_counts)


@pytest.mark.parametrize("resampled", [None, 7, 30])
@pytest.mark.parametrize("step", [1, 4, 11])
def test_each_shard_has_its_own_account_that_sums_to_its_index(resampled, step, tmp_path):
    """Against a count by hand, with a checkpoint in between at every step."""
    order = Order(SIZES, seed=0, shuffle=resampled is None, window=2, resampled=resampled)
    total = 3 * order.num_samples // step * step + step
    bad = {p for p in range(total) if p % 5 == 2}
    path, state = tmp_path / "ledger.jsonl", None
    for begin in range(0, total, step):
        ledger = Ledger.restore(state, path, num_samples=order.num_samples, max_bad_fraction=1, shards=shards_of(order))
        here = range(begin, begin + step)
        ledger.record(here, [skip(p, num_samples=order.num_samples) for p in here if p in bad])
        state = json.loads(json.dumps(ledger.state()))
    found = lines(path)
    assert len(found) >= 3
    for epoch, line in enumerate(found):
        positions = range(epoch * order.num_samples, (epoch + 1) * order.num_samples)
        for shard in range(4):
            here = [p for p in positions if order.shard_at(p) == shard]
            skipped = Counter({"truncated": len(bad.intersection(here))}) + Counter(LEFT_OUT[shard])
            assert line["shards"][f"{shard}.tar"] == {
                "delivered": len(here) - len(bad.intersection(here)),
                "skipped": dict(skipped),
            }
        each = line["shards"].values()
        assert line["delivered"] == sum(one["delivered"] for one in each)
        assert sum(line["skipped"].values()) == sum(sum(one["skipped"].values()) for one in each)
        assert line["index_count"] == line["delivered"] + sum(line["skipped"].values()) == order.num_samples + 4


def test_what_cannot_be_asked_for_has_the_budget_of_what_cannot_be_read():
    names = [f"{i}.tar" for i in range(4)]
    error = left_out_of_budget(LEFT_OUT, names, 100, 0.01)
    assert str(error) == (
        "2 of 100 samples cannot be used (0.tar: 1 no_image; 1.tar: 1 damaged_shard), and data.max_bad_fraction=0.01 "
        "allows 1. Repair the shards, or raise data.max_bad_fraction."
    )
    assert left_out_of_budget(LEFT_OUT, names, 100, 0.02) is None
