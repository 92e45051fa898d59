"""The task loss of an instruction: reasoning of its own, exact losses, and what is asked only once."""

from __future__ import annotations

import datetime
import enum
import math
import random
from typing import Any, Literal

import dspy
import pydantic
import pytest
from scripted_engine import (
    SEED,
    ScriptedEngine,
    chat_answer,
    exact_match,
    obedient_script,
    planted_engine,
    planted_rows,
    program_on,
    value_in,
)
from scripted_text import text_lm

from dspy_greater import local_lm
from dspy_greater.errors import ProgramError
from dspy_greater.metric import RowMetric
from dspy_greater.model.plain import PlainModel
from dspy_greater.objective.evaluator import Evaluator, Instruction, Objective
from dspy_greater.objective.loss import losses
from dspy_greater.objective.score import DEFAULT_CRITERION, PAPER_CRITERION, Criterion
from dspy_greater.objective.sequences import headers, openings, partition, split_completion
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.rollout import plain
from dspy_greater.prompt.layout import Layout
from dspy_greater.settings import Settings

ROWS = planted_rows(4)


def evaluator_of(
    program: Any,
    rows: Any = ROWS,
    *,
    metric: Any = exact_match,
    field: str | None = "answer",
    engine: Any = None,
    settings: Settings | None = None,
    criterion: Criterion = DEFAULT_CRITERION,
    extractor: str | None = None,
) -> Evaluator:
    [predictor] = predictors_of(program)
    return Evaluator(
        Objective(
            program=program, predictor=predictor, field=field, rows=rows, metric=RowMetric(metric), extractor=extractor
        ),
        engine=engine or predictor.lm.engine.engine,
        settings=settings or Settings(),
        criterion=criterion,
    )


def instruction(evaluator: Evaluator, text: str) -> Instruction:
    return Instruction(evaluator.layout.edits.instruction_ids(text), text)


def seed_of(evaluator: Evaluator) -> Evaluation:
    [found] = evaluator.evaluate([evaluator.seed()])
    return found


def test_an_evaluation_is_the_metric_and_the_exact_loss_of_the_models_own_reasoning() -> None:
    evaluator = evaluator_of(program_on(planted_engine()))
    found = seed_of(evaluator)
    assert (found.instruction, found.score) == (SEED, 0.0)
    assert [row.row for row in found.rows] == [0, 1, 2, 3]
    assert [row.inputs for row in found.rows] == [dict(row.inputs()) for row in ROWS]
    assert {row.written["reasoning"] for row in found.rows} == {"read it quickly"}
    plainly = losses(PlainModel(evaluator.engine), evaluator.supervised(found), answer_temperature=0.2)
    assert [row.cross_entropy for row in found.rows] == pytest.approx(plainly.cross_entropy)
    assert found.cross_entropy == pytest.approx(sum(plainly.cross_entropy) / 4)
    assert found.fluency_nll == pytest.approx(sum(plainly.fluency_nll) / 4)
    uncertainty = sum(1.0 - math.exp(-loss) for loss in plainly.cross_entropy) / 4
    assert found.objective == pytest.approx((1.0 + 0.3 * uncertainty + 0.02 * found.fluency_nll, found.cross_entropy))
    paper = evaluator_of(program_on(planted_engine()), criterion=PAPER_CRITERION)
    assert seed_of(paper).objective == pytest.approx((1.0 + 0.02 * found.fluency_nll, found.cross_entropy))


def test_new_instructions_are_generated_in_one_batch_and_known_ones_not_again() -> None:
    engine = ScriptedEngine(obedient_script)
    evaluator = evaluator_of(program_on(engine))
    texts = [instruction(evaluator, text) for text in ("Say it.", "Please count.", "Say it.")]
    first = evaluator.evaluate(texts)
    assert engine.batches == [8]
    assert first[0] is first[2] and [each.score for each in first] == [0.0, 1.0, 0.0]
    spent = engine.counters
    assert evaluator.evaluate(texts[:2]) == first[:2]
    assert engine.counters == spent
    assert evaluator.evaluate([]) == []


