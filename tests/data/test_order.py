"""The order of samples: a permutation per epoch, known at any position."""

import threading
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclosion.data.order import Order
from eclosion.rng import generator

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**40)
FIXED = [9, 6, 8, 3, 7, 1, 2, 5, 0, 4, 1, 6, 3, 5, 7, 0, 9, 4, 8, 2]
FIXED_SHARDS = [8, 0, 1, 2, 7, 5, 3, 4, 6]
FIXED_RESAMPLED = [7, 8, 0, 1, 2, 0, 1, 2, 7]


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 1000))
def test_each_epoch_visits_every_sample_once(num_samples, seed, epoch):
    order = Order([num_samples], seed=seed, shuffle=True)
    visited = order.indices(range(epoch * num_samples, (epoch + 1) * num_samples))
    assert sorted(visited.tolist()) == list(range(num_samples))


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.lists(st.integers(0, 2000), max_size=60))
def test_a_position_has_its_sample_in_whatever_order_positions_are_asked_for(num_samples, seed, positions):
    from_start = Order([num_samples], seed=seed, shuffle=True).indices(range(2001))
    order = Order([num_samples], seed=seed, shuffle=True)
    assert order.indices(positions).tolist() == from_start[positions].tolist()
    assert [order.index_at(p) for p in positions[:5]] == from_start[positions[:5]].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order([1000], seed=0, shuffle=True)
    first, second = order.indices(range(1000)), order.indices(range(1000, 2000))
    other = Order([1000], seed=1, shuffle=True).indices(range(1000))
    for a, b in [(first, second), (first, other)]:
        assert (a == b).mean() < 0.02  # two random orders agree in one place on average


def test_every_order_is_equally_likely():
    """A chi-squared test over the 6 orders of 3 samples; the limit has a chance of 1e-6."""
    counts: dict[tuple[int, ...], int] = {}
    order = Order([3], seed=0, shuffle=True)
    for epoch in range(1200):
        key = tuple(order.indices(range(3 * epoch, 3 * epoch + 3)).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 36.0


def test_the_order_never_changes_between_versions():
    """Runs are resumed with it: a change here breaks every run under way."""
    assert Order([10], seed=0, shuffle=True).indices(range(20)).tolist() == FIXED


def test_without_shuffle_the_order_is_that_of_the_source():
    assert Order([3], seed=5, shuffle=False).indices(range(1, 8)).tolist() == [1, 2, 0, 1, 2, 0, 1]


def test_what_is_kept_of_an_order_is_bounded_and_has_four_bytes_a_sample():
    order = Order([700_000], seed=0, shuffle=True)
    order.indices(range(0, 7_000_000, 70_000))
    order.indices(range(500))
    assert len(order._visits) <= 2
    assert sum(window.nbytes for window in order._windows.values()) <= 2 * 4 * 700_000


def test_threads_may_ask_at_once():
    wanted = Order([50], seed=3, shuffle=True).indices(range(1000))
    order, wrong = Order([50], seed=3, shuffle=True), []

    def ask(thread):
        positions = generator(thread, "ask").integers(0, 1000, 300)
        wrong.extend(p for p in positions if order.index_at(p) != wanted[p])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_no_samples_have_no_order():
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0], seed=0, shuffle=True)


def test_indices_are_int64():
    assert Order([5], seed=0, shuffle=True).indices([1, 2]).dtype == np.int64


SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(sum)


def reference(sizes, *, seed, shuffle, window, resampled, num_epochs):
    """The same order, built the slow way from what its description says: list after list."""
    shards, start = [], 0
    for size in sizes:
        shards.append(list(range(start, start + size)))
        start += size
    filled, run = [s for s, samples in enumerate(shards) if samples], []
    for epoch in range(num_epochs):
        if resampled:
            rng, out = generator(seed, "resample", epoch), []
            while len(out) < resampled:
                for k in rng.integers(0, len(filled), 1024):
                    out += shards[filled[k]]
            run += out[:resampled]
            continue
        visits = np.array(filled)
        if shuffle and len(filled) > 1:
            generator(seed, "shards", epoch).shuffle(visits)
        for number in range(0, len(visits), window if shuffle else 1):
            together = visits[number : number + window] if shuffle else visits[number : number + 1]
            mixed = np.concatenate([shards[s] for s in together]).astype(np.int64)
            if shuffle:
                where = (epoch,) if len(sizes) == 1 else (epoch, number // window)
                generator(seed, "order", *where).shuffle(mixed)
            run += mixed.tolist()
    return run


@settings(max_examples=150, deadline=None)
@given(SHARDS, SEEDS, st.sampled_from(["shuffled", "in order", "resampled"]), st.integers(1, 5), st.integers(1, 40))
def test_orders_over_shards_are_what_their_description_says(sizes, seed, kind, window, epoch_samples):
    options = {
        "seed": seed,
        "shuffle": kind == "shuffled",
        "window": window,
        "resampled": epoch_samples if kind == "resampled" else None,
    }
    order = Order(sizes, **options)
    whole = reference(sizes, **options, num_epochs=3)
    assert order.num_samples * 3 == len(whole)
    assert order.indices(range(len(whole))).tolist() == whole
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    assert [order.shard_at(p) for p in range(len(whole))] == [shard_of[i] for i in whole]
    for epoch in range(3):
        here = whole[epoch * order.num_samples : (epoch + 1) * order.num_samples]
        counts = np.bincount(shard_of[here], minlength=len(sizes))
        assert order.shard_counts(epoch).tolist() == counts.tolist()
        if kind != "resampled":
            assert sorted(here) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(SHARDS, SEEDS, st.booleans(), st.integers(1, 5), st.integers(0, 80))
def test_the_shards_that_come_next_are_told_before_they_are_needed(sizes, seed, shuffle, window, position):
    order = Order(sizes, seed=seed, shuffle=shuffle, window=window)
    needed = list(dict.fromkeys(order.shard_at(p) for p in range(position, (position // sum(sizes) + 1) * sum(sizes))))
    told = list(islice(order.shards_from(position), len(sizes) + window))
    assert set(needed) <= set(told)
    if not shuffle:
        assert told[: len(needed)] == needed


def test_a_window_keeps_few_shards_in_use():
    sizes, window = [50] * 40, 4
    order = Order(sizes, seed=1, shuffle=True, window=window)
    shards = [order.shard_at(p) for p in range(2000)]
    for begin in range(0, 2000, 50 * window):
        assert len(set(shards[begin : begin + 50 * window])) == window


def test_a_window_as_wide_as_the_data_mixes_all_shards():
    """Mean distance of two neighbours in the order, against that of two random samples, n / 3."""
    order = Order([100] * 20, seed=3, shuffle=True, window=20)
    visited = order.indices(range(2000))
    assert abs(np.abs(np.diff(visited)).mean() / (2000 / 3) - 1) < 0.05


def test_orders_over_shards_never_change_between_versions():
    """Runs are resumed with them: a change here breaks every run under way."""
    assert Order([3, 0, 4, 2], seed=0, shuffle=True, window=2).indices(range(9)).tolist() == FIXED_SHARDS
    assert Order([3, 0, 4, 2], seed=0, shuffle=False, resampled=9).indices(range(9)).tolist() == FIXED_RESAMPLED
