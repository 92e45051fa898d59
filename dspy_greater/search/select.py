"""Candidates with reasoning of their own -> the token that stays, and why (Algorithm 1, lines 14 to 18)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dspy_greater.run.events import Evaluation, RowOutcome

_ROUNDING = 1e-9  # far more than a sum of scores can be off, far less than a mistake


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
    doubt_weight: float = 0.0,
    loss_first: bool = False,
) -> Evaluation:
    """Sum up an instruction's rows: (mistake rate + weight x fluency, cross-entropy), lower is better.

    With a `doubt_weight` α the first number is smooth: each row adds α (1 - e^(-L_CE)), the chance that an answer
    which is drawn by its tokens' mean likelihood is not the gold one, and α more where the adapter found no answer.
    With `loss_first` the two numbers change places.

    Rows whose loss is not finite do not count in the cross-entropy; with none left the
    objective is infinite, because a minimum over NaN would pick it.

    Example:
        >>> row = RowOutcome(row=0, score=1.0, inputs={}, written={}, cross_entropy=0.5)
        >>> evaluation((1,), "Add.", [row], 3.0, score_fluency_weight=0.02).objective
        (0.06, 0.5)
    """
    score = sum(row.score for row in rows) / len(rows)
    finite = [row for row in rows if math.isfinite(row.cross_entropy)]
    cross_entropy = sum(row.cross_entropy for row in finite) / len(finite) if finite else math.nan
    unsure = doubt_weight * sum(map(_doubt, finite)) / max(1, len(finite))
    mistakes = 1.0 - score + unsure + score_fluency_weight * fluency_nll
    objective = (cross_entropy, mistakes) if loss_first else (mistakes, cross_entropy)
    if not all(map(math.isfinite, objective)):
        objective = (math.inf, math.inf)
    return Evaluation(token_ids, instruction, tuple(rows), score, cross_entropy, fluency_nll, objective)


def has_no_chance(
    rows: Sequence[RowOutcome], total: int, beat: float, *, best_score: float, fluency: float = 0.0
) -> bool:
    """Whether the objective's first number is above `beat` even if all rows that were not run score best.

    That number is the mistake rate plus the fluency term, so

        1 - (sum of the scores so far + best_score x rows left) / total + fluency

    bounds it from below. A bound that equals `beat` up to rounding is a chance.

    Args:
        rows: those that were run.
        total: how many rows there are.
        beat: the first number of the objective that matters.
        best_score: the most that the metric gives for a row.
        fluency: what the fluency term is at least; it is never negative.

    Example:
        >>> wrong = RowOutcome(row=0, score=0.0, inputs={}, written={}, cross_entropy=0.5)
        >>> has_no_chance([wrong], 4, 0.25, best_score=1.0), has_no_chance([wrong, wrong], 4, 0.25, best_score=1.0)
        (False, True)
    """
    most = sum(row.score for row in rows) + best_score * (total - len(rows))
    return 1.0 - most / total + fluency > beat + _ROUNDING


def given_up(
    token_ids: tuple[int, ...], instruction: str, rows: Sequence[RowOutcome], fluency_nll: float
) -> Evaluation:
    """The record of an instruction that was given up after these rows, if any; no step can choose it.

    Example:
        >>> row = RowOutcome(row=0, score=0.0, inputs={}, written={}, cross_entropy=0.5)
        >>> given_up((1,), "Guess.", [row], 3.0).objective
        (inf, inf)
    """
    score = sum(row.score for row in rows) / len(rows) if rows else math.nan
    return Evaluation(
        token_ids, instruction, tuple(rows), score, math.nan, fluency_nll, (math.inf, math.inf), complete=False
    )


def realised_change(current: Evaluation, challenger: Evaluation) -> tuple[float, float]:
    """By how much mistakes and cross-entropy per row differ, over the rows that both were run on; negative is good.

    The second is nan where no loss was taken: the challenger was given up early.

    Example:
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
    finite = [each for each in losses if math.isfinite(each)]
    return _mean(mistakes), _mean(finite)


