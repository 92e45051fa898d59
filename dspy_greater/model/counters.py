"""What an engine has computed: the unit of budgets, cost reports and regression tests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Counters:
    """What an engine has computed so far; the numbers only grow, and `later - earlier` is the cost between.

    Attributes:
        forwards: forward passes of the model.
        prefilled_tokens: prompt tokens read, without padding; a prefix that rows share counts once.
        generated_tokens: tokens written, without the stop token.
        padded_tokens: token slots computed for nothing (padding, rows that had already finished).
        lm_head_rows: hidden states turned into vocabulary logits.
        backward_tokens: tokens of forward passes that a backward pass went through.

    Example:
        >>> Counters(forwards=5) - Counters(forwards=2) == Counters(forwards=3)
        True
    """

    forwards: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    padded_tokens: int = 0
    lm_head_rows: int = 0
    backward_tokens: int = 0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Tally:
    """Counters that many threads add to.

    >>> tally = Tally()
    >>> tally.add(forwards=1)
    >>> tally.total
    Counters(forwards=1, prefilled_tokens=0, generated_tokens=0, padded_tokens=0, lm_head_rows=0, backward_tokens=0)
    """

    def __init__(self) -> None:
        self.total = Counters()
        self._lock = threading.Lock()

    def add(self, **increments: int) -> None:
        """Add to the counters that are named."""
        with self._lock:
            self.total = self.total + Counters(**increments)
