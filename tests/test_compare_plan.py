"""Plans of runs and screenings of tasks: what a benchmark says before it is begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.harness.config import RunConfig
from benchmarks.harness.plan import Plan
from benchmarks.harness.screen_command import Screened, table
from dspy_greater.errors import SettingsError

CONFIGS = sorted((Path(__file__).parents[1] / "benchmarks" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_says_what_it_takes(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(path), "--out", str(tmp_path / "o"), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    cells = sum(line.endswith(": to run") for line in out)
    assert out[-4].startswith(f"{cells} cells to run, at most ") and out[-1].startswith("memory: ")
    assert "hours if optimizers only read" in out[-2]


def test_hours_and_memory_are_those_of_the_stated_rates() -> None:
    stated = {"device": "d", "parameters": 1e9, "layers": 2, "width": 4, "kv_width": 3, "reads": 100.0, "writes": 10.0}
    found = Plan.of({**stated, "prompt": 50, "written": 5, "rows": [4, 6, 8]})
    asked = RunConfig(tasks=("a",), optimizers=("seed", "x"), budget=36_000, seeds=(0,), limit=7)
    # dev: 5 programs on 6 rows, test: 7 rows, for each of two cells; and the seed's test once
    assert found.judging(asked, 2) == (50 * (2 * 37 + 7), 5 * (2 * 37 + 7))
    after = (50 * 81 / 100 + 5 * 81 / 10) / 3600
    assert found.hours(asked, 2) == pytest.approx((0.2 + after, 2.0 + after))
    assert found.memory(3) == {"weights": 2e9, "states of 3 rows": 2 * 2 * 3 * 2 * 55 * 3, "a gradient": 34 * 8 * 4096}


@pytest.mark.parametrize(
    ("stated", "said"),
    [({"device": "d"}, "plan lacks kv_width, layers"), ({"colour": 1}, "plan has colour; it takes bytes_a_number")],
)
def test_a_plan_that_cannot_be_read_is_named(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Plan.of(stated)


def screened(name: str, accuracies: list[float]) -> Screened:
    shares = {f"instruction {place}": share for place, share in enumerate(accuracies)}
    return Screened(name, 10, 0, shares, dict.fromkeys(shares, 0.1), read=900, written=120, seconds=1.0)


def test_the_task_on_which_instructions_matter_most_comes_first() -> None:
    rows = table([screened("a", [0.5, 0.6]), screened("b", [0.2, 0.7, 0.1])]).splitlines()[2:]
    assert rows == [
        "| b | 10 | 20% | 70% | 60% | 10% | 4 |",
        "| a | 10 | 50% | 60% | 10% | 10% | 6 |",
    ]


@pytest.mark.slow
def test_a_screening_reads_training_rows_alone_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["screen", "--tasks", "pocket:navigate", "--limit", "4", "--model-args", "max_tokens=60"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    line = json.loads((tmp_path / "screen.jsonl").read_text())
    assert line["rows"] == 4 and len(line["accuracies"]) == 3 and line["written"] > 0 and line["read"] > 0
    assert "| pocket:navigate | 4 |" in capsys.readouterr().out
    assert main([*asked, "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "screen.jsonl").read_text().splitlines()) == 1, "it was screened already"
    assert main([*asked, "--instruction", "Track it.", "--out", str(tmp_path)]) == 0
    other = json.loads((tmp_path / "screen.jsonl").read_text().splitlines()[-1])
    assert list(other["accuracies"]) == [next(iter(line["accuracies"])), "Track it."]
    path = tmp_path / "screen.jsonl"
    path.write_bytes(path.read_bytes() + b'{"task": "poc')  # it was killed while it wrote
    assert main([*asked[:-1], "max_tokens=50", "--out", str(tmp_path)]) == 0
    again = [json.loads(each) for each in path.read_text().splitlines()]
    assert [each["model_args"] for each in again] == ["max_tokens=60", "max_tokens=60", "max_tokens=50"]


def test_a_task_to_screen_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["screen", "--tasks", "nowhere", "--out", str(tmp_path)]) == 2
    assert "There is no task 'nowhere'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_estimate_and_its_search_are_held_against_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["estimate", "--task", "pocket:navigate", "--steps", "1", "--limit", "4", "--out", str(tmp_path / "x.json")]
    assert main(asked) in (0, 1)  # whether it was right; such a short search tells nothing of that
    [found] = json.loads((tmp_path / "x.json").read_text())
    assert {"seconds", "tokens", "written"} <= set(found["ratios"]) == set(found["ratios_after_first_steps"])
    assert found["taken"]["written"] > 0 and found["after_first_steps"]["after_steps"] == 1
    assert found["ratios"]["written"] == pytest.approx(found["told"]["total"]["written"] / found["taken"]["written"])
    table = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in table}) == 1 and table[2].startswith("| pocket:navigate | seconds |")
