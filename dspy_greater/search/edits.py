"""Edits of an instruction: at one position another token, one more in front of it or at the end, or none.

Tokens come from equations 3 and 4 of the paper, which ask what could follow the instruction's beginning: the same
tokens can stand at the position or be put in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from dspy_greater.objective.evaluator import Instruction
from dspy_greater.search.proposals import ProposalSizes, propose
from dspy_greater.search.step import StepContext

Kind = Literal["replace", "insert", "delete", "rewrite"]
Origin = Literal["token", "phrase", "written", "form"]
Legal = Callable[[int], tuple[tuple[Kind, Instruction], ...] | None]


@dataclass(frozen=True)
class Edit:
    """A legal instruction that differs from the current one at one position, or ("rewrite") altogether.

    `tokens` stand at the position afterwards (where one is deleted: the one that was there): one, or those of a phrase.
    At either end of the instruction a token may have taken in a blank around it, as " Think" for a proposed "Think".
    `log_probability` is how likely the model finds what was proposed there, nats per token, mean over the proposal
    contexts. `origin` is what proposed it.
    """

    kind: Kind
    tokens: tuple[int, ...]
    instruction: Instruction
    log_probability: float
    origin: Origin = "token"

    @property
    def token(self) -> int:
        """The first of its tokens."""
        return self.tokens[0]


def propose_replacements(at: StepContext) -> tuple[Edit, ...]:
    """Another token at the position, or one more at the end, as in the paper; the likeliest token first."""
    return _proposed(at, {"replace"}, new=False)


def propose_edits(at: StepContext) -> tuple[Edit, ...]:
    """All edits at the position that were not tried yet, the likeliest token first.

    A token that only leads to instructions that were tried does not count as a candidate, so the proposals widen
    until there is something new.
    """
    called = any(row.inputs for row in at.current.rows)  # otherwise what it says makes no difference
    return _distinct([*_proposed(at, {"replace", "insert"}, new=True), *_deletion(at)]) if called else ()


def _proposed(at: StepContext, kinds: Collection[Kind], *, new: bool) -> tuple[Edit, ...]:
    contexts = at.evaluator.proposal_contexts(at.current, at.state.position)
    editable = at.state.position in at.evaluator.layout.edits.positions(at.current.token_ids)
    if not contexts or not (editable or at.state.appends()):
        return ()
    proposal = propose(
        at.model,
        contexts,
        ProposalSizes(
            top_k=at.settings.top_k,
            sample_size=at.settings.proposal_rows,
            draws=at.settings.proposal_draws,
            minimum=at.settings.minimum_candidates,
        ),
        generator=at.random(),
        canonical=_legal(at, kinds, new=new, editable=editable),
    )
    likelihoods = zip(proposal.canonical, proposal.mean_log_probabilities, strict=True)
    return _distinct(
        [
            Edit(kind, (instruction.token_ids[at.state.position],), instruction, likelihood)
            for found, likelihood in likelihoods
            for kind, instruction in found
        ]
    )


def _legal(at: StepContext, kinds: Collection[Kind], *, new: bool, editable: bool) -> Legal:
    """What a token can become at the position; None when that is nothing, or nothing new."""
    ids, position, edits = at.current.token_ids, at.state.position, at.evaluator.layout.edits
    grows = edits.length(ids) < at.settings.max_instruction_tokens

    def legal(token: int) -> tuple[tuple[Kind, Instruction], ...] | None:
        found: list[tuple[Kind, tuple[tuple[int, ...], str] | None]] = []
        if at.state.appends() and grows:
            found.append(("insert", edits.append(ids, token)))
        if editable and "replace" in kinds:
            found.append(("replace", edits.replace(ids, position, token)))
        if editable and grows and "insert" in kinds:
            found.append(("insert", edits.insert(ids, position, token)))
        kept: list[tuple[Kind, Instruction]] = [
            (kind, Instruction(*edited)) for kind, edited in found if edited is not None
        ]
        return tuple(pair for pair in kept if not (new and at.evaluator.knows(pair[1].text))) or None

    return legal


def _deletion(at: StepContext) -> list[Edit]:
    ids, position = at.current.token_ids, at.state.position
    if len(ids) < 2 or position not in at.evaluator.layout.edits.positions(ids):
        return []
    shorter = at.evaluator.layout.edits.delete(ids, position)
    if shorter is None or at.evaluator.knows(shorter[1]):
        return []
    return [Edit("delete", (ids[position],), Instruction(*shorter), math.nan)]


def _distinct(edits: list[Edit]) -> tuple[Edit, ...]:
    """Two tokens can be deployed as one text: the likelier counts."""
    first = {edit.instruction.text: edit for edit in reversed(edits)}
    return tuple(edit for edit in edits if first[edit.instruction.text] is edit)
