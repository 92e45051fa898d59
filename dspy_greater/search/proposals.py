"""Candidate tokens for one position of the instruction: equations 3 and 4 of the paper.

The language model itself says which tokens could stand at position i, given an input and the instruction so
far; a token that it finds likely for *every* sampled input is about the task and not about one example.

Shapes: V vocabulary, D distinct contexts, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Generic, TypeVar

from torch import Tensor

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.model.interface import Model
from dspy_greater.model.tensors import whole
from dspy_greater.stats import mean

CandidateT = TypeVar("CandidateT")


@dataclass(frozen=True)
class ProposalSizes:
    """How widely equations 3 and 4 look. Raises `SettingsError` for a number below 1."""

    top_k: int = 10  # k of equation 3
    sample_size: int = 5  # q of equation 4
    draws: int = 4  # samples whose intersections are united
    minimum: int = 6  # k doubles while fewer candidates are legal
    max_widening: int = 16  # up to so many times `top_k`

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise SettingsError(f"{name} is {value}; give at least 1.")


@dataclass(frozen=True)
class Proposal(Generic[CandidateT]):
    """The candidates for one position, likeliest first, and how they were found.

    >>> Proposal((7, 3), ("solve", "list"), (-0.5, -1.25), top_k=20, distinct_contexts=12).candidates
    (7, 3)
    """

    candidates: tuple[int, ...]  # [C] token ids
    canonical: tuple[CandidateT, ...]  # [C] what `canonical` made of each
    mean_log_probabilities: tuple[float, ...]  # [C] nats, mean over the distinct contexts
    top_k: int  # the k that was needed
    distinct_contexts: int  # how many contexts went through the model


def propose(
    model: Model,
    contexts: Sequence[Sequence[int]],
    sizes: ProposalSizes = ProposalSizes(),
    *,
    generator: Random,
    canonical: Callable[[int], CandidateT | None],
) -> Proposal[CandidateT]:
    """Tokens among the model's top k after each one of a sample of contexts, for any of several samples.

    `contexts[j]` are the token ids of x_j ⊙ p_<i. A draw samples q = `sizes.sample_size` of them and intersects
    their top k (equations 3 and 4); the candidates are the union over the draws. `canonical(token)`
    returns None for a token that must not be used, and such tokens do not count. While fewer than `sizes.minimum`
    are left, k doubles, up to `sizes.max_widening` times the first; only then may fewer come back, or none. Every k
    reads one and the same forward pass over the distinct sampled contexts.

    Order: mean log-probability over those contexts, then token id. A context whose probabilities are not
    numbers takes no part. All randomness comes from `generator`.

    Raises `LayoutError` for no contexts or an empty one.

    >>> from dspy_greater.model.engine import Engine
    >>> engine = Engine.from_pretrained("pocket")
    >>> found = propose(engine, [(1, 2, 3), (1, 5)], generator=Random(0), canonical={8: "add", 9: "list"}.get)
    >>> set(found.candidates) <= {8, 9}
    True
    """
    _check(contexts)
    widest = sizes.top_k * sizes.max_widening
    drawn = _draw([tuple(context) for context in contexts], sizes, generator)
    distinct = tuple(dict.fromkeys(context for draw in drawn for context in draw))

    logprobs = model.next_token_logprobs(distinct)  # [D, V]
    numbers = [not bool(row.isnan().any()) for row in logprobs]
    log_probabilities = {
        context: row for context, row, usable in zip(distinct, logprobs, numbers, strict=True) if usable
    }
    ranked = {context: _ranking(row, widest) for context, row in log_probabilities.items()}
    rankings = [[ranked[context] for context in draw if context in ranked] for draw in drawn]
    k, legal = _widen_until_enough(rankings, sizes.top_k, widest, sizes.minimum, canonical)

    mean = {token: _mean_at(token, log_probabilities.values()) for token in legal}
    order = tuple(sorted(legal, key=lambda token: (-mean[token], token)))
    return Proposal(
        candidates=order,
        canonical=tuple(legal[token] for token in order),
        mean_log_probabilities=tuple(mean[token] for token in order),
        top_k=k,
        distinct_contexts=len(distinct),
    )


def intersection(rankings: Iterable[Sequence[int]], k: int) -> set[int]:
    """Equation 4: the tokens among the first k (equation 3) of every ranking.

    >>> intersection([[4, 8, 6], [6, 4, 1]], k=2)
    {4}
    """
    first, *others = [set(ranking[:k]) for ranking in rankings] or [set[int]()]  # cand_ij of equation 3
    return first.intersection(*others)


def _draw(contexts: Sequence[tuple[int, ...]], sizes: ProposalSizes, generator: Random) -> list[list[tuple[int, ...]]]:
    """D_q of equation 4, several times over."""
    return [generator.sample(contexts, min(sizes.sample_size, len(contexts))) for _ in range(sizes.draws)]


def _widen_until_enough(
    rankings: Sequence[Sequence[Sequence[int]]],
    k: int,
    widest: int,
    minimum: int,
    canonical: Callable[[int], CandidateT | None],
) -> tuple[int, dict[int, CandidateT]]:
    """The smallest of k, 2k, 4k ... `widest` that leaves `minimum` legal tokens, and these tokens."""
    verdicts: dict[int, CandidateT | None] = {}
    while True:
        proposed = set[int]().union(*(intersection(draw, k) for draw in rankings))
        for token in sorted(proposed - verdicts.keys()):
            verdicts[token] = canonical(token)
        legal = {token: kept for token in sorted(proposed) if (kept := verdicts[token]) is not None}
        if len(legal) >= minimum or k >= widest:
            return k, legal
        k = min(2 * k, widest)


def _ranking(log_probabilities: Tensor, length: int) -> list[int]:
    """Token ids, likeliest first; a stable sort, so of equally likely ones the smaller id comes first."""
    return whole(log_probabilities.sort(descending=True, stable=True).indices[:length])


def _mean_at(token: int, log_probabilities: Iterable[Tensor]) -> float:
    return mean([float(row[token]) for row in log_probabilities])


def _check(contexts: Sequence[Sequence[int]]) -> None:
    if not contexts:
        raise LayoutError("There is no context to propose tokens for; give one per training example.")
    for row, context in enumerate(contexts):
        if len(context) == 0:
            raise LayoutError(
                f"The proposal context of example {row} is empty; give it the rendered input, or at least a "
                "begin-of-text token, for the model to continue."
            )
