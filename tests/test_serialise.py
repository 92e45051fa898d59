"""Whatever is recorded comes back unchanged, and nothing but events comes back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from any_event import bits, events
from hypothesis import given, settings

from dspy_greater.run.events import Event, Warned
from dspy_greater.run.serialise import EventFormatError, Opaque, decode, encode, from_json, to_json


@settings(max_examples=150, deadline=None)
@given(events)
def test_every_event_comes_back_from_json_bit_for_bit(event: Event) -> None:
    text = json.dumps(to_json(event), allow_nan=False)
    assert bits(from_json(json.loads(text))) == bits(event)
    assert "\n" not in text and text.isascii()


@dataclass(frozen=True)
class Left:
    value: int


@dataclass(frozen=True)
class Right:
    value: int


@dataclass(frozen=True)
class Tagged:
    type: str


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (Left(1), Left | Right),
        (Right(1), Left | Right | None),
        (None, Left | Right | None),
        ("text", Left | Right | str),
        ((1, "a", (0.5,)), tuple[int, str, tuple[float, ...]]),
        ([Left(1)], list[Left]),
        ({3: Left(1)}, dict[int, Left]),
        ("b", Literal["a", "b"]),
        (-0.0, float),
        (1, float),
        (True, int),
        (2**70, int),
        ("\ud800", str),
        (Opaque("a.B", "<B>"), object),
    ],
)
def test_a_value_comes_back_as_its_type_hint_says(value: object, hint: object) -> None:
    assert bits(decode(json.loads(json.dumps(encode(value, hint))), hint)) == bits(value)


def test_an_object_that_json_cannot_hold_becomes_a_description() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise OSError

    assert decode(encode({"x": {1}}, object), object) == {"x": Opaque("builtins.set", "{1}")}
    broken = decode(encode(Broken(), object), object)
    assert broken.text == "<its repr raised OSError>"
    assert len(decode(encode(b"x" * 9999, object), object).text) == 500


class Scalar:
    """As a number of an array library is."""

    def __float__(self) -> float:
        return 2.5

    def __index__(self) -> int:
        return 2


def test_numbers_of_array_libraries_become_plain_ones() -> None:
    assert encode(Scalar(), float) == 2.5
    assert encode(Scalar(), int) == 2


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (Warned(3), Event, "Warned.message should be text, but it is of type int."),
        ((1, "2"), tuple[int, ...], r"value\[1\] should be a whole number, but it is of type str."),
        ((1,), tuple[int, int], "value should have 2 entries, but it has 1."),
        ([1], tuple[int, ...], "value should be a tuple, but it is of type list."),
        ("x", float, "float should be a number, but it is of type str."),
        ({1: 1}, dict[str, int], "a key of value should be text, but it is of type int."),
        (3, Event, "value should be SearchStarted or StepTaken or Validated or Warned"),
        ("c", Literal["a", "b"], "value should be 'a' or 'b', but it is of type str."),
        ({1}, set[int], "is not a type that an event may declare. Use dataclasses"),
        (Tagged("a"), Tagged | Left, 'Tagged has a field "type", which would hide its class name.'),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_says_where(value: object, hint: object, message: str) -> None:
    with pytest.raises(EventFormatError, match=message):
        encode(value, hint)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "Popen", "args": "ls"}, "value has the type 'Popen', which is not SearchStarted or"),
        ({"type": "Warned"}, r"does not have the fields of Warned: missing \['message'\], unknown \[\]"),
        ({"type": "Warned", "message": "", "extra": 1}, r"missing \[\], unknown \['extra'\]"),
        ({"type": "Warned", "message": 3}, "Warned.message should be text"),
        ({"type": "Validated", "predictor": "", "scores": {"a": {"$float": "1"}}, "winner": "", "spent": {}}, "number"),
        ([], "value should be SearchStarted or"),
    ],
)
def test_data_that_is_no_event_is_an_error_that_says_where(data: Any, message: str) -> None:
    with pytest.raises(EventFormatError, match=message):
        from_json(data)


def test_an_unknown_mark_is_an_error() -> None:
    with pytest.raises(EventFormatError, match=r"'\$class', which this version does not know"):
        decode({"$class": "os.system"}, object)
