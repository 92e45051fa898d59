"""Events as JSON values and back without loss, driven by the type hints of their dataclasses.

Nothing is unpickled and no class is looked up by a name from the file: a reader gets only the
dataclasses that its own type hint lists. What is written is standard JSON, so a float that JSON does not
have is written as `{"$float": "nan"}`. Where the hint says `object`, JSON's own values are kept
as they are, tuples and mappings with other keys are marked (`$tuple`, `$pairs`), and any other object
becomes an `Opaque` description of itself.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias, Union, cast, get_args, get_origin
from typing import get_type_hints as resolve_type_hints

from dspy_greater.errors import GreaterError
from dspy_greater.run.events import Event

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

_LONGEST_DESCRIPTION = 500  # characters of an object that cannot be written


class EventFormatError(GreaterError, ValueError):
    """A value does not have the type that its event declares, or JSON does not describe an event."""


@dataclass(frozen=True)
class Opaque:
    """What is left of an object that JSON cannot hold: its type's name, and 500 characters of its repr."""

    type: str
    text: str


@dataclass(frozen=True)
class _Codec:
    """Both directions for one type hint; the second argument of each says where, for the error."""

    encode: Callable[[Any, str], JSON]
    decode: Callable[[Any, str], Any]


def to_json(event: Event) -> JSON:
    """The event as a value that `json.dumps(..., allow_nan=False)` accepts; `from_json` undoes it.

    Raises:
        EventFormatError: a field holds a value of another type than it declares; names the field.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> to_json(Warned("careful"))
        {'type': 'Warned', 'message': 'careful'}
    """
    return encode(event, Event)


def from_json(data: JSON) -> Event:
    """The event that `to_json` wrote, equal to it in every bit; only objects that became `Opaque` stay so.

    Raises:
        EventFormatError: the data is not an event of this version; names the field.

    Example:
        >>> from_json({"type": "Warned", "message": "careful"})
        Warned(message='careful')
    """
    return cast("Event", decode(data, Event))


def encode(value: object, hint: Any) -> JSON:
    """A value of type `hint` as JSON.

    `hint` may be made of dataclasses, unions, Literal, tuple, list, dict and Mapping, the scalar
    types, None and object. A union of several dataclasses is marked by their class names under "type".

    Raises:
        EventFormatError: the value is not of that type, or the hint is not one of these.

    Example:
        >>> encode((1.5, None), tuple[float | None, ...])
        [1.5, None]
    """
    return _codec(hint).encode(value, _name(hint))


def decode(data: JSON, hint: Any) -> Any:
    """The value of type `hint` that `encode` wrote.

    Raises:
        EventFormatError: the data does not fit the hint.

    Example:
        >>> decode([1.5, None], tuple[float | None, ...])
        (1.5, None)
    """
    return _codec(hint).decode(data, _name(hint))


@cache
def _codec(hint: Any) -> _Codec:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is object or hint is Any:
        return _Codec(_encode_untyped, _decode_untyped)
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass_codec(hint)
    if origin is Union or origin is types.UnionType:
        members = tuple(member for member in arguments if member is not type(None))
        inner = _codec(members[0]) if len(members) == 1 else _union_codec(members)
        return inner if members == arguments else _optional(inner)
    if origin is Literal:
        return _checked(lambda value: value in arguments, " or ".join(map(repr, arguments)))
    if origin is tuple:
        return _tuple_codec(arguments)
    if origin is list:
        return _list_codec(arguments[0])
    if origin is dict or origin is Mapping:
        return _mapping_codec(*arguments)
    if hint is float:
        return _Codec(_encode_float, _decode_float)
    if hint is int:
        return _Codec(_encode_int, _decode_int)
    if hint is str or hint is bool:
        return _checked(lambda value: isinstance(value, hint), "text" if hint is str else "True or False")
    if hint is None or hint is type(None):
        return _checked(lambda value: value is None, "None")
    raise EventFormatError(
        f"{hint} is not a type that an event may declare. Use dataclasses, unions, Literal, tuple, list, "
        "dict, str, int, float, bool, None or object."
    )


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else "value"


def _mismatch(value: object, wanted: str, where: str) -> EventFormatError:
    return EventFormatError(f"{where} should be {wanted}, but it is of type {type(value).__name__}.")


