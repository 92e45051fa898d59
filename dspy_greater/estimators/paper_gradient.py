"""The paper's gradient over reasoning with respect to one token of the instruction: equation 7.

The paper writes the embedding of the token at position i as ε · E. E [C, d] holds the embeddings of the
candidates and of the current token p_i; the indicator ε [C] is 1 at p_i and 0 elsewhere. By the chain rule

    ∂L/∂ε  =  ∂L/∂(ε·E) · Eᵀ      [C]  =  [d] · [d, C]

so one backward pass to the embedding of p_i gives the gradient for *any* candidates, however many. The loss of
equation 6 is L = L_CE + λ exp(L_nll), with L_nll the instruction's mean negative log-likelihood; so its gradient is
that of a weighted sum of log-probabilities, in which the instruction's tokens weigh -λ exp(L_nll) / n.

ε stands for the token as an input only: as a prediction target in L_nll the token at position i stays p_i.

Shapes: N examples, C candidates, d embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.interface import Leaf, Model, TokenQuery
from dspy_greater.model.tensors import floats
from dspy_greater.objective.loss import check_supervised, means, span_queries
from dspy_greater.prompt.spans import Supervised


@dataclass(frozen=True)
class TokenGradient:
    """∂L/∂ε: the first-order worth of each token that could stand at one position; negative is good.

    An example whose loss or gradient is not finite is nan throughout and takes no part in the sums.

    >>> found = TokenGradient(
    ...     current=5,
    ...     candidates=(3, 4, 5),
    ...     per_example=((2.0, -1.0, 0.5), (1.0, 0.0, 1.5)),
    ...     per_example_current=(0.5, 1.5),
    ... )
    >>> found.total, found.total_current, found.predicted_change
    ((3.0, -1.0, 2.0), 2.0, (1.0, -3.0, 0.0))
    >>> found.most_negative(2)
    (4, 5)
    """

    current: int  # p_i, the token that stands there
    candidates: tuple[int, ...]  # [C]
    per_example: tuple[tuple[float, ...], ...]  # [N, C]
    per_example_current: tuple[float, ...]  # [N] the same for p_i

    @property
    def total(self) -> tuple[float, ...]:
        """∂L/∂ε summed over the finite examples, [C]; nan throughout when there is none."""
        usable = [math.isfinite(slope) for slope in self.per_example_current]
        rows = [row for row, finite in zip(self.per_example, usable, strict=True) if finite]
        return tuple(_sum([row[column] for row in rows]) for column in range(len(self.candidates)))

    @property
    def total_current(self) -> float:
        """∂L/∂ε at p_i, summed over the finite examples; nan when there is none."""
        return _sum([slope for slope in self.per_example_current if math.isfinite(slope)])

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


def paper_gradient(
    model: Model,
    examples: Sequence[Supervised],
    *,
    position: int,
    candidates: Sequence[int],
    answer_temperature: float = 0.2,
    fluency_weight: float = 0.2,
) -> TokenGradient:
    """Equation 7: ∂L/∂ε at `position` of the instruction, for every example and candidate token.

    Each example is x ⊙ p ⊙ r ⊙ p_extract ⊙ y with the reasoning r that the model itself generated under p.
    `fluency_weight` is λ of equation 6.

    Raises `LayoutError` for misplaced spans, no examples, or examples whose instructions differ, and
    `SettingsError` for a position or candidate that does not exist.

    >>> from dspy_greater.model.engine import Engine
    >>> from dspy_greater.prompt.spans import Span
    >>> example = Supervised((1, 5, 6, 7, 9), instruction=Span(1, 3), reasoning=Span(3, 4), answer=Span(4, 5))
    >>> found = paper_gradient(Engine.from_pretrained("pocket"), [example], position=1, candidates=[2, 3, 4])
    >>> found.current, len(found.total), len(found.most_negative(2))
    (6, 3, 2)
    """
    check_supervised(examples, answer_temperature)
    current = _current_token(examples, position)
    sequences = [example.token_ids for example in examples]
    queries: list[TokenQuery] = []
    for row, (example, factor) in enumerate(
        zip(examples, _fluency_factors(model, examples, fluency_weight), strict=True)
    ):
        queries += span_queries(row, example.answer, answer_temperature, -1.0)  # L_CE, a mean over the answer
        queries += span_queries(row, example.instruction, 1.0, -factor) if factor else []
    E = model.embed([*candidates, current])  # [C + 1, d]
    places = tuple(example.instruction.start + position for example in examples)
    leaf = Leaf(places, E[-1:].expand(len(examples), -1))  # ε·E = E[p_i], one for each example
    gradient = model.logprob_gradient(sequences, queries, leaf)  # [N, d]  ∂L/∂(ε·E)
    unusable = ~gradient.isfinite().all(1, keepdim=True)  # [N, 1]
    rows = (gradient @ E.to(gradient).T).masked_fill(unusable, math.nan)  # [N, C + 1]  ∂L/∂ε
    return TokenGradient(
        current, tuple(candidates), tuple(tuple(floats(row)) for row in rows[:, :-1]), tuple(floats(rows[:, -1]))
    )


def _fluency_factors(model: Model, examples: Sequence[Supervised], fluency_weight: float) -> list[float]:
    """λ exp(L_nll) of each example: what its instruction's mean negative log-likelihood weighs in ∂L; 0 without λ."""
    if fluency_weight == 0:
        return [0.0] * len(examples)
    queries = [query for row, example in enumerate(examples) for query in span_queries(row, example.instruction, 1.0)]
    logprobs = model.token_logprobs([example.token_ids for example in examples], queries)  # [R]
    nll = -torch.tensor(means(logprobs, [example.instruction for example in examples]), dtype=torch.float64)
    return floats(fluency_weight * nll.exp())


def _current_token(examples: Sequence[Supervised], position: int) -> int:
    """p_i, or an error when there is no such token or the examples do not agree on the instruction."""
    if not examples:
        raise LayoutError("There is no example to take the gradient of; give at least one.")
    spans = [example.instruction for example in examples]
    instructions = [
        tuple(example.token_ids[span.start : span.stop]) for example, span in zip(examples, spans, strict=True)
    ]
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
