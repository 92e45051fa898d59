"""GRAD-SUM with scripted language models: the loop, what it finds, and what it keeps of its promises."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import Any

import dspy
import pytest
from scripted_gradsum import (
    ROWS,
    SEED,
    UNLABELLED,
    asked_of,
    editor_script,
    exact_match,
    gradient_of,
    instruction_of,
    judge_script,
    level,
    optimizer,
    program,
    program_script,
    summary_of,
    versions_of,
)
from scripted_text import Asked, text_lm

from dspy_greater import GradSumTeleprompter
from dspy_greater.errors import JudgeError, MetricError, ProgramError, SettingsError
from dspy_greater.gradsum.settings import GradSumSettings
from dspy_greater.run.events import BeamStarted, BeamValidated, IterationTaken

HELD_OUT = (1, 4, 7, 9, 12, 14)
VALIDATION = [ROWS[number] for number in HELD_OUT]
TRAIN = [row for row in ROWS if row not in VALIDATION]
THOROUGH = {"iterations": 8, "sample_size": 10, "subset_size": 10}


class Twin:
    """The loop as one would first write it down, on the scripts' own tables."""

    def __init__(self, rows: list[Any], width: int) -> None:
        self.rows, self.width = rows, width
        self.beam = [SEED]
        self.ran: set[tuple[str, str]] = set()

    def right(self, prompt: str, row: int) -> bool:
        return int(self.rows[row].question) < level(prompt)

    def score(self, prompt: str, subset: Any) -> float:
        return sum(1.0 if self.right(prompt, row) else 0.25 for row in subset) / len(subset)

    def run(self, prompts: list[str], rows: Any) -> list[tuple[str, str]]:
        pairs = [(prompt, self.rows[row].question) for prompt in prompts for row in rows]
        fresh = [pair for pair in pairs if pair not in self.ran]
        self.ran |= set(fresh)
        return fresh

    def iterate(self, sample: Any, subset: Any) -> dict[str, Any]:
        ran = self.run(self.beam, sample)
        failed = {prompt: [row for row in sample if not self.right(prompt, row)] for prompt in self.beam}
        gradients = {
            prompt: [gradient_of(prompt, f"question: {self.rows[row].question}") for row in rows]
            for prompt, rows in failed.items()
        }
        summaries = {prompt: summary_of(texts) for prompt, texts in gradients.items() if texts}
        candidates: list[str] = []
        for prompt in summaries:
            fresh = [text for text in versions_of(prompt) if text not in [*self.beam, *candidates]]
            candidates += fresh
        entrants = [*self.beam, *candidates]
        ran += self.run(entrants, subset)
        scores = {prompt: self.score(prompt, subset) for prompt in entrants}
        before = self.beam
        self.beam = sorted(entrants, key=lambda prompt: -scores[prompt])[: self.width]
        told = {"ran": ran, "failed": failed, "gradients": gradients, "summaries": summaries, "scores": scores}
        return {**told, "beam": before, "candidates": candidates}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loop_is_followed_exactly(seed: int) -> None:
    student, teacher = program(), optimizer(seed=seed)
    better = teacher.compile(student, TRAIN, valset=VALIDATION)
    drawn = random.Random(f"{seed}/rows").sample(TRAIN, len(TRAIN))
    twin = Twin(drawn, width=2)
    task, judge = asked_of(student.predictors()[0].lm), asked_of(teacher.judge_lm)
    gradient, editor = asked_of(teacher.gradient_lm), asked_of(teacher.editor_lm)
    expected_runs: list[tuple[str, str]] = []
    feedback, summaries = [], []
    for iteration in better.detailed_results.iterations:
        sample, subset = iteration.sample, iteration.subset
        assert (len(set(sample)), len(set(subset))) == (6, 4) and set(subset) <= set(sample)
        told = twin.iterate(sample, subset)
        expected_runs += told["ran"]
        assert [each.prompts["predict"] for each in iteration.members] == told["beam"]
        for member in iteration.members:
            prompt = member.prompts["predict"]
            assert [output.row for output in member.outputs] == list(sample)
            assert [each.row for each in member.gradients] == told["failed"][prompt]
            assert [each.text for each in member.gradients] == told["gradients"][prompt]
            assert member.summaries.get("predict") == told["summaries"].get(prompt)
            feedback += told["gradients"][prompt]
        summaries += list(told["summaries"].items())
        assert [c["predict"] for member in iteration.members for c in member.candidates] == told["candidates"]
        assert {each.prompts["predict"]: each.score for each in iteration.compared} == {
            prompt: (score,) for prompt, score in told["scores"].items()
        }
        assert all([output.row for output in each.outputs] == list(subset) for each in iteration.compared)
        assert [each["predict"] for each in iteration.beam] == twin.beam
    finalists = [SEED, *(prompt for prompt in twin.beam if prompt != SEED)]
    expected_runs += [(prompt, row.question) for prompt in finalists for row in VALIDATION]
    assert Counter((asked.instruction, asked["question"]) for asked in task) == Counter(expected_runs)
    assert len(judge) == len(expected_runs)
    written = [asked for asked in gradient if "evaluation" in asked]
    assert sorted(gradient_of(asked["prompts"], asked["inputs"]) for asked in written) == sorted(feedback)
    summarised = [(asked["prompt"], summary_of(asked.list_of("feedback"))) for asked in gradient if "feedback" in asked]
    assert sorted(summarised) == sorted(summaries)  # one for each member of the beam, from all its gradients
    assert sorted((asked["prompt"], asked["feedback"]) for asked in editor) == sorted(summaries)


