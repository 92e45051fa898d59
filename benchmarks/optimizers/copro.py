"""`copro`: `dspy.COPRO`, with its published defaults: 10 instructions a round, 3 rounds, temperature 1.4.

The proposer writes the instructions, and every one of them is scored on all of `train`; COPRO takes one set of rows
only, so `dev` is left to the comparison, which lets the best candidates meet there. COPRO also proposes a prefix for
the last output field, which DSPy's chat adapter does not render.

It takes no seed: a run repeats as far as the two models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from benchmarks.optimizers.optimizer import Context


class Copro:
    """Coordinate ascent over instructions, from their scores.

    Args:
        **settings: arguments of `dspy.COPRO` in place of its own.
    """

    name = "copro"
    about = "dspy.COPRO with its defaults: breadth 10, depth 3; candidates are scored on train"

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program that `COPRO.compile` returns."""
        optimizer = dspy.COPRO(prompt_model=context.prompt_lm, metric=context.metric, **self._settings)
        return optimizer.compile(student, trainset=list(train), eval_kwargs={"display_progress": False})
