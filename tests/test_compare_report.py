"""The report of a comparison: its statistics, tables, pages and verdicts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.__main__ import main as benchmarks_main
from benchmarks.harness.cells import Accuracy, Cell, CellKey, Cells, Contender
from benchmarks.report.command import main, write_report
from benchmarks.report.comparison import SEED_ROW, comparisons
from benchmarks.report.findings import findings
from benchmarks.report.html import text, to_html
from benchmarks.report.markdown import to_markdown
from benchmarks.report.plots import cost_plot, cost_points
from benchmarks.report.report import Report, build
from benchmarks.report.statistics import Spread, average_ranks, holm, mcnemar_exact, wilson
from benchmarks.report.tables import (
    Table,
    accuracy_table,
    cost_table,
    environment_table,
    instruction_tables,
    paired_table,
    rank_table,
    task_table,
)
from benchmarks.report.transfer import Transferred, append_transfer, read_transfer, transfer_tables
from dspy_greater.errors import DataError, RunDirectoryError

GOLDEN = Path(__file__).parent / "golden" / "compare_report.md"
PREDICTOR = "predict"
SEED_ROWS = (1, 0, 0, 0, 1, 0, 0, 0)


def cell(
    optimizer: str,
    rows: Sequence[int] | None,
    *,
    task: str = "pocket:navigate",
    seed: int = 0,
    budget: int = 1000,
    proposer: str = "phrasebook",
    limit: int | None = None,
    **fields: Any,
) -> Cell:
    """A finished cell, or a failed one where there are no rows."""
    instruction = f"Keep the position | {optimizer}."
    found: dict[str, Any] = {
        "test": None if rows is None else Accuracy.of(rows),
        "seed_test": Accuracy.of(SEED_ROWS),
        "instructions": {} if rows is None else {PREDICTOR: instruction},
        "chosen": "" if rows is None else "returned",
        "contenders": () if rows is None else (Contender("returned", {PREDICTOR: instruction}, {}, 0.5),),
        "tokens": {"charged": 900, "generated": 100, "prefilled": 400, "backward": 200},
        "proposer_tokens": {"calls": 2, "prompt_tokens": 30, "completion_tokens": 10},
        "seconds": 12.0,
        "peak_memory_bytes": 2**30,
        "scored_candidates": 7,
        "error": "RuntimeError: <no> answer" if rows is None else None,
        "rows": {"train": 4, "dev": 8, "test": 8, "source": "the generator"},
        "model_identity": "pocket@1",
        "versions": {"python": "3.11", "dspy": "3.4.1"},
        "finished": "2026-11-21T07:00:00+00:00",
    }
    key = CellKey(task, optimizer, seed, "pocket", "", proposer, budget, limit)
    return Cell(key=key, **{**found, **fields})


OTHER = "bbh:web_of_lies"
SMALL = [
    cell("greater", (1, 1, 1, 1, 1, 1, 0, 1)),
    cell("gepa", (1, 1, 0, 0, 1, 1, 0, 0), stopped="tokens"),
    cell("apo", None),
    cell("greater", (1, 1, 1, 1, 1, 0, 1, 1), seed=1),
    cell("gepa", (1, 1, 1, 1, 1, 0, 1, 1), seed=1, chosen="seed"),
    cell("greater", (1, 0, 0, 0, 1, 1, 0, 0), task=OTHER),
    cell("gepa", (1, 1, 1, 0, 1, 1, 0, 1), task=OTHER),
]


def only(cells: Sequence[Cell]) -> Any:
    (comparison,) = comparisons(cells)
    return comparison


def test_the_dev_score_and_the_demonstrations_are_those_of_the_program_that_was_chosen() -> None:
    text = {PREDICTOR: "Think."}
    demos = (
        Contender("seed", text, {}, 0.25),
        Contender("returned", text, {PREDICTOR: 4}, 0.5),
        Contender("recorded", text, {PREDICTOR: 2}, 0.5),
    )
    rows = [
        cell("simba", (1, 1), instructions=text, contenders=demos),
        cell(
            "miprov2",
            (1, 0),
            instructions=text,
            chosen="seed",
            contenders=(replace(demos[0], dev_accuracy=0.75), *demos[1:]),
        ),
    ]
    (table,) = instruction_tables(only(rows))
    assert row_of(table, "simba")[2:4] == ("Think. (with 4 demonstrations)", "50.0")
    assert row_of(table, "miprov2")[2:4] == ("Think. (the seed instruction)", "75.0")


@pytest.mark.parametrize(
    ("proposer", "said"),
    [("self,max_tokens=300", "are charged, too, since it is the same model"), ("phrasebook", "are not charged")],
)
def test_the_cost_says_whether_proposals_were_charged(proposer: str, said: str) -> None:
    assert f"the proposer's tokens {said}" in cost_table(only([cell("gepa", (1, 0), proposer=proposer)])).caption


# ---------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962), (100, 100, 0.9630, 1.0)],
)
def test_wilson_intervals_have_the_known_values(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("first", "second"), list(product(range(6), range(6))))
def test_mcnemar_is_the_binomial_test_over_all_splits_as_likely_or_less(first: int, second: int) -> None:
    count = first + second
    mass = [math.comb(count, right) / 2**count for right in range(count + 1)]
    slow = sum(each for each in mass if each <= mass[first] * (1 + 1e-12))
    assert mcnemar_exact(first, second) == pytest.approx(slow)


def test_mcnemar_has_the_known_values() -> None:
    assert mcnemar_exact(10, 1) == pytest.approx(0.01171875)
    assert mcnemar_exact(5, 5) == mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 600) == pytest.approx(2 / 2**600)


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_equal_scores_share_their_rank() -> None:
    assert average_ranks({"a": 1, "b": 2, "c": 2, "d": 3}) == {"a": 4.0, "b": 2.5, "c": 2.5, "d": 1.0}


def test_one_seed_has_no_deviation() -> None:
    assert Spread.of([0.5]) == Spread(1, 0.5, 0.5, 0.5, None)


# ---------------------------------------------------------------------------- comparison


def test_pairs_are_the_same_row_of_the_same_cell() -> None:
    (pair,) = [each for each in only(SMALL).paired("greater") if each.peer == "gepa"]
    assert (pair.wins, pair.draws, pair.losses) == (1, 1, 1)
    assert (pair.only_baseline, pair.only_peer, pair.rows) == (3, 3, 24)
    assert pair.p == 1.0


def test_a_peer_without_a_shared_cell_is_not_paired() -> None:
    assert [pair.peer for pair in only(SMALL).paired("greater")] == ["gepa"]
    assert only([cell("greater", (1, 0)), cell("gepa", (1, 0), seed=1)]).paired("greater") == []


def test_p_values_are_corrected_for_the_number_of_peers() -> None:
    cells = [cell("greater", (1,) * 8), cell("a", (0,) * 8), cell("b", (0,) * 7 + (1,))]
    first, second = only(cells).paired("greater")
    assert (first.p, second.p) == (2 / 2**8, 2 / 2**7)
    assert (first.p_holm, second.p_holm) == (2 * first.p, 2 * first.p)


def test_other_budgets_proposers_and_models_are_not_mixed() -> None:
    cells = [cell("greater", (1, 0)), cell("gepa", (1, 0), budget=2000), cell("gepa", (1, 0), proposer="gpt")]
    assert [len(group.cells) for group in comparisons(cells)] == [1, 1, 1]


def test_a_cell_that_was_run_again_counts_once() -> None:
    assert only([cell("greater", None), cell("greater", (1, 1))]).result("greater").pooled == 1.0


def test_the_seed_instruction_is_counted_once_a_task_and_seed() -> None:
    result = only(SMALL).result(SEED_ROW, "pocket:navigate")
    assert (result.pooled, result.seeds.count) == (0.25, 2)


def test_an_optimizer_whose_every_cell_failed_is_ranked_last() -> None:
    ranks = only(SMALL).ranks()
    assert ranks["apo"] == Spread.of([3.0])
    assert (ranks["greater"].mean, ranks["gepa"].mean) == (1.5, 1.5)


# -------------------------------------------------------------------------------- tables


def row_of(table: Table | None, name: str) -> tuple[str, ...]:
    assert table is not None
    (found,) = [row for row in table.rows if row[0] == name]
    return found


def test_failed_missing_and_single_seed_cells_each_say_so() -> None:
    table = accuracy_table(only(SMALL))
    assert table.columns == ("optimizer", "pocket:navigate", OTHER, "mean of tasks")
    assert row_of(table, "apo") == ("apo", "failed", "not run", "incomplete")
    assert row_of(table, "greater")[1].endswith(" 87.5..87.5")
    assert row_of(table, "greater")[2] == "37.5 [13.7, 69.4]"
    assert row_of(table, "gepa")[1] == "68.8 [44.4, 85.8] 50.0..87.5"


def test_a_part_of_the_seeds_that_failed_is_counted() -> None:
    table = accuracy_table(only([cell("greater", (1, 1)), cell("greater", None, seed=1)]))
    assert row_of(table, "greater")[1].endswith(", 1 failed")


def test_the_best_of_each_task_stands_out_whoever_it_is() -> None:
    table = accuracy_table(only(SMALL))
    assert {(table.rows[row][0], table.columns[column]) for row, column in table.strong} == {
        ("greater", "pocket:navigate"),
        ("gepa", OTHER),
        ("gepa", "mean of tasks"),
    }


def test_every_table_of_results_names_the_proposer() -> None:
    report = build([*SMALL, cell("greater", (1, 0), proposer="openai/gpt", budget=5)], "greater")
    for section in report.sections[:-1]:
        for part in section.parts:
            assert "proposer phrasebook" in part.caption or "proposer openai/gpt" in part.caption, part.title


def test_seconds_of_cells_that_ran_together_are_said_to_be_that() -> None:
    alone, together = cell("greater", (1,) * 8), cell("apo", (1,) * 8, together=6, peak_memory_bytes=0)
    assert "at a time" not in cost_table(comparisons([alone])[0]).caption
    table = cost_table(comparisons([alone, together])[0])
    assert "Up to 6 cells of apo ran at a time" in table.caption
    assert [dict(zip(table.columns, row, strict=True))["peak MiB"] for row in table.rows] == ["1,024", "not known"]


def test_a_task_that_is_lost_has_a_minus() -> None:
    assert row_of(task_table(only(SMALL), "greater"), "gepa") == ("gepa", "+18.8 (p 0.250)", "-37.5 (p 0.250)")


def test_the_paired_table_counts_both_ways() -> None:
    assert row_of(paired_table(only(SMALL), "greater"), "gepa") == (
        ("gepa", "1 / 1 / 1", "24", "3", "3", "0.0", "1.000", "1.000")
    )
    assert paired_table(only(SMALL), "nobody") is None


def test_ranks_are_sorted_from_the_best() -> None:
    assert [row[0] for row in rank_table(only(SMALL)).rows] == ["gepa", "greater", "apo"]


def test_instructions_stand_side_by_side_with_kept_seeds_and_failures() -> None:
    navigate, _ = instruction_tables(only(SMALL))
    assert [row[:3] for row in navigate.rows] == [
        ("greater", "0", "Keep the position | greater."),
        ("greater", "1", "Keep the position | greater."),
        ("gepa", "0", "Keep the position | gepa."),
        ("gepa", "1", "Keep the position | gepa. (the seed instruction)"),
        ("apo", "0", "failed"),
    ]


def test_demonstrations_and_several_predictors_are_shown() -> None:
    texts = {"first": "Break it down.", "second": "Answer."}
    contender = Contender("returned", texts, {"first": 2, "second": 1}, 0.5)
    (table,) = instruction_tables(only([cell("a", (1, 0), instructions=texts, contenders=(contender,))]))
    assert table.rows[0][2] == "first: Break it down.\nsecond: Answer. (with 3 demonstrations)"


def test_the_environment_lists_every_value_that_occurs() -> None:
    table = environment_table([*SMALL, cell("x", (1,), versions={"python": "3.12"})])
    assert row_of(table, "python")[1] == "3.11\n3.12"
    assert row_of(table, "seeds")[1] == "0, 1"
    assert row_of(table, f"rows of {OTHER}")[1] == "4 / 8 / 8; the generator"


# ------------------------------------------------------------------------------- verdict


def test_losses_are_said_as_plainly_as_wins() -> None:
    cells = [cell("greater", (1, 1, 0, 0) * 5), cell("gepa", (1, 1, 1, 1) * 5), cell("apo", (0, 0, 0, 0) * 5)]
    said = findings(only(cells), "greater")
    assert said == [
        "greater loses to gepa by 50.0 points (0 wins, 0 draws, 1 losses over cells; p 0.004 after Holm).",
        "greater beats apo by 50.0 points (1 wins, 0 draws, 0 losses over cells; p 0.004 after Holm).",
        "On pocket:navigate, gepa (100.0) beats greater (50.0).",
    ]


def test_a_difference_that_may_be_chance_is_called_that() -> None:
    first, *_ = findings(only([cell("greater", (1, 1, 1, 0)), cell("gepa", (1, 1, 0, 0))]), "greater")
    assert "beats gepa by 25.0 points, a difference that may be chance (" in first


def test_even_results_failures_and_a_missing_baseline_are_said() -> None:
    assert findings(only(SMALL), "greater") == [
        "greater and gepa are even (1 wins, 1 draws, 1 losses over cells; p 1.000 after Holm).",
        "On pocket:navigate, greater is the best (87.5).",
        f"On {OTHER}, gepa (75.0) beats greater (37.5).",
        "1 of 7 cells failed.",
    ]
    assert findings(only(SMALL), "opro") == ["opro was not run, so nothing is compared with it."]
    assert findings(only(SMALL), "apo") == ["Every cell of apo failed, so nothing is compared with it."]
    assert "in common with greater" in findings(only([cell("greater", (1,))]), "greater")[0]
    level = findings(only([cell("greater", (1, 0)), cell("gepa", (0, 1))]), "greater")
    assert level[1] == "On pocket:navigate, no optimizer beats greater (50.0); at least one is level with it."


# --------------------------------------------------------------------------------- plots


def test_curves_go_over_budgets_on_the_tasks_that_all_have_finished() -> None:
    cells = [
        cell("greater", (1, 0), tokens={"charged": 500}),
        cell("greater", (1, 1), budget=2000, tokens={"charged": 1900}),
        cell("gepa", (0, 0), tokens={"charged": 800}),
        cell("greater", (0, 0), task=OTHER),
        cell("apo", None),
    ]
    points, tasks = cost_points(comparisons(cells))
    assert tasks == ["pocket:navigate"]
    assert [(point.optimizer, point.tokens, point.accuracy) for point in points] == [
        ("greater", 500, 0.5),
        ("gepa", 800, 0.0),
        ("greater", 1900, 1.0),
    ]
    plot = cost_plot(comparisons(cells))
    assert plot is not None and plot.svg.count("<polyline") == 2


def test_no_curve_is_drawn_where_no_task_is_shared() -> None:
    assert cost_plot(comparisons([cell("a", (1,)), cell("b", (1,), task=OTHER)])) is None
    assert cost_plot(comparisons([cell("a", None)])) is None


# --------------------------------------------------------------------------------- pages


def page(report: Report) -> ElementTree.Element:
    doctype, _, body = to_html(report).partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(body)


def test_the_page_is_well_formed_and_holds_every_table_and_plot() -> None:
    report = build(SMALL, "greater")
    root = page(report)
    parts = [part for section in report.sections for part in section.parts]
    assert len(root.findall(".//table")) == sum(isinstance(part, Table) for part in parts)
    assert len(root.findall(".//svg")) == sum(not isinstance(part, Table) for part in parts) == 3
    assert [each.text for each in root.findall(".//h2")] == [section.title for section in report.sections]


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    written = to_html(build(SMALL, "greater"))
    assert not re.search(r"https?:|<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=", written)


def test_whatever_an_instruction_holds_is_shown_and_not_obeyed() -> None:
    nasty = "</td><script>alert(1)</script> | `x` & \x00\x1b ]]> \ud800 **bold**\nnext line"
    report = build([cell("greater", (1, 0), instructions={"predict": nasty})], "greater")
    shown = [each.text for each in page(report).iter("td")]
    assert nasty.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd") in shown
    line = next(line for line in to_markdown(report).splitlines() if "alert" in line)
    assert "<script" not in line and len(re.findall(r"(?<!\\)\|", line)) == 6 and "<br>next line" in line


def test_text_keeps_what_html_can_hold() -> None:
    assert text("λ → 😀\t\n") == "λ → 😀\t\n"


def test_the_small_report_reads_as_it_did() -> None:
    written = to_markdown(build(SMALL, "greater"))
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(written, encoding="utf-8")
    assert written == GOLDEN.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- command


def finished_run(directory: Path, cells: Sequence[Cell] = SMALL) -> Path:
    for each in cells:
        Cells(directory).append(each)
    return directory


def test_the_command_writes_both_files_and_says_the_verdict(tmp_path: Path, capsys: Any) -> None:
    assert benchmarks_main(["report", "--out", str(finished_run(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert f"On {OTHER}, gepa (75.0) beats greater (37.5)." in said
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_another_baseline_turns_the_comparison_round(tmp_path: Path) -> None:
    said = write_report(finished_run(tmp_path), "gepa")
    assert "On pocket:navigate, greater (87.5) beats gepa (68.8)." in said


def test_a_report_of_nothing_is_refused_with_what_to_do(tmp_path: Path, capsys: Any) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "no finished cells" in capsys.readouterr().err
    with pytest.raises(DataError, match="--baseline mipro has no cells; there are greater, gepa, apo"):
        write_report(finished_run(tmp_path), "mipro")
    with pytest.raises(DataError, match="`python -m benchmarks transfer` makes it"):
        write_report(tmp_path, "greater", tmp_path / "nowhere.jsonl")


def test_a_report_without_the_default_baseline_is_still_a_report(tmp_path: Path) -> None:
    said = write_report(finished_run(tmp_path, [cell("gepa", (1, 0))]))
    assert "greater was not run, so nothing is compared with it." in said


def test_a_run_in_which_everything_failed_is_still_a_report(tmp_path: Path) -> None:
    write_report(finished_run(tmp_path, [cell("greater", None), cell("apo", None, seed_test=None)]))
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "2 cells, of which 2 failed" in written and "RuntimeError: &lt;no&gt; answer" in written


# ------------------------------------------------------------------------------ transfer


def transferred(name: str, rows: Sequence[int], seed: int = 0) -> Transferred:
    source = cell(name, (1, 0), seed=seed)
    return Transferred(
        source.key, "other", "", "other@1", dict(source.instructions), Accuracy.of(rows), Accuracy.of((0, 0)), 0.5
    )


def test_transferred_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    path, line = tmp_path / "transfer.jsonl", transferred("greater", (1, 0))
    append_transfer(path, line)
    append_transfer(path, replace(line, finished="later"))
    assert read_transfer(path) == [replace(line, finished="later")]
    assert read_transfer(tmp_path / "none.jsonl") == []


def test_instructions_are_evaluated_on_another_model_once(tmp_path: Path, capsys: Any) -> None:
    finished_run(tmp_path, [cell("a", (1, 0), limit=2), cell("b", (1, 0), limit=2), cell("c", None, limit=2)])
    command = ["transfer", "--cells", str(tmp_path / "cells.jsonl"), "--model", "pocket", "--threads", "2"]
    assert benchmarks_main([*command, "--model-args", "max_tokens=40"]) == 0
    said = capsys.readouterr().out
    assert "pocket:navigate · a · seed 0: 50.0 on pocket" in said and "· c ·" not in said
    first, second = read_transfer(tmp_path / "transfer.jsonl")
    assert first.instructions == {PREDICTOR: "Keep the position | a."} and len(first.test.correct) == 2
    assert first.seed_test == second.seed_test and first.model_args == "max_tokens=40"
    assert benchmarks_main([*command, "--model-args", "max_tokens=40"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'transfer.jsonl'}\n"
    assert benchmarks_main(command) == 0  # its own model: nothing to transfer
    assert len(read_transfer(tmp_path / "transfer.jsonl")) == 2


def test_other_rows_than_the_cells_own_are_refused(tmp_path: Path, capsys: Any) -> None:
    finished_run(tmp_path, [cell("a", (1, 0, 1), limit=2)])
    command = ["transfer", "--cells", str(tmp_path / "cells.jsonl"), "--model", "pocket"]
    assert benchmarks_main([*command, "--model-args", "max_tokens=40"]) == 2
    assert "was tested on 3 rows, and here are 2; give the --data-dir that the run had" in capsys.readouterr().err
    assert benchmarks_main(["transfer", "--cells", str(tmp_path / "none.jsonl"), "--model", "pocket"]) == 2
    assert "no finished cells" in capsys.readouterr().err


def test_a_line_of_a_transfer_that_was_torn_is_left_out_and_any_character_may_stand_in_one(tmp_path: Path) -> None:
    path, odd = tmp_path / "transfer.jsonl", transferred("greater", (1, 1))
    odd = replace(odd, instructions={PREDICTOR: "One.\u2028Two.\u0085Three."})
    append_transfer(path, odd)
    with path.open("ab") as file:
        file.write(b'{"source": {"ta')
    assert read_transfer(path) == [odd]
    append_transfer(path, transferred("gepa", (0, 1)))
    assert len(read_transfer(path)) == 2


def test_a_damaged_line_of_a_transfer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "transfer.jsonl"
    path.write_text("{}\n")
    with pytest.raises(RunDirectoryError, match="Line 1 of .* is no result of a transfer"):
        read_transfer(path)


def test_the_transfer_table_has_the_seed_the_other_model_and_what_it_was(tmp_path: Path) -> None:
    lines = [transferred("greater", (1, 1)), transferred("greater", (1, 0), seed=1), transferred("gepa", (0, 1))]
    (table,) = transfer_tables(lines)
    assert table.title == "Transfer from pocket to other"
    assert "proposer phrasebook" in table.caption
    assert row_of(table, SEED_ROW)[1].startswith("0.0 [")
    assert row_of(table, "greater")[1] == "75.0 [30.1, 95.4] 50.0..100.0 (was 50.0)"
    assert table.strong == {(1, 1)}
    finished_run(tmp_path)
    append_transfer(tmp_path / "transfer.jsonl", lines[0])
    write_report(tmp_path)
    assert "Transfer from pocket to other" in (tmp_path / "report.md").read_text(encoding="utf-8")
