"""A session's memory is its own: searches that run at once on one model get what each would get alone."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest, Model, Tokens
from dspy_greater.objective.loss import losses
from dspy_greater.prompt.spans import Span, Supervised
from tests.model_calls import Full
from tests.tiny_models import tiny_model, tiny_tokenizer

SEARCHES = 4
HEAD, ROWS, LENGTH = 24, 5, 9


def engine_for(model: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), name="tiny")


def prompts(search: int) -> list[Tokens]:
    """Every search has a head of its own, of tokens that the others' heads have, too."""
    head = tuple(range(20 + search, 20 + search + HEAD))
    return [(*head, *range(100, 105 + row)) for row in range(ROWS)]


def step(model: Model, search: int) -> tuple[Any, ...]:
    """Texts, losses of what was generated, and a gradient, twice over."""
    found: list[Any] = []
    for answer in (7, 8):
        requests = [GenerationRequest(prompt, LENGTH, stop_token_ids=()) for prompt in prompts(search)]
        texts = [each.token_ids for each in model.generate(requests)]
        rows = []
        for prompt, text in zip(prompts(search), texts, strict=True):
            ids = (*prompt, *text, answer)
            reasoning = Span(len(prompt), len(prompt) + len(text))
            rows.append(Supervised(ids, Span(HEAD - 4, HEAD), reasoning, Span(len(ids) - 1, len(ids))))
        gradient = paper_gradient(model, rows, position=1, candidates=range(200, 210))
        found += [texts, losses(model, rows), gradient]
    return tuple(found)


def drafts(model: Model, search: int) -> list[tuple[Tokens, Tokens]]:
    """What the search before this one would have left: texts that are right for a while."""
    requests = [GenerationRequest(prompt, LENGTH - 2, stop_token_ids=()) for prompt in prompts(search)]
    return [
        (prompt, (*each.token_ids, 5, 5))
        for prompt, each in zip(prompts(search), model.generate(requests), strict=True)
    ]


@pytest.mark.slow
def test_searches_at_once_in_threads_get_what_each_gets_alone() -> None:
    engine = engine_for(tiny_model())
    expected = [drafts(engine, search) for search in range(SEARCHES)]
    alone = []
    for search in range(SEARCHES):
        with engine.session(expected[search]) as model:
            alone.append(step(model, search))
    together = threading.Barrier(SEARCHES)

    def work(search: int) -> tuple[Any, ...]:
        with engine.session(expected[search]) as model:
            together.wait(60)
            return step(model, search)

    with ThreadPoolExecutor(SEARCHES) as pool:
        assert list(pool.map(work, range(SEARCHES))) == alone


@pytest.mark.slow
def test_a_session_that_ends_leaves_the_others_what_they_keep() -> None:
    engine = engine_for(tiny_model())
    with engine.session() as outlives:
        first = step(outlives, 0)
        with engine.session() as other:
            step(other, 1)
        before = engine.counters
        assert step(outlives, 0)[0] == first[0]
        again = engine.counters - before
    with engine.session() as fresh:
        before = engine.counters
        step(fresh, 0)
        assert again.prefilled_tokens < (engine.counters - before).prefilled_tokens


@pytest.mark.slow
def test_what_somebody_still_holds_of_a_session_keeps_no_states_alive() -> None:
    engine = engine_for(tiny_model())
    with engine.session() as session:
        step(session, 0)
        assert session._generated is not None and session._prefixes.kept is not None
        states = [weakref.ref(session._prefixes.kept), *map(weakref.ref, session._generated._rows)]
        assert len(states) > 1
    gc.collect()
    assert [each for each in states if each() is not None] == []


def test_a_lack_of_memory_in_one_search_leaves_the_other_its_results() -> None:
    model = Full(tiny_model(), most=64)
    engine = engine_for(model)
    with engine.session() as one, engine.session() as other:
        requests = [GenerationRequest(prompt, LENGTH, stop_token_ids=()) for prompt in prompts(0)]
        expected = one.generate(requests)
        assert one._generated is not None and one._generated.bytes > 0
        model.most = 2
        assert other.generate(requests) == expected
        assert one._generated.bytes > 0
        model.most = 64
        assert one.generate(requests) == expected


def test_a_session_inside_a_session_is_the_same_one() -> None:
    engine = engine_for(tiny_model())
    with engine.session() as session:
        with session.session([((1, 2), (3,))]) as inner:
            assert inner is session
            step(inner, 0)
        assert session._prefixes.kept is not None  # the outermost ends it
    assert session.tokenizer is engine.tokenizer and session.context_length == engine.context_length


def test_an_error_ends_the_session() -> None:
    engine, opened = engine_for(tiny_model()), []

    def fail() -> None:
        with engine.session() as session:
            opened.append(session)
            step(session, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert opened[0]._prefixes.kept is None and opened[0]._generated.bytes == 0
