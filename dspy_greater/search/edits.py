"""Edits of an instruction at one position: another token, one more in front of it, or none.

Tokens come from equations 3 and 4 of the paper, which ask what could follow the instruction's beginning: the same
tokens can stand at the position or be put in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Instruction, Objective
from dspy_greater.search.proposals import propose
from dspy_greater.search.state import SearchState, step_random
from dspy_greater.settings import Settings

Kind = Literal["replace", "insert", "delete"]


@dataclass(frozen=True)
class Edit:
    """A legal instruction that differs from the current one at one position.

    `token` stands at the position afterwards (where one is deleted: the one that was there), and
    `log_probability` is how likely the model finds it there, nats, mean over the proposal contexts.
    """

    kind: Kind
    token: int
    instruction: Instruction
    log_probability: float


def propose_edits(
    objective: Objective, model: Model, state: SearchState, settings: Settings, *, random_seed: int, predictor: str
) -> tuple[Edit, ...]:
    """All edits at the state's position that were not tried yet, the likeliest token first.

    A token that only leads to instructions that were tried does not count as a candidate, so the proposals widen
    until there is something new.
    """
    contexts = objective.proposal_contexts(state.current, state.position)
    if not contexts:
        return ()
    legal = _legal(objective, state, settings)
    proposal = propose(
        model,
        contexts,
        top_k=settings.top_k,
        sample_size=settings.proposal_rows,
        draws=settings.proposal_draws,
        minimum=settings.minimum_candidates,
        generator=step_random(random_seed, predictor, state.step),
        canonical=legal,
    )
    likelihoods = zip(proposal.candidates, proposal.canonical, proposal.mean_log_probabilities, strict=True)
    edits = [
        Edit(kind, token, instruction, likelihood)
        for token, found, likelihood in likelihoods
        for kind, instruction in found
    ]
    return _distinct([*edits, *_deletion(objective, state)])


def _legal(
    objective: Objective, state: SearchState, settings: Settings
) -> Callable[[int], tuple[tuple[Kind, Instruction], ...] | None]:
    """What a token can become at the position; None when that is nothing new."""
    ids, position, layout = state.current.token_ids, state.position, objective.layout
    positions = layout.positions(ids)
    editable = position in positions
    grows = (len(positions) if layout.fixed else len(ids)) < settings.max_instruction_tokens

    def legal(token: int) -> tuple[tuple[Kind, Instruction], ...] | None:
        found: list[tuple[Kind, tuple[tuple[int, ...], str] | None]] = []
        if editable:
            found.append(("replace", layout.replace(ids, position, token)))
        if grows and (editable or state.appends()):
            longer = layout.append(ids, token) if state.appends() else layout.insert(ids, position, token)
            found.append(("insert", longer))
        kept: list[tuple[Kind, Instruction]] = [(kind, Instruction(*each)) for kind, each in found if each is not None]
        return tuple(pair for pair in kept if not objective.knows(pair[1].text)) or None

    return legal


def _deletion(objective: Objective, state: SearchState) -> list[Edit]:
    ids, position = state.current.token_ids, state.position
    if len(ids) < 2 or position not in objective.layout.positions(ids):
        return []
    shorter = objective.layout.delete(ids, position)
    if shorter is None or objective.knows(shorter[1]):
        return []
    return [Edit("delete", ids[position], Instruction(*shorter), float("nan"))]


def _distinct(edits: list[Edit]) -> tuple[Edit, ...]:
    """Two tokens can be deployed as one text: the likelier counts."""
    first = {each.instruction.text: each for each in reversed(edits)}
    return tuple(each for each in edits if first[each.instruction.text] is each)
