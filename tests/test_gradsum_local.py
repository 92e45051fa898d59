"""The example in which a local model judges and edits what a smaller one writes."""

from __future__ import annotations

import json
from pathlib import Path

import dspy
import gradsum_local
import pytest
from gradsum_judge import ScriptedOptimizer

PROBLEM = "Ann has 3 cats and 12 dogs. She gives {} dogs to Ben. How many pets does she have?"


class Judge(ScriptedOptimizer):
    """Full marks for a short form with all numbers."""

    def judge(self, question: str, output: str) -> dict[str, str]:
        kept = gradsum_local.kept_numbers(question, output)
        return {"explanation": f"{kept:.0%} of the numbers are there.", "score": str(1 + round(4 * kept))}


class Worker(ScriptedOptimizer):
    """Shortens by leaving out the end of the problem."""

    def answer(self, asked: dict[str, str]) -> dict[str, str]:
        return {"short": " ".join(asked["problem"].split()[:7])}


def test_the_example_tells_the_judge_and_the_check_apart_and_keeps_the_better_prompt(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("\n".join(json.dumps({"question": PROBLEM.format(dogs), "answer": "#### 9"}) for dogs in range(20)))
    sizes = ["--rows", "4", "--test-rows", "5", "--iterations", "1", "--sample-size", "3", "--subset-size", "2"]
    options = gradsum_local.parse_arguments(
        ["--model", "small", "--judge", "big", "--gsm8k", str(rows), "--out", str(tmp_path / "run"), *sizes]
    )
    small, big = (dspy.LM("scripted/model", engine=engine, cache=False) for engine in (Worker(), Judge()))
    figures = gradsum_local.search(small, big, options)
    assert figures["seed"]["instruction"] == "Shorten the text."
    assert figures["found"]["judge"] >= figures["seed"]["judge"] > 0
    assert 0.6 < figures["seed"]["numbers kept"] < 1.0  # 3 and 12 of three numbers, or of two where 3 or 12 is given
    assert figures["seed"]["length"] == pytest.approx(7 / len(PROBLEM.split()))
    assert figures["iterations"] == 1
    assert figures["spent"]["generation"]["runs"] > 0
    assert figures["spent"]["evaluation"]["answered"] > 0
    assert (tmp_path / "run" / "report.html").exists()
