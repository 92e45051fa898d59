"""How much of a search is left, told from what its steps took: for the bar, and to correct an estimate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dspy_greater.run.estimate import Budget, Cost, Estimate
from dspy_greater.run.events import BeamStarted, Event, IterationTaken, NotCalled, SearchStarted, StepTaken, Validated
from dspy_greater.run.log import LOGGER

_LAST = 10  # steps from which the next ones are told: reasoning grows while a search goes on
_RUNS_SHARE = 0.5  # of a step's seconds that its runs of the program take, where nothing better is known
_SURE = 1.25  # times more or less than what the first steps tell
_FIRST = 3  # steps after which an estimate is corrected
# What was told counts as much as so many steps for those to come, because the first ones are special.
_AS_STEPS = 10
_SECONDS_AS_STEPS = 3  # less of seconds: how fast a machine is shows at once


@dataclass(frozen=True)
class Plan:
    """What is known of a search before it begins: the settings say so."""

    predictors: tuple[str, ...] = ()
    validation_runs: int = 0  # of each predictor
    budget: Budget = field(default_factory=Budget)


UNPLANNED = Plan()


class Outlook:
    """A listener that tells how long a search will still take.

    Args:
        plan: what will come after the steps; without one, only the steps are told.
        told: the estimate before the search, where there is one.

    >>> from dspy_greater.objective.types import Evaluation
    >>> seed = Evaluation((1,), "Think.", (), 0.5, 0.25, 1.0, (0.5, 0.25))
    >>> outlook = Outlook()
    >>> outlook(SearchStarted("predict", seed, 4, seconds=1.0))
    >>> outlook(StepTaken("predict", 0, 0, 1, (), seed, "", {"generated_tokens": 90}, seconds=3.0))
    >>> outlook.seconds_left, outlook.tokens_per_second
    (9.0, 30.0)
    """

    def __init__(self, plan: Plan = UNPLANNED, told: Estimate | None = None) -> None:
        self._plan, self._told = plan, told
        self._begun: list[str] = []
        self._passed_over: set[str] = set()  # the program does not call them
        self._total = self.taken = 0  # steps of this predictor's search
        self._seeds: list[Cost] = []
        self._validations: list[Cost] = []
        self._steps: list[Cost] = []  # all that told their time
        self._validated = True

    def __call__(self, event: Event) -> None:
        if isinstance(event, (SearchStarted, BeamStarted)):
            self.taken, self._validated = 0, False
            if isinstance(event, SearchStarted):
                self._total = event.steps
                self._begun.append(event.predictor)
                self._seeds.append(Cost.of(event.spent, event.seconds))
            else:
                self._total = event.iterations
        elif isinstance(event, (StepTaken, IterationTaken)):
            self.taken += 1
            if event.seconds > 0:
                spent = event.spent if isinstance(event, StepTaken) else {}
                self._steps.append(Cost.of(spent, event.seconds))
        elif isinstance(event, NotCalled):
            self._passed_over.update(event.predictors)
        elif isinstance(event, Validated):
            self._validated = True
            self._validations.append(Cost.of(event.spent, event.seconds))

    @property
    def tokens_per_second(self) -> float | None:
        """Written by the last steps."""
        last = _sum(self._steps[-_LAST:])
        return last.written / last.seconds if last.written and last.seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Until the end, or until a budget of seconds is spent; None where nothing is known yet."""
        step, others = self._step(), len({*self._plan.predictors} - {*self._begun, *self._passed_over})
        if step is None:
            return None
        left = max(0, self._total - self.taken)
        validation = self._validation(step).seconds
        rest = 0.0 if self._validated and not left else left * step.seconds + (0.0 if self._validated else validation)
        seed = _mean(self._seeds).seconds
        whole = rest + others * (seed + self._total * step.seconds + validation)
        limit = self._plan.budget.seconds
        if limit is None:
            return whole
        used = _sum([*self._seeds, *self._steps, *self._validations]).seconds
        return min(whole, max(0.0, limit - used) + validation)

    def corrected(self) -> Estimate | None:
        """The estimate that the search was begun with, with what its steps took in the place of what was told."""
        if self._told is None or not self._steps:
            return None
        count, steps = len(self._steps), max(self._told.steps, 1)
        later = self._later(self._told.step)
        step = 1.0 / max(steps, count) * (_sum(self._steps) + max(0, steps - count) * later)
        seed = _mean(self._seeds) if self._seeds else self._told.seed
        longer = max(1.0, later.written / max(later.runs, 1)) / max(
            1.0, self._told.step.written / max(self._told.step.runs, 1)
        )
        told = self._told.validation
        faster = seed.seconds / self._told.seed.seconds if self._told.seed.seconds and seed.seconds else 1.0
        validation = (
            _mean(self._validations)
            if self._validations
            else replace(told, written=told.written * longer, seconds=told.seconds * (faster + longer) / 2)
        )
        found = replace(
            self._told,
            steps=self._total,
            seed=seed,
            step=step,
            validation=validation,
            after_steps=count,
            bounded_by=None,
        )
        found = replace(found, low=1 / _SURE * found.total, high=_SURE * found.total)
        return self._plan.budget.bounded(found)

    def _later(self, told: Cost) -> Cost:
        """A step that is still to come."""
        last = self._steps[-_LAST:]
        count, taken = len(last), _sum(last)
        seconds = (taken.seconds + _SECONDS_AS_STEPS * told.seconds) / (count + _SECONDS_AS_STEPS)
        return replace(1.0 / (count + _AS_STEPS) * (taken + _AS_STEPS * told), seconds=seconds)

    def _step(self) -> Cost | None:
        if self._steps:
            return 1.0 / len(self._steps[-_LAST:]) * _sum(self._steps[-_LAST:])
        return None if self._told is None else self._told.step

    def _validation(self, step: Cost) -> Cost:
        if self._validations:
            return _mean(self._validations)
        if self._told is not None:
            return self._told.validation
        run_seconds = _RUNS_SHARE * step.seconds / step.runs if step.runs else 0.0
        return Cost(runs=self._plan.validation_runs, seconds=run_seconds * self._plan.validation_runs)


class EstimateLog:
    """A listener that logs, after the first steps, what an estimate has become."""

    def __init__(self, plan: Plan, told: Estimate) -> None:
        self._outlook, self._after = Outlook(plan, told), min(_FIRST, told.steps)

    def __call__(self, event: Event) -> None:
        self._outlook(event)
        if isinstance(event, StepTaken) and self._after and self._outlook.taken >= self._after:
            found, self._after = self._outlook.corrected(), 0
            if found is not None:
                LOGGER.info("Estimate after %d steps: %s", found.after_steps, found)


def _sum(costs: list[Cost]) -> Cost:
    return sum(costs, Cost())


def _mean(costs: list[Cost]) -> Cost:
    return 1.0 / len(costs) * _sum(costs) if costs else Cost()
