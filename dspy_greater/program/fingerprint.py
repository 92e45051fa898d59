"""What a run depends on, in a form that a journal can keep: rows and predictors by digest, never by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from pydantic import TypeAdapter

from dspy_greater.program.predictors import Predictor
from dspy_greater.scalars import plain_scalar

JSON = Any  # what `json.dumps` takes

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NUMBERS = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed")  # as they are
_OTHERS = (  # by digest
    *("top_k", "min_p", "n", "stop", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
    *("reasoning_effort", "thinking", "chat_template_kwargs", "extra_body", "response_format", "tools", "tool_choice"),
)


def row_key(row: Any) -> str:
    """An example's fields as text; equal for equal rows."""
    return _canonical(row.toDict())


def fingerprint(rows: Sequence[Any]) -> str:
    """A digest of examples, in their order."""
    return _digest(row.toDict() for row in rows)


def described_lm(lm: Any) -> dict[str, JSON]:
    """What an LM's answers depend on, as far as it cannot be a secret."""
    known = {name: plain_scalar(value) for name, value in (getattr(lm, "kwargs", None) or {}).items()}
    numbers = {name: known[name] for name in _NUMBERS if isinstance(known.get(name), (int, float))}
    others = {name: _digest([{name: known[name]}]) for name in _OTHERS if known.get(name) is not None}
    return {"lm": str(getattr(lm, "model", lm)), "sampling": numbers | others}


def described(predictor: Predictor) -> dict[str, JSON]:
    """What a predictor's answers depend on."""
    return {
        "instruction": predictor.instruction,
        "signature": predictor.signature.signature,
        "fields": _digest(_field(name, info) for name, info in predictor.signature.fields.items()),
        "adapter": type(predictor.adapter).__name__,
        "demos": _digest(dict(demo) for demo in predictor.demos) if predictor.demos else None,
        **described_lm(predictor.lm),
    }


def _field(name: str, info: Any) -> dict[str, JSON]:
    """What an adapter tells of a field: what it is for, and which values it may have."""
    extra = info.json_schema_extra or {}
    output = extra.get("__dspy_field_type") == "output"
    told = {key: extra.get(key) for key in ("desc", "prefix", "constraints")}
    spelt = _ADDRESS.sub("", str(info.annotation))
    return {"name": name, "type": spelt, "values": _values(info.annotation) if output else None, **told}


def _values(annotation: Any) -> JSON:
    """The values of a type; nothing of one that is no data."""
    try:
        return TypeAdapter(annotation).json_schema()
    except Exception:  # a type may have a schema of its own, or values that are no data
        return None


def _digest(values: Iterable[Mapping[str, Any]]) -> str:
    return hashlib.sha256("\n".join(map(_canonical, values)).encode()).hexdigest()[:16]


def _canonical(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, sort_keys=True, default=_as_text)
    except (TypeError, ValueError, RecursionError):  # keys that are no text; objects that hold themselves
        plain = _with_text_keys(values)
    try:
        return json.dumps(plain, sort_keys=True, default=_as_text)
    except (ValueError, RecursionError):
        return json.dumps(plain, sort_keys=True, default=_as_type)


def _with_text_keys(value: Any, depth: int = 20) -> JSON:
    if depth == 0:
        return _as_type(value)
    if isinstance(value, Mapping):
        return {repr(key): _with_text_keys(part, depth - 1) for key, part in value.items()}
    return [_with_text_keys(part, depth - 1) for part in value] if isinstance(value, (list, tuple)) else value


def _as_type(value: object) -> str:
    return type(value).__qualname__


def _as_text(value: object) -> JSON:
    """The same in each process, where a set has another order, and an object another address."""
    if isinstance(value, Set):
        return sorted(map(repr, value))
    nameless = type(value).__str__ is object.__str__ and type(value).__repr__ is object.__repr__
    if not nameless:
        return _ADDRESS.sub("", str(value))
    slots = {
        name: getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())
    }
    return [_as_type(value), _with_text_keys({**slots, **getattr(value, "__dict__", {})})]
