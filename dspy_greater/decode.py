"""The decode loop: rows of token ids in, written tokens out, on a left-padded batch with a key-value cache.

Finished rows leave the batch, the part of the prompts that all rows share is read once (`prefix`), and the
cache is written in place. A row's result does not depend on which rows it shares a batch with: its random numbers
are its own.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .prefill import Part, parts_of
from .prefix import PrefixStore, Tally, tokens_held
from .written import Places, WrittenRows, WrittenStates, slot_mask

_NOISE_BLOCK = 64
_GROWTH_LEAST = 64  # tokens by which a cache grows at least
_COMPACT_BELOW = 0.875  # finished rows leave once they are an eighth of the batch


@dataclass
class Row:
    """One sequence on its way: what it reads, how it is sampled, and what it has written so far."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    on_token: Callable[[int], bool | None] | None = None
    written: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    _noise: list[float] = field(default_factory=list)
    _generator: torch.Generator | None = None

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt and what was written: a row interrupted by a lack of memory goes on from here."""
        return (*self.prompt, *self.written)

    def uniform(self) -> float:
        """The random number in [0, 1) of the token that is about to be written."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        while len(self._noise) <= len(self.written):
            block = torch.rand(_NOISE_BLOCK, generator=self._generator, dtype=torch.float64)
            self._noise.extend(block.tolist())
        return self._noise[len(self.written)]

    def accept(self, token: int) -> None:
        """Take the next token: a stop token ends the row unwritten, a full row ends by length."""
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
            return
        self.written.append(token)
        if self.on_token is not None and self.on_token(token):
            self.finish_reason = "stop"
        elif len(self.written) >= self.max_new_tokens:
            self.finish_reason = "length"


