"""Walking programs, and tracing their calls."""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import dspy
import pytest
from dspy.utils.dummies import DummyLM

from dspy_greater.errors import DataError, ProgramError
from dspy_greater.program.copies import copy_program, with_instructions
from dspy_greater.program.dataset import check_examples, refuse_unfit_gold, supervised_field
from dspy_greater.program.predictors import predictors_of, refuse_unsupported, refuse_unusable, search_adapter
from dspy_greater.program.traced_run import carrying, trace_calls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dspy")


class TwoHops(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = dspy.Predict("question -> query")
        self.again = self.query
        self.answer = dspy.ChainOfThought("question, context -> answer")

    def forward(self, question: str) -> Any:
        context = self.query(question=question).query
        return self.answer(question=question, context=context)


class Weights:
    """Stands for an in-process engine whose weights must not be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the weights were copied")


def row(**values: Any) -> dspy.Example:
    return dspy.Example(**values).with_inputs("question")


ROWS = [row(question="1 + 1?", answer="two"), row(question="2 + 2?", answer="four")]
REPLIES = [{"query": "sum"}, {"reasoning": "count", "answer": "two"}]


def dummy(replies: Any = None) -> Any:
    return DummyLM(list(replies or REPLIES))


# --- predictors ---


def test_every_predictor_is_listed_once_with_its_path() -> None:
    program = TwoHops()
    predictors = predictors_of(program)
    assert [predictor.name for predictor in predictors] == ["query", "answer.predict"]
    assert predictors[1].instruction == program.answer.predict.signature.instructions
    assert predictors[1].input_fields == ("question", "context")
    assert predictors[1].output_fields == ("reasoning", "answer")


def test_a_bare_predictor_is_a_program_too() -> None:
    program = dspy.Predict("question -> answer")
    assert [predictor.name for predictor in predictors_of(program)] == ["self"]
    assert with_instructions(program, {"self": "Add up."}).signature.instructions == "Add up."


def test_the_model_of_a_predictor_comes_before_the_global_one() -> None:
    program, own, common = TwoHops(), dummy(), dummy()
    program.query.lm = own
    with dspy.context(lm=common):
        assert [predictor.lm for predictor in predictors_of(program)] == [own, common]


def test_the_search_never_falls_back_to_another_prompt() -> None:
    mine = dspy.ChatAdapter()
    with dspy.context(adapter=mine):
        adapter = search_adapter()
    assert adapter.use_json_adapter_fallback is False
    assert mine.use_json_adapter_fallback is True
    assert search_adapter().use_json_adapter_fallback is False
    with dspy.context(adapter=dspy.XMLAdapter()):
        assert type(search_adapter()) is dspy.XMLAdapter


# --- gold values ---


def test_the_supervised_field_is_the_last_output_with_gold_values() -> None:
    predictors = predictors_of(TwoHops())
    assert supervised_field(predictors[0], ROWS) is None
    assert supervised_field(predictors[1], ROWS) == "answer"


def test_an_input_of_the_same_name_is_not_a_gold_value() -> None:
    predictor = predictors_of(dspy.Predict("question -> topic"))[0]
    assert supervised_field(predictor, [dspy.Example(question="a", topic="b").with_inputs("question", "topic")]) is None


def test_missing_gold_names_rows_and_field() -> None:
    predictor = predictors_of(TwoHops())[1]
    rows = [*ROWS, row(question="3?"), row(question="4?", answer=None)]
    with pytest.raises(DataError, match=r"Rows 2, 3 of the trainset have no gold value for `answer`.*`answer.predict`"):
        supervised_field(predictor, rows)
    with pytest.raises(DataError, match=r"Row 2 of the trainset has no gold value for `answer`"):
        supervised_field(predictor, rows[:3])
    many = [ROWS[0], *[row(question="?")] * 15]
    with pytest.raises(DataError, match=r"Rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 5 more"):
        supervised_field(predictor, many)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_gold_value_is_a_missing_one(empty: str) -> None:
    predictor = predictors_of(TwoHops())[1]
    with pytest.raises(DataError, match=r"Row 2 of the trainset has no gold value for `answer`"):
        supervised_field(predictor, [*ROWS, row(question="?", answer=empty)])
    assert supervised_field(predictor, [row(question="?", answer=empty)]) is None


def test_gold_values_that_do_not_fit_their_field_are_named_by_row() -> None:
    predictor = predictors_of(dspy.Predict("question -> count: int"))[0]
    refuse_unfit_gold(predictor, "count", [row(question="1 + 1?", count=2), row(question="2 + 2?", count="4")])
    rows = [row(question="?", count=count) for count in (1, "two", 3, "four")]
    with pytest.raises(
        DataError,
        match=r"(?s)Rows 1, 3 of the trainset have a gold value that does not fit `count` of predictor `self`.*"
        r"counted from 0\). In row 1: The gold value 'two' .*int.*Correct the rows, or the field's type",
    ):
        refuse_unfit_gold(predictor, "count", rows)


@pytest.mark.parametrize(
    ("student", "kind"),
    [(TwoHops, "the class TwoHops"), ("question -> answer", "a str"), (None, "a NoneType"), (len, "a builtin_")],
)
def test_what_is_not_a_program_is_refused_with_what_to_pass(student: Any, kind: str) -> None:
    with pytest.raises(ProgramError, match=f"The student is {kind}.*Pass an instance of a dspy.Module, such as"):
        predictors_of(student)


def test_unusable_examples_say_how_to_mend_them() -> None:
    with pytest.raises(DataError, match=r"Row 1 of the trainset does not say.*\.with_inputs\('question', \.\.\.\)"):
        check_examples([ROWS[0], dspy.Example(question="a", answer="b")])
    with pytest.raises(DataError, match=r"Row 0 of the valset is not dspy.Example"):
        check_examples([{"question": "a"}], name="valset")
    with pytest.raises(DataError, match="The trainset is empty"):
        check_examples([])


# --- what is refused ---


def search(query: str) -> str:
    """Look something up."""
    return query


def test_unsupported_programs_say_what_to_do() -> None:
    with dspy.context(lm=dummy()):
        for predictor in predictors_of(TwoHops()):
            refuse_unsupported(predictor)
        with pytest.raises(ProgramError, match="no predictors to optimise"):
            refuse_unusable(predictors_of(dspy.Module()))
        (picture,) = predictors_of(dspy.Predict("picture: dspy.Image -> answer"))
        with pytest.raises(ProgramError, match=r"field `picture` of type Image.*text field, or leave .*predictors="):
            refuse_unsupported(picture)
        (past,) = predictors_of(dspy.Predict("past: dspy.History, question -> answer"))
        refuse_unsupported(past)  # its messages are text
    with (
        dspy.context(lm=None),
        pytest.raises(ProgramError, match=r"`query` has no language model.*dspy.configure"),
    ):
        refuse_unusable(predictors_of(TwoHops()))
    with (
        dspy.context(lm="openai/x"),
        pytest.raises(ProgramError, match=r"the string 'openai/x'.*Pass a dspy.LM"),
    ):
        refuse_unusable(predictors_of(TwoHops()))


class Facts(dspy.Type):
    """A type of a user's own that is written as text, or as something else."""

    items: list[str]
    apart: bool = False

    def format(self) -> Any:
        text = " and ".join(self.items)
        return [{"type": "image_url", "image_url": {"url": text}}] if self.apart else text


def test_a_type_of_the_users_own_is_taken_where_the_rows_show_that_it_is_text() -> None:
    signature = dspy.Signature("question, facts -> answer").with_updated_fields("facts", type_=Facts)
    several = dspy.Signature("question, facts -> answer").with_updated_fields("facts", type_=list[Facts])
    with dspy.context(lm=dummy()):
        (predictor,) = predictors_of(dspy.Predict(signature))
        (many,) = predictors_of(dspy.Predict(several))
    text, image = Facts(items=["a", "b"]), Facts(items=["a", "b"], apart=True)
    refuse_unsupported(predictor, [row(question="?", facts=text)])
    refuse_unsupported(many, [row(question="?", facts=[text, text])])
    for strange, rows in (
        (predictor, []),
        (predictor, [row(question="?")]),
        (predictor, [row(question="?", facts=text), row(question="?", facts=image)]),
        (many, [row(question="?", facts=[text, image])]),
    ):
        with pytest.raises(ProgramError, match=r"field `facts` of type Facts"):
            refuse_unsupported(strange, rows)


def double(number: int) -> int:
    """Twice a number,
    exactly."""
    return 2 * number


@pytest.mark.parametrize(
    ("agent", "lists"),
    [
        (partial(dspy.CodeAct, tools=[double]), ["codeact"]),
        (partial(dspy.RLM, tools=[double]), ["generate_action"]),
        (dspy.RLM, ["generate_action"]),
    ],
)
def test_an_instruction_that_describes_the_tools_of_its_module_lists_them(agent: Any, lists: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of CodeAct
        module = agent("question -> answer")
    with dspy.context(lm=dummy()):
        assert [predictor.name for predictor in predictors_of(module) if predictor.lists_tools] == lists


def test_an_instruction_that_only_names_a_tool_lists_none() -> None:
    student = TwoHops()
    student.tools = [dspy.Tool(double, name="query")]
    with dspy.context(lm=dummy()):
        assert not any(predictor.lists_tools for predictor in predictors_of(student))


def test_an_instruction_that_lists_tools_is_known_by_its_fields() -> None:
    with dspy.context(lm=dummy()):
        agent = predictors_of(dspy.ReAct("question -> answer", tools=[search]))
        assert [predictor.lists_tools for predictor in agent] == [True, False]
        for predictor in agent:
            refuse_unsupported(predictor)
        assert [predictor.lists_tools for predictor in predictors_of(TwoHops())] == [False, False]


# --- copies ---


def test_a_copy_has_the_instruction_and_the_student_does_not() -> None:
    student = TwoHops()
    before = student.dump_state()
    copied = with_instructions(student, {"answer.predict": "Add the items."})
    assert copied.answer.predict.signature.instructions == "Add the items."
    assert copied.query.signature.instructions == student.query.signature.instructions
    assert copied.again is copied.query
    assert student.dump_state() == before
    assert copied._compiled is student._compiled is False


def test_an_unknown_predictor_is_named_with_the_known_ones() -> None:
    with pytest.raises(ProgramError, match=r"no predictor `answer`; it has `query`, `answer.predict`"):
        with_instructions(TwoHops(), {"answer": "Add."})


def test_language_models_are_shared_and_never_copied() -> None:
    student, lm = TwoHops(), dummy()
    lm.weights = Weights()
    student.set_lm(lm)
    copied = copy_program(student)
    assert copied.query is not student.query
    assert copied.query.lm is lm
    assert copied.answer.predict.lm is lm


def compiled(program: Any) -> Any:
    """The program as an optimizer returns it."""
    program.candidate_programs = [{"score": 1.0, "program": copy_program(program)}]
    program.detailed_results, program.score = object(), 1.0
    return program


def test_a_copy_leaves_behind_what_an_optimizer_attached() -> None:
    student = compiled(TwoHops())
    student.inner = compiled(dspy.Predict("question -> answer"))
    copied = copy_program(student)
    attached = {"candidate_programs", "detailed_results", "score"}
    assert attached.isdisjoint(vars(copied)) and attached.isdisjoint(vars(copied.inner))
    assert attached <= vars(student).keys() and attached <= vars(student.inner).keys()
    assert [name for name, _ in copied.named_predictors()] == [name for name, _ in student.named_predictors()]


class Client:
    """Holds what cannot be copied, as clients of databases do."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def search(self, query: str) -> str:
        """Search."""
        return query


def test_a_copy_of_what_cannot_be_copied_takes_nothing_from_the_student() -> None:
    student = TwoHops()
    student.steps = [compiled(dspy.Predict("question -> answer")), threading.Lock()]
    copied = copy_program(student)
    assert copied.steps[0] is not student.steps[0] and copied.steps[1] is student.steps[1]
    assert student.steps[0].score == 1.0 and not hasattr(copied.steps[0], "score")


class Hop(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.client = Client()
        self.tools = {"search": dspy.Tool(self.client.search), "own": dspy.Tool(self.asked)}
        self.gen = dspy.Predict("question -> answer")
        self.again = self.gen

    def asked(self, question: str) -> str:
        """Ask."""
        return self.client.search(question)

    def forward(self, question: str) -> Any:
        return self.gen(question=self.asked(question))


class Hops(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hops = {"first": Hop(), "second": Hop(), "lock": threading.Lock()}

    def forward(self, question: str) -> Any:
        return self.hops["first"](question=question)


def test_candidates_of_a_program_with_clients_have_instructions_of_their_own_and_the_student_keeps_its() -> None:
    student = Hops()
    before = {name: predictor.signature.instructions for name, predictor in student.named_predictors()}
    [first, *others] = before
    one, other = with_instructions(student, {first: "Add."}), with_instructions(student, {first: "Count."})
    for copied, text in ((one, "Add."), (other, "Count.")):
        found = {name: predictor.signature.instructions for name, predictor in copied.named_predictors()}
        assert found == {**before, first: text}
        assert copied.hops["first"].client is student.hops["first"].client
        assert copied.hops["first"].again is copied.hops["first"].gen
        assert copied.hops["first"].tools["own"].func.__self__ is copied.hops["first"]
    assert {name: predictor.signature.instructions for name, predictor in student.named_predictors()} == before
    assert others and not {id(module) for module in student.predictors()} & {id(module) for module in one.predictors()}


class Cache(dict[Any, Any]):
    """A mapping that cannot be copied itself."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.lock = threading.Lock()


def test_containers_that_cannot_be_copied_or_hold_themselves_are_no_reason_to_refuse_a_program() -> None:
    student = TwoHops()
    student.cache, student.locks, student.loop = Cache({"a": 1}), {threading.Lock(): 1}, [threading.Lock()]
    student.loop.append(student.loop)
    copied = copy_program(student)
    assert copied.cache is student.cache and copied.query is not student.query
    student.cache["predictor"] = dspy.Predict("question -> answer")  # which would be the student's in every copy
    with pytest.raises(ProgramError, match="cannot be copied"):
        copy_program(student)


def test_a_program_that_cannot_be_copied_is_refused() -> None:
    class Stubborn(TwoHops):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one of me")

    with pytest.raises(ProgramError, match=r"cannot be copied, and .* TypeError: there is only one .* __deepcopy__\."):
        copy_program(Stubborn())


def test_a_copy_keeps_a_score_that_is_the_programs_own() -> None:
    student = TwoHops()
    student.score = dspy.Predict("answer -> grade")
    student.candidate_programs = None
    copied = copy_program(student)
    assert isinstance(copied.score, dspy.Predict)
    assert copied.candidate_programs is None


# --- traces ---


def test_a_trace_holds_every_call_with_inputs_outputs_and_text() -> None:
    with dspy.context(lm=dummy(), adapter=dspy.ChatAdapter()):
        trace = trace_calls(TwoHops(), ROWS[0])
    assert (trace.error, trace.failure) == (None, None)
    assert trace.prediction.answer == "two"
    first, second = trace.calls
    assert (first.predictor, dict(first.inputs), dict(first.outputs)) == (
        "query",
        {"question": "1 + 1?"},
        {"query": "sum"},
    )
    assert second.predictor == "answer.predict"
    assert second.inputs == {"question": "1 + 1?", "context": "sum"}
    assert second.outputs == {"reasoning": "count", "answer": "two"}
    assert second.completion is not None
    assert "[[ ## reasoning ## ]]\ncount" in second.completion


def test_calls_of_one_predictor_in_several_threads_are_told_in_one_order_whichever_started_first() -> None:
    class Fan(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("question -> answer")

        def forward(self, question: str, order: list[int]) -> Any:
            barrier = threading.Barrier(len(order))

            def one(number: int) -> Any:
                return dspy.Predict.__call__(self.ask, question=f"{question} {number}")

            class Waiting(dspy.utils.BaseCallback):
                def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
                    barrier.wait(10)  # all are under way

            with dspy.context(callbacks=[*dspy.settings.callbacks, Waiting()]), ThreadPoolExecutor(len(order)) as pool:
                started = []
                for number in order:
                    started.append(pool.submit(carrying(one), number))
                    time.sleep(0.05)
                [future.result() for future in started]
            self.ask(question="the last one")

    for order in ([1, 2, 3], [3, 1, 2]):  # the last call is the run's own
        with dspy.context(lm=dummy([{"answer": "yes"}] * 4), adapter=dspy.ChatAdapter()):
            trace = trace_calls(Fan(), dspy.Example(question="Number", order=order).with_inputs("question", "order"))
        asked = [call.inputs["question"] for call in trace.calls]
        assert asked == ["Number 1", "Number 2", "Number 3", "the last one"]


def test_a_text_that_does_not_parse_is_kept_with_what_could_be_parsed() -> None:
    lm = dummy([{"query": "sum"}, {"reasoning": "count for ever"}])
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        trace = trace_calls(TwoHops(), ROWS[0])
    assert trace.failure == "parse"
    assert trace.prediction is None
    assert trace.error is not None
    assert trace.error.startswith("AdapterParseError")
    call = trace.calls[1]
    assert call.outputs == {"reasoning": "count for ever"}
    assert call.completion is not None
    assert "count for ever" in call.completion
    assert call.error is not None
    assert len(lm.history) == 2


def test_a_program_that_raises_is_recorded() -> None:
    class Broken(TwoHops):
        def forward(self, question: str) -> Any:
            self.query(question=question)
            raise ZeroDivisionError("nothing to divide")

    with dspy.context(lm=dummy()):
        trace = trace_calls(Broken(), ROWS[0])
    assert trace.failure == "program"
    assert trace.error == "ZeroDivisionError: nothing to divide"
    assert isinstance(trace.exception, ZeroDivisionError)
    assert [call.predictor for call in trace.calls] == ["query"]


def test_an_interrupt_is_raised() -> None:
    class Interrupted(dspy.Module):
        def forward(self, question: str) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_calls(Interrupted(), ROWS[0])


def test_a_failure_that_the_program_survives_is_still_recorded() -> None:
    class Patient(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guess = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            try:
                return self.guess(question=question)
            except dspy.utils.exceptions.AdapterParseError:
                return self.guess(question=question + " Please.")

    with dspy.context(lm=dummy([{"nothing": "?"}, {"answer": "two"}]), adapter=dspy.ChatAdapter()):
        trace = trace_calls(Patient(), ROWS[0])
    assert trace.error is None
    assert [call.error is None for call in trace.calls] == [False, True]


def test_a_trace_does_not_touch_the_callers_settings() -> None:
    with dspy.context(lm=dummy(), trace=[], callbacks=[]):
        trace_calls(TwoHops(), ROWS[0])
        assert dspy.settings.trace == []
        assert dspy.settings.callbacks == []


class Echo(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> answer")
        self.second = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.second(question=self.first(question=question).answer)


def test_a_hundred_threads_do_not_mix_up_their_calls() -> None:
    questions = [f"question number {number:03d}" for number in range(100)]
    lm = DummyLM({question: {"answer": question} for question in questions})
    barrier = threading.Barrier(100, timeout=60)
    program = Echo()

    def run(question: str) -> Any:
        barrier.wait()
        return trace_calls(program, row(question=question))

    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()), ThreadPoolExecutor(100) as pool:
        traces = list(pool.map(carrying(run), questions))
    for question, trace in zip(questions, traces, strict=True):
        assert trace.error is None, trace.error
        assert [call.predictor for call in trace.calls] == ["first", "second"]
        assert all(call.inputs["question"] == question for call in trace.calls)
        assert trace.prediction.answer == question


def test_threads_that_are_not_carried_see_no_local_settings() -> None:
    lm = dummy()
    with dspy.context(lm=lm), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: dspy.settings.lm).result() is not lm
        assert pool.submit(carrying(lambda: dspy.settings.lm)).result() is lm


def test_calls_from_threads_inside_a_program_are_recorded() -> None:
    class Parallel(Echo):
        def forward(self, question: str) -> Any:
            pairs = [(self.first, dspy.Example(question=question).with_inputs("question"))] * 4
            results = dspy.Parallel(num_threads=4, disable_progress_bar=True)(pairs)
            return dspy.Prediction(answer=results[0].answer)

    lm = DummyLM({"1 + 1?": {"answer": "two"}})
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        trace = trace_calls(Parallel(), ROWS[0])
    assert trace.error is None, trace.error
    assert len(trace.calls) == 4
    assert all(call.completion for call in trace.calls)
