"""Which rows of a call go together: a function of the rows alone, so that results do not depend on the workers.

Shapes: P tokens of the opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dspy_greater.model.fast.prefix_cache import LEAST_SHARED
from dspy_greater.model.interface import TokenQuery, Tokens
from dspy_greater.model.kv_cache import shared_length
from dspy_greater.model.teacher_forcing import token_batches
from dspy_greater.workers.jobs import Opening

_JOBS_PER_BATCH = 4  # a call that is one batch in one process gives several workers something to do


def even_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """As `token_batches` of a quarter of so many tokens, and as many batches, but as even as they can be.

    >>> even_batches([4, 4, 4, 4, 4], max_batch_tokens=64)  # of 16: four and one
    [[0, 1, 2], [3, 4]]
    """
    if not lengths:
        return []
    most = max(1, max_batch_tokens // _JOBS_PER_BATCH)
    batches = token_batches(lengths, most)
    least = 0
    while most - least > 1:  # the smallest bound that makes no batch more
        middle = (least + most) // 2
        tried = token_batches(lengths, middle)
        if len(tried) == len(batches):
            most, batches = middle, tried
        else:
            least = middle
    return batches


def opening_of(beginnings: Sequence[Tokens], longest: int) -> Opening:
    """What the sequences share of these beginnings; nothing where it is not worth a pass of its own."""
    shared = shared_length(beginnings) if len(beginnings) > 1 else 0
    if shared < LEAST_SHARED:
        return Opening()
    return Opening(beginnings[0][:shared], len(beginnings), longest)


def first_asked(sequences: Sequence[Tokens], queries: Sequence[TokenQuery], wanted: Iterable[int]) -> dict[int, int]:
    """Query -> the first of the wanted ones that asks the same: the same token, after the same, as warm.

    >>> first_asked([(1, 2, 3), (1, 2, 4)], [TokenQuery(0, 1), TokenQuery(1, 1), TokenQuery(1, 2)], range(3))
    {0: 0, 1: 0, 2: 2}
    """
    seen: dict[tuple[Tokens, float], int] = {}
    found: dict[int, int] = {}
    for number in wanted:
        query = queries[number]
        asked = (sequences[query.row][: query.at + 1], query.temperature)
        found[number] = seen.setdefault(asked, number)
    return found
