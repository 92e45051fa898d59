"""`GradSum`: textual gradients, summarised, for the instructions of a DSPy program."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dspy.teleprompt import Teleprompter
from typing_extensions import Unpack

from dspy_greater.errors import OutageError, SettingsError, UnvalidatedError
from dspy_greater.gradsum.estimate import estimate
from dspy_greater.gradsum.evaluate import mean_score
from dspy_greater.gradsum.loop import Loop
from dspy_greater.gradsum.meter import Meter
from dspy_greater.gradsum.settings import GradSumKnobs, GradSumSettings
from dspy_greater.gradsum.task import Options, Prompts, Task, prepare
from dspy_greater.metric import Metric
from dspy_greater.notices import warn_caller
from dspy_greater.program.rollout import Rollout
from dspy_greater.program.roundtrip import saved, write_back
from dspy_greater.program.validation import warn_of_one_answer, winner
from dspy_greater.report.file import ReportFile
from dspy_greater.report.result import GradSumResult, what_stopped
from dspy_greater.run.best import BestFile
from dspy_greater.run.events import (
    BeamStarted,
    BeamValidated,
    Event,
    IterationTaken,
    Listener,
    NotCalled,
    Output,
    Warned,
)
from dspy_greater.run.journal import Journal
from dspy_greater.run.log import StepLog
from dspy_greater.run.progress import Listeners, ProgressBar, checked_callbacks
from dspy_greater.run.stop import BY_FILE, StopFile, by_signal, second, terminable
from dspy_greater.run.trackers import checked_trackers, tracked
from dspy_greater.settings import Auto, checked_log_dir, checked_seed, spelled_out

_LOG = logging.getLogger(__name__)


class Keywords(GradSumKnobs, total=False):
    """The arguments of `GradSum` that most people leave alone, beside the loop's knobs."""

    gradient_lm: Any
    editor_lm: Any
    callbacks: Sequence[Listener]
    listeners: Sequence[Listener]
    progress: bool | None
    use_mlflow: bool
    use_wandb: bool