def test_without_summaries_the_editor_is_given_the_raw_gradients() -> None:
    teacher = optimizer(summarize=False, iterations=1)
    better = teacher.compile(program(), TRAIN, valset=VALIDATION)
    (member,) = better.detailed_results.iterations[0].members
    assert len(member.gradients) > 1
    (asked,) = asked_of(teacher.editor_lm)
    assert asked["feedback"] == "\n".join(f"- {each.text}" for each in member.gradients)
    assert not any("feedback" in asked for asked in asked_of(teacher.gradient_lm))
    assert "summarisation" not in better.detailed_results.spent_by_module or (
        better.detailed_results.spent_by_module["summarisation"]["calls"] == 0
    )


def test_the_planted_best_prompt_is_found_by_a_judge() -> None:
    student = program()
    better = optimizer(**THOROUGH).compile(student, TRAIN, valset=VALIDATION)
    assert level(instruction_of(better)) >= 16
    assert (better.score, better.detailed_results.seed_score) == (1.0, 2.25 / 6)
    assert instruction_of(student) == SEED


def test_the_planted_best_prompt_is_found_by_a_metric_alone() -> None:
    teacher = optimizer(criteria=None, metric=exact_match, **THOROUGH)
    better = teacher.compile(program(), TRAIN, valset=VALIDATION)
    assert level(instruction_of(better)) >= 16
    assert (better.score, better.detailed_results.seed_score) == (1.0, 1 / 6)
    assert asked_of(teacher.judge_lm) == []


@pytest.mark.slow
def test_a_judge_needs_no_expected_answers() -> None:
    teacher = optimizer(**THOROUGH)
    held_out = [UNLABELLED[number] for number in HELD_OUT]
    better = teacher.compile(program(), [row for row in UNLABELLED if row not in held_out], valset=held_out)
    assert better.score == 1.0
    assert {asked["expected"] for asked in asked_of(teacher.judge_lm)} == {"(none is known)"}


def test_the_judge_is_shown_all_acceptable_answers_and_no_gaps() -> None:
    teacher = optimizer(iterations=1)
    rows = [row.copy(answer=[row.answer, None, "b"], level=float("nan")) for row in TRAIN]
    teacher.compile(program(), rows, valset=[row.copy(answer=" ") for row in VALIDATION])
    told = {asked["inputs"].removeprefix("question: "): asked["expected"] for asked in asked_of(teacher.judge_lm)}
    trained = {row.question for row in TRAIN} & set(told)
    assert {told[number] for number in trained} == {f"answer: one of: a{number}; b" for number in trained}
    assert {told[row.question] for row in VALIDATION} == {"(none is known)"}


def test_the_judge_is_shown_the_expected_answer_where_there_is_one() -> None:
    teacher = optimizer(iterations=1)
    teacher.compile(program(), TRAIN, valset=VALIDATION)
    for asked in asked_of(teacher.judge_lm):
        assert asked["expected"] == f"answer: a{asked['inputs'].removeprefix('question: ')}"


