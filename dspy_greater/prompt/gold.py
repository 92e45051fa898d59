"""What a row holds for an output field -> the answers that count as right there, by one rule.

- A key that is there is a value. None is a value where the field's annotation allows None.
- NaN, pandas.NA, NaT, texts of blanks alone and None in any other field are missing.
- Scalars and arrays of numpy, pandas and torch are Python's own numbers, texts, dates and lists.
- A list (tuple, set, array) in a text field is a list of acceptable answers; in any other field it is one value.
- A value is turned into its field's type as DSPy's adapters would read it. What cannot be is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dspy.adapters.utils import get_annotation_name, parse_value, serialize_for_json
from pydantic import BaseModel, TypeAdapter, ValidationError

from dspy_greater.errors import DataError

_LONGEST_SHOWN = 120  # characters of a value in a message
ADDRESS = " at 0x"  # in the text of an object that has none of its own; another one in every process


@dataclass(frozen=True)
class Gold:
    """The acceptable answers of a row, each in the type of the field, all different; none where gold is missing.

    >>> Gold().missing, Gold(("Ann Lee", "A. Lee")).missing
    (True, False)
    """

    answers: tuple[object, ...] = ()

    @property
    def missing(self) -> bool:
        """Whether there is nothing to train on."""
        return not self.answers


def gold_of(annotation: Any, raw: object, field: str | None = None) -> Gold:
    """The rule: what `raw`, the row's own value, means in a field of this annotation.

    What comes back means the same again: each answer, given as `raw`, has itself as its one answer.

    Args:
        annotation: of the output field.
        raw: what stands in the row; for a key that is not there, None in a field that does not allow it.
        field: the field's name, for the error.

    Raises:
        DataError: the value cannot be turned into the field's type; names value, field and type.

    >>> gold_of(str, ["Ann Lee", "A. Lee", "Ann Lee"]).answers, gold_of(list[str], ["a", "b"]).answers
    (('Ann Lee', 'A. Lee'), (['a', 'b'],))
    >>> gold_of(int, "12").answers, gold_of(float, float("nan")).answers, gold_of(str | None, None).answers
    ((12,), (), (None,))
    """
    if annotation is str and type(raw) is str:  # as nearly always
        return Gold((raw,)) if raw.strip() else Gold()
    try:
        several = _several(raw) if is_text(annotation) else None
        found = [_answer(annotation, value) for value in ([raw] if several is None else several)]
    except Exception as error:  # a field's own validators may raise anything
        raise DataError(_does_not_fit(raw, field, annotation, _reason(error))) from error
    different = {(type(answer), repr(answer)): answer for answers in found for answer in answers}
    return Gold(tuple(different.values()))


def row_gold(signature: Any, field: str, example: Any) -> Gold:
    """The gold of a row for an output field; missing where the row does not have the key, or has it as an input.

    Raises `DataError` as `gold_of` does.

    >>> import dspy
    >>> signature = dspy.Signature("question -> answer")
    >>> [row_gold(signature, "answer", row).answers for row in (dspy.Example(answer=4), dspy.Example(label=4))]
    [('4',), ()]
    """
    if field not in example or field in (example._input_keys or ()):
        return Gold()
    return gold_of(signature.output_fields[field].annotation, example[field], field)


def is_text(annotation: Any) -> bool:
    """Whether a field holds text: `str`, or a union with `str` none of whose members takes a list.

    >>> is_text(str), is_text(str | None), is_text(list[str] | str), is_text(Literal["yes", "no"])
    (True, True, False, False)
    """
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return str in members and not any(map(_takes_a_list, members))


def allows_none(annotation: Any) -> bool:
    """Whether None is a value of this annotation.

    >>> allows_none(str), allows_none(str | None), allows_none(Literal["yes", None])
    (False, True, True)
    """
    try:
        return annotation is not str and _validator(annotation).validate_python(None) is None
    except Exception:  # a field's own validators may raise anything
        return False


def in_words(value: object) -> str:
    """A gold value as a prompt has it: the member of an enumeration by its value, which adapters read, not its name.

    >>> import enum
    >>> in_words(enum.Enum("Color", {"RED": "red"}, type=str).RED), in_words(4)
    ('red', '4')
    """
    return str(value.value if isinstance(value, Enum) else value)


def labels_as_text(labels: Mapping[str, object], annotations: Mapping[str, Any]) -> dict[str, str]:
    """A row's labels in words: what is missing is left out, and acceptable answers stand side by side.

    `annotations` are those of the labels that are output fields; any other label is shown as it is.

    >>> labels_as_text({"answer": ["Ann Lee", "A. Lee"], "date": float("nan"), "level": 3}, {"answer": str})
    {'answer': 'one of: Ann Lee; A. Lee', 'level': '3'}
    """
    shown: dict[str, str] = {}
    for name, raw in labels.items():
        answers = (raw,)
        if name in annotations and (several := _several(raw)) is not None and is_text(annotations[name]):
            answers = tuple(several)
        nothing = not allows_none(annotations.get(name, str))
        texts = [in_words(answer) for answer in answers if not (is_missing(answer) or (answer is None and nothing))]
        if texts:
            shown[name] = f"one of: {'; '.join(texts)}" if len(texts) > 1 else texts[0]
    return shown


def shortened(value: object) -> str:
    """A value for a message, on one line.

    >>> shortened("a" * 200)[-5:]
    'aa...'
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def is_missing(value: object) -> bool:
    """Whether a value says that there is none, whatever the field: NaN, pandas.NA, NaT, blanks. None is not judged.

    >>> [is_missing(value) for value in (float("nan"), " ", "nan", 0, None, [])]
    [True, True, False, False, False, False]
    """
    if isinstance(value, str):
        return not value.strip()
    if getattr(value, "shape", ()) != () or isinstance(value, (list, tuple, Set, Mapping)):
        return False
    try:
        unequal: Any = value != value  # NaN and NaT differ from themselves
        if unequal is value:  # a comparison with pandas.NA is pandas.NA; False is no different from False
            return not isinstance(value, bool) and str(getattr(value, "dtype", "")) != "bool"
        return bool(unequal) or str(value) == "<NA>"
    except Exception:  # a stranger's comparison may raise anything
        return False


