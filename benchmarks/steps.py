"""Steps that the package does not ship: its own, with chance or a lesser gradient in a part's place."""

from __future__ import annotations

from collections.abc import Sequence

from dspy_greater.objective.types import Evaluation
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.paper_step import PaperStep, Ranked, by_gradient_through
from dspy_greater.search.step import StepContext


def by_chance(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
    """Line 14 of Algorithm 1 without a gradient: the current token and the proposed ones in random order."""
    tokens = [stands, *candidates]
    return Ranked(tuple(at.random().sample(tokens, len(tokens))), {})


def by_answer_gradient(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
    """The paper's gradient with an empty reasoning before the answer: the ablation of its figure 3."""
    return by_gradient_through(at, at.evaluator.supervised(current, reasoned=False), candidates)


CHANCE = DefaultStep(rank=None, forecast=None, name="chance", needs_gradient=False)
PAPER_CHANCE = PaperStep(rank=by_chance, name="paper, by chance", needs_gradient=False)
WITHOUT_REASONING = PaperStep(rank=by_answer_gradient, name="paper, without reasoning")
