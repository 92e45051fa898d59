"""What was just generated is not read again, and the losses are those of reading everything again."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_greater.errors import EngineMemoryError
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.generated_kv import GeneratedRows, GeneratedStates, Places, slot_mask
from dspy_greater.model.fast.likelihoods import _alike
from dspy_greater.model.fast.session import Session
from dspy_greater.model.interface import GenerationRequest, Leaf, Model, TokenQuery
from dspy_greater.model.kv_cache import InPlaceLayer, shared_length
from dspy_greater.model.plain import PlainModel
from dspy_greater.model.prefill import parts_of
from dspy_greater.model.teacher_forcing import in_batches
from dspy_greater.objective.loss import Losses, losses
from dspy_greater.prompt.spans import Span, Supervised
from tests.model_calls import Full, memory_runs_out
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512
HEAD, ANSWER_HEADER, GOLD = 20, (7, 8, 9), (11, 12)


def build(kind: Any = "llama", **options: Any) -> Engine:
    batch_rows = options.pop("max_batch_rows", 64)
    model = tiny_model(kind, VOCABULARY, torch.float32, **options)
    return Engine(model, tiny_tokenizer(), name="tiny", max_batch_rows=batch_rows)


def prompts(instructions: int = 2, rows: int = 6, seed: int = 0) -> list[tuple[tuple[int, ...], Span]]:
    """Prompts of a few instructions that differ in one token, each with inputs of many lengths."""
    rng = random.Random(seed)

    def some(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(13, VOCABULARY) for _ in range(length))

    head, before, after = (1, *some(HEAD - 1)), some(2), some(8)
    inputs = [some(rng.randrange(1, 25)) for _ in range(rows)]
    span = Span(HEAD, HEAD + 7)
    return [((*head, *before, 13 + k, *after, *each), span) for k in range(instructions) for each in inputs]


def finished(asked: Sequence[tuple[tuple[int, ...], Span]], texts: Sequence[tuple[int, ...]]) -> list[Supervised]:
    rows = []
    for (prompt, span), each in zip(asked, texts, strict=True):
        before = (*prompt, *each, *ANSWER_HEADER)
        reasoning, answer = (
            Span(len(prompt), len(prompt) + len(each)),
            Span(len(before), len(before) + len(GOLD)),
        )
        rows.append(Supervised((*before, *GOLD), span, reasoning, answer))
    return rows


def write(model: Model, asked: Sequence[tuple[tuple[int, ...], Span]], lengths: Sequence[int]) -> list[Supervised]:
    """Every row generates its own number of tokens, so that rows leave their batch at different times."""
    requests = [
        GenerationRequest(prompt, length, stop_token_ids=()) for (prompt, _), length in zip(asked, lengths, strict=True)
    ]
    return finished(asked, [each.token_ids for each in model.generate(requests)])


def kept_by(session: Session) -> GeneratedStates:
    assert session._generated is not None
    return session._generated


def lengths_of(asked: Sequence[Any], most: int = 12) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(1, most) for _ in asked]


def spent(engine: Engine, model: Model, rows: Sequence[Supervised]) -> tuple[Losses, Counters]:
    before = engine.counters
    return losses(model, rows), engine.counters - before


def assert_same(found: Losses, engine: Engine, rows: Sequence[Supervised]) -> None:
    """The losses of reading everything again, row by row."""
    expected = losses(PlainModel(engine), rows)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-4)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_from_kept_states_are_those_of_reading_everything_again(kind: Any) -> None:
    engine, asked = build(kind, **({"sliding_window": 96} if kind == "gemma2" else {})), prompts()
    with engine.session() as session:
        rows = write(session, asked, lengths_of(asked))
        found, costs = spent(engine, session, rows)
    assert_same(found, engine, rows)
    # What was not read while writing: the last token, the answer's header and the gold answer.
    most = len(rows) * (1 + len(ANSWER_HEADER) + len(GOLD)) + 2 * (7 + 1)
    assert 0 < costs.prefilled_tokens <= most


def test_rows_that_left_their_batches_at_different_times_are_read_together() -> None:
    engine, asked = build(max_batch_rows=5), prompts()
    with engine.session() as session:
        rows = write(session, asked, lengths_of(asked))
        kept = [kept_by(session).find(row.token_ids, least=1, most=1000) for row in rows]
        assert len({id(each.rows) for each in kept if each}) > 3
        _, costs = spent(engine, session, rows)
        assert costs.forwards == 3 + 1  # answers of 12 rows, 5 at a time; fluency
        engine.max_batch_rows = 64
        found, costs = spent(engine, session, rows)
    assert costs.forwards == 2
    assert_same(found, engine, rows)


@pytest.mark.slow
def test_a_long_row_does_not_make_the_others_long() -> None:
    engine, asked = build(), prompts(rows=12)
    longest = max(asked, key=lambda each: len(each[0]))
    with engine.session() as session:
        rows = write(session, asked, [4] * len(asked)) + write(session, [longest], [200])
        found, costs = spent(engine, session, rows)
    assert 2 + 1 <= costs.forwards <= 3 + 1  # and fluency
    assert_same(found, engine, rows)


@given(st.lists(st.integers(1, 300), max_size=30), st.integers(1, 12))
def test_rows_that_share_a_cache_are_alike_and_few(slots: list[int], most: int) -> None:
    groups = _alike(slots, most)
    assert sorted(row for group in groups for row in group) == list(range(len(slots)))
    for group in groups:
        mine = [slots[row] for row in group]
        assert len(group) <= most and len(mine) * max(mine) <= 1.5 * sum(mine)


def test_what_is_kept_takes_as_much_memory_as_it_says() -> None:
    engine, asked = build(), prompts(rows=24)
    with engine.session() as session:
        write(session, asked, [1 + row % 25 for row in range(len(asked))])
        kept = kept_by(session)
        held = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for rows in kept._rows
            for layer in rows.layers
            for each in layer
        }
        assert sum(held.values()) == kept.bytes


def test_a_row_that_is_left_alone_does_not_hold_the_memory_of_its_batch() -> None:
    layer = InPlaceLayer(limit=80)
    layer.update(*torch.randn(2, 64, 2, 40, 8).unbind())
    for left in (48, 31, 12, 1):
        layer.select(range(left), 0)
        assert layer.keys is not None
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes == left * 2 * 40 * 8 * 4


def test_a_window_that_holds_each_row_is_enough_for_rows_that_are_read_together() -> None:
    asked = [((1, *range(20, 20 + length)), Span(1, 4)) for length in (30, 60)]
    engine = build("gemma2", sliding_window=90)
    with engine.session() as session:
        early, late = (write(session, [each], [length])[0] for each, length in zip(asked, (4, 24), strict=True))
        # The short row's answer is long: behind the other's 84 slots it ends beyond the window.
        gold = Span(early.answer.start, early.answer.start + 40)
        early = replace(early, token_ids=(*early.token_ids[: gold.start], *range(100, 140)), answer=gold)
        found, costs = spent(engine, session, [early, late])
    assert costs.forwards == 1 + 1  # and fluency
    assert_same(found, engine, [early, late])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_read_in_parts_write_what_they_write_alone(kind: Any) -> None:
    engine, asked = build(kind), prompts(instructions=3, rows=40)
    lengths = lengths_of(asked)
    contexts = [prompt for prompt, _ in asked]
    assert len(parts_of(contexts)) > 3
    together = write(engine, asked, lengths)
    alone = build(kind, max_batch_rows=1)
    alone.checks.cache_reach = 0
    assert together == write(alone, asked, lengths)


def test_a_reasoning_that_was_changed_afterwards_is_read_from_where_it_differs() -> None:
    engine, asked = build(), prompts(rows=3)
    with engine.session() as session:
        rows = write(session, asked, [8] * len(asked))
        other = [
            replace(each, token_ids=(*each.token_ids[: len(prompt) + 3], 5, *each.token_ids[len(prompt) + 4 :]))
            for each, (prompt, _) in zip(rows, asked, strict=True)
        ]
        found, costs = spent(engine, session, other)
    assert_same(found, engine, other)
    rest = 5 + len(ANSWER_HEADER) + len(GOLD)
    assert len(other) * rest <= costs.prefilled_tokens <= len(other) * rest + 2 * 27


def test_rows_that_were_not_written_here_are_read_as_ever() -> None:
    engine, asked = build(), prompts(rows=3)
    rows = finished(asked, [(21, 22, 23)] * len(asked))
    expected, again = spent(engine, engine, rows)
    with engine.session() as session:
        write(session, prompts(rows=3, seed=5), [4] * 6)
        found, costs = spent(engine, session, rows)
    assert (found, costs.prefilled_tokens) == (expected, again.prefilled_tokens)
    assert_same(found, engine, rows)


def test_nothing_is_kept_without_a_session_and_nothing_after_it() -> None:
    engine, asked = build(), prompts(rows=2)
    rows = write(engine, asked, [3] * 4)
    _, costs = spent(engine, engine, rows)
    assert costs.prefilled_tokens > sum(len(each.token_ids) - HEAD - 10 for each in rows)
    with engine.session() as session:
        with session.session() as inner:
            write(inner, asked, [3] * 4)
        assert kept_by(session).bytes > 0
    assert kept_by(session).bytes == 0


def test_beyond_a_sliding_window_nothing_is_kept_and_the_losses_are_right() -> None:
    engine, asked = build("gemma2", sliding_window=40), prompts(rows=3)
    with engine.session() as session:
        rows = write(session, asked, [30] * len(asked))
        found, _ = spent(engine, session, rows)
        assert kept_by(session).bytes == 0
    assert_same(found, engine, rows)


def test_an_answer_that_would_leave_the_sliding_window_is_read_in_full() -> None:
    asked = [(prompt[:30], span) for prompt, span in prompts(rows=3)]
    longest = max(len(prompt) for prompt, _ in asked)
    engine = build("gemma2", sliding_window=longest + 5)
    with engine.session() as session:
        rows = write(session, asked, [4] * len(asked))
        assert kept_by(session).bytes > 0
        found, costs = spent(engine, session, rows)
    assert_same(found, engine, rows)
    assert costs.prefilled_tokens > sum(len(row.token_ids) - HEAD for row in rows) / 2


def test_the_oldest_states_give_way_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = build(), prompts(rows=2)
    with engine.session() as session:
        first = write(session, asked, [3] * 4)
        limit = kept_by(session).bytes + 1
        monkeypatch.setattr("dspy_greater.model.fast.generated_kv.MOST_BYTES", limit)
        second = write(session, prompts(rows=2, seed=3), [3] * 4)
        assert 0 < kept_by(session).bytes <= limit
        _, old = spent(engine, session, first)
        _, new = spent(engine, session, second)
    assert new.prefilled_tokens < old.prefilled_tokens


def test_when_memory_runs_out_while_scoring_the_rows_are_read_in_halves() -> None:
    model = Full(tiny_model("llama", VOCABULARY, torch.float32), most=64)
    engine = Engine(model, tiny_tokenizer(), name="full")
    asked = prompts(rows=8)
    with engine.session() as session:
        rows = write(session, asked, [4] * len(asked))
        model.most = 2
        found = losses(session, rows)
        model.most = 0
        with pytest.raises(EngineMemoryError, match="alone does not fit"):
            losses(session, rows)
    model.most = 64
    unshared = Engine(model, tiny_tokenizer(), name="full")  # a model that takes no embeddings has no plain twin
    unshared.checks.cache_reach = 0
    expected = losses(unshared, rows)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-4)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=1e-5)


def asked_three_ways(session: Model, rows: Sequence[tuple[int, ...]], engine: Engine) -> list[Any]:
    """What reads and generates nothing: gradients of each row and of all, log-probabilities, next tokens."""
    queries = [TokenQuery(row, len(tokens) - 1) for row, tokens in enumerate(rows)]
    leaf = engine.embed([7])
    return [
        lambda: session.logprob_gradient(rows, queries, Leaf((5,) * len(rows), leaf.expand(len(rows), -1))),
        lambda: session.logprob_gradient(rows, queries, Leaf((5,) * len(rows), leaf)),
        lambda: session.token_logprobs(rows, queries),
        lambda: session.next_token_logprobs(rows),
    ]


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("continues", [False, True])
def test_what_is_kept_gives_way_to_whatever_is_read_where_memory_runs_out(way: int, continues: bool) -> None:
    engine, written, others = build(), prompts(rows=2), prompts(rows=2, seed=7)
    with engine.session() as session:
        rows = [row.token_ids for row in write(session, written, [6] * len(written))]
        rows = rows if continues else [prompt for prompt, _ in others]
        states = [weakref.ref(kept.layers[0][0]) for kept in kept_by(session)._rows]
        assert states
        with memory_runs_out(engine, lambda ids: any(state() is not None for state in states)) as failed:
            found = asked_three_ways(session, rows, engine)[way]()
        assert failed and kept_by(session).bytes == 0
    expected = asked_three_ways(engine, rows, engine)[way]()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_row_that_does_not_fit_is_tried_once_more_for_what_was_given_up_and_no_more() -> None:
    tried: list[Any] = []

    def work(batch: Sequence[str]) -> list[str]:
        tried.append(list(batch))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(EngineMemoryError, match="A row of 1 tokens alone does not fit into memory"):
        in_batches(work, ["a", "b"], [1, 1], 8, lambda: True)
    assert tried == [["a", "b"], ["a"], ["a"]]


def test_a_lack_of_memory_while_writing_gives_up_what_was_kept() -> None:
    model = Full(tiny_model("llama", VOCABULARY, torch.float32), most=64)
    engine = Engine(model, tiny_tokenizer(), name="full", max_batch_rows=16)
    asked = prompts(rows=4)
    with engine.session() as session:
        write(session, asked, [3] * 8)
        model.most = 4
        write(session, prompts(rows=4, seed=9), [3] * 8)
        assert engine.max_batch_rows == 4
        assert kept_by(session).find(asked[0][0], least=5, most=99) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=8), st.data())
def test_the_row_that_is_found_begins_most_like_the_sequence(kept: list[tuple[int, ...]], data: Any) -> None:
    wanted = tuple(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))
    states = GeneratedStates()
    for each in kept:
        states.keep(rows_of(each))
    found = states.find(wanted, least=1, most=99)
    best = max(shared_length([wanted, each]) for each in kept)
    assert (found.known if found else 0) == best


def rows_of(tokens: tuple[int, ...]) -> GeneratedRows:
    nothing = torch.zeros(1, 1, len(tokens), 1)
    return GeneratedRows((tokens,), (Places(0, len(tokens), 0),), ((nothing, nothing),))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 5), st.data())
def test_a_mask_shows_exactly_the_first_tokens_of_a_row(
    first: int, shared: int, pads: int, own: int, data: Any
) -> None:
    length = data.draw(st.integers(0, shared + own))
    slots = [None] * first + list(range(shared)) + [None] * pads + list(range(shared, shared + own)) + [None] * 2
    expected = [int(token is not None and token < length) for token in slots]
    assert slot_mask([Places(first, shared, pads)], [length], len(slots)).tolist() == [expected]
