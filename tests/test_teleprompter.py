"""`compile` as DSPy users call it: interfaces, results, adapters, and programs of every shape."""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import weakref
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
from any_event import bits
from dspy.utils.callback import BaseCallback
from scripted_engine import (
    GOLD,
    SEED,
    ScriptedEngine,
    chat_answer,
    exact_match,
    instruction_of,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
    worth_of,
)

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.metric import RowMetric
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.program.rollout import Running, roll_out
from dspy_greater.prompt.layout import Layout
from dspy_greater.run.events import SearchStarted, StepTaken, Validated, Warned

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]


@pytest.fixture
def engine() -> Any:
    return planted_engine()


def compiled(engine: Any, **settings: Any) -> Any:
    return optimizer(**settings).compile(program_on(engine), TRAIN, valset=VALIDATION)


# ---- ways to call


def test_the_metric_may_come_third_as_the_user_writes_it(engine: Any) -> None:
    better = optimizer(metric=None).compile(program_on(engine), [*TRAIN, *VALIDATION], exact_match)
    assert worth_of(instruction_of(better)) > 0


def test_the_metric_given_to_compile_wins_over_the_one_of_the_constructor(engine: Any) -> None:
    never = optimizer(metric=lambda example, prediction, trace=None: 0.0)
    better = never.compile(program_on(engine), TRAIN, exact_match, valset=VALIDATION)
    assert better.score > 0


def test_keywords_alone_work_as_dspy_calls_an_optimizer(engine: Any) -> None:
    better = optimizer().compile(program_on(engine), trainset=TRAIN, valset=VALIDATION, teacher=None)
    assert worth_of(instruction_of(better)) > 0


@pytest.mark.slow
def test_an_optimizer_may_be_used_again_for_another_program(engine: Any) -> None:
    again = optimizer()
    first = again.compile(program_on(engine), TRAIN, valset=VALIDATION)
    second = again.compile(program_on(engine), TRAIN, valset=VALIDATION)
    assert instruction_of(first) == instruction_of(second)
    assert bits(first.detailed_results.steps) == bits(second.detailed_results.steps)


@pytest.mark.slow
def test_an_lm_in_a_context_is_used_like_a_configured_one(engine: Any) -> None:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    with dspy.context(lm=local_lm(engine, cache=False, max_tokens=64)):
        better = optimizer().compile(program, TRAIN, valset=VALIDATION)
        assert better(question=TRAIN[0].question).answer == TRAIN[0].answer
    assert better.predictors()[0].lm is None  # it takes its LM from the settings, as the student does
    assert instruction_of(better) == instruction_of(compiled(engine))


def test_a_predictors_own_lm_wins_over_the_configured_one(engine: Any) -> None:
    other = ScriptedEngine(obedient_script)
    with dspy.context(lm=local_lm(other, cache=False)):
        better = compiled(engine)
    assert other.batches == []
    assert better.predictors()[0].lm.engine.engine is engine


def test_the_callbacks_of_dspy_are_told_of_start_and_end(engine: Any) -> None:
    heard: list[Any] = []

    class Callback(BaseCallback):
        def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append(("start", type(instance), sorted(inputs)))

        def on_compile_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
            heard.append(("end", outputs, exception))

    with dspy.context(callbacks=[Callback()]):
        better = optimizer().compile(program_on(engine), TRAIN, valset=VALIDATION)
    assert heard[0][:2] == ("start", GReaTerTeleprompter)
    assert {"student", "trainset", "valset"} <= set(heard[0][2])
    assert heard[1:] == [("end", better, None)]


def test_the_searchs_own_listeners_hear_every_event_in_order(engine: Any) -> None:
    heard: list[Any] = []
    better = compiled(engine, steps=3, listeners=[heard.append])
    assert [type(event) for event in heard] == [SearchStarted, StepTaken, StepTaken, StepTaken, Validated]
    assert tuple(heard[1:4]) == better.detailed_results.steps
    assert heard[-1].winner == instruction_of(better)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 24])  # of eight rows BetterTogether leaves none for validation
