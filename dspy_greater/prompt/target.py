"""The assistant's half of a supervised prompt: where its reasoning ends and where the gold value lies.

The header of the supervised field is the adapter's own, so it is found by looking at what the adapter
writes: two renderings that differ in one value only differ where that value is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy.adapters.utils import serialize_for_json

from dspy_greater.errors import DataError, LayoutError
from dspy_greater.prompt.gold import gold_of


@dataclass(frozen=True)
class AssistantText:
    """`text[:header]` is reasoning, `text[header:gold]` the answer's header, `text[gold:]` the gold value."""

    text: str
    header: int
    gold: int


class AssistantTexts:
    """`assistant_text` for the rows of one predictor, from one rendering a row instead of five.

    What an adapter writes between and after values is learnt from the first row whose values it writes as they
    are. A later row is taken apart by it only where its rendering ends in exactly those texts and its own
    values; any other goes through `assistant_text`.

    >>> import dspy
    >>> texts = AssistantTexts(dspy.ChatAdapter(), dspy.Signature("question -> reasoning, answer"))
    >>> found = texts.text({"reasoning": "Two and two."}, "answer", "4")
    >>> found.text[found.gold :], found.text[: found.header]
    ('4', '[[ ## reasoning ## ]]\\nTwo and two.')
    """

    def __init__(self, adapter: Any, signature: Any, extractor: str | None = None) -> None:
        self._adapter, self._signature, self._extractor = adapter, signature, extractor
        self._names = list(signature.output_fields)
        self._around: dict[str, _Around] = {}

    def text(self, written: Mapping[str, object], field: str, gold: object) -> AssistantText:
        """As `assistant_text`, which raises the same."""
        around = self._around.get(field)
        values = {name: written[name] for name in around.earlier if name in written} if around else {}
        if around and gold and type(gold) is str and len(values) == len(around.earlier):
            body = self._adapter.format_assistant_message_content(around.signature, {**values, field: gold})
            found = around.taken_apart(body, values, gold)
            if found is not None:
                return found.with_extractor(self._extractor)
        located = _located(self._adapter, self._signature, written, field, gold)
        if around is None:
            self._learn(located, written, field, gold)
        return located.with_extractor(self._extractor)

    def _learn(self, located: _Located, written: Mapping[str, object], field: str, gold: object) -> None:
        earlier = tuple(self._names[: self._names.index(field)])
        texts = [gold, *(written[name] for name in earlier[-1:])]
        if self._signature.output_fields[field].annotation is not str or any(type(each) is not str for each in texts):
            return  # lists and numbers are surrounded by other characters than texts, in JSON for one
        between, after = located.body[located.header : located.start], located.body[located.stop :]
        self._around[field] = _Around(_up_to(self._signature, field), earlier, between, after)


@dataclass(frozen=True)
class _Around:
    """What is written around a supervised value, whatever the row."""

    signature: Any
    earlier: tuple[str, ...]
    between: str  # from the end of the value before to the supervised one
    after: str

    def taken_apart(self, body: str, values: Mapping[str, object], gold: str) -> _Located | None:
        """Where things lie, if the body ends in the last value before, the supervised one, and nothing else."""
        start = len(body) - len(gold) - len(self.after)
        header = start - len(self.between) if self.earlier else 0
        previous = values[self.earlier[-1]] if self.earlier else ""
        if type(previous) is not str or not body.endswith(f"{previous}{self.between}{gold}{self.after}"):
            return None
        if not self.earlier and start != len(self.between):
            return None
        return _Located(body, header, start, start + len(gold))


@dataclass(frozen=True)
class _Located:
    """An assistant's message: reasoning up to `header`, the supervised value in `[start, stop)`."""

    body: str
    header: int
    start: int
    stop: int

    def with_extractor(self, extractor: str | None) -> AssistantText:
        """The text up to the end of the value, with another text before it if one is given."""
        if extractor is None:
            return AssistantText(self.body[: self.stop], self.header, self.start)
        text = self.body[: self.header] + extractor
        return AssistantText(text + self.body[self.start : self.stop], self.header, len(text))


