"""Everything that could decide which candidates are tried, as predicted changes of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from torch import Tensor

from dspy_greater.estimators.off_policy import Likelihood, forecast, likelihoods
from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.replay import Reasoning, advantages
from dspy_greater.objective.types import Evaluation
from dspy_greater.search.edits import Edit
from dspy_greater.settings import Settings

Term = Literal["score", "pathwise", "whole"]  # of the score gradient's module; the whole is both
Point = Literal["current", "midpoint", "centroid"]  # where a linear model is taken


@dataclass(frozen=True)
class Position:
    """One position of one instruction: its replacements, and the reasonings that a search would have at hand."""

    objective: Evaluator
    model: Model  # a session
    current: Evaluation
    position: int
    edits: tuple[Edit, ...]
    own: tuple[Reasoning, ...]  # of the current instruction
    replayed: tuple[Reasoning, ...]  # and of some that were tried elsewhere
    settings: Settings

    @property
    def tokens(self) -> list[int]:
        """What each edit puts at the position."""
        return [edit.token for edit in self.edits]


Ranking = Callable[[Position], Sequence[float]]  # predicted change of every edit, negative is good


def at_random(at: Position) -> list[float]:
    """No prediction at all."""
    random = Random(f"{at.current.instruction}/{at.position}")
    return [random.random() for _ in at.edits]


def by_likelihood(at: Position) -> list[float]:
    """The proposal's own order."""
    return [-edit.log_probability for edit in at.edits]


def paper(at: Position) -> list[float]:
    """Equation 7: the reasoning fixed, at the current token."""
    return _paper(at, reasoned=True)


def without_reasoning(at: Position) -> list[float]:
    """The same with an empty reasoning: the ablation of the paper's figure 3."""
    return _paper(at, reasoned=False)


def fixed_reasoning(at: Position) -> list[float]:
    """What the pathwise term linearises, exactly: the change of the answer's cross-entropy, the reasoning fixed."""
    now, shares = _read(at, at.own), [each.share for each in at.own]
    ids = [edit.instruction.token_ids for edit in at.edits]
    then = [_read(at, [run.under(each) for run in at.own]) for each in ids]
    return [forecast(now, each, [0.0] * len(now), shares, saturates=False).change for each in then]


def slope(term: Term, point: Point, optimism: float | None = None) -> Ranking:
    """A term of the expected loss's gradient at a point, over the instruction's own reasonings."""

    def rank(at: Position) -> Sequence[float]:
        hope = at.settings.optimism if optimism is None else optimism
        return score_gradient(
            at.model,
            at.own,
            [0.0] * len(at.own) if term == "pathwise" else advantages(at.own, baseline_scale=hope),
            position=at.position,
            candidates=at.tokens,
            answer_weight=0.0 if term == "score" else at.settings.answer_weight,
            answer_temperature=at.settings.answer_temperature,
            value=_value(at, point),
        )

    return rank


def rescored(reasonings: str = "own", optimism: float | None = None, *, saturates: bool = True) -> Ranking:
    """Re-weighted scoring over some of the reasonings."""

    def rank(at: Position) -> list[float]:
        runs: Sequence[Reasoning] = getattr(at, reasonings)
        hope = at.settings.optimism if optimism is None else optimism
        now, shares = _read(at, runs), [each.share for each in runs]
        against = advantages(runs, baseline_scale=hope)
        weight = at.settings.answer_weight
        ids = [edit.instruction.token_ids for edit in at.edits]
        then = [_read(at, [run.under(each) for run in runs]) for each in ids]
        return [forecast(now, each, against, shares, answer_weight=weight, saturates=saturates).change for each in then]

    return rank


RANKINGS: Mapping[str, Ranking] = {
    "re-weighted scoring": rescored(),
    "re-weighted scoring, optimism 1": rescored(optimism=1.0),
    "re-weighted scoring, optimism 0.5": rescored(optimism=0.5),
    "re-weighted scoring, answers in nats": rescored(saturates=False),
    "re-weighted scoring, optimism 0.5, answers in nats": rescored(optimism=0.5, saturates=False),
    "re-weighted scoring, also what was tried elsewhere": rescored("replayed"),
    "score, centroid": slope("score", "centroid"),
    "score, centroid, optimism 1": slope("score", "centroid", optimism=1.0),
    "score, midpoint": slope("score", "midpoint"),
    "score, current": slope("score", "current"),
    "whole, centroid": slope("whole", "centroid"),
    "whole, current": slope("whole", "current"),
    "pathwise, centroid": slope("pathwise", "centroid"),
    "pathwise, current": slope("pathwise", "current"),
    "paper (pathwise and fluency, current)": paper,
    "reasoning fixed, exact": fixed_reasoning,
    "gradient without reasoning": without_reasoning,
    "likelihood": by_likelihood,
    "random": at_random,
}


def _paper(at: Position, *, reasoned: bool) -> list[float]:
    found = paper_gradient(
        at.model,
        at.objective.supervised(at.current, reasoned=reasoned),
        position=at.position,
        candidates=at.tokens,
        answer_temperature=at.settings.answer_temperature,
        fluency_weight=at.settings.fluency_weight,
    )
    return list(found.predicted_change)


def _value(at: Position, point: Point) -> Tensor:
    """The embedding [1, d] at which a linear model is taken."""
    current = at.model.embed([at.current.token_ids[at.position]])
    centroid = at.model.embed(at.tokens).mean(0, keepdim=True)
    return {"current": current, "midpoint": (current + centroid) / 2, "centroid": centroid}[point]


def _read(at: Position, runs: Sequence[Reasoning]) -> list[Likelihood]:
    return likelihoods(at.model, runs, answer_temperature=at.settings.answer_temperature)
