"""Whether the rows' inputs are those that the program takes, as far as that can be told without running it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from dspy_greater.errors import DataError, ProgramError
from dspy_greater.program.predictors import Predictor

_LONGEST = 120  # characters of a row in a message


def refuse_without_inputs(predictor: Predictor) -> None:
    """Raises `ProgramError` for a predictor without input fields: all rows are the same to it."""
    if not predictor.input_fields:
        raise ProgramError(
            f"Predictor `{predictor.name}` has no input field, so that its prompt is the same for every row and there "
            "is nothing to search on. Give its signature an input field, as in 'question -> answer', or leave the "
            "predictor out: predictors=[...] names those that are optimised."
        )


def refuse_strange_inputs(program: Any, rows: Sequence[Any], *, name: str = "trainset") -> None:
    """Raises `DataError` when the program cannot be called with the inputs of any of the rows.

    Looked at are the parameters of its `forward`, and the signature of a bare `dspy.Predict` or `dspy.ChainOfThought`.
    Where only some rows do not fit, those fail when they are run.
    """
    if not rows or any(_takes(program, row.inputs()) for row in rows):
        return
    given = list(rows[0].inputs())
    raise DataError(
        f"The inputs of the rows of the {name} are {named(given)}, and the program takes {named(_taken(program))}. "
        f"Rename them, or say which fields are inputs with example.with_inputs({_arguments(_taken(program))})."
    )


def named(names: Sequence[str]) -> str:
    """Names for a message.

    >>> named(["question", "context"]), named([])
    ('`question`, `context`', 'nothing')
    """
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def shortened(value: object) -> str:
    """The beginning of a value's repr.

    >>> shortened({"question": "x" * 500})[-20:]
    'xxxxxxxxxxxxxxxxx...'
    """
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _takes(program: Any, inputs: Mapping[str, Any]) -> bool:
    fields = _fields(program)
    if fields is not None:
        return not fields or bool(set(fields) & set(inputs))
    signature = _signature(program)
    if signature is None:
        return True
    try:
        signature.bind(program, **inputs)
    except TypeError:
        return False
    return True


def _taken(program: Any) -> list[str]:
    signature = _signature(program)
    _, *parameters = signature.parameters.values() if signature else (None,)
    names = [
        parameter.name
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return _fields(program) or names


def _fields(program: Any) -> list[str] | None:
    """The input fields of a program that hands its arguments to one predictor as they are."""
    forward = getattr(type(program), "forward", None)
    if forward is dspy.Predict.forward:
        return list(program.signature.input_fields)
    return list(program.predict.signature.input_fields) if forward is dspy.ChainOfThought.forward else None


def _signature(program: Any) -> inspect.Signature | None:
    """Of the `forward` of the program's class, `self` included; None where something else answers a call."""
    forward = getattr(type(program), "forward", None)
    if type(program).__call__ is not dspy.Module.__call__ or not inspect.isfunction(forward):
        return None
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


def _arguments(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "..."
