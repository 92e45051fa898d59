"""Whether the rows fit into the model's context: their prompts, and behind these their gold values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy_greater.errors import ContextLengthError
from dspy_greater.model.engine import Engine
from dspy_greater.notices import warn_caller
from dspy_greater.program.dataset import name_rows
from dspy_greater.program.inputs import shortened
from dspy_greater.program.predictors import Predictor
from dspy_greater.prompt.layout import Layout

_REMEDY = "Leave out or shorten such rows, use fewer demos, or use a model with a longer context."


@dataclass(frozen=True)
class Case:
    """What a predictor is given on a row, and the answers that it may find; `number` is the row's in the trainset."""

    number: int
    inputs: Mapping[str, Any]
    answers: tuple[object, ...]


def refuse_long_prompts(
    engine: Engine, layout: Layout, predictor: Predictor, inputs_list: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a row whose prompt fills the context, naming the longest.

    Raises:
        ContextLengthError: there is one.
    """
    limit = engine.context_length
    if limit is None or not inputs_list:
        return
    index, tokens = layout.longest(inputs_list, predictor.instruction)
    if tokens >= limit:
        raise ContextLengthError(
            f"The prompt of predictor `{predictor.name}` takes {tokens} tokens for the row "
            f"{shortened(inputs_list[index])}, and {engine.name} has a context of {limit} tokens, which leaves no room "
            f"for an answer. {_REMEDY}"
        )


def refuse_long_answers(
    engine: Engine, layout: Layout, predictor: Predictor, field: str, cases: Sequence[Case]
) -> None:
    """Refuse rows that leave no room for the gold value even if nothing is reasoned; where it is some, warn of them.

    Raises:
        ContextLengthError: it is all of them; names the longest.
    """
    limit = engine.context_length
    if limit is None or not cases:
        return
    earlier = predictor.output_fields[: predictor.output_fields.index(field)]
    unreasoned = dict.fromkeys(earlier, "")

    def length(case: Case) -> int:  # of acceptable answers the shortest has to fit
        laid_out = (
            layout.supervised(predictor.instruction, case.inputs, unreasoned, field, answer) for answer in case.answers
        )
        return min((len(sequence.token_ids) for sequence in laid_out), default=0)

    lengths = list(map(length, cases))
    long = [index for index, tokens in enumerate(lengths) if tokens > limit]
    if not long:
        return
    longest = max(long, key=lengths.__getitem__)
    told = (
        f"The prompt of predictor `{predictor.name}` and the gold value of `{field}` behind it take {lengths[longest]} "
        f"tokens for row {cases[longest].number} of the trainset, {shortened(dict(cases[longest].inputs))}, and "
        f"{engine.name} has a context of {limit} tokens"
    )
    if len(long) == len(cases):
        raise ContextLengthError(f"{told}. No training row leaves room for its answer. {_REMEDY}")
    rows = name_rows([cases[index].number for index in long])
    warn_caller(
        f"{told}. Nothing can be learned from the gold values of {len(long)} of {len(cases)} training rows that leave "
        f"no room for an answer: {rows[0].lower()}{rows[1:]}. {_REMEDY}",
        RuntimeWarning,
    )
