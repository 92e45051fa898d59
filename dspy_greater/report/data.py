"""What a report shows, as plain values, from a run's record: no dependence on a clock, a folder or a random choice.

So the report that a run writes and the one that is made from its journal afterwards are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.report.figures import Fidelity, PhaseCosts, Progress, cost, fidelity, progress, summed
from dspy_greater.run.events import BeamStarted, Event, IterationTaken, NotCalled, SearchStarted, StepTaken, Validated
from dspy_greater.run.record import Record
from dspy_greater.run.serialise import as_mapping, leaves
from dspy_greater.stats import interval, mean, paired_interval

Texts = tuple[tuple[str, str], ...]  # names and what stands under them


@dataclass(frozen=True)
class Averaged:
    """A mean over rows with its 95 % confidence interval, which is nan where it is not known."""

    mean: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Row:
    """A row that one instruction gets right and the other does not, with what the model wrote under each."""

    place: str  # "validation" or "training"
    number: int
    inputs: Texts
    expected: Texts  # empty for a training row, whose record does not hold it
    before: Texts
    after: Texts
    score_before: float
    score_after: float

    @property
    def fixed(self) -> bool:
        """Whether the found instruction does better on it."""
        return self.score_after > self.score_before


@dataclass(frozen=True)
class SearchShown:
    """One predictor: what changed, and how it came about."""

    name: str
    about: Texts  # what is known of the predictor
    seed: Evaluation
    found: Evaluation | None  # of the winner, or of the best so far; None where its training rows are not on record
    instruction: str  # the winner, or the best so far
    planned: int  # steps
    steps: tuple[StepTaken, ...]
    validated: Validated | None  # after the last step, that is; an earlier validation is not of what is shown
    before: Averaged  # of the metric, on the validation rows; before the validation, on the training rows
    after: Averaged
    gain: Averaged  # mean of the differences, row by row
    rows: tuple[Row, ...]  # whose score changed; validation rows come first
    progress: Progress
    fidelity: Fidelity
    spent: dict[str, dict[str, int]]  # the engines' counters, by phase

    @property
    def cost(self) -> PhaseCosts:
        """Of this predictor's search."""
        return cost(self.spent)

    @property
    def measured_on(self) -> str:
        """Which rows `before` and `after` are of."""
        return "training" if self.validated is None else "validation"


@dataclass(frozen=True)
class Loop:
    """GRAD-SUM: the student's prompts, the best so far, and the best score of each iteration."""

    before: dict[str, str]
    after: dict[str, str]
    planned: int
    scores: tuple[tuple[float, ...], ...]
    spent: dict[str, dict[str, int]]  # by module


@dataclass(frozen=True)
class Report:
    """Everything on the page, in the order of the page."""

    searches: tuple[SearchShown, ...]
    loop: Loop | None
    waiting: tuple[str, ...]  # predictors whose search has not begun
    not_called: tuple[str, ...]
    cost: PhaseCosts
    about: Texts  # of the run: metric, model
    settings: Texts
    versions: Texts
    damaged_line: int | None


def report_of(record: Record) -> Report:
    """The report of a run, as far as its record goes."""
    names = list(dict.fromkeys(event.predictor for event in record.events if isinstance(event, SearchStarted)))
    known = as_mapping(record.identity.get("predictors"))
    searches = tuple(_search(name, as_mapping(known.get(name)), record.events) for name in names)
    not_called = tuple(name for event in record.events if isinstance(event, NotCalled) for name in event.predictors)
    targets = [name for name, about in known.items() if "weights" in as_mapping(about)]
    phases = {phase: summed(search.spent[phase] for search in searches) for phase in ("seed", "search", "validation")}
    return Report(
        searches=searches,
        loop=_loop(record.events),
        waiting=tuple(name for name in targets if name not in names and name not in not_called),
        not_called=not_called,
        cost=cost(phases),
        about=_about(record.identity, known),
        settings=_flat({key: value for key, value in record.identity.items() if key != "predictors"}),
        versions=tuple(record.versions.items()),
        damaged_line=record.damaged_line,
    )


def best_of(seed: Evaluation, steps: Sequence[StepTaken]) -> Evaluation:
    """The evaluation with the lowest objective of all that were made, the first of equals."""
    return min(_evaluations(seed, steps), key=lambda evaluation: evaluation.objective)


def averaged(values: Sequence[float], known_mean: float | None = None) -> Averaged:
    """The mean of values with its interval; `known_mean` where the values themselves are not on record."""
    low, high = interval(values)
    return Averaged(mean(values) if known_mean is None else known_mean, low, high, len(values))


