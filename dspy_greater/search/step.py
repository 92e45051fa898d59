"""What a step of a search is given, and what every kind of step can do.

`PaperStep` (`paper_step`) is Algorithm 1 as published, `DefaultStep` (`default_step`) what users run. Both are built of
small callables for proposing, ranking, forecasting and moving, so that a benchmark can put another one in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.score import Criterion
from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import StepTaken
from dspy_greater.search.state import SearchState
from dspy_greater.settings import Settings

Positions = Callable[[Sequence[int]], Sequence[int]]  # token ids of an instruction -> positions that may be changed


@dataclass(frozen=True)
class StepContext:
    """Where a search stands, and what a step works with.

    `model` is the session of this step: what several calls have in common is computed once.
    """

    evaluator: Evaluator
    model: Model
    state: SearchState
    settings: Settings
    predictor: str
    random_seed: int

    @property
    def current(self) -> Evaluation:
        """The instruction that the step edits."""
        return self.state.current

    def random(self) -> random.Random:
        """The step's source of randomness from its beginning: the same whether or not the run was interrupted."""
        return step_random(self.random_seed, self.predictor, self.state.step)


class Step(Protocol):
    """One kind of step.

    `name` is what the journal calls it, and `criterion` how instructions are compared. `needs_gold` and
    `needs_gradient` say what it cannot do without.
    """

    @property
    def name(self) -> str: ...
    @property
    def criterion(self) -> Criterion: ...
    @property
    def needs_gold(self) -> bool: ...
    @property
    def needs_gradient(self) -> bool: ...

    def take(self, at: StepContext) -> StepTaken:
        """Propose, rank, try and select, from where the search stands."""
        ...

    def move(self, state: SearchState, settings: Settings, positions: Positions) -> SearchState:
        """Where the search goes on after a step."""
        ...


def step_random(seed: int, predictor: str, step: int) -> random.Random:
    """The source of randomness of one step of one predictor's search.

    >>> step_random(0, "predict", 3).random() == step_random(0, "predict", 3).random()
    True
    """
    return random.Random(f"{seed}/{predictor}/{step}")


@dataclass(frozen=True)
class Search:
    """What stays the same from the first step of a predictor's search to the last.

    Attributes:
        evaluator: the task loss of the predictor's instruction.
        settings: T, k, q, λ, μ and the rest.
        step: lines 7 to 18 of Algorithm 1.
        predictor: the predictor's name, for events and the randomness of the steps.
        random_seed: decides which rows propose at each step.
    """

    evaluator: Evaluator
    settings: Settings
    step: Step
    predictor: str
    random_seed: int