@pytest.mark.parametrize("seed", range(6))
def test_the_result_is_never_worse_than_the_seed(seed: int) -> None:
    rng = random.Random(seed)
    worse = text_lm(lambda asked: {"versions": [f"Level {rng.randint(0, 3)}. {rng.random()}"]})
    better = optimizer(seed=seed, editor_lm=worse, metric=exact_match).compile(program(), ROWS[2:], valset=ROWS[:2])
    assert (better.score, better.detailed_results.seed_score) == (1.0, 1.0)
    assert instruction_of(better) == SEED


def test_prompts_are_compared_as_the_program_will_run_with_the_adapters_fallback_to_json() -> None:
    """The student writes no chat format, and is right in JSON; what the search finds keeps the format, and is worse."""

    def script(asked: Asked) -> Any:
        number = int(asked["question"])
        if "JSON object" in asked.text:
            return json.dumps({"reasoning": "I look.", "answer": f"a{number}"})
        if level(asked.instruction) <= 2:
            return f"The answer is a{number}."
        return {"reasoning": "I look.", "answer": f"a{number}" if number % 2 else "wrong"}

    student = program(script)
    better = optimizer(criteria=None, metric=exact_match).compile(student, TRAIN, valset=VALIDATION)
    details = better.detailed_results
    assert len(details.finalists) > 1 and details.seed_score == 1.0, "the search goes on from the prompt alone"
    assert instruction_of(better) == SEED
    assert all(exact_match(row, better(**row.inputs())) for row in VALIDATION)
    assert details.iterations[0].members[0].outputs[0].metric == 0.0


def test_a_tie_keeps_the_seed() -> None:
    same = text_lm(lambda asked: {"versions": ["Level 2, in other words.", "Level 2."]})
    better = optimizer(editor_lm=same).compile(program(), TRAIN, valset=VALIDATION)
    assert instruction_of(better) == SEED
    assert len(better.detailed_results.finalists) == 2


def test_an_editor_that_hands_back_what_it_was_shown_is_asked_again() -> None:
    def parrot(asked: Asked) -> dict[str, Any]:
        if "correction" in asked:
            return {"versions": ["Level 1, careful."]}
        scored = re.findall(rf"\d\.\d\d: {re.escape(asked['prompt'])}", asked["tried"])  # nothing is at first
        return {"versions": scored or [asked["prompt"]]}

    teacher = optimizer(iterations=2, beam_width=1, editor_lm=text_lm(parrot))
    better = teacher.compile(program(), TRAIN, valset=VALIDATION)
    first, second = better.detailed_results.iterations
    assert [tuple(each.prompts.values()) for each in first.compared] == [(SEED,), ("Level 1, careful.",)]
    asked = asked_of(teacher.editor_lm)
    assert ["correction" in each for each in asked] == [False, True, False, True]
    assert asked[2]["tried"].count(f": {asked[2]['prompt']}") == 1, "it was shown with its score, and came back so"
    told = "versions holds the prompt as it is and nothing else; write others."
    assert all(told in each["correction"] for each in asked[1::2])
    assert not any(re.match(r"\d\.\d\d: ", text) for each in second.compared for text in each.prompts.values())


def test_with_a_metric_and_criteria_the_metric_decides_and_the_judge_settles_ties() -> None:
    def polite(asked: Asked) -> dict[str, Any]:
        return {**program_script(asked), "reasoning": "Please." if "polite" in asked.instruction else "Hm."}

    def judge(asked: Asked) -> dict[str, Any]:
        return {"explanation": "politeness", "score": 5 if "Please" in asked["output"] else 1}

    edits = text_lm(lambda asked: {"versions": ["Level 1, polite.", "Level 2, polite.", "Level 2, rude."]})
    teacher = optimizer(metric=exact_match, judge_lm=text_lm(judge), editor_lm=edits, subset_size=6)
    better = teacher.compile(program(polite), TRAIN, valset=VALIDATION[:2])
    assert instruction_of(better) == "Level 2, polite."
    assert better.detailed_results.validation[0] == (0.5, 0.0)
    assert better.detailed_results.validation[better.detailed_results.winner] == (0.5, 1.0)


