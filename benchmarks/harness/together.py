"""Cells that only ask, several at a time: each in a process of its own, all on one model.

A process has its own random numbers, output, signals and libraries' settings, so cells cannot meet but in the model's
batches. An in-process model stays in the process that was started, and is asked from the others (`shared_model`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.bench import Bench
from benchmarks.harness.cells import Accuracy, Cell, CellKey
from benchmarks.harness.config import RunConfig
from benchmarks.harness.models import TaskModel, remote_task_model, task_model
from benchmarks.harness.shared_model import Door, RemoteEngine, SharedModel
from dspy_greater.errors import GreaterError

Known = Callable[[CellKey], Accuracy | None]

_FAREWELL = 10.0  # seconds for the processes to clean up after themselves, once no cell is left


@dataclass(frozen=True)
class Directions:
    """How another process finds the model."""

    door: Door
    name: str
    identity: str
    model_string: str
    sampling: Mapping[str, Any]

    def model(self, lane: str) -> TaskModel:
        """The model, with an account of the lane's own."""
        engine = RemoteEngine(self.door, lane)
        return remote_task_model(self.name, self.identity, self.model_string, engine, self.sampling)


def run_together(
    config: RunConfig, keys: Sequence[CellKey], known_seed: Known, begun: Callable[[CellKey], None]
) -> Iterator[Cell]:
    """The cells of these keys, as they finish. Close the iterator to end those that are under way.

    Args:
        config: of the run; `config.together` cells are under way at a time.
        keys: which cells, of optimizers that need no weights in their process.
        known_seed: the seed's accuracy on a cell's rows, once a cell that was yielded has measured it. Until then one
            cell of these rows is under way.
        begun: told of each cell that begins.

    Raises:
        WeightsError: the model cannot be loaded.
        GreaterError: a process was killed; what finished was yielded.
    """
    most, before, patience = min(config.together, len(keys)), set(multiprocessing.active_children()), 0.0
    with _opened(config) as directions:
        pool = ProcessPoolExecutor(
            max_workers=most,
            mp_context=multiprocessing.get_context("spawn"),  # threads of torch do not survive a fork
            initializer=_set_up,
            initargs=(config, directions),
        )
        try:
            yield from _finished(pool, most, list(keys), known_seed, begun)
            patience = _FAREWELL
        except BrokenProcessPool as error:
            raise GreaterError(
                f"A process that ran one of {most} cells at a time was killed, often for memory; the same command goes "
                "on from the last finished cell, with a smaller --together."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            until = time.monotonic() + patience
            for process in set(multiprocessing.active_children()) - before:
                process.join(max(0.0, until - time.monotonic()))
                process.terminate()  # a cell under way would not end by itself


def _finished(
    pool: ProcessPoolExecutor, most: int, waiting: list[CellKey], known_seed: Known, begun: Callable[[CellKey], None]
) -> Iterator[Cell]:
    running: dict[Future[Cell], CellKey] = {}
    while waiting or running:
        while len(running) < most and (key := _next(waiting, running.values(), known_seed)) is not None:
            waiting.remove(key)
            begun(key)
            running[pool.submit(_run_cell, key, known_seed(key))] = key
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: future.exception() is not None):  # what finished comes first
            del running[future]
            yield replace(future.result(), together=most, peak_memory_bytes=0)  # the weights are elsewhere


def _next(waiting: Sequence[CellKey], running: Iterable[CellKey], known_seed: Known) -> CellKey | None:
    """The first key whose seed is measured, or that nobody measures now."""
    busy = {(key.task, key.seed) for key in running}
    return next((key for key in waiting if known_seed(key) is not None or (key.task, key.seed) not in busy), None)


@contextlib.contextmanager
def _opened(config: RunConfig) -> Iterator[Directions | None]:
    """The model of the run behind a door; None for a served one, which every process asks by itself."""
    model = task_model(config.model, config.model_args)
    if model.engine is None:
        yield None
        return
    with SharedModel(model.engine).opened() as door:
        yield Directions(door, model.name, model.identity, model.judge.model, model.sampling)


_given: tuple[RunConfig, Directions | None] | None = None  # of a process of the pool


def _set_up(config: RunConfig, directions: Directions | None) -> None:
    """In each process, before its first cell."""
    global _given
    _given = config, directions
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_cell(key: CellKey, known_seed: Accuracy | None) -> Cell:
    if _given is None:
        raise GreaterError("This process was not set up to run cells; start them by run_together.")
    config, directions = _given
    model = None if directions is None else directions.model(f"{key.text} in process {os.getpid()}")
    return Bench(config, model).run(key, known_seed=known_seed)
