"""`miprov2` and `miprov2-0shot`: `dspy.MIPROv2` (arXiv 2406.11695), with its published defaults.

The default preset, `auto="light"`, with at most 4 bootstrapped and 4 labelled demonstrations; `miprov2-0shot`
allows none and optimises the instruction alone. Demonstrations are bootstrapped on `train` by the task model,
instructions are written by the proposer, and both are chosen on `dev`.

The seed decides demonstrations, tips and Optuna's sampler. Bootstrapping samples the task model at temperature 1, so a
run repeats as far as the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy
import optuna  # noqa: F401  MIPROv2 asks for it only after it has spent part of the budget

from benchmarks.optimizers.optimizer import Context


class Mipro:
    """Instructions and demonstrations, chosen together.

    Args:
        **settings: arguments of `dspy.MIPROv2` in place of its own; `num_trials`, `minibatch` and `minibatch_size`
            go to its `compile`.
    """

    name = "miprov2"
    about = "dspy.MIPROv2 with its defaults: auto='light', up to 4 bootstrapped and 4 labelled demonstrations"
    defaults: dict[str, Any] = {}

    def __init__(self, **settings: Any) -> None:
        merged = {**self.defaults, **settings}
        of_compile = ("num_trials", "minibatch", "minibatch_size")
        self._compile = {name: merged.pop(name) for name in of_compile if name in merged}
        self._settings = merged

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The program that `MIPROv2.compile` returns."""
        optimizer = dspy.MIPROv2(
            metric=context.metric,
            prompt_model=context.prompt_lm,
            task_model=context.task_lm,
            seed=context.seed,
            **self._settings,
        )
        return optimizer.compile(student, trainset=list(train), valset=list(dev), **self._compile)


class MiproZeroShot(Mipro):
    """Instructions alone."""

    name = "miprov2-0shot"
    about = "dspy.MIPROv2 without demonstrations: auto='light', the instruction alone"
    defaults = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0}
