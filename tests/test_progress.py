"""What a user sees of a running search, and that no callback of theirs can end it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_greater.objective.types import Candidate, Evaluation
from dspy_greater.run import best as best_file
from dspy_greater.run.best import BestFile
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
from dspy_greater.run.files import replace_text
from dspy_greater.run.outlook import Plan
from dspy_greater.run.progress import Listeners, ProgressBar, in_notebook


def evaluation(score: float, loss: float = 0.25) -> Evaluation:
    return Evaluation((1, 2), f"{score}", (), score, loss, 1.0, (1 - score, loss))


def step(number: int, chosen: float, *tried: float, predictor: str = "predict") -> StepTaken:
    candidates = tuple(Candidate(3, "x", -1.0, 0.5, evaluation(score, 0.125)) for score in tried)
    untried = Candidate(4, "y", -2.0, 0.75, None)
    return StepTaken(predictor, number, 7, 1, (*candidates, untried), evaluation(chosen), "better", {})


STARTED = SearchStarted("predict", evaluation(0.5), 4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(*happened: Event, file: io.StringIO | None = None, show: bool | None = True) -> list[str]:
    """What the bar drew, redraw by redraw."""
    file = file or io.StringIO()
    with ProgressBar(show, file) as bar:
        for event in happened:
            bar(event)
    return file.getvalue().replace("\n", "\r").split("\r")


def test_a_search_starts_with_the_seeds_score() -> None:
    shown = drawn(STARTED)
    assert any("predict:   0%" in each and "0/4" in each and "best=0.5, loss=0.25" in each for each in shown)


def test_each_step_shows_position_best_score_and_loss() -> None:
    text = "\n".join(drawn(STARTED, step(0, 0.5, 0.25), step(1, 0.625, 0.75)))
    assert "1/4" in text and "position=7, best=0.5, loss=0.25" in text
    assert "50%" in text and "2/4" in text and "position=7, best=0.75, loss=0.125" in text


def test_a_worse_step_does_not_hide_the_best_one() -> None:
    assert "best=0.75, loss=0.25" in drawn(STARTED, step(0, 0.75), step(1, 0.25))[-2]


def test_the_validation_ends_the_bar_with_both_scores() -> None:
    shown = drawn(STARTED, step(0, 0.5), Validated("predict", {"seed": 0.4, "new": 0.6}, "new"), Warned("x"))
    assert "validation=0.6, seed=0.4" in shown[-2]


def test_every_predictor_has_a_bar_of_its_own() -> None:
    text = "\n".join(drawn(STARTED, step(0, 0.5), SearchStarted("second", evaluation(0.25), 9)))
    assert "predict:  25%" in text
    assert "second:   0%" in text and "0/9" in text and "best=0.25" in text


def test_a_resumed_search_goes_on_at_its_step() -> None:
    text = "\n".join(drawn(STARTED, step(2, 0.5)))
    assert "3/4" in text
    without_a_start = "\n".join(drawn(step(2, 0.5)))
    assert "predict: 3step" in without_a_start and "best=0.5" in without_a_start


def test_a_bar_is_drawn_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(show=True) as bar:
        bar(STARTED)
    captured = capsys.readouterr()
    assert "best=0.5" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("show", "file", "visible"),
    [
        (True, io.StringIO, True),
        (True, Terminal, True),
        (None, io.StringIO, False),
        (None, Terminal, True),
        (False, io.StringIO, False),
        (False, Terminal, False),
    ],
)
def test_by_default_a_bar_is_drawn_only_on_a_terminal(
    show: bool | None, file: Callable[[], io.StringIO], visible: bool
) -> None:
    out = file()
    drawn(STARTED, step(0, 0.5), Validated("predict", {"seed": 0.5}, "seed"), file=out, show=show)
    assert bool(out.getvalue()) is visible


def test_a_closed_bar_ends_its_line_and_closes_again() -> None:
    out = io.StringIO()
    bar = ProgressBar(True, out)
    bar.close()
    bar(STARTED)
    bar.close()
    assert out.getvalue().endswith("\n")
    length = len(out.getvalue())
    bar.close()
    bar(Validated("predict", {"seed": 0.5}, "seed"))
    assert len(out.getvalue()) == length


def test_each_step_shows_its_edit_the_speed_and_the_time_left() -> None:
    taken = replace(step(0, 0.5), spent={"generated_tokens": 300}, seconds=2.0, current_text=" hard")
    new = Candidate(3, " twice as carefully as ever before", -1.0, 0.5, evaluation(0.75))
    text = drawn(STARTED, replace(taken, candidates=(new,), chosen=new.evaluation or taken.chosen))[-2]
    assert "' hard' -> ' twice as carefully as e...', 150 tokens/s, 00:06 left]" in text
    assert "' hard' kept, 150 tokens/s, 00:06 left" in drawn(STARTED, taken)[-2]


def test_the_time_left_is_that_of_the_whole_run() -> None:
    plan = Plan(("predict", "second"), validation_runs=0)
    out = io.StringIO()
    with ProgressBar(True, out, plan) as bar:
        bar(STARTED)
        bar(replace(step(0, 0.5), seconds=600.0))
    assert "1:10:00 left" in out.getvalue()  # three steps of this predictor, four of the next


@pytest.mark.parametrize(("show", "visible"), [(None, True), (True, True), (False, False)])
def test_a_notebook_shows_a_bar_though_it_is_no_terminal(
    show: bool | None, visible: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    with ProgressBar(show) as bar:
        bar(STARTED)
        bar(step(0, 0.5))
    captured = capsys.readouterr()
    assert ("1/4" in captured.err + captured.out) is visible


def test_a_shell_of_ipython_is_a_terminal_and_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(config={"TerminalIPythonApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert not in_notebook()


# --- listeners ---


def emit_all(listeners: Listeners, *happened: Event) -> None:
    for event in happened:
        listeners.emit(event)


def test_every_listener_hears_every_event_in_order() -> None:
    heard: list[tuple[str, Event]] = []
    listeners = Listeners([lambda event: heard.append(("first", event)), lambda event: heard.append(("second", event))])
    listeners.emit(STARTED)
    listeners(Warned("x"))
    assert heard == [
        ("first", STARTED), ("second", STARTED), ("first", Warned("x")), ("second", Warned("x")),
    ]  # fmt: skip


def test_a_listener_that_raises_is_reported_once_and_dropped() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise LookupError("no such dashboard")

    listeners = Listeners([broken, heard.append])
    with pytest.warns(RuntimeWarning) as caught:
        emit_all(listeners, STARTED, Warned("x"), Warned("y"))
    assert heard == [STARTED, STARTED, Warned("x"), Warned("y")]
    assert [str(each.message) for each in caught] == [
        "The callback test_a_listener_that_raises_is_reported_once_and_dropped.<locals>.broken raised LookupError: "
        "no such dashboard (at SearchStarted). It is not called again in this run; the search goes on."
    ]


def test_a_listener_that_is_an_object_is_named_by_its_class() -> None:
    class Dashboard:
        def __call__(self, event: Event) -> None:
            raise ValueError

    with pytest.warns(RuntimeWarning, match="The callback .*Dashboard raised ValueError"):
        Listeners([Dashboard()]).emit(STARTED)


def test_ctrl_c_in_a_listener_waits_until_all_have_heard_and_a_second_one_does_not() -> None:
    heard: list[Event] = []

    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt("SIGTERM")

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        Listeners([interrupted, heard.append]).emit(STARTED)
    assert heard == [STARTED]
    with pytest.raises(KeyboardInterrupt):
        Listeners([interrupted, interrupted, heard.append]).emit(STARTED)
    assert heard == [STARTED]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_between_the_files_of_the_best_leaves_them_of_one_state(tmp_path: Path, times: int) -> None:
    left = [0]

    def program(instructions: Mapping[str, str]) -> str:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        return json.dumps(dict(instructions))

    def on_disk() -> list[Any]:
        told = json.loads((tmp_path / "best.json").read_text())["instructions"]
        return [told, json.loads((tmp_path / "best_program.json").read_text())]

    best = BestFile(tmp_path, program)
    best(STARTED)
    assert on_disk() == [{STARTED.predictor: STARTED.seed.instruction}] * 2
    left[0] = times
    with pytest.raises(KeyboardInterrupt):
        best(Validated(STARTED.predictor, {"Look twice.": 1.0}, "Look twice."))
    assert on_disk()[0] == {STARTED.predictor: "Look twice."}
    assert (on_disk()[0] == on_disk()[1]) == (times == 1)  # a second one is obeyed at once


@pytest.mark.parametrize("refused", ["best.json", "best_program.json"])
def test_a_best_that_could_not_be_written_is_warned_of_once_and_written_at_the_next_event(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [True]

    def elsewhere(path: Path, text: str) -> None:
        if held[0] and path.name == refused:
            raise PermissionError(13, "open elsewhere")
        replace_text(path, text)

    def on_disk() -> list[Any]:
        return [json.loads((tmp_path / name).read_text()) for name in ("best.json", "best_program.json")]

    monkeypatch.setattr(best_file, "replace_text", elsewhere)
    validated = Validated(STARTED.predictor, {"Look twice.": 1.0}, "Look twice.")
    found = {"instructions": {STARTED.predictor: "Look twice."}, "predictor": STARTED.predictor}
    with BestFile(tmp_path, lambda instructions: json.dumps(dict(instructions))) as best:
        text = rf"{refused} could not be written: PermissionError: .*It is tried again as the run goes on"
        with pytest.warns(RuntimeWarning, match=text):
            best(STARTED)
        best(validated)  # and this is not told again
        held[0] = False
        best(Warned("whatever comes next"))
        assert on_disk() == [{**found, "validation_score": 1.0}, found["instructions"]]
        held[0] = True
        best(replace(validated, winner="Look thrice.", scores={"Look thrice.": 1.0}))
        held[0] = False
    assert on_disk()[1] == on_disk()[0]["instructions"] == {STARTED.predictor: "Look thrice."}  # written at the end


def test_ctrl_c_passes_through_a_listener() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    listeners = Listeners([interrupted])
    for _ in range(2):  # it is not the listener's fault
        with pytest.raises(KeyboardInterrupt):
            listeners.emit(STARTED)


def test_grad_sum_shows_iterations_best_score_and_calls() -> None:
    compared = tuple(PromptsScored({"predict": text}, (), (score,)) for text, score in (("a", 0.5), ("b", 0.75)))
    member = MemberEdited({"predict": "a"}, (), (), {}, ({"predict": "b"},))
    spent = {"generation": {"calls": 8}, "evaluation": {"calls": 4}}
    iteration = IterationTaken(0, (0, 1), (0,), (member,), compared, ({"predict": "b"},), spent)
    validated = BeamValidated(({"predict": "a"}, {"predict": "b"}), ((0.25,), (0.5,)), 1)
    text = "\n".join(drawn(BeamStarted({"predict": "a"}, 4), iteration, validated))
    assert "GRAD-SUM:  25%" in text and "1/4" in text
    assert "best=0.75, candidates=1, LM calls=12" in text
    assert "validation=0.5, seed=0.25" in text
