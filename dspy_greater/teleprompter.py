"""`GReaTerTeleprompter`: gradients over reasoning for the instructions of a DSPy program."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspy.teleprompt import Teleprompter

from .algorithm import minimise
from .errors import ProgramError, SettingsError
from .metric import Metric, refuse_useless_metric
from .objective import Objective
from .problem import Problem, Target, pose
from .report.result import CompileResult, PredictorResult
from .rollout import searching_copy
from .rows import as_list
from .run.events import Evaluation, Listener, SearchStarted, StepTaken, Validated
from .run.journal import Journal
from .run.progress import Listeners, ProgressBar
from .search import begin
from .settings import Auto, Settings, Variant
from .validation import validation_scores, winner
from .warm_start import compile_warm
from .writeback import round_trip, write_back


class GReaTerTeleprompter(Teleprompter):
    """Optimises a program's instructions with numerical gradients through the model's own reasoning.

    Every predictor that has gold values for one of its output fields is optimised in turn. The
    LM behind it must be an open-weight model: `local_lm(...)`, or a served one whose weights can be
    loaded (`weights=` says which, where its name does not).

    Args:
        metric: metric(example, prediction, trace=None) -> bool, number or Prediction(score=...).
        variant: "paper" is Algorithm 1 as published.
        auto: "light" (20 steps, 24 rows), "medium" (50, 50), "heavy" (105, 100) or None, the paper's
            105 steps on 50 rows.
        seed: decides every random choice; the same seed gives the same instruction on CPU in fp32.
        log_dir: directory for the run's journal. Called again with the same inputs, `compile` goes on
            where an interrupted run stopped.
        weights: an engine, a (model, tokenizer) pair, a path or a hub id; or a mapping to one of these
            by predictor name or LM name.
        extractor: text between reasoning and answer for the loss; by default the adapter's own.
        warm_start: another optimizer, such as `GradSumTeleprompter`, that runs first; the search goes on from
            the instructions that it finds. The floor is still the student that `compile` was given. To resume
            both, give both a `log_dir`, and not the same.
        listeners: called with every event (`dspy_greater.run.events`).
        progress: show a progress bar; None shows it on a terminal only.
        **settings: any field of `Settings`.

    Raises:
        SettingsError: an unknown or impossible setting.

    ```python
    optimizer = GReaTerTeleprompter(metric=exact_match, auto="light", log_dir="runs/navigate")
    better = optimizer.compile(program, trainset=train, valset=val)
    better.detailed_results.steps[0].candidates
    ```
    """

    def __init__(
        self,
        metric: Metric | None = None,
        *,
        variant: Variant = "paper",
        auto: Auto | None = "light",
        seed: int = 0,
        log_dir: str | Path | None = None,
        weights: Any = None,
        extractor: str | None = None,
        warm_start: Teleprompter | None = None,
        listeners: Sequence[Listener] = (),
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise SettingsError(f"seed={seed!r}: give a whole number.")
        self.metric = metric
        self.settings = Settings.of(auto, variant=variant, **settings)
        self.seed = seed
        self.log_dir = log_dir
        self.weights = weights
        self.extractor = extractor
        self.warm_start = warm_start
        self.listeners = tuple(listeners)
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
            trainset: examples with inputs set and gold values for an output field.
            metric: instead of the one given to the constructor.
            teacher: accepted for DSPy's interface; gradients need none.
            valset: rows on which the finalists meet the seed; without any, part of the trainset.

        Returns:
            The program, with `detailed_results` (`CompileResult`), `candidate_programs` and `score` (0 to 1).
            Ctrl-C ends the search early with the best so far; a second one raises.

        Raises:
            GreaterError: one of its subclasses, before the search, for input that cannot work.
        """
        trainset, valset = as_list(trainset, name="trainset"), as_list(valset, name="valset")
        problem = pose(
            student,
            trainset,
            self.metric if metric is None else metric,
            valset,
            settings=self.settings,
            seed=self.seed,
            weights=self.weights,
            extractor=self.extractor,
        )
        if self.warm_start is not None:
            return compile_warm(self, student, problem, trainset, valset)
        meter = _Meter(problem)
        program, results, interrupted = problem.program, [], False
        with (
            Journal.open(self.log_dir, problem.identity()) as journal,
            ProgressBar(show=self.progress) as bar,
        ):
            listeners = Listeners([bar, *self.listeners])
            for target in problem.targets:
                search = _Search(problem, target, program, journal, listeners)
                try:
                    search.run()  # Algorithm 1
                except KeyboardInterrupt:  # before this predictor's seed was evaluated
                    if not results:
                        raise
                    interrupted = True
                    break
                result = search.validate()
                program = searching_copy(program, {target.site.name: result.instruction})
                results.append(result)
                if search.interrupted:
                    interrupted = True
                    break
        return _finished(student, meter.result(tuple(results), interrupted))


