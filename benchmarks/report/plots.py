"""Comparisons -> inline SVG: accuracy with its interval, and accuracy against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.report.comparison import SEED_ROW, Comparison, Result, shared_tasks

WIDTH, LABELS, ROW, MARGIN = 760, 190, 24, 36
CURVES = 320  # height of the plot against cost
# Colour-blind safe; more optimizers than colours take another shape of line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#5b4b8a", "#444444")
DASHES = ("", "6 3", "2 3")


@dataclass(frozen=True)
class Plot:
    """A drawing with what it shows.

    Attributes:
        title: a heading.
        caption: what is drawn, under which conditions.
        svg: the drawing, one element.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class CostPoint:
    """An optimizer at one budget: mean charged tokens and mean accuracy over the same tasks."""

    optimizer: str
    tokens: float
    accuracy: float


def interval_plot(comparison: Comparison, task: str) -> Plot:
    """Every optimizer's accuracy on one task with its interval; the line is the seed instruction."""
    results = [
        (name, result)
        for name in comparison.optimizers
        if (result := comparison.result(name, task)) is not None and result.seeds is not None
    ]
    height = MARGIN + ROW * len(results) + 20
    parts = [_axis_x(share, height - 20, f"{100 * share:.0f}") for share in (0, 0.25, 0.5, 0.75, 1)]
    seed = comparison.result(SEED_ROW, task)
    if seed is not None:
        x = _x(seed.pooled)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{MARGIN - 14}" y2="{height - 20}" class="seed"/>')
    for index, (name, result) in enumerate(results):
        parts.append(_interval(name, result, MARGIN + ROW * index, COLOURS[0]))
    return Plot(
        title=f"Accuracy on {task}",
        caption=f"{comparison.text}. Percent with 95 % intervals; the dashed line is the seed instruction.",
        svg=_svg(height, parts, f"Accuracy of each optimizer on {task}"),
    )


def _interval(name: str, result: Result, y: float, colour: str) -> str:
    low, high, middle = _x(result.low), _x(result.high), _x(result.pooled)
    return (
        f'<text x="{LABELS - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
        f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{middle}" cy="{y}" r="4.5" fill="{colour}"/>'
    )


def cost_points(group: Sequence[Comparison]) -> tuple[list[CostPoint], list[str]]:
    """Where each optimizer stands at each budget, on the tasks that all of them have finished; and these tasks."""
    tasks = shared_tasks(group)
    points = []
    for comparison in sorted(group, key=lambda each: each.budget):
        for name in comparison.optimizers:
            accuracy = comparison.task_mean(name, tasks) if tasks else None
            cells = [cell for task in tasks for cell in comparison.of(name, task) if cell.test is not None]
            if accuracy is not None:
                tokens = sum(cell.tokens.get("charged", 0) for cell in cells) / len(cells)
                points.append(CostPoint(name, tokens, accuracy))
    return points, tasks


def cost_plot(group: Sequence[Comparison]) -> Plot | None:
    """Accuracy against charged tokens, a line for each optimizer over its budgets; None where nothing is shared."""
    points, tasks = cost_points(group)
    drawn = [point for point in points if point.tokens > 0]
    if not drawn:
        return None
    low = math.floor(math.log10(min(point.tokens for point in drawn)) * 2) / 2
    high = max(low + 0.5, math.ceil(math.log10(max(point.tokens for point in drawn)) * 2) / 2)

    def place(point: CostPoint) -> tuple[float, float]:
        across = (math.log10(point.tokens) - low) / (high - low)
        return _x(across), round(MARGIN + (1 - point.accuracy) * (CURVES - MARGIN), 1)

    names = list(dict.fromkeys(point.optimizer for point in drawn))
    height = CURVES + 44 + 18 * math.ceil(len(names) / 3)
    parts = [_axis_y(share) for share in (0, 0.25, 0.5, 0.75, 1)]
    steps = [low + step / 2 for step in range(round(2 * (high - low)) + 1)]
    parts += [_axis_x((step - low) / (high - low), CURVES, f"{float(f'{10**step:.2g}'):,.0f}") for step in steps]
    for index, name in enumerate(names):
        places = [place(point) for point in drawn if point.optimizer == name]
        parts.append(_curve(name, places, index, CURVES + 40 + 18 * (index // 3)))
    return Plot(
        title="Accuracy against cost",
        caption=(
            f"{group[0].setting.text}. Mean test accuracy in percent over {', '.join(tasks)}, against the mean of the "
            "charged task-model tokens (logarithmic); optimizers that were charged nothing are not drawn."
        ),
        svg=_svg(height, parts, "Accuracy of each optimizer against its charged tokens"),
    )


def _curve(name: str, places: list[tuple[float, float]], index: int, y: float) -> str:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    line = " ".join(f"{x},{y}" for x, y in places)
    style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
    left = LABELS / 2 + (index % 3) * 220
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"><title>{escape(name)}</title></circle>' for x, y in places
    )
    return (
        f'<polyline points="{line}" {style}/>{dots}'
        f'<line x1="{left}" x2="{left + 24}" y1="{y - 4}" y2="{y - 4}" {style}/>'
        f'<text x="{left + 30}" y="{y}">{escape(name)}</text>'
    )


def _x(share: float) -> float:
    return round(LABELS + share * (WIDTH - LABELS - MARGIN), 1)


def _axis_x(share: float, y: float, label: str) -> str:
    x = _x(share)
    return (
        f'<line x1="{x}" x2="{x}" y1="{MARGIN - 14}" y2="{y}" class="grid"/>'
        f'<text x="{x}" y="{y + 14}" text-anchor="middle">{label}</text>'
    )


def _axis_y(share: float) -> str:
    y = round(MARGIN + (1 - share) * (CURVES - MARGIN), 1)
    return (
        f'<line x1="{_x(0)}" x2="{_x(1)}" y1="{y}" y2="{y}" class="grid"/>'
        f'<text x="{LABELS - 10}" y="{y + 4}" text-anchor="end">{100 * share:.0f}</text>'
    )


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'
