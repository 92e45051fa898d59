"""Hugging Face transformers as a competent user calls it: large batches, frozen weights, no custom machinery.

`model.generate` writes all rows in left-padded batches sorted by length; proposals, gradients and losses
are padded batches with an attention mask. The gradient stops at the input embeddings. Logits are made
everywhere, every prompt is read in full by every row, and the current instruction's reasoning is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.speed.rival import (
    best,
    candidates_of,
    left_padded_generate,
    losses_in,
    objective,
    relative,
    right_padded,
    sampled,
    tally_forward,
)
from benchmarks.speed.step import Clock, Reasonings, RowLosses, Step
from benchmarks.speed.work import Work
from dspy_greater.model.engine import Engine
from dspy_greater.model.teacher_forcing import in_batches
from dspy_greater.prompt.spans import Supervised

Found = TypeVar("Found")


def step(engine: Engine, work: Work, clock: Clock) -> Step:
    """One step, the plain way."""
    with clock.phase("proposals"):
        candidates = _propose(engine, work)
    with clock.phase("reasoning"):
        current = _generate(engine, work, work.prompts(work.instruction))
    with clock.phase("gradient"):
        supervised = work.supervised(work.instruction, current)
        embedding_gradients = _over(supervised, engine, lambda batch: _gradients(engine, work, batch))  # N times [d]
        tokens = torch.tensor([*candidates, work.current], device=engine.weights.device)
        E = engine.model.get_input_embeddings()(tokens).float()  # [C + 1, d]
        gradient = relative((torch.stack(embedding_gradients).float() @ E.T).tolist())
    selected = best(work, candidates, gradient)
    edited = [work.edited(token) for token in selected]
    rows = len(work.rows)
    with clock.phase("reasoning"):
        written = _generate(engine, work, [prompt for each in edited for prompt in work.prompts(each)])
        parts = [written[start : start + rows] for start in range(0, len(written), rows)]
    with clock.phase("scoring"):
        flat = [each for text, part in zip(edited, parts, strict=True) for each in work.supervised(text, part)]
        pairs = _over(flat, engine, lambda batch: _losses(engine, work, batch))
        scored = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    losses = {
        token: RowLosses(tuple(answer for answer, _ in part), tuple(fluency for _, fluency in part))
        for token, part in zip(selected, scored, strict=True)
    }
    reasoning = dict(zip(selected, parts, strict=True))
    return Step(tuple(candidates), gradient, selected, current, reasoning, losses)


def _propose(engine: Engine, work: Work) -> list[int]:
    draws = sampled(work)
    contexts = list(dict.fromkeys(context for draw in draws for context in draw))
    with torch.no_grad():
        logits = engine.model(**right_padded(contexts, engine.weights.device), use_cache=False).logits
    tally_forward(engine, contexts)
    rows = range(len(contexts))
    last = logits[rows, [len(context) - 1 for context in contexts]].float().log_softmax(-1).cpu()
    return candidates_of(work, draws, dict(zip(contexts, last, strict=True)))


def _generate(engine: Engine, work: Work, prompts: Sequence[tuple[int, ...]]) -> Reasonings:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = -(-len(order) // engine.max_batch_rows)
    size = -(-len(order) // batches)
    written: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = left_padded_generate(engine, [prompts[index] for index in part], work.reasoning_tokens)
        written.update(zip(part, rows, strict=True))
    return tuple(written[index] for index in range(len(prompts)))


def _gradients(engine: Engine, work: Work, batch: Sequence[Supervised]) -> list[Tensor]:
    """The loss's gradient at the embedding of the position, N times [d]."""
    inputs = right_padded([each.token_ids for each in batch], engine.weights.device)
    embedded = engine.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()  # [N, T, d]
    logits = engine.model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], use_cache=False).logits
    losses = [objective(*losses_in(row, each, work), work) for row, each in zip(logits, batch, strict=True)]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), embedded)
    tally_forward(engine, [each.token_ids for each in batch], backward=True)
    return [row[each.instruction.start + work.position] for row, each in zip(gradient, batch, strict=True)]


def _losses(engine: Engine, work: Work, batch: Sequence[Supervised]) -> list[tuple[float, float]]:
    with torch.no_grad():
        inputs = right_padded([each.token_ids for each in batch], engine.weights.device)
        logits = engine.model(**inputs, use_cache=False).logits
        parts = [torch.stack(losses_in(row, each, work)) for row, each in zip(logits, batch, strict=True)]
    tally_forward(engine, [each.token_ids for each in batch])
    return [(answer, fluency) for answer, fluency in torch.stack(parts).tolist()]


def _over(
    supervised: Sequence[Supervised], engine: Engine, run: Callable[[Sequence[Supervised]], list[Found]]
) -> list[Found]:
    """`run` on padded batches of bounded size, neighbours in length together; results in order."""
    return in_batches(run, supervised, [len(each.token_ids) for each in supervised], engine.max_batch_tokens)