def test_feedback_of_the_metric_is_the_gradient() -> None:
    def told(example: Any, prediction: Any, trace: object = None) -> Any:
        right = exact_match(example, prediction)
        return dspy.Prediction(score=right, feedback=f"{example.question} wants {example.answer}")

    teacher = optimizer(criteria=None, metric=told, iterations=1, sample_size=10)
    better = teacher.compile(program(), TRAIN, valset=VALIDATION)
    (member,) = better.detailed_results.iterations[0].members
    failed = [output for output in member.outputs if output.metric == 0.0]
    assert 0 < len(failed) < len(member.outputs)
    assert [each.text for each in member.gradients] == [output.feedback for output in failed]
    assert not any("evaluation" in asked for asked in asked_of(teacher.gradient_lm))
    assert "wants a" in asked_of(teacher.editor_lm)[0]["feedback"]


def test_an_output_that_does_not_parse_gets_a_gradient_and_no_verdict() -> None:
    def clumsy(asked: Asked) -> Any:
        return program_script(asked) if "careful" in asked.instruction else "I do not know the format."

    teacher = optimizer(iterations=1, editor_lm=text_lm(lambda asked: {"versions": ["Level 20, careful."]}))
    better = teacher.compile(program(clumsy), TRAIN, valset=VALIDATION)
    (member,) = better.detailed_results.iterations[0].members
    assert [len(member.gradients), len(member.outputs)] == [6, 6]
    assert all("AdapterParseError" in (output.error or "") for output in member.outputs)
    shown = next(asked for asked in asked_of(teacher.gradient_lm) if "evaluation" in asked)
    assert shown["output"] == "I do not know the format."
    assert "It failed: AdapterParseError" in shown["evaluation"]
    assert instruction_of(better) == "Level 20, careful."


def test_settings_of_dspy_hold_in_all_threads() -> None:
    student = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    by_default = text_lm(judge_script)
    teacher = optimizer(judge_lm=None, iterations=1)
    with dspy.context(lm=text_lm(program_script)):
        with pytest.raises(JudgeError):  # the default judge is the LM of the settings, which does not judge
            teacher.compile(student, TRAIN, valset=VALIDATION)
    student.set_lm(text_lm(program_script))
    with dspy.context(lm=by_default):
        assert teacher.compile(student, TRAIN, valset=VALIDATION).score > 0.25
    assert len(asked_of(by_default)) > 0


def test_the_student_and_dspys_settings_are_untouched() -> None:
    student = program()
    lm, before = student.predictors()[0].lm, student.predictors()[0].signature
    with dspy.track_usage() as usage:
        better = optimizer().compile(student, TRAIN, valset=VALIDATION)
    assert student.predictors()[0].signature is before and before.instructions == SEED
    assert better is not student
    assert better.predictors()[0].lm is student.predictors()[0].lm is lm
    assert dspy.settings.usage_tracker is None
    assert sum(map(len, usage.usage_data.values())) == better.detailed_results.spent["calls"]


def test_what_was_spent_is_exactly_what_was_asked() -> None:
    student, teacher = program(), optimizer(num_threads=8)
    spent = teacher.compile(student, TRAIN, valset=VALIDATION).detailed_results.spent_by_module
    gradient = asked_of(teacher.gradient_lm)
    asked = {
        "generation": len(asked_of(student.predictors()[0].lm)),
        "evaluation": len(asked_of(teacher.judge_lm)),
        "gradients": sum("evaluation" in each for each in gradient),
        "summarisation": sum("evaluation" not in each for each in gradient),
        "editing": len(asked_of(teacher.editor_lm)),
    }
    assert {module: counted["calls"] for module, counted in spent.items()} == asked
    assert {module: counted["prompt_tokens"] for module, counted in spent.items()} == {
        m: 10 * n for m, n in asked.items()
    }
    assert {module: counted["completion_tokens"] for module, counted in spent.items()} == {
        m: 2 * n for m, n in asked.items()
    }


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> Any:
        details = optimizer(seed=seed).compile(program(), TRAIN, valset=VALIDATION).detailed_results
        return details.iterations, details.finalists, details.validation, details.spent_by_module

    assert run(3) == run(3)
    assert run(3)[0] != run(4)[0]


def test_events_tell_the_run() -> None:
    heard: list[Any] = []
    optimizer(listeners=[heard.append]).compile(program(), TRAIN, valset=VALIDATION)
    assert [type(event) for event in heard] == [BeamStarted, *[IterationTaken] * 3, BeamValidated]
    assert heard[0] == BeamStarted({"predict": SEED}, 3)
    assert heard[-1].finalists[0] == {"predict": SEED}


