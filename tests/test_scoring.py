"""What was just written is not read again, and the losses are those of reading everything again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dspy_greater.model.fast.scoring import _alike, score
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_greater.errors import EngineMemoryError
from dspy_greater.model.engine import Counters, Engine, GenerationRequest
from dspy_greater.model.fast.generated_kv import Places, WrittenRows, WrittenStates, slot_mask
from dspy_greater.model.fast.prefix_cache import shared_length
from dspy_greater.model.kv_cache import InPlaceLayer, storage
from dspy_greater.model.prefill import LEAST_SAVED, Part, parts_of
from dspy_greater.model.teacher_forcing import teacher_forced_losses
from tests.tiny_models import tiny_model, tiny_tokenizer

KINDS = ["llama", "qwen2", "gemma2"]
VOCABULARY = 512
HEAD, ANSWER_HEADER, GOLD = 20, (7, 8, 9), (11, 12)


@dataclass(frozen=True)
class Span:
    start: int
    stop: int


@dataclass(frozen=True)
class Finished:
    token_ids: tuple[int, ...]
    instruction: Span
    answer: Span


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


def finished(asked: Sequence[tuple[tuple[int, ...], Span]], written: Sequence[tuple[int, ...]]) -> list[Finished]:
    rows = []
    for (prompt, span), each in zip(asked, written, strict=True):
        before = (*prompt, *each, *ANSWER_HEADER)
        rows.append(Finished((*before, *GOLD), span, Span(len(before), len(before) + len(GOLD))))
    return rows


def write(engine: Engine, asked: Sequence[tuple[tuple[int, ...], Span]], lengths: Sequence[int]) -> list[Finished]:
    """Every row writes its own number of tokens, so that rows leave their batch at different times."""
    requests = [
        GenerationRequest(prompt, length, stop_token_ids=()) for (prompt, _), length in zip(asked, lengths, strict=True)
    ]
    return finished(asked, [each.token_ids for each in engine.complete(requests)])


def kept_rows_of(engine: Engine) -> list[WrittenRows]:
    """Everything that is kept at the moment."""
    return [rows for each in engine.written._keeping.everywhere for rows in each.rows]


def lengths_of(asked: Sequence[Any], most: int = 12) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(1, most) for _ in asked]


def spent(engine: Engine, rows: Sequence[Finished], **options: Any) -> tuple[Any, Counters]:
    before = engine.counters
    return score(engine, rows, **options), engine.counters - before


def assert_same(found: Any, expected: Any) -> None:
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-4)
    assert found.fluency_nll == pytest.approx(expected.fluency_nll, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_from_kept_states_are_those_of_reading_everything_again(kind: Any) -> None:
    engine, asked = build(kind, **({"sliding_window": 96} if kind == "gemma2" else {})), prompts()
    with engine.shared_prefixes(), engine.kept_rows():
        rows = write(engine, asked, lengths_of(asked))
        found, costs = spent(engine, rows)
    expected = teacher_forced_losses(engine, rows)
    assert_same(found, expected)
    # What was not read while writing: the last token, the answer's header and the gold answer.
    most = len(rows) * (1 + len(ANSWER_HEADER) + len(GOLD)) + 2 * (7 + 1)
    assert 0 < costs.prefilled_tokens <= most


def test_rows_that_left_their_batches_at_different_times_are_read_together() -> None:
    engine, asked = build(max_batch_rows=5), prompts()
    with engine.shared_prefixes(), engine.kept_rows():
        rows = write(engine, asked, lengths_of(asked))
        kept = [engine.written.find(row.token_ids, least=1, most=1000) for row in rows]
        assert len({id(each.rows) for each in kept if each}) > 3
        _, costs = spent(engine, rows)
        assert costs.forwards == 3 + 1  # answers of 12 rows, 5 at a time; fluency
        engine._batch_rows = 64
        found, costs = spent(engine, rows)
    assert costs.forwards == 2
    assert_same(found, teacher_forced_losses(engine, rows))


def test_a_long_row_does_not_make_the_others_long() -> None:
    engine, asked = build(), prompts(rows=12)
    longest = max(asked, key=lambda each: len(each[0]))
    with engine.kept_rows():
        rows = write(engine, asked, [4] * len(asked)) + write(engine, [longest], [200])
        found, costs = spent(engine, rows)
    assert 2 + 1 <= costs.forwards <= 3 + 1  # and fluency
    assert_same(found, teacher_forced_losses(engine, rows))


@given(st.lists(st.integers(1, 300), max_size=30), st.integers(1, 12))
def test_rows_that_share_a_cache_are_alike_and_few(slots: list[int], most: int) -> None:
    groups = _alike(slots, most)
    assert sorted(row for group in groups for row in group) == list(range(len(slots)))
    for group in groups:
        mine = [slots[row] for row in group]
        assert len(group) <= most and len(mine) * max(mine) <= 1.5 * sum(mine)


def test_what_is_kept_takes_hardly_more_memory_than_it_says() -> None:
    engine, asked = build(), prompts(rows=24)
    with engine.kept_rows():
        write(engine, asked, [1 + row % 25 for row in range(len(asked))])
        held = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for rows in kept_rows_of(engine)
            for layer in rows.layers
            for each in layer
        }
        assert engine.written.bytes <= sum(held.values()) <= 1.3 * engine.written.bytes


def test_a_row_that_is_left_alone_does_not_hold_the_memory_of_its_batch() -> None:
    layer = InPlaceLayer(limit=80)
    layer.update(*torch.randn(2, 64, 2, 40, 8).unbind())
    for left in (48, 31, 12, 1):
        layer.keep(range(left), 0)
        assert layer.keys is not None and storage(layer.keys) <= 2 * left * (64 * 2 * 80 * 8 * 4) / 64


def test_a_window_that_holds_each_row_is_enough_for_rows_that_are_read_together() -> None:
    asked = [((1, *range(20, 20 + length)), Span(1, 4)) for length in (30, 60)]
    engine = build("gemma2", sliding_window=90)
    with engine.kept_rows():
        early, late = (write(engine, [each], [length])[0] for each, length in zip(asked, (4, 24), strict=True))
        # The short row's answer is long: behind the other's 84 slots it ends beyond the window.
        gold = Span(early.answer.start, early.answer.start + 40)
        early = Finished((*early.token_ids[: gold.start], *range(100, 140)), early.instruction, gold)
        found, costs = spent(engine, [early, late])
    assert costs.forwards == 1 + 1  # and fluency
    assert_same(found, teacher_forced_losses(engine, [early, late]))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_read_in_parts_write_what_they_write_alone(kind: Any) -> None:
    engine, asked = build(kind), prompts(instructions=3, rows=40)
    lengths = lengths_of(asked)
    contexts = [prompt for prompt, _ in asked]
    assert len(parts_of(contexts)) > 3
    together = write(engine, asked, lengths)
    alone = build(kind, max_batch_rows=1)
    alone.prefixes.reach = 0
    assert together == write(alone, asked, lengths)


def test_a_reasoning_that_was_changed_afterwards_is_read_from_where_it_differs() -> None:
    engine, asked = build(), prompts(rows=3)
    with engine.kept_rows():
        rows = write(engine, asked, [8] * len(asked))
        other = [
            Finished((*each.token_ids[: len(prompt) + 3], 5, *each.token_ids[len(prompt) + 4 :]), span, each.answer)
            for each, (prompt, span) in zip(rows, asked, strict=True)
        ]
        found, costs = spent(engine, other)
    assert_same(found, teacher_forced_losses(engine, other))
    rest = 5 + len(ANSWER_HEADER) + len(GOLD)
    assert len(other) * rest <= costs.prefilled_tokens <= len(other) * rest + 2 * 27


def test_rows_that_were_not_written_here_are_read_as_ever() -> None:
    engine, asked = build(), prompts(rows=3)
    rows = finished(asked, [(21, 22, 23)] * len(asked))
    expected, again = spent(engine, rows)
    with engine.kept_rows():
        write(engine, prompts(rows=3, seed=5), [4] * 6)
        found, costs = spent(engine, rows)
    assert (found, costs.prefilled_tokens) == (expected, again.prefilled_tokens)
    assert_same(found, teacher_forced_losses(engine, rows))


def test_nothing_is_kept_outside_the_block_and_nothing_after_it() -> None:
    engine, asked = build(), prompts(rows=2)
    write(engine, asked, [3] * 4)
    assert engine.written.bytes == 0
    with engine.kept_rows():
        with engine.kept_rows():
            write(engine, asked, [3] * 4)
        assert engine.written.bytes > 0
    assert engine.written.bytes == 0


def test_beyond_a_sliding_window_nothing_is_kept_and_the_losses_are_right() -> None:
    engine, asked = build("gemma2", sliding_window=40), prompts(rows=3)
    with engine.kept_rows():
        rows = write(engine, asked, [30] * len(asked))
        found, _ = spent(engine, rows)
        assert engine.written.bytes == 0
    assert_same(found, teacher_forced_losses(engine, rows))


def test_an_answer_that_would_leave_the_sliding_window_is_read_in_full() -> None:
    asked = [(prompt[:30], span) for prompt, span in prompts(rows=3)]
    longest = max(len(prompt) for prompt, _ in asked)
    engine = build("gemma2", sliding_window=longest + 5)
    with engine.kept_rows():
        rows = write(engine, asked, [4] * len(asked))
        assert engine.written.bytes > 0
        found, costs = spent(engine, rows)
    assert_same(found, teacher_forced_losses(engine, rows))
    assert costs.prefilled_tokens > sum(len(row.token_ids) - HEAD for row in rows) / 2


def test_the_oldest_states_give_way_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = build(), prompts(rows=2)
    with engine.kept_rows():
        first = write(engine, asked, [3] * 4)
        limit = engine.written.bytes + 1
        monkeypatch.setattr("dspy_greater.model.fast.generated_kv.MOST_BYTES", limit)
        second = write(engine, prompts(rows=2, seed=3), [3] * 4)
        assert 0 < engine.written.bytes <= limit
        _, old = spent(engine, first)
        _, new = spent(engine, second)
    assert new.prefilled_tokens < old.prefilled_tokens


class Full(torch.nn.Module):
    """A model whose passes over more than a few rows run out of memory."""

    def __init__(self, model: Any, most: int) -> None:
        super().__init__()
        self.inner, self.most = model, most
        self.config = model.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Any, **inputs: Any) -> Any:
        if len(input_ids) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.inner(input_ids=input_ids, **inputs)


def test_when_memory_runs_out_while_scoring_the_rows_are_read_in_halves() -> None:
    model = Full(tiny_model("llama", VOCABULARY, torch.float32), most=64)
    engine = Engine(model, tiny_tokenizer(), name="full")
    asked = prompts(rows=8)
    with engine.kept_rows():
        rows = write(engine, asked, [4] * len(asked))
        model.most = 2
        found = score(engine, rows)
        model.most = 0
        with pytest.raises(EngineMemoryError, match="alone does not fit"):
            score(engine, rows)
    model.most = 64
    assert_same(found, teacher_forced_losses(engine, rows))


def test_a_lack_of_memory_while_writing_gives_up_what_was_kept() -> None:
    model = Full(tiny_model("llama", VOCABULARY, torch.float32), most=64)
    engine = Engine(model, tiny_tokenizer(), name="full", max_batch_rows=16)
    asked = prompts(rows=4)
    with engine.kept_rows():
        write(engine, asked, [3] * 8)
        model.most = 4
        write(engine, prompts(rows=4, seed=9), [3] * 8)
        assert engine.max_batch_rows == 4
        assert engine.written.find(asked[0][0], least=5, most=99) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=8), st.data())
def test_the_row_that_is_found_begins_most_like_the_sequence(kept: list[tuple[int, ...]], data: Any) -> None:
    wanted = tuple(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))
    states = WrittenStates()
    with states.open():
        for each in kept:
            states.keep(rows_of(each))
        found = states.find(wanted, least=1, most=99)
    best = max(shared_length([wanted, each]) for each in kept)
    assert (found.known if found else 0) == best


def rows_of(tokens: tuple[int, ...]) -> Any:
    from dspy_greater.model.fast.generated_kv import WrittenRows

    nothing = torch.zeros(1, 1, len(tokens), 1)
    return WrittenRows((tokens,), (Places(0, len(tokens), 0),), ((nothing, nothing),))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 5), st.data())
def test_a_mask_shows_exactly_the_first_tokens_of_a_row(
    first: int, shared: int, pads: int, own: int, data: Any
) -> None:
    length = data.draw(st.integers(0, shared + own))
    slots = [None] * first + list(range(shared)) + [None] * pads + list(range(shared, shared + own)) + [None] * 2
    expected = [int(token is not None and token < length) for token in slots]
    assert slot_mask([Places(first, shared, pads)], [length], len(slots)).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=40))
def test_parts_hold_every_row_once_and_each_row_keeps_a_token_of_its_own(contexts: list[tuple[int, ...]]) -> None:
    for divide in (True, False):
        parts = parts_of(contexts, divide=divide)
        assert sorted(row for part in parts for row in part.rows) == list(range(len(contexts)))
        for part in parts:
            beginnings = {contexts[row][: part.shared] for row in part.rows}
            assert len(beginnings) == 1 and all(len(contexts[row]) > part.shared for row in part.rows)


def test_candidates_are_read_apart_where_that_saves_enough_and_together_otherwise() -> None:
    head, tail = tuple(range(100, 120)), tuple(range(200, 230))
    many = [(*head, token, *tail, 300 + row) for token in (1, 2) for row in range(20)]
    assert (20 - 1) * len(tail) >= LEAST_SAVED
    assert parts_of(many) == [Part(tuple(range(20)), 51), Part(tuple(range(20, 40)), 51)]
    few = [(*head, token, *tail, 300 + row) for token in (1, 2) for row in range(2)]
    assert parts_of(few) == [Part((0, 1, 2, 3), 20)]


def test_what_is_shared_by_a_candidates_rows_is_read_once_for_all_of_them() -> None:
    engine = build()
    tail = tuple(range(200, 230))
    asked = [(*range(100, 120), token, *tail, 300 + row) for token in (1, 2) for row in range(20)]
    engine.generate(asked, max_new_tokens=1)
    assert engine.counters.prefilled_tokens == 20 + 2 * (1 + len(tail)) + 40
