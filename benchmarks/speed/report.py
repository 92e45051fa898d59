"""Measurements -> the JSON of a result, and tables for the eye."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.floor import model_bytes, model_flops
from benchmarks.speed.sizes import Ceilings, ModelSize
from benchmarks.speed.step import PHASES
from benchmarks.speed.timing import Run, Spread, ratios
from benchmarks.speed.work import Work

_WEIGHT_GRADIENTS = frozenset({"released"})


def write(text: str = "") -> None:
    """The one way in which the benchmark says something."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all; it may be written again as the run goes on."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def arms_json(runs: Sequence[Run], size: ModelSize, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """Arm -> its seconds, rates, memory and whether they are extrapolated."""
    return {name: _arm(name, [run for run in runs if run.arm == name], size, work, ceilings) for name in names(runs)}


def names(runs: Sequence[Run]) -> list[str]:
    """The arms that ran, slowest schedule first."""
    return [name for name in ("released", "plain", "ours") if any(run.arm == name for run in runs)]


def ratios_json(runs: list[Run]) -> dict[str, Any]:
    """`ratio` and `ratio_spread`: every rival's seconds over ours."""
    found = {name: ratios(runs, name, "ours") for name in names(runs) if name != "ours"} if _has_ours(runs) else {}
    return {
        "ratio": {name: round(each.median, 3) for name, each in found.items()},
        "ratio_spread": {name: each.as_json() for name, each in found.items()},
    }


def _has_ours(runs: Sequence[Run]) -> bool:
    return any(run.arm == "ours" for run in runs)


def _arm(name: str, runs: list[Run], size: ModelSize, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    first = runs[0]
    extrapolated = (
        None if first.rows_done == first.rows else f"extrapolated from {first.rows_done} of {first.rows} rows"
    )
    phases = {phase: _phase(name, phase, runs, size, work, ceilings) for phase in PHASES}
    return {
        "seconds": Spread.of([run.total for run in runs]).as_json(),
        "repeats": len(runs),
        "extrapolated": extrapolated,
        "peak_memory_bytes": max(run.peak_bytes for run in runs),
        "phases": phases,
    }


def _phase(name: str, phase: str, runs: list[Run], size: ModelSize, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    seconds = Spread.of([run.seconds[phase] for run in runs])
    counters, done = runs[0].counters[phase], seconds.median / runs[0].scale
    tokens = counters.generated_tokens or counters.prefilled_tokens
    flops = model_flops(counters, size, work, weight_gradients=name in _WEIGHT_GRADIENTS)
    return {
        "seconds": seconds.as_json(),
        "tokens_per_second": tokens / done,
        "share_of_matmul_rate": flops / done / ceilings.matmul_flops,
        "share_of_copy_rate": model_bytes(counters, size, work) / done / ceilings.copy_bytes,
        "counters": asdict(counters),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown, phase by phase; a row per arm, and the floor."""
    arms, floor = result["arms"], result["floor"]
    lines = [
        "| phase | arm | seconds | min..max | tokens/s | of matmul | of copy | against ours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    ours = arms.get("ours")
    for phase in PHASES:
        for name, arm in arms.items():
            each = arm["phases"][phase]
            against = each["seconds"]["median"] / ours["phases"][phase]["seconds"]["median"] if ours else None
            lines.append(
                f"| {phase} | {name} | {_spread(each['seconds'])} | {each['tokens_per_second']:,.0f} "
                f"| {100 * each['share_of_matmul_rate']:.0f} % | {100 * each['share_of_copy_rate']:.0f} % "
                f"| {_times(against)} |"
            )
        lines.append(f"| {phase} | floor | {_seconds(floor[phase])} | | | | | |")
    for name, arm in arms.items():
        lines.append(f"| **step** | {name} | {_spread(arm['seconds'])} | | | | {_times(result['ratio'].get(name))} |")
    lines.append(f"| **step** | floor | {_seconds(result['floor_seconds'])} | | | | | |")
    return "\n".join([*lines, "", *_notes(result)])


def _notes(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, arm in result["arms"].items():
        note = f"{name}: peak memory {arm['peak_memory_bytes'] / 2**30:.2f} GiB, {arm['repeats']} repeats"
        lines.append(f"{note}; {arm['extrapolated']}" if arm["extrapolated"] else note)
    for name, ratio in result["ratio"].items():
        spread = result["ratio_spread"][name]
        lines.append(f"ours is {ratio:.1f} times as fast as {name} ({spread['min']:.1f}..{spread['max']:.1f})")
    if "ours" in result["arms"]:
        times = result["arms"]["ours"]["seconds"]["median"] / result["floor_seconds"]
        lines.append(f"ours takes {times:.1f} times the floor")
    return lines


def _spread(seconds: Mapping[str, float]) -> str:
    return f"{_seconds(seconds['median'])} | {_seconds(seconds['min'])}..{_seconds(seconds['max'])}"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"
