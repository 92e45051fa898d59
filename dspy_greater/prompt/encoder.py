"""Chat messages to text to token ids, with special tokens inside the data kept as plain text.

A chat template marks turns with special tokens such as `<|eot_id|>`. The same characters inside a
message are data, and must not end a turn. What the *template* writes is therefore tokenised as usual,
and what a *message* contains never becomes a special token. Whoever sends prompts to the model and
whoever scores them has to agree on this, so both go through `PromptEncoder`.

Nothing here imports dspy, torch or transformers; the tokenizer is the object that is passed in.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy_greater.errors import LayoutError
from dspy_greater.notices import warn_caller
from dspy_greater.prompt.chat_template import content_text, render_chat

_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF8FF)]


@dataclass(frozen=True)
class RenderedText:
    """A chat-templated text and the character ranges `[start, stop)` in it that are plain data."""

    text: str
    plain: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class EncodedText:
    """Token ids, and for each the characters `[start, stop)` of the text that it covers."""

    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class PromptEncoder:
    """Renders chat messages with a tokenizer's template and tokenises the result.

    Raises `LayoutError` when the tokenizer cannot report character offsets or has no chat template.

    ```python
    encoder = PromptEncoder(tokenizer)
    token_ids = encoder.chat_ids([{"role": "user", "content": "What does <|eot_id|> mean?"}])
    ```
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise LayoutError(
                f"{type(tokenizer).__name__} cannot report which characters a token covers. "
                "Load the tokenizer with AutoTokenizer and the `tokenizers` backend (use_fast=True)."
            )
        if not getattr(tokenizer, "chat_template", None):
            raise LayoutError(
                f"{type(tokenizer).__name__} has no chat template, so a DSPy prompt cannot be rendered. "
                "Use the instruction-tuned model, or set tokenizer.chat_template."
            )
        self.tokenizer = tokenizer
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if getattr(token, "special", False))
        self.added_ids = frozenset(added) | frozenset(tokenizer.all_special_ids)
        self.special_texts = tuple(sorted((str(added[i]) for i in self.special_ids), key=len, reverse=True))
        # Tokens of the model's own that are no special ones, such as the tags of its thoughts and its calls of tools.
        self.markup = frozenset(text for text in map(str, added.values()) if text[:1] in ("<", "["))
        alternatives = "|".join(re.escape(text) for text in self.special_texts)
        self._pattern = re.compile(alternatives) if alternatives else None
        self._plain_tokenizer: Any = None
        self._anchor: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._anchor_text = self._decode(self._anchor)
        self._lock = threading.Lock()
        self._warned = False

    def decode(self, token_ids: Sequence[int]) -> str:
        """The characters of these tokens as they stand in the middle of a text.

        Decoders of the SentencePiece kind drop blanks at the beginning of what they are given, so the tokens
        are decoded after a letter.
        """
        text = self._decode([*self._anchor, *token_ids])
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._decode(list(token_ids))

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def special_ranges(self, text: str) -> tuple[tuple[int, int], ...]:
        """Character ranges in `text` that spell a special token."""
        return tuple(match.span() for match in self._pattern.finditer(text)) if self._pattern else ()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> RenderedText:
        """Apply the chat template; special tokens spelt out in a message are reported in `plain`."""
        pattern = self._pattern
        texts = [content_text(message.get("content")) for message in messages]
        contents = "".join(texts)
        if pattern is None or not pattern.search(contents):
            text = render_chat(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)
            return RenderedText(text)
        self._warn_once(contents)
        # A template must not see the special tokens as markup, and we must find them again in its output.
        mark = next(char for char in _PRIVATE_USE if char not in contents)
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{mark}{len(hidden) - 1}{mark}"

        masked = [
            {**message, "content": pattern.sub(hide, text)} for message, text in zip(messages, texts, strict=True)
        ]
        text = render_chat(self.tokenizer, masked, add_generation_prompt=add_generation_prompt)
        return _reveal(text, mark, hidden)

    def encode(self, rendered: RenderedText) -> EncodedText:
        """Tokenise jointly, without adding BOS or EOS; ranges in `plain` never become special tokens."""
        encoded = _encode(self.tokenizer, rendered.text)
        if not rendered.plain:
            return encoded
        intruders = {
            index
            for index, (token_id, (start, stop)) in enumerate(zip(*_pair(encoded), strict=True))
            if token_id in self.special_ids and any(start < b and a < stop for a, b in rendered.plain)
        }
        return self._replace_intruders(rendered.text, encoded, intruders) if intruders else encoded

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of a chat prompt, as the model that serves it must be given them."""
        return self.encode(self.render(messages)).token_ids

    def _replace_intruders(self, text: str, encoded: EncodedText, intruders: set[int]) -> EncodedText:
        """Re-encode as plain text each stretch between two of the template's own special tokens."""
        ids, offsets = _pair(encoded)
        walls = [i for i, token in enumerate(ids) if token in self.special_ids and i not in intruders]
        new_ids: list[int] = []
        new_offsets: list[tuple[int, int]] = []
        first = 0
        for wall in [*walls, len(ids)]:
            if any(first <= i < wall for i in intruders):
                begin = offsets[first - 1][1] if first else 0
                end = offsets[wall][0] if wall < len(ids) else len(text)
                piece = self._encode_plain(text[begin:end])
                new_ids.extend(piece.token_ids)
                new_offsets.extend((a + begin, b + begin) for a, b in piece.offsets)
            else:
                new_ids.extend(ids[first:wall])
                new_offsets.extend(offsets[first:wall])
            new_ids.extend(ids[wall : wall + 1])
            new_offsets.extend(offsets[wall : wall + 1])
            first = wall + 1
        return EncodedText(tuple(new_ids), tuple(new_offsets))

    def _encode_plain(self, text: str) -> EncodedText:
        # `split_special_tokens` is state of the tokenizer's backend, shared by all its callers: use a copy.
        with self._lock:
            if self._plain_tokenizer is None:
                self._plain_tokenizer = copy.deepcopy(self.tokenizer)
            return _encode(self._plain_tokenizer, text, split_special_tokens=True)

    def _warn_once(self, contents: str) -> None:
        if self._warned or self._pattern is None:
            return
        self._warned = True
        found = sorted({match.group() for match in self._pattern.finditer(contents)})
        warn_caller(
            f"The data contains the special tokens {', '.join(found)}; they are tokenised as plain text. "
            "A server that parses special tokens inside messages sees a different prompt.",
        )


def _reveal(text: str, mark: str, hidden: list[str]) -> RenderedText:
    """Put the hidden special tokens back and say where they are."""
    pieces: list[str] = []
    plain: list[tuple[int, int]] = []
    length = last = 0
    for match in re.finditer(f"{mark}([0-9]+){mark}", text):
        before, special = text[last : match.start()], hidden[int(match.group(1))]
        length += len(before)
        plain.append((length, length + len(special)))
        length += len(special)
        pieces += [before, special]
        last = match.end()
    return RenderedText("".join([*pieces, text[last:]]), tuple(plain))


def _encode(tokenizer: Any, text: str, **options: Any) -> EncodedText:
    output = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, **options
    )
    return EncodedText(tuple(output["input_ids"]), tuple(output["offset_mapping"]))


def _pair(encoded: EncodedText) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    return encoded.token_ids, encoded.offsets
