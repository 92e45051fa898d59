"""Log-probabilities of tokens in finished sequences, without reading anything twice.

What several sequences begin with is read once (`prefix_cache`), what was just generated goes on from where its states
end (`generated_kv`), and the same question about the same beginning is asked once.

Shapes: N sequences of a batch, T tokens that are read in the longest, R queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dspy_greater.errors import EngineMemoryError
from dspy_greater.model.fast.generated_kv import Continuation, GeneratedStates, continued, relief
from dspy_greater.model.fast.prefix_cache import LEAST_SHARED, Beginning, PrefixCache
from dspy_greater.model.fast.readings import Reading, last_run
from dspy_greater.model.kv_cache import shared_length
from dspy_greater.model.teacher_forcing import in_batches, logits_at, logprobs, of_tokens, right_padded

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

_MOST_PADS = 1.5  # times the slots of kept states may be filled when they are put into one cache


class Reader:
    """Answers queries; hold the engine meanwhile.

    Args:
        engine: the weights.
        prefixes: what was read of beginnings.
        generated: the states of rows that were generated, where they are kept.
    """

    def __init__(self, engine: Engine, prefixes: PrefixCache, generated: GeneratedStates | None) -> None:
        self._engine, self._prefixes, self._generated = engine, prefixes, generated

    def answers(self, readings: Sequence[Reading]) -> dict[int, float]:
        """The log-probability that each query asks for, by its number."""
        found: dict[int, float] = {}
        early, kept, rest = self._divided(readings)
        left = self._read_continued(kept, found)
        self._read(rest, found)
        self._read(left, found)
        self._read_early(early, found)
        return found

    def _divided(
        self, readings: Sequence[Reading]
    ) -> tuple[list[Reading], list[tuple[Reading, Continuation]], list[Reading]]:
        """What to read of beginnings, of sequences whose states are kept, and of the others."""
        early: list[Reading] = []
        kept: list[tuple[Reading, Continuation]] = []
        rest: list[Reading] = []
        for reading in readings:
            earlier = len(reading.queries) - last_run(reading.queries)
            found = self._kept(reading, earlier)
            if found is None:
                rest.append(reading)
                continue
            early.append(reading.part(reading.queries[:earlier]))
            kept.append((reading.part(reading.queries[earlier:]), found))
        shared = shared_length([reading.tokens[:-1] for reading in rest]) if len(rest) > 1 else 0
        if shared >= LEAST_SHARED and max(len(reading.tokens) for reading in rest) <= self._engine.checks.cache_reach:
            early += [reading.part(pair for pair in reading.queries if pair[1].at <= shared) for reading in rest]
            rest = [reading.part(pair for pair in reading.queries if pair[1].at > shared) for reading in rest]
        return [reading for reading in early if reading.queries], kept, [reading for reading in rest if reading.queries]

    def _kept(self, reading: Reading, earlier: int) -> Continuation | None:
        """Where the states of a sequence are, if they reach past the `earlier` queries; the others are read on."""
        if self._generated is None:
            return None
        least = reading.queries[earlier - 1][1].at + 1 if earlier else 1
        found = self._generated.find(
            reading.tokens, least=max(least, LEAST_SHARED), most=reading.queries[earlier][1].at - 1
        )
        if found is None or found.rows.slots + len(reading.tokens) - found.known > self._engine.checks.cache_reach:
            return None
        return found

    def _read(self, readings: Sequence[Reading], found: dict[int, float]) -> None:
        """Read what the sequences begin with once, and the rest of each."""
        if not readings:
            return
        longest = max(len(reading.tokens) for reading in readings)
        alike = shared_length([reading.tokens[: reading.first - 1] for reading in readings])
        beginning = Beginning(self._prefixes, readings[0].tokens[:alike], rows=len(readings), longest=longest)

        def of_batch(batch: Sequence[Reading]) -> list[None]:
            asked = [
                (row, query.at, query.temperature) for row, reading in enumerate(batch) for _, query in reading.queries
            ]
            values = logprobs(self._engine, [reading.tokens for reading in batch], asked, beginning.prefix()).tolist()
            found.update(zip((number for reading in batch for number, _ in reading.queries), values, strict=True))
            return [None] * len(batch)

        shared = len(beginning.prefix() or ())
        lengths = [len(reading.tokens) - shared for reading in readings]
        relieve = relief(self._generated, beginning.forget)
        engine = self._engine
        in_batches(of_batch, readings, lengths, engine.max_batch_tokens, relieve, engine.checks.fixed_rotation)

    def _read_early(self, readings: Sequence[Reading], found: dict[int, float]) -> None:
        """Beginnings, each distinct one once."""
        same: dict[tuple[Any, ...], list[Reading]] = defaultdict(list)
        for reading in readings:
            stop = reading.queries[-1][1].at + 1
            same[reading.tokens[:stop], tuple((query.at, query.temperature) for _, query in reading.queries)].append(
                reading
            )
        distinct = [group[0].part(group[0].queries, len(tokens)) for (tokens, _), group in same.items()]
        self._read(distinct, found)
        for group in same.values():
            for reading in group[1:]:
                pairs = zip(reading.queries, group[0].queries, strict=True)
                found.update((number, found[original]) for (number, _), (original, _) in pairs)

    def _read_continued(self, kept: list[tuple[Reading, Continuation]], found: dict[int, float]) -> list[Reading]:
        """Sequences from where their states end; those that there is no memory for beside the states are returned.

        `kept` is emptied: it would hold the states that are given up.
        """
        for rows in _alike([states.rows.slots for _, states in kept], self._engine.max_batch_rows):
            # Rows that were kept side by side stay side by side, so that they are copied in one piece.
            together = {id(kept[row][1].rows): number for number, row in reversed(list(enumerate(rows)))}
            batch = sorted((kept[row] for row in rows), key=lambda pair: (together[id(pair[1].rows)], pair[1].row))
            lengths = [len(reading.tokens) - states.known for reading, states in batch]
            work = partial(self._continued, found)
            try:
                in_batches(work, batch, lengths, self._engine.max_batch_tokens, relieve=self._prefixes.drop)
            except EngineMemoryError:
                relief(self._generated)()
                break
        left = [reading for reading, _ in kept if any(number not in found for number, _ in reading.queries)]
        kept.clear()
        return left

    def _continued(self, found: dict[int, float], batch: Sequence[tuple[Reading, Continuation]]) -> list[None]:
        """One forward pass over what follows the kept states."""
        known = torch.tensor([states.known for _, states in batch])
        rest = [reading.tokens[states.known :] for reading, states in batch]
        token_ids, steps = right_padded(rest)  # [N, T]
        length = torch.tensor([len(unread) for unread in rest])[:, None]
        real = steps < length
        cache, held = continued(self._engine.model, [states for _, states in batch], token_ids.shape[1])
        asked = [(row, number, query) for row, (reading, _) in enumerate(batch) for number, query in reading.queries]
        row = torch.tensor([place for place, _, _ in asked])  # [R]
        at = torch.tensor([query.at for *_, query in asked])
        logits = logits_at(
            self._engine,
            token_ids,
            known[:, None] + torch.minimum(steps, length - 1),
            (row, at - 1 - known[row]),
            real=int(real.sum()),
            attention_mask=torch.cat([held, real.long()], 1).to(self._engine.weights.device),
            past_key_values=cache,
        )  # [R, V]
        tokens = [batch[place][0].tokens[query.at] for place, _, query in asked]
        values = of_tokens(logits, tokens, [query.temperature for *_, query in asked]).tolist()
        found.update(zip((number for _, number, _ in asked), values, strict=True))
        return [None] * len(batch)


def _alike(slots: Sequence[int], most: int) -> list[list[int]]:
    """Rows whose states go into one cache: at most as many as are decoded at once, and little of it pads.

    >>> _alike([10, 400, 12, 11], most=2)
    [[0, 3], [2], [1]]
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(slots)), key=slots.__getitem__):
        group = groups[-1] if groups else []
        if 0 < len(group) < most and slots[row] * (len(group) + 1) <= _MOST_PADS * sum(
            slots[member] for member in [*group, row]
        ):
            group.append(row)
        else:
            groups.append([row])
    return groups
