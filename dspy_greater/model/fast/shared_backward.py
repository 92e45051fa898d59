"""Gradients of sums of log-probabilities with respect to one embedding, without differentiating anything twice.

What stands before the leaf is read once and not differentiated. Behind it prompts go on alike for a while: the rest
of the instruction, demonstrations, the words around an input. What the model makes of these depends on the leaf, so it
cannot be kept as a prefix; but where all sequences share one leaf, one row of it will do. The sequences of a batch go
on from its key-value states, and what they ask of these, added up, goes back through the row once.

Shapes: P tokens of the prefix, S of the segment behind the leaf, N sequences, d embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspy_greater.errors import EngineMemoryError
from dspy_greater.model.fast.generated_kv import GeneratedStates, relief
from dspy_greater.model.fast.prefix_cache import LEAST_SAVED, Beginning, Prefix, PrefixCache
from dspy_greater.model.fast.readings import Reading
from dspy_greater.model.interface import Leaf, Tokens
from dspy_greater.model.kv_cache import held_states, plain_cache, shared_length
from dspy_greater.model.teacher_forcing import (
    embedded_at,
    in_batches,
    is_out_of_memory,
    logits_at,
    logprobs,
    right_padded,
)

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine


class Backward:
    """Differentiates what readings ask for with respect to a leaf; hold the engine meanwhile, with gradients enabled.

    Args:
        engine: the weights.
        prefixes: what was read of beginnings.
        generated: the states of rows that were generated, which give way where memory runs out.
    """

    def __init__(self, engine: Engine, prefixes: PrefixCache, generated: GeneratedStates | None) -> None:
        self._engine, self._prefixes, self._generated = engine, prefixes, generated

    def gradient(self, sequences: int, readings: Mapping[int, Reading], leaf: Leaf) -> Tensor:
        """As `interface.Model.logprob_gradient`, for the queries about N = `sequences` sequences."""
        # A token at the leaf's place or before it is predicted by what the leaf does not reach.
        reached = {
            row: reading.part(pair for pair in reading.queries if pair[1].at > leaf.places[row])
            for row, reading in readings.items()
            if reading.queries[-1][1].at > leaf.places[row]
        }
        embedding, exact = leaf.embedding.detach(), self._engine.weights.exact_dtype
        if len(embedding) > 1:
            found = torch.zeros(sequences, embedding.shape[1], dtype=exact, device=embedding.device)
            self._of_each(reached, leaf.places, embedding, found)
            return found
        together = self._together(reached, leaf.places, embedding) if reached else embedding.to(exact) * 0
        if together is not None:
            return together
        found = torch.zeros(sequences, embedding.shape[1], dtype=exact, device=embedding.device)
        self._of_each(reached, leaf.places, embedding.expand(sequences, -1), found)
        finite = [row for row in reached if bool(found[row].isfinite().all())]
        return found[finite].sum(0, keepdim=True) if finite else found[:1] + torch.nan

    def _of_each(self, readings: Mapping[int, Reading], places: Tokens, embedding: Tensor, found: Tensor) -> None:
        """The gradient of each sequence alone, into its row of [N, d]."""
        if not readings:
            return
        layer = self._engine.model.get_input_embeddings()
        alike = min(min(places[row], reading.first - 1) for row, reading in readings.items())
        beginning = self._beginning(readings, alike)

        def of_batch(batch: Sequence[int]) -> list[None]:
            prefix, value = beginning.prefix(), embedding[list(batch)].requires_grad_()  # value [n, d]
            shared = len(prefix or ())
            with embedded_at(layer, [places[row] - shared for row in batch], value):
                total = self._weighted([readings[row] for row in batch], prefix)
            (gradient,) = torch.autograd.grad(total, value)
            found[list(batch)] = gradient.to(found)
            self._engine.tally.add(backward_tokens=sum(len(readings[row].tokens) - shared for row in batch))
            return [None] * len(batch)

        rows = list(readings)
        lengths = [len(readings[row].tokens) - len(beginning.prefix() or ()) for row in rows]
        relieve = relief(self._generated, beginning.forget)
        engine = self._engine
        in_batches(of_batch, rows, lengths, engine.max_batch_tokens, relieve, engine.checks.fixed_rotation)

    def _together(self, readings: Mapping[int, Reading], places: Tokens, embedding: Tensor) -> Tensor | None:
        """The sum over all sequences, [1, d], through what they share behind the leaf.

        None where that cannot be had or is not worth it, and each sequence has to be read: without memory for it, or
        where half precision has no number for what all rows ask together.
        """
        first = min(readings)
        place, longest = places[first], max(len(reading.tokens) for reading in readings.values())
        alike = shared_length([reading.tokens[: reading.first - 1] for reading in readings.values()])
        if place >= alike or any(places[row] != place for row in readings):
            return None
        prefix = self._beginning(readings, min(place, alike)).prefix()
        own = alike - (len(prefix) if prefix else 0)
        if not _worth_sharing(self._engine, own, rows=len(readings), longest=longest):
            return None
        value = embedding.clone().requires_grad_()  # [1, d]
        try:
            tokens = readings[first].tokens[:alike]
            segment = _read_segment(self._engine, tokens, prefix, place=place, embedding=value)
            if segment is None:
                return None
            leaves = [state.detach().requires_grad_() for state in segment.states]
            asked = [leaf.new_zeros(leaf.shape, dtype=self._engine.weights.exact_dtype) for leaf in leaves]
            in_batches(
                partial(self._of_segment, segment.holding(leaves), asked),
                list(readings.values()),
                [len(reading.tokens) - alike for reading in readings.values()],
                self._engine.max_batch_tokens,
                relief(self._generated),
            )
            total = _through(segment, value, asked)
        except (EngineMemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, EngineMemoryError) and not is_out_of_memory(error):
                raise
            return None
        self._engine.tally.add(backward_tokens=own)
        return total.to(self._engine.weights.exact_dtype) if bool(total.isfinite().all()) else None

    def _of_segment(self, segment: Prefix, asked: Sequence[Tensor], batch: Sequence[Reading]) -> list[None]:
        """Add what the sequences of a batch ask of the segment's states, which are leaves here."""
        found = torch.autograd.grad(self._weighted(batch, segment), segment.states, materialize_grads=True)
        found = [gradient.to(total) for gradient, total in zip(found, asked, strict=True)]  # all, before any counts
        for gradient, total in zip(found, asked, strict=True):
            total += gradient
        self._engine.tally.add(backward_tokens=sum(len(reading.tokens) - len(segment) for reading in batch))
        return [None] * len(batch)

    def _weighted(self, batch: Sequence[Reading], prefix: Prefix | None) -> Tensor:
        """Σ weight x log-probability over the queries of a batch, a scalar."""
        asked = [
            (row, query.at, query.temperature) for row, reading in enumerate(batch) for _, query in reading.queries
        ]
        values = logprobs(self._engine, [reading.tokens for reading in batch], asked, prefix)  # [R]
        return values @ values.new_tensor([query.weight for reading in batch for _, query in reading.queries])

    def _beginning(self, readings: Mapping[int, Reading], most: int) -> Beginning:
        sequences = [reading.tokens for reading in readings.values()]
        alike = min(most, shared_length([tokens[:-1] for tokens in sequences]))
        longest = max(map(len, sequences))
        return Beginning(self._prefixes, sequences[0][:alike], rows=len(sequences), longest=longest)


