"""Prompts are read in parts that begin alike: every row once, and what is shared for all of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import LEAST_SAVED
from dspy_greater.model.prefill import Part, parts_of
from tests.model_calls import generated
from tests.tiny_models import tiny_model, tiny_tokenizer


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
    engine = Engine(tiny_model("llama", 512), tiny_tokenizer(), name="tiny", max_batch_rows=64)
    tail = tuple(range(200, 230))
    asked = [(*range(100, 120), token, *tail, 300 + row) for token in (1, 2) for row in range(20)]
    generated(engine, asked, 1)
    assert engine.counters.prefilled_tokens == 20 + 2 * (1 + len(tail)) + 40
