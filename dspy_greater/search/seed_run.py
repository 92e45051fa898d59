"""The student's own run on the training rows, before the first search: what it says of program, predictors and metric.

Whatever can only be known by running the program is known here: what fails on every row is an error that names the
cause, and what fails on some rows is one warning that counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspy_greater.errors import DataError, ProgramError, UnusedPredictorError
from dspy_greater.metric import refuse_useless_metric
from dspy_greater.notices import warn_caller
from dspy_greater.program.copies import modules_that_run_copies
from dspy_greater.program.dataset import name_rows
from dspy_greater.program.inputs import named, shortened
from dspy_greater.program.predictors import Predictor
from dspy_greater.program.traced_run import calls_of

if TYPE_CHECKING:
    from dspy_greater.program.rollout import Rollout


@dataclass(frozen=True)
class SeedRun:
    """Runs of the student, one on each training row; `numbers` says which rows of the caller's trainset these are."""

    rollouts: tuple[Rollout, ...]
    rows: tuple[Any, ...]
    numbers: tuple[int, ...]

    @property
    def called(self) -> frozenset[str]:
        """The predictors that were called on any row."""
        return frozenset(call.predictor for rollout in self.rollouts for call in rollout.trace)

    def given_to(self, predictor: str) -> dict[int, Mapping[str, Any]]:
        """The inputs of a predictor's last call on each row on which it was called."""
        calls = {
            row: rollout.calls[predictor] for row, rollout in enumerate(self.rollouts) if predictor in rollout.calls
        }
        return {row: call.inputs for row, call in calls.items()}

    def place(self, index: int) -> str:
        """A training row for a message."""
        return f"row {self.numbers[index]} of the trainset, {shortened(dict(self.rows[index].inputs()))}"

    def failed(self, *kinds: str) -> list[int]:
        """The training rows with a failure of these kinds."""
        return [index for index, rollout in enumerate(self.rollouts) if rollout.failure in kinds]


def check_seed_run(run: SeedRun) -> None:
    """Refuse what no instruction can mend, and warn of rows that failed for another reason than an answer's form.

    Raises:
        MetricError: the metric failed on every row.
        ProgramError: the program failed on every row before it called a predictor, or by what this machine lacks.
    """
    _refuse_broken_program(run)
    refuse_useless_metric([rollout.error for rollout in run.rollouts])
    _warn_of_failures(run)


def refuse_nameless_inputs(run: SeedRun, predictors: Sequence[Predictor]) -> None:
    """Raises `DataError` when a predictor was called with none of its inputs: the rows name them differently."""
    for predictor in predictors:
        calls = [call for rollout in run.rollouts for call in calls_of(rollout.trace, predictor.name)]
        if calls and not any(call.inputs for call in calls):
            raise DataError(
                f"Predictor `{predictor.name}` takes {named(predictor.input_fields)}, and was called on the training "
                f"rows with nothing of that name; the rows' inputs are {named(list(run.rows[0].inputs()))}. Rename "
                "the inputs of the rows, or of the signature."
            )


def unused_error(run: SeedRun, names: Sequence[str], program: Any, *, named: bool = False) -> UnusedPredictorError:
    """That there is nothing to search for these predictors; `named` that the user asked for them by name."""
    leave_out = " Or leave it out of predictors=[...]." if named else ""
    return UnusedPredictorError(f"{_not_called(names, len(run.rows))}{_reason(run)} {_hint(program)}{leave_out}")


def kept_as_they_are(names: Sequence[str], rows: int) -> str:
    """What becomes of predictors that were not called, for a warning.

    >>> kept_as_they_are(["query"], 4)
    'Predictor `query` was not called on any of the 4 training rows. It keeps its instruction.'
    """
    its = "They keep their instructions." if len(names) > 1 else "It keeps its instruction."
    return f"{_not_called(names, rows)} {its}"


def warn_if_all_failed(run: SeedRun) -> None:
    """Where no row gave a score, the search has little to go by."""
    if any(rollout.error is None for rollout in run.rollouts):
        return
    first = run.rollouts[0]
    warn_caller(
        f"The program failed on all {len(run.rollouts)} training rows with the student's instructions; on "
        f"{run.place(0)}, {first.source} failed with {first.error}\nThe search goes on from there. If no instruction "
        "can help, check the adapter and the LM's max_tokens.",
        RuntimeWarning,
    )


def _refuse_broken_program(run: SeedRun) -> None:
    count, first = len(run.rollouts), run.rollouts[0]
    if len(run.failed("program", "setup")) < count:
        return
    try_it = f"Try program(**trainset[{run.numbers[0]}].inputs()) and mend it."
    if not run.called:
        raise ProgramError(
            f"The program failed on all {count} training rows before it called a predictor; on {run.place(0)}, "
            f"{first.source} raised {first.error}. {try_it}"
        )
    if len(run.failed("setup")) == count and len({rollout.error for rollout in run.rollouts}) == 1:
        raise ProgramError(
            f"The program failed on all {count} training rows, and not by what the language model wrote: on "
            f"{run.place(0)}, after predictor `{first.trace[-1].predictor}` was called, {first.source} raised "
            f"{first.error}\nNo instruction can mend that. {try_it}"
        )


def _warn_of_failures(run: SeedRun) -> None:
    count = len(run.rollouts)
    metric, others = run.failed("metric"), run.failed("lm", "setup", "program")
    if metric:
        warn_caller(
            f"The metric failed on {len(metric)} of {count} training rows, which count as mistakes: "
            f"{_listed(run, metric)}. On {run.place(metric[0])}, {run.rollouts[metric[0]].error}. Mend the metric or "
            "leave such rows out.",
            RuntimeWarning,
        )
    if others and len(others) < count:
        first = run.rollouts[others[0]]
        warn_caller(
            f"The program failed on {len(others)} of {count} training rows, which count as mistakes: "
            f"{_listed(run, others)}. On {run.place(others[0])}, {first.source} failed with {first.error}",
            RuntimeWarning,
        )


def _listed(run: SeedRun, indices: Sequence[int]) -> str:
    told = name_rows(sorted({run.numbers[index] for index in indices}))
    return f"{told[0].lower()}{told[1:]} of the trainset"


def _not_called(names: Sequence[str], rows: int) -> str:
    subject = f"Predictors {named(names)} were" if len(names) > 1 else f"Predictor {named(names)} was"
    return f"{subject} not called on any of the {rows} training rows."


def _reason(run: SeedRun) -> str:
    """Why the first run did not come to a predictor, if it failed."""
    first = run.rollouts[0]
    return "" if first.error is None else f" On {run.place(0)}, {first.source} failed with {first.error}."


def _hint(program: Any) -> str:
    """What hides a predictor, if something does."""
    hiding = modules_that_run_copies(program)
    if hiding:
        return f"{hiding[0]} runs copies of a program: compile the inner program and wrap the result."
    return "Try program(**trainset[0].inputs()) and see which way it goes."
