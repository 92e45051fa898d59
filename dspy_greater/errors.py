"""Every error this package raises on purpose, under one root.

Each message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


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


class WeightsError(GreaterError, ValueError):
    """No open weights are known for a predictor's LM, or they could not be loaded."""


class LayoutError(GreaterError, ValueError):
    """A rendered prompt could not be mapped to token ids with an instruction span."""


class ContextLengthError(LayoutError):
    """A prompt leaves no room for an answer in the model's context window."""


class EngineMemoryError(GreaterError, MemoryError):
    """One row alone does not fit into memory."""


class LossError(GreaterError, ArithmeticError):
    """The task loss was not finite, too often in a row for the search to go on."""


class JudgeError(GreaterError, ValueError):
    """The judge gave no usable verdict on any output, so that no prompt can be told from another."""


class RunDirectoryError(GreaterError, OSError):
    """The run directory cannot be written, or belongs to another run."""


class EventFormatError(GreaterError, ValueError):
    """A value does not have the type that its event declares, or JSON does not describe an event."""


class BudgetSpent(GreaterError):
    """The next stage would cost more LM calls or tokens than are left; it ends the loop, not the run."""


class MalformedAnswer(GreaterError):
    """An answer that cannot be used; the message tells the LM what is wrong with it."""
