"""The criterion by which instructions are compared: rows -> one evaluation with its objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.stats import mean


@dataclass(frozen=True)
class Criterion:
    """By what instructions are compared, beside mistakes and fluency.

    The paper's losses only break ties. The default counts how uncertain the gold answers are, a smooth number where
    mistakes are coarse, and takes the loss of a row in which no answer was found over the header that is missing, too.
    """

    counts_uncertainty: bool = True
    counts_missing_header: bool = True


DEFAULT_CRITERION = Criterion()
PAPER_CRITERION = Criterion(counts_uncertainty=False, counts_missing_header=False)


def likeliest(cross_entropies: Iterable[float]) -> int:
    """Which of a row's acceptable answers counts: that of the least loss, of equals the first; 0 if none is finite.

    Example:
        >>> likeliest([2.0, 0.5, 0.5]), likeliest([math.nan, 3.0]), likeliest([math.nan])
        (1, 1, 0)
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in cross_entropies]
    return losses.index(min(losses))


def evaluation(
    token_ids: tuple[int, ...],
    instruction: str,
    rows: Sequence[RowOutcome],
    fluency_nll: float,
    *,
    score_fluency_weight: float,
    uncertainty_weight: float = 0.0,
) -> Evaluation:
    """Sum up an instruction's rows: (mistake rate + weight x fluency, cross-entropy), lower is better.

    With a `uncertainty_weight` α the first number is smooth: each row adds α (1 - e^(-L_CE)), the chance that an answer
    which is drawn by its tokens' mean likelihood is not the gold one, and α more where the adapter found no answer.

    Rows whose loss is not finite do not count in the cross-entropy; with none left the
    objective is infinite, because a minimum over NaN would pick it.

    Example:
        >>> row = RowOutcome(row=0, score=1.0, inputs={}, written={}, cross_entropy=0.5)
        >>> evaluation((1,), "Add.", [row], 3.0, score_fluency_weight=0.02).objective
        (0.06, 0.5)
    """
    score = mean([row.score for row in rows])
    finite = [row for row in rows if math.isfinite(row.cross_entropy)]
    cross_entropy = mean([row.cross_entropy for row in finite])
    uncertain = uncertainty_weight * sum(map(answer_uncertainty, finite)) / max(1, len(finite))
    mistakes = 1.0 - score + uncertain + score_fluency_weight * fluency_nll
    objective = (mistakes, cross_entropy)
    if not all(map(math.isfinite, objective)):
        objective = (math.inf, math.inf)
    return Evaluation(token_ids, instruction, tuple(rows), score, cross_entropy, fluency_nll, objective)


def answer_uncertainty(row: RowOutcome) -> float:
    """Between 0 and 1; where no answer was found another 1, so that a wrong answer is a step forward."""
    return float(row.unparsed) + 1.0 - math.exp(-max(0.0, row.cross_entropy))