def test_what_an_interrupted_run_had_evaluated_is_not_evaluated_again() -> None:
    engine = ScriptedEngine(obedient_script)
    first = seed_of(evaluator_of(program_on(engine)))
    again = evaluator_of(program_on(engine))
    again.recall([first])
    assert seed_of(again) is first
    assert engine.batches == [4]


def test_the_same_instruction_gets_the_same_numbers_alone_and_among_others() -> None:
    texts = ["Say it.", "Please count.", "Read it now."]
    together = evaluator_of(program_on(planted_engine()))
    for text, found in zip(texts, together.evaluate([instruction(together, each) for each in texts]), strict=True):
        alone = evaluator_of(program_on(planted_engine()))
        [single] = alone.evaluate([instruction(alone, text)])
        assert single.score == found.score
        assert single.objective == pytest.approx(found.objective, rel=1e-5)


def test_a_row_that_did_not_parse_keeps_what_was_written_as_its_reasoning() -> None:
    evaluator = evaluator_of(program_on(ScriptedEngine(lambda prompt: "It must be yes.")))
    found = seed_of(evaluator)
    assert all(row.written == {"reasoning": "It must be yes."} for row in found.rows)
    assert all(row.error and row.error.startswith("AdapterParseError") for row in found.rows)
    assert found.score == 0.0 and all(math.isfinite(row.cross_entropy) for row in found.rows)


@pytest.mark.parametrize("criterion", [DEFAULT_CRITERION, PAPER_CRITERION])
def test_where_no_answer_was_found_the_loss_is_of_its_header_too_but_not_in_the_papers_variant(
    criterion: Criterion,
) -> None:
    wordless = ROWS[0].question

    def script(prompt: str) -> str:
        return "It must be yes." if value_in(prompt) == wordless else chat_answer(reasoning="I look.", answer="yes")

    evaluator = evaluator_of(program_on(ScriptedEngine(script)), criterion=criterion)
    found = seed_of(evaluator)
    assert [row.unparsed for row in found.rows] == [True, False, False, False]
    rows = evaluator.supervised(found)
    gold = [found.answer.stop - found.answer.start for found in rows]
    assert (gold[0] > gold[1] + 5) == (criterion == DEFAULT_CRITERION) and gold[1] == gold[2]
    plainly = losses(PlainModel(evaluator.engine), rows)
    assert [row.cross_entropy for row in found.rows] == pytest.approx(plainly.cross_entropy, rel=1e-4)
    replayed = {each.example: each.sequences[0].answer for each in evaluator.replay(found, random.Random(0), 24)}
    assert replayed == dict(enumerate(each.answer for each in rows))


@pytest.mark.parametrize(
    "fields,completion",
    [
        ("question -> reasoning, answer: Literal['yes', 'no']", chat_answer(reasoning="I look.", answer="maybe")),
        ("question -> reasoning, answer, sure: bool", chat_answer(reasoning="I look.", answer="yes")),
        ("question -> reasoning, answer, sure: bool", "[[ ## reasoning ## ]]\nI look.\n\n[[ ## answer ## ]]\n"),
    ],
)
def test_an_answer_that_was_found_but_cannot_be_used_is_a_mistake_and_no_more(fields: str, completion: str) -> None:
    program = dspy.Predict(dspy.Signature(fields, SEED))
    program.set_lm(local_lm(ScriptedEngine(lambda prompt: completion), cache=False))
    evaluator = evaluator_of(program)
    found = seed_of(evaluator)
    assert all(row.error and "AdapterParseError" in row.error for row in found.rows)
    assert not any(row.unparsed for row in found.rows)
    assert {row.written["reasoning"] for row in found.rows} == {"I look."}
    assert {each.answer.stop - each.answer.start for each in evaluator.supervised(found)} == {1}


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
@pytest.mark.parametrize("fields", ["question -> reasoning, answer", "question -> answer, why"])
def test_the_header_of_a_field_is_found_in_what_the_adapter_writes(adapter: Any, fields: str) -> None:
    program = dspy.Predict(dspy.Signature(fields, SEED))
    program.set_lm(local_lm(ScriptedEngine(lambda prompt: ""), cache=False))
    with dspy.context(adapter=adapter):
        [predictor] = predictors_of(program)
    names = [name.strip() for name in fields.partition("->")[2].split(",")]
    content = adapter.format_assistant_message_content(predictor.signature, dict.fromkeys(names, "the value"))
    before, found, _ = partition(content, headers(predictor, "answer"))
    assert found and before.count("the value") == names.index("answer")
    assert partition("The answer is yes.", headers(predictor, "answer")) == ("The answer is yes.", "", "")


