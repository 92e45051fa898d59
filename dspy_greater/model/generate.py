"""The decode loop: rows of token ids in, generated tokens out, on a left-padded batch with a key-value cache.

Prompts are read in parts (`prefill`), finished rows leave the batch, and the cache is written in place (`kv_cache`).
A row's result does not depend on which rows it shares a batch with, nor on its draft: its random numbers are its own.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dspy_greater.model.fast.generated_kv import GeneratedRows, GeneratedStates, Places, slot_mask
from dspy_greater.model.fast.prefix_cache import PrefixCache
from dspy_greater.model.kv_cache import InPlaceLayer, Move, join
from dspy_greater.model.prefill import Part, Prefilled, parts_of, prefill
from dspy_greater.model.sampling import Row, choose

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

_COMPACT_BELOW = 0.9  # finished rows leave once they are a tenth of the batch
_JOIN_EVERY = 8  # steps: each time the states of all rows are copied

Arrivals = Callable[[int], Sequence[Row]]


@torch.no_grad()
def decode(
    engine: Engine,
    rows: Sequence[Row],
    prefixes: PrefixCache,
    generated: GeneratedStates | None = None,
    arrivals: Arrivals | None = None,
) -> None:
    """Generate every row to its end, greedily where its temperature is 0, by its own random numbers otherwise.

    Rows are changed in place, so what was generated before an out-of-memory error is not lost. What all of them
    begin with comes from `prefixes`; the states of finished rows go to `generated`, where that is given. Rows that
    `arrivals` has (at most as many as it is asked for) join those under way.
    """
    batch, steps = _Batch(engine, rows, generated), 0
    logits = batch.read(prefixes)  # [rows, V]
    while batch.rows:
        before = sum(len(row.generated) for row in batch.rows)
        for row, token in zip(batch.rows, choose(logits, batch.rows), strict=True):
            if row.finish_reason is None:
                row.accept(token)
        engine.tally.add(generated_tokens=sum(len(row.generated) for row in batch.rows) - before)
        if not batch.drop_finished():
            return
        logits, steps = batch.step(), steps + 1
        if arrivals is not None and steps % _JOIN_EVERY == 0:
            logits = batch.joined_by(arrivals(engine.max_batch_rows - len(batch.rows)), logits, prefixes)


class _Batch:
    """The tensors of one batch: cache, mask, positions. Where a row's tokens lie in the cache is in its `Places`."""

    def __init__(self, engine: Engine, rows: Sequence[Row], generated: GeneratedStates | None) -> None:
        self.engine, self.model, self.rows, self._generated = engine, engine.model, list(rows), generated
        self._device = engine.weights.device

    def read(self, prefixes: PrefixCache) -> Tensor:
        """Prefill. Returns the next-token logits [rows, V] of the rows that are not finished by it."""
        contexts = [row.context for row in self.rows]
        lengths = [len(row.context) + len(row.expected) for row in self.rows]
        # Drafts need no room of their own at the end, but may leave unused slots in the middle of a part.
        self._capacity = self._slots(max(lengths))
        self._reach = self.engine.checks.cache_reach
        plain = self._capacity <= self._reach
        if not plain:
            for row in self.rows:
                row.draft = ()
            self._capacity = self._slots(max(map(len, contexts)))
        parts = parts_of(contexts, lengths, divide=plain)
        read = [prefill(self.engine, self.rows, part, prefixes, self._capacity) for part in parts]
        for prefilled in read:
            finished = [j for j, row in enumerate(prefilled.rows) if self.rows[row].finish_reason]
            mine = [self.rows[row] for row in prefilled.rows]
            self._hand_over(prefilled.cache, prefilled.length, mine, prefilled.places, prefilled.known, finished)
        return self._begin(read)

    def joined_by(self, rows: Sequence[Row], logits: Tensor, prefixes: PrefixCache) -> Tensor:
        """Read the prompts of more rows and put them beside those under way; `logits` [rows, V] are of the latter."""
        if not rows:
            return logits
        live = self._live()
        if len(live) < len(self.rows):
            self._let_go(live)
        known = tuple(len(row.context) for row in self.rows)  # every token is in the cache after a step
        count = len(known)
        under_way = Prefilled(
            tuple(range(count)), tuple(self._places), known, (0,) * count, self._length, self.cache, logits[live]
        )
        self.rows += rows
        self._capacity = self._slots(max(self._length, *(len(row.context) for row in rows)))
        parts = [
            Part(tuple(count + row for row in part.rows), part.shared)
            for part in parts_of([row.context for row in rows])
        ]
        return self._begin(
            [under_way, *(prefill(self.engine, self.rows, part, prefixes, self._capacity) for part in parts)]
        )

    def _slots(self, filled: int) -> int:
        """The most slots that the cache will have, once so many are filled: all rows of a batch end at the last."""
        return filled + max(row.room for row in self.rows)

    def _begin(self, read: Sequence[Prefilled]) -> Tensor:
        """Put together what goes on: cache, mask, positions and logits."""
        going = [
            (part, j, row)
            for part, prefilled in enumerate(read)
            for j, row in enumerate(prefilled.rows)
            if self.rows[row].finish_reason is None
        ]
        # Neighbours move together.
        going.sort(key=lambda entry: (entry[0], read[entry[0]].rejected[entry[1]], entry[1]))
        slots = max((read[part].length - read[part].rejected[j] for part, j, _ in going), default=0)
        places = [(read[part].places[j], read[part].length - read[part].rejected[j]) for part, j, _ in going]
        self._places = [Places(slots - filled + place.first, place.shared, place.between) for place, filled in places]
        self._known = [read[part].known[j] for part, j, _ in going]
        self.rows = [self.rows[row] for *_, row in going]
        self.cache, self._length = self._joined(read, [(part, j) for part, j, _ in going], slots), slots
        if not going:
            return torch.empty(0)
        mask = torch.ones(len(going), self._capacity + slots, dtype=torch.long)
        mask[:, :slots] = slot_mask(self._places, self._known, slots)
        self._mask = mask.to(self._device)
        self._positions = torch.tensor(self._known, device=self._device)[:, None] - 1  # [rows, 1], of the newest token
        return torch.stack([read[part].logits[j] for part, j, _ in going])

    def _joined(self, read: Sequence[Prefilled], going: Sequence[tuple[int, int]], slots: int) -> DynamicCache:
        """One cache for the rows that go on, without what was read of drafts for nothing."""
        as_read = [j for _, j in going] == list(range(len(read[0].rows))) and not any(read[0].rejected)
        if len(read) == 1 and as_read:
            return read[0].cache
        together: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number, (part, j) in enumerate(going):
            leaving, numbers = together[part, read[part].rejected[j]]
            leaving.append(j)
            numbers.append(number)
        moves: list[Move] = [(part, *rows, rejected) for (part, rejected), rows in together.items()]
        return join(self.model, self._capacity, [prefilled.cache for prefilled in read], moves, slots)

    def step(self) -> Tensor:
        """Read the newest token of every row; rows that have finished but not left read a pad token."""
        live = [row.finish_reason is None for row in self.rows]
        pairs = zip(self.rows, live, strict=True)
        newest = [[row.generated[-1] if alive else self.engine.weights.pad_token_id] for row, alive in pairs]
        self._length += 1
        self._positions = self._positions + torch.tensor(live, device=self._device)[:, None]
        output = self.model(
            input_ids=torch.tensor(newest, device=self._device),
            attention_mask=self._mask[:, : self._length],
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        rows = output.logits.shape[0] * output.logits.shape[1]
        self.engine.tally.add(forwards=1, lm_head_rows=rows, padded_tokens=len(live) - sum(live))
        return output.logits[:, -1]

    def drop_finished(self) -> bool:
        """Let finished rows leave once they are enough to pay for moving the others; False: none left."""
        live = self._live()
        if len(live) <= _COMPACT_BELOW * len(self.rows):
            self._let_go(live)
        return bool(live)

    def _live(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.finish_reason is None]

    def _let_go(self, live: Sequence[int]) -> None:
        """Of all rows but these, keep the states where they are wanted."""
        finished = sorted(set(range(len(self.rows))) - set(live))
        self._hand_over(self.cache, self._length, self.rows, self._places, self._known, finished)
        if live:
            self._keep(live)

    def _keep(self, rows: Sequence[int]) -> None:
        """Let the others go, and with them the slots that only they had used."""
        first = min(self._places[row].first for row in rows)
        if all(isinstance(layer, InPlaceLayer) for layer in self.cache.layers):
            for layer in self.cache.layers:
                layer.select(rows, first)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            first = 0
            self.cache.batch_select_indices(torch.tensor(rows))
        self._mask, self._positions = self._mask[rows, first:], self._positions[rows]
        self._length -= first
        self.rows = [self.rows[row] for row in rows]
        self._known = [self._known[row] for row in rows]
        self._places = [replace(self._places[row], first=self._places[row].first - first) for row in rows]

    def _hand_over(
        self,
        cache: DynamicCache,
        slots: int,
        rows: Sequence[Row],
        places: Sequence[Places],
        known: Sequence[int],
        finished: Sequence[int],
    ) -> None:
        """Let `generated` keep the states of these rows, if it wants them and the cache still holds them all."""
        if self._generated is None or not finished:
            return
        held: list[Any] = list(cache.layers)
        filled = all(getattr(layer, "keys", None) is not None and layer.keys.shape[-2] == slots for layer in held)
        if not filled or self._capacity > self._reach:
            return
        bytes_of_row = sum(state[:1].nbytes for layer in held for state in (layer.keys, layer.values))
        if not self._generated.make_room(bytes_of_row * len(finished), held[0].keys.device):
            return
        index = torch.tensor(finished)
        self._generated.keep(
            GeneratedRows(
                # The last token that a row generated may not have been read.
                token_ids=tuple(rows[i].context[: max(known[i], len(rows[i].context) - 1)] for i in finished),
                places=tuple(places[i] for i in finished),
                layers=tuple((layer.keys[index], layer.values[index]) for layer in held),
            )
        )
