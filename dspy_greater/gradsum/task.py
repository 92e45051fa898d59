"""Student, rows, criteria, metric and LMs -> a checked task, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import dspy

from dspy_greater.errors import MetricError, ProgramError, SettingsError
from dspy_greater.gradsum.settings import GradSumSettings
from dspy_greater.metric import Metric, RowMetric
from dspy_greater.notices import warn_caller
from dspy_greater.program.asked_lm import for_search
from dspy_greater.program.code import code_of_run
from dspy_greater.program.dataset import as_list, check_examples, numbers_in, split
from dspy_greater.program.fingerprint import described, described_lm, fingerprint
from dspy_greater.program.inputs import refuse_strange_inputs
from dspy_greater.program.predictors import Predictor, predictors_of, refuse_unusable
from dspy_greater.program.rollout import pin_lms, renamed, searching_copy
from dspy_greater.program.servers import Servers
from dspy_greater.run.serialise import JSON

Prompts = dict[str, str]  # predictor name -> instruction
# Settings that say how the work is done and not what comes out: a run may go on with others.
_OF_THE_MACHINE = ("max_seconds", "max_outage_seconds", "request_timeout")


@dataclass(frozen=True)
class Task:
    """All that the loop needs, checked."""

    description: str
    criteria: str | None
    metric: RowMetric | None
    program: Any  # a copy of the student in which every predictor holds its LM
    predictors: tuple[Predictor, ...]  # all predictors
    edited: tuple[Predictor, ...]  # those whose prompts are edited
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    judge_lm: Any
    gradient_lm: Any
    editor_lm: Any
    settings: GradSumSettings
    seed: int
    numbers: tuple[int, ...] = ()  # which rows of the caller's trainset the training rows are
    servers: Servers = field(default_factory=Servers)  # waits for answers that do not come

    @property
    def seed_prompts(self) -> Prompts:
        """The student's instructions."""
        return {predictor.name: predictor.instruction for predictor in self.edited}

    def validation_calls(self, per_run: int = 1) -> int:
        """LM calls of the final comparison when a run of the program makes so many."""
        return (self.settings.beam_width + 1) * len(self.validation) * self.calls_per_output(per_run)

    def calls_per_output(self, per_run: int = 1) -> int:
        """LM calls to generate and to judge one output."""
        return per_run + int(self.criteria is not None)

    def identity(self) -> dict[str, JSON]:
        """What must be the same for an interrupted run to be continued."""
        return {
            "optimizer": "GRAD-SUM",
            "settings": {name: value for name, value in asdict(self.settings).items() if name not in _OF_THE_MACHINE},
            "seed": self.seed,
            "task_description": self.description,
            "criteria": self.criteria,
            "metric": self.metric.name if self.metric else None,
            "predictors": {predictor.name: described(predictor) for predictor in self.predictors},
            "judge_lm": described_lm(self.judge_lm),
            "gradient_lm": described_lm(self.gradient_lm),
            "editor_lm": described_lm(self.editor_lm),
            "train": fingerprint(self.train),
            "validation": fingerprint(self.validation),
        }

    def code(self) -> dict[str, str]:
        """Digests of the code that a run depends on."""
        return code_of_run(self.metric and self.metric.function, self.program, self.predictors)


@dataclass(frozen=True)
class Options:
    """How a program is to be optimised; `lms` are judge, gradient and editor LM, or None for the default."""

    description: str
    criteria: str | None
    lms: tuple[Any, Any, Any]
    settings: GradSumSettings
    seed: int


def prepare(
    student: Any,
    trainset: Sequence[Any],
    metric: Metric | None,
    valset: Sequence[Any] | None,
    options: Options,
) -> Task:
    """Check everything and gather it.

    Raises:
        DataError: rows are missing or do not say which fields are inputs.
        MetricError: there is neither a metric nor criteria, or the metric cannot be called.
        ProgramError: nothing to optimise, or no language model.
        SettingsError: the budget does not even cover the final comparison.
    """
    trainset, valset = as_list(trainset, name="trainset"), as_list(valset, name="valset")
    check_examples(trainset)
    if valset:
        check_examples(valset, name="valset")
    if metric is None and options.criteria is None:
        raise MetricError(
            "There is nothing to score outputs by. Pass GradSumTeleprompter(criteria=...) for a judge, a metric as "
            "GradSumTeleprompter(metric=...) or compile(student, trainset, metric), or both."
        )
    refuse_unusable(predictors_of(student))
    refuse_strange_inputs(student, trainset)
    refuse_strange_inputs(student, valset or (), name="valset")
    train, validation = split(trainset, valset, settings=options.settings, seed=options.seed)
    timeout = options.settings.request_timeout
    program = searching_copy(pin_lms(student, timeout=timeout), {}, options.seed)
    predictors = predictors_of(program)
    judge_lm, gradient_lm, editor_lm = (
        for_search(renamed(lm), timeout=timeout) for lm in _resolved(options.lms, predictors)
    )
    task = Task(
        description=options.description,
        criteria=options.criteria,
        metric=None if metric is None else RowMetric(metric),
        program=program,
        predictors=predictors,
        edited=_editable(predictors),
        train=train,
        validation=validation,
        judge_lm=judge_lm,
        gradient_lm=gradient_lm,
        editor_lm=editor_lm,
        settings=options.settings,
        seed=options.seed,
        servers=Servers(options.settings.max_outage_seconds),
        numbers=numbers_in(train, trainset),
    )
    _check_budget(task)
    return task


def _resolved(lms: tuple[Any, Any, Any], predictors: Sequence[Predictor]) -> tuple[Any, Any, Any]:
    """Judge, gradient and editor LM: each is the one before it where none is given, the first DSPy's own."""
    judge, gradient, editor = lms
    judge = judge or dspy.settings.lm or predictors[0].lm
    gradient = gradient or judge
    return judge, gradient, editor or gradient


def _editable(predictors: Sequence[Predictor]) -> tuple[Predictor, ...]:
    """The predictors whose instructions may be rewritten: not those that list tools, as ReAct's do."""
    editable = tuple(predictor for predictor in predictors if not predictor.lists_tools)
    if not editable:
        raise ProgramError(
            "Every predictor lists its tools in its instruction, and rewriting that would lose them. Optimise a "
            "program with another predictor."
        )
    kept = [predictor.name for predictor in predictors if predictor.lists_tools]
    if kept:
        warn_caller(
            f"Predictors {', '.join(kept)} list their tools in their instructions and keep them as they are.",
        )
    return editable


def _check_budget(task: Task) -> None:
    limit = task.settings.max_lm_calls
    least = task.validation_calls()
    if limit is not None and limit < least:
        raise SettingsError(
            f"max_lm_calls={limit} does not cover the final comparison: {task.settings.beam_width + 1} programs on "
            f"{len(task.validation)} rows, {task.calls_per_output()} calls each at least, are {least}. Raise it, or "
            "lower validation_rows or beam_width."
        )
