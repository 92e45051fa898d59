"""Servers that do not answer, or answer what is no language model's: rows without an answer are no rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest
from any_event import bits
from fault_proxy import FAULTS, Fault, FaultProxy, StandIn, between, every
from scripted_engine import (
    SEED,
    ScriptedEngine,
    exact_match,
    instruction_of,
    obedient_script,
    optimizer,
    planted_engine,
    planted_rows,
)

from dspy_greater.errors import GreaterError, OutageError, ProgramError, UnvalidatedError
from dspy_greater.program import servers
from dspy_greater.program.faults import ServerFault
from dspy_greater.program.servers import Servers
from dspy_greater.search import problem

pytestmark = pytest.mark.slow

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]
MODEL = planted_engine().model
SEED_RUN, STEP = len(TRAIN), len(TRAIN)  # calls


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits long for the next try, and none meets another's cache."""
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(servers, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(dspy, "cache", dspy.clients.Cache(False, True, None))


def obedient(messages: Sequence[Mapping[str, Any]]) -> str:
    system, user = messages[0]["content"], messages[-1]["content"]
    return obedient_script(f"{system}<|end|><|user|>{user}")


@pytest.fixture(scope="module")
def model() -> Iterator[StandIn]:
    with StandIn(obedient).serving() as stand_in:
        yield stand_in


@pytest.fixture
def proxy(model: StandIn) -> Iterator[FaultProxy]:
    model.answer, model.asked, model.usage, model.name = obedient, [], True, "model"
    with FaultProxy(model.url, hang=5.0).serving() as running:
        yield running


def student(url: str, *, cache: bool = False, **lm: Any) -> Any:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    program.set_lm(dspy.LM("openai/model", api_base=url, api_key="none", cache=cache, num_retries=0, **lm))
    return program


def compiled(program: Any, **settings: Any) -> Any:
    weights = ScriptedEngine(obedient_script, model=MODEL)
    chosen = {"steps": 2, "weights": weights, "max_outage_seconds": 20.0, **settings}
    with pytest.MonkeyPatch.context() as patch:
        # The stand-in counts words and writes what is scripted; `test_parity` holds how a server is compared.
        patch.setattr(problem, "who_answers", lambda *_, **__: None)
        return optimizer(**chosen).compile(program, TRAIN, valset=VALIDATION)


def quickly_or_not(fault: Fault) -> Any:
    """Two kinds are tried with every change, the others with the slow tests."""
    return pytest.param(fault, marks=[] if fault in ("503", "no choices") else [pytest.mark.slow])


def test_a_served_search_counts_what_the_server_says(proxy: FaultProxy, model: StandIn) -> None:
    details = compiled(student(proxy.url)).detailed_results
    phases = details.spent_by_phase
    assert sum(phase["runs"] for phase in phases.values()) == len(proxy.seen)
    assert details.spent["generated_tokens"] == sum(phase["generated_tokens"] for phase in phases.values()) > 0
    assert details.spent["prompt_tokens"] == sum(phase["prompt_tokens"] for phase in phases.values())
    assert details.spent["prompt_tokens"] == sum(words(asked) for asked in model.asked) > 0
    assert details.spent["generated_tokens"] == sum(len(obedient(asked).split()) for asked in model.asked)
    assert details.faults == {} and details.stopped_by is None


def words(messages: Any) -> int:
    return sum(len(each["content"].split()) for each in messages)


def test_where_a_server_does_not_tell_the_texts_are_counted(proxy: FaultProxy, model: StandIn) -> None:
    model.usage = False
    details = compiled(student(proxy.url)).detailed_results
    assert details.spent["generated_tokens"] > 0 and details.spent["prompt_tokens"] == 0


# ---- faults that pass


@pytest.fixture(scope="module")
def undisturbed(model: StandIn) -> Any:
    model.answer, model.asked, model.usage, model.name = obedient, [], True, "model"
    return compiled(student(model.url))


def same(found: Any, undisturbed: Any) -> bool:
    one, other = found.detailed_results, undisturbed.detailed_results
    assert same_steps(found, undisturbed)
    assert [each.validation for each in one.predictors] == [each.validation for each in other.predictors]
    assert one.spent["generated_tokens"] == other.spent["generated_tokens"] and one.stopped_by is None
    return True


KINDS: dict[Fault, str] = {
    "die": "unreachable",
    "429": "rate limit",
    "429 now": "rate limit",
    "500": "server error",
    "503": "server error",
    "html": "malformed",
    "empty": "malformed",
    "no choices": "empty",
    "garbage": "malformed",
    "hang": "timeout",
}


@pytest.mark.parametrize("fault", [quickly_or_not(each) for each in FAULTS])
def test_a_fault_in_the_middle_of_a_step_changes_nothing(fault: Fault, proxy: FaultProxy, undisturbed: Any) -> None:
    proxy.retry_after, proxy.hang = "0.2", 2.0
    proxy.faults = between(SEED_RUN + 2, SEED_RUN + 5, fault)
    found = compiled(student(proxy.url), request_timeout=0.5 if fault == "hang" else 30.0)
    assert same(found, undisturbed)
    assert found.detailed_results.faults == {KINDS[fault]: 3}
    assert f"calls without an answer: 3 {KINDS[fault]}" in str(found.detailed_results)
    assert found.detailed_results.to_dict()["faults"] == {KINDS[fault]: 3}


@pytest.mark.parametrize("fault", [quickly_or_not(each) for each in ("html", "empty", "no choices", "garbage")])
def test_answers_that_are_no_language_models_are_no_mistakes_of_the_program(
    fault: Fault, proxy: FaultProxy, undisturbed: Any
) -> None:
    proxy.faults = every(4, fault)
    found = compiled(student(proxy.url))
    assert same(found, undisturbed)
    assert sum(found.detailed_results.faults.values()) == proxy.seen.count(fault) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "no choices"])
