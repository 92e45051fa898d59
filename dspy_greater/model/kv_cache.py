"""The key-value cache that decoding writes to: in place, and put together from parts that were read apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dspy_greater.model.fast.prefix_cache import tokens_held

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

    def keep(self, order: Sequence[int], first: int) -> None:
        """Hold the rows of `order` alone, without the slots before `first`.

        A row that changes its place comes from behind those that are left, so it takes that of one that is gone.
        Once what is left is less than half of the buffer it is copied, so that the rest of the memory is free.
        """
        if self.keys is None or self.values is None:
            return
        moved = [(place, row) for place, row in enumerate(order) if place != row]
        if self._buffers is None or 2 * bytes_of(self._buffers[0][: len(order)]) < storage(self._buffers[0]):
            self.keys, self.values = (held[list(order), :, first:] for held in (self.keys, self.values))
            self._buffers = None
            return
        stop, places, rows = self.get_seq_length(), [place for place, _ in moved], [row for _, row in moved]
        for buffer in self._buffers if moved else ():
            buffer[places, :, first:stop] = buffer[rows, :, first:stop]
        self._buffers = (self._buffers[0][: len(order), :, first:], self._buffers[1][: len(order), :, first:])
        self.keys, self.values = (buffer[:, :, : stop - first] for buffer in self._buffers)


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
        joined.layers[index] = InPlaceLayer.joined(limit, [each.layers[index] for each in caches], moves, slots)
        for each in caches:
            each.layers[index] = DynamicLayer()
    return joined


def bytes_of(states: Tensor) -> int:
    """What the numbers of a tensor take."""
    return states.numel() * states.element_size()


def storage(states: Tensor) -> int:
    """What a tensor keeps in memory, with all that it is a view of."""
    return states.untyped_storage().nbytes()


def _as_slice(rows: Sequence[int]) -> slice | list[int]:
    """Neighbours as a slice, which is not copied twice."""
    first = rows[0]
    return slice(first, first + len(rows)) if list(rows) == list(range(first, first + len(rows))) else list(rows)