def test_better_together_runs_it_among_its_optimizers(engine: Any, rows: int) -> None:
    program = program_on(engine)
    together = dspy.BetterTogether(metric=exact_match, g=optimizer(steps=1), b=dspy.LabeledFewShot(k=1))
    result = together.compile(
        program,
        trainset=planted_rows(rows),
        strategy="g -> b",
        optimizer_compile_args={"b": {}},
        num_threads=1,
    )
    assert not result.flag_compilation_error_occurred
    strategies = {each["strategy"]: each["program"] for each in result.candidate_programs}
    assert set(strategies) == {"", "g", "g -> b"}
    assert worth_of(instruction_of(strategies["g"])) > 0
    assert strategies["g"](question=TRAIN[0].question).answer == TRAIN[0].answer


@pytest.mark.slow
def test_what_another_optimizer_compiled_is_optimised_further() -> None:
    program = program_on(ScriptedEngine(obedient_script, model=planted_engine().model))
    student = dspy.LabeledFewShot(k=1).compile(program, trainset=TRAIN)
    student.set_lm(program.predictors()[0].lm)  # that optimizer forgets it
    better = optimizer(selections=30).compile(student, VALIDATION, valset=planted_rows(24)[16:20])
    assert worth_of(instruction_of(better)) > 0
    assert better.predictors()[0].demos == student.predictors()[0].demos != []
    assert better._compiled is student._compiled


# ---- results


def test_the_result_tells_every_step_of_the_papers_variant(engine: Any) -> None:
    better = compiled(engine, variant="paper", steps=3)
    details = better.detailed_results
    assert [step.step for step in details.steps] == [0, 1, 2]
    assert [step.position for step in details.steps] == [0, 1, 2]
    for step in details.steps:
        assert step.predictor == "predict"
        assert step.reason and step.chosen.instruction and step.chosen.token_ids
        assert len(step.candidates) >= 6
        scored = [each for each in step.candidates if each.evaluation is not None]
        assert 0 < len(scored) <= 4  # three and, where it was proposed, the current token
        for each in scored:
            assert each.evaluation.objective[1] == each.evaluation.cross_entropy
            assert each.evaluation.token_ids[step.position] == each.token
    first = details.steps[0]
    assert sum(each.gradient is not None for each in first.candidates) >= 5
    assert engine.tokenizer.decode([first.current_token]).strip() == "Please"


@pytest.mark.slow
def test_the_result_tells_every_step(engine: Any) -> None:
    details = compiled(engine, steps=3).detailed_results
    assert [step.step for step in details.steps] == [0, 1, 2]
    before = details.predictors[0].seed
    for step in details.steps:
        assert (step.predictor, step.current_token) == ("predict", before.token_ids[step.position])
        assert step.reason and step.chosen.instruction and step.chosen.token_ids
        assert len({each.token for each in step.candidates}) >= 6
        tried = [each for each in step.candidates if each.evaluation is not None]
        assert 0 < len(tried) <= 3
        for each in tried:
            assert each.forecast is not None and each.effective_samples > 0 and each.realised is not None
            longer = {"insert": 1, "replace": 0, "delete": -1}[each.edit]
            ids = each.evaluation.token_ids
            assert len(ids) == len(before.token_ids) + longer
            assert (ids[step.position] if longer >= 0 else before.token_ids[step.position]) == each.token
        before = step.chosen
    assert math.isfinite(details.predictors[0].fidelity)
    assert len(details.predictors[0].fidelity_by_step) == 3


def test_the_result_tells_scores_rows_and_cost(engine: Any) -> None:
    before = engine.counters
    better = compiled(engine)
    details = better.detailed_results
    assert (details.train_rows, details.validation_rows, details.interrupted) == (4, 4, False)
    assert better.score == details.score == details.predictors[0].score == 1.0
    assert details.seed_score == 0.0
    assert details.predictors[0].seed_instruction == SEED
    assert details.predictors[0].field == "answer"
    assert next(iter(details.predictors[0].validation)) == SEED
    assert details.seconds > 0
    spent = engine.counters - before
    assert details.spent["forwards"] == spent.forwards
    assert details.spent["generated_tokens"] == spent.generated_tokens
    assert sum(step.spent["generated_tokens"] for step in details.steps) < spent.generated_tokens


