"""Every error this package raises on purpose, under one root.

Each message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

# What a user's program or metric may raise without ending the search: code that a model wrote may call exit().
OUTCOMES = (Exception, SystemExit, asyncio.CancelledError)


class GreaterError(Exception):
    """Root of all errors that `dspy_greater` raises on purpose."""


class SettingsError(GreaterError, ValueError):
    """A setting has a value that cannot work; raised when the optimizer is built."""


class DataError(GreaterError, ValueError):
    """The train or validation rows cannot be used; names the rows and the field."""


class MetricError(GreaterError, TypeError):
    """The metric raised on every row, or returned something that is not a score."""


class ProgramError(GreaterError, ValueError):
    """The program has nothing to optimise, or a predictor that is not supported."""


class UnusedPredictorError(ProgramError):
    """The program never calls a predictor that is to be optimised."""


class CallMismatchError(ProgramError):
    """A predictor's calls send something else than the search would score.

    `predictor` is the one that could be left out for that; it is empty where no search would be right.
    """

    def __init__(self, message: str, predictor: str = "") -> None:
        super().__init__(message)
        self.predictor = predictor


class UnvalidatedError(GreaterError, RuntimeError):
    """A search ended early, and what it had found could not be compared with the student on the validation rows.

    `program` is the student with the best instructions on the training rows, `detailed_results` the record as
    `compile` attaches it. What ended the search is the `__cause__`.
    """

    def __init__(self, message: str, *, program: Any = None, detailed_results: Any = None) -> None:
        super().__init__(message)
        self.program, self.detailed_results = program, detailed_results


class OutageError(GreaterError, ConnectionError):
    """A language model on a server gave no answer for as long as the run may wait; nothing can be said of a prompt."""


class WeightsError(GreaterError, ValueError):
    """No open weights are known for a predictor's LM, or they could not be loaded."""


class ServerError(WeightsError):
    """The server behind a predictor's LM does not answer, or not as what the search needs it to be."""


class ParityError(ServerError):
    """A server reads other prompts than the weights that are loaded here, or writes other tokens."""


class LayoutError(GreaterError, ValueError):
    """A rendered prompt could not be mapped to token ids with an instruction span."""


class ContextLengthError(LayoutError):
    """A prompt leaves no room for an answer in the model's context window."""


class EngineMemoryError(GreaterError, MemoryError):
    """One row alone does not fit into memory; `finished` has what was written for others of its batch, by place."""

    def __init__(self, message: str, *, finished: Mapping[int, Any] | None = None) -> None:
        super().__init__(message)
        self.finished = dict(finished or {})


class WorkerError(GreaterError, RuntimeError):
    """Workers could not be started, or died again and again."""


class WorkerLostError(WorkerError):
    """A worker died while it was at work; another can do the same."""


class LossError(GreaterError, ArithmeticError):
    """The task loss was not finite, too often in a row for the search to go on."""


class JudgeError(GreaterError, ValueError):
    """The judge gave no usable verdict on any output, so that no prompt can be told from another."""


class RunDirectoryError(GreaterError, OSError):
    """The run directory cannot be written, or belongs to another run."""


class MissingExtraError(GreaterError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class EventFormatError(GreaterError, ValueError):
    """A value does not have the type that its event declares, or JSON does not describe an event."""


class BudgetSpent(GreaterError):
    """The next stage would cost more LM calls or tokens than are left; it ends the loop, not the run."""


class MalformedAnswer(GreaterError):
    """An answer that cannot be used; the message tells the LM what is wrong with it."""
