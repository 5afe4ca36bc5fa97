"""The order of samples: a permutation per epoch, known at any position."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclosion.data.order import Order
from eclosion.rng import generator

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**40)
FIXED = [9, 6, 8, 3, 7, 1, 2, 5, 0, 4, 1, 6, 3, 5, 7, 0, 9, 4, 8, 2]


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 1000))
def test_each_epoch_visits_every_sample_once(num_samples, seed, epoch):
    order = Order(num_samples, seed=seed, shuffle=True)
    visited = order.indices(range(epoch * num_samples, (epoch + 1) * num_samples))
    assert sorted(visited.tolist()) == list(range(num_samples))


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.lists(st.integers(0, 2000), max_size=60))
def test_a_position_has_its_sample_in_whatever_order_positions_are_asked_for(num_samples, seed, positions):
    from_start = Order(num_samples, seed=seed, shuffle=True).indices(range(2001))
    order = Order(num_samples, seed=seed, shuffle=True)
    assert order.indices(positions).tolist() == from_start[positions].tolist()
    assert [order.index_at(p) for p in positions[:5]] == from_start[positions[:5]].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order(1000, seed=0, shuffle=True)
    first, second = order.indices(range(1000)), order.indices(range(1000, 2000))
    other = Order(1000, seed=1, shuffle=True).indices(range(1000))
    for a, b in [(first, second), (first, other)]:
        assert (a == b).mean() < 0.02  # two random orders agree in one place on average


def test_every_order_is_equally_likely():
    """A chi-squared test over the 6 orders of 3 samples; the limit has a chance of 1e-6."""
    counts: dict[tuple[int, ...], int] = {}
    order = Order(3, seed=0, shuffle=True)
    for epoch in range(1200):
        key = tuple(order.indices(range(3 * epoch, 3 * epoch + 3)).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 36.0


def test_the_order_never_changes_between_versions():
    """Runs are resumed with it: a change here breaks every run under way."""
    assert Order(10, seed=0, shuffle=True).indices(range(20)).tolist() == FIXED


def test_without_shuffle_the_order_is_that_of_the_source():
    assert Order(3, seed=5, shuffle=False).indices(range(1, 8)).tolist() == [1, 2, 0, 1, 2, 0, 1]


def test_at_most_two_epochs_are_kept_as_four_bytes_a_sample():
    order = Order(1000, seed=0, shuffle=True)
    order.indices(range(0, 10_000, 7))
    order.indices(range(500))
    assert len(order._permutations) <= 2
    assert sum(p.nbytes for p in order._permutations.values()) == 2 * 4 * 1000


def test_threads_may_ask_at_once():
    wanted = Order(50, seed=3, shuffle=True).indices(range(1000))
    order, wrong = Order(50, seed=3, shuffle=True), []

    def ask(thread):
        positions = generator(thread, "ask").integers(0, 1000, 300)
        wrong.extend(p for p in positions if order.index_at(p) != wanted[p])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_no_samples_have_no_order():
    with pytest.raises(ValueError, match="at least one sample, not 0"):
        Order(0, seed=0, shuffle=True)


def test_indices_are_int64():
    assert Order(5, seed=0, shuffle=True).indices([1, 2]).dtype == np.int64
