"""What a kind of step has paid: how often it led to fewer mistakes than anything before.

A search has two kinds of step: edits of the instruction, and whole instructions that the model writes. They cost about
the same, and which of them leads on depends on the model. A small one that knows its task only by its words gains from
tokens, and writes nothing of use when asked; a larger one hardly minds a token more, and gains from another sentence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Payoff:
    """The record of one kind of step: how many were taken, and how many led to fewer mistakes than any before.

    No tokens are counted here: what a step reads depends on the memory and the workers that there are, and the same
    search has to come again with others.
    """

    steps: int = 0
    paid: int = 0

    def after(self, paid: bool) -> Payoff:
        """With one step more.

        >>> Payoff().after(paid=True).after(paid=False)
        Payoff(steps=2, paid=1)
        """
        return Payoff(self.steps + 1, self.paid + paid)

    @property
    def chance(self) -> float:
        """That the next step of this kind pays, by Laplace's rule of succession.

        >>> Payoff(0, 0).chance, Payoff(1, 1).chance, Payoff(2, 0).chance
        (0.5, 0.6666666666666666, 0.25)
        """
        return (self.paid + 1) / (self.steps + 2)
