"""A search can be ended from outside, by a signal, a file or the clock, and returns the best so far."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from any_event import bits
from scripted_engine import (
    RUN_FILES,
    SEED,
    Checked,
    ScriptedEngine,
    chat_answer,
    checked_engine,
    checked_rows,
    exact_match,
    instruction_of,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
)
from scripted_gradsum import ROWS
from scripted_gradsum import optimizer as gradsum
from scripted_gradsum import program as summed_program

from dspy_greater import local_lm
from dspy_greater.errors import SettingsError
from dspy_greater.run.events import BeamStarted, IterationTaken, SearchStarted, StepTaken, Validated
from dspy_greater.run.serialise import from_json, to_json
from dspy_greater.run.stop import StopFile, terminable

TRAIN, VALIDATION = planted_rows(24)[:4], planted_rows(24)[8:12]
ROOT = Path(__file__).resolve().parent.parent
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself this signal")


def compiled(**settings: Any) -> Any:
    return optimizer(**{"steps": 3, **settings}).compile(program_on(planted_engine()), TRAIN, valset=VALIDATION)


def two_predictors(**options: Any) -> Any:
    program = Checked(checked_engine(planted_engine().model))
    return optimizer(steps=2, **options).compile(program, checked_rows([*TRAIN, *VALIDATION]))


def summed(**settings: Any) -> Any:
    return gradsum(**settings).compile(summed_program(), ROWS[:6], valset=ROWS[8:12])


def at(kind: Any, number: int, do: Any) -> Any:
    """A callback that does something at the event of this kind, and of this step or iteration."""

    def callback(event: Any) -> None:
        if isinstance(event, kind) and getattr(event, "step", getattr(event, "iteration", number)) == number:
            do()

    return callback


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def found(better: Any) -> Any:
    """All that a search decided, to the bit."""
    details = better.detailed_results
    parts = [(each.steps, each.finalists, each.validation, each.instruction) for each in details.predictors]
    return bits(tuple(parts)), better.score


# --- SIGTERM ---


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@on_posix
@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_sigterm_returns_the_best_so_far_which_is_on_disk_and_the_run_goes_on_from_there(
    tmp_path: Path, variant: Any
) -> None:
    settings = {"steps": 5, "variant": variant}
    better = compiled(**settings, log_dir=tmp_path, callbacks=[at(StepTaken, 1, terminate)])
    details = better.detailed_results
    assert (details.stopped_by, details.interrupted, len(details.steps)) == ("SIGTERM", True, 2)
    assert better.score == details.score > details.seed_score
    assert "stopped by SIGTERM" in str(details)
    saved = json.loads((tmp_path / "best_program.json").read_text())
    assert saved["predict"]["signature"]["instructions"] == instruction_of(better)
    assert found(compiled(**settings, log_dir=tmp_path)) == found(compiled(**settings))


@on_posix
@pytest.mark.usefixtures("handler")
def test_a_second_sigterm_raises_at_once() -> None:
    def again(event: Any) -> None:
        if isinstance(event, (StepTaken, Validated)):
            terminate()

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        compiled(callbacks=[again])


@on_posix
@pytest.mark.usefixtures("handler")
def test_sigterm_before_anything_was_found_raises() -> None:
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        compiled(callbacks=[at(SearchStarted, 0, terminate)])


@on_posix
@pytest.mark.usefixtures("handler")
def test_sigterm_in_the_validation_keeps_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy_greater.search.predictor_search.validation_scores", lambda *a, **b: terminate())
    better = compiled()
    assert (better.detailed_results.stopped_by, instruction_of(better)) == ("SIGTERM", SEED)


@on_posix
@pytest.mark.usefixtures("handler")
def test_sigterm_ends_grad_sum_too() -> None:
    details = summed(callbacks=[at(IterationTaken, 0, terminate)]).detailed_results
    assert (details.stopped_by, details.interrupted, len(details.iterations)) == ("SIGTERM", True, 1)


@on_posix
@pytest.mark.usefixtures("handler")
def test_sigterm_in_a_first_optimizer_returns_what_that_one_found() -> None:
    first = optimizer(steps=3, callbacks=[at(StepTaken, 1, terminate)])
    better = compiled(warm_start=first, metric=exact_match)
    assert (better.detailed_results.stopped_by, len(better.detailed_results.steps)) == ("SIGTERM", 2)


@pytest.mark.slow
@on_posix
@pytest.mark.usefixtures("handler")
def test_the_callers_handler_is_back_after_every_end() -> None:
    def mine(number: int, frame: Any) -> None:
        """Does nothing."""

    def broken() -> None:
        raise KeyboardInterrupt

    for before in (signal.SIG_DFL, signal.SIG_IGN, mine):
        signal.signal(signal.SIGTERM, before)
        compiled(steps=1)
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(KeyboardInterrupt):
            compiled(steps=1, callbacks=[at(SearchStarted, 0, broken)])
        assert signal.getsignal(signal.SIGTERM) == before


@on_posix
@pytest.mark.usefixtures("handler")
def test_a_handler_of_the_callers_is_called_first_and_what_it_raises_ends_the_search() -> None:
    called: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    details = compiled(callbacks=[at(StepTaken, 0, terminate)]).detailed_results
    assert (called, details.stopped_by) == ([signal.SIGTERM], "SIGTERM")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
    with pytest.raises(SystemExit):
        compiled(callbacks=[at(StepTaken, 0, terminate)])


@on_posix
@pytest.mark.usefixtures("handler")
def test_who_ignores_sigterm_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    details = compiled(callbacks=[at(StepTaken, 0, terminate)]).detailed_results
    assert (details.stopped_by, len(details.steps)) == (None, 3)


@pytest.mark.usefixtures("handler")
def test_a_handler_that_is_put_in_during_the_search_stays() -> None:
    def later(number: int, frame: Any) -> None:
        """Does nothing."""

    with terminable():
        signal.signal(signal.SIGTERM, later)
    assert signal.getsignal(signal.SIGTERM) is later


@pytest.mark.usefixtures("handler")
def test_a_search_in_another_thread_leaves_signals_alone() -> None:
    seen: list[Any] = []
    done: list[Any] = []

    def work() -> None:
        done.append(compiled(steps=1, callbacks=[lambda event: seen.append(signal.getsignal(signal.SIGTERM))]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert set(seen) == {signal.SIG_DFL} and done[0].detailed_results.stopped_by is None


# --- a file named STOP ---


@pytest.mark.slow
def test_a_stop_file_ends_the_search_after_the_step_that_it_is_in_and_is_removed(tmp_path: Path) -> None:
    stop = tmp_path / "STOP"
    better = compiled(steps=5, log_dir=tmp_path, callbacks=[at(StepTaken, 1, stop.touch)])
    details = better.detailed_results
    assert (details.stopped_by, details.interrupted, len(details.steps)) == ("STOP file", False, 2)
    assert better.score >= details.seed_score and not stop.exists()
    assert json.loads((tmp_path / "best.json").read_text())["instructions"]["predict"] == instruction_of(better)
    assert found(compiled(steps=5, log_dir=tmp_path)) == found(compiled(steps=5))


@pytest.mark.slow
def test_a_stop_file_that_was_there_before_takes_no_step_says_so_and_is_removed(tmp_path: Path) -> None:
    compiled(steps=4, log_dir=tmp_path, callbacks=[lambda e: False if getattr(e, "step", 0) == 1 else None])
    (tmp_path / "STOP").write_text("not read")
    text = r"STOP was there before the run began, so no step was taken. It is removed: compile again to go on."
    with pytest.warns(RuntimeWarning, match=text):
        details = compiled(steps=4, log_dir=tmp_path).detailed_results
    assert (details.stopped_by, len(details.steps)) == ("STOP file", 2)  # what is recorded counts
    assert found(compiled(steps=4, log_dir=tmp_path)) == found(compiled(steps=4))


@pytest.mark.parametrize("kind", [compiled, summed])
def test_a_stop_file_in_a_run_that_an_error_ends_does_not_stop_the_next_one(tmp_path: Path, kind: Any) -> None:
    def stopped_and_broken() -> None:
        (tmp_path / "STOP").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kind(log_dir=tmp_path, callbacks=[at((SearchStarted, BeamStarted), 0, stopped_and_broken)])
    assert not (tmp_path / "STOP").exists()


def test_whoever_finds_the_directory_in_use_leaves_the_stop_file_to_the_run_that_uses_it(tmp_path: Path) -> None:
    from dspy_greater.errors import RunDirectoryError
    from dspy_greater.run.journal import Journal

    with Journal.open(tmp_path, {}):
        (tmp_path / "STOP").touch()
        with pytest.raises(RunDirectoryError):
            compiled(log_dir=tmp_path)
        assert (tmp_path / "STOP").exists()


def test_a_stop_file_where_nothing_is_left_to_stop_is_only_removed(tmp_path: Path) -> None:
    whole = compiled(log_dir=tmp_path, callbacks=[at(Validated, 0, (tmp_path / "STOP").touch)])
    assert whole.detailed_results.stopped_by is None and not (tmp_path / "STOP").exists()
    (tmp_path / "STOP").touch()
    again = compiled(log_dir=tmp_path)
    assert again.detailed_results.stopped_by is None and found(again) == found(whole)
    assert not (tmp_path / "STOP").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StepTaken, Validated])
def test_a_stop_file_in_the_first_predictor_leaves_the_second_as_it_was(tmp_path: Path, kind: type) -> None:
    better = two_predictors(log_dir=tmp_path, callbacks=[at(kind, 1, (tmp_path / "STOP").touch)])
    details = better.detailed_results
    assert ([each.name for each in details.predictors], details.stopped_by) == (["first.predict"], "STOP file")
    assert found(two_predictors(log_dir=tmp_path)) == found(two_predictors())


@pytest.mark.slow
def test_what_a_later_predictor_has_recorded_is_not_given_up_for_a_stop_file(tmp_path: Path) -> None:
    def callback(event: Any) -> Any:
        return False if isinstance(event, StepTaken) and event.predictor == "second.predict" else None

    first = two_predictors(log_dir=tmp_path, callbacks=[callback])
    assert len(first.detailed_results.steps) == 3
    (tmp_path / "STOP").touch()
    with pytest.warns(RuntimeWarning, match="STOP was there before"):
        again = two_predictors(log_dir=tmp_path)
    assert found(again) == found(first) and again.detailed_results.stopped_by == "STOP file"
    late = two_predictors(log_dir=tmp_path, max_seconds=1e-9)
    assert found(late) == found(first) and late.detailed_results.stopped_by == "budget"
    assert found(two_predictors(log_dir=tmp_path)) == found(two_predictors())


def test_a_stop_file_ends_grad_sum_too(tmp_path: Path) -> None:
    stop = tmp_path / "STOP"
    details = summed(log_dir=tmp_path, callbacks=[at(IterationTaken, 0, stop.touch)]).detailed_results
    assert (details.stopped_by, len(details.iterations), stop.exists()) == ("STOP file", 1, False)
    stop.touch()
    with pytest.warns(RuntimeWarning, match="STOP was there before"):
        again = summed(log_dir=tmp_path).detailed_results
    assert again.iterations == details.iterations
    fresh = tmp_path / "fresh"
    better = summed(log_dir=fresh, callbacks=[at(BeamStarted, 0, (fresh / "STOP").touch)])
    assert better.detailed_results.iterations == () and better.detailed_results.stopped_by == "STOP file"


def test_a_stop_file_of_any_kind_is_neither_read_nor_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (tmp_path / "run").mkdir()
    for make in (lambda at: at.symlink_to(elsewhere), lambda at: at.symlink_to(tmp_path / "nowhere")):
        make(tmp_path / "run" / "STOP")
        stop = StopFile(tmp_path / "run")
        assert stop.seen()
        with pytest.warns(RuntimeWarning, match="It is removed"):
            stop.obeyed(ended=True)
        assert not os.path.lexists(tmp_path / "run" / "STOP")
    (tmp_path / "run" / "STOP").mkdir()  # a folder is no file that we remove
    stop = StopFile(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="It could not be removed: remove it to go on"):
        stop.obeyed(ended=stop.seen())
    assert elsewhere.read_text() == "kept" and (tmp_path / "run" / "STOP").is_dir()


# --- the clock ---


class Clock:
    """`time.monotonic` that goes on by so many seconds at every look."""

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "steps"), [(0.5, 0), (1.0, 0), (1.5, 1), (3.0, 2), (100, 5)])
def test_the_step_that_reaches_max_seconds_is_the_last(
    limit: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("dspy_greater.search.loop.time", "dspy_greater.search.predictor_search.time"):
        monkeypatch.setattr(module, Clock())  # the seed takes a second, and so does every step
    better = compiled(steps=5, max_seconds=limit)
    details = better.detailed_results
    assert len(details.steps) == steps and {step.seconds for step in details.steps} <= {1.0}
    assert details.stopped_by == (None if steps == 5 else "budget")
    assert better.score >= details.seed_score
    if steps == 2:
        assert details.out_of_budget == (
            "max_seconds=3 was reached with 3.0 seconds, after step 2 of 5 of predictor `predict`."
        )


@pytest.mark.slow
def test_a_resumed_run_counts_the_seconds_that_were_recorded_and_more_of_them_let_it_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("dspy_greater.search.loop.time", "dspy_greater.search.predictor_search.time"):
        monkeypatch.setattr(module, Clock())
    assert len(compiled(steps=5, max_seconds=3, log_dir=tmp_path).detailed_results.steps) == 2
    assert len(compiled(steps=5, max_seconds=3, log_dir=tmp_path).detailed_results.steps) == 2
    assert len(compiled(steps=5, max_seconds=2, log_dir=tmp_path).detailed_results.steps) == 2  # none is given up
    assert len(compiled(steps=5, max_seconds=4, log_dir=tmp_path).detailed_results.steps) == 3
    assert found(compiled(steps=5, log_dir=tmp_path)) == found(compiled(steps=5))


@pytest.mark.slow
def test_the_first_predictors_validation_counts_for_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dspy_greater.search.loop.time", "dspy_greater.search.predictor_search.time"):
        monkeypatch.setattr(module, Clock())
    details = two_predictors(max_seconds=4).detailed_results  # a seed, two steps and a validation
    assert [each.name for each in details.predictors] == ["first.predict"]
    assert (details.out_of_budget or "").endswith("Not searched, and left as they were: second.predict.")
    assert len(two_predictors(max_seconds=4.5).detailed_results.predictors) == 2


def test_grad_sum_begins_no_iteration_after_max_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy_greater.gradsum.loop.time", Clock())
    details = summed(iterations=4, max_seconds=2, log_dir=tmp_path).detailed_results
    assert (len(details.iterations), details.stopped_by) == (2, "budget")
    assert details.out_of_budget == "max_seconds=2 was reached with 2.0 seconds."
    assert len(summed(iterations=4, max_seconds=3, log_dir=tmp_path).detailed_results.iterations) == 3
    assert len(summed(iterations=4, log_dir=tmp_path).detailed_results.iterations) == 4


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1h", True])
def test_max_seconds_has_to_be_a_positive_number(value: Any) -> None:
    for build in (optimizer, gradsum):
        with pytest.raises(SettingsError, match="max_seconds=.*: give a positive number of seconds, or None"):
            build(max_seconds=value)


def test_seconds_are_recorded_and_no_part_of_what_was_decided() -> None:
    heard: list[Any] = []
    compiled(steps=2, callbacks=[heard.append])
    assert all(event.seconds > 0 for event in heard)
    for event in heard:
        data: Any = to_json(event)
        again: Any = from_json(json.loads(json.dumps(data)))
        assert again.seconds == event.seconds
        del data["seconds"]  # as an older version wrote it
        older: Any = from_json(data)
        assert older.seconds == 0.0 and bits(older) == bits(event)


# --- on disk ---


def test_the_program_on_disk_is_the_one_that_is_returned_and_dspy_loads_it(tmp_path: Path) -> None:
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", SEED))
    with dspy.context(lm=local_lm(planted_engine(), cache=False, max_tokens=64)):
        better = optimizer(log_dir=tmp_path).compile(program, TRAIN, valset=VALIDATION)
    loaded = dspy.ChainOfThought("question -> answer")
    loaded.load(tmp_path / "best_program.json")
    assert instruction_of(loaded) == instruction_of(better) != SEED
    assert sorted(each.name for each in tmp_path.iterdir()) == RUN_FILES


def test_where_the_student_is_as_good_as_both_optimizers_it_is_what_lies_on_disk(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: chat_answer(reasoning="I look.", answer="yes"), model=planted_engine().model)
    first = dspy.LabeledFewShot(k=0)
    better = optimizer(warm_start=first, log_dir=tmp_path).compile(program_on(engine), TRAIN, valset=VALIDATION)
    assert better.detailed_results.warm_start.undone
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"instructions": {"predict": SEED}, "validation_score": better.score}
    saved = json.loads((tmp_path / "best_program.json").read_text())
    assert saved["predict"]["signature"]["instructions"] == SEED


def test_a_program_that_cannot_be_saved_is_told_of_once_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = program_on(planted_engine())
    program.predict.demos = [dspy.Example(question=object(), reasoning="r", answer="yes")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        better = optimizer(log_dir=tmp_path).compile(program, TRAIN, valset=VALIDATION)
    told = [each for each in caplog.records if "cannot be saved as JSON" in each.getMessage()]
    assert len(told) == 1 and "best.json holds its instructions." in told[0].getMessage()
    assert json.loads((tmp_path / "best.json").read_text())["instructions"]["predict"] == instruction_of(better)


# --- kills ---


@pytest.mark.slow
@on_posix
def test_searches_that_are_killed_at_random_moments_go_on_to_the_same_bits() -> None:
    """A few; `python -m tests.kills` kills more of them, and of more kinds."""
    searches = ["--searches", "planted_default", "planted_paper", "two_predictors"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", "6", "--terms", "3", "--seed", "1", *searches],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ran.returncode == 0 and " 0 faults," in ran.stdout, ran.stdout + ran.stderr
