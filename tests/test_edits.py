"""Edits at one position: replacement, insertion and deletion, legal, new and without doubles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import dspy
import pytest
from scripted_engine import SEED, exact_match, planted_engine, planted_rows, program_on, word_id

from dspy_greater.metric import RowMetric
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.predictors import predictors_of
from dspy_greater.search.edits import Edit, propose_edits
from dspy_greater.search.select import given_up
from dspy_greater.search.state import SearchState, begin
from dspy_greater.settings import Settings

ROWS = planted_rows(4)
ALL = {"top_k": 2000}  # every token of the vocabulary is proposed


def searching(
    instruction: str = SEED, *, position: int = 0, program: Any = None, fixed: str = "", **knobs: Any
) -> tuple[Evaluator, SearchState, Settings]:
    """An objective whose seed was evaluated, and the state before a step at this position."""
    program = program or program_on(planted_engine(), instruction=instruction)
    [site] = predictors_of(program)
    settings = Settings(**knobs)
    objective = Evaluator(
        program=program,
        site=site,
        field="answer",
        rows=ROWS,
        metric=RowMetric(exact_match),
        engine=site.lm.engine.engine,
        settings=settings,
        fixed=fixed,
    )
    [seed] = objective.evaluate([objective.seed()])
    state = begin(seed, settings, editable=objective.layout.positions(seed.token_ids), fixed=fixed)
    return objective, replace(state, position=position) if position else state, settings


def edits_of(objective: Evaluator, state: SearchState, settings: Settings, *, seed: int = 0) -> tuple[Edit, ...]:
    return propose_edits(objective, state, settings, random_seed=seed, predictor="predict")


def tried(objective: Evaluator, edits: tuple[Edit, ...]) -> None:
    """All of these were tried; what came of them does not matter."""
    objective.recall(
        [Evaluation(e.instruction.token_ids, e.instruction.text, (), 0.0, 1.0, 1.0, (1.0, 1.0)) for e in edits]
    )


@pytest.mark.parametrize("position", [0, 2, 4])
def test_replacement_insertion_and_deletion_are_proposed_and_change_one_position(position: int) -> None:
    objective, state, settings = searching(position=position)
    ids = state.current.token_ids
    found = edits_of(objective, state, settings)
    assert {each.kind for each in found} == {"replace", "insert", "delete"}
    for each in found:
        new = each.instruction.token_ids
        after = {"replace": ids[position + 1 :], "insert": ids[position:], "delete": ids[position + 1 :]}[each.kind]
        own = () if each.kind == "delete" else (each.token,)
        assert new[:position] == ids[:position] or position in (0, len(ids) - 1)
        assert len(new) == position + len(own) + len(after)
        assert new[position + len(own) :] == after or each.kind == "delete"


@pytest.mark.parametrize("position", [0, 2])
def test_every_edit_is_deployed_with_the_ids_that_it_has(position: int) -> None:
    for each in edits_of(*searching(position=position)):
        fresh, _, _ = searching()
        assert fresh.layout.instruction_ids(each.instruction.text) == each.instruction.token_ids


@pytest.mark.parametrize("position", [0, 3, 4])
def test_the_token_of_an_edit_is_the_one_that_is_deployed(position: int) -> None:
    objective, state, settings = searching("Please say it now", position=position, **ALL)
    found = [each for each in edits_of(objective, state, settings) if each.kind != "delete"]
    assert len(found) > 20
    for each in found:
        assert each.token == each.instruction.token_ids[position]


def test_the_likeliest_token_comes_first_and_the_deletion_last() -> None:
    objective, state, settings = searching(position=1)
    *others, deletion = edits_of(objective, state, settings)
    likelihoods = [each.log_probability for each in others]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert (deletion.kind, deletion.token) == ("delete", state.current.token_ids[1])
    assert math.isnan(deletion.log_probability)
    assert deletion.instruction.text == "Please it now."


def test_two_tokens_that_are_deployed_as_one_text_are_one_edit_with_the_likelier_token() -> None:
    objective, state, settings = searching(**ALL)
    found = edits_of(objective, state, settings)
    texts = [each.instruction.text for each in found]
    assert len(texts) == len(set(texts))
    tokenizer = objective.engine.tokenizer
    [adding] = [each for each in found if each.instruction.text == "add say it now."]
    assert adding.token == word_id(tokenizer, " add") != word_id(tokenizer, "add")


def test_the_current_instruction_is_not_proposed() -> None:
    objective, state, settings = searching(**ALL)
    assert SEED not in {each.instruction.text for each in edits_of(objective, state, settings)}


def test_what_was_tried_is_not_proposed_again_and_the_proposals_widen() -> None:
    objective, state, settings = searching()
    seen: set[str] = set()
    tokens: set[int] = set()
    for _ in range(3):
        found = edits_of(objective, state, settings)
        texts = {each.instruction.text for each in found}
        assert not texts & seen
        assert len({each.token for each in found if each.kind != "delete"}) >= settings.minimum_candidates
        seen |= texts
        assert {each.token for each in found} - tokens
        tokens |= {each.token for each in found}
        tried(objective, found)


def test_what_was_given_up_counts_as_tried() -> None:
    objective, state, settings = searching()
    first = edits_of(objective, state, settings)[0]
    objective.recall([given_up(first.instruction.token_ids, first.instruction.text, [], 3.0)])
    assert first.instruction.text not in {each.instruction.text for each in edits_of(objective, state, settings)}


def test_with_everything_tried_there_is_no_edit_and_no_error() -> None:
    objective, state, settings = searching("count.", max_instruction_tokens=2, top_k=3, proposal_draws=1)
    for _ in range(30):
        found = edits_of(objective, state, settings)
        tried(objective, found)
    assert found == ()


def test_at_its_longest_the_instruction_does_not_grow() -> None:
    objective, state, settings = searching(max_instruction_tokens=5)
    assert len(state.current.token_ids) == 5
    assert {each.kind for each in edits_of(objective, state, settings)} == {"replace", "delete"}


def test_the_last_token_is_not_deleted() -> None:
    objective, state, settings = searching("count")
    assert {each.kind for each in edits_of(objective, state, settings)} == {"replace", "insert"}


def test_behind_the_last_token_of_an_open_sentence_tokens_are_put_there_and_nothing_else() -> None:
    objective, state, settings = searching("count them now", position=3)
    state = replace(state, position=len(state.current.token_ids))
    found = edits_of(objective, state, settings)
    assert {each.kind for each in found} == {"insert"}
    assert all(each.instruction.text.startswith("count them now") for each in found)
    assert all(len(each.instruction.token_ids) == len(state.current.token_ids) + 1 for each in found)


def test_a_fixed_text_stays_to_the_byte() -> None:
    fixed = "Please count.\n\n(1) look, read.\n(2) say."
    objective, state, settings = searching(fixed, fixed=fixed, max_instruction_tokens=3)
    assert len(state.current.token_ids) > 3  # what is fixed does not count
    assert state.appends()
    for _ in range(3):
        found = edits_of(objective, state, settings)
        assert found and all(each.instruction.text.startswith(fixed) for each in found)
        chosen = found[0].instruction
        [evaluated] = objective.evaluate([chosen])
        state = replace(state, current=evaluated, position=len(chosen.token_ids) - 1)
    assert {"replace", "insert"} <= {each.kind for each in found}
    while len(objective.layout.positions(state.current.token_ids)) < 3:
        state = replace(state, position=len(state.current.token_ids))
        [evaluated] = objective.evaluate([edits_of(objective, state, settings)[0].instruction])
        state = replace(state, current=evaluated)
    assert edits_of(objective, replace(state, position=len(state.current.token_ids)), settings) == ()


def test_a_line_break_is_no_position() -> None:
    objective, state, settings = searching("Look\nhere now.")
    breaks = set(range(len(state.current.token_ids))) - set(objective.layout.positions(state.current.token_ids))
    assert breaks
    assert edits_of(objective, replace(state, position=min(breaks)), settings) == ()


def test_the_same_step_of_the_same_run_proposes_the_same() -> None:
    settings = {"proposal_rows": 1, "proposal_draws": 1}
    assert repr(edits_of(*searching(**settings))) == repr(edits_of(*searching(**settings)))


def test_without_a_call_of_the_predictor_nothing_is_proposed() -> None:
    class Idle(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(planted_engine())

        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer="yes")

    assert edits_of(*searching(program=Idle())) == ()