def _search(name: str, about: Mapping[str, Any], events: Sequence[Event]) -> SearchShown:
    mine = [event for event in events if getattr(event, "predictor", None) == name]
    started = next(event for event in mine if isinstance(event, SearchStarted))
    steps = tuple(event for event in mine if isinstance(event, StepTaken))
    latest = next((event for event in reversed(mine) if isinstance(event, (StepTaken, Validated))), None)
    validated = latest if isinstance(latest, Validated) else None  # a run that went on has to be validated again
    best = best_of(started.seed, steps)
    instruction = best.instruction if validated is None else validated.winner
    tried = _evaluations(started.seed, steps)
    found = next((evaluation for evaluation in reversed(list(tried)) if evaluation.instruction == instruction), None)
    before, after = _scores(started.seed, found, validated)
    phases = {
        "seed": started.spent,
        "search": summed(step.spent for step in steps),
        "validation": {} if validated is None else validated.spent,
    }
    return SearchShown(
        name=name,
        about=_flat({key: value for key, value in about.items() if key != "instruction"}),
        seed=started.seed,
        found=found,
        instruction=instruction,
        planned=started.steps,
        steps=steps,
        validated=validated,
        before=averaged(before, None if validated is None else validated.scores.get(started.seed.instruction)),
        after=averaged(after, None if validated is None else validated.scores.get(instruction)),
        gain=_gain(before, after),
        rows=(*_validation_rows(started.seed.instruction, validated), *_training_rows(started.seed, found)),
        progress=progress(name, started.seed, steps),
        fidelity=fidelity(name, steps),
        spent=phases,
    )


def _evaluations(seed: Evaluation, steps: Iterable[StepTaken]) -> Iterator[Evaluation]:
    yield seed
    for step in steps:
        yield from (candidate.evaluation for candidate in step.candidates if candidate.evaluation is not None)
        yield step.chosen


def _scores(
    seed: Evaluation, found: Evaluation | None, validated: Validated | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Row by row, of the seed and of the found instruction."""
    if validated is not None:
        subscores = validated.subscores
        return subscores.get(seed.instruction, ()), subscores.get(validated.winner, ())
    rows = () if found is None else found.rows
    return tuple(row.score for row in seed.rows), tuple(row.score for row in rows)


def _gain(before: Sequence[float], after: Sequence[float]) -> Averaged:
    if len(before) != len(after):
        return Averaged(math.nan, math.nan, math.nan, 0)
    low, high = paired_interval(before, after)
    return Averaged(mean([new - old for old, new in zip(before, after, strict=True)]), low, high, len(after))


def _validation_rows(seed: str, validated: Validated | None) -> Iterator[Row]:
    if validated is None:
        return
    before, after = validated.subscores.get(seed, ()), validated.subscores.get(validated.winner, ())
    for changed in validated.changed:
        if changed.row < min(len(before), len(after)):
            yield Row(
                "validation",
                changed.row,
                tuple(changed.inputs.items()),
                tuple(changed.expected.items()),
                (*changed.before, *_error(changed.errors[0])),
                (*changed.after, *_error(changed.errors[1])),
                before[changed.row],
                after[changed.row],
            )


def _training_rows(seed: Evaluation, found: Evaluation | None) -> Iterator[Row]:
    after = {row.row: row for row in (() if found is None else found.rows)}
    for row in seed.rows:
        now = after.get(row.row)
        if now is not None and (now.score > row.score or now.score < row.score):
            inputs = row.inputs or now.inputs or _inputs_of_calls(row)
            yield Row("training", row.row, _texts(inputs), (), _written(row), _written(now), row.score, now.score)


def _inputs_of_calls(row: RowOutcome) -> dict[str, object]:
    return row.calls[0].inputs if row.calls else {}


def _written(row: RowOutcome) -> Texts:
    thoughts = (("thoughts", row.preamble),) if row.preamble.strip() else ()
    calls = tuple(("", call.completion) for call in row.calls)
    unparsed = (("", "No answer was found in what the model wrote."),) if row.unparsed else ()
    return (*thoughts, *_texts(row.written), *calls, *unparsed, *_error(row.error))


def _error(error: str | None) -> Texts:
    return () if error is None else (("error", error),)


def _texts(fields: Mapping[str, object]) -> Texts:
    return tuple((str(name), str(value)) for name, value in fields.items())


def _loop(events: Sequence[Event]) -> Loop | None:
    started = next((event for event in events if isinstance(event, BeamStarted)), None)
    if started is None:
        return None
    iterations = [event for event in events if isinstance(event, IterationTaken)]
    beams = [event.beam[0] for event in iterations if event.beam]
    return Loop(
        before=started.prompts,
        after=beams[-1] if beams else started.prompts,
        planned=started.iterations,
        scores=tuple(max((scored.score for scored in event.compared), default=()) for event in iterations),
        spent=iterations[-1].spent if iterations else {},
    )


def _about(identity: Mapping[str, Any], predictors: Mapping[str, Any]) -> Texts:
    models = [as_mapping(predictor) for predictor in predictors.values()]
    weights = dict.fromkeys(str(model.get("weights") or model.get("lm")) for model in models if model)
    found = {"model": ", ".join(weights), "metric": identity.get("metric")}
    return tuple((name, str(value)) for name, value in found.items() if value)


def _flat(value: Mapping[str, Any]) -> Texts:
    """Every value inside nested mappings, under its keys; what is empty or None is left out."""
    return tuple((" · ".join(path), str(leaf)) for path, leaf in leaves(value) if leaf not in (None, "", {}))
