"""`GReaTer`: gradients over reasoning for the instructions of a DSPy program."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dspy.teleprompt import Teleprompter
from typing_extensions import Unpack

from dspy_greater.errors import UnvalidatedError
from dspy_greater.estimate.greater import brief_estimate, estimate, plan_of
from dspy_greater.metric import Metric
from dspy_greater.notices import warn_caller
from dspy_greater.program.dataset import as_list
from dspy_greater.program.rendering import ProgramPrompts
from dspy_greater.program.rollout import asks_servers, engines_behind
from dspy_greater.program.roundtrip import saved, write_back
from dspy_greater.report.file import ReportFile
from dspy_greater.report.result import CompileResult, what_stopped
from dspy_greater.run.best import BestFile
from dspy_greater.run.events import Listener, SearchStarted
from dspy_greater.run.journal import Journal
from dspy_greater.run.log import LOGGER, StepLog
from dspy_greater.run.outlook import EstimateLog
from dspy_greater.run.progress import Listeners, ProgressBar, checked_callbacks
from dspy_greater.run.stop import BY_FILE, StopFile, terminable
from dspy_greater.run.trackers import checked_trackers, tracked
from dspy_greater.search.asked import Modes
from dspy_greater.search.coordinate_descent import CoordinateDescent, Found
from dspy_greater.search.problem import Options, Problem, prepare
from dspy_greater.search.step import Step
from dspy_greater.search.variants import Variant, step_of
from dspy_greater.search.warm_start import compile_warm
from dspy_greater.served.record import ServedModel
from dspy_greater.settings import Auto, Knobs, Settings, checked_log_dir, checked_seed, spelled_out
from dspy_greater.workers.crews import Crews, Hire, Workers, checked_shards, checked_workers


class Keywords(Knobs, total=False):
    """The arguments of `GReaTer` that most people leave alone, beside the search's knobs."""

    extractor: str | None
    predictors: Iterable[str] | None
    mode: Modes
    warm_start: Teleprompter | None
    listeners: Sequence[Listener]
    progress: bool | None
    workers: Workers | Hire | None
    shards: int | None
    strict: bool | None
    use_mlflow: bool
    use_wandb: bool


