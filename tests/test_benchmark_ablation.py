"""The ablation's table: means, paired leads of the default, failures that are counted and not hidden."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import optimizer, planted_engine, planted_rows, program_on

from benchmarks.ablation import along, command, reasonings
from benchmarks.ablation.command import main
from benchmarks.ablation.reasonings import Answered, is_right, through_reasoning
from benchmarks.ablation.table import table
from benchmarks.ablation.variants import FROM, STARTS, SWEEPS, VARIANTS
from benchmarks.steps import CHANCE, PAPER_CHANCE, WITHOUT_REASONING
from dspy_greater.objective.types import Candidate
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.run.events import StepTaken
from dspy_greater.search.paper_step import PaperStep
from dspy_greater.search.step import Step
from dspy_greater.settings import Settings


def cell(variant: str, seed: int, accuracy: float, task: str = "navigate") -> dict[str, Any]:
    return {"task": task, "seed": seed, "variant": variant, "accuracy": accuracy, "steps": 10, "budget": 30_000}


def rows_of(cells: list[dict[str, Any]]) -> dict[str, list[str]]:
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in table(cells).splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line for line in lines[2:]}


def test_the_lead_is_taken_over_searches_that_both_have() -> None:
    cells = [cell("whole", 0, 0.9), cell("whole", 1, 0.8), cell("paper", 0, 0.7), cell("paper", 2, 1.0)]
    found = rows_of(cells)
    assert found["paper"][3].startswith("+20.0")
    assert found["whole"][3] == "" and found["whole"][2] == "85.0"


def test_a_variant_that_was_never_run_beside_the_default_has_no_lead() -> None:
    assert rows_of([cell("whole", 0, 0.9), cell("paper", 1, 0.7)])["paper"][3] == "-"


def test_failed_searches_are_counted_and_take_no_part_in_the_mean() -> None:
    broken = {"task": "navigate", "seed": 1, "variant": "whole", "error": "LossError: none"}
    found = rows_of([cell("whole", 0, 0.9), broken])["whole"]
    assert (found[2], found[4], found[-1]) == ("90.0", "1", "1")


def test_every_variant_and_sweep_is_made_of_settings_that_exist() -> None:
    for variant in (*VARIANTS.values(), *SWEEPS.values(), *FROM.values()):
        Settings.of(None, **variant.settings)
        assert variant.about and variant.instruction


def test_another_start_changes_the_instruction_and_nothing_else() -> None:
    assert (FROM["published"].step, FROM["published"].settings) == (VARIANTS["whole"].step, VARIANTS["whole"].settings)
    for name in ("paper", "paper-random", "random"):
        assert FROM[f"published-{name}"].step == VARIANTS[name].step
        assert FROM[f"published-{name}"].settings == VARIANTS[name].settings
        assert FROM[f"published-{name}"].instruction == STARTS["published"] != VARIANTS[name].instruction


def test_without_the_default_the_first_is_what_the_others_are_compared_with() -> None:
    text = table([cell("paper", 0, 0.6), cell("random", 0, 0.8)])
    assert "paper is better by" in text and "-20.0" in text


def test_the_table_is_of_the_cells_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell("whole", 0, 0.9), cell("whole", 1, 0.8), cell("paper", 0, 0.7), cell("whole", 0, 0.5, "web_of_lies")]
    cells.append({**cell("whole", 1, 0.1), "budget": 20_000})
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(each) + "\n" for each in cells))
    asked = ["--tasks", "navigate", "--seeds", "1", "--variants", "whole"]
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path), *asked]) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert line.startswith("| whole | 80.0 (80.0 to 80.0) | 80.0 |")


# ---- the steps that only benchmarks know


def steps_taken(step: Step, seed: int = 0, **settings: Any) -> tuple[StepTaken, ...]:
    searching = optimizer(variant=step, steps=3, seed=seed, explore_every=0, **settings)
    rows = planted_rows(8)
    return searching.compile(program_on(planted_engine()), rows[:4], valset=rows[4:]).detailed_results.steps


def tried(step: StepTaken) -> list[Candidate]:
    return [each for each in step.candidates if each.evaluation is not None and each.realised is not None]


@pytest.mark.slow
@pytest.mark.parametrize("step", [CHANCE, PAPER_CHANCE], ids=lambda step: step.name)
def test_chance_asks_neither_gradient_nor_forecast_and_differs_with_the_seed(step: Step) -> None:
    taken = steps_taken(step)
    for each in taken:
        assert all(candidate.gradient is None and candidate.forecast is None for candidate in each.candidates)
        assert each.spent["backward_tokens"] == 0 and len(each.candidates) > 3
    assert [tried(each) for each in steps_taken(step)] == [tried(each) for each in taken]
    others = [[tried(each) for each in steps_taken(step, seed)] for seed in (1, 2)]
    assert any(other != [tried(each) for each in taken] for other in others)


@pytest.mark.slow
def test_chance_tries_as_many_as_the_step_in_whose_place_it_stands() -> None:
    assert {len(tried(each)) for each in steps_taken(CHANCE)} == {1}
    assert {len(tried(each)) for each in steps_taken(CHANCE, selections=2)} == {2}
    assert {len(tried(each)) for each in steps_taken(PAPER_CHANCE)} <= {2, 3}  # what stands there may be among the 3


@pytest.mark.slow
def test_the_gradient_without_reasoning_ranks_the_same_candidates_by_other_slopes() -> None:
    (answer, *_), (paper, *_) = steps_taken(WITHOUT_REASONING), steps_taken(PaperStep())
    assert [each.token for each in answer.candidates] == [each.token for each in paper.candidates]
    slopes = [[each.gradient for each in step.candidates if each.gradient is not None] for step in (answer, paper)]
    assert len(slopes[0]) == len(slopes[1]) > 3 and slopes[0] != pytest.approx(slopes[1], rel=1e-3)


# ---- along the way


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["whole", "paper", "random", "without-reasoning"])
def test_a_search_along_its_way_is_where_one_with_the_smaller_budget_ends(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_TRAIN", 12)
    monkeypatch.setattr(command, "_VALIDATION", 10)
    monkeypatch.setattr(command, "_TEST", 20)
    (tmp_path / "bbh").mkdir()
    rng = random.Random(0)
    questions = [generate("web_of_lies", rng) for _ in range(42)]
    rows = [{"input": each, "target": work_out("web_of_lies", each).answer} for each in questions]
    (tmp_path / "bbh" / "web_of_lies.json").write_text(json.dumps({"examples": rows}))
    common = ["--data-dir", str(tmp_path), "--tasks", "web_of_lies", "--seeds", "0", "--variants", variant]
    for tokens, more in ((1_200, ["--along", "700"]), (700, [])):
        assert main([*common, "--out", str(tmp_path), "--generated-tokens", str(tokens), *more]) == 0
    long, short = (json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines())
    assert long["along"]["700"] == {key: short[key] for key in ("instruction", "accuracy")}
    assert long["along"]["1200"] == {key: long[key] for key in ("instruction", "accuracy")}
    assert long["steps"] > short["steps"] >= 1


@pytest.mark.parametrize(
    ("along", "message"), [("30000", "give budgets below --generated-tokens 30000"), ("many", "2")]
)
def test_budgets_along_the_way_are_checked_before_anything_is_searched(
    along: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--along", along])
    assert not (tmp_path / "out").exists()


def test_the_table_along_the_way_pairs_searches_on_the_same_rows() -> None:
    def looked_at(variant: str, seed: int, early: float, late: float) -> dict[str, Any]:
        reached = {"1000": {"accuracy": early}, "30000": {"accuracy": late}}
        return {**cell(variant, seed, late), "along": reached}

    cells = [looked_at("whole", 0, 0.5, 0.9), looked_at("random", 0, 0.3, 0.9), looked_at("random", 1, 0.5, 0.7)]
    lines = along.table([*cells, cell("whole", 2, 0.1)], "whole").splitlines()
    assert lines[0] == "| variant | 1,000 | 30,000 | searches |"
    assert lines[2:] == [
        "| whole | 50.0 | 90.0 | 1 |",
        "| random | 40.0 (+20.0, +20.0 to +20.0) | 80.0 (+0.0, +0.0 to +0.0) | 2 |",
    ]


# ---- reasonings

QUESTION = "not ( True and False ) is"


@pytest.mark.parametrize("style", ["full", "sketch"])
def test_a_working_of_the_question_is_a_right_reasoning(style: str) -> None:
    working = getattr(work_out("boolean_expressions", QUESTION), style)
    assert is_right("boolean_expressions", QUESTION, f" {working}\n")
    assert not is_right("boolean_expressions", QUESTION, working.replace("False", "True"))
    assert not is_right("boolean_expressions", QUESTION, None)


counts = st.fixed_dictionaries({(a, b): st.integers(1, 9) for a in (True, False) for b in (True, False)})


@given(before=counts, after=counts)
def test_the_gain_is_what_went_through_reasoning_and_what_changed_at_equal_reasoning(
    before: dict[Any, int], after: dict[Any, int]
) -> None:
    one, two = Answered(before), Answered(after)
    share = (one.reasoned + two.reasoned) / 2
    rest = sum(
        weight * ((two.after(kind) or 0.0) - (one.after(kind) or 0.0))
        for kind, weight in ((True, share), (False, 1 - share))
    )
    assert through_reasoning(one, two) + rest == pytest.approx(two.accuracy - one.accuracy)


def test_answers_that_get_better_without_better_reasoning_are_no_gain_through_it() -> None:
    before = Answered({(True, True): 2, (True, False): 2, (False, True): 1, (False, False): 5})
    after = Answered({(True, True): 4, (False, True): 6})
    assert through_reasoning(before, after) == 0.0 and after.accuracy == 1.0
    table = reasonings.table({"navigate": (before, after)})
    assert table.splitlines()[2] == "| navigate | 40 → 40 | 75 | 58 | +70 | +0 |"


def test_the_found_instruction_reasons_right_where_the_seed_guesses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    questions = [generate("web_of_lies", rng) for _ in range(6)]
    rows = [dspy.Example(question=each, answer=work_out("web_of_lies", each).answer) for each in questions]
    monkeypatch.setattr(command, "_rows", lambda *_: ([], [], [row.with_inputs("question") for row in rows]))
    text = "Check the statements one by one and mark each person as honest or a liar."
    found = {**cell("whole", 0, 1.0, "web_of_lies"), "instruction": text}
    (tmp_path / "cells.jsonl").write_text(json.dumps(found) + "\n")
    asked = ["--tasks", "web_of_lies", "--seeds", "0", "--variants", "whole", "--reasonings"]
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path), *asked]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| web_of_lies | 0 → 100 | 100 |")
    assert (tmp_path / "table.md").read_text().endswith(line + "\n")
