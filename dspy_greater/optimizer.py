"""`GReaTerTeleprompter`: gradients over reasoning for the instructions of a DSPy program."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspy.teleprompt import Teleprompter

from dspy_greater.errors import CallMismatchError, SettingsError, UnusedPredictorError
from dspy_greater.metric import Metric
from dspy_greater.program.dataset import as_list
from dspy_greater.program.rollout import engines_behind, searching_copy
from dspy_greater.program.roundtrip import write_back
from dspy_greater.report.result import CompileResult, PredictorResult, what_stopped
from dspy_greater.run.events import Listener, Warned
from dspy_greater.run.journal import Journal
from dspy_greater.run.log import StepLog
from dspy_greater.run.progress import Listeners, ProgressBar, checked_callbacks
from dspy_greater.search.predictor_search import PredictorSearch
from dspy_greater.search.problem import Modes, Problem, pose
from dspy_greater.search.step import Step
from dspy_greater.search.variants import Variant, step_of
from dspy_greater.search.warm_start import compile_warm
from dspy_greater.settings import Auto, Settings


class GReaTerTeleprompter(Teleprompter):
    """Optimises a program's instructions with numerical gradients through the model's own reasoning.

    Every predictor that has gold values for one of its output fields is optimised in turn. The
    LM behind it must be an open-weight model: `local_lm(...)`, or a served one whose weights can be
    loaded (`weights=` says which, where its name does not).

    Args:
        metric: metric(example, prediction, trace=None) -> bool, number or Prediction(score=...).
        variant: "default" ranks candidates by the score gradient and by off-policy forecasts, and works for any metric
            and for predictors without gold values; "paper" is Algorithm 1 as published. Or a step of your own
            (`dspy_greater.search.step`).
        auto: "light" (20 steps, 24 rows), "medium" (50, 50), "heavy" (105, 100) or None, the paper's
            105 steps on 50 rows.
        seed: decides every random choice; the same seed gives the same instruction on CPU in fp32.
        log_dir: directory for the run's journal. Called again with the same inputs, `compile` goes on
            where an interrupted run stopped.
        weights: an engine, a (model, tokenizer) pair, a path or a hub id; or a mapping to one of these
            by predictor name or LM name.
        extractor: text between reasoning and answer for the loss; by default the adapter's own.
        predictors: names (of `program.named_predictors()`) of those to optimise; by default all that can be.
        mode: "rewrite" or "append", for all predictors or by name. An instruction that is appended to stays to
            the byte, and a sentence after it is searched; so it is by default where an instruction lists its
            tools, as `dspy.ReAct`'s does.
        warm_start: another optimizer, such as `GradSumTeleprompter`, that runs first; the search goes on from
            the instructions that it finds. The floor is still the student that `compile` was given. To resume
            both, give both a `log_dir`, and not the same.
        callbacks: functions that are called with every event (`dspy_greater.run.events`). One that returns exactly
            `False` ends the search after that step: the best so far is returned, and a run with a `log_dir` can go on
            from there. One that raises is warned of once and not called again.
        listeners: the same, under an older name.
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
        variant: Variant | Step = "default",
        auto: Auto | None = "light",
        seed: int = 0,
        log_dir: str | Path | None = None,
        weights: Any = None,
        extractor: str | None = None,
        predictors: Sequence[str] | None = None,
        mode: Modes = None,
        warm_start: Teleprompter | None = None,
        callbacks: Sequence[Listener] = (),
        listeners: Sequence[Listener] = (),
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise SettingsError(f"seed={seed!r}: give a whole number.")
        self.metric = metric
        self.settings = Settings.of(auto, **settings)
        self.step = step_of(variant)
        self.seed = seed
        self.log_dir = log_dir
        self.weights = weights
        self.extractor = extractor
        self.predictors = predictors
        self.mode: Modes = mode
        self.warm_start = warm_start
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
            trainset: examples with inputs set and gold values for an output field. In a text field a list of them is
                a list of acceptable answers.
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
            step=self.step,
            seed=self.seed,
            weights=self.weights,
            extractor=self.extractor,
            predictors=self.predictors,
            mode=self.mode,
        )
        if self.warm_start is not None:
            return compile_warm(self, student, problem, trainset, valset)
        meter = _Meter(problem)
        program, results, generated = problem.program, [], 0
        interrupted, called_off, stopped = False, False, None
        with (
            Journal.open(self.log_dir, problem.identity()) as journal,
            ProgressBar(show=self.progress) as bar,
        ):
            listeners = Listeners([bar, StepLog(), *self.listeners])
            for target in problem.targets:
                search = PredictorSearch(problem, target, program, journal, listeners, generated_tokens=generated)
                try:
                    search.run()  # Algorithm 1
                except (CallMismatchError, UnusedPredictorError) as error:
                    another = isinstance(error, CallMismatchError) and error.predictor != target.site.name
                    if another or target.field is not None or (not results and target is problem.targets[-1]):
                        raise
                    warnings.warn(f"{error} It keeps its instruction.", stacklevel=4)  # the call of compile
                    continue
                except KeyboardInterrupt:  # before this predictor's seed was evaluated
                    if not results:
                        raise
                    interrupted = True
                    break
                result = search.validate()
                program = searching_copy(program, {target.site.name: result.instruction})
                results.append(result)
                interrupted, called_off = search.interrupted, search.called_off
                if interrupted or called_off:
                    break
                generated, stopped = search.generated_tokens, search.out_of_budget()
                if stopped is not None:
                    listeners.emit(Warned(stopped))
                    break
        why = what_stopped(interrupted=interrupted, called_off=called_off, out_of_budget=stopped)
        return _finished(student, meter.result(tuple(results), stopped, why))


class _Meter:
    """Measures a run in this process: seconds, and the counters of every engine that takes part."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._started = problem, time.monotonic()
        taking_part = [*(target.engine for target in problem.targets), *engines_behind(problem.program)]
        engines = {id(engine): engine for engine in taking_part}
        self._before = [(engine, engine.counters) for engine in engines.values()]

    def result(
        self, predictors: tuple[PredictorResult, ...], out_of_budget: str | None, stopped_by: str | None
    ) -> CompileResult:
        spent = [asdict(engine.counters - before) for engine, before in self._before]
        return CompileResult(
            predictors=predictors,
            train_rows=len(self._problem.train),
            validation_rows=len(self._problem.validation),
            seconds=time.monotonic() - self._started,
            spent={name: sum(part[name] for part in spent) for name in spent[0]},
            interrupted=stopped_by == "interrupt",
            out_of_budget=out_of_budget,
            stopped_by=stopped_by,
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
