"""Positions with every candidate tried: what was predicted for it, and what came true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import dspy

from benchmarks.fidelity.rankings import RANKINGS, Position
from dspy_greater.lm.local import weights_behind
from dspy_greater.metric import RowMetric
from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.replay import Reasoning
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.predictors import predictors_of, with_instruction
from dspy_greater.program.rollout import pin_lms
from dspy_greater.search.default_step import hopeful
from dspy_greater.search.edits import Edit, propose_edits
from dspy_greater.search.select import realised_change
from dspy_greater.search.state import begin
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
    random = Random(f"{plan.task}/{plan.instruction}/{plan.seed}")
    objective = _objective(plan, rows, metric)
    (seed,) = objective.evaluate([objective.seed()])
    begun_at = _evaluated(replace(plan, instruction=plan.begun_at), rows, metric) if plan.begun_at else seed
    plan = replace(plan, settings=hopeful(plan.settings, begun_at, seed))
    editable = objective.layout.positions(seed.token_ids)
    chosen = sorted(random.sample(editable, min(plan.positions, len(editable))))
    with objective.engine.session() as model:
        edits = {position: _replacements(objective, model, seed, position, plan) for position in chosen}
    tried = {
        position: objective.evaluate([edit.instruction for edit in found]) for position, found in edits.items() if found
    }
    for position, evaluations in tried.items():
        others = [each for other, found in tried.items() if other != position for each in found]
        at_hand = random.sample(others, min(_ELSEWHERE, len(others)))
        with objective.engine.session() as model:
            at = _position(plan, objective, model, seed, position, edits[position], at_hand)
            predicted = {name: tuple(RANKINGS[name](at)) for name in rankings}
        yield Measured(
            plan.task,
            plan.instruction,
            plan.seed,
            position,
            tuple(edit.instruction.text for edit in edits[position]),
            tuple(realised_change(seed, each) for each in evaluations),
            predicted,
            plan.begun_at,
        )


def _evaluated(plan: Plan, rows: Sequence[Any], metric: Any) -> Evaluation:
    objective = _objective(plan, rows, metric)
    (found,) = objective.evaluate([objective.seed()])
    return found


def _objective(plan: Plan, rows: Sequence[Any], metric: Any) -> Evaluator:
    program = with_instruction(dspy.ChainOfThought("question -> answer"), "predict", plan.instruction)
    pinned = pin_lms(program)
    (site,) = predictors_of(pinned)
    return Evaluator(
        program=pinned,
        site=site,
        field="answer",
        rows=rows,
        metric=RowMetric(metric),
        engine=weights_behind(site.lm, weights=None, predictor_name=site.name),
        settings=plan.settings,
    )


def _replacements(objective: Evaluator, model: Model, seed: Evaluation, position: int, plan: Plan) -> tuple[Edit, ...]:
    state = replace(begin(seed, plan.settings), position=position)
    edits = propose_edits(
        objective, model, state, plan.settings, random_seed=plan.seed, predictor=f"position {position}"
    )
    return tuple(edit for edit in edits if edit.kind == "replace")[: plan.candidates]


def _position(
    plan: Plan,
    objective: Evaluator,
    model: Model,
    seed: Evaluation,
    position: int,
    edits: tuple[Edit, ...],
    at_hand: Sequence[Evaluation],
) -> Position:
    """What a search would know before it tried anything at this position."""

    def reasonings(more: Sequence[Evaluation]) -> tuple[Reasoning, ...]:
        rows = (*seed.rows, *(row for each in more for row in each.rows))
        return tuple(objective.replay(replace(seed, rows=rows), Random(plan.seed), len(rows)))

    return Position(
        objective=objective,
        model=model,
        current=seed,
        position=position,
        edits=edits,
        own=reasonings([]),
        replayed=reasonings(at_hand),
        settings=plan.settings,
    )
