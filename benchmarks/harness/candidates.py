"""What an optimizer has tried: instructions and demonstrations of a program, and how they scored on how many rows."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from benchmarks.harness.cells import wilson
from dspy_greater.errors import DataError

MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class Candidate:
    """The part of a program that optimizers write, predictor by predictor; equal parts are one candidate."""

    instructions: tuple[tuple[str, str], ...]
    demos: tuple[tuple[str, str], ...] = ()  # predictor -> its demonstrations as JSON

    @classmethod
    def of(cls, program: dspy.Module | Mapping[str, str]) -> Candidate:
        """The candidate that a program is, or that a mapping from predictor to instruction describes."""
        if isinstance(program, Mapping):
            return cls(tuple(program.items()))
        demos = {name: predictor.demos for name, predictor in program.named_predictors() if predictor.demos}
        return cls(
            tuple(instructions_of(program).items()),
            tuple((name, _demos_as_text(each)) for name, each in demos.items()),
        )

    def fits(self, program: dspy.Module) -> bool:
        """Whether its predictors are among the program's."""
        names = {name for name, _ in program.named_predictors()}
        return bool(self.instructions) and {name for name, _ in self.instructions} <= names

    def written_to(self, program: dspy.Module) -> dspy.Module:
        """A copy of the program with these instructions and demonstrations."""
        copied, texts, demos = program.deepcopy(), dict(self.instructions), dict(self.demos)
        named: list[tuple[str, Any]] = copied.named_predictors()
        for name, predictor in named:
            if name in texts:
                predictor.signature = predictor.signature.with_instructions(texts[name])
            predictor.demos = [dspy.Example(**demo) for demo in json.loads(demos.get(name, "[]"))]
        return copied


def instructions_of(program: dspy.Module) -> dict[str, str]:
    """Predictor name -> instruction."""
    named: list[tuple[str, Any]] = program.named_predictors()
    return {name: predictor.signature.instructions for name, predictor in named}


def _demos_as_text(demos: Sequence[Any]) -> str:
    return json.dumps([dict(demo) for demo in demos], default=str, sort_keys=True)


@dataclass(frozen=True)
class Scored:
    """A candidate with the mean of all scores that were reported for it."""

    candidate: Candidate
    score: float
    rows: int

    @property
    def assured(self) -> float:
        """The lower end of the score's 95 % interval (Wilson): three rows of three are no match for 95 of 100."""
        return wilson(self.score, self.rows)[0]


class Notebook:
    """Every candidate that an optimizer scored, whoever reports it; many threads may write.

    Example:
        >>> notebook = Notebook()
        >>> notebook.record({"predict": "Think."}, 0.5, 10)
        >>> notebook.record({"predict": "Think."}, 1.0, 30)
        >>> [(best.score, best.rows) for best in notebook.best(3)]
        [(0.875, 40)]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[Candidate, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def record(self, program: dspy.Module | Mapping[str, str] | Candidate, score: float, rows: int) -> None:
        """Add a score, the mean over that many rows, from 0 to 1.

        Raises:
            DataError: it is not such a score.
        """
        if rows < 1 or not math.isfinite(score) or not 0 <= score <= 1:
            raise DataError(f"A score of {score!r} on {rows!r} rows: give a mean from 0 to 1 and at least one row.")
        candidate = program if isinstance(program, Candidate) else Candidate.of(program)
        with self._lock:
            total, count = self._sums.get(candidate, (0.0, 0))
            if count or len(self._sums) < MOST_REMEMBERED:
                self._sums[candidate] = (total + score * rows, count + rows)

    def best(self, count: int) -> list[Scored]:
        """The best of them, by the lower end of the score's interval; the earlier one of two that tie."""
        with self._lock:
            scored = [Scored(candidate, total / rows, rows) for candidate, (total, rows) in self._sums.items()]
        return sorted(scored, key=lambda each: -each.assured)[:count]


class EvaluationWatch(BaseCallback):
    """Records what `dspy.Evaluate` finds, for optimizers that evaluate through it."""

    def __init__(self, notebook: Notebook, student: dspy.Module) -> None:
        self._notebook, self._student = notebook, student
        self._open: dict[str, Candidate] = {}

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember the program as it is now: an optimizer may go on to change it."""
        program = inputs.get("program")
        if isinstance(program, dspy.Module):
            candidate = Candidate.of(program)
            if candidate.fits(self._student):
                self._open[call_id] = candidate

    def on_evaluate_end(self, call_id: str, outputs: Any | None, exception: BaseException | None = None) -> None:
        """Record the score, unless the evaluation was cut short."""
        candidate = self._open.pop(call_id, None)
        results = getattr(outputs, "results", None)
        score = getattr(outputs, "score", -1.0)
        if candidate is not None and exception is None and results and 0 <= score <= 100:
            self._notebook.record(candidate, score / 100, len(results))
