"""Gold values by one rule: what a row holds, in a field of some type, as some adapter writes it."""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import os
import subprocess
import sys
from typing import Any, Literal, Optional

import dspy
import numpy as np
import pandas as pd
import pydantic
import pytest
import torch
from dspy.adapters.utils import serialize_for_json
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_greater.errors import DataError
from dspy_greater.program.dataset import (
    refuse_missing_gold,
    refuse_unfit_gold,
    refuse_unwritable_gold,
    supervised_field,
    warn_of_misread_gold,
)
from dspy_greater.program.fingerprint import fingerprint
from dspy_greater.program.predictors import predictors_of
from dspy_greater.prompt.gold import Gold, allows_none, gold_of, is_missing, is_text, labels_as_text, row_gold
from dspy_greater.prompt.target import assistant_text


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Person(pydantic.BaseModel):
    name: str
    age: int
    tags: list[str] = []


class NotAvailable:
    """As some libraries print what is not there."""

    def __str__(self) -> str:
        return "<NA>"


DAY = datetime.date(2024, 1, 2)
OLD = Optional[str]  # noqa: UP045
TEXTS: list[Any] = [str, OLD, str | None, Literal["a", "b"] | str, str | int]
LISTS: list[Any] = [list[str], list[int], list[Any], tuple[int, int], set[str], str | list[str], list[str] | None]
OTHERS: list[Any] = [int, float, bool, Literal["a", "b"], Literal[1, 2], Colour, Level, dict, dict[str, int], Person]
OTHERS += [datetime.date, datetime.datetime, Any, int | None, float | None, Person | None, list[Person]]
EVERY_TYPE = [*TEXTS, *LISTS, *OTHERS]
ADAPTERS: dict[str, Any] = {"chat": dspy.ChatAdapter(), "json": dspy.JSONAdapter(), "xml": dspy.XMLAdapter()}
MISSING: list[Any] = [
    float("nan"),
    np.nan,
    np.float32("nan"),
    np.array(np.nan),
    torch.tensor(math.nan),
    decimal.Decimal("NaN"),
    pd.NA,
    pd.NaT,
    np.datetime64("NaT"),
    np.timedelta64("NaT"),
    np.ma.masked,
    NotAvailable(),
    "",
    " \n\t",
    np.str_(" "),
]


def predictor_of(kind: Any, adapter: Any = None) -> Any:
    fields = {
        "question": (str, dspy.InputField()),
        "reasoning": (str, dspy.OutputField()),
        "answer": (kind, dspy.OutputField()),
        "note": (str, dspy.OutputField()),
    }
    with dspy.context(adapter=adapter):
        [predictor] = predictors_of(dspy.Predict(dspy.Signature(fields, "Answer.")))
    return predictor


def rows_of(*values: Any) -> list[Any]:
    return [dspy.Example(question=f"{n}?", answer=each).with_inputs("question") for n, each in enumerate(values)]


def described(value: Any) -> str:
    return " ".join(f"{type(value).__name__} {value!r}".split())[:40]


# --- the rule ---


@pytest.mark.parametrize("value", MISSING, ids=described)
@pytest.mark.parametrize("kind", EVERY_TYPE, ids=str)
def test_what_is_not_there_is_missing_whatever_the_type_of_the_field(kind: Any, value: Any) -> None:
    assert gold_of(kind, value) == Gold()
    assert is_missing(value)


@pytest.mark.parametrize("kind", EVERY_TYPE, ids=str)
def test_none_is_a_value_where_the_annotation_allows_it_and_missing_elsewhere(kind: Any) -> None:
    allowed = kind in (Any, OLD, str | None, int | None, float | None, list[str] | None, Person | None)
    assert allows_none(kind) == allowed
    assert gold_of(kind, None).answers == ((None,) if allowed else ())


@pytest.mark.parametrize(
    "value", [False, np.False_, 0, 0.0, np.int64(0), np.float32(0), torch.tensor(0)], ids=described
)
def test_false_and_zero_are_values(value: Any) -> None:
    assert gold_of(bool, value).answers == (False,)
    assert gold_of(int, value).answers == (0,)
    assert not gold_of(str, value).missing


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "null", "<NA>", "NaT", "[]"])
def test_a_text_that_only_looks_like_a_missing_value_is_one(text: str) -> None:
    assert gold_of(str, text).answers == (text,)


@pytest.mark.parametrize("text", ["nan", "NaN"])
def test_a_text_that_a_field_of_numbers_reads_as_nan_is_missing(text: str) -> None:
    assert gold_of(float, text).missing


