"""The gradient over reasoning with respect to one token of the instruction: equation 7 of the paper.

The paper writes the embedding of the token at position i as ε · E. E [C, d] holds the embeddings of the
candidates and of the current token p_i; the indicator ε [C] is 1 at p_i and 0 elsewhere. By the chain rule

    ∂L/∂ε  =  ∂L/∂(ε·E) · Eᵀ      [C]  =  [d] · [d, C]

so one backward pass to the embedding of p_i gives the gradient for *any* candidates, however many; they may
be chosen afterwards.

ε stands for the token as an input only: as a prediction target in L_perpl the token at position i stays p_i.

Shapes: N examples, C candidates, d embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.engine import Engine
from dspy_greater.model.teacher_forcing import (
    Losses,
    Reading,
    SupervisedTokens,
    check_supervised,
    in_batches,
    losses_of,
)


@dataclass(frozen=True)
class EmbeddingGradient:
    """∂L/∂(ε·E): how each example's loss changes with the embedding of the token at one position."""

    position: int  # index in the instruction
    current: int  # p_i, the token that stands there
    per_example: Tensor  # [N, d] at least float32, on the model's device
    losses: Losses  # of the same forward pass


@dataclass(frozen=True)
class TokenGradient:
    """∂L/∂ε: the first-order worth of each token that could stand at one position; negative is good.

    An example whose loss or gradient is not finite is nan throughout and takes no part in the sums.

    >>> found = TokenGradient(
    ...     position=0,
    ...     current=5,
    ...     candidates=(3, 4, 5),
    ...     per_example=((2.0, -1.0, 0.5), (1.0, 0.0, 1.5)),
    ...     per_example_current=(0.5, 1.5),
    ...     losses=Losses((0.1, 0.2), (1.0, 1.0)),
    ... )
    >>> found.total, found.total_current, found.predicted_change
    ((3.0, -1.0, 2.0), 2.0, (1.0, -3.0, 0.0))
    >>> found.most_negative(2)
    (4, 5)
    """

    position: int  # index in the instruction
    current: int  # p_i, the token that stands there
    candidates: tuple[int, ...]  # [C]
    per_example: tuple[tuple[float, ...], ...]  # [N, C]
    per_example_current: tuple[float, ...]  # [N] the same for p_i
    losses: Losses  # of the same forward pass

    @property
    def total(self) -> tuple[float, ...]:
        """∂L/∂ε summed over the finite examples, [C]; nan throughout when there is none."""
        rows = [row for row, usable in zip(self.per_example, self._usable, strict=True) if usable]
        return tuple(_sum([row[column] for row in rows]) for column in range(len(self.candidates)))

    @property
    def total_current(self) -> float:
        """∂L/∂ε at p_i, summed over the finite examples; nan when there is none."""
        return _sum([each for each in self.per_example_current if math.isfinite(each)])

    @property
    def predicted_change(self) -> tuple[float, ...]:
        """By how much the summed loss changes, to first order, when the candidate replaces p_i, [C]."""
        return tuple(total - self.total_current for total in self.total)

    def most_negative(self, mu: int) -> tuple[int, ...]:
        """Line 14 of Algorithm 1, top-μ(-∂L/∂ε): at most `mu` of candidates and current token, the best first.

        ε has a place for the current token, too: while fewer than μ candidates have a more negative
        gradient, it is among them. A token whose gradient is nan is never picked, so fewer may come back, or none. Of
        equals, the current token comes first, and then the one that was proposed first.
        """
        gradients = {self.current: self.total_current, **dict(zip(self.candidates, self.total, strict=True))}
        eligible = [token for token, gradient in gradients.items() if math.isfinite(gradient)]
        return tuple(sorted(eligible, key=gradients.__getitem__)[:mu])

    @property
    def _usable(self) -> list[bool]:
        return [math.isfinite(each) for each in self.per_example_current]


def gradient_over_reasoning(
    engine: Engine,
    supervised: Sequence[SupervisedTokens],
    *,
    position: int,
    candidates: Sequence[int],
    answer_temperature: float = 0.2,
    fluency_weight: float = 0.2,
    max_batch_tokens: int = 8_192,
) -> TokenGradient:
    """Equation 7: ∂L/∂ε at `position` of the instruction, for every example and candidate token.

    Each example is x ⊙ p ⊙ r ⊙ p_extract ⊙ y with the reasoning r that the model itself wrote under p. One
    forward and one backward pass over each, whatever the number of candidates; what all examples begin with, up
    to the position, is read once and not differentiated, since the token cannot reach back to it.
    `fluency_weight` is λ of equation 6. Weights get no gradient; the model and the random state are left as they were.

    Raises `LayoutError` for misplaced spans, no examples, or examples whose instructions differ, and
    `SettingsError` for a position or candidate that does not exist.

    >>> from types import SimpleNamespace as Row
    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> row = Row(token_ids=(1, 5, 6, 7, 9), instruction=Row(start=1, stop=3), answer=Row(start=4, stop=5))
    >>> found = gradient_over_reasoning(engine, [row], position=1, candidates=[2, 3, 4])
    >>> found.current, len(found.total), len(found.most_negative(2))
    (6, 3, 2)
    """
    gradient = embedding_gradient(
        engine,
        supervised,
        position=position,
        answer_temperature=answer_temperature,
        fluency_weight=fluency_weight,
        max_batch_tokens=max_batch_tokens,
    )
    return token_gradient(engine, gradient, candidates)


