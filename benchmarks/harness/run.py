"""All cells of a run that are not finished: one after another, or several at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence

from benchmarks.harness.bench import Bench
from benchmarks.harness.cells import Accuracy, Cell, CellKey, Cells
from benchmarks.harness.config import RunConfig
from benchmarks.harness.together import run_together
from benchmarks.optimizers.optimizer import needs_weights


def run_all(config: RunConfig, say: Callable[[str], None]) -> int:
    """Run every cell that is not finished; returns how many failed.

    They run one after another, those that only ask `config.together` at a time after the others.

    Args:
        config: which cells.
        say: takes one line of progress for each cell.

    Raises:
        GreaterError: the run directory cannot be used, or the model cannot be loaded.
    """
    cells, keys, failed = Cells(config.out), config.keys(), 0
    place = {key: f"[{number}/{len(keys)}] {key.text}" for number, key in enumerate(keys, start=1)}
    left: list[CellKey] = []
    for key in keys:
        known = cells.finished(key)
        if known is None or (known.error and config.retry_errors):
            left.append(key)
        else:
            say(f"{place[key]}: {summary(known)}, finished before")
    running = _run(config, left, lambda key: _known_seed(cells, key), lambda key: say(f"{place[key]} ..."))
    with contextlib.closing(running):
        for cell in running:
            cells.append(cell)
            failed += cell.error is not None
            say(f"{place[cell.key]}: {summary(cell)}")
    return failed


def _run(
    config: RunConfig,
    keys: Sequence[CellKey],
    known_seed: Callable[[CellKey], Accuracy | None],
    begun: Callable[[CellKey], None],
) -> Generator[Cell]:
    """The cells of these keys, as they finish."""
    together = [key for key in keys if config.together > 1 and not needs_weights(key.optimizer)]
    bench = Bench(config)
    for key in keys:
        if key not in together:
            begun(key)
            yield bench.run(key, known_seed=known_seed(key))
    if together:
        yield from run_together(config, together, known_seed, begun)


def summary(cell: Cell) -> str:
    """A finished cell in a few words."""
    if cell.error is not None:
        return f"failed: {cell.error.splitlines()[0][:200]}"
    before = f"{100 * cell.seed_test.accuracy:.0f} %" if cell.seed_test else "?"
    after = f"{100 * cell.test.accuracy:.0f} %" if cell.test else "?"
    stopped = f", stopped by {cell.stopped}" if cell.stopped else ""
    return f"{before} -> {after}, {cell.tokens['charged']:,} tokens, {cell.seconds:.0f} s{stopped}"


def _known_seed(cells: Cells, key: CellKey) -> Accuracy | None:
    """The seed's accuracy on the same test rows, if a cell of this directory has measured it."""

    def rows(key: CellKey) -> tuple[object, ...]:
        return key.task, key.seed, key.model, key.model_args, key.limit

    measured = (cell.seed_test for cell in cells if rows(cell.key) == rows(key))
    return next((accuracy for accuracy in measured if accuracy is not None), None)