def _checked(fits: Callable[[Any], bool], wanted: str) -> _Codec:
    """A value that JSON holds as it is."""

    def same(value: Any, where: str) -> Any:
        if not fits(value):
            raise _mismatch(value, wanted, where)
        return value

    return _Codec(same, same)


def _encode_float(value: Any, where: str) -> JSON:
    if isinstance(value, int):
        return value
    if not isinstance(value, SupportsFloat):
        raise _mismatch(value, "a number", where)
    number = float(value)
    return number if math.isfinite(number) else {"$float": repr(number)}


def _decode_float(data: Any, where: str) -> float:
    if isinstance(data, (int, float)):
        return data
    for text in ("nan", "inf", "-inf"):
        if data == {"$float": text}:
            return float(text)
    raise _mismatch(data, "a number", where)


def _encode_int(value: Any, where: str) -> JSON:
    if isinstance(value, int):
        return value
    if not isinstance(value, SupportsIndex):
        raise _mismatch(value, "a whole number", where)
    return value.__index__()


def _decode_int(data: Any, where: str) -> int:
    if not isinstance(data, int):
        raise _mismatch(data, "a whole number", where)
    return data


def _sequence(value: Any, kind: type[tuple[Any, ...]] | type[list[Any]], where: str) -> Sequence[Any]:
    if not isinstance(value, kind):
        raise _mismatch(value, f"a {kind.__name__}", where)
    return cast("Sequence[Any]", value)


def _tuple_codec(arguments: tuple[Any, ...]) -> _Codec:
    of_one_type = len(arguments) == 2 and arguments[1] is Ellipsis

    def hints(values: Sequence[Any], where: str) -> Sequence[Any]:
        if of_one_type:
            return [arguments[0]] * len(values)
        if len(values) != len(arguments):
            raise EventFormatError(f"{where} should have {len(arguments)} entries, but it has {len(values)}.")
        return arguments

    def write(value: Any, where: str) -> JSON:
        entries = _sequence(value, tuple, where)
        pairs = zip(entries, hints(entries, where), strict=True)
        return [_codec(hint).encode(entry, f"{where}[{i}]") for i, (entry, hint) in enumerate(pairs)]

    def read(data: Any, where: str) -> tuple[Any, ...]:
        entries = _sequence(data, list, where)
        pairs = zip(entries, hints(entries, where), strict=True)
        return tuple(_codec(hint).decode(entry, f"{where}[{i}]") for i, (entry, hint) in enumerate(pairs))

    return _Codec(write, read)


def _list_codec(hint: Any) -> _Codec:
    def write(value: Any, where: str) -> JSON:
        entries = enumerate(_sequence(value, list, where))
        return [_codec(hint).encode(entry, f"{where}[{i}]") for i, entry in entries]

    def read(data: Any, where: str) -> list[Any]:
        entries = enumerate(_sequence(data, list, where))
        return [_codec(hint).decode(entry, f"{where}[{i}]") for i, entry in entries]

    return _Codec(write, read)


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(value, "a mapping", where)
    return cast("Mapping[Any, Any]", value)


def _mapping_codec(key: Any, hint: Any) -> _Codec:
    """An object where the keys are text, else a list of pairs."""
    pairs = _list_codec(tuple[key, hint])

    def write(value: Any, where: str) -> JSON:
        entries = _mapping(value, where)
        if key is not str:
            return pairs.encode(list(entries.items()), where)
        for name in entries:
            if not isinstance(name, str):
                raise _mismatch(name, "text", f"a key of {where}")
        return {name: _codec(hint).encode(entry, f"{where}[{name!r}]") for name, entry in entries.items()}

    def read(data: Any, where: str) -> dict[Any, Any]:
        if key is not str:
            return dict(pairs.decode(data, where))
        entries = _mapping(data, where).items()
        return {name: _codec(hint).decode(entry, f"{where}[{name!r}]") for name, entry in entries}

    return _Codec(write, read)


