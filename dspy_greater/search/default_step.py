"""The default step: edits -> score gradient -> off-policy forecasts -> reasoning of their own -> select.

Each stage is dearer and more faithful than the one before, and fewer candidates pass it:

    propose_edits       what could be put here: a token, a phrase, nothing     one forward pass over short contexts
    by_score_gradient   slope of the expected loss over reasonings at hand     one forward and backward pass
    forecast_off_policy the same change, exact in the edit                     one forward pass for each candidate
    evaluate            reasonings of their own                                generation

The first three look at the next few positions, the last at the one of them that promises most. While forecasts do not
come true, some steps leave gradient and forecast out and try edits by chance (`exploration`). While that pays better,
a step asks the model for whole instructions instead (`payoff`, `written`). Those have no slope, and are too far from
what the reasonings at hand were written under for a forecast: they reason on a few rows, and the best of them there on
the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from dspy_greater.estimators.off_policy import Forecast, Likelihood, forecast, likelihoods
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.objective.replay import Reasoning, Replay, advantages
from dspy_greater.objective.score import DEFAULT_CRITERION, Criterion
from dspy_greater.objective.types import Candidate, Evaluation, Trial
from dspy_greater.run.events import StepTaken
from dspy_greater.search.edits import Edit, propose_edits
from dspy_greater.search.exploration import baseline_scale, explores, forecasts_are_trusted
from dspy_greater.search.phrases import propose_phrases
from dspy_greater.search.prices import Glance, glance
from dspy_greater.search.select import Selection, realised_change, select
from dspy_greater.search.state import SearchState, positions_ahead, return_to_best
from dspy_greater.search.step import Positions, StepContext
from dspy_greater.search.written import propose_written, writes
from dspy_greater.settings import Settings

_ALIKE = 1e-9  # mistakes that differ by no more than rounding errors
_KINDS = ("replace", "insert", "delete", "phrase")
TRIAL_ROWS = 8  # on which whole instructions reason first

Slopes = dict[str, float]  # by the candidate's text
Forecasts = dict[str, Forecast]  # by the candidate's text


Ranking = Callable[[StepContext, Replay, Sequence[Edit]], Slopes]
Forecaster = Callable[[StepContext, Replay, Sequence[Edit]], Forecasts]
Forecasting = Callable[[StepContext, Replay], Forecaster]  # what does not depend on the position is computed once


def by_score_gradient(at: StepContext, replay: Replay, edits: Sequence[Edit]) -> Slopes:
    """Slopes of replacements and of insertions, each at a place of its own; a kind with one edit has none."""
    found: Slopes = {}
    for kind in ("replace", "insert"):
        alike = [edit for edit in edits if (edit.kind, edit.origin) == (kind, "token")]
        if len(alike) < 2 or not replay.reasonings:
            continue
        ids, position = at.current.token_ids, at.state.position
        if kind == "insert":  # any token will do in the gap: the embedding is put there
            ids = (*ids[:position], alike[0].token, *ids[position:])
        slopes = score_gradient(
            at.model,
            Replay([reasoning.under(ids) for reasoning in replay.reasonings], replay.advantages),
            position=position,
            candidates=[edit.token for edit in alike],
            answer_weight=at.settings.answer_weight if _gold_has_to_tell(replay.reasonings) else 0.0,
            answer_temperature=at.settings.answer_temperature,
        )
        found |= {edit.instruction.text: slope for edit, slope in zip(alike, slopes, strict=True)}
    return found


def forecast_off_policy(at: StepContext, replay: Replay) -> Forecaster:
    """The exact change of the expected loss over the reasonings at hand, or over the first of them."""
    temperature = at.settings.answer_temperature
    saturates = _reasons(at.state.seed)
    known: dict[tuple[int, ...], list[Likelihood]] = {}  # by instruction, of the first reasonings

    def read(ids: tuple[int, ...], count: int) -> list[Likelihood]:
        found = known.setdefault(ids, [])
        missing = [reasoning.under(ids) for reasoning in replay.reasonings[len(found) : count]]
        if missing:
            found += likelihoods(at.model, missing, answer_temperature=temperature)
        return found[:count]

    def of_edits(_at: StepContext, first: Replay, edits: Sequence[Edit]) -> Forecasts:
        count, shares = len(first.reasonings), [reasoning.share for reasoning in first.reasonings]
        now = read(at.current.token_ids, count) if edits else []
        weight, against = at.settings.answer_weight, first.advantages
        tell = partial(forecast, now, advantages=against, shares=shares, answer_weight=weight, saturates=saturates)
        return {edit.instruction.text: tell(read(edit.instruction.token_ids, count)) for edit in edits}

    return of_edits


def race(
    forecaster: Forecaster, at: StepContext, replay: Replay, edits: Sequence[Edit], rounds: Sequence[tuple[int, int]]
) -> Forecasts:
    """Forecasts of those edits that are left after the rounds, (how many go on, from how many reasonings) each."""
    told: Forecasts = {}
    for kept, count in rounds:
        edits = sorted(edits, key=lambda edit: _change(told, edit))[:kept]
        told = forecaster(at, replay.first(count), edits)
    return told


@dataclass(frozen=True)
class _Look:
    """A position, its edits, and what the first two gates say of them."""

    at: StepContext
    edits: tuple[Edit, ...]
    slopes: Slopes
    shortlist: tuple[Edit, ...]
    forecasts: Forecasts
    asked: bool = False  # for whole instructions
    trials: Mapping[str, Evaluation] = field(default_factory=dict[str, Evaluation])  # by text, on a few rows

    @property
    def promise(self) -> float:
        """The best forecast at the position."""
        return min((_finite(prediction.change) for prediction in self.forecasts.values()), default=math.inf)

    def ranked(self) -> list[Edit]:
        """The shortlist by forecast; a stable sort, so without forecasts its own order counts."""
        return sorted(self.shortlist, key=lambda edit: _change(self.forecasts, edit))


@dataclass(frozen=True)
class DefaultStep:
    """The default variant's step.

    `rank` and `forecast` are the gates before generation; None leaves one out, and without `rank` edits pass by chance.
    `selections` is μ where the settings name none.
    """

    rank: Ranking | None = by_score_gradient
    forecast: Forecasting | None = forecast_off_policy
    selections: int = 1
    name: str = "default"
    needs_gold: bool = False
    needs_gradient: bool = True
    criterion: Criterion = DEFAULT_CRITERION

    def take(self, at: StepContext) -> StepTaken:
        """One step from the state; see the module."""
        before, random = at.evaluator.spent(), at.random()
        if writes(at):
            return self._rewritten(at, propose_written(at), random, before)
        if self.rank is not None and explores(at.state, at.settings, random):
            return replace(self, rank=None, forecast=None)._step(at, random, before)
        return self._step(at, random, before)

    def move(self, state: SearchState, settings: Settings, positions: Positions) -> SearchState:
        """On from what was chosen; back to the best after a round without a new one."""
        return return_to_best(state, settings, positions)

    def _step(self, at: StepContext, random: Random, before: Mapping[str, int]) -> StepTaken:
        look = min(self._look_ahead(at, self._glance(at), random), key=lambda option: option.promise)
        evaluated = at.evaluator.evaluate([edit.instruction for edit in self._tried(look)], at.model)
        return self._taken(look, evaluated, select(at.current, evaluated, stays=False), before)

    def _rewritten(
        self, at: StepContext, written: tuple[Edit, ...], random: Random, before: Mapping[str, int]
    ) -> StepTaken:
        """The best of whole instructions on a few rows reasons on all; the search moves to it only if it is better."""
        look = _Look(at, written, {}, written, {}, asked=True)
        if not written:
            return self._taken(look, [], Selection(at.current, "kept the instruction: no other was written"), before)
        instructions, every = [edit.instruction for edit in written], [row.row for row in at.current.rows]
        rows = sorted(random.sample(every, min(TRIAL_ROWS, len(every))))
        tried = at.evaluator.try_out(instructions, rows, at.model)
        look = replace(look, trials={found.instruction: found for found in tried})
        best = min(range(len(tried)), key=lambda place: tried[place].objective)
        if not tried[best].objective < at.evaluator.on_rows(at.current, rows).objective:
            kept = Selection(at.current, f"kept the instruction: on {len(rows)} rows it is the best")
            return self._taken(look, [], kept, before)
        evaluated = at.evaluator.evaluate([instructions[best]], at.model, tried)
        # A walk goes on over worse instructions; another one altogether has to be better.
        return self._taken(look, evaluated, select(at.current, evaluated, what="instruction"), before)

    def _replay(self, at: StepContext, seen: Glance, random: Random) -> Replay:
        reasonings = at.evaluator.replay(at.current, random, seen.reasonings)
        scale = baseline_scale(at.settings, at.state.seed, at.current)
        return Replay(tuple(reasonings), tuple(advantages(reasonings, baseline_scale=scale)))

    def _forecaster(self, at: StepContext, replay: Replay) -> Forecaster | None:
        if self.forecast is None or at.settings.forecasts == 0 or not replay.reasonings:
            return None
        return self.forecast(at, replay)

    def _glance(self, at: StepContext) -> Glance:
        """Chance costs nothing, and what is not forecast is not paid for."""
        if self.forecast is not None:
            return glance(at, self._most(at))
        if self.rank is None:
            return Glance(1, 0, at.settings.replayed, races=False)
        return glance(replace(at, settings=replace(at.settings, forecasts=0)), self._most(at))

    def _taken(
        self, look: _Look, evaluated: Sequence[Evaluation], selection: Selection, before: Mapping[str, int]
    ) -> StepTaken:
        """What became of the look's candidates, of which those that were evaluated reasoned on all rows."""
        at, state = look.at, look.at.state
        stands = [] if state.appends() else [at.current.token_ids[state.position]]
        replaced = at.current.instruction if look.asked else at.model.tokenizer.decode(stands)
        return StepTaken(
            predictor=at.predictor,
            step=state.step,
            position=state.position,
            current_token=stands[0] if stands else -1,
            candidates=_told(look, evaluated),
            chosen=selection.chosen,
            reason=selection.reason,
            spent=at.evaluator.spent(before),
            current_text=replaced,
            asked=look.asked,
        )

    def _look_ahead(self, at: StepContext, seen: Glance, random: Random) -> list[_Look]:
        """Slopes and forecasts at the next few positions; at one alone where nothing is forecast."""
        replay = self._replay(at, seen, random)
        forecaster = self._forecaster(at, replay)
        count = seen.positions if forecaster is not None else 1
        ahead = positions_ahead(at.state, at.settings, at.evaluator.layout.edits.positions(at.current.token_ids), count)
        looks: list[_Look] = []
        for state in ahead:
            here = replace(at, state=state)
            edits = (*propose_edits(here), *propose_phrases(here))
            slopes = self.rank(here, replay, edits) if self.rank is not None and seen.slopes else {}
            shortlist = self._shortlist(here, edits, slopes, seen, random)
            alone = len(ahead) == 1 and len(shortlist) < 2  # nothing to compare it with
            rounds = seen.rounds(len(shortlist))
            found = race(forecaster, here, replay, shortlist, rounds) if forecaster is not None and not alone else {}
            looks.append(_Look(here, edits, slopes, shortlist, found))
        return looks

    def _shortlist(
        self, at: StepContext, edits: Sequence[Edit], slopes: Slopes, seen: Glance, random: Random
    ) -> tuple[Edit, ...]:
        """The best by slope, kinds in turn: slopes of different kinds cannot be compared. Without ranking, some.

        Where slopes are too dear, those that the model finds likeliest.
        """
        size = max(seen.candidates, self._most(at))
        if self.rank is None:
            return tuple(random.sample(list(edits), min(size, len(edits))))
        ranked = [
            sorted((edit for edit in edits if _kind(edit) == kind), key=lambda edit: _slope(slopes, edit))
            for kind in _KINDS
        ]
        longest = max(map(len, ranked), default=0)
        return tuple(edit for turn in range(longest) for alike in ranked for edit in alike[turn : turn + 1])[:size]

    def _tried(self, look: _Look) -> list[Edit]:
        """At most μ candidates; only those that promise an improvement, once forecasts have proven themselves."""
        ranked = look.ranked()[: self._most(look.at)]
        if self.rank is None or not forecasts_are_trusted(look.at.state):
            return ranked
        promising = [edit for edit in ranked if _change(look.forecasts, edit) < 0]
        return promising or ranked[:1]

    def _most(self, at: StepContext) -> int:
        return at.settings.selections or self.selections


