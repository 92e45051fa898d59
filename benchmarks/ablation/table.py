"""Cells of the ablation -> a table: accuracy by task, and over all tasks with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.fidelity.table import interval


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per variant, best mean first; cells that failed are counted."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    names = list(dict.fromkeys(cell["variant"] for cell in cells))
    done = {name: [cell for cell in cells if cell["variant"] == name and "accuracy" in cell] for name in names}
    lines = [
        f"| variant | mean, %, 95 % interval over searches | {' | '.join(tasks)} | searches | steps | failed |",
        f"| --- | --- | {' | '.join('---' for _ in tasks)} | --- | --- | --- |",
    ]
    for name in sorted(names, key=lambda name: -_mean([cell["accuracy"] for cell in done[name]])):
        found = done[name]
        mean, low, high = interval([100 * cell["accuracy"] for cell in found])
        by_task = [_mean([100 * cell["accuracy"] for cell in found if cell["task"] == task]) for task in tasks]
        failed = sum(cell["variant"] == name and "error" in cell for cell in cells)
        lines.append(
            f"| {name} | {mean:.1f} ({low:.1f} to {high:.1f}) | {' | '.join(f'{each:.1f}' for each in by_task)} "
            f"| {len(found)} | {_mean([cell['steps'] for cell in found]):.0f} | {failed} |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
