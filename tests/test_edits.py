"""Edits at one position: replacement, insertion and deletion, legal, new and without doubles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import dspy
import pytest
from scripted_engine import SEED, exact_match, planted_engine, planted_rows, program_on, word_id

from dspy_greater.metric import RowMetric
from dspy_greater.objective.evaluator import Evaluator, Objective
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.predictors import predictors_of
from dspy_greater.search.edits import Edit, propose_edits
from dspy_greater.search.state import begin
from dspy_greater.search.step import StepContext
from dspy_greater.settings import Settings

ROWS = planted_rows(4)
ALL = {"top_k": 2000}  # every token of the vocabulary is proposed


def searching(
    instruction: str = SEED, *, position: int = 0, program: Any = None, fixed: str = "", **knobs: Any
) -> StepContext:
    """Before a step at this position, after the seed was evaluated."""
    program = program or program_on(planted_engine(), instruction=instruction)
    [predictor] = predictors_of(program)
    settings = Settings(**knobs)
    evaluator = Evaluator(
        Objective(
            program=program, predictor=predictor, field="answer", rows=ROWS, metric=RowMetric(exact_match), fixed=fixed
        ),
        engine=predictor.lm.engine.engine,
        settings=settings,
    )
    [seed] = evaluator.evaluate([evaluator.seed()])
    state = begin(seed, settings, editable=evaluator.layout.edits.positions(seed.token_ids), fixed=fixed)
    at = StepContext(evaluator, evaluator.engine, state, settings, "predict", 0)
    return moved(at, position=position) if position else at


def moved(at: StepContext, **changes: Any) -> StepContext:
    """Where the state is another."""
    return replace(at, state=replace(at.state, **changes))


def tried(at: StepContext, edits: tuple[Edit, ...]) -> None:
    """All of these were tried; what came of them does not matter."""
    at.evaluator.recall(
        [Evaluation(e.instruction.token_ids, e.instruction.text, (), 0.0, 1.0, 1.0, (1.0, 1.0)) for e in edits]
    )


@pytest.mark.parametrize("position", [0, 2, 4])
def test_replacement_insertion_and_deletion_are_proposed_and_change_one_position(position: int) -> None:
    at = searching(position=position)
    ids = at.current.token_ids
    found = propose_edits(at)
    assert {each.kind for each in found} == {"replace", "insert", "delete"}
    for each in found:
        new = each.instruction.token_ids
        after = {"replace": ids[position + 1 :], "insert": ids[position:], "delete": ids[position + 1 :]}[each.kind]
        own = () if each.kind == "delete" else (each.token,)
        assert new[:position] == ids[:position] or position in (0, len(ids) - 1)
        assert len(new) == position + len(own) + len(after)
        assert new[position + len(own) :] == after or each.kind == "delete"


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 2])
def test_every_edit_is_deployed_with_the_ids_that_it_has(position: int) -> None:
    for each in propose_edits(searching(position=position)):
        assert searching().evaluator.layout.edits.instruction_ids(each.instruction.text) == each.instruction.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 3, 4])
def test_the_token_of_an_edit_is_the_one_that_is_deployed(position: int) -> None:
    at = searching("Please say it now", position=position, **ALL)
    found = [each for each in propose_edits(at) if each.kind != "delete"]
    assert len(found) > 20
    for each in found:
        assert each.token == each.instruction.token_ids[position]


def test_the_likeliest_token_comes_first_and_the_deletion_last() -> None:
    at = searching(position=1)
    *others, deletion = propose_edits(at)
    likelihoods = [each.log_probability for each in others]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert (deletion.kind, deletion.token) == ("delete", at.current.token_ids[1])
    assert math.isnan(deletion.log_probability)
    assert deletion.instruction.text == "Please it now."


@pytest.mark.slow
def test_two_tokens_that_are_deployed_as_one_text_are_one_edit_with_the_likelier_token() -> None:
    at = searching(**ALL)
    found = propose_edits(at)
    texts = [each.instruction.text for each in found]
    assert len(texts) == len(set(texts))
    tokenizer = at.evaluator.engine.tokenizer
    [adding] = [each for each in found if each.instruction.text == "add say it now."]
    assert adding.token == word_id(tokenizer, " add") != word_id(tokenizer, "add")


@pytest.mark.slow
def test_the_current_instruction_is_not_proposed() -> None:
    at = searching(**ALL)
    assert SEED not in {each.instruction.text for each in propose_edits(at)}


def test_what_was_tried_is_not_proposed_again_and_the_proposals_widen() -> None:
    at = searching()
    seen: set[str] = set()
    tokens: set[int] = set()
    for _ in range(3):
        found = propose_edits(at)
        texts = {each.instruction.text for each in found}
        assert not texts & seen
        assert len({each.token for each in found if each.kind != "delete"}) >= at.settings.minimum_candidates
        seen |= texts
        assert {each.token for each in found} - tokens
        tokens |= {each.token for each in found}
        tried(at, found)


def test_with_everything_tried_there_is_no_edit_and_no_error() -> None:
    at = searching("count.", max_instruction_tokens=2, top_k=3, proposal_draws=1)
    for _ in range(30):
        found = propose_edits(at)
        tried(at, found)
    assert found == ()


def test_at_its_longest_the_instruction_does_not_grow() -> None:
    at = searching(max_instruction_tokens=5)
    assert len(at.current.token_ids) == 5
    assert {each.kind for each in propose_edits(at)} == {"replace", "delete"}


def test_the_last_token_is_not_deleted() -> None:
    at = searching("count")
    assert {each.kind for each in propose_edits(at)} == {"replace", "insert"}


def test_behind_the_last_token_of_an_open_sentence_tokens_are_put_there_and_nothing_else() -> None:
    at = searching("count them now", position=3)
    at = moved(at, position=len(at.current.token_ids))
    found = propose_edits(at)
    assert {each.kind for each in found} == {"insert"}
    assert all(each.instruction.text.startswith("count them now") for each in found)
    assert all(len(each.instruction.token_ids) == len(at.current.token_ids) + 1 for each in found)


@pytest.mark.slow
def test_a_fixed_text_stays_to_the_byte() -> None:
    fixed = "Please count.\n\n(1) look, read.\n(2) say."
    at = searching(fixed, fixed=fixed, max_instruction_tokens=3)
    assert len(at.current.token_ids) > 3  # what is fixed does not count
    assert at.state.appends()
    for _ in range(3):
        found = propose_edits(at)
        assert found and all(each.instruction.text.startswith(fixed) for each in found)
        chosen = found[0].instruction
        [evaluated] = at.evaluator.evaluate([chosen])
        at = moved(at, current=evaluated, position=len(chosen.token_ids) - 1)
    assert {"replace", "insert"} <= {each.kind for each in found}
    while len(at.evaluator.layout.edits.positions(at.current.token_ids)) < 3:
        at = moved(at, position=len(at.current.token_ids))
        [evaluated] = at.evaluator.evaluate([propose_edits(at)[0].instruction])
        at = moved(at, current=evaluated)
    assert propose_edits(moved(at, position=len(at.current.token_ids))) == ()


def test_a_line_break_is_no_position() -> None:
    at = searching("Look\nhere now.")
    breaks = set(range(len(at.current.token_ids))) - set(at.evaluator.layout.edits.positions(at.current.token_ids))
    assert breaks
    assert propose_edits(moved(at, position=min(breaks))) == ()


def test_the_same_step_of_the_same_run_proposes_the_same() -> None:
    settings = {"proposal_rows": 1, "proposal_draws": 1}
    assert repr(propose_edits(searching(**settings))) == repr(propose_edits(searching(**settings)))


def test_without_a_call_of_the_predictor_nothing_is_proposed() -> None:
    class Idle(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(planted_engine())

        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer="yes")

    assert propose_edits(searching(program=Idle())) == ()
