"""Jobs are dealt to whichever worker is free; answers come back in the order of the jobs.

A worker that dies is replaced, and its job is done again. A job is whole, so the answer is the same.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from dspy_greater.errors import WorkerError, WorkerLostError
from dspy_greater.notices import warn_caller
from dspy_greater.workers.jobs import Answer, Job

_LOG = logging.getLogger(__name__)
_MOST_LOSSES = 3  # workers that one job may take along


class Worker(Protocol):
    """Something with the weights that does jobs, one at a time."""

    @property
    def device(self) -> str:
        """What it computes on, such as "cpu" or the name of an accelerator."""
        ...

    def submit(self, job: Job) -> Future[Answer]:
        """Begin a job. The future raises what the job raised, or `WorkerLostError` where the worker died."""
        ...

    def close(self) -> None:
        """End the worker; it may be dead already."""
        ...


class Pool:
    """Workers over the same weights.

    Args:
        workers: at least one.
        hire: starts another, in the place of one that died; raises `WorkerError` where that cannot be.
        close: is called once the workers are closed.

    Warns where the workers compute on unlike devices.
    """

    def __init__(
        self, workers: Sequence[Worker], hire: Callable[[], Worker], close: Callable[[], object] = lambda: None
    ) -> None:
        self._workers, self._hire, self._close = list(workers), hire, close
        _warn_of_unlike([hired.device for hired in self._workers])

    def do(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers, in the order of the jobs.

        Raises:
            WorkerError: a job ended several workers, or none is left.
            GreaterError: what a job raised.
        """
        waiting, losses = deque(range(len(jobs))), Counter[int]()
        answers: dict[int, Answer] = {}
        running: dict[Future[Answer], tuple[int, Worker]] = {}
        free = deque(self._workers)
        while len(answers) < len(jobs):
            while free and waiting:
                place, worker = waiting.popleft(), free.popleft()
                running[worker.submit(jobs[place])] = (place, worker)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                place, worker = running.pop(done)
                try:
                    answers[place] = done.result()
                    free.append(worker)
                except WorkerLostError as lost:
                    losses[place] += 1
                    _refuse_deadly(jobs[place], losses[place], lost)
                    waiting.appendleft(place)
                    free.extend(self._replaced(worker, lost))
        return [answers[place] for place in range(len(jobs))]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._close()

    def _replaced(self, worker: Worker, lost: WorkerLostError) -> list[Worker]:
        """Another worker, or none where none is to be had and others are left."""
        worker.close()
        self._workers.remove(worker)
        _LOG.warning("A worker died, and its batch is done again: %s", lost)
        try:
            another = self._hire()
        except WorkerError as error:
            if not self._workers:
                raise
            warn_caller(f"A worker died and could not be replaced; {len(self._workers)} go on. {error}", RuntimeWarning)
            return []
        self._workers.append(another)
        _warn_of_unlike([hired.device for hired in self._workers])
        return [another]


def _refuse_deadly(job: Job, losses: int, lost: WorkerLostError) -> None:
    if losses >= _MOST_LOSSES:
        raise WorkerError(
            f"{losses} workers died one after the other of the same batch, {job.size}; the last: {lost} "
            "If their memory is too small, use fewer workers on a machine, a smaller dtype such as bfloat16, or "
            "shorter inputs."
        ) from lost


def _warn_of_unlike(devices: Sequence[str]) -> None:
    counts = Counter(devices)
    if len(counts) > 1:
        listed = ", ".join(f"{count} on {device}" for device, count in sorted(counts.items()))
        warn_caller(
            f"The workers compute on unlike devices: {listed}. Which of them gets a batch is a matter of time, and "
            "their rounding differs, so that a search may differ from run to run.",
            RuntimeWarning,
        )
