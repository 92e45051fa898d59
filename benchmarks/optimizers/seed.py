"""`seed`: no optimizer at all, the row that every other one has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import dspy

from benchmarks.optimizers.optimizer import Context


class Seed:
    """Returns the student as it is: what the seed instruction scores, and what a cell costs besides."""

    name = "seed"
    about = "the seed instruction, unchanged"

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The student."""
        return student
