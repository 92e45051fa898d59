"""Callbacks hear of everything, may stop a search, and can break nothing; and a result says what ended its search."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import dspy
import golden_runs
import numpy
import pytest
from any_event import bits
from dspy.utils.callback import BaseCallback
from scripted_engine import (
    SEED,
    Checked,
    checked_engine,
    checked_rows,
    exact_match,
    instruction_of,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
)
from scripted_gradsum import ROWS, program
from scripted_gradsum import optimizer as gradsum

from dspy_greater import GReaTer, local_lm
from dspy_greater import optimizer as greater
from dspy_greater.errors import SettingsError
from dspy_greater.report.file import ReportFile
from dspy_greater.run.estimate import Cost, Estimate
from dspy_greater.run.events import BeamStarted, Event, IterationTaken, SearchStarted, StepTaken, Validated, Warned
from dspy_greater.run.progress import Listeners

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]


def compiled(**settings: Any) -> Any:
    return optimizer(**settings).compile(program_on(planted_engine()), TRAIN, valset=VALIDATION)


def stopping(kind: type, number: int = 0) -> Any:
    """A callback that says False at the event of this kind, and at the step or iteration of this number."""

    def callback(event: Any) -> bool | None:
        here = getattr(event, "step", getattr(event, "iteration", 0)) == number
        return False if isinstance(event, kind) and here else None

    return callback


def found(better: Any) -> Any:
    """All that a search decided, to the bit."""
    details = better.detailed_results
    parts = [(each.steps, each.finalists, each.validation, each.instruction) for each in details.predictors]
    return bits(tuple(parts)), instruction_of(better), better.score


# --- hearing ---


def test_none_is_no_callbacks_as_in_dspy() -> None:
    assert optimizer(callbacks=None, listeners=None).listeners == ()
    assert gradsum(callbacks=None, listeners=None).listeners == ()


def test_callbacks_and_listeners_are_two_names_for_the_same() -> None:
    heard: list[tuple[str, str]] = []
    compiled(
        steps=2,
        callbacks=[lambda event: heard.append(("callback", type(event).__name__))],
        listeners=[lambda event: heard.append(("listener", type(event).__name__))],
    )
    happened = ["SearchStarted", "StepTaken", "StepTaken", "Validated"]
    assert heard == [(name, event) for event in happened for name in ("listener", "callback")]


@pytest.mark.slow
def test_bar_log_report_and_callbacks_take_at_most_a_fiftieth_of_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the processor's time, on the pocket model with the preset's 24 rows."""
    taken, emit, close = [0.0], Listeners.emit, ReportFile.close

    def timed(function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                taken[0] += time.process_time() - began

        return run

    told = Estimate(("predict",), 3, Cost(seconds=1.0), Cost(seconds=1.0), Cost(seconds=1.0), Cost(), Cost())
    monkeypatch.setattr(Listeners, "emit", timed(emit))
    monkeypatch.setattr(Listeners, "__call__", timed(emit))
    monkeypatch.setattr(ReportFile, "close", timed(close))
    monkeypatch.setattr(greater, "brief_estimate", lambda problem: told)  # a probe of the model, whose price is its own
    caplog.set_level(logging.INFO, logger="dspy_greater")
    heard: list[Event] = []
    rows, student = golden_runs.rows("navigate", 48), golden_runs.plain()
    student.set_lm(local_lm("pocket", cache=False, max_tokens=200))
    search = GReaTer(metric=exact_match, steps=3, progress=True, log_dir=tmp_path, callbacks=[heard.append])
    began = time.process_time()
    search.compile(student, rows[:24], valset=rows[24:])
    whole = time.process_time() - began
    assert len(heard) == 5 and (tmp_path / "report.html").exists() and len(caplog.messages) >= 6
    assert 0 < taken[0] <= 0.02 * whole, (taken[0], whole)


@pytest.mark.slow
def test_a_callback_that_raises_is_warned_of_once_and_ends_nothing() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise LookupError("no such dashboard")

    with pytest.warns(RuntimeWarning) as caught:
        better = compiled(steps=3, callbacks=[broken])
    assert [str(each.message) for each in caught] == [
        "The callback test_a_callback_that_raises_is_warned_of_once_and_ends_nothing.<locals>.broken raised "
        "LookupError: no such dashboard (at SearchStarted). It is not called again in this run; the search goes on."
    ]
    assert [type(event) for event in heard] == [SearchStarted]
    assert found(better) == found(compiled(steps=3))


def test_what_is_not_called_with_events_is_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        optimizer(callbacks=[BaseCallback()])
    assert str(caught.value).startswith("callbacks=[<dspy.utils.callback.BaseCallback object at ")
    assert str(caught.value).endswith(
        ": give a list of functions that take an event (dspy_greater.run.events). DSPy's own callback objects go to "
        "dspy.configure(callbacks=[...])."
    )
    for wrong in (print, 3, "name", {"a": 1}):
        with pytest.raises(SettingsError, match="callbacks=.*: give a list of functions that take an event"):
            optimizer(callbacks=wrong)
        with pytest.raises(SettingsError, match="listeners=.*: give a list of functions that take an event"):
            gradsum(listeners=wrong)
    assert len(optimizer(callbacks=iter([print])).listeners) == 1


def test_dspys_own_callbacks_and_ours_do_not_meet() -> None:
    heard: list[Any] = []

    class Callback(BaseCallback):
        def on_compile_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
            heard.append(exception)

    with dspy.context(callbacks=[Callback()]):
        compiled(steps=1, callbacks=[heard.append])
    assert [type(each) for each in heard] == [SearchStarted, StepTaken, Validated, type(None)]


# --- stopping ---


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_false_stops_the_search_after_that_step_and_the_best_so_far_is_returned(variant: Any) -> None:
    whole = compiled(steps=5, variant=variant)
    better = compiled(steps=5, variant=variant, callbacks=[stopping(StepTaken, 1)])
    details = better.detailed_results
    assert bits(details.steps) == bits(whole.detailed_results.steps[:2])
    assert details.stopped_by == "callback"
    assert not details.interrupted and details.out_of_budget is None
    assert better.score == details.score >= details.seed_score
    assert set(details.predictors[0].validation) >= {SEED, instruction_of(better)}


@pytest.mark.parametrize("answer", [None, True, 0, 0.0, "", (), numpy.False_, "stop"])
def test_nothing_but_false_stops_a_search(answer: object) -> None:
    listeners = Listeners([lambda event: answer])
    listeners.emit(Warned("x"))
    assert not listeners.stopped
    listeners = Listeners([lambda event: answer, lambda event: False, lambda event: answer])
    listeners.emit(Warned("x"), replayed=True)
    assert not listeners.stopped
    listeners.emit(Warned("x"))
    assert listeners.stopped


def test_every_callback_hears_the_event_at_which_one_stops() -> None:
    heard: list[Any] = []
    compiled(steps=5, callbacks=[stopping(StepTaken), heard.append])
    assert [type(event) for event in heard] == [SearchStarted, StepTaken, Validated]


def test_false_at_the_start_takes_no_step_and_returns_the_seed() -> None:
    better = compiled(steps=5, callbacks=[stopping(SearchStarted)])
    details = better.detailed_results
    assert (details.steps, details.stopped_by, instruction_of(better)) == ((), "callback", SEED)


@pytest.mark.slow
@pytest.mark.parametrize("callback", [stopping(StepTaken, 2), stopping(Validated)])
def test_false_where_nothing_is_left_to_do_stops_nothing(callback: Any) -> None:
    better = compiled(steps=3, callbacks=[callback])
    assert better.detailed_results.stopped_by is None
    assert found(better) == found(compiled(steps=3))


@pytest.mark.slow
def test_a_search_that_a_callback_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = compiled(steps=4)
    stopped = compiled(steps=4, log_dir=tmp_path, callbacks=[stopping(StepTaken, 1)])
    assert len(stopped.detailed_results.steps) == 2
    heard: list[Any] = []
    resumed = compiled(steps=4, log_dir=tmp_path, callbacks=[heard.append])
    assert found(resumed) == found(whole)
    assert resumed.detailed_results.stopped_by is None
    assert [event.step for event in heard if isinstance(event, StepTaken)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_callback_that_stops_at_the_same_step_again_does_not_stop_what_is_replayed(tmp_path: Path) -> None:
    def every_other(event: Any) -> bool | None:
        return False if isinstance(event, SearchStarted) or getattr(event, "step", 0) % 2 == 1 else None

    taken = [len(compiled(steps=4, log_dir=tmp_path, callbacks=[every_other]).detailed_results.steps) for _ in range(4)]
    assert taken == [0, 2, 4, 4]
    assert found(compiled(steps=4, log_dir=tmp_path, callbacks=[every_other])) == found(compiled(steps=4))


def two_predictors(**options: Any) -> Any:
    program = Checked(checked_engine(planted_engine().model))
    return optimizer(steps=2, **options).compile(program, checked_rows([*TRAIN, *VALIDATION]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "steps"), [(stopping(StepTaken, 0), 1), (stopping(StepTaken, 1), 2), (stopping(Validated), 2)]
)
def test_a_stop_in_the_first_predictor_leaves_the_second_as_it_was(callback: Any, steps: int, tmp_path: Path) -> None:
    better = two_predictors(callbacks=[callback], log_dir=tmp_path)
    details = better.detailed_results
    assert [each.name for each in details.predictors] == ["first.predict"]
    assert (len(details.steps), details.stopped_by) == (steps, "callback")
    assert better.second.predict.signature.instructions == SEED
    resumed, whole = two_predictors(log_dir=tmp_path), two_predictors()
    for part in ("steps", "score"):
        assert bits(getattr(resumed.detailed_results, part)) == bits(getattr(whole.detailed_results, part))
    assert [each.instruction for each in resumed.detailed_results.predictors] == [
        each.instruction for each in whole.detailed_results.predictors
    ]


# --- what ended it ---


def interrupting(kind: type) -> Any:
    def listener(event: Any) -> None:
        if isinstance(event, kind):
            raise KeyboardInterrupt

    return listener


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, None),
        ({"callbacks": [stopping(StepTaken)]}, "callback"),
        ({"callbacks": [interrupting(StepTaken)]}, "interrupt"),
        ({"callbacks": [interrupting(StepTaken), stopping(StepTaken)]}, "interrupt"),
        ({"max_generated_tokens": 1}, "budget"),
        ({"max_generated_tokens": 1, "callbacks": [stopping(SearchStarted)]}, "callback"),
    ],
)
def test_a_result_says_what_ended_the_search(settings: Any, told: str | None) -> None:
    details = compiled(steps=3, **settings).detailed_results
    assert details.stopped_by == told
    assert details.interrupted == (told == "interrupt")
    assert (details.out_of_budget is not None) == (told == "budget")