def test_the_cost_is_told_by_phase_and_adds_up(engine: Any) -> None:
    details = compiled(engine, steps=3).detailed_results
    phases = details.spent_by_phase
    assert list(phases) == ["seed", "search", "validation"]
    for name, count in details.spent.items():
        assert sum(phase[name] for phase in phases.values()) == count
    assert phases["seed"]["runs"] == 4
    assert phases["search"]["runs"] == sum(step.spent["runs"] for step in details.steps)
    assert phases["validation"]["runs"] == 4 * len(details.predictors[0].validation)
    assert phases["seed"]["backward_tokens"] == phases["validation"]["backward_tokens"] == 0


@pytest.mark.slow
def test_the_search_stops_after_the_step_that_reaches_the_budget_and_says_so(engine: Any) -> None:
    whole = compiled(engine, steps=4).detailed_results
    seed, first = whole.predictors[0].seed_spent["generated_tokens"], whole.steps[0].spent["generated_tokens"]
    heard: list[Any] = []
    better = compiled(engine, steps=4, max_generated_tokens=seed + first, listeners=[heard.append])
    details = better.detailed_results
    assert repr(details.steps) == repr(whole.steps[:1])  # a gradient that was not taken is NaN
    assert details.out_of_budget == (
        f"max_generated_tokens={seed + first} was reached with {seed + first} tokens, after step 1 of 4 of "
        "predictor `predict`."
    )
    assert heard[-1] == Warned(details.out_of_budget)
    assert better.score == details.score >= details.seed_score
    assert len(compiled(engine, steps=4, max_generated_tokens=seed + first + 1).detailed_results.steps) == 2
    assert whole.out_of_budget is None


@pytest.mark.slow
def test_a_budget_that_is_reached_in_the_last_step_took_nothing_away(engine: Any) -> None:
    whole = compiled(engine, steps=1).detailed_results
    spent = sum(whole.spent_by_phase[name]["generated_tokens"] for name in ("seed", "search"))
    assert compiled(engine, steps=1, max_generated_tokens=spent).detailed_results.out_of_budget is None


def test_a_budget_that_the_seed_spends_returns_the_seed(engine: Any) -> None:
    better = compiled(engine, max_generated_tokens=1)
    assert instruction_of(better) == SEED and better.detailed_results.steps == ()
    assert better.detailed_results.out_of_budget is not None


def test_candidate_programs_are_runnable_and_ranked_with_the_seed_among_them(engine: Any) -> None:
    better = compiled(engine)
    scores = [each["score"] for each in better.candidate_programs]
    assert scores == sorted(scores, reverse=True)
    texts = [instruction_of(each["program"]) for each in better.candidate_programs]
    assert SEED in texts and instruction_of(better) in texts and len(set(texts)) == len(texts)
    assert better.candidate_programs[0]["program"](question=TRAIN[0].question).answer == TRAIN[0].answer


def test_the_result_is_saved_and_loaded_as_an_ordinary_program(engine: Any, tmp_path: Path) -> None:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    with dspy.context(lm=local_lm(engine, cache=False, max_tokens=64)):
        better = optimizer().compile(program, TRAIN, valset=VALIDATION)
        better.save(tmp_path / "better.json")
        loaded = dspy.ChainOfThought("question -> answer")
        loaded.load(tmp_path / "better.json")
        assert instruction_of(loaded) == instruction_of(better)
        assert loaded(question=TRAIN[0].question).answer == better(question=TRAIN[0].question).answer
    assert instruction_of(better) in json.dumps(json.loads((tmp_path / "better.json").read_text()))


def test_copies_of_the_result_work_and_share_the_weights(engine: Any) -> None:
    better = compiled(engine)
    for copied in (copy.deepcopy(better), better.deepcopy(), better.reset_copy()):
        assert instruction_of(copied) == instruction_of(better)
    copied = copy.deepcopy(better)
    assert copied.predictors()[0].lm.engine is better.predictors()[0].lm.engine
    assert copied(question=TRAIN[0].question).answer == TRAIN[0].answer
    assert copied.detailed_results == better.detailed_results


def test_what_is_attached_to_the_result_does_not_become_a_predictor(engine: Any) -> None:
    better = compiled(engine)
    assert [name for name, _ in better.named_predictors()] == ["predict"]


