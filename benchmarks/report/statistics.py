"""The statistics of the report, beside those that a search has itself (`dspy_greater.stats`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.cells import wilson
from dspy_greater.stats import ranks

__all__ = ["Spread", "average_ranks", "holm", "mcnemar_exact", "wilson"]


@dataclass(frozen=True)
class Spread:
    """Mean, least, most and standard deviation (n - 1) of a few numbers; the deviation is None for one number.

    Example:
        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(count=3, mean=2.0, least=1.0, most=3.0, deviation=1.0)
    """

    count: int
    mean: float
    least: float
    most: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one number or more."""
        count, mean = len(values), math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else None
        return cls(count, mean, min(values), max(values), deviation)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: of the rows on which two programs differ, how even is the split?

    Under the null hypothesis the number of rows that only the first has right is binomial(n, 1/2), n being all rows
    that exactly one of them has right; p is twice its smaller tail, at most 1.

    Args:
        only_first: rows that only the first program has right.
        only_second: rows that only the second program has right.

    Example:
        >>> mcnemar_exact(8, 1)
        0.0390625
        >>> mcnemar_exact(0, 0)
        1.0
    """
    differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differing, right) for right in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differing)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p-values, in their order.

    Example:
        >>> holm([0.25, 0.125])
        [0.25, 0.25]
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda each: values[each])):
        largest = max(largest, min(1.0, values[index] * (len(values) - place)))
        adjusted[index] = largest
    return adjusted


def average_ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """Name -> rank, 1 for the highest score; equal scores share the mean of their ranks.

    Example:
        >>> average_ranks({"a": 0.9, "b": 0.5, "c": 0.9})
        {'a': 1.5, 'b': 3.0, 'c': 1.5}
    """

    places = ranks([-score for score in scores.values()])
    return {name: place + 1 for name, place in zip(scores, places, strict=True)}
