"""What a user sees of the optimizers: names, keywords, budgets, and a result in DSPy's own words."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted_engine import SEED, exact_match, instruction_of, optimizer, planted_engine, planted_rows, program_on
from scripted_gradsum import ROWS, program
from scripted_gradsum import optimizer as gradsum

import dspy_greater
from dspy_greater import GradSum, GReaTer, local_lm
from dspy_greater.errors import SettingsError
from dspy_greater.gradsum.settings import GradSumKnobs, GradSumSettings
from dspy_greater.run.events import SearchStarted, StepTaken
from dspy_greater.run.files import replace_text
from dspy_greater.settings import Knobs, Settings

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]


def compiled(program_: Any = None, **settings: Any) -> Any:
    return optimizer(**settings).compile(program_ or program_on(planted_engine()), TRAIN, valset=VALIDATION)


# ---- names and keywords


def test_the_older_names_are_the_same_classes() -> None:
    assert dspy_greater.GReaTerTeleprompter is GReaTer and dspy_greater.GradSumTeleprompter is GradSum
    assert issubclass(GReaTer, dspy.teleprompt.Teleprompter) and issubclass(GradSum, dspy.teleprompt.Teleprompter)


@pytest.mark.parametrize(
    ("optimizer_class", "knobs", "settings"), [(GReaTer, Knobs, Settings), (GradSum, GradSumKnobs, GradSumSettings)]
)
def test_every_setting_is_a_keyword_that_help_shows(optimizer_class: Any, knobs: Any, settings: Any) -> None:
    names = [field.name for field in dataclasses.fields(settings)]
    assert list(knobs.__annotations__) == names
    shown = inspect.signature(optimizer_class).parameters
    assert set(names) <= set(shown) and "settings" not in shown
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names)


@pytest.mark.parametrize("settings", [Settings, GradSumSettings])
def test_the_types_that_help_shows_are_those_of_the_settings(settings: Any) -> None:
    knobs = Knobs if settings is Settings else GradSumKnobs
    for field in dataclasses.fields(settings):
        shown = getattr(knobs.__annotations__[field.name], "__forward_arg__", "")
        assert shown == (field.type if "None" in str(field.type) else f"{field.type} | None")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"max_errors": -1}, "max_errors=-1: give a whole number of at least 0"),
        ({"max_metric_calls": 0}, "max_metric_calls=0: give a whole number of at least 1"),
        ({"failure_score": float("nan")}, "failure_score=nan: give a finite number"),
        ({"num_threads": 0}, "num_threads=0: give a whole number of at least 1"),
    ],
)
def test_impossible_values_are_refused_at_once(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        GReaTer(metric=exact_match, **wrong)


# ---- rows that fail, and budgets


def failing_on(questions: str) -> Any:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if questions in example.question:
            raise ValueError("no such question")
        return exact_match(example, prediction)

    return metric


@pytest.mark.filterwarnings("ignore:The metric failed on:RuntimeWarning")
def test_a_row_that_fails_has_the_failure_score_in_training_and_validation() -> None:
    metric = failing_on("apples")
    seen = [row for row in TRAIN if "apples" in row.question]
    assert 0 < len(seen) < len(TRAIN)
    details = compiled(metric=metric, failure_score=-1.0, steps=1).detailed_results
    scores = [row.score for row in details.predictors[0].seed.rows]
    assert scores.count(-1.0) == len(seen)
    failed = ["apples" in row.question for row in VALIDATION]
    for subscores in details.val_subscores:
        assert sorted(score == -1.0 for score in subscores) == sorted(failed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The metric failed on:RuntimeWarning")
def test_more_failed_rows_than_allowed_end_the_search_with_what_was_found() -> None:
    metric = failing_on("apples")
    allowed = sum("apples" in row.question for row in TRAIN)  # the seed's own
    with pytest.warns(RuntimeWarning, match=rf"failed on \d+ rows, and max_errors={allowed}; on the last, the metric"):
        better = compiled(metric=metric, max_errors=allowed, steps=4)
    assert len(better.detailed_results.steps) == 1 and "max_errors" in better.detailed_results.stopped_by
    assert len(compiled(metric=metric, max_errors=1000, steps=4).detailed_results.steps) == 4


@pytest.mark.slow
def test_metric_calls_are_a_budget_that_the_step_which_reaches_it_ends() -> None:
    free = compiled(steps=4).detailed_results
    seed, *steps = [free.predictors[0].seed_spent["runs"], *(step.spent["runs"] for step in free.steps)]
    reached = seed + sum(steps[:2])
    limited = compiled(steps=4, max_metric_calls=reached).detailed_results
    assert len(limited.steps) == 2 and limited.stopped_by == "budget"
    assert f"max_metric_calls={reached} was reached with {reached} calls, after step 2 of 4" in limited.out_of_budget
    assert len(compiled(steps=4, max_metric_calls=reached + 1).detailed_results.steps) == 3


# ---- the result


@pytest.mark.slow
def test_a_result_says_which_programs_were_validated_and_how_each_row_went() -> None:
    better = compiled(steps=3)
    details = better.detailed_results
    assert details.candidates[0].instructions == {"predict": SEED}
    assert details.candidates[details.best_idx].instructions == {"predict": instruction_of(better)}
    assert details.val_aggregate_scores[details.best_idx] == better.score > details.val_aggregate_scores[0]
    for score, subscores in zip(details.val_aggregate_scores, details.val_subscores, strict=True):
        assert len(subscores) == len(VALIDATION) and sum(subscores) / len(subscores) == score
    evaluate = dspy.Evaluate(devset=VALIDATION, metric=exact_match, num_threads=1, display_progress=False)
    assert evaluate(better).score == pytest.approx(100 * better.score)  # percent there, the metric's own scale here


@pytest.mark.slow
def test_a_result_is_plain_values_and_a_short_trajectory() -> None:
    details = compiled(steps=3).detailed_results
    record = json.loads(json.dumps(details.to_dict(), allow_nan=False))
    assert record["score"] == details.score and record["best_idx"] == details.best_idx
    [predictor] = record["predictors"]
    assert [step["instruction"] for step in predictor["steps"]] == [step.chosen.instruction for step in details.steps]
    told = str(details)
    assert told.startswith(f"score {details.seed_score:.3g} -> {details.score:.3g} on 4 validation rows\n")
    assert repr(SEED) in told and repr(details.predictors[0].instruction) in told
    assert len(told.splitlines()) <= len(details.steps) + 4


class Two(dspy.Module):
    """Two predictors with gold values."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.first, self.second = (dspy.ChainOfThought(dspy.Signature("question -> answer", SEED)) for _ in range(2))
        self.set_lm(local_lm(engine, cache=False, max_tokens=64))

    def forward(self, question: str) -> Any:
        first = self.first(question=question)
        return dspy.Prediction(first=first.answer, answer=self.second(question=question).answer)


