"""Which rows train and which validate, and the gold values that they must have."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import dspy
from dspy.adapters.utils import get_annotation_name

from dspy_greater.errors import DataError
from dspy_greater.notices import warn_caller
from dspy_greater.program.fingerprint import row_key
from dspy_greater.program.predictors import Predictor
from dspy_greater.prompt.gold import ADDRESS, Gold, allows_none, gold_of, row_gold, shortened
from dspy_greater.prompt.target import assistant_text

_ROWS_NAMED = 10  # in a message


def name_rows(rows: Sequence[int]) -> str:
    """The first of these row numbers, for a message.

    Example:
        >>> name_rows([3]), name_rows(range(12))
        ('Row 3', 'Rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more')
    """
    named = ", ".join(str(row) for row in rows[:_ROWS_NAMED])
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f"Row{'s' if len(rows) > 1 else ''} {named}{more}"


def check_examples(examples: Sequence[Any], *, name: str = "trainset") -> None:
    """Raises `DataError` when there are no examples, or some do not say which fields are inputs."""
    if not examples:
        raise DataError(f"The {name} is empty. Pass at least one dspy.Example.")
    strangers = [row for row, example in enumerate(examples) if not isinstance(example, dspy.Example)]
    if strangers:
        raise DataError(
            f"{name_rows(strangers)} of the {name} {_verb(strangers, 'are', 'is')} not dspy.Example. "
            "Build them as dspy.Example(question=..., answer=...).with_inputs('question')."
        )
    bare = [row for row, example in enumerate(examples) if example._input_keys is None]
    if bare:
        raise DataError(
            f"{name_rows(bare)} of the {name} {_verb(bare, 'do', 'does')} not say which fields are inputs. "
            "Call .with_inputs('question', ...) on each example."
        )


class RowLimits(Protocol):
    """How many rows of each kind an optimizer takes at most."""

    @property
    def train_rows(self) -> int:
        """Rows to train on."""
        ...

    @property
    def validation_rows(self) -> int:
        """Rows on which the finalists meet the seed."""
        ...


def as_list(rows: Iterable[Any] | None, *, name: str) -> list[Any]:
    """All rows, of a generator too, which can be read only once; no rows for None.

    Raises `DataError` when they are not a collection.

    Example:
        >>> as_list((row for row in "ab"), name="trainset"), as_list(None, name="valset")
        (['a', 'b'], [])
    """
    if rows is None:
        return []
    if not isinstance(rows, Iterable):
        raise DataError(f"The {name} is a {type(rows).__name__}. Pass a list of dspy.Example.")
    return list(rows)


def split(
    trainset: Sequence[Any], valset: Sequence[Any] | None, *, settings: RowLimits, seed: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The rows to train and to validate on: seeded samples, disjoint where there is no valset.

    Without a valset, at most half of the trainset is kept for validation; a trainset of one
    row has to serve as both, with a warning.
    """
    rng = random.Random(f"{seed}/rows")
    rows = rng.sample(list(trainset), len(trainset))
    if not valset:
        kept = min(settings.validation_rows, len(rows) // 2)
        validation, rows = rows[:kept], rows[kept:]
    else:
        validation = rng.sample(list(valset), min(settings.validation_rows, len(valset)))
    train = rows[: settings.train_rows]
    if not validation:
        validation = list(train)
    trained_on = {row_key(row) for row in train}
    shared = sum(row_key(row) in trained_on for row in validation)
    if shared:
        warn_caller(
            f"{shared} of {len(validation)} validation rows are also training rows, so the validation score is "
            "optimistic. Pass a valset of other rows.",
        )
    return tuple(train), tuple(validation)


def numbers_in(rows: Sequence[Any], trainset: Sequence[Any]) -> tuple[int, ...]:
    """Where each of these rows stands in the caller's trainset; of a row that stands there twice, the first place.

    Example:
        >>> train = [["a"], ["b"], ["c"]]
        >>> numbers_in([train[2], train[0]], train)
        (2, 0)
    """
    places: dict[int, int] = {}
    for place, row in enumerate(trainset):
        places.setdefault(id(row), place)
    return tuple(places[id(row)] for row in rows)


def supervised_field(predictor: Predictor, trainset: Sequence[Any]) -> str | None:
    """The last output field of the predictor that the examples carry a gold value for, or None.

    A field that is None on every row, though it may be, gives way to one that tells rows apart.

    Raises `DataError` when some rows lack that value, or do not say which fields are inputs.
    """
    check_examples(trainset)
    found: str | None = None
    for name in reversed(predictor.output_fields):
        golds = [gold for example in trainset if (gold := _gold(predictor, name, example)) is None or not gold.missing]
        if any(gold is None or gold.answers != (None,) for gold in golds):
            found = name
            break
        found = found or (name if golds else None)
    if found is not None:
        refuse_missing_gold(predictor, found, trainset)
    return found


def refuse_missing_gold(predictor: Predictor, field: str, rows: Sequence[Any], *, name: str = "trainset") -> None:
    """Raises `DataError` when some rows have no gold value for an output field, see `gold`."""
    missing = _without_gold(predictor, field, rows)
    if missing:
        none = ", None where there is none" if allows_none(predictor.signature.output_fields[field].annotation) else ""
        raise DataError(
            f"{name_rows(missing)} of the {name} {_verb(missing, 'have', 'has')} no gold value for `{field}`, which "
            f"predictor `{predictor.name}` is trained on (rows are counted from 0). Fill in the value{none}, "
            "or leave those rows out."
        )


def refuse_unfit_gold(predictor: Predictor, field: str, trainset: Sequence[Any]) -> None:
    """Raises `DataError` when a gold value does not fit the type of its output field."""
    reasons: dict[int, DataError] = {}
    for row, example in enumerate(trainset):
        try:
            row_gold(predictor.signature, field, example)
        except DataError as error:
            reasons[row] = error
    _refuse(predictor, field, reasons)


def refuse_unwritable_gold(predictor: Predictor, field: str, rows: Sequence[Any], trainset: Sequence[Any]) -> None:
    """Raises `DataError` when the predictor's adapter cannot write an acceptable answer of one of these training rows.

    What their losses need is tried: a rendering in which the answer can be found.
    """
    signature = _alone(predictor.signature, field)
    numbers = {id(example): row for row, example in enumerate(trainset)}
    reasons: dict[int, DataError] = {}
    for example in rows:
        try:
            for answer in row_gold(predictor.signature, field, example).answers:
                _try_to_write(signature, predictor.adapter, field, answer)
        except DataError as error:
            reasons[numbers[id(example)]] = error
    _refuse(predictor, field, dict(sorted(reasons.items())))


def _refuse(predictor: Predictor, field: str, reasons: Mapping[int, DataError]) -> None:
    if reasons:
        rows = list(reasons)
        raise DataError(
            f"{name_rows(rows)} of the trainset {_verb(rows, 'have', 'has')} a gold value that does not fit `{field}` "
            f"of predictor `{predictor.name}` (rows are counted from 0). In row {rows[0]}: {reasons[rows[0]]}"
        ) from reasons[rows[0]]


def warn_of_misread_gold(predictor: Predictor, field: str, rows: Sequence[Any]) -> None:
    """Warns where the adapter does not read a gold value as that value again, so that `==` finds no answer right."""
    annotation = predictor.signature.output_fields[field].annotation
    if annotation is str:
        return
    signature, adapter = _alone(predictor.signature, field), type(predictor.adapter).__name__
    golds = (row_gold(signature, field, example) for example in rows)
    for answer in {repr(value): value for gold in golds for value in gold.answers}.values():
        written, read = _read_again(predictor.adapter, signature, field, answer)
        if read is None:
            continue
        warn_caller(
            f"{adapter} writes the gold value {shortened(answer)} of `{field}` ({get_annotation_name(annotation)}) as "
            f"{shortened(written)}, and {read}, so a metric that compares values finds no such answer right. Use "
            "another adapter (dspy.JSONAdapter keeps types apart) or another type, or compare texts in the metric.",
        )
        return


def _read_again(adapter: Any, signature: Any, field: str, answer: object) -> tuple[str, str | None]:
    """What an adapter writes for an answer, and what it reads there in words; None where that is the answer."""
    with dspy.context(callbacks=[]):
        written = str(adapter.format_assistant_message_content(signature, {field: answer}))
        try:
            read = adapter.parse(signature, written)[field]
            same = gold_of(signature.output_fields[field].annotation, read).answers == (answer,)
        except Exception:  # an adapter of one's own may raise anything
            return written, "cannot read that again"
    texts = [" ".join(value.split()) if isinstance(value, str) else value for value in (read, answer)]
    return written, None if same or texts[0] == texts[1] else f"reads that as {shortened(read)}"


def _without_gold(predictor: Predictor, field: str, rows: Sequence[Any]) -> list[int]:
    """The rows whose gold value for a field is missing."""
    golds = [_gold(predictor, field, example) for example in rows]
    return [row for row, gold in enumerate(golds) if gold is not None and gold.missing]


def _gold(predictor: Predictor, field: str, example: Any) -> Gold | None:
    """None for a value that is there and does not fit."""
    try:
        return row_gold(predictor.signature, field, example)
    except DataError:
        return None


def _alone(signature: Any, field: str) -> Any:
    """The signature with no other output field."""
    for name in signature.output_fields:
        if name != field:
            signature = signature.delete(name)
    return signature


def _try_to_write(signature: Any, adapter: Any, field: str, answer: object) -> None:
    writer, kind = type(adapter).__name__, get_annotation_name(signature.output_fields[field].annotation)
    try:
        found = assistant_text(adapter, signature, {}, field, answer)
    except Exception as error:  # an adapter of one's own may raise anything
        raise DataError(f"{writer} cannot write {shortened(answer)} in a field of type {kind}: {error}") from error
    if ADDRESS in found.text[found.gold :] and not isinstance(answer, str):
        raise DataError(
            f"{writer} writes {shortened(answer)} in a field of type {kind} by its address. Give a text, a number, or "
            "a list of them."
        )


def _verb(rows: Sequence[int], several: str, one: str) -> str:
    return several if len(rows) > 1 else one
