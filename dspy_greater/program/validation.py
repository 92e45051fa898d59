"""Finalists and the seed on the validation rows: the floor under every optimizer's result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy

from dspy_greater.metric import RowMetric, refuse_useless_metric
from dspy_greater.notices import warn_caller
from dspy_greater.program.inputs import shortened
from dspy_greater.program.rollout import Rollout, Running, plain, roll_out, searching_copy

_TELLING = 8  # rows


def validation_scores(
    program: Any,
    finalists: Sequence[Mapping[str, str]],
    rows: Sequence[Any],
    metric: RowMetric,
    *,
    running: Running,
    heard: Callable[[list[list[Rollout]]], object] | None = None,
) -> list[tuple[float, ...]]:
    """The metric of each finalist on each row, run as it will be deployed.

    Args:
        program: a program in which every predictor holds its LM.
        finalists: instructions by predictor name; what is not named stays as it is in `program`.
        rows: the validation rows.
        metric: the user's metric.
        running: how they are run.
        heard: is told the runs of each finalist, row by row.

    Raises:
        MetricError: the metric failed on every row of every finalist, so that its zeros compare nothing.
        OutageError: a server gave no answer on a row of the first finalist, or on no row at all, for longer than the
            run waits.
        ProgramError: the language model never answered.
    """
    programs = [searching_copy(program, texts) for texts in finalists]
    rollouts = roll_out(programs, rows, metric.late, running, deployed=True)
    refuse_useless_metric(*([rollout.error for rollout in group] for group in rollouts), rows="validation rows")
    if heard is not None:
        heard(rollouts)
    warn_of_failed_metric(rows, rollouts)
    return [tuple(rollout.score for rollout in group) for group in rollouts]


def warn_of_failed_metric(rows: Sequence[Any], runs: Sequence[Sequence[Rollout]]) -> None:
    """Warn where the metric failed on validation rows; `runs` are those of each finalist, row by row."""
    failed = [(row, rollout) for group in runs for row, rollout in enumerate(group) if rollout.failure == "metric"]
    if failed:
        row, first = failed[0]
        warn_caller(
            f"The metric failed on {len({row for row, _ in failed})} of {len(rows)} validation rows, which count as "
            f"mistakes. On the row {shortened(dict(rows[row].inputs()))}, {first.error}.",
            RuntimeWarning,
        )


def warn_of_one_answer(rows: Sequence[Any], runs: Sequence[Rollout]) -> None:
    """Warn where a program gives all rows one answer while their gold values differ: its score is that value's share.

    Args:
        rows: the validation rows; fewer than eight may have one answer by chance, and say nothing.
        runs: the program's runs on them.
    """
    predictions = [run.prediction for run in runs if isinstance(run.prediction, dspy.Prediction)]
    for name in {str(name): None for row in rows for name in row.labels()}:
        golds = [repr(plain(row.labels()[name])) for row in rows if name in row.labels()]
        given = [repr(plain(prediction[name])) for prediction in predictions if name in prediction]
        if len(given) == len(golds) >= _TELLING and len(set(golds)) > 1 and len(set(given)) == 1:
            answer = shortened(plain(predictions[0][name]))
            warn_caller(
                f"The program that was found answers all {len(given)} validation rows with {answer} in the field "
                f"`{name}`, while their gold values differ. Its score says how common that answer is among them, and "
                "nothing of other rows; give rows with other answers, or a metric that weighs each answer alike.",
                RuntimeWarning,
            )


def winner(scores: Sequence[float] | Sequence[tuple[float, ...]]) -> int:
    """Index of the best score, the first of equals: with the seed at 0, a tie keeps the seed.

    Scores of several parts are compared from left to right.

    Example:
        >>> winner([0.5, 0.75, 0.75]), winner([0.5, 0.5])
        (1, 0)
    """
    return max(range(len(scores)), key=lambda index: scores[index])
