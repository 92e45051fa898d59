"""Modules that run copies of a program, whose predictors nobody sees."""

from __future__ import annotations

from typing import Any

import dspy


def modules_that_run_copies(program: Any) -> list[str]:
    """The class names of those that the program holds.

    >>> modules_that_run_copies(dspy.Predict("question -> answer"))
    []
    """
    modules: Any = program.named_sub_modules()
    return [type(module).__name__ for _, module in modules if isinstance(module, (dspy.BestOfN, dspy.Refine))]
