"""What the search asks of a language model: tokens, log-probabilities, and gradients of sums of these.

Every number of the method is a function of token log-probabilities, and every gradient is that of a weighted sum of
them. `plain.PlainModel` computes them as one would first write them down, `engine.Engine` fast; tests hold the two
together.

Shapes: R queries, N sequences, D contexts, C tokens, V vocabulary, d embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class TokenQuery:
    """How likely is the token at place `at` of sequence `row`, after the tokens before it?

    The logits are divided by `temperature` before the softmax. `weight` is the query's factor in the sum that
    `logprob_gradient` differentiates. The first token of a sequence cannot be asked for: nothing predicts it.
    """

    row: int
    at: int
    temperature: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Leaf:
    """One token of each sequence whose embedding is a variable.

    `embedding` [N, d] holds the value for each sequence; [1, d] is one variable that all sequences share. The token
    that stands at the place counts as a target of queries, and not as an input.
    """

    places: Tokens  # [N] index in each sequence
    embedding: Tensor  # [N, d] or [1, d]


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt: `token_ids` without the stop token, and why it ended."""

    token_ids: Tokens
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt with its own sampling settings.

    `temperature` 0 is greedy. Otherwise a token is drawn from the smallest set of likeliest ones that together reach
    `top_p`, by random numbers that follow from `seed` and the token's place alone. `stop_token_ids` replace the
    model's own end tokens. `on_token` is called with every token; a true answer ends the row after it. `on_end` is
    called with the result as soon as it is there, which may be long before that of the batch.
    """

    prompt: Tokens
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: Tokens | None = None
    on_token: Callable[[int], bool | None] | None = None
    on_end: Callable[[Generation], None] | None = None


class Model(Protocol):
    """A causal language model over token ids."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and output together; None for no limit that is known."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue every prompt; results in the order of the requests.

        Raises:
            ContextLengthError: a prompt leaves no room.
            LayoutError: a prompt has no tokens.
            EngineMemoryError: a single row does not fit into memory.
        """
        ...

    def next_token_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """log f(. | context) for every context, [D, V], at least float32, on the CPU. Equation 3 ranks these."""
        ...

    def token_logprobs(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery]) -> Tensor:
        """The log-probability of every queried token, [R], at least float32, on the CPU; no gradient.

        Equations 5 and 6 and off-policy forecasts are sums of these.
        """
        ...

    def logprob_gradient(self, sequences: Sequence[Tokens], queries: Sequence[TokenQuery], leaf: Leaf) -> Tensor:
        """The gradient of Σ weight x log-probability with respect to the leaf, in the leaf's shape, at least float32.

        Row j of a leaf [N, d] reaches sequence j alone. With a leaf [1, d] the gradients of all sequences are added
        up; one that is not finite takes no part, and where none is finite the sum is nan. Equation 7 and the score
        term are gradients of this kind.
        """
        ...

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """What enters the first layer for these tokens, [C, d], in the model's dtype."""
        ...

    def session(self, expected: Iterable[tuple[Tokens, Tokens]] = ()) -> AbstractContextManager[Model]:
        """The same model for the calls of one step: what they have in common may be computed once.

        `expected` says what was generated after prompts like those that will come. It changes speed, and results by
        rounding at most.
        """
        ...
