"""The text around a predictor's instruction, as its adapter and the model's chat template write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json

from dspy_greater.errors import LayoutError
from dspy_greater.prompt.encoder import EncodedText, PromptEncoder, RenderedText
from dspy_greater.prompt.spans import Span, covering

_CACHE_ENTRIES = 4096
_NOTHING = RenderedText("")
# Everything an adapter or a chat template might escape, collapse or interpret.
_VERBATIM_PROBE = "Az \"q\" 'r' <s> & {t} {{ u }} {% v %} \\n %s  [w](x) `y` *z* \u00e9 \u2013 \u6f22"


@dataclass(frozen=True)
class Template:
    """The text around the instruction, and the plain-data ranges in it."""

    before: str
    after: str
    plain_before: tuple[tuple[int, int], ...]
    plain_after: tuple[tuple[int, int], ...]


class Templates:
    """Renders the prompts of one predictor: what stands before and after the instruction, and how it is spelled.

    A word that occurs nowhere (`sentinel`) stands for the instruction, so that a prompt is rendered once per
    row and not once per row and instruction. `reference` is the template of a row of placeholders
    (`reference_inputs`), `joiner` what the adapter writes for a line break in an instruction.

    Raises `LayoutError` when the instruction cannot be found exactly once in the rendered prompt.
    """

    def __init__(self, encoder: PromptEncoder, adapter: Any, signature: Any, demos: Sequence[Any]) -> None:
        self._encoder, self._adapter, self._signature, self._demos = encoder, adapter, signature, list(demos)
        self._known: dict[str, Template] = {}
        self._spelled: dict[str, str] = {}
        self.sentinel = _unused_word(adapter, signature, self._demos)
        self._marked = signature.with_instructions(self.sentinel)
        self.reference_inputs = {
            name: dspy.History(messages=[]) if info.annotation is dspy.History else "x"
            for name, info in signature.input_fields.items()
        }
        self.reference = self._make(self.reference_inputs)
        self.joiner = self._spell_slowly(f"{self.sentinel}\n{self.sentinel}").replace(self.sentinel, "")
        self._verbatim = self._spell_slowly(_VERBATIM_PROBE) == _VERBATIM_PROBE

    def of(self, inputs: Mapping[str, Any]) -> Template:
        """The template of a row."""
        key = row_key(inputs)
        if key not in self._known:
            remember(self._known, key, self._make(inputs))
        return self._known[key]

    def spell(self, instruction: str) -> str:
        """The instruction as it stands in the rendered prompt: indented, and trimmed where templates trim.

        Raises `LayoutError` when it is empty, or changes other parts of the prompt.
        """
        one_line = self._verbatim and instruction.isprintable() and instruction == instruction.strip()
        if one_line and instruction:
            return instruction
        if instruction not in self._spelled:
            remember(self._spelled, instruction, self._spell_slowly(instruction))
        return self._spelled[instruction]

    def encode(
        self, template: Template, instruction: str, tail: RenderedText = _NOTHING
    ) -> tuple[EncodedText, Span, int]:
        """Tokenise a prompt, and a text after it, jointly.

        Also returned are the instruction's tokens, and the character at which `tail` starts.
        """
        spelled = self.spell(instruction)
        start, stop = len(template.before), len(template.before) + len(spelled)
        begin = stop + len(template.after)
        plain = [
            *template.plain_before,
            *((a + start, b + start) for a, b in self._encoder.special_ranges(spelled)),
            *((a + stop, b + stop) for a, b in template.plain_after),
            *((a + begin, b + begin) for a, b in tail.plain),
        ]
        text = template.before + spelled + template.after + tail.text
        encoded = self._encoder.encode(RenderedText(text, tuple(plain)))
        return encoded, covering(encoded.offsets, start, stop), begin

    def _make(self, inputs: Mapping[str, Any]) -> Template:
        rendered = self._render(self._marked, inputs)
        found = rendered.text.count(self.sentinel)
        if found != 1:
            raise LayoutError(
                f"The instruction occurs {found} times in the prompt that {type(self._adapter).__name__} and "
                "the chat template render, and it has to occur once. Use ChatAdapter, JSONAdapter or "
                "XMLAdapter, and a chat template that keeps the system message."
            )
        start = rendered.text.index(self.sentinel)
        stop = start + len(self.sentinel)
        return Template(
            rendered.text[:start],
            rendered.text[stop:],
            tuple(pair for pair in rendered.plain if pair[1] <= start),
            tuple((a - stop, b - stop) for a, b in rendered.plain if a >= stop),
        )

    def messages(self, instruction: str, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages that DSPy sends with this instruction and these inputs."""
        own = instruction == self._signature.instructions  # making a signature takes longer than the messages
        return self._format(self._signature if own else self._signature.with_instructions(instruction), inputs)

    def _format(self, signature: Any, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        # What was recorded of a conversation is a plain mapping, and adapters want the object.
        told = {
            name: dspy.History(**value)
            for name, value in inputs.items()
            if isinstance(value, Mapping)
            and name in signature.input_fields
            and signature.input_fields[name].annotation is dspy.History
        }
        return list(self._adapter.format(signature, self._demos, {**inputs, **told}))

    def _render(self, signature: Any, inputs: Mapping[str, Any]) -> RenderedText:
        messages = self._format(signature, inputs)
        for message in messages:
            if not isinstance(message.get("content"), str):
                raise LayoutError(
                    f"The {message.get('role')} message is not plain text (an image, a file or a tool call). "
                    "Use text fields in this predictor, or leave it out of the search."
                )
        return self._encoder.render(messages)

    def _spell_slowly(self, instruction: str) -> str:
        template = self.reference
        if not instruction.strip():
            raise LayoutError("The instruction is empty. Give the predictor's signature an instruction.")
        text = self._render(self._signature.with_instructions(instruction), self.reference_inputs).text
        stop = len(text) - len(template.after)
        if not text.startswith(template.before) or not text.endswith(template.after) or stop <= len(template.before):
            raise LayoutError(
                f"{type(self._adapter).__name__} or the chat template changes other parts of the prompt with "
                f"the instruction {instruction[:60]!r}. Use ChatAdapter, JSONAdapter or XMLAdapter."
            )
        return text[len(template.before) : stop]


def remember(cache: dict[str, Any], key: str, value: Any) -> None:
    """Keep a value in a cache that is emptied once it is full."""
    if len(cache) >= _CACHE_ENTRIES:
        cache.clear()
    cache[key] = value


def row_key(inputs: Mapping[str, Any]) -> str:
    """A text for the values of a row, the same only for rows that render alike."""
    # The type is part of the key: 1, 1.0 and True are equal and hash alike, but render differently.
    encode: Callable[[Any], str] = repr
    return json.dumps(
        [
            [name, type(value).__qualname__, value if type(value) is str else serialize_for_json(value)]
            for name, value in inputs.items()
        ],
        default=encode,
    )


def _unused_word(adapter: Any, signature: Any, demos: Sequence[Any]) -> str:
    text = repr((signature.instructions, signature.fields, demos, type(adapter).__name__))
    number = 7
    while f"Zq{number}instructionqZ" in text:
        number += 1
    return f"Zq{number}instructionqZ"