def both(example: Any, prediction: Any, trace: Any = None) -> float:
    return ((prediction.first == example.answer) + (prediction.answer == example.answer)) / 2


@pytest.mark.slow
def test_candidate_programs_are_whole_programs_from_best_to_worst() -> None:
    better = compiled(Two(planted_engine()), metric=both, steps=2)
    details, ranked = better.detailed_results, better.candidate_programs
    texts = [tuple(each.signature.instructions for each in one["program"].predictors()) for one in ranked]
    assert len(set(texts)) == len(texts) and (SEED, SEED) in texts
    assert texts[0] == tuple(each.signature.instructions for each in better.predictors())
    scores = [one["score"] for one in ranked]
    assert scores == sorted(scores, reverse=True) and scores[0] == better.score
    assert {text for text, _ in texts} == set(details.predictors[0].validation)  # of the first one's search too
    evaluate = dspy.Evaluate(devset=VALIDATION, metric=both, num_threads=1, display_progress=False)
    for one in ranked:
        assert evaluate(one["program"]).score == pytest.approx(100 * one["score"], abs=0.01)


def test_grad_sum_has_the_same_words_for_its_result() -> None:
    better = gradsum(iterations=2).compile(program(), ROWS[:6], valset=ROWS[8:12])
    details = better.detailed_results
    assert details.candidates[0].instructions == details.seed_prompts
    assert details.candidates[details.best_idx].instructions == details.prompts
    for score, subscores in zip(details.val_aggregate_scores, details.val_subscores, strict=True):
        assert len(subscores) == 4 and sum(subscores) / 4 == pytest.approx(score)
    assert json.loads(json.dumps(details.to_dict(), allow_nan=False))["score"] == details.score
    assert str(details).startswith(f"score {details.seed_score:.3g} -> {details.score:.3g} on 4 validation rows\n")


# ---- best.json


@pytest.mark.slow
def test_the_best_so_far_is_on_disk_after_every_new_best(tmp_path: Path) -> None:
    seen: list[tuple[float, Any]] = []

    def look(event: Any) -> None:
        if isinstance(event, (SearchStarted, StepTaken)):
            known = [each.evaluation for each in getattr(event, "candidates", ()) if each.evaluation is not None]
            tried = [event.seed] if isinstance(event, SearchStarted) else [event.chosen, *known]
            best = min(tried, key=lambda each: each.objective)
            seen.append((best, json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))))

    better = compiled(steps=3, log_dir=tmp_path, callbacks=[look])
    best = seen[0][0]
    for tried, written in seen:
        best = min(best, tried, key=lambda each: each.objective)
        assert written["instructions"] == {"predict": best.instruction} and written["score"] == best.score
    written = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    assert written["instructions"] == {"predict": instruction_of(better)}
    assert written["validation_score"] == better.score
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".best")]


def test_a_folder_that_takes_no_file_costs_no_search(tmp_path: Path) -> None:
    (tmp_path / "best.json").mkdir()
    with pytest.warns(RuntimeWarning, match=r"best\.json could not be written: .* It is tried again as"):
        better = compiled(steps=1, log_dir=tmp_path)
    assert better.detailed_results.steps


def test_a_run_goes_on_writing_its_best_after_a_write_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = iter([True])

    def once(path: Path, text: str) -> None:
        if next(failing, False):
            raise PermissionError(13, "open elsewhere")
        replace_text(path, text)

    monkeypatch.setattr("dspy_greater.run.best.replace_text", once)
    with pytest.warns(RuntimeWarning, match=r"best\.json could not be written"):
        better = gradsum(iterations=1, log_dir=tmp_path).compile(program(), ROWS[:6], valset=ROWS[8:12])
    assert json.loads((tmp_path / "best.json").read_text())["instructions"] == better.detailed_results.prompts


def test_grad_sum_writes_its_best_too(tmp_path: Path) -> None:
    better = gradsum(iterations=1, log_dir=tmp_path).compile(program(), ROWS[:6], valset=ROWS[8:12])
    written = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    assert written["instructions"] == better.detailed_results.prompts
    assert written["validation_score"] == better.score
