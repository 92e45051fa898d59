"""The kinds of step by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Literal

from dspy_greater.errors import SettingsError
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.paper_step import PaperStep
from dspy_greater.search.step import Step

Variant = Literal["default", "paper"]

VARIANTS: Mapping[str, Step] = {"default": DefaultStep(), "paper": PaperStep()}
_OF_A_STEP = ("name", "criterion", "needs_gold", "needs_gradient", "take", "move")


def step_of(variant: Variant | Step) -> Step:
    """The step that a name stands for, or the given one.

    Raises:
        SettingsError: an unknown name, or something that is no step.

    >>> step_of("paper").name
    'paper'
    """
    if isinstance(variant, str):
        if variant in VARIANTS:
            return VARIANTS[variant]
    elif not isinstance(variant, type) and all(hasattr(variant, name) for name in _OF_A_STEP):
        return variant
    raise SettingsError(f"variant={variant!r} is not known. Use one of {', '.join(map(repr, VARIANTS))}, or a step.")


def described_step(step: Step) -> dict[str, str]:
    """What a journal keeps of a step: its name, and which callables it is built of."""
    parts: dict[str, Any] = {}
    if is_dataclass(step):
        parts = {field.name: getattr(step, field.name) for field in fields(step)}
    return {"class": type(step).__qualname__, **{name: _told(part) for name, part in parts.items()}}


def _told(part: Any) -> str:
    """The same in every process: no address in memory."""
    if isinstance(part, partial):
        given = [*map(_told, part.args), *(f"{name}={_told(value)}" for name, value in part.keywords.items())]
        return f"{_told(part.func)}({', '.join(given)})"
    if type(part).__repr__ is object.__repr__:
        return type(part).__qualname__
    return getattr(part, "__qualname__", None) or repr(part)
