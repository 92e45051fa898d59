"""The search's state machine: positions, rounds, growth and the best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as quickly
from hypothesis import strategies as st

from dspy_greater.objective.types import Candidate, Evaluation
from dspy_greater.run.events import StepTaken
from dspy_greater.search.state import (
    SearchState,
    Usage,
    advance,
    begin,
    ends_sentence,
    positions_ahead,
    return_to_best,
)
from dspy_greater.search.step import step_random
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


def every_position(ids: Sequence[int]) -> Sequence[int]:
    return range(len(ids))


def after(
    state: SearchState,
    chosen: Evaluation,
    tried: Sequence[Evaluation] = (),
    settings: Settings = SETTINGS,
    *,
    position: int | None = None,
    candidates: tuple[Candidate, ...] = (),
    spent: int = 0,
    failed: bool = False,
) -> SearchState:
    """The state after a step that chose this, at the state's position unless another is given."""
    at = state.position if position is None else position
    step = StepTaken("predict", state.step, at, -1, candidates, chosen, "", {"generated_tokens": spent})
    return advance(state, step, tried, settings, every_position, failed=failed)


def follow(history: list[tuple[Evaluation, list[Evaluation], bool]], seed: Evaluation) -> list[SearchState]:
    states = [begin(seed, SETTINGS)]
    for chosen, tried, failed in history:
        states.append(after(states[-1], chosen, tried, failed=failed))
    return states


def positions_of(text: str, steps: int) -> list[int]:
    """The positions visited when every step keeps the instruction."""
    kept = evaluated(text)
    states = follow([(kept, [], False)] * steps, kept)
    return [state.position for state in states]


def test_the_search_begins_at_the_first_token_with_the_seed_as_the_best() -> None:
    seed = evaluated("Add up.")
    state = begin(seed, SETTINGS)
    assert (state.position, state.step, state.current, state.best) == (0, 0, seed, (seed,))
    assert not state.finished(SETTINGS)
    assert state.finished(Settings.of(None, steps=0))


@pytest.mark.parametrize(
    ("text", "position", "count", "expected"),
    [
        ("Add it up now.", 0, 3, [0, 1, 2]),
        ("Add it up now.", 2, 3, [2, 3, 0]),  # into the next round
        ("Add it up now", 3, 3, [3, 4, 0]),  # an open sentence could go on
        ("Add it up now", 4, 3, [4, 0, 1]),
        ("Add it.", 1, 9, [1, 0]),  # each once
        ("Add.", 0, 3, [0]),
    ],
)
def test_positions_ahead_are_those_that_steps_without_a_change_would_come_to(
    text: str, position: int, count: int, expected: list[int]
) -> None:
    start = evaluated(text)
    state = replace(begin(start, SETTINGS), position=position)
    found = positions_ahead(state, SETTINGS, range(len(start.token_ids)), count)
    assert [each.position for each in found] == expected
    assert all(replace(each, position=position) == state for each in found)
    for expect in expected[1:]:
        state = after(state, start)
        assert state.position == expect


def test_where_nothing_can_be_edited_and_where_a_fixed_text_is_all_there_is_looking_ahead_ends() -> None:
    state = begin(evaluated("Add it."), SETTINGS, editable=[])
    assert [each.position for each in positions_ahead(state, SETTINGS, [], 3)] == [0]
    fixed = begin(evaluated("Add it."), SETTINGS, editable=[], fixed="Add it.")
    assert [each.position for each in positions_ahead(fixed, SETTINGS, [], 3)] == [2]


def test_a_step_that_was_taken_further_on_is_gone_on_from_there() -> None:
    seed = evaluated("Add it up now.")
    assert after(begin(seed, SETTINGS), seed, position=2).position == 3


def test_a_finished_sentence_starts_over_at_the_first_token() -> None:
    assert positions_of("Add them up.", 7) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_open_sentence_goes_on_behind_its_last_token() -> None:
    assert positions_of("Add them up", 4) == [0, 1, 2, 3, 0]
    state = follow([(evaluated("Add them up"), [], False)] * 3, evaluated("Add them up"))[-1]
    assert state.appends()


def test_an_appended_token_grows_the_instruction_until_it_ends_a_sentence() -> None:
    grown = [evaluated("Add"), evaluated("Add them"), evaluated("Add them up"), evaluated("Add them up .")]
    states = follow([(each, [], False) for each in grown], grown[0])
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
    state = after(begin(seed, SETTINGS), tried[1], tried)
    assert [each.instruction for each in state.best] == ["good.", "seed.", "late."]


def test_failed_steps_are_counted_in_a_row_only() -> None:
    kept = evaluated("Add up.")
    states = follow([(kept, [], True), (kept, [], True), (kept, [], False), (kept, [], True)], kept)
    assert [state.failed_steps for state in states] == [0, 1, 2, 0, 1]


def test_a_steps_randomness_depends_on_seed_predictor_and_step_and_on_nothing_else() -> None:
    def draw(*key: Any) -> float:
        return step_random(*key).random()

    assert draw(0, "predict", 3) == draw(0, "predict", 3)
    assert len({draw(0, "predict", 3), draw(1, "predict", 3), draw(0, "other", 3), draw(0, "predict", 4)}) == 4