def test_the_compatibility_backend_of_dspy_has_the_same_faults(fault: Fault, proxy: FaultProxy) -> None:
    plain = compiled(student(proxy.url, top_k=1))
    proxy.seen.clear()
    proxy.faults = between(SEED_RUN, SEED_RUN + 3, fault)
    found = compiled(student(proxy.url, top_k=1))
    assert same(found, plain) and found.detailed_results.faults == {KINDS[fault]: 3}


@pytest.mark.slow
def test_an_outage_of_the_seeds_run_and_one_of_the_final_comparison_change_nothing(
    proxy: FaultProxy, undisturbed: Any
) -> None:
    calls = sum(phase["runs"] for phase in undisturbed.detailed_results.spent_by_phase.values())
    validation = undisturbed.detailed_results.spent_by_phase["validation"]["runs"]
    for start in (2, calls - validation, calls - 1):
        proxy.seen.clear()
        proxy.faults = between(start, start + 4, "503")
        assert same(compiled(student(proxy.url)), undisturbed)


@pytest.mark.slow
def test_a_model_that_has_nothing_to_say_is_no_fault(proxy: FaultProxy, model: StandIn) -> None:
    model.answer = lambda messages: "" if SEED not in messages[0]["content"] else obedient(messages)
    details = compiled(student(proxy.url)).detailed_results
    assert details.faults == {} and len(details.steps) == 2
    model.usage = False  # and it never tells of prompts
    model.answer = lambda messages: "" if SEED not in messages[0]["content"] else obedient(messages)
    details = compiled(student(proxy.url)).detailed_results
    assert details.faults == {} and len(details.steps) == 2


# ---- faults that do not pass


def test_a_server_that_dies_in_a_step_leaves_no_trace_in_the_journal_and_the_run_goes_on(
    proxy: FaultProxy, undisturbed: Any, tmp_path: Path
) -> None:
    proxy.faults = between(SEED_RUN + STEP + 1, math.inf, "503")
    with pytest.raises(UnvalidatedError, match="after step 1 of 2 of predictor `predict`: OutageError: No language mo"):
        compiled(student(proxy.url), max_outage_seconds=0.3, log_dir=tmp_path)
    kept = (tmp_path / "journal.jsonl").read_text()
    assert [kept.count(f'"{kind}"') for kind in ("SearchStarted", "StepTaken", "Validated")] == [1, 1, 0]
    proxy.faults = between(0, 0, "503")
    assert same_steps(compiled(student(proxy.url), max_outage_seconds=7.0, log_dir=tmp_path), undisturbed)


def same_steps(found: Any, undisturbed: Any) -> bool:
    one, other = found.detailed_results.steps, undisturbed.detailed_results.steps
    assert [each.spent for each in one] == [each.spent for each in other]
    assert list(map(str, one)) == list(map(str, other)) and bits(one) == bits(other)
    return instruction_of(found) == instruction_of(undisturbed)


