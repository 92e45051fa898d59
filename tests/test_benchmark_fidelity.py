"""The fidelity benchmark: end to end on a tiny plan, resumed, and its statistics by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import dspy
import pytest

from benchmarks.fidelity import command
from benchmarks.fidelity.command import INSTRUCTIONS, MIDWAY, main
from benchmarks.fidelity.measure import Measured, Plan, positions
from benchmarks.fidelity.rankings import RANKINGS
from benchmarks.fidelity.table import LINEARISES, correlation, interval, linearisation_table, share_of_best_gain, table
from benchmarks.steps import by_answer_gradient
from benchmarks.tasks.answers import metric_of
from benchmarks.tasks.bbh import normaliser
from dspy_greater import local_lm
from dspy_greater.objective.replay import Replay, advantages
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.search.default_step import by_score_gradient, forecast_off_policy
from dspy_greater.search.paper_step import by_paper_gradient
from dspy_greater.settings import Settings


def measured(predicted: list[float], mistakes: list[float]) -> Measured:
    realised = tuple((change, 0.0) for change in mistakes)
    return Measured("navigate", "Go.", 0, 0, tuple("abcd"), realised, {"one": tuple(predicted)})


def test_correlation_and_share_of_the_best_gain_by_hand() -> None:
    at = measured([0.1, 0.2, 0.3, 0.4], [-0.1, 0.0, 0.1, -0.4])
    assert correlation(at, "one") == pytest.approx(-0.2)
    assert share_of_best_gain(at, "one") == pytest.approx(0.25)  # the best of all comes fourth


def test_where_nothing_could_be_gained_there_is_no_share() -> None:
    assert math.isnan(share_of_best_gain(measured([1.0, 2.0, 3.0, 4.0], [0.0, 0.1, 0.2, 0.3]), "one"))


def test_a_prediction_that_is_not_a_number_comes_last() -> None:
    at = measured([math.nan, 0.2, 0.3, 0.4], [-0.4, 0.0, 0.0, -0.1])
    assert share_of_best_gain(at, "one") == pytest.approx(0.25)


def test_an_interval_holds_its_mean_and_leaves_out_what_is_not_a_number() -> None:
    mean, low, high = interval([0.0, 1.0, 0.5, math.nan])
    assert mean == pytest.approx(0.5)
    assert low <= mean <= high
    assert all(map(math.isnan, interval([])))


def test_the_table_has_a_row_for_every_ranking_best_first() -> None:
    at = measured([0.1, 0.2, 0.3, 0.4], [-0.4, -0.1, 0.1, 0.2])
    both = replace(at, predicted={"wrong": (4.0, 3.0, 2.0, 1.0), "right": (1.0, 2.0, 3.0, 4.0)})
    rows = table([both]).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| right", "| wrong"]


def test_a_gradient_is_held_against_the_exact_change_that_it_linearises() -> None:
    exact = {
        "reasoning fixed, exact": (1.0, 2.0, 3.0, 4.0),
        "re-weighted scoring, answers in nats": (4.0, 3.0, 2.0, 1.0),
    }
    gradients = {
        "pathwise, current": (4.0, 3.0, 2.0, 1.0),
        "pathwise, centroid": (0.1, 0.2, 0.3, 0.4),
        "whole, current": (1.0, 2.0, 3.0, 4.0),
        "whole, centroid": (4.0, 3.0, 2.0, 1.0),
    }
    at = replace(measured([], [-0.4, -0.1, 0.1, 0.2]), predicted={**gradients, **exact})
    older = replace(at, predicted=dict(gradients))
    rows = [row.strip("| ").split(" | ") for row in linearisation_table([at, older]).splitlines()[2:]]
    assert {name: float(rho.split()[0]) for name, _, rho, _ in rows} == dict(
        zip(gradients, (-1, 1, -1, 1), strict=True)
    )
    assert {exact: float(came.split()[0]) for _, exact, _, came in rows} == dict(zip(exact, (1, -1), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("instruction", ["Think your reasoning.", "Answer the question."])
def test_the_rankings_are_those_by_which_the_searches_choose(instruction: str) -> None:
    random = Random(1)
    questions = [generate("navigate", random) for _ in range(6)]
    rows = [dspy.Example(question=each, answer=work_out("navigate", each).answer) for each in questions]
    plan = Plan("navigate", instruction, 0, positions=2, candidates=4, settings=Settings())
    seen = 0
    with dspy.context(lm=local_lm("pocket")):
        for at, _ in positions(
            plan, [each.with_inputs("question") for each in rows], metric_of(normaliser("bbh:navigate"))
        ):
            here, texts = at.here, [each.instruction.text for each in at.edits]
            stands = here.current.token_ids[here.state.position]
            replay = Replay(at.own, tuple(advantages(at.own, baseline_scale=here.settings.baseline_scale)))
            forecasts = forecast_off_policy(here, replay)(here, replay, at.edits)
            slopes = by_score_gradient(here, replay, at.edits)
            term = "score" if len({each.mistake for each in at.own}) > 1 else "whole"
            paper = by_paper_gradient(here, here.current, stands, at.tokens).slopes
            answer = by_answer_gradient(here, here.current, stands, at.tokens).slopes
            for name, expected in {
                "re-weighted scoring": [forecasts[text].change for text in texts],
                f"{term}, centroid": [slopes[text] for text in texts],
                "paper (pathwise and fluency, current)": [paper[token] for token in at.tokens],
                "gradient without reasoning": [answer[token] for token in at.tokens],
            }.items():
                assert list(RANKINGS[name](at)) == pytest.approx(expected, rel=1e-3, abs=1e-6), name
            assert paper != answer
            read = here.evaluator.engine.counters
            RANKINGS["re-weighted scoring, optimism 1"](at)
            assert here.evaluator.engine.counters == read, "what one ranking has read, another reads no more"
            seen += 1
    assert seen == 2


@pytest.mark.slow
def test_it_measures_every_ranking_on_the_pocket_model_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = Random(0)
    questions = [generate("navigate", random) for _ in range(12)]
    examples = [{"input": question, "target": work_out("navigate", question).answer} for question in questions]
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "navigate.json").write_text(json.dumps({"examples": examples}))
    command = [
        *("--data-dir", str(tmp_path), "--tasks", "navigate", "--instructions", "Think your reasoning."),
        *("--positions", "2", "--candidates", "4", "--rows", "6", "--out", str(tmp_path / "out")),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in RANKINGS)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["positions"] == 2
    assert summary["rankings"].keys() == RANKINGS.keys()
    before = (tmp_path / "out" / "positions.jsonl").read_text()
    linearised = shown.splitlines()[-len(LINEARISES) :]
    assert [line.strip("| ").split(" | ")[0] for line in linearised] == list(LINEARISES)
    assert not any("nan" in line for line in linearised)
    assert main(command) == 0
    assert capsys.readouterr().out == shown
    assert (tmp_path / "out" / "positions.jsonl").read_text() == before


def test_midway_positions_are_not_taken_for_those_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def measured_at(plan: Plan, *_: Any) -> list[Measured]:
        seen.append((plan.instruction, plan.begun_at))
        at = measured([0.1, 0.2, 0.3, 0.4], [-0.4, -0.1, 0.1, 0.2])
        return [replace(at, task=plan.task, instruction=plan.instruction, begun_at=plan.begun_at)]

    monkeypatch.setattr(command, "measure", measured_at)
    monkeypatch.setattr(command, "_rows", lambda *_: [])
    asked = ["--data-dir", str(tmp_path), "--tasks", "navigate", "--out", str(tmp_path / "out")]
    for more in (["--instructions", *MIDWAY["navigate"]], ["--midway"], ["--midway", "--model-args", "max_tokens=60"]):
        assert main([*asked, *more]) == 0
    assert seen == [(each, None) for each in MIDWAY["navigate"]] + [
        (each, INSTRUCTIONS[0]) for each in MIDWAY["navigate"]
    ]


def test_a_task_without_midway_instructions_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="There are no midway instructions for snarks; there are for boolean_expressions"
    ):
        main(["--data-dir", str(tmp_path), "--tasks", "snarks", "--midway", "--out", str(tmp_path / "out")])


def test_a_directory_without_the_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no .*navigate.json. --data-dir names the directory"):
        main(["--data-dir", str(tmp_path), "--tasks", "navigate", "--out", str(tmp_path / "out")])


def test_rankings_are_chosen_by_pattern_and_a_stranger_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[list[str]] = []
    monkeypatch.setattr(command, "measure", lambda *asked: chosen.append(asked[-1]) or [])
    monkeypatch.setattr(command, "_rows", lambda *_: [])
    asked = ["--data-dir", str(tmp_path), "--tasks", "navigate", "--instructions", "Go.", "--out", str(tmp_path / "x")]
    assert main([*asked, "--rankings", "random", "whole*"]) == 1  # nothing was measured
    assert chosen == [["whole, centroid", "whole, current", "random"]]
    with pytest.raises(SystemExit, match="There is no ranking 'best'. There are: re-weighted scoring; "):
        main([*asked, "--rankings", "best"])
