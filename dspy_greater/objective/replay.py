"""Reasonings at hand: what a model generated for an example, and how wrong it turned out.

Every instruction that was tried has left a reasoning on each row. Those of the current instruction are read again
under other instructions, by the estimators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dspy_greater.prompt.spans import Span


@dataclass(frozen=True)
class ReasonedSequence:
    """One call of a predictor as tokens: prompt, what was generated, and the gold answer if there is one.

    Where there is a gold answer, `generated` is the reasoning before it; otherwise all that the model wrote.
    """

    token_ids: tuple[int, ...]
    instruction: Span
    generated: Span
    answer: Span | None = None

    def under(self, instruction: Sequence[int]) -> ReasonedSequence:
        """The same with other tokens in the place of the instruction.

        >>> sequence = ReasonedSequence((1, 5, 6, 8, 9), Span(1, 3), Span(3, 5))
        >>> sequence.under([7, 7, 7]) == ReasonedSequence((1, 7, 7, 7, 8, 9), Span(1, 4), Span(4, 6))
        True
        """
        start, stop = self.instruction.start, self.instruction.stop
        by = len(instruction) - (stop - start)
        return replace(
            self,
            token_ids=(*self.token_ids[:start], *instruction, *self.token_ids[stop:]),
            instruction=Span(start, stop + by),
            generated=_moved(self.generated, by),
            answer=None if self.answer is None else _moved(self.answer, by),
        )


@dataclass(frozen=True)
class Reasoning:
    """One run of the program on one example, as far as one predictor wrote it.

    `mistake` is 1 - the metric's score; `share` is the part of its example's weight that the reasoning has: the
    reasonings of an example share a weight of 1. A predictor that was called several times has several sequences.
    """

    example: int
    mistake: float
    share: float
    sequences: tuple[ReasonedSequence, ...]

    def under(self, instruction: Sequence[int]) -> Reasoning:
        """The same under another instruction."""
        return replace(self, sequences=tuple(sequence.under(instruction) for sequence in self.sequences))


@dataclass(frozen=True)
class Replay:
    """Reasonings at hand, and by how much each turned out worse than what is assumed of others, [M] each."""

    reasonings: Sequence[Reasoning]
    advantages: Sequence[float]

    def first(self, count: int) -> Replay:
        """The first of them."""
        return Replay(self.reasonings[:count], self.advantages[:count])

    def under(self, instruction: Sequence[int]) -> Replay:
        """The same under another instruction."""
        return replace(self, reasonings=tuple(reasoning.under(instruction) for reasoning in self.reasonings))


def advantages(reasonings: Sequence[Reasoning], *, baseline_scale: float = 1.0) -> list[float]:
    """ℓ_m - b for each reasoning: how much worse it turned out than what is assumed of others; [M].

    The baseline b is `baseline_scale` times the mean mistake, by shares. Whatever becomes likelier instead of the
    reasonings at hand counts as having a mistake of b: with 1 as wrong as they are on average, with 0 never wrong.

    >>> wrong, right = Reasoning(0, 1.0, 0.5, ()), Reasoning(0, 0.0, 0.5, ())
    >>> advantages([wrong, right, Reasoning(1, 1.0, 1.0, ())])
    [0.25, -0.75, 0.25]
    >>> advantages([wrong, wrong], baseline_scale=0.5)  # all wrong: anything else is worth a try
    [0.5, 0.5]
    """
    total = math.fsum(reasoning.share for reasoning in reasonings)
    mean = math.fsum(reasoning.share * reasoning.mistake for reasoning in reasonings) / total if total else 0.0
    return [reasoning.mistake - baseline_scale * mean for reasoning in reasonings]


def _moved(span: Span, by: int) -> Span:
    return Span(span.start + by, span.stop + by)