def _gold_has_to_tell(reasonings: Sequence[Reasoning]) -> bool:
    """Whether all reasonings turned out alike, or none was generated, so that only gold answers tell what is better."""
    mistakes = [reasoning.mistake for reasoning in reasonings]
    alike = max(mistakes) - min(mistakes) <= _ALIKE
    generated = any(len(sequence.generated) for reasoning in reasonings for sequence in reasoning.sequences)
    return alike or not generated


def _reasons(seed: Evaluation) -> bool:
    """Whether the program reasons before it answers, by its fields or by what the model writes before the first one.

    It is asked of the seed, so that all forecasts of a search are in one unit, and of rows in which the answer's field
    was found: where it was in none, the gold answer with its header has to lead there.
    """
    rows = [row for row in seed.rows if not row.unparsed]
    return any(row.written for row in rows) or 2 * sum(bool(row.preamble.strip()) for row in rows) > len(rows)


def _told(look: _Look, evaluated: Sequence[Evaluation]) -> tuple[Candidate, ...]:
    """What became of each candidate, for the record."""
    outcomes = {evaluation.instruction: evaluation for evaluation in evaluated}
    decode = look.at.model.tokenizer.decode

    def tell(edit: Edit) -> Candidate:
        text = edit.instruction.text
        outcome, told, trial = outcomes.get(text), look.forecasts.get(text), look.trials.get(text)
        return Candidate(
            token=edit.token,
            text=text if edit.kind == "rewrite" else decode(list(edit.tokens)),
            log_probability=edit.log_probability,
            gradient=look.slopes.get(text),
            evaluation=outcome,
            edit=edit.kind,
            forecast=None if told is None else told.change,
            effective_samples=None if told is None else told.effective_samples,
            realised=None if outcome is None else realised_change(look.at.current, outcome),
            trial=None if trial is None else Trial(len(trial.rows), trial.score),
            origin=edit.origin,
        )

    return tuple(tell(edit) for edit in look.edits)


def _kind(edit: Edit) -> str:
    return edit.kind if edit.origin == "token" else edit.origin


def _slope(slopes: Slopes, edit: Edit) -> float:
    return _finite(slopes.get(edit.instruction.text, math.inf))


def _change(forecasts: Forecasts, edit: Edit) -> float:
    told = forecasts.get(edit.instruction.text)
    return math.inf if told is None else _finite(told.change)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
