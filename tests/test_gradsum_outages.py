"""GRAD-SUM where servers do not answer: no output and no verdict is made up of that."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from any_event import bits
from dspy import lm15
from scripted_gradsum import (
    ROWS,
    editor_script,
    gradient_script,
    instruction_of,
    judge_script,
    optimizer,
    program,
    program_script,
)
from scripted_text import Asked, text_lm

from dspy_greater.errors import JudgeError, OutageError, UnvalidatedError
from dspy_greater.program import servers

pytestmark = pytest.mark.slow

TRAIN, VALIDATION = ROWS[:8], ROWS[8:]
SCRIPTS: dict[str, Any] = {"judge": judge_script, "gradient": gradient_script, "editor": editor_script}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(servers, "LONGEST_WAIT", 0.01)


def failing(script: Any, when: Callable[[int], bool], error: Exception) -> Any:
    number = itertools.count(1)

    def answer(one: Asked) -> Any:
        if when(next(number)):
            raise error
        return script(one)

    return answer


def compiled(student: Any = None, **settings: Any) -> Any:
    chosen = {"max_outage_seconds": 10.0, **settings}
    return optimizer(**chosen).compile(student or program(), TRAIN, valset=VALIDATION)


def same(found: Any, undisturbed: Any) -> bool:
    one, other = found.detailed_results, undisturbed.detailed_results
    assert instruction_of(found) == instruction_of(undisturbed) and one.stopped_by is None
    assert [each.beam for each in one.iterations] == [each.beam for each in other.iterations]
    assert bits([each.members for each in one.iterations]) == bits([each.members for each in other.iterations])
    assert bits([each.compared for each in one.iterations]) == bits([each.compared for each in other.iterations])
    return one.validation == other.validation


@pytest.mark.parametrize("role", [*SCRIPTS, "task"])
def test_calls_that_come_to_nothing_now_and_then_change_nothing(role: str) -> None:
    plain = compiled()
    wrong = lm15.ProviderError("the reply (HTTP 200, text/html) is not JSON", status=200)
    script = failing(SCRIPTS.get(role, program_script), lambda count: count % 3 == 0, wrong)
    if role == "task":
        found = compiled(program(script))
    else:
        found = compiled(**{f"{role}_lm": text_lm(script, f"scripted/{role}")})
    assert same(found, plain)
    assert found.detailed_results.faults["malformed"] > 0
    assert f"{found.detailed_results.faults['malformed']} malformed" in str(found.detailed_results)


@pytest.mark.parametrize("role", ["judge", "task"])
def test_an_outage_ends_the_loop_before_the_iteration_is_recorded_and_the_run_goes_on(
    role: str, tmp_path: Path
) -> None:
    plain = compiled()
    lives = {"judge": 60, "task": 60}[role]
    script = failing({**SCRIPTS, "task": program_script}[role], lambda count: count > lives, lm15.ServerError("down"))
    lm = {} if role == "task" else {f"{role}_lm": text_lm(script, f"scripted/{role}")}
    student = program(script) if role == "task" else program()
    with pytest.raises((OutageError, UnvalidatedError), match="No language model answered for"):
        compiled(student, **lm, log_dir=tmp_path, max_outage_seconds=0.1)
    assert same(compiled(log_dir=tmp_path), plain)


def test_a_verdict_on_the_students_output_is_never_made_up() -> None:
    last = VALIDATION[0].question

    def picky(asked: Asked) -> Any:
        if f"question: {last}" in asked["inputs"].splitlines() and "wrong" in asked["output"]:
            raise lm15.RateLimitError("too many requests")
        return judge_script(asked)

    with pytest.raises(UnvalidatedError, match="in the validation: OutageError"):
        compiled(judge_lm=text_lm(picky, "scripted/judge"), max_outage_seconds=0.1)


def test_a_judge_that_never_answered_is_an_error_at_once() -> None:
    def refused(asked: Asked) -> Any:
        raise ConnectionRefusedError("nobody listens")

    with pytest.raises((JudgeError, OutageError), match="nobody listens"):
        compiled(judge_lm=text_lm(refused, "scripted/judge"), max_outage_seconds=0.1)


def test_the_optimizers_own_lms_have_a_cache_that_knows_the_server() -> None:
    from dspy_greater.program.asked_lm import for_search

    one = dspy.LM("openai/judge", api_base="http://127.0.0.1:1/v1", rollout_id=3, temperature=1.0)
    other = one.copy(api_base="http://127.0.0.1:2/v1")
    keys = [for_search(each, weights=known).kwargs["rollout_id"] for each in (one, other) for known in ("", "a")]
    assert len(set(keys)) == 4 and one.kwargs["rollout_id"] == 3
    assert for_search(one.copy(rollout_id=4)).kwargs["rollout_id"] not in keys
    assert for_search(one, timeout=9.0).kwargs["timeout"] == 9.0
    assert for_search(one.copy(timeout=5.0), timeout=9.0).kwargs["timeout"] == 5.0
