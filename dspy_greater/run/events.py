"""What the search says while it works. The algorithm emits; progress bar, journal and callbacks listen.

Every event is a frozen dataclass of plain values, so that it can be written as JSON
and read back without loss (`to_json`, `from_json`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RowOutcome:
    """One training row under one instruction."""

    row: int
    score: float  # the user's metric; 0.0 when the row failed
    inputs: dict[str, object]  # of the predictor's own call; empty when it was not called
    written: dict[str, object]  # output fields before the supervised one: the reasoning
    cross_entropy: float  # of the gold answer after that reasoning; NaN when not finite
    error: str | None = None  # why the row failed, if it did


@dataclass(frozen=True)
class Evaluation:
    """One instruction on all training rows, with reasoning of its own.

    `objective` is (mistake rate + weighted fluency, cross-entropy), compared left to
    right; lower is better. It is infinite when no row has a finite loss.
    """

    token_ids: tuple[int, ...]
    instruction: str
    rows: tuple[RowOutcome, ...]
    score: float  # mean of the metric over the rows
    cross_entropy: float  # mean over the rows with a finite loss
    fluency_nll: float  # nats per instruction token
    objective: tuple[float, float]


@dataclass(frozen=True)
class Candidate:
    """A token that was proposed for a position, and what became of it."""

    token: int
    text: str
    log_probability: float  # mean over the proposal contexts, nats
    gradient: float | None  # summed over the rows, relative to the current token's
    evaluation: Evaluation | None  # None when the gradient did not select it


@dataclass(frozen=True)
class SearchStarted:
    """A predictor's search begins from the seed instruction."""

    predictor: str
    seed: Evaluation
    steps: int


@dataclass(frozen=True)
class StepTaken:
    """One step of Algorithm 1: a position was proposed for, differentiated and decided."""

    predictor: str
    step: int
    position: int
    current_token: int
    candidates: tuple[Candidate, ...]
    chosen: Evaluation  # the instruction after the step
    reason: str  # why, in words
    spent: dict[str, int]  # the engine's counters, this step


@dataclass(frozen=True)
class Validated:
    """The finalists of a predictor on the validation rows; `scores` by instruction, the seed first."""

    predictor: str
    scores: dict[str, float]
    winner: str


@dataclass(frozen=True)
class Warned:
    """Something the user should know, once."""

    message: str


Event = SearchStarted | StepTaken | Validated | Warned
Listener = Callable[[Event], None]
