"""Requests of many threads, answered in one batch.

Two ways to decide when a batch is full: by a moment of silence (ordinary serving), or exactly when every
worker of a lockstep group waits (the search, where batches must not depend on the timing of threads).
Neither owns a thread: one of the waiting callers leads and computes for all.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from dspy_greater.errors import GreaterError, SettingsError

Compute = Callable[[Sequence[Any]], Sequence[Any]]


class _Ticket:
    """One caller's request and, later, its outcome."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.leads = False
        self._asleep = threading.Lock()  # every waiter has its own: 150 that wake by one condition queue for its lock
        self._asleep.acquire()

    def awake(self, timeout: float) -> bool:
        """Sleep until `wake` is called; False: for `timeout` seconds it was not."""
        return self._asleep.acquire(timeout=timeout)

    def wake(self) -> None:
        """End the sleep of the thread that waits for this, or its next one."""
        with contextlib.suppress(RuntimeError):  # it was woken already
            self._asleep.release()


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
        self._waiting: list[_Ticket] = []
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
        ticket = _Ticket(request)
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
        return _outcome(ticket)

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

    def _gather(self) -> list[_Ticket]:
        """Take all requests once none has arrived for a moment."""
        with self._changed:
            while len(self._waiting) < self._most:
                rest = self._arrived + self._window - time.monotonic()
                if rest <= 0:
                    break
                self._changed.wait(rest)
            batch, self._waiting = self._waiting, []
        return batch

    def _answer(self, batch: Sequence[_Ticket], compute: Compute) -> None:
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
                raise  # an interrupt belongs to the thread it hit; the others hear of it in `_outcome`
        finally:
            for ticket in batch:
                ticket.done = True


class Lockstep:
    """A group of worker threads whose requests are computed together, once all of them wait.

    Every one of the `workers` threads enters `worker()` once, for as long as it lives; a thread that has
    not entered yet is waited for, one that has left is not. So the batches, and with them every bit of the
    results, follow from what the workers ask and not from how fast they are. A worker that asks nothing
    for `stall_seconds` (a slow tool, a lock that another worker holds) is no longer waited for in that
    batch; `stalls` counts these.
    """

    def __init__(self, answer: Callable[[Sequence[_Ticket]], None], workers: int, stall_seconds: float) -> None:
        if workers < 1:
            raise SettingsError(f"A lockstep group of {workers} workers cannot run; it needs at least one.")
        self._answer, self._workers, self._live = answer, workers, workers
        self._patience = stall_seconds
        self._changing = threading.Lock()
        self._members: set[int] = set()
        self._entered = 0
        self._waiting: list[_Ticket] = []
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
        with self._changing:
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
            with self._changing:
                self._members.discard(me)
                self._live -= 1
                self._wake_one()

    def submit(self, request: Any) -> Any:
        """Wait until every live worker waits, then for the result."""
        ticket = _Ticket(request)
        with self._changing:
            self._waiting.append(ticket)
            self._progress = time.monotonic()
            batch = self._taken()  # the last to arrive finds the batch full and leads it
        try:
            while not batch and not ticket.done:
                if not ticket.awake(timeout=min(1.0, self._patience)) or not ticket.done:
                    with self._changing:
                        batch = [] if ticket.done else self._taken()
        except BaseException:  # an interrupt: nobody waits for this any more
            with self._changing:
                self._waiting = [each for each in self._waiting if each is not ticket]
            raise
        if batch:
            self._lead(batch)
        return _outcome(ticket)

    def close(self) -> None:
        """Compute what still waits without waiting for anyone else."""
        with self._changing:
            self._closed = True
            self._wake_one()

    def _lead(self, batch: Sequence[_Ticket]) -> None:
        try:
            self._answer(batch)
        finally:
            with self._changing:
                self._computing = False
                self._progress = time.monotonic()
                self._wake_one()
            for ticket in batch:
                ticket.wake()

    def _taken(self) -> list[_Ticket]:
        """The batch that the calling waiter leads from now on, or nothing; the caller holds the lock."""
        if not self._ready():
            return []
        self._computing = True
        batch, self._waiting = self._waiting, []
        return batch

    def _wake_one(self) -> None:
        """Where all who are left wait already, one of them leads; the caller holds the lock."""
        if self._waiting and (self._closed or len(self._waiting) >= self._live):
            self._waiting[0].wake()

    def _ready(self) -> bool:
        """Whether the calling waiter may lead now; the caller holds the lock."""
        if self._computing or not self._waiting:
            return False
        if self._closed or len(self._waiting) >= self._live:
            return True
        stalled = time.monotonic() - self._progress > self._patience
        self.stalls += stalled
        return stalled


def _outcome(ticket: _Ticket) -> Any:
    error = ticket.error
    if error is None:
        return ticket.result
    if isinstance(error, Exception) or ticket.leads:
        raise error
    raise GreaterError("The thread that computed this batch was interrupted; call again.") from error
