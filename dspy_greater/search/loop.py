"""Algorithm 1 of arXiv 2412.09722: propose -> reason -> gradient over reasoning -> select, one position at a time.

`minimise` is the loop. A step is an object: `PaperStep` has the paper's lines 7 to 18, `DefaultStep` what users run.
`state` says which position is next.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from dspy_greater.errors import LossError, ProgramError
from dspy_greater.objective.evaluator import Evaluator
from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import StepTaken
from dspy_greater.search.state import UNUSED, SearchState, Usage, advance, begin
from dspy_greater.search.step import Search, StepContext
from dspy_greater.settings import Settings


def minimise(
    search: Search, seed: Evaluation, *, recorded: Iterable[StepTaken] = (), usage: Usage = UNUSED
) -> Iterator[tuple[SearchState, StepTaken, bool]]:
    """Algorithm 1: T steps from the seed instruction, each yielded with the state after it.

    Fewer where `max_generated_tokens`, `max_metric_calls` or `max_seconds` is reached; what is recorded is replayed
    whatever time it took.

    Args:
        search: the loss, the step and the settings.
        seed: p_init, evaluated.
        recorded: steps of an interrupted run; they are replayed instead of taken.
        usage: what was spent of the budgets before, on the seed too.

    Yields:
        The state, the step that led to it, and whether the step was taken now (not replayed).

    Raises:
        LossError: several steps in a row had no candidate with a finite loss.
        ProgramError: more than `max_errors` rows failed.
    """
    evaluator, settings = search.evaluator, search.settings
    positions, fixed = evaluator.layout.edits.positions, evaluator.layout.edits.fixed
    state = begin(seed, settings, editable=positions(seed.token_ids), usage=usage, fixed=fixed)
    replay = deque(recorded)
    known_by_text = {seed.instruction: seed}
    _refuse_many_errors(known_by_text.values(), settings, search.predictor)
    since = time.monotonic()
    while (replay and state.step < settings.steps) or not state.finished(settings):
        known = replay.popleft() if replay else None
        taken = known or _take(search, state)
        now = time.monotonic()
        if known is None:
            taken = replace(taken, began=state.current.instruction, seconds=now - since)
        since = now
        evaluated = [candidate.evaluation for candidate in taken.candidates if candidate.evaluation is not None]
        evaluator.recall([*evaluated, taken.chosen])
        known_by_text.update({evaluation.instruction: evaluation for evaluation in (*evaluated, taken.chosen)})
        failed = _failed(evaluator, taken, evaluated)
        state = advance(state, taken, evaluated, settings, positions, failed=failed)
        state = search.step.move(state, settings, positions)
        _give_up_if_failing(state, settings, search.predictor)
        yield state, taken, known is None
        _refuse_many_errors(known_by_text.values(), settings, search.predictor)


def _take(search: Search, state: SearchState) -> StepTaken:
    """One step, in a session of its own: nothing is kept between steps, so that a resumed run computes the same."""
    evaluator = search.evaluator
    with evaluator.model.session(evaluator.generated(state.current)) as model:
        at = StepContext(evaluator, model, state, search.settings, search.predictor, search.random_seed)
        return search.step.take(at)


def _failed(evaluator: Evaluator, step: StepTaken, evaluated: list[Evaluation]) -> bool:
    """Whether a step that had candidates found no finite loss; one that kept p_i untried has none to show.

    A candidate without a row to take a loss from (its prompts fill the context, say) is a bad one, and no more.
    """
    if not step.candidates:
        return False
    if evaluated:
        unmeasured = all(math.isinf(evaluation.objective[0]) for evaluation in evaluated)
        return unmeasured and any(map(evaluator.fits, evaluated))
    slopes = [candidate.gradient for candidate in step.candidates if candidate.gradient is not None]
    return math.isinf(step.chosen.objective[0]) or (bool(slopes) and not any(map(math.isfinite, slopes)))


def _give_up_if_failing(state: SearchState, settings: Settings, predictor: str) -> None:
    if state.failed_steps >= settings.max_failed_steps:
        raise LossError(
            f"Predictor `{predictor}`: no candidate had a finite loss in {state.failed_steps} steps in a row. Check "
            "that program(**trainset[0].inputs()) answers, load the model in a wider dtype "
            "(local_lm(..., dtype='float32')), and check its weights."
        )


def _refuse_many_errors(evaluations: Iterable[Evaluation], settings: Settings, predictor: str) -> None:
    failed = [row for evaluation in evaluations for row in evaluation.rows if row.error is not None]
    if settings.max_errors is not None and len(failed) > settings.max_errors:
        raise ProgramError(
            f"Predictor `{predictor}`: the program or the metric failed on {len(failed)} rows, and "
            f"max_errors={settings.max_errors}; on the last, {failed[-1].error}. Mend it, or allow more."
        )
