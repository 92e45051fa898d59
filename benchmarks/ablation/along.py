"""How far a search had come with a part of its budget: what it would have returned if it had ended there.

A search with a smaller budget takes the same steps and stops earlier, so one long search shows all shorter ones. Only
the final comparison on the validation rows is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.fidelity.table import interval
from dspy_greater.program.validation import winner
from dspy_greater.report.result import PredictorResult
from dspy_greater.search.state import UNUSED, advance, begin
from dspy_greater.settings import Settings


def contestants(found: PredictorResult, settings: Settings) -> list[str]:
    """The seed instruction and the finalists of the search that ends with `settings.max_generated_tokens`."""
    state = begin(found.seed, settings, usage=UNUSED.after(found.seed_spent))
    for step in found.steps:
        if state.finished(settings):
            break
        tried = [each.evaluation for each in step.candidates if each.evaluation is not None]
        state = advance(state, step, tried, settings, lambda ids: range(len(ids)))  # where it goes on does not matter
    return list(dict.fromkeys([found.seed.instruction, *(each.instruction for each in state.best)]))


def instruction_at(found: PredictorResult, settings: Settings, validation_score: Callable[[str], float]) -> str:
    """What that search returns; as everywhere, the seed keeps a tie."""
    texts = contestants(found, settings)
    return texts[winner([validation_score(text) for text in texts])]


def table(cells: Sequence[dict[str, Any]], baseline: str) -> str:
    """Markdown: mean accuracy of each variant by budget, and in brackets by how much the baseline is ahead of it.

    Cells whose search was not looked at along the way are left out.
    """
    cells = [cell for cell in cells if cell.get("along")]
    budgets = sorted({int(budget) for cell in cells for budget in cell["along"]})
    names = list(dict.fromkeys(cell["variant"] for cell in cells))
    head = ["variant", *(f"{budget:,}" for budget in budgets), "searches"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in names:
        found = {_key(cell): cell for cell in cells if cell["variant"] == name}
        first = {_key(cell): cell for cell in cells if cell["variant"] == baseline and name != baseline}
        parts = [_reached(found, first, str(budget)) for budget in budgets]
        lines.append(f"| {name} | {' | '.join(parts)} | {len(found)} |")
    return "\n".join(lines)


def _reached(found: dict[Any, Any], baseline: dict[Any, Any], budget: str) -> str:
    reached = [100 * cell["along"][budget]["accuracy"] for cell in found.values() if budget in cell["along"]]
    pairs = [(baseline[key], found[key]) for key in found if key in baseline]
    leads = [
        100 * (mine["along"][budget]["accuracy"] - other["along"][budget]["accuracy"])
        for mine, other in pairs
        if budget in mine["along"] and budget in other["along"]
    ]
    mean = f"{sum(reached) / len(reached):.1f}" if reached else "-"
    return f"{mean} ({_signed(leads)})" if leads else mean


def _signed(leads: list[float]) -> str:
    mean, low, high = interval(leads)
    return f"{mean:+.1f}, {low:+.1f} to {high:+.1f}"


def _key(cell: dict[str, Any]) -> tuple[str, int]:
    return cell["task"], cell["seed"]
