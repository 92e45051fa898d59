"""Measured positions -> a table: rank correlation and what the first picks are worth, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random

from benchmarks.fidelity.measure import Measured
from dspy_greater.stats import mean, spearman

_RESAMPLES = 2000
_PICKS = 3  # μ: candidates that a step tries


def correlation(at: Measured, ranking: str) -> float:
    """Spearman's ρ between predicted and realised change; nan where nothing can be ranked."""
    return spearman(at.predicted[ranking], at.realised)


def share_of_best_gain(at: Measured, ranking: str) -> float:
    """Mistakes saved by the best first pick, as a share of what the best of all saves; nan if none saves any."""
    best = min(change for change, _ in at.realised)
    if best >= 0:
        return math.nan
    order = sorted(range(len(at.realised)), key=lambda index: _number(at.predicted[ranking][index]))
    return max(0.0, -min(at.realised[index][0] for index in order[:_PICKS])) / -best


def first_pick(at: Measured, ranking: str) -> float:
    """By how much the mistake rate changed with the candidate that the ranking puts first; negative is good."""
    first = min(range(len(at.realised)), key=lambda index: _number(at.predicted[ranking][index]))
    return at.realised[first][0]


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of the numbers among `values` and its 95 % bootstrap interval over positions; nan for none.

    >>> interval([1.0, 1.0, float("nan")])
    (1.0, 1.0, 1.0)
    """
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return math.nan, math.nan, math.nan
    random = Random(seed)
    means = sorted(mean(random.choices(numbers, k=len(numbers))) for _ in range(_RESAMPLES))
    low, high = means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
    return mean(numbers), low, high


def table(measured: Sequence[Measured]) -> str:
    """Markdown: a row per ranking, best first."""
    tasks = list(dict.fromkeys(at.task for at in measured))
    names = sorted(measured[0].predicted, key=lambda name: -_or_low(interval(_all(measured, name, correlation))[0]))
    lines = [
        f"| ranking | ρ, 95 % interval | {' | '.join(tasks)} | best gain among the first {_PICKS} "
        "| mistakes after the first pick |",
        f"| --- | --- | {' | '.join('---' for _ in tasks)} | --- | --- |",
    ]
    for name in names:
        by_task = [interval(_all([at for at in measured if at.task == task], name, correlation))[0] for task in tasks]
        lines.append(
            f"| {name} | {_shown(interval(_all(measured, name, correlation)))} | "
            f"{' | '.join(f'{value:.2f}' for value in by_task)} | "
            f"{_shown(interval(_all(measured, name, share_of_best_gain)))} | "
            f"{_signed(interval(_all(measured, name, first_pick)))} |"
        )
    return "\n".join(lines)


# What each gradient is the first-order part of.
LINEARISES: Mapping[str, str] = {
    "pathwise, current": "reasoning fixed, exact",
    "pathwise, centroid": "reasoning fixed, exact",
    "whole, current": "re-weighted scoring, answers in nats",
    "whole, centroid": "re-weighted scoring, answers in nats",
}


def agreement(at: Measured, gradient: str) -> float:
    """Spearman's ρ between a gradient's prediction and the exact change that it linearises."""
    return spearman(at.predicted[gradient], at.predicted[LINEARISES[gradient]])


def linearisation_table(measured: Sequence[Measured]) -> str:
    """Markdown: how far a linear model of each kind agrees with what it is a model of, and that with what came.

    Positions that were measured without the exact change are left out, and gradients that were not asked for.
    """
    lines = ["| gradient | of | ρ with it, 95 % interval | ρ of it with what came |", f"|{' --- |' * 4}"]
    for gradient, exact in LINEARISES.items():
        both = [at for at in measured if {gradient, exact} <= at.predicted.keys()]
        if not both:
            continue
        within, came = interval(_all(both, gradient, agreement)), interval(_all(both, exact, correlation))
        lines.append(f"| {gradient} | {exact} | {_shown(within)} | {_shown(came)} |")
    return "\n".join(lines)


def _all(measured: Sequence[Measured], name: str, of: Callable[[Measured, str], float]) -> list[float]:
    return [of(at, name) for at in measured]


def _shown(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


def _signed(found: tuple[float, float, float]) -> str:
    return f"{found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f})"


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _or_low(value: float) -> float:
    return -math.inf if math.isnan(value) else value
