"""GRAD-SUM when things go wrong: answers that cannot be used, kills, interrupts, and the end of the budget."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted_gradsum import (
    ROWS,
    SEED,
    editor_script,
    exact_match,
    gradient_script,
    instruction_of,
    judge_script,
    optimizer,
    program,
    program_script,
)
from scripted_text import Asked, text_lm

from dspy_greater.errors import (
    BudgetSpent,
    JudgeError,
    ProgramError,
    RunDirectoryError,
    SettingsError,
    UnvalidatedError,
)
from dspy_greater.gradsum.ask import Asker
from dspy_greater.gradsum.evaluate import Evaluator
from dspy_greater.gradsum.loop import Loop
from dspy_greater.gradsum.meter import Meter
from dspy_greater.gradsum.settings import GradSumSettings
from dspy_greater.gradsum.task import Options, Task, prepare
from dspy_greater.program.fingerprint import described_lm
from dspy_greater.run.events import IterationTaken, Warned

HELD_OUT = (1, 4, 7, 9, 12, 14)
VALIDATION = [ROWS[number] for number in HELD_OUT]
TRAIN = [row for row in ROWS if row not in VALIDATION]


def compiled(**settings: Any) -> Any:
    return optimizer(**settings).compile(program(), TRAIN, valset=VALIDATION)


# --- answers that cannot be used ---


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("Lovely weather today.", "AdapterParseError"),
        ({"explanation": "fine", "score": "very good"}, "the score 'very good' is not a whole number from 1 to 5"),
        ({"explanation": "fine", "score": "7"}, "the score '7' is not a whole number from 1 to 5"),
        ({"explanation": "fine", "score": "3.5"}, "the score '3.5' is not a whole number"),
        ({"explanation": "", "score": "3"}, "the explanation is empty"),
    ],
)
def test_a_judge_that_only_talks_nonsense_is_a_clear_error(answer: Any, problem: str) -> None:
    judge = text_lm(lambda asked: answer)
    with pytest.raises(JudgeError) as found:
        compiled(judge_lm=judge, retries=1)
    told = str(found.value)
    assert "no usable verdict on any of 6 outputs, each asked 2 times" in told
    assert problem in told and "Use another judge_lm" in told
    assert len(judge.engine.asked) == 12


def test_a_dead_judge_is_a_clear_error() -> None:
    def dead(asked: Asked) -> Any:
        raise OSError("no route to host")

    with pytest.raises(JudgeError, match="no route to host"):
        compiled(judge_lm=text_lm(dead))


@pytest.mark.parametrize("score", ["4", "4.0", "4/5", "4 out of 5", " 4. "])
def test_a_score_may_be_written_as_people_do(score: str) -> None:
    better = compiled(judge_lm=text_lm(lambda asked: {"explanation": "good", "score": score}), iterations=0)
    assert better.score == 0.75


def moody(script: Any, every: int) -> Any:
    """Answers with nonsense whenever it is asked for the first time and the question is unlucky."""
    count = itertools.count()
    lock = threading.Lock()

    def answer(asked: Asked) -> Any:
        with lock:
            unlucky = next(count) % every == 0
        return "Let me think about that." if unlucky and "correction" not in asked else script(asked)

    return answer


@pytest.mark.slow
def test_malformed_answers_are_asked_again_and_counted() -> None:
    judge, gradient = text_lm(moody(judge_script, 3)), text_lm(moody(gradient_script, 2))
    editor = text_lm(moody(editor_script, 1))
    better = compiled(judge_lm=judge, gradient_lm=gradient, editor_lm=editor)
    calm = compiled()
    assert instruction_of(better) == instruction_of(calm)
    assert better.detailed_results.validation == calm.detailed_results.validation
    spent = better.detailed_results.spent_by_module
    retried = [asked for asked in judge.engine.asked if "correction" in asked]
    assert spent["evaluation"]["malformed"] == len(retried) > 0
    assert "attempt 2. Your last answer could not be used: AdapterParseError" in retried[0]["correction"]
    edits = sum("correction" not in asked for asked in editor.engine.asked)
    assert spent["editing"] == {
        "calls": 2 * edits,
        "prompt_tokens": 20 * edits,
        "completion_tokens": 4 * edits,
        "answered": edits,
        "malformed": edits,
        "unanswered": 0,
    }


def test_an_editor_that_only_talks_nonsense_leaves_the_seed_and_is_reported() -> None:
    editor = text_lm(lambda asked: "I would rather not.")
    with pytest.warns(UserWarning, match="no answer could be used: 3 of editing"):
        better = compiled(editor_lm=editor)
    assert instruction_of(better) == SEED
    assert better.detailed_results.spent_by_module["editing"]["unanswered"] == 3
    assert len(editor.engine.asked) == 9


@pytest.mark.parametrize("versions", [[], ["", "  "], ["[[ ## answer ## ]] yes"], "one"])
def test_versions_that_cannot_be_prompts_are_malformed(versions: Any) -> None:
    with pytest.warns(UserWarning, match="of editing"):
        better = compiled(editor_lm=text_lm(lambda asked: {"versions": versions}), iterations=1, retries=0)
    assert instruction_of(better) == SEED


def test_gradients_that_are_not_written_are_left_out() -> None:
    def unwilling(asked: Asked) -> Any:
        return "No." if asked.get("inputs") == "question: 3" else gradient_script(asked)

    with pytest.warns(UserWarning, match="1 of gradients"):
        better = compiled(gradient_lm=text_lm(unwilling), iterations=1, sample_size=10, retries=0)
    (member,) = better.detailed_results.iterations[0].members
    failed = [output.row for output in member.outputs if output.judged != 1.0]
    assert len(member.gradients) == len(failed) - 1


def test_an_output_without_a_verdict_counts_as_the_worst_and_has_no_gradient() -> None:
    def partial(asked: Asked) -> Any:
        return "?" if asked["inputs"] == "question: 0" else judge_script(asked)

    with pytest.warns(UserWarning, match="1 of evaluation. Outputs without a verdict count as the worst"):
        better = compiled(judge_lm=text_lm(partial), iterations=1, sample_size=10)
    outputs = better.detailed_results.iterations[0].members[0].outputs
    (unjudged,) = [output for output in outputs if output.inputs == "question: 0"]
    assert unjudged.judged == 0.0 and "the judge gave no usable verdict: AdapterParseError" in (unjudged.error or "")
    gradients = better.detailed_results.iterations[0].members[0].gradients
    assert unjudged.row not in [each.row for each in gradients]


def too_long(asked: Asked) -> Any:
    """A language model that one row, and prompts that ramble, are too long for."""
    if asked["question"] == "3" or "ramble" in asked.instruction:
        raise OSError("the prompt is too long")
    return program_script(asked)


@pytest.mark.slow
def test_a_row_that_the_model_cannot_take_scores_nothing_and_blames_no_prompt() -> None:
    better = optimizer(iterations=6).compile(program(too_long), TRAIN, valset=VALIDATION)
    failed = [
        (member, output)
        for iteration in better.detailed_results.iterations
        for member in iteration.members
        for output in member.outputs
        if output.inputs == "question: 3"
    ]
    assert failed
    for member, output in failed:
        assert output.judged == 0.0 and "the prompt is too long" in (output.error or "")
        assert output.row not in [each.row for each in member.gradients]
    assert better.score > better.detailed_results.seed_score


def test_a_candidate_that_the_model_cannot_take_is_only_a_bad_one() -> None:
    rambling = text_lm(lambda asked: {"versions": ["Level 20, but ramble."]})
    better = optimizer(editor_lm=rambling).compile(program(too_long), TRAIN, valset=VALIDATION)
    assert instruction_of(better) == SEED
    assert [each.score for each in better.detailed_results.iterations[0].compared][1] == (0.0,)


@pytest.mark.slow
def test_a_server_that_dies_during_the_run_is_an_error_and_the_run_goes_on_later(tmp_path: Path) -> None:
    def dying(asked: Asked) -> Any:
        if len(task.engine.asked) > 40:
            raise OSError("connection refused")
        return program_script(asked)

    task = text_lm(dying, "scripted/task")
    student = program()
    student.set_lm(task)
    with pytest.raises(UnvalidatedError, match="could not be called.*connection refused.*log_dir goes on") as found:
        optimizer(log_dir=tmp_path, iterations=5).compile(student, TRAIN, valset=VALIDATION)
    assert isinstance(found.value.__cause__, ProgramError)
    assert instruction_of(found.value.program) == found.value.detailed_results.iterations[-1].beam[0]["predict"] != SEED
    resumed = optimizer(log_dir=tmp_path, iterations=5).compile(program(), TRAIN, valset=VALIDATION)
    assert resumed.score > resumed.detailed_results.seed_score


def test_a_server_that_is_gone_for_one_iteration_ends_the_loop_and_what_was_found_is_validated() -> None:
    def hiccup(asked: Asked) -> Any:
        if len(scored) == 1 and validating == []:
            raise OSError("connection refused")
        return program_script(asked)

    scored: list[Any] = []
    validating: list[Any] = []

    def listener(event: Any) -> None:
        if isinstance(event, IterationTaken):
            scored.append(event)
        elif isinstance(event, Warned):
            validating.append(event)

    with pytest.warns(RuntimeWarning, match="ended early, after iteration 1 of 5: ProgramError.*connection refused"):
        better = optimizer(iterations=5, listeners=[listener]).compile(program(hiccup), TRAIN, valset=VALIDATION)
    details = better.detailed_results
    assert len(details.iterations) == 1 and better.score > details.seed_score
    assert details.stopped_by is not None and details.stopped_by.startswith("after iteration 1 of 5: ProgramError: The")
    assert not details.interrupted


def test_one_pair_of_prompts_and_row_that_is_too_long_is_no_dead_server() -> None:
    """The row works under other prompts, and the prompts work on other rows."""

    def picky(asked: Asked) -> Any:
        if asked["question"] == "3" and asked.instruction == SEED:
            raise OSError("the prompt is too long")
        return program_script(asked)

    task = posed_task(program(picky))
    meter = Meter()
    evaluator = Evaluator(task, ROWS, Asker(meter, task.servers, retries=0, threads=1), meter)
    evaluator.evaluate([{"predict": SEED}], [0, 1, 2])
    evaluator.evaluate([{"predict": "Level 9."}], [3])
    [[output]] = evaluator.evaluate([{"predict": SEED}], [3])
    assert output.metric == 0.0 and "the prompt is too long" in (output.error or "")


def posed_task(student: Any, **options: Any) -> Task:
    return prepare(
        student,
        ROWS,
        exact_match,
        None,
        Options(
            description="Put an a before the question.",
            criteria=None,
            lms=(text_lm(judge_script), None, None),
            settings=GradSumSettings.of(None, **options),
            seed=0,
        ),
    )


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError("full"), OSError("disk")], ids=repr)
def test_whatever_ends_the_loop_late_leaves_what_was_found(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *arguments: Any) -> Any:
        if self.iterations:
            raise error
        return original(self, *arguments)

    original = Loop._select
    monkeypatch.setattr(Loop, "_select", broken)
    with pytest.warns(RuntimeWarning, match=type(error).__name__):
        better = compiled()
    assert len(better.detailed_results.iterations) == 1
    assert better.score > better.detailed_results.seed_score
    assert f"after iteration 1 of 3: {type(error).__name__}" in better.detailed_results.stopped_by


def test_an_error_before_anything_was_found_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *arguments: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Loop, "_select", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        compiled()


def test_a_first_interrupt_in_the_validation_keeps_the_students_prompts_and_a_second_one_raises() -> None:
    def interrupted(self: Any, finalists: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "validate", interrupted)
        better = compiled()
        assert better.detailed_results.interrupted and instruction_of(better) == SEED
        assert len(better.candidate_programs) > 1
        with pytest.raises(KeyboardInterrupt):
            compiled(listeners=[after(1, KeyboardInterrupt)])


def test_a_metric_that_fails_on_every_validation_row_compares_nothing() -> None:
    def metric(example: Any, prediction: Any, trace: object = None) -> bool:
        if example.question in {row.question for row in VALIDATION}:
            raise KeyError("note")
        return exact_match(example, prediction)

    with pytest.raises(UnvalidatedError, match="The metric failed on all 6 validation rows") as found:
        compiled(metric=metric, criteria=None)
    assert instruction_of(found.value.program) != SEED


@pytest.mark.parametrize("iterations", [0, 2])
def test_a_validation_row_that_the_metric_does_not_score_is_a_mistake_and_throws_nothing_away(iterations: int) -> None:
    def metric(example: Any, prediction: Any, trace: object = None) -> Any:
        return None if example.question == VALIDATION[0].question else exact_match(example, prediction)

    with pytest.warns(RuntimeWarning, match=r"The metric failed on 1 of \d+ validation rows, which count as mistakes"):
        better = compiled(metric=metric, criteria=None, iterations=iterations)
    details = better.detailed_results
    assert details.stopped_by is None and len(details.iterations) == iterations
    assert all(rows[0] == 0.0 for rows in details.subscores)
    assert (better.score > details.seed_score) == (iterations > 0)


# --- kills, interrupts ---


class Killed(BaseException):
    pass


def after(number: int, error: type[BaseException]) -> Any:
    """A listener that raises after so many iterations."""

    def listener(event: Any) -> None:
        if isinstance(event, IterationTaken) and event.iteration + 1 == number:
            raise error

    return listener


def told(better: Any) -> Any:
    details = better.detailed_results
    return details.iterations, details.finalists, details.validation, details.winner, details.spent_by_module


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, number: int) -> None:
    with pytest.raises(Killed):
        compiled(log_dir=tmp_path, listeners=[after(number, Killed)])
    student = program()
    resumed = optimizer(log_dir=tmp_path).compile(student, TRAIN, valset=VALIDATION)
    whole = program()
    uninterrupted = optimizer().compile(whole, TRAIN, valset=VALIDATION)
    assert told(resumed) == told(uninterrupted)
    asked = [len(each.predictors()[0].lm.engine.asked) for each in (student, whole)]
    assert asked[0] < asked[1]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_iteration_loses_that_iteration_only(tmp_path: Path) -> None:
    def tired(asked: Asked) -> Any:
        if len(editor.engine.asked) > 2:  # the second iteration's
            raise Killed
        return editor_script(asked)

    editor = text_lm(tired)
    with pytest.raises(Killed):
        compiled(log_dir=tmp_path, editor_lm=editor)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3  # header, start, one iteration
    resumed = compiled(log_dir=tmp_path, editor_lm=text_lm(editor_script))
    assert told(resumed)[:4] == told(compiled(editor_lm=text_lm(editor_script)))[:4]


def test_a_run_with_other_criteria_is_not_continued(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, iterations=1)
    with pytest.raises(RunDirectoryError, match='criteria: "The answer is.*" -> "Something else."'):
        compiled(log_dir=tmp_path, iterations=1, criteria="Something else.")


def test_no_secret_of_a_language_model_is_written_down() -> None:
    known = described_lm(dspy.LM("openai/some-model", api_key="sesame", temperature=0.5))
    assert known == {"lm": "openai/some-model", "sampling": {"temperature": 0.5}}


def test_an_interrupt_returns_the_best_so_far() -> None:
    better = compiled(listeners=[after(2, KeyboardInterrupt)], iterations=5)
    assert better.detailed_results.interrupted
    assert len(better.detailed_results.iterations) == 2
    assert better.score > better.detailed_results.seed_score


def test_a_second_interrupt_raises() -> None:
    def twice(asked: Asked) -> Any:
        if stopped:
            raise KeyboardInterrupt
        return program_script(asked)

    stopped: list[Any] = []

    def listener(event: Any) -> None:
        if isinstance(event, IterationTaken):
            stopped.append(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer(listeners=[listener]).compile(program(twice), TRAIN, valset=VALIDATION)


# --- the budget ---


@pytest.mark.parametrize("limit", [36, 60, 80, 110, 150])
def test_a_budget_on_calls_is_kept_and_the_best_so_far_returned(limit: int) -> None:
    better = compiled(max_lm_calls=limit, iterations=20)
    details = better.detailed_results
    assert details.spent["calls"] <= limit
    assert f"do not fit into max_lm_calls={limit}" in (details.out_of_budget or "")
    assert len(details.iterations) < 20
    assert better.score >= details.seed_score


def test_calls_that_a_cache_answers_do_not_make_the_next_prompts_look_cheap(tmp_path: Path) -> None:
    """Another prompt of a program that calls a model twice a run takes two calls, though the student's took none."""

    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.say = program().predictors()[0], program().predictors()[0]

        def forward(self, question: str) -> Any:
            self.look(question=question)
            return self.say(question=question)

    def blames(asked: Asked) -> Any:
        return {**gradient_script(asked), **({"concerns": "look, say"} if "evaluation" in asked else {})}

    dspy.configure_cache(disk_cache_dir=str(tmp_path), enable_disk_cache=False)
    student = Twice()
    student.set_lm(dspy.LM("scripted/cached", engine=text_lm(program_script).engine, cache=True, num_retries=0))
    for row in ROWS:
        student(**row.inputs())
    search = optimizer(criteria=None, metric=exact_match, gradient_lm=text_lm(blames), max_lm_calls=40)
    details = search.compile(student, TRAIN, valset=VALIDATION).detailed_results
    assert details.spent_by_module["generation"]["calls"] == 0, "the student's prompts were known"
    assert details.spent["calls"] <= 40 and details.out_of_budget is not None


