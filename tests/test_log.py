"""A run in lines of text: what they say, and that nobody sees them who did not ask."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import SEED, optimizer, planted_engine, planted_rows, program_on
from scripted_gradsum import ROWS, program
from scripted_gradsum import optimizer as gradsum

from dspy_greater.objective.types import Candidate, Evaluation
from dspy_greater.run.events import (
    BeamStarted,
    BeamValidated,
    Event,
    IterationTaken,
    MemberEdited,
    PromptsScored,
    SearchStarted,
    StepTaken,
    Validated,
    Warned,
)
from dspy_greater.run.log import StepLog, edit_of

ROOT = Path(__file__).resolve().parent.parent


def evaluation(instruction: str, score: float, loss: float = 0.25) -> Evaluation:
    return Evaluation((1, 2), instruction, (), score, loss, 1.0, (1 - score, loss))


def candidate(text: str, outcome: Evaluation | None, edit: str = "replace") -> Candidate:
    return Candidate(3, text, -1.0, 0.5, outcome, edit)


STARTED = SearchStarted("predict", evaluation("Think.", 0.5), 4, {"generated_tokens": 120})
BETTER, WORSE = evaluation("Count.", 0.75, 0.125), evaluation("Guess.", 0.25)
STEP = StepTaken(
    "predict",
    0,
    7,
    1,
    (candidate(" Guess", WORSE), candidate(" Count", BETTER), candidate(" Look", None)),
    BETTER,
    "gain 0.25",
    {"generated_tokens": 410, "forwards": 9},
    " Think",
)


def lines(caplog: pytest.LogCaptureFixture, *happened: Event) -> list[str]:
    caplog.set_level(logging.INFO, logger="dspy_greater")
    log = StepLog()
    for event in happened:
        log(event)
    assert {record.name for record in caplog.records} <= {"dspy_greater"}
    return [record.getMessage() for record in caplog.records]


def test_the_start_each_step_and_the_validation_are_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    back = replace(STEP, step=1, position=8, candidates=(candidate(" Guess", WORSE),), chosen=WORSE, spent={})
    validated = Validated("predict", {"Think.": 0.5, "Count.": 0.8}, "Count.", {"generated_tokens": 800})
    assert lines(caplog, STARTED, STEP, back, validated) == [
        "Predictor `predict`: 4 steps from score 0.5, loss 0.25, 120 tokens generated: 'Think.'",
        "Predictor `predict`, step 1/4, position 7: ' Think' -> ' Count', score 0.75, best 0.75, 410 tokens generated; "
        "gain 0.25",
        "Predictor `predict`, step 2/4, position 8: ' Think' -> ' Guess', score 0.25, best 0.75, 0 tokens generated; "
        "gain 0.25",
        "Predictor `predict`, validation of 2 instructions: score 0.8, seed 0.5, 800 tokens generated: 'Count.'",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_the_best_of_what_was_tried_is_told_though_it_was_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    kept = replace(STEP, chosen=STARTED.seed, reason="within the noise: 50 % is not enough")
    assert lines(caplog, STARTED, kept)[1] == (
        "Predictor `predict`, step 1/4, position 7: ' Think' kept, score 0.5, best 0.75, 410 tokens generated; "
        "within the noise: 50 % is not enough"
    )


def test_a_step_without_its_start_is_told_as_far_as_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, STEP)[0].startswith("Predictor `predict`, step 1, position 7: ' Think' -> ' Count', score")


def test_a_second_predictor_has_a_best_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    second = replace(STARTED, predictor="answer", steps=9, seed=evaluation("Say.", 0.125))
    step = replace(STEP, predictor="answer", chosen=WORSE, candidates=())
    assert "`answer`, step 1/9, " in lines(caplog, STARTED, STEP, second, step)[-1]
    assert "score 0.25, best 0.25" in caplog.messages[-1]


def test_a_warning_of_the_search_is_logged_as_one(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, Warned("The budget is at 100 %.")) == ["The budget is at 100 %."]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("found", "current", "told"),
    [
        (candidate(" Count", BETTER), " Think", "' Think' -> ' Count'"),
        (candidate(" Count", BETTER, "insert"), " Think", "'' -> ' Count'"),
        (candidate(" Think", BETTER, "insert"), " Think", "'' -> ' Think'"),
        (candidate(" Think", BETTER, "delete"), " Think", "' Think' -> ''"),
        (candidate(" Count", BETTER), "", "'' -> ' Count'"),  # appended
        (candidate(" Think", BETTER), " Think", "' Think' kept"),  # line 14 of the paper took the token itself
        (candidate(" Count", WORSE), " Think", "' Think' kept"),
        (candidate(" Count", None), "\n", "'\\n' kept"),
    ],
)
def test_an_edit_is_told_as_what_stood_and_what_stands(found: Candidate, current: str, told: str) -> None:
    assert edit_of(replace(STEP, candidates=(found,), current_text=current)) == told


def test_grad_sum_has_a_line_an_iteration_too(caplog: pytest.LogCaptureFixture) -> None:
    compared = tuple(PromptsScored({"predict": text}, (), score) for text, score in (("a", (0.5, 1)), ("b", (0.75, 0))))
    member = MemberEdited({"predict": "a"}, (), (), {}, ({"predict": "b"},))
    spent = {"generation": {"calls": 8}, "evaluation": {"calls": 4}}
    iteration = IterationTaken(0, (0, 1), (0,), (member,), compared, ({"predict": "b"},), spent)
    validated = BeamValidated(({"predict": "a"}, {"predict": "b"}), ((0.25, 1.0), (0.5, 0.5)), 1)
    assert lines(caplog, BeamStarted({"predict": "a"}, 4), iteration, validated) == [
        "GRAD-SUM: 4 iterations from {'predict': 'a'}",
        "GRAD-SUM, iteration 1/4: best score 0.75 and 0, 1 candidates, 12 LM calls up to now",
        "GRAD-SUM, validation of 2 programs: score 0.5 and 0.5, seed 0.25 and 1: {'predict': 'b'}",
    ]


# --- in a run ---


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_a_search_logs_what_its_steps_did(caplog: pytest.LogCaptureFixture, variant: Any) -> None:
    caplog.set_level(logging.INFO, logger="dspy_greater")
    rows = planted_rows(24)
    engine = planted_engine()
    better = optimizer(variant=variant, steps=6, progress=False).compile(
        program_on(engine), rows[:4], valset=rows[8:12]
    )
    logged = [record.getMessage() for record in caplog.records if record.name == "dspy_greater"]
    assert logged[0].startswith("Estimate: ")
    told = [line for line in logged if not line.startswith("Estimate")]
    steps = better.detailed_results.steps
    assert len(told) == len(steps) + 2
    assert told[0].startswith("Predictor `predict`: 6 steps from score 0, loss ") and told[0].endswith(repr(SEED))
    assert told[-1].startswith("Predictor `predict`, validation of ")
    assert sum("->" in line.split(";")[0] for line in told) > 0
    text = SEED
    for step, line in zip(steps, told[1:], strict=False):
        assert f"step {step.step + 1}/6, position {step.position}: {edit_of(step)}, " in line
        assert f"{step.spent['generated_tokens']} tokens generated; {step.reason}" in line
        if step.current_text:
            assert step.current_text == engine.tokenizer.decode([step.current_token])
        if variant == "paper":  # the other may go back to where it was
            assert edit_of(step).endswith("kept") == (step.chosen.instruction == text)
        text = step.chosen.instruction


def test_grad_sum_logs_its_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dspy_greater")
    gradsum(iterations=2).compile(program(), ROWS[:6], valset=ROWS[8:12])
    told = [record.getMessage() for record in caplog.records if record.name == "dspy_greater"]
    assert [line.split(":")[0] for line in told] == [
        "GRAD-SUM", "GRAD-SUM, iteration 1/2", "GRAD-SUM, iteration 2/2", told[-1].split(":")[0],
    ]  # fmt: skip
    assert told[-1].startswith("GRAD-SUM, validation of ")


def test_nothing_is_seen_of_it_where_logging_is_not_configured() -> None:
    code = (
        "from dspy_greater.run.events import SearchStarted, Warned\n"
        "from dspy_greater.run.log import StepLog\n"
        "from dspy_greater.objective.types import Evaluation\n"
        "log = StepLog()\n"
        "log(SearchStarted('p', Evaluation((1,), 'Think.', (), 0.5, 1.0, 1.0, (0.5, 1.0)), 3))\n"
        "log(Warned('careful'))\n"
    )
    assert run(code) == ""
    asked = "import logging\nlogging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')\n"
    assert run(asked + code).splitlines() == [
        "dspy_greater INFO Predictor `p`: 3 steps from score 0.5, loss 1, 0 tokens generated: 'Think.'",
        "dspy_greater WARNING careful",
    ]


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr
