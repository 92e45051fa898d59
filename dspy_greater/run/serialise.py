"""Events as JSON values and back without loss.

A dataclass is an object with its class under "type", a tuple is an array. What JSON does not have is marked:
`{"$list": [1]}`, `{"$pairs": [[1, 2]]}` for a mapping with other keys, `{"$float": "nan"}`. An object that
cannot be written, which only a user's row can hold, becomes an `Opaque` description of itself.

Nothing is unpickled, and no class is made but those of `events` and `types`. Whether an event has the types that it
declares is for pydantic to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Rational, Real
from typing import Any, TypeAlias, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dspy_greater.errors import EventFormatError
from dspy_greater.objective import types
from dspy_greater.run import events
from dspy_greater.run.events import Event

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


@dataclass(frozen=True)
class Opaque:
    """What is left of an object that JSON cannot hold: its type's name, and 500 characters of its repr."""

    kind: str
    text: str


_KNOWN = (Opaque, *vars(types).values(), *vars(events).values())
_CLASSES: dict[str, Any] = {kind.__name__: kind for kind in _KNOWN if is_dataclass(kind)}
_TYPES = TypeAdapter[Event](Event, config=ConfigDict(strict=True, revalidate_instances="always"))


def to_json(event: Event) -> JSON:
    """The event as a value that `json.dumps(..., allow_nan=False)` accepts; `from_json` undoes it.

    Raises:
        EventFormatError: a field holds a value of another type than it declares; names the field.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> to_json(Warned("careful"))
        {'type': 'Warned', 'message': 'careful'}
    """
    data = _write(event)
    from_json(data)  # what could not be read again is not written
    return data


def from_json(data: JSON) -> Event:
    """The event that `to_json` wrote, equal to it in every bit; only objects that became `Opaque` stay so.

    Raises:
        EventFormatError: the data is not an event of this version; names the field.

    Example:
        >>> from_json({"type": "Warned", "message": "careful"})
        Warned(message='careful')
    """
    event = _read(data)
    try:
        return _TYPES.validate_python(event)
    except ValidationError as error:
        raise EventFormatError(_told(type(event).__name__, error)) from error


def as_mapping(value: object) -> dict[str, Any]:
    """What was read from JSON where a mapping should be; nothing where it is none.

    >>> as_mapping({"seed": 0}), as_mapping([1])
    ({'seed': 0}, {})
    """
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value inside nested mappings, with the keys that lead to it; an empty mapping is a value.

    >>> list(leaves({"settings": {"steps": 3}, "seed": 0}))
    [(('settings', 'steps'), 3), (('seed',), 0)]
    """
    inner = as_mapping(value)
    if not inner:
        yield path, value
    for key, item in inner.items():
        yield from leaves(item, (*path, str(key)))


def _write(value: Any) -> JSON:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Integral):  # of an array library
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    if isinstance(value, tuple):
        return [_write(entry) for entry in cast("tuple[Any, ...]", value)]
    if isinstance(value, list):
        return {"$list": [_write(entry) for entry in cast("list[Any]", value)]}
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        if all(isinstance(key, str) and key != "type" and not key.startswith("$") for key, _ in items):
            return {key: _write(entry) for key, entry in items}
        return {"$pairs": [[_write(part) for part in pair] for pair in items]}
    name = type(value).__name__
    if _CLASSES.get(name) is type(value):
        return {"type": name, **{field.name: _write(getattr(value, field.name)) for field in fields(_CLASSES[name])}}
    try:
        text = repr(value)
    except Exception as error:  # a stranger's __repr__ may raise anything; the run is worth more
        text = f"<its repr raised {type(error).__name__}>"
    return _write(Opaque(f"{type(value).__module__}.{type(value).__qualname__}", text[:500]))


def _read(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_read(entry) for entry in cast("list[Any]", data))
    if not isinstance(data, dict):
        return data
    found = cast("dict[str, Any]", data)
    if "type" in found:
        return _instance(found["type"], {name: entry for name, entry in found.items() if name != "type"})
    mark = next((key for key in found if key.startswith("$")), None)
    if mark is None:
        return {key: _read(entry) for key, entry in found.items()}
    inner: Any = _read(found[mark])
    try:
        if mark == "$float" and inner in ("nan", "inf", "-inf"):
            return float(inner)
        if mark == "$list":
            return list(inner)
        if mark == "$pairs":
            return dict(inner)
    except (TypeError, ValueError) as error:
        raise EventFormatError(f"The mark {mark!r} does not fit what it holds: {error}.") from error
    raise EventFormatError(f"It holds the mark {mark!r} with {inner!r}, which this version does not know.")


def _instance(name: object, found: dict[str, Any]) -> Any:
    """Of the named class, with its fields and no others; what was added later or is not compared may be missing."""
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise EventFormatError(f"It has the type {name!r}, which is none of {', '.join(_CLASSES)}.")
    names = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.compare and "later" not in field.metadata}
    if not needed <= set(found) <= names:
        missing, strange = sorted(needed - set(found)), sorted(set(found) - names)
        raise EventFormatError(f"It does not have the fields of {name}: missing {missing}, unknown {strange}.")
    return kind(**{name: _read(entry) for name, entry in found.items()})


def _told(name: str, error: ValidationError) -> str:
    """The first thing that is wrong with an event of this class, and where."""
    for detail in error.errors(include_url=False):
        where, value = ".".join(map(str, detail["loc"])), detail["input"]
        if detail["loc"][0] == name:
            kind = value.kind if isinstance(value, Opaque) else type(value).__name__
            return f"{where} is of type {kind}. {detail['msg']}."
    return f"It is of type {name}, which is no event."
