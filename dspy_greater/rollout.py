"""Run a program with one or more instructions on rows: what the model reasoned and how the metric scored it.

All (instruction, row) pairs run at once. On an in-process model they move in lockstep, so
that every wave of calls is one batch whose make-up does not depend on thread timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from .lm import LocalEngine
from .metric import RowMetric, Score
from .program import PredictorCall, carrying, predictors_of, trace_calls, with_instructions

Worker = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Rollout:
    """One run of a program on one row: the last call of each predictor, and the metric's score.

    `error` says why the run or the metric failed; such a row scores 0.
    """

    calls: Mapping[str, PredictorCall]
    score: float
    error: str | None = None


def roll_out(programs: Sequence[Any], rows: Sequence[Any], metric: RowMetric, *, threads: int) -> list[list[Rollout]]:
    """Run every program on every row.

    Args:
        programs: DSPy programs that differ in their instructions.
        rows: examples with inputs set.
        metric: scores (example, prediction).
        threads: how many runs are under way at a time where an LM is a server; where the LM is
            an in-process model, all of them are.

    Returns:
        For each program the rollouts of the rows, in their order.

    Raises:
        MetricError: the metric returned something that is not a score.

    ```python
    [[rollout]] = roll_out([dspy.ChainOfThought("question -> answer")], rows[:1], RowMetric(metric), threads=8)
    rollout.score, rollout.calls["predict"].outputs["reasoning"]
    ```
    """
    pairs = [(program, row) for program in programs for row in rows]
    with _in_lockstep(programs, len(pairs)) as worker:
        size = threads if worker is None else len(pairs)
        enter: Worker = worker or nullcontext

        @carrying
        def run(program: Any, row: Any) -> Rollout:
            with enter():
                return _run(program, row, metric)

        done = _all(run, pairs, size)
    return (
        [done[start : start + len(rows)] for start in range(0, len(done), len(rows))]
        if rows
        else [[] for _ in programs]
    )


def searching_copy(program: Any, texts: Mapping[str, str]) -> Any:
    """A copy of the program with other instructions, whose in-process models do not answer from a cache.

    The counters then say what the search cost; a server's cache, which saves money, is left on.
    """
    copied = with_instructions(program, texts)
    for _, predictor in copied.named_predictors():
        lm = predictor.lm
        if _local_engine(lm) is not None:
            predictor.lm = lm.copy(cache=False)
    return copied


def pin_lms(program: Any) -> Any:
    """A copy of the program in which every predictor holds the LM that it would use now.

    DSPy's settings are local to a thread; a predictor that carries its LM does not depend on them.
    """
    copied = with_instructions(program, {})
    lms = {site.name: site.lm for site in predictors_of(program)}
    for name, predictor in copied.named_predictors():
        predictor.lm = lms.get(name, predictor.lm)
    return copied


def _run(program: Any, row: Any, metric: RowMetric) -> Rollout:
    trace = trace_calls(program, row)
    calls = {call.predictor: call for call in trace.calls}
    if trace.error is not None:
        return Rollout(calls, 0.0, trace.error)
    score: Score = metric(row, trace.prediction)
    return Rollout(calls, score.value, score.error)


def _all(run: Callable[[Any, Any], Rollout], pairs: Sequence[tuple[Any, Any]], size: int) -> list[Rollout]:
    """Run all pairs in `size` threads; the first error, or an interrupt, abandons the rest."""
    if not pairs:
        return []
    pool = ThreadPoolExecutor(size, thread_name_prefix="rollout")
    futures: list[Future[Rollout]] = []
    try:
        futures = [pool.submit(run, *pair) for pair in pairs]
        return [future.result() for future in futures]
    finally:
        finished = all(future.done() for future in futures)
        pool.shutdown(wait=finished, cancel_futures=True)


@contextmanager
def _in_lockstep(programs: Sequence[Any], runs: int) -> Iterator[Worker | None]:
    """Lockstep on the one in-process engine of the programs; None when there is none, or several."""
    engines = {
        id(engine): engine
        for program in programs
        for site in predictors_of(program)
        if (engine := _local_engine(site.lm)) is not None
    }
    if len(engines) != 1 or runs == 0:
        yield None
        return
    (engine,) = engines.values()
    with engine.lockstep(runs) as group:
        yield group.worker


def _local_engine(lm: Any) -> LocalEngine | None:
    engine = getattr(lm, "engine", None)
    return engine if isinstance(engine, LocalEngine) else None
