"""A step of the default variant: edits -> whole gradient -> re-weighted scoring -> reasoning of their own -> select.

Each stage is dearer and more faithful than the one before, and fewer candidates pass it:

    propose_edits     what could be written here                              one forward pass over short contexts
    whole_gradient    slope of the expected loss over reasonings at hand      one forward and backward pass
    rescore           the same change, exact in the edit                      one forward pass for each candidate
    evaluate          reasonings of their own                                 generation

The first three look at the next few positions, the last at the one of them that promises most. While forecasts do not
come true, some steps leave gradient and forecast out and try edits by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from dspy_greater.estimators.off_policy import Forecast, Likelihood, forecast, likelihoods
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.fidelity import spearman
from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Objective
from dspy_greater.objective.replay import Reasoning, advantages
from dspy_greater.run.events import Candidate, Evaluation, StepTaken
from dspy_greater.search.edits import Edit, propose_edits
from dspy_greater.search.select import realised_change, select
from dspy_greater.search.state import SearchState, positions_ahead, step_random
from dspy_greater.settings import Settings

_TRUSTED = 0.3  # rank correlation from which forecasts are believed
_OUTDONE = 0.9  # share of the seed's mistakes from which on it is outdone
_ALIKE = 1e-9  # mistakes that differ by no more than rounding errors
_ENOUGH = 9  # candidates that were tried before fidelity says that forecasts come true,
_ENOUGH_TO_DOUBT = 6  # and of the last few, before it says that they do not
_LAST = 12


@dataclass(frozen=True)
class _Verdict:
    """What each stage said of an edit; None for a stage that it did not reach."""

    edit: Edit
    slope: float | None = None
    forecast: Forecast | None = None


Verdicts = dict[str, _Verdict]  # by the candidate's text


@dataclass(frozen=True)
class _Look:
    """A position, and what the first two gates say of its edits: of all of them, and of those that pass the first."""

    state: SearchState
    sloped: Verdicts
    forecasts: Verdicts


def take_whole_step(
    objective: Objective, model: Model, state: SearchState, settings: Settings, *, predictor: str, random_seed: int
) -> StepTaken:
    """One step from `state`; see the module."""
    before, current = objective.spent(), state.current
    random = step_random(random_seed, predictor, state.step)
    settings = (
        _by_chance(settings) if _explores(state, settings, random) else hopeful(settings, state.seed, state.current)
    )
    reasonings = objective.replay(current, random, settings.replayed)

    looks = _look_ahead(
        objective, model, reasonings, state, settings, random, random_seed=random_seed, predictor=predictor
    )
    look = min(looks, key=_promise)
    tried = _most_promising(look.forecasts, state, settings)
    evaluated = objective.evaluate([each.edit.instruction for each in tried], model)
    selection = select(current, evaluated, stays=False)

    return StepTaken(
        predictor=predictor,
        step=state.step,
        position=look.state.position,
        current_token=current.token_ids[look.state.position] if not look.state.appends() else -1,
        candidates=_told(objective, {**look.sloped, **look.forecasts}, current, evaluated),
        chosen=selection.chosen,
        reason=selection.reason,
        spent=objective.spent(before),
    )


def hopeful(settings: Settings, seed: Evaluation, current: Evaluation) -> Settings:
    """With as much optimism about reasonings that were not seen as there is reason for.

    While the model is as wrong as under the seed instruction, anything else is worth a try. Once it is right more
    often, what it would write instead is mostly what it wrote before, and counts as no better than what is at hand:
    optimism is 1 where a tenth of the seed's mistakes, 1 - score, is gone, and where the seed made none.

    >>> seed = Evaluation((), "Guess.", (), score=0.5, cross_entropy=0.0, fluency_nll=0.0, objective=(0.5, 0.0))
    >>> [round(hopeful(Settings(), seed, replace(seed, score=now)).optimism, 2) for now in (0.5, 0.525, 0.6)]
    [0.5, 0.75, 1.0]
    """
    before, now = 1.0 - seed.score, 1.0 - current.score
    hope = min(1.0, max(0.0, (now / before - _OUTDONE) / (1.0 - _OUTDONE))) if before > 0 else 0.0
    return replace(settings, optimism=1.0 - (1.0 - settings.optimism) * hope)


def _explores(state: SearchState, settings: Settings, random: Random) -> bool:
    """Whether this step tries edits by chance, since what was forecast of the last ones did not come true.

    Where no single edit does much, forecasts tell noise and pass over what chance would find. The other steps
    go on forecasting, so that trust can be regained. Which these are is drawn: in a fixed order both kinds would
    keep to positions of their own.
    """
    if not settings.explore_every or settings.ranking == "random":
        return False
    last = _came_true(state)[-_LAST:]
    doubted = len(last) >= _ENOUGH_TO_DOUBT and not spearman(*zip(*last, strict=True)) >= _TRUSTED
    return doubted and random.random() * settings.explore_every < 1


def _by_chance(settings: Settings) -> Settings:
    return replace(settings, estimator="random", rescored=0)


def _came_true(state: SearchState) -> list[tuple[float, tuple[float, float]]]:
    """What was predicted and what came, of the candidates that ran to the end."""
    return [pair for pair in state.predictions if all(map(math.isfinite, (pair[0], *pair[1])))]


def _look_ahead(
    objective: Objective,
    model: Model,
    reasonings: Sequence[Reasoning],
    state: SearchState,
    settings: Settings,
    random: Random,
    *,
    random_seed: int,
    predictor: str,
) -> list[_Look]:
    """Slopes and forecasts at the next few positions; at one alone where nothing is forecast."""
    forecasts = settings.rescored and settings.ranking != "random" and reasonings
    count = settings.positions_ahead if forecasts else 1
    ahead = positions_ahead(state, settings, objective.layout.positions(state.current.token_ids), count)
    now: list[Likelihood] | None = None
    looks: list[_Look] = []
    for at in ahead:
        edits = propose_edits(objective, model, at, settings, random_seed=random_seed, predictor=predictor)
        sloped = _slope(model, reasonings, at, edits, settings)
        shortlist = _shortlist(sloped, settings, random)
        found = {each.edit.instruction.text: each for each in shortlist}
        if forecasts and len(shortlist) > (1 if len(ahead) == 1 else 0):
            now = now or _likelihoods(model, [each.under(state.current.token_ids) for each in reasonings], settings)
            found = _rescore(model, reasonings, now, shortlist, settings, saturates=_reasons(state.seed))
        looks.append(_Look(at, sloped, found))
    return looks


def _promise(look: _Look) -> float:
    """The best forecast at the position."""
    return min(map(_by_forecast, look.forecasts.values()), default=math.inf)


def _slope(
    model: Model, reasonings: Sequence[Reasoning], state: SearchState, edits: Sequence[Edit], settings: Settings
) -> Verdicts:
    """The first gate: slopes of replacements and of insertions, each at a place of its own."""
    found = {each.instruction.text: _Verdict(each) for each in edits}
    if settings.ranking == "random" or not reasonings:
        return found
    for kind in ("replace", "insert"):
        alike = [each for each in edits if each.kind == kind]
        if len(alike) < 2:
            continue
        slopes = _slopes(model, reasonings, state, alike, settings)
        for each, slope in zip(alike, slopes, strict=True):
            found[each.instruction.text] = _Verdict(each, slope)
    return found


def _slopes(
    model: Model, reasonings: Sequence[Reasoning], state: SearchState, alike: Sequence[Edit], settings: Settings
) -> tuple[float, ...]:
    ids, position = state.current.token_ids, state.position
    if alike[0].kind == "insert":  # any token will do in the gap: the embedding is put there
        ids = (*ids[:position], alike[0].token, *ids[position:])
    return score_gradient(
        model,
        [each.under(ids) for each in reasonings],
        advantages(reasonings, baseline_scale=settings.optimism),
        position=position,
        candidates=[each.token for each in alike],
        answer_weight=settings.answer_weight if _gold_has_to_tell(reasonings) else 0.0,
        answer_temperature=settings.answer_temperature,
    )


def _gold_has_to_tell(reasonings: Sequence[Reasoning]) -> bool:
    """Whether all reasonings turned out alike, or none was generated, so that only gold answers tell what is better."""
    mistakes = [each.mistake for each in reasonings]
    alike = max(mistakes) - min(mistakes) <= _ALIKE
    generated = any(len(sequence.generated) for each in reasonings for sequence in each.sequences)
    return alike or not generated


def _reasons(seed: Evaluation) -> bool:
    """Whether the program reasons before it answers, by its fields or by what the model writes before the first one.

    It is asked of the seed, so that all forecasts of a search are in one unit, and of rows in which the answer's field
    was found: where it was in none, the gold answer with its header has to lead there.
    """
    rows = [row for row in seed.rows if not row.unparsed]
    return any(row.written for row in rows) or 2 * sum(bool(row.preamble.strip()) for row in rows) > len(rows)


def _shortlist(verdicts: Verdicts, settings: Settings, random: Random) -> list[_Verdict]:
    """The best by slope, kinds in turn: slopes of different kinds cannot be compared."""
    size = max(settings.rescored, settings.most_tried)
    if settings.ranking == "random":
        return random.sample(list(verdicts.values()), min(size, len(verdicts)))
    kinds = ("replace", "insert", "delete")
    ranked = [sorted((each for each in verdicts.values() if each.edit.kind == kind), key=_by_slope) for kind in kinds]
    longest = max(map(len, ranked), default=0)
    return [each for turn in range(longest) for alike in ranked for each in alike[turn : turn + 1]][:size]


def _rescore(
    model: Model,
    reasonings: Sequence[Reasoning],
    now: Sequence[Likelihood],
    shortlist: Sequence[_Verdict],
    settings: Settings,
    *,
    saturates: bool,
) -> Verdicts:
    """The second gate: the exact change of the expected loss over the reasonings at hand."""
    against = advantages(reasonings, baseline_scale=settings.optimism)
    shares = [each.share for each in reasonings]
    found: Verdicts = {}
    for each in shortlist:
        ids = each.edit.instruction.token_ids
        then = _likelihoods(model, [reasoning.under(ids) for reasoning in reasonings], settings)
        told = forecast(now, then, against, shares, answer_weight=settings.answer_weight, saturates=saturates)
        found[each.edit.instruction.text] = _Verdict(each.edit, each.slope, told)
    return found


def _likelihoods(model: Model, reasonings: Sequence[Reasoning], settings: Settings) -> list[Likelihood]:
    return likelihoods(model, reasonings, answer_temperature=settings.answer_temperature)


def _most_promising(verdicts: Verdicts, state: SearchState, settings: Settings) -> list[_Verdict]:
    """At most μ candidates; only those that promise an improvement, once forecasts have proven themselves."""
    # A stable sort: without forecasts the order of the shortlist counts, by slope or random.
    ranked = sorted(verdicts.values(), key=_by_forecast)[: settings.most_tried]
    came_true = _came_true(state)
    trusted = len(came_true) >= _ENOUGH and spearman(*zip(*came_true, strict=True)) >= _TRUSTED
    promising = [each for each in ranked if each.forecast is not None and each.forecast.change < 0]
    return (promising or ranked[:1]) if trusted and settings.ranking != "random" else ranked


def _told(
    objective: Objective, verdicts: Verdicts, current: Evaluation, evaluated: Sequence[Evaluation]
) -> tuple[Candidate, ...]:
    """What became of each candidate, for the record."""
    outcomes = {each.instruction: each for each in evaluated}

    def tell(verdict: _Verdict) -> Candidate:
        edit, outcome = verdict.edit, outcomes.get(verdict.edit.instruction.text)
        return Candidate(
            token=edit.token,
            text=objective.engine.tokenizer.decode([edit.token]),
            log_probability=edit.log_probability,
            gradient=verdict.slope,
            evaluation=outcome,
            edit=edit.kind,
            forecast=None if verdict.forecast is None else verdict.forecast.change,
            effective_samples=None if verdict.forecast is None else verdict.forecast.effective_samples,
            realised=None if outcome is None else realised_change(current, outcome),
        )

    return tuple(tell(each) for each in verdicts.values())


def _by_slope(verdict: _Verdict) -> float:
    return verdict.slope if verdict.slope is not None and math.isfinite(verdict.slope) else math.inf


def _by_forecast(verdict: _Verdict) -> float:
    change = math.inf if verdict.forecast is None else verdict.forecast.change
    return change if math.isfinite(change) else math.inf
