"""What every arm of the benchmark is given and what it has to come up with."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed.work import Work
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine

PHASES: tuple[str, ...] = ("proposals", "reasoning", "gradient", "scoring")

# The processor's clock leaves out what other programs take; on an accelerator only the wall clock means anything.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

Reasonings = tuple[tuple[int, ...], ...]  # one per row


@dataclass(frozen=True)
class RowLosses:
    """Cross-entropy of the answer and mean negative log-likelihood of the instruction, one per row, in nats."""

    cross_entropy: tuple[float, ...]  # [N]
    fluency_nll: tuple[float, ...]  # [N]


@dataclass(frozen=True)
class Step:
    """All that one step found out; two arms that did the same work have equal ones."""

    candidates: tuple[int, ...]  # [C] in the order in which they were proposed
    gradient: tuple[tuple[float, ...], ...]  # [N, C] relative to the current token's
    selected: tuple[int, ...]  # [mu] the best first
    current_reasoning: Reasonings
    reasoning: dict[int, Reasonings]  # of each selected candidate
    losses: dict[int, RowLosses]  # of each selected candidate


class Clock:
    """Seconds and counters of each phase of one step; the device is idle when a phase begins and ends."""

    def __init__(self, engine: Engine, now: Callable[[], float] = time.perf_counter) -> None:
        self._engine, self._now = engine, now
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.counters = dict.fromkeys(PHASES, Counters())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside counts for this phase."""
        synchronise(self._engine.weights.device)
        before, started = self._engine.counters, self._now()
        yield
        synchronise(self._engine.weights.device)
        self.seconds[name] += self._now() - started
        self.counters[name] += self._engine.counters - before


Arm = Callable[[Engine, Work, Clock], Step]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident peak starts again from now
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: the device's allocations, or on CPU the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
