"""A rendered, chat-templated DSPy prompt as token ids, with the spans that the search works on.

The tokens that are searched over are the tokens that will be deployed: the prompt is rendered by the
predictor's own adapter and the model's own chat template, tokenised as one text, and the instruction's
tokens are those that cover its characters. Tokenising the instruction on its own gives other tokens: its
first one usually takes in the last blank of the adapter's indentation.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy.adapters.utils import serialize_for_json

from dspy_greater.assistant import assistant_text
from dspy_greater.encode import EncodedText, PromptEncoder, RenderedText
from dspy_greater.errors import LayoutError
from dspy_greater.legal import LegalText
from dspy_greater.spans import Prompt, Span, Supervised, covering

__all__ = ["Layout", "Prompt", "Span", "Supervised"]

_CACHE_ENTRIES = 4096
# Everything an adapter or a chat template might escape, collapse or interpret.
_VERBATIM_PROBE = "Az \"q\" 'r' <s> & {t} {{ u }} {% v %} \\n %s  [w](x) `y` *z* \u00e9 \u2013 \u6f22"


@dataclass(frozen=True)
class _Frame:
    """The text around the instruction, and the plain-data ranges in it."""

    before: str
    after: str
    plain_before: tuple[tuple[int, int], ...]
    plain_after: tuple[tuple[int, int], ...]


class Layout:
    """Maps one predictor's prompts to token ids: which tokens are the instruction, reasoning and answer.

    Arguments: the model's tokenizer, the DSPy adapter and signature of the predictor, its
    demonstrations, and optionally the text between reasoning and gold value (`extractor`, by default the
    adapter's header of the answer field). None of them is changed.

    Special tokens that occur in the data are tokenised as plain text, with one warning; send prompts to
    the model with `PromptEncoder.chat_ids` and it sees the same tokens.

    Raises `LayoutError` when the instruction cannot be found exactly once in the rendered prompt.

    ```python
    layout = Layout(tokenizer, dspy.ChatAdapter(), dspy.Signature("question -> reasoning, answer"))
    prompt = layout.prompt("Think step by step.", {"question": "2 + 2?"})
    ids = layout.instruction_ids("Think step by step.")
    layout.replace(ids, 1, new_token)  # (canonical ids, new instruction), or None
    ```
    """

    def __init__(
        self,
        tokenizer: Any,
        adapter: Any,
        signature: Any,
        *,
        demos: Sequence[Any] = (),
        extractor: str | None = None,
    ) -> None:
        self.encoder = PromptEncoder(tokenizer)
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.signature = signature
        self.demos = list(demos)
        self.extractor = extractor
        self._legal = LegalText(self.encoder, signature)
        self._frames: dict[str, _Frame] = {}
        self._spelled: dict[str, str] = {}
        self._ids: dict[str, tuple[int, ...]] = {}
        self._sentinel = _unused_word(adapter, signature, self.demos)
        self._marked = signature.with_instructions(self._sentinel)
        self._reference_inputs = dict.fromkeys(signature.input_fields, "x")
        self._reference = self._make_frame(self._reference_inputs)
        self._joiner = self._spell_slowly(f"{self._sentinel}\n{self._sentinel}").replace(self._sentinel, "")
        self._verbatim = self._spell_slowly(_VERBATIM_PROBE) == _VERBATIM_PROBE

    # ------------------------------------------------------------------ prompts

    def prompt(self, instruction: str, inputs: Mapping[str, Any]) -> Prompt:
        """The prompt that DSPy would send with this instruction and these inputs.

        Raises `LayoutError` when the instruction's tokens differ from those in other prompts.
        """
        encoded, span, _ = self._encode(self._frame(inputs), self._spell(instruction), RenderedText(""))
        self._require_same_ids(instruction, encoded.token_ids, span)
        return Prompt(encoded.token_ids, span)

    def supervised(
        self,
        instruction: str,
        inputs: Mapping[str, Any],
        written: Mapping[str, object],
        field: str,
        gold: object,
        *,
        preamble: str = "",
    ) -> Supervised:
        """The prompt followed by the assistant's text up to the end of the gold value of `field`.

        `written` maps the output fields before `field` to what the model wrote for them; `preamble` is
        what it wrote before its first field (a native `<think>` block), counted as reasoning.

        Raises `LayoutError` or `DataError`, see `assistant_text`.
        """
        content = assistant_text(self.adapter, self.signature, written, field, gold, self.extractor)
        text = preamble + content.text
        tail = RenderedText(text, self.encoder.special_ranges(text))
        encoded, span, begin = self._encode(self._frame(inputs), self._spell(instruction), tail)
        self._require_same_ids(instruction, encoded.token_ids, span)
        starts = [start for start, _ in encoded.offsets]
        stops = [stop for _, stop in encoded.offsets]
        header = begin + len(preamble) + content.header
        gold_start = begin + len(preamble) + content.gold
        first = next(i for i, stop in enumerate(stops) if stop > begin)
        # A token that straddles the end of the reasoning (".\n\n") is the model's way to end it.
        reasoning_stop = next((i for i in range(first, len(starts)) if starts[i] >= header), len(starts))
        answer = next(i for i, stop in enumerate(stops) if stop > gold_start)
        reasoning = Span(first, min(reasoning_stop, answer)) if header > begin else Span(first, first)
        return Supervised(encoded.token_ids, span, reasoning, Span(answer, len(starts)))

    def proposal_prefix(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of a user's turn, left open, that holds the inputs and waits for an instruction.

        This is the paper's layout (input first, prompt after it), in which the next tokens that the
        model proposes for the instruction depend on the input.
        """
        content = self.adapter.format_user_message_content(self.signature, dict(inputs), main_request=False)
        messages = [{"role": "user", "content": f"{content}\n\n{self._sentinel}"}]
        rendered = self.encoder.render(messages, add_generation_prompt=False)
        if rendered.text.count(self._sentinel) != 1:
            raise LayoutError(
                "The chat template does not keep a user's message as it is, so the inputs cannot be put "
                "before the instruction. Check tokenizer.chat_template."
            )
        return self.encoder.encode(_cut(rendered, rendered.text.index(self._sentinel))).token_ids

    def longest(self, inputs_list: Sequence[Mapping[str, Any]], instruction: str) -> tuple[int, int]:
        """Index of the inputs with the longest prompt, and its length in tokens.

        Raises `LayoutError` when there are no inputs.
        """
        if not inputs_list:
            raise LayoutError("There are no inputs to measure. Pass at least one row.")
        lengths = [len(self.prompt(instruction, inputs).token_ids) for inputs in inputs_list]
        index = max(range(len(lengths)), key=lengths.__getitem__)
        return index, lengths[index]

    # -------------------------------------------------------------- instructions

    def instruction_ids(self, instruction: str) -> tuple[int, ...]:
        """The token ids that cover the instruction, the same in every prompt.

        Raises `LayoutError` when the instruction is empty or only blanks.
        """
        if instruction not in self._ids:
            encoded, span, _ = self._encode(self._reference, self._spell(instruction), RenderedText(""))
            _remember(self._ids, instruction, encoded.token_ids[span.start : span.stop])
        return self._ids[instruction]

    def text_of(self, ids: Sequence[int]) -> str:
        """The instruction that these ids deploy.

        Raises `LayoutError` when no instruction is tokenised to them.
        """
        found = self._resolve(tuple(ids), frozenset())
        if found is None:
            raise LayoutError(
                f"No instruction is tokenised to the {len(ids)} ids {list(ids)[:8]}: they do not survive "
                "decoding, rendering and tokenising. Use ids from instruction_ids, replace or append."
            )
        return found[1]

    def positions(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The positions that may be edited: all but line breaks and the indentation after them."""
        return self._legal.positions(tuple(ids))

    def replace(self, ids: Sequence[int], position: int, token: int) -> tuple[tuple[int, ...], str] | None:
        """The instruction with `token` at `position`: its ids and text, or None when it is not legal.

        A candidate is legal when writing its text into the signature, rendering and tokenising gives the
        same ids: the length and all other positions unchanged. At both ends the token may take in the
        blanks around the instruction, so that there the id of "Think" comes back as that of " Think".
        """
        old = tuple(ids)
        if position not in self.positions(old):
            return None
        return self._edit(old, position, (*old[:position], token, *old[position + 1 :]), token)

    def append(self, ids: Sequence[int], token: int) -> tuple[tuple[int, ...], str] | None:
        """The instruction with one token more at its end, under the contract of `replace`."""
        return self.insert(ids, len(ids), token)

    def insert(self, ids: Sequence[int], position: int, token: int) -> tuple[tuple[int, ...], str] | None:
        """The instruction with `token` before `position`, under the contract of `replace`."""
        old = tuple(ids)
        return self._edit(old, position, (*old[:position], token, *old[position:]), token)

    def delete(self, ids: Sequence[int], position: int) -> tuple[tuple[int, ...], str] | None:
        """The instruction without the token at `position`, under the contract of `replace`."""
        old = tuple(ids)
        return self._edit(old, position, (*old[:position], *old[position + 1 :]), None)

    # ------------------------------------------------------------------ internals

    def _edit(
        self, old: tuple[int, ...], position: int, new: tuple[int, ...], token: int | None
    ) -> tuple[tuple[int, ...], str] | None:
        editable = self.positions(old)
        appending = position == len(old) and len(new) == len(old) + 1
        if not new or not (appending or position in editable):
            return None
        if token is not None and not self._legal.token(token):
            return None
        # Only the tokens at both ends can take in characters around the instruction.
        free = {position} & {0, len(new) - 1}
        if appending or (token is None and position == len(old) - 1):
            free.add(position - 1)
        found = self._resolve(new, frozenset(free))
        if found is None or not self._legal.no_worse(found[1], self.text_of(old)):
            return None
        return found

    def _resolve(self, ids: tuple[int, ...], free: frozenset[int]) -> tuple[tuple[int, ...], str] | None:
        """Canonical ids and text; they may differ from `ids` at the `free` positions only."""
        for text in self._readings(self.encoder.decode(ids)):
            if not text or inspect.cleandoc(text) != text:
                continue
            canonical = self.instruction_ids(text)
            if len(canonical) == len(ids) and all(
                a == b or i in free for i, (a, b) in enumerate(zip(canonical, ids, strict=True))
            ):
                return canonical, text
        return None

    def _readings(self, decoded: str) -> list[str]:
        """The instructions that a decoded span may stand for: its ends may carry text from around it."""
        before, after = self._reference.before, self._reference.after
        core = decoded.strip()
        lefts = [k for k in range(1, min(len(core), 16)) if before.rstrip().endswith(core[:k])]
        rights = [k for k in range(1, min(len(core), 16)) if after.lstrip().startswith(core[-k:])]
        pairs = [(0, 0), *((k, 0) for k in lefts), *((0, k) for k in rights)]
        texts = [core[left : len(core) - right].strip() for left, right in pairs]
        if decoded.endswith(" "):
            texts.append(decoded.lstrip())  # DSPy keeps blanks at the end of a seed, and some templates too
        if "\n" not in self._joiner:
            return texts
        return [text.replace(self._joiner, "\n") for text in texts]

    def _frame(self, inputs: Mapping[str, Any]) -> _Frame:
        key = _inputs_key(inputs)
        if key not in self._frames:
            _remember(self._frames, key, self._make_frame(inputs))
        return self._frames[key]

    def _make_frame(self, inputs: Mapping[str, Any]) -> _Frame:
        rendered = self._render(self._marked, inputs)
        found = rendered.text.count(self._sentinel)
        if found != 1:
            raise LayoutError(
                f"The instruction occurs {found} times in the prompt that {type(self.adapter).__name__} and "
                "the chat template render, and it has to occur once. Use ChatAdapter, JSONAdapter or "
                "XMLAdapter, and a chat template that keeps the system message."
            )
        start = rendered.text.index(self._sentinel)
        stop = start + len(self._sentinel)
        return _Frame(
            rendered.text[:start],
            rendered.text[stop:],
            tuple(pair for pair in rendered.plain if pair[1] <= start),
            tuple((a - stop, b - stop) for a, b in rendered.plain if a >= stop),
        )

    def _render(self, signature: Any, inputs: Mapping[str, Any]) -> RenderedText:
        messages = self.adapter.format(signature, self.demos, dict(inputs))
        for message in messages:
            if not isinstance(message.get("content"), str):
                raise LayoutError(
                    f"The {message.get('role')} message is not plain text (an image, a file or a tool call). "
                    "Use text fields in this predictor, or leave it out of the search."
                )
        return self.encoder.render(messages)

    def _spell(self, instruction: str) -> str:
        """The instruction as it stands in the rendered prompt: indented, and trimmed where templates trim."""
        one_line = self._verbatim and instruction.isprintable() and instruction == instruction.strip()
        if one_line and instruction:
            return instruction
        if instruction not in self._spelled:
            _remember(self._spelled, instruction, self._spell_slowly(instruction))
        return self._spelled[instruction]

    def _spell_slowly(self, instruction: str) -> str:
        frame = self._reference
        if not instruction.strip():
            raise LayoutError("The instruction is empty. Give the predictor's signature an instruction.")
        text = self._render(self.signature.with_instructions(instruction), self._reference_inputs).text
        stop = len(text) - len(frame.after)
        if not text.startswith(frame.before) or not text.endswith(frame.after) or stop <= len(frame.before):
            raise LayoutError(
                f"{type(self.adapter).__name__} or the chat template changes other parts of the prompt with "
                f"the instruction {instruction[:60]!r}. Use ChatAdapter, JSONAdapter or XMLAdapter."
            )
        return text[len(frame.before) : stop]

    def _encode(self, frame: _Frame, spelled: str, tail: RenderedText) -> tuple[EncodedText, Span, int]:
        """Tokenise a prompt jointly; also the instruction's span and the character the tail starts at."""
        start, stop = len(frame.before), len(frame.before) + len(spelled)
        begin = stop + len(frame.after)
        plain = [
            *frame.plain_before,
            *((a + start, b + start) for a, b in self.encoder.special_ranges(spelled)),
            *((a + stop, b + stop) for a, b in frame.plain_after),
            *((a + begin, b + begin) for a, b in tail.plain),
        ]
        text = frame.before + spelled + frame.after + tail.text
        encoded = self.encoder.encode(RenderedText(text, tuple(plain)))
        return encoded, covering(encoded.offsets, start, stop), begin

    def _require_same_ids(self, instruction: str, token_ids: tuple[int, ...], span: Span) -> None:
        if token_ids[span.start : span.stop] != self.instruction_ids(instruction):
            raise LayoutError(
                f"The instruction {instruction[:60]!r} is tokenised differently in different prompts: the "
                "tokenizer merges text of the row into its last token. End the instruction with a full stop, "
                "or use a chat template that closes the system message."
            )


def _cut(rendered: RenderedText, stop: int) -> RenderedText:
    return RenderedText(rendered.text[:stop], tuple(pair for pair in rendered.plain if pair[1] <= stop))


def _remember(cache: dict[str, Any], key: str, value: Any) -> None:
    if len(cache) >= _CACHE_ENTRIES:
        cache.clear()
    cache[key] = value


def _inputs_key(inputs: Mapping[str, Any]) -> str:
    # The type is part of the key: 1, 1.0 and True are equal and hash alike, but render differently.
    encode: Callable[[Any], str] = repr
    return json.dumps(
        [[name, type(value).__qualname__, serialize_for_json(value)] for name, value in inputs.items()],
        default=encode,
    )


def _unused_word(adapter: Any, signature: Any, demos: Sequence[Any]) -> str:
    text = repr((signature.instructions, signature.fields, demos, type(adapter).__name__))
    number = 7
    while f"Zq{number}instructionqZ" in text:
        number += 1
    return f"Zq{number}instructionqZ"
