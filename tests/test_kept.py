"""Nothing that was found is lost: bad candidates, errors that come late, and what the journal goes on from."""

from __future__ import annotations

import gc
import math
import uuid
import weakref
from pathlib import Path
from typing import Any

import dspy
import pytest
from any_event import bits
from dspy import lm15
from dspy.primitives.code_interpreter import CodeInterpreterError
from scripted_engine import (
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
    worth_of,
)
from scripted_text import text_lm

from dspy_greater import local_lm
from dspy_greater.errors import (
    GreaterError,
    LayoutError,
    MetricError,
    ProgramError,
    UnvalidatedError,
)
from dspy_greater.program import servers
from dspy_greater.prompt.layout import Layout
from dspy_greater.run.events import SearchStarted, StepTaken, Validated, Warned
from dspy_greater.run.journal import Journal
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.paper_step import PaperStep

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]
MODEL = planted_engine().model


def engine_that(script: Any = obedient_script) -> ScriptedEngine:
    return ScriptedEngine(script, model=MODEL)


class Solver(dspy.Module):
    """Answers, and then does with the answer what `then` does."""

    def __init__(self, engine: Any, then: Any = None, **lm: Any) -> None:
        super().__init__()
        self.solve = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        self.solve.set_lm(local_lm(engine, cache=False, max_tokens=64, num_retries=0, **lm))
        self.then = then

    def forward(self, question: str) -> Any:
        found = self.solve(question=question)
        if self.then is not None:
            self.then(self.solve.predict.signature.instructions)
        return found


def compiled(program: Any, **settings: Any) -> Any:
    return optimizer(**{"steps": 3, **settings}).compile(program, TRAIN, valset=VALIDATION)


def texts_of(details: Any) -> list[str]:
    return [each.evaluation.instruction for step in details.steps for each in step.candidates if each.evaluation]


# ---- a candidate that fails on every row is a bad candidate


