"""One cell: an optimizer on a task under a budget, and what it found, judged."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import dspy

from benchmarks.harness import machine
from benchmarks.harness.adapter import SearchAdapter
from benchmarks.harness.budget import Budget, BudgetSpent, Spent
from benchmarks.harness.candidates import EvaluationWatch, instructions_of
from benchmarks.harness.cells import Accuracy, Cell, CellKey
from benchmarks.harness.config import RunConfig
from benchmarks.harness.judging import Verdict, accuracy, decide
from benchmarks.harness.models import TaskModel, prompt_model, task_model
from benchmarks.harness.patience import rows_run_once
from benchmarks.harness.progress import progress_kept
from benchmarks.harness.provider import served
from benchmarks.optimizers import Context, DescribeTask, make
from benchmarks.tasks.registry import load
from benchmarks.tasks.task import Task
from dspy_greater.errors import ProgramError

ALARM_GRACE = 60.0  # seconds after the limit at which a main thread that asks nothing of the model is interrupted
ALARM_AGAIN = 10.0
LONGEST_NAME = 200  # bytes of a folder's name


@dataclass(frozen=True)
class Searched:
    """What came out of an optimizer's turn."""

    program: dspy.Module | None
    spent: Spent
    seconds: float
    peak_memory: int
    error: str | None


