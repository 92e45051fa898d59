"""Another optimizer first, gradients after: textual proposals give the seed, numeric gradients refine it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.roundtrip import write_back
from dspy_greater.program.validation import validation_scores, winner
from dspy_greater.report.result import WarmStart
from dspy_greater.search.problem import Problem


def compile_warm(optimizer: Any, student: Any, problem: Problem, trainset: Sequence[Any], valset: Any) -> Any:
    """The program that `optimizer` makes of what `optimizer.warm_start` makes of the student.

    Both see the same validation rows and train on none of them. The student's own instructions take part
    in a last comparison, and a tie keeps them. After Ctrl-C in the first optimizer, its program is returned.

    Args:
        optimizer: has `warm_start`, and compiles without one when that is None.
        student: the program; it is not changed.
        problem: the student's, checked.
        trainset: the caller's.
        valset: the caller's, or nothing.
    """
    held_out = {id(row) for row in problem.validation}
    train = trainset if valset else [row for row in trainset if id(row) not in held_out] or trainset
    rows = {"trainset": train, "valset": problem.validation}
    first = optimizer.warm_start
    warmed = first.compile(student, **_accepted(first, {**rows, "metric": problem.metric.function}))
    if getattr(getattr(warmed, "detailed_results", None), "interrupted", False):
        return warmed

    names = [site.name for site in predictors_of(student)]
    found = {site.name: site.instruction for site in predictors_of(warmed) if site.name in names}
    refining = copy.copy(optimizer)
    refining.warm_start = None
    best = refining.compile(write_back(student, found), train, problem.metric.function, valset=problem.validation)
    return _floored(student, best, found, warmed, problem)


def _accepted(first: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the optimizer's `compile` takes; its own metric comes before ours."""
    taken = inspect.signature(first.compile).parameters
    own_metric = getattr(first, "metric", None) is not None
    return {name: value for name, value in arguments.items() if name in taken and not (name == "metric" and own_metric)}


def _floored(student: Any, best: Any, found: dict[str, str], warmed: Any, problem: Problem) -> Any:
    """`best`, or the student's instructions where they are as good on the validation rows."""
    own = {site.name: site.instruction for site in predictors_of(student)}
    last = {site.name: site.instruction for site in predictors_of(best)}
    scores = validation_scores(
        problem.program, [own, last], problem.validation, problem.metric, threads=problem.settings.threads
    )
    kept = write_back(student, [own, last][winner(scores)])
    warm = WarmStart(found, scores[0], scores[1], getattr(warmed, "detailed_results", None))
    kept.detailed_results = replace(best.detailed_results, warm_start=warm)
    kept.score = kept.detailed_results.score
    programs = [*best.candidate_programs, {"score": scores[0], "program": write_back(student, own)}]
    kept.candidate_programs = sorted(programs, key=lambda each: -each["score"])
    return kept
