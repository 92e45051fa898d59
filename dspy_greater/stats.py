"""The small statistics of a search: means, their error, and rank correlation.

Rank correlation between predicted and realised change tells whether a ranking of candidates earned its cost: whether
those that it put first turned out best once they had reasoned for themselves. Every step knows both for the
candidates that it tried, so every run measures it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

_Z = 1.959963984540054  # 97.5 % of a normal distribution lie below


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; nan of no values.

    >>> mean([1.0, 2.0]), mean([])
    (1.5, nan)
    """
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values, such as the paired differences of two instructions; 0 of fewer than two.

    >>> standard_error([1.0, 3.0]), standard_error([1.0])
    (1.0, 0.0)
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of independent values; (nan, nan) of fewer than two.

    Wilson's where all values are 0 or 1, which is right near the ends too; otherwise 1.96 standard errors to each side.

    >>> low, high = interval([1.0] * 20)
    >>> round(low, 2), round(high, 2)
    (0.84, 1.0)
    """
    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    middle = mean(values)
    if any(value not in (0.0, 1.0) for value in values):
        reach = _Z * standard_error(values)
        return middle - reach, middle + reach
    scale = 1 + _Z**2 / count
    middle_of_both = (middle + _Z**2 / (2 * count)) / scale
    reach = _Z / scale * math.sqrt(middle * (1 - middle) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle_of_both - reach), min(1.0, middle_of_both + reach)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean change on the same rows; (nan, nan) of fewer than two.

    Agresti and Min's where all values are 0 or 1, which is not empty where nothing changed; otherwise 1.96 standard
    errors to each side.

    >>> low, high = paired_interval([0.0] * 20, [0.0] * 20)
    >>> round(low, 2), round(high, 2)
    (-0.09, 0.09)
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    count = len(changes)
    if count < 2 or not all(map(math.isfinite, changes)):
        return math.nan, math.nan
    if not {*before, *after} <= {0.0, 1.0}:
        reach = _Z * standard_error(changes)
        return mean(changes) - reach, mean(changes) + reach
    changed, gained = sum(map(abs, changes)) + 1, sum(changes)
    reach = _Z * math.sqrt(changed - gained**2 / (count + 2)) / (count + 2)
    middle = gained / (count + 2)
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def spearman(predicted: Sequence[float], realised: Sequence[float] | Sequence[tuple[float, ...]]) -> float:
    """Spearman's ρ between two rankings of the same candidates, ties sharing their mean rank.

    `realised` may be tuples, compared left to right. Pairs with a nan are left out. nan when fewer than three pairs
    are left or one side does not vary: there is nothing to rank.

    >>> spearman([0.1, 0.2, 0.3], [(0.0, 1.0), (0.0, 2.0), (1.0, 0.0)])
    1.0
    >>> spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    -1.0
    """
    both = [
        (one, other) for one, other in zip(predicted, realised, strict=True) if _is_number(one) and _is_number(other)
    ]
    if len(both) < 3:
        return math.nan
    return _pearson(ranks([one for one, _ in both]), ranks([other for _, other in both]))


def ranks(values: Sequence[Any]) -> list[float]:
    """The place of each value in ascending order, from 0; equal values share the mean of their places.

    >>> ranks([0.5, 0.1, 0.5])
    [1.5, 0.0, 1.5]
    """
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    count = {value: ordered.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]


def _pearson(one: Sequence[float], other: Sequence[float]) -> float:
    middle = mean(one), mean(other)
    one = [value - middle[0] for value in one]
    other = [value - middle[1] for value in other]
    scale = math.sqrt(sum(value * value for value in one) * sum(value * value for value in other))
    return math.nan if scale == 0 else sum(first * second for first, second in zip(one, other, strict=True)) / scale


def _is_number(value: float | tuple[float, ...]) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return not any(map(math.isnan, parts))
