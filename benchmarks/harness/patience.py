"""Rows that take long are run once, as every other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dspy.utils.parallelizer import ParallelExecutor


@contextlib.contextmanager
def rows_run_once() -> Iterator[None]:
    """Inside, `dspy.Evaluate` and `dspy.Parallel` wait for their last rows, however long these take.

    By default they run the last three rows again after two minutes, beside the runs that are under way. On a CPU that
    several cells share a row may take that long, and an optimizer that evaluates through DSPy would pay for it twice.
    """
    make: Any = ParallelExecutor.__init__

    def made_patient(self: ParallelExecutor, *arguments: Any, **settings: Any) -> None:
        make(self, *arguments, **settings)
        self.timeout = 0

    ParallelExecutor.__init__ = made_patient
    try:
        yield
    finally:
        ParallelExecutor.__init__ = make
