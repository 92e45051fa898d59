"""Positions with every candidate tried: what was predicted for it, and what came true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import dspy

from benchmarks.fidelity.rankings import RANKINGS, Position
from dspy_greater.metric import RowMetric
from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Evaluator, Objective
from dspy_greater.objective.replay import Reasoning
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.copies import with_instructions
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.rollout import pin_lms
from dspy_greater.search.edits import Edit, propose_edits
from dspy_greater.search.exploration import baseline_scale
from dspy_greater.search.select import realised_change
from dspy_greater.search.state import begin
from dspy_greater.search.step import StepContext
from dspy_greater.served.weights import weights_behind
from dspy_greater.settings import Settings

_ELSEWHERE = 6  # instructions tried at other positions, whose reasonings are at hand


@dataclass(frozen=True)
class Measured:
    """One position: the realised change of every candidate and the change that each ranking predicted."""

    task: str
    instruction: str
    seed: int
    position: int
    candidates: tuple[str, ...]
    realised: tuple[tuple[float, float], ...]  # mistake rate, cross-entropy
    predicted: dict[str, tuple[float, ...]]
    begun_at: str | None = None  # as in `Plan`


@dataclass(frozen=True)
class Plan:
    """What is measured for one task, seed instruction and seed."""

    task: str
    instruction: str
    seed: int
    positions: int
    candidates: int
    settings: Settings
    begun_at: str | None = None  # the seed of the search that came to the instruction; None: it is the seed itself


def measure(plan: Plan, rows: Sequence[Any], metric: Any, rankings: Sequence[str]) -> Iterator[Measured]:
    """Try all candidates at some positions of the instruction, then ask every ranking what it would have said."""
    for at, evaluations in positions(plan, rows, metric):
        yield Measured(
            plan.task,
            plan.instruction,
            plan.seed,
            at.here.state.position,
            tuple(edit.instruction.text for edit in at.edits),
            tuple(realised_change(at.here.current, each) for each in evaluations),
            {name: tuple(RANKINGS[name](at)) for name in rankings},
            plan.begun_at,
        )


def positions(plan: Plan, rows: Sequence[Any], metric: Any) -> Iterator[tuple[Position, list[Evaluation]]]:
    """Some positions of the instruction as a search would see them, and what came of every replacement there."""
    random = Random(f"{plan.task}/{plan.instruction}/{plan.seed}")
    evaluator = _evaluator(plan, rows, metric)
    current, _ = evaluator.evaluate_seed()
    settings = _settled(plan, rows, metric, current)
    editable = evaluator.layout.edits.positions(current.token_ids)
    chosen = sorted(random.sample(editable, min(plan.positions, len(editable))))
    with evaluator.engine.session() as model:
        contexts = [_context(evaluator, model, current, settings, position, plan.seed) for position in chosen]
        edits = {each.state.position: _replacements(each, plan) for each in contexts}
    tried = {
        position: evaluator.evaluate([edit.instruction for edit in found]) for position, found in edits.items() if found
    }
    for position, evaluations in tried.items():
        others = [each for other, found in tried.items() if other != position for each in found]
        elsewhere = random.sample(others, min(_ELSEWHERE, len(others)))
        with evaluator.engine.session() as model:
            here = _context(evaluator, model, current, settings, position, plan.seed)
            own, replayed = _at_hand(here, []), _at_hand(here, elsewhere)
            yield Position(here, edits[position], own, replayed), evaluations


def _evaluator(plan: Plan, rows: Sequence[Any], metric: Any) -> Evaluator:
    program = with_instructions(dspy.ChainOfThought("question -> answer"), {"predict": plan.instruction})
    pinned = pin_lms(program)
    (predictor,) = predictors_of(pinned)
    return Evaluator(
        Objective(program=pinned, predictor=predictor, field="answer", rows=rows, metric=RowMetric(metric)),
        engine=weights_behind(predictor.lm, weights=None, predictor_name=predictor.name),
        settings=plan.settings,
    )


def _settled(plan: Plan, rows: Sequence[Any], metric: Any, current: Evaluation) -> Settings:
    """The settings with the baseline that a search from the plan's beginning would have come to."""
    begun_at = current
    if plan.begun_at:
        begun_at, _ = _evaluator(replace(plan, instruction=plan.begun_at), rows, metric).evaluate_seed()
    return replace(plan.settings, baseline_scale=baseline_scale(plan.settings, begun_at, current))


def _context(
    evaluator: Evaluator, model: Model, current: Evaluation, settings: Settings, position: int, seed: int
) -> StepContext:
    state = replace(begin(current, settings), position=position)
    return StepContext(evaluator, model, state, settings, f"position {position}", seed)


def _replacements(here: StepContext, plan: Plan) -> tuple[Edit, ...]:
    return tuple(edit for edit in propose_edits(here) if edit.kind == "replace")[: plan.candidates]


def _at_hand(here: StepContext, more: Sequence[Evaluation]) -> tuple[Reasoning, ...]:
    """The reasonings of the current instruction and of some others, all of them."""
    rows = (*here.current.rows, *(row for each in more for row in each.rows))
    return tuple(here.evaluator.replay(replace(here.current, rows=rows), Random(here.random_seed), len(rows)))
