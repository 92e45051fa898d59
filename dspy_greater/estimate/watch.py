"""A model with a stopwatch: what its calls read, wrote and differentiated, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Generation, GenerationRequest, Leaf, Model, TokenQuery, Tokens
from dspy_greater.run.estimate import Cost


class Watched:
    """`interface.Model` over a session, with what its calls cost.

    Attributes:
        writing: what `generate` cost.
        reading: what the calls without a gradient cost.
        differentiating: what `logprob_gradient` cost.
        answers: what was generated, by prompt.
    """

    def __init__(self, engine: Engine, model: Model) -> None:
        self._engine, self._model = engine, model
        self.writing = self.reading = self.differentiating = Cost()
        self.answers: dict[Tokens, Generation] = {}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._model.tokenizer

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and output together."""
        return self._model.context_length

    @property
    def cost(self) -> Cost:
        """Of all calls."""
        return self.writing + self.reading + self.differentiating

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """See `interface.Model`."""
        with self._timed("writing"):
            found = self._model.generate(requests)
        self.answers.update(zip((request.prompt for request in requests), found, strict=True))
        return found

    def next_token_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """See `interface.Model`."""
        with self._timed("reading"):
            return self._model.next_token_logprobs(contexts)

    def token_logprobs(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery]) -> Tensor:
        """See `interface.Model`."""
        with self._timed("reading"):
            return self._model.token_logprobs(sequences, queries)

    def logprob_gradient(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery], leaf: Leaf) -> Tensor:
        """See `interface.Model`."""
        with self._timed("differentiating"):
            return self._model.logprob_gradient(sequences, queries, leaf)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """See `interface.Model`."""
        return self._model.embed(tokens)

    @contextmanager
    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> Iterator[Watched]:
        """Itself."""
        yield self

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        before, began = self._engine.counters, time.perf_counter()
        yield
        seconds, spent = time.perf_counter() - began, self._engine.counters - before
        cost = Cost(0, spent.prefilled_tokens, spent.backward_tokens, spent.generated_tokens, seconds)
        setattr(self, kind, getattr(self, kind) + cost)


@contextmanager
def watched(engine: Engine) -> Iterator[Watched]:
    """A session of the engine, with a stopwatch."""
    with engine.session() as session:
        yield Watched(engine, session)
