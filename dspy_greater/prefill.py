"""Which rows of a batch are read together: those that begin alike, and of these the ones of about one length.

All rows of a batch begin with the chat template's system message; the rows of one candidate also share what stands
after the edited token. Each such beginning is read once (`prefix`), and the rest of its rows in parts that differ
little in length, so that little of what is computed is padding.

Shapes: n rows of a part, P tokens of its prefix, T tokens of its longest rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .prefix import LEAST_SAVED, shared_length

_LEAST_ROWS = 8  # of a part
_MOST_PADDING = 0.15  # of a part's own tokens


@dataclass(frozen=True)
class Part:
    """Rows of a batch, by their number in it, that begin with the same `shared` tokens."""

    rows: tuple[int, ...]
    shared: int


def parts_of(contexts: Sequence[tuple[int, ...]], *, divide: bool = True) -> list[Part]:
    """Every row in one part; each row keeps at least one token behind the shared ones.

    With `divide=False` all rows are one part.

    >>> parts_of([(1, 2), (1, 2, 3)])
    [Part(rows=(0, 1), shared=1)]
    """
    everyone = tuple(range(len(contexts)))
    together = Part(everyone, _alike(contexts, everyone))
    return _by_length(_by_beginning(together, contexts), contexts) if divide else [together]


def _by_beginning(part: Part, contexts: Sequence[tuple[int, ...]]) -> list[Part]:
    """Split where the token after the shared ones differs, wherever that shares enough tokens more."""
    branches: dict[int, list[int]] = {}
    for row in part.rows:
        branches.setdefault(contexts[row][part.shared], []).append(row)
    if len(branches) < 2:
        return [part]
    found: list[Part] = []
    rest: list[int] = []
    for rows in branches.values():
        branch = Part(tuple(rows), _alike(contexts, rows))
        if (len(rows) - 1) * (branch.shared - part.shared) >= LEAST_SAVED:
            found += _by_beginning(branch, contexts)
        else:
            rest += rows
    return [*found, Part(tuple(sorted(rest)), part.shared)] if rest else found


def _by_length(parts: Sequence[Part], contexts: Sequence[tuple[int, ...]]) -> list[Part]:
    """Cut parts whose rows differ so much in length that padding would cost more than another forward pass."""
    found: list[Part] = []
    for part in parts:
        ordered = sorted(part.rows, key=lambda row: len(contexts[row]))
        start = 0
        for at in range(len(ordered)):
            mine = [len(contexts[row]) - part.shared for row in ordered[start : at + 1]]
            padding = len(mine) * mine[-1] - sum(mine)
            if len(mine) > _LEAST_ROWS and padding > max(LEAST_SAVED, _MOST_PADDING * sum(mine)):
                found.append(Part(tuple(ordered[start:at]), part.shared))
                start = at
        found.append(Part(tuple(ordered[start:]), part.shared))
    return found


def _alike(contexts: Sequence[tuple[int, ...]], rows: Sequence[int]) -> int:
    return shared_length([contexts[row][:-1] for row in rows])