def _answer(annotation: Any, raw: object) -> tuple[object, ...]:
    """The one answer that a value is; nothing where it is missing."""
    if is_missing(raw):
        return ()
    value = _plain(raw)
    if value is None:
        return (None,) if allows_none(annotation) else ()
    found = _plain(_fitted(annotation, value))
    return () if is_missing(found) else (found,)  # "nan" in a table of texts is NaN in a field of numbers


def _fitted(annotation: Any, value: object) -> object:
    """The value in the type of the field: as it is where the type takes it so, else as an adapter would read it."""
    if annotation is str:
        return _text(value)
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    try:
        return _validator(annotation).validate_python(value, strict=True)
    except ValidationError:
        value = value.value if isinstance(value, Enum) and not isinstance(annotation, type(Enum)) else value
    try:
        found = parse_value(value, annotation)
    except Exception:  # as above
        if not is_text(annotation):
            raise
        return _text(value)
    return _member(annotation, found) if get_origin(annotation) is Literal else found


def _validator(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _kept_validator(annotation)
    except TypeError:  # it cannot be hashed
        return TypeAdapter(annotation)


@lru_cache(64)
def _kept_validator(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)  # takes as long as to validate a hundred values


def _member(annotation: Any, value: object) -> object:
    """The member of a Literal that a value equals: a table with a gap has 1.0 for 1."""
    for member in get_args(annotation):
        if member == value and isinstance(member, bool) == isinstance(value, bool):
            return member
    raise DataError(f"it is none of {', '.join(map(repr, get_args(annotation)))}")


def _text(value: object) -> str:
    """A value of a text field as text."""
    if isinstance(value, Enum):
        return _text(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    if _several(value) is not None:
        raise DataError("an acceptable answer is a text, and not a list itself")
    if isinstance(value, (Mapping, BaseModel)) or is_dataclass(value):
        return json.dumps(serialize_for_json(value), ensure_ascii=False)
    text = str(value)
    if ADDRESS in text:
        raise DataError(f"an object of type {type(value).__name__} has no text of its own")
    return text


def _several(value: object) -> list[Any] | None:
    """What a list, tuple, set or array holds, sets in a fixed order; None for anything else."""
    if isinstance(value, Set):
        return sorted(value, key=repr)
    if callable(getattr(value, "tolist", None)):
        return None if getattr(value, "shape", None) == () else list(_iterable(value))
    single = (str, bytes, bytearray, Mapping, Iterator, BaseModel, type)
    if isinstance(value, single) or hasattr(value, "keys") or not isinstance(value, Iterable):
        return None
    return list(_iterable(value))


def _iterable(value: Any) -> Iterable[Any]:
    return value


def _plain(value: object) -> object:
    """Scalars and arrays of numpy, pandas and torch as Python's own, in lists and mappings, too; sets as lists."""
    if isinstance(value, Iterator):
        raise DataError("it can be read only once, and is read several times; make it a list")
    if type(value) is tuple:
        return tuple(map(_inner, value))
    if type(value) is dict:
        return {_inner(key): _inner(entry) for key, entry in value.items()}
    if isinstance(value, Set):  # in another order in every process
        return sorted(map(_inner, value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, tuple)):
        return list(map(_inner, value))
    return _plain_array(value) if callable(getattr(value, "tolist", None)) else _plain_time(value)


def _plain_array(value: Any) -> object:
    if getattr(value, "shape", None) != ():
        return list(map(_inner, value))
    kind, found = getattr(value.dtype, "kind", ""), value.tolist()
    if kind == "f" and value.dtype.itemsize < 8:
        return float(str(value))  # the shortest that is this number: 0.1, and not 0.10000000149011612
    if kind in ("M", "m") and isinstance(found, int):  # nanoseconds, which Python's own do not have
        return value.astype({"M": "datetime64[us]", "m": "timedelta64[us]"}[kind]).tolist()
    return found


def _plain_time(value: Any) -> object:
    """Moments and durations of pandas as Python's own; anything else as it is."""
    if callable(getattr(value, "to_pydatetime", None)):
        return value.to_pydatetime(warn=False)
    return value.to_pytimedelta() if callable(getattr(value, "to_pytimedelta", None)) else value


def _inner(value: object) -> object:
    """An entry of a list or mapping, which is all there or no value at all."""
    if not isinstance(value, str) and is_missing(value):
        raise DataError(f"it holds {value!r}, which is a missing value")
    return _plain(value)


def _takes_a_list(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _takes_a_list(get_args(annotation)[0])
    kind = get_origin(annotation) or annotation
    if kind is Any:
        return True
    if not isinstance(kind, type) or issubclass(kind, (str, bytes)):
        return False
    return issubclass(list, kind) or issubclass(kind, (Sequence, Set))


def _does_not_fit(raw: object, field: str | None, annotation: Any, reason: str) -> str:
    named = f" of `{field}`" if field else ""
    if _several(raw) is not None and not is_text(annotation) and not _takes_a_list(annotation):
        reason += " (a list of acceptable answers is taken in text fields)"
    return (
        f"The gold value {shortened(raw)}{named} does not fit its type {get_annotation_name(annotation)}: {reason}. "
        "Correct the rows, or the field's type."
    )


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error).rstrip(".") or type(error).__name__
    parts = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()[:3]]
    return "; ".join(f"{place}: {said}" if place else said for place, said in parts)
