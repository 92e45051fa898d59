"""The whole gradient over reasoning: the paper's term, and the one that credits better reasoning.

With the expected loss J(p) = E_x E_{r ~ f(.|x,p)} [ℓ(r) + α L_CE(x, p, r, y)], ℓ the mistake that the metric sees and
α the weight of the gold answer's cross-entropy beside it,

    ∇J = α E[ ∇L_CE(x, p, r, y) ]  +  E[ (ℓ - b) ∇log f(r | x, p) ]
               pathwise                        score

The paper keeps the first term: r is fixed, so a token that would make the model reason better earns nothing. The second
is the score-function term: what went wrong should have been less likely, what went right more. It asks the metric for
numbers only, so any metric will do, and it needs no gold answer. Both come from one forward and one backward pass over

    S = Σ_m v_m [ (ℓ_m - b) log f(r_m | x, p) + α L_CE(x, p, r_m, y) ]

The embedding at the position is a leaf, as in `gradient`, and may stand anywhere: where candidates lie far from the
current token, a linear model taken at their centroid ranks them better than one taken at the token itself.

Shapes: M sequences, d embedding, C candidates, R predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.estimators.paper_gradient import embedded_at
from dspy_greater.model.engine import Engine, EngineMemoryError
from dspy_greater.model.fast.prefix_cache import Beginning, Prefix, is_out_of_memory, shared_length
from dspy_greater.model.fast.shared_backward import SharedSegment, read_segment, worth_sharing
from dspy_greater.model.teacher_forcing import in_batches, logits_before
from dspy_greater.objective.replay import ReasonedSequence, Reasoning, advantages
from dspy_greater.settings import Baseline, Point, Term


@dataclass(frozen=True)
class CandidateSlopes:
    """∂J/∂ε for each candidate of one position, [C]: how the expected loss changes to first order; negative is good.

    Only differences between candidates mean anything: the slope of a token includes what all tokens have in common.
    """

    candidates: tuple[int, ...]  # [C] token ids
    slopes: tuple[float, ...]  # [C]; nan throughout when no sequence has a finite gradient

    def most_negative(self, count: int) -> tuple[int, ...]:
        """At most `count` candidates, best first; of equals the one that was proposed first.

        >>> CandidateSlopes((7, 8, 9), (0.5, -1.0, math.nan)).most_negative(2)
        (8, 7)
        """
        finite = [pair for pair in zip(self.slopes, self.candidates, strict=True) if math.isfinite(pair[0])]
        return tuple(token for _, token in sorted(finite, key=lambda pair: pair[0])[:count])


def whole_gradient(
    engine: Engine,
    reasonings: Sequence[Reasoning],
    *,
    position: int,
    candidates: Sequence[int],
    term: Term = "whole",
    point: Point = "centroid",
    baseline: Baseline = "batch",
    optimism: float = 1.0,
    answer_weight: float = 1.0,
    answer_temperature: float = 0.2,
    max_batch_tokens: int = 8_192,
) -> CandidateSlopes:
    """The slope of the expected loss for every candidate at `position` of the instruction.

    Args:
        engine: the model. Its weights get no gradient; it and the random state are left as they were.
        reasonings: laid out under an instruction that has a token at the position (any token, where `point` is
            "centroid").
        position: index in the instruction.
        candidates: token ids, [C].
        term: which of the two terms.
        point: where the linear model is taken: at the embedding of the token that stands there, at the mean of the
            candidates' embeddings, or half way.
        baseline: what b is a mean of, see `reasoning.advantages`.
        optimism: times which.
        answer_weight: α.
        answer_temperature: divides the logits of gold answers.
        max_batch_tokens: bounds rows times longest row of one backward pass.

    Raises:
        LayoutError: no reasonings, or a position outside an instruction.
        SettingsError: a candidate outside the vocabulary, or none.

    >>> from dspy_greater.prompt.spans import Span
    >>> engine = Engine.from_pretrained("pocket")
    >>> sequence = ReasonedSequence((1, 5, 6, 7, 9), Span(1, 3), Span(3, 4), Span(4, 5))
    >>> runs = [Reasoning(0, 1.0, 1.0, (sequence,)), Reasoning(1, 0.0, 1.0, (sequence,))]
    >>> len(whole_gradient(engine, runs, position=1, candidates=[2, 3, 4]).slopes)
    3
    """
    layer = engine.model.get_input_embeddings()
    _check(reasonings, position, candidates, layer.weight.shape[0])
    weighted = _weighted(reasonings, term, advantages(reasonings, baseline, optimism=optimism), answer_weight)
    with engine.exclusive(), torch.inference_mode(False):
        with torch.no_grad():
            E = layer(torch.tensor(list(candidates), device=layer.weight.device))  # [C, d]
        gradients = _differentiate(engine, weighted, position, E.mean(0), point, answer_temperature, max_batch_tokens)
        total = torch.stack([each for each in gradients if bool(each.isfinite().all())] or [E.new_full((1,), math.nan)])
        slopes = total.sum(0) @ E.to(total).T if total.shape[-1] == E.shape[-1] else E.new_full((len(E),), math.nan)
    return CandidateSlopes(tuple(candidates), tuple(slopes.tolist()))


@dataclass(frozen=True)
class _Weighted:
    """A sequence and its factors in S."""

    sequence: ReasonedSequence
    written: float  # v (ℓ - b)
    answer: float  # v α


def _weighted(
    reasonings: Sequence[Reasoning], term: Term, against: Sequence[float], answer_weight: float
) -> list[_Weighted]:
    """S as a list; sequences that no term asks for are left out."""
    total = math.fsum(each.share for each in reasonings)
    found: list[_Weighted] = []
    for each, advantage in zip(reasonings, against, strict=True):
        share = each.share / total
        for sequence in each.sequences:
            written = 0.0 if term == "pathwise" or not len(sequence.written) else share * advantage
            answer = 0.0 if term == "score" or sequence.answer is None else answer_weight * share
            if written or answer:
                found.append(_Weighted(sequence, written, answer))
    return found


def _differentiate(
    engine: Engine,
    weighted: Sequence[_Weighted],
    position: int,
    centroid: Tensor,
    point: Point,
    answer_temperature: float,
    max_batch_tokens: int,
) -> list[Tensor]:
    """∂S/∂(ε·E) in parts, each [d]: one forward and one backward pass over what the sequences do not share."""
    if not weighted:
        return []
    sequences = [each.sequence for each in weighted]
    # The leaf has to lie behind the prefix, and so has everything that is predicted.
    first = min(min(each.instruction.start + position, each.written.start - 1) for each in sequences)
    alike = shared_length([each.token_ids[:first] for each in sequences])
    longest = max(len(each.token_ids) for each in sequences)
    tokens = sequences[0].token_ids[:alike]
    beginning = Beginning(engine.prefixes, tokens, rows=len(sequences), longest=longest)
    leaf = partial(_leaf, engine.model.get_input_embeddings(), position=position, centroid=centroid, point=point)
    lengths = [len(each.token_ids) for each in sequences]
    bounds = {"max_batch_tokens": max_batch_tokens, "shared": beginning.length(), "relieve": beginning.forget}
    in_all = partial(in_batches, rows=weighted, lengths=lengths, **bounds)

    together = _together(engine, sequences, position, leaf, beginning, in_all, answer_temperature)
    if together is not None:
        return together
    work = partial(_of_each, engine, beginning, leaf, position=position, answer_temperature=answer_temperature)
    return in_all(work)


def _together(
    engine: Engine,
    sequences: Sequence[ReasonedSequence],
    position: int,
    leaf: Callable[[Sequence[ReasonedSequence]], Tensor],
    beginning: Beginning,
    in_all: Callable[..., object],
    answer_temperature: float,
) -> list[Tensor] | None:
    """The sum over all sequences, through what they share; None where that cannot be had, and each has to be read.

    It cannot without memory for it, or where half precision has no number for what all rows ask together.
    """
    try:
        segment = _segment(engine, sequences, position, leaf, beginning)
        if segment is None:
            return None
        in_all(partial(_of_segment, engine, segment, answer_temperature=answer_temperature))
        found = segment.pull_back()
    except (EngineMemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, EngineMemoryError) and not is_out_of_memory(error):
            raise
        return None
    if found is None:
        return []
    return [found] if bool(found.isfinite().all()) else None


def _of_each(
    engine: Engine,
    beginning: Beginning,
    leaf: Callable[[Sequence[ReasonedSequence]], Tensor],
    batch: Sequence[_Weighted],
    *,
    position: int,
    answer_temperature: float,
) -> list[Tensor]:
    """∂S/∂(ε·E) for each sequence of a batch, [d]."""
    sequences = [each.sequence for each in batch]
    shared, embedding = beginning.length(), leaf(sequences)  # [M, d]
    places = [each.instruction.start + position - shared for each in sequences]  # [M]
    with torch.enable_grad(), embedded_at(engine.model.get_input_embeddings(), places, embedding):
        loss = _surrogate(engine, batch, beginning.read(), answer_temperature)
        (gradient,) = torch.autograd.grad(loss, embedding)  # [M, d]
    engine.tally(backward_tokens=sum(len(each.token_ids) - shared for each in sequences))
    return list(gradient.to(loss.dtype))


def _segment(
    engine: Engine,
    sequences: Sequence[ReasonedSequence],
    position: int,
    leaf: Callable[[Sequence[ReasonedSequence]], Tensor],
    beginning: Beginning,
) -> SharedSegment | None:
    """What all sequences have in common from the position on, if reading it once is worth it."""
    place = sequences[0].instruction.start + position
    # What is asked for is predicted by the token before it, which rows read themselves.
    most = min(each.written.start for each in sequences) - 1
    alike = shared_length([each.token_ids[:most] for each in sequences])
    own = alike - beginning.length()
    longest = max(len(each.token_ids) for each in sequences)
    if place >= alike or not worth_sharing(engine, own, rows=len(sequences), longest=longest):
        return None
    if any(each.instruction.start + position != place for each in sequences):
        return None
    tokens, embedding = sequences[0].token_ids[:alike], leaf(sequences[:1])  # [1, d]
    segment = read_segment(engine, tokens, beginning.read(), place=place, leaf=embedding)
    if segment is not None:
        engine.tally(backward_tokens=own)
    return segment


def _of_segment(
    engine: Engine, segment: SharedSegment, batch: Sequence[_Weighted], *, answer_temperature: float
) -> list[None]:
    """Let the segment know what the sequences of a batch ask of it."""
    prefix, copies = segment.copies(len(batch))
    with torch.enable_grad():
        loss = _surrogate(engine, batch, prefix, answer_temperature)
        segment.collect(torch.autograd.grad(loss, copies))
    engine.tally(backward_tokens=sum(len(each.sequence.token_ids) - len(prefix) for each in batch))
    return [None] * len(batch)


def _leaf(
    layer: Module, sequences: Sequence[ReasonedSequence], *, position: int, centroid: Tensor, point: Point
) -> Tensor:
    """Where the linear model is taken, [M, d]."""
    tokens = torch.tensor([each.token_ids[each.instruction.start + position] for each in sequences])  # [M]
    current = layer(tokens.to(centroid.device)).detach()  # [M, d]
    if point == "current":
        at = current
    else:
        at = centroid.expand_as(current) if point == "centroid" else (current + centroid) / 2
    return at.clone().requires_grad_()


def _surrogate(engine: Engine, batch: Sequence[_Weighted], prefix: Prefix | None, answer_temperature: float) -> Tensor:
    """S of the batch: a scalar whose gradient is the whole gradient."""
    asked: list[tuple[int, int, float, float]] = []  # row, index, temperature, factor of the log-likelihood
    for row, each in enumerate(batch):
        written, answer = each.sequence.written, each.sequence.answer
        if each.written:
            asked += [(row, at, 1.0, each.written) for at in range(written.start, written.stop)]
        if each.answer and answer is not None:
            factor = -each.answer / (answer.stop - answer.start)  # the mean negative log-likelihood
            asked += [(row, at, answer_temperature, factor) for at in range(answer.start, answer.stop)]
    places = [(row, at) for row, at, *_ in asked]
    logits = logits_before(engine, [each.sequence.token_ids for each in batch], places, prefix=prefix)  # [R, V]
    targets = torch.tensor([batch[row].sequence.token_ids[at] for row, at in places], device=logits.device)  # [R]
    heat, factor = logits.new_tensor([[heat, factor] for *_, heat, factor in asked]).unbind(1)  # [R] each
    log_likelihood = -cross_entropy(logits / heat[:, None], targets, reduction="none")  # [R]
    return (factor * log_likelihood).sum()


def _check(reasonings: Sequence[Reasoning], position: int, candidates: Sequence[int], vocabulary: int) -> None:
    sequences = [sequence for each in reasonings for sequence in each.sequences]
    if not sequences:
        raise LayoutError("There is no reasoning to take the gradient over; give at least one with a sequence.")
    for each in sequences:
        if not 0 <= position < each.instruction.stop - each.instruction.start or each.instruction.start < 1:
            raise LayoutError(
                f"Position {position} is not in the instruction [{each.instruction.start}, {each.instruction.stop}) of "
                "a sequence, or no token stands before the instruction; lay the reasonings out under one instruction."
            )
    if not candidates:
        raise SettingsError("There is no candidate to take the slope for; give at least one token id.")
    for token in candidates:
        if not 0 <= token < vocabulary:
            raise SettingsError(
                f"Candidate token {token} is outside the model's vocabulary of {vocabulary}; "
                "give ids from the model's own tokenizer."
            )
