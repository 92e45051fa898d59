"""The ablation's table: means, paired leads of the default, failures that are counted and not hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation.command import main
from benchmarks.ablation.table import table
from benchmarks.ablation.variants import SWEEPS, VARIANTS
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
    for variant in (*VARIANTS.values(), *SWEEPS.values()):
        Settings.of(None, **variant.settings)
        assert variant.about and variant.instruction


def test_the_table_is_of_the_cells_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell("whole", 0, 0.9), cell("whole", 1, 0.8), cell("paper", 0, 0.7), cell("whole", 0, 0.5, "web_of_lies")]
    cells.append({**cell("whole", 1, 0.1), "budget": 20_000})
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(each) + "\n" for each in cells))
    asked = ["--tasks", "navigate", "--seeds", "1", "--variants", "whole"]
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path), *asked]) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert line.startswith("| whole | 80.0 (80.0 to 80.0) | 80.0 |")
