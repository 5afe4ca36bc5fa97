"""Randomness as a function of position."""

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from scipy import stats

from eclosion.rng import generator, integer_seed, randint, randn, uniform


def test_the_same_position_gives_the_same_numbers_in_any_order():
    first = {p: generator(7, "loss", "unet", p).random(4) for p in (3, 1, 2)}
    again = {p: generator(7, "loss", "unet", p).random(4) for p in (1, 2, 3)}
    for p in first:
        assert np.array_equal(first[p], again[p])


@given(st.integers(0, 2**62), st.integers(0, 2**40))
def test_seed_purpose_and_position_all_count(seed, p):
    here = generator(seed, "loss", p).integers(0, 2**63, 2)
    for other in (generator(seed + 1, "loss", p), generator(seed, "augment", p), generator(seed, "loss", p + 1)):
        assert not np.array_equal(here, other.integers(0, 2**63, 2))


def test_a_number_is_not_its_text():
    assert generator(0, "a", 1).random() != generator(0, "a", "1").random()


def test_a_row_comes_from_its_own_generator():
    whole = randn([generator(0, p) for p in range(4)], (2, 3))
    alone = randn([generator(0, 2)], (2, 3))
    assert torch.equal(whole[2], alone[0])
    assert whole.dtype == torch.float32


def test_normal_numbers_are_normal_within_and_between_positions():
    within = randn([generator(0, "noise", 5)], (20_000,)).numpy().ravel()
    between = randn([generator(0, "noise", p) for p in range(20_000)], (1,)).numpy().ravel()
    for sample in (within, between):
        assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(between[:-1], between[1:])[0, 1]) < 4 / np.sqrt(len(between))


def test_whole_numbers_are_even_and_stay_inside():
    drawn = randint([generator(0, "t", p) for p in range(20_000)], 0, 10)
    assert drawn.dtype == torch.int64
    assert stats.chisquare(torch.bincount(drawn, minlength=10).numpy()).pvalue > 1e-3


def test_numbers_between_zero_and_one_are_even():
    assert stats.kstest(uniform([generator(0, "u", p) for p in range(20_000)]).numpy(), "uniform").pvalue > 1e-3


def test_the_stream_of_a_position_is_pinned():
    """A change here makes every run that is resumed another run."""
    assert generator(0, "loss", "unet", 0).integers(0, 2**32, 3).tolist() == [642483903, 4173788557, 1900477409]
    assert integer_seed(0, "weights") == 2934036865011653446
