"""How far a comparison is, told from its directory while it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import bench, config, run
from benchmarks.harness.budget import Budget, Usage
from benchmarks.harness.progress import EVERY, FILE, Progress, progress_kept, under_way
from benchmarks.harness.status_command import told
from benchmarks.optimizers import OPTIMIZERS, Context
from dspy_greater.errors import RunDirectoryError

NOW = Progress("gsm8k · apo · seed 0", 20_000, 80_000, 600.0, 1, 0.25, 40, judging=False, written=1000.0)
pytestmark = pytest.mark.filterwarnings("ignore:Item 'summary' on TypedDict class:UserWarning")


def spent(tokens: int) -> Budget:
    budget = Budget(80_000)
    budget.add_served(Usage(1, tokens, 0))
    return budget


def test_a_cell_keeps_telling_what_it_spent_and_found_until_it_is_over(tmp_path: Path) -> None:
    directory = tmp_path / "logs" / "one"
    directory.mkdir(parents=True)
    budget = spent(500)
    with progress_kept(directory, "gsm8k · apo · seed 0", budget, every=0.01):
        budget.record({"predict": "Think."}, 0.5, 10)
        budget.add_served(Usage(1, 300, 0))
        deadline = time.monotonic() + 10
        while (found := under_way(tmp_path))[:1] == [] or found[0].scored == 0 or found[0].charged < 800:
            assert time.monotonic() < deadline
        assert (found[0].cell, found[0].charged, found[0].limit) == ("gsm8k · apo · seed 0", 800, 80_000)
        assert (found[0].scored, found[0].best, found[0].best_rows) == (1, 0.5, 10)
    assert under_way(tmp_path) == []
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("progress", "now", "said"),
    [
        (NOW, 1002.0, "20,000 of 80,000 tokens, 10 min, 1 candidate, best 25 % of 40 rows, some 30 min left"),
        (replace(NOW, charged=0, scored=0, best=None), 1002.0, "0 of 80,000 tokens, 10 min, 0 candidates"),
        (replace(NOW, charged=81_000, judging=True), 1002.0, "40 rows, being judged"),
        (NOW, 1000.0 + 180, "40 rows; nothing was heard of it for 3 min, it may have been killed"),
        (NOW, 1000.0 + 2 * EVERY, "some 30 min left"),
    ],
)
def test_a_line_says_what_is_left_and_what_may_be_dead(progress: Progress, now: float, said: str) -> None:
    assert told(progress, now).endswith(said)


def test_a_run_can_be_looked_at_while_a_cell_is_at_work_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    class Looking:
        about = name = "looking"

        def optimise(
            self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
        ) -> dspy.Module:
            while not under_way(out):
                time.sleep(0.01)
            seen.extend(each.cell for each in under_way(out))
            return student

    out = tmp_path / "out"
    monkeypatch.setitem(OPTIMIZERS, "looking", "unused:Unused")
    monkeypatch.setattr(bench, "make", lambda name: Looking())
    asked: dict[str, Any] = {"tasks": ("pocket:navigate",), "optimizers": ("looking",), "limit": 2, "out": out}
    assert run.run_all(config.RunConfig(**asked), lambda _: None) == 0
    assert seen == ["pocket:navigate · looking · seed 0"]
    assert main(["status", "--out", str(out)]) == 0
    assert capsys.readouterr().out == "1 cell finished, 0 with an error\n"


def test_a_cell_that_was_killed_is_told_by_its_age(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "logs" / "killed"
    directory.mkdir(parents=True)
    (directory / FILE).write_text(json.dumps(vars(replace(NOW, written=time.time() - 300))))
    assert main(["status", "--out", str(tmp_path)]) == 0
    assert "nothing was heard of it for 5 min, it may have been killed" in capsys.readouterr().out


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--out", str(tmp_path / "x")]) == 2
    assert "it has no cells.jsonl and no logs. Give the --out of `benchmarks run`." in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    directory = tmp_path / "logs" / "odd"
    directory.mkdir(parents=True)
    (directory / FILE).write_text("[1]")
    with pytest.raises(RunDirectoryError, match=r"progress\.json does not tell how far a cell is .*; remove it\."):
        under_way(tmp_path)
    assert main(["status", "--out", str(tmp_path)]) == 2
