"""Programs of every shape under the default variant, from end to end: what is searched, and what stays as it was."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import dspy
import pytest
from scripted_engine import (
    GOLD,
    SEED,
    ScriptedEngine,
    chat_answer,
    exact_match,
    instruction_in,
    instruction_of,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
    value_in,
    worth_of,
)
from scripted_text import text_lm

from dspy_greater import local_lm
from dspy_greater.pocket.tasks import generate, work_out

MODEL = planted_engine().model
MODEL.config.max_position_embeddings = 8192  # an agent's prompts are long
TRY_ALL = {"selections": 40, "steps": 2}


def obeying(script: Any, name: str = "scripted") -> ScriptedEngine:
    return ScriptedEngine(script, model=MODEL, name=name)


def unlabelled(count: int = 8) -> list[Any]:
    """Rows whose label has the name of no output field: only the metric knows what to do with it."""
    return [
        dspy.Example(question=row.question, label=row.answer).with_inputs("question") for row in planted_rows(count)
    ]


def answer_is_label(example: Any, prediction: Any, trace: Any = None) -> bool:
    return prediction.answer == example.label


def instructions(program: Any) -> dict[str, str]:
    return {name: predictor.signature.instructions for name, predictor in program.named_predictors()}


# --- without gold values ---


class TwoHops(dspy.Module):
    """A hint, and an answer that is right when the hint is worth something."""

    def __init__(self, engine: Any, *, answering: Any = None) -> None:
        super().__init__()
        self.hint = dspy.Predict(dspy.Signature("question -> hint", SEED))
        self.answer = dspy.ChainOfThought(dspy.Signature("question, hint -> answer", "Say it."))
        self.set_lm(local_lm(engine, cache=False, max_tokens=64))
        if answering is not None:
            self.answer.set_lm(answering)

    def forward(self, question: str) -> Any:
        return self.answer(question=question, hint=self.hint(question=question).hint)


def hop_script(prompt: str) -> str:
    """The hint is as good as the hint's instruction; the answer depends on nothing else."""
    if (
        "`hint`, and" in prompt.rsplit("<|user|>", 1)[-1]
        or "Respond with the corresponding output fields, " not in prompt
    ):
        raise AssertionError("not a prompt of this program")
    if "starting with the field `[[ ## hint ## ]]`" in prompt:
        return chat_answer(hint="carefully" if worth_of(instruction_in(prompt)) > 0.2 else "quickly")
    return answer_with(value_in(prompt), value_in(prompt, "hint"))


def answer_with(question: str, hint: str) -> str:
    right = GOLD["apples" if "apples" in question else "pears"][0]
    return chat_answer(reasoning="I look.", answer=right if hint == "carefully" else "never")


@pytest.mark.slow
def test_a_predictor_without_gold_values_improves_through_the_metric_alone() -> None:
    better = optimizer(**TRY_ALL).compile(TwoHops(obeying(hop_script)), planted_rows(8))
    hint, answer = better.detailed_results.predictors
    assert [(hint.name, hint.field), (answer.name, answer.field)] == [("hint", None), ("answer.predict", "answer")]
    assert (hint.seed_score, hint.score) == (0.0, 1.0)
    assert worth_of(instructions(better)["hint"]) > 0.2
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


@pytest.mark.slow
def test_a_program_without_any_gold_field_improves_through_the_metric_alone() -> None:
    better = optimizer(metric=answer_is_label, **TRY_ALL).compile(TwoHops(obeying(hop_script)), unlabelled())
    assert [each.field for each in better.detailed_results.predictors] == [None, None]
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


def test_the_planted_model_is_made_to_obey_by_a_metric_without_gold_values() -> None:
    program = program_on(planted_engine())
    better = optimizer(metric=answer_is_label, steps=2).compile(program, unlabelled())
    assert better.detailed_results.predictors[0].field is None
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)
    assert any(each.forecast is not None for each in better.detailed_results.steps[0].candidates)


