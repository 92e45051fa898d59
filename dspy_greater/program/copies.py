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
    copied = _deep_copy(program, instead, originals)
    for module in [module for _, module in copied.named_sub_modules()]:
        if _is_compiled(module):
            for name in _ATTACHED:
                delattr(module, name)
    return copied


def _deep_copy(program: Any, instead: Mapping[int, Any], modules: Mapping[int, Any]) -> Any:
    """A copy in which no module is the program's own; parts of modules that cannot be copied (clients, locks) are.

    `instead` has what stands in the copy for an object, by its id.
    """
    try:
        return copy.deepcopy(program, dict(instead))
    except Exception:
        shared = dict(instead)
    for module in modules.values():
        shared |= _uncopyable(list(vars(module).values()), {**instead, **modules})
    try:
        return copy.deepcopy(program, shared)
    except Exception as error:
        raise ProgramError(
            f"The program cannot be copied, and candidates run in copies of it: {type(error).__name__}: {error}. "
            "Give the module that holds what cannot be copied a __deepcopy__."
        ) from error


def _uncopyable(value: Any, known: Mapping[int, Any]) -> dict[int, Any]:
    """What cannot be copied in the place of a module's attribute, or among the items of its containers, by id."""
    if id(value) in known:
        return {}
    parts: dict[int, Any] = {}
    for item in _items(value):
        parts |= _uncopyable(item, {**known, **parts, id(value): value})  # it may hold itself
    try:
        copy.deepcopy(value, {**known, **parts})
    except Exception:
        return parts if _holds_modules(value, set()) else {id(value): value}
    return parts


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []


def _holds_modules(value: Any, seen: set[int]) -> bool:
    """Whether a module would be shared with a container; there is no copy without one of its own then."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(isinstance(item, dspy.Module) or _holds_modules(item, seen) for item in _items(value))


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
    return [type(module).__name__ for module in _running_copies(program)]


def in_modules_that_run_copies(program: Any) -> set[int]:
    """The predictors, by `id`, that are only run in copies.

    >>> in_modules_that_run_copies(dspy.Predict("question -> answer"))
    set()
    """
    return {id(predictor) for module in _running_copies(program) for predictor in module.predictors()}


def _running_copies(program: Any) -> list[Any]:
    return [module for _, module in program.named_sub_modules() if isinstance(module, (dspy.BestOfN, dspy.Refine))]