def outdoes(
    challenger: Evaluation,
    current: Evaluation,
    *,
    noise: float = 0.0,
    doubt_weight: float = 0.0,
    loss_first: bool = False,
) -> bool:
    """Whether the challenger's objective is lower, and by more than `noise` standard errors of the paired difference.

    The difference is that of each row's share of the objective's first number: mistake and doubt, or with `loss_first`
    the cross-entropy. With `noise=0`, lower is enough.

    Example:
        >>> def score(*scores):
        ...     rows = [RowOutcome(n, each, {}, {}, 0.5) for n, each in enumerate(scores)]
        ...     return evaluation((1,), "", rows, 0.0, score_fluency_weight=0.0)
        >>> outdoes(score(1, 1, 0, 1), score(0, 1, 0, 1), noise=0.9)  # one row better, none worse
        True
        >>> outdoes(score(1, 1, 0, 1), score(0, 0, 1, 1), noise=0.9)  # two better, one worse
        False
    """
    if not challenger.objective < current.objective:
        return False
    if not math.isfinite(current.objective[0]):
        return True
    differences = [
        _cost(before, doubt_weight, loss_first) - _cost(after, doubt_weight, loss_first)
        for before, after in _paired(current, challenger)
    ]
    differences = [each for each in differences if math.isfinite(each)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return current.objective[0] - challenger.objective[0] >= noise * error


def select(
    current: Evaluation,
    challengers: Sequence[Evaluation],
    *,
    noise: float = 0.0,
    doubt_weight: float = 0.0,
    loss_first: bool = False,
    stays: bool = True,
) -> Selection:
    """Line 15: the best of the challengers and the current instruction; a tie keeps the current one.

    With `noise`, a challenger counts only if it outdoes the current instruction by that many standard errors. Unless
    the current instruction `stays` in the contest, the best challenger with a finite objective is chosen, though it be
    worse: line 14 may select others than the current token, and line 15 replaces it by one of the selected.

    Example:
        >>> row = RowOutcome(row=0, score=0.0, inputs={}, written={}, cross_entropy=0.5)
        >>> worse = evaluation((1,), "Guess.", [row], 1.0, score_fluency_weight=0.0)
        >>> select(worse, []).chosen is worse
        True
    """
    usable = [each for each in challengers if each.objective[0] < math.inf]
    early = sum(not each.complete for each in challengers)
    if not usable:
        return Selection(current, f"kept the token: {_nothing_usable(len(challengers), early)}")
    rest = f"; {early} more given up early" if early else ""
    if not stays:
        best = min(usable, key=lambda each: each.objective)
        return Selection(best, f"the best of {len(usable)} selected{rest}: {_change(current, best)}")
    better = [each for each in usable if each.objective < current.objective]
    if not better:
        return Selection(current, f"kept the token: the best of {len(usable)} did not lower the objective{rest}")
    clear = [
        each for each in better if outdoes(each, current, noise=noise, doubt_weight=doubt_weight, loss_first=loss_first)
    ]
    if not clear:
        return Selection(
            current, f"kept the token: {len(better)} of {len(usable)} were better, but within the noise{rest}"
        )
    best = min(clear, key=lambda each: each.objective)
    return Selection(best, _change(current, best))


def _change(current: Evaluation, best: Evaluation) -> str:
    gain = current.objective[0] - best.objective[0]
    return f"objective {current.objective[0]:.4f} -> {best.objective[0]:.4f} (gain {gain:.4f}), score {best.score:.3f}"


def _doubt(row: RowOutcome) -> float:
    """Between 0 and 1; where no answer was found another 1, so that a wrong answer is a step forward."""
    return float(row.unparsed) + 1.0 - math.exp(-max(0.0, row.cross_entropy))


def _cost(row: RowOutcome, doubt_weight: float, loss_first: bool) -> float:
    """A row's share of the objective; a loss that is not finite is no evidence for either side."""
    if loss_first:
        return row.cross_entropy
    return 1.0 - row.score + (doubt_weight * _doubt(row) if math.isfinite(row.cross_entropy) else 0.0)


def _paired(one: Evaluation, other: Evaluation) -> list[tuple[RowOutcome, RowOutcome]]:
    """The rows that both were run on."""
    rows = {row.row: row for row in one.rows}
    return [(rows[row.row], row) for row in other.rows if row.row in rows]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _nothing_usable(challengers: int, early: int) -> str:
    if not challengers:
        return "nothing to try at this position"
    if early == challengers:
        return f"all {early} were given up early, for they could not lower the objective"
    return "no candidate had a finite loss" + (f"; {early} given up early" if early else "")
