"""What an instruction is worth: on one call, on one row, on all rows, and as a candidate of a step.

These are the nouns that a search speaks in. Frozen dataclasses of plain values, so that events can hold them and
a journal can keep them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallOutcome:
    """One call of the predictor on one row: what it was given, and the text that the model wrote."""

    inputs: dict[str, object]
    completion: str
    demos: tuple[dict[str, object], ...] | None = None  # of this call, where it had others than the predictor
    limit: int | None = None  # of tokens: a text that reached it was cut off, and no end of the turn follows it


@dataclass(frozen=True)
class RowOutcome:
    """One training row under one instruction."""

    row: int
    score: float  # the user's metric; 0.0 when the row failed
    inputs: dict[str, object]  # of the predictor's own call; empty when it was not called
    written: dict[str, object]  # output fields before the supervised one: the reasoning
    cross_entropy: float  # of the gold answer after that reasoning, the least of all; NaN when not finite or not taken
    error: str | None = None  # why the row failed, if it did
    preamble: str = ""  # what the model wrote before its first field: a native <think> block
    calls: tuple[CallOutcome, ...] = ()  # every call of the predictor, where there is no gold value
    unparsed: bool = False  # the model did not write the field that has a gold value
    demos: tuple[dict[str, object], ...] | None = None  # as in `CallOutcome`, where there is a gold value
    answer: int = 0  # of the row's acceptable answers the one that counts: the likeliest after that reasoning


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
class Trial:
    """What an instruction came to on the few rows on which it reasoned first."""

    rows: int
    score: float  # mean of the metric


@dataclass(frozen=True)
class Candidate:
    """A token, a phrase or a whole instruction that was proposed, and what became of it."""

    token: int  # the first one
    text: str
    log_probability: float  # mean over the proposal contexts, nats
    gradient: float | None  # its slope, lower is better; `variant="paper"`: relative to the current token's
    evaluation: Evaluation | None  # None when it was not selected
    edit: str = "replace"  # "insert": before the position; "delete": the token that was there; "rewrite": all of it
    forecast: float | None = None  # predicted change of the expected loss, off-policy
    effective_samples: float | None = None  # how many reasonings carry the forecast
    realised: tuple[float, float] | None = None  # change of mistake rate and of cross-entropy, on the same rows
    trial: Trial | None = field(default=None, metadata={"later": True})  # of a whole instruction
    origin: str = "token"  # "phrase": several; whole instructions: "written" by the model, "form" of a right answer
