"""Requests of many threads, answered in one batch.

Two ways to decide when a batch is full: by a moment of silence (ordinary serving), or exactly when every
worker of a lockstep group waits (the search, where batches must not depend on the timing of threads; see `lockstep`).
Neither owns a thread: one of the waiting callers leads and computes for all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from dspy_greater.errors import GreaterError
from dspy_greater.lm.lockstep import Lockstep, Ticket

Compute = Callable[[Sequence[Any]], Sequence[Any]]


class Batcher:
    """Coalesce blocking calls into batches; each caller gets its own result or the batch's error.

    Args:
        compute: requests -> results, in the same order; called by one thread at a time.
        window: seconds of silence after which a batch starts. A batch that is running collects the next.
        most_rows: a batch does not wait any longer once this many requests are there.

    Example:
        >>> Batcher(lambda requests: [2 * request for request in requests]).submit(21)
        42
    """

    def __init__(self, compute: Compute, *, window: float = 0.003, most_rows: int = 256) -> None:
        self._compute, self._window, self._most = compute, window, most_rows
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._led = False
        self._arrived = 0.0
        self._group: Lockstep | None = None
        self._group_turn = threading.Lock()  # held for as long as a group lasts
        self._group_owner: int | None = None
        self._sizes: deque[int] = deque(maxlen=10_000)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many requests each of the latest batches had, oldest first."""
        return tuple(self._sizes)

    def is_in_lockstep(self) -> bool:
        """Whether the calling thread is a worker of a lockstep group."""
        group = self._group
        return group is not None and group.has_this_thread()

    def submit(self, request: Any) -> Any:
        """Wait for this request's result; raises what computing its batch raised."""
        group = self._group
        if group is not None and group.has_this_thread():
            return group.submit(request)
        ticket = Ticket(request)
        with self._changed:
            self._waiting.append(ticket)
            self._arrived = time.monotonic()
            self._changed.notify_all()
            while self._led and not ticket.done:
                self._changed.wait()
            if not ticket.done:
                self._led = True
                ticket.leads = True
        if ticket.leads:
            try:
                self._answer(self._gather(), self._compute)
            finally:
                with self._changed:
                    self._led = False
                    self._changed.notify_all()
        return ticket.outcome()

    @contextmanager
    def lockstep(
        self, workers: int, *, stall_seconds: float = 60.0, compute: Compute | None = None
    ) -> Iterator[Lockstep]:
        """Batches that start exactly when all `workers` threads wait; see `Lockstep`. `compute` is the group's own.

        There is one group at a time: a second thread waits here until the first has left its block.

        Raises:
            GreaterError: the calling thread is in lockstep already, and would wait for itself.
        """
        me, current = threading.get_ident(), self._group
        if self._group_owner == me or (current is not None and current.has_this_thread()):
            raise GreaterError("This thread is in lockstep already on the same model; leave that block first.")
        group = Lockstep(partial(self._answer, compute=compute or self._compute), workers, stall_seconds)
        with self._group_turn:
            self._group_owner, self._group = me, group
            try:
                yield group
            finally:
                self._group_owner = self._group = None
                group.close()

    def _gather(self) -> list[Ticket]:
        """Take all requests once none has arrived for a moment."""
        with self._changed:
            while len(self._waiting) < self._most:
                rest = self._arrived + self._window - time.monotonic()
                if rest <= 0:
                    break
                self._changed.wait(rest)
            batch, self._waiting = self._waiting, []
        return batch

    def _answer(self, batch: Sequence[Ticket], compute: Compute) -> None:
        self._sizes.append(len(batch))
        try:
            results = compute([ticket.request for ticket in batch])
            for ticket, result in zip(batch, results, strict=True):
                ticket.result = result
        except BaseException as error:
            finished = getattr(error, "finished", {})  # by place: what one row cannot spoil for the others
            for place, ticket in enumerate(batch):
                ticket.result = finished.get(place)
                ticket.error = None if place in finished else error
            if not isinstance(error, Exception):
                raise  # an interrupt belongs to the thread it hit; the others hear of it in `Ticket.outcome`
        finally:
            for ticket in batch:
                ticket.done = True
