"""How programs are judged: the same rows, metric, model and adapter for all, by `dspy.Evaluate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

from benchmarks.harness.candidates import Candidate, Scored, instructions_of
from benchmarks.harness.cells import Accuracy, Contender
from benchmarks.harness.patience import rows_run_once
from dspy_greater.errors import ProgramError

MOST_RECORDED = 3


@dataclass(frozen=True)
class Verdict:
    """The winner on the dev split, and everything that met there."""

    program: dspy.Module
    origin: str
    contenders: tuple[Contender, ...]


def accuracy(
    program: dspy.Module, rows: Sequence[dspy.Example], metric: Callable[..., float], threads: int
) -> Accuracy:
    """The program on the rows; a row on which it fails is wrong.

    Raises:
        ProgramError: it failed on every row, and never because of what the model wrote.
    """
    errors: list[Exception] = []
    lock = threading.Lock()

    def watched(**inputs: Any) -> Any:
        try:
            return program(**inputs)
        except Exception as error:  # counted, and then Evaluate's to score
            with lock:
                errors.append(error)
            raise

    evaluate = dspy.Evaluate(
        devset=list(rows), metric=metric, num_threads=threads, max_errors=2 * len(rows) + 1, provide_traceback=False
    )
    with rows_run_once():
        scores = [float(score) for _, _, score in evaluate(watched).results]  # pyright: ignore[reportArgumentType]
    if len(errors) >= len(rows) and not any(isinstance(error, AdapterParseError) for error in errors):
        first = errors[0]
        raise ProgramError(
            f"The program failed on all {len(rows)} rows; on the first, {type(first).__name__}: {first}. "
            "The model cannot be called, or the program cannot run."
        )
    return Accuracy.of([int(score >= 1.0) for score in scores], min(len(errors), len(rows)))


def decide(
    seed: dspy.Module,
    returned: dspy.Module | None,
    recorded: Sequence[Scored],
    score: Callable[[dspy.Module], float],
) -> Verdict:
    """The seed, what the optimizer returned and the best three of what else it recorded meet on the dev split.

    A tie keeps the earlier of these three, and so the seed before all.
    """
    entries: list[tuple[str, dspy.Module, Scored | None]] = [("seed", seed, None)]
    if returned is not None:
        entries.append(("returned", without_models(returned), None))
    fitting = [each for each in recorded if each.candidate.fits(seed)]
    there = {Candidate.of(program) for _, program, _ in entries}
    others = [each for each in fitting if each.candidate not in there][:MOST_RECORDED]
    entries += [("recorded", each.candidate.written_to(seed), each) for each in others]
    known = {each.candidate: each for each in fitting}
    judged: dict[Candidate, float] = {}
    contenders: list[Contender] = []
    best: tuple[float, str, dspy.Module] | None = None
    for origin, program, own in entries:
        candidate = Candidate.of(program)
        if candidate in judged:
            continue
        judged[candidate] = score(program)
        own = own or known.get(candidate)
        contenders.append(_contender(origin, program, judged[candidate], own))
        if best is None or judged[candidate] > best[0]:
            best = (judged[candidate], origin, program)
    _, origin, program = best or (0.0, "seed", seed)
    return Verdict(program, origin, tuple(contenders))


def without_models(program: dspy.Module) -> dspy.Module:
    """A copy whose predictors take their model from the settings, and not the metered one of the search."""
    copied = program.deepcopy()
    for _, predictor in copied.named_predictors():
        predictor.lm = None
    return copied


def _contender(origin: str, program: dspy.Module, dev_accuracy: float, own: Scored | None) -> Contender:
    return Contender(
        origin=origin,
        instructions=instructions_of(program),
        demos={name: len(predictor.demos) for name, predictor in program.named_predictors() if predictor.demos},
        dev_accuracy=dev_accuracy,
        own_score=None if own is None else own.score,
        own_rows=None if own is None else own.rows,
    )