PLAIN = [
    (str, "yes", "yes"),
    (str, 4, "4"),
    (str, True, "True"),
    (str, DAY, "2024-01-02"),
    (str, Colour.RED, "red"),
    (str, b"yes", "yes"),
    (str, {"a": np.int64(1)}, '{"a": 1}'),
    (str, Person(name="Ada", age=3), '{"name": "Ada", "age": 3, "tags": []}'),
    (str | None, 4, "4"),
    (int, "12", 12),
    (int, 3.0, 3),
    (float, 3, 3.0),
    (bool, "no", False),
    (Literal[1, 2], 1.0, 1),  # a table with a gap
    (Literal[1, 2], "2", 2),
    (Literal["red", "blue"], Colour.RED, "red"),
    (Colour, "red", Colour.RED),
    (Colour, "BLUE", Colour.BLUE),
    (Level, 2, Level.HIGH),
    (dict, '{"a": 1}', {"a": 1}),
    (Person, {"name": "Ada", "age": "3"}, Person(name="Ada", age=3)),
    (datetime.date, "2024-01-02", DAY),
    (datetime.datetime, "2024-01-02T03:00", datetime.datetime(2024, 1, 2, 3)),
    (list[str], '["a", "b"]', ["a", "b"]),
    (list[str], ("a", "b"), ["a", "b"]),
    (list[str], {"b", "a"}, ["a", "b"]),
    (list[str], [""], [""]),
    (set[str], ["b", "a", "b"], ["a", "b"]),
    (tuple[int, int], [1, 2], (1, 2)),
    (Any, "[note] it", "[note] it"),
    (Any, ["a"], ["a"]),
    (str | int, "5", "5"),
    (str | int, 5, 5),
    (str | list[str], ["a", "b"], ["a", "b"]),
]


@pytest.mark.parametrize(("kind", "raw", "value"), PLAIN, ids=map(str, range(len(PLAIN))))
def test_a_value_is_turned_into_the_type_of_its_field(kind: Any, raw: Any, value: Any) -> None:
    [found] = gold_of(kind, raw).answers
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (np.int64(5), 5),
        (np.uint8(5), 5),
        (np.float64(0.1), 0.1),
        (np.float32(0.1), 0.1),
        (np.float16(0.1), 0.1),
        (np.bool_(True), True),
        (np.str_("yes"), "yes"),
        (np.array(5), 5),
        (torch.tensor(5), 5),
        (np.datetime64("2024-01-02"), DAY),
        (np.datetime64("2024-01-02T00:00:00.000000000"), datetime.datetime(2024, 1, 2)),
        (np.timedelta64(1, "D").astype("timedelta64[ns]"), datetime.timedelta(days=1)),
        (pd.Timestamp("2024-01-02 00:00:00.000000001"), datetime.datetime(2024, 1, 2)),
        (pd.Timedelta("1D"), datetime.timedelta(days=1)),
    ],
    ids=described,
)
def test_scalars_of_array_libraries_are_pythons_own(raw: Any, value: Any) -> None:
    [found] = gold_of(Any, raw).answers
    assert (found, type(found)) == (value, type(value))
    assert gold_of(str, raw).answers == (str(value),)
    assert gold_of(Any, {"a": [raw]}).answers == ({"a": [value]},)


SEVERAL: list[Any] = [
    ["Ann Lee", "A. Lee", "Ann Lee"],
    ("Ann Lee", "A. Lee"),
    {"Ann Lee": 1, "A. Lee": 2}.keys(),
    np.array(["Ann Lee", "A. Lee"]),
    np.array(["Ann Lee", "A. Lee"], dtype=object),
    pd.Series(["Ann Lee", "A. Lee"]),
    ["Ann Lee", None, math.nan, pd.NA, "", "A. Lee"],
]


@pytest.mark.parametrize("raw", SEVERAL, ids=described)
@pytest.mark.parametrize("kind", TEXTS[:1] + TEXTS[3:], ids=str)
def test_a_list_in_a_text_field_is_a_list_of_different_acceptable_answers(kind: Any, raw: Any) -> None:
    assert is_text(kind)
    assert set(gold_of(kind, raw).answers) == {"Ann Lee", "A. Lee"}
    assert len(gold_of(kind, raw).answers) == 2