def embedding_gradient(
    engine: Engine,
    supervised: Sequence[SupervisedTokens],
    *,
    position: int,
    answer_temperature: float = 0.2,
    fluency_weight: float = 0.2,
    max_batch_tokens: int = 8_192,
) -> EmbeddingGradient:
    """The half of equation 7 that needs the model and no candidates: ∂L/∂(ε·E).

    Arguments and errors as in `gradient_over_reasoning`. `max_batch_tokens` bounds rows times longest row of
    one backward pass, what is read once left out; it changes memory and speed, never the result beyond rounding.
    """
    check_supervised(supervised, answer_temperature)
    current = _current_token(supervised, position)
    lengths = [len(example.token_ids) for example in supervised]
    first = min(example.instruction.start for example in supervised) + position
    # The engine has frozen every weight, so the backward pass ends at the embedding.
    with engine.exclusive(), torch.inference_mode(False), torch.enable_grad():
        reading = Reading(engine, supervised, answer_temperature=answer_temperature, most=first)
        differentiate = partial(_differentiate, engine, reading, position=position, fluency_weight=fluency_weight)
        shared = reading.shared()
        results = in_batches(differentiate, supervised, lengths, max_batch_tokens, shared, reading.forget)
    gradients, losses = zip(*results, strict=True)
    return EmbeddingGradient(position, current, torch.stack(gradients), losses_of(losses))


def _differentiate(
    engine: Engine,
    reading: Reading,
    batch: Sequence[SupervisedTokens],
    *,
    position: int,
    fluency_weight: float,
) -> list[tuple[Tensor, tuple[float, float]]]:
    """One forward and one backward pass; for each example ∂L/∂(ε·E) [d] and the two parts of its loss."""
    layer = engine.model.get_input_embeddings()
    places = [example.instruction.start + position for example in batch]  # [N]
    current = torch.tensor([example.token_ids[at] for example, at in zip(batch, places, strict=True)])  # [N]
    embedding = layer(current.to(layer.weight.device)).detach().requires_grad_()  # [N, d]  ε·E = E[p_i]

    shared = reading.shared()  # P, at most the place of the token
    with embedded_at(layer, [place - shared for place in places], embedding):
        cross_entropy, fluency_nll = reading.losses(batch)  # [N]
    loss = cross_entropy  # [N]  equation 6
    if fluency_weight != 0:
        loss = cross_entropy + fluency_weight * fluency_nll.exp()

    (gradient,) = torch.autograd.grad(loss.sum(), embedding)  # [N, d]: example j's loss sees row j alone
    engine.tally(backward_tokens=sum(len(example.token_ids) - shared for example in batch))
    gradient = gradient.to(loss.dtype)  # at least float32
    return list(zip(gradient, zip(cross_entropy.tolist(), fluency_nll.tolist(), strict=True), strict=True))


def token_gradient(engine: Engine, gradient: EmbeddingGradient, candidates: Sequence[int]) -> TokenGradient:
    """The other half of equation 7: ∂L/∂ε = ∂L/∂(ε·E) · Eᵀ. No pass through the model.

    E is what the embedding layer puts out for a token; a scale inside that layer (Gemma's √d) is part of it.
    Raises `SettingsError` for a candidate that is not in the vocabulary.
    """
    layer = engine.model.get_input_embeddings()
    for token in candidates:
        if not 0 <= token < layer.weight.shape[0]:
            raise SettingsError(
                f"Candidate token {token} is outside the model's vocabulary of {layer.weight.shape[0]}; "
                "give ids from the model's own tokenizer."
            )
    tokens = torch.tensor([*candidates, gradient.current], device=layer.weight.device)  # [C + 1]
    with engine.exclusive(), torch.no_grad():
        E = layer(tokens).to(gradient.per_example)  # [C + 1, d]
    G = (gradient.per_example @ E.T).tolist()  # [N, C + 1]
    rows = [
        row if finite and math.isfinite(row[-1]) else [math.nan] * len(row)
        for row, finite in zip(G, gradient.losses.finite, strict=True)
    ]
    return TokenGradient(
        position=gradient.position,
        current=gradient.current,
        candidates=tuple(candidates),
        per_example=tuple(tuple(row[:-1]) for row in rows),
        per_example_current=tuple(row[-1] for row in rows),
        losses=gradient.losses,
    )


@contextmanager
def embedded_at(layer: Module, places: Sequence[int], embedding: Tensor) -> Iterator[None]:
    """Inside, `layer` puts out `embedding[j]` at place `places[j]` of row j, and else what it always does."""
    rows, columns = torch.arange(len(places)), torch.tensor(places)  # [N] each

    def substitute(_layer: Module, _inputs: Any, embedded: Tensor) -> Tensor:  # [N, T, d]
        return embedded.index_put((rows, columns), embedding)

    hook = layer.register_forward_hook(substitute)
    try:
        yield
    finally:
        hook.remove()


def _current_token(supervised: Sequence[SupervisedTokens], position: int) -> int:
    """p_i, or an error when there is no such token or the examples do not agree on the instruction."""
    if not supervised:
        raise LayoutError("There is no example to take the gradient of; give at least one.")
    spans = [each.instruction for each in supervised]
    instructions = [tuple(each.token_ids[span.start : span.stop]) for each, span in zip(supervised, spans, strict=True)]
    for row, instruction in enumerate(instructions):
        if instruction != instructions[0]:
            raise LayoutError(
                f"Example {row} has the instruction tokens {instruction}, example 0 has {instructions[0]}; "
                "lay out every example with the same instruction."
            )
    if not 0 <= position < len(instructions[0]):
        raise SettingsError(
            f"Position {position} is not in the instruction, which has {len(instructions[0])} tokens; "
            "count from 0 at its first token."
        )
    return instructions[0][position]


def _sum(values: Sequence[float]) -> float:
    """The exactly rounded sum, the same in any order; nan for nothing and for anything not finite."""
    return math.fsum(values) if values and all(map(math.isfinite, values)) else math.nan
