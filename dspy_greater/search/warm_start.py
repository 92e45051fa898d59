"""Another optimizer first, gradients after: textual proposals give the seed, numeric gradients refine it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dspy_greater.errors import UnvalidatedError
from dspy_greater.notices import warn_caller
from dspy_greater.program.predictors import predictors_of
from dspy_greater.program.roundtrip import saved, write_back
from dspy_greater.program.validation import validation_scores, winner
from dspy_greater.report.result import ValidatedProgram, WarmStart
from dspy_greater.run.best import BestFile
from dspy_greater.run.stop import by_signal, is_second, second
from dspy_greater.search.problem import Problem
from dspy_greater.stats import mean


def compile_warm(optimizer: Any, student: Any, problem: Problem, trainset: Sequence[Any], valset: Any) -> Any:
    """The program that `optimizer` makes of what `optimizer.warm_start` makes of the student.

    Both see the same validation rows and train on none of them. The student's own instructions take part
    in a last comparison, and a tie keeps them. After Ctrl-C in the first optimizer, its program is returned. Where
    the second ends before it finds anything, what the first one found takes its place in the last comparison.

    Args:
        optimizer: has `warm_start`, and compiles without one when that is None.
        student: the program; it is not changed.
        problem: the student's, checked.
        trainset: the caller's.
        valset: the caller's, or nothing.

    Raises:
        UnvalidatedError: the last comparison failed; carries what was found.
    """
    held_out = {id(row) for row in problem.validation}
    train = trainset if valset else [row for row in trainset if id(row) not in held_out] or trainset
    rows = {"trainset": train, "valset": problem.validation}
    first = optimizer.warm_start
    warmed = first.compile(student, **_accepted(first, {**rows, "metric": problem.metric.function}))
    if getattr(getattr(warmed, "detailed_results", None), "interrupted", False):
        return warmed

    names = [predictor.name for predictor in predictors_of(student)]
    found = {predictor.name: predictor.instruction for predictor in predictors_of(warmed) if predictor.name in names}
    refining = copy.copy(optimizer)
    refining.warm_start = None
    try:
        best = refining.compile(write_back(student, found), train, problem.metric.function, valset=problem.validation)
    except (Exception, KeyboardInterrupt) as error:
        if is_second(error) or found == _instructions(student):  # nothing is to be waited for, or to lose
            raise
        return _unrefined(student, found, warmed, problem, error)
    kept = _floored(student, best, found, warmed, problem)
    if kept.detailed_results.warm_start.undone and not math.isnan(kept.score):
        BestFile(optimizer.log_dir, partial(saved, student)).settle(_instructions(student), kept.score)
    return kept


def _instructions(program: Any) -> dict[str, str]:
    return {predictor.name: predictor.instruction for predictor in predictors_of(program)}


def _accepted(first: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the optimizer's `compile` takes; its own metric comes before ours."""
    taken = inspect.signature(first.compile).parameters
    own_metric = getattr(first, "metric", None) is not None
    return {name: value for name, value in arguments.items() if name in taken and not (name == "metric" and own_metric)}


def _floored(student: Any, best: Any, found: dict[str, str], warmed: Any, problem: Problem) -> Any:
    """`best`, or the student's instructions where they are as good on the validation rows, or could not be compared."""
    own, last, details = _instructions(student), _instructions(best), best.detailed_results
    try:
        rows = _compared(problem, [own, last])
    except KeyboardInterrupt as interrupt:
        if details.interrupted:
            raise second(interrupt) from interrupt
        details = replace(details, interrupted=True, stopped_by=by_signal(interrupt))
        rows = [(math.nan,), (math.nan,)]
    except Exception as error:
        raise _unvalidated(best, details, error) from error
    scores = [mean(row_scores) for row_scores in rows]
    kept = write_back(student, [own, last][winner(scores)])
    student_run = ValidatedProgram(own, scores[0], rows[0])
    warm = WarmStart(found, student_run, scores[1], getattr(warmed, "detailed_results", None))
    rendering = details.rendering and details.rendering.under(_instructions(kept))
    kept.detailed_results = replace(details, warm_start=warm, rendering=rendering)
    kept.score = kept.detailed_results.score
    programs = [*best.candidate_programs, {"score": scores[0], "program": write_back(student, own)}]
    kept.candidate_programs = sorted(programs, key=lambda listed: _last_if_unknown(listed["score"]))
    return kept


def _last_if_unknown(score: float) -> tuple[bool, float]:
    """Sorts the best first, and what was not validated last."""
    return math.isnan(score), -score


def _unrefined(student: Any, found: dict[str, str], warmed: Any, problem: Problem, ended: BaseException) -> Any:
    """What the first optimizer found, or the student's instructions where they are as good on the validation rows."""
    texts = [_instructions(student), found]
    details = getattr(warmed, "detailed_results", None)
    if isinstance(ended, UnvalidatedError):  # it found something, too
        texts.append(_instructions(ended.program))
        details = ended.detailed_results
    try:
        scores = [mean(row_scores) for row_scores in _compared(problem, texts)]
    except Exception as error:
        raise _unvalidated(write_back(student, texts[-1]), details, error) from ended
    kept = write_back(student, texts[winner(scores)])
    kept.detailed_results, kept.score = details, max(scores)
    ranked = sorted(zip(scores, texts, strict=True), key=lambda pair: _last_if_unknown(pair[0]))
    kept.candidate_programs = [
        {"score": score, "program": write_back(student, instructions)} for score, instructions in ranked
    ]
    warn_caller(
        f"The search that was to go on from what the first optimizer found ended with {type(ended).__name__}: {ended}\n"
        "The best that was validated is returned.",
        RuntimeWarning,
    )
    return kept


def _compared(problem: Problem, texts: Sequence[dict[str, str]]) -> list[tuple[float, ...]]:
    return validation_scores(
        problem.program,
        texts,
        problem.validation,
        problem.metric,
        running=problem.running,
    )


def _unvalidated(program: Any, details: Any, error: Exception) -> UnvalidatedError:
    return UnvalidatedError(
        f"The last comparison with the student failed: {type(error).__name__}: {error}\n`error.program` is the program "
        "that was found, and `error.detailed_results` the record.",
        program=program,
        detailed_results=details,
    )
