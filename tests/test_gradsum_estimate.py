"""What a run of GRAD-SUM is said to cost before it begins, against what it costs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
import pytest
from scripted_gradsum import exact_match, gradient_script, optimizer, program, program_script
from scripted_text import Asked, text_lm

from dspy_greater import Estimate
from dspy_greater.errors import MetricError, ProgramError

ROWS = [dspy.Example(question=str(number), answer=f"a{number}").with_inputs("question") for number in range(48)]
VALIDATION, TRAIN = ROWS[::6], [row for number, row in enumerate(ROWS) if number % 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"iterations": 1},
        {"beam_width": 1, "sample_size": 10, "subset_size": 8},
        {"summarize": False, "candidates_per_edit": 1},
        {"iterations": 6, "beam_width": 3},
        {"criteria": None, "judge_lm": None, "metric": exact_match},
    ],
    ids=["usual", "one iteration", "one prompt", "raw feedback", "wide and long", "metric alone"],
)
def test_calls_and_tokens_are_within_half_as_much_again_and_below_the_bound(settings: dict[str, Any]) -> None:
    told = optimizer(**settings).compile(program(), TRAIN, valset=VALIDATION, dry_run=True)
    details = optimizer(**settings).compile(program(), TRAIN, valset=VALIDATION).detailed_results
    spent = details.spent_by_module.values()
    tokens = sum(counted["prompt_tokens"] + counted["completion_tokens"] for counted in spent)
    calls = sum(counted["calls"] for counted in spent)
    assert isinstance(told, Estimate) and told.unit == "iterations"
    assert 1 / 1.5 < told.total.calls / calls < 1.5
    assert 1 / 1.5 < told.total.tokens / tokens < 1.5
    assert told.low.calls <= told.total.calls <= told.high.calls
    assert calls <= told.high.calls


class Router(dspy.Module):
    """Each question goes to one of four predictors; a fifth is for none."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, program().predictors()[0])

    def forward(self, question: str) -> Any:
        return getattr(self, "abcd"[int(question) % 4])(question=question)


def blaming_all(asked: Asked) -> dict[str, Any]:
    return {**gradient_script(asked), **({"concerns": "a, b, c, d"} if "evaluation" in asked else {})}


@pytest.mark.filterwarnings("ignore:Predictor.*not called")
def test_predictors_that_a_run_does_not_call_cost_nothing_in_the_estimate_nor_in_the_budget() -> None:
    settings: dict[str, Any] = {"criteria": None, "metric": exact_match, "gradient_lm": text_lm(blaming_all)}
    told = optimizer(**settings).compile(Router(), TRAIN, valset=VALIDATION, dry_run=True)
    details = optimizer(**settings).compile(Router(), TRAIN, valset=VALIDATION).detailed_results
    generation = details.spent_by_module["generation"]
    assert generation["calls"] == generation["runs"] == generation["predictor_calls"]
    assert 1 / 1.5 < told.total.calls / details.spent["calls"] < 1.5
    most = details.spent["calls"] + 24  # all prompts of the beam might have met the student's
    bounded = optimizer(**settings, max_lm_calls=most).compile(Router(), TRAIN, valset=VALIDATION).detailed_results
    assert bounded.out_of_budget is None and len(bounded.iterations) == 3


def test_a_dry_run_takes_one_small_iteration_and_leaves_nothing_behind(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()
    events: list[Any] = []

    def counted(question: Any) -> Any:
        asked["program"] += 1
        return program_script(question)

    student = program(counted)
    before = [each.signature.instructions for each in student.predictors()]
    search = optimizer(log_dir=tmp_path / "run", callbacks=[events.append])
    told = search.compile(student, TRAIN, valset=VALIDATION, dry_run=True)
    assert not events and not (tmp_path / "run").exists()
    assert [each.signature.instructions for each in student.predictors()] == before
    assert asked["program"] == told.probe.runs <= 4 + 3  # the rows, and each candidate on one
    assert told.probe.calls > told.probe.runs and told.probe.seconds > 0


def test_a_dry_run_asks_again_what_dspys_cache_knows(tmp_path: Path) -> None:
    student = program()
    with dspy.context(lm=None):
        dspy.configure_cache(disk_cache_dir=str(tmp_path), enable_disk_cache=False)
        student.set_lm(dspy.LM("scripted/cached", engine=text_lm(program_script).engine, cache=True, num_retries=0))
        first, second = (optimizer().compile(student, TRAIN, valset=VALIDATION, dry_run=True) for _ in range(2))
    assert first.probe.calls == second.probe.calls > 0
    assert first.total.calls == second.total.calls


def test_a_budget_bounds_the_estimate_as_it_bounds_the_run() -> None:
    whole = optimizer(iterations=6).compile(program(), TRAIN, valset=VALIDATION, dry_run=True)
    limit = round(0.5 * whole.total.calls)
    settings = {"iterations": 6, "max_lm_calls": limit}
    told = optimizer(**settings).compile(program(), TRAIN, valset=VALIDATION, dry_run=True)
    details = optimizer(**settings).compile(program(), TRAIN, valset=VALIDATION).detailed_results
    assert told.bounded_by == "max_lm_calls" and 0 < told.steps < 6
    assert told.total.calls <= limit
    assert told.steps <= len(details.iterations) < 6


def test_the_line_says_iterations_calls_and_tokens() -> None:
    told = str(optimizer().compile(program(), TRAIN, valset=VALIDATION, dry_run=True))
    assert "3 iterations, " in told and " runs of the program, " in told and " calls of language models, " in told
    assert "differentiated" not in told


def test_a_dry_run_raises_what_the_run_would() -> None:
    with pytest.raises(MetricError, match="There is nothing to score outputs by"):
        optimizer(criteria=None).compile(program(), TRAIN, valset=VALIDATION, dry_run=True)


def test_a_row_that_a_dry_run_names_is_the_callers() -> None:
    class Broken(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predict = program().predictors()[0]

        def forward(self, question: str) -> Any:
            raise KeyError(f"no table for {question}")

    with pytest.raises(ProgramError) as told:
        optimizer(seed=1).compile(Broken(), TRAIN, valset=VALIDATION, dry_run=True)
    failed = re.search(r"no table for (\d+)", str(told.value))
    named = re.search(r"trainset\[(\d+)\]", str(told.value))
    assert failed is not None and named is not None, told.value
    assert TRAIN[int(named[1])].question == failed[1]
