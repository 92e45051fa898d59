"""Everything that could decide which candidates are tried, as predicted changes of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from torch import Tensor

from dspy_greater.estimators.off_policy import Likelihood, forecast, likelihoods
from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.objective.replay import ReasonedSequence, Reasoning, Replay, advantages
from dspy_greater.search.edits import Edit
from dspy_greater.search.step import StepContext

Term = Literal["score", "pathwise", "whole"]  # of the score gradient's module; the whole is both
Point = Literal["current", "midpoint", "centroid"]  # where a linear model is taken


@dataclass(frozen=True)
class Position:
    """One position of one instruction: its replacements, and the reasonings that a search would have at hand."""

    here: StepContext  # with a session's model
    edits: tuple[Edit, ...]
    own: tuple[Reasoning, ...]  # of the current instruction
    replayed: tuple[Reasoning, ...]  # and of some that were tried elsewhere
    known: dict[tuple[ReasonedSequence, ...], Likelihood] = field(default_factory=dict)  # what any ranking has read

    @property
    def tokens(self) -> list[int]:
        """What each edit puts at the position."""
        return [edit.token for edit in self.edits]


Ranking = Callable[[Position], Sequence[float]]  # predicted change of every edit, negative is good


def at_random(at: Position) -> list[float]:
    """No prediction at all."""
    random = Random(f"{at.here.current.instruction}/{at.here.state.position}")
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


def slope(term: Term, point: Point, scale: float | None = None) -> Ranking:
    """A term of the expected loss's gradient at a point, over the instruction's own reasonings.

    `scale` takes the place of the `baseline_scale` that a search would have there.
    """

    def rank(at: Position) -> Sequence[float]:
        settings = at.here.settings
        return score_gradient(
            at.here.model,
            Replay(at.own, [0.0] * len(at.own) if term == "pathwise" else _advantages(at, at.own, scale)),
            position=at.here.state.position,
            candidates=at.tokens,
            answer_weight=0.0 if term == "score" else settings.answer_weight,
            answer_temperature=settings.answer_temperature,
            value=_value(at, point),
        )

    return rank


def off_policy(scale: float | None = None, *, elsewhere: bool = False, saturates: bool = True) -> Ranking:
    """Off-policy forecasts over the instruction's own reasonings, or those from `elsewhere`, too."""

    def rank(at: Position) -> list[float]:
        runs = at.replayed if elsewhere else at.own
        now, shares, against = _read(at, runs), [each.share for each in runs], _advantages(at, runs, scale)
        weight = at.here.settings.answer_weight
        ids = [edit.instruction.token_ids for edit in at.edits]
        then = [_read(at, [run.under(each) for run in runs]) for each in ids]
        return [forecast(now, each, against, shares, answer_weight=weight, saturates=saturates).change for each in then]

    return rank


# Named as in the committed tables: re-weighted scoring is the off-policy forecast, optimism the scale of the baseline.
RANKINGS: Mapping[str, Ranking] = {
    "re-weighted scoring": off_policy(),
    "re-weighted scoring, optimism 1": off_policy(1.0),
    "re-weighted scoring, optimism 0.5": off_policy(0.5),
    "re-weighted scoring, answers in nats": off_policy(saturates=False),
    "re-weighted scoring, optimism 0.5, answers in nats": off_policy(0.5, saturates=False),
    "re-weighted scoring, also what was tried elsewhere": off_policy(elsewhere=True),
    "score, centroid": slope("score", "centroid"),
    "score, centroid, optimism 1": slope("score", "centroid", 1.0),
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
        at.here.model,
        at.here.evaluator.supervised(at.here.current, reasoned=reasoned),
        position=at.here.state.position,
        candidates=at.tokens,
        answer_temperature=at.here.settings.answer_temperature,
        fluency_weight=at.here.settings.fluency_weight,
    )
    return list(found.predicted_change)


def _advantages(at: Position, runs: Sequence[Reasoning], scale: float | None) -> list[float]:
    return advantages(runs, baseline_scale=at.here.settings.baseline_scale if scale is None else scale)


def _value(at: Position, point: Point) -> Tensor:
    """The embedding [1, d] at which a linear model is taken."""
    current = at.here.model.embed([at.here.current.token_ids[at.here.state.position]])
    centroid = at.here.model.embed(at.tokens).mean(0, keepdim=True)
    return {"current": current, "midpoint": (current + centroid) / 2, "centroid": centroid}[point]


def _read(at: Position, runs: Sequence[Reasoning]) -> list[Likelihood]:
    """Likelihoods of the runs; one that a ranking has read is not read again for another."""
    missing = [run for run in runs if run.sequences not in at.known]
    found = likelihoods(at.here.model, missing, answer_temperature=at.here.settings.answer_temperature)
    at.known.update(zip((run.sequences for run in missing), found, strict=True))
    return [at.known[run.sequences] for run in runs]
