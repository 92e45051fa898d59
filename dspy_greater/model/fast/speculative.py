"""A guess of what a row will generate, taken from what was generated after a prompt that differs in a few tokens.

A candidate instruction differs from the current one in a single token, and often the model reasons on as it did before.
So what it generated then is a draft: `prefill` reads it together with the prompt, keeps the tokens that the row would
have chosen anyway, one after the other, and decoding goes on from the first that it would not. The text is the same as
without drafts (up to rounding in the last digit of a logit), for greedy rows and for sampled ones: a row's random
numbers belong to its places.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from dspy_greater.model.kv_cache import shared_length

MOST_CHANGED = 16  # tokens in which two prompts may differ, all in one place

Tokens = tuple[int, ...]


class Drafts:
    """What was generated after which prompt.

    >>> drafts = Drafts([((1, 2, 3, 4), (7, 8))])
    >>> drafts.guess((1, 5, 3, 4)), drafts.guess(range(40))
    ((7, 8), ())
    """

    def __init__(self, generated: Iterable[tuple[Sequence[int], Sequence[int]]] = ()) -> None:
        self._generated: dict[Tokens, Tokens] = {tuple(prompt): tuple(text) for prompt, text in generated}
        self._reversed = sorted(prompt[::-1] for prompt in self._generated)

    def __len__(self) -> int:
        return len(self._generated)

    def guess(self, prompt: Sequence[int]) -> Tokens:
        """What was generated after the prompt that ends most like this one; nothing if they differ by too much.

        A prompt ends with a row's own input, and differs in the instruction before it.
        """
        wanted = tuple(prompt)
        place = bisect.bisect_left(self._reversed, wanted[::-1])
        # The longest common ending stands next to it in this order.
        near = self._reversed[max(0, place - 1) : place + 1]
        alike = max(near, key=lambda tokens: shared_length([tokens, wanted[::-1]]), default=())[::-1]
        return self._generated[alike] if alike and changed(alike, wanted) <= MOST_CHANGED else ()


def changed(one: Tokens, other: Tokens) -> int:
    """Between what both begin and what both end with, the tokens of the longer one.

    >>> changed((1, 2, 3, 4), (1, 7, 7, 4))
    2
    """
    before = shared_length([one, other])
    after = min(shared_length([one[::-1], other[::-1]]), len(one) - before, len(other) - before)
    return max(len(one), len(other)) - before - after
