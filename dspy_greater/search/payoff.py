"""What a kind of step has paid: how often it led to fewer mistakes than anything before, and at which price.

A search has two kinds of step: edits of the instruction, and whole instructions that the model writes. Which of them
leads on depends on the model. A small one that knows its task only by its words gains from tokens, and writes nothing
of use when asked; a larger one hardly minds a token more, and gains from another sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DIFFERENTIATE = 2.0  # a backward pass, in forward passes


@dataclass(frozen=True)
class Payoff:
    """The record of one kind of step; tokens are those of all its steps together."""

    steps: int = 0
    paid: int = 0  # steps that led to fewer mistakes than any before
    read: int = 0
    differentiated: int = 0
    written: int = 0

    def after(self, spent: Mapping[str, int], paid: bool) -> Payoff:
        """With one step more, and with what it spent.

        >>> Payoff().after({"prefilled_tokens": 900, "generated_tokens": 50}, paid=True)
        Payoff(steps=1, paid=1, read=900, differentiated=0, written=50)
        """
        return Payoff(
            self.steps + 1,
            self.paid + paid,
            self.read + spent.get("prefilled_tokens", 0),
            self.differentiated + spent.get("backward_tokens", 0),
            self.written + spent.get("generated_tokens", 0),
        )

    @property
    def chance(self) -> float:
        """That its next step pays, by Laplace's rule of succession.

        >>> Payoff().chance, Payoff(steps=1, paid=1).chance, Payoff(steps=2).chance
        (0.5, 0.6666666666666666, 0.25)
        """
        return (self.paid + 1) / (self.steps + 2)

    def price(self, write_price: float) -> float:
        """Of one of its steps, in tokens read; `write_price` is that of a token written."""
        tokens = self.read + DIFFERENTIATE * self.differentiated + write_price * self.written
        return tokens / max(1, self.steps)

    def is_ahead_of(self, other: Payoff, write_price: float) -> bool:
        """Whether its next step pays more likely, for its price, than one of the other kind; the first step is its.

        A kind that was not tried yet counts as being as dear as this one.

        >>> tried, untried = Payoff().after({"prefilled_tokens": 900}, paid=False), Payoff()
        >>> untried.is_ahead_of(untried, 4.0), tried.is_ahead_of(untried, 4.0)
        (True, False)
        """
        if not self.steps:
            return True
        price = self.price(write_price)
        others = other.price(write_price) if other.steps else price
        return self.chance * others > other.chance * price


UNTRIED = Payoff()
