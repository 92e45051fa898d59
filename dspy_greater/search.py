"""Which position is next, and which instructions are best so far: a pure state machine.

`advance(state, step) -> state` reads nothing but its arguments, so a run is resumed by
replaying its recorded steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .run.events import Evaluation
from .settings import Settings

_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


@dataclass(frozen=True)
class SearchState:
    """Where the search stands.

    Invariants: `best` is sorted by objective, holds distinct instructions and every one
    of them was evaluated; `position` is an index of the current instruction, or its length when
    the next step appends a token.
    """

    seed: Evaluation
    current: Evaluation
    best: tuple[Evaluation, ...]
    step: int = 0
    position: int = 0
    failed_steps: int = 0  # in a row, without one finite loss

    def finished(self, settings: Settings) -> bool:
        """Whether all steps are taken."""
        return self.step >= settings.steps

    def appends(self) -> bool:
        """Whether the next step adds a token at the end instead of replacing one."""
        return self.position >= len(self.current.token_ids)


def begin(seed: Evaluation, settings: Settings, *, editable: Sequence[int] | None = None) -> SearchState:
    """The state before the first step: p = p* = the seed instruction (Algorithm 1, line 3).

    `editable` are the positions that may be changed, all of them by default; line breaks may not.
    """
    first = min(editable, default=0) if editable is not None else 0
    return SearchState(seed=seed, current=seed, best=_ranked((seed,), settings), position=first)


def advance(
    state: SearchState,
    chosen: Evaluation,
    evaluated: Sequence[Evaluation],
    settings: Settings,
    *,
    failed: bool = False,
    editable: Sequence[int] | None = None,
) -> SearchState:
    """The state after a step that evaluated some instructions and chose one (lines 16 to 19)."""
    return replace(
        state,
        current=chosen,
        best=_ranked((*state.best, chosen, *evaluated), settings),
        step=state.step + 1,
        position=_next_position(state.position, chosen, settings, editable),
        failed_steps=state.failed_steps + 1 if failed else 0,
    )


def ends_sentence(text: str) -> bool:
    """Whether an instruction is finished.

    Example:
        >>> ends_sentence("Think step by step."), ends_sentence("Think step")
        (True, False)
    """
    return text.rstrip().rstrip("\"')]").endswith(_SENTENCE_ENDS)


def step_random(seed: int, predictor: str, step: int) -> random.Random:
    """The source of randomness of one step: the same whether or not the run was interrupted before it."""
    return random.Random(f"{seed}/{predictor}/{step}")


def _next_position(position: int, chosen: Evaluation, settings: Settings, editable: Sequence[int] | None) -> int:
    """The next editable index; past the last, a new token if the sentence is open, else back to the first."""
    length = len(chosen.token_ids)
    positions = range(length) if editable is None else sorted(editable)
    later = [each for each in positions if each > position]
    if later:
        return later[0]
    could_not_grow = position >= length  # the step was to append a token, and there was none
    grows = not ends_sentence(chosen.instruction) and length < settings.max_instruction_tokens
    return length if grows and not could_not_grow else min(positions, default=0)


def _ranked(evaluations: Sequence[Evaluation], settings: Settings) -> tuple[Evaluation, ...]:
    """Distinct instructions, best objective first; of equals the earlier one."""
    distinct = {each.instruction: each for each in reversed(evaluations)}
    order = list(dict.fromkeys(each.instruction for each in evaluations))
    ranked = sorted((distinct[text] for text in order), key=lambda each: each.objective)
    return tuple(ranked[: settings.finalists])