def test_where_nobody_knows_the_answer_none_is_missing() -> None:
    program = program_on(ScriptedEngine(lambda prompt: "It must be yes."))
    without_gold = evaluator_of(program, field=None)
    assert not any(row.unparsed for row in seed_of(without_gold).rows)


def test_an_extractor_asks_for_the_answer_alone() -> None:
    program = program_on(ScriptedEngine(lambda prompt: "It must be yes."))
    evaluator = evaluator_of(program, extractor=" So the answer is ")
    found = seed_of(evaluator)
    assert all(row.unparsed for row in found.rows)
    assert {each.answer.stop - each.answer.start for each in evaluator.supervised(found)} == {1}


def test_empty_reasoning_still_has_a_loss() -> None:
    evaluator = evaluator_of(program_on(ScriptedEngine(lambda prompt: chat_answer(reasoning="", answer="yes"))))
    found = seed_of(evaluator)
    assert found.rows[0].written == {"reasoning": ""}
    assert math.isfinite(found.cross_entropy)


def test_a_row_on_which_the_predictor_was_not_called_counts_as_a_mistake_without_a_loss() -> None:
    class Choosy(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(ScriptedEngine(lambda prompt: chat_answer(reasoning="I look.", answer="yes")))

        def forward(self, question: str) -> Any:
            return self.step(question=question) if "one" in question else dspy.Prediction(answer="yes")

    evaluator = evaluator_of(Choosy())
    found = seed_of(evaluator)
    assert [row.error for row in found.rows] == [None, None, *["predictor `step.predict` was not called"] * 2]
    assert [math.isnan(row.cross_entropy) for row in found.rows] == [False, False, True, True]
    assert len(evaluator.supervised(found)) == len(evaluator.proposal_contexts(found, 0)) == 2
    assert math.isfinite(found.objective[0])


def test_of_several_calls_of_a_predictor_the_last_one_counts() -> None:
    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(ScriptedEngine(lambda prompt: chat_answer(reasoning=value_in(prompt), answer="yes")))

        def forward(self, question: str) -> Any:
            self.step(question="first")
            return self.step(question="second " + question)

    found = seed_of(evaluator_of(Twice()))
    assert [row.inputs["question"] for row in found.rows] == ["second " + row.question for row in ROWS]


def test_a_proposal_context_is_the_input_and_then_the_instruction_up_to_the_position() -> None:
    evaluator = evaluator_of(program_on(planted_engine()))
    found = seed_of(evaluator)
    contexts = evaluator.proposal_contexts(found, 2)
    assert {context[-2:] for context in contexts} == {found.token_ids[:2]}
    texts = [evaluator.engine.tokenizer.decode(context) for context in contexts]
    assert all(text.endswith("Please say") for text in texts)
    assert all(row.question in text for row, text in zip(ROWS, texts, strict=True))


# ---- typed fields


class Colour(enum.Enum):
    RED = "red"


class Fruit(pydantic.BaseModel):
    name: str
    ripe: bool = True


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("two apples", str),
        (3, int),
        (2.5, float),
        (True, bool),
        (None, str),
        (["a", "b"], str),
        (["a", "b"], list[str]),
        (("a", "b"), str),
        ({"a": 1, 2: [3]}, dict),
        (Colour.RED, Colour),
        (Fruit(name="pear"), Fruit),
        ([Fruit(name="pear")], list[Fruit]),
        (datetime.date(2024, 12, 12), datetime.date),
        (datetime.datetime(2024, 12, 12, 3, 4), datetime.datetime),
    ],
)
@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
def test_an_input_of_any_type_is_scored_as_dspy_sends_it(value: Any, kind: Any, adapter: Any) -> None:
    signature = dspy.Signature({"thing": (kind, dspy.InputField()), "answer": (str, dspy.OutputField())}, SEED)
    layout = Layout(planted_engine().tokenizer, adapter, signature)
    assert layout.prompt(SEED, {"thing": plain(value)}) == layout.prompt(SEED, {"thing": value})


