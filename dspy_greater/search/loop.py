"""Algorithm 1 of arXiv 2412.09722: propose -> reason -> gradient over reasoning -> select, one position at a time.

`minimise` is the loop, `take_step` its body. Each stage is a module: `propose`, `objective`
(reasoning and exact losses), `gradient`, `select`, and `search` for what comes next. The default variant has
the same loop and a step of its own, `whole_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dspy_greater.errors import LossError
from dspy_greater.estimators.paper_gradient import TokenGradient, paper_gradient
from dspy_greater.model.interface import Model
from dspy_greater.objective.evaluator import Instruction, Objective
from dspy_greater.run.events import Candidate, Evaluation, StepTaken
from dspy_greater.search.default_step import take_whole_step
from dspy_greater.search.proposals import propose
from dspy_greater.search.select import realised_change, select
from dspy_greater.search.state import SearchState, advance, begin, restarted, step_random
from dspy_greater.settings import Settings

Proposed = dict[Instruction, float]  # candidate -> mean log-probability of its token, likeliest first


def minimise(
    objective: Objective,
    seed: Evaluation,
    settings: Settings,
    *,
    predictor: str,
    random_seed: int,
    recorded: Iterable[StepTaken] = (),
    generated_tokens: int = 0,
) -> Iterator[tuple[SearchState, StepTaken, bool]]:
    """Algorithm 1: T steps from the seed instruction, each yielded with the state after it.

    Fewer where `max_generated_tokens` is reached.

    Args:
        objective: the task loss of the predictor's instruction.
        seed: p_init, evaluated.
        settings: T, k, q, λ, μ and the rest.
        predictor: the predictor's name, for events and the randomness of the steps.
        random_seed: decides which rows propose at each step.
        recorded: steps of an interrupted run; they are replayed instead of taken.
        generated_tokens: what the budget has spent before, on the seed too.

    Yields:
        The state, the step that led to it, and whether the step was taken now (not replayed).

    Raises:
        LossError: several steps in a row had no candidate with a finite loss.
    """
    positions = objective.layout.positions
    state = begin(
        seed,
        settings,
        editable=positions(seed.token_ids),
        generated_tokens=generated_tokens,
        fixed=objective.layout.fixed,
    )
    replay = iter(recorded)
    while not state.finished(settings):
        known = next(replay, None)
        step = known or _step(objective, state, settings, predictor=predictor, random_seed=random_seed)
        evaluated = [each.evaluation for each in step.candidates if each.evaluation is not None]
        objective.recall([*evaluated, step.chosen])
        state = advance(
            state,
            step.chosen,
            evaluated,
            settings,
            failed=_failed(step, evaluated),
            position=step.position,
            editable=positions(step.chosen.token_ids),
            generated_tokens=step.spent.get("generated_tokens", 0),
            predictions=step.predictions,
        )
        if settings.variant == "whole":
            state = restarted(state, settings, positions)
        _give_up_if_failing(state, settings, predictor)
        yield state, step, known is None


def _step(
    objective: Objective, state: SearchState, settings: Settings, *, predictor: str, random_seed: int
) -> StepTaken:
    """One step of the variant; what its prompts begin with is read once, and candidates are drafted."""
    take = take_whole_step if settings.variant == "whole" else take_step
    with objective.engine.session(objective.drafts(state.current)) as model:
        return take(objective, model, state, settings, predictor=predictor, random_seed=random_seed)


def take_step(
    objective: Objective, model: Model, state: SearchState, settings: Settings, *, predictor: str, random_seed: int
) -> StepTaken:
    """Lines 7 to 18 for the state's position."""
    position = state.position
    before = objective.spent()

    proposed = _propose(objective, model, state, settings, random_seed=random_seed, predictor=predictor)
    current = _with_placeholder(objective, model, state, proposed)  # p, one token longer if the sentence goes on
    stands = current.token_ids[position] if position < len(current.token_ids) else -1  # p_i
    edits = {each.token_ids[position]: each for each in proposed if each.text != current.instruction}
    if settings.ranking == "random":
        gradient, selected = None, _at_random([stands, *edits], settings, random_seed, predictor, state)
    else:
        gradient = _differentiate(objective, model, current, position, list(edits), settings)
        selected = gradient.most_negative(settings.most_tried) if gradient else ()
    stays = stands in selected  # if not, the best of the others follows
    evaluated = objective.evaluate([edits[token] for token in selected if token in edits], model)
    selection = select(current, evaluated, stays=stays)

    return StepTaken(
        predictor=predictor,
        step=state.step,
        position=position,
        current_token=stands,
        candidates=_told(model.tokenizer, position, proposed, gradient, current, evaluated),
        chosen=selection.chosen,
        reason=selection.reason,
        spent=objective.spent(before),
    )