def test_a_budget_on_tokens_is_kept() -> None:
    better = compiled(max_lm_tokens=1500, iterations=20)
    details = better.detailed_results
    assert details.spent["prompt_tokens"] + details.spent["completion_tokens"] <= 1500
    assert "do not fit into max_lm_tokens=1500" in (details.out_of_budget or "")
    assert 1 <= len(details.iterations) < 20


@pytest.mark.slow
def test_a_larger_budget_is_never_a_shorter_run() -> None:
    lengths = [len(compiled(max_lm_calls=limit).detailed_results.iterations) for limit in (40, 90, 140, 400)]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 3
    assert compiled(max_lm_calls=400).detailed_results.out_of_budget is None


def test_a_budget_that_does_not_cover_the_final_comparison_is_refused() -> None:
    text = "max_lm_calls=35 does not cover the final comparison: 3 programs on 6 rows, 2 calls each at least, are 36"
    with pytest.raises(SettingsError, match=text):
        compiled(max_lm_calls=35)


def test_a_run_that_ended_at_its_budget_ends_there_again(tmp_path: Path) -> None:
    first = compiled(max_lm_calls=110, iterations=20, log_dir=tmp_path)
    again = compiled(max_lm_calls=110, iterations=20, log_dir=tmp_path)
    assert again.detailed_results.iterations == first.detailed_results.iterations
    assert told(again)[1:4] == told(first)[1:4]


def test_the_meter_counts_exactly_under_threads() -> None:
    meter = Meter(max_calls=10_000)

    def work() -> None:
        for _ in range(1000):
            meter.add("evaluation", calls=1, prompt_tokens=3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.spent()["evaluation"]["calls"] == 8000
    assert meter.spent()["evaluation"]["prompt_tokens"] == 24_000
    meter.reserve(1500)
    meter.admit(500)
    with pytest.raises(BudgetSpent, match="501 more LM calls do not fit into max_lm_calls=10000 after 8000"):
        meter.admit(501)


def test_the_journal_holds_plain_json(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, metric=exact_match, iterations=1)
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line)
