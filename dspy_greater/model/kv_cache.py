"""The key-value cache that decoding writes to: in place, and put together from parts that were read apart."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_GROWTH_LEAST = 64  # tokens by which a cache grows at least


Move = tuple[int, Sequence[int], Sequence[int], int]  # part, its rows, their new numbers, slots that they leave behind


class InPlaceLayer(DynamicLayer):
    """A growing cache layer that writes into a buffer instead of copying all earlier tokens every step.

    The buffer grows by quarters up to `limit` tokens: a row may be allowed thousands of tokens and write
    few, so the memory for all of them is not taken at once.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._buffers: tuple[Tensor, Tensor] | None = None  # two of [rows, heads, room, head size]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._buffers is None or stop > self._buffers[0].shape[-2]:
            self._buffers = (
                self._grown(self.keys, key_states, start, stop),
                self._grown(self.values, value_states, start, stop),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys = self._buffers[0][:, :, :stop]
        self.values = self._buffers[1][:, :, :stop]
        return self.keys, self.values

    @classmethod
    def joined(cls, limit: int, parts: Sequence[Any], moves: Sequence[Move], slots: int) -> InPlaceLayer:
        """One layer from the same layer of several parts: the states of each row end at the last of `slots`."""
        layer, one, rows = cls(limit), parts[0], sum(len(numbers) for _, _, numbers, _ in moves)
        if one.keys is None:  # some models share the states of other layers
            return layer
        layer.lazy_initialization(one.keys, one.values)
        layer._buffers = (
            layer._grown(None, one.keys[:1].expand(rows, -1, -1, -1), 0, slots),
            layer._grown(None, one.values[:1].expand(rows, -1, -1, -1), 0, slots),
        )
        for part, leaving, numbers, behind in moves:
            old, new = _as_slice(leaving), _as_slice(numbers)
            for buffer, states in zip(layer._buffers, (parts[part].keys, parts[part].values), strict=True):
                kept = states.shape[-2] - behind
                buffer[new, :, : slots - kept] = 0  # masked, and nan times zero would be nan
                buffer[new, :, slots - kept : slots] = states[old, :, :kept]
        layer.keys, layer.values = layer._buffers[0][:, :, :slots], layer._buffers[1][:, :, :slots]
        return layer

    def _grown(self, old: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
        rows, heads, _, size = new.shape
        room = max(stop, min(self._limit, stop + max(_GROWTH_LEAST, stop // 4)))
        buffer = new.new_empty(rows, heads, room, size)
        if start and old is not None:
            buffer[:, :, :start] = old
        return buffer

    def select(self, rows: Sequence[int], first: int) -> None:
        """Hold these rows alone, in this order, without the slots before `first`."""
        if self.keys is None or self.values is None:
            return
        self.keys, self.values = (held[list(rows), :, first:] for held in (self.keys, self.values))
        self._buffers = None


def new_cache(model: Any, limit: int) -> DynamicCache:
    """A cache for this model and `limit` tokens, written in place where it need not forget any of them."""
    cache = DynamicCache(config=model.config)
    if limit <= tokens_held(cache):
        cache.layers[:] = [InPlaceLayer(limit) for _ in cache.layers]
    return cache


def join(model: Any, limit: int, caches: Sequence[DynamicCache], moves: Sequence[Move], slots: int) -> DynamicCache:
    """One cache for the rows of several, in place; it takes the layers out of these, to need less memory."""
    joined = new_cache(model, limit)
    for index in range(len(joined.layers)):
        joined.layers[index] = InPlaceLayer.joined(limit, [cache.layers[index] for cache in caches], moves, slots)
        for cache in caches:
            cache.layers[index] = DynamicLayer()
    return joined


def _as_slice(rows: Sequence[int]) -> slice | list[int]:
    """Neighbours as a slice, which is not copied twice."""
    first = rows[0]
    return slice(first, first + len(rows)) if list(rows) == list(range(first, first + len(rows))) else list(rows)


def shared_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with.

    >>> shared_length([(1, 2, 3), (1, 2, 4, 5), (1, 2)])
    2
    """
    return len(os.path.commonprefix(list(sequences)))


def tokens_held(cache: DynamicCache) -> float:
    """How many tokens fit into the cache before it forgets one; 0 for layers that are no plain keys and values."""
    kinds = {type(layer) for layer in cache.layers}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0
    return min(getattr(layer, "sliding_window", math.inf) for layer in cache.layers)


def held_states(layer: Any) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, without any token in them where the model never filled it."""
    nothing = torch.empty(1, 1, 0, 1)
    return (nothing, nothing) if layer.keys is None else (layer.keys, layer.values)


def plain_cache(model: Any) -> DynamicCache:
    """An empty cache that keeps everything; within the reach of a sliding window it is the same as one that slides."""
    cache = DynamicCache(config=model.config)
    cache.layers[:] = [DynamicLayer() for _ in cache.layers]
    return cache


def rotation_is_fixed_up_to(model: Any) -> float:
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
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [rope["original_max_position_embeddings"] for rope in nested if "original_max_position_embeddings" in rope]


def reach_of(model: Any) -> float:
    """The most tokens of a whole sequence in which the states of a prefix are those of the prefix alone.

    0 where the model's cache holds anything but keys and values.
    """
    if not hasattr(model, "config"):
        return 0
    return min(tokens_held(DynamicCache(config=model.config)), rotation_is_fixed_up_to(model))
