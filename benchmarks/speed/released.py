"""The schedule that the algorithm was published with, rendered plainly from a description of its order of work.

Four generations of all rows in batches of nine: the current instruction's and each of the three candidates'.
Proposals and gradients take one example at a time, over an indicator that needs the candidates beforehand,
and the backward pass reaches every weight. Losses read each whole sequence again, one at a time. Logits are
made everywhere, and nothing is kept from one step to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from dspy_greater.prompt.spans import Supervised

BATCH = 9


def step(engine: Engine, work: Work, clock: Clock) -> Step:
    """One step, the released way."""
    with _trainable(engine):
        with clock.phase("proposals"):
            candidates = _propose(engine, work)
        with clock.phase("reasoning"):
            current = _generate(engine, work, work.instruction)
        with clock.phase("gradient"):
            supervised = work.supervised(work.instruction, current)
            gradient = relative([_gradient(engine, work, each, candidates) for each in supervised])
        selected = best(work, candidates, gradient)
        reasoning: dict[int, Reasonings] = {}
        losses: dict[int, RowLosses] = {}
        for token in selected:
            instruction = work.edited(token)
            with clock.phase("reasoning"):
                reasoning[token] = _generate(engine, work, instruction)
            with clock.phase("scoring"):
                losses[token] = _losses(engine, work, work.supervised(instruction, reasoning[token]))
    return Step(tuple(candidates), gradient, selected, current, reasoning, losses)


def _propose(engine: Engine, work: Work) -> list[int]:
    """Every row proposes, one at a time."""
    found: dict[tuple[int, ...], Tensor] = {}
    for context in work.proposal_contexts():
        with torch.no_grad():
            logits = engine.model(**right_padded([context], engine.weights.device), use_cache=False).logits
        tally_forward(engine, [context])
        found[context] = logits[0, -1].float().log_softmax(-1).cpu()
    return candidates_of(work, sampled(work), found)


def _generate(engine: Engine, work: Work, instruction: Sequence[int]) -> Reasonings:
    prompts = work.prompts(instruction)
    parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return tuple(row for part in parts for row in left_padded_generate(engine, part, work.reasoning_tokens))


def _gradient(engine: Engine, work: Work, example: Supervised, candidates: Sequence[int]) -> list[float]:
    """Equation 7 for one example: [C + 1], the current token last."""
    layer = engine.model.get_input_embeddings()
    tokens = torch.tensor([*candidates, work.current], device=engine.weights.device)
    indicator = torch.zeros(len(tokens), device=engine.weights.device)
    indicator[-1] = 1.0
    indicator.requires_grad_()
    at = example.instruction.start + work.position
    embedded = layer(torch.tensor(example.token_ids, device=engine.weights.device))  # [T, d]
    edited = indicator.to(embedded.dtype) @ layer(tokens)  # [d]
    embedded = torch.cat([embedded[:at], edited[None], embedded[at + 1 :]])[None]
    logits = engine.model(inputs_embeds=embedded, use_cache=False).logits[0]
    objective(*losses_in(logits, example, work), work).backward()
    tally_forward(engine, [example.token_ids], backward=True)
    engine.model.zero_grad(set_to_none=True)
    return [] if indicator.grad is None else indicator.grad.tolist()


def _losses(engine: Engine, work: Work, supervised: Sequence[Supervised]) -> RowLosses:
    rows: list[tuple[float, float]] = []
    for example in supervised:
        with torch.no_grad():
            logits = engine.model(**right_padded([example.token_ids], engine.weights.device), use_cache=False).logits[0]
            answer, fluency = losses_in(logits, example, work)
        tally_forward(engine, [example.token_ids])
        rows.append((answer.item(), fluency.item()))
    return RowLosses(tuple(answer for answer, _ in rows), tuple(fluency for _, fluency in rows))


@contextmanager
def _trainable(engine: Engine) -> Iterator[None]:
    """Every weight gets a gradient, as it does when nobody freezes a model."""
    frozen = [parameter for parameter in engine.model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