def raising(error: BaseException, unless: str = SEED) -> Any:
    def then(instruction: str) -> None:
        if instruction != unless:
            raise error

    return then


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        CodeInterpreterError("SyntaxError in the sandbox"),
        TimeoutError("the tool took too long"),
        SystemExit(1),  # code that the model wrote may call exit()
        ValueError("no number in the answer"),
    ],
    ids=repr,
)
def test_a_candidate_whose_code_fails_on_every_row_is_only_a_bad_one(error: BaseException) -> None:
    better = compiled(Solver(engine_that(), raising(error)))
    details = better.detailed_results
    assert (len(details.steps), details.stopped_by, instruction_of(better)) == (3, None, SEED)
    tried = [each.evaluation for step in details.steps for each in step.candidates if each.evaluation]
    assert tried and {each.score for each in tried} == {0.0}
    assert all(row.error and row.error.startswith(type(error).__name__) for each in tried for row in each.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        lm15.ContextLengthError("the prompt leaves no room"),
        lm15.TimeoutError("the request timed out"),
        lm15.ServerError("the server failed"),
        lm15.InvalidRequestError("the prompt was refused"),
        OSError("connection reset"),
    ],
    ids=repr,
)
def test_a_candidate_that_no_language_model_answers_is_only_a_bad_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.0)
    asked: list[Any] = []

    def script(prompt: Any) -> str:
        asked.append(prompt)
        if prompt.instruction != SEED:
            raise error
        return obedient_script(f"your objective is:\n{SEED}<|end|><|user|>{prompt.text}")

    program = Solver(engine_that())
    program.set_lm(text_lm(script))
    better = compiled(program, weights=engine_that())
    details = better.detailed_results
    assert (len(details.steps), details.stopped_by, instruction_of(better)) == (3, None, SEED)
    tried = len(texts_of(details))
    probes = 3  # in each step the student is asked on one row whether the model lives
    assert sum(step.spent["runs"] for step in details.steps) == 4 * tried + probes
    again = 0
    if isinstance(error, (lm15.TimeoutError, lm15.ServerError)):  # three times, and what was answered before as well
        again = 3 * 3 * (4 + 1) + 3 * (4 * (len(details.predictors[0].validation) - 1) + 1)
    assert len(asked) == 4 + 4 * tried + probes + 4 * len(details.predictors[0].validation) + again


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["I would rather not.", ""])
def test_a_candidate_whose_answers_never_parse_is_only_a_bad_one(answer: str) -> None:
    better = compiled(
        Solver(
            engine_that(
                lambda prompt: (
                    chat_answer(reasoning="I look.", answer="yes") if instruction_in(prompt) == SEED else answer
                )
            )
        )
    )
    assert len(better.detailed_results.steps) == 3 and better.detailed_results.stopped_by is None


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "good", KeyError("note"), float("nan"), SystemExit(2)], ids=repr)
def test_a_candidate_that_the_metric_cannot_score_is_only_a_bad_one(value: Any) -> None:
    """It returns what is no score, or raises, for every answer of the candidates."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        if prediction.answer != "odd":
            return exact_match(example, prediction)
        if isinstance(value, BaseException):
            raise value
        return value

    def script(prompt: str) -> str:
        return chat_answer(reasoning="I look.", answer="yes" if instruction_in(prompt) == SEED else "odd")

    with pytest.warns(RuntimeWarning, match="The metric failed on 4 of 4 validation rows"):
        better = compiled(Solver(engine_that(script)), metric=metric)
    details = better.detailed_results
    assert (len(details.steps), details.stopped_by, instruction_of(better)) == (3, None, SEED)
    errors = {
        row.error
        for step in details.steps
        for each in step.candidates
        if each.evaluation
        for row in each.evaluation.rows
    }
    assert len(errors) == 1 and str(errors.pop()).startswith("the metric ")


@pytest.mark.slow
def test_a_candidate_that_cannot_be_laid_out_is_only_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Layout.supervised

    def supervised(self: Any, instruction: str, *arguments: Any, **options: Any) -> Any:
        if instruction != SEED:
            raise LayoutError("tokenised differently in different prompts")
        return original(self, instruction, *arguments, **options)

    monkeypatch.setattr(Layout, "supervised", supervised)
    details = compiled(Solver(engine_that()), steps=7).detailed_results
    assert len(details.steps) == 7 and details.stopped_by is None  # more than end a search without a finite loss
    tried = [each.evaluation for step in details.steps for each in step.candidates if each.evaluation]
    assert {each.objective for each in tried} == {(math.inf, math.inf)}


# ---- a dead model is told from it


def dying_engine(*, alive: int, back_after: int = 10**6) -> ScriptedEngine:
    """Answers so many prompts, then none, and after so many refusals again."""
    asked: list[str] = []

    def script(prompt: str) -> str:
        asked.append(prompt)
        if alive < len(asked) <= alive + back_after:
            raise OSError("connection refused")
        return obedient_script(prompt)

    return engine_that(script)


def test_a_model_that_dies_before_the_first_step_is_an_error_with_its_own_words() -> None:
    text = (
        r"could not be called on any of the 4 rows; on the first, predictor `solve\.predict`: LMUnexpectedErr.*refused"
    )
    with pytest.raises(ProgramError, match=text):
        compiled(Solver(dying_engine(alive=0)))


def test_a_model_that_dies_late_ends_the_search_and_what_was_found_is_validated() -> None:
    heard: list[Any] = []
    with pytest.warns(
        RuntimeWarning, match="ended early, after step 2 of 50 of predictor `solve.predict`: ProgramErr"
    ) as told:
        better = compiled(Solver(dying_engine(alive=12, back_after=2)), steps=50, listeners=[heard.append])
    details = better.detailed_results
    assert len(details.steps) == 2 and not details.interrupted
    assert details.stopped_by.startswith("after step 2 of 50 of predictor `solve.predict`: ProgramError: The language")
    assert better.score == details.score >= details.seed_score and not math.isnan(better.score)
    assert [type(event) for event in heard] == [SearchStarted, StepTaken, StepTaken, Warned, Validated]
    assert [str(each.message).endswith("The best that was validated is returned.") for each in told] == [True]
    assert {warning.filename for warning in told} == {__file__}


def test_where_the_model_stays_dead_the_error_carries_what_was_found() -> None:
    student = Solver(dying_engine(alive=12))
    with pytest.raises(
        UnvalidatedError, match="(?s)after step 2 of 50.*then, in the validation.*So no instruction"
    ) as found:
        compiled(student, steps=50, selections=1, explore_every=0)
    error = found.value
    best = error.detailed_results.predictors[0].finalists[0]
    assert instruction_of(error.program) == best.instruction != SEED and repr(best.instruction) in str(error)
    assert math.isnan(error.detailed_results.score)
    assert error.detailed_results.predictors[0].instruction == SEED
    assert isinstance(error.__cause__, ProgramError) and isinstance(error, GreaterError)
    assert instruction_of(student) == SEED


def test_a_model_that_never_answers_while_the_program_goes_on_is_dead_too() -> None:
    class Careless(Solver):
        def forward(self, question: str) -> Any:
            try:
                return self.solve(question=question)
            except Exception:
                return dspy.Prediction(answer="yes")

    with pytest.raises(ProgramError, match="could not be called on any of the 4 rows; on the first, predictor `solve"):
        compiled(Careless(dying_engine(alive=0)))


def test_a_language_model_of_any_make_is_recognised_as_one() -> None:
    class Legacy(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
            raise ZeroDivisionError("no route")

    program = dspy.Predict(dspy.Signature("question -> answer", SEED))
    program.set_lm(Legacy("legacy"))
    with (
        pytest.warns(DeprecationWarning, match="forward"),
        pytest.raises(ProgramError, match="could not be called .* predictor `self`: ZeroDivisionError: no route"),
    ):
        optimizer(weights=engine_that()).compile(program, TRAIN, valset=VALIDATION)


def test_the_probe_asks_the_server_and_not_its_cache() -> None:
    asked: list[str] = []

    class Server:
        supports_function_calling = supports_reasoning = supports_response_schema = False
        supported_params = frozenset({"temperature", "max_tokens"})

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def complete(self, request: Any) -> Any:
            text = f"<|user|>{request.messages[-1].text}"
            asked.append(text)
            if len(asked) > 4:
                raise OSError("connection refused")
            return lm15.Response(
                id=None,
                model="m",
                message=lm15.Message.assistant([lm15.TextPart(obedient_script(text))]),
                finish_reason="stop",
                usage=lm15.Usage(input_tokens=1, output_tokens=1, total_tokens=2),
            )

    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    name = f"served/{uuid.uuid4().hex}"  # nothing that an earlier run left in DSPy's cache
    program.set_lm(dspy.LM(name, engine=Server(), cache=True, num_retries=0))
    with pytest.raises(ProgramError, match="connection refused"):
        optimizer(weights=engine_that()).compile(program, TRAIN, valset=VALIDATION)
    assert len(asked) == 4 + 4 + 1  # the seed, the first candidate, and the probe: a row that the cache knows


# ---- whatever ends a search late


def failing_at(call: int, error: BaseException, original: Any) -> Any:
    calls: list[Any] = []

    def function(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise error
        return original(*arguments, **options)

    return function


LATE = [
    RuntimeError("CUDA error: device-side assert triggered"),
    MemoryError("out of memory"),
    OSError(28, "No space left on device"),
    LayoutError("no such place"),
    RecursionError("too deep"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", LATE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_an_error_of_any_kind_in_a_late_step_returns_the_best_so_far(
    variant: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = DefaultStep if variant == "default" else PaperStep
    monkeypatch.setattr(kind, "take", failing_at(2, error, kind.take))
    program = Solver(engine_that())
    with pytest.warns(
        RuntimeWarning, match=f"after step 1 of 5 of predictor `solve.predict`: {type(error).__name__}: "
    ):
        better = compiled(program, steps=5, variant=variant, selections=30)
    details = better.detailed_results
    assert len(details.steps) == 1 and not details.interrupted and details.out_of_budget is None
    assert worth_of(instruction_of(better)) > 0 and better.score == 1.0
    assert str(error) in details.stopped_by


@pytest.mark.parametrize("error", [*LATE, ProgramError("no predictor")], ids=lambda error: type(error).__name__)
def test_an_error_before_anything_was_found_is_raised_as_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DefaultStep, "take", failing_at(1, error, DefaultStep.take))
    with pytest.raises(type(error)) as found:
        compiled(Solver(engine_that()))
    assert found.value is error


@pytest.mark.slow
def test_what_a_failed_step_held_in_memory_is_given_back_before_the_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    class Tensor:
        """Something large."""

    original, validate = DefaultStep.take, predictor_search.validation_scores
    alive: list[weakref.ref[Any]] = []

    def step(*arguments: Any, **options: Any) -> Any:
        if arguments[1].state.step == 0:
            return original(*arguments, **options)
        large = Tensor()
        alive.append(weakref.ref(large))
        try:
            raise RuntimeError("CUDA out of memory")
        except RuntimeError as error:
            raise MemoryError("one row alone does not fit") from error

    def scores(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        assert [each() for each in alive] == [None]
        return validate(*arguments, **options)

    monkeypatch.setattr(DefaultStep, "take", step)
    monkeypatch.setattr(predictor_search, "validation_scores", scores)
    with pytest.warns(RuntimeWarning, match="MemoryError: one row alone"):
        assert compiled(Solver(engine_that()), selections=30).score == 1.0


@pytest.mark.slow
def test_a_step_that_cannot_be_recorded_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    error = GreaterError("a field holds a value of another type")
    monkeypatch.setattr(Journal, "append", failing_at(3, error, Journal.append))
    with pytest.warns(RuntimeWarning, match="after step 2 of 5 .*GreaterError: a field holds"):
        better = compiled(Solver(engine_that()), steps=5, selections=30)
    assert len(better.detailed_results.steps) == 2 and better.score == 1.0


def test_a_validation_that_cannot_be_recorded_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    error = GreaterError("a field holds a value of another type")
    monkeypatch.setattr(Journal, "append", failing_at(3, error, Journal.append))
    with pytest.warns(RuntimeWarning, match="after step 1 of 1 .*GreaterError: a field holds"):
        better = compiled(Solver(engine_that()), steps=1, selections=30)
    assert better.score == 1.0 and worth_of(instruction_of(better)) > 0


@pytest.mark.slow
def test_a_journal_or_a_bar_that_cannot_be_closed_does_not_cost_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspy_greater.run.lines import LineFile
    from dspy_greater.run.progress import ProgressBar

    def full(self: Any) -> None:
        close(self)
        raise OSError(122, "Disk quota exceeded")

    def gone(self: Any) -> None:
        if self._closing:
            raise ValueError("I/O operation on closed file")

    def leave(self: Any, *details: Any) -> None:
        self._closing = True
        exit_of(self, *details)

    close, exit_of = LineFile.close, ProgressBar.__exit__
    monkeypatch.setattr(LineFile, "close", full)
    monkeypatch.setattr(ProgressBar, "_closing", False, raising=False)
    monkeypatch.setattr(ProgressBar, "__exit__", leave)
    monkeypatch.setattr(ProgressBar, "close", gone)
    with pytest.warns(RuntimeWarning, match="The journal could not be closed: Disk quota exceeded"):
        better = compiled(Solver(engine_that()), steps=1, selections=30, log_dir=tmp_path, progress=False)
    assert better.score == 1.0


def test_a_first_interrupt_after_the_validation_returns_what_was_validated() -> None:
    def listener(event: Any) -> None:
        if isinstance(event, Validated):
            raise KeyboardInterrupt

    better = compiled(Solver(engine_that()), steps=1, selections=30, listeners=[listener])
    assert better.detailed_results.interrupted and better.score == 1.0
    assert worth_of(instruction_of(better)) > 0


@pytest.mark.slow
def test_a_run_that_an_error_ended_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    whole = compiled(Solver(engine_that()), steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(DefaultStep, "take", failing_at(3, OSError("once"), DefaultStep.take))
        with pytest.warns(RuntimeWarning, match="after step 2 of 4"):
            compiled(Solver(engine_that()), steps=4, log_dir=tmp_path)
    resumed = compiled(Solver(engine_that()), steps=4, log_dir=tmp_path)
    assert bits(resumed.detailed_results.predictors) == bits(whole.detailed_results.predictors)
    assert resumed.detailed_results.stopped_by is None


@pytest.mark.slow
def test_a_finalist_that_would_not_be_deployed_as_it_was_scored_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    best = instruction_of(compiled(Solver(engine_that()), steps=1, selections=30))
    original = predictor_search.round_trip

    def round_trip(layout: Any, instruction: str, *arguments: Any) -> None:
        if instruction == best:
            raise LayoutError("The prompt that DSPy sends is not the one that was scored")
        original(layout, instruction, *arguments)

    monkeypatch.setattr(predictor_search, "round_trip", round_trip)
    with pytest.warns(RuntimeWarning, match="One of the best instructions is left out. The prompt that DSPy sends"):
        better = compiled(Solver(engine_that()), steps=1, selections=30)
    assert instruction_of(better) not in (best, SEED) and better.score > better.detailed_results.seed_score


# ---- the validation, and several predictors


def on_validation_rows(error: BaseException) -> Any:
    held_out = {row.question for row in VALIDATION}

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if example.question in held_out:
            raise error
        return exact_match(example, prediction)

    return metric


def test_a_metric_that_fails_on_all_validation_rows_leaves_what_was_found_in_the_error() -> None:
    with pytest.raises(
        UnvalidatedError, match="(?s)in the validation.*MetricError: The metric failed on all 4"
    ) as found:
        compiled(Solver(engine_that()), steps=1, selections=30, metric=on_validation_rows(KeyError("note")))
    assert worth_of(instruction_of(found.value.program)) > 0
    assert isinstance(found.value.__cause__, MetricError)


def test_where_nothing_was_found_the_validations_own_error_is_raised() -> None:
    with pytest.raises(MetricError, match="The metric failed on all 4 validation rows"):
        compiled(Solver(engine_that()), steps=0, metric=on_validation_rows(KeyError("note")))


class Two(dspy.Module):
    """Two predictors with gold values of their own."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.first = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        self.second = dspy.ChainOfThought(dspy.Signature("question -> verdict", SEED))
        self.set_lm(local_lm(engine, cache=False, max_tokens=64, num_retries=0))

    def forward(self, question: str) -> Any:
        answer = self.first(question=question).answer
        return dspy.Prediction(answer=answer, verdict=self.second(question=question).verdict)


