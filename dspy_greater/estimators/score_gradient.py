"""The score gradient: the slope of the expected loss, credit for better reasoning included.

With the expected loss J(p) = E_x E_{r ~ f(.|x,p)} [ℓ(r) + α L_CE(x, p, r, y)], ℓ the mistake that the metric sees and
α the weight of the gold answer's cross-entropy beside it,

    ∇J = α E[ ∇L_CE(x, p, r, y) ]  +  E[ (ℓ - b) ∇log f(r | x, p) ]
               pathwise                        score

The paper keeps the first term: r is fixed, so a token that would make the model reason better earns nothing. The second
is the score-function term: what went wrong should have been less likely, what went right more. It asks the metric for
numbers only, so any metric will do, and it needs no gold answer. Both come from one forward and one backward pass over

    S = 1/V Σ_m v_m [ (ℓ_m - b) log f(r_m | x, p) + α L_CE(x, p, r_m, y) ],    V = Σ v_m

The embedding at the position is a leaf, as in `paper_gradient`, that all sequences share. Its value is the mean of the
candidates' embeddings: candidates lie far from the current token, and a linear model taken there ranks them better.

Shapes: M reasonings, C candidates, d embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.interface import Leaf, Model, TokenQuery, Tokens
from dspy_greater.model.tensors import floats
from dspy_greater.objective.loss import span_queries
from dspy_greater.objective.replay import Reasoning, Replay


def score_gradient(
    model: Model,
    replay: Replay,
    *,
    position: int,
    candidates: Sequence[int],
    answer_weight: float = 0.0,
    answer_temperature: float = 0.2,
    value: Tensor | None = None,
) -> tuple[float, ...]:
    """The slope of the expected loss for every candidate at `position`, [C].

    Only differences between candidates mean anything: the slope of a token includes what all tokens have in common.
    They are nan throughout where no sequence has a finite gradient, or none has a part in the loss.

    Args:
        model: the model.
        replay: reasonings laid out under an instruction that has a token at the position, any token, and ℓ_m - b for
            each, [M]; see `replay.advantages`.
        position: index in the instruction.
        candidates: token ids, [C].
        answer_weight: α; 0 leaves the pathwise term out.
        answer_temperature: divides the logits of gold answers.
        value: where the linear model is taken, [1, d]; the mean of the candidates' embeddings without it.

    Raises:
        LayoutError: no reasonings, or a position outside an instruction.
        SettingsError: a candidate outside the vocabulary, or none.

    >>> from dspy_greater.model.engine import Engine
    >>> from dspy_greater.objective.replay import ReasonedSequence, Reasoning
    >>> from dspy_greater.prompt.spans import Span
    >>> sequence = ReasonedSequence((1, 5, 6, 7, 9), Span(1, 3), Span(3, 4), Span(4, 5))
    >>> runs = [Reasoning(0, 1.0, 1.0, (sequence,)), Reasoning(1, 0.0, 1.0, (sequence,))]
    >>> model = Engine.from_pretrained("pocket")
    >>> len(score_gradient(model, Replay(runs, [0.5, -0.5]), position=1, candidates=[2, 3, 4]))
    3
    """
    _check(replay.reasonings, position, candidates)
    E = model.embed(candidates)  # [C, d]
    sequences, queries, places = _surrogate(replay, position, answer_weight, answer_temperature)
    if not queries:
        return (math.nan,) * len(candidates)
    leaf = Leaf(places, E.mean(0, keepdim=True) if value is None else value)
    gradient = model.logprob_gradient(sequences, queries, leaf)[0]  # [d]  ∂S/∂(ε·E)
    return tuple(floats(E.to(gradient) @ gradient))  # [C]  ∂S/∂ε


def _surrogate(
    replay: Replay,
    position: int,
    answer_weight: float,
    answer_temperature: float,
) -> tuple[list[Tokens], list[TokenQuery], Tokens]:
    """S as sequences and weighted queries, and the leaf's places; sequences that no term asks for are left out."""
    total = math.fsum(reasoning.share for reasoning in replay.reasonings)
    sequences: list[Tokens] = []
    queries: list[TokenQuery] = []
    places: list[int] = []
    for reasoning, advantage in zip(replay.reasonings, replay.advantages, strict=True):
        share = reasoning.share / total
        for sequence in reasoning.sequences:
            row, span = len(sequences), sequence.generated
            mine = [TokenQuery(row, at, 1.0, share * advantage) for at in range(span.start, span.stop) if advantage]
            if sequence.answer is not None and answer_weight:  # L_CE is the mean negative log-likelihood
                mine += span_queries(row, sequence.answer, answer_temperature, -answer_weight * share)
            if mine:
                sequences.append(sequence.token_ids)
                places.append(sequence.instruction.start + position)
                queries += mine
    return sequences, queries, tuple(places)


def _check(reasonings: Sequence[Reasoning], position: int, candidates: Sequence[int]) -> None:
    sequences = [sequence for reasoning in reasonings for sequence in reasoning.sequences]
    if not sequences:
        raise LayoutError("There is no reasoning to take the gradient over; give at least one with a sequence.")
    for sequence in sequences:
        if not 0 <= position < len(sequence.instruction) or sequence.instruction.start < 1:
            raise LayoutError(
                f"Position {position} is not in the instruction [{sequence.instruction.start}, "
                f"{sequence.instruction.stop}) of a sequence, or no token stands before the instruction; lay the "
                "reasonings out under one instruction."
            )
    if not candidates:
        raise SettingsError("There is no candidate to take the slope for; give at least one token id.")
