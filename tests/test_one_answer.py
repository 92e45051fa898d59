"""A program that gives every row one answer is told from one that reasons, whatever the metric says."""

from __future__ import annotations

import warnings
from typing import Any

import dspy
import pytest
import scripted_gradsum
from scripted_engine import (
    SEED,
    ScriptedEngine,
    chat_answer,
    instruction_in,
    instruction_of,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
)
from scripted_text import Asked

from dspy_greater.program.rollout import Rollout
from dspy_greater.program.validation import warn_of_one_answer

GOLDS = ("yes", "no", "no", "yes", "no", "yes", "no", "no")


def told(answers: Any, golds: Any = GOLDS, make: Any = dspy.Prediction) -> list[str]:
    rows = [dspy.Example(question="?", answer=gold).with_inputs("question") for gold in golds]
    runs = [Rollout({}, 0.0, prediction=None if each is None else make(answer=each)) for each in answers]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_one_answer(rows, runs)
    return [str(each.message) for each in found]


def test_one_answer_to_rows_with_several_is_told() -> None:
    assert told(["no"] * 8) == [
        "The program that was found answers all 8 validation rows with 'no' in the field `answer`, while their gold "
        "values differ. Its score says how common that answer is among them, and nothing of other rows; give rows with "
        "other answers, or a metric that weighs each answer alike."
    ]
    assert "with ['a'] in the field" in told([["a"]] * 8)[0]
    assert len(told(["x" * 500] * 8)[0]) < 600


@pytest.mark.parametrize(
    ("answers", "golds"),
    [
        (["no"] * 7 + ["yes"], GOLDS),
        (["no"] * 8, ["no"] * 8),  # as it should be
        (["no"] * 7, GOLDS[:7]),  # too few to say
        (["no"] * 7 + [None], GOLDS),  # a row failed
        (["x" * 500 + each for each in "abcdefgh"], GOLDS),  # differ behind what is shown
        ([], ()),
    ],
)
def test_nothing_is_told_where_answers_differ_or_should_not(answers: Any, golds: Any) -> None:
    assert told(answers, golds) == []


def test_what_is_no_prediction_is_not_looked_into() -> None:
    assert told(["no"] * 8, make=lambda answer: answer) == []


def searched(script: Any) -> Any:
    engine = ScriptedEngine(script, model=planted_engine().model)
    rows = planted_rows(16)
    return optimizer(steps=4, validation_rows=8).compile(program_on(engine), rows[:4], valset=rows[8:])


def always_yes(prompt: str) -> str:
    return chat_answer(reasoning="I look.", answer="You see." if instruction_in(prompt) == SEED else "yes")


def test_a_search_says_so_of_what_it_found() -> None:
    with pytest.warns(RuntimeWarning, match="all 8 validation rows with 'yes' in the field `answer`"):
        better = searched(always_yes)
    assert instruction_of(better) != SEED


def test_grad_sum_says_so_too() -> None:
    def script(asked: Asked) -> dict[str, Any]:
        return {"reasoning": "I look.", "answer": "You see." if asked.instruction == scripted_gradsum.SEED else "a1"}

    teacher = scripted_gradsum.optimizer(iterations=1, validation_rows=8, metric=scripted_gradsum.exact_match)
    rows = scripted_gradsum.ROWS
    with pytest.warns(RuntimeWarning, match="all 8 validation rows with 'a1' in the field `answer`"):
        better = teacher.compile(scripted_gradsum.program(script), rows[8:], valset=rows[:8])
    assert instruction_of(better) != scripted_gradsum.SEED


def test_a_search_that_finds_reasoning_or_nothing_says_nothing() -> None:
    assert instruction_of(searched(lambda prompt: chat_answer(reasoning="I look.", answer="yes"))) == SEED
    assert instruction_of(searched(obedient_script)) != SEED
