"""The tokens that all rows have in common from a changed one on: read once, and differentiated once.

Behind the changed token prompts go on alike for a while: the rest of the instruction, demonstrations, the words
around an input. What the model makes of them depends on the changed embedding e, so it cannot be kept as a prefix, but
one row of it will do. The rows of a batch read on from copies of its key-value states, and the chain rule brings
together what each asks of its copy:

    ∂L/∂e = ( Σ_j ∂L_j/∂(K, V)_j ) · ∂(K, V)/∂e

Shapes: P tokens of the prefix, S of the segment, N rows, d embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspy_greater.estimators.paper_gradient import embedded_at
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import LEAST_SAVED, Prefix, held_states, plain_cache
from dspy_greater.model.teacher_forcing import logits_at, right_padded


class SharedSegment:
    """Key-value states of P + S tokens that depend on a leaf, and what the rows of all batches ask of them.

    >>> from dspy_greater.model.engine import Engine
    >>> from dspy_greater.model.teacher_forcing import logits_before
    >>> engine = Engine.from_pretrained("pocket")
    >>> layer = engine.model.get_input_embeddings()
    >>> leaf = layer(torch.tensor([7])).detach().requires_grad_()
    >>> with engine.exclusive():
    ...     segment = read_segment(engine, [5, 7, 6, 8], None, place=1, leaf=leaf)
    ...     prefix, copies = segment.copies(rows=2)
    ...     logits = logits_before(engine, [[5, 7, 6, 8, 9], [5, 7, 6, 8, 3]], [(0, 5), (1, 5)], prefix=prefix)
    ...     segment.collect(torch.autograd.grad(logits[:, 4].sum(), copies))
    >>> segment.pull_back().shape == leaf[0].shape
    True
    """

    def __init__(self, token_ids: Sequence[int], leaf: Tensor, states: Sequence[Tensor]) -> None:
        self.token_ids = tuple(token_ids)  # [P + S]
        self._leaf = leaf  # [1, d]
        self._states = tuple(states)  # keys and values of every layer in turn, each [1, heads, P + S, head size]
        self._asked: tuple[Tensor, ...] | None = None  # Σ_j ∂L_j/∂(K, V)_j so far

    def copies(self, rows: int) -> tuple[Prefix, list[Tensor]]:
        """What N = `rows` rows begin with, and its states for each of them, [N, heads, P + S, head size], as leaves."""
        leaves = [state.detach().expand(rows, *state.shape[1:]).requires_grad_() for state in self._states]
        return Prefix(self.token_ids, tuple(zip(leaves[::2], leaves[1::2], strict=True)), None), leaves

    def collect(self, gradients: Sequence[Tensor]) -> None:
        """Add what the rows of a batch ask of their copies; a row in which anything is not finite takes no part."""
        usable = torch.stack([each.flatten(1).isfinite().all(1) for each in gradients]).all(0)  # [N]
        if not bool(usable.any()):
            return
        spoiled = ~usable[:, None, None, None]
        sums = [_sum_of_rows(each.masked_fill(spoiled, 0.0)) for each in gradients]
        if self._asked is not None:
            sums = [before + each for before, each in zip(self._asked, sums, strict=True)]
        self._asked = tuple(sums)  # all or nothing: a batch that runs out of memory is tried again

    def pull_back(self) -> Tensor | None:
        """∂L/∂e, [d], at least float32; None when no row took part. It can be asked for once."""
        if self._asked is None:
            return None
        asked = [each.to(state.dtype) for each, state in zip(self._asked, self._states, strict=True)]
        (gradient,) = torch.autograd.grad(self._states, self._leaf, grad_outputs=asked)  # [1, d]
        return gradient[0].to(torch.promote_types(gradient.dtype, torch.float32))


def read_segment(
    engine: Engine, token_ids: Sequence[int], prefix: Prefix | None, *, place: int, leaf: Tensor
) -> SharedSegment | None:
    """Read what follows the prefix, with `leaf` [1, d] as the embedding at `place`, behind the prefix.

    None when the states of this model cannot be handed on. Call it inside `engine.exclusive()`.
    """
    shared = len(prefix) if prefix else 0
    cache = prefix.cache(engine.model, 1) if prefix else plain_cache(engine.model)
    own, positions = right_padded([tuple(token_ids[shared:])])  # [1, S] each
    last = (torch.tensor([0]), torch.tensor([own.shape[1] - 1]))
    with torch.enable_grad(), embedded_at(engine.model.get_input_embeddings(), [place - shared], leaf):
        logits_at(engine, own, positions + shared, last, real=own.shape[1], past_key_values=cache)
    states = [state for layer in cache.layers for state in held_states(layer)]
    if any(state.shape[-2] != len(token_ids) or not state.requires_grad for state in states):
        return None
    return SharedSegment(token_ids, leaf, states)


def worth_sharing(engine: Engine, tokens: int, *, rows: int, longest: int) -> bool:
    """Whether a segment of so many tokens saves N = `rows` rows, the longest of so many tokens, more than it costs."""
    return tokens * (rows - 1) >= LEAST_SAVED and longest <= engine.prefixes.reach


def _sum_of_rows(gradient: Tensor) -> Tensor:
    """[N, ...] -> [1, ...], at least float32."""
    return gradient.sum(0, keepdim=True, dtype=torch.promote_types(gradient.dtype, torch.float32))