@pytest.mark.slow
def test_the_pocket_model_gains_ten_points_where_only_the_metric_knows_the_labels() -> None:
    rng = random.Random(0)
    questions = list(dict.fromkeys(generate("navigate", rng) for _ in range(60)))[:48]
    rows = [
        dspy.Example(question=text, label=work_out("navigate", text).answer).with_inputs("question")
        for text in questions
    ]
    program = program_on("pocket", instruction="Answer the question.", max_tokens=400)
    compiler = optimizer(metric=answer_is_label, steps=6, train_rows=16, validation_rows=32)
    better = compiler.compile(program, rows[:16], valset=rows[16:])
    assert better.detailed_results.predictors[0].field is None
    assert better.score >= better.detailed_results.seed_score + 0.1


# --- agents ---


def look(query: str) -> str:
    """Looks {something} up; é – "quoted"."""
    return f"found {query}"


def agent_script(prompt: str) -> str:
    """Finds the answer only if a sentence worth something was put behind the list of tools."""
    if "next_tool_name" not in prompt:
        asked = prompt.rsplit("<|user|>", 1)[-1]
        gold = GOLD["apples" if "apples" in asked else "pears"][0]
        return chat_answer(reasoning="It was found.", answer=gold if "found it" in asked else "never")
    steps = prompt.rsplit("<|user|>", 1)[-1].count("## observation_")
    obeys = worth_of(instruction_in(prompt).rsplit("finish", 1)[-1]) > 0
    name, arguments = ("look", {"query": "it" if obeys else "x"}) if steps < 1 else ("finish", {})
    return chat_answer(next_thought="Now.", next_tool_name=name, next_tool_args=json.dumps(arguments))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The data contains the special tokens")
def test_an_agent_keeps_its_list_of_tools_to_the_byte_and_gains_a_sentence() -> None:
    program = dspy.ReAct(dspy.Signature("question -> answer", "Answer."), tools=[look], max_iters=3)
    program.set_lm(local_lm(obeying(agent_script), cache=False, max_tokens=400))
    before = instructions(program)
    better = optimizer(train_rows=2, validation_rows=2, **TRY_ALL).compile(program, planted_rows(4))
    after = instructions(better)
    assert after["react"].startswith(before["react"]) and after["react"] != before["react"]
    assert worth_of(after["react"][len(before["react"]) :]) > 0
    assert better.detailed_results.predictors[0].name == "react"
    for step in better.detailed_results.predictors[0].steps:
        tried = [each.evaluation.instruction for each in step.candidates if each.evaluation is not None]
        assert all(text.startswith(before["react"]) for text in tried)
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)
    assert instructions(program) == before


# --- models ---


def test_each_of_two_models_is_searched_with_its_own_weights() -> None:
    first = obeying(hop_script)
    second = ScriptedEngine(hop_script, model=planted_engine(seed=1).model, name="second")
    program = TwoHops(first, answering=local_lm(second, cache=False, max_tokens=64))
    better = optimizer(steps=1).compile(program, planted_rows(8))
    assert [each.name for each in better.detailed_results.predictors] == ["hint", "answer.predict"]
    assert all("[[ ## hint ## ]]`" in each for each in first.prompts)
    assert all("## reasoning ##" in each for each in second.prompts)
    assert first.counters.backward_tokens > 0 and second.counters.backward_tokens > 0


@pytest.mark.slow
def test_a_predictor_on_a_model_without_weights_stays_and_the_others_improve() -> None:
    def remote(asked: Any) -> str:
        return answer_with(asked["question"], asked["hint"])

    program = TwoHops(obeying(hop_script), answering=text_lm(remote))
    with pytest.warns(UserWarning, match="Predictors answer.predict keep their instructions. No open weights"):
        better = optimizer(metric=answer_is_label, **TRY_ALL).compile(program, unlabelled())
    assert [each.name for each in better.detailed_results.predictors] == ["hint"]
    assert instructions(better)["answer.predict"] == "Say it."
    assert better.answer.predict.lm.model == "scripted/text"
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


# --- shapes ---