def test_a_server_that_is_back_for_the_final_comparison_returns_what_was_found(proxy: FaultProxy) -> None:
    proxy.faults = between(SEED_RUN + STEP + 1, SEED_RUN + STEP + 4, "503")
    with pytest.warns(RuntimeWarning, match="ended early, after step 1 of 2 of predictor `predict`: OutageError"):
        found = compiled(student(proxy.url), max_outage_seconds=0.0)
    details = found.detailed_results
    assert len(details.steps) == 1 and details.score >= details.seed_score
    assert "OutageError" in details.stopped_by


@pytest.mark.parametrize("fault", [quickly_or_not(each) for each in ("503", "html", "no choices", "429", "die")])
def test_where_a_row_of_the_seeds_final_comparison_is_not_answered_nothing_is_returned_as_better(
    fault: Fault, proxy: FaultProxy
) -> None:
    row = VALIDATION[1].question
    proxy.faults = lambda number, body: fault if SEED in body and row in body else None
    with pytest.raises(UnvalidatedError, match="in the validation of predictor `predict`: OutageError") as caught:
        compiled(student(proxy.url), max_outage_seconds=0.3)
    details = caught.value.detailed_results
    assert math.isnan(details.score) and details.predictors[0].instruction == SEED
    assert isinstance(caught.value.__cause__, OutageError) and isinstance(caught.value.__cause__, GreaterError)


def test_a_row_that_breaks_the_server_again_and_again_is_a_mistake_as_before(proxy: FaultProxy) -> None:
    row = f"]]\\n{TRAIN[1].question}\\n"
    proxy.faults = lambda number, body: "500" if row in body else None
    with pytest.warns(RuntimeWarning, match="The program failed on 1 of 4 training rows, which count as mistakes"):
        details = compiled(student(proxy.url)).detailed_results
    assert details.stopped_by is None and len(details.steps) == 2


@pytest.mark.parametrize("fault", ["die", "html"])
def test_a_server_that_never_answered_is_an_error_at_once(fault: Fault, proxy: FaultProxy) -> None:
    proxy.faults = between(0, math.inf, fault)
    since = time.monotonic()
    with pytest.raises(ProgramError, match="could not be called on any of the 4 rows"):
        compiled(student(proxy.url), max_outage_seconds=60.0)
    assert time.monotonic() - since < 20


@pytest.mark.slow
def test_a_name_that_the_server_does_not_know_is_an_error_at_once_and_later_an_outage(
    proxy: FaultProxy, model: StandIn
) -> None:
    model.name = "another"
    with pytest.raises(ProgramError, match="The model 'model' does not exist"):
        compiled(student(proxy.url))
    model.name = "model"

    def renamed(messages: Any) -> str:
        if SEED not in messages[0]["content"]:
            model.name = "another"
        return obedient(messages)

    model.answer = renamed
    with pytest.raises((OutageError, UnvalidatedError), match="does not exist"):
        compiled(student(proxy.url), max_outage_seconds=0.3)


def test_a_judge_that_dies_is_no_mistake_of_the_program(proxy: FaultProxy, undisturbed: Any) -> None:
    with StandIn(lambda messages: "good", name="judge").serving() as judge, FaultProxy(judge.url).serving() as wrong:
        wrong.faults = every(3, "html")
        asked = dspy.LM("openai/judge", api_base=wrong.url, api_key="none", cache=False, num_retries=0)

        def judged(example: Any, prediction: Any, trace: Any = None) -> bool:
            return asked("Is it good?") == ["good"] and exact_match(example, prediction)

        found = compiled(student(proxy.url), metric=judged)
    assert bits(found.detailed_results.steps) == bits(undisturbed.detailed_results.steps)
    assert found.detailed_results.faults["malformed"] == wrong.seen.count("html") > 0


def test_the_wait_for_a_server_is_no_part_of_a_runs_identity(proxy: FaultProxy, tmp_path: Path) -> None:
    first = compiled(student(proxy.url), log_dir=tmp_path)
    asked = len(proxy.seen)
    again = compiled(student(proxy.url), log_dir=tmp_path, max_outage_seconds=1.0, request_timeout=9.0)
    assert bits(again.detailed_results.steps) == bits(first.detailed_results.steps) and len(proxy.seen) == asked


# ---- DSPy's cache


def test_two_servers_with_one_name_never_share_answers(proxy: FaultProxy, model: StandIn) -> None:
    compiled(student(proxy.url, cache=True))
    asked = len(model.asked)
    compiled(student(proxy.url, cache=True))
    assert len(model.asked) == asked  # the same server is not asked twice
    with StandIn(lambda messages: "nothing that parses").serving() as other:
        with pytest.warns(RuntimeWarning, match="The program failed on all 4 training rows"):
            assert compiled(student(other.url, cache=True)).score == 0.0
        assert other.asked