def test_dspys_own_evaluation_agrees_with_the_score(engine: Any) -> None:
    better = compiled(engine)
    evaluate = dspy.Evaluate(devset=VALIDATION, metric=exact_match, num_threads=2, display_progress=False)
    assert evaluate(better).score == 100 * better.score


@pytest.mark.slow
def test_two_runs_in_one_process_leave_nothing_behind(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    for kind in (Evaluator, Layout):
        original = kind.__init__

        def remembering(self: Any, *arguments: Any, _original: Any = original, **options: Any) -> None:
            alive.append(weakref.ref(self))
            _original(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", remembering)
    results = [compiled(engine), compiled(engine)]
    gc.collect()
    assert len(alive) >= 4
    assert [each for each in alive if each() is not None] == []
    assert instruction_of(results[0]) == instruction_of(results[1])


@pytest.mark.slow
def test_a_longer_run_holds_no_more_objects_than_its_record(engine: Any) -> None:
    compiled(engine)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(3):
        compiled(engine)
    gc.collect()
    # DSPy remembers the calls of its language models; a search must not, or only that much.
    assert len(gc.get_objects()) - before < 3000


# ---- the model of the package


@pytest.mark.slow
@pytest.mark.parametrize("task", ["web_of_lies", "navigate", "object_counting"])
def test_the_pocket_model_gets_better_from_an_instruction_that_does_not_fit(task: str) -> None:
    rng = random.Random(0)
    questions = list(dict.fromkeys(generate(task, rng) for _ in range(60)))[:48]
    golds = [(text, work_out(task, text).answer) for text in questions]
    rows = [dspy.Example(question=text, answer=gold).with_inputs("question") for text, gold in golds]
    poor = program_on("pocket", instruction="Answer the question.", max_tokens=400)
    fitting = program_on("pocket", instruction=FITTING[task], max_tokens=400)
    groups = roll_out([poor, fitting], rows[:16], RowMetric(exact_match), Running(1))
    low, high = (sum(each.score for each in group) / 16 for group in groups)
    assert high - low >= 0.3, f"the pocket model answers {low:.0%} and, under a fitting instruction, {high:.0%}"
    better = optimizer(steps=4, train_rows=16, validation_rows=32).compile(poor, rows[:16], valset=rows[16:])
    assert better.score > better.detailed_results.seed_score + 0.1


FITTING = {
    "web_of_lies": "Follow each person in turn.",
    "navigate": "Keep the position after every step.",
    "object_counting": "List each item with its number and add.",
}


# ---- adapters, types and demonstrations


def typed_script(kind: str) -> Any:
    """Writes in the adapter's own format; the answer is right when the instruction is worth enough."""

    def write(prompt: str) -> str:
        system, asked = prompt.split("<|user|>", 1)[0], prompt.rsplit("<|user|>", 1)[-1]
        fruit = next(fruit for fruit in GOLD if fruit in asked)
        obeys = worth_of(system.split("objective is:")[-1]) > 0.1
        values = {"apples": ("yes", 2, True, "two"), "pears": ("no", 3, False, "three")}
        right, wrong = values[fruit], values["pears" if fruit == "apples" else "apples"]
        place = ["choice", "number", "truth", "text"].index(field_of(system))
        value = (right if obeys else wrong)[place]
        if kind == "json":
            return json.dumps({"reasoning": "I look.", field_of(system): value})
        if kind == "xml":
            name = field_of(system)
            return f"<reasoning>\nI look.\n</reasoning>\n<{name}>\n{value}\n</{name}>"
        return chat_answer(reasoning="I look.", **{field_of(system): value})

    return write


def field_of(system: str) -> str:
    return next(
        name for name in ("choice", "number", "truth", "text") if f"`{name}`" in system or f"<{name}>" in system
    )


FIELDS = {
    "choice": (Literal["yes", "no"], {"apples": "yes", "pears": "no"}),
    "number": (int, {"apples": 2, "pears": 3}),
    "truth": (bool, {"apples": True, "pears": False}),
    "text": (str, {"apples": "two", "pears": "three"}),
}
ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}


@pytest.mark.slow
@pytest.mark.parametrize("with_demos", [False, True], ids=["bare", "demos"])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_and_type_is_searched_with_and_without_demonstrations(
    kind: str, field: str, with_demos: bool
) -> None:
    annotation, golds = FIELDS[field]
    values = {"question": (str, dspy.InputField()), field: (annotation, dspy.OutputField())}
    program = dspy.ChainOfThought(dspy.Signature(values, SEED))
    engine = ScriptedEngine(typed_script(kind), model=planted_engine().model)
    program.set_lm(local_lm(engine, cache=False))
    if with_demos:
        program.predictors()[0].demos = [
            dspy.Example(question="one of apples", reasoning="r", **{field: golds["apples"]})
        ]
    rows = [
        dspy.Example(question=row.question, **{field: golds["apples" if "apples" in row.question else "pears"]})
        for row in planted_rows(4)
    ]
    rows = [row.with_inputs("question") for row in rows]

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        return getattr(prediction, field) == getattr(example, field)

    with dspy.context(adapter=ADAPTERS[kind]()):
        better = optimizer(
            metric=metric, variant="paper", steps=1, selections=30, train_rows=2, validation_rows=2
        ).compile(program, rows)
        assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)
        assert worth_of(instruction_of(better)) > 0
        assert better(question=rows[0].question).toDict()[field] == rows[0][field]
    assert better.predictors()[0].demos == program.predictors()[0].demos


