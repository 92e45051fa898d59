"""What the student's own run says before the first search: whose error it was, on which row, and how often."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy.primitives.code_interpreter import CodeExecutionError, CodeInterpreterError
from scripted_engine import (
    SEED,
    ScriptedEngine,
    chat_answer,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
)
from scripted_text import text_lm

from dspy_greater import local_lm
from dspy_greater.errors import ContextLengthError, DataError, ProgramError, UnusedPredictorError
from dspy_greater.program.dataset import numbers_in, split
from dspy_greater.program.inputs import refuse_strange_inputs
from dspy_greater.program.traced_run import trace_calls
from dspy_greater.settings import Settings

ROWS = planted_rows(8)
MODEL = planted_engine().model


class Solver(dspy.Module):
    """Answers, and then does what `then` does with the question."""

    def __init__(self, then: Any = None, script: Any = obedient_script, model: Any = MODEL) -> None:
        super().__init__()
        self.engine = ScriptedEngine(script, model=model)
        self.solve = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        self.solve.set_lm(local_lm(self.engine, cache=False, max_tokens=64, num_retries=0))
        self.then = then

    def forward(self, question: str) -> Any:
        found = self.solve(question=question)
        if self.then is not None:
            self.then(question)
        return found


def compiled(program: Any, rows: Any = ROWS, **settings: Any) -> Any:
    return optimizer(**{"steps": 1, **settings}).compile(program, rows)


def run_on(program: Any, row: Any = ROWS[0]) -> Any:
    return trace_calls(program, row)


# ---- whose failure it was


def no_deno(question: str) -> None:
    dspy.PythonInterpreter(deno_command=["/no/deno"])("1 + 1")


def broken_tool(question: str) -> None:
    dspy.Tool(lambda text: 1 / 0, name="divide")(text=question)


def of_my_own(question: str) -> None:
    raise KeyError("index")


def leaving(question: str) -> None:
    raise SystemExit("the model wrote exit()")


def cancelled(question: str) -> None:
    raise asyncio.CancelledError


def raising(error: BaseException) -> Any:
    def then(question: str) -> None:
        raise error

    return then


@pytest.mark.parametrize(
    ("then", "failure", "source", "error"),
    [
        (no_deno, "setup", "the code interpreter", "CodeInterpreterError: Deno executable not found"),
        (broken_tool, "program", "the tool `divide`", "ZeroDivisionError: division by zero"),
        (of_my_own, "program", "the program's own code", "KeyError: 'index'"),
        (leaving, "program", "the program's own code", "SystemExit: the model wrote exit()"),
        (cancelled, "program", "the program's own code", "CancelledError: "),
        (
            raising(CodeExecutionError("NameError: x")),
            "program",
            "the program's own code",
            "CodeExecutionError: Name",
        ),
        (raising(ModuleNotFoundError("no faiss")), "setup", "the program's own code", "ModuleNotFoundError: no faiss"),
        (raising(ConnectionError("the index")), "setup", "the program's own code", "ConnectionError: the index"),
        (raising(TimeoutError("slow")), "program", "the program's own code", "TimeoutError: slow"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_an_error_behind_the_answer_is_told_from_the_language_models(
    then: Any, failure: str, source: str, error: str
) -> None:
    trace = run_on(Solver(then))
    assert (trace.failure, trace.source) == (failure, source)
    assert trace.error is not None and trace.error.startswith(error)
    assert not any(call.lm_failed for call in trace.calls)


def test_an_answer_that_does_not_parse_is_the_predictors() -> None:
    trace = run_on(Solver(script=lambda prompt: "I would rather not."))
    assert (trace.failure, trace.source) == ("parse", "predictor `solve.predict`")


@pytest.mark.parametrize(
    "error", [OSError("no route"), lm15.TimeoutError("slow"), lm15.ContextLengthError("long"), lm15.AuthError("who?")]
)
def test_a_language_models_error_is_its_own(error: Exception) -> None:
    def script(asked: Any) -> str:
        raise error

    program = Solver()
    program.set_lm(text_lm(script))
    trace = run_on(program)
    assert (trace.failure, trace.source) == ("lm", "the language model of predictor `solve.predict`")
    assert str(error) in str(trace.error) and [call.lm_failed for call in trace.calls] == [True]


def test_what_was_raised_from_a_language_models_error_is_the_language_models() -> None:
    def script(asked: Any) -> str:
        raise OSError("no route")

    class Wrapped(Solver):
        def forward(self, question: str) -> Any:
            try:
                return self.solve(question=question)
            except Exception as error:
                raise CodeInterpreterError("the bridge broke") from error

    program = Wrapped()
    program.set_lm(text_lm(script))
    assert run_on(program).failure == "lm"


def test_an_error_while_a_language_models_error_is_handled_is_the_programs() -> None:
    def script(asked: Any) -> str:
        raise OSError("no route")

    class Handling(Solver):
        def forward(self, question: str) -> Any:
            try:
                return self.solve(question=question)
            except Exception:
                return {}["fallback"]

    program = Handling()
    program.set_lm(text_lm(script))
    trace = run_on(program)
    assert (trace.failure, trace.error) == ("program", "KeyError: 'fallback'")


# ---- what fails on every row


def test_an_interpreter_that_is_not_installed_ends_the_run_with_its_own_words() -> None:
    program = Solver(no_deno)
    text = (
        r"(?s)The program failed on all 4 training rows, and not by what the language model wrote: on row \d of the "
        r"trainset, \{'question': .*\}, after predictor `solve.predict` was called, the code interpreter raised "
        r"CodeInterpreterError: Deno executable not found.*No instruction can mend that\. Try program\(\*\*trainset\["
    )
    with pytest.raises(ProgramError, match=text) as found:
        compiled(program)
    assert "could not be called" not in str(found.value)
    assert len(program.engine.batches) == 1


@pytest.mark.parametrize("then", [broken_tool, of_my_own, raising(CodeExecutionError("NameError: x")), leaving])
def test_code_that_fails_on_every_row_may_fail_for_what_the_model_wrote(then: Any) -> None:
    with pytest.warns(RuntimeWarning, match="(?s)failed on all 4 training rows .* on row . of .* failed with") as told:
        better = compiled(Solver(then))
    assert len(better.detailed_results.steps) == 1
    assert "check the adapter and the LM's max_tokens" in str(told[0].message)


def test_different_things_that_are_missing_may_be_what_the_model_asked_for() -> None:
    def missing(question: str) -> None:
        raise FileNotFoundError(question)

    with pytest.warns(RuntimeWarning, match="failed on all 4 training rows"):
        assert compiled(Solver(missing)).detailed_results.steps


# ---- what fails on some rows is counted


def on_apples(error: BaseException) -> Any:
    def then(question: str) -> None:
        if "apples" in question:
            raise error

    return then


@pytest.mark.parametrize("error", [KeyError("index"), OSError("the index")], ids=repr)
def test_rows_on_which_the_program_fails_are_counted_and_named(error: Exception) -> None:
    with pytest.warns(RuntimeWarning) as told:
        better = compiled(Solver(on_apples(error)))
    failed = [row for row in better.detailed_results.predictors[0].seed.rows if row.error]
    message = str(told[0].message)
    assert 0 < len(failed) < 4
    found = re.fullmatch(
        rf"The program failed on {len(failed)} of 4 training rows, which count as mistakes: rows? ([\d, ]+) of the "
        rf"trainset\. On row (\d+) of the trainset, (.*), the program's own code failed with {type(error).__name__}.*",
        message,
    )
    assert found is not None, message
    numbers = [int(number) for number in found[1].split(", ")]
    assert len(numbers) == len(failed) and int(found[2]) in numbers
    assert all("apples" in ROWS[number].question for number in numbers)
    assert found[3] == repr({"question": ROWS[int(found[2])].question})


def test_rows_whose_answers_do_not_parse_are_nothing_to_warn_of() -> None:
    def script(prompt: str) -> str:
        return "I would rather not." if "apples" in prompt.rsplit("<|user|>", 1)[-1] else obedient_script(prompt)

    assert compiled(Solver(script=script)).detailed_results.steps  # a warning would be an error


def test_a_metric_that_raises_wherever_there_was_an_answer_is_counted_among_the_answers() -> None:
    def script(prompt: str) -> str:
        return "I would rather not." if "apples" in prompt.rsplit("<|user|>", 1)[-1] else obedient_script(prompt)

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        raise ZeroDivisionError("no pears")

    with pytest.warns(RuntimeWarning) as told:
        compiled(Solver(script=script), metric=metric, steps=0)
    of_metric, of_all = [str(each.message) for each in told][:2]
    assert re.match(r"The metric failed on [123] of 4 .*ZeroDivisionError: no pears\. Mend the metric", of_metric)
    assert of_all.startswith("The program failed on all 4 training rows")


def test_rows_are_numbered_as_the_caller_has_them() -> None:
    train, _ = split(ROWS, None, settings=Settings.of(None, train_rows=3, validation_rows=3), seed=0)
    assert [ROWS[number] for number in numbers_in(train, ROWS)] == list(train)


def test_duplicates_are_counted_as_the_rows_that_they_are() -> None:
    for rows, valset, count in (([ROWS[0]] * 8, None, "4 of 4"), (ROWS[:4], [ROWS[0], ROWS[0], ROWS[5]], "2 of 3")):
        with pytest.warns(UserWarning, match=f"{count} validation rows are also training rows"):
            split(rows, valset, settings=Settings(), seed=0)


# ---- inputs


class Explicit(Solver):
    """Its `forward` names what it takes."""


class Loose(Solver):
    """Its `forward` takes what it is given, and renames nothing."""

    def forward(self, **inputs: Any) -> Any:
        return self.solve(**inputs)


def renamed(name: str, count: int = 8) -> list[Any]:
    return [dspy.Example(**{name: row.question}, answer=row.answer).with_inputs(name) for row in ROWS[:count]]


@pytest.mark.parametrize("program", [Explicit, lambda: program_on(ScriptedEngine(obedient_script, model=MODEL))])
def test_rows_that_name_their_inputs_differently_are_refused_before_the_first_token(program: Any) -> None:
    student = program()
    with pytest.raises(DataError) as found:
        compiled(student, renamed("text"))
    assert str(found.value) == (
        "The inputs of the rows of the trainset are `text`, and the program takes `question`. Rename them, or say "
        "which fields are inputs with example.with_inputs('question')."
    )
    assert student.predictors()[0].lm.engine.engine.batches == []


def test_rows_that_name_their_inputs_differently_are_found_in_the_students_run_where_anything_goes() -> None:
    text = (
        r"`solve.predict` takes `question`, and was called on the training rows with nothing of that name; the rows' "
    )
    with pytest.raises(DataError, match=text + "inputs are `text`"):
        compiled(Loose(), renamed("text"))


def test_rows_of_which_some_fit_are_run() -> None:
    rows = [*ROWS[:4], *renamed("text", 1)]
    refuse_strange_inputs(Explicit(), rows)
    with pytest.raises(DataError, match="rows of the valset are `text`, and the program takes `question`"):
        optimizer(steps=0).compile(Explicit(), ROWS, valset=renamed("text"))


def test_a_program_that_renames_its_inputs_itself_is_run_as_it_is() -> None:
    class Renaming(Solver):
        def forward(self, text: str, *, hint: str = "") -> Any:
            return self.solve(question=text)

    assert compiled(Renaming(), renamed("text")).detailed_results.steps


def test_a_signature_without_inputs_is_refused_by_name() -> None:
    program = dspy.Predict(dspy.Signature("-> answer", "Say a word."))
    program.set_lm(local_lm(ScriptedEngine(obedient_script, model=MODEL), cache=False))
    with pytest.raises(ProgramError, match="`self` has no input field, so that its prompt is the same for every row"):
        compiled(program, [dspy.Example(answer="yes").with_inputs()] * 4)


def test_only_a_module_that_runs_copies_is_said_to_hide_its_predictors() -> None:
    class Idle(Solver):
        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer="yes")

    with pytest.raises(UnusedPredictorError) as found:
        compiled(Idle())
    assert "BestOfN" not in str(found.value) and "Try program(**trainset[0].inputs()) and see" in str(found.value)
    inner = Solver()
    best = dspy.BestOfN(module=inner, N=1, reward_fn=lambda inputs, prediction: 1.0, threshold=1.0)
    with pytest.raises(
        UnusedPredictorError, match="BestOfN runs copies of a program: compile the inner program and wr"
    ):
        compiled(best)


# ---- the context


class Narrow(ScriptedEngine):
    """Has a context of so many tokens."""

    limit = 10**6

    @property
    def context_length(self) -> int:
        return self.limit


def narrow(limit: int) -> Any:
    engine = Narrow(obedient_script, model=MODEL)
    engine.limit = limit
    return engine


def prompt_tokens(question: str) -> int:
    from dspy_greater.program.predictors import predictors_of
    from dspy_greater.prompt.layout import Layout

    program = program_on(ScriptedEngine(obedient_script, model=MODEL))
    [predictor] = predictors_of(program)
    layout = Layout(predictor.lm.engine.engine.tokenizer, predictor.adapter, predictor.signature)
    return len(layout.prompt(SEED, {"question": question}).token_ids)


LONG = dspy.Example(question="maybe " * 30 + "one of apples", answer="yes").with_inputs("question")


@pytest.mark.parametrize("room", [1, 5])
def test_prompts_that_leave_no_room_for_the_gold_value_are_refused_before_the_first_token(room: int) -> None:
    engine = narrow(max(prompt_tokens(row.question) for row in ROWS) + room)
    text = (
        r"The prompt of predictor `predict` and the gold value of `answer` behind it take (\d+) tokens for row \d of "
        rf"the trainset, {{'question': '\w+ of \w+'}}, and scripted has a context of {engine.limit} tokens\. No train"
    )
    with pytest.raises(ContextLengthError, match=text) as found:
        optimizer().compile(program_on(engine), ROWS)
    [needed] = re.findall(text, str(found.value))
    assert int(needed) > engine.limit and "dtype" not in str(found.value)
    assert engine.batches == []


def test_rows_that_leave_no_room_are_flagged_where_others_do() -> None:
    rows = [*ROWS[:3], LONG]
    engine = narrow(prompt_tokens(LONG.question) + 3)
    text = (
        r"row 3 of the trainset, .*Nothing can be learned from the gold values of 1 of 4 training rows.*: row 3\. Leave"
    )
    with pytest.warns(RuntimeWarning, match=text):
        better = optimizer(steps=1).compile(program_on(engine), rows, valset=ROWS[4:])
    assert len(better.detailed_results.steps) == 1


def test_a_context_with_room_for_the_gold_values_is_no_matter() -> None:
    engine = narrow(prompt_tokens(ROWS[0].question) + 60)
    assert optimizer(steps=1).compile(program_on(engine), ROWS[:4], valset=ROWS[4:]).detailed_results.steps


class Retrieving(Solver):
    """Gives its predictor more than the row has."""

    def forward(self, question: str) -> Any:
        return self.solve(question="maybe " * 30 + question)


class TwoSteps(dspy.Module):
    """The second predictor is given more than the row has."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.query = dspy.Predict(dspy.Signature("question -> query", "Write it."))
        self.answer = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        self.set_lm(local_lm(engine, cache=False, max_tokens=64))

    def forward(self, question: str) -> Any:
        self.query(question=question)
        return self.answer(question="maybe " * 30 + question)


