"""Run a program with one or more instructions on rows: what the model reasoned and how the metric scored it.

All (instruction, row) pairs run at once. On an in-process model they move in lockstep, so
that every wave of calls is one batch whose make-up does not depend on thread timing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dspy.adapters.utils import serialize_for_json

from dspy_greater.errors import ProgramError
from dspy_greater.lm.local import LocalEngine, local_engine
from dspy_greater.lm.request import PROVIDER
from dspy_greater.metric import Score
from dspy_greater.program.asked_lm import for_search, uncached_lm
from dspy_greater.program.copies import in_modules_that_run_copies, with_instructions
from dspy_greater.program.failures import Failure
from dspy_greater.program.faults import ServerFault, ServerUsage, is_served
from dspy_greater.program.predictors import predictor_names, predictors_of, samples
from dspy_greater.program.servers import Servers, Spent
from dspy_greater.program.traced_run import Result, carrying, hearing_faults, trace_calls
from dspy_greater.program.tracing import PredictorCall

if TYPE_CHECKING:
    from dspy_greater.model.engine import Engine

Worker = Callable[[], AbstractContextManager[None]]
Generate = Callable[[Sequence[Any]], Sequence[Any]]  # requests -> generations, as `interface.Model.generate`
_MOST_IN_LOCKSTEP = 512  # threads that wait for one model together


@dataclass(frozen=True)
class Rollout:
    """One run of a program on one row: the last call of each predictor, and the metric's score.

    `error` says why the run or the metric failed; such a row has the failure score. `failure` is the kind of that
    error, and `source` says who raised it. `feedback` is the metric's, and `trace` every call in its order.
    `faults` are those of servers that the program or the metric asked: where there are any, nobody answered, and
    the score says nothing.
    """

    calls: Mapping[str, PredictorCall]
    score: float
    error: str | None = None
    failure: Failure | Literal["metric"] | None = None
    source: str | None = None
    feedback: str | None = None
    trace: tuple[PredictorCall, ...] = ()
    prediction: Any = field(default=None, compare=False)
    faults: tuple[ServerFault, ...] = ()

    @property
    def lm_failed(self) -> bool:
        """Whether no language model answered: its error ended the run, or the program went on without any answer."""
        return self.failure == "lm" or (len(self.trace) > 0 and all(call.lm_failed for call in self.trace))


@dataclass(frozen=True)
class Running:
    """How programs are run.

    Attributes:
        threads: how many runs are under way at a time where an LM is a server; where the LM is an in-process model,
            all of them are.
        failure_score: of a run that failed, or that the metric failed on.
        servers: waits for those that do not answer.
    """

    threads: int
    failure_score: float = 0.0
    servers: Servers = field(default_factory=Servers)


def roll_out(
    programs: Sequence[Any],
    rows: Sequence[Any],
    metric: Callable[[Any, Any], Score],
    running: Running,
    *,
    deployed: bool = False,
) -> list[list[Rollout]]:
    """Run every program on every row. The first program is the floor: none of its rows may stay without an answer.

    Args:
        programs: DSPy programs that differ in their instructions.
        rows: examples with inputs set.
        metric: scores (example, prediction).
        running: how they are run.
        deployed: let the adapter ask again in JSON where an answer does not parse, as it will when the
            program is used; while searching, only the prompt that is searched counts.

    Returns:
        For each program the rollouts of the rows, in their order.

    Raises:
        MetricError: the metric returned something that is not a score.
        OutageError: a server gave no answer for longer than the run waits.
        ProgramError: the language model could not be called, not even once.

    ```python
    [[rollout]] = roll_out([dspy.ChainOfThought("question -> answer")], rows[:1], RowMetric(metric), Running(threads=8))
    rollout.score, rollout.calls["predict"].outputs["reasoning"]
    ```
    """
    run = partial(
        run_pairs, metric=metric, threads=running.threads, deployed=deployed, failure_score=running.failure_score
    )
    pairs = [(program, row) for program in programs for row in rows]
    done = answered(pairs, run, running.servers, must=range(len(rows)))
    refuse_dead_lm(done, len(rows))
    return (
        [done[start : start + len(rows)] for start in range(0, len(done), len(rows))]
        if rows
        else [[] for _ in programs]
    )


def answered(
    pairs: Sequence[tuple[Any, Any]],
    run: Callable[[Sequence[tuple[Any, Any]]], list[Rollout]],
    servers: Servers,
    *,
    probe: Callable[[], Rollout] | None = None,
    must: Container[int] = (),
) -> list[Rollout]:
    """The runs of programs on rows, once every row is answered or is at fault itself; see `Servers.settled`.

    Raises:
        OutageError: a server gave no answer for longer than the run waits.
    """

    def again(indices: Sequence[int]) -> list[Rollout]:
        return run([(uncached(pairs[at][0]), pairs[at][1]) for at in indices])

    return servers.settled(run(pairs), again, probe=probe, must=must)


def run_pairs(
    pairs: Sequence[tuple[Any, Any]],
    metric: Callable[[Any, Any], Score],
    *,
    threads: int,
    deployed: bool = False,
    generate: Generate | None = None,
    failure_score: float = 0.0,
) -> list[Rollout]:
    """Run programs on rows, each (program, row) once; see `roll_out`. All may fail.

    `generate` answers in the place of the one in-process model of the programs, such as a session's does.
    Recorded are the calls of predictors that a program has before its first run.
    """
    programs = {id(program): program for program, _ in pairs}
    lms = [predictor.lm for program in programs.values() for predictor in predictors_of(program)]
    names = {id(program): predictor_names(program) for program in programs.values()}

    def run(program: Any, row: Any) -> Rollout:
        return _run(program, row, metric, deployed, names[id(program)])

    done = together(run, pairs, lms=lms, threads=threads, generate=generate)
    return [rollout if rollout.error is None else replace(rollout, score=failure_score) for rollout in done]


def together(
    run: Callable[..., Result],
    jobs: Sequence[tuple[Any, ...]],
    *,
    lms: Sequence[Any],
    threads: int,
    generate: Generate | None = None,
) -> list[Result]:
    """`run(*job)` for all jobs at once, with the caller's DSPy settings; the results in the order of the jobs.

    Args:
        run: what to do.
        jobs: its arguments.
        lms: every LM that is called. Where only one of them is in-process, the calls move in lockstep,
            some hundred jobs at a time, and `generate`, where it is given, answers them.
        threads: how many jobs are under way at a time otherwise.
    """
    if len(jobs) > _MOST_IN_LOCKSTEP:
        parts = [jobs[start : start + _MOST_IN_LOCKSTEP] for start in range(0, len(jobs), _MOST_IN_LOCKSTEP)]
        return [result for part in parts for result in together(run, part, lms=lms, threads=threads, generate=generate)]
    with _in_lockstep(lms, len(jobs), generate) as worker:
        size = threads if worker is None else len(jobs)
        enter: Worker = worker or nullcontext

        @carrying
        def enter_and_run(*job: Any) -> Result:
            with enter():
                return run(*job)

        return _all(enter_and_run, jobs, size)


def engines_behind(program: Any) -> list[Engine]:
    """The in-process models that the program's predictors call, each once."""
    return [local.engine for local in _local_engines(predictor.lm for predictor in predictors_of(program))]