def _read_segment(
    engine: Engine, token_ids: Sequence[int], prefix: Prefix | None, *, place: int, embedding: Tensor
) -> Prefix | None:
    """The states of P + S tokens, in the graph of `embedding` [1, d], the leaf at `place` behind the prefix.

    None when the states of this model cannot be handed on. Call it while holding the engine.
    """
    shared = len(prefix) if prefix else 0
    cache = prefix.cache(engine.model, 1) if prefix else plain_cache(engine.model)
    own, positions = right_padded([tuple(token_ids[shared:])])  # [1, S] each
    last = (torch.tensor([0]), torch.tensor([own.shape[1] - 1]))
    with embedded_at(engine.model.get_input_embeddings(), [place - shared], embedding):
        logits_at(engine, own, positions + shared, last, real=own.shape[1], past_key_values=cache)
    layers = tuple(held_states(layer) for layer in cache.layers)
    segment = Prefix(tuple(token_ids), layers)
    whole = all(state.shape[-2] == len(token_ids) and state.requires_grad for state in segment.states)
    return segment if whole else None


def _through(segment: Prefix, embedding: Tensor, asked: Sequence[Tensor]) -> Tensor:
    """What is asked of the segment's states -> the gradient [1, d] of the embedding that they were read with."""
    of_states = [gradient.to(state) for gradient, state in zip(asked, segment.states, strict=True)]
    return torch.autograd.grad(segment.states, embedding, of_states)[0]


def _worth_sharing(engine: Engine, tokens: int, *, rows: int, longest: int) -> bool:
    """Whether a segment of so many tokens saves N = `rows` rows, the longest of so many tokens, more than it costs."""
    return tokens * (rows - 1) >= LEAST_SAVED and longest <= engine.checks.cache_reach
