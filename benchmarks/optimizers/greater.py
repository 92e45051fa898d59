"""This package's own optimizer, in the variants that the comparison tells apart.

- `greater`: `GReaTerTeleprompter` in its default variant and at the paper's sizes (`auto=None`: 105 steps, 50 rows), so
  that the budget ends the search and not a preset. It is told the budget's prices: a token written costs what one that
  is read costs.
- `greater-paper`: Algorithm 1 of GReaTer (arXiv 2412.09722) with the paper's values.
- `greater-no-reasoning`: the paper's ablation. It is `greater-paper` in all but the gradient, which is taken of the
  answer alone, without the reasoning before it.
- `random-search`: `greater` in all but the gradient: the same proposals, of which chance chooses.

Training rows are `train`, and `dev` is the validation set. The proposer is not used: the task model proposes. A search
that the budget ends has recorded every instruction that it ran on all of its rows. The same seed gives the same
search on a CPU in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from benchmarks.optimizers.optimizer import Context
from benchmarks.steps import CHANCE, WITHOUT_REASONING
from dspy_greater import GReaTerTeleprompter
from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import Event, SearchStarted, StepTaken, Validated


class Greater:
    """Gradients over reasoning, as this package does them by default.

    Args:
        **settings: arguments of `GReaTerTeleprompter` in place of its own, and of `defaults`.
    """

    name = "greater"
    about = "GReaTerTeleprompter, default variant, 105 steps, 50 rows"
    needs_weights = True
    defaults: dict[str, Any] = {"auto": None, "write_price": 1.0}  # a budget charges all tokens alike

    def __init__(self, **settings: Any) -> None:
        self._settings = {**self.defaults, **settings}

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program that `GReaTerTeleprompter.compile` returns."""
        optimizer = GReaTerTeleprompter(
            context.metric,
            seed=context.seed,
            log_dir=context.log_dir / "greater",
            listeners=[Recorder(context)],
            progress=False,
            **self._settings,
        )
        return optimizer.compile(student, list(train), valset=list(dev))


class GreaterPaper(Greater):
    """Algorithm 1 as published."""

    name = "greater-paper"
    about = "Algorithm 1 of GReaTer (arXiv 2412.09722) with the paper's values: 105 steps, 50 rows, k=10, μ=3"
    defaults = {"variant": "paper", "auto": None}


class GreaterNoReasoning(Greater):
    """The paper's ablation."""

    name = "greater-no-reasoning"
    about = "the paper's ablation: greater-paper with the gradient of the answer alone, without reasoning"
    defaults = {**GreaterPaper.defaults, "variant": WITHOUT_REASONING}


class RandomSearch(Greater):
    """What the gradient is worth."""

    name = "random-search"
    about = "greater with the same proposals and no gradient: chance chooses which of them are tried"
    defaults = {**Greater.defaults, "variant": CHANCE}


class Recorder:
    """Reports to the budget what the search scored: each instruction once per set of rows."""

    def __init__(self, context: Context) -> None:
        self._budget = context.budget
        self._found: dict[str, str] = {}  # instructions of the predictors that are finished
        self._known: set[tuple[str, str]] = set()

    def __call__(self, event: Event) -> None:
        """Record what the event tells."""
        if isinstance(event, SearchStarted):
            self._evaluated(event.predictor, event.seed)
        elif isinstance(event, StepTaken):
            for candidate in event.candidates:
                self._evaluated(event.predictor, candidate.evaluation)
            self._evaluated(event.predictor, event.chosen)
            self._budget.check()  # a step whose candidates were all known called no program, and still cost tokens
        elif isinstance(event, Validated):
            self._found[event.predictor] = event.winner

    def _evaluated(self, predictor: str, evaluation: Evaluation | None) -> None:
        if evaluation is None or (predictor, evaluation.instruction) in self._known:
            return
        self._known.add((predictor, evaluation.instruction))
        prompts = {**self._found, predictor: evaluation.instruction}
        self._budget.record(prompts, evaluation.score, len(evaluation.rows))
