"""Everything that a report says, in the order in which it is said; Markdown and HTML write the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.cells import Cell
from benchmarks.report.comparison import Comparison, Setting, comparisons
from benchmarks.report.findings import findings
from benchmarks.report.plots import Plot, cost_plot, interval_plot
from benchmarks.report.tables import (
    Table,
    accuracy_table,
    cost_table,
    environment_table,
    failure_table,
    instruction_tables,
    paired_table,
    rank_table,
    task_table,
)


@dataclass(frozen=True)
class Section:
    """One setting at one budget, or what all settings share.

    Attributes:
        title: a heading.
        sentences: the verdict.
        parts: tables and drawings, in order.
    """

    title: str
    sentences: tuple[str, ...]
    parts: tuple[Table | Plot, ...]


@dataclass(frozen=True)
class Report:
    """A report, ready to be written.

    Attributes:
        title: of the page.
        lead: what it is about.
        sections: in order.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]


def build(cells: Sequence[Cell], baseline: str, extra: Sequence[Table] = ()) -> Report:
    """The report of all cells.

    Args:
        cells: of one run directory, oldest first.
        baseline: the optimizer that the others are held against.
        extra: further tables, such as of transfer.
    """
    groups = comparisons(cells)
    latest = [cell for group in groups for cell in group.cells]
    sections = [_section(group, baseline) for group in groups]
    settings: dict[Setting, list[Comparison]] = {}
    for group in groups:
        settings.setdefault(group.setting, []).append(group)
    curves = [plot for each in settings.values() if (plot := cost_plot(each)) is not None]
    failures = failure_table(groups)
    shared = [*curves, *extra, *([failures] if failures else []), environment_table(latest)]
    failed = sum(cell.test is None for cell in latest)
    proposers = ", ".join(dict.fromkeys(cell.key.proposer for cell in latest))
    lead = (
        f"{len(latest)} cells, of which {failed} failed. Proposer of the textual optimizers: {proposers}. "
        "Every optimizer had the same program, model, metric, rows and seed instruction, and was judged by the best it "
        "had found when it ended or when its budget of task-model tokens was spent."
    )
    return Report("Comparison of prompt optimizers", lead, (*sections, Section("All settings", (), tuple(shared))))


def _section(comparison: Comparison, baseline: str) -> Section:
    parts: list[Table | Plot | None] = [
        accuracy_table(comparison),
        paired_table(comparison, baseline),
        task_table(comparison, baseline),
        rank_table(comparison) if len(comparison.tasks) > 1 else None,
        cost_table(comparison),
        *(interval_plot(comparison, task) for task in comparison.tasks),
        *instruction_tables(comparison),
    ]
    heading = comparison.text[0].upper() + comparison.text[1:]
    return Section(heading, tuple(findings(comparison, baseline)), tuple(part for part in parts if part is not None))