class Nested(dspy.Module):
    """Predictors in a list, in a mapping and in a module of their own; one is used under two names."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.parts = [TwoHops(engine)]
        self.held = {"again": self.parts[0].hint}

    def forward(self, question: str) -> Any:
        hint = self.held["again"](question=question).hint
        return self.parts[0].answer(question=question, hint=hint)


@pytest.mark.slow
def test_nested_modules_and_shared_predictors_are_searched_once_each() -> None:
    better = optimizer(metric=answer_is_label, **TRY_ALL).compile(Nested(obeying(hop_script)), unlabelled())
    assert [each.name for each in better.detailed_results.predictors] == ["parts[0].hint", "parts[0].answer.predict"]
    assert better.held["again"] is better.parts[0].hint
    assert worth_of(instructions(better)["parts[0].hint"]) > 0.2
    assert better.score == 1.0


class InParallel(TwoHops):
    """Asks for two hints at once."""

    def forward(self, question: str) -> Any:
        calls = [(self.hint, {"question": question}), (self.hint, {"question": f"maybe {question}"})]
        first, _ = dspy.Parallel(num_threads=2, disable_progress_bar=True)(calls)
        return self.answer(question=question, hint=first.hint)


@pytest.mark.slow
def test_calls_in_parallel_are_credited_with_their_run() -> None:
    better = optimizer(metric=answer_is_label, **TRY_ALL).compile(InParallel(obeying(hop_script)), unlabelled())
    seed = better.detailed_results.predictors[0].seed
    assert {len(row.calls) for row in seed.rows} == {2}
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


def json_script(prompt: str) -> str:
    instruction = re.search(r"your objective is: *\n(.*?)<\|end\|>", prompt, re.DOTALL)
    worthy = instruction is not None and worth_of(instruction.group(1)) > 0
    gold = GOLD["apples" if "apples" in prompt.rsplit("<|user|>", 1)[-1] else "pears"][0]
    return json.dumps({"reasoning": "I look.", "answer": gold if worthy else "never"})


@pytest.mark.slow
def test_json_and_demonstrations_are_searched_without_gold_values_too() -> None:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(local_lm(obeying(json_script), cache=False))
    program.predict.demos = [dspy.Example(question="one of apples", reasoning="r", answer="yes")]
    with dspy.context(adapter=dspy.JSONAdapter()):
        better = optimizer(metric=answer_is_label, **TRY_ALL).compile(program, unlabelled())
        assert better(question="one of apples").answer == "yes"
    assert better.predict.demos == program.predict.demos
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


@pytest.mark.slow
def test_better_together_runs_the_default_variant_without_gold_values() -> None:
    program = program_on(obeying(obedient_script))
    together = dspy.BetterTogether(metric=answer_is_label, g=optimizer(metric=answer_is_label, **TRY_ALL))
    result = together.compile(program, trainset=unlabelled(24), strategy="g", num_threads=1)
    assert not result.flag_compilation_error_occurred
    [found] = [each["program"] for each in result.candidate_programs if each["strategy"] == "g"]
    assert worth_of(instruction_of(found)) > 0


@pytest.mark.slow
def test_a_predictor_that_is_called_on_some_rows_only_learns_from_those() -> None:
    class Sometimes(TwoHops):
        def forward(self, question: str) -> Any:
            if "pears" in question:
                return dspy.Prediction(answer="no")
            return super().forward(question)

    better = optimizer(metric=answer_is_label, **TRY_ALL).compile(Sometimes(obeying(hop_script)), unlabelled())
    hint = better.detailed_results.predictors[0]
    called = [bool(row.calls) for row in hint.seed.rows]
    assert 0 < sum(called) < len(called)
    assert better.score == 1.0


@pytest.mark.slow
def test_a_metric_that_gives_parts_of_a_point_is_climbed() -> None:
    def graded(example: Any, prediction: Any, trace: Any = None) -> float:
        return 0.2 + 0.6 * (prediction.answer == example.label)

    better = optimizer(metric=graded, **TRY_ALL).compile(program_on(obeying(obedient_script)), unlabelled())
    assert better.detailed_results.seed_score == pytest.approx(0.2)
    assert better.score == pytest.approx(0.8)


@pytest.mark.slow
def test_exact_match_on_gold_values_gives_the_same_score_as_dspys_own_evaluation() -> None:
    better = optimizer(**TRY_ALL).compile(TwoHops(obeying(hop_script)), planted_rows(8), valset=planted_rows(24)[8:12])
    evaluate = dspy.Evaluate(devset=planted_rows(24)[8:12], metric=exact_match, num_threads=1, display_progress=False)
    assert evaluate(better).score == 100 * better.score