def test_acceptable_answers_keep_their_order_and_those_of_a_set_get_one() -> None:
    assert gold_of(str, ["b", "c", "a"]).answers == ("b", "c", "a")
    assert gold_of(str, {"b", "c", "a"}).answers == gold_of(str, frozenset("cab")).answers == ("a", "b", "c")
    assert gold_of(str, [1, True, "1", np.int64(1)]).answers == ("1", "True")
    assert gold_of(str | None, ["b", None]).answers == ("b", None)
    assert gold_of(str, ["b", None]).answers == ("b",)


@pytest.mark.parametrize("empty", [[], (), set(), np.array([]), pd.Series([], dtype=object), [None], [math.nan, " "]])
def test_no_acceptable_answer_is_a_missing_one(empty: Any) -> None:
    assert gold_of(str, empty).missing


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_in_a_field_of_lists_a_list_is_one_value(kind: Any) -> None:
    assert not is_text(kind)
    raw = [1, 2] if kind in (list[int], list[Any], tuple[int, int]) else ["a", "b"]
    for written in (raw, tuple(raw), np.array(raw)):
        [found] = gold_of(kind, written).answers
        assert list(found) == raw  # pyright: ignore
    if kind != tuple[int, int]:
        assert gold_of(kind, []).answers == ([],)


UNFIT: list[tuple[Any, Any, str]] = [
    (int, "four", "unable to parse string as an integer"),
    (int, 3.5, "fractional part"),
    (int, Colour.RED, "integer"),
    (int, [3, 4], "a list of acceptable answers is taken in text fields"),
    (float, "x", "number"),
    (bool, "perhaps", "boolean"),
    (Literal["a", "b"], "c", "."),
    (Literal["a", "b"], ["a", "b"], "a list of acceptable answers is taken in text fields"),
    (Literal[1, 2], 1.5, "Input should be 1 or 2"),
    (Colour, "green", "not a valid name or value"),
    (Colour, ["red"], "."),
    (list[int], ["a"], "integer"),
    (list[str], "yes", "valid list"),
    (dict, "yes", "dictionary"),
    (Person, {"name": "Ada"}, "age: Field required"),
    (datetime.date, "tomorrow", "date"),
    (str, [["a"]], "an acceptable answer is a text, and not a list itself"),
    (str, object(), "an object of type object has no text of its own"),
    (str, iter(["a"]), "it can be read only once"),
    (list[str], iter(["a"]), "it can be read only once"),
    (list[float], [1.0, math.nan], "it holds nan, which is a missing value"),
    (dict, {"a": pd.NA}, "it holds <NA>, which is a missing value"),
]


@pytest.mark.parametrize(("kind", "raw", "reason"), UNFIT, ids=map(str, range(len(UNFIT))))
def test_what_does_not_fit_is_an_error_with_value_field_and_type(kind: Any, raw: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        gold_of(kind, raw, "answer")
    text = str(caught.value)
    name = {Literal["a", "b"]: "Literal['a', 'b']", list[int]: "list[int]"}.get(kind, getattr(kind, "__name__", ""))
    assert text.startswith("The gold value ") and f" of `answer` does not fit its type {name}" in text
    assert text.endswith(". Correct the rows, or the field's type.") and "\n" not in text
    assert len(text) < 500


numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=True, allow_infinity=False, width=32)
named = st.sampled_from([*MISSING, Colour.RED, Level.LOW])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5) | named | st.dates() | st.datetimes()
scalars |= numbers.map(np.float32) | st.integers(-99, 99).map(np.int64) | st.binary(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.frozensets(st.text(max_size=3) | st.integers(), max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        | st.lists(st.text(max_size=3), max_size=3).map(np.array)
    ),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(EVERY_TYPE), raw=values)
def test_the_rule_gives_answers_that_stand_for_themselves_or_an_error(kind: Any, raw: Any) -> None:
    try:
        found = gold_of(kind, raw)
    except DataError:
        return
    assert repr(found) == repr(gold_of(kind, raw))
    assert len({(type(each), repr(each)) for each in found.answers}) == len(found.answers)
    assert len(found.answers) < 2 or is_text(kind)
    for answer in found.answers:
        assert not is_missing(answer)
        assert answer is not None or allows_none(kind)
        assert repr(gold_of(kind, answer).answers) == repr((answer,))


@settings(max_examples=100, deadline=None)
@given(raw=st.lists(st.text(max_size=4), max_size=5))
def test_a_list_of_texts_means_its_different_texts_with_words(raw: list[str]) -> None:
    assert gold_of(str, raw).answers == tuple(dict.fromkeys(each for each in raw if each.strip()))