class GradSum(Teleprompter):
    """Optimises a program's instructions by summarised textual feedback (GRAD-SUM, arXiv 2407.12865).

    A judge scores what the program writes by your own criteria, with or without expected answers; or a metric
    does; or both, and then the metric decides and the judge's score settles ties. Every predictor
    is edited, except those whose instructions list tools.

    Args:
        task_description: what the program is for, in a sentence or two.
        criteria: what a good output is, in your own words; gives an LLM judge.
        metric: metric(example, prediction, trace=None) -> bool, number or Prediction(score, feedback). With one
            predictor, the feedback of an output below full score is its gradient.
        judge_lm: judges; by default `dspy.settings.lm`, else the program's own.
        gradient_lm: writes gradients and summaries; by default the judge's.
        editor_lm: writes candidate prompts; by default the gradients'.
        auto: "light" (3 iterations of 10 rows), "medium" (6 of 20), "heavy" (10 of 30) or None, the paper's values.
        seed: decides every random choice.
        log_dir: directory for the run's journal, the best so far (`best.json`, `best_program.json`) and a page that
            shows the run (`report.html`). Called again with the same inputs, `compile` goes on after the last
            iteration that was finished.
        callbacks: functions that are called with every event (`dspy_greater.run.events`). One that returns exactly
            `False` ends the loop after that iteration: the best so far is returned, and a run with a `log_dir` can go
            on from there. One that raises is warned of once and not called again.
        listeners: the same, under an older name.
        progress: show a progress bar; None shows it on a terminal and in a notebook.
        use_mlflow, use_wandb: record the run in MLflow, in Weights & Biases (the extras `mlflow` and `wandb`):
            settings, the numbers of each iteration, `report.html`, the best program. Their faults are warnings.
        **keywords: besides those above, any field of `GradSumSettings`, which explains them.

    Raises:
        SettingsError: an unknown or impossible setting.
        MissingExtraError: a tracker that was asked for is not installed.

    ```python
    optimizer = GradSum(
        "Answer customers' questions from the manual.",
        criteria="Full marks for a short, friendly answer that the manual supports.",
        judge_lm=dspy.LM("openai/gpt-5-mini"),
    )
    better = optimizer.compile(program, trainset=train, valset=val)
    better.detailed_results.iterations[0].members[0].summaries
    ```
    """

    @spelled_out(Keywords)
    def __init__(
        self,
        task_description: str,
        criteria: str | None = None,
        metric: Metric | None = None,
        *,
        judge_lm: Any = None,
        auto: Auto | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        super().__init__()
        _check_text("task_description", task_description)
        if criteria is not None:
            _check_text("criteria", criteria)
        knobs: dict[str, Any] = dict(keywords)
        self.task_description = task_description
        self.criteria = criteria
        self.metric = metric
        self.judge_lm = judge_lm
        self.gradient_lm, self.editor_lm = knobs.pop("gradient_lm", None), knobs.pop("editor_lm", None)
        self.seed = checked_seed(seed)
        self.log_dir = checked_log_dir(log_dir)
        # Not under the name `callbacks`, where DSPy looks for its own.
        listeners = checked_callbacks(knobs.pop("listeners", None), "listeners")
        self.listeners = (*listeners, *checked_callbacks(knobs.pop("callbacks", None)))
        self.progress: bool | None = knobs.pop("progress", None)
        self.trackers = checked_trackers(
            use_mlflow=knobs.pop("use_mlflow", False), use_wandb=knobs.pop("use_wandb", False)
        )
        self.settings = GradSumSettings.of(auto, **knobs)

    def compile(
        self,
        student: Any,
        trainset: Sequence[Any],
        metric: Metric | None = None,
        *,
        teacher: Any = None,
        valset: Sequence[Any] | None = None,
        dry_run: bool = False,
    ) -> Any:
        """A copy of the student with better instructions, never worse than the student on the validation rows.

        Args:
            student: the program; it is not changed.
            trainset: examples with inputs set; expected values are used where there are any.
            metric: instead of the one given to the constructor.
            teacher: accepted for DSPy's interface.
            valset: rows on which the last beam meets the student's prompts; without any, part of the trainset.
            dry_run: only say what the run is going to cost, as an `Estimate`. One small iteration is taken for that,
                on four rows at most; nothing is written, and no callback hears of it.

        Returns:
            The program, with `detailed_results` (`GradSumResult`), `candidate_programs` and `score`.
            Ctrl-C, SIGTERM, and the end of the budget, end the loop with the best so far; a second signal raises. A
            file `STOP` in `log_dir` does after the iteration that is under way, and is removed. So does an error of
            any kind, once a prompt besides the student's was chosen: what was found is validated and
            returned, with a warning, and `detailed_results.stopped_by` says what happened.

        Raises:
            GreaterError: one of its subclasses, for input that cannot work; `JudgeError` for a judge that cannot.
            UnvalidatedError: the loop ended early, and its validation failed too; carries what was found.
            Exception: what ended the loop before any other prompt was chosen.
        """
        task = prepare(
            student,
            trainset,
            self.metric if metric is None else metric,
            valset,
            Options(
                description=self.task_description,
                criteria=self.criteria,
                lms=(self.judge_lm, self.gradient_lm, self.editor_lm),
                settings=self.settings,
                seed=self.seed,
            ),
        )
        if dry_run:
            return estimate(task)
        stop_file, identity = StopFile(self.log_dir), task.identity()
        with (
            Journal.open(self.log_dir, identity, code=task.code()) as journal,
            ProgressBar(show=self.progress) as bar,
            tracked(self.trackers, identity, self.log_dir) as (trackers, folder),
            ReportFile(folder, identity, journal.versions) as report,
            BestFile(self.log_dir, partial(saved, student)) as best_file,
            terminable(),
            stop_file,
        ):
            listeners = Listeners([bar, StepLog(), best_file, report, *trackers, *self.listeners], stop_file)
            run = _Run(task, journal, listeners)
            run.search()
            result = run.validate()
        stop_file.obeyed(ended=run.called_off == BY_FILE)
        if run.unvalidated is not None:
            raise _unvalidated(student, result) from run.unvalidated
        if run.error is not None:
            warn_caller(
                f"The search ended early, {run.error}\nThe best that was validated is returned.", RuntimeWarning
            )
        return _finished(student, result)


class _Run:
    """One compile: the loop, and what is kept and told of it.

    Attributes:
        error: where and by which error the loop ended early, if one did it.
        unvalidated: the error that kept what was found from being validated, if one did.
    """

    def __init__(self, task: Task, journal: Journal, listeners: Listeners) -> None:
        limits = task.settings
        self._task, self._journal, self._listeners = task, journal, listeners
        self._meter = Meter(max_calls=limits.max_lm_calls, max_tokens=limits.max_lm_tokens)
        self._told_before = [event for event in journal.recorded() if isinstance(event, NotCalled)]
        self._loop = Loop(task, self._meter, [name for event in self._told_before for name in event.predictors])
        self._started = time.monotonic()
        self._interrupted: str | None = None
        self.error: str | None = None
        self.unvalidated: Exception | None = None

    def search(self) -> None:
        """The loop, from where an interrupted run stopped; Ctrl-C, callbacks or an error end it with what was found.

        All that is recorded is replayed first.

        Raises:
            Exception: whatever came before any prompt but the student's was chosen.
        """
        recorded = self._journal.recorded()
        iterations = [event for event in recorded if isinstance(event, IterationTaken)]
        self._tell(BeamStarted(self._task.seed_prompts, self._task.settings.iterations), record=not recorded)
        for event in self._told_before:
            self._tell(event, record=False)
        if not iterations and self._listeners.stopped:
            return
        try:
            for iteration, fresh in self._loop.run(iterations):
                if fresh and iteration.iteration == 0 and self._loop.uncalled:
                    self._tell(NotCalled(tuple(sorted(self._loop.uncalled))), record=True)
                self._tell(iteration, record=fresh)
                if len(self._loop.iterations) >= len(iterations) and self._listeners.stopped:
                    return
        except KeyboardInterrupt as interrupt:
            self._interrupted = by_signal(interrupt)
        except Exception as error:
            if self._nothing_to_lose():
                raise
            if isinstance(error, OutageError):
                self._task.servers.stop_waiting()
            self._stop(error, f"after iteration {len(self._loop.iterations)} of {self._task.settings.iterations}")

    def validate(self) -> GradSumResult:
        """The last beam meets the student's prompts on the validation rows; a tie keeps the student's.

        So does a first Ctrl-C, and an error, which is kept in `unvalidated`.
        """
        task, loop = self._task, self._loop
        finalists = [task.seed_prompts]
        finalists += [prompts for prompts in loop.beam if prompts != task.seed_prompts]
        scores: list[tuple[float, ...]] = [(math.nan,)] * len(finalists)
        outputs: list[tuple[Output, ...]] = []
        runs: list[tuple[Rollout, ...]] = []
        try:
            outputs, runs = loop.validate(finalists)
            scores = [mean_score(group) for group in outputs]
            self._tell(BeamValidated(tuple(finalists), tuple(scores), winner(scores)), record=False)
        except KeyboardInterrupt as interrupt:
            if self._interrupted:
                raise second(interrupt) from interrupt
            self._interrupted = by_signal(interrupt)
        except Exception as error:
            if self._nothing_to_lose():
                raise
            self._stop(error, "in the validation")
            self.unvalidated = error
        by_module = self._meter.spent()
        _warn_of_unanswered(by_module)
        if runs and winner(scores) > 0:
            warn_of_one_answer(task.validation, runs[winner(scores)])
        return GradSumResult(
            iterations=tuple(loop.iterations),
            finalists=tuple(finalists),
            validation=tuple(scores),
            winner=winner(scores),
            subscores=tuple(tuple(output.score[0] for output in rows) for rows in outputs),
            train_rows=len(task.train),
            validation_rows=len(task.validation),
            seconds=time.monotonic() - self._started,
            spent_by_module=by_module,
            faults=self._task.servers.faults,
            interrupted=self._interrupted is not None,
            out_of_budget=loop.out_of_budget,
            stopped_by=self.error
            or what_stopped(
                interrupted=self._interrupted, called_off=self.called_off, out_of_budget=loop.out_of_budget
            ),
        )

    @property
    def called_off(self) -> str | None:
        """What kept iterations from being taken: "callback" or "STOP file"."""
        left = len(self._loop.iterations) < self._task.settings.iterations
        return self._listeners.stopped_by if left else None

    def _nothing_to_lose(self) -> bool:
        return all(prompts == self._task.seed_prompts for prompts in self._loop.beam)

    def _stop(self, error: Exception, where: str) -> None:
        told = f"{where}: {type(error).__name__}: {error}"
        self.error = told if self.error is None else f"{self.error}; then, {told}"
        _LOG.error("The search ended early, %s", where, exc_info=error)
        self._listeners.emit(Warned(f"The search ended early, {told}"))

    def _tell(self, event: Event, *, record: bool) -> None:
        if record:
            self._journal.append(event)
        self._listeners.emit(event, replayed=not record)


GradSumTeleprompter = GradSum  # the name that DSPy's own optimizers would give it


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{name}={value!r}: give a text that is not empty.")


def _warn_of_unanswered(spent: dict[str, dict[str, int]]) -> None:
    given_up = {module: counted["unanswered"] for module, counted in spent.items() if counted["unanswered"]}
    if given_up:
        told = ", ".join(f"{count} of {module}" for module, count in given_up.items())
        warn_caller(
            f"Questions that were given up because no answer could be used: {told}. Outputs without a verdict "
            "count as the worst; the other questions were left out."
        )


def _finished(student: Any, detailed: GradSumResult) -> Any:
    """The student with the winning prompts and DSPy's customary attachments."""
    best = write_back(student, detailed.prompts)
    scored: list[tuple[float, Prompts]] = [
        (score[0], prompts) for score, prompts in zip(detailed.validation, detailed.finalists, strict=True)
    ]
    ranked = sorted(scored, key=lambda pair: -pair[0])
    best.candidate_programs = [{"score": score, "program": write_back(student, prompts)} for score, prompts in ranked]
    best.score = detailed.score
    best.detailed_results = detailed
    return best


def _unvalidated(student: Any, detailed: GradSumResult) -> UnvalidatedError:
    """The error that carries what was found where nothing could be compared with the student."""
    best = next(prompts for prompts in detailed.finalists if prompts != detailed.seed_prompts)
    return UnvalidatedError(
        f"The search ended early, {detailed.stopped_by}\nSo no prompt could be compared with the student's on the "
        f"validation rows. The best on the training rows is {best!r}: `error.program` is the student with it, and "
        "`error.detailed_results` the record. A run with a log_dir goes on after the last iteration.",
        program=write_back(student, best),
        detailed_results=detailed,
    )
