"""The search's state machine: positions, rounds, growth and the best so far."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as quickly
from hypothesis import strategies as st

from dspy_greater.run.events import Evaluation
from dspy_greater.search import SearchState, advance, begin, ends_sentence, step_random
from dspy_greater.settings import Settings

quick = quickly(max_examples=80, deadline=None, derandomize=True)
SETTINGS = Settings.of(None, steps=12, finalists=3, max_instruction_tokens=6)


def evaluated(text: str, objective: float = 0.5, *, length: int | None = None) -> Evaluation:
    ids = tuple(range(length or len(text.split())))
    return Evaluation(ids, text, (), 0.5, 0.1, 0.1, (objective, 0.1))


instructions = st.builds(
    evaluated,
    st.lists(st.sampled_from(["add", "list", "count.", "then", "now."]), min_size=1, max_size=7).map(" ".join),
    st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf]),
)
histories = st.lists(st.tuples(instructions, st.lists(instructions, max_size=3), st.booleans()), max_size=12)


def walk(history: list[tuple[Evaluation, list[Evaluation], bool]], seed: Evaluation) -> list[SearchState]:
    states = [begin(seed, SETTINGS)]
    for chosen, tried, failed in history:
        states.append(advance(states[-1], chosen, tried, SETTINGS, failed=failed))
    return states


def positions_of(text: str, steps: int) -> list[int]:
    """The positions visited when every step keeps the instruction."""
    kept = evaluated(text)
    states = walk([(kept, [], False)] * steps, kept)
    return [state.position for state in states]


def test_the_search_begins_at_the_first_token_with_the_seed_as_the_best() -> None:
    seed = evaluated("Add up.")
    state = begin(seed, SETTINGS)
    assert (state.position, state.step, state.current, state.best) == (0, 0, seed, (seed,))
    assert not state.finished(SETTINGS)
    assert state.finished(Settings.of(None, steps=0))


def test_a_finished_sentence_starts_over_at_the_first_token() -> None:
    assert positions_of("Add them up.", 7) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_open_sentence_goes_on_behind_its_last_token() -> None:
    assert positions_of("Add them up", 4) == [0, 1, 2, 3, 0]
    state = walk([(evaluated("Add them up"), [], False)] * 3, evaluated("Add them up"))[-1]
    assert state.appends()


def test_an_appended_token_grows_the_instruction_until_it_ends_a_sentence() -> None:
    grown = [evaluated("Add"), evaluated("Add them"), evaluated("Add them up"), evaluated("Add them up .")]
    states = walk([(each, [], False) for each in grown], grown[0])
    assert [state.position for state in states] == [0, 1, 2, 3, 0]
    assert [len(state.current.token_ids) for state in states] == [1, 1, 2, 3, 4]


def test_the_instruction_stops_growing_at_its_longest() -> None:
    assert positions_of("a b c d e f", 6) == [0, 1, 2, 3, 4, 5, 0]  # six tokens are the most
    assert positions_of("a b c d e", 5) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["Add.", "Add!", "Add?", 'He said "add."', "(Add.)", "Add. ", "加。", "加！"])
def test_a_full_stop_a_mark_or_a_closing_quote_ends_a_sentence(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize("text", ["Add", "Add,", "Add:", "3.5 apples", "", "."[:0], "Add . then"])
def test_other_ends_leave_the_sentence_open(text: str) -> None:
    assert not ends_sentence(text)


def test_only_the_finalists_are_remembered_and_the_earlier_of_equals_first() -> None:
    seed = evaluated("seed.", 0.5)
    tried = [evaluated("late.", 0.5), evaluated("good.", 0.1), evaluated("bad.", 0.9)]
    state = advance(begin(seed, SETTINGS), tried[1], tried, SETTINGS)
    assert [each.instruction for each in state.best] == ["good.", "seed.", "late."]


def test_failed_steps_are_counted_in_a_row_only() -> None:
    kept = evaluated("Add up.")
    states = walk([(kept, [], True), (kept, [], True), (kept, [], False), (kept, [], True)], kept)
    assert [state.failed_steps for state in states] == [0, 1, 2, 0, 1]


def test_a_steps_randomness_depends_on_seed_predictor_and_step_and_on_nothing_else() -> None:
    def draw(*key: object) -> float:
        return step_random(*key).random()

    assert draw(0, "predict", 3) == draw(0, "predict", 3)
    assert len({draw(0, "predict", 3), draw(1, "predict", 3), draw(0, "other", 3), draw(0, "predict", 4)}) == 4


@given(instructions, histories)
@quick
def test_the_position_is_always_a_token_or_the_place_behind_the_last(
    seed: Evaluation, history: list[tuple[Evaluation, list[Evaluation], bool]]
) -> None:
    for state in walk(history, seed):
        length = len(state.current.token_ids)
        assert 0 <= state.position <= length
        assert state.appends() == (state.position == length)
        if state.appends():
            assert not ends_sentence(state.current.instruction)
            assert length < SETTINGS.max_instruction_tokens


@given(instructions, histories)
@quick
def test_the_best_are_sorted_distinct_and_never_worse_than_the_seed(
    seed: Evaluation, history: list[tuple[Evaluation, list[Evaluation], bool]]
) -> None:
    seen: dict[str, Evaluation] = {seed.instruction: seed}
    states = walk(history, seed)
    for state, (chosen, tried, _) in zip(states[1:], history, strict=True):
        for each in (chosen, *tried):
            seen.setdefault(each.instruction, each)
        objectives = [each.objective for each in state.best]
        texts = [each.instruction for each in state.best]
        assert objectives == sorted(objectives)
        assert len(set(texts)) == len(texts) <= SETTINGS.finalists
        assert set(texts) <= set(seen)
        assert state.best[0].objective <= seed.objective


@given(instructions, histories, st.integers(0, 12))
@quick
def test_replaying_recorded_steps_gives_the_state_that_stepping_gave(
    seed: Evaluation, history: list[tuple[Evaluation, list[Evaluation], bool]], stop: int
) -> None:
    whole = walk(history, seed)
    first = walk(history[:stop], seed)[-1]
    for chosen, tried, failed in history[stop:]:
        first = advance(first, chosen, tried, SETTINGS, failed=failed)
    assert first == whole[-1]
    assert replace(first, step=0).step == 0  # a state is a value: nothing else holds on to it