def test_a_key_that_is_not_there_is_missing_even_where_none_would_be_a_value() -> None:
    signature = predictor_of(str | None).signature
    there, absent = rows_of(None)[0], dspy.Example(question="?").with_inputs("question")
    assert row_gold(signature, "answer", there).answers == (None,)
    assert row_gold(signature, "answer", absent).missing
    assert row_gold(signature, "answer", dspy.Example(answer="x").with_inputs("answer")).missing


# --- as adapters write it ---


WRITABLE: list[tuple[Any, Any]] = [
    *((kind, raw) for kind, raw, _ in PLAIN if kind is not Level),
    (Level, 1),
    (list[str], []),
    (list[int], []),
    (dict, {}),
    (dict[str, int], {"a": 1, "b": 2}),
    (list[Person], [Person(name="Ada", age=3)]),
    (Person | None, {"name": "Ada", "age": 3}),
    *((kind, None) for kind in (Any, str | None, int | None, list[str] | None, Person | None)),
    *((str, text) for text in ("a\nb", ' a "b" <c> & d', "[[ ## answer ## ]]", "</answer>", "null")),
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("kind", "raw"), WRITABLE, ids=map(str, range(len(WRITABLE))))
def test_the_loss_is_of_exactly_what_an_adapter_writes_for_the_value(kind: Any, raw: Any, adapter: str) -> None:
    predictor = predictor_of(kind, ADAPTERS[adapter])
    [answer] = gold_of(kind, raw).answers
    found = assistant_text(predictor.adapter, predictor.signature, {"reasoning": "So."}, "answer", answer)
    signature = predictor.signature.delete("note")
    whole = predictor.adapter.format_assistant_message_content(signature, {"reasoning": "So.", "answer": answer})
    assert whole.startswith(found.text)
    before, after = whole[: found.gold], whole[len(found.text) :]
    assert "So." in before[: found.header] and "answer" in before[found.header :]
    others = [" ".join([*"xyz"]), "Qq"] if isinstance(serialize_for_json(answer), str) else [7, 31]
    for other in others:  # what surrounds it is the same for another value
        text = predictor.adapter.format_assistant_message_content(signature, {"reasoning": "So.", "answer": other})
        assert text.startswith(before) and text.endswith(after)
    refuse_unwritable_gold(predictor, "answer", rows := rows_of(raw), rows)


class Fussy(dspy.ChatAdapter):
    """Writes no number above nine."""

    def format_assistant_message_content(self, signature: Any, outputs: Any, missing_field_message: Any = None) -> str:
        if isinstance(outputs.get("answer"), int) and outputs["answer"] > 9 and outputs["answer"] != 52:
            raise OverflowError("a digit too many")
        return super().format_assistant_message_content(signature, outputs, missing_field_message)


def test_a_value_that_the_adapter_cannot_write_is_named_with_row_field_and_type() -> None:
    rows = rows_of(3, 12, 4, 15)
    text = (
        r"Rows 1, 3 of the trainset have a gold value that does not fit `answer` of predictor `self` \(rows are "
        r"counted from 0\). In row 1: Fussy cannot write 12 in a field of type int: a digit too many"
    )
    with pytest.raises(DataError, match=text):
        refuse_unwritable_gold(predictor_of(int, Fussy()), "answer", rows[::-1], rows)
    rows = rows_of(["a"], object())
    with pytest.raises(
        DataError, match="Row 1 .*ChatAdapter writes <object object at .*> in a field of type Any by its"
    ):
        refuse_unwritable_gold(predictor_of(Any), "answer", rows, rows)


# --- rows ---


@pytest.mark.parametrize("gap", [*MISSING, None, [], [None]], ids=described)
@pytest.mark.parametrize("kind", [str, int, Literal["yes", "no"]], ids=str)
def test_rows_with_a_gap_are_counted_and_named(kind: Any, gap: Any) -> None:
    value = 4 if kind is int else "yes"
    if isinstance(gap, list) and kind is not str:
        pytest.skip("a list in another field is no gap")
    predictor, rows = predictor_of(kind), rows_of(value, gap, value, gap)
    for check in (supervised_field, lambda predictor, rows: refuse_missing_gold(predictor, "answer", rows)):
        with pytest.raises(
            DataError, match="^Rows 1, 3 of the trainset have no gold value for `answer`, which .*value, or"
        ):
            check(predictor, rows)
    assert supervised_field(predictor, rows_of(gap, gap)) is None


def test_where_none_is_a_value_the_error_says_so() -> None:
    predictor = predictor_of(str | None)
    with pytest.raises(
        DataError, match="Row 2 of the trainset has no .* Fill in the value, None where there is none, or"
    ):
        supervised_field(predictor, rows_of("yes", None, math.nan))
    assert supervised_field(predictor, rows_of("yes", None)) == "answer"