def _propose(
    objective: Objective, model: Model, state: SearchState, settings: Settings, *, random_seed: int, predictor: str
) -> Proposed:
    """Equations 3 and 4: legal instructions with another token at the position, or one more at the end."""
    ids, position, layout = state.current.token_ids, state.position, objective.layout
    appends = state.appends()
    contexts = objective.proposal_contexts(state.current, position)
    if not contexts or not (appends or position in layout.positions(ids)):
        return {}

    def canonical(token: int) -> Instruction | None:
        found = layout.append(ids, token) if appends else layout.replace(ids, position, token)
        return Instruction(*found) if found else None

    proposal = propose(
        model,
        contexts,
        top_k=settings.top_k,
        sample_size=settings.proposal_rows,
        draws=settings.proposal_draws,
        minimum=settings.minimum_candidates,
        generator=step_random(random_seed, predictor, state.step),
        canonical=canonical,
    )
    likeliest_last = zip(reversed(proposal.canonical), reversed(proposal.mean_log_probabilities), strict=True)
    distinct = dict(likeliest_last)  # two tokens can be deployed as one: the likelier counts
    return dict(sorted(distinct.items(), key=lambda pair: -pair[1]))


def _with_placeholder(objective: Objective, model: Model, state: SearchState, proposed: Proposed) -> Evaluation:
    """The current instruction; where the step appends, with the likeliest token as the one to improve on."""
    if not state.appends() or not proposed:
        return state.current
    (longer,) = objective.evaluate([next(iter(proposed))], model)
    return longer


def _differentiate(
    objective: Objective, model: Model, current: Evaluation, position: int, candidates: list[int], settings: Settings
) -> TokenGradient | None:
    """Equations 5 to 7 on the rows' own reasoning; None when there is nothing to differentiate."""
    supervised = objective.supervised(current, reasoned=settings.ranking != "answer")
    if not candidates or not supervised:
        return None
    return paper_gradient(
        model,
        supervised,
        position=position,
        candidates=candidates,
        answer_temperature=settings.answer_temperature,
        fluency_weight=settings.fluency_weight,
    )


def _at_random(
    tokens: list[int], settings: Settings, random_seed: int, predictor: str, state: SearchState
) -> list[int]:
    return step_random(random_seed, predictor, state.step).sample(tokens, min(settings.most_tried, len(tokens)))


def _told(
    tokenizer: Any,
    position: int,
    proposed: Proposed,
    gradient: TokenGradient | None,
    current: Evaluation,
    evaluated: list[Evaluation],
) -> tuple[Candidate, ...]:
    """What became of each candidate, for the record."""
    slopes = dict(zip(gradient.candidates, gradient.predicted_change, strict=True)) if gradient else {}
    outcomes = {each.instruction: each for each in [current, *evaluated]}

    def tell(candidate: Instruction, log_probability: float) -> Candidate:
        token = candidate.token_ids[position]
        text: Callable[..., str] = tokenizer.decode
        outcome = outcomes.get(candidate.text)
        told = None if outcome is None or outcome is current else realised_change(current, outcome)
        return Candidate(token, text([token]), log_probability, slopes.get(token), outcome, realised=told)

    return tuple(tell(candidate, log_probability) for candidate, log_probability in proposed.items())


def _failed(step: StepTaken, evaluated: list[Evaluation]) -> bool:
    """Whether a step that had candidates found no finite loss; one that kept p_i untried has none to show."""
    if not step.candidates:
        return False
    if evaluated:
        return all(math.isinf(each.objective[0]) for each in evaluated)
    slopes = [each.gradient for each in step.candidates if each.gradient is not None]
    return math.isinf(step.chosen.objective[0]) or (bool(slopes) and not any(map(math.isfinite, slopes)))


def _give_up_if_failing(state: SearchState, settings: Settings, predictor: str) -> None:
    if state.failed_steps >= settings.max_failed_steps:
        raise LossError(
            f"Predictor `{predictor}`: no candidate had a finite loss in {state.failed_steps} steps in a row. Check "
            "that program(**trainset[0].inputs()) answers, load the model in a wider dtype "
            "(local_lm(..., dtype='float32')), and check its weights."
        )