@pytest.mark.slow
def test_an_extractor_of_the_users_own_changes_the_loss_and_not_the_deployed_program(engine: Any) -> None:
    plain, own = compiled(engine), compiled(engine, extractor="\n\nSo the answer is ")
    losses = [each.detailed_results.predictors[0].seed.cross_entropy for each in (plain, own)]
    assert losses[0] != losses[1]
    assert own(question=TRAIN[0].question).answer is not None


# ---- programs with several predictors


class Checked(dspy.Module):
    """Answers, and then checks the answer; both have gold values."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        self.second = dspy.ChainOfThought(dspy.Signature("question -> verdict", SEED))
        self.first.set_lm(local_lm(first, cache=False, max_tokens=64))
        self.second.set_lm(local_lm(second, cache=False, max_tokens=64))

    def forward(self, question: str) -> Any:
        answer = self.first(question=question).answer
        return dspy.Prediction(answer=answer, verdict=self.second(question=question).verdict)


def checked_script(prompt: str) -> str:
    return obedient_script(prompt).replace("## answer ##", "## verdict ##" if "`verdict`" in prompt else "## answer ##")


def checked_rows(count: int) -> list[Any]:
    rows = [dspy.Example(question=row.question, answer=row.answer, verdict=row.answer) for row in planted_rows(count)]
    return [row.with_inputs("question") for row in rows]


def both_match(example: Any, prediction: Any, trace: Any = None) -> float:
    return ((prediction.answer == example.answer) + (prediction.verdict == example.verdict)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("models", ["one", "two"])
def test_two_predictors_with_gold_values_are_optimised_in_turn(models: str) -> None:
    model = planted_engine().model
    first = ScriptedEngine(checked_script, model=model)
    second = first if models == "one" else ScriptedEngine(checked_script, model=model, name="second")
    program = Checked(first, second)
    better = optimizer(metric=both_match, variant="paper", selections=30).compile(program, checked_rows(8))
    found = better.detailed_results.predictors
    assert [each.name for each in found] == ["first.predict", "second.predict"]
    assert [each.field for each in found] == ["answer", "verdict"]
    assert [(each.seed_score, each.score) for each in found] == [(0.0, 0.5), (0.5, 1.0)]
    assert [worth_of(text) > 0 for text in (instruction_of(better.first), instruction_of(better.second))] == [
        True,
        True,
    ]
    assert better.score == 1.0 and better.detailed_results.seed_score == 0.0
    assert instruction_of(program.first) == instruction_of(program.second) == SEED
    assert {step.predictor for step in better.detailed_results.steps} == {"first.predict", "second.predict"}


@pytest.mark.slow
def test_each_model_gets_the_gradients_and_prompts_of_its_own_predictor_only() -> None:
    first = ScriptedEngine(checked_script)
    second = ScriptedEngine(checked_script, name="second")
    optimizer(metric=both_match).compile(Checked(first, second), checked_rows(8))
    assert first.prompts and all("`verdict`" not in prompt for prompt in first.prompts)
    assert second.prompts and all("`answer`" not in prompt for prompt in second.prompts)
    assert first.counters.backward_tokens > 0 and second.counters.backward_tokens > 0


@pytest.mark.slow
def test_the_earlier_predictors_new_instruction_is_in_force_while_the_next_is_searched() -> None:
    engine = ScriptedEngine(checked_script, model=planted_engine().model)
    program = Checked(engine, engine)
    better = optimizer(metric=both_match, variant="paper", selections=30).compile(program, checked_rows(8))
    second = better.detailed_results.predictors[1]
    assert second.seed.score == 0.5  # the first predictor is right already


def test_a_predictor_whose_turn_comes_after_the_budget_is_spent_keeps_its_instruction() -> None:
    engine = ScriptedEngine(checked_script, model=planted_engine().model)
    program = Checked(engine, engine)
    better = optimizer(metric=both_match, selections=30, max_generated_tokens=1).compile(program, checked_rows(8))
    details = better.detailed_results
    assert [each.name for each in details.predictors] == ["first.predict"]
    assert details.out_of_budget.endswith("`first.predict`. Not searched, and left as they were: second.predict.")
    assert instruction_of(better.second) == SEED


@pytest.mark.slow
def test_the_budget_counts_all_models_and_all_predictors() -> None:
    model = planted_engine().model

    def run(**settings: Any) -> Any:
        first, second = (ScriptedEngine(checked_script, model=model, name=name) for name in ("first", "second"))
        better = optimizer(metric=both_match, **settings).compile(Checked(first, second), checked_rows(8))
        return better.detailed_results, first.counters.generated_tokens + second.counters.generated_tokens

    whole, generated = run()
    assert sum(phase["generated_tokens"] for phase in whole.spent_by_phase.values()) == generated
    costs = [each.seed_spent["generated_tokens"] for each in whole.predictors]
    steps = [[step.spent["generated_tokens"] for step in each.steps] for each in whole.predictors]
    limited, _ = run(max_generated_tokens=sum(costs) + sum(steps[0]) + 1)
    assert [len(each.steps) for each in limited.predictors] == [2, 1]
    assert (
        limited.out_of_budget is not None and "after step 1 of 2 of predictor `second.predict`" in limited.out_of_budget
    )


def test_a_predictor_under_two_names_is_optimised_once(engine: Any) -> None:
    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = program_on(engine)
            self.same = self.one

        def forward(self, question: str) -> Any:
            return self.same(question=question)

    better = optimizer().compile(Twice(), TRAIN, valset=VALIDATION)
    assert len(better.detailed_results.predictors) == 1
    assert instruction_of(better.one) == instruction_of(better.same) != SEED


@pytest.mark.slow
def test_a_bare_predict_without_reasoning_is_optimised_too() -> None:
    engine = ScriptedEngine(lambda prompt: obedient_script(prompt).split("\n\n", 1)[1], model=planted_engine().model)
    program = dspy.Predict(dspy.Signature("question -> answer", SEED))
    program.set_lm(local_lm(engine, cache=False))
    better = optimizer(selections=30).compile(program, TRAIN, valset=VALIDATION)
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)
    assert better.detailed_results.predictors[0].name == "self"


@pytest.mark.slow
def test_where_nothing_is_reasoned_and_some_answers_are_right_the_gold_answers_tell_candidates_apart() -> None:
    engine = ScriptedEngine(lambda prompt: obedient_script(prompt).split("\n\n", 1)[1], model=planted_engine().model)
    program = dspy.Predict(dspy.Signature("question -> answer", "Add it now."))
    program.set_lm(local_lm(engine, cache=False))
    better = optimizer(steps=4, train_rows=8, explore_every=0).compile(program, planted_rows(8), valset=VALIDATION)
    steps = better.detailed_results.steps
    assert {row.score for row in better.detailed_results.predictors[0].seed.rows} == {0.0, 1.0}
    slopes = [each.gradient for step in steps for each in step.candidates if each.edit == "replace"]
    assert slopes and all(slope is not None and math.isfinite(slope) for slope in slopes)
