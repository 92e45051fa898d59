"""What the figures show, as numbers: of a report's page and of `result.plot_score()` and its like alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import StepTaken
from dspy_greater.stats import spearman

# Counter of the engines -> what it is called in a figure.
COSTS = {"prefilled_tokens": "read", "backward_tokens": "differentiated", "generated_tokens": "written"}


@dataclass(frozen=True)
class Progress:
    """The current instruction on the training rows before the first step and after each."""

    name: str  # of the predictor
    scores: tuple[float, ...]  # mean of the metric; the seed's first
    losses: tuple[float, ...]  # mean cross-entropy of the gold answers, nats; nan where there are none
    accepted: tuple[int, ...]  # after which steps, from 1, the instruction was another one


@dataclass(frozen=True)
class Outcome:
    """What was told of a candidate that was tried, and what came."""

    step: int  # from 1
    told: float  # predicted change: the forecast, or else the gradient
    came: float  # realised change of the mistake rate, on the same rows
    loss: float  # realised change of the mean cross-entropy, nats


@dataclass(frozen=True)
class Fidelity:
    """All forecasts of a predictor, and how well they put the candidates in order."""

    name: str
    forecasts: tuple[Outcome, ...]
    rank_correlation: float  # Spearman's; nan for fewer than three
    by_step: tuple[float, ...]


@dataclass(frozen=True)
class PhaseCosts:
    """Tokens by phase ("seed", "search", "validation"), and how often the program was run on a row."""

    phases: tuple[str, ...]
    tokens: dict[str, tuple[int, ...]]  # by the names of `COSTS`, in the order of the phases
    runs: tuple[int, ...]


def progress(name: str, seed: Evaluation, steps: Sequence[StepTaken]) -> Progress:
    """The path of the current instruction."""
    path = [seed, *(step.chosen for step in steps)]
    changed = [step.chosen.instruction != began for step, began in zip(steps, beginnings(seed, steps), strict=True)]
    return Progress(
        name,
        tuple(evaluation.score for evaluation in path),
        tuple(evaluation.cross_entropy for evaluation in path),
        tuple(place for place, accepted in enumerate(changed, start=1) if accepted),
    )


def beginnings(seed: Evaluation, steps: Sequence[StepTaken]) -> list[str]:
    """The instruction before each step, which need not be the one after the step before: a search may have returned."""
    path = [seed, *(step.chosen for step in steps)]
    return [step.began or before.instruction for step, before in zip(steps, path, strict=False)]


def fidelity(name: str, steps: Sequence[StepTaken]) -> Fidelity:
    """What the forecasts were worth."""
    found = [
        Outcome(step.step + 1, told, mistakes, loss) for step in steps for told, (mistakes, loss) in step.predictions
    ]
    pairs = [step.predictions for step in steps]
    return Fidelity(
        name,
        tuple(found),
        spearman([forecast.told for forecast in found], [(forecast.came, forecast.loss) for forecast in found]),
        tuple(spearman([told for told, _ in step_pairs], [came for _, came in step_pairs]) for step_pairs in pairs),
    )


def cost(phases: Mapping[str, Mapping[str, int]]) -> PhaseCosts:
    """Of the engines' counters by phase.

    Example:
        >>> cost({"seed": {"generated_tokens": 5, "runs": 2}}).tokens["written"]
        (5,)
    """
    return PhaseCosts(
        tuple(phases),
        {told: tuple(phase.get(name, 0) for phase in phases.values()) for name, told in COSTS.items()},
        tuple(phase.get("runs", 0) for phase in phases.values()),
    )


def summed(costs: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counters of several, added up.

    Example:
        >>> summed([{"runs": 1}, {"runs": 2, "forwards": 3}])
        {'runs': 3, 'forwards': 3}
    """
    found: dict[str, int] = {}
    for counted in costs:
        for name, count in counted.items():
            found[name] = found.get(name, 0) + count
    return found