def row_seed(seed: int, row: int) -> int:
    """A 63-bit seed for one row, a fixed function of the call's seed and the row's place in the call."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _InPlaceLayer(DynamicLayer):
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
    def joined(cls, limit: int, parts: Sequence[_Read], index: int, slots: int) -> _InPlaceLayer:
        """Layer number `index` of all parts in one, each part's states at the end of `slots`."""
        held: list[Any] = [part.cache.layers[index] for part in parts]
        rows, layer, one = sum(len(part.rows) for part in parts), cls(limit), held[0]
        if one.keys is None:  # some models share the states of other layers
            return layer
        layer.lazy_initialization(one.keys, one.values)
        layer._buffers = (
            layer._grown(None, one.keys[:1].expand(rows, -1, -1, -1), 0, slots),
            layer._grown(None, one.values[:1].expand(rows, -1, -1, -1), 0, slots),
        )
        for part, read in zip(parts, held, strict=True):
            for buffer, states in zip(layer._buffers, (read.keys, read.values), strict=True):
                buffer[part.rows, :, : slots - part.length] = 0  # masked, and nan times zero would be nan
                buffer[part.rows, :, slots - part.length : slots] = states
        layer.keys, layer.values = layer._buffers[0][:, :, :slots], layer._buffers[1][:, :, :slots]
        return layer

    def _grown(self, old: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
        rows, heads, _, size = new.shape
        room = max(stop, min(self._limit, stop + max(_GROWTH_LEAST, stop // 4)))
        buffer = new.new_empty(rows, heads, room, size)
        if start and old is not None:
            buffer[:, :, :start] = old
        return buffer

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def _new_cache(model: Any, limit: int) -> DynamicCache:
    """A cache for this model and `limit` tokens, written in place where it need not forget any of them."""
    cache = DynamicCache(config=model.config)
    if limit <= tokens_held(cache):
        cache.layers[:] = [_InPlaceLayer(limit) for _ in cache.layers]
    return cache


@dataclass(frozen=True)
class _Read:
    """A part of a batch after its prefill: n rows in `length` slots, [`shared` tokens | pads | own tokens]."""

    rows: tuple[int, ...]  # their numbers in the batch
    shared: int
    pads: tuple[int, ...]  # [n]
    length: int
    cache: DynamicCache
    logits: Tensor  # [n, V]


@torch.no_grad()
def decode(
    model: Any,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    tally: Tally,
    prefixes: PrefixStore,
    written: WrittenStates | None = None,
) -> None:
    """Write every row to its end, greedily where its temperature is 0, by its own random numbers otherwise.

    Rows are changed in place, so what was written before an out-of-memory error is not lost. What all of them
    begin with comes from `prefixes`; the states of finished rows go to `written`, where they are wanted.
    """
    batch = _Batch(model, rows, pad_token_id, tally, written)
    logits = batch.read(prefixes)  # [rows, V]
    while True:
        before = sum(len(row.written) for row in batch.rows)
        for row, token in zip(batch.rows, choose(logits, batch.rows), strict=True):
            if row.finish_reason is None:
                row.accept(token)
        tally(generated_tokens=sum(len(row.written) for row in batch.rows) - before)
        if not batch.drop_finished():
            return
        logits = batch.step()


class _Batch:
    """The tensors of one batch: cache, mask, positions. Where a row's tokens lie in the cache is in its `Places`."""

    def __init__(
        self, model: Any, rows: Sequence[Row], pad_token_id: int, tally: Tally, written: WrittenStates | None
    ) -> None:
        self.model, self.rows, self.tally, self._pad = model, list(rows), tally, pad_token_id
        self._written = written
        self._device = model.get_input_embeddings().weight.device
        self._contexts = [row.context for row in rows]
        steps = max(row.max_new_tokens - len(row.written) for row in rows)
        self._capacity = max(map(len, self._contexts)) + steps
        keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keep else {}

    def read(self, prefixes: PrefixStore) -> Tensor:
        """Prefill, part by part: what a part shares once, then each row's own. Returns next-token logits [rows, V]."""
        parts = parts_of(self._contexts, divide=self._capacity <= prefixes.reach)
        read = [self._read_part(part, prefixes) for part in parts]
        self._length = max(each.length for each in read)
        self.cache, places, logits = self._joined(read)
        self._places = [places[row] for row in range(len(self.rows))]
        lengths = [len(context) for context in self._contexts]
        mask = torch.ones(len(self.rows), self._capacity + self._length, dtype=torch.long)
        mask[:, : self._length] = slot_mask(self._places, lengths, self._length)
        self._mask = mask.to(self._device)
        self._positions = torch.tensor(lengths, device=self._device)[:, None] - 1  # [rows, 1], of the newest token
        return logits

    def _read_part(self, part: Part, prefixes: PrefixStore) -> _Read:
        contexts = [self._contexts[row] for row in part.rows]
        prefix = prefixes.read(contexts[0][: part.shared], rows=len(contexts), longest=self._capacity)
        shared, cache = len(prefix) if prefix else 0, _new_cache(self.model, self._capacity)
        if prefix:
            prefix.fill(cache.layers, len(contexts))  # pyright: ignore[reportArgumentType]
        own = [context[shared:] for context in contexts]
        width = max(map(len, own))
        pads = [width - len(each) for each in own]
        ids = torch.tensor([[self._pad] * pad + list(each) for pad, each in zip(pads, own, strict=True)])  # [n, width]
        steps = torch.arange(width)[None] - torch.tensor(pads)[:, None]
        real = (steps >= 0).long()
        mask = torch.cat([torch.ones(len(own), shared, dtype=torch.long), real], 1)
        self.tally(prefilled_tokens=ids.numel() - sum(pads), padded_tokens=sum(pads))
        logits = self._forward(cache, ids, mask, shared + steps.clamp(min=-shared))
        return _Read(part.rows, shared, tuple(pads), shared + width, cache, logits)

    def _joined(self, read: Sequence[_Read]) -> tuple[DynamicCache, dict[int, Places], Tensor]:
        """One cache for all rows, where the tokens of each lie in it, and their logits [rows, V]."""
        slots = self._length
        places = {
            row: Places(slots - each.length, each.shared, pads)
            for each in read
            for row, pads in zip(each.rows, each.pads, strict=True)
        }
        if len(read) == 1:
            return read[0].cache, places, read[0].logits
        cache = _new_cache(self.model, self._capacity)
        cache.layers[:] = [_InPlaceLayer.joined(self._capacity, read, i, slots) for i in range(len(cache.layers))]
        order = torch.tensor([row for each in read for row in each.rows], device=self._device).argsort()
        return cache, places, torch.cat([each.logits for each in read])[order]

    def step(self) -> Tensor:
        """Read the newest token of every row; rows that have finished but not left read a pad token."""
        live = [row.finish_reason is None for row in self.rows]
        pairs = zip(self.rows, live, strict=True)
        newest = [[row.written[-1] if alive else self._pad] for row, alive in pairs]
        self._length += 1
        self._positions = self._positions + 1
        self.tally(padded_tokens=len(live) - sum(live))
        return self._forward(self.cache, torch.tensor(newest), self._mask[:, : self._length], self._positions)

    def drop_finished(self) -> bool:
        """Let finished rows leave once they are enough to pay for moving the others; False: none left."""
        keep = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if len(keep) <= _COMPACT_BELOW * len(self.rows):
            self._hand_over([index for index, row in enumerate(self.rows) if row.finish_reason])
        if keep and len(keep) <= _COMPACT_BELOW * len(self.rows):
            indices = torch.tensor(keep, device=self._device)
            self.cache.batch_select_indices(indices)
            self._mask, self._positions = self._mask[indices], self._positions[indices]
            self.rows = [self.rows[index] for index in keep]
            self._contexts = [self._contexts[index] for index in keep]
            self._places = [self._places[index] for index in keep]
        return bool(keep)

    def _hand_over(self, finished: Sequence[int]) -> None:
        """Let `written` keep the states of these rows, if it wants them and the cache still holds them all."""
        if self._written is None or not self._written.wanted:
            return
        layers = [layer for layer in self.cache.layers if isinstance(layer, _InPlaceLayer)]
        held = [(layer.keys, layer.values) for layer in layers if layer.keys is not None and layer.values is not None]
        if len(held) < len(self.cache.layers) or held[0][0].shape[-2] != self._length:
            return
        rows = torch.tensor(finished, device=self._device)
        everyone = len(finished) == len(self.rows)
        self._written.keep(
            WrittenRows(
                # The last token that a row wrote may not have been read.
                token_ids=tuple(
                    row.context[: max(len(self._contexts[i]), len(row.context) - 1)]
                    for i, row in ((i, self.rows[i]) for i in finished)
                ),
                places=tuple(self._places[i] for i in finished),
                layers=tuple(pair if everyone else (pair[0][rows], pair[1][rows]) for pair in held),
            )
        )

    def _forward(self, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        self.tally(forwards=1, lm_head_rows=output.logits.shape[0] * output.logits.shape[1])
        return output.logits[:, -1]


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every row from its logits [rows, V].

    Greedy is the arg max. Otherwise the inverse of the cumulative distribution, in token order, at the
    row's own uniform number: the same number gives the same token whatever else is in the batch.
    """
    tokens = logits.argmax(-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and row.finish_reason is None]
    if not drawn:
        return tokens
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    options = {"device": logits.device, "dtype": exact}
    heat = torch.tensor([rows[i].temperature for i in drawn], **options)[:, None]
    nucleus = torch.tensor([rows[i].top_p for i in drawn], **options)[:, None]
    noise = torch.tensor([rows[i].uniform() for i in drawn], **options)[:, None]
    probabilities = torch.softmax(logits[drawn].to(exact) / heat, -1)  # [drawn, V]
    if bool((nucleus < 1).any()):
        ranked, order = torch.sort(probabilities, stable=True, dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= nucleus
        outside[:, 0] = False  # the likeliest token always stays
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    cumulative = probabilities.cumsum(-1)
    # Strictly above, so that a token of probability 0 is never drawn.
    above = cumulative > noise * cumulative[:, -1:]
    for i, token in zip(drawn, above.int().argmax(-1).tolist(), strict=True):
        tokens[i] = token
    return tokens
