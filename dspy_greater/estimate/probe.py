"""A short probe: what a program's prompts are like, how much the model writes, and how fast all that goes.

The program is run on a few training rows: under the student's instruction, under the same with "Think step by step."
or its like behind it, and under a likely edit of it. The model is asked for whole instructions as well, as a
search asks it first. All in all that is about what a step of a search costs. Nothing of the search is touched: the
probe has sessions of its own, and draws its rows from a source of randomness of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from random import Random
from typing import Any

from dspy_greater.estimate.reasoned import Lengths, Reasoned, Run, lengths
from dspy_greater.estimate.speed import Speed, resident_bytes, try_speed
from dspy_greater.estimate.watch import Watched, watched
from dspy_greater.metric import RowMetric
from dspy_greater.model.kv_cache import shared_length
from dspy_greater.objective.evaluator import Evaluator, Instruction, Objective
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.rollout import engines_behind, run_pairs, searching_copy, unscored
from dspy_greater.prompt.layout import Supervised
from dspy_greater.run.estimate import Cost
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.edits import propose_edits
from dspy_greater.search.problem import Problem, Target
from dspy_greater.search.state import begin
from dspy_greater.search.step import StepContext
from dspy_greater.search.written import answered, requests
from dspy_greater.stats import mean

ROWS = 8  # that the program is run on, under each instruction
ASKED = ("Think step by step.", "Go through it item by item, and write down each.")
EDITS = 1


@dataclass(frozen=True)
class Asked:
    """What a request for a whole instruction takes, tokens, on the mean; nothing where none is made.

    Attributes:
        read: of the request.
        written: of the answer.
        longest: the most of an answer.
        usable: the share of answers that can be tried, by Laplace's rule.
    """

    read: float = 0.0
    written: float = 0.0
    longest: float = 0.0
    usable: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What a probe found for one predictor; tokens and seconds, means over runs unless it says otherwise.

    Attributes:
        lengths: of what the program writes.
        calls: of the predictor, in a run.
        asked: what it is to be asked for whole instructions.
        loss_read: tokens read to take a run's loss.
        gold: tokens of the gold answer, with what leads to it.
        tail: tokens that all prompts have alike behind an edit, in the middle of the instruction.
        context: tokens that a proposal reads for a row.
        edit_seconds: to find the legal edits of a position, without the model.
        run_seconds: of the program on a row, without an in-process model.
        metric_seconds: of the metric on a row, where it is slow enough to be asked of somebody else.
        served: whether the program is answered by servers, wholly or in part; then `run_seconds` has their time.
        speed: of the model.
        resident_bytes: in use already.
        cost: of the probe.
    """

    lengths: Lengths
    calls: float
    asked: Asked
    loss_read: float
    gold: float
    tail: float
    context: float
    edit_seconds: float
    run_seconds: float
    metric_seconds: float
    served: bool
    speed: Speed
    resident_bytes: int
    cost: Cost


def probe(problem: Problem, target: Target, most_rows: int = ROWS) -> Measured:
    """Try what a predictor's search will do, on a few rows, so many at most.

    Raises:
        GreaterError: what the search would raise.
    """
    began, before = time.perf_counter(), target.engine.counters
    rows = Random(f"{problem.seed}/probe").sample(list(problem.train), min(most_rows, len(problem.train)))
    metric = _Timed(problem.metric)
    evaluator = _evaluator(problem, target, rows, metric)
    served = engines_behind(problem.program) != [target.engine]
    start = evaluator.spent()
    with watched(target.engine) as model:
        seed, wall = _evaluated(evaluator, [evaluator.seed()], model)
        loss_read = model.reading.read / len(rows)
        at = _beginning(problem, target, evaluator, seed[0], model)
        edits, edit_seconds = _edits(at, model)
        others, more = _evaluated(evaluator, [*_longer(evaluator), *edits], model)
        spent = evaluator.spent(start)
        asks = isinstance(problem.step, DefaultStep)
        asked = _asked(at, model, tried=most_rows >= ROWS) if asks else Asked()
    evaluations, wall = [*seed, *others], wall + more
    reasoned = lengths(evaluator, evaluations, spent["generated_tokens"])
    runs = len(rows) * len(evaluations)
    run_seconds = wall / runs * max(1, min(problem.settings.num_threads, len(rows) * len(evaluations) / 2))
    if not served:
        run_seconds = _program_seconds(
            problem, target, rows, [evaluation.instruction for evaluation in evaluations], model
        )
    speed = _speed(problem, target, evaluator, evaluations, reasoned.high)
    supervised = evaluator.supervised(evaluations[0], reasoned=False)
    counted = target.engine.counters - before
    return Measured(
        lengths=reasoned,
        calls=len(reasoned.student.runs) / len(rows),
        asked=asked,
        loss_read=loss_read,
        gold=mean([float(len(example.answer)) for example in supervised]) if supervised else 0.0,
        tail=_tail(reasoned.student.runs, supervised),
        context=_context(evaluator, evaluations[0]),
        edit_seconds=edit_seconds,
        run_seconds=max(0.0, run_seconds),
        metric_seconds=metric.seconds,
        served=served,
        speed=speed,
        resident_bytes=resident_bytes(target.engine),
        cost=Cost(
            evaluator.spent()["runs"],
            counted.prefilled_tokens,
            counted.backward_tokens,
            max(counted.generated_tokens, spent["generated_tokens"]),
            time.perf_counter() - began,
        ),
    )


