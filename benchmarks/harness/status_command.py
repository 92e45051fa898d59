"""`python -m benchmarks status`: how far a run is, from its directory, while it goes on elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.cells import FILE, Cells
from benchmarks.harness.progress import Progress, under_way
from dspy_greater.errors import GreaterError


def main(argv: Sequence[str]) -> int:
    """Print a line for the finished cells and one for each that is under way; returns 0, or 2 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks status", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the run's directory")
    out: Path = parser.parse_args(argv).out
    if not (out / FILE).exists() and not (out / "logs").exists():
        sys.stderr.write(f"No run is in {out}: it has no {FILE} and no logs. Give the --out of `benchmarks run`.\n")
        return 2
    try:
        finished = list(Cells(out))
        lines = [told(progress, time.time()) for progress in under_way(out)]
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    failed = sum(cell.error is not None for cell in finished)
    said = f"{len(finished)} cell{'' if len(finished) == 1 else 's'} finished, {failed} with an error"
    sys.stdout.write("\n".join([said, *lines]) + "\n")
    return 0


def told(progress: Progress, now: float) -> str:
    """A cell under way on one line.

    >>> told(Progress("gsm8k · apo · seed 0", 20_000, 80_000, 600.0, 3, 0.25, 40, False, 0.0), now=2.0)
    'gsm8k · apo · seed 0: 20,000 of 80,000 tokens, 10 min, 3 candidates, best 25 % of 40 rows, some 30 min left'
    """
    said = f"{progress.cell}: {progress.charged:,} of {progress.limit:,} tokens, {progress.seconds / 60:.0f} min"
    said += f", {progress.scored} candidate{'' if progress.scored == 1 else 's'}"
    if progress.best is not None:
        said += f", best {100 * progress.best:.0f} % of {progress.best_rows} rows"
    if (silent := progress.silent(now)) is not None:
        return f"{said}; nothing was heard of it for {silent / 60:.0f} min, it may have been killed"
    if progress.judging:
        return f"{said}, being judged"
    return said if progress.left is None else f"{said}, some {progress.left / 60:.0f} min left"
