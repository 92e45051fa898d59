"""One predictor's search, from the seed instruction to the validated winner, with journal and listeners."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from dspy_greater.errors import LayoutError, OutageError
from dspy_greater.metric import refuse_useless_metric
from dspy_greater.notices import warn_caller
from dspy_greater.objective.evaluator import Evaluator, Objective
from dspy_greater.program.rollout import Rollout
from dspy_greater.program.roundtrip import round_trip
from dspy_greater.program.validation import validation_scores, warn_of_one_answer, winner
from dspy_greater.report.result import PredictorResult
from dspy_greater.run.events import SearchStarted, StepTaken, Validated
from dspy_greater.run.journal import Journal
from dspy_greater.run.progress import Listeners
from dspy_greater.run.stop import by_signal, second
from dspy_greater.search.changed_rows import changed_rows
from dspy_greater.search.loop import minimise
from dspy_greater.search.problem import Problem, Target
from dspy_greater.search.seed_run import SeedRun, warn_if_all_failed
from dspy_greater.search.state import Usage, begin
from dspy_greater.search.step import Search
from dspy_greater.served.watch import neutral
from dspy_greater.stats import mean


class PredictorSearch:
    """Runs and validates the search of one predictor; goes on where the journal's record of it ends.

    Args:
        problem: what is optimised.
        target: the predictor.
        program: the program, with the instructions that were found for other predictors.
        journal: of the run.
        listeners: hear every event.
        usage: what the searches of earlier predictors used of the budgets.

    Attributes:
        interrupted: what ended the search, "interrupt" (Ctrl-C) or "SIGTERM", if one of them did.
        stopped_by: the error that ended it, if one did.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        program: Any,
        journal: Journal,
        listeners: Listeners,
        *,
        usage: Usage,
    ) -> None:
        self._problem, self._target, self._program = problem, target, program
        self._journal, self._listeners = journal, listeners
        self._name = target.predictor.name
        self._recorded = [event for event in journal.recorded() if getattr(event, "predictor", None) == self._name]
        self._evaluator = Evaluator(
            Objective(
                program=neutral(program, {searched.predictor.name: searched.watch for searched in problem.targets}),
                predictor=target.predictor,
                field=target.field,
                rows=problem.train,
                metric=problem.metric,
                extractor=problem.extractor,
                fixed=target.fixed,
                servers=problem.servers,
                heard=None if target.watch is None else target.watch.heard,
            ),
            engine=target.engine,
            settings=problem.settings,
            criterion=problem.step.criterion,
            model=problem.model_of(target.engine),
        )
        self._steps: list[StepTaken] = []
        self._used_before = usage
        self._validation_seconds = 0.0
        self.interrupted: str | None = None
        self.stopped_by: Exception | None = None

    def evaluate_seed(self) -> SeedRun | None:
        """The seed's reasoning and losses: its runs, or None where the journal has them.

        Raises:
            CallMismatchError: the predictor's calls send something else than would be scored.
            ProgramError: the language model never answered.
        """
        evaluator = self._evaluator
        recorded = [event for event in self._recorded if isinstance(event, SearchStarted)]
        if recorded:
            self._started, self._seed = recorded[0], recorded[0].seed
            evaluator.resume(self._seed, self._started.called_as)
            return None
        self._before, self._began = evaluator.spent(), time.monotonic()
        self._seed, rollouts = evaluator.evaluate_seed()
        return SeedRun(tuple(rollouts), self._problem.train, self._problem.numbers)

    def start(self, run: SeedRun | None) -> None:
        """Begin the search from the seed, whose runs these are.

        Raises:
            ContextLengthError: no row leaves room for its gold value.
            MetricError: the metric failed on every row.
        """
        evaluator, settings, seed = self._evaluator, self._problem.settings, self._seed
        if run is not None:
            refuse_useless_metric([row.error for row in seed.rows])
            if any(row.inputs and math.isnan(row.cross_entropy) for row in seed.rows):
                self._target.refuse_long_answers(run.given_to(self._name), self._problem)
            warn_if_all_failed(run)
            spent = evaluator.spent(self._before)
            called, seconds = evaluator.called.description, time.monotonic() - self._began
            self._started = SearchStarted(self._name, seed, settings.steps, spent, called, seconds)
        self._tell(self._started, record=run is not None)
        self._state = begin(seed, settings, usage=self._used_before.after(self._started.spent, self._started.seconds))

    def run(self) -> None:
        """Algorithm 1, from where a run stopped; Ctrl-C, callbacks or an error end it with what was found.

        All that is recorded is replayed first.
        """
        recorded = [event for event in self._recorded if isinstance(event, StepTaken)]
        searching = minimise(
            Search(self._evaluator, self._problem.settings, self._problem.step, self._name, self._problem.seed),
            self._started.seed,
            recorded=recorded,
            usage=self._state.usage,
        )
        if not recorded and self._listeners.stopped:
            return
        try:
            for self._state, step, fresh in searching:
                self._steps.append(step)
                self._tell(step, record=fresh)
                if len(self._steps) >= len(recorded) and self._listeners.stopped:
                    return
        except KeyboardInterrupt as interrupt:
            self.interrupted = by_signal(interrupt)
        except Exception as error:  # whatever it is, hours of search may lie before it
            self.stopped_by = error
            if isinstance(error, OutageError):
                self._problem.servers.stop_waiting()

    @property
    def found_something(self) -> bool:
        """Whether any instruction but the seed was tried and could be measured."""
        seed = self._state.seed.instruction
        return any(
            evaluation.instruction != seed and math.isfinite(evaluation.objective[0]) for evaluation in self._state.best
        )

    @property
    def steps_taken(self) -> str:
        """How far it came, in words."""
        return f"after step {self._state.step} of {self._problem.settings.steps} of predictor `{self._name}`"

    @property
    def usage(self) -> Usage:
        """What the searches used of the budgets up to now, those of earlier predictors and this validation included."""
        return self._state.usage.after({}, self._validation_seconds)

    @property
    def called_off(self) -> str | None:
        """What kept steps from being taken, or other predictors from being searched: "callback" or "STOP file"."""
        left = self._state.step < self._problem.settings.steps or bool(self._rest)
        return self._listeners.stopped_by if left and not self._goes_on and self._listeners.stopped else None

    @property
    def _rest(self) -> list[str]:
        """The predictors whose turn comes later."""
        targets = self._problem.targets
        return [target.predictor.name for target in targets[targets.index(self._target) + 1 :]]

    @property
    def _goes_on(self) -> bool:
        """Whether the journal says that the search of a later predictor has begun: what it found is not given up."""
        begun = {event.predictor for event in self._journal.recorded() if isinstance(event, SearchStarted)}
        return bool(begun.intersection(self._rest))

    def out_of_budget(self) -> str | None:
        """What the budget did not allow, in words; None when it allowed all."""
        settings, state, rest = self._problem.settings, self._state, self._rest
        exhausted = state.usage.exhausted(settings) or (self.usage.exhausted(settings) if rest else None)
        if exhausted is None or (state.step >= settings.steps and not rest) or self._goes_on:
            return None
        kept = f" Not searched, and left as they were: {', '.join(rest)}." if rest else ""
        return f"{exhausted}, after step {state.step} of {settings.steps} of predictor `{self._name}`.{kept}"

    def validate(self, known_score: float) -> PredictorResult:
        """The finalists meet the seed on the validation rows; a tie keeps the seed, and so does a first Ctrl-C.

        `known_score` is the seed's, if an earlier predictor was validated, or nan.
        """
        texts = self._finalists()
        known = [event for event in self._recorded if isinstance(event, Validated) and list(event.scores) == texts]
        try:
            validated = known[-1] if known else self._validated(texts)
        except KeyboardInterrupt as interrupt:
            if self.interrupted:
                raise second(interrupt) from interrupt
            self.interrupted = by_signal(interrupt)
            return self.unvalidated(known_score)
        self._validation_seconds = validated.seconds
        try:
            self._tell(validated, record=not known)
        except KeyboardInterrupt as interrupt:
            if self.interrupted:
                raise second(interrupt) from interrupt
            self.interrupted = by_signal(interrupt)
        except Exception as error:  # what was validated counts, whether or not it could be told
            self.stopped_by = self.stopped_by or error
        return self._result(validated)

    def unvalidated(self, known_score: float) -> PredictorResult:
        """The result where nothing could be validated: the seed is kept."""
        seed = self._state.seed.instruction
        return self._result(Validated(self._name, {seed: known_score}, seed))

    def _validated(self, texts: Sequence[str]) -> Validated:
        problem, before, began = self._problem, self._evaluator.spent(), time.monotonic()
        runs: list[list[Rollout]] = []
        subscores = validation_scores(
            self._program,
            [{self._name: text} for text in texts],
            problem.validation,
            problem.metric,
            running=problem.running,
            heard=runs.extend,
        )
        self._evaluator.count([rollout for group in runs for rollout in group])
        scores = [mean(row_scores) for row_scores in subscores]
        best = winner(scores)
        if best > 0:
            warn_of_one_answer(problem.validation, runs[best])
        spent = self._evaluator.spent(before)
        spent["runs"] = len(texts) * len(problem.validation)
        return Validated(
            self._name,
            dict(zip(texts, scores, strict=True)),
            texts[best],
            spent,
            dict(zip(texts, subscores, strict=True)),
            changed_rows(problem.validation, runs[0], runs[best]),
            seconds=time.monotonic() - began,
        )

    def _finalists(self) -> list[str]:
        """The seed and the best of what was tried; one that DSPy would not send as it was scored is left out."""
        seed = self._state.seed.instruction
        texts = [seed]
        for evaluation in self._state.best:
            try:
                round_trip(self._evaluator.layout, evaluation.instruction, evaluation.token_ids)
            except LayoutError as error:
                warn_caller(f"One of the best instructions is left out. {error}", RuntimeWarning)
            else:
                texts.append(evaluation.instruction)
        return list(dict.fromkeys(texts))

    def _result(self, validated: Validated) -> PredictorResult:
        return PredictorResult(
            name=self._name,
            field=self._target.field,
            seed=self._state.seed,
            steps=tuple(self._steps),
            finalists=self._state.best,
            validation=validated.scores,
            subscores=validated.subscores,
            instruction=validated.winner,
            seed_spent=self._started.spent,
            validation_spent=validated.spent,
        )

    def _tell(self, event: Any, *, record: bool) -> None:
        if record:
            self._journal.append(event)
        self._listeners.emit(event, replayed=not record)