def _evaluator(problem: Problem, target: Target, rows: Sequence[Any], metric: _Timed) -> Evaluator:
    return Evaluator(
        Objective(
            problem.program, target.predictor, target.field, rows, metric.row_metric, problem.extractor, target.fixed
        ),
        engine=target.engine,
        settings=problem.settings,
        criterion=problem.step.criterion,
    )


class _Timed:
    """The metric with a stopwatch; `seconds` are its mean, where somebody else is asked."""

    def __init__(self, metric: RowMetric) -> None:
        self._taken: list[float] = []
        function = metric.function

        @wraps(function)
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._taken.append(time.perf_counter() - began)

        self.row_metric = RowMetric(timed)

    @property
    def seconds(self) -> float:
        found = mean(self._taken) if self._taken else 0.0
        return found if found > 0.05 else 0.0


def _longer(evaluator: Evaluator) -> list[Instruction]:
    """The student's instruction, and a sentence that asks for more reasoning."""
    texts = [f"{evaluator.seed().text.rstrip()} {asked}".strip() for asked in ASKED]
    return [Instruction(evaluator.layout.edits.instruction_ids(text), text) for text in texts]


def _evaluated(
    evaluator: Evaluator, instructions: Sequence[Instruction], model: Watched
) -> tuple[list[Evaluation], float]:
    """The instructions, and how long the program took for all of them, losses left out."""
    before, began = model.reading.seconds, time.perf_counter()
    found = evaluator.evaluate(instructions, model)
    return found, time.perf_counter() - began - (model.reading.seconds - before)


def _asked(at: StepContext, model: Watched, *, tried: bool) -> Asked:
    """What a step asks for whole instructions; where it is `tried`, half of it is, for the answers."""
    found = requests(at, at.settings.written) if any(row.inputs for row in at.current.rows) else []
    if not found:
        return Asked()
    read, room = mean([float(len(request.prompt)) for request in found]), float(found[0].max_new_tokens)
    if not tried:
        return Asked(read, room / 2, room, 0.5)
    count = -(-len(found) // 2)
    before, known = model.writing, len(model.answers)
    usable = answered(at, found[:count])
    longest = max((len(generation.token_ids) for generation in list(model.answers.values())[known:]), default=0)
    written = (model.writing.written - before.written) / count
    return Asked(read, written, float(longest), (len(usable) + 1) / (count + 2))


def _beginning(problem: Problem, target: Target, evaluator: Evaluator, seed: Evaluation, model: Watched) -> StepContext:
    """Where the search will begin."""
    editable = evaluator.layout.edits.positions(seed.token_ids)
    state = begin(seed, problem.settings, editable=editable, fixed=evaluator.layout.edits.fixed)
    return StepContext(evaluator, model, state, problem.settings, target.predictor.name, problem.seed)


def _edits(at: StepContext, model: Watched) -> tuple[list[Instruction], float]:
    """Likely edits of the first position, and how long it took to tell which tokens are legal there."""
    before, began = model.cost.seconds, time.perf_counter()
    found = propose_edits(at)
    seconds = time.perf_counter() - began - (model.cost.seconds - before)
    return [edit.instruction for edit in found[:EDITS]], max(0.0, seconds)


def _program_seconds(
    problem: Problem, target: Target, rows: Sequence[Any], instructions: Sequence[str], model: Watched
) -> float:
    """Of the program itself on a row: it is run again, with the answers that are known; 0 where it asked for none."""
    if not model.answers:
        return 0.0
    copies = [searching_copy(problem.program, {target.predictor.name: instruction}) for instruction in instructions]
    pairs = [(copied, row) for copied in copies for row in rows]
    anything = next(iter(model.answers.values()))
    began = time.perf_counter()
    run_pairs(
        pairs,
        unscored,
        threads=problem.settings.num_threads,
        generate=lambda requests: [model.answers.get(request.prompt, anything) for request in requests],
    )
    return (time.perf_counter() - began) / len(pairs)


def _speed(
    problem: Problem, target: Target, evaluator: Evaluator, evaluations: Sequence[Evaluation], long: Reasoned
) -> Speed:
    reasonings = evaluator.replay(evaluations[0], Random(0), 4)  # the fewest of a step
    prompt = long.runs[0][0] if long.runs else evaluations[0].token_ids
    editable = evaluator.layout.edits.positions(evaluations[0].token_ids)
    position = min(editable, default=len(evaluations[0].token_ids) - 1)
    return try_speed(target.engine, prompt, len(problem.train), reasonings, position)


def _tail(runs: Sequence[Run], supervised: Sequence[Supervised]) -> float:
    shared, _ = prompt_lengths(runs)
    middles = [(example.instruction.start + example.instruction.stop) / 2 for example in supervised]
    return max(0.0, shared - mean(middles)) if middles else 0.0


def _context(evaluator: Evaluator, seed: Evaluation) -> float:
    """Half of the instruction is behind the position, on the mean."""
    contexts = evaluator.proposal_contexts(seed, len(seed.token_ids) // 2)
    return mean([float(len(context)) for context in contexts]) if contexts else 0.0


def prompt_lengths(runs: Sequence[Run]) -> tuple[float, float]:
    """What the prompts begin with, and what each has besides; tokens.

    >>> prompt_lengths([((1, 2, 3), ()), ((1, 2, 4, 5), ())])
    (2.0, 1.5)
    """
    prompts = [prompt for prompt, _ in runs]
    if not prompts:
        return 0.0, 0.0
    shared = shared_length(prompts) if len(prompts) > 1 else len(prompts[0]) // 2
    return float(shared), mean([float(len(prompt)) for prompt in prompts]) - shared
