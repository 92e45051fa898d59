"""Cells of the ablation -> a table: accuracy by task, and over all tasks with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.fidelity.table import interval
from dspy_greater.stats import mean

BASELINE = "whole"  # the default, which the others are compared with; without it the first is


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per variant, best mean first; cells that failed are counted."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    names = list(dict.fromkeys(cell["variant"] for cell in cells))
    baseline = BASELINE if BASELINE in names else names[0]
    done = {name: [cell for cell in cells if cell["variant"] == name and "accuracy" in cell] for name in names}
    head = ["variant", "mean, %, 95 % interval over searches", *tasks, f"{baseline} is better by", "searches", "steps"]
    lines = [f"| {' | '.join(head)} | failed |", f"|{' --- |' * (len(head) + 1)}"]
    for name in sorted(names, key=lambda name: -mean([cell["accuracy"] for cell in done[name]])):
        found = done[name]
        middle, low, high = interval([100 * cell["accuracy"] for cell in found])
        by_task = [mean([100 * cell["accuracy"] for cell in found if cell["task"] == task]) for task in tasks]
        lead = "" if name == baseline else _lead(done[baseline], found)
        steps = mean([cell["steps"] for cell in found])
        failed = sum(cell["variant"] == name and "error" in cell for cell in cells)
        accuracies = " | ".join(f"{each:.1f}" for each in by_task)
        lines.append(
            f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {accuracies} | {lead} | {len(found)} | {steps:.0f} "
            f"| {failed} |"
        )
    return "\n".join(lines)


def _lead(baseline: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    """Points by which the baseline is ahead on the same rows, with a 95 % interval over pairs of searches."""
    theirs = {(cell["task"], cell["seed"]): cell["accuracy"] for cell in found}
    shared = [(cell["accuracy"], theirs.get((cell["task"], cell["seed"]))) for cell in baseline]
    leads = [100 * (mine - other) for mine, other in shared if other is not None]
    if not leads:
        return "-"
    middle, low, high = interval(leads)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
