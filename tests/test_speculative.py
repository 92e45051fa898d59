"""A draft saves forward passes and changes nothing: neither what is generated nor what is kept of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import PrefixCache
from dspy_greater.model.fast.speculative import MOST_CHANGED, Drafts, changed
from dspy_greater.model.generate import decode
from dspy_greater.model.interface import Generation, GenerationRequest
from dspy_greater.model.sampling import Row
from tests.model_calls import Full
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY, LENGTH = 512, 14
WIDE: dict[str, Any] = {"gemma2": {"sliding_window": 128}}


def build(kind: Any = "llama", **options: Any) -> Engine:
    model = tiny_model(kind, VOCABULARY, torch.float32, **WIDE.get(kind, {}))
    return Engine(model, tiny_tokenizer(), name="tiny", **options)


def prompts(count: int = 7, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(13, VOCABULARY) for _ in range(rng.randrange(3, 30))) for _ in range(count)]


def asked(rows: Sequence[tuple[int, ...]], **options: Any) -> list[GenerationRequest]:
    return [GenerationRequest(row, LENGTH, seed=number, **options) for number, row in enumerate(rows)]


def generated_with(
    engine: Engine, requests: Sequence[GenerationRequest], drafts: Sequence[Sequence[int]]
) -> tuple[list[Generation], Counters]:
    before = engine.counters
    expected = [(request.prompt, tuple(draft)) for request, draft in zip(requests, drafts, strict=True)]
    with engine.session(expected) as session:
        found = session.generate(requests)
    return found, engine.counters - before


def spoiled(texts: Sequence[Sequence[int]], at: int) -> list[tuple[int, ...]]:
    """The texts with another token at one place."""
    return [
        (*text[:at], (text[at] + 1) % VOCABULARY, *text[at + 1 :]) if at < len(text) else (*text,) for text in texts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"temperature": 1.3, "top_p": 0.8}])
def test_rows_generate_the_same_with_right_half_right_and_wrong_drafts(kind: Any, options: dict[str, Any]) -> None:
    engine = build(kind)
    requests = asked(prompts(), **options)
    expected = engine.generate(requests)
    texts = [each.token_ids for each in expected]
    for drafts in (texts, spoiled(texts, 0), spoiled(texts, 5), [text[:4] for text in texts], [(1,) * 40] * len(texts)):
        found, _ = generated_with(engine, requests, drafts)
        assert found == expected


def test_a_draft_that_comes_true_costs_one_pass_and_a_wrong_one_as_many_as_none() -> None:
    engine = build()
    requests = asked(prompts(), stop_token_ids=())
    before = engine.counters
    expected = engine.generate(requests)
    plain = engine.counters - before
    texts = [each.token_ids for each in expected]
    _, right = generated_with(engine, requests, texts)
    _, wrong = generated_with(engine, requests, spoiled(texts, 0))
    reading = plain.forwards - (LENGTH - 1)
    assert right.forwards == reading
    assert wrong.forwards == plain.forwards
    assert right.generated_tokens == wrong.generated_tokens == plain.generated_tokens == LENGTH * len(requests)
    # What was read for nothing is charged like a prompt.
    assert right.prefilled_tokens == plain.prefilled_tokens
    assert wrong.prefilled_tokens == plain.prefilled_tokens + (LENGTH - 1) * len(requests)


def test_a_row_ends_inside_its_draft_where_it_would_have_ended_without() -> None:
    engine = build()
    requests = asked(prompts())
    texts = [each.token_ids for each in engine.generate(asked(prompts(), stop_token_ids=()))]
    stops = tuple({text[row] for row, text in enumerate(texts)})  # every row meets one of them early
    ending = [replace(each, stop_token_ids=stops) for each in requests]
    expected = engine.generate(ending)
    assert any(each.finish_reason == "stop" and len(each.token_ids) < LENGTH for each in expected)
    found, _ = generated_with(engine, ending, texts)
    assert found == expected


def test_a_callback_hears_of_drafted_tokens_in_order_and_may_end_the_row() -> None:
    engine = build()
    [request] = asked(prompts(1), stop_token_ids=())
    [text] = [each.token_ids for each in engine.generate([request])]
    heard: list[int] = []

    def listen(token: int) -> bool:
        heard.append(token)
        return len(heard) == 5

    [found], _ = generated_with(engine, [replace(request, on_token=listen)], [text])
    assert tuple(heard) == found.token_ids == text[:5] and found.finish_reason == "stop"


def test_a_row_that_lack_of_memory_interrupts_goes_on_with_the_rest_of_its_draft() -> None:
    model = Full(tiny_model("llama", VOCABULARY, torch.float32), most=64)
    engine = Engine(model, tiny_tokenizer(), name="full", max_batch_rows=8)
    requests = asked(prompts(8), stop_token_ids=())
    expected = engine.generate(requests)
    model.most = 3
    found, _ = generated_with(engine, requests, spoiled([each.token_ids for each in expected], 6))
    assert found == expected and engine.max_batch_rows <= 4


def test_a_model_that_forgets_what_leaves_its_window_is_given_no_drafts() -> None:
    model = tiny_model("gemma2", VOCABULARY, torch.float32, sliding_window=16)
    engine = Engine(model, tiny_tokenizer(), name="tiny")
    requests = asked(prompts(), stop_token_ids=())
    before = engine.counters
    expected = engine.generate(requests)
    plain = engine.counters - before
    found, costs = generated_with(engine, requests, [each.token_ids for each in expected])
    assert (found, costs) == (expected, plain)


def test_drafts_belong_to_their_session() -> None:
    engine = build()
    requests = asked(prompts(), stop_token_ids=())
    texts = [each.token_ids for each in engine.generate(requests)]
    expected = list(zip((each.prompt for each in requests), texts, strict=True))

    def forwards(model: Any) -> int:
        before = engine.counters
        assert [each.token_ids for each in model.generate(requests)] == texts
        return (engine.counters - before).forwards

    without = forwards(engine)
    with engine.session(expected) as one, engine.session() as other:
        assert forwards(one) == without - (LENGTH - 1)
        assert forwards(other) == without
        assert forwards(engine) == without


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple), max_size=8, unique=True), st.data())
def test_the_draft_is_of_the_prompt_that_ends_most_like_the_one_asked_about(
    known: list[tuple[int, ...]], data: Any
) -> None:
    wanted = tuple(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30)))
    drafts = Drafts((prompt, (number,)) for number, prompt in enumerate(known))
    found = drafts.guess(wanted)
    if not found:
        return

    def ending(prompt: tuple[int, ...]) -> int:
        pairs = zip(reversed(prompt), reversed(wanted), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(wanted)))

    chosen = known[found[0]]
    assert changed(chosen, wanted) <= MOST_CHANGED
    assert ending(chosen) == max(map(ending, known))


def test_prompts_that_differ_in_more_than_an_edit_have_no_draft() -> None:
    head, tail = tuple(range(20)), tuple(range(100, 120))
    drafts = Drafts([((*head, *[7] * MOST_CHANGED, *tail), (1,))])
    assert drafts.guess((*head, *[8] * MOST_CHANGED, *tail)) == (1,)
    assert drafts.guess((*head, *[8] * (MOST_CHANGED + 1), *tail)) == ()
    assert drafts.guess(head) == () and Drafts().guess(head) == ()


def test_true_drafts_of_unequal_length_that_go_on_leave_each_row_its_own_states() -> None:
    engine = build()
    rows = [tuple(range(20, 25)), tuple(range(30, 37)), tuple(range(40, 44))]
    requests = asked(rows, stop_token_ids=())
    expected = engine.generate(requests)
    for lengths in itertools.permutations((6, 0, 3)):
        drafts = [each.token_ids[:length] for each, length in zip(expected, lengths, strict=True)]
        found, _ = generated_with(engine, requests, drafts)
        assert found == expected


def test_rows_that_were_interrupted_and_fresh_ones_share_a_batch() -> None:
    engine = build()
    rows = [tuple(range(20, 35)), tuple(range(40, 44)), tuple(range(50, 59))]
    expected = engine.generate(asked(rows, stop_token_ids=()))
    batch = [Row(prompt, LENGTH, frozenset()) for prompt in rows]
    batch[1].generated = list(expected[1].token_ids[:13])  # it is the shortest prompt, and now the longest row
    with engine.exclusive():
        decode(engine, batch, PrefixCache(engine))
    assert [tuple(row.generated) for row in batch] == [each.token_ids for each in expected]