def _dataclass_codec(kind: type) -> _Codec:
    """Every field by its name, no more and no less."""
    hints = resolve_type_hints(kind)
    names = [field.name for field in fields(kind)]

    def write(value: Any, where: str) -> JSON:
        if type(value) is not kind:
            raise _mismatch(value, kind.__name__, where)
        return {name: _codec(hints[name]).encode(getattr(value, name), f"{where}.{name}") for name in names}

    def read(data: Any, where: str) -> Any:
        found = _mapping(data, where)
        if set(found) != set(names):
            missing, strange = sorted(set(names) - set(found)), sorted(set(found) - set(names))
            raise EventFormatError(
                f"{where} does not have the fields of {kind.__name__}: missing {missing}, unknown {strange}."
            )
        return kind(**{name: _codec(hints[name]).decode(found[name], f"{where}.{name}") for name in names})

    return _Codec(write, read)


def _optional(inner: _Codec) -> _Codec:
    return _Codec(
        lambda value, where: None if value is None else inner.encode(value, where),
        lambda data, where: None if data is None else inner.decode(data, where),
    )


def _union_codec(members: tuple[Any, ...]) -> _Codec:
    """The dataclass that the class name tells, else the first member that fits."""
    classes = [member for member in members if isinstance(member, type) and is_dataclass(member)]
    others = [member for member in members if member not in classes]
    by_name = {kind.__name__: kind for kind in classes} if len(classes) > 1 else {}
    described = " or ".join(str(getattr(member, "__name__", member)) for member in members)
    for kind in by_name.values():
        if any(field.name == "type" for field in fields(kind)):
            raise EventFormatError(f'{kind.__name__} has a field "type", which would hide its class name.')

    def first_that_fits(value: Any, where: str, way: Literal["encode", "decode"]) -> Any:
        for member in others if by_name else members:
            with contextlib.suppress(EventFormatError):
                return getattr(_codec(member), way)(value, where)
        raise _mismatch(value, described, where)

    def write(value: Any, where: str) -> JSON:
        kind = by_name.get(type(value).__name__)
        if kind is None:
            return first_that_fits(value, where, "encode")
        inside = cast("Mapping[str, JSON]", _codec(kind).encode(value, kind.__name__))
        return {"type": kind.__name__, **inside}

    def read(data: Any, where: str) -> Any:
        if by_name and isinstance(data, dict):
            inside = dict(cast("dict[str, Any]", data))
            tag = inside.pop("type", None)
            if tag not in by_name:
                raise EventFormatError(f"{where} has the type {tag!r}, which is not {described}.")
            return _codec(by_name[tag]).decode(inside, str(tag))
        return first_that_fits(data, where, "decode")

    return _Codec(write, read)


def _encode_untyped(value: Any, where: str) -> JSON:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _encode_float(value, where)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, (list, tuple)):
        entries = [_encode_untyped(entry, where) for entry in cast("Sequence[Any]", value)]
        return entries if isinstance(value, list) else {"$tuple": entries}
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return {key: _encode_untyped(entry, where) for key, entry in items}
        return {"$pairs": [[_encode_untyped(part, where) for part in pair] for pair in items]}
    opaque = value if isinstance(value, Opaque) else _describe(value)
    return {"$opaque": [opaque.type, opaque.text]}


def _describe(value: object) -> Opaque:
    kind = type(value)
    try:
        text = repr(value)
    except Exception as error:  # a stranger's __repr__ may raise anything; the run is worth more
        text = f"<its repr raised {type(error).__name__}>"
    return Opaque(f"{kind.__module__}.{kind.__qualname__}", text[:_LONGEST_DESCRIPTION])


def _decode_untyped(data: Any, where: str) -> Any:
    if isinstance(data, list):
        return [_decode_untyped(entry, where) for entry in cast("list[Any]", data)]
    if not isinstance(data, dict):
        return data
    found = cast("dict[str, Any]", data)
    mark = next(iter(found), "")
    if not mark.startswith("$"):
        return {key: _decode_untyped(entry, where) for key, entry in found.items()}
    if mark == "$float":
        return _decode_float(found, where)
    if mark == "$tuple":
        return tuple(_decode_untyped(found[mark], where))
    if mark == "$pairs":
        return dict(decode(found[mark], list[tuple[object, object]]))
    if mark == "$opaque":
        return Opaque(*cast("tuple[str, str]", decode(found[mark], tuple[str, str])))
    raise EventFormatError(f"{where} holds the mark {mark!r}, which this version does not know.")
