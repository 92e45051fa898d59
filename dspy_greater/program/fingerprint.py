"""What a run depends on, in a form that a journal can keep: rows and predictors by digest, never by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from dspy_greater.program.predictors import Predictor
from dspy_greater.scalars import plain_scalar

JSON = Any  # what `json.dumps` takes

_SAMPLING = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed")


def row_key(row: Any) -> str:
    """An example's fields as text; equal for equal rows."""
    return _canonical(row.toDict())


def fingerprint(rows: Sequence[Any]) -> str:
    """A digest of examples, in their order."""
    return _digest(row.toDict() for row in rows)


def described_lm(lm: Any) -> dict[str, JSON]:
    """What an LM's answers depend on, as far as it cannot be a secret."""
    known = {name: plain_scalar(value) for name, value in (getattr(lm, "kwargs", None) or {}).items()}
    return {
        "lm": str(getattr(lm, "model", lm)),
        "sampling": {name: known[name] for name in _SAMPLING if isinstance(known.get(name), (int, float))},
    }


def described(predictor: Predictor) -> dict[str, JSON]:
    """What a predictor's answers depend on."""
    return {
        "instruction": predictor.instruction,
        "signature": predictor.signature.signature,
        "adapter": type(predictor.adapter).__name__,
        "demos": _digest(dict(demo) for demo in predictor.demos) if predictor.demos else None,
        **described_lm(predictor.lm),
    }


def _digest(values: Iterable[Mapping[str, Any]]) -> str:
    return hashlib.sha256("\n".join(map(_canonical, values)).encode()).hexdigest()[:16]


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=_as_text)


def _as_text(value: object) -> JSON:
    return sorted(map(repr, value)) if isinstance(value, Set) else str(value)  # a set has another order in each process
