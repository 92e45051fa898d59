"""Which tokens of a sequence are its instruction, its reasoning and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspy_greater.errors import LayoutError


@dataclass(frozen=True)
class Span:
    """A half-open range `[start, stop)` of token indices."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Prompt:
    """A prompt up to where the assistant starts to write: x and p of the paper."""

    token_ids: tuple[int, ...]
    instruction: Span


@dataclass(frozen=True)
class Supervised:
    """A prompt with reasoning, the answer's header and the gold value: x, p, r, p_extract and y.

    `answer` ends the sequence and covers the gold value, with the header of its field only where that was asked for;
    `reasoning` is what the assistant writes before the header of the supervised field, and may be empty.
    """

    token_ids: tuple[int, ...]
    instruction: Span
    reasoning: Span
    answer: Span


@dataclass(frozen=True)
class Written:
    """A prompt with what a model wrote after it: x, p, and all of the assistant's turn.

    `completion` ends the sequence; its last token is the end of the turn unless the text was cut off.
    """

    token_ids: tuple[int, ...]
    instruction: Span
    completion: Span


def covering(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> Span:
    """The tokens that overlap the characters `[start, stop)`; raises `LayoutError` when none does."""
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and a < b]
    if not overlapping:
        raise LayoutError("No token covers the instruction. Give the predictor an instruction with words.")
    return Span(overlapping[0], overlapping[-1] + 1)
