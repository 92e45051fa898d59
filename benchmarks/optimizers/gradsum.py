"""`gradsum`: this package's `GradSumTeleprompter`, with the metric as the judge.

It follows GRAD-SUM (arXiv 2407.12865) with the paper's values: a beam of 3, 10 iterations, 30 rows, 3 candidates per
edit. It departs where the comparison asks for it: the task's metric scores outputs in the place of an LM judge. The
gradients, summaries and edits are the proposer's; the module prompts are the package's own, since the paper's are not
public. `train` is sampled, and the last beam meets the seed on `dev`. The same seed gives the same run as far as the
two models repeat themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import dspy

from benchmarks.optimizers.optimizer import Context
from dspy_greater import GradSumTeleprompter
from dspy_greater.run.events import Event, IterationTaken, Output


class GradSum:
    """Textual gradients, summarised.

    Args:
        **settings: arguments of `GradSumTeleprompter` in place of its own.
    """

    name = "gradsum"
    about = "GradSumTeleprompter (GRAD-SUM, arXiv 2407.12865, the paper's values); the metric judges, not an LM"

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program that `GradSumTeleprompter.compile` returns."""
        optimizer = GradSumTeleprompter(
            context.requests.about,
            metric=context.metric,
            gradient_lm=context.prompt_lm,
            editor_lm=context.prompt_lm,
            seed=context.seed,
            log_dir=context.log_dir / "gradsum",
            listeners=[Recorder(context)],
            progress=False,
            **self._settings,
        )
        return optimizer.compile(student, list(train), valset=list(dev))


class Recorder:
    """Reports to the budget what the loop scored: prompts on a row count once, as they are run on it once."""

    def __init__(self, context: Context) -> None:
        self._budget = context.budget
        self._known: dict[tuple[tuple[str, str], ...], set[int]] = {}

    def __call__(self, event: Event) -> None:
        """Record what the event tells."""
        if isinstance(event, IterationTaken):
            for each in (*event.members, *event.compared):
                self._scored(each.prompts, each.outputs)

    def _scored(self, prompts: dict[str, str], outputs: Iterable[Output]) -> None:
        known = self._known.setdefault(tuple(sorted(prompts.items())), set())
        new = {output.row: output.metric or 0.0 for output in outputs if output.row not in known}
        known.update(new)
        if new:
            self._budget.record(prompts, sum(new.values()) / len(new), len(new))
