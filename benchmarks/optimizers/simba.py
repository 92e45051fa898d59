"""`simba`: `dspy.SIMBA`, with its published defaults: 8 steps, minibatches of 32, 6 candidates, up to 4 demonstrations.

The proposer writes the rules. SIMBA takes one set of rows, `train`, and compares its last candidates there; `dev` is
left to the comparison, which lets the best candidates meet there. It departs in one place: where
there are fewer than 32 training rows, which SIMBA would refuse, a minibatch is all of them.

SIMBA does not evaluate through `dspy.Evaluate`. What it scores is therefore reported row by row, but for the
trajectories that it samples at temperature 1, which is not how a program is judged.

The seed decides minibatches, parents, strategies and demonstrations that are dropped. Trajectories are sampled at
temperature 1, so a run repeats as far as the task model does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from benchmarks.optimizers.optimizer import Context

BATCH = 32


class Simba:
    """Rules and demonstrations from the rows whose outcome varies most.

    Args:
        **settings: arguments of `dspy.SIMBA` in place of its own.
    """

    name = "simba"
    about = "dspy.SIMBA with its defaults: 8 steps of 32 rows, 6 candidates; candidates are scored on train"

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program that `SIMBA.compile` returns."""
        watch = _Watch(student, context)
        settings = {"bsize": min(BATCH, len(train)), **self._settings}
        callbacks = [*dspy.settings.get("callbacks", []), watch]
        with dspy.context(callbacks=callbacks):
            optimizer = dspy.SIMBA(metric=watch.metric, prompt_model=context.prompt_lm, **settings)
            return optimizer.compile(student, trainset=list(train), seed=context.seed)


class _Watch(BaseCallback):
    """Knows which program a thread ran last when the metric is called there, as SIMBA does right after the run."""

    def __init__(self, student: dspy.Module, context: Context) -> None:
        self._kind, self._context = type(student), context
        self._last = threading.local()

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember the program; its own parts are modules of another kind."""
        if type(instance) is self._kind:
            self._last.program = instance

    def metric(self, example: Any, prediction: Any, trace: Any = None) -> float:
        """The metric; 0 where the program failed, which SIMBA leaves to the metric."""
        score = 0.0 if prediction is None else self._context.metric(example, prediction, trace)
        program = self._last.program
        if not any(_samples(predictor) for predictor in program.predictors()):
            self._context.budget.record(program, score, 1)
        return score


def _samples(predictor: Any) -> bool:
    """Whether SIMBA gave the predictor an LM of its own, to sample a trajectory."""
    return predictor.lm is not None and predictor.lm.kwargs.get("rollout_id") is not None