def asks_servers(program: Any) -> bool:
    """Whether any predictor calls a language model that is not in-process."""
    return any(is_served(predictor.lm) for predictor in predictors_of(program))


def spent_on_servers(rollouts: Iterable[Rollout], estimate: Callable[[str], int]) -> Spent:
    """What language models that are not in-process read and wrote in these runs, for any predictor.

    Theirs is the count, thoughts included; `estimate` counts the tokens of what was written where they do not tell.
    """
    spent = Spent()
    for call in (call for rollout in rollouts for call in rollout.trace):
        asked = [(sent.usage, sent.answers) for sent in call.exchanges if is_served(sent.lm)]
        for usage, answers in asked if call.exchanges else [(None, call.samples)]:
            told = usage or ServerUsage()
            written = told.generated_tokens
            if written is None:
                written = sum(estimate(text) for answer in answers for text in (answer.thoughts, answer.text) if text)
            spent += Spent(told.prompt_tokens or 0, written)
    return spent


def searching_copy(program: Any, texts: Mapping[str, str], seed: int = 0) -> Any:
    """A copy of the program with other instructions, whose in-process models do not answer from a cache.

    The counters then say what the search cost; a server's cache, which saves money, is left on. A model
    that has no seed gets one from `seed`, another for each predictor that samples, so that a search at a temperature
    can be repeated. A prompt that a predictor asks twice is then answered alike; `n=` gives several samples. Predictors
    that are not known to sample go on sharing what they shared, and the attempts of BestOfN and Refine draw anew.
    """
    copied = with_instructions(program, texts)
    attempts, shared = in_modules_that_run_copies(copied), dict[Any, Any]()
    for place, (_, predictor) in enumerate(copied.named_predictors()):
        lm = predictor.lm
        if local_engine(lm) is None:
            continue
        attempt = id(predictor) in attempts
        draws = place if samples(predictor) and not attempt else 0
        key = (id(lm), attempt, draws)
        if key not in shared:
            own, drawn = lm.kwargs.get("seed"), None if attempt else seed + draws
            shared[key] = lm.copy(cache=False, seed=drawn if own is None else own)
        predictor.lm = shared[key]
    return copied


def pin_lms(program: Any, *, weights: Mapping[str, str] | None = None, timeout: float | None = None) -> Any:
    """A copy of the program in which every predictor holds the LM that it would use now, `renamed` and `for_search`.

    DSPy's settings are local to a thread; a predictor that carries its LM does not depend on them. `weights` has the
    identity of the weights behind a predictor, where they are known, and `timeout` is that of a server's answer.
    """
    copied = with_instructions(program, {})
    predictors = predictors_of(program)
    now = {
        id(predictor.lm): (predictor.lm, (weights or {}).get(predictor.name, "")) for predictor in reversed(predictors)
    }
    now = {  # what several predictors share they go on sharing
        key: for_search(renamed(lm), weights=known, timeout=timeout) for key, (lm, known) in now.items()
    }
    lms = {predictor.name: now[id(predictor.lm)] for predictor in predictors}
    for name, module in copied.named_predictors():
        module.lm = lms.get(name, module.lm)
    return copied


