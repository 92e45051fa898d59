"""Queries about sequences, sorted by the sequence that they are about."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dspy_greater.model.interface import TokenQuery, Tokens

Numbered = tuple[int, TokenQuery]  # a query and its number in the call


@dataclass(frozen=True)
class Reading:
    """A sequence and the queries about it, in the order of their places.

    >>> found = by_row([(1, 5, 6)], [TokenQuery(row=0, at=2), TokenQuery(row=0, at=1)])[0]
    >>> found.first, [number for number, _ in found.queries]
    (1, [1, 0])
    """

    tokens: Tokens
    queries: tuple[Numbered, ...]

    def part(self, kept: Iterable[Numbered], length: int | None = None) -> Reading:
        """Some of the queries, about the first tokens."""
        return Reading(self.tokens[:length], tuple(kept))

    @property
    def first(self) -> int:
        """The place of the first queried token."""
        return self.queries[0][1].at


def by_row(sequences: Sequence[Tokens], queries: Sequence[TokenQuery], reach: float = math.inf) -> dict[int, Reading]:
    """The sequences about which something is asked, by their row; what stands behind the last query is left out.

    Not of sequences of more than `reach` tokens: positions may depend on the length of such a one.
    """
    mine: dict[int, list[Numbered]] = defaultdict(list)
    for number, query in enumerate(queries):
        mine[query.row].append((number, query))
    found: dict[int, Reading] = {}
    for row in sorted(mine):
        asked = tuple(sorted(mine[row], key=lambda pair: pair[1].at))
        stop = asked[-1][1].at + 1 if len(sequences[row]) <= reach else None
        found[row] = Reading(sequences[row][:stop], asked)
    return found


def last_run(queries: Sequence[Numbered]) -> int:
    """How many of the queries, from the last one back, are about neighbouring tokens."""
    run = 1
    while run < len(queries) and queries[-run][1].at - queries[-run - 1][1].at <= 1:
        run += 1
    return run
