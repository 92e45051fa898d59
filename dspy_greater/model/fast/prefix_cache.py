"""The tokens that several rows begin with: read once, without gradient, and shared as key-value states.

Attention is causal, so the states of a prefix do not depend on what follows it. `PrefixStore` reads a prefix
as one row and hands it out as a `Prefix`, whose states every row of a batch then sees as views.

Shapes: P tokens of the prefix, N rows, d hidden size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspy_greater.model.fast.scoped import Scoped

LEAST_SHARED = 16  # fewer tokens are not worth a forward of their own,
LEAST_SAVED = 256  # unless it saves all rows together this many

Tally = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Prefix:
    """The states of P tokens that rows begin with; they are never written to."""

    token_ids: tuple[int, ...]  # [P]
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values, each [1, heads, P, head size]
    hidden: Tensor | None  # [P, d] what the output layer is given, where the model shows it

    def __len__(self) -> int:
        return len(self.token_ids)

    def first(self, length: int) -> Prefix:
        """The same for the first `length` tokens, as views."""
        layers = tuple((keys[..., :length, :], values[..., :length, :]) for keys, values in self.layers)
        return Prefix(self.token_ids[:length], layers, None if self.hidden is None else self.hidden[:length])

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


@dataclass(eq=False)
class _Kept:
    prefix: Prefix | None = None


class PrefixStore:
    """Reads prefixes with a model; between `open` and the end of the block it keeps the longest one.

    What it keeps serves every prefix that begins with the same tokens: a shorter one is cut from it, a longer
    one is continued from it. Use it while holding the engine (`Engine.exclusive`).

    Args:
        model: a causal language model in the manner of `transformers`.
        tally: is told of what is computed, as `Engine.tally`.

    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> with engine.exclusive(), engine.prefixes.open():
    ...     prefix = engine.prefixes.read(range(5, 45), rows=2, longest=60)
    ...     again = engine.prefixes.read(range(5, 35), rows=2, longest=60)
    >>> len(prefix), len(again), engine.counters.prefilled_tokens, engine.prefixes.kept
    (40, 30, 40, None)
    """

    def __init__(self, model: Any, tally: Tally) -> None:
        self._model, self._tally = model, tally
        self._keeping = Scoped[_Kept]()
        self._shows_hidden = _output_layer(model) is not None

    def open(self) -> AbstractContextManager[object]:
        """Keep what is read until the outermost of the open blocks ends, for the threads that carry its context."""
        return self._keeping.open(_Kept)

    @property
    def kept(self) -> Prefix | None:
        """What is kept at the moment."""
        keeping = self._keeping.value
        return keeping.prefix if keeping else None

    def drop(self) -> None:
        """Give the memory back, whoever keeps it; what is needed again is read again."""
        for each in self._keeping.everywhere:
            each.prefix = None

    @cached_property
    def reach(self) -> float:
        """The most tokens of a whole sequence in which the states of a prefix are those of the prefix alone.

        0 where the model's cache holds anything but keys and values.
        """
        if not hasattr(self._model, "config"):
            return 0
        return min(tokens_held(DynamicCache(config=self._model.config)), _rotation_is_fixed_up_to(self._model))

    def read(self, token_ids: Sequence[int], *, rows: int, longest: int, with_hidden: bool = False) -> Prefix | None:
        """The states of `token_ids`, or of a first part of them where the rest is not worth a forward pass.

        Args:
            token_ids: what N = `rows` rows begin with, each having at least one more token. For a row alone
                nothing is read, but what is kept is used.
            longest: tokens of the longest row, what it may still write included.
            with_hidden: the caller needs `Prefix.hidden`.

        Returns:
            None when nothing is to be gained, the model's states cannot be shared, or memory ran out.
        """
        tokens = tuple(token_ids)
        if len(tokens) < LEAST_SHARED or longest > self.reach or (with_hidden and not self._shows_hidden):
            return None
        start = self._kept_part(tokens, with_hidden)
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
        if found is None or (with_hidden and found.hidden is None):
            return None
        keeping = self._keeping.value
        if keeping and (keeping.prefix is None or len(found) >= len(keeping.prefix)):
            keeping.prefix = found
        return found

    def _kept_part(self, tokens: tuple[int, ...], with_hidden: bool) -> Prefix | None:
        """What is kept of the tokens, if it is enough to be worth sharing."""
        kept = self.kept
        if kept is None or (with_hidden and kept.hidden is None):
            return None
        known = shared_length([tokens, kept.token_ids])
        return kept.first(known) if known >= LEAST_SHARED else None

    def _continued(self, start: Prefix | None, tokens: tuple[int, ...]) -> Prefix | None:
        """Read what `start` lacks of the tokens; None when the model left them out of the cache."""
        known = len(start) if start else 0
        cache = start.cache(self._model, 1) if start else plain_cache(self._model)
        device = self._model.get_input_embeddings().weight.device
        # Tensors made in inference mode could not serve a gradient later.
        with torch.inference_mode(False), torch.no_grad(), self._last_place_only(len(tokens) - known) as seen:
            output = self._model(
                input_ids=torch.tensor([tokens[known:]], device=device),
                position_ids=torch.arange(known, len(tokens), device=device)[None],
                past_key_values=cache,
                use_cache=True,
                **self._fewest_logits(),
            )
        self._tally(forwards=1, prefilled_tokens=len(tokens) - known, lm_head_rows=output.logits.shape[1])
        layers = tuple(held_states(layer) for layer in cache.layers)
        if any(keys.shape[-2] != len(tokens) for keys, _ in layers):
            self.reach = 0
            return None
        self._shows_hidden = bool(seen)
        hidden = seen[0] if seen else None
        if start and hidden is not None:
            hidden = None if start.hidden is None else torch.cat([start.hidden, hidden])
        return Prefix(tokens, layers, hidden)

    def _fewest_logits(self) -> dict[str, int]:
        known = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        return {"logits_to_keep": 1} if known and not self._shows_hidden else {}

    @contextmanager
    def _last_place_only(self, length: int) -> Iterator[list[Tensor]]:
        """Inside, the output layer maps the last of [1, P, d] alone; yields a list that gets all of them [P, d]."""
        seen: list[Tensor] = []

        def keep_last(_layer: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not inputs or inputs[0].shape[:-1] != (1, length):
                return None
            seen.append(inputs[0][0])
            return (inputs[0][:, -1:], *inputs[1:])

        layer = _output_layer(self._model)
        if layer is None:
            yield seen
            return
        hook = layer.register_forward_pre_hook(keep_last)
        try:
            yield seen
        finally:
            hook.remove()


class Beginning:
    """What the rows of one call begin with: read when it is first asked for, and again after `forget`.

    Args:
        store: reads and keeps it.
        token_ids: the rows' common beginning.
        rows: how many rows there are.
        longest: tokens of the longest row.
    """

    def __init__(self, store: PrefixStore, token_ids: Sequence[int], *, rows: int, longest: int) -> None:
        self._store, self._tokens, self._rows, self._longest = store, tuple(token_ids), rows, longest
        self._prefix: Prefix | None = None

    def read(self) -> Prefix | None:
        """Its states; None when nothing is shared."""
        if self._prefix is None:
            self._prefix = self._store.read(self._tokens, rows=self._rows, longest=self._longest)
        return self._prefix

    def length(self) -> int:
        """How many tokens are shared, their states being at hand."""
        found = self.read()
        return len(found) if found else 0

    def forget(self) -> None:
        """Give the memory back."""
        self._prefix = None
        self._store.drop()


def shared_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with.

    >>> shared_length([(1, 2, 3), (1, 2, 4, 5), (1, 2)])
    2
    """
    least, greatest = min(sequences), max(sequences)
    pairs = zip(least, greatest, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(least), len(greatest)))


