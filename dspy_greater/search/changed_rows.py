"""What a winner fixed and broke on the validation rows, for whoever reads of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dspy_greater.program.rollout import Rollout, plain
from dspy_greater.program.tracing import PredictorCall
from dspy_greater.run.events import ChangedRow

_LONGEST_TEXT = 20_000  # characters of one text


def changed_rows(rows: Sequence[Any], seed: Sequence[Rollout], winner: Sequence[Rollout]) -> tuple[ChangedRow, ...]:
    """The rows whose scores differ, with what every predictor wrote for them under the seed and under the winner.

    Args:
        rows: the validation rows.
        seed: the program's runs on them with the seed instruction.
        winner: the same with the winner.
    """
    return tuple(
        ChangedRow(
            row,
            _texts(rows[row].inputs()),
            _texts(rows[row].labels()),
            tuple(map(_written, before.trace)),
            tuple(map(_written, after.trace)),
            (before.error, after.error),
        )
        for row, (before, after) in enumerate(zip(seed, winner, strict=True))
        if not (before.score == after.score or (math.isnan(before.score) and math.isnan(after.score)))
    )


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(plain(value))[:_LONGEST_TEXT] for name, value in fields.items()}


def _written(call: PredictorCall) -> tuple[str, str]:
    """The predictor, and all that it wrote: thoughts that a server returns apart first."""
    return call.predictor, "\n".join(text for text in (call.thoughts, call.completion) if text)[:_LONGEST_TEXT]
