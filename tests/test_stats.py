"""Means, their error and the rank correlation of predictions: known values, ties, and what has no value."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_greater.stats import mean, ranks, spearman, standard_error


def test_the_mean_of_nothing_is_no_number() -> None:
    assert mean([1.0, 2.0, 6.0]) == mean((1, 2, 6)) == 3.0
    assert math.isnan(mean([])) and math.isnan(mean([1.0, math.nan]))


def test_the_error_of_a_mean_shrinks_with_the_root_of_the_number_of_values() -> None:
    assert standard_error([0.0, 2.0]) == pytest.approx(1.0)  # deviation √2 over √2
    assert standard_error([0.0, 2.0] * 8) == pytest.approx(math.sqrt(16 / 15) / 4)
    assert standard_error([3.0]) == standard_error([]) == standard_error([2.0, 2.0]) == 0.0


def test_ties_share_their_mean_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]


def test_a_known_correlation_with_ties() -> None:
    # By hand: ranks 0, 1, 2, 3 against 0.5, 0.5, 2, 3 give covariance 4.5 over sqrt(5 * 4.5).
    assert spearman([1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 6.0, 7.0]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=12))
def test_only_order_matters(values: list[int]) -> None:
    other = [random.Random(value).random() for value in values]
    once = spearman([float(value) for value in values], other)
    again = spearman([math.atan(value) for value in values], [10 * each + 3 for each in other])
    assert once == pytest.approx(again, nan_ok=True)
    assert math.isnan(once) or -1 - 1e-9 <= once <= 1 + 1e-9


def test_tuples_are_compared_from_left_to_right() -> None:
    assert spearman([1.0, 2.0, 3.0], [(0.0, 9.0), (1.0, 0.0), (1.0, 5.0)]) == pytest.approx(1.0)


def test_pairs_with_a_nan_are_left_out() -> None:
    assert spearman([1.0, 2.0, 3.0, math.nan], [3.0, 2.0, 1.0, 9.0]) == pytest.approx(-1.0)
    assert spearman([1.0, 2.0, 3.0, 4.0], [(1.0, 1.0), (2.0, 1.0), (3.0, 0.0), (0.0, math.nan)]) == pytest.approx(1.0)


@pytest.mark.parametrize(("one", "other"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([], [])])
def test_where_there_is_nothing_to_rank_there_is_no_number(one: list[float], other: list[float]) -> None:
    assert math.isnan(spearman(one, other))
