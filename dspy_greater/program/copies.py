"""Copies of a DSPy program: those that share its language models, that have other instructions, that modules run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import dspy

from dspy_greater.errors import ProgramError

# What the optimizers attach to the program that they return.
_ATTACHED = {"candidate_programs", "detailed_results", "score"}


def copy_program(program: Any) -> Any:
    """A deep copy of a program that shares its language models: weights are never copied.

    What an optimizer attached to it stays behind: a program that is compiled again would carry all the
    candidates of every earlier time, each with candidates of its own.
    """
    instead: dict[int, Any] = {}
    originals = {id(module): module for _, module in program.named_sub_modules()}
    for module in originals.values():
        instead |= {id(value): value for value in vars(module).values() if isinstance(value, dspy.BaseLM)}
        if _is_compiled(module):
            instead[id(module.candidate_programs)] = []
    try:
        copied = copy.deepcopy(program, instead)
    except Exception:  # parts that cannot be copied: DSPy shares those
        copied = program.deepcopy()
    for module in [module for _, module in copied.named_sub_modules()]:
        if id(module) not in originals and _is_compiled(module):
            for name in _ATTACHED:
                delattr(module, name)
    return copied


def with_instructions(program: Any, texts: Mapping[str, str]) -> Any:
    """A copy of the program with new instructions for the predictors named in `texts`.

    Raises `ProgramError` when there is no such predictor.
    """
    copied = copy_program(program)
    predictors = dict(copied.named_predictors())
    for name, text in texts.items():
        if name not in predictors:
            known = ", ".join(f"`{known}`" for known in predictors) or "none"
            raise ProgramError(f"The program has no predictor `{name}`; it has {known}.")
        predictors[name].signature = predictors[name].signature.with_instructions(text)
    return copied


def _is_compiled(module: Any) -> bool:
    """Whether an optimizer attached its results; a program may have a `score` of its own."""
    attached = vars(module)
    return attached.keys() >= _ATTACHED and isinstance(attached["candidate_programs"], list)


def modules_that_run_copies(program: Any) -> list[str]:
    """The class names of the program's modules that run copies of others, whose predictors nobody sees.

    >>> modules_that_run_copies(dspy.Predict("question -> answer"))
    []
    """
    modules: Any = program.named_sub_modules()
    return [type(module).__name__ for _, module in modules if isinstance(module, (dspy.BestOfN, dspy.Refine))]
