"""`gepa`: `dspy.GEPA` (arXiv 2507.19457), with its published defaults and its longest preset.

GEPA has no default length. `auto="heavy"` only sets how many metric calls it may make, so that the budget ends it.
Minibatches of 3 come from `train`, the Pareto front is over `dev`, and the proposer is the reflection model. The
metric is ours; where GEPA asks for feedback on a predictor it is told the score and the row's expected values, as
DSPy's tutorials do and as other optimizers here see them too.

The seed decides minibatches, parents and merges: a run repeats as far as the two models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from benchmarks.optimizers.optimizer import Context, Metric
from benchmarks.tasks import answers


class Gepa:
    """Reflective evolution along a Pareto front.

    Args:
        **settings: arguments of `dspy.GEPA` in place of its own.
    """

    name = "gepa"
    about = "dspy.GEPA with its defaults, auto='heavy' so that the budget ends it; feedback: score and gold values"
    defaults: dict[str, Any] = {"auto": "heavy"}

    def __init__(self, **settings: Any) -> None:
        self._settings = {**self.defaults, **settings}

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program that `GEPA.compile` returns."""
        optimizer = dspy.GEPA(
            metric=with_feedback(context.metric),
            reflection_lm=context.prompt_lm,
            seed=context.seed,
            **self._settings,
        )
        return optimizer.compile(student, trainset=list(train), valset=list(dev))


def with_feedback(metric: Metric) -> Metric:
    """The metric with GEPA's five arguments: the bare score, and feedback where that is asked for."""

    def scored(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
        score = metric(gold, pred, trace)
        if pred_name is None:
            return score
        expected = "\n".join(f"{name}: {value}" for name, value in answers.expected(gold).items())
        verdict = "That is right." if score >= 1 else f"That is wrong; the score is {score:g}."
        return dspy.Prediction(score=score, feedback=f"{verdict} Expected was\n{expected}")

    return scored
