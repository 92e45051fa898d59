"""Which rows train and which validate, and the gold values that they must have."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from dspy_greater.errors import DataError
from dspy_greater.program.fingerprint import row_key
from dspy_greater.program.predictors import PredictorSite, check_examples, name_rows
from dspy_greater.prompt.target import coerce_gold

# `stacklevel` of a warning from a function that `pose` calls: that function, `pose`, `compile`, the two
# wrappers that DSPy puts around it, and then the line that the user wrote.
CALL_OF_COMPILE = 6


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
    shared = len({row_key(row) for row in train} & {row_key(row) for row in validation})
    if shared:
        warnings.warn(
            f"{shared} of {len(validation)} validation rows are also training rows, so the validation score is "
            "optimistic. Pass a valset of other rows.",
            stacklevel=CALL_OF_COMPILE,
        )
    return tuple(train), tuple(validation)


def supervised_field(site: PredictorSite, trainset: Sequence[Any]) -> str | None:
    """The last output field of the predictor that the examples carry a gold value for, or None.

    Raises `DataError` when some rows lack that value, or do not say which fields are inputs.
    """
    check_examples(trainset)
    for name in reversed(site.output_fields):
        if len(_without_gold(name, trainset)) < len(trainset):
            refuse_missing_gold(site, name, trainset)
            return name
    return None


def refuse_missing_gold(site: PredictorSite, field: str, rows: Sequence[Any], *, name: str = "trainset") -> None:
    """Raises `DataError` when some rows have no gold value for an output field, or an empty one."""
    missing = _without_gold(field, rows)
    if missing:
        raise DataError(
            f"{name_rows(missing)} of the {name} {_have(missing)} no gold value for `{field}`, which "
            f"predictor `{site.name}` is trained on (rows are counted from 0). Fill in the value, "
            "or leave those rows out."
        )


def refuse_unfit_gold(site: PredictorSite, field: str, trainset: Sequence[Any]) -> None:
    """Raises `DataError` when a gold value cannot be written in the type of its output field."""
    reasons: dict[int, DataError] = {}
    for row, example in enumerate(trainset):
        try:
            coerce_gold(site.signature, field, example.labels()[field])
        except DataError as error:
            reasons[row] = error
    if reasons:
        rows = list(reasons)
        raise DataError(
            f"{name_rows(rows)} of the trainset {_have(rows)} a gold value that does not fit `{field}` of predictor "
            f"`{site.name}` (rows are counted from 0). In row {rows[0]}: {reasons[rows[0]]}"
        ) from reasons[rows[0]]


def _without_gold(field: str, rows: Sequence[Any]) -> list[int]:
    """The rows with no value for a field, or an empty text, which leaves nothing to train on."""
    values = [example.labels().get(field) for example in rows]
    return [row for row, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())]


def _have(rows: Sequence[int]) -> str:
    return "have" if len(rows) > 1 else "has"
