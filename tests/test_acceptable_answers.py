"""Several acceptable answers: the best of them counts in the loss, in gradients and in forecasts, and a run repeats."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pandas as pd
import pytest
from any_event import bits
from scripted_engine import (
    ScriptedEngine,
    chat_answer,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
    value_in,
    word_id,
)

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.errors import DataError
from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.metric import RowMetric
from dspy_greater.model.plain import PlainModel
from dspy_greater.objective.evaluator import Evaluator, Instruction, Objective
from dspy_greater.objective.loss import losses
from dspy_greater.objective.replay import Replay, advantages
from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.program.predictors import predictors_of
from dspy_greater.settings import Settings

TEXTS = ("Please say it now.", "Please count.", "Read it now.")
ANSWERS = (["no", "yes", "maybe", "no"], ["quickly", "no"], ["yes"], np.array(["of it", "yes", "no"]))


def rows_with(*answers: Any) -> list[Any]:
    plain = planted_rows(len(answers))
    return [row.copy(answer=answer) for row, answer in zip(plain, answers, strict=True)]


def any_match(example: Any, prediction: Any, trace: object = None) -> bool:
    answers = [example.answer] if isinstance(example.answer, str) else list(example.answer)
    return prediction.answer in answers


def evaluator_on(engine: Any, rows: Any, settings: Settings | None = None) -> Evaluator:
    program = program_on(engine)
    [predictor] = predictors_of(program)
    return Evaluator(
        Objective(program=program, predictor=predictor, field="answer", rows=rows, metric=RowMetric(any_match)),
        engine=engine,
        settings=settings or Settings(),
    )


def evaluated(evaluator: Evaluator, *texts: str) -> list[Evaluation]:
    return evaluator.evaluate([Instruction(evaluator.layout.edits.instruction_ids(text), text) for text in texts])


def loss_of(evaluator: Evaluator, text: str, row: RowOutcome, answer: str) -> float:
    """The slow twin: one answer, laid out and read by itself."""
    found = evaluator.layout.supervised(
        text, row.inputs, row.written, "answer", answer, from_header=row.unparsed and evaluator.examples._header_counts
    )
    [loss] = losses(PlainModel(evaluator.engine), [found], answer_temperature=0.2).cross_entropy
    return loss


# --- the loss ---


@pytest.mark.parametrize("engine", [planted_engine, lambda: ScriptedEngine(obedient_script)], ids=["real", "scripted"])
def test_the_loss_of_a_row_is_the_least_over_its_acceptable_answers(engine: Any) -> None:
    evaluator = evaluator_on(engine(), rows_with(*ANSWERS))
    counted = set()
    for found in evaluated(evaluator, *TEXTS):
        for row, raw in zip(found.rows, ANSWERS, strict=True):
            answers = list(dict.fromkeys(map(str, raw)))
            apart = [loss_of(evaluator, found.instruction, row, answer) for answer in answers]
            assert row.cross_entropy == pytest.approx(min(apart), rel=1e-4, abs=1e-6)
            assert apart[row.answer] == pytest.approx(min(apart), rel=1e-4, abs=1e-6)
            counted.add(row.answer)
        assert found.cross_entropy == pytest.approx(sum(row.cross_entropy for row in found.rows) / 4)
        assert all(map(math.isfinite, found.objective))
    assert len(counted) > 1  # not always the first


def test_where_the_answer_was_not_found_each_is_scored_with_its_header() -> None:
    engine = ScriptedEngine(lambda prompt: "I do not know the format.")
    evaluator = evaluator_on(engine, rows_with(*ANSWERS))
    [found] = evaluated(evaluator, TEXTS[0])
    assert all(row.unparsed for row in found.rows)
    for row, raw in zip(found.rows, ANSWERS, strict=True):
        apart = [loss_of(evaluator, TEXTS[0], row, answer) for answer in dict.fromkeys(map(str, raw))]
        assert row.cross_entropy == pytest.approx(min(apart), rel=1e-4)


def test_which_answer_counts_may_differ_from_instruction_to_instruction() -> None:
    evaluator = evaluator_on(planted_engine(), rows_with(*[["yes", "no"]] * 4))
    found = evaluated(evaluator, "Please count. Add. Count.", "Hurry. Guess. Hurry.")
    assert [row.answer for row in found[0].rows] != [row.answer for row in found[1].rows]


@pytest.mark.parametrize("same", [["yes", "yes"], ("yes",), {"yes"}, ["yes", None, " ", math.nan], np.array(["yes"])])
def test_one_acceptable_answer_in_any_form_computes_the_same_bits_as_the_answer(same: Any) -> None:
    plain = evaluator_on(planted_engine(), rows_with("yes", "yes", "yes", "yes"))
    listed = evaluator_on(planted_engine(), rows_with("yes", same, same, "yes"))
    assert evaluated(listed, *TEXTS) == evaluated(plain, *TEXTS)


def test_an_answer_that_does_not_fit_the_context_leaves_the_others() -> None:
    engine = planted_engine()
    evaluator = evaluator_on(engine, rows_with(["yes " * 1000 + "yes", "no"], *ANSWERS[1:]))
    [found] = evaluated(evaluator, TEXTS[0])
    assert found.rows[0].answer == 1 and math.isfinite(found.rows[0].cross_entropy)


# --- gradients and forecasts ---


def reduced(found: Evaluation) -> list[Any]:
    """The rows with the one answer that counts under an instruction."""
    answers = [list(dict.fromkeys(map(str, raw)))[row.answer] for row, raw in zip(found.rows, ANSWERS, strict=True)]
    return rows_with(*answers)


def test_gradient_and_forecast_take_the_answer_that_counts_under_the_instruction() -> None:
    evaluator = evaluator_on(planted_engine(), rows_with(*ANSWERS))
    for found in evaluated(evaluator, *TEXTS[:2]):
        alone = evaluator_on(planted_engine(), reduced(found))
        [twin] = evaluated(alone, found.instruction)
        assert evaluator.supervised(found) == alone.supervised(twin)
        replayed = evaluator.replay(found, random.Random(0), 9)
        assert replayed == alone.replay(twin, random.Random(0), 9)
        assert evaluator.generated(found) == alone.generated(twin)
        weighed, words = advantages(replayed, baseline_scale=0.5), [" count", " add", " hurry"]
        candidates = [word_id(evaluator.engine.tokenizer, each) for each in words]
        slopes = score_gradient(
            evaluator.engine, Replay(replayed, weighed), position=1, candidates=candidates, answer_weight=1.0
        )
        assert all(map(math.isfinite, slopes)) and any(slopes)
        told = losses(evaluator.engine, evaluator.supervised(found))
        assert told.cross_entropy == pytest.approx([row.cross_entropy for row in found.rows], rel=1e-4)


def test_the_gradient_is_that_of_the_minimum() -> None:
    """Central differences of min over answers, where one answer is clearly the best."""
    evaluator = evaluator_on(planted_engine(), rows_with(*ANSWERS))
    [found] = evaluated(evaluator, TEXTS[1])
    engine, position = evaluator.engine, 1
    token = found.token_ids[position]
    table = engine.model.get_input_embeddings().weight.data
    settings: dict[str, Any] = {"answer_temperature": 0.2, "fluency_weight": 0.0}
    gradient = paper_gradient(
        engine, evaluator.supervised(found), position=position, candidates=[token + 1], **settings
    )
    direction = (table[token + 1] - table[token]).clone()
    moved = []
    for step in (1e-2, -1e-2):
        table[token] += step * direction
        try:
            per_row = [
                min(loss_of(evaluator, found.instruction, row, str(answer)) for answer in raw)
                for row, raw in zip(found.rows, ANSWERS, strict=True)
            ]
        finally:
            table[token] -= step * direction
        moved.append(sum(per_row))
    assert (moved[0] - moved[1]) / 2e-2 == pytest.approx(gradient.predicted_change[0], rel=0.05, abs=1e-2)


# --- whole searches ---


def compiled(engine: Any, rows: Any, **options: Any) -> Any:
    return optimizer(metric=any_match, steps=3, **options).compile(program_on(engine), rows)


def numbers_in(found: Any) -> list[float]:
    steps = found.detailed_results.predictors[0].steps
    candidates = [each for step in steps for each in step.candidates]
    told = [number for each in candidates for number in (each.gradient, each.forecast) if number is not None]
    chosen = [row.cross_entropy for step in steps for row in step.chosen.rows]
    return [*told, *chosen, *(each for step in steps for each in step.chosen.objective)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_a_search_with_acceptable_answers_finds_better_instructions_and_stays_finite(variant: str) -> None:
    rows = [row.copy(answer=[f"{row.answer} it", row.answer]) for row in planted_rows(8)]
    better = compiled(ScriptedEngine(obedient_script), rows, variant=variant)
    numbers = numbers_in(better)
    assert numbers and all(map(math.isfinite, numbers))
    assert better.score >= better.detailed_results.predictors[0].validation[TEXTS[0]]
    assert {row.answer for row in better.detailed_results.predictors[0].seed.rows} <= {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_a_search_on_lists_of_one_answer_takes_the_same_steps_bit_for_bit(variant: str) -> None:
    plain = planted_rows(8)
    listed = [row.copy(answer=[row.answer, row.answer]) for row in plain]
    found, same = (compiled(planted_engine(), rows, variant=variant) for rows in (plain, listed))
    assert bits(same.detailed_results.predictors) == bits(found.detailed_results.predictors)


@pytest.mark.slow
def test_an_interrupted_search_with_acceptable_answers_goes_on_with_the_same_ones(tmp_path: Path) -> None:
    rows = [row.copy(answer=["no", "yes", "of it"]) for row in planted_rows(8)]
    whole = compiled(planted_engine(), rows, log_dir=tmp_path / "whole")
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "journal.jsonl").write_text("".join(lines[:3]))  # header, start, one step
    resumed = compiled(planted_engine(), rows, log_dir=tmp_path / "cut")
    assert bits(resumed.detailed_results.predictors) == bits(whole.detailed_results.predictors)
    assert any(row.answer for row in whole.detailed_results.predictors[0].seed.rows)


ADAPTERS: list[Any] = [
    (dspy.ChatAdapter(), lambda answer: chat_answer(reasoning="I look.", answer=answer)),
    (dspy.JSONAdapter(), lambda answer: json.dumps({"reasoning": "I look.", "answer": answer})),
    (dspy.XMLAdapter(), lambda answer: f"<reasoning>\nI look.\n</reasoning>\n\n<answer>\n{answer}\n</answer>"),
]


@pytest.mark.parametrize(("adapter", "write"), ADAPTERS, ids=["chat", "json", "xml"])
def test_every_adapter_writes_every_acceptable_answer(adapter: Any, write: Any) -> None:
    engine = ScriptedEngine(lambda prompt: write("yes"))
    rows = [row.copy(answer=['a "no" < b', "yes", "of it"]) for row in planted_rows(8)]
    with dspy.context(adapter=adapter):
        better = optimizer(metric=any_match, steps=1).compile(program_on(engine), rows)
    assert all(map(math.isfinite, numbers_in(better)))
    assert [row.error for row in better.detailed_results.predictors[0].seed.rows] == [None] * 4


@pytest.mark.slow
def test_on_the_pocket_model_a_list_of_answers_is_searched() -> None:
    rows = [
        dspy.Example(question=f"not ( {a} ) and {b} is", answer=["Ann Lee", str(not a and b), "A. Lee"])
        for a in (True, False)
        for b in (True, False)
    ]
    rows = [row.with_inputs("question") for row in rows * 2]
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", "Answer the question."))
    program.set_lm(local_lm("pocket", max_tokens=60))
    search = GReaTerTeleprompter(metric=any_match, auto=None, steps=2, train_rows=4, validation_rows=4, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*validation rows are also training rows")
        better = search.compile(program, rows)
    found = better.detailed_results.predictors[0]
    assert all(map(math.isfinite, numbers_in(better)))
    assert {row.answer for row in found.seed.rows} == {1}  # the other two are no answers to such questions


# --- gaps and values that do not fit, from end to end ---


@pytest.mark.slow
def test_none_is_trained_towards_where_it_is_a_value() -> None:
    signature = dspy.Signature("question -> reasoning, day: str | None", TEXTS[0])
    rows = [
        dspy.Example(question=row.question, day=None if n % 2 else "yes").with_inputs("question")
        for n, row in enumerate(planted_rows(8))
    ]

    def script(prompt: str) -> str:
        return json.dumps({"reasoning": "I look.", "day": "yes" if "apples" in value_in(prompt) else None})

    program = dspy.Predict(signature)
    program.set_lm(local_lm(ScriptedEngine(script), cache=False, max_tokens=64))
    search = optimizer(metric=lambda row, found, trace=None: row.day == found.day, steps=1)
    with dspy.context(adapter=dspy.JSONAdapter()):
        better = search.compile(program, rows)
    assert all(map(math.isfinite, numbers_in(better)))
    chat = dspy.Predict(signature)
    chat.set_lm(local_lm(ScriptedEngine(lambda prompt: chat_answer(reasoning="So.", day="None")), cache=False))
    text = "ChatAdapter writes the gold value None of `day` .* reads that as 'None'"
    with pytest.warns(UserWarning, match=text) as told:
        search.compile(chat, rows)
    assert told[0].filename == __file__


@pytest.mark.parametrize("gap", [None, math.nan, pd.NA, pd.NaT, np.float64("nan"), " ", [], [None]])
def test_gaps_are_refused_before_anything_is_generated(gap: Any) -> None:
    engine = ScriptedEngine(obedient_script)
    rows = rows_with("yes", gap, "yes", gap)
    with pytest.raises(
        DataError, match="Rows 1, 3 of the trainset have no gold value for `answer`, which predictor `pre"
    ):
        compiled(engine, rows)
    with pytest.raises(DataError, match="Row 1 of the valset has no gold value for `answer`"):
        optimizer(metric=any_match).compile(program_on(engine), planted_rows(4), valset=rows[:2])
    assert engine.batches == []


def test_gaps_on_every_row_leave_the_predictor_to_the_metric() -> None:
    engine = ScriptedEngine(obedient_script)
    rows = [row.copy(answer=math.nan, label=row.answer) for row in planted_rows(8)]
    search = optimizer(metric=lambda row, found, trace=None: row.label == found.answer, steps=1)
    assert search.compile(program_on(engine), rows).detailed_results.predictors[0].field is None


class Fussy(dspy.ChatAdapter):
    """Cannot write one of the answers."""

    def format_assistant_message_content(self, signature: Any, outputs: Any, missing_field_message: Any = None) -> str:
        if outputs.get("answer") == "no":
            raise OverflowError("no room")
        return super().format_assistant_message_content(signature, outputs, missing_field_message)


def test_an_answer_that_cannot_be_written_is_refused_before_anything_is_generated() -> None:
    engine = ScriptedEngine(obedient_script)
    rows = rows_with("yes", ["yes", "no"], "yes", "yes")
    text = "Row 1 of the trainset has a gold value .* `answer` of predictor `predict` .*Fussy cannot write 'no' in a "
    with dspy.context(adapter=Fussy()), pytest.raises(DataError, match=text + "field of type str: no room"):
        optimizer(metric=any_match).compile(program_on(engine), rows, valset=planted_rows(8)[6:])
    with pytest.raises(DataError, match="Row 2 .*does not fit its type str: an acceptable answer is a text, and not"):
        compiled(engine, rows_with("yes", "no", [["yes"], "no"], "no"))
    assert engine.batches == []
