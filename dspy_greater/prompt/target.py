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

    >>> import dspy
    >>> signature = dspy.Signature("question -> reasoning, answer")
    >>> found = assistant_text(dspy.ChatAdapter(), signature, {"reasoning": "Two and two."}, "answer", "4")
    >>> found.text[found.gold :], found.text[: found.header]
    ('4', '[[ ## reasoning ## ]]\\nTwo and two.')
    """
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
    if extractor is None:
        return AssistantText(body[:stop], header, start)
    text = body[:header] + extractor
    return AssistantText(text + body[start:stop], header, len(text))


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
