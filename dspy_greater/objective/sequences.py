"""A run on a row -> what is remembered of it, and remembered runs -> token sequences under any instruction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dspy_greater.errors import DataError
from dspy_greater.objective.replay import ReasonedSequence
from dspy_greater.objective.types import CallOutcome, RowOutcome
from dspy_greater.program.called import own_demos, token_limit
from dspy_greater.program.predictors import Predictor
from dspy_greater.program.rollout import Rollout, plain
from dspy_greater.program.traced_run import calls_of
from dspy_greater.program.tracing import Answer, PredictorCall
from dspy_greater.prompt.gold import labels_as_text, row_gold
from dspy_greater.prompt.layout import Layout
from dspy_greater.prompt.spans import Span, Supervised

_MOST_CUTS = 8  # attempts to make a row fit the context by shortening its reasoning
_MARK = "\ue000value\ue000"


class Examples:
    """The training rows as one predictor sees them.

    Args:
        layout: of the predictor's prompt.
        predictor: as it was found in the program.
        field: its output field with gold values; None where there is none.
        rows: the training rows; with `field`, each has gold for it.
        context_length: the most tokens of a sequence, None for no limit.
        header_counts: where the adapter found no answer, the model is asked for the field's header as well as for
            the gold value.
    """

    def __init__(
        self,
        layout: Layout,
        predictor: Predictor,
        field: str | None,
        rows: Sequence[Any],
        context_length: int | None,
        *,
        header_counts: bool = False,
    ) -> None:
        self._layout, self._predictor, self._field = layout, predictor, field
        self._golds = [_acceptable(predictor, field, row, example) for row, example in enumerate(rows)] if field else []
        self._rows, self._limit, self._header_counts = rows, context_length, header_counts
        self._openings = openings(predictor)
        self._headers = headers(predictor, field) if field else ()
        self._tails: dict[str, int] = {}  # inputs of a call -> tokens of its prompt behind the instruction

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self, row: RowOutcome, *, others: bool) -> dict[str, str]:
        """What the row's example says is right, in words, by name: of the predictor's own output fields.

        With `others`, every label where it has none of these: a metric may read it.
        """
        fields: Any = self._predictor.signature.output_fields
        found = self._rows[row.row].labels().toDict()
        own = {name: value for name, value in found.items() if name in fields}
        shown = own or (found if others else {})
        return labels_as_text(shown, {name: info.annotation for name, info in fields.items()})

    def golds(self) -> list[Any]:
        """The gold value of each row, the first of those that are acceptable; none without a field that has them."""
        return [acceptable[0] for acceptable in self._golds]

    def outcome(self, index: int, rollout: Rollout) -> RowOutcome:
        """What is kept of a run on row `index`; its loss is not taken yet."""
        call = rollout.calls.get(self._predictor.name)
        if call is None:
            why = rollout.error or f"predictor `{self._predictor.name}` was not called"
            return RowOutcome(index, rollout.score, {}, {}, math.nan, why)
        names = self._predictor.output_fields
        earlier = names[: names.index(self._field)] if self._field else ()
        written = {name: plain(call.outputs.get(name, "")) for name in earlier}
        preamble, body = split_completion(self._openings, call.completion or "")
        tags = self._layout.thought_tags if call.thoughts else None
        if call.thoughts and tags is not None:  # where the model wrote what a server returns apart
            preamble, body = tags.block(call.thoughts) + preamble.lstrip("\n"), body.lstrip("\n")
        reasoning, header, _ = partition(body, self._headers)
        failed = call.error is not None and call.completion is not None
        unparsed = failed and self._field is not None and self._field not in call.outputs and not header
        if call.error is not None and earlier and not any(written.values()):
            written[earlier[0]] = (
                reasoning.rstrip() if header else body
            )  # what did not parse is still what the model reasoned
        inputs = {name: plain(value) for name, value in call.inputs.items()}
        calls = () if self._field else calls_of(rollout.trace, self._predictor.name)
        told = tuple(self._told(traced, answer) for traced in calls for answer in traced.samples)
        demos = own_demos(self._predictor, call) if self._field else None
        return RowOutcome(
            index, rollout.score, inputs, written, math.nan, rollout.error, preamble, told, unparsed, demos
        )

    def _told(self, call: PredictorCall, answer: Answer) -> CallOutcome:
        text, tags = answer.text or "", self._layout.thought_tags if answer.thoughts else None
        if answer.thoughts and tags is not None:
            text = tags.joined(answer.thoughts, answer.text)
        return CallOutcome(
            {name: plain(value) for name, value in call.inputs.items()},
            text,
            own_demos(self._predictor, call),
            0 if answer.text is None else token_limit(call),
        )

    def supervised(
        self, instruction: str, row: RowOutcome, *, reasoned: bool = True, cut: bool = True
    ) -> Supervised | None:
        """The row's tokens up to the gold value that counts (`row.answer`), the reasoning cut to what fits the context.

        None when the predictor was not called on it, has no gold value, or nothing can make it fit. Without
        `reasoned` the reasoning is left empty, without `cut` it is all there, whether or not it fits.
        """
        if not row.inputs or self._field is None:
            return None
        gold, from_header = self._golds[row.row][row.answer], self._header_counts and row.unparsed
        written, preamble, layout = dict(row.written), row.preamble, self._layout.with_demos(row.demos)
        if not reasoned:
            written, preamble = dict.fromkeys(written, ""), ""
        for _ in range(_MOST_CUTS):
            found = layout.supervised(
                instruction, row.inputs, written, self._field, gold, preamble=preamble, from_header=from_header
            )
            surplus = len(found.token_ids) - self._limit if cut and self._limit is not None else 0
            if surplus <= 0:
                return found
            texts = {name: text for name, text in written.items() if isinstance(text, str)}
            longest = max(texts, key=lambda name: len(texts[name]), default=None)
            kept = 1 - min(1.0, (surplus + 8) / max(1, len(found.reasoning)))
            preamble = preamble[: int(kept * len(preamble))]
            if longest is not None:
                written[longest] = texts[longest][: int(kept * len(texts[longest]))]
        return None

    def sequences(self, instruction: str, row: RowOutcome, *, cut: bool = True) -> tuple[ReasonedSequence, ...]:
        """What the predictor wrote on the row, as tokens: with a gold value the reasoning before it and the value.

        With `cut` all of them fit the context: a reasoning is shortened, a call without gold value left out.
        """
        if self._field is not None:
            found = self.supervised(instruction, row, cut=cut)
            if found is None:
                return ()
            return (ReasonedSequence(found.token_ids, found.instruction, found.reasoning, found.answer),)
        laid_out = [
            self._layout.with_demos(call.demos).written(instruction, call.inputs, call.completion, limit=call.limit)
            for call in row.calls
        ]
        limit = self._limit if cut and self._limit is not None else math.inf
        return tuple(
            ReasonedSequence(sequence.token_ids, sequence.instruction, sequence.completion)
            for sequence in laid_out
            if len(sequence.token_ids) <= limit
        )

    def alternatives(self, instruction: str, row: RowOutcome) -> list[Supervised | None]:
        """As `fluency_sequence`, for each of the row's acceptable answers; without a gold value there is one."""
        count = len(self._golds[row.row]) if self._field is not None else 1
        return [self.fluency_sequence(instruction, replace(row, answer=answer)) for answer in range(count)]

    def prompt_length(self, sequence: ReasonedSequence, instruction: str, row: RowOutcome) -> int:
        """How many tokens of a sequence of the row are its prompt; the rest the predictor wrote, or the gold value."""
        if self._field is None:
            return sequence.generated.start
        inputs = repr((row.inputs, row.demos))
        if inputs not in self._tails:
            prompt = self._layout.with_demos(row.demos).prompt(instruction, row.inputs)
            self._tails[inputs] = len(prompt.token_ids) - prompt.instruction.stop
        return sequence.instruction.stop + self._tails[inputs]

    def fluency_sequence(self, instruction: str, row: RowOutcome) -> Supervised | None:
        """A sequence to read the instruction's likelihood from, and the gold answer's where there is one."""
        if self._field is not None:
            return self.supervised(instruction, row)
        for sequence in self.sequences(instruction, row)[:1]:
            begins, ends = sequence.generated.start, sequence.generated.stop
            # The loss of these tokens does not count; where nothing was written, the prompt's last one stands there.
            read = Span(min(begins, ends - 1), ends)
            return Supervised(sequence.token_ids, sequence.instruction, Span(read.start, read.start), read)
        return None