def test_other_weights_behind_the_same_name_never_replay_old_answers(proxy: FaultProxy, model: StandIn) -> None:
    compiled(student(proxy.url, cache=True))
    asked = len(model.asked)
    compiled(student(proxy.url, cache=True), weights=planted_engine(seed=3))
    assert len(model.asked) > asked


def test_an_answer_that_was_none_is_never_replayed(proxy: FaultProxy, undisturbed: Any) -> None:
    proxy.faults = between(SEED_RUN, SEED_RUN + 2, "no choices")
    assert same(compiled(student(proxy.url, cache=True)), undisturbed)
    again = compiled(student(proxy.url, cache=True))
    assert bits(again.detailed_results.steps) == bits(undisturbed.detailed_results.steps)


def test_the_callers_lm_is_left_as_it_was(proxy: FaultProxy) -> None:
    program = student(proxy.url, cache=True)
    before = dict(program.predictors()[0].lm.kwargs)
    better = compiled(program)
    assert program.predictors()[0].lm.kwargs == before == better.predictors()[0].lm.kwargs


# ---- the wait itself


class Answer:
    def __init__(self, *kinds: Any) -> None:
        self.faults = tuple(ServerFault(kind) for kind in kinds)


class Asking:
    """Asks again; `left` are the rounds that nobody has asked for yet."""

    def __init__(self, *rounds: Any) -> None:
        self.left = list(rounds)

    def __call__(self, indices: Sequence[int]) -> list[Answer]:
        return [Answer(*self.left.pop(0)) for _ in indices]


def test_what_was_answered_is_not_asked_again() -> None:
    again = Asking([])
    patient = Servers(5.0)
    found = patient.settled([Answer(), Answer("server error")], again)
    assert [each.faults for each in found] == [(), ()] and not again.left
    assert patient.faults == {"server error": 1}


def test_one_row_is_asked_before_the_others_are() -> None:
    asked: list[list[int]] = []

    def again(indices: Sequence[int]) -> list[Answer]:
        asked.append(list(indices))
        return [Answer("unreachable") if len(asked) < 3 else Answer() for _ in indices]

    Servers(5.0).settled([Answer(), *[Answer("unreachable")] * 3], again)
    assert asked == [[1], [0], [2], [0], [3], [1, 2]] or asked[0] == [1]
    assert all(len(each) == 1 for each in asked[:2])


def test_what_only_the_prompt_can_be_blamed_for_stays_unanswered_unless_it_must_not() -> None:
    def again(indices: Sequence[int]) -> list[Answer]:
        return [Answer("timeout") if index == 1 else Answer() for index in indices]

    done = [Answer(), Answer("timeout")]
    assert [bool(each.faults) for each in Servers(60.0).settled(done, again)] == [False, True]
    with pytest.raises(OutageError, match=r"max_outage_seconds=0.1 \(timeout\)"):
        Servers(0.1).settled(done, again, must=[1])


@pytest.mark.parametrize("kind", ["rate limit", "malformed", "empty", "refused", "unreachable"])
def test_what_no_prompt_brings_about_is_never_blamed_on_one(kind: Any) -> None:
    def again(indices: Sequence[int]) -> list[Answer]:
        return [Answer(kind) if index == 1 else Answer() for index in indices]

    with pytest.raises(OutageError, match="No language model answered for"):
        Servers(0.2).settled([Answer(), Answer(kind)], again)


def test_the_time_begins_anew_with_every_answer() -> None:
    since = time.monotonic()
    late = {1: since + 0.3, 2: since + 0.6, 3: since + 0.9}

    def again(indices: Sequence[int]) -> list[Answer]:
        return [Answer("server error") if time.monotonic() < late.get(index, 0.0) else Answer() for index in indices]

    found = Servers(0.5).settled([Answer(), *[Answer("unreachable")] * 3], again, probe=lambda: Answer("unreachable"))
    assert not any(each.faults for each in found) and time.monotonic() - since >= 0.85


@pytest.mark.parametrize(
    "setting",
    [{"max_outage_seconds": -1}, {"request_timeout": 0}, {"max_outage_seconds": "long"}, {"request_timeout": math.inf}],
    ids=str,
)
def test_a_wait_that_cannot_be_is_refused(setting: dict[str, Any]) -> None:
    [(name, value)] = setting.items()
    with pytest.raises(GreaterError, match=f"{name}={value!r}: give a"):
        optimizer(**setting)