def test_the_program_saves_and_loads_as_an_ordinary_one(tmp_path: Any) -> None:
    with dspy.context(lm=text_lm(program_script)):
        student = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
        better = optimizer().compile(student, TRAIN, valset=VALIDATION)
    better.save(tmp_path / "better.json")
    loaded = dspy.ChainOfThought("question -> answer")
    loaded.load(tmp_path / "better.json")
    assert instruction_of(loaded) == instruction_of(better)
    scores = [each["score"] for each in better.candidate_programs]
    assert scores == sorted(scores, reverse=True) and scores[0] == better.score


# --- what is refused before the first call ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradSumTeleprompter(" "), "task_description=' ': give a text"),
        (lambda: GradSumTeleprompter("Do it.", criteria=""), "criteria='': give a text"),
        (lambda: GradSumTeleprompter("Do it.", "good", seed=True), "seed=True: give a whole number"),
        (
            lambda: GradSumTeleprompter("Do it.", "good", beam=2),
            "There is no setting beam. The settings are: auto|beam_",
        ),
        (
            lambda: GradSumTeleprompter("Do it.", "good", beam_width=0),
            "beam_width=0: give a whole number of at least 1",
        ),
        (
            lambda: GradSumTeleprompter("Do it.", "good", judge_scale=(5, 1)),
            r"judge_scale=\(5, 1\): give \(worst, best",
        ),
        (lambda: GradSumTeleprompter("Do it.", "good", judge_scale=5), "judge_scale=5: give two whole numbers"),
        (lambda: GradSumTeleprompter("Do it.", "good", summarize="no"), "summarize='no': give True or False"),
        (lambda: GradSumTeleprompter("Do it.", "good", max_lm_calls=0), "max_lm_calls=0: give a whole number"),
        (lambda: GradSumTeleprompter("Do it.", "good", full_score="all"), "full_score='all': give a number"),
        (lambda: GradSumTeleprompter("Do it.", "good", auto="huge"), "auto='huge' is not a preset"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(build: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build()


def test_a_run_without_metric_and_criteria_is_refused() -> None:
    with pytest.raises(MetricError, match="nothing to score outputs by. Pass GradSumTeleprompter.criteria="):
        optimizer(criteria=None).compile(program(), TRAIN, valset=VALIDATION)


def test_a_metric_that_fails_on_every_row_is_an_error() -> None:
    def broken(example: Any, prediction: Any, trace: object = None) -> bool:
        return prediction.choice == example.answer

    with pytest.raises(MetricError, match="failed on all 6 training rows; on the first, the metric raised"):
        optimizer(criteria=None).compile(program(), TRAIN, broken, valset=VALIDATION)


def test_a_program_without_a_language_model_is_refused() -> None:
    with pytest.raises(ProgramError, match="Predictor `predict` has no language model"):
        optimizer().compile(dspy.ChainOfThought("question -> answer"), TRAIN, valset=VALIDATION)


def test_a_program_whose_language_model_is_dead_is_an_error() -> None:
    def dead(asked: Asked) -> Any:
        raise OSError("no route to host")

    with pytest.raises(ProgramError, match="language model could not be called on any of the 6 rows.*no route to host"):
        optimizer().compile(program(dead), TRAIN, valset=VALIDATION)


def test_presets_change_only_what_they_name() -> None:
    paper = GradSumSettings.of(None)
    assert (paper.beam_width, paper.iterations, paper.sample_size, paper.summarize) == (3, 10, 30, True)
    assert GradSumSettings.of("light").iterations < GradSumSettings.of("medium").iterations <= paper.iterations
    assert GradSumSettings.of("light", iterations=7).iterations == 7


def test_the_editor_is_shown_what_was_tried() -> None:
    teacher = optimizer(iterations=2)
    better = teacher.compile(program(), TRAIN, valset=VALIDATION)
    first, *later = asked_of(teacher.editor_lm)
    assert first.list_of("tried") == []
    compared = better.detailed_results.iterations[0].compared
    assert {f"{each.score[0]:.2f}: {each.prompts['predict']}" for each in compared} == set(later[0].list_of("tried"))
    blind = optimizer(iterations=2, tried_shown=0, editor_lm=text_lm(editor_script))
    blind.compile(program(), TRAIN, valset=VALIDATION)
    assert all("tried" not in asked for asked in asked_of(blind.editor_lm))
