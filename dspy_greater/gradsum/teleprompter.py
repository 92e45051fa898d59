"""`GradSumTeleprompter`: textual gradients, summarised, for the instructions of a DSPy program."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspy.teleprompt import Teleprompter

from dspy_greater.errors import SettingsError
from dspy_greater.gradsum.loop import Loop
from dspy_greater.gradsum.meter import Meter
from dspy_greater.gradsum.settings import GradSumSettings
from dspy_greater.gradsum.task import Prompts, Task, pose
from dspy_greater.metric import Metric
from dspy_greater.program.roundtrip import write_back
from dspy_greater.program.validation import winner
from dspy_greater.report.result import GradSumResult, what_stopped
from dspy_greater.run.events import BeamStarted, BeamValidated, Event, IterationTaken, Listener
from dspy_greater.run.journal import Journal
from dspy_greater.run.log import StepLog
from dspy_greater.run.progress import Listeners, ProgressBar, checked_callbacks
from dspy_greater.settings import Auto


class GradSumTeleprompter(Teleprompter):
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
        log_dir: directory for the run's journal. Called again with the same inputs, `compile` goes on
            after the last iteration that was finished.
        callbacks: functions that are called with every event (`dspy_greater.run.events`). One that returns exactly
            `False` ends the loop after that iteration: the best so far is returned, and a run with a `log_dir` can go
            on from there. One that raises is warned of once and not called again.
        listeners: the same, under an older name.
        progress: show a progress bar; None shows it on a terminal only.
        **settings: any field of `GradSumSettings`, such as `beam_width=3, iterations=10, sample_size=30,
            candidates_per_edit=3, subset_size=10, summarize=True, judge_scale=(1, 5), max_lm_calls=None`.

    Raises:
        SettingsError: an unknown or impossible setting.

    ```python
    optimizer = GradSumTeleprompter(
        "Answer customers' questions from the manual.",
        criteria="Full marks for a short, friendly answer that the manual supports.",
        judge_lm=dspy.LM("openai/gpt-5-mini"),
    )
    better = optimizer.compile(program, trainset=train, valset=val)
    better.detailed_results.iterations[0].members[0].summaries
    ```
    """

    def __init__(
        self,
        task_description: str,
        criteria: str | None = None,
        metric: Metric | None = None,
        *,
        judge_lm: Any = None,
        gradient_lm: Any = None,
        editor_lm: Any = None,
        auto: Auto | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        callbacks: Sequence[Listener] = (),
        listeners: Sequence[Listener] = (),
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        _check_text("task_description", task_description)
        if criteria is not None:
            _check_text("criteria", criteria)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise SettingsError(f"seed={seed!r}: give a whole number.")
        self.task_description = task_description
        self.criteria = criteria
        self.metric = metric
        self.judge_lm, self.gradient_lm, self.editor_lm = judge_lm, gradient_lm, editor_lm
        self.settings = GradSumSettings.of(auto, **settings)
        self.seed = seed
        self.log_dir = log_dir
        # Not under the name `callbacks`, where DSPy looks for its own.
        self.listeners = (*checked_callbacks(listeners, "listeners"), *checked_callbacks(callbacks))
        self.progress = progress

    def compile(
        self,
        student: Any,
        trainset: Sequence[Any],
        metric: Metric | None = None,
        *,
        teacher: Any = None,
        valset: Sequence[Any] | None = None,
    ) -> Any:
        """A copy of the student with better instructions, never worse than the student on the validation rows.

        Args:
            student: the program; it is not changed.
            trainset: examples with inputs set; expected values are used where there are any.
            metric: instead of the one given to the constructor.
            teacher: accepted for DSPy's interface.
            valset: rows on which the last beam meets the student's prompts; without any, part of the trainset.

        Returns:
            The program, with `detailed_results` (`GradSumResult`), `candidate_programs` and `score`.
            Ctrl-C, and the end of the budget, end the loop with the best so far; a second Ctrl-C raises.

        Raises:
            GreaterError: one of its subclasses, for input that cannot work; `JudgeError` for a judge that cannot.
        """
        task = pose(
            student,
            trainset,
            self.metric if metric is None else metric,
            valset,
            description=self.task_description,
            criteria=self.criteria,
            lms=(self.judge_lm, self.gradient_lm, self.editor_lm),
            settings=self.settings,
            seed=self.seed,
        )
        with (
            Journal.open(self.log_dir, task.identity()) as journal,
            ProgressBar(show=self.progress) as bar,
        ):
            run = _Run(task, journal, Listeners([bar, StepLog(), *self.listeners]))
            run.search()
            result = run.validate()
        return _finished(student, result)


class _Run:
    """One compile: the loop, and what is kept and told of it."""

    def __init__(self, task: Task, journal: Journal, listeners: Listeners) -> None:
        limits = task.settings
        self._task, self._journal, self._listeners = task, journal, listeners
        self._meter = Meter(max_calls=limits.max_lm_calls, max_tokens=limits.max_lm_tokens)
        self._loop = Loop(task, self._meter)
        self._started = time.monotonic()
        self._interrupted = False

    def search(self) -> None:
        """The loop, from where an interrupted run stopped; Ctrl-C and callbacks end it with what was found."""
        recorded = self._journal.recorded()
        iterations = [event for event in recorded if isinstance(event, IterationTaken)]
        self._tell(BeamStarted(self._task.seed_prompts, self._task.settings.iterations), record=not recorded)
        if self._listeners.stopped:
            return
        try:
            for iteration, fresh in self._loop.run(iterations):
                self._tell(iteration, record=fresh)
                if self._listeners.stopped:
                    return
        except KeyboardInterrupt:
            self._interrupted = True

    def validate(self) -> GradSumResult:
        """The last beam meets the student's prompts on the validation rows; a tie keeps the student's."""
        task, loop = self._task, self._loop
        finalists = [task.seed_prompts]
        finalists += [prompts for prompts in loop.beam if prompts != task.seed_prompts]
        scores = loop.validate(finalists)
        validated = BeamValidated(tuple(finalists), tuple(scores), winner(scores))
        self._tell(validated, record=False)
        by_module = self._meter.spent()
        _warn_of_unanswered(by_module)
        return GradSumResult(
            iterations=tuple(loop.iterations),
            finalists=validated.finalists,
            validation=validated.scores,
            winner=validated.winner,
            train_rows=len(task.train),
            validation_rows=len(task.validation),
            seconds=time.monotonic() - self._started,
            spent_by_module=by_module,
            interrupted=self._interrupted,
            out_of_budget=loop.out_of_budget,
            stopped_by=what_stopped(
                interrupted=self._interrupted, called_off=self._called_off, out_of_budget=loop.out_of_budget
            ),
        )

    @property
    def _called_off(self) -> bool:
        return self._listeners.stopped and len(self._loop.iterations) < self._task.settings.iterations

    def _tell(self, event: Event, *, record: bool) -> None:
        if record:
            self._journal.append(event)
        self._listeners.emit(event, replayed=not record)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{name}={value!r}: give a text that is not empty.")


def _warn_of_unanswered(spent: dict[str, dict[str, int]]) -> None:
    given_up = {module: counted["unanswered"] for module, counted in spent.items() if counted["unanswered"]}
    if given_up:
        told = ", ".join(f"{count} of {module}" for module, count in given_up.items())
        warnings.warn(
            f"Questions that were given up because no answer could be used: {told}. Outputs without a verdict "
            "count as the worst; the other questions were left out.",
            stacklevel=4,
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
