"""Which position is next, and which instructions are best so far: a pure state machine.

`advance(state, step) -> state` reads nothing but its arguments, so a run is resumed by
replaying its recorded steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import StepTaken
from dspy_greater.search.payoff import Payoff
from dspy_greater.settings import Settings

_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")
_RECENT = 60  # candidates over which forecasts prove themselves
_LONGEST_WALK = 20  # steps without a new best; an instruction that grows with every step would never return


@dataclass(frozen=True)
class Usage:
    """What a run has used of its budgets: the seeds' evaluations and the steps, of all predictors up to now."""

    generated_tokens: int = 0
    metric_calls: int = 0  # runs of the program on a row
    seconds: float = field(default=0.0, compare=False)  # the validations of earlier predictors included

    def after(self, spent: Mapping[str, int], seconds: float = 0.0) -> Usage:
        """With what an event says that was spent.

        >>> Usage(10, 1).after({"generated_tokens": 5, "runs": 2}, seconds=0.5)
        Usage(generated_tokens=15, metric_calls=3, seconds=0.5)
        """
        tokens, calls = spent.get("generated_tokens", 0), spent.get("runs", 0)
        return Usage(self.generated_tokens + tokens, self.metric_calls + calls, self.seconds + seconds)

    def exhausted(self, settings: Settings) -> str | None:
        """Which budget is spent, in words."""
        tokens, calls = settings.max_generated_tokens, settings.max_metric_calls
        if tokens is not None and self.generated_tokens >= tokens:
            return f"max_generated_tokens={tokens} was reached with {self.generated_tokens} tokens"
        if calls is not None and self.metric_calls >= calls:
            return f"max_metric_calls={calls} was reached with {self.metric_calls} calls"
        if settings.max_seconds is not None and self.seconds >= settings.max_seconds:
            return f"max_seconds={settings.max_seconds:g} was reached with {self.seconds:.1f} seconds"
        return None


UNUSED = Usage()


@dataclass(frozen=True)
class SearchState:
    """Where the search stands.

    Invariants: `best` is sorted by objective, holds distinct instructions and every one
    of them was evaluated on all rows; `position` is an index of the current instruction, or its length when
    the next step appends a token. `unchanged` counts the steps since a new best was found.
    """

    seed: Evaluation
    current: Evaluation
    best: tuple[Evaluation, ...]
    step: int = 0
    position: int = 0
    failed_steps: int = 0  # in a row, without one finite loss
    usage: Usage = UNUSED  # since the run began, by the searches of earlier predictors too
    fixed: str = ""  # the leading text of the instruction that may not change
    unchanged: int = 0
    predictions: tuple[tuple[float, tuple[float, float]], ...] = ()  # (predicted, realised) of what was tried
    edits: Payoff = field(default_factory=Payoff)  # of the steps that changed the current instruction,
    rewrites: Payoff = field(default_factory=Payoff)  # and of those that asked for others
    highest: float = -math.inf  # score of all that was evaluated
    formed: str | None = None  # the best instruction when whole ones were last asked for: its forms were tried

    def finished(self, settings: Settings) -> bool:
        """Whether all steps are taken, or a budget is spent."""
        return self.step >= settings.steps or self.usage.exhausted(settings) is not None

    def appends(self) -> bool:
        """Whether the next step adds a token at the end instead of replacing one."""
        return self.position >= len(self.current.token_ids)


def begin(
    seed: Evaluation,
    settings: Settings,
    *,
    editable: Sequence[int] | None = None,
    usage: Usage = UNUSED,
    fixed: str = "",
) -> SearchState:
    """The state before the first step: p = p* = the seed instruction (Algorithm 1, line 3).

    `editable` are the positions that may be changed, all of them by default; line breaks may not.
    `usage` is what was spent before, the seed's evaluation included. Only what follows `fixed` is searched;
    where nothing does, the first step appends a token.
    """
    first = min(editable, default=_nowhere(seed, fixed)) if editable is not None else 0
    best = _ranked((seed,), settings)
    return SearchState(seed, seed, best, position=first, usage=usage, fixed=fixed, highest=seed.score)


