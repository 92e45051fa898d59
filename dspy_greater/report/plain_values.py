"""Results as plain values, of which JSON can be made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dspy_greater.run.events import StepTaken
from dspy_greater.run.log import edit_of


def finite(value: Any) -> Any:
    """Lists and mappings of plain values with None in the place of nan and infinities, which JSON does not have.

    >>> finite({"loss": math.nan, "rows": (0.5, 1)})
    {'loss': None, 'rows': [0.5, 1]}
    """
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_as_dict(step: StepTaken) -> dict[str, Any]:
    """What a step did, and what became of its candidates."""
    return {
        "step": step.step,
        "position": step.position,
        "edit": edit_of(step),
        "instruction": step.chosen.instruction,
        "score": step.chosen.score,
        "cross_entropy": step.chosen.cross_entropy,
        "reason": step.reason,
        "spent": step.spent,
        "candidates": [
            {
                "edit": each.edit,
                "origin": each.origin,
                "text": each.text,
                "log_probability": each.log_probability,
                "gradient": each.gradient,
                "forecast": each.forecast,
                "instruction": None if each.evaluation is None else each.evaluation.instruction,
                "score": None if each.evaluation is None else each.evaluation.score,
            }
            for each in step.candidates
        ],
    }
