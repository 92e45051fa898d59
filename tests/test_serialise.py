"""Whatever is recorded comes back unchanged, and nothing but events comes back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from any_event import FLOATS, MARKS, TEXTS, bits, events
from hypothesis import given, settings

from dspy_greater.errors import EventFormatError
from dspy_greater.objective.types import CallOutcome, Evaluation, RowOutcome
from dspy_greater.run.events import Event, SearchStarted, Validated, Warned
from dspy_greater.run.journal import Journal
from dspy_greater.run.serialise import Opaque, from_json, to_json


def through_text(event: Event) -> Event:
    return from_json(json.loads(json.dumps(to_json(event), allow_nan=False)))


def started(value: object = None, *, number: float = 0.5, text: str = "Think.") -> SearchStarted:
    """An event with a user's value, a number and a text at every kind of place that can hold one."""
    inputs = {"value": value, "nested": [(value, {"inner": value})]}
    row = RowOutcome(0, number, inputs, {text: text}, number, text, text, (CallOutcome(inputs, text),))
    seed = Evaluation((1, 2), text, (row,), number, number, number, (number, number))
    return SearchStarted(text, seed, 3)


def value_of(event: Any) -> Any:
    return event.seed.rows[0].inputs["value"]


# --- the same in every bit ---


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(events)
def test_every_event_comes_back_from_json_bit_for_bit(event: Event) -> None:
    text = json.dumps(to_json(event), allow_nan=False)
    assert bits(from_json(json.loads(text))) == bits(event)
    assert "\n" not in text and text.isascii()


@pytest.mark.parametrize("number", FLOATS, ids=repr)
def test_every_float_comes_back_from_a_journal_at_every_place(number: float, tmp_path: Path) -> None:
    happened = (started((number, [number]), number=number), Validated("p", {"a": number}, "a"))
    assert_kept(happened, tmp_path)


@pytest.mark.parametrize("text", [*TEXTS, *MARKS], ids=ascii)
def test_every_text_comes_back_from_a_journal_at_every_place(text: str, tmp_path: Path) -> None:
    happened = (
        started({text: text}, text=text),
        Validated(text, {text: 1.0}, text, {text: 2}),
        Warned(text),
    )
    assert_kept(happened, tmp_path)


def assert_kept(happened: tuple[Event, ...], directory: Path) -> None:
    with Journal.open(directory, {}) as journal:
        for event in happened:
            journal.append(event)
    with Journal.open(directory, {}) as journal:
        assert bits(journal.recorded()) == bits(happened)


@pytest.mark.parametrize(
    "value",
    [
        [],
        (),
        {},
        [(), [[]]],
        {"a": [1, (2.0, {"b": None})]},
        {3: True, (1, "x"): {"type": "Warned", "message": "not an event"}},
        {"$float": "nan"},
        {"$list": 3, "other": [False]},
        [1, 1.0, True, "1"],
        2**70,
        math.nan,
        Opaque("a.B", "<B>"),
        Warned("a part of a row"),
    ],
    ids=repr,
)
def test_the_values_of_a_users_row_come_back_as_they_were(value: object) -> None:
    assert bits(value_of(through_text(started(value)))) == bits(value)


def test_an_object_that_json_cannot_hold_becomes_a_description() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise OSError

    assert value_of(through_text(started({"x": {1}}))) == {"x": Opaque("builtins.set", "{1}")}
    assert value_of(through_text(started(Fraction(1, 3)))) == Opaque("fractions.Fraction", "Fraction(1, 3)")
    assert value_of(through_text(started(Broken()))).text == "<its repr raised OSError>"
    assert len(value_of(through_text(started(b"x" * 9999))).text) == 500


def test_a_strangers_class_with_the_name_of_an_event_is_not_taken_for_it() -> None:
    stranger = type("Warned", (), {"message": "not ours", "__repr__": lambda self: "stranger"})
    assert value_of(through_text(started(stranger()))) == Opaque(f"{__name__}.Warned", "stranger")


def test_numbers_of_array_libraries_become_plain_ones() -> None:
    event: Any = Validated("p", {"a": numpy.float32(0.1), "b": numpy.float64(0.1)}, "a", {"runs": numpy.int64(3)})
    assert bits(through_text(event)) == bits(
        Validated("p", {"a": float(numpy.float32(0.1)), "b": 0.1}, "a", {"runs": 3})
    )


def test_a_whole_number_where_a_float_is_declared_comes_back_as_that_float() -> None:
    assert bits(through_text(Validated("p", {"a": 1}, "a"))) == bits(Validated("p", {"a": 1.0}, "a"))


# --- what is no event ---


