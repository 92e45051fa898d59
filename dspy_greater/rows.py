"""Which rows train and which validate."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from .identity import row_key


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
            stacklevel=4,
        )
    return tuple(train), tuple(validation)
