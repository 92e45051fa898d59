"""The tokens that several rows begin with: read once, without gradient, and shared as key-value states.

Attention is causal, so the states of a prefix do not depend on what follows it. `PrefixCache` reads a prefix
as one row and hands it out as a `Prefix`, whose states every row of a batch then sees as views.

Shapes: P tokens of the prefix, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dspy_greater.model.kv_cache import held_states, plain_cache, shared_length
from dspy_greater.model.teacher_forcing import is_out_of_memory, logits_at, right_padded

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

LEAST_SHARED = 16  # fewer tokens are not worth a forward of their own,
LEAST_SAVED = 256  # unless it saves all rows together this many


@dataclass(frozen=True, eq=False)
class Prefix:
    """The states of P tokens that rows begin with; they are never written to."""

    token_ids: tuple[int, ...]  # [P]
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values, each [1, heads, P, head size]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def states(self) -> list[Tensor]:
        """Keys and values of all layers, in turn."""
        return [state for layer in self.layers for state in layer]

    def holding(self, states: Sequence[Tensor]) -> Prefix:
        """The same tokens with other states."""
        return Prefix(self.token_ids, tuple(zip(states[::2], states[1::2], strict=True)))

    def first(self, length: int) -> Prefix:
        """The same for the first `length` tokens, as views."""
        layers = tuple((keys[..., :length, :], values[..., :length, :]) for keys, values in self.layers)
        return Prefix(self.token_ids[:length], layers)

    def fill(self, layers: Sequence[DynamicLayer], rows: int) -> None:
        """Let empty cache layers hold the states, for every one of N = `rows` rows, as views."""
        for layer, (keys, values) in zip(layers, self.layers, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (held.expand(rows, *held.shape[1:]) for held in (keys, values))

    def cache(self, model: Any, rows: int) -> DynamicCache:
        """A new cache that holds the states for N = `rows` rows; a forward pass appends copies to it."""
        cache = plain_cache(model)
        self.fill(cache.layers, rows)  # pyright: ignore[reportArgumentType]
        return cache


class PrefixCache:
    """Reads prefixes with an engine and keeps the longest one; use it while holding the engine.

    What is kept serves every prefix that begins with the same tokens: a shorter one is cut from it, a longer one is
    continued from it.

    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> with engine.exclusive():
    ...     prefixes = PrefixCache(engine)
    ...     prefix = prefixes.read(range(5, 45), rows=2, longest=60)
    ...     again = prefixes.read(range(5, 35), rows=2, longest=60)
    >>> len(prefix), len(again), engine.counters.prefilled_tokens
    (40, 30, 40)
    """

    def __init__(self, engine: Engine, kept: Prefix | None = None) -> None:
        self._engine, self.kept = engine, kept

    def drop(self) -> bool:
        """Give the memory back; what is needed again is read again. Whether there was any."""
        held, self.kept = self.kept is not None, None
        return held

    def read(self, token_ids: Sequence[int], *, rows: int, longest: int) -> Prefix | None:
        """The states of `token_ids`, or of a first part of them where the rest is not worth a forward pass.

        Args:
            token_ids: what N = `rows` rows begin with, each having at least one more token. For a row alone
                nothing is read, but what is kept is used.
            rows: how many.
            longest: tokens of the longest row, what it may still generate included.

        Returns:
            None when nothing is to be gained, the model's states cannot be shared, or memory ran out.
        """
        tokens = tuple(token_ids)
        if len(tokens) < LEAST_SHARED or longest > self._engine.checks.cache_reach:
            return None
        start = self._kept_part(tokens)
        missing = len(tokens) - (len(start) if start else 0)
        if rows < 2 or (start and missing < LEAST_SHARED and missing * (rows - 1) < LEAST_SAVED):
            return start
        try:
            found = self._continued(start, tokens)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            self.drop()
            return None
        if found is not None and (self.kept is None or len(found) >= len(self.kept)):
            self.kept = found
        return found

    def _kept_part(self, tokens: tuple[int, ...]) -> Prefix | None:
        """What is kept of the tokens, if it is enough to be worth sharing."""
        known = shared_length([tokens, self.kept.token_ids]) if self.kept else 0
        return self.kept.first(known) if self.kept and known >= LEAST_SHARED else None

    def _continued(self, start: Prefix | None, tokens: tuple[int, ...]) -> Prefix | None:
        """Read what `start` lacks of the tokens; None when the model left them out of the cache."""
        known, model = len(start) if start else 0, self._engine.model
        cache = start.cache(model, 1) if start else plain_cache(model)
        own, positions = right_padded([tokens[known:]])  # [1, T]
        last = (torch.tensor([0]), torch.tensor([own.shape[1] - 1]))
        # Tensors made in inference mode could not serve a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            logits_at(self._engine, own, positions + known, last, real=own.shape[1], past_key_values=cache)
        layers = tuple(held_states(layer) for layer in cache.layers)
        if any(keys.shape[-2] != len(tokens) for keys, _ in layers):
            self._engine.checks.cache_reach = 0
            return None
        return Prefix(tokens, layers)


class Beginning:
    """What the rows of some batches begin with: read when the first batch needs it, and again after memory ran out.

    Args:
        prefixes: what reads and keeps it.
        token_ids: what all N = `rows` rows begin with; more may be read of none of them.
        rows: how many.
        longest: tokens of the longest row.
    """

    def __init__(self, prefixes: PrefixCache, token_ids: Sequence[int], *, rows: int, longest: int) -> None:
        self._prefixes = prefixes
        self._read = partial(prefixes.read, token_ids, rows=rows, longest=longest)
        self._asked, self._prefix = False, None

    def prefix(self) -> Prefix | None:
        """Its states, or those of a first part of it; as `PrefixCache.read`."""
        if not self._asked:
            self._asked, self._prefix = True, self._read()
        return self._prefix

    def forget(self) -> bool:
        """Give the memory back; whether there was any."""
        held = self._prefix is not None
        self._asked, self._prefix = False, None
        return self._prefixes.drop() or held
