"""The task loss of an instruction: reasoning of its own, exact losses, and what is asked only once."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import random
from typing import Any, Literal, TypeVar

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
from dspy_greater.model.teacher_forcing import teacher_forced_losses
from dspy_greater.objective.evaluator import Evaluator, Instruction
from dspy_greater.objective.sequences import headers, openings, partition, split_completion
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.rollout import Rollout, plain
from dspy_greater.prompt.layout import Layout
from dspy_greater.search.select import evaluation, select
from dspy_greater.search.state import advance, begin
from dspy_greater.settings import Settings

ROWS = planted_rows(4)
EvaluatorT = TypeVar("EvaluatorT", bound=Evaluator)


def objective_of(
    program: Any,
    rows: Any = ROWS,
    *,
    metric: Any = exact_match,
    field: str | None = "answer",
    settings: Settings | None = None,
    extractor: str | None = None,
    kind: type[EvaluatorT] = Evaluator,
) -> EvaluatorT:
    [site] = predictors_of(program)
    return kind(
        program=program,
        site=site,
        field=field,
        rows=rows,
        metric=RowMetric(metric),
        engine=site.lm.engine.engine,
        settings=settings or Settings(),
        extractor=extractor,
    )


def instruction(objective: Evaluator, text: str) -> Instruction:
    return Instruction(objective.layout.instruction_ids(text), text)


def seed_of(objective: Evaluator) -> Evaluation:
    [found] = objective.evaluate([objective.seed()])
    return found


def test_an_evaluation_is_the_metric_and_the_exact_loss_of_the_models_own_reasoning() -> None:
    objective = objective_of(program_on(planted_engine()))
    found = seed_of(objective)
    assert (found.instruction, found.score) == (SEED, 0.0)
    assert [row.row for row in found.rows] == [0, 1, 2, 3]
    assert [row.inputs for row in found.rows] == [dict(row.inputs()) for row in ROWS]
    assert {row.written["reasoning"] for row in found.rows} == {"read it quickly"}
    losses = teacher_forced_losses(objective.engine, objective.supervised(found), answer_temperature=0.2)
    assert [row.cross_entropy for row in found.rows] == pytest.approx(losses.cross_entropy)
    assert found.cross_entropy == pytest.approx(sum(losses.cross_entropy) / 4)
    assert found.fluency_nll == pytest.approx(sum(losses.fluency_nll) / 4)
    doubt = sum(1.0 - math.exp(-loss) for loss in losses.cross_entropy) / 4
    assert found.objective == pytest.approx((1.0 + 0.3 * doubt + 0.02 * found.fluency_nll, found.cross_entropy))
    paper = objective_of(program_on(planted_engine()), settings=Settings(variant="paper"))
    assert seed_of(paper).objective == pytest.approx((1.0 + 0.02 * found.fluency_nll, found.cross_entropy))


def test_new_instructions_are_generated_in_one_batch_and_known_ones_not_again() -> None:
    engine = ScriptedEngine(obedient_script)
    objective = objective_of(program_on(engine))
    texts = [instruction(objective, text) for text in ("Say it.", "Please count.", "Say it.")]
    first = objective.evaluate(texts)
    assert engine.batches == [8]
    assert first[0] is first[2] and [each.score for each in first] == [0.0, 1.0, 0.0]
    spent = engine.counters
    assert objective.evaluate(texts[:2]) == first[:2]
    assert engine.counters == spent
    assert objective.evaluate([]) == []


def test_what_an_interrupted_run_had_evaluated_is_not_evaluated_again() -> None:
    engine = ScriptedEngine(obedient_script)
    first = seed_of(objective_of(program_on(engine)))
    again = objective_of(program_on(engine))
    again.recall([first])
    assert seed_of(again) is first
    assert engine.batches == [4]


def test_the_same_instruction_gets_the_same_numbers_alone_and_among_others() -> None:
    texts = ["Say it.", "Please count.", "Read it now."]
    together = objective_of(program_on(planted_engine()))
    for text, found in zip(texts, together.evaluate([instruction(together, each) for each in texts]), strict=True):
        alone = objective_of(program_on(planted_engine()))
        [single] = alone.evaluate([instruction(alone, text)])
        assert single.score == found.score
        assert single.objective == pytest.approx(found.objective, rel=1e-5)


def test_a_row_that_did_not_parse_keeps_what_was_written_as_its_reasoning() -> None:
    objective = objective_of(program_on(ScriptedEngine(lambda prompt: "It must be yes.")))
    found = seed_of(objective)
    assert all(row.written == {"reasoning": "It must be yes."} for row in found.rows)
    assert all(row.error and row.error.startswith("AdapterParseError") for row in found.rows)
    assert found.score == 0.0 and all(math.isfinite(row.cross_entropy) for row in found.rows)


@pytest.mark.parametrize("variant", ["whole", "paper"])
def test_where_no_answer_was_found_the_loss_is_of_its_header_too_but_not_in_the_papers_variant(variant: Any) -> None:
    wordless = ROWS[0].question

    def script(prompt: str) -> str:
        return "It must be yes." if value_in(prompt) == wordless else chat_answer(reasoning="I look.", answer="yes")

    objective = objective_of(program_on(ScriptedEngine(script)), settings=Settings(variant=variant))
    found = seed_of(objective)
    assert [row.unparsed for row in found.rows] == [True, False, False, False]
    rows = objective.supervised(found)
    gold = [found.answer.stop - found.answer.start for found in rows]
    assert (gold[0] > gold[1] + 5) == (variant == "whole") and gold[1] == gold[2]
    losses = teacher_forced_losses(objective.engine, rows)
    assert [row.cross_entropy for row in found.rows] == pytest.approx(losses.cross_entropy, rel=1e-4)
    replayed = {each.example: each.sequences[0].answer for each in objective.replay(found, random.Random(0), 24)}
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
    objective = objective_of(program)
    found = seed_of(objective)
    assert all(row.error and "AdapterParseError" in row.error for row in found.rows)
    assert not any(row.unparsed for row in found.rows)
    assert {row.written["reasoning"] for row in found.rows} == {"I look."}
    assert {each.answer.stop - each.answer.start for each in objective.supervised(found)} == {1}


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
@pytest.mark.parametrize("fields", ["question -> reasoning, answer", "question -> answer, why"])
def test_the_header_of_a_field_is_found_in_what_the_adapter_writes(adapter: Any, fields: str) -> None:
    program = dspy.Predict(dspy.Signature(fields, SEED))
    program.set_lm(local_lm(ScriptedEngine(lambda prompt: ""), cache=False))
    with dspy.context(adapter=adapter):
        [site] = predictors_of(program)
    names = [name.strip() for name in fields.partition("->")[2].split(",")]
    content = adapter.format_assistant_message_content(site.signature, dict.fromkeys(names, "the value"))
    before, found, _ = partition(content, headers(site, "answer"))
    assert found and before.count("the value") == names.index("answer")
    assert partition("The answer is yes.", headers(site, "answer")) == ("The answer is yes.", "", "")


def test_where_losses_decide_or_nobody_knows_the_answer_no_header_counts() -> None:
    program = program_on(ScriptedEngine(lambda prompt: "It must be yes."))
    by_loss = objective_of(program, settings=Settings(acceptance="loss"))
    assert {each.answer.stop - each.answer.start for each in by_loss.supervised(seed_of(by_loss))} == {1}
    without_gold = objective_of(program, field=None)
    assert not any(row.unparsed for row in seed_of(without_gold).rows)


def test_an_extractor_asks_for_the_answer_alone() -> None:
    program = program_on(ScriptedEngine(lambda prompt: "It must be yes."))
    objective = objective_of(program, extractor=" So the answer is ")
    found = seed_of(objective)
    assert all(row.unparsed for row in found.rows)
    assert {each.answer.stop - each.answer.start for each in objective.supervised(found)} == {1}


def test_empty_reasoning_still_has_a_loss() -> None:
    objective = objective_of(program_on(ScriptedEngine(lambda prompt: chat_answer(reasoning="", answer="yes"))))
    found = seed_of(objective)
    assert found.rows[0].written == {"reasoning": ""}
    assert math.isfinite(found.cross_entropy)


def test_a_row_on_which_the_predictor_was_not_called_counts_as_a_mistake_without_a_loss() -> None:
    class Choosy(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(ScriptedEngine(lambda prompt: chat_answer(reasoning="I look.", answer="yes")))

        def forward(self, question: str) -> Any:
            return self.step(question=question) if "one" in question else dspy.Prediction(answer="yes")

    objective = objective_of(Choosy())
    found = seed_of(objective)
    assert [row.error for row in found.rows] == [None, None, *["predictor `step.predict` was not called"] * 2]
    assert [math.isnan(row.cross_entropy) for row in found.rows] == [False, False, True, True]
    assert len(objective.supervised(found)) == len(objective.proposal_contexts(found, 0)) == 2
    assert math.isfinite(found.objective[0])


def test_of_several_calls_of_a_predictor_the_last_one_counts() -> None:
    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(ScriptedEngine(lambda prompt: chat_answer(reasoning=value_in(prompt), answer="yes")))

        def forward(self, question: str) -> Any:
            self.step(question="first")
            return self.step(question="second " + question)

    found = seed_of(objective_of(Twice()))
    assert [row.inputs["question"] for row in found.rows] == ["second " + row.question for row in ROWS]


def test_a_proposal_context_is_the_input_and_then_the_instruction_up_to_the_position() -> None:
    objective = objective_of(program_on(planted_engine()))
    found = seed_of(objective)
    contexts = objective.proposal_contexts(found, 2)
    assert {context[-2:] for context in contexts} == {found.token_ids[:2]}
    texts = [objective.engine.tokenizer.decode(context) for context in contexts]
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
    objective = objective_of(program, rows)
    found = seed_of(objective)
    assert (found.score, found.rows[0].error) == (1.0, None)
    [supervised] = objective.supervised(found)
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
    (site,) = predictors_of(program, adapter=adapter)
    preamble, rest = split_completion(openings(site), "<think>\nTwo and two.\n</think>\n" + body)
    assert preamble == "<think>\nTwo and two.\n</think>\n"
    assert "Because." in rest
    assert split_completion(openings(site), "no header at all") == ("", "no header at all")
    assert split_completion(openings(site), body)[0] == ""


def test_a_native_thinking_block_is_part_of_the_reasoning_that_is_differentiated_through() -> None:
    thought = "<think>count them twice</think>\n"
    engine = ScriptedEngine(lambda prompt: thought + chat_answer(reasoning="Because.", answer="four"))
    objective = objective_of(program_on(engine))
    found = seed_of(objective)
    assert {row.preamble for row in found.rows} == {thought}
    for row in objective.supervised(found):
        text = engine.tokenizer.decode(list(row.token_ids[row.reasoning.start : row.reasoning.stop]))
        assert text.startswith("<think>count them twice</think>") and "Because." in text


def test_a_reasoning_that_fills_the_context_is_cut_and_still_scored() -> None:
    engine = ScriptedEngine(lambda prompt: chat_answer(reasoning="and so on " * 2000, answer="four"))
    limit = engine.context_length
    assert limit is not None
    objective = objective_of(program_on(engine))
    found = seed_of(objective)
    supervised = objective.supervised(found)
    assert len(supervised) == len(found.rows)
    assert all(limit - 200 < len(row.token_ids) <= limit for row in supervised)
    assert all(math.isfinite(row.cross_entropy) for row in found.rows)


def test_an_unparsed_answer_is_reasoning_without_the_header_it_began_with() -> None:
    engine = ScriptedEngine(lambda prompt: "[[ ## reasoning ## ]]\nI was cut off")
    objective = objective_of(program_on(engine))
    found = seed_of(objective)
    assert {row.written["reasoning"] for row in found.rows} == {"I was cut off"}
    assert all(row.error is not None for row in found.rows)


# --- giving up ---


class SmallBatches(ScriptedEngine):
    """Decodes few rows at a time, so that there are waves."""

    max_batch_rows = 24


MANY = planted_rows(24)
GOOD, HALF, BAD = "Please count.", "Please add.", "Say it."  # mistakes: none, half of all, all


def racing(metric: Any = exact_match, engine: Any = None, **settings: Any) -> tuple[Evaluator, Any]:
    engine = engine or SmallBatches(obedient_script)
    return objective_of(program_on(engine), MANY, metric=metric, settings=Settings(**settings)), engine


def tried(objective: Evaluator, *texts: str, beat: float | None) -> list[Evaluation]:
    return objective.evaluate([instruction(objective, text) for text in texts], beat=beat)


def test_an_instruction_is_given_up_after_the_wave_that_leaves_it_no_chance() -> None:
    objective, engine = racing()
    good, half, bad = tried(objective, GOOD, HALF, BAD, beat=0.4)
    assert [len(each.rows) for each in (good, half, bad)] == [24, 24, 16]
    assert [each.complete for each in (good, half, bad)] == [True, True, False]
    assert engine.batches == [24, 24, 16]  # 8 rows of each, 8 of each, and 8 of those that are left
    assert [row.row for row in bad.rows] == list(range(16))
    assert all(math.isnan(row.cross_entropy) for row in bad.rows)
    assert bad.objective == (math.inf, math.inf) and bad.score == 0.0
    assert objective.spent()["runs"] == 24 + 24 + 16


def test_a_survivor_gets_the_same_numbers_as_without_waves() -> None:
    with_waves = tried(racing()[0], GOOD, HALF, BAD, beat=0.4)
    at_once = tried(racing()[0], GOOD, HALF, BAD, beat=None)
    assert all(each.complete for each in at_once)
    for one, other in zip(with_waves[:2], at_once[:2], strict=True):
        assert (one.score, one.token_ids) == (other.score, other.token_ids)
        assert one.objective == pytest.approx(other.objective, rel=1e-5)
        assert [row.written for row in one.rows] == [row.written for row in other.rows]


def test_what_was_given_up_is_not_run_again_and_goes_on_with_the_missing_rows_when_it_gets_a_chance() -> None:
    objective, engine = racing()
    [good, early] = tried(objective, GOOD, BAD, beat=0.3)
    assert (len(good.rows), len(early.rows), engine.batches) == (24, 12, [24, 12])  # 12 of each, and 12 of one
    assert tried(objective, BAD, beat=0.3) == tried(objective, BAD, beat=0.1) == [early]
    assert engine.batches == [24, 12]
    [whole] = tried(objective, BAD, beat=None)
    assert engine.batches == [24, 12, 12] and len(set(engine.prompts)) == 48
    assert whole.complete and [row.row for row in whole.rows] == list(range(24))
    [alone] = tried(racing()[0], BAD, beat=None)
    assert whole.objective == pytest.approx(alone.objective, rel=1e-5)
    assert tried(objective, BAD, beat=0.1) == [whole]


def test_an_interrupted_run_goes_on_with_the_rows_that_were_run() -> None:
    [_, early] = tried(racing()[0], GOOD, BAD, beat=0.3)
    objective, engine = racing()
    objective.recall([early])
    assert tried(objective, BAD, beat=0.3) == [early] and engine.batches == []
    [whole] = tried(objective, BAD, beat=2.0)
    assert whole.complete and engine.batches == [12]


def test_an_instruction_that_fits_into_one_batch_is_run_at_once() -> None:
    objective, engine = racing()
    [bad] = tried(objective, BAD, beat=0.0)
    assert bad.complete and engine.batches == [24]  # giving it up half way would save no batch


def test_a_metric_that_gives_more_than_was_said_ends_the_giving_up() -> None:
    def generous(example: Any, prediction: Any, trace: Any = None) -> float:
        late = [row.question for row in MANY].index(example.question) >= 8
        return 3.0 * late if prediction.answer == example.answer else 0.0

    objective, engine = racing(generous)
    good, bad = tried(objective, GOOD, BAD, beat=0.2)
    assert good.complete and bad.complete and good.score == 2.0
    assert sum(engine.batches) == 48
    assert tried(objective, HALF, beat=-1.0)[0].complete  # nor is anything given up later
    declared, engine = racing(generous, best_score=3.0)
    assert [each.complete for each in tried(declared, GOOD, BAD, beat=-1.0)] == [True, False]


def test_a_dead_language_model_is_reported_even_if_all_candidates_are_given_up() -> None:
    long = [dspy.Example(question="maybe " * 2000, answer="yes").with_inputs("question")] * 24
    objective = objective_of(program_on(SmallBatches(obedient_script)), long)
    with pytest.raises(ProgramError, match="could not be called on any of the 24 rows"):
        tried(objective, BAD, beat=0.1)


def test_a_server_is_asked_in_waves_of_two_runs_for_each_thread() -> None:
    answer = chat_answer(reasoning="I look.", answer="never")
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(text_lm(lambda asked: answer))
    [site] = predictors_of(program)
    engine = ScriptedEngine(obedient_script)
    objective = Evaluator(
        program=program,
        site=site,
        field="answer",
        rows=MANY,
        metric=RowMetric(exact_match),
        engine=engine,
        settings=Settings(threads=6),
    )
    [early] = tried(objective, BAD, beat=0.3)
    assert len(early.rows) == len(program.predictors()[0].lm.engine.asked) == 12
    written = engine.tokenizer.encode(answer, add_special_tokens=False)
    assert objective.spent()["generated_tokens"] == 12 * len(written)
    assert engine.counters.generated_tokens == 0


def test_an_instruction_whose_fluency_alone_rules_it_out_is_not_run_at_all() -> None:
    objective, engine = racing()
    [seed] = objective.evaluate([objective.seed()])
    runs = sum(engine.batches)
    [good] = tried(objective, GOOD, beat=0.1)
    assert (good.complete, good.rows, sum(engine.batches)) == (False, (), runs)
    assert 0.02 * 0.99 * good.fluency_nll > 0.1 and math.isnan(good.score)
    assert tried(objective, GOOD, beat=0.1) == [good]
    [whole] = tried(objective, GOOD, beat=1.0)
    assert whole.complete and whole.fluency_nll == pytest.approx(good.fluency_nll, rel=1e-5)
    [alone] = tried(racing()[0], GOOD, beat=None)
    assert whole.objective == pytest.approx(alone.objective, rel=1e-5)
    careless, _ = racing(score_fluency_weight=0.0)
    careless.recall([seed])
    assert tried(careless, GOOD, beat=0.0)[0].complete


def test_no_fluency_is_taken_for_granted_where_the_inputs_come_before_the_instruction() -> None:
    class InputsFirst(dspy.ChatAdapter):
        def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
            system, *others = super().format(signature, demos, inputs)
            return [{**system, "content": f"About {inputs['question']}. {system['content']}"}, *others]

    engine = SmallBatches(obedient_script)
    with dspy.context(adapter=InputsFirst()):
        objective = objective_of(program_on(engine), MANY)
        objective.evaluate([objective.seed()])
        [good] = tried(objective, GOOD, beat=0.1)
    assert good.complete


class Table(Evaluator):
    """An objective whose fluency and cross-entropy are read from a table."""

    table: dict[str, tuple[list[float], float, float]]

    def _fluency(self, instructions: Any) -> dict[str, float]:
        return {each.text: self.table[each.text][1] for each in instructions}

    def _score(self, instructions: Any, drafts: Any) -> None:
        for each, rows in zip(instructions, drafts, strict=True):
            _, fluency, loss = self.table[each.text]
            rows = [dataclasses.replace(row, cross_entropy=loss) for row in rows]
            self._known[each.text] = evaluation(each.token_ids, each.text, rows, fluency, score_fluency_weight=0.02)


def searched(table: Any, steps: Any, *, giving_up: bool) -> tuple[list[Any], int]:
    """What a search over instructions of a table decides, step by step, and how many runs it takes."""
    settings = Settings(finalists=2)
    objective = objective_of(program_on(SmallBatches(obedient_script)), MANY, settings=settings, kind=Table)
    objective.table = table
    known = {text: Instruction((index,), text) for index, text in enumerate(table)}
    [seed] = objective.evaluate([known["0."]])
    state, decided = begin(seed, settings), []
    for longer, candidates in steps:
        current = state.current
        if longer is not None:  # a step that appends goes on from another instruction, even a worse one
            [current] = objective.evaluate([known[longer]])
        edits = [known[text] for text in candidates if text != current.instruction]
        evaluated = objective.evaluate(edits, beat=state.to_beat(current, settings) if giving_up else None)
        chosen = select(current, evaluated).chosen
        state = advance(state, chosen, [current, *evaluated], settings)
        decided.append((chosen, state.best))
    return decided, objective.spent()["runs"]


TEXTS = [f"{index}." for index in range(30)]


def random_table(rng: random.Random) -> dict[str, tuple[list[float], float, float]]:
    """Scores of good and bad instructions, some with all their mistakes first or last; ties are common."""
    table = {}
    for text in TEXTS:
        skill, order = rng.random(), rng.choice([0, 0, 1, -1])
        scores = [rng.choice([1.0, 1.0, 0.5]) if rng.random() < skill else 0.0 for _ in MANY]
        table[text] = (sorted(scores, reverse=order < 0) if order else scores, rng.choice([0.0, 1.0, 4.0]), 0.5)
    return table


def random_walk(rng: random.Random) -> list[tuple[str | None, list[str]]]:
    """Each step: the instruction that it goes on from instead of the current one, if any, and its candidates."""
    return [(rng.choice([None, rng.choice(TEXTS)]), rng.sample(TEXTS, 3)) for _ in range(6)]


@pytest.mark.parametrize("salt", range(30))
def test_giving_up_decides_as_the_twin_that_runs_every_row(salt: int) -> None:
    rng = random.Random(salt)
    table, steps = random_table(rng), random_walk(rng)
    by_question = {row.question: index for index, row in enumerate(MANY)}

    def run(pairs: Any, metric: Any, **options: Any) -> list[Rollout]:
        return [
            Rollout({}, table[program.predictors()[0].signature.instructions][0][by_question[row.question]])
            for program, row in pairs
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspy_greater.objective.evaluator.run_pairs", run)
        decided, runs = searched(table, steps, giving_up=True)
        twin, more_runs = searched(table, steps, giving_up=False)
    assert decided == twin
    assert runs <= more_runs
