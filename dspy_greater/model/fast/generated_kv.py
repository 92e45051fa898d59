"""The key-value states of rows that were just generated, kept so that what comes after them costs no second reading.

When a row has generated its reasoning, the states of its prompt and its reasoning are in the cache of the batch. What
is asked next is how likely the gold answer is after them: a few tokens more. `GeneratedStates` keeps the states of
finished rows; `find` picks, for a sequence, the row that begins most like it: a `Continuation`.

Shapes: n rows of one batch, S slots of its cache, T tokens that are read after them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dspy_greater.model.kv_cache import Move, join, shared_length

MOST_BYTES = 2 << 30  # of states; the oldest go first
_SHARE_OF_DEVICE = 0.1  # of an accelerator's memory


@dataclass(frozen=True)
class Places:
    """Where the tokens of a row lie in a cache: [first pads | `shared` tokens | pads between | its other tokens]."""

    first: int
    shared: int
    between: int


def slot_mask(places: Sequence[Places], lengths: Sequence[int], slots: int) -> Tensor:
    """[n, S], S = `slots`: 1 where one of the first `lengths[j]` tokens of row j lies.

    >>> slot_mask([Places(first=1, shared=2, between=1)], [4], 7).tolist()
    [[0, 1, 1, 0, 1, 1, 0]]
    """
    slot = torch.arange(slots)[None]  # [1, S]
    first, shared, between = torch.tensor([(place.first, place.shared, place.between) for place in places]).T[..., None]
    length = torch.tensor(lengths)[:, None]
    before = (slot >= first) & (slot < first + torch.minimum(shared, length))
    own = (slot >= first + shared + between) & (slot < first + between + length)
    return (before | own).long()


@dataclass(frozen=True, eq=False)
class GeneratedRows:
    """Rows that left a decode batch together, as its cache held them."""

    token_ids: tuple[tuple[int, ...], ...]  # n rows: the tokens whose states are held
    places: tuple[Places, ...]  # [n]
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values, each [n, heads, S, head size]

    @property
    def slots(self) -> int:
        """S: places in the cache, pads and leftovers included."""
        return self.layers[0][0].shape[-2]

    @property
    def bytes(self) -> int:
        """What the states take."""
        return sum(state.nbytes for layer in self.layers for state in layer)

    def cache(self, model: Any) -> DynamicCache:
        """A new cache that holds the states as they are, without copying them."""
        cache, layers = DynamicCache(config=model.config), [DynamicLayer() for _ in self.layers]
        cache.layers[:] = layers
        for layer, (keys, values) in zip(layers, self.layers, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache


@dataclass(frozen=True)
class Continuation:
    """A sequence that begins as a kept row does."""

    rows: GeneratedRows
    row: int
    known: int  # tokens that they have in common


def continued(model: Any, found: Sequence[Continuation], room: int) -> tuple[DynamicCache, Tensor]:
    """A copy of the states of n rows in one cache with `room` tokens to spare, and [n, S]: 1 where they are known.

    The rows may have been written in different batches: each ends at the last of S slots.
    """
    apart = list({id(continuation.rows): continuation.rows for continuation in found}.values())
    slots = max(rows.slots for rows in apart)
    moves: list[Move] = []
    for part, rows in enumerate(apart):
        mine = [number for number, continuation in enumerate(found) if continuation.rows is rows]
        moves.append((part, [found[number].row for number in mine], mine, 0))
    cache = join(model, slots + room, [rows.cache(model) for rows in apart], moves, slots)
    held = [(continuation.rows.places[continuation.row], slots - continuation.rows.slots) for continuation in found]
    places = [replace(place, first=place.first + pads) for place, pads in held]
    return cache, slot_mask(places, [continuation.known for continuation in found], slots)


class GeneratedStates:
    """The states of rows that one session generated, the oldest going first where they are too many.

    At most 2 GiB of them; on CUDA a tenth of the device's memory where that is more. Use it while holding the engine.
    """

    def __init__(self) -> None:
        self._rows: list[GeneratedRows] = []
        self._order: list[tuple[tuple[int, ...], int, int]] | None = None  # tokens, which rows, which of them; sorted

    @property
    def bytes(self) -> int:
        """What is kept at the moment."""
        return sum(rows.bytes for rows in self._rows)

    def drop(self) -> bool:
        """Give the memory back; what is needed again is read again. Whether there was any."""
        held = bool(self._rows)
        self._rows, self._order = [], None
        return held

    def make_room(self, size: int, device: torch.device) -> bool:
        """Let the oldest go where `size` bytes more would be too many; False: they are by themselves."""
        limit = _most_bytes(device)
        while self._rows and self.bytes + size > limit:
            self._rows.pop(0)
            self._order = None
        return size <= limit

    def keep(self, rows: GeneratedRows) -> None:
        """Keep these rows; for the room see `make_room`."""
        self._rows.append(rows)
        self._order = None

    def find(self, sequence: Sequence[int], *, least: int, most: int) -> Continuation | None:
        """The kept row that begins most like the sequence, if at least `least` tokens; `most` of them count."""
        if not self._rows:
            return None
        if self._order is None:
            self._order = sorted(
                (tokens, at, row) for at, rows in enumerate(self._rows) for row, tokens in enumerate(rows.token_ids)
            )
        wanted = tuple(sequence)
        place = bisect.bisect_left(self._order, (wanted, 0, 0))
        # Whatever has the longest beginning in common with it stands next to it in sorted order.
        near = self._order[max(0, place - 1) : place + 1]
        found = [(min(most, shared_length([wanted, tokens])), at, row) for tokens, at, row in near]
        known, at, row = max(found, key=lambda candidate: candidate[0])
        return Continuation(self._rows[at], row, known) if known >= least else None


def relief(generated: GeneratedStates | None, *others: Callable[[], bool]) -> Callable[[], bool]:
    """What gives up the kept states, and whatever `others` give up; it says whether there was any."""
    return lambda: any([generated is not None and generated.drop(), *(give_up() for give_up in others)])


def _most_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return MOST_BYTES
    # Of all there is, not of what is free: a run that is resumed has to keep the same rows.
    _, total = torch.cuda.mem_get_info(device)
    return max(MOST_BYTES, _SHARE_OF_DEVICE * total)