def test_a_field_that_is_none_on_every_row_gives_way_to_one_that_tells_rows_apart() -> None:
    fields = {"q": (str, dspy.InputField()), "answer": (str, dspy.OutputField())}
    signature = dspy.Signature({**fields, "note": (str | None, dspy.OutputField())}, "Answer.")
    [predictor] = predictors_of(dspy.Predict(signature))

    def rows(*pairs: Any) -> list[Any]:
        return [dspy.Example(q="?", answer=answer, note=note).with_inputs("q") for answer, note in pairs]

    assert supervised_field(predictor, rows(("yes", None), ("no", None))) == "answer"
    assert supervised_field(predictor, rows(("yes", None), ("no", "x"))) == "note"
    assert supervised_field(predictor, rows((None, None), (None, None))) == "note"


def test_what_does_not_fit_is_there_and_named_by_row() -> None:
    predictor, rows = predictor_of(int), rows_of(1, "two", np.int64(3), [4])
    assert supervised_field(predictor, rows) == "answer"
    text = (
        r"^Rows 1, 3 of the trainset have a gold value that does not fit `answer` of predictor `self` \(rows are "
        r"counted from 0\). In row 1: The gold value 'two' of `answer` does not fit its type int: .*Correct the rows"
    )
    with pytest.raises(DataError, match=text):
        refuse_unfit_gold(predictor, "answer", rows)


@pytest.mark.parametrize(
    ("kind", "adapter", "value", "says"),
    [
        (str | None, "chat", None, r"reads that as 'None'"),
        (str | None, "xml", None, r"reads that as 'None'"),
        (list[str] | None, "xml", None, r"reads that as \['None'\]"),
        (Level, "chat", 1, "cannot read that again"),
        (Any, "chat", "5", "reads that as 5"),
    ],
)
def test_a_value_that_the_adapter_reads_as_another_is_told_once(kind: Any, adapter: str, value: Any, says: str) -> None:
    fine = {Level: [], Any: ["a"]}.get(kind, [["a"]] if "list" in str(kind) else ["a"])
    with pytest.warns(UserWarning, match=says) as told:
        warn_of_misread_gold(predictor_of(kind, ADAPTERS[adapter]), "answer", rows_of(*fine, value, value))
    [warning] = told
    assert "of `answer` (" in str(warning.message) and "finds no such answer right" in str(warning.message)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_values_that_come_back_are_no_reason_for_a_warning(adapter: str) -> None:
    for kind, raw in WRITABLE:
        misread = kind in (Level, str | None, list[str] | None) or (kind is Any and isinstance(raw, str))
        if not (misread or kind == str | int or kind is Colour):
            warn_of_misread_gold(predictor_of(kind, ADAPTERS[adapter]), "answer", rows_of(raw))
    warn_of_misread_gold(predictor_of(str | None, ADAPTERS["json"]), "answer", rows_of(None, "a"))
    warn_of_misread_gold(predictor_of(int | None, ADAPTERS[adapter]), "answer", rows_of(None, 4))


# --- where gold is shown or compared ---


def test_labels_are_told_in_words_without_what_is_missing() -> None:
    labels = {
        "answer": ["Ann Lee", None, "A. Lee"],
        "date": None,
        "tags": ["a", "b"],
        "level": 3,
        "gap": pd.NA,
        "x": None,
    }
    kinds = {"answer": str, "date": str | None, "tags": list[str]}
    assert labels_as_text(labels, kinds) == {
        "answer": "one of: Ann Lee; A. Lee",
        "date": "None",
        "tags": "['a', 'b']",
        "level": "3",
    }
    assert labels_as_text({"answer": ["Ann Lee"]}, {"answer": str}) == {"answer": "Ann Lee"}
    color = enum.Enum("Color", {"RED": "red"}, type=str)
    assert labels_as_text({"answer": color.RED}, {"answer": color}) == {"answer": "red"}
    assert labels_as_text({"answer": []}, {"answer": str}) == {}


@pytest.mark.slow
def test_a_row_with_a_set_has_the_same_identity_in_every_process() -> None:
    code = (
        "import dspy; from dspy_greater.program.fingerprint import fingerprint; "
        "print(fingerprint([dspy.Example(q='?', answer={'ab', 'cd', 'ef', 'gh', 'ij'}).with_inputs('q')]))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert fingerprint(rows_of({"a"})) != fingerprint(rows_of({"b"}))
