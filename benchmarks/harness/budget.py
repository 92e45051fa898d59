"""The one budget of a cell: what is charged to an optimizer, and when it has had its share.

Charged are tokens of the task model: generated + prefilled + 2 x backward. A token that a gradient went back
through is thus counted three times, once in the forward pass (it was prefilled) and twice in the backward pass.
In-process models are read from the engine's own counters, whoever made it compute; of a served model the usage that
it reports counts. What the proposer reads and writes is counted beside it, and charged to nobody, unless it is the task
model itself (`--prompt-model self`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from benchmarks.harness.candidates import Notebook
from dspy_greater.errors import SettingsError
from dspy_greater.model.counters import Counters

if TYPE_CHECKING:
    import dspy


class BudgetSpent(BaseException):
    """The cell's tokens or seconds are spent.

    Not an `Exception`: optimizers and `dspy.Evaluate` take those for a row that failed, and go on.
    """


@dataclass(frozen=True)
class Usage:
    """What a model read and wrote, in tokens, and in how many calls."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Spent:
    """What a cell has cost so far.

    Example:
        >>> Spent(generated=10, prefilled=100, backward=20).charged
        150
    """

    generated: int = 0
    prefilled: int = 0
    backward: int = 0

    @property
    def charged(self) -> int:
        """generated + prefilled + 2 x backward."""
        return self.generated + self.prefilled + 2 * self.backward

    def as_json(self) -> dict[str, int]:
        """The parts and their sum."""
        return {"charged": self.charged, **asdict(self)}


def no_counters() -> Counters:
    """The counters of a task model that runs elsewhere."""
    return Counters()


class Budget:
    """What an optimizer may still use, and what it has found so far.

    Args:
        limit: charged tokens.
        counters: a snapshot of the in-process task model's counters.
        seconds: how long the optimizer may take; a last resort against one that never comes back.

    Example:
        >>> budget = Budget(100)
        >>> budget.add_served(Usage(1, 80, 30))
        >>> budget.check()
        Traceback (most recent call last):
        ...
        benchmarks.harness.budget.BudgetSpent: The budget of 100 tokens is spent (110).
    """

    def __init__(
        self, limit: int, *, counters: Callable[[], Counters] = no_counters, seconds: float | None = None
    ) -> None:
        if limit < 1:
            raise SettingsError(f"A budget of {limit} tokens buys nothing; give a positive number.")
        self.limit = limit
        self._counters, self._before = counters, counters()
        self._started, self._seconds = time.monotonic(), seconds
        self._lock = threading.Lock()
        self._served, self._proposer = Usage(), Usage()
        self._final: Spent | None = None
        self._stopped: str | None = None
        self.notebook = Notebook()

    @property
    def spent(self) -> Spent:
        """What has been computed for the optimizer up to now, or up to `close`."""
        if self._final is not None:
            return self._final
        used = self._counters() - self._before
        return Spent(
            generated=used.generated_tokens + self._served.completion_tokens,
            prefilled=used.prefilled_tokens + self._served.prompt_tokens,
            backward=used.backward_tokens,
        )

    @property
    def remaining(self) -> int:
        """Tokens that are left; never negative."""
        return max(0, self.limit - self.spent.charged)

    @property
    def proposer(self) -> Usage:
        """What the proposer read and wrote; charged only where it is the task model itself."""
        return self._proposer

    @property
    def seconds(self) -> float:
        """How long the optimizer has been at work."""
        return time.monotonic() - self._started

    @property
    def stopped(self) -> str | None:
        """`tokens` or `seconds` when a call was refused for the lack of them; None while there was enough."""
        return self._stopped

    @property
    def closed(self) -> bool:
        """Whether the optimizer's turn is over."""
        return self._final is not None

    def check(self) -> None:
        """Called before every call of the task model.

        Raises:
            BudgetSpent: nothing is left, or the optimizer's time in the cell is over.
        """
        if self._final is not None:
            raise BudgetSpent("The optimizer's turn is over; its program is being judged.")
        charged = self.spent.charged
        if charged >= self.limit:
            self._stopped = self._stopped or "tokens"
            raise BudgetSpent(f"The budget of {self.limit} tokens is spent ({charged}).")
        if self._seconds is not None and self.seconds >= self._seconds:
            self.out_of_time()

    def out_of_time(self) -> None:
        """Raises `BudgetSpent` for the time limit, and says so in the cell's row."""
        self._stopped = self._stopped or "seconds"
        raise BudgetSpent(f"The time limit of {self._seconds:.0f} s is reached.")

    def record(self, program: dspy.Module | Mapping[str, str], score: float, rows: int) -> None:
        """Report a candidate and its score: the mean of the metric, from 0 to 1, over that many rows.

        The best of what was recorded is what a stopped optimizer is judged by. `dspy.Evaluate` reports by itself.

        Args:
            program: a program, or a mapping from predictor name to instruction.
            score: mean over the rows.
            rows: how many.

        Raises:
            DataError: not a score from 0 to 1, or no rows.
        """
        if self._final is None:
            self.notebook.record(program, score, rows)

    def add_served(self, usage: Usage) -> None:
        """Charge what a served task model says it read and wrote."""
        with self._lock:
            self._served = self._served + usage

    def add_proposer(self, usage: Usage) -> None:
        """Count what the proposer read and wrote."""
        with self._lock:
            self._proposer = self._proposer + usage

    def close(self) -> Spent:
        """End the optimizer's turn: the account is final, and every further call of the task model is refused."""
        if self._final is None:
            self._final = self.spent
        return self._final
