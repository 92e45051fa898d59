"""Events of every shape, for property tests, and when two of them are the same in every bit."""

from __future__ import annotations

import math
import struct
from dataclasses import fields, is_dataclass
from typing import Any

from hypothesis import strategies as st

from dspy_greater.objective.types import CallOutcome, Candidate, Evaluation, RowOutcome
from dspy_greater.run.events import (
    BeamStarted,
    BeamValidated,
    ChangedRow,
    IterationTaken,
    MemberEdited,
    NotCalled,
    Output,
    PromptsScored,
    SearchStarted,
    StepTaken,
    TextGradient,
    Validated,
    Warned,
)

FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, -2.225073858507201e-308, 1.7976931348623157e308, 0.1, 1e22)
TEXTS = ("", "\x00", "\ud800", "\udfff\ud83d", "👩‍🔬", "\n\u2028\x85", "NaN", '{"$float":"nan"}')
MARKS = ("type", "$float", "$list", "$pairs", "$tuple", "$")

numbers = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True) | st.sampled_from(FLOATS)
texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(TEXTS)  # lone surrogates too
names = texts | st.sampled_from(MARKS)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(st.integers() | st.tuples(texts), inner, max_size=2)
    ),
    max_leaves=6,
)
demos = st.none() | st.lists(st.dictionaries(names, plain, max_size=2), max_size=2).map(tuple)
calls = st.builds(
    CallOutcome,
    inputs=st.dictionaries(names, plain, max_size=2),
    completion=texts,
    demos=demos,
    limit=st.none() | st.integers(0, 99),
)
outcomes = st.builds(
    RowOutcome,
    row=st.integers(0, 99),
    score=numbers,
    inputs=st.dictionaries(names, plain, max_size=2),
    written=st.dictionaries(names, texts, max_size=2),
    cross_entropy=numbers,
    error=st.none() | texts,
    preamble=texts,
    calls=st.lists(calls, max_size=2).map(tuple),
    unparsed=st.booleans(),
    demos=demos,
    answer=st.integers(0, 9),
)
evaluations = st.builds(
    Evaluation,
    token_ids=st.lists(st.integers(0, 200_000), max_size=4).map(tuple),
    instruction=texts,
    rows=st.lists(outcomes, max_size=2).map(tuple),
    score=numbers,
    cross_entropy=numbers,
    fluency_nll=numbers,
    objective=st.tuples(numbers, numbers),
)
candidates = st.builds(
    Candidate,
    token=st.integers(),
    text=texts,
    log_probability=numbers,
    gradient=st.none() | numbers,
    evaluation=st.none() | evaluations,
    edit=st.sampled_from(["replace", "insert", "delete"]),
    forecast=st.none() | numbers,
    effective_samples=st.none() | numbers,
    realised=st.none() | st.tuples(numbers, numbers),
)
costs = st.dictionaries(names, st.integers(), max_size=2)
prompts = st.dictionaries(names, texts, max_size=2)
said = st.lists(st.tuples(texts, texts), max_size=2).map(tuple)
changed = st.builds(
    ChangedRow,
    row=st.integers(0, 99),
    inputs=prompts,
    expected=prompts,
    before=said,
    after=said,
    errors=st.tuples(st.none() | texts, st.none() | texts),
)
outputs = st.builds(
    Output,
    row=st.integers(0, 99),
    inputs=texts,
    expected=texts,
    written=texts,
    trace=texts,
    metric=st.none() | numbers,
    judged=st.none() | numbers,
    evaluation=texts,
    feedback=st.none() | texts,
    error=st.none() | texts,
)
gradients = st.builds(TextGradient, row=st.integers(0, 99), concerns=st.lists(texts, max_size=2).map(tuple), text=texts)
members = st.builds(
    MemberEdited,
    prompts=prompts,
    outputs=st.lists(outputs, max_size=1).map(tuple),
    gradients=st.lists(gradients, max_size=1).map(tuple),
    summaries=prompts,
    candidates=st.lists(prompts, max_size=1).map(tuple),
)
compared = st.builds(
    PromptsScored,
    prompts=prompts,
    outputs=st.lists(outputs, max_size=1).map(tuple),
    score=st.lists(numbers, max_size=2).map(tuple),
)
rows = st.lists(st.integers(0, 99), max_size=2).map(tuple)
beams = st.lists(prompts, max_size=2).map(tuple)
events = st.one_of(
    st.builds(
        SearchStarted,
        predictor=texts,
        seed=evaluations,
        steps=st.integers(),
        spent=costs,
        called_as=st.text(),
    ),
    st.builds(
        StepTaken,
        predictor=texts,
        step=st.integers(),
        position=st.integers(),
        current_token=st.integers(),
        candidates=st.lists(candidates, max_size=2).map(tuple),
        chosen=evaluations,
        reason=texts,
        spent=costs,
        current_text=texts,
    ),
    st.builds(
        Validated,
        predictor=texts,
        scores=st.dictionaries(names, numbers, max_size=2),
        winner=texts,
        spent=costs,
        subscores=st.dictionaries(names, st.lists(numbers, max_size=2).map(tuple), max_size=2),
        changed=st.lists(changed, max_size=2).map(tuple),
    ),
    st.builds(NotCalled, predictors=st.lists(texts, max_size=3).map(tuple)),
    st.builds(Warned, message=texts),
    st.builds(BeamStarted, prompts=prompts, iterations=st.integers()),
    st.builds(
        IterationTaken,
        iteration=st.integers(),
        sample=rows,
        subset=rows,
        members=st.lists(members, max_size=1).map(tuple),
        compared=st.lists(compared, max_size=1).map(tuple),
        beam=beams,
        spent=st.dictionaries(names, costs, max_size=2),
    ),
    st.builds(
        BeamValidated,
        finalists=beams,
        scores=st.lists(st.lists(numbers, max_size=2).map(tuple), max_size=2).map(tuple),
        winner=st.integers(),
    ),
)


def bits(value: Any) -> Any:
    """A value in which two floats are equal only if they are the same float, NaN too; without what is not compared."""
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else struct.pack("<d", value))
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), [bits(getattr(value, field.name)) for field in fields(value) if field.compare])
    if isinstance(value, dict):
        return ("dict", [(bits(key), bits(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [bits(entry) for entry in value])
    return (type(value), value)