class Bench:
    """Runs cells on one task model, which is loaded when the first cell needs it unless it is given."""

    def __init__(self, config: RunConfig, model: TaskModel | None = None) -> None:
        self._config = config
        self._model = model

    def run(self, key: CellKey, *, known_seed: Accuracy | None = None) -> Cell:
        """One cell from beginning to end; what fails in it is its `error`.

        Raises:
            WeightsError: the model cannot be loaded, which no other cell could mend.
            KeyboardInterrupt: the user's.
        """
        with seeded(key.seed):
            if self._model is None:
                self._model = task_model(key.model, self._config.model_args)
            cell = Cell(key, model_identity=self._model.identity, versions=machine.versions())
            try:
                cell = self._run(cell, self._model, known_seed)
            except Exception as error:
                cell = replace(cell, error=described(error))
        return replace(cell, finished=datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def _run(self, cell: Cell, model: TaskModel, known_seed: Accuracy | None) -> Cell:
        config, key = self._config, cell.key
        task = load(key.task, data_dir=config.data_dir, seed=key.seed, limit=key.limit)
        rows = {"train": len(task.train), "dev": len(task.dev), "test": len(task.test), "source": task.source}
        cell = replace(cell, rows=rows)
        budget = Budget(key.budget, counters=model.counters, seconds=config.time_limit)
        directory = fresh_directory(config.out / "logs", key)
        adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
        with (
            progress_kept(directory, key.text, budget),
            dspy.context(adapter=adapter, num_threads=config.threads, max_errors=1_000_000),
            quiet(directory),
        ):
            searched = self._search(task, key, model, budget, directory)
            cell = replace(
                cell,
                tokens=searched.spent.as_json(),
                proposer_tokens=asdict(budget.proposer),
                seconds=round(searched.seconds, 3),
                peak_memory_bytes=searched.peak_memory,
                stopped=budget.stopped,
                scored_candidates=len(budget.notebook),
                error=searched.error,
            )
            started = time.monotonic()
            try:
                with dspy.context(lm=model.judge):
                    cell = self._judged(cell, task, searched.program, budget, known_seed)
            except Exception as error:  # what the search cost stays in the row
                cell = replace(cell, error=described(error))
        return replace(cell, judging_seconds=round(time.monotonic() - started, 3))

    def _search(self, task: Task, key: CellKey, model: TaskModel, budget: Budget, directory: Path) -> Searched:
        """The optimizer's turn, which ends with its return, its budget, its time or its error."""
        optimizer, student = make(key.optimizer), task.make_program()
        config = self._config
        lm = model.metered(budget)
        proposer = prompt_model(config.prompt_model, key.seed, budget, model, config.prompt_args)
        error: str | None = None
        program: dspy.Module | None = None
        machine.forget_peak_memory()
        watch = EvaluationWatch(budget.notebook, student)
        with (
            served("task", lm) as task_name,
            served("proposer", proposer) as prompt_name,
            dspy.context(lm=lm, callbacks=[watch], adapter=SearchAdapter(student)),
            seeded(key.seed),
            rows_run_once(),
            alarm(budget, self._config.time_limit),
        ):
            context = Context(
                metric=task.metric,
                task_lm=lm,
                prompt_lm=proposer,
                seed=key.seed,
                log_dir=directory,
                budget=budget,
                requests=DescribeTask(task.name, task.about, task.seed_instruction),
                task_lm_name=task_name,
                prompt_lm_name=prompt_name,
            )
            try:
                program = optimizer.optimise(student, task.train, task.dev, context)
            except BudgetSpent:
                pass
            except Exception as failure:
                # Once calls are refused, whatever an optimizer makes of that is the end of its turn.
                error = None if budget.stopped else described(failure)
                (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        seconds = budget.seconds
        return Searched(program, budget.close(), seconds, machine.peak_memory(), error)

    def _judged(
        self, cell: Cell, task: Task, program: dspy.Module | None, budget: Budget, known_seed: Accuracy | None
    ) -> Cell:
        """Dev decides, test is looked at once. A cell with an error shows the seed's accuracy alone."""
        threads = self._config.threads
        seed_test = known_seed or accuracy(task.make_program(), task.test, task.metric, threads)
        cell = replace(cell, seed_test=seed_test)
        if cell.error is not None:
            return cell
        if program is not None and not isinstance(program, dspy.Module):
            return replace(cell, error=f"TypeError: the optimizer returned a {type(program).__name__}, not a program")

        def on_dev(candidate: dspy.Module) -> float:
            return accuracy(candidate, task.dev, task.metric, threads).accuracy

        verdict = decide(task.make_program(), program, budget.notebook.best(20), _zero_where_broken(on_dev))
        return replace(cell, test=self._tested(verdict, task, seed_test), **_chosen(verdict))

    def _tested(self, verdict: Verdict, task: Task, seed_test: Accuracy) -> Accuracy:
        if verdict.origin == "seed":
            return seed_test
        return accuracy(verdict.program, task.test, task.metric, self._config.threads)


def _zero_where_broken(score: Callable[[dspy.Module], float]) -> Callable[[dspy.Module], float]:
    """The seed has run on the test rows already; a candidate that cannot run at all is the optimizer's own fault."""

    def scored(program: dspy.Module) -> float:
        try:
            return score(program)
        except ProgramError:
            return 0.0

    return scored


def _chosen(verdict: Verdict) -> dict[str, Any]:
    return {
        "chosen": verdict.origin,
        "contenders": verdict.contenders,
        "instructions": instructions_of(verdict.program),
    }


def described(error: BaseException) -> str:
    """`Type: message`."""
    return f"{type(error).__name__}: {error}"


def fresh_directory(parent: Path, key: CellKey) -> Path:
    """An empty directory for a cell's logs; what a killed attempt left there is removed."""
    name = f"{key.task}-{key.optimizer}-{key.seed}-{key.model}-{key.proposer}-{key.budget}-{key.limit}"
    readable = re.sub(r"[^\w.-]+", "_", name)
    if len(readable.encode()) > LONGEST_NAME:  # a path of a model may be longer than a file system's names
        readable = f"{readable[: LONGEST_NAME // 4]}-{sha256(name.encode()).hexdigest()[:16]}"
    directory = parent / readable
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers from `seed`, and as they were afterwards."""
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


@contextlib.contextmanager
def quiet(directory: Path) -> Iterator[None]:
    """What optimizers print and log goes to `output.txt` of the cell's directory."""
    loggers = {name: logging.getLogger(name) for name in ("dspy", "LiteLLM", "httpx")}
    levels = {name: logger.level for name, logger in loggers.items()}
    with (directory / "output.txt").open("w", encoding="utf-8", buffering=1) as file:
        try:
            for name in ("LiteLLM", "httpx"):
                loggers[name].setLevel(logging.WARNING)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for name, level in levels.items():
                loggers[name].setLevel(level)


@contextlib.contextmanager
def alarm(budget: Budget, seconds: float | None) -> Iterator[None]:
    """The last resort against an optimizer that neither asks the model nor comes back: interrupt the main thread.

    A signal reaches Python code and waits for locks, not a call into C that never returns; in another thread, or
    where there is no such signal, only calls of the model are refused.
    """
    usable = seconds is not None and hasattr(signal, "SIGALRM")
    if not usable or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: budget.out_of_time())
    signal.setitimer(signal.ITIMER_REAL, (seconds or 0.0) + ALARM_GRACE, ALARM_AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