# --- GRAD-SUM ---


def summed(**settings: Any) -> Any:
    return gradsum(**settings).compile(program(), ROWS[:6], valset=ROWS[8:12])


def told_of(better: Any) -> Any:
    details = better.detailed_results
    return bits((details.iterations, details.finalists, details.validation, details.winner))


@pytest.mark.slow
def test_grad_sum_is_stopped_by_a_callback_and_goes_on_where_it_was(tmp_path: Path) -> None:
    heard: list[Any] = []
    better = summed(iterations=3, log_dir=tmp_path, callbacks=[stopping(IterationTaken, 0), heard.append])
    details = better.detailed_results
    assert (len(details.iterations), details.stopped_by, details.interrupted) == (1, "callback", False)
    assert better.score >= details.seed_score
    assert heard[0] == BeamStarted({"predict": details.seed_prompts["predict"]}, 3)
    resumed = summed(iterations=3, log_dir=tmp_path, callbacks=[stopping(IterationTaken, 0)])
    assert told_of(resumed) == told_of(summed(iterations=3))
    assert resumed.detailed_results.stopped_by is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"iterations": 1}, None),
        ({"iterations": 1, "callbacks": [stopping(IterationTaken)]}, None),
        ({"iterations": 3, "callbacks": [stopping(BeamStarted)]}, "callback"),
        ({"iterations": 3, "callbacks": [interrupting(IterationTaken)]}, "interrupt"),
        ({"iterations": 20, "max_lm_calls": 60}, "budget"),
    ],
)
def test_a_result_of_grad_sum_says_what_ended_it(settings: Any, told: str | None) -> None:
    details = summed(**settings).detailed_results
    assert details.stopped_by == told
    assert details.interrupted == (told == "interrupt")
    assert (details.out_of_budget is not None) == (told == "budget")


def test_a_search_after_a_warm_start_says_what_ended_it_too() -> None:
    first = dspy.LabeledFewShot(k=0)
    better = compiled(steps=3, warm_start=first, callbacks=[stopping(StepTaken)], metric=exact_match)
    assert better.detailed_results.warm_start is not None
    assert (len(better.detailed_results.steps), better.detailed_results.stopped_by) == (1, "callback")
