"""The model interface as one would first write it down: one row at a time, no cache, nothing kept.

It is the twin that the fast implementation equals in tests, and what a reader starts from. Use `engine.Engine`
for work.

Shapes: T tokens of a sequence, R queries, N sequences, V vocabulary, d embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dspy_greater.model.interface import Generation, GenerationRequest, Leaf, TokenQuery, Tokens
from dspy_greater.model.over_engine import OverEngine
from dspy_greater.model.requests import row_of
from dspy_greater.model.sampling import choose


class PlainModel(OverEngine):
    """`interface.Model` over the weights of an engine, without anything that makes it fast.

    >>> from dspy_greater.model.engine import Engine
    >>> model = PlainModel(Engine.from_pretrained("pocket"))
    >>> model.token_logprobs([(1, 5, 6)], [TokenQuery(row=0, at=2)]).shape
    torch.Size([1])
    """

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Token by token, the whole row read again for each."""
        done: list[Generation] = []
        for request in requests:
            row = row_of(self._engine, request)
            while row.finish_reason is None:
                logits = self._logits(row.context)[-1:]  # [1, V]
                row.accept(choose(logits, [row])[0])
            done.append(row.result())
        return done

    @torch.no_grad()
    def next_token_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """log f(. | context), [D, V]."""
        return torch.stack([self._logits(tuple(context))[-1].log_softmax(-1).cpu() for context in contexts])

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery]) -> Tensor:
        """log f(token | what stands before it) of every query, [R]."""
        logits = [self._logits(sequence) for sequence in sequences]  # N times [T, V]
        return torch.stack([_logprob(logits[query.row], sequences[query.row], query).cpu() for query in queries])

    def logprob_gradient(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery], leaf: Leaf) -> Tensor:
        """One forward and one backward pass for each sequence; [N, d] or, for a shared leaf, their sum [1, d]."""
        gradients: list[Tensor] = []
        for row, tokens in enumerate(sequences):
            value = leaf.embedding[row if len(leaf.embedding) > 1 else 0].detach().requires_grad_()  # [d]
            mine = [query for query in queries if query.row == row]
            with torch.enable_grad():
                embedded = self.embed(tokens)  # [T, d]
                place = leaf.places[row]
                logits = self._logits(tokens, torch.cat([embedded[:place], value[None], embedded[place + 1 :]]))
                total = value.sum() * 0 + sum(query.weight * _logprob(logits, tokens, query) for query in mine)
            gradients.append(torch.autograd.grad(total, value)[0].to(logits.dtype))
        if len(leaf.embedding) == len(sequences) > 1:
            return torch.stack(gradients)
        finite = [gradient for gradient in gradients if bool(gradient.isfinite().all())]
        return sum(finite, torch.zeros_like(gradients[0]))[None] if finite else gradients[0][None] * torch.nan

    @torch.no_grad()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """The embedding layer's output, [C, d]."""
        layer = self._engine.model.get_input_embeddings()
        return layer(torch.tensor(list(tokens), device=self._engine.weights.device))

    @contextmanager
    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> Iterator[PlainModel]:
        """Itself: it keeps nothing."""
        yield self

    def _logits(self, tokens: Tokens, embedded: Tensor | None = None) -> Tensor:
        """[T, V], at least float32."""
        inputs = {"inputs_embeds": (self.embed(tokens) if embedded is None else embedded)[None]}
        with self._engine.exclusive():
            logits: Tensor = self._engine.model(**inputs, use_cache=False).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logprob(logits: Tensor, tokens: Tokens, query: TokenQuery) -> Tensor:
    return (logits[query.at - 1] / query.temperature).log_softmax(-1)[tokens[query.at]]