class _Search:
    """One predictor's search: from the seed instruction to the validated winner."""

    def __init__(self, problem: Problem, target: Target, program: Any, journal: Journal, listeners: Listeners) -> None:
        self._problem, self._target, self._program = problem, target, program
        self._journal, self._listeners = journal, listeners
        self._name = target.site.name
        self._recorded = [event for event in journal.recorded() if getattr(event, "predictor", None) == self._name]
        self._objective = Objective(
            program=program,
            site=target.site,
            field=target.field,
            rows=problem.train,
            metric=problem.metric,
            engine=target.engine,
            settings=problem.settings,
            extractor=problem.extractor,
        )
        self._steps: list[StepTaken] = []
        self.interrupted = False

    def run(self) -> None:
        """Algorithm 1, from where an interrupted run stopped; Ctrl-C ends it with what was found."""
        settings = self._problem.settings
        seed = self._seed()
        self._state = begin(seed, settings)
        searching = minimise(
            self._objective,
            seed,
            settings,
            predictor=self._name,
            random_seed=self._problem.seed,
            recorded=[event for event in self._recorded if isinstance(event, StepTaken)],
        )
        try:
            for self._state, step, fresh in searching:
                self._steps.append(step)
                self._tell(step, record=fresh)
        except KeyboardInterrupt:
            self.interrupted = True

    def validate(self) -> PredictorResult:
        """The finalists meet the seed on the validation rows; a tie keeps the seed, and so does a first Ctrl-C."""
        problem, state = self._problem, self._state
        texts = list(dict.fromkeys([state.seed.instruction, *(each.instruction for each in state.best)]))
        finalists = [{self._name: text} for text in texts]
        known = [each for each in self._recorded if isinstance(each, Validated) and list(each.scores) == texts]
        if known:
            validated = known[-1]
        else:
            try:
                scores = validation_scores(
                    self._program, finalists, problem.validation, problem.metric, threads=problem.settings.threads
                )
            except KeyboardInterrupt:
                if self.interrupted:  # the second one
                    raise
                self.interrupted = True
                return self._result({state.seed.instruction: math.nan}, state.seed.instruction)
            validated = Validated(self._name, dict(zip(texts, scores, strict=True)), texts[winner(scores)])
        scored = {each.instruction: each.token_ids for each in [state.seed, *state.best]}
        round_trip(self._objective.layout, validated.winner, scored[validated.winner])
        self._tell(validated, record=not known)
        return self._result(validated.scores, validated.winner)

    def _result(self, validation: dict[str, float], instruction: str) -> PredictorResult:
        state, steps = self._state, tuple(self._steps)
        return PredictorResult(self._name, self._target.field, state.seed, steps, state.best, validation, instruction)

    def _seed(self) -> Evaluation:
        """The seed's reasoning and losses, from the journal or made now.

        Raises:
            MetricError: the metric failed on every row.
            ProgramError: the program never called the predictor.
        """
        recorded = [event for event in self._recorded if isinstance(event, SearchStarted)]
        if recorded:
            seed = recorded[0].seed
            self._objective.recall([seed])
        else:
            (seed,) = self._objective.evaluate([self._objective.seed()])
            refuse_useless_metric([row.error for row in seed.rows])
            _refuse_unused_predictor(seed, self._name)
            _warn_if_all_failed(seed, self._name)
        self._tell(SearchStarted(self._name, seed, self._problem.settings.steps), record=not recorded)
        return seed

    def _tell(self, event: Any, *, record: bool) -> None:
        if record:
            self._journal.append(event)
        self._listeners.emit(event)


class _Meter:
    """Measures a run: seconds, and the counters of every engine that takes part."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._started = problem, time.monotonic()
        engines = {id(target.engine): target.engine for target in problem.targets}
        self._before = [(engine, engine.counters) for engine in engines.values()]

    def result(self, predictors: tuple[PredictorResult, ...], interrupted: bool) -> CompileResult:
        spent = [asdict(engine.counters - before) for engine, before in self._before]
        return CompileResult(
            predictors=predictors,
            train_rows=len(self._problem.train),
            validation_rows=len(self._problem.validation),
            seconds=time.monotonic() - self._started,
            spent={name: sum(part[name] for part in spent) for name in spent[0]},
            interrupted=interrupted,
        )


def _warn_if_all_failed(seed: Evaluation, name: str) -> None:
    if all(row.error is not None for row in seed.rows):
        warnings.warn(
            f"The program failed on all {len(seed.rows)} training rows with the seed instruction of predictor "
            f"`{name}`; on the first: {seed.rows[0].error}\nThe search goes on from there. If no instruction can help, "
            "check the adapter and the LM's max_tokens.",
            RuntimeWarning,
            stacklevel=5,
        )


def _refuse_unused_predictor(seed: Evaluation, name: str) -> None:
    if not any(row.inputs for row in seed.rows):
        raise ProgramError(
            f"Predictor `{name}` was not called on any of the {len(seed.rows)} training rows; on the first, "
            f"{seed.rows[0].error}. Try program(**trainset[0].inputs()) and mend it."
        )


def _finished(student: Any, detailed: CompileResult) -> Any:
    """The student with the winning instructions and DSPy's customary attachments."""
    best = write_back(student, {result.name: result.instruction for result in detailed.predictors})
    *earlier, last = detailed.predictors
    others = {result.name: result.instruction for result in earlier}
    ranked = sorted(last.validation.items(), key=lambda pair: -pair[1])
    best.candidate_programs = [
        {"score": score, "program": write_back(student, {**others, last.name: text})} for text, score in ranked
    ]
    best.score = detailed.score
    best.detailed_results = detailed
    return best