def two_script(prompt: str) -> str:
    return chat_answer(query="fruit") if "`query`" in prompt else obedient_script(prompt)


def test_what_a_program_adds_to_the_rows_is_measured_in_the_students_run_and_for_all_predictors() -> None:
    longest = max(prompt_tokens("maybe " * 30 + row.question) for row in ROWS)
    engine = narrow(longest + 3)
    text = (
        r"`answer\.predict` and the gold value of `answer` behind it take \d+ tokens .* 'maybe maybe .*No training row"
    )
    engine.script = two_script
    heard: list[Any] = []
    with pytest.raises(ContextLengthError, match=text):
        optimizer(steps=1, listeners=[heard.append]).compile(TwoSteps(engine), ROWS)
    assert heard == []  # though the other predictor comes first, and would fit
    single = Retrieving()
    lm = local_lm(engine, cache=False, max_tokens=64)
    engine.script = obedient_script
    single.set_lm(lm)
    with pytest.raises(ContextLengthError, match="`solve.predict` and the gold value .* 'maybe maybe"):
        optimizer(steps=1).compile(single, ROWS)


@pytest.mark.slow
def test_candidates_that_no_longer_fit_do_not_end_a_search() -> None:
    from dspy_greater.program.predictors import predictors_of
    from dspy_greater.prompt.layout import Layout

    [predictor] = predictors_of(program_on(narrow(10**6)))
    layout = Layout(predictor.lm.engine.engine.tokenizer, predictor.adapter, predictor.signature)
    laid_out = [layout.supervised(SEED, dict(row.inputs()), {"reasoning": ""}, "answer", row.answer) for row in ROWS]
    engine = narrow(max(len(each.token_ids) for each in laid_out))  # all rows fit, and not with one token more
    better = optimizer(steps=8, selections=30, max_failed_steps=1).compile(program_on(engine), ROWS)
    details = better.detailed_results
    assert len(details.steps) == 8 and details.stopped_by is None
    tried = [each for step in details.steps for each in step.candidates if each.evaluation]
    assert {math.isinf(each.evaluation.objective[0]) for each in tried if each.edit == "insert"} == {True}
    assert all(math.isfinite(step.chosen.objective[0]) for step in details.steps)
