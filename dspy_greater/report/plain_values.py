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
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
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
                "edit": candidate.edit,
                "origin": candidate.origin,
                "text": candidate.text,
                "log_probability": candidate.log_probability,
                "gradient": candidate.gradient,
                "forecast": candidate.forecast,
                "instruction": None if candidate.evaluation is None else candidate.evaluation.instruction,
                "score": None if candidate.evaluation is None else candidate.evaluation.score,
            }
            for candidate in step.candidates
        ],
    }
