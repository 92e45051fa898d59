"""How far the cells of a run are: each keeps a small file while it is under way, and `status` reads them.

A killed cell leaves its file behind. It is told by its age: a file is written anew every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.budget import Budget
from dspy_greater.errors import RunDirectoryError

FILE = "progress.json"
EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Progress:
    """A cell under way.

    Attributes:
        cell: in words.
        charged: tokens so far.
        limit: the budget.
        seconds: since the cell began.
        scored: how many different candidates were recorded.
        best: mean score of the best of them, on `best_rows` rows; None before the first.
        best_rows: how many.
        judging: whether the optimizer's turn is over.
        written: when, in seconds since 1970.
    """

    cell: str
    charged: int
    limit: int
    seconds: float
    scored: int
    best: float | None
    best_rows: int
    judging: bool
    written: float

    @classmethod
    def of(cls, cell: str, budget: Budget) -> Progress:
        """What the cell's budget knows now."""
        best = next(iter(budget.notebook.best(1)), None)
        return cls(
            cell=cell,
            charged=budget.spent.charged,
            limit=budget.limit,
            seconds=budget.seconds,
            scored=len(budget.notebook),
            best=best.score if best else None,
            best_rows=best.rows if best else 0,
            judging=budget.closed,
            written=time.time(),
        )

    def silent(self, now: float) -> float | None:
        """For how many seconds nothing was written, where that is longer than a cell that lives would take."""
        return now - self.written if now - self.written > 4 * EVERY else None

    @property
    def left(self) -> float | None:
        """Seconds until the budget is spent at the pace so far; None where nothing is spent yet, or no more will be."""
        if not self.charged or self.judging:
            return None
        return max(0, self.limit - self.charged) * self.seconds / self.charged


@contextlib.contextmanager
def progress_kept(directory: Path, cell: str, budget: Budget, every: float = EVERY) -> Iterator[None]:
    """Keeps the cell's file in its directory for as long as the block lasts."""
    over = threading.Event()

    def keep() -> None:
        while True:
            with contextlib.suppress(OSError):  # a full disk ends no cell
                _write(directory / FILE, Progress.of(cell, budget))
            if over.wait(every):
                return

    writer = threading.Thread(target=keep, name="cell-progress", daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()
        (directory / FILE).unlink(missing_ok=True)


def under_way(out: Path) -> list[Progress]:
    """The cells of a run directory that have such a file, those that were killed too.

    Raises:
        RunDirectoryError: a file is something else.
    """
    found = [_read(path) for path in sorted(out.glob(f"logs/*/{FILE}"))]
    return [progress for progress in found if progress is not None]


def _write(path: Path, progress: Progress) -> None:
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    whole.replace(path)  # nobody reads half of it


def _read(path: Path) -> Progress | None:
    """None where the cell came to its end just now."""
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} does not tell how far a cell is ({error}); remove it.") from error
