"""How the seconds of a step grow with its size: values that double, a table and a small chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.speed.report import save, write
from benchmarks.speed.step import Arm
from benchmarks.speed.timing import Spread, run_once
from benchmarks.speed.work import Work
from dspy_greater.model.engine import Engine

AXES = {"n": "rows", "prompt": "prompt tokens", "reasoning": "reasoning tokens", "mu": "candidates"}
_CHART_WIDTH = 40


def doubling(least: int, most: int) -> list[int]:
    """From the least value on, each twice the one before.

    Example:
        >>> doubling(8, 50)
        [8, 16, 32]
    """
    values = [least]
    while 2 * values[-1] <= most:
        values.append(2 * values[-1])
    return values


def measure_scale(
    axis: str,
    values: Sequence[int],
    *,
    work_of: Callable[[int], Work],
    engine: Engine,
    arms: Mapping[str, Arm],
    repeats: int,
    clock: str,
    result: dict[str, Any],
    out: Any,
) -> dict[str, Any]:
    """Time every arm at every value of the axis; `result` is completed and saved after each value."""
    result["scale"] = {"axis": AXES[axis], "points": []}
    for value in values:
        work = work_of(value).with_current_reasoning(engine)
        runs = [
            run_once(name, arm, engine, work, rows_done=len(work.rows), clock=clock)
            for _ in range(repeats)
            for name, arm in arms.items()
        ]
        seconds = {name: Spread.of([run.total for run in runs if run.arm == name]) for name in arms}
        point = {"value": value, "seconds": {name: each.as_json() for name, each in seconds.items()}}
        result["scale"]["points"].append(point)
        save(out, result)
    write(chart(result["scale"]))
    return result


def chart(scale: Mapping[str, Any]) -> str:
    """A row per value and arm: seconds, how many times those of the value before, and a bar."""
    most = max(seconds["median"] for point in scale["points"] for seconds in point["seconds"].values())
    lines = [f"{scale['axis']:>17} {'arm':9} {'seconds':>9} {'growth':>7}"]
    before: dict[str, float] = {}
    for point in scale["points"]:
        for name, seconds in point["seconds"].items():
            median = seconds["median"]
            growth = f"{median / before[name]:.2f}x" if name in before else ""
            bar = "#" * max(1, round(_CHART_WIDTH * median / most))
            lines.append(f"{point['value']:>17} {name:9} {median:>9.3g} {growth:>7} {bar}")
            before[name] = median
    return "\n".join(lines)
