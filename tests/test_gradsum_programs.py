"""GRAD-SUM on programs with several predictors, and together with GReaTer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted_engine import SEED as PLANTED_SEED
from scripted_engine import exact_match as planted_match
from scripted_engine import instruction_of, planted_engine, planted_rows, program_on, worth_of
from scripted_engine import optimizer as greater
from scripted_text import Asked, text_lm

from dspy_greater import GradSumTeleprompter
from dspy_greater.errors import DataError, ProgramError, UnusedPredictorError
from dspy_greater.run.events import IterationTaken, NotCalled

# --- two predictors: the first finds the number in the question, the second writes it as a word ---

WORDS = ("zero", "one", "two", "three", "four", "five")
ROWS = [dspy.Example(question=f"q{number}", answer=WORDS[number]).with_inputs("question") for number in range(6)]


class Two(dspy.Module):
    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.find = dspy.Predict(dspy.Signature("question -> number", "Find it."))
        self.write = dspy.Predict(dspy.Signature("number -> answer", "Write it."))
        self.set_lm(lm)

    def forward(self, question: str) -> Any:
        return self.write(number=self.find(question=question).number)


def two_script(asked: Asked) -> dict[str, Any]:
    if "question" in asked:
        return {"number": asked["question"][1:] if "digit" in asked.instruction else "5"}
    return {"answer": WORDS[int(asked["number"])] if "word" in asked.instruction else asked["number"]}


def blame(asked: Asked) -> dict[str, Any]:
    """Reads the trace: which predictor went wrong."""
    if "evaluation" not in asked:
        return {"summary": " ".join(sorted(set(asked.list_of("feedback"))))}
    digit = asked["inputs"].removeprefix("question: q")
    guilty = []
    if f"number: {digit}" not in asked["trace"].split("Predictor `write`")[0]:
        guilty.append("find")
    if not any(f"answer: {word}" in asked["trace"] for word in WORDS):
        guilty.append("write")
    return {"feedback": f"blame {' and '.join(guilty)}", "concerns": ", ".join(f"`{name}`" for name in guilty)}


def mend(asked: Asked) -> dict[str, Any]:
    better = "Copy the digit." if asked["prompt"].startswith(("Find", "Copy")) else "Write the word."
    return {"versions": [better]}


def two_predictors(**settings: Any) -> tuple[Any, Any, GradSumTeleprompter]:
    student = Two(text_lm(two_script))
    options = {"iterations": 2, "beam_width": 2, "validation_rows": 3, "progress": False, **settings}
    teacher = GradSumTeleprompter(
        "Write the number in words.",
        metric=lambda example, prediction, trace=None: prediction.answer == example.answer,
        judge_lm=text_lm(blame),
        editor_lm=text_lm(mend),
        **options,
    )
    return student, teacher.compile(student, ROWS[:3], valset=ROWS[3:]), teacher


def test_every_predictor_is_edited_by_the_feedback_that_concerns_it() -> None:
    student, better, teacher = two_predictors()
    assert better.score == 1.0
    assert better.detailed_results.prompts == {"find": "Copy the digit.", "write": "Write the word."}
    assert [student.find.signature.instructions, student.write.signature.instructions] == ["Find it.", "Write it."]
    (member,) = better.detailed_results.iterations[0].members
    assert [each.concerns for each in member.gradients] == [("find", "write")] * 3
    assert member.candidates == ({"find": "Copy the digit.", "write": "Write the word."},)
    edits = {asked["prompt"]: asked for asked in teacher.editor_lm.engine.asked}
    assert edits["Find it."]["interface"] == "question -> number"
    assert edits["Write it."]["interface"] == "number -> answer"


def test_the_gradient_module_is_given_the_trace_and_all_prompts() -> None:
    _, _, teacher = two_predictors(iterations=1)
    asked = next(asked for asked in teacher.judge_lm.engine.asked if "evaluation" in asked)
    assert "Predictor `find`:\nFind it." in asked["prompts"] and "Predictor `write`:\nWrite it." in asked["prompts"]
    assert asked["trace"].startswith("Predictor `find` was given\nquestion: q")
    assert "Predictor `write` was given\nnumber: 5\nand wrote\nanswer: 5" in asked["trace"]


def test_feedback_on_one_predictor_leaves_the_other_alone() -> None:
    student = Two(text_lm(two_script))
    student.find.signature = student.find.signature.with_instructions("Find the digit.")
    teacher = GradSumTeleprompter(
        "Write the number in words.",
        metric=lambda example, prediction, trace=None: prediction.answer == example.answer,
        judge_lm=text_lm(blame),
        editor_lm=text_lm(mend),
        iterations=1,
        validation_rows=3,
        progress=False,
    )
    better = teacher.compile(student, ROWS[:3], valset=ROWS[3:])
    (member,) = better.detailed_results.iterations[0].members
    assert set(member.summaries) == {"write"}
    assert better.detailed_results.prompts == {"find": "Find the digit.", "write": "Write the word."}
    assert better.score == 1.0


def test_feedback_on_no_known_predictor_is_malformed() -> None:
    def vague(asked: Asked) -> dict[str, Any]:
        return {**blame(asked), "concerns": "all of it"}

    student = Two(text_lm(two_script))
    teacher = GradSumTeleprompter(
        "Write the number in words.", "good", judge_lm=text_lm(lambda asked: {"explanation": "no", "score": 1}),
        gradient_lm=text_lm(vague), iterations=1, validation_rows=3, retries=1, progress=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="3 of gradients"):
        better = teacher.compile(student, ROWS[:3], valset=ROWS[3:])
    assert better.detailed_results.spent_by_module["gradients"]["malformed"] == 6
    correction = next(asked["correction"] for asked in teacher.gradient_lm.engine.asked if "correction" in asked)
    assert "concerns names none of the predictors find, write." in correction


def test_instructions_that_list_tools_are_never_rewritten() -> None:
    def search(query: str) -> str:
        return "found"

    agent = dspy.ReAct("question -> answer", tools=[search])
    agent.set_lm(text_lm(lambda asked: "x"))
    listed = agent.react.signature.instructions
    with pytest.warns(UserWarning, match="Predictors react list their tools in their instructions and keep them"):
        better = GradSumTeleprompter("Answer.", metric=planted_match, iterations=0, progress=False).compile(
            agent, ROWS[:3], valset=ROWS[3:]
        )
    assert set(better.detailed_results.prompts) == {"extract.predict"}
    assert better.react.signature.instructions == agent.react.signature.instructions == listed
    only = dspy.Predict(agent.react.signature)
    only.set_lm(text_lm(lambda asked: "x"))
    with pytest.raises(ProgramError, match="Every predictor lists its tools"):
        GradSumTeleprompter("Answer.", metric=planted_match, progress=False).compile(only, ROWS[:3], valset=ROWS[3:])


# --- what the student's own run says ---


def matching(example: Any, prediction: Any, trace: object = None) -> bool:
    return prediction.answer == example.answer


class WithSpare(Two):
    """Has a predictor that it never calls."""

    def __init__(self, lm: Any) -> None:
        super().__init__(lm)
        self.spare = dspy.Predict(dspy.Signature("question -> guess", "Guess it."))
        self.set_lm(lm)


def teacher_of(**settings: Any) -> GradSumTeleprompter:
    options = {
        "iterations": 2,
        "beam_width": 2,
        "validation_rows": 3,
        "progress": False,
        "metric": matching,
        **settings,
    }
    return GradSumTeleprompter("Write it.", judge_lm=text_lm(blame), editor_lm=text_lm(mend), **options)


class Killed(BaseException):
    """Stands for a process that dies."""


def killing(event: Any) -> None:
    if isinstance(event, IterationTaken):
        raise Killed


def test_a_predictor_that_is_never_called_is_not_edited_and_a_run_that_goes_on_knows_it(tmp_path: Path) -> None:
    text = r"Predictor `spare` was not called on any of the 3 training rows\. It keeps its instruction\."
    with pytest.warns(UserWarning, match=text) as told, pytest.raises(Killed):
        teacher_of(log_dir=tmp_path, listeners=[killing]).compile(
            WithSpare(text_lm(two_script)), ROWS[:3], valset=ROWS[3:]
        )
    assert {warning.filename for warning in told} == {__file__}
    heard: list[Any] = []
    teacher = teacher_of(log_dir=tmp_path, listeners=[heard.append])
    better = teacher.compile(WithSpare(text_lm(two_script)), ROWS[:3], valset=ROWS[3:])
    assert NotCalled(("spare",)) in heard, "it is replayed like all that is recorded"
    assert better.detailed_results.prompts == {
        "find": "Copy the digit.",
        "write": "Write the word.",
        "spare": "Guess it.",
    }
    assert better.score == 1.0
    assert all("Guess" not in asked["prompt"] for asked in teacher.editor_lm.engine.asked)


def test_a_program_none_of_whose_predictors_is_called_is_refused_before_anything_is_edited() -> None:
    best = dspy.BestOfN(module=Two(text_lm(two_script)), N=1, reward_fn=lambda inputs, output: 1.0, threshold=1.0)
    teacher = teacher_of()
    with pytest.raises(
        UnusedPredictorError, match="`module.write` were not called on any of the 3.*BestOfN runs copies"
    ):
        teacher.compile(best, ROWS[:3], valset=ROWS[3:])
    assert teacher.judge_lm.engine.asked == teacher.editor_lm.engine.asked == []


@pytest.mark.filterwarnings("ignore:Questions that were given up")
def test_a_metric_that_raises_on_some_rows_is_counted_once() -> None:
    def metric(example: Any, prediction: Any, trace: object = None) -> bool:
        if example.question == "q1":
            raise KeyError("note")
        return matching(example, prediction)

    text = r"The metric failed on 1 of 3 training rows, .*: row 1 of the trainset\. On row 1 .* raised KeyError: 'note'"
    with pytest.warns(RuntimeWarning, match=text) as told:
        teacher_of(metric=metric).compile(Two(text_lm(two_script)), ROWS[:3], valset=ROWS[3:])
    assert sum(each.category is RuntimeWarning for each in told) == 1


def test_an_interpreter_that_is_not_installed_is_no_prompts_fault() -> None:
    class Runs(Two):
        def forward(self, question: str) -> Any:
            found = super().forward(question)
            dspy.PythonInterpreter(deno_command=["/no/deno"])("1 + 1")
            return found

    with pytest.raises(
        ProgramError, match="(?s)not by what the language model wrote: .*the code interpreter raised Code"
    ):
        teacher_of().compile(Runs(text_lm(two_script)), ROWS[:3], valset=ROWS[3:])


def test_rows_that_name_their_inputs_differently_are_refused() -> None:
    rows = [dspy.Example(text=row.question, answer=row.answer).with_inputs("text") for row in ROWS]
    with pytest.raises(DataError, match="rows of the trainset are `text`, and the program takes `question`"):
        teacher_of().compile(Two(text_lm(two_script)), rows[:3], valset=rows[3:])


def test_rows_may_come_from_generators() -> None:
    better = teacher_of().compile(Two(text_lm(two_script)), (row for row in ROWS[:3]), valset=(row for row in ROWS[3:]))
    assert better.score == 1.0


# --- with GReaTer, on a planted model with weights ---

PLANTED = planted_rows(16)
PLANTED_TRAIN, PLANTED_VALIDATION = PLANTED[:8], PLANTED[8:]


def textual(versions: list[str], **settings: Any) -> GradSumTeleprompter:
    def answer(asked: Asked) -> dict[str, Any]:
        if "evaluation" in asked:
            return {"feedback": "be careful"}
        return {"versions": versions} if "number" in asked else {"summary": "be careful"}

    options = {"iterations": 1, "sample_size": 8, "subset_size": 8, "validation_rows": 8, "progress": False, **settings}
    return GradSumTeleprompter("Count fruit.", judge_lm=text_lm(answer), **options)


@pytest.mark.slow
def test_a_warm_start_gives_the_seed_that_gradients_refine() -> None:
    student = program_on(planted_engine())
    first = textual(["Please list it now.", "Hurry."])
    better = greater(warm_start=first, steps=1, train_rows=8, validation_rows=8).compile(
        student, PLANTED_TRAIN, valset=PLANTED_VALIDATION
    )
    details = better.detailed_results
    assert details.warm_start.instructions == {"predict": "Please list it now."}
    assert details.predictors[0].seed_instruction == "Please list it now."
    assert details.seed_score == details.warm_start.student_score < better.score == details.score
    assert details.warm_start.details.prompts == {"predict": "Please list it now."}
    assert not details.warm_start.undone
    assert instruction_of(student) == PLANTED_SEED
    scores = [each["score"] for each in better.candidate_programs]
    assert scores == sorted(scores, reverse=True)
    assert instruction_of(better) != PLANTED_SEED


def test_after_a_warm_start_the_floor_is_still_the_student() -> None:
    class Misleading(dspy.teleprompt.Teleprompter):
        def compile(self, student: Any, *, trainset: Any, teacher: Any = None, valset: Any = None) -> Any:
            self.rows = trainset, valset
            worse = student.deepcopy()
            worse.predictors()[0].signature = worse.predictors()[0].signature.with_instructions("Hurry now.")
            return worse

    first = Misleading()
    student = program_on(planted_engine(), instruction="Please count it now.")
    better = greater(warm_start=first, steps=0, train_rows=8, validation_rows=4).compile(
        student, PLANTED, metric=planted_match
    )
    details = better.detailed_results
    assert details.warm_start.undone and details.predictors[0].seed_instruction == "Hurry now."
    assert instruction_of(better) == "Please count it now."
    assert better.score == details.score == details.seed_score == 1.0 > details.warm_start.score
    trained, validated = first.rows
    assert len(validated) == 4 and len(trained) == 12
    assert not {row.question for row in trained} & {row.question for row in validated}


@pytest.mark.slow
def test_both_optimizers_work_in_better_together() -> None:
    student = program_on(planted_engine())
    together = dspy.BetterTogether(
        metric=planted_match,
        text=textual(["Please list it now.", "Hurry."], metric=planted_match),
        gradient=greater(steps=1, train_rows=8, validation_rows=8),
    )
    better = together.compile(
        student, trainset=PLANTED_TRAIN, valset=PLANTED_VALIDATION, strategy="text -> gradient", num_threads=1
    )
    assert not better.flag_compilation_error_occurred
    assert worth_of(instruction_of(better)) > worth_of(PLANTED_SEED)
    strategies = {each["strategy"] for each in better.candidate_programs}
    assert strategies == {"", "text", "text -> gradient"}
