"""Threads whose requests are computed together exactly when all of them wait, whatever their timing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dspy_greater.errors import GreaterError, SettingsError


class Ticket:
    """One caller's request and, later, its outcome."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.leads = False

    def outcome(self) -> Any:
        """The result; raises what went wrong instead."""
        if self.error is None:
            return self.result
        if isinstance(self.error, Exception) or self.leads:
            raise self.error
        raise GreaterError("The thread that computed this batch was interrupted; call again.") from self.error


class Lockstep:
    """A group of worker threads whose requests are computed together, once all of them wait.

    Every one of the `workers` threads enters `worker()` once, for as long as it lives; a thread that has
    not entered yet is waited for, one that has left is not. So the batches, and with them every bit of the
    results, follow from what the workers ask and not from how fast they are. A worker that asks nothing
    for `stall_seconds` (a slow tool, a lock that another worker holds) is no longer waited for in that
    batch; `stalls` counts these.
    """

    def __init__(self, answer: Callable[[Sequence[Ticket]], None], workers: int, stall_seconds: float) -> None:
        if workers < 1:
            raise SettingsError(f"A lockstep group of {workers} workers cannot run; it needs at least one.")
        self._answer, self._workers, self._live = answer, workers, workers
        self._patience = stall_seconds
        self._changed = threading.Condition()
        self._members: set[int] = set()
        self._entered = 0
        self._waiting: list[Ticket] = []
        self._computing = False
        self._closed = False
        self._progress = time.monotonic()
        self.stalls = 0

    def has_this_thread(self) -> bool:
        """Whether the calling thread is a worker of this group."""
        return threading.get_ident() in self._members

    @contextmanager
    def worker(self) -> Iterator[None]:
        """The calling thread is one of the workers while this block lasts.

        Raises:
            GreaterError: more threads enter than were announced, or this one is inside already.
        """
        me = threading.get_ident()
        with self._changed:
            if self._entered >= self._workers or me in self._members:
                raise GreaterError(
                    f"A lockstep group of {self._workers} workers takes {self._workers} threads, each once; "
                    "announce as many workers as there are threads that enter."
                )
            self._entered += 1
            self._members.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._members.discard(me)
                self._live -= 1
                self._notify_if_full()

    def submit(self, request: Any) -> Any:
        """Wait until every live worker waits, then for the result."""
        ticket = Ticket(request)
        with self._changed:
            self._waiting.append(ticket)
            self._progress = time.monotonic()
            try:
                # The last to arrive finds the batch full and leads it.
                while not ticket.done and not self._ready():
                    self._wait()
            except BaseException:  # an interrupt: nobody waits for this any more
                self._waiting = [other for other in self._waiting if other is not ticket]
                raise
            batch = [] if ticket.done else self._waiting
            if batch:
                self._waiting, self._computing = [], True
        if batch:
            self._lead(batch)
        return ticket.outcome()

    def close(self) -> None:
        """Compute what still waits without waiting for anyone else."""
        with self._changed:
            self._closed = True
            self._notify_if_full()

    def _lead(self, batch: Sequence[Ticket]) -> None:
        try:
            self._answer(batch)
        finally:
            with self._changed:
                self._computing = False
                self._progress = time.monotonic()
                self._changed.notify_all()

    def _wait(self) -> None:
        """Until something has changed, or for a while; the caller holds the lock."""
        self._changed.wait(min(1.0, self._patience))

    def _notify_if_full(self) -> None:
        """Where all who are left wait already, one of them leads; the caller holds the lock."""
        if self._full():
            self._changed.notify_all()

    def _full(self) -> bool:
        return bool(self._waiting) and (self._closed or len(self._waiting) >= self._live)

    def _ready(self) -> bool:
        """Whether the calling waiter may lead now; the caller holds the lock."""
        if self._computing or not self._waiting:
            return False
        if self._full():
            return True
        stalled = time.monotonic() - self._progress > self._patience
        self.stalls += stalled
        return stalled
