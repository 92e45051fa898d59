"""How far does right reasoning explain the gain? Answers under seed and found instruction, by what was reasoned before.

A reasoning is right when it is one of the two workings of its question that the pocket model was taught, in full or in
short, word for word: a stricter test than a right answer, which a guess passes half of the time where there are two.
With s the share of right reasonings and a₁, a₀ the accuracy after right and after other ones, accuracy is
s a₁ + (1 - s) a₀. Its gain splits into a part through right reasoning, the change of s times the mean of a₁ - a₀ before
and after, and the rest, the changes of a₁ and a₀ at the mean of s. Where there was none of one kind before or after,
the other time's accuracy stands for both. The table shows a₁ and a₀ of both times together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy_greater.pocket.tasks import work_out


@dataclass(frozen=True)
class Answered:
    """How many rows had a right or another reasoning, and a right or a wrong answer after it."""

    count: Mapping[tuple[bool, bool], int]  # (reasoning is right, answer is right) -> rows

    def __add__(self, other: Answered) -> Answered:
        return Answered(Counter(self.count) + Counter(other.count))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self._share(lambda _, answer: answer)

    @property
    def reasoned(self) -> float:
        """s: share of right reasonings."""
        return self._share(lambda reasoning, _: reasoning)

    def after(self, reasoning: bool) -> float | None:
        """a₁ or a₀: share of right answers after right or other reasonings; None where there are none."""
        right, wrong = self.count.get((reasoning, True), 0), self.count.get((reasoning, False), 0)
        return right / (right + wrong) if right + wrong else None

    def _share(self, holds: Any) -> float:
        return sum(rows for key, rows in self.count.items() if holds(*key)) / sum(self.count.values())


def answered(task: str, found: Sequence[tuple[Any, Any, Any]]) -> Answered:
    """Of (row, prediction, score), the rows being of a task that the pocket model knows how to work out."""
    return Answered(Counter((is_right(task, row.question, said.get("reasoning")), bool(ok)) for row, said, ok in found))


def is_right(task: str, question: str, reasoning: str | None) -> bool:
    """Whether a reasoning is a working of the question, in full or in short.

    >>> is_right("boolean_expressions", "not True is", "not True = False")
    True
    >>> is_right("boolean_expressions", "not True is", "I answer at once.")
    False
    """
    working = work_out(task, question)
    return (reasoning or "").strip() in (working.full.strip(), working.sketch.strip())


def through_reasoning(before: Answered, after: Answered) -> float:
    """The part of the gain in accuracy that came with more right reasonings.

    >>> guessed = Answered({(False, True): 5, (False, False): 5})
    >>> reasoned = Answered({(True, True): 8, (False, True): 1, (False, False): 1})
    >>> round(through_reasoning(guessed, reasoned), 2), round(reasoned.accuracy - guessed.accuracy, 2)
    (0.4, 0.4)
    """
    right = [each for each in (before.after(True), after.after(True)) if each is not None]
    other = [each for each in (before.after(False), after.after(False)) if each is not None]
    if not right or not other:  # all reasonings were of one kind, before and after
        return 0.0
    return (after.reasoned - before.reasoned) * (sum(right) / len(right) - sum(other) / len(other))


def table(pairs: Mapping[str, tuple[Answered, Answered]]) -> str:
    """Markdown: a row per task, from its seed and its found instructions."""
    head = [
        "task",
        "right reasoning, %",
        "answers right after it, %",
        "after any other, %",
        "gain, points",
        "through it",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for task, (before, after) in pairs.items():
        gain, part = after.accuracy - before.accuracy, through_reasoning(before, after)
        both = before + after
        lines.append(
            f"| {task} | {100 * before.reasoned:.0f} → {100 * after.reasoned:.0f} | {_percent(both.after(True))} "
            f"| {_percent(both.after(False))} | {100 * gain:+.0f} | {100 * part:+.0f} |"
        )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"