@pytest.mark.parametrize(
    ("kind", "gold", "says"),
    [
        (Literal["yes", "no"], "yes", "yes"),
        (int, 12, "12"),
        (bool, True, "True"),
        (str, "yes", "yes"),
        (float, 0.5, "0.5"),
        (list[str], ["a", "b"], '["a", "b"]'),
    ],
)
def test_gold_values_of_any_type_are_scored_and_matched(kind: Any, gold: Any, says: str) -> None:
    engine = ScriptedEngine(lambda prompt: chat_answer(reasoning="I look.", answer=says))
    fields = {"question": (str, dspy.InputField()), "answer": (kind, dspy.OutputField())}
    program = dspy.ChainOfThought(dspy.Signature(fields, SEED))
    program.set_lm(local_lm(engine, cache=False))
    rows = [dspy.Example(question="one", answer=gold).with_inputs("question")]
    evaluator = evaluator_of(program, rows)
    found = seed_of(evaluator)
    assert (found.score, found.rows[0].error) == (1.0, None)
    [supervised] = evaluator.supervised(found)
    answer = supervised.token_ids[supervised.answer.start : supervised.answer.stop]
    assert engine.tokenizer.decode(answer).strip() == says


# --- what the model wrote outside its fields ---


@pytest.mark.parametrize(
    ("adapter", "body"),
    [
        (dspy.ChatAdapter(), "[[ ## reasoning ## ]]\nBecause.\n\n[[ ## answer ## ]]\n4"),
        (dspy.JSONAdapter(), '{"reasoning": "Because.", "answer": "4"}'),
        (dspy.XMLAdapter(), "<reasoning>\nBecause.\n</reasoning>\n<answer>\n4\n</answer>"),
    ],
)
def test_a_native_thinking_block_is_told_from_the_fields_after_it(adapter: Any, body: str) -> None:
    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(adapter=adapter):
        (predictor,) = predictors_of(program)
    preamble, rest = split_completion(openings(predictor), "<think>\nTwo and two.\n</think>\n" + body)
    assert preamble == "<think>\nTwo and two.\n</think>\n"
    assert "Because." in rest
    for text in ("no header at all", "The matrix [[1, 2], [3, 4]] has rows < columns."):
        assert split_completion(openings(predictor), text) == ("", text)
    assert split_completion(openings(predictor), body)[0] == ""


def test_a_native_thinking_block_is_part_of_the_reasoning_that_is_differentiated_through() -> None:
    thought = "<think>count them twice</think>\n"
    engine = ScriptedEngine(lambda prompt: thought + chat_answer(reasoning="Because.", answer="four"))
    evaluator = evaluator_of(program_on(engine))
    found = seed_of(evaluator)
    assert {row.preamble for row in found.rows} == {thought}
    for row in evaluator.supervised(found):
        text = engine.tokenizer.decode(list(row.token_ids[row.reasoning.start : row.reasoning.stop]))
        assert text.startswith("<think>count them twice</think>") and "Because." in text


def test_a_reasoning_that_fills_the_context_is_cut_and_still_scored() -> None:
    engine = ScriptedEngine(lambda prompt: chat_answer(reasoning="and so on " * 2000, answer="four"))
    limit = engine.context_length
    assert limit is not None
    evaluator = evaluator_of(program_on(engine))
    found = seed_of(evaluator)
    supervised = evaluator.supervised(found)
    assert len(supervised) == len(found.rows)
    assert all(limit - 200 < len(row.token_ids) <= limit for row in supervised)
    assert all(math.isfinite(row.cross_entropy) for row in found.rows)