def advance(
    state: SearchState,
    step: StepTaken,
    evaluated: Sequence[Evaluation],
    settings: Settings,
    positions: Callable[[Sequence[int]], Sequence[int]],
    *,
    failed: bool = False,
) -> SearchState:
    """The state after a step that evaluated some instructions and chose one (lines 16 to 19).

    `positions` tells which positions of an instruction may be changed, and `failed` whether no loss was finite.
    """
    state, chosen = replace(state, position=step.position), step.chosen
    highest = max([state.highest, *(found.score for found in evaluated)])
    paid = highest > state.highest
    best = _ranked((*state.best, chosen, *evaluated), settings)
    further = best[0].instruction != state.best[0].instruction
    return replace(
        state,
        current=chosen,
        best=best,
        step=state.step + 1,
        position=_after_rewriting(state, chosen, positions)
        if step.asked
        else _next_position(state, chosen, settings, positions(chosen.token_ids)),
        failed_steps=state.failed_steps + 1 if failed else 0,
        usage=state.usage.after(step.spent, step.seconds),
        unchanged=0 if further else state.unchanged + 1,
        predictions=(*state.predictions, *step.predictions)[-_RECENT:],
        edits=state.edits if step.asked else state.edits.after(paid),
        rewrites=state.rewrites.after(paid) if step.asked else state.rewrites,
        highest=highest,
        formed=state.best[0].instruction if step.asked else state.formed,
    )


def return_to_best(
    state: SearchState, settings: Settings, positions: Callable[[Sequence[int]], Sequence[int]]
) -> SearchState:
    """After a round that led nowhere: the search returns to the best.

    That is more steps without a new best than the current instruction has positions, more than twenty of a longer one,
    or too many without a finite loss. What was tried from the best is not tried again, so the search leaves it on
    another way. `positions` tells which positions of an instruction may be changed.
    """
    current, best = state.current, state.best[0]
    away = current.instruction != best.instruction
    lost = away and state.failed_steps >= settings.max_failed_steps
    if state.unchanged <= max(1, min(len(positions(current.token_ids)), _LONGEST_WALK)) and not lost:
        return state
    first = min(positions(best.token_ids), default=_nowhere(best, state.fixed))
    failed = 0 if lost else state.failed_steps
    return replace(state, current=best, position=first, unchanged=0, failed_steps=failed)


def positions_ahead(state: SearchState, settings: Settings, editable: Sequence[int], count: int) -> list[SearchState]:
    """The state at its position and at the next ones, of the next round too: `count` of them, if there are so many.

    `editable` are the positions of the current instruction that may be changed.
    """
    found = [state]
    while len(found) < count:
        position = _next_position(found[-1], state.current, settings, editable)
        if position in [earlier.position for earlier in found]:
            break
        found.append(replace(state, position=position))
    return found


def ends_sentence(text: str) -> bool:
    """Whether an instruction is finished.

    Example:
        >>> ends_sentence("Think step by step."), ends_sentence("Think step"), ends_sentence(".")
        (True, False, False)
    """
    return any(map(str.isalnum, text)) and text.rstrip().rstrip("\"')]").endswith(_SENTENCE_ENDS)


def _nowhere(evaluation: Evaluation, fixed: str) -> int:
    """Where to go on if no position can be edited: at the end, if a fixed text is all there is."""
    return len(evaluation.token_ids) if fixed else 0


def _next_position(state: SearchState, chosen: Evaluation, settings: Settings, editable: Sequence[int]) -> int:
    """The next editable index; past the last, a new token if the sentence is open, else back to the first."""
    length = len(chosen.token_ids)
    positions = sorted(editable)
    later = [position for position in positions if position > state.position]
    if later:
        return later[0]
    could_not_grow = state.position >= length  # the step was to append a token, and there was none
    searched = len(positions) if state.fixed else length
    grows = not ends_sentence(chosen.instruction[len(state.fixed) :]) and searched < settings.max_instruction_tokens
    return length if grows and not could_not_grow else min(positions, default=_nowhere(chosen, state.fixed))


def _after_rewriting(
    state: SearchState, chosen: Evaluation, positions: Callable[[Sequence[int]], Sequence[int]]
) -> int:
    """Where it was if the instruction stayed; the first position of another one."""
    if chosen.instruction == state.current.instruction:
        return state.position
    return min(positions(chosen.token_ids), default=_nowhere(chosen, state.fixed))


def _ranked(evaluations: Sequence[Evaluation], settings: Settings) -> tuple[Evaluation, ...]:
    """Distinct instructions on all rows, best objective first; of equals the earlier one."""
    distinct = {evaluation.instruction: evaluation for evaluation in reversed(evaluations)}
    order = list(dict.fromkeys(evaluation.instruction for evaluation in evaluations))
    ranked = sorted((distinct[text] for text in order), key=lambda evaluation: evaluation.objective)
    return tuple(ranked[: settings.finalists])
