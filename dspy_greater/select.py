"""Candidates with reasoning of their own -> the token that stays, and why (Algorithm 1, lines 14 to 18)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .run.events import Evaluation, RowOutcome


@dataclass(frozen=True)
class Selection:
    """The instruction after a step, and the reason for it in words."""

    chosen: Evaluation
    reason: str


def evaluation(
    token_ids: tuple[int, ...],
    instruction: str,
    rows: Sequence[RowOutcome],
    fluency_nll: float,
    *,
    score_fluency_weight: float,
) -> Evaluation:
    """Sum up an instruction's rows: (mistake rate + weight x fluency, cross-entropy), lower is better.

    Rows whose loss is not finite do not count in the cross-entropy; with none left the
    objective is infinite, because a minimum over NaN would pick it.

    Example:
        >>> row = RowOutcome(row=0, score=1.0, inputs={}, written={}, cross_entropy=0.5)
        >>> evaluation((1,), "Add.", [row], 3.0, score_fluency_weight=0.02).objective
        (0.06, 0.5)
    """
    score = sum(row.score for row in rows) / len(rows)
    finite = [row.cross_entropy for row in rows if math.isfinite(row.cross_entropy)]
    cross_entropy = sum(finite) / len(finite) if finite else math.nan
    objective = (1.0 - score + score_fluency_weight * fluency_nll, cross_entropy)
    if not all(map(math.isfinite, objective)):
        objective = (math.inf, math.inf)
    return Evaluation(token_ids, instruction, tuple(rows), score, cross_entropy, fluency_nll, objective)


def select(current: Evaluation, challengers: Sequence[Evaluation]) -> Selection:
    """Line 15: the best of the challengers and the current instruction; a tie keeps the current one.

    Example:
        >>> row = RowOutcome(row=0, score=0.0, inputs={}, written={}, cross_entropy=0.5)
        >>> worse = evaluation((1,), "Guess.", [row], 1.0, score_fluency_weight=0.0)
        >>> select(worse, []).chosen is worse
        True
    """
    usable = [each for each in challengers if each.objective[0] < math.inf]
    if not usable:
        why = "no candidate had a finite loss" if challengers else "nothing to try at this position"
        return Selection(current, f"kept the token: {why}")
    best = min(usable, key=lambda each: each.objective)
    if best.objective >= current.objective:
        return Selection(current, f"kept the token: the best of {len(usable)} did not lower the objective")
    gain = current.objective[0] - best.objective[0]
    return Selection(
        best,
        f"objective {current.objective[0]:.4f} -> {best.objective[0]:.4f} (gain {gain:.4f}), score {best.score:.3f}",
    )
