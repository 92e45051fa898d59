"""A search in lines of text, through `logging`: for runs that nobody watches, and for what is read afterwards."""

from __future__ import annotations

import logging

from dspy_greater.objective.types import Candidate, Evaluation
from dspy_greater.run.events import (
    BeamStarted,
    BeamValidated,
    Event,
    IterationTaken,
    NotCalled,
    SearchStarted,
    StepTaken,
    Validated,
    Warned,
)

LOGGER = logging.getLogger("dspy_greater")


class StepLog:
    """A listener that logs a line a step, at level INFO of the logger "dspy_greater"; warnings at their own.

    Nothing is seen of it unless the program configures logging. Scores are means of the metric over the training
    rows; "best" is that of the instruction with the lowest objective so far. Tokens are those that the step had
    generated.

    Example:
        >>> logging.basicConfig(level=logging.INFO)  # doctest: +SKIP
        >>> StepLog()(Warned("careful"))
    """

    def __init__(self) -> None:
        self._of = ""  # how many steps there will be
        self._best: Evaluation | None = None

    def __call__(self, event: Event) -> None:
        LOGGER.log(logging.WARNING if isinstance(event, Warned) else logging.INFO, "%s", self._line(event))

    def _line(self, event: Event) -> str:
        if isinstance(event, SearchStarted):
            self._of, self._best = f"/{event.steps}", event.seed
            return (
                f"Predictor `{event.predictor}`: {event.steps} steps from score {event.seed.score:.3g}, loss "
                f"{event.seed.cross_entropy:.3g}, {_generated(event)}: {event.seed.instruction!r}"
            )
        if isinstance(event, StepTaken):
            return (
                f"Predictor `{event.predictor}`, step {event.step + 1}{self._of}, position {event.position}: "
                f"{edit_of(event)}, score {event.chosen.score:.3g}, best {self._best_score(event):.3g}, "
                f"{_generated(event)}; {event.reason}"
            )
        if isinstance(event, Validated):
            seed = next(iter(event.scores.values()))
            return (
                f"Predictor `{event.predictor}`, validation of {len(event.scores)} instructions: score "
                f"{event.scores[event.winner]:.3g}, seed {seed:.3g}, {_generated(event)}: {event.winner!r}"
            )
        if isinstance(event, BeamStarted):
            self._of = f"/{event.iterations}"
            return f"GRAD-SUM: {event.iterations} iterations from {event.prompts!r}"
        if isinstance(event, IterationTaken):
            best = max((scored.score for scored in event.compared), default=())
            candidates = sum(len(member.candidates) for member in event.members)
            calls = sum(part.get("calls", 0) for part in event.spent.values())
            return (
                f"GRAD-SUM, iteration {event.iteration + 1}{self._of}: best score {_scores(best)}, {candidates} "
                f"candidates, {calls} LM calls up to now"
            )
        if isinstance(event, BeamValidated):
            score, seed = _scores(event.scores[event.winner]), _scores(event.scores[0])
            prompts = event.finalists[event.winner]
            return f"GRAD-SUM, validation of {len(event.finalists)} programs: score {score}, seed {seed}: {prompts!r}"
        if isinstance(event, NotCalled):
            return f"{', '.join(event.predictors)}: not called on any training row, left as it is"
        return event.message

    def _best_score(self, step: StepTaken) -> float:
        known = step.evaluated if self._best is None else (self._best, *step.evaluated)
        self._best = min(known, key=lambda evaluation: evaluation.objective)
        return self._best.score


def edit_of(step: StepTaken) -> str:
    """What a step did to the instruction: `old -> new`, one of them empty for a token more or less.

    Example:
        >>> before = Evaluation((1, 2), "Think hard", (), 0.5, 1.0, 1.0, (0.5, 1.0))
        >>> edit_of(StepTaken("predict", 0, 1, 2, (), before, "kept the token", {}, current_text=" hard"))
        "' hard' kept"
    """
    parts = edit_parts(step)
    return f"{step.current_text!r} kept" if parts is None else f"{parts[0]!r} -> {parts[1]!r}"


def edit_parts(step: StepTaken) -> tuple[str, str] | None:
    """The text that a step took out of the instruction and what it put there, either perhaps empty; None: kept.

    Example:
        >>> after = Evaluation((1, 3), "Think twice", (), 0.5, 1.0, 1.0, (0.5, 1.0))
        >>> twice = Candidate(3, " twice", -1.0, None, after)
        >>> edit_parts(StepTaken("predict", 0, 1, 2, (twice,), after, "better", {}, current_text=" hard"))
        (' hard', ' twice')
    """
    for candidate in step.candidates:
        if candidate.evaluation is not None and candidate.evaluation.instruction == step.chosen.instruction:
            if candidate.edit == "replace" and candidate.text == step.current_text:
                return None
            return candidate_edit(step, candidate)
    return None


def candidate_edit(step: StepTaken, candidate: Candidate) -> tuple[str, str]:
    """The text that a candidate would take out of the instruction, and what it would put there."""
    old = "" if candidate.edit == "insert" else step.current_text
    if candidate.origin == "phrase" and old:  # the event names the first of the tokens that it replaces
        old += " ..."
    return old, "" if candidate.edit == "delete" else candidate.text


def _generated(event: SearchStarted | StepTaken | Validated) -> str:
    return f"{event.spent.get('generated_tokens', 0)} tokens generated"


def _scores(score: tuple[float, ...]) -> str:
    """The metric's, and the judge's where there is one."""
    return " and ".join(f"{part:.3g}" for part in score)