def row(**changed: Any) -> SearchStarted:
    event = started(1)
    changed_row = replace(event.seed.rows[0], **changed)
    return replace(event, seed=replace(event.seed, rows=(changed_row,)))


def seed(**changed: Any) -> SearchStarted:
    event = started(1)
    return replace(event, seed=replace(event.seed, **changed))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Warned(3), "Warned.message is of type int. Input should be a valid string."),
        (Warned(None), "Warned.message is of type NoneType. Input should be a valid string."),
        (row(score="0.5"), "SearchStarted.seed.rows.0.score is of type str. Input should be a valid number."),
        (row(score=True), "SearchStarted.seed.rows.0.score is of type bool. Input should be a valid number."),
        (row(score=None), "SearchStarted.seed.rows.0.score is of type NoneType. Input should be a valid number."),
        (row(score={1}), "SearchStarted.seed.rows.0.score is of type builtins.set. Input should be a valid number."),
        (row(row=0.0), "SearchStarted.seed.rows.0.row is of type float. Input should be a valid integer."),
        (row(row=True), "SearchStarted.seed.rows.0.row is of type bool. Input should be a valid integer."),
        (row(row="0"), "SearchStarted.seed.rows.0.row is of type str. Input should be a valid integer."),
        (row(unparsed=1), "SearchStarted.seed.rows.0.unparsed is of type int. Input should be a valid boolean."),
        (row(inputs={3: 1}), "SearchStarted.seed.rows.0.inputs.3.[key] is of type int. Input should be a valid"),
        (row(inputs=[]), "SearchStarted.seed.rows.0.inputs is of type list. Input should be a valid dictionary."),
        (seed(token_ids=[1]), "SearchStarted.seed.token_ids is of type list. Input should be a valid tuple."),
        (seed(token_ids=(1, "2")), "SearchStarted.seed.token_ids.1 is of type str. Input should be a valid int"),
        (seed(objective=(1.0,)), "SearchStarted.seed.objective.1 is of type tuple. Field required."),
        (seed(objective=(1.0,) * 3), "SearchStarted.seed.objective is of type tuple. Tuple should have at most 2"),
        (seed(rows=(Warned(""),)), "SearchStarted.seed.rows.0 is of type Warned. Input should be an instance of RowO"),
        (3, "It is of type int, which is no event."),
        (started(1).seed, "It is of type Evaluation, which is no event."),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_an_error_that_says_where(event: Any, message: str) -> None:
    with pytest.raises(EventFormatError) as caught:
        to_json(event)
    assert str(caught.value).startswith(message)


VALIDATED = {"type": "Validated", "predictor": "", "scores": {}, "winner": "", "spent": {}, "subscores": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "Popen", "args": "ls"}, r"It has the type 'Popen', which is none of Opaque, .*SearchStarted, "),
        ({"type": ["Warned"], "message": ""}, r"It has the type \['Warned'\], which is none of"),
        ({"type": "Warned"}, r"not have the fields of Warned: missing \['message'\], unknown \[\]."),
        (
            {"type": "Validated", "predictor": ""},
            r"of Validated: missing \['scores', 'spent', 'subscores', 'winner'\], unknown",
        ),
        ({"type": "Warned", "message": "", "extra": 1}, r"missing \[\], unknown \['extra'\]."),
        ({"type": "Warned", "message": 3}, "Warned.message is of type int. Input should be a valid string."),
        ({**VALIDATED, "scores": {"a": "1"}}, "Validated.scores.a is of type str. Input should be a valid number."),
        ({**VALIDATED, "scores": {"a": {"$float": "1"}}}, r"the mark '\$float' with '1', which this version does not"),
        ({**VALIDATED, "scores": {"a": {"$float": 1}}}, r"the mark '\$float' with 1, which this version does not know"),
        ({**VALIDATED, "scores": {"$class": "os.system"}}, r"the mark '\$class' with 'os.system', which this version"),
        ({**VALIDATED, "scores": {"$pairs": [[1]]}}, r"The mark '\$pairs' does not fit what it holds: "),
        ({**VALIDATED, "scores": {"$pairs": [[{"$list": []}, 1]]}}, r"The mark '\$pairs' does not fit what it holds: "),
        ({**VALIDATED, "scores": {"$list": 3}}, r"The mark '\$list' does not fit what it holds: "),
        ({"type": "Opaque", "kind": "", "text": ""}, "It is of type Opaque, which is no event."),
        ([], "It is of type tuple, which is no event."),
        (None, "It is of type NoneType, which is no event."),
    ],
)
def test_data_that_is_no_event_is_an_error_that_says_where(data: Any, message: str) -> None:
    before = repr(data)
    with pytest.raises(EventFormatError, match=message):
        from_json(data)
    assert repr(data) == before