def renamed(lm: Any) -> Any:
    """The LM; of a `local_lm` whose weights have changed since it was made, a copy under their name of now."""
    local = local_engine(lm)
    if local is None or not str(lm.model).startswith(f"{PROVIDER}/"):
        return lm
    name = f"{PROVIDER}/{local.engine.identity}"
    if name == lm.model or name != f"{PROVIDER}/{local.engine.identity}":  # another each time: they cannot be told
        return lm
    return lm.copy(model=name)


def plain(value: Any) -> object:
    """A value that a journal can hold and that DSPy writes into a prompt exactly as it writes the original.

    Example:
        >>> import datetime
        >>> plain(datetime.date(2024, 12, 12)), plain(("a", 1))
        ('2024-12-12', ('a', 1))
    """
    # DSPy writes a list that stands for text differently from a tuple.
    if isinstance(value, tuple):
        return tuple(map(serialize_for_json, value))
    return value if type(value) is str else serialize_for_json(value)


def _run(
    program: Any, row: Any, metric: Callable[[Any, Any], Score], deployed: bool, names: Mapping[int, str]
) -> Rollout:
    trace = trace_calls(program, row, deployed=deployed, names=names)
    calls = {call.predictor: call for call in trace.calls}
    if trace.error is not None:
        return Rollout(calls, 0.0, trace.error, trace.failure, trace.source, trace=trace.calls, faults=trace.faults)
    score, faults = hearing_faults(lambda: metric(row, trace.prediction))
    failure, source = (None, None) if score.error is None else ("metric", "the metric")
    return Rollout(
        calls,
        score.value,
        score.error,
        failure,
        source,
        score.feedback,
        trace.calls,
        trace.prediction,
        (*trace.faults, *faults),
    )


def _all(run: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], size: int) -> list[Result]:
    """Run all jobs in `size` threads; the first error, or an interrupt, abandons the rest."""
    if not jobs:
        return []
    pool = ThreadPoolExecutor(size, thread_name_prefix="rollout")
    futures: list[Future[Result]] = []
    try:
        futures = [pool.submit(run, *job) for job in jobs]
        return [future.result() for future in futures]
    finally:
        finished = all(future.done() for future in futures)
        pool.shutdown(wait=finished, cancel_futures=True)


def refuse_dead_lm(done: Sequence[Rollout], rows: int, probe: Callable[[], Rollout] | None = None) -> None:
    """A search over answers that never came would go on to the end and find nothing.

    Prompts that no language model can take (too long, refused, endless) fail on every row too, and are only bad
    prompts. What tells them from a dead model is a run that worked before.

    Args:
        done: runs of one or more programs.
        rows: how many rows they were run on, for the message.
        probe: runs again what worked before; None where nothing did.

    Raises:
        ProgramError: the language model could not be called, not even once, nor by the probe.
    """
    if not done or not all(rollout.lm_failed for rollout in done) or (probe is not None and not probe().lm_failed):
        return
    first = done[0]
    error = first.error or next(call.error for call in first.trace)
    predictor = next((f"predictor `{call.predictor}`: " for call in first.trace if call.lm_failed), "")
    raise ProgramError(
        f"The language model could not be called on any of the {rows} rows; on the first, {predictor}{error}. "
        "Try program(**trainset[0].inputs()). A run with a log_dir goes on from its last step once that works."
    )


def run_uncached(program: Any, row: Any, *, threads: int) -> Rollout:
    """A run of a program on a row that asks its language models themselves, and never a cache."""
    [rollout] = run_pairs([(uncached(program), row)], unscored, threads=threads)
    return rollout


def uncached(program: Any) -> Any:
    """A copy of the program whose language models do not answer from a cache."""
    copied, asked = with_instructions(program, {}), dict[int, Any]()
    for _, predictor in copied.named_predictors():
        lm = predictor.lm
        predictor.lm = asked[id(lm)] = asked.get(id(lm)) or uncached_lm(lm)  # what they share they go on sharing
    return copied


def unscored(example: Any, prediction: Any) -> Score:
    """The metric of a run whose score does not matter."""
    return Score(0.0)


@contextmanager
def _in_lockstep(lms: Sequence[Any], runs: int, generate: Generate | None) -> Iterator[Worker | None]:
    """Lockstep on the one in-process engine of the LMs; None when there is none, or several."""
    engines = _local_engines(lms)
    if len(engines) != 1 or runs == 0:
        yield None
        return
    (engine,) = engines
    with engine.lockstep(runs, generate=generate) as group:
        yield group.worker


def _local_engines(lms: Iterable[Any]) -> list[LocalEngine]:
    return list({id(engine): engine for lm in lms if (engine := local_engine(lm)) is not None}.values())
