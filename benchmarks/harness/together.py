"""Cells that only ask, several at a time: each in a process of its own, all on one model.

A process has its own random numbers, output, signals and libraries' settings, so cells cannot meet but in the model's
batches. An in-process model stays in the process that was started, and is asked from the others (`shared_model`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class _Shared:
    """What a process has to know of a model that it asks for."""

    door: Door
    name: str
    identity: str
    string: str
    sampling: Mapping[str, Any]

    def model(self) -> TaskModel:
        engine = RemoteEngine(self.door, f"process {os.getpid()}")
        return remote_task_model(self.name, self.identity, self.string, engine, self.sampling)


def run_together(
    config: RunConfig, keys: Sequence[CellKey], known_seed: Known, begun: Callable[[CellKey], None]
) -> Iterator[Cell]:
    """The cells of these keys, as they finish.

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
    with _shared(config) as shared:
        pool = ProcessPoolExecutor(
            max_workers=min(config.together, len(keys)),
            mp_context=multiprocessing.get_context("spawn"),  # threads of torch do not survive a fork
            initializer=_begin,
            initargs=(config, shared),
        )
        try:
            yield from _finished(pool, config.together, list(keys), known_seed, begun)
        except BrokenProcessPool as error:
            raise GreaterError(
                f"A process that ran one of {config.together} cells at a time was killed, often for memory; the same "
                "command goes on from the last finished cell, with a smaller --together."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(
    pool: ProcessPoolExecutor, most: int, waiting: list[CellKey], known_seed: Known, begun: Callable[[CellKey], None]
) -> Iterator[Cell]:
    running: dict[Future[Cell], CellKey] = {}
    while waiting or running:
        while len(running) < most and (key := _next(waiting, running.values(), known_seed)) is not None:
            waiting.remove(key)
            begun(key)
            running[pool.submit(_cell, key, known_seed(key))] = key
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            del running[future]
            yield replace(future.result(), together=most)


def _next(waiting: Sequence[CellKey], running: Any, known_seed: Known) -> CellKey | None:
    """The first key whose seed is measured, or that nobody measures now."""
    busy = {(key.task, key.seed) for key in running}
    return next((key for key in waiting if known_seed(key) is not None or (key.task, key.seed) not in busy), None)


@contextlib.contextmanager
def _shared(config: RunConfig) -> Iterator[_Shared | None]:
    """The model of the run behind a door; None for a served one, which every process asks by itself."""
    model = task_model(config.model, config.model_args)
    if model.engine is None:
        yield None
        return
    with SharedModel(model.engine).opened() as door:
        yield _Shared(door, model.name, model.identity, model.judge.model, model.sampling)


_bench: Bench | None = None  # of a process of the pool


def _begin(config: RunConfig, shared: _Shared | None) -> None:
    global _bench
    _bench = Bench(config, None if shared is None else shared.model())


def _cell(key: CellKey, known_seed: Accuracy | None) -> Cell:
    if _bench is None:
        raise GreaterError("This process was not set up to run cells.")
    return _bench.run(key, known_seed=known_seed)
