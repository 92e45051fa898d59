"""One predictor's search, from the seed instruction to the validated winner, with journal and listeners."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from dspy_greater.errors import UnusedPredictorError
from dspy_greater.metric import refuse_useless_metric
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.types import Evaluation
from dspy_greater.program.called import called_as, scored_calls
from dspy_greater.program.rollout import Rollout
from dspy_greater.program.roundtrip import round_trip
from dspy_greater.program.sent import differences, refuse_context_lms, refuse_differences
from dspy_greater.program.validation import validation_scores, winner
from dspy_greater.report.result import PredictorResult
from dspy_greater.run.events import SearchStarted, StepTaken, Validated
from dspy_greater.run.journal import Journal
from dspy_greater.run.progress import Listeners
from dspy_greater.search.loop import minimise
from dspy_greater.search.problem import Problem, Target
from dspy_greater.search.state import begin


class PredictorSearch:
    """Runs and validates the search of one predictor; goes on where the journal's record of it ends.

    Args:
        problem: what is optimised.
        target: the predictor.
        program: the program, with the instructions that were found for other predictors.
        journal: of the run.
        listeners: hear every event.
        generated_tokens: what the searches of earlier predictors spent of the budget.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        program: Any,
        journal: Journal,
        listeners: Listeners,
        *,
        generated_tokens: int,
    ) -> None:
        self._problem, self._target, self._program = problem, target, program
        self._journal, self._listeners = journal, listeners
        self._name = target.site.name
        self._recorded = [event for event in journal.recorded() if getattr(event, "predictor", None) == self._name]
        self._evaluator = Evaluator(
            program=program,
            site=target.site,
            field=target.field,
            rows=problem.train,
            metric=problem.metric,
            engine=target.engine,
            settings=problem.settings,
            criterion=problem.step.criterion,
            extractor=problem.extractor,
            fixed=target.fixed,
        )
        self._steps: list[StepTaken] = []
        self._generated_before = generated_tokens
        self.interrupted = False

    def run(self) -> None:
        """Algorithm 1, from where an interrupted run stopped; Ctrl-C and callbacks end it with what was found."""
        settings = self._problem.settings
        self._started = self._start()
        generated = self._generated_before + self._started.spent.get("generated_tokens", 0)
        self._state = begin(self._started.seed, settings, generated_tokens=generated)
        searching = minimise(
            self._evaluator,
            self._started.seed,
            settings,
            self._problem.step,
            predictor=self._name,
            random_seed=self._problem.seed,
            recorded=[event for event in self._recorded if isinstance(event, StepTaken)],
            generated_tokens=generated,
        )
        if self._listeners.stopped:
            return
        try:
            for self._state, step, fresh in searching:
                self._steps.append(step)
                self._tell(step, record=fresh)
                if self._listeners.stopped:
                    return
        except KeyboardInterrupt:
            self.interrupted = True

    @property
    def generated_tokens(self) -> int:
        """What the searches spent of the budget up to now, those of earlier predictors included."""
        return self._state.generated_tokens

    @property
    def called_off(self) -> bool:
        """Whether a callback kept steps from being taken, or other predictors from being searched."""
        return self._listeners.stopped and (self._state.step < self._problem.settings.steps or bool(self._rest))

    @property
    def _rest(self) -> list[str]:
        """The predictors whose turn comes later."""
        targets = self._problem.targets
        return [target.site.name for target in targets[targets.index(self._target) + 1 :]]

    def out_of_budget(self) -> str | None:
        """What the budget did not allow, in words; None when it allowed all."""
        settings, state, rest = self._problem.settings, self._state, self._rest
        if not state.out_of_budget(settings) or (state.step >= settings.steps and not rest):
            return None
        kept = f" Not searched, and left as they were: {', '.join(rest)}." if rest else ""
        return (
            f"max_generated_tokens={settings.max_generated_tokens} was reached with {state.generated_tokens} tokens, "
            f"after step {state.step} of {settings.steps} of predictor `{self._name}`.{kept}"
        )

    def validate(self) -> PredictorResult:
        """The finalists meet the seed on the validation rows; a tie keeps the seed, and so does a first Ctrl-C."""
        problem, state = self._problem, self._state
        texts = list(dict.fromkeys([state.seed.instruction, *(each.instruction for each in state.best)]))
        finalists = [{self._name: text} for text in texts]
        known = [each for each in self._recorded if isinstance(each, Validated) and list(each.scores) == texts]
        if known:
            validated = known[-1]
        else:
            before = self._evaluator.spent()
            try:
                scores = validation_scores(
                    self._program, finalists, problem.validation, problem.metric, threads=problem.settings.threads
                )
            except KeyboardInterrupt:
                if self.interrupted:  # the second one
                    raise
                self.interrupted = True
                return self._result(Validated(self._name, {texts[0]: math.nan}, texts[0]))
            spent = self._evaluator.spent(before)
            spent["runs"] = len(finalists) * len(problem.validation)
            validated = Validated(self._name, dict(zip(texts, scores, strict=True)), texts[winner(scores)], spent)
        scored = {each.instruction: each.token_ids for each in [state.seed, *state.best]}
        round_trip(self._evaluator.layout, validated.winner, scored[validated.winner])
        self._tell(validated, record=not known)
        return self._result(validated)

    def _result(self, validated: Validated) -> PredictorResult:
        return PredictorResult(
            name=self._name,
            field=self._target.field,
            seed=self._state.seed,
            steps=tuple(self._steps),
            finalists=self._state.best,
            validation=validated.scores,
            instruction=validated.winner,
            seed_spent=self._started.spent,
            validation_spent=validated.spent,
        )

    def _start(self) -> SearchStarted:
        """The seed's reasoning and losses, from the journal or made now.

        Raises:
            CallMismatchError: a predictor's calls send something else than would be scored.
            MetricError: the metric failed on every row.
            ProgramError: the program never called the predictor.
        """
        recorded = [event for event in self._recorded if isinstance(event, SearchStarted)]
        if recorded:
            started = recorded[0]
            if started.called_as:
                self._evaluator.follow_again(started.seed, started.called_as)
            self._evaluator.recall([started.seed])
        else:
            before = self._evaluator.spent()
            seed, rollouts = self._evaluator.evaluate_seed()
            refuse_useless_metric([row.error for row in seed.rows])
            self._look_at_the_others(rollouts)
            _refuse_unused_predictor(seed, self._name)
            _warn_if_all_failed(seed, self._name)
            spent = self._evaluator.spent(before)
            called_as = self._evaluator.called.description
            started = SearchStarted(self._name, seed, self._problem.settings.steps, spent, called_as)
        self._tell(started, record=not recorded)
        return started

    def _look_at_the_others(self, rollouts: Sequence[Rollout]) -> None:
        """Refuse, before the first search, what would end a later one: all predictors were called in these runs."""
        problem = self._problem
        if self._target is not problem.targets[0]:
            return
        refuse_context_lms(problem.borrowed, [call for rollout in rollouts for call in rollout.trace])
        others = [each for each in problem.targets[1:] if each.field is not None]  # the rest keep their instruction
        for target in others:
            calls = scored_calls(rollouts, target.site.name, every=False)
            tokenizer = target.engine.tokenizer
            called = called_as(target.site, calls, str(tokenizer.chat_template), supervised=target.field)
            found = differences(called, called.layout(tokenizer), target.engine, calls, supervised=target.field)
            refuse_differences(target.site.name, found, len(calls))

    def _tell(self, event: Any, *, record: bool) -> None:
        if record:
            self._journal.append(event)
        self._listeners.emit(event, replayed=not record)


def _warn_if_all_failed(seed: Evaluation, name: str) -> None:
    if all(row.error is not None for row in seed.rows):
        warnings.warn(
            f"The program failed on all {len(seed.rows)} training rows with the seed instruction of predictor "
            f"`{name}`; on the first: {seed.rows[0].error}\nThe search goes on from there. If no instruction can help, "
            "check the adapter and the LM's max_tokens.",
            RuntimeWarning,
            stacklevel=7,  # the call of compile
        )


def _refuse_unused_predictor(seed: Evaluation, name: str) -> None:
    if not any(row.inputs for row in seed.rows):
        raise UnusedPredictorError(
            f"Predictor `{name}` was not called on any of the {len(seed.rows)} training rows; on the first, "
            f"{seed.rows[0].error}. A module that runs copies of a program (BestOfN, Refine) hides its predictors: "
            "compile the inner program and wrap the result. Otherwise try program(**trainset[0].inputs()) and mend it."
        )
