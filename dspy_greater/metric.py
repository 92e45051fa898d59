"""A user's metric -> a number per row: bool, float, or anything with a `score`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspy_greater.errors import OUTCOMES, MetricError

Metric = Callable[..., Any]
METRIC_FAILED = "the metric"  # how the error of a row begins that the metric failed on


@dataclass(frozen=True)
class Score:
    """What a metric said of one row.

    `error` says why it counts as a failure, if it does; `feedback` is the text that came with a score.
    """

    value: float
    error: str | None = None
    feedback: str | None = field(default=None, compare=False)


class RowMetric:
    """Calls a metric as DSPy's evaluation does, `metric(example, prediction)`, and coerces the result.

    A metric that raises, or returns NaN, makes its row a failure (0.0). One that returns
    something that is no score at all is a mistake in the metric and is reported at once.
    What it takes besides (`trace`, and two more in GEPA's form) is left at its default, or None.
    It may call language models itself, as a judge does. It is never differentiated.

    A score is a finite number, larger where the prediction is better. Nothing keeps it between 0 and 1: a metric
    may count points, or take some away.

    Raises:
        MetricError: there is no metric, or it is not callable.

    Example:
        >>> RowMetric(lambda example, prediction, trace=None: example == prediction)(1, 1)
        Score(value=1.0, error=None, feedback=None)
    """

    def __init__(self, metric: Metric | None) -> None:
        if metric is None:
            raise MetricError(
                "There is no metric. Pass one as GReaTer(metric=...) or compile(student, trainset, metric)."
            )
        if not callable(metric):
            raise MetricError(
                f"metric={metric!r} cannot be called. Pass a function metric(example, prediction, trace=None) -> "
                "number, to GReaTer(metric=...) or to compile(..., metric=...)."
            )
        self.function = metric
        self._extra = _extra_arguments(metric)

    @property
    def name(self) -> str:
        """What the metric is called: the same in every process."""
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def __call__(self, example: Any, prediction: Any) -> Score:
        """The score of one row.

        Raises:
            MetricError: the metric returned something that is not a score.
        """
        try:
            value = self.function(example, prediction, *self._extra)
        except MetricError:
            raise
        except OUTCOMES as error:  # a user's metric may fail on a row; the row then counts as wrong
            return Score(0.0, f"{METRIC_FAILED} raised {type(error).__name__}: {error}")
        return _coerced(value)

    def late(self, example: Any, prediction: Any) -> Score:
        """The score of one row once the metric has proven itself: what is no score then makes its row a failure."""
        try:
            return self(example, prediction)
        except MetricError as error:
            return Score(0.0, f"{METRIC_FAILED} gave no score: {error}")


def refuse_useless_metric(*runs: Sequence[str | None], rows: str = "training rows") -> None:
    """Raises `MetricError` when the errors of all rows of all runs are the metric's own.

    Args:
        runs: for each run over the rows, why each row failed, or None where it did not.
        rows: what the rows are, for the message.
    """
    errors = [error for run in runs for error in run]
    if errors and all((error or "").startswith(METRIC_FAILED) for error in errors):
        raise MetricError(
            f"The metric failed on all {len(runs[0])} {rows}; on the first, {errors[0]}. Try "
            "metric(row, program(**row.inputs())) on one of them and mend it."
        )


def _extra_arguments(metric: Metric) -> tuple[None, ...]:
    """None for each parameter that has to be given after (example, prediction): `trace`, and GEPA's two more."""
    try:
        parameters = inspect.signature(metric).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(None for parameter in positional[2:] if parameter.default is parameter.empty)


def _coerced(value: Any) -> Score:
    if inspect.iscoroutine(value):
        value.close()
        raise MetricError(
            "The metric is asynchronous: it returned a coroutine, which is not a score. Pass an ordinary function; "
            "dspy.syncify turns an asynchronous module into one."
        )
    score = value
    feedback = None
    if not isinstance(value, (bool, int, float)):
        score, feedback = _part(value, "score", value), _part(value, "feedback", None)
    to_python = getattr(score, "item", None)
    if callable(to_python) and math.prod(getattr(score, "shape", ())) == 1:
        score = to_python()  # a number of numpy or torch
    if not isinstance(score, (bool, int, float)):
        raise MetricError(
            f"The metric returned {value!r} of type {type(value).__name__}, which is not a score. Return a bool, a "
            "number, or a dspy.Prediction(score=...)."
        )
    if math.isnan(score) or math.isinf(score):
        return Score(0.0, f"{METRIC_FAILED} returned {score}")
    return Score(float(score), feedback=str(feedback) if feedback else None)


def _part(value: Any, name: str, absent: Any) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, absent)
