"""How far forecasts are believed: what is assumed of reasonings that were not seen, and when chance has a turn."""

from __future__ import annotations

import math
from random import Random

from dspy_greater.objective.types import Evaluation
from dspy_greater.search.state import SearchState
from dspy_greater.settings import Settings
from dspy_greater.stats import spearman

_TRUSTED = 0.3  # rank correlation from which forecasts are believed
_OUTDONE = 0.9  # share of the seed's mistakes from which on it is outdone
_ENOUGH = 9  # candidates that were tried before fidelity says that forecasts come true,
_ENOUGH_TO_DOUBT = 6  # and of the last few, before it says that they do not
_LAST = 12


def baseline_scale(settings: Settings, seed: Evaluation, current: Evaluation) -> float:
    """What the mean mistake is multiplied by to give the baseline, between the setting's and 1.

    While the model is as wrong as under the seed instruction, anything else is worth a try. Once it is right more
    often, what it would generate instead is mostly what it generated before, and counts as no better than what is at
    hand: the scale is 1 where a tenth of the seed's mistakes, 1 - score, is gone, and where the seed made none.

    >>> from dataclasses import replace
    >>> seed = Evaluation((), "Guess.", (), score=0.5, cross_entropy=0.0, fluency_nll=0.0, objective=(0.5, 0.0))
    >>> [round(baseline_scale(Settings(), seed, replace(seed, score=now)), 2) for now in (0.5, 0.525, 0.6)]
    [0.5, 0.75, 1.0]
    """
    before, now = 1.0 - seed.score, 1.0 - current.score
    hope = min(1.0, max(0.0, (now / before - _OUTDONE) / (1.0 - _OUTDONE))) if before > 0 else 0.0
    return 1.0 - (1.0 - settings.baseline_scale) * hope


def explores(state: SearchState, settings: Settings, random: Random) -> bool:
    """Whether a step tries edits by chance, since what was forecast of the last ones did not come true.

    Where no single edit does much, forecasts tell noise and pass over what chance would find. The other steps
    go on forecasting, so that trust can be regained. Which these are is drawn: in a fixed order both kinds would
    keep to positions of their own.
    """
    if not settings.explore_every:
        return False
    last = _came_true(state)[-_LAST:]
    doubted = len(last) >= _ENOUGH_TO_DOUBT and not spearman(*zip(*last, strict=True)) >= _TRUSTED
    return doubted and random.random() * settings.explore_every < 1


def forecasts_are_trusted(state: SearchState) -> bool:
    """Whether enough candidates were tried, and what was predicted of them came true."""
    came_true = _came_true(state)
    return len(came_true) >= _ENOUGH and spearman(*zip(*came_true, strict=True)) >= _TRUSTED


def _came_true(state: SearchState) -> list[tuple[float, tuple[float, float]]]:
    """What was predicted and what came, of the candidates whose numbers are finite."""
    return [pair for pair in state.predictions if all(map(math.isfinite, (pair[0], *pair[1])))]
