"""How a run deals with language models on servers: it waits for answers that do not come, and counts what was spent.

A row that no model answered is no row: it is asked again, past all caches, until it is answered, or until
`max_outage_seconds` have gone by without any answer; then `OutageError` ends whatever the row was for. What tells
an outage from a prompt that a server cannot take is a run that worked before: where that is answered, and the row
times out or breaks the server, again and again, the row is the prompt's fault.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dspy_greater.errors import OutageError
from dspy_greater.program.faults import ServerFault

_LOG = logging.getLogger(__name__)
_STRIKES = 3  # times that a row is asked again in vain while what worked before is answered
_OF_PROMPTS = ("server error", "timeout")  # what a prompt may bring about
_PASSING = ("rate limit", "server error", "timeout")  # worth waiting for where no server has ever answered
FIRST_WAIT = 0.2  # seconds; doubled from one try to the next
LONGEST_WAIT = 30.0


class Asked(Protocol):
    """What came of asking; where there are `faults`, nobody answered."""

    @property
    def faults(self) -> tuple[ServerFault, ...]: ...


Outcome = TypeVar("Outcome", bound=Asked)


@dataclass(frozen=True)
class Spent:
    """What language models on servers read and wrote, in tokens."""

    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        """
        >>> Spent(1, 2) + Spent(3, 4)
        Spent(prompt_tokens=4, generated_tokens=6)
        """
        return Spent(self.prompt_tokens + other.prompt_tokens, self.generated_tokens + other.generated_tokens)


class Servers:
    """The servers of a run: how long it waits for them, and what it counted; safe in threads.

    Args:
        max_outage_seconds: how long to wait for an answer.

    Attributes:
        spent: what they read and wrote in this process, as they say themselves.

    Example:
        >>> Servers(max_outage_seconds=60.0).faults
        {}
    """

    def __init__(self, max_outage_seconds: float = 0.0) -> None:
        self.max_outage_seconds = max_outage_seconds
        self.spent = Spent()
        self._faults: Counter[str] = Counter()
        self._answered = False
        self._lock = threading.Lock()

    @property
    def faults(self) -> dict[str, int]:
        """How many calls came to nothing in this process, by the kind of fault (`faults.ServerFault`)."""
        with self._lock:
            return dict(sorted(self._faults.items()))

    def stop_waiting(self) -> None:
        """An outage has ended the search: nobody waits for another."""
        self.max_outage_seconds = 0.0

    def count(self, spent: Spent) -> None:
        """Add to what was spent."""
        with self._lock:
            self.spent += spent

    def settled(
        self,
        done: Sequence[Outcome],
        again: Callable[[Sequence[int]], Sequence[Outcome]],
        *,
        probe: Callable[[], Asked] | None = None,
        must: Container[int] = (),
    ) -> list[Outcome]:
        """What came of asking, once everything is answered.

        Args:
            done: what came of it at first.
            again: asks those with these indices again, past all caches.
            probe: asks what was answered before; by default one of `done` that was.
            must: indices that may not stay without an answer, whatever they ask.

        Raises:
            OutageError: no answer came for `max_outage_seconds`.
        """
        found, waiting = list(done), self._unanswered(done, range(len(done)))
        if not waiting or self._hopeless(found, waiting):
            return found
        answered = next((index for index in range(len(found)) if index not in waiting), None)
        if probe is None and answered is not None:
            probe = _asking(again, answered)
        tries = _Tries(self.max_outage_seconds, found[waiting[0]].faults[-1], len(waiting))
        while waiting:
            tries.wait(found[waiting[0]].faults[-1])
            left = self._ask(found, again, waiting[:1])
            alive = not left or (probe is not None and not self._unanswered([probe()], [0]))
            rest = self._ask(found, again, waiting[1:]) if alive else waiting[1:]
            tries.count(progress=len(left) + len(rest) < len(waiting), alive=alive)
            waiting = [*rest, *left]  # another one first, the next time
            if tries.strikes >= _STRIKES and not any(at in must or not _of_prompt(found[at]) for at in waiting):
                break
        tries.over()
        return found

    def _ask(
        self, found: list[Outcome], again: Callable[[Sequence[int]], Sequence[Outcome]], indices: list[int]
    ) -> list[int]:
        """Ask again; which of these are still without an answer."""
        if not indices:
            return []
        for index, outcome in zip(indices, again(indices), strict=True):
            found[index] = outcome
        return self._unanswered(found, indices)

    def _unanswered(self, found: Sequence[Asked], indices: Iterable[int]) -> list[int]:
        indices = list(indices)
        with self._lock:
            self._faults.update(fault.kind for index in indices for fault in found[index].faults)
            waiting = [index for index in indices if found[index].faults]
            self._answered = self._answered or len(waiting) < len(indices)
        return waiting

    def _hopeless(self, found: Sequence[Asked], waiting: Sequence[int]) -> bool:
        """Whether no server ever answered, for a reason that waiting does not mend, such as an address."""
        if self._answered or len(waiting) < len(found):
            return False
        return all(fault.kind not in _PASSING for outcome in found for fault in outcome.faults)


class _Tries:
    """The waits of one outage, each twice as long as the one before."""

    def __init__(self, limit: float, first: ServerFault, rows: int) -> None:
        self._limit, self._delay, self._since = limit, FIRST_WAIT, time.monotonic()
        self.strikes = 0
        _LOG.warning(
            "No language model answered %d times; asking again for up to %g seconds: %s", rows, limit, first.text
        )

    def wait(self, fault: ServerFault) -> None:
        """Wait for the next try; raises `OutageError` where there is no time left."""
        now = time.monotonic()
        left = self._since + self._limit - now
        if left <= 0:
            raise OutageError(
                f"No language model answered for {now - self._since:.0f} seconds, and max_outage_seconds="
                f"{self._limit:g} ({fault.kind}); the last that was heard is {fault.text[:500]}\nAn outage says "
                "nothing of an instruction, so what was under way is given up. See to the server, or leave out the row "
                "that it cannot take. A run with a log_dir goes on from its last step once that works."
            )
        time.sleep(min(max(self._delay, fault.retry_after or 0.0), left))

    def count(self, *, progress: bool, alive: bool) -> None:
        """How a try went: whether anything was answered, and whether the server answers other things."""
        if progress:
            self._since, self._delay, self.strikes = time.monotonic(), FIRST_WAIT, 0
            return
        self._delay = min(2 * self._delay, LONGEST_WAIT)
        self.strikes = self.strikes + 1 if alive else 0

    def over(self) -> None:
        """Everything is answered, or cannot be."""
        _LOG.warning("The language model answers again." if self.strikes < _STRIKES else "Some prompts get no answer.")


def _asking(again: Callable[[Sequence[int]], Sequence[Outcome]], index: int) -> Callable[[], Outcome]:
    return lambda: again([index])[0]


def _of_prompt(asked: Asked) -> bool:
    return all(fault.kind in _OF_PROMPTS for fault in asked.faults)