def test_an_unparsed_answer_is_reasoning_without_the_header_it_began_with() -> None:
    engine = ScriptedEngine(lambda prompt: "[[ ## reasoning ## ]]\nI was cut off")
    evaluator = evaluator_of(program_on(engine))
    found = seed_of(evaluator)
    assert {row.written["reasoning"] for row in found.rows} == {"I was cut off"}
    assert all(row.error is not None for row in found.rows)


def test_a_row_that_lacks_its_first_header_is_scored_by_its_reasoning_and_not_behind_its_own_answer() -> None:
    reasoned = "I count [[ the apples ]]. It is no."
    engine = ScriptedEngine(lambda prompt: f"{reasoned}\n\n[[ ## answer ## ]]\nno\n\n[[ ## completed ## ]]")
    evaluator = evaluator_of(program_on(engine))
    found = seed_of(evaluator)
    assert {(row.written["reasoning"], row.preamble) for row in found.rows} == {(reasoned, "")}
    for each, row in zip(evaluator.supervised(found), ROWS, strict=True):
        scored = engine.tokenizer.decode(list(each.token_ids[each.reasoning.start :]), skip_special_tokens=False)
        assert scored == f"[[ ## reasoning ## ]]\n{reasoned}\n\n[[ ## answer ## ]]\n{row.answer}"


def test_where_a_predictor_without_gold_values_writes_nothing_the_row_is_a_mistake_and_no_error() -> None:
    rows = [dspy.Example(question=row.question, label=row.answer).with_inputs("question") for row in ROWS]
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    engine = ScriptedEngine(lambda prompt: "" if "two" in value_in(prompt) else obedient_script(prompt))
    program.set_lm(local_lm(engine, cache=False, stop=["END"]))
    evaluator = evaluator_of(program, rows, field=None, metric=lambda example, found, trace=None: found.answer == "yes")
    found = seed_of(evaluator)
    assert [row.error is None for row in found.rows] == ["two" not in row.question for row in rows]
    assert math.isfinite(found.fluency_nll) and math.isfinite(found.objective[0])


# --- what it costs ---


def test_every_run_and_every_token_of_the_engine_is_counted() -> None:
    engine = ScriptedEngine(obedient_script)
    evaluator = evaluator_of(program_on(engine))
    before = evaluator.spent()
    evaluator.evaluate([instruction(evaluator, text) for text in ("Say it.", "Please count.")])
    spent = evaluator.spent(before)
    assert spent["runs"] == 8 and spent["generated_tokens"] == engine.counters.generated_tokens > 0


@pytest.mark.parametrize("tells", [True, False])
def test_what_a_server_wrote_counts_as_it_says_or_as_the_tokenizer_of_the_weights_splits_it(
    tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tells:
        monkeypatch.setattr("dspy_greater.program.tracing.usage_of", lambda lm, messages: None)
    answer = chat_answer(reasoning="I look.", answer="never")
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(text_lm(lambda asked: answer))
    engine = ScriptedEngine(obedient_script)
    evaluator = evaluator_of(program, engine=engine, settings=Settings(num_threads=6))
    seed_of(evaluator)
    written = engine.tokenizer.encode(answer, add_special_tokens=False)
    assert evaluator.spent()["generated_tokens"] == 4 * (2 if tells else len(written))  # the script's server says 2
    assert evaluator.spent()["prompt_tokens"] == (4 * 10 if tells else 0)
    assert engine.counters.generated_tokens == 0 and evaluator.spent()["runs"] == 4


# --- candidates that bring nothing ---


def test_a_language_model_that_cannot_be_called_for_any_row_is_reported() -> None:
    long = [dspy.Example(question="maybe " * 2000, answer="yes").with_inputs("question")] * 4
    evaluator = evaluator_of(program_on(ScriptedEngine(obedient_script)), long)
    with pytest.raises(ProgramError, match="could not be called on any of the 4 rows"):
        evaluator.evaluate([instruction(evaluator, "Say it.")])
