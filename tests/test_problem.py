"""Bad input is refused before the first token is generated, with words that say what to do."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal

import dspy
import numpy as np
import pytest
from any_event import bits
from dspy.utils.dummies import DummyLM
from pydantic import AfterValidator
from scripted_engine import (
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
)

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.errors import (
    ContextLengthError,
    DataError,
    GreaterError,
    MetricError,
    ProgramError,
    SettingsError,
    UnusedPredictorError,
    WeightsError,
)
from dspy_greater.program.dataset import split
from dspy_greater.program.fingerprint import _field, fingerprint
from dspy_greater.search.default_step import DefaultStep, by_score_gradient
from dspy_greater.search.problem import Options, Problem, prepare
from dspy_greater.search.variants import described_step, step_of
from dspy_greater.settings import Settings

ROWS = planted_rows(8)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(obedient_script)


def compile_with(engine: Any, trainset: Any = ROWS, **options: Any) -> Any:
    settings = {name: options.pop(name) for name in ("metric", "weights", "variant") if name in options}
    return optimizer(**settings).compile(options.pop("program", program_on(engine)), trainset, **options)


def refused(kind: type[GreaterError], text: str, engine: Any, *arguments: Any, **options: Any) -> None:
    """The error is of this kind, says this, and came before anything was generated."""
    with pytest.raises(kind, match=text):
        compile_with(engine, *arguments, **options)
    assert engine.counters.generated_tokens == 0


# ---- rows


@pytest.mark.parametrize("trainset", [[], None, ()])
def test_an_empty_trainset_is_refused(engine: Any, trainset: Any) -> None:
    refused(DataError, "The trainset is empty. Pass at least one dspy.Example", engine, trainset)


def test_rows_that_are_not_examples_are_named(engine: Any) -> None:
    rows = [*ROWS[:2], {"question": "x", "answer": "yes"}]
    refused(DataError, r"Row 2 of the trainset is not dspy.Example. Build them as dspy.Example\(", engine, rows)


def test_rows_that_do_not_say_which_fields_are_inputs_are_named(engine: Any) -> None:
    rows = [ROWS[0], dspy.Example(question="x", answer="yes"), dspy.Example(question="y", answer="yes")]
    refused(
        DataError,
        r"Rows 1, 2 of the trainset do not say which fields are inputs. Call .with_inputs",
        engine,
        rows,
    )
    refused(DataError, r"Rows 1, 2 of the valset do not say", engine, ROWS, valset=rows)


@pytest.mark.parametrize("gold", [{}, {"answer": None}])
def test_rows_without_a_gold_value_are_named_with_the_field(engine: Any, gold: dict[str, Any]) -> None:
    rows = [*ROWS[:3], dspy.Example(question="x", **gold).with_inputs("question")]
    refused(
        DataError,
        "Row 3 of the trainset has no gold value for `answer`, which predictor `predict`",
        engine,
        rows,
    )


def test_where_gold_values_are_needed_their_lack_names_the_fields_on_both_sides(engine: Any) -> None:
    rows = [dspy.Example(question=text, label="yes").with_inputs("question") for text in "xy"]
    refused(
        DataError,
        "output fields are answer, reasoning; the rows' labels are label. Give the examples a value for one of",
        engine,
        rows,
        variant="paper",
    )
    rows = [dspy.Example(question=text).with_inputs("question") for text in "xy"]
    refused(DataError, "the rows' labels are none", engine, rows, variant="paper")


def test_a_valset_without_gold_values_is_refused_by_its_own_name(engine: Any) -> None:
    valset = [ROWS[0], dspy.Example(question="x", label="yes").with_inputs("question")]
    text = "Row 1 of the valset has no gold value for `answer`, which predictor `predict`"
    refused(DataError, text, engine, valset=valset)


def test_gold_values_that_do_not_fit_are_refused_before_anything_is_generated(engine: Any) -> None:
    program = program_on(engine, signature="question -> answer: bool")
    rows = [*ROWS[:3], dspy.Example(question="x", answer="perhaps").with_inputs("question")]
    text = "(?s)Row 3 of the trainset has a gold value that does not fit `answer` of predictor `predict`.*'perhaps'"
    refused(DataError, text, engine, rows, program=program)
    empty = [*ROWS[:3], dspy.Example(question="x", answer="").with_inputs("question")]
    refused(DataError, "Row 3 of the trainset has no gold value for `answer`", engine, empty)


def test_rows_may_come_from_generators(engine: Any) -> None:
    program = program_on(engine)
    problem = posed(program, (row for row in ROWS[:4]), (row for row in ROWS[4:]))
    assert problem.identity() == posed(program, ROWS[:4], ROWS[4:]).identity()
    refused(DataError, "The trainset is a int. Pass a list of dspy.Example", engine, 3)


# ---- the metric


def test_no_metric_is_refused_with_both_ways_to_pass_one(engine: Any) -> None:
    text = r"There is no metric. Pass one as GReaTer\(metric=...\) or compile\(student, trainset, metric\)"
    refused(MetricError, text, engine, metric=None)


def test_a_metric_that_cannot_be_called_is_refused(engine: Any) -> None:
    refused(MetricError, "metric='exact' cannot be called", engine, metric="exact")


def test_a_metric_that_raises_on_every_row_ends_the_run_after_the_first_rollout(engine: Any) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        return prediction.label == example.label

    with pytest.raises(
        MetricError,
        match=r"The metric failed on all 4 training rows; on the first, the metric raised AttributeError",
    ):
        compile_with(engine, metric=metric)
    assert len(engine.batches) == 1


def test_a_metric_that_raises_on_some_rows_counts_them_as_mistakes(engine: Any) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if "pears" in example.question:
            raise ZeroDivisionError("no pears")
        return exact_match(example, prediction)

    with pytest.warns(RuntimeWarning, match="The metric failed on . of 4 .* rows, which count as mistakes") as told:
        better = compile_with(engine, metric=metric, program=program_on(engine, instruction="Please count."))
    seed = better.detailed_results.predictors[0].seed
    failed = [row for row in seed.rows if row.error]
    assert 0 < len(failed) < 4
    assert {row.error for row in failed} == {"the metric raised ZeroDivisionError: no pears"}
    assert seed.score == 1 - len(failed) / 4
    of_training, of_validation = [str(each.message) for each in told]
    assert of_training.startswith(f"The metric failed on {len(failed)} of 4 training rows")
    assert "validation rows" in of_validation and of_validation.endswith("raised ZeroDivisionError: no pears.")
    # The rows are told by their places in the trainset of eight, of which the odd ones ask for pears.
    found = re.search(
        r"mistakes: rows? ([\d, ]+) of the trainset\. On row (\d+) of the trainset, (.*?), the", of_training
    )
    assert found is not None
    assert len(found[1].split(", ")) == len(failed) and all(int(row) % 2 for row in found[1].split(", "))
    assert found[3] == repr(dict(ROWS[int(found[2])].inputs()))


@pytest.mark.parametrize("value", [None, "yes", [1]])
def test_a_metric_that_returns_no_score_is_shown_at_its_first_call(engine: Any, value: Any) -> None:
    with pytest.raises(MetricError, match="which is not a score. Return a bool, a number, or a dspy.Prediction"):
        compile_with(engine, metric=lambda example, prediction, trace=None: value)
    assert len(engine.batches) == 1


def test_a_metric_that_is_nan_on_every_row_is_useless_and_refused(engine: Any) -> None:
    with pytest.raises(MetricError, match="failed on all 4 training rows; on the first, the metric returned nan"):
        compile_with(engine, metric=lambda example, prediction, trace=None: float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda hit: dspy.Prediction(score=hit), np.bool_, np.float32, float, int])
def test_a_metric_may_return_any_kind_of_number(engine: Any, wrap: Any) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        return wrap(exact_match(example, prediction))

    program = program_on(engine, instruction="Please count.")
    assert compile_with(engine, metric=metric, program=program).score == 1.0


# ---- language models and weights


def test_an_lm_without_weights_is_refused_at_the_start_with_what_to_pass() -> None:
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(dspy.LM("openai/gpt-4o", api_key="none"))
    refused(
        WeightsError,
        r"predictor 'predict', which runs on the LM 'openai/gpt-4o'; a gradient needs them..*weights=\{'openai/gpt-4o'",
        planted_engine(),
        program=program,
    )


def test_a_program_without_an_lm_is_refused(engine: Any) -> None:
    text = r"Predictor `predict` has no language model. Call dspy.configure\(lm=...\) or set_lm\(...\)"
    refused(ProgramError, text, engine, program=dspy.ChainOfThought("question -> answer"))


@pytest.mark.parametrize("weights", [{"predict": 0}, {"dummy": 0}, {"predict": 0, "dummy": 1}, 0])
def test_weights_are_found_by_predictor_by_lm_or_for_all(weights: Any) -> None:
    engine = planted_engine()
    engines = [engine, planted_engine()]
    chosen = {name: engines[place] for name, place in weights.items()} if isinstance(weights, dict) else engine
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(DummyLM([{"reasoning": "r", "answer": "yes"}]))
    problem = posed(program, weights=chosen)
    assert problem.targets[0].engine is engine


def test_weights_that_are_none_of_these_are_refused(engine: Any) -> None:
    refused(WeightsError, "weights is a int; pass an Engine", engine, weights=3)


def test_a_prompt_that_fills_the_context_is_refused_with_the_longest_row(engine: Any) -> None:
    rows = [*ROWS, dspy.Example(question="maybe " * 2000, answer="yes").with_inputs("question")]
    text = r"takes \d{4} tokens for the row \{'question': 'maybe maybe.*\.\.\..*context of 1024 tokens, which leaves no"
    with pytest.raises(ContextLengthError, match=text):
        optimizer(train_rows=9).compile(program_on(engine), rows, valset=planted_rows(24)[20:])
    assert engine.batches == []


# ---- programs


def test_a_program_without_predictors_is_refused(engine: Any) -> None:
    class Nothing(dspy.Module):
        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer="yes")

    refused(
        ProgramError,
        "The program has no predictors to optimise. Pass a dspy.Module",
        engine,
        program=Nothing(),
    )


def agent_on(engine: Any) -> Any:
    def search(query: str) -> str:
        """Look something up."""
        return query

    program = dspy.ReAct("question -> answer", tools=[search])
    program.set_lm(local_lm(engine, cache=False))
    return program


def test_an_instruction_that_lists_its_tools_cannot_be_rewritten(engine: Any) -> None:
    rows = [dspy.Example(question="x", answer="yes", next_thought="search").with_inputs("question")] * 8
    text = "`react` lists its tools in its instruction, and rewriting it would lose them. Use mode='append' for it"
    for mode in ("rewrite", {"react": "rewrite"}):
        with pytest.raises(ProgramError, match=text):
            posed(agent_on(engine), rows, mode=mode)
    # Whoever leaves it out may rewrite the rest.
    problem = posed(agent_on(engine), mode="rewrite", predictors=["extract.predict"])
    assert [target.append for target in problem.targets] == [False]


@pytest.mark.filterwarnings("ignore:.*validation rows are also training rows")
def test_an_instruction_that_lists_its_tools_is_appended_to_by_itself(engine: Any) -> None:
    rows = [dspy.Example(question="x", answer="yes", next_thought="search").with_inputs("question")] * 8
    for problem in (posed(agent_on(engine), rows, step=PAPER), posed(agent_on(engine))):
        react, extract = problem.targets
        assert (react.predictor.name, react.append, extract.append) == ("react", True, False)
        assert react.fixed == react.predictor.instruction and extract.fixed == ""
        assert "(1) search, whose description is <desc>Look something up.</desc>" in react.fixed


def test_an_agent_without_gold_values_keeps_its_instruction_where_they_are_needed(engine: Any) -> None:
    with pytest.warns(UserWarning, match="Predictors react have no gold values in the trainset and keep"):
        problem = posed(agent_on(engine), step=PAPER)
    assert [(target.predictor.name, target.field) for target in problem.targets] == [("extract.predict", "answer")]


def test_a_field_that_is_no_text_is_refused_only_where_it_would_be_optimised(engine: Any) -> None:
    class Looks(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look = dspy.Predict("picture: dspy.Image -> question")
            self.answer = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
            self.set_lm(local_lm(engine, cache=False))

    with pytest.warns(UserWarning, match="Predictors look keep their instructions. .* of type Image"):
        problem = posed(Looks())
    assert [target.predictor.name for target in problem.targets] == ["answer.predict"]
    rows = [dspy.Example(picture="x", question="y", answer="yes").with_inputs("picture")]
    refused(ProgramError, r"`look` has the field `picture` of type Image", engine, rows, program=Looks())


@pytest.mark.parametrize("student", [dspy.ChainOfThought, "question -> answer", None])
def test_a_student_that_is_not_a_program_is_refused(engine: Any, student: Any) -> None:
    refused(
        ProgramError, "The student is .*, not a program. Pass an instance of a dspy.Module", engine, program=student
    )


def test_a_program_that_never_calls_its_predictor_is_refused_with_its_own_error(engine: Any) -> None:
    class Broken(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = program_on(engine)

        def forward(self, question: str) -> Any:
            raise OSError("the index is missing")

    refused(
        ProgramError,
        r"The program failed on all 4 training rows before it called a predictor; on row \d of the trainset, "
        r"\{'question': .*\}, the program's own code raised OSError: the index is missing\. Try program",
        engine,
        program=Broken(),
    )


class Idle(dspy.Module):
    """Has predictors that it does not call."""

    def __init__(self, engine: Any, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, dspy.Predict(dspy.Signature("question -> query", "Write a query.")))
        self.answer = program_on(engine, instruction="Please count.")
        self.set_lm(local_lm(engine, cache=False))

    def forward(self, question: str) -> Any:
        return self.answer(question=question)


def test_a_predictor_without_gold_values_that_is_never_called_keeps_its_instruction_with_a_warning(engine: Any) -> None:
    with pytest.warns(UserWarning, match="were not called") as told:
        better = compile_with(engine, program=Idle(engine, "first", "second"))
    assert [str(each.message) for each in told] == [
        "Predictors `first`, `second` were not called on any of the 4 training rows. They keep their instructions."
    ]
    assert better.first.signature.instructions == better.second.signature.instructions == "Write a query."
    assert [each.name for each in better.detailed_results.predictors] == ["answer.predict"]
    assert better.score == 1.0


def test_where_no_predictor_that_is_to_be_optimised_is_called_the_run_ends_with_an_error(engine: Any) -> None:
    text = r"Predictors `first`, `second` were not called on any of the 4 training rows\. Try program\(\*\*trainset"
    program = Idle(engine, "first", "second")
    with pytest.raises(UnusedPredictorError, match=text):
        optimizer(predictors=["first", "second"]).compile(program, ROWS)


def test_a_predictor_that_was_asked_for_by_name_and_is_never_called_is_an_error_before_any_search(engine: Any) -> None:
    heard: list[Any] = []
    text = r"Predictor `first` was not called on any of the 4 training rows\..*Or leave it out of predictors=\[\.\.\.\]"
    compiler = optimizer(predictors=["answer.predict", "first"], listeners=[heard.append])
    with pytest.raises(UnusedPredictorError, match=text):
        compiler.compile(Idle(engine, "first"), ROWS)
    assert heard == [] and len(engine.batches) == 1


def test_a_predictor_with_gold_values_that_is_never_called_is_left_alone_too() -> None:
    class Silent(Idle):
        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer=self.first(question=question).query)

    engine = ScriptedEngine(lambda prompt: chat_answer(query="x"))
    with pytest.warns(UserWarning, match="`answer.predict` was not called on any of the 4 training rows. It keeps"):
        better = compile_with(engine, program=Silent(engine, "first"))
    assert [each.name for each in better.detailed_results.predictors] == ["first"]
    assert instruction_of(better.answer) == "Please count."


def test_where_gold_values_are_needed_predictors_without_are_named_and_keep_their_instructions() -> None:
    engine = ScriptedEngine(
        lambda prompt: obedient_script(prompt) if "answer ##" in prompt else chat_answer(query="fruit")
    )

    class TwoHops(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = dspy.Predict(dspy.Signature("question -> query", "Write a query."))
            self.answer = dspy.ChainOfThought(dspy.Signature("question, query -> answer", "Please count."))
            self.set_lm(local_lm(engine, cache=False))

        def forward(self, question: str) -> Any:
            return self.answer(question=question, query=self.query(question=question).query)

    with pytest.warns(UserWarning, match="Predictors query have no gold values in the trainset and keep their instr"):
        better = compile_with(engine, program=TwoHops(), variant="paper")
    assert better.query.signature.instructions == "Write a query."
    assert [each.name for each in better.detailed_results.predictors] == ["answer.predict"]
    assert better.score == 1.0


@pytest.mark.slow
def test_a_program_that_is_compiled_again_and_again_does_not_grow() -> None:
    engine = ScriptedEngine(obedient_script)
    program = program_on(engine)
    for _ in range(3):
        program = compile_with(engine, program=program)
        assert program.candidate_programs
        attached = [vars(each["program"]).keys() for each in program.candidate_programs]
        assert not [names for names in attached if "candidate_programs" in names or "detailed_results" in names]


@pytest.mark.slow
def test_two_compiles_at_once_on_one_model_find_what_each_finds_alone() -> None:
    engine = ScriptedEngine(obedient_script)
    students = [program_on(engine, instruction=text) for text in (SEED, "Please count.")]

    def found(student: Any) -> Any:
        (result,) = compile_with(engine, program=student).detailed_results.predictors
        # The counters are the engine's, and so of both.
        return replace(
            result, seed_spent={}, validation_spent={}, steps=tuple(replace(step, spent={}) for step in result.steps)
        )

    alone = [found(student) for student in students]
    with ThreadPoolExecutor(2) as pool:
        together = [pool.submit(found, student) for student in students]
        # A number that was not taken is NaN.
        assert [bits(each.result(60)) for each in together] == list(map(bits, alone))


# ---- settings of the optimizer


def test_an_unknown_setting_is_refused_when_the_optimizer_is_built() -> None:
    with pytest.raises(SettingsError, match="There is no setting learning_rate. The settings are: "):
        GReaTerTeleprompter(metric=exact_match, learning_rate=0.1)


def test_an_unknown_preset_is_refused_when_the_optimizer_is_built() -> None:
    with pytest.raises(
        SettingsError, match="auto='huge' is not a preset. Use one of 'light', 'medium', 'heavy' or None"
    ):
        GReaTerTeleprompter(metric=exact_match, auto="huge")


@pytest.mark.parametrize("seed", ["0", 1.0, None, True])
def test_a_seed_that_is_not_a_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(SettingsError, match="seed=.*: give a whole number"):
        GReaTerTeleprompter(metric=exact_match, seed=seed)


# ---- which predictors, and what may happen to their instructions


PAPER = step_of("paper")  # the one that needs gold values


class Draft(dspy.Module):
    """Two steps; the rows have gold values for the second at most."""

    def __init__(self, engine: Any, *, first: Any = None) -> None:
        super().__init__()
        self.query = dspy.Predict(dspy.Signature("question -> query", "Write a query."))
        self.answer = dspy.ChainOfThought(dspy.Signature("question, query -> answer", "Please count."))
        self.set_lm(local_lm(engine, cache=False))
        if first is not None:
            self.query.lm = first


def remote_lm() -> Any:
    return dspy.LM("openai/gpt-4o", api_key="none")


def unlabelled(count: int = 8) -> list[Any]:
    return [dspy.Example(question=row.question, label=row.answer).with_inputs("question") for row in ROWS[:count]]


def fields_of(problem: Problem) -> dict[str, str | None]:
    return {target.predictor.name: target.field for target in problem.targets}


def test_a_predictor_without_gold_values_is_optimised_by_the_metric_alone(engine: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = posed(Draft(engine))
    assert fields_of(problem) == {"query": None, "answer.predict": "answer"}
    assert all(target.engine is engine for target in problem.targets)


def test_a_program_without_any_gold_field_is_accepted(engine: Any) -> None:
    problem = posed(Draft(engine), unlabelled(6), [*unlabelled()[6:7], ROWS[7]])
    assert fields_of(problem) == {"query": None, "answer.predict": None}
    assert fields_of(posed(program_on(engine), unlabelled())) == {"predict": None}


def test_a_predictor_on_a_remote_model_keeps_its_instruction_with_one_warning(engine: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"Predictors query keep their instructions. No open weights .*'query'"
    ) as told:
        problem = posed(Draft(engine, first=remote_lm()))
    assert len(told) == 1
    assert fields_of(problem) == {"answer.predict": "answer"}
    assert problem.program.query.lm.model == "openai/gpt-4o"
    named = posed(Draft(engine, first=remote_lm()), weights={"openai/gpt-4o": engine})
    assert fields_of(named) == {"query": None, "answer.predict": "answer"}


def test_a_field_that_is_no_text_leaves_its_predictor_alone(engine: Any) -> None:
    class Looks(Draft):
        def __init__(self) -> None:
            super().__init__(engine)
            self.query = dspy.Predict("picture: dspy.Image -> query")
            self.query.lm = local_lm(engine, cache=False)

    with pytest.warns(UserWarning, match="Predictors query keep their instructions. Predictor `query` has the field"):
        assert fields_of(posed(Looks())) == {"answer.predict": "answer"}


def test_nothing_to_optimise_says_why_for_every_predictor(engine: Any) -> None:
    program = Draft(engine)
    program.set_lm(remote_lm())
    with pytest.raises(WeightsError, match=r"No predictor can be optimised. .*'query'.* weights=.*'answer.predict'"):
        posed(program, unlabelled())
    with pytest.raises(DataError, match="labels are label. .* or leave variant='paper', which is the only one that"):
        posed(program, unlabelled(), step=PAPER)


def test_gold_values_are_still_checked_where_there_are_some(engine: Any) -> None:
    rows = [*ROWS[:3], *unlabelled(1)]
    with pytest.raises(DataError, match="Row 3 of the trainset has no gold value for `answer`, which predictor"):
        posed(Draft(engine), rows)
    with pytest.raises(DataError, match="Row 0 of the valset has no gold value for `answer`"):
        posed(Draft(engine), ROWS, unlabelled(1))
    program = Draft(engine)
    program.answer.set_lm(remote_lm())
    with pytest.raises(WeightsError, match="'answer.predict'"):
        posed(program)
    # Rows without the label matter to nobody where that predictor is left out.
    assert fields_of(posed(Draft(engine), rows, predictors=["query"])) == {"query": None}


def test_only_the_predictors_that_are_named_are_optimised(engine: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fields_of(posed(Draft(engine), predictors=["answer.predict"])) == {"answer.predict": "answer"}
        named = posed(Draft(engine), predictors=("answer.predict", "query"))
    assert list(fields_of(named)) == ["query", "answer.predict"]


def test_a_predictor_that_is_named_and_cannot_be_optimised_is_an_error(engine: Any) -> None:
    with pytest.raises(
        DataError, match="`query` has no output field with gold values .* and variant='paper' needs them"
    ):
        posed(Draft(engine), predictors=["query"], step=PAPER)
    with pytest.raises(WeightsError, match="No open weights are known for predictor 'query'"):
        posed(Draft(engine, first=remote_lm()), predictors=["query", "answer.predict"])


def test_names_that_the_program_does_not_have_are_told_with_those_it_has(engine: Any) -> None:
    known = "which the program does not have; its predictors are `query`, `answer.predict`"
    with pytest.raises(ProgramError, match=f"predictors names `answer`, `x`, {known}"):
        posed(Draft(engine), predictors=["answer", "query", "x"])
    with pytest.raises(ProgramError, match=f"mode names `answer`, {known}"):
        posed(Draft(engine), mode={"answer": "append"})


@pytest.mark.parametrize("predictors", ["query", [], ()])
def test_predictors_that_are_no_list_of_names_are_refused(engine: Any, predictors: Any) -> None:
    with pytest.raises(SettingsError, match=r"predictors=.*: give a list of names, such as \['query'\]"):
        posed(Draft(engine), predictors=predictors)


@pytest.mark.parametrize("mode", ["prepend", 3, {"query": "insert"}])
def test_an_unknown_mode_is_refused(engine: Any, mode: Any) -> None:
    with pytest.raises(SettingsError, match="mode=.* is not known. Use 'rewrite', 'append', or a mapping from"):
        posed(Draft(engine), mode=mode)


def test_any_instruction_can_be_kept_and_appended_to(engine: Any) -> None:
    def appends(mode: Any) -> list[bool]:
        return [target.append for target in posed(Draft(engine), mode=mode).targets]

    assert appends(None) == appends("rewrite") == [False, False]
    assert appends("append") == [True, True]
    assert appends({"answer.predict": "append"}) == appends({"query": "rewrite", "answer.predict": "append"})
    assert appends({"answer.predict": "append"}) == [False, True]


def test_a_predictor_that_is_used_twice_is_one_target(engine: Any) -> None:
    class Twice(Draft):
        def __init__(self) -> None:
            super().__init__(engine)
            self.again = self.query
            self.steps = [self.query, self.answer]

    assert list(fields_of(posed(Twice()))) == ["query", "answer.predict"]


# ---- the split


def posed(program: Any, rows: Any = ROWS, valset: Any = None, **options: Any) -> Problem:
    settings = Settings.of(None, train_rows=4, validation_rows=4)
    options = {"settings": settings, "step": step_of("default"), "seed": 0, **options}
    return prepare(program, rows, exact_match, valset, Options(**options))


def keys(rows: Any) -> list[str]:
    return [row.question for row in rows]


def test_without_a_valset_train_and_validation_rows_are_disjoint_and_seeded(engine: Any) -> None:
    settings = Settings.of(None, train_rows=50, validation_rows=3)
    train, validation = split(ROWS, None, settings=settings, seed=0)
    assert sorted(keys([*train, *validation])) == sorted(keys(ROWS))
    assert len(validation) == 3
    assert split(ROWS, [], settings=settings, seed=0) == (train, validation)
    assert split(ROWS, None, settings=settings, seed=0) == (train, validation)
    assert split(ROWS, None, settings=settings, seed=1) != (train, validation)


def test_at_most_half_of_the_trainset_is_kept_for_validation() -> None:
    train, validation = split(ROWS[:3], None, settings=Settings(), seed=0)
    assert (len(train), len(validation)) == (2, 1)


def test_samples_are_no_larger_than_the_settings_say() -> None:
    settings = Settings.of(None, train_rows=2, validation_rows=3)
    train, validation = split(ROWS, planted_rows(24)[8:], settings=settings, seed=0)
    assert (len(train), len(validation)) == (2, 3)


def test_rows_that_train_and_validate_are_counted_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="2 of 2 validation rows are also training rows, so .* optimistic. Pass"):
        split(ROWS[:2], ROWS[:2], settings=Settings(), seed=0)
    with pytest.warns(UserWarning, match="1 of 1 validation rows are also training rows"):
        split(ROWS[:1], None, settings=Settings(), seed=0)


def test_warnings_point_to_the_line_that_calls_compile(engine: Any) -> None:
    class TwoHops(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = dspy.Predict("question -> query")
            self.answer = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
            self.set_lm(local_lm(engine, cache=False))

        def forward(self, question: str) -> Any:
            return self.answer(question=question)

    for variant, last in (
        ("paper", "Predictors query have no gold values"),
        ("default", "Predictor `query` was not called on any of the 2 training rows"),
    ):
        with pytest.warns(UserWarning, match="validation rows|keep their instr|was not called") as told:
            optimizer(variant=variant, steps=0).compile(TwoHops(), ROWS[:2], valset=ROWS[:2])
        assert {warning.filename for warning in told} == {__file__}
        texts = [str(warning.message) for warning in told]
        assert ["also training rows" in text for text in texts] == [True, False]
        assert texts[1].startswith(last)


def test_a_valset_of_its_own_gives_no_warning(engine: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = posed(program_on(engine), ROWS[:4], ROWS[4:])
    assert set(keys(problem.train)).isdisjoint(keys(problem.validation))


# ---- identity


def test_the_identity_is_the_same_for_the_same_inputs(engine: Any) -> None:
    assert posed(program_on(engine)).identity() == posed(program_on(engine)).identity()


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("step", lambda engine: posed(program_on(engine), step=PAPER)),
        ("step", lambda engine: posed(program_on(engine), step=replace(step_of("default"), rank=None))),
        ("seed", lambda engine: posed(program_on(engine), seed=1)),
        ("extractor", lambda engine: posed(program_on(engine), extractor="So:")),
        ("settings", lambda engine: posed(program_on(engine), settings=Settings())),
        ("train", lambda engine: posed(program_on(engine), planted_rows(9))),
        ("validation", lambda engine: posed(program_on(engine), valset=planted_rows(24)[20:])),
        ("predictors", lambda engine: posed(program_on(engine, instruction="Please count."))),
        ("predictors", lambda engine: posed(program_on(ScriptedEngine(obedient_script, name="other")))),
        ("predictors", lambda engine: posed(program_on(engine, max_tokens=65))),
        ("predictors", lambda engine: posed(program_on(engine), mode="append")),
        ("predictors", lambda engine: posed(with_demo(program_on(engine)))),
        ("predictors", lambda engine: posed(stopping(program_on(engine)))),
        ("predictors", lambda engine: posed(with_answer(program_on(engine), desc="one word"))),
        ("predictors", lambda engine: posed(with_answer(program_on(engine), Literal["yes", "no"]))),
    ],
)
def test_the_identity_tells_what_changed(engine: Any, where: str, change: Any) -> None:
    before, now = posed(program_on(engine)).identity(), change(engine).identity()
    assert where in {name for name in before if before[name] != now[name]}


def test_the_identity_of_a_step_of_ones_own_holds_no_address_in_memory() -> None:
    class Ranking:
        def __call__(self, *arguments: Any) -> Any:
            """Never called."""

    def by(scale: float, ranking: Any) -> Any:
        return DefaultStep(rank=partial(by_score_gradient, scale=scale, ranking=ranking), forecast=ranking)

    told = described_step(by(0.5, Ranking()))
    assert told == described_step(by(0.5, Ranking())) != described_step(by(0.25, Ranking()))
    assert " at 0x" not in str(told) and "by_score_gradient(scale=0.5" in told["rank"]


def test_settings_of_the_machine_do_not_change_the_identity(engine: Any) -> None:
    settings = {"train_rows": 4, "validation_rows": 4}
    other = Settings.of(None, **settings, num_threads=3)
    assert posed(program_on(engine), settings=other).identity() == posed(program_on(engine)).identity()


def test_the_identity_holds_no_secret() -> None:
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(dspy.LM("openai/gpt-4o", api_key="sk-very-secret"))
    assert "secret" not in repr(posed(program, weights=planted_engine()).identity())


def test_the_seed_decides_what_a_sampled_model_draws(engine: Any) -> None:
    def drawn(of_the_search: int, **own: Any) -> Any:
        program = program_on(engine)
        program.set_lm(local_lm(engine, temperature=0.8, **own))
        return posed(program, seed=of_the_search).program.predictors()[0].lm.kwargs["seed"]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, seed=7) == drawn(1, seed=7) == 7


def stopping(program: Any) -> Any:
    program.set_lm(program.predictors()[0].lm.copy(stop=["END"]))
    return program


def with_answer(program: Any, kind: Any = None, **told: Any) -> Any:
    predictor = program.predictors()[0]
    predictor.signature = predictor.signature.with_updated_fields("answer", kind, **told)
    return program


def test_the_identity_tells_apart_types_of_one_name(engine: Any) -> None:
    def identity(*answers: str) -> Any:
        kind = Enum("Kind", {name: name for name in answers}, type=str)
        return posed(with_answer(program_on(engine), kind)).identity()

    assert identity("yes", "no") == identity("yes", "no") != identity("yes", "no", "maybe")


class Slotted:
    """Has neither a text nor a dictionary."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class Nameless:
    """Has no text of its own."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_a_digest_of_rows_takes_keys_of_any_kind_and_holds_no_address_in_memory() -> None:
    def row(value: int) -> Any:
        return dspy.Example(question="q", table={("a", 1): value, 2: {None: [{3: 4}]}, "b": Nameless(value)})

    assert fingerprint([row(1)]) == fingerprint([row(1)]) != fingerprint([row(2)])
    slotted = [dspy.Example(question=Slotted(value)) for value in (1, 1, 2)]
    assert fingerprint(slotted[:1]) == fingerprint(slotted[1:2]) != fingerprint(slotted[2:])
    parent = Nameless(1)
    parent.value = {("a", "b"): parent}  # pyright: ignore[reportAttributeAccessIssue]
    assert fingerprint([dspy.Example(question=parent)]) == fingerprint([dspy.Example(question=parent)])


def test_the_identity_takes_types_that_are_no_data_and_holds_no_address_of_theirs(engine: Any) -> None:
    functions = Enum("Functions", {"ONE": (len, object()), "TWO": (max, object())})
    kinds = [list[Annotated[int, AfterValidator(lambda value: value)]] for _ in range(2)]
    signatures = [dspy.Signature("question -> answer").with_updated_fields("answer", kind) for kind in kinds]
    described_ = [_field("answer", signature.output_fields["answer"]) for signature in signatures]
    assert " at 0x" not in str(described_) and described_[0] == described_[1]
    odd = dspy.Signature("question -> answer").with_updated_fields("answer", functions)
    assert _field("answer", odd.output_fields["answer"])["values"] is None


def with_demo(program: Any) -> Any:
    program.predictors()[0].demos = [dspy.Example(question="one", reasoning="r", answer="yes")]
    return program


def test_the_identity_tells_another_adapter(engine: Any) -> None:
    problem = posed(program_on(engine))
    before = problem.identity()
    with dspy.context(adapter=dspy.JSONAdapter()):
        assert problem.identity() != before