def test_the_search_is_over_after_the_step_that_reaches_the_budget() -> None:
    kept, limited = evaluated("Add up."), Settings.of(None, steps=12, max_generated_tokens=100)
    state = begin(kept, limited, usage=Usage(40))
    assert not state.finished(limited)
    state = after(state, kept, settings=limited, spent=59)
    assert (state.usage.generated_tokens, state.finished(limited), state.usage.exhausted(limited)) == (99, False, None)
    state = after(state, kept, settings=limited, spent=1)
    assert state.finished(limited) and "max_generated_tokens=100 was reached" in (state.usage.exhausted(limited) or "")
    assert not state.finished(SETTINGS) and state.usage.exhausted(SETTINGS) is None


@given(instructions, histories)
@quick
def test_the_position_is_always_a_token_or_the_place_behind_the_last(
    seed: Evaluation, history: list[tuple[Evaluation, list[Evaluation], bool]]
) -> None:
    for state in follow(history, seed):
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
    states = follow(history, seed)
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
    whole = follow(history, seed)
    first = follow(history[:stop], seed)[-1]
    for chosen, tried, failed in history[stop:]:
        first = after(first, chosen, tried, failed=failed)
    assert first == whole[-1]
    assert replace(first, step=0).step == 0  # a state is a value: nothing else holds on to it


# --- back to the best ---


def walked(*chosen: Evaluation) -> SearchState:
    """Where a search stands after these steps, the first instruction being the seed."""
    state = begin(chosen[0], SETTINGS)
    for each in chosen[1:]:
        state = after(state, each, [each])
    return state


def back(state: SearchState) -> SearchState:
    return return_to_best(state, SETTINGS, every_position)


def test_steps_are_counted_since_the_best_was_found_though_every_step_changes_something() -> None:
    best, worse = evaluated("Add up.", 0.1), [evaluated(f"Add {each}.", 0.5) for each in "abc"]
    assert walked(best, *worse).unchanged == 3
    assert walked(best, *worse, evaluated("List up.", 0.05)).unchanged == 0


def test_after_a_round_without_a_new_best_it_returns_to_the_best_at_its_first_position() -> None:
    best, worse = evaluated("Add up now.", 0.1), [evaluated(f"Add {each} now.", 0.5) for each in "abcd"]
    within = walked(best, *worse[:3])
    assert back(within) is within
    state = back(walked(best, *worse))
    assert (state.current, state.position, state.unchanged, state.step) == (best, 0, 0, 4)
    assert state.best == walked(best, *worse).best  # nothing is forgotten


def test_it_returns_to_the_first_position_that_can_be_edited() -> None:
    best, worse = evaluated("Add up now.", 0.1), [evaluated(f"Add {each} now.", 0.5) for each in "abcd"]
    walk = walked(best, *worse)
    assert return_to_best(walk, SETTINGS, lambda ids: [1]).position == 1
    fixed = return_to_best(replace(walk, fixed="Add up now."), SETTINGS, lambda ids: [])
    assert fixed.appends()


def test_an_instruction_that_grows_with_every_step_does_not_walk_for_ever() -> None:
    best = evaluated("Add up.", 0.1)
    state, returns = begin(best, SETTINGS), 0
    for _ in range(45):
        longer = evaluated(state.current.instruction + " up", 0.9)
        state = back(after(state, longer, [longer]))
        returns += state.current is best
    assert returns == 2  # after 21 and 42 steps


def test_a_walk_to_where_nothing_is_finite_ends_at_the_best_and_not_with_an_error() -> None:
    best, nowhere = evaluated("Add them all up one by one.", 0.1), evaluated("Add ~ all up one by one.", math.inf)
    state = begin(best, SETTINGS)
    for _ in range(SETTINGS.max_failed_steps):
        state = after(state, nowhere, [nowhere], failed=True)
    state = back(state)
    assert (state.current, state.failed_steps) == (best, 0)
    recalled = replace(best, fluency_nll=math.nan)  # at the best itself, which nan makes unequal to itself
    failing = replace(state, current=recalled, failed_steps=SETTINGS.max_failed_steps, unchanged=99)
    assert back(failing).failed_steps == SETTINGS.max_failed_steps


@pytest.mark.slow
@given(seed=instructions, history=histories)
@quick
def test_replaying_with_returns_gives_the_same_states(
    seed: Evaluation, history: list[tuple[Evaluation, list[Evaluation], bool]]
) -> None:
    def states() -> list[SearchState]:
        found = [begin(seed, SETTINGS)]
        for chosen, tried, failed in history:
            found.append(back(after(found[-1], chosen, tried, failed=failed)))
        return found

    assert states() == states()
    for state in states():
        assert 0 <= state.position <= len(state.current.token_ids)
        assert state.unchanged <= max(1, len(state.current.token_ids))


# --- what forecasts were worth ---


def predicted(forecast: float, realised: tuple[float, float]) -> Candidate:
    return Candidate(1, "x", -1.0, None, evaluated("x"), forecast=forecast, realised=realised)


def test_what_was_predicted_and_what_came_of_it_is_kept_over_all_steps() -> None:
    kept = evaluated("Add up.")
    first, second = ((0.1, (0.0, 1.0)),), ((0.2, (1.0, 0.0)), (0.3, (1.0, 1.0)))
    state = begin(kept, SETTINGS)
    for pairs in (first, second):
        state = after(state, kept, candidates=tuple(predicted(*pair) for pair in pairs))
    assert state.predictions == (*first, *second)


def test_only_the_last_predictions_are_kept() -> None:
    kept = evaluated("Add up.")
    many = tuple((float(n), (0.0, 0.0)) for n in range(70))
    state = after(begin(kept, SETTINGS), kept, candidates=tuple(predicted(*pair) for pair in many))
    assert state.predictions == many[-60:]
