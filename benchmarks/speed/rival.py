"""What the two rivals share: the order of Algorithm 1 and its arithmetic, written out plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.speed.step import Reasonings
from benchmarks.speed.work import Work
from dspy_greater.errors import LossError
from dspy_greater.model.engine import Engine
from dspy_greater.prompt.spans import Span, Supervised


def sampled(work: Work) -> list[list[tuple[int, ...]]]:
    """The samples of proposal contexts whose top k are intersected."""
    contexts, rng = work.proposal_contexts(), work.generator()
    return [rng.sample(contexts, min(work.sample_size, len(contexts))) for _ in range(work.draws)]


def candidates_of(work: Work, draws: list[list[tuple[int, ...]]], found: dict[tuple[int, ...], Tensor]) -> list[int]:
    """Equations 3 and 4 from log-probabilities by context [V]: widen k until enough are left, likeliest first."""
    contexts = list(dict.fromkeys(context for draw in draws for context in draw))
    k, widest = work.top_k, work.top_k * work.max_widening
    order = {
        context: found[context].sort(descending=True, stable=True).indices[:widest].tolist() for context in contexts
    }
    while True:
        common = [set.intersection(*(set(order[context][:k]) for context in draw)) for draw in draws]
        legal = [token for token in set().union(*common) if work.allows(token) is not None]
        if len(legal) >= work.minimum or k >= widest:
            break
        k = min(2 * k, widest)
    mean = {token: sum(float(found[context][token]) for context in contexts) / len(contexts) for token in legal}
    return sorted(legal, key=lambda token: (-mean[token], token))


def best(work: Work, candidates: Sequence[int], gradient: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The mu candidates whose gradient [N, C], relative to the current token's, is most negative.

    Raises:
        LossError: too few candidates to do the whole work.
    """
    totals = [sum(row[column] for row in gradient) for column in range(len(candidates))]
    order = sorted(range(len(candidates)), key=lambda column: totals[column])[: work.selections]
    return enough(work, tuple(candidates[column] for column in order))


def enough(work: Work, selected: tuple[int, ...]) -> tuple[int, ...]:
    """The selected candidates, if they are as many as the work asks for.

    Raises:
        LossError: too few.
    """
    if len(selected) < work.selections:
        raise LossError(f"{len(selected)} candidates for {work.selections} selections; use fewer, or other weights.")
    return selected


def left_padded_generate(engine: Engine, prompts: Sequence[tuple[int, ...]], tokens: int) -> Reasonings:
    """One call of `model.generate`: exactly `tokens` greedy tokens after each prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = engine.model.generate(
            input_ids=ids.to(engine.weights.device),
            attention_mask=mask.to(engine.weights.device),
            max_new_tokens=tokens,
            do_sample=False,
        )
    read = sum(map(len, prompts))
    engine.tally.add(
        forwards=tokens,
        prefilled_tokens=read,
        padded_tokens=ids.numel() - read,
        generated_tokens=tokens * len(prompts),
        lm_head_rows=tokens * len(prompts),
    )
    return tuple(map(tuple, output[:, width:].tolist()))


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids and attention mask of a padded batch."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def tally_forward(engine: Engine, sequences: Sequence[Sequence[int]], *, backward: bool = False) -> None:
    """Count a forward pass over a padded batch with logits everywhere."""
    slots, real = len(sequences) * max(map(len, sequences)), sum(map(len, sequences))
    engine.tally.add(
        forwards=1,
        prefilled_tokens=real,
        padded_tokens=slots - real,
        lm_head_rows=slots,
        backward_tokens=real if backward else 0,
    )


def losses_in(logits: Tensor, example: Supervised, work: Work) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answer and mean NLL of the instruction of one row, from all its logits [T, V]."""
    ids = torch.tensor(example.token_ids, device=logits.device)

    def mean_nll(span: Span, temperature: float) -> Tensor:
        predicted = logits[span.start - 1 : span.stop - 1].float() / temperature
        return cross_entropy(predicted, ids[span.start : span.stop])

    return mean_nll(example.answer, work.answer_temperature), mean_nll(example.instruction, 1.0)


def objective(answer: Tensor, fluency: Tensor, work: Work) -> Tensor:
    """Equation 6."""
    return answer + work.fluency_weight * fluency.exp()


def relative(rows: Any) -> tuple[tuple[float, ...], ...]:
    """Gradients [N, C + 1] whose last column is the current token's -> [N, C] relative to it."""
    return tuple(tuple(value - row[-1] for value in row[:-1]) for row in rows)
