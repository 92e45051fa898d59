"""The paper's step: lines 7 to 18 of Algorithm 1 (arXiv 2412.09722).

propose (equations 3, 4) -> gradient over reasoning (5 to 7) -> the best μ with reasoning of their own -> select
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.objective.score import PAPER_CRITERION, Criterion
from dspy_greater.objective.types import Candidate, Evaluation
from dspy_greater.prompt.spans import Supervised
from dspy_greater.run.events import StepTaken
from dspy_greater.search.edits import Edit, propose_replacements
from dspy_greater.search.select import realised_change, select
from dspy_greater.search.state import SearchState
from dspy_greater.search.step import Positions, StepContext
from dspy_greater.settings import Settings


@dataclass(frozen=True)
class Ranked:
    """The tokens of line 14, best first, and what ranked them: predicted changes by token, where there are such."""

    tokens: tuple[int, ...]
    slopes: dict[int, float]


# (context, the instruction to improve on, its token at the position, candidate tokens) -> line 14, best first
PaperRanking = Callable[[StepContext, Evaluation, int, Sequence[int]], Ranked]


def by_paper_gradient(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
    """Equations 5 to 7 on the rows' own reasoning; nothing where there is nothing to differentiate."""
    return by_gradient_through(at, at.evaluator.supervised(current), candidates)


def by_gradient_through(at: StepContext, examples: Sequence[Supervised], candidates: Sequence[int]) -> Ranked:
    """The order of line 14, from equation 7 on these sequences."""
    if not candidates or not examples:
        return Ranked((), {})
    gradient = paper_gradient(
        at.model,
        examples,
        position=at.state.position,
        candidates=candidates,
        answer_temperature=at.settings.answer_temperature,
        fluency_weight=at.settings.fluency_weight,
    )
    return Ranked(
        gradient.most_negative(len(candidates) + 1),
        dict(zip(gradient.candidates, gradient.predicted_change, strict=True)),
    )


@dataclass(frozen=True)
class PaperStep:
    """Algorithm 1 as published. `rank` is its line 14, `selections` its μ where the settings name none."""

    rank: PaperRanking = by_paper_gradient
    selections: int = 3
    name: str = "paper"
    needs_gold: bool = True
    needs_gradient: bool = True
    criterion: Criterion = PAPER_CRITERION

    def take(self, at: StepContext) -> StepTaken:
        """Lines 7 to 18 for the state's position."""
        before, position = at.evaluator.spent(), at.state.position
        edits = propose_replacements(at)
        current = self._with_placeholder(at, edits)  # p, one token longer if the sentence goes on
        stands = current.token_ids[position] if position < len(current.token_ids) else -1  # p_i
        others = {edit.token: edit for edit in edits if edit.instruction.text != current.instruction}
        ranked = self.rank(at, current, stands, list(others))
        selected = ranked.tokens[: at.settings.selections or self.selections]
        tried = [others[token].instruction for token in selected if token in others]
        evaluated = at.evaluator.evaluate(tried, at.model)
        # Line 15: p_i is replaced by the best of the selected tokens, though it be worse than what stood there.
        selection = select(current, evaluated, stays=stands in selected)
        return StepTaken(
            predictor=at.predictor,
            step=at.state.step,
            position=position,
            current_token=stands,
            candidates=_told(at, edits, ranked, current, evaluated),
            chosen=selection.chosen,
            reason=selection.reason,
            spent=at.evaluator.spent(before),
            current_text=at.model.tokenizer.decode([stands] if stands >= 0 else []),
        )

    def move(self, state: SearchState, settings: Settings, positions: Positions) -> SearchState:
        """Line 19: to the next position, which the state knows."""
        return state

    def _with_placeholder(self, at: StepContext, edits: Sequence[Edit]) -> Evaluation:
        """The current instruction; where the step appends, with the likeliest token as the one to improve on."""
        if not at.state.appends() or not edits:
            return at.current
        (longer,) = at.evaluator.evaluate([edits[0].instruction], at.model)
        return longer


def _told(
    at: StepContext, edits: Sequence[Edit], ranked: Ranked, current: Evaluation, evaluated: Sequence[Evaluation]
) -> tuple[Candidate, ...]:
    """What became of each candidate, for the record."""
    outcomes = {evaluation.instruction: evaluation for evaluation in [current, *evaluated]}

    def tell(edit: Edit) -> Candidate:
        outcome = outcomes.get(edit.instruction.text)
        return Candidate(
            edit.token,
            at.model.tokenizer.decode([edit.token]),
            edit.log_probability,
            ranked.slopes.get(edit.token),
            outcome,
            edit=edit.kind,
            realised=None if outcome is None or outcome is current else realised_change(current, outcome),
        )

    return tuple(tell(edit) for edit in edits)
