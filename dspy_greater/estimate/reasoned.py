"""How long a search's reasonings will be, told from those of a probe.

A search moves to instructions under which the program is right more often. So the best guess at how long the model will
reason is how long it reasoned in the probe's runs that were right, under whichever of the probe's instructions. A text
that comes back on another row, such as "I answer at once.", says nothing of the row and is no reasoning: a model that
does not reason under the student's instruction will once a search has found out that it helps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.types import Evaluation, RowOutcome

_WRONG = 0.1  # what the length of a run counts that was wrong, where one that was right counts 1 more

Run = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt, and what was generated after it


@dataclass(frozen=True)
class Reasoned:
    """What the model writes under an instruction, tokens; means over runs of the program on a row.

    `runs` are those of the predictor: prompts, and what was generated up to a gold answer. `written` counts all that
    the program had written, and `longest` is the most of one run.
    """

    runs: tuple[Run, ...]
    written: float
    longest: float


@dataclass(frozen=True)
class Lengths:
    """What the model writes in a run.

    Attributes:
        student: under the student's instruction.
        low: in the shorter half of the runs that `likely` goes by, or under the student's where that is less.
        likely: in runs that were right, if the model reasoned there.
        high: in the longer half, or under the student's where that is more.
    """

    student: Reasoned
    low: Reasoned
    likely: Reasoned
    high: Reasoned


def lengths(evaluator: Evaluator, evaluations: Sequence[Evaluation], written: float) -> Lengths:
    """From evaluations of a probe, the student's first, whose runs wrote `written` tokens in all.

    What of these the record lacks (other predictors' answers, ends of turns) is shared alike among the runs.
    """
    runs = [tuple(evaluator.generated(evaluation)) for evaluation in evaluations]
    rows, told = len(evaluations[0].rows), [_written(run) for run in runs]
    rest = max(0.0, written - sum(told)) / (rows * len(evaluations))
    most = max((len(generated) for _, generated in runs[0]), default=0)
    student = Reasoned(runs[0], told[0] / rows + rest, most + rest)
    own = sorted(_own(evaluator, evaluations))
    if not own or not told[0]:
        return Lengths(student, student, student, student)
    called = sum(bool(row.inputs) for row in evaluations[0].rows)

    def as_long_as(some: Sequence[tuple[int, float]]) -> Reasoned:
        length = sum(length * weight for length, weight in some) / sum(weight for _, weight in some)
        return Reasoned(longer(runs[0], length * called / told[0]), length * called / rows + rest, some[-1][0] + rest)

    half = -(-len(own) // 2)
    ordered = sorted((as_long_as(own[:half]), student, as_long_as(own[-half:])), key=lambda guess: guess.written)
    return Lengths(student, ordered[0], as_long_as(own), ordered[-1])


def longer(runs: Sequence[Run], times: float) -> tuple[Run, ...]:
    """The runs with so many times as many tokens generated.

    >>> longer([((1,), (2, 3))], 2.5)
    (((1,), (2, 3, 2, 3, 2)),)
    """
    return tuple((prompt, tuple(islice(cycle(text), round(times * len(text))))) for prompt, text in runs)


def _own(evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> list[tuple[int, float]]:
    """Length and weight of every run that reasons on its own row; of all runs where none does."""
    runs = [(evaluation, row) for evaluation in evaluations for row in evaluation.rows if row.inputs]
    rows_of: dict[str, set[int]] = defaultdict(set)
    for _, row in runs:
        rows_of[_text(row)].add(row.row)
    own = [(evaluation, row) for evaluation, row in runs if len(rows_of[_text(row)]) == 1] or runs
    weighted = [(replace(evaluation, rows=(row,)), _WRONG + min(1.0, max(0.0, row.score))) for evaluation, row in own]
    found = [(_written(evaluator.generated(evaluation)), weight) for evaluation, weight in weighted]
    return [(length, weight) for length, weight in found if length]


def _text(row: RowOutcome) -> str:
    """What the model wrote on a row before the answer, or all of it where there is no gold answer."""
    return repr((row.preamble.strip(), row.written, [call.completion for call in row.calls]))


def _written(runs: Sequence[Run]) -> int:
    return sum(len(generated) for _, generated in runs)
