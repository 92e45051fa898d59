"""Candidates with reasoning of their own -> the token that stays, and why (Algorithm 1, lines 14 to 18)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.stats import mean


@dataclass(frozen=True)
class Selection:
    """The instruction after a step, and the reason for it in words."""

    chosen: Evaluation
    reason: str


def realised_change(current: Evaluation, challenger: Evaluation) -> tuple[float, float]:
    """By how much mistakes and cross-entropy per row differ, on the same rows; negative is good.

    Example:
        >>> from dspy_greater.objective.score import evaluation
        >>> right = RowOutcome(row=0, score=1.0, inputs={}, written={}, cross_entropy=0.5)
        >>> wrong = RowOutcome(row=0, score=0.0, inputs={}, written={}, cross_entropy=2.0)
        >>> before, after = (
        ...     evaluation((1,), text, [row], 0.0, score_fluency_weight=0.0)
        ...     for text, row in [("Guess.", wrong), ("Think.", right)]
        ... )
        >>> realised_change(before, after)
        (-1.0, -1.5)
    """
    pairs = _paired(current, challenger)
    mistakes = [before.score - after.score for before, after in pairs]
    losses = [after.cross_entropy - before.cross_entropy for before, after in pairs]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return mean(mistakes), mean(finite)


def select(
    current: Evaluation, challengers: Sequence[Evaluation], *, stays: bool = True, what: str = "token"
) -> Selection:
    """Line 15: the best of the challengers and the current instruction; a tie keeps the current one.

    Unless the current instruction `stays` in the contest, the best challenger with a finite objective is chosen, though
    it be worse: line 14 may select others than the current token, and line 15 replaces it by one of the selected.
    `what` is kept otherwise, for the reason in words.

    Example:
        >>> from dspy_greater.objective.score import evaluation
        >>> row = RowOutcome(row=0, score=0.0, inputs={}, written={}, cross_entropy=0.5)
        >>> worse = evaluation((1,), "Guess.", [row], 1.0, score_fluency_weight=0.0)
        >>> select(worse, []).chosen is worse
        True
    """
    usable = [challenger for challenger in challengers if challenger.objective[0] < math.inf]
    if not usable:
        why = "no candidate had a finite loss" if challengers else "nothing to try at this position"
        return Selection(current, f"kept the {what}: {why}")
    best = min(usable, key=lambda challenger: challenger.objective)
    if not stays:
        return Selection(best, f"the best of {len(usable)} selected: {_change(current, best)}")
    if not best.objective < current.objective:
        return Selection(current, f"kept the {what}: the best of {len(usable)} did not lower the objective")
    return Selection(best, _change(current, best))


def _change(current: Evaluation, best: Evaluation) -> str:
    gain = current.objective[0] - best.objective[0]
    return f"objective {current.objective[0]:.4f} -> {best.objective[0]:.4f} (gain {gain:.4f}), score {best.score:.3f}"


def _paired(one: Evaluation, other: Evaluation) -> list[tuple[RowOutcome, RowOutcome]]:
    """The rows that both were run on."""
    rows = {row.row: row for row in one.rows}
    return [(rows[row.row], row) for row in other.rows if row.row in rows]