def tokens_held(cache: DynamicCache) -> float:
    """How many tokens fit into the cache before it forgets one; 0 for layers that are no plain keys and values."""
    kinds = {type(layer) for layer in cache.layers}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0
    return min(getattr(layer, "sliding_window", math.inf) for layer in cache.layers)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Eval mode and no gradients for parameters, both as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that memory ran out, on whatever device."""
    said = any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))
    return said or isinstance(error, torch.OutOfMemoryError)


def _output_layer(model: Any) -> Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find else None


def held_states(layer: Any) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, without any token in them where the model never filled it."""
    nothing = torch.empty(1, 1, 0, 1)
    return (nothing, nothing) if layer.keys is None else (layer.keys, layer.values)


def plain_cache(model: Any) -> DynamicCache:
    """An empty cache that keeps everything; within the reach of a sliding window it is the same as one that slides."""
    cache = DynamicCache(config=model.config)
    cache.layers[:] = [DynamicLayer() for _ in cache.layers]
    return cache


def _rotation_is_fixed_up_to(model: Any) -> float:
    """The longest sequence at which position embeddings that adapt to the length (NTK, LongRoPE) do not yet."""
    limits = [math.inf]
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            limits += [getattr(module, "original_max_seq_len", 0), *_original_lengths(module)]
    return min(limits)


def _original_lengths(module: Any) -> list[float]:
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    nested = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    return [each["original_max_position_embeddings"] for each in nested if "original_max_position_embeddings" in each]
