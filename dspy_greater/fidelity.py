"""Did the predictions come true? Rank correlation between predicted and realised change of the loss.

A ranking of candidates earns its cost when those that it puts first turn out best once they have reasoned for
themselves. Every step knows both for the candidates that it tried, so every run measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


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
    one = [value - sum(one) / len(one) for value in one]
    other = [value - sum(other) / len(other) for value in other]
    scale = math.sqrt(sum(value * value for value in one) * sum(value * value for value in other))
    return math.nan if scale == 0 else sum(first * second for first, second in zip(one, other, strict=True)) / scale


def _is_number(value: float | tuple[float, ...]) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return not any(map(math.isnan, parts))