def assistant_text(
    adapter: Any,
    signature: Any,
    written: Mapping[str, object],
    field: str,
    gold: object,
    extractor: str | None = None,
) -> AssistantText:
    """Render the assistant's message up to the end of the gold value of `field`.

    `written` holds the output fields before `field`; later fields are left out. With `extractor`, that
    text stands between the reasoning and the gold value instead of the adapter's header.

    Raises `LayoutError` when the field or an earlier value is missing, or the gold value cannot be
    located, and `DataError` when the gold value is missing, does not fit the field's type, or is several answers.
    """
    return _located(adapter, signature, written, field, gold).with_extractor(extractor)


def _located(adapter: Any, signature: Any, written: Mapping[str, object], field: str, gold: object) -> _Located:
    names = list(signature.output_fields)
    if field not in names:
        raise LayoutError(f"`{field}` is not an output field of the signature; it has {', '.join(names)}.")
    earlier = names[: names.index(field)]
    missing = [name for name in earlier if name not in written]
    if missing:
        raise LayoutError(
            f"Output field `{missing[0]}` comes before `{field}` and has no value. "
            "Pass what the model wrote for it in `written`."
        )
    signature = _up_to(signature, field)
    values = {name: written[name] for name in earlier}
    values[field] = gold = _one_answer(signature, field, gold)

    def render(changes: Mapping[str, object]) -> str:
        return adapter.format_assistant_message_content(signature, {**values, **changes})

    body = render({})
    others = [body, *_render_stand_ins(render, field, gold, adapter)]  # an empty list in XML has no tag that closes
    start = len(os.path.commonprefix(others))
    stop = len(body) - len(_common_suffix(others))
    header = _header_start(render, earlier, values, body, adapter) if earlier else 0
    if not header <= start < stop:
        raise LayoutError(
            f"Could not find the gold value {gold!r} of `{field}` in what {type(adapter).__name__} writes. "
            "Check that it is not empty, or use ChatAdapter, JSONAdapter or XMLAdapter."
        )
    return _Located(body, header, start, stop)


def _up_to(signature: Any, field: str) -> Any:
    names = list(signature.output_fields)
    for name in names[names.index(field) + 1 :]:
        signature = signature.delete(name)
    return signature


def _one_answer(signature: Any, field: str, gold: object) -> object:
    """The gold value in the type of its field, so that it is rendered as the model should write it."""
    answers = gold_of(signature.output_fields[field].annotation, gold, field).answers
    if not answers:
        raise DataError(f"The gold value of `{field}` is missing ({gold!r}). Give every row a value.")
    first, *others = answers
    if others:
        raise DataError(f"`{field}` has {len(answers)} acceptable answers. Lay out each of them by itself.")
    return first


def _stand_ins(value: object) -> tuple[object, ...]:
    """Values that an adapter surrounds by the same text as `value`, and that share no end of their own."""
    plain = serialize_for_json(value)
    if isinstance(plain, str):
        return ("Aa", "Bb")
    if isinstance(plain, (list, dict)):
        return ([1], {"a": 2}, 5)
    return (1, 52)


def _render_stand_ins(render: Any, field: str, value: object, adapter: Any) -> Sequence[str]:
    try:
        return [render({field: stand_in}) for stand_in in _stand_ins(value)]
    except (ValueError, TypeError, AttributeError) as error:
        raise LayoutError(
            f"{type(adapter).__name__} could not render other values of `{field}` to compare with: {error}. "
            "Use ChatAdapter, JSONAdapter or XMLAdapter for the search."
        ) from error


def _header_start(render: Any, earlier: Sequence[str], values: Mapping[str, object], body: str, adapter: Any) -> int:
    """The end of the last value before the supervised field."""
    previous = earlier[-1]
    others = _render_stand_ins(render, previous, values[previous], adapter)
    tail = _common_suffix(others)
    if not body.endswith(tail):
        raise LayoutError(
            f"Could not find where `{previous}` ends in what {type(adapter).__name__} writes. "
            "Use ChatAdapter, JSONAdapter or XMLAdapter for the search."
        )
    return len(body) - len(tail)


def _common_suffix(texts: Sequence[str]) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]