class GReaTer(Teleprompter):
    """Optimises a program's instructions with numerical gradients through the model's own reasoning.

    Every predictor is optimised in turn. One without gold values is judged by the program's metric alone, and left out
    of `variant="paper"`. The LM behind it must be an open-weight model: `local_lm(...)`, or a served one whose weights
    can be loaded (`weights=` says which, where its name does not).

    Args:
        metric: metric(example, prediction, trace=None) -> bool, number or Prediction(score=...).
        variant: "default" ranks candidates by the score gradient and by off-policy forecasts, and works for any metric
            and for predictors without gold values; "paper" is Algorithm 1 as published. Or a step of your own
            (`dspy_greater.search.step`).
        auto: "light" (20 steps, 24 rows), "medium" (50, 50), "heavy" (105, 100) or None, the paper's
            105 steps on 50 rows.
        seed: decides every random choice; the same seed gives the same instruction on CPU in fp32.
        log_dir: directory for the run's journal, the best so far (`best.json`, `best_program.json`) and a page that
            shows the run (`report.html`). Called again with the same inputs, `compile` goes on where an interrupted
            run stopped.
        weights: an engine, a (model, tokenizer) pair, a path or a hub id, or `(name, options)` with options for
            loading, such as `("Qwen/Qwen3-32B", {"device_map": "auto"})`; or a mapping to one of these by predictor
            name or LM name.
        extractor: text between reasoning and answer for the loss; by default the adapter's own.
        predictors: names (of `program.named_predictors()`) of those to optimise; by default all that can be.
        mode: "rewrite" or "append", for all predictors or by name. An instruction that is appended to stays to
            the byte, and a sentence after it is searched; so it is by default where an instruction lists its
            tools, as those of `dspy.ReAct`, `dspy.CodeAct` and `dspy.RLM` do.
        warm_start: another optimizer, such as `GradSum`, that runs first; the search goes on from
            the instructions that it finds. The floor is still the student that `compile` was given. To resume
            both, give both a `log_dir`, and not the same.
        callbacks: functions that are called with every event (`dspy_greater.run.events`). One that returns exactly
            `False` ends the search after that step: the best so far is returned, and a run with a `log_dir` can go on
            from there. One that raises is warned of once and not called again.
        listeners: the same, under an older name.
        progress: show a progress bar; None shows it on a terminal and in a notebook.
        use_mlflow, use_wandb: record the run in MLflow, in Weights & Biases (the extras `mlflow` and `wandb`):
            settings, the numbers of each step, `report.html`. Their faults are warnings.
        workers: how many processes read with the weights, beside this one: gradients, forecasts, losses and proposals.
            A number, "auto" (one a GPU) or the address of a Ray cluster; needs `pip install 'dspy-greater[ray]'`. Any
            number finds the same, bit for bit, on devices of one kind; a run may go on with another.
        shards: processes over which each worker divides the weights (FSDP2), for a model that fits no single GPU;
            `workers=2, shards=2` is two workers of two processes each. One when not given.
        strict: where the LM is a server that writes other tokens than the weights here would, stop with an error; by
            default that is a warning with numbers. Another prompt is an error before the search, and during it a
            warning, or with `strict` an error.
        **keywords: besides those above, any field of `Settings`, which explains them and what they cost.

    Raises:
        SettingsError: an unknown or impossible setting.
        MissingExtraError: a tracker that was asked for is not installed.

    ```python
    optimizer = GReaTer(metric=exact_match, auto="light", log_dir="runs/navigate")
    better = optimizer.compile(program, trainset=train, valset=val)
    better.detailed_results.steps[0].candidates
    ```
    """

    @spelled_out(Keywords)
    def __init__(
        self,
        metric: Metric | None = None,
        *,
        variant: Variant | Step = "default",
        auto: Auto | None = "light",
        seed: int = 0,
        log_dir: str | Path | None = None,
        weights: Any = None,
        callbacks: Sequence[Listener] | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        super().__init__()
        knobs: dict[str, Any] = dict(keywords)
        predictors = knobs.pop("predictors", None)
        self.metric = metric
        self.step = step_of(variant)
        self.seed = checked_seed(seed)
        self.log_dir = checked_log_dir(log_dir)
        self.weights = weights
        self.extractor: str | None = knobs.pop("extractor", None)
        self.predictors = tuple(predictors) if isinstance(predictors, Iterator) else predictors
        self.mode: Modes = knobs.pop("mode", None)
        self.warm_start: Teleprompter | None = knobs.pop("warm_start", None)
        # Not under the name `callbacks`, where DSPy looks for its own.
        listeners = checked_callbacks(knobs.pop("listeners", None), "listeners")
        self.listeners = (*listeners, *checked_callbacks(callbacks))
        self.progress: bool | None = knobs.pop("progress", None)
        self.workers = checked_workers(knobs.pop("workers", None))
        self.shards = checked_shards(knobs.pop("shards", None), self.workers)
        self.strict = bool(knobs.pop("strict", None))
        self.trackers = checked_trackers(
            use_mlflow=knobs.pop("use_mlflow", False), use_wandb=knobs.pop("use_wandb", False)
        )
        self.settings = Settings.of(auto, **knobs)

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
            trainset: examples with inputs set. A value under the name of an output field is the gold answer, which
                only `variant="paper"` needs. In a text field a list of them is a list of acceptable answers.
            metric: instead of the one given to the constructor.
            teacher: accepted for DSPy's interface; gradients need none.
            valset: rows on which the finalists meet the seed; without any, part of the trainset.
            dry_run: search nothing, and return an `Estimate` of what the search will cost. For it the program is run
                on up to eight training rows under four instructions, and the model is timed (`dspy_greater.estimate`).
                No file is written. A warm start is not counted.

        Returns:
            The program, with `detailed_results` (`CompileResult`; printed, a short trajectory), `candidate_programs`
            (whole programs, best first) and `score`. Scores are means of the metric: 0.75 is what DSPy's `Evaluate`
            shows as 75.0 %.
            Ctrl-C and SIGTERM end the search early with the best so far; a second one raises. A file `STOP` in
            `log_dir` does after the step that is under way, and is removed (`dspy_greater.run.stop`). So does an error
            of any kind, once an instruction besides the student's own was tried: what was found is validated and
            returned, with a warning, and `detailed_results.stopped_by` says what happened.

        Raises:
            GreaterError: one of its subclasses, before the search, for input that cannot work.
            UnvalidatedError: the search ended early, and its validation failed too; carries what was found.
            Exception: what ended the search before any other instruction was tried.
        """
        trainset, valset = as_list(trainset, name="trainset"), as_list(valset, name="valset")
        problem = prepare(
            student,
            trainset,
            self.metric if metric is None else metric,
            valset,
            Options(
                settings=self.settings,
                step=self.step,
                seed=self.seed,
                weights=self.weights,
                extractor=self.extractor,
                predictors=self.predictors,
                mode=self.mode,
                strict=self.strict,
            ),
        )
        if dry_run:
            return estimate(problem)
        if self.warm_start is not None:
            with terminable():
                return compile_warm(self, student, problem, trainset, valset)
        stop_file = StopFile(self.log_dir)
        with (
            self._watched(student, problem, stop_file) as (journal, listeners),
            Crews(self.workers, self.shards) as crews,
        ):
            problem = replace(problem, model_of=crews.model)
            meter = _Meter(problem)
            found = CoordinateDescent(problem, journal, listeners).run()  # Algorithm 1, predictor by predictor
        stop_file.obeyed(ended=found.called_off == BY_FILE)
        detailed = meter.result(found)
        if found.unvalidated is not None:
            raise _unvalidated(student, detailed) from found.unvalidated
        if found.error is not None:
            warn_caller(
                f"The search ended early, {found.error}\nThe best that was validated is returned."
                f"{_GO_ON if self.log_dir else ''}",
                RuntimeWarning,
            )
        called_as = {event.predictor: event.called_as for event in journal.events() if isinstance(event, SearchStarted)}
        return _finished(student, detailed, called_as)

    @contextmanager
    def _watched(
        self, student: Any, problem: Problem, stop_file: StopFile
    ) -> Generator[tuple[Journal, Listeners], None, None]:
        """Everything that hears of a run's events, and what is on record of them."""
        identity = problem.identity()
        versions = {f"server of {server.predictor}": str(server) for server in _servers(problem)}
        with (
            Journal.open(self.log_dir, identity, versions, problem.code()) as journal,
            ProgressBar(show=self.progress, plan=plan_of(problem)) as bar,
            tracked(self.trackers, identity, self.log_dir) as (trackers, folder),
            ReportFile(folder, identity, journal.versions) as report,
            BestFile(self.log_dir, partial(saved, student)) as best_file,
            terminable(),
            stop_file,
        ):
            logs = [StepLog(), *_estimate_log(problem, journal)]
            yield journal, Listeners([bar, *logs, best_file, report, *trackers, *self.listeners], stop_file)


def _estimate_log(problem: Problem, journal: Journal) -> list[Listener]:
    """What the search will cost, logged where somebody reads it, and what corrects it; not for a run that goes on."""
    if not LOGGER.isEnabledFor(logging.INFO) or journal.recorded():
        return []
    try:
        told = brief_estimate(problem)
    except Exception as error:  # the search will say it better, or does without
        LOGGER.info("No estimate: %s: %s", type(error).__name__, error)
        return []
    LOGGER.info("Estimate: %s", told)
    return [EstimateLog(plan_of(problem), told)]


class _Meter:
    """Measures a run in this process: seconds, and the counters of every engine that takes part."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._started = problem, time.monotonic()
        taking_part = [*(target.engine for target in problem.targets), *engines_behind(problem.program)]
        engines = {id(engine): engine for engine in taking_part}
        self._before = [(engine, engine.counters) for engine in engines.values()]

    def result(self, found: Found) -> CompileResult:
        spent = [asdict(engine.counters - before) for engine, before in self._before]
        totals = {name: sum(part[name] for part in spent) for name in spent[0]}
        served = self._problem.servers.spent
        totals["generated_tokens"] += served.generated_tokens
        if asks_servers(self._problem.program):
            totals["prompt_tokens"] = served.prompt_tokens
        return CompileResult(
            predictors=found.predictors,
            train_rows=len(self._problem.train),
            validation_rows=len(self._problem.validation),
            seconds=time.monotonic() - self._started,
            spent=totals,
            faults=self._problem.servers.faults,
            servers=_servers(self._problem),
            interrupted=found.interrupted is not None,
            out_of_budget=found.out_of_budget,
            stopped_by=found.error
            or what_stopped(
                interrupted=found.interrupted, called_off=found.called_off, out_of_budget=found.out_of_budget
            ),
        )


def _servers(problem: Problem) -> tuple[ServedModel, ...]:
    """What is known up to now of the servers behind the targets' LMs."""
    return tuple(target.watch.record() for target in problem.targets if target.watch is not None)


def _finished(student: Any, detailed: CompileResult, called_as: dict[str, str]) -> Any:
    """The student with the winning instructions and DSPy's customary attachments."""
    best = write_back(student, {result.name: result.instruction for result in detailed.predictors})
    best.candidate_programs = [
        {"score": score, "program": write_back(student, instructions)} for score, instructions in _ranked(detailed)
    ]
    best.score = detailed.score
    best.detailed_results = replace(detailed, rendering=ProgramPrompts.of(best, called_as))
    return best


def _ranked(detailed: CompileResult) -> list[tuple[float, dict[str, str]]]:
    """All whole programs that were validated, best first; what an interrupt or an error kept from it comes last."""
    validated = [program for program in detailed.candidates if not math.isnan(program.score)]
    returned = detailed.candidates[detailed.best_idx].instructions
    ranked = sorted(validated, key=lambda program: (-program.score, program.instructions != returned))
    last = detailed.predictors[-1]
    others = {predictor.name: predictor.instruction for predictor in detailed.predictors}
    unknown = [program.instructions for program in detailed.candidates if math.isnan(program.score)]
    unknown += [{**others, last.name: finalist.instruction} for finalist in last.finalists]
    known = [program.instructions for program in validated]
    rest = {tuple(instructions.items()): instructions for instructions in unknown if instructions not in known}
    return [(program.score, program.instructions) for program in ranked] + [
        (math.nan, instructions) for instructions in rest.values()
    ]


def _unvalidated(student: Any, detailed: CompileResult) -> UnvalidatedError:
    """The error that carries what was found where nothing could be compared with the student."""
    [result] = detailed.predictors
    best, seed = result.finalists[0], result.seed
    return UnvalidatedError(
        f"The search ended early, {detailed.stopped_by}\nSo no instruction could be compared with the student's on "
        f"the validation rows. On the training rows the best is {best.instruction!r} (score {best.score:.3g}, the "
        f"student's {seed.score:.3g}). `error.program` is the student with it, and `error.detailed_results` the "
        f"record.{_GO_ON}",
        program=write_back(student, {result.name: best.instruction}),
        detailed_results=detailed,
    )


_GO_ON = " A run with a log_dir goes on from the last step that was taken."

GReaTerTeleprompter = GReaTer  # the name that DSPy's own optimizers would give it
