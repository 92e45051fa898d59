"""Repeats in which the arms take turns: seconds, counters and memory of each."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.speed import ours, plain, released
from benchmarks.speed.step import CLOCKS, PHASES, Arm, Clock, peak_memory, reset_peak_memory
from benchmarks.speed.work import Work
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine

ARMS: dict[str, Arm] = {"released": released.step, "plain": plain.step, "ours": ours.step}


@dataclass(frozen=True)
class Run:
    """One timed step of one arm. Where only a part was done, `seconds` are scaled up by `scale`."""

    arm: str
    seconds: dict[str, float]  # by phase
    counters: dict[str, Counters]  # by phase, as done
    peak_bytes: int
    rows_done: int
    rows: int

    @property
    def scale(self) -> float:
        """By how much the part that was done is smaller than the whole."""
        return self.rows / self.rows_done

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


def run_once(name: str, arm: Arm, engine: Engine, work: Work, *, rows_done: int, clock: str = "wall") -> Run:
    """Time one step, on the first `rows_done` rows."""
    part = work if rows_done >= len(work.rows) else work.first_rows(rows_done)
    gc.collect()
    reset_peak_memory(engine.weights.device)
    timed = Clock(engine, CLOCKS[clock])
    arm(engine, part, timed)
    scale = len(work.rows) / len(part.rows)
    return Run(
        arm=name,
        seconds={phase: scale * timed.seconds[phase] for phase in PHASES},
        counters=timed.counters,
        peak_bytes=peak_memory(engine.weights.device),
        rows_done=len(part.rows),
        rows=len(work.rows),
    )


def run_all(
    arms: Mapping[str, Arm],
    engine: Engine,
    work: Work,
    *,
    repeats: int,
    parts: Mapping[str, int],
    time_limit: float | None,
    after_repeat: Callable[[list[Run]], object],
    clock: str = "wall",
) -> list[Run]:
    """`repeats` rounds in which every arm runs once, a different one first each time.

    Args:
        parts: how many rows an arm does, where that is not all.
        time_limit: no round begins after so many seconds; the first always does.
        after_repeat: is given all runs so far.
        clock: one of `CLOCKS`.
    """
    runs: list[Run] = []
    names, started = list(arms), time.perf_counter()
    for repeat in range(repeats):
        if repeat and time_limit is not None and time.perf_counter() - started > time_limit:
            break
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            done = parts.get(name, len(work.rows))
            runs.append(run_once(name, arms[name], engine, work, rows_done=done, clock=clock))
        after_repeat(runs)
    return runs


@dataclass(frozen=True)
class Spread:
    """Median and range of some repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        """As it stands in the results."""
        return {"median": self.median, "min": self.least, "max": self.most}


def ratios(runs: list[Run], arm: str, to: str) -> Spread:
    """How many times as long `arm` takes as `to`, each pair within one round."""
    pairs = zip([run for run in runs if run.arm == arm], [run for run in runs if run.arm == to], strict=True)
    return Spread.of([one.total / other.total for one, other in pairs])
