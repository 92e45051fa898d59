"""What a search with `GReaTer` is going to cost."""

from __future__ import annotations

from dspy_greater.errors import UnusedPredictorError
from dspy_greater.estimate.counts import Counts, Sizes, peak_bytes
from dspy_greater.estimate.probe import ROWS, Measured, probe
from dspy_greater.run.estimate import Budget, Cost, Estimate
from dspy_greater.run.outlook import Plan
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.prices import write_price
from dspy_greater.search.problem import Problem, Target

_BRIEF = 200  # runs of a search for each row of a probe, which has four instructions


def plan_of(problem: Problem) -> Plan:
    """What the settings say of a search."""
    settings = problem.settings
    return Plan(
        tuple(target.predictor.name for target in problem.targets),
        (settings.finalists + 1) * len(problem.validation),
        Budget(settings.max_generated_tokens, settings.max_metric_calls, settings.max_seconds),
    )


def brief_estimate(problem: Problem) -> Estimate:
    """As `estimate`, from so few rows that the probe's runs are about a fiftieth of the search's."""
    settings = problem.settings
    runs = settings.steps * len(problem.train) + (settings.finalists + 1) * len(problem.validation)
    return estimate(problem, most_rows=min(ROWS, max(2, runs // _BRIEF)))


def estimate(problem: Problem, most_rows: int = ROWS) -> Estimate:
    """Probe every predictor that will be searched on so many rows at most, and count.

    A predictor that the program does not call on the probe's rows is left out.

    Raises:
        GreaterError: what the search would raise.
    """
    found = [(target, probe(problem, target, most_rows)) for target in problem.targets]
    called = [(target, measured) for target, measured in found if measured.lengths.student.runs]
    if not called:
        names = ", ".join(f"`{target.predictor.name}`" for target, _ in found)
        raise UnusedPredictorError(
            f"The program did not call {names} on the rows of the probe, so nothing can be told."
        )
    parts = [_parts(problem, target, measured) for target, measured in called]
    share = 1.0 / len(parts)

    def average(costs: list[Cost]) -> Cost:
        return share * sum(costs, Cost())

    whole = Estimate(
        predictors=tuple(target.predictor.name for target, _ in called),
        steps=problem.settings.steps,
        seed=average([part.seed for part in parts]),
        step=average([part.step for part in parts]),
        validation=average([part.validation for part in parts]),
        low=sum((part.low for part in parts), Cost()),
        high=sum((part.high for part in parts), Cost()),
        peak_bytes=max(part.peak_bytes for part in parts),
        probe=sum((measured.cost for _, measured in found), Cost()),
    )
    return plan_of(problem).budget.bounded(whole)


def _parts(problem: Problem, target: Target, measured: Measured) -> Estimate:
    """The estimate of one predictor's search."""
    settings = problem.settings
    sizes = Sizes(
        settings,
        len(problem.train),
        len(problem.validation),
        settings.selections or getattr(problem.step, "selections", 1),
        write_price(target.engine, settings),
        looks_ahead=isinstance(problem.step, DefaultStep),
    )
    lengths = measured.lengths
    seed, usual = Counts(sizes, measured, lengths.student), Counts(sizes, measured, lengths.likely)
    fixed = settings.finalists / (settings.finalists + 1)  # the seed is validated, too

    def whole(counts: Counts) -> Cost:
        return seed.seed() + settings.steps * counts.step() + counts.validation()

    return Estimate(
        predictors=(target.predictor.name,),
        steps=settings.steps,
        seed=seed.seed(),
        step=usual.step(),
        validation=fixed * usual.validation() + (1.0 - fixed) * seed.validation(),
        low=whole(Counts(sizes, measured, lengths.low)),
        high=whole(Counts(sizes, measured, lengths.high)),
        peak_bytes=peak_bytes(
            Counts(sizes, measured, lengths.high), target.engine.max_batch_rows, target.engine.max_batch_tokens
        ),
    )
