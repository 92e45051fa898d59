"""Rows that join a batch under way get what they would have got alone, and those that are there keep what they get."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.session import Session
from dspy_greater.model.interface import Generation, GenerationRequest
from tests.model_calls import Full, memory_runs_out
from tests.tiny_models import tiny_model, tiny_tokenizer

VOCABULARY = 512


def build(kind: Any, **settings: Any) -> Engine:
    return Engine(tiny_model(kind, VOCABULARY, torch.float32, **settings), tiny_tokenizer(), name="tiny")


def asked(count: int, seed: int) -> list[GenerationRequest]:
    """Prompts of 3 to 60 tokens, some of which begin alike, with 1 to 50 tokens to write, greedy or drawn."""
    rng = random.Random(seed)
    common = tuple(rng.randrange(13, VOCABULARY) for _ in range(24))
    return [
        GenerationRequest(
            (
                *(common if rng.random() < 0.5 else ()),
                *(rng.randrange(13, VOCABULARY) for _ in range(rng.randrange(3, 36))),
            ),
            rng.randrange(1, 50),
            temperature=rng.choice([0.0, 1.0]),
            seed=number,
        )
        for number in range(count)
    ]


def with_joining(
    engine: Engine, requests: Sequence[GenerationRequest], first: int, seed: int
) -> tuple[list[Generation | None], int]:
    """What ends where the first few are asked for and the others join by and by; how many joined."""
    rng = random.Random(seed)
    results: list[Generation | None] = [None] * len(requests)

    def noting(place: int) -> GenerationRequest:
        def ended(generation: Generation) -> None:
            assert results[place] is None, "told twice"
            results[place] = generation

        return replace(requests[place], on_end=ended)

    waiting = [noting(place) for place in range(first, len(requests))]
    joined = 0

    def arrivals(most: int) -> list[GenerationRequest]:
        nonlocal joined
        few = min(most, rng.randrange(0, 4), len(waiting))
        new, waiting[:few] = waiting[:few], []
        joined += len(new)
        return new

    Session(engine, keeps=False).generate([noting(place) for place in range(first)], arrivals)
    while waiting:
        Session(engine, keeps=False).generate([waiting.pop()])
    return results, joined


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_row_gets_what_it_gets_alone_whenever_it_joins(kind: str, seed: int) -> None:
    engine, requests = build(kind), asked(24, seed)
    alone = [engine.generate([request])[0] for request in requests]
    found, joined = with_joining(engine, requests, first=8, seed=seed)
    assert found == alone
    assert joined > 2


def test_a_result_is_told_as_soon_as_its_row_has_ended() -> None:
    engine, order = build("llama"), []
    requests = [
        GenerationRequest((20, 21, 22), length, stop_token_ids=(), on_end=lambda _, length=length: order.append(length))
        for length in (40, 3, 20)
    ]
    engine.generate(requests)
    assert order == [3, 20, 40]


def test_nobody_joins_where_states_are_forgotten_and_all_are_answered() -> None:
    engine, requests = build("gemma2", sliding_window=16), asked(12, 0)
    alone = [engine.generate([request])[0] for request in requests]
    found, joined = with_joining(engine, requests, first=8, seed=0)
    assert (found, joined) == (alone, 0)


def test_a_lack_of_memory_costs_no_row_that_has_joined() -> None:
    engine, requests = build("llama"), asked(24, 1)
    alone = [engine.generate([request])[0] for request in requests]
    engine.model = Full(engine.model, 5)
    found, joined = with_joining(engine, requests, first=5, seed=1)
    assert found == alone
    assert joined > 2
    assert engine.max_batch_rows < 24


def test_a_lack_of_memory_after_many_rows_lowers_the_size_of_batches_and_never_raises_it() -> None:
    engine, requests = build("llama"), asked(60, 2)
    engine.max_batch_rows = 12
    alone = [engine.generate([request])[0] for request in requests]
    start = engine.counters.forwards
    limits: set[int] = set()

    def starved(ids: torch.Tensor) -> bool:
        limits.add(engine.max_batch_rows)
        return engine.counters.forwards > start + 120 and len(ids) > 2

    with memory_runs_out(engine, starved) as failed:
        found, joined = with_joining(engine, requests, first=9, seed=1)
    assert (found, joined > 20, len(failed) > 0) == (alone, True, True)
    assert max(limits) == 12 > engine.max_batch_rows