def two_script(prompt: str) -> str:
    return obedient_script(prompt).replace("## answer ##", "## verdict ##" if "`verdict`" in prompt else "## answer ##")


def two_rows(rows: Any) -> list[Any]:
    return [dspy.Example(**row.toDict(), verdict=row.answer).with_inputs("question") for row in rows]


def both_match(example: Any, prediction: Any, trace: Any = None) -> float:
    return ((prediction.answer == example.answer) + (prediction.verdict == example.verdict)) / 2


def compile_two(**settings: Any) -> Any:
    quick = optimizer(**{"metric": both_match, "steps": 1, "selections": 30, **settings})
    return quick.compile(Two(engine_that(two_script)), two_rows(TRAIN), valset=two_rows(VALIDATION))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "step", "validation"])
def test_an_error_in_the_second_predictor_keeps_what_the_first_one_gained(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    whole = compile_two()
    where, name = {
        "start": (predictor_search.PredictorSearch, "start"),
        "step": (DefaultStep, "take"),
        "validation": (predictor_search, "validation_scores"),
    }[moment]
    monkeypatch.setattr(where, name, failing_at(2, OSError("gone"), getattr(where, name)))
    with pytest.warns(RuntimeWarning, match=r"ended early, .* of predictor `second\.predict`: OSError: gone"):
        better = compile_two()
    details = better.detailed_results
    assert instruction_of(better.first) == instruction_of(whole.first) != SEED
    assert instruction_of(better.second) == SEED
    assert better.score == details.score == whole.detailed_results.predictors[0].score == 0.5
    assert details.seed_score == 0.0 and "OSError: gone" in details.stopped_by


class Router(dspy.Module):
    """Goes the second way on some questions, and as long as the first way is what it was."""

    def __init__(self, engine: Any, rare: str) -> None:
        super().__init__()
        self.usual, self.rare = (dspy.ChainOfThought(dspy.Signature("question -> answer", SEED)) for _ in range(2))
        self.set_lm(local_lm(engine, cache=False, max_tokens=64))
        self.word = rare

    def forward(self, question: str) -> Any:
        changed = self.usual.predict.signature.instructions != SEED
        return (self.rare if self.word in question and not changed else self.usual)(question=question)


def test_a_predictor_that_is_never_called_is_known_before_the_first_search_and_costs_nothing(tmp_path: Path) -> None:
    heard: list[Any] = []
    engine = engine_that()
    text = r"Predictor `rare\.predict` was not called on any of the 4 training rows\. It keeps its instruction\."

    def listener(event: Any) -> None:
        heard.append(type(event).__name__)

    with pytest.warns(UserWarning, match=text):
        better = compiled(Router(engine, "zebra"), steps=2, log_dir=tmp_path, listeners=[listener])
    assert heard == ["NotCalled", "SearchStarted", "StepTaken", "StepTaken", "Validated"]
    details = better.detailed_results
    assert [each.name for each in details.predictors] == ["usual.predict"] and details.stopped_by is None
    assert better.score >= details.seed_score and instruction_of(better.rare) == SEED
    report, first = (tmp_path / "report.html").read_text(), heard.copy()
    heard.clear()
    settings: dict[str, Any] = {"steps": 2, "log_dir": tmp_path, "listeners": [listener]}
    again = compiled(Router(engine_that(), "zebra"), **settings)  # nothing is run, nor warned of
    assert bits(again.detailed_results.predictors) == bits(details.predictors)
    assert heard == first and (tmp_path / "report.html").read_text() == report
    assert "left as they are: rare.predict." in report and "Not searched yet" not in report


def test_a_predictor_that_comes_first_and_is_never_called_is_passed_over(tmp_path: Path) -> None:
    class Backwards(Router):
        def __init__(self, engine: Any) -> None:
            dspy.Module.__init__(self)
            self.rare, self.usual = (dspy.ChainOfThought(dspy.Signature("question -> answer", SEED)) for _ in range(2))
            self.set_lm(local_lm(engine, cache=False, max_tokens=64))
            self.word = "zebra"

    engine = engine_that()
    with pytest.warns(UserWarning, match=r"`rare\.predict` was not called"):
        better = compiled(Backwards(engine), steps=1, selections=1)
    assert [each.name for each in better.detailed_results.predictors] == ["usual.predict"]
    assert sum(engine.batches) == 4 + 4 + 4 + 8  # its turn and the next one's, a candidate, two finalists


@pytest.mark.slow
def test_a_predictor_that_is_no_longer_called_under_what_was_found_before_it_is_passed_over(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 1, "selections": 30, "log_dir": tmp_path}
    with pytest.warns(UserWarning, match=r"`rare\.predict` was not called on any of the 4 training rows\. It keeps"):
        better = compiled(Router(engine_that(), "one"), **settings)
    assert [each.name for each in better.detailed_results.predictors] == ["usual.predict"]
    assert better.score == 1.0
    report = (tmp_path / "report.html").read_text()
    assert "left as they are: rare.predict." in report and "Not searched yet" not in report
    again = compiled(Router(engine_that(), "one"), **settings)  # it is known, and not warned of again
    assert bits(again.detailed_results.predictors) == bits(better.detailed_results.predictors)
    assert (tmp_path / "report.html").read_text() == report


@pytest.mark.slow
def test_an_interrupt_in_the_second_seeds_run_keeps_the_first_predictor() -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        if validated:
            raise KeyboardInterrupt
        return both_match(example, prediction)

    validated: list[Any] = []
    better = compile_two(
        metric=metric, listeners=[lambda event: validated.append(1) if isinstance(event, Validated) else None]
    )
    assert better.detailed_results.interrupted and better.score == 0.5
    assert [each.name for each in better.detailed_results.predictors] == ["first.predict"]


@pytest.mark.slow
def test_an_interrupt_in_the_second_validation_keeps_the_score_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    original = predictor_search.validation_scores
    monkeypatch.setattr(predictor_search, "validation_scores", failing_at(2, KeyboardInterrupt(), original))
    better = compile_two()
    assert better.detailed_results.interrupted and better.score == 0.5
    assert [instruction_of(better.first) == SEED, instruction_of(better.second) == SEED] == [False, True]


# ---- another optimizer first


class First(dspy.teleprompt.Teleprompter):
    """Finds this instruction."""

    def __init__(self, found: str) -> None:
        self.found = found

    def compile(self, student: Any, *, trainset: Any, teacher: Any = None, valset: Any = None) -> Any:
        copied = student.deepcopy()
        predictor = copied.predictors()[0]
        predictor.signature = predictor.signature.with_instructions(self.found)
        return copied


COUNTING = "Please count it now."


def compile_warm(found: str = COUNTING, **settings: Any) -> Any:
    return compiled(Solver(engine_that()), warm_start=First(found), steps=1, selections=30, **settings)


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()], ids=repr)
def test_what_the_first_optimizer_found_is_kept_where_the_second_finds_nothing(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    monkeypatch.setattr(predictor_search.PredictorSearch, "start", failing_at(1, error, None))
    with pytest.warns(
        RuntimeWarning, match=f"what the first optimizer found ended with {type(error).__name__}"
    ) as told:
        better = compile_warm()
    assert (instruction_of(better), better.score) == (COUNTING, 1.0)
    assert [each["score"] for each in better.candidate_programs] == [1.0, 0.0]
    assert {warning.filename for warning in told} == {__file__}


def test_where_the_first_optimizer_found_nothing_either_the_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    monkeypatch.setattr(predictor_search.PredictorSearch, "start", failing_at(1, OSError("gone"), None))
    with pytest.raises(OSError, match="gone"):
        compile_warm(SEED)


def test_what_the_second_found_takes_part_though_its_own_validation_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.predictor_search as predictor_search

    original = predictor_search.validation_scores
    monkeypatch.setattr(predictor_search, "validation_scores", failing_at(1, OSError("gone"), original))
    with pytest.warns(RuntimeWarning, match="ended with UnvalidatedError"):
        better = compile_warm("Please look.")
    assert better.score == 1.0 and worth_of(instruction_of(better)) > 0
    assert len(better.candidate_programs) == 3


@pytest.mark.slow
def test_a_last_comparison_that_fails_leaves_what_was_found_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.warm_start as warm_start

    monkeypatch.setattr(warm_start, "validation_scores", failing_at(1, OSError("gone"), None))
    with pytest.raises(UnvalidatedError, match="The last comparison with the student failed: OSError: gone") as found:
        compile_warm()
    assert worth_of(instruction_of(found.value.program)) >= 1
    assert found.value.detailed_results.predictors[0].seed_instruction == COUNTING


def test_a_second_interrupt_after_a_warm_start_is_not_followed_by_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy_greater.search.predictor_search as predictor_search
    import dspy_greater.search.warm_start as warm_start

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken):
            raise KeyboardInterrupt

    compared: list[Any] = []
    monkeypatch.setattr(predictor_search, "validation_scores", interrupted)
    monkeypatch.setattr(warm_start, "validation_scores", lambda *_, **__: compared.append(1))
    with pytest.raises(KeyboardInterrupt):
        compile_warm(listeners=[listener])
    assert not compared


@pytest.mark.slow
def test_an_interrupt_in_the_last_comparison_keeps_the_student_and_a_second_one_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import dspy_greater.search.warm_start as warm_start

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "validation_scores", interrupted)
    better = compile_warm()
    assert instruction_of(better) == SEED and better.detailed_results.interrupted
    assert better.detailed_results.warm_start.undone
    unknown = [math.isnan(each["score"]) for each in better.candidate_programs]
    assert unknown == sorted(unknown) and any(unknown)  # what was validated comes first
    assert any(instruction_of(each["program"]) == COUNTING for each in better.candidate_programs)

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_warm(listeners=[listener])
