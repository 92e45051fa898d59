"""What the search of this package does in one step, by the functions that it calls.

The current instruction's reasoning is there from the step before, and is the draft of the candidates'; all
candidates and rows are written in one go; the gradient stops at one embedding, and logits are made where a loss
needs them.
"""

from __future__ import annotations

from benchmarks.speed.rival import enough
from benchmarks.speed.step import Clock, RowLosses, Step
from benchmarks.speed.work import Work
from dspy_greater.estimators.paper_gradient import paper_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Model
from dspy_greater.objective.loss import losses
from dspy_greater.search.proposals import ProposalSizes, propose


def step(engine: Engine, work: Work, clock: Clock) -> Step:
    """One step, our way."""
    left = zip(work.prompts(work.instruction), work.current_reasoning, strict=True)  # by the step before
    with engine.session(left) as model:
        return _step(model, work, clock)


def _step(model: Model, work: Work, clock: Clock) -> Step:
    with clock.phase("proposals"):
        proposal = propose(
            model,
            work.proposal_contexts(),
            ProposalSizes(
                top_k=work.top_k,
                sample_size=work.sample_size,
                draws=work.draws,
                minimum=work.minimum,
                max_widening=work.max_widening,
            ),
            generator=work.generator(),
            canonical=work.allows,
        )
    with clock.phase("gradient"):
        gradient = paper_gradient(
            model,
            work.supervised(work.instruction, work.current_reasoning),
            position=work.position,
            candidates=proposal.candidates,
            answer_temperature=work.answer_temperature,
            fluency_weight=work.fluency_weight,
        )
        steepest = gradient.most_negative(work.selections + 1)
        selected = enough(work, tuple(each for each in steepest if each != gradient.current)[: work.selections])
    edited, rows = [work.edited(token) for token in selected], len(work.rows)
    with clock.phase("reasoning"):
        generated = model.generate([request for text in edited for request in work.requests(text)])
        reasonings = [each.token_ids for each in generated]
        parts = [tuple(reasonings[start : start + rows]) for start in range(0, len(reasonings), rows)]
    with clock.phase("scoring"):
        found = losses(
            model,
            [each for text, part in zip(edited, parts, strict=True) for each in work.supervised(text, part)],
            answer_temperature=work.answer_temperature,
        )
    pairs = zip(gradient.per_example, gradient.per_example_current, strict=True)
    return Step(
        candidates=proposal.candidates,
        gradient=tuple(tuple(value - base for value in row) for row, base in pairs),
        selected=selected,
        current_reasoning=work.current_reasoning,
        reasoning=dict(zip(selected, parts, strict=True)),
        losses={
            token: RowLosses(found.cross_entropy[begin : begin + rows], found.fluency_nll[begin : begin + rows])
            for token, begin in zip(selected, range(0, len(reasonings), rows), strict=True)
        },
    )
