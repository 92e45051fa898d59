"""The fast model for the calls of one step: what several calls have in common is computed once, then forgotten.

Three things are kept between the calls of a session, and dropped at its end: the key-value states of the longest prefix
that was read, those of the rows that were generated, and what rows are expected to generate. None of them changes a
result beyond rounding; `plain.PlainModel` is the twin.

Shapes: N sequences, R queries, V vocabulary, d embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspy_greater.errors import EngineMemoryError
from dspy_greater.model.fast.generated_kv import GeneratedStates
from dspy_greater.model.fast.likelihoods import Reader
from dspy_greater.model.fast.prefix_cache import Prefix, PrefixCache
from dspy_greater.model.fast.readings import by_row
from dspy_greater.model.fast.shared_backward import Backward
from dspy_greater.model.fast.speculative import Drafts
from dspy_greater.model.generate import decode
from dspy_greater.model.incremental import decode_by
from dspy_greater.model.interface import Generation, GenerationRequest, Leaf, TokenQuery, Tokens
from dspy_greater.model.over_engine import OverEngine
from dspy_greater.model.requests import row_of
from dspy_greater.model.sampling import Row
from dspy_greater.model.teacher_forcing import in_batches, is_out_of_memory, next_logits

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine


class Session(OverEngine):
    """`interface.Model` over an engine; `Engine.session` opens one."""

    def __init__(
        self,
        engine: Engine,
        expected: Iterable[tuple[Tokens, Tokens]] = (),
        *,
        keeps: bool = True,
        beginning: Prefix | None = None,
    ) -> None:
        super().__init__(engine)
        self._prefixes = PrefixCache(engine, beginning)
        self._generated = GeneratedStates() if keeps else None
        self._drafts = Drafts(expected)
        self._reader = Reader(engine, self._prefixes, self._generated)
        self._backward = Backward(engine, self._prefixes, self._generated)

    @contextmanager
    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> Iterator[Session]:
        """Itself: what it keeps serves the calls inside as well."""
        yield self

    def forget(self) -> bool:
        """Give the memory back; what is needed again is read again. Whether there was any."""
        held = self._prefixes.drop()
        return (self._generated is not None and self._generated.drop()) or held

    def continues(self, tokens: Tokens, beyond: int) -> bool:
        """Whether the states of more than the first `beyond` tokens are kept, of a row that was generated here."""
        kept = self._generated
        return kept is not None and kept.find(tokens, least=beyond + 1, most=len(tokens) - 1) is not None

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        arrivals: Callable[[int], Sequence[GenerationRequest]] | None = None,
    ) -> list[Generation]:
        """See `interface.Model`; rows of similar length are decoded together.

        A row that does not fit into memory does not keep the others from being generated: the error has them.

        Args:
            requests: what to generate.
            arrivals: has more requests, at most as many as it is asked for. They join the batch that is under way,
                where the model's states allow it, and their results go to their `on_end` alone.

        Raises:
            EngineMemoryError: a row does not fit by itself; `finished` has the results of the requests by their place.
                It may be of a row that joined.
        """
        rows = [row_of(self._engine, request) for request in requests]
        for row in rows if len(self._drafts) else []:
            row.draft = self._drafts.guess(row.prompt)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt), rows[i].prompt, rows[i].seed))
        waiting = [rows[i] for i in order]
        failed: dict[int, EngineMemoryError] = {}  # by the id of the row
        most = self._engine.max_batch_rows
        with self._engine.exclusive():
            while waiting:
                batch, waiting = _next_batch(self._engine, waiting)
                try:
                    self._decode(batch, arrivals)
                except EngineMemoryError as error:  # it is this row, and not the size of the batches
                    failed[id(batch[0])], self._engine.max_batch_rows = error, most
                    continue
                for row in batch:
                    row.finish_reason = None if row.finish_reason == "pause" else row.finish_reason
                waiting = [row for row in batch if row.finish_reason is None] + waiting
        finished = {place: row.result() for place, row in enumerate(rows) if id(row) not in failed}
        for error in failed.values():
            raise EngineMemoryError(str(error), finished=finished) from error
        return [finished[place] for place in range(len(rows))]

    def _decode(self, batch: list[Row], arrivals: Callable[[int], Sequence[GenerationRequest]] | None = None) -> None:
        """Decode the batch, or a part of it where memory ran out and something was given up for another try.

        What joins it is put into `batch`, which then holds what has not ended.

        Raises:
            EngineMemoryError: there is nothing left to be given up.
        """
        joining = None
        if arrivals is not None and self._engine.checks.cache_reach == math.inf:
            joining = partial(self._join, batch, arrivals)
        try:
            if self._engine.checks.handshake.keys_and_values:
                decode(self._engine, batch, self._prefixes, self._generated, joining)
            else:
                decode_by(self._engine, batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            failure = str(error).splitlines()[0]
        else:
            return
        kept = self._generated is not None and self._generated.bytes > 0
        self.forget()
        if not kept:  # otherwise what was kept may have been too much, and not the batch
            _halve_batches(self._engine, min(len(batch), self._engine.max_batch_rows), failure)

    def _join(
        self, batch: list[Row], arrivals: Callable[[int], Sequence[GenerationRequest]], most: int
    ) -> Sequence[Row]:
        """Rows that join the batch, in which what has ended gives way to them."""
        new = [row_of(self._engine, request) for request in arrivals(most)]
        batch[:] = [*(row for row in batch if row.finish_reason is None), *new]
        return new

    # ------------------------------------------------------------ teacher forcing

    @torch.no_grad()
    def next_token_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """See `interface.Model`."""

        def of_batch(batch: Sequence[Sequence[int]]) -> list[Tensor]:
            return list(next_logits(self._engine, batch).log_softmax(-1).cpu())  # N times [V]

        engine = self._engine
        with engine.exclusive():
            lengths = [len(context) for context in contexts]
            apart = engine.checks.fixed_rotation
            return torch.stack(in_batches(of_batch, contexts, lengths, engine.max_batch_tokens, self.forget, apart))

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery]) -> Tensor:
        """See `interface.Model`. Rows that were generated here go on from where their states end.

        What is asked about the tokens that several sequences begin with is read once for all of them.
        """
        if not queries:
            return torch.zeros(0)
        with self._engine.exclusive():
            readings = by_row(sequences, queries, self._engine.checks.cache_reach)
            found = self._reader.answers(list(readings.values()))
        return torch.tensor([found[number] for number in range(len(queries))], dtype=self._engine.weights.exact_dtype)

    # ------------------------------------------------------------------ gradients

    def logprob_gradient(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery], leaf: Leaf) -> Tensor:
        """See `interface.Model`. What stands before the leaf is read once and not differentiated."""
        with self._engine.exclusive(), torch.inference_mode(False), torch.enable_grad():
            readings = by_row(sequences, queries, self._engine.checks.cache_reach)
            return self._backward.gradient(len(sequences), readings, leaf)


def _next_batch(engine: Engine, waiting: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to decode together, and the others.

    Some models embed the positions of a long row in another way, and of all rows in a pass as of its longest. So long
    and short rows are not mixed, and a row that becomes long on its way pauses: it goes on when it is read anew.
    """
    limit = engine.checks.fixed_rotation
    short = [row for row in waiting if row.length <= limit]
    alike, others = (short, [row for row in waiting if row.length > limit]) if short else (list(waiting), [])
    batches = -(-len(alike) // engine.max_batch_rows)
    size = -(-len(alike) // batches)  # even batches, no small rest
    for row in alike[:size]:
        row.pause_at = int(limit) + 1 - len(row.prompt) if short and limit < math.inf else None
    return alike[:size], [*alike[size:], *others]


def _halve_batches(engine: Engine, rows: int, failure: str) -> None:
    """Decode at most half of so many rows together from now on.

    Raises:
        EngineMemoryError: it was one row.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rows == 1:
        raise EngineMemoryError(
            f"One row alone does not fit into the memory of {engine.weights.device} beside {engine.name!r} "
            f"({failure}); use a smaller dtype such as bfloat16, a smaller max_tokens, shorter inputs or "
            "a smaller model."
        )
    engine.max_batch_rows = rows // 2