def written_key(row: RowOutcome) -> str:
    """Two runs on a row with the same key were given and wrote the same, and the same answer counts."""
    calls = [(_given(call), call.completion) for call in row.calls]
    return repr((_given(row), row.written, row.preamble, calls, row.unparsed, row.answer))


def _given(asked: RowOutcome | CallOutcome) -> object:
    return asked.inputs if asked.demos is None else (asked.inputs, asked.demos)


def openings(predictor: Predictor) -> tuple[str, ...]:
    """How the header of a predictor's first field begins, as its adapter writes it."""
    header = _header(predictor, 0)
    # Models space JSON in their own way. A part of any other header may stand anywhere in a text.
    return tuple(filter(None, dict.fromkeys([header, *(["{"] if header.startswith("{") else [])])))


def headers(predictor: Predictor, field: str) -> tuple[str, ...]:
    """How the header of an output field ends, as the predictor's adapter writes it."""
    line = _header(predictor, predictor.output_fields.index(field)).rpartition("\n")[2].strip()
    return tuple(filter(None, dict.fromkeys([line, line.partition(":")[0]])))  # JSON, as above


def split_completion(openings: Sequence[str], completion: str) -> tuple[str, str]:
    """What a model wrote before the header of its first field (a native <think> block), and what after it.

    A completion without that header is all body.
    """
    before, found, after = partition(completion, openings)
    return (before, after.lstrip("\n")) if found else ("", completion)


def partition(text: str, separators: Sequence[str]) -> tuple[str, str, str]:
    """`str.partition` at the first of the separators that occurs.

    >>> partition("I look. <answer>yes", ["[[ ## answer ## ]]", "<answer>"]), partition("I look.", ["<answer>"])
    (('I look. ', '<answer>', 'yes'), ('I look.', '', ''))
    """
    found = next((separator for separator in separators if separator in text), None)
    return text.partition(found) if found else (text, "", "")


def _acceptable(predictor: Predictor, field: str, row: int, example: Any) -> tuple[object, ...]:
    gold = row_gold(predictor.signature, field, example)
    if gold.missing:
        raise DataError(
            f"Row {row} has no gold value for `{field}` of predictor `{predictor.name}`. "
            "Fill it in, or leave the row out."
        )
    return gold.answers


def _header(predictor: Predictor, place: int) -> str:
    """What the adapter writes before the value of an output field and after the value before that."""
    values = dict.fromkeys(predictor.output_fields, _MARK)
    written = predictor.adapter.format_assistant_message_content(predictor.signature, values)
    return str(written).split(_MARK)[place].strip()
